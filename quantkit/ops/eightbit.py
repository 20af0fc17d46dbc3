"""8-bit weights: LLM.int8, int8 and FP8 per channel, FP8 per block; and what their linears compute when activations are 8 bits too.

LLM.int8 (Dettmers et al. 2022) scales by ``SCB / 127``; the others keep a scale, ``w = value * scale`` (``formats.md`` 4.2 to 4.5,
5.6). N out, K in, T tokens. These torch functions are the reference of every 8-bit layout, on any device. Know no file layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from quantkit.errors import InputError
from quantkit.geometry import FP8_BLOCK

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT8_STEPS = 127.5
"""Half of the 255 steps of a symmetric range: the largest magnitude is 127.5 scales, so it rounds to 128 and clips to 127."""

LLM_INT8_UNIT = 6.200012e-05
LLM_INT8_UNIT_CPU = 6.200124e-05
"""1/127^2 as bitsandbytes writes it in its CUDA kernels and in its CPU code, where it is 2e-5 too large. A model needs the same: the
next linear rounds what this one made, and values that lie between two steps then fall to different sides."""

Most = Callable[[Tensor], Tensor]
"""The largest magnitudes ``[T, 1]`` of whole tokens, from those of the part of each that is here, float32 (float64 for float64)."""


def _own(absmax: Tensor) -> Tensor:
    """Whole tokens are here."""
    return absmax


def llm_int8_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ``[N, K]`` and SCB float32 ``[N]`` of ``weight [N, K]``: the bytes of a checkpoint that transformers saves.

    bitsandbytes casts to float16 before it takes the row maxima, whatever the weight is, and so does this. Rows of zeros: SCB 0,
    codes 0. Raises InputError for weights that are no finite float16.
    """
    half = weight.to(torch.float16)
    scb = half.abs().amax(1).float()
    if not torch.isfinite(scb).all():
        raise InputError("weight", "holds values that are no finite float16", "weights below 65520, since LLM.int8 rounds to float16 first")
    return _to_steps(half, scb.unsqueeze(1)), scb


def _to_steps(half: Tensor, absmax: Tensor) -> Tensor:
    """``round(half * (127 / absmax))`` in float32, as int8; 0 where absmax is 0."""
    return (half * torch.where(absmax == 0, 0.0, 127.0 / absmax)).round_().to(torch.int8)


def llm_int8_dequantize(values: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """``values [N, K] * SCB[n] * (1/127)`` in float32, cast to ``dtype``."""
    return (values * scb.float().unsqueeze(1)).mul_(1 / 127).to(dtype)


def llm_int8_linear(x: Tensor, values: Tensor, scb: Tensor, threshold: float = 6.0, most: Most = _own) -> Tensor:
    """``x [T, K]`` -> ``[T, N]`` in the dtype of x; the caller adds ``bias``.

    Columns of x with a float16 magnitude of at least ``threshold`` in any of these tokens are multiplied by the dequantized weight
    in the dtype of x; the rest is rounded to int8 per token and multiplied in integers. 0 sends everything through int8. On a CPU
    every step rounds as in bitsandbytes 0.50, so the results have its bits.
    """
    half = x.to(torch.float16)
    outliers = half.abs() >= threshold if threshold > 0 else torch.zeros_like(half, dtype=torch.bool)
    half = half.masked_fill(outliers, 0)
    absmax = most(half.abs().amax(1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32))).float()  # [T, 1]
    taken = outliers.any(0)
    rounded = _to_steps(half, absmax).masked_fill_(taken, 0)
    unit = LLM_INT8_UNIT_CPU if x.device.type == "cpu" else LLM_INT8_UNIT
    y = (_int_product(rounded, values) * (absmax * scb.float()) * unit).to(x.dtype)
    if x.device.type != "cpu":  # how many columns are taken is known there alone: to ask would be to wait, and no CUDA graph could do it
        return y.addmm(x.masked_fill(~taken, 0), llm_int8_dequantize(values, scb, x.dtype).T)
    columns = taken.nonzero().view(-1)
    return y.addmm(x[:, columns], llm_int8_dequantize(values[:, columns], scb, x.dtype).T) if columns.numel() else y


_EXACT = 1024
"""So many products of two int8 sum below 2^24: float32 adds them exactly, in any order, and TF32 holds the factors."""


def _int_product(a: Tensor, b: Tensor) -> Tensor:
    """``a [T, K] @ b [N, K].T`` of int8, accumulated exactly, rounded to float32 once at the end."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int64, device=a.device)
    for start in range(0, a.shape[1], _EXACT):
        columns = slice(start, start + _EXACT)
        total += (a[:, columns].float() @ b[:, columns].float().T).long()
    return total.float()


def int8_channel_quantize(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """int8 ``[N, K]`` and scales ``[N, 1]`` of ``weight [N, K]``, symmetric (``formats.md`` 4.2); codes fit the rounded scale.

    Raises InputError for weights that are not finite, or whose scale leaves ``scale_dtype``.
    """
    work = weight.float()
    scales = _scales(work.abs().amax(1, keepdim=True), INT8_STEPS, scale_dtype)
    return _to_int8(work, scales), scales


def fp8_channel_quantize(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn ``[N, K]`` and scales ``[N, 1]``; otherwise as ``int8_channel_quantize``."""
    work = weight.float()
    scales = _scales(work.abs().amax(1, keepdim=True), FP8_MAX, scale_dtype)
    return _to_fp8(work, scales), scales


def fp8_block_quantize(weight: Tensor, block: int = FP8_BLOCK) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn ``[N, K]`` and scales float32 ``[ceil(N/block), ceil(K/block)]``, to multiply by (``formats.md`` 4.5)."""
    n, k = weight.shape
    work = weight.float()
    padded = torch.nn.functional.pad(work.abs(), (0, -k % block, 0, -n % block))
    tiles = padded.view(math.ceil(n / block), block, math.ceil(k / block), block)
    scales = _scales(tiles.amax((1, 3)), FP8_MAX, torch.float32)
    return _to_fp8(work, _spread(scales, n, k, block)), scales


def dequantize_scaled(values: Tensor, scales: Tensor, block: int | None, dtype: torch.dtype) -> Tensor:
    """``values * scales`` in float32, cast to ``dtype``: ``[N, K]`` int8 or float8.

    ``block`` None: scales ``[N, 1]`` (channel) or ``[1]`` (tensor); else ``[ceil(N/block), ceil(K/block)]``.
    """
    if block is not None:
        scales = _spread(scales, values.shape[0], values.shape[1], block)
    return values.float().mul_(scales.float()).to(dtype)


def quantize_tokens_int8(x: Tensor, most: Most = _own) -> tuple[Tensor, Tensor]:
    """int8 ``[T, K]`` and scales ``[T, 1]``, float32 (float64 for float64), of ``x [T, K]``: ``absmax / 127.5``, as for weights."""
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    scales = _token_scales(work, INT8_STEPS, most)
    return _to_int8(work, scales), scales


def quantize_tokens_fp8(x: Tensor, most: Most = _own) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn ``[T, K]`` and scales ``[T, 1]``, float32 (float64 for float64), of ``x [T, K]``: ``absmax / 448``."""
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    scales = _token_scales(work, FP8_MAX, most)
    return _to_fp8(work, scales), scales


def rounded_linear(x: Tensor, weight: Tensor, activations: str, most: Most = _own) -> Tensor:
    """What a linear computes that rounds its input as it runs: ``x [T, K]`` times ``weight [N, K]`` -> ``[T, N]`` in the dtype of x.

    ``activations``: "int8_token" or "fp8_token", the grid that each token is rounded to. ``weight`` is dequantized, in float32 (float64
    where x is). The caller adds ``bias``. The rounded tokens are multiplied by their scales before the product, which is made in the
    weight's dtype: on a CPU in float32 results have the bits of compressed-tensors 0.20. Scaling the product instead would differ in
    its last bits alone, but the next linear rounds again, and at the end of a model that is a difference of 1e-2.
    """
    match activations:
        case "int8_token":
            values, scales = quantize_tokens_int8(x, most)
        case "fp8_token":
            values, scales = quantize_tokens_fp8(x, most)
        case _:
            raise AssertionError(activations)
    assert weight.dtype == scales.dtype
    return functional.linear(values.to(scales.dtype).mul_(scales), weight).to(x.dtype)


def smooth_scale(act_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """What to divide activations and multiply weight columns by: ``act^alpha / weight^(1 - alpha)``, float32 ``[K]``.

    SmoothQuant (Xiao et al. 2022), equation 4, from the largest magnitudes ``[K]`` of activations and of weight columns. A channel
    that is all zeros in either keeps 1. Raises InputError for magnitudes that are not finite, or whose scale is no normal float32.
    """
    act, weight = act_absmax.double(), weight_absmax.double()
    scale = torch.where((act == 0) | (weight == 0), 1.0, act.pow(alpha) / weight.pow(1 - alpha)).float()
    usable = torch.isfinite(act) & torch.isfinite(weight) & torch.isfinite(scale) & (scale >= torch.finfo(torch.float32).tiny)
    if not usable.all():
        raise InputError("activations", "have magnitudes that give no smoothing scale", "finite activations and weights")
    return scale


def _scales(absmax: Tensor, steps: float, dtype: torch.dtype) -> Tensor:
    """``absmax / steps`` as ``dtype``, of any shape. Zeros get the epsilon of ``dtype``: any scale stores them, and none divides by 0.

    Raises InputError for absmax that is not finite, and for scales that ``dtype`` rounds to 0 or infinity.
    """
    scales = (absmax / steps).to(dtype)
    if not torch.isfinite(absmax).all():
        raise InputError("weight", "holds values that are not finite", "finite weights")
    if not torch.isfinite(scales).all() or ((scales == 0) & (absmax > 0)).any():
        name = str(dtype).removeprefix("torch.")
        raise InputError("weight", f"holds values whose scale is not a {name}", "a scale dtype of more range", "float32 holds any scale")
    return torch.where(absmax == 0, torch.finfo(dtype).eps, scales)


def _token_scales(x: Tensor, steps: float, most: Most) -> Tensor:
    """``absmax / steps`` per row of ``x [T, K]``, float32 or float64: ``[T, 1]``. Tokens too small to divide by get epsilon."""
    scales = most(x.abs().amax(1, keepdim=True)) / steps
    return torch.where(scales < torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).eps, scales)


def _to_int8(x: Tensor, scales: Tensor) -> Tensor:
    return (x / scales.to(x.dtype)).round_().clamp_(-128, 127).to(torch.int8)


def _to_fp8(x: Tensor, scales: Tensor) -> Tensor:
    # Clamped first: casts of more than 448 saturate in some versions of torch and give NaN in others.
    return (x / scales.to(x.dtype)).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def _spread(scales: Tensor, n: int, k: int, block: int) -> Tensor:
    """Block scales as one per weight: ``[n, k]``; the last blocks may be short."""
    return scales.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
