"""Perplexity of a model over a text, by windows; the convention is part of the result.

Knows a decoder and tokens; knows nothing of files or quantization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    if window < 2 or not 1 <= stride <= window:
        raise InputError(
            "--window/--stride", f"window {window}, stride {stride}", "a window of 2 or more and a stride from 1 to the window"
        )
    windows = _windows(ids, window, stride, bos)
    if not windows:
        raise InputError("text", f"has {len(ids)} tokens", "at least 2")
    per_batch = max(1, BATCH_TOKENS // window)
    total = squares = 0.0
    scored = 0
    for start in range(0, len(windows), per_batch):
        progress(stage, start, len(windows))
        group = windows[start : start + per_batch]
        tokens = torch.tensor([token for part, _ in group for token in part])
        lengths = tuple(len(part) for part, _ in group)
        positions = torch.cat([torch.arange(length) for length in lengths])
        hidden = decoder.forward(tokens, Batch(positions=positions, lengths=lengths, sequences=None))
        rows, targets = _scored_rows(group, lengths)
        for low in range(0, rows.numel(), LOGIT_ROWS):
            logits = decoder.logits(hidden[rows[low : low + LOGIT_ROWS]])
            wanted = targets[low : low + LOGIT_ROWS].to(logits.device)
            nll = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double()
            total += float(nll.sum())
            squares += float((nll * nll).sum())
        scored += int(rows.numel())
    progress(stage, len(windows), len(windows))
    mean = total / scored
    if not math.isfinite(mean):
        raise InputError("perplexity", "the model's logits are not finite", "a model that runs in this dtype", "try --dtype float32")
    value = math.exp(mean) if mean < 700 else math.inf
    error = value * math.sqrt(max(squares / scored - mean * mean, 0.0) / max(scored - 1, 1))
    return Perplexity(value, error, scored, len(ids), window, stride, bos is not None)


def _scored_rows(group: Sequence[tuple[list[int], int]], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row of the hidden states that predicts each scored token, and that token."""
    rows, targets, base = list[int](), list[int](), 0
    for (part, first), length in zip(group, lengths, strict=True):
        rows += range(base + first - 1, base + length - 1)
        targets += part[first:]
        base += length
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
