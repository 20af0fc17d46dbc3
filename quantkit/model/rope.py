"""Rotary position embedding: frequencies of every scaling kind, and the angles of a batch; ``ops.fused.rotate`` is the rotation.

Frequencies and angles are float32 and the cosines are cast at the end, as transformers does, whatever the compute dtype.
This module knows positions and lengths; it knows no weights and no cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from quantkit.arch.spec import Rope
from quantkit.errors import InputError
from quantkit.ops.transfer import upload

WHERE = "config.json: rope_parameters"
LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})


def _positive(parameters: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = parameters.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise InputError(f"{WHERE}: {key}", f"is {value!r}", "a positive number")
    return value


def _factors(parameters: Mapping[str, Any], key: str, count: int) -> Tensor:
    values = parameters.get(key)
    good = isinstance(values, (list, tuple)) and len(values) == count
    if not good or not all(isinstance(v, (int, float)) and math.isfinite(v) and v > 0 for v in values or ()):
        raise InputError(f"{WHERE}: {key}", "is not a factor per rotary pair", f"{count} positive numbers")
    return torch.tensor(values, dtype=torch.float32)


def frequencies(rope: Rope, head_dim: int, max_positions: int, length: int) -> tuple[Tensor, float]:
    """Inverse frequencies ``[head_dim/2]`` float32 and the factor on cosine and sine, for a sequence of ``length`` tokens.

    Only "dynamic" and "longrope" depend on ``length``. Sources: Su et al. 2021 (default), Chen et al. 2023 (linear), the
    NTK rule (dynamic), Peng et al. 2023 (yarn), Ding et al. 2024 (longrope), Llama 3.1 (llama3). Raises InputError for a
    number that the kind needs and the config lacks or has out of range.
    """
    given = rope.parameters
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    if rope.kind == "default":
        return 1.0 / rope.theta**exponents, 1.0
    if rope.kind == "linear":
        return 1.0 / rope.theta**exponents / _positive(given, "factor"), 1.0
    if rope.kind == "dynamic":
        return _dynamic(rope, head_dim, max_positions, length, exponents), 1.0
    original = _positive(given, "original_max_position_embeddings", float(max_positions))
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, max_positions, original, exponents)
    if rope.kind == "longrope":
        factors = _factors(given, "long_factor" if length > original else "short_factor", head_dim // 2)
        factor = _positive(given, "factor", max_positions / original)
        stretched = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
        return 1.0 / (factors * rope.theta**exponents), _positive(given, "attention_factor", stretched)
    return _llama3(rope, original, exponents), 1.0


def _dynamic(rope: Rope, head_dim: int, max_positions: int, length: int, exponents: Tensor) -> Tensor:
    if head_dim <= 2:
        raise InputError("config.json: head_dim", f"is {head_dim}", "more than 2 with dynamic rotary scaling")
    factor = _positive(rope.parameters, "factor")
    # Within the trained length the ratio is exact; beyond, transformers computes the base in float32.
    reach = max_positions if length <= max_positions else torch.tensor(length)
    base = rope.theta * ((factor * reach / max_positions) - (factor - 1)) ** (head_dim / (head_dim - 2))
    return 1.0 / torch.as_tensor(base**exponents)


def _yarn(rope: Rope, head_dim: int, max_positions: int, original: float, exponents: Tensor) -> tuple[Tensor, float]:
    given = rope.parameters
    factor = _positive(given, "factor", max_positions / original)
    if rope.theta <= 1:
        raise InputError(f"{WHERE}: rope_theta", f"is {rope.theta}", "more than 1 with yarn")

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    def pair_of(rotations: float) -> float:
        return (head_dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    scaling = magnitude(1.0)
    if given.get("mscale") and given.get("mscale_all_dim"):
        scaling = magnitude(_positive(given, "mscale")) / magnitude(_positive(given, "mscale_all_dim"))
    low, high = pair_of(_positive(given, "beta_fast", 32.0)), pair_of(_positive(given, "beta_slow", 1.0))
    if given.get("truncate", True):
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    if low == high:
        high += 0.001  # the ramp divides by the difference
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = rope.theta**exponents
    keep = 1 - ramp
    return (1.0 / (factor * powers)) * (1 - keep) + (1.0 / powers) * keep, _positive(given, "attention_factor", scaling)


def _llama3(rope: Rope, original: float, exponents: Tensor) -> Tensor:
    given = rope.parameters
    factor, low, high = (_positive(given, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise InputError(f"{WHERE}: high_freq_factor", f"is {high}", f"more than low_freq_factor {low}")
    plain = 1.0 / rope.theta**exponents
    wave = 2 * math.pi / plain
    slowed = torch.where(wave > original / low, plain / factor, plain)
    smooth = (original / wave - low) / (high - low)
    between = ~(wave < original / high) & ~(wave > original / low)
    return torch.where(between, (1 - smooth) * slowed / factor + smooth * slowed, slowed)


class Rotary:
    """The angles of one Rope. ``angles`` gives cosine and sine for the tokens of a batch."""

    def __init__(self, rope: Rope, head_dim: int, max_positions: int, dtype: torch.dtype, device: str) -> None:
        self.rope, self.dtype, self._device = rope, dtype, device
        self._head_dim, self._max_positions = head_dim, max_positions
        self._known: dict[int, tuple[Tensor, float]] = {}
        self._of_length(1)
        self._of_length(max_positions)  # a longrope's second set of numbers is checked before the first request needs it

    def _of_length(self, length: int) -> tuple[Tensor, float]:
        """``frequencies`` of a sequence of ``length`` tokens, remembered where few lengths differ."""
        key = 0
        if self.rope.kind == "dynamic":
            key = max(length, self._max_positions)
        elif self.rope.kind == "longrope":
            key = int(length > _original(self.rope, self._max_positions))
        if key not in self._known:
            inverse, scaling = frequencies(self.rope, self._head_dim, self._max_positions, length)
            found = inverse.to(self._device), scaling
            if key > self._max_positions:  # beyond the trained length every length has its own
                return found
            self._known[key] = found
        return self._known[key]

    def angles(self, positions: Tensor, lengths: Sequence[int], reach: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[T, 1, head_dim/2]`` in the compute dtype, for ``positions [T]`` of sequences of ``lengths`` tokens.

        "dynamic" and "longrope" look at ``reach [T]``, how long each token's sequence is to be taken for; without it, up to its last
        position. A result never depends on the other sequences of the batch.
        """
        places = positions.to(self._device)
        scaling = self._of_length(1)[1]
        if self.rope.kind not in LENGTH_DEPENDENT:
            inverse = self._of_length(1)[0]
        else:
            if reach is None:
                ends = [end - 1 for end, length in zip(accumulate(lengths), lengths, strict=True) for _ in range(length)]
                whole = all(length == 1 for length in lengths)
                reach = (places if whole else places.index_select(0, upload(ends, torch.int64, places.device))) + 1
            inverse = self._reaching(reach)  # [T, head_dim/2]
        turns = places.to(torch.float32).unsqueeze(-1) * inverse  # [T, head_dim/2]
        return (turns.cos() * scaling).to(self.dtype).unsqueeze(1), (turns.sin() * scaling).to(self.dtype).unsqueeze(1)

    def _reaching(self, reach: Tensor) -> Tensor:
        """Inverse frequencies ``[T, head_dim/2]`` of tokens of sequences as long as ``reach [T]``. "longrope" asks no device."""
        if self.rope.kind == "longrope":
            long = (reach > _original(self.rope, self._max_positions)).unsqueeze(1)
            return torch.where(long, self._of_length(self._max_positions)[0], self._of_length(1)[0])
        different, which = torch.unique(reach.cpu(), return_inverse=True)
        rows = [self._of_length(length)[0] for length in different.tolist()]
        return torch.stack(rows)[which.to(self._device)] if rows else torch.empty(0, self._head_dim // 2, device=self._device)


def _original(rope: Rope, max_positions: int) -> float:
    return _positive(rope.parameters, "original_max_position_embeddings", float(max_positions))


def length_class(ropes: Iterable[Rope], max_positions: int, length: int) -> str:
    """What rotary frequencies make of the length of a prompt: prompts of one class that begin alike have the same keys there."""
    found = set()
    for rope in ropes:
        if rope.kind == "longrope":
            found.add("long" if length > _original(rope, max_positions) else "short")
        elif rope.kind == "dynamic":
            found.add(str(max(length, max_positions)))
    return ",".join(sorted(found))
