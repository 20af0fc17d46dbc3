"""Calibration: which tokens, in which order, and the statistics of a block's inputs over them.

The stream owns the hidden states between blocks. It hooks nothing: the decoder hands its linears' inputs to a tap.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit import fs
from quantkit.arch.spec import ModelSpec
from quantkit.errors import InputError
from quantkit.model.decoder import Batch, Block
from quantkit.ops.dtypes import as_bytes
from quantkit.quantizers.base import InputStats
from quantkit.text.builtin import builtin_text
from quantkit.text.tokenizer import Tokenizer

MAX_TEXT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class CalibrationTokens:
    """``tokens [samples, seq_len]`` int64, and what they came from (shown and stored; never a path)."""

    tokens: Tensor
    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens: what a resumed run compares."""
        return hashlib.sha256(as_bytes(self.tokens)).hexdigest()


def read_text(path: Path) -> str:
    """The text of a ``.txt`` file, or the ``text`` fields of a ``.jsonl`` file joined by blank lines.

    Raises InputError for a file that cannot be read, is too large, is not UTF-8, or has a line without a ``text`` string.
    """
    try:
        raw = fs.read_bytes(path, MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InputError(str(path), f"is not UTF-8 at byte {exc.start}", "UTF-8 text") from exc
    if path.suffix != ".jsonl":
        return raw
    texts = []
    for number, line in enumerate(raw.split("\n"), 1):  # splitlines would also split at the separators that JSON leaves in strings
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise InputError(f"{path}:{number}", "is not JSON", 'one object per line, such as {"text": "..."}') from exc
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str) or any("\ud800" <= char <= "\udfff" for char in text):
            raise InputError(f"{path}:{number}", "has no text", 'a "text" string of Unicode characters in each object')
        texts.append(text)
    return "\n\n".join(texts)


def cut_windows(ids: Sequence[int], samples: int, seq_len: int, bos: int | None, where: str) -> Tensor:
    """``samples`` windows spread evenly over ``ids``, each ``seq_len`` tokens with ``bos`` first when given: [samples, seq_len].

    Raises InputError when the text is too short for that many windows that do not overlap.
    """
    body = seq_len - (bos is not None)
    if body < 1:
        raise InputError("--seq-len", f"is {seq_len}", "at least 2")
    count = len(ids) // body
    if count < samples:
        raise InputError(
            where,
            f"has {len(ids)} tokens, enough for {count} windows of {seq_len}",
            f"{samples} windows",
            "use fewer --samples or a shorter --seq-len",
        )
    flat = torch.tensor(list(ids), dtype=torch.int64)
    starts = [(index * count // samples) * body for index in range(samples)]
    windows = torch.stack([flat[start : start + body] for start in starts])
    return windows if bos is None else torch.cat([torch.full((samples, 1), bos, dtype=torch.int64), windows], 1)


def window_bos(tokenizer: Tokenizer) -> int | None:
    """The BOS token that the tokenizer itself puts before a text, or None when it puts none."""
    ids = tokenizer.encode("a", special=True)
    return ids[0] if tokenizer.bos_id is not None and ids and ids[0] == tokenizer.bos_id else None


def text_tokens(tokenizer: Tokenizer, source: str, samples: int, seq_len: int) -> CalibrationTokens:
    """Calibration tokens from ``builtin`` or from a text or JSONL file. Raises InputError when it is too short."""
    if source == "builtin":
        text, label = builtin_text("calibration"), "builtin"
    else:
        text = read_text(Path(source))
        label = f"text sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    ids = tokenizer.encode(text, special=False)
    return CalibrationTokens(cut_windows(ids, samples, seq_len, window_bos(tokenizer), f"calibration text ({source})"), label)


def input_roles(spec: ModelSpec) -> dict[str, str]:
    """Linear role -> the role whose input it shares: the first target of its scale group, else itself."""
    shared = {role: group.targets[0] for group in spec.architecture.scale_groups for role in group.targets}
    return {role: shared.get(role, role) for role in spec.linears}


def peak_of(values: Tensor) -> float:
    """The greatest magnitude, without a copy of ``values``; NaN when one of them is."""
    low, high = torch.aminmax(values)
    return float(torch.maximum(high, -low))


GRAM_PANEL = 256
"""Columns of a Gram matrix that are summed at a time."""


class StatsCollector:
    """Sums the statistics of a block's inputs, tile by tile in a fixed order."""

    def __init__(self, roles: Mapping[str, str]) -> None:
        self._roles = roles
        self._gram: dict[str, Tensor] = {}
        self._abs: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._peak: dict[str, float] = {}

    def tap(self, role: str, x: Tensor) -> None:
        """Add one tile: ``x [T, K]`` is the input of the linear ``role``."""
        if self._roles[role] != role:
            return
        tile = x.float()
        if role not in self._gram:
            k = tile.shape[1]
            self._gram[role], self._abs[role] = tile.new_zeros(k, k), tile.new_zeros(k)
            self._tokens[role], self._peak[role] = 0, 0.0
        gram = self._gram[role]
        for first in range(0, tile.shape[1], GRAM_PANEL):  # X^T X is symmetric: the other half is mirrored when it is asked for
            panel = slice(first, first + GRAM_PANEL)
            gram[panel, first:].addmm_(tile[:, panel].T, tile[:, first:])
        self._abs[role] += tile.abs().sum(0)
        self._tokens[role] += tile.shape[0]
        self._peak[role] = max(self._peak[role], peak_of(tile))

    def stats(self) -> dict[str, InputStats]:
        """The statistics by linear role; roles that share an input share the object."""
        grams = {role: gram.triu() + gram.triu(1).T for role, gram in self._gram.items()}
        own = {role: InputStats(gram, self._abs[role], self._tokens[role], self._peak[role]) for role, gram in grams.items()}
        return {role: own[first] for role, first in self._roles.items()}


class CalibrationStream:
    """The hidden states at the current block: ``[samples, seq_len, hidden]``, in the compute dtype."""

    def __init__(self, hidden: Tensor, tile_samples: int) -> None:
        self.hidden = hidden
        self.tile_samples = max(1, tile_samples)
        self.peak = peak_of(hidden)

    def carry(self) -> memoryview:
        """The hidden states as bytes, for the resume point."""
        return as_bytes(self.hidden)

    def restore(self, carry: bytes) -> None:
        """Continue from the bytes of an earlier run. Raises InputError when they are not of this shape."""
        want = self.hidden.numel() * self.hidden.element_size()
        if len(carry) != want:
            raise InputError("resume point", f"holds {len(carry)} bytes of activations", f"{want}", "start again with --overwrite")
        flat = torch.from_numpy(np.frombuffer(carry, dtype=np.uint8).copy())
        self.hidden = flat.view(self.hidden.dtype).reshape(self.hidden.shape)

    def advance(self, block: Block, collector: StatsCollector, device: str) -> None:
        """Run ``block`` (on ``device``) over every tile: the collector sees its inputs, the hidden states become its outputs.

        The states of the whole calibration stay on the host; one tile at a time is on the device.
        Raises InputError when an activation is not finite.
        """
        samples, length, width = self.hidden.shape
        for start in range(0, samples, self.tile_samples):
            tile = self.hidden[start : start + self.tile_samples]
            count = tile.shape[0]
            positions = torch.arange(length, device=device).repeat(count)
            batch = Batch(positions=positions, lengths=(length,) * count, sequences=None)
            out = block.forward(tile.reshape(-1, width).to(device), batch, None, collector.tap)
            self.hidden[start : start + count] = out.reshape(tile.shape)
        self.peak = peak_of(self.hidden)
        if not math.isfinite(self.peak):
            raise InputError(
                f"block {block.layer}", "its activations on the calibration text are not finite", "a model that runs in float32"
            )
