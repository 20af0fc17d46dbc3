"""Methods that look at one weight at a time: round to nearest, and the fixed codebooks and 8-bit formats. No calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.arch.spec import ModelSpec
from quantkit.errors import InputError
from quantkit.layouts.base import Codebook, GroupedInt, Neutral, Scaled, SuperBlock, on_device, with_bias
from quantkit.ops.codebook import quantize_4bit
from quantkit.ops.dtypes import TORCH_DTYPES
from quantkit.ops.eightbit import fp8_block_quantize, fp8_channel_quantize, int8_channel_quantize, llm_int8_quantize
from quantkit.ops.ggml.tensor import encode_tensor
from quantkit.ops.grouped import encode, group_range, scales_and_zeros
from quantkit.quant_config import is_kept
from quantkit.quantizers.base import FLOAT, BlockFit, BlockWeights, InputStats, QuantizerFactory, built_in, choice, refuse_unknown_options
from quantkit.quantizers.devices import spread
from quantkit.scheme import LinearScheme


def group_of(weight: Tensor, scheme: LinearScheme) -> int:
    """The group size in elements: K when the scheme says -1."""
    return int(weight.shape[1]) if scheme.group_size == -1 else scheme.group_size


def min_zero(scheme: LinearScheme) -> int:
    """The least zero point that the layout can store: GPTQ v1 has no 0 (``formats.md`` 2.2)."""
    return 1 if scheme.layout == "gptq" else 0


def refuse_not_finite(weight: Tensor, where: str) -> None:
    """Raise InputError naming ``where`` when ``weight`` holds NaN or infinity."""
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise InputError(where, f"holds {bad} values that are not finite", "finite weights")


def round_to_nearest(weight: Tensor, scheme: LinearScheme, where: str, shrink: Tensor | float = 1.0) -> GroupedInt:
    """``weight [N, K]`` float32 on the grid of its group ranges, each multiplied by ``shrink`` (broadcast to [N, G]); without bias.

    Raises InputError naming ``where`` for values that are not finite or whose scale leaves its dtype.
    """
    refuse_not_finite(weight, where)
    low, high = group_range(weight, group_of(weight, scheme))
    try:
        scales, zeros = scales_and_zeros(
            low * shrink, high * shrink, scheme.bits, scheme.sym, TORCH_DTYPES[scheme.scale_dtype], min_zero(scheme)
        )
    except InputError as exc:
        raise InputError(where, exc.what, exc.expected) from exc
    return GroupedInt(encode(weight, scales, zeros, scheme.bits), scales, zeros, scheme.bits)


def quantize_weight(weight: Tensor, scheme: LinearScheme, dtype: torch.dtype, where: str) -> Neutral:
    """``weight [N, K]``, float32 of a weight stored in ``dtype``, quantized without calibration as its layout wants it; without bias.

    Raises InputError naming ``where`` for weights that the layout cannot represent.
    """
    refuse_not_finite(weight, where)
    scales = TORCH_DTYPES[scheme.scale_dtype]
    try:
        match scheme.layout:
            case "bnb4":
                codes, absmax = quantize_4bit(weight.to(dtype), scheme.code, scheme.group_size)
                return Codebook(codes.reshape(weight.shape), absmax, scheme.code, scheme.group_size, dtype)
            case "bnb8":
                values, scb = llm_int8_quantize(weight.to(dtype))
                return Scaled(values, scb.unsqueeze(1), divisor=127)
            case "int8":
                return Scaled(*int8_channel_quantize(weight, scales))
            case "fp8":
                return Scaled(*fp8_channel_quantize(weight, scales))
            case "fp8_block":
                return Scaled(*fp8_block_quantize(weight))
            case "ggml":
                return SuperBlock(encode_tensor(weight, scheme.code), scheme.code)
    except InputError as exc:
        raise InputError(where, exc.what, exc.expected, exc.hint) from exc
    return round_to_nearest(weight, scheme, where)


def quantize_linears(
    block: BlockWeights, linears: Mapping[str, Tensor], biases: Mapping[str, Tensor], schemes: Mapping[str, LinearScheme], spec: ModelSpec
) -> dict[str, Neutral]:
    """``quantize_weight`` of those of ``linears`` that are not kept, dealt over the devices of ``block``. Raises InputError as it does."""
    roles = [role for role in linears if not is_kept(schemes[role])]

    def work(job: int, device: str) -> Neutral:
        role = roles[job]
        where = spec.tensor(block.layer, spec.linears[role].name)
        result = quantize_weight(linears[role].to(device), schemes[role], block.linear_dtypes[role], where)
        return with_bias(on_device(result, block.devices[0]), biases.get(role))

    return dict(zip(roles, spread(block.devices, [math.prod(spec.linear_shape(role)) for role in roles], work), strict=True))


@dataclass(frozen=True, slots=True)
class Direct:
    """A method without calibration: the layout of each linear's scheme says how it is rounded."""

    name: str
    needs: frozenset[str] = frozenset()
    inputs: str = FLOAT

    def fit(self, block: BlockWeights, stats: Mapping[str, InputStats], schemes: Mapping[str, LinearScheme], spec: ModelSpec) -> BlockFit:
        return BlockFit(quantize_linears(block, block.linears, block.biases, schemes, spec))


def _factory(name: str, known: tuple[str, ...]) -> QuantizerFactory:
    def create(options: Mapping[str, Any]) -> Direct:
        refuse_unknown_options(name, options, known)
        for key in known:
            choice(name, options, key, True, (True, False))
        return Direct(name)

    return create


METHODS = (
    built_in("rtn", "round to nearest, no calibration", _factory("rtn", ())),
    built_in("nf4", "4-bit NormalFloat, double-quantized", _factory("nf4", ("double_quant",))),
    built_in("fp4", "4-bit float, double-quantized", _factory("fp4", ("double_quant",))),
    built_in("int8", "LLM.int8: outlier inputs in floats", _factory("int8", ())),
    built_in("fp8", "8-bit float by channel, or by block", _factory("fp8", ())),
)
