"""Calibration: which tokens, in which order, and the statistics of a block's inputs over them.

The stream owns the hidden states between blocks. It hooks nothing: the decoder hands its linears' inputs to a tap.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quantkit import fs
from quantkit.arch.spec import ModelSpec
from quantkit.errors import InputError
from quantkit.model.decoder import Batch, Block
from quantkit.ops.dtypes import as_bytes
from quantkit.quantizers.base import InputStats
from quantkit.quantizers.devices import each, shares
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


def owners(spec: ModelSpec, layer: int) -> dict[str, str]:
    """Linear role -> the role whose input it shares: the first of those that read the same tokens after the same op, else itself."""
    found: dict[str, str] = {}
    for group in spec.scale_groups(layer):
        first: dict[str, str] = {}
        for role in group.targets:
            expert = role.rpartition(".")[0] if role.startswith("experts.") else ""  # which tokens reach it is the router's choice
            found[role] = first.setdefault(expert, role)
    return {role: found.get(role, role) for role in spec.block_linears(layer)}


_STAGE = {"q": 0, "k": 0, "v": 0, "o": 1, "router": 2, "shared_gate": 2, "gate": 2, "up": 2, "down": 3}


def stages(spec: ModelSpec, layer: int) -> tuple[tuple[str, ...], ...]:
    """The linears of a block in groups whose inputs exist at the same time, in order: what true-sequential quantization works through."""
    found: dict[int, list[str]] = {}
    for role in spec.block_linears(layer):
        found.setdefault(_STAGE[role.rpartition(".")[2]], []).append(role)
    return tuple(tuple(found[stage]) for stage in sorted(found))


def peak_of(values: Tensor) -> float:
    """The greatest magnitude, without a copy of ``values``; NaN when one of them is."""
    low, high = torch.aminmax(values)
    return float(torch.maximum(high, -low))


GRAM_PANEL = 256
"""Columns of a Gram matrix that are summed at a time on a CPU."""
CUDA_PANEL = 2048
STARVED = 128
"""An expert that fewer tokens reach borrows the statistics of all tokens of its layer."""
_HALVES = frozenset({torch.float16, torch.bfloat16})


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a^T b``, summed in float32; products of 16-bit activations are exact in it, so tensor cores may make them."""
    if a.is_cuda and a.dtype in _HALVES:
        total += torch.mm(a.T, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.T.float(), b.float())


class Collector(Protocol):
    """What sees the inputs of a block's linears as the calibration goes through it."""

    def tap(self, role: str, x: Tensor) -> None:
        """Add one tile: ``x [T, K]`` is the input of the linear ``role``."""


class StatsCollector:
    """Sums the statistics of a block's inputs, tile by tile in a fixed order, for ``roles`` and what they share inputs with."""

    def __init__(self, shared: Mapping[str, str], roles: Iterable[str], needs: frozenset[str]) -> None:
        self._shared = {role: shared[role] for role in roles}
        self._owners = frozenset(self._shared.values())
        self._needs = needs
        self._gram: dict[str, Tensor] = {}
        self._cross: dict[str, Tensor] = {}
        self._abs: dict[str, Tensor] = {}
        self._max: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._reference: dict[str, Tensor] = {}

    def tap(self, role: str, x: Tensor) -> None:
        """Add one tile: ``x [T, K]`` is the input of the linear ``role``."""
        if role not in self._owners or not x.shape[0]:
            return
        k, magnitude = x.shape[1], x.float().abs()
        if role not in self._tokens:
            self._abs[role], self._max[role] = magnitude.new_zeros(k), magnitude.new_zeros(k)
            self._tokens[role] = 0
            if "gram" in self._needs:
                self._gram[role] = magnitude.new_zeros(k, k)
            if "cross" in self._needs:
                self._cross[role] = magnitude.new_zeros(k, k)
        self._abs[role] += magnitude.sum(0)
        torch.maximum(self._max[role], magnitude.amax(0), out=self._max[role])
        self._tokens[role] += x.shape[0]
        if "gram" in self._needs:
            gram, width = self._gram[role], CUDA_PANEL if x.is_cuda else GRAM_PANEL
            tile = x if x.is_cuda else x.float()
            for first in range(0, k, width):  # X^T X is symmetric: the other half is mirrored when it is asked for
                panel = slice(first, first + width)
                _add_product(gram[panel, first:], tile[:, panel], tile[:, first:])
        if role in self._reference:
            _add_product(self._cross[role], x, self._reference.pop(role))

    def tap_reference(self, role: str, x: Tensor) -> None:
        """Keep the float model's input of ``role`` for the tile that ``tap`` sees next. Experts see other tokens, so they have none."""
        if role in self._owners and not role.startswith("experts."):
            self._reference[role] = x

    @torch.inference_mode()
    def add(self, other: StatsCollector, device: str) -> None:
        """Add what a collector of the same roles on another device saw; the sums are on ``device``, and ``other`` is used up."""
        for role, tokens in other._tokens.items():
            greatest, known = other._max[role].to(device), role in self._tokens
            self._max[role] = torch.maximum(self._max[role], greatest) if known else greatest
            self._tokens[role] = self._tokens.get(role, 0) + tokens
            for own, theirs in ((self._abs, other._abs), (self._gram, other._gram), (self._cross, other._cross)):
                if role in theirs:
                    found = theirs.pop(role).to(device)
                    own[role] = own[role].add_(found) if known else found

    @torch.inference_mode()
    def stats(self) -> dict[str, InputStats]:
        """The statistics by linear role; roles that share an input share the object. They are handed over: call it once."""
        own: dict[str, InputStats] = {}
        for role, tokens in self._tokens.items():
            gram = self._gram.pop(role, None)
            if gram is not None:
                gram = gram.triu_().add_(gram.triu(1).T)
            own[role] = InputStats(
                gram if gram is not None else self._abs[role].new_zeros(0, 0),
                self._abs[role],
                self._max[role],
                tokens,
                self._cross.pop(role, None) if not role.startswith("experts.") else None,
            )
        found = {role: own[first] for role, first in self._shared.items() if first in own}
        return found | self._borrowed(own, found)

    def _borrowed(self, own: Mapping[str, InputStats], found: Mapping[str, InputStats]) -> dict[str, InputStats]:
        """Statistics for experts that too few tokens reached: the layer's own input, or all experts' inner activations together."""
        starved = [r for r in self._shared if r.startswith("experts.") and (r not in found or found[r].tokens < STARVED)]
        out: dict[str, InputStats] = {}
        if any(not r.endswith(".down") for r in starved) and "router" in own:
            whole = replace(own["router"], borrowed=True, cross=None)
            out |= {r: whole for r in starved if not r.endswith(".down")}
        downs = [s for r, s in own.items() if r.startswith("experts.") and r.endswith(".down")]
        if any(r.endswith(".down") for r in starved) and downs:
            pooled = InputStats(
                functools.reduce(torch.add, (s.gram for s in downs)),
                functools.reduce(torch.add, (s.abs_sum for s in downs)),
                functools.reduce(torch.maximum, (s.abs_max for s in downs)),
                sum(s.tokens for s in downs),
                borrowed=True,
            )
            out |= {r: pooled for r in starved if r.endswith(".down")}
        return out


def gathered(collectors: Sequence[StatsCollector], device: str) -> dict[str, InputStats]:
    """The statistics of all devices, added in their order on ``device``; the collectors are used up."""
    first, *others = collectors
    for other in others:
        first.add(other, device)
    return first.stats()


def in_file(path: Path, values: Tensor) -> Tensor:
    """``values`` in a file at ``path`` that is mapped into memory: the system holds as much of it as it has room for."""
    array = fs.scratch_array(path, values.numel() * values.element_size())
    mapped = torch.from_numpy(array).view(values.dtype).reshape(values.shape)
    mapped.copy_(values)
    return mapped


class CalibrationStream:
    """The hidden states at the current block: ``[samples, seq_len, hidden]``, in the compute dtype, on the host or in a file."""

    def __init__(self, hidden: Tensor, tile_samples: int) -> None:
        self.hidden = hidden
        self.tile_samples = max(1, tile_samples)
        self.peak = peak_of(hidden)

    def carry(self) -> memoryview:
        """The hidden states as bytes, for the resume point."""
        return as_bytes(self.hidden)

    def restore(self, carry: Iterable[bytes]) -> None:
        """Continue from the bytes of an earlier run, in pieces. Raises InputError when they are not of this shape."""
        flat = self.hidden.reshape(-1).view(torch.uint8)
        done = 0
        for piece in carry:
            room = flat[done : done + len(piece)]
            if room.numel() == len(piece):
                room.copy_(torch.from_numpy(np.frombuffer(piece, dtype=np.uint8).copy()))
            done += len(piece)
        if done != flat.numel():
            raise InputError("resume point", f"holds {done} bytes of activations", f"{flat.numel()}", "start again with --overwrite")
        self.peak = peak_of(self.hidden)

    def tiles(self, device: str, windows: slice) -> Iterator[tuple[slice, Tensor, Batch]]:
        """The samples of each tile of ``windows``, its hidden states ``[T, hidden]`` on ``device``, and the batch that they are."""
        _, length, width = self.hidden.shape
        for start in range(windows.start, windows.stop, self.tile_samples):
            rows = slice(start, min(start + self.tile_samples, windows.stop))
            count = rows.stop - rows.start
            positions = torch.arange(length, device=device).repeat(count)
            batch = Batch(positions=positions, lengths=(length,) * count, sequences=None)
            yield rows, self.hidden[rows].reshape(-1, width).to(device, non_blocking=True), batch

    def observe(
        self,
        blocks: Sequence[Block],
        collectors: Sequence[StatsCollector],
        until: frozenset[str],
        devices: Sequence[str],
        reference: tuple[CalibrationStream, Sequence[Block]] | None,
    ) -> None:
        """Let the collectors see the inputs of the linears ``until``; the hidden states stay. Each device has its part of the samples,
        a copy of the block and a collector. ``reference`` is the float model's stream and block, whose inputs of the same tokens the
        collectors see first."""
        parts = shares(self.hidden.shape[0], len(devices))

        def work(index: int, device: str) -> None:
            others = None if reference is None else reference[0].tiles(device, parts[index])
            for _, tile, batch in self.tiles(device, parts[index]):
                if others is not None and reference is not None:
                    _, other, _ = next(others)
                    reference[1][index].observe(other, batch, collectors[index].tap_reference, until)
                blocks[index].observe(tile, batch, collectors[index].tap, until)

        each(devices, work)

    def advance(self, blocks: Sequence[Block], collectors: Sequence[Collector] | None, devices: Sequence[str]) -> None:
        """Run the block over every tile: the collectors see its inputs, the hidden states become its outputs.

        Each device has its part of the samples, one tile of it at a time, a copy of the block and a collector. Raises InputError when
        an activation is not finite.
        """
        parts = shares(self.hidden.shape[0], len(devices))

        def work(index: int, device: str) -> float:
            peaks = [0.0]
            for rows, tile, batch in self.tiles(device, parts[index]):
                out = blocks[index].forward(tile, batch, None, None if collectors is None else collectors[index].tap)
                self.hidden[rows].copy_(out.reshape(self.hidden[rows].shape))
                peaks.append(peak_of(out))
            return max(peaks) if all(map(math.isfinite, peaks)) else math.inf

        self.peak = max(each(devices, work))
        if not math.isfinite(self.peak):
            raise InputError(
                f"block {blocks[0].layer}", "its activations on the calibration text are not finite", "a model that runs in float32"
            )
