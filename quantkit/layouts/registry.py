"""The codecs by layout name, and the choice of the linear that runs a stored linear on a device."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.comm import Comm
from quantkit.errors import InputError
from quantkit.geometry import FLOAT_LAYOUTS, Geometry, geometry_of
from quantkit.layouts.awq import AwqCodec, AwqGemvCodec
from quantkit.layouts.base import Codebook, Codec, GroupedInt, LinearOp, Neutral, SuperBlock, dequantized, with_bias
from quantkit.layouts.bnb import Bnb4Codec
from quantkit.layouts.ggml import GgmlCodec
from quantkit.layouts.gptq import GptqCodec
from quantkit.layouts.packed import PackedCodec
from quantkit.layouts.plain import DenseLinear, PlainCodec, TransposedCodec
from quantkit.layouts.scaled import FP8, FP8_BLOCKS, INT8, LlmInt8Codec
from quantkit.layouts.tiled import tiles_of
from quantkit.ops.cuda_tiles import TiledLinear, available
from quantkit.ops.eightbit import Most, llm_int8_linear, rounded_linear
from quantkit.ops.ggml.decode import FOUR_BITS, decode, four_bits
from quantkit.ops.ggml.linear import BLOCK_DTYPES, BlockCpuLinear
from quantkit.ops.grouped import Int4CpuLinear, int4_cpu_supports
from quantkit.scheme import LinearScheme

_ALL: tuple[Codec, ...] = (
    PlainCodec(),
    TransposedCodec(),
    AwqCodec(),
    AwqGemvCodec(),
    GptqCodec("gptq", 1),
    GptqCodec("gptq_v2", 0),
    PackedCodec(),
    INT8,
    FP8,
    FP8_BLOCKS,
    Bnb4Codec(),
    LlmInt8Codec(),
    GgmlCodec(),
)
CODECS: Mapping[str, Codec] = MappingProxyType({item.name: item for item in _ALL})


def codec(name: str) -> Codec:
    """The codec of a layout. Raises InputError for a name that no layout has."""
    if name not in CODECS:
        raise InputError("layout", f"{name!r} is unknown", f"one of {', '.join(CODECS)}")
    return CODECS[name]


class UnpackingLinear:
    """A packed linear that dequantizes itself at each call: the parity mode, exact in the compute dtype.

    Only the parts stay in memory; the dense weight lives for one call.
    """

    def __init__(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype) -> None:
        self._parts = {suffix: part for suffix, part in parts.items() if suffix != "bias"}
        self._geometry, self._dtype = geometry, dtype
        self.bias = parts["bias"].to(dtype) if "bias" in parts else None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts.values()) + (0 if self.bias is None else self.bias.nbytes)

    def weight(self) -> Tensor:
        return codec(self._geometry.layout).dequant(self._parts, self._geometry, self._dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight())


class EightBitLinear(UnpackingLinear):
    """A linear whose input is quantized to 8 bits too, token by token, when it runs; in float32 (float64 in a float64 model)."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.rounded(x, lambda absmax: absmax)

    def rounded(self, x: Tensor, most: Most) -> Tensor:
        """The product where ``x`` holds a part of each token, whose largest magnitude ``most`` tells."""
        kind = self._geometry.scheme.activations
        if kind == "int8_outlier":
            return llm_int8_linear(x, self._parts["weight"], self._parts["SCB"], most=most)
        work = torch.promote_types(x.dtype, torch.float32)
        return rounded_linear(x, codec(self._geometry.layout).dequant(self._parts, self._geometry, work), kind, most)


class SharedRounding:
    """A linear that rounds its input and is cut along it: all ranks round a token to the grid of the whole token, as one rank would.

    ``op`` of a rank that owns nothing is dense zeros; it is asked all the same, as the largest magnitude is agreed on by all.
    """

    def __init__(self, op: LinearOp, comm: Comm) -> None:
        self._op, self._comm, self.bias = op, comm, op.bias

    @property
    def nbytes(self) -> int:
        return self._op.nbytes

    def weight(self) -> Tensor:
        return self._op.weight()

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self._op, EightBitLinear):
            return self._op.rounded(x, self._most)
        self._most(x.new_zeros(x.shape[0], 1, dtype=torch.promote_types(x.dtype, torch.float32)))
        return self._op(x)

    def _most(self, absmax: Tensor) -> Tensor:
        return self._comm.all_gather(absmax, (1,) * self._comm.size).amax(1, keepdim=True)


def load_linear(
    geometry: Geometry, parts: Mapping[str, Tensor], *, dtype: torch.dtype, device: str = "cpu", parity: bool = False
) -> LinearOp:
    """The linear that runs ``parts`` (one stored linear) in ``dtype`` on ``device``.

    On a GPU in 16 bits what tiles can hold runs on the CUDA kernels, where they are built. On a CPU in bfloat16 4-bit integers, ggml's
    among them, run on torch's int4 kernel, and other ggml blocks in any dtype on a kernel of theirs; everywhere else it is dequantized at
    each call. Where the scheme quantizes activations they are, except with ``parity``, which is the dequantized weight times the input as
    it is.
    Empty shapes (a rank that owns nothing) run as dense.
    """
    moved = {suffix: part.to(device) for suffix, part in parts.items()}
    bias = moved["bias"].to(dtype) if "bias" in moved else None
    chosen = codec(geometry.layout)
    if not geometry.n or not geometry.k:
        return DenseLinear(torch.zeros(geometry.n, geometry.k, dtype=dtype, device=device), bias)
    if geometry.layout in FLOAT_LAYOUTS:
        return DenseLinear(chosen.dequant(moved, geometry, dtype).contiguous(), bias)
    if parity:
        return UnpackingLinear(moved, geometry, dtype)
    if geometry.scheme.activations:
        return EightBitLinear(moved, geometry, dtype)
    if available(device, dtype) and (tiles := tiles_of(moved, geometry, chosen)) is not None:
        return TiledLinear(tiles, dtype, bias)
    if device == "cpu" and geometry.layout == "ggml" and dtype in BLOCK_DTYPES:
        blocks, kind = moved["weight"].contiguous(), geometry.scheme.code
        if dtype == torch.bfloat16 and kind in FOUR_BITS:
            return Int4CpuLinear(*four_bits(blocks, kind), bias)
        return BlockCpuLinear(blocks, kind, dtype, bias)
    if device == "cpu" and dtype == torch.bfloat16 and geometry.scheme.bits == 4:
        result = chosen.unpack(moved, geometry)
        if isinstance(result, GroupedInt) and result.g_idx is None and int4_cpu_supports(geometry.k, geometry.k // result.scales.shape[1]):
            return Int4CpuLinear(result.codes, result.scales, (8.0 - result.zeros.float()) * result.scales.float(), bias)
    return UnpackingLinear(moved, geometry, dtype)


def dense_weight(result: Neutral, scheme: LinearScheme, dtype: torch.dtype) -> Tensor:
    """The weight ``[N, K]`` that a linear stored by ``scheme`` multiplies by once ``result`` is written."""
    if isinstance(result, GroupedInt):
        return dequantized(result, dtype)
    if isinstance(result, SuperBlock):
        return decode(result.blocks, result.kind, dtype)
    n, k = (result.codes if isinstance(result, Codebook) else result.values).shape
    geometry = geometry_of(scheme, n, k, dtype="F32")
    chosen = codec(scheme.layout)
    parts = chosen.pack(with_bias(result, None), geometry)
    return chosen.dequant(parts, geometry, dtype)
