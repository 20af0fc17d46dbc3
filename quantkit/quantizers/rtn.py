"""Round to nearest: each group on the grid of its own range. No calibration; the baseline of every other method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantkit.arch.spec import ModelSpec
from quantkit.errors import InputError
from quantkit.layouts.base import GroupedInt
from quantkit.ops.grouped import encode, group_range, scales_and_zeros
from quantkit.quantizers.base import BlockFit, BlockWeights, InputStats, Method, refuse_unknown_options
from quantkit.scheme import LinearScheme


def group_of(weight: Tensor, scheme: LinearScheme) -> int:
    """The group size in elements: K when the scheme says -1."""
    return int(weight.shape[1]) if scheme.group_size == -1 else scheme.group_size


def refuse_not_finite(weight: Tensor, where: str) -> None:
    """Raise InputError naming ``where`` when ``weight`` holds NaN or infinity."""
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise InputError(where, f"holds {bad} values that are not finite", "finite weights")


def round_to_nearest(weight: Tensor, scheme: LinearScheme, bias: Tensor | None, where: str, shrink: Tensor | float = 1.0) -> GroupedInt:
    """Quantize ``weight [N, K]`` float32 on the grid of its group ranges, each multiplied by ``shrink`` (broadcast to [N, G]).

    Raises InputError naming ``where`` for values that are not finite or whose scale leaves float16.
    """
    refuse_not_finite(weight, where)
    low, high = group_range(weight, group_of(weight, scheme))
    try:
        scales, zeros = scales_and_zeros(low * shrink, high * shrink, scheme.bits, scheme.sym)
    except InputError as exc:
        raise InputError(where, exc.what, exc.expected) from exc
    return GroupedInt(encode(weight, scales, zeros, scheme.bits), scales, zeros, scheme.bits, bias)


class Rtn:
    """The method ``rtn``."""

    name = "rtn"
    needs: frozenset[str] = frozenset()

    def fit(self, block: BlockWeights, stats: Mapping[str, InputStats], schemes: Mapping[str, LinearScheme], spec: ModelSpec) -> BlockFit:
        results = {}
        for role, weight in block.linears.items():
            if schemes[role].layout != "plain":
                where = spec.tensor(block.layer, spec.linears[role].name)
                results[role] = round_to_nearest(weight, schemes[role], block.biases.get(role), where)
        return BlockFit(results)


def create(options: Mapping[str, Any]) -> Rtn:
    """Build the method. It has no options of its own."""
    refuse_unknown_options("rtn", options, ())
    return Rtn()


METHOD = Method("rtn", "round to nearest, no calibration", ("awq",), "built-in", create)
