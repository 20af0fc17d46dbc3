"""Perplexity of a model over a text, by windows; the convention is part of the result.

Knows a decoder and tokens; knows nothing of files or quantization.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.model.decoder import Batch, Decoder
from quantkit.progress import Progress, silent

BATCH_TOKENS = 4096
LOGIT_ROWS = 512
"""Rows of logits at a time: a vocabulary of 262,144 makes 512 MiB of float32."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """``value`` = exp(mean negative log-likelihood) over ``scored`` tokens; ``error`` is its standard error."""

    value: float
    error: float
    scored: int
    tokens: int
    window: int
    stride: int
    bos: bool

    @property
    def convention(self) -> str:
        """How the figure was made, in words."""
        start = "BOS first in each window, " if self.bos else ""
        overlap = "windows do not overlap" if self.stride == self.window else "only new tokens scored"
        return f"window {self.window}, stride {self.stride}, {start}{overlap}, {self.scored} tokens scored"


def _windows(ids: Sequence[int], window: int, stride: int, bos: int | None) -> list[tuple[list[int], int]]:
    """Each window's tokens, and the first position in it whose token is scored."""
    body = window - (bos is not None)
    step = stride - (bos is not None) if stride == window else stride
    out: list[tuple[list[int], int]] = []
    covered = 0
    for start in range(0, len(ids), step):
        part = list(ids[start : start + body])
        if len(part) < body and out and stride == window:
            break  # the tail of a text cut into whole windows is dropped, as every published protocol does
        shift = 0 if bos is None else 1
        first = max(covered - start + shift, 1)
        if first < len(part) + shift:
            out.append(([bos, *part] if bos is not None else part, first))
        covered = start + len(part)
        if covered >= len(ids):
            break
    return out


def windows_of(ids: Sequence[int], window: int, stride: int, bos: int | None) -> list[tuple[list[int], int]]:
    """The windows of a text: the tokens of each, and the first position in it whose token is scored.

    Raises InputError for a window or stride that cannot be used or a text shorter than two tokens.
    """
    if window < 2 or not 1 <= stride <= window:
        raise InputError(
            "--window/--stride", f"window {window}, stride {stride}", "a window of 2 or more and a stride from 1 to the window"
        )
    windows = _windows(ids, window, stride, bos)
    if not windows:
        raise InputError("text", f"has {len(ids)} tokens", "at least 2")
    return windows


def scored_logits(decoder: Decoder, group: Sequence[tuple[list[int], int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits ``[rows, vocab]`` float32 that predict the scored tokens of some windows, and those tokens ``[rows]``, on their device."""
    tokens = torch.tensor([token for part, _ in group for token in part])
    lengths = tuple(len(part) for part, _ in group)
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = decoder.forward(tokens, Batch(positions=positions, lengths=lengths, sequences=None))
    rows, targets = _scored_rows(group, lengths)
    for low in range(0, rows.numel(), LOGIT_ROWS):
        logits = decoder.logits(hidden[rows[low : low + LOGIT_ROWS]])
        yield logits, targets[low : low + LOGIT_ROWS].to(logits.device)


def groups_of(windows: Sequence[tuple[list[int], int]], window: int) -> Iterator[Sequence[tuple[list[int], int]]]:
    """The windows that go through a model at once."""
    per_batch = max(1, BATCH_TOKENS // window)
    for start in range(0, len(windows), per_batch):
        yield windows[start : start + per_batch]


@dataclass(slots=True)
class LikelihoodSums:
    """Sums over scored tokens in float64, from which a perplexity is made."""

    total: float = 0.0
    squares: float = 0.0
    scored: int = 0

    def add(self, nll: Tensor) -> None:
        """Count the negative log-likelihoods of some tokens."""
        wide = nll.double()
        self.total += float(wide.sum())
        self.squares += float((wide * wide).sum())
        self.scored += wide.numel()

    def perplexity(self, tokens: int, window: int, stride: int, bos: bool) -> Perplexity:
        """Raises InputError where the model's logits were not finite."""
        mean = self.total / self.scored
        if not math.isfinite(mean):
            raise InputError("perplexity", "the model's logits are not finite", "a model that runs in this dtype", "try --dtype float32")
        value = math.exp(mean) if mean < 700 else math.inf
        error = value * math.sqrt(max(self.squares / self.scored - mean * mean, 0.0) / max(self.scored - 1, 1))
        return Perplexity(value, error, self.scored, tokens, window, stride, bos)


@torch.inference_mode()
def perplexity(
    decoder: Decoder,
    ids: Sequence[int],
    *,
    window: int,
    stride: int,
    bos: int | None = None,
    progress: Progress = silent,
    stage: str = "perplexity",
) -> Perplexity:
    """Perplexity of ``ids`` under ``decoder``.

    Windows of ``window`` tokens every ``stride``; every token of a window after its first that no earlier window scored
    counts once. With ``bos`` each window starts with it. Negative log-likelihoods are summed in float64.
    Raises InputError for a window or stride that cannot be used or a text shorter than two tokens.
    """
    windows = windows_of(ids, window, stride, bos)
    sums, done = LikelihoodSums(), 0
    for group in groups_of(windows, window):
        progress(stage, done, len(windows))
        for logits, wanted in scored_logits(decoder, group):
            sums.add(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        done += len(group)
    progress(stage, done, len(windows))
    return sums.perplexity(len(ids), window, stride, bos is not None)


def _scored_rows(group: Sequence[tuple[list[int], int]], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row of the hidden states that predicts each scored token, and that token."""
    rows, targets, base = list[int](), list[int](), 0
    for (part, first), length in zip(group, lengths, strict=True):
        rows += range(base + first - 1, base + length - 1)
        targets += part[first:]
        base += length
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
