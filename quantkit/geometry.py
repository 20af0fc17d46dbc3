"""Layouts without torch: which tensors a stored linear consists of, their shapes, and where they may be cut.

A linear is ``[N, K]`` (out, in). Every index of every part covers a whole number of elements along N or K; that one
fact gives shapes, bytes, granules and the slice rule. This module never touches data and knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from quantkit.errors import InputError
from quantkit.scheme import KEEP, LinearScheme

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}
)
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Dtypes of weights that are not quantized."""
SCALE_DTYPES = frozenset({"F16", "BF16", "F32"})
GPTQ_BITS = (2, 3, 4, 8)
FP8_BLOCK = 128
"""Both sides of a block of the block FP8 layout (``formats.md`` 4.5)."""
BNB_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
"""Blocks of double quantization (``formats.md`` 5.3)."""


@dataclass(frozen=True, slots=True)
class GgmlBlock:
    """One block type of ggml: ``elements`` consecutive weights of a row in ``nbytes`` bytes; ``bits`` is the width of a code."""

    elements: int
    nbytes: int
    bits: int


GGML_BLOCKS: Mapping[str, GgmlBlock] = MappingProxyType(
    {
        "Q4_0": GgmlBlock(32, 18, 4),
        "Q4_1": GgmlBlock(32, 20, 4),
        "Q5_0": GgmlBlock(32, 22, 5),
        "Q5_1": GgmlBlock(32, 24, 5),
        "Q8_0": GgmlBlock(32, 34, 8),
        "IQ4_NL": GgmlBlock(32, 18, 4),
        "Q2_K": GgmlBlock(256, 84, 2),
        "Q3_K": GgmlBlock(256, 110, 3),
        "Q4_K": GgmlBlock(256, 144, 4),
        "Q5_K": GgmlBlock(256, 176, 5),
        "Q6_K": GgmlBlock(256, 210, 6),
        "IQ4_XS": GgmlBlock(256, 136, 4),
    }
)
"""Block types that a linear may stay in (``gguf.md`` 2)."""
CODES: Mapping[str, tuple[str, ...]] = MappingProxyType({"bnb4": ("nf4", "fp4"), "ggml": tuple(GGML_BLOCKS)})
"""Layout -> what ``LinearScheme.code`` may be; of every other layout it is empty."""


WHOLE = 0
"""A step: the axis belongs to the whole dim, however far it extends, so a cut of the dim keeps all of it."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a stored tensor: every ``step`` elements of ``dim`` ("N" or "K"), or WHOLE, take ``words`` indices."""

    dim: str
    step: int = 1
    words: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a linear: its name is ``<linear>.<suffix>``.

    ``kept``: it holds floats of whatever dtype the model has. ``flat``: on disk the axes lie flattened, in a shape such as
    (-1, 1). ``free``: its length depends on its content, and ``words`` is a nominal one.
    """

    suffix: str
    dtype: str
    axes: tuple[Axis, ...]
    kept: bool = False
    flat: tuple[int, ...] | None = None
    free: bool = False


@dataclass(frozen=True, slots=True)
class Geometry:
    """The parts of one linear of out features ``n`` and in features ``k``, or of a cut of it.

    Of a cut, ``origin`` is where it begins in the linear of shape ``whole``; of a whole linear they are (0, 0) and (n, k).
    """

    scheme: LinearScheme
    n: int
    k: int
    parts: tuple[Part, ...]
    origin: tuple[int, int] = (0, 0)
    whole: tuple[int, int] = (-1, -1)

    def __post_init__(self) -> None:
        if self.whole == (-1, -1):
            object.__setattr__(self, "whole", (self.n, self.k))

    @property
    def layout(self) -> str:
        return self.scheme.layout

    def extent(self, dim: str) -> int:
        return self.n if dim == "N" else self.k

    def part(self, suffix: str) -> Part:
        """The part called ``suffix``. Raises KeyError when the layout has none."""
        for part in self.parts:
            if part.suffix == suffix:
                return part
        raise KeyError(suffix)

    def shape(self, part: Part) -> tuple[int, ...]:
        """The shape of ``part`` by its axes: what ``slices`` indexes, and what a rank stores."""
        return tuple(axis.words if axis.step == WHOLE else self.extent(axis.dim) // axis.step * axis.words for axis in part.axes)

    def stored_shape(self, part: Part) -> tuple[int, ...]:
        """The shape of ``part`` in a checkpoint: that of its axes, flattened where the format says so."""
        shape = self.shape(part)
        if part.flat is None or self.whole != (self.n, self.k):
            return shape
        return tuple(math.prod(shape) if size == -1 else size for size in part.flat)

    def nbytes(self, part: Part) -> int:
        return math.prod(self.shape(part)) * DTYPE_BYTES[part.dtype]

    @property
    def total_bytes(self) -> int:
        return sum(self.nbytes(part) for part in self.parts)

    def granule(self, dim: str) -> int:
        """The smallest number of elements of ``dim`` ("N" or "K") that every part can be cut at."""
        return math.lcm(*(axis.step for part in self.parts for axis in part.axes if axis.dim == dim and axis.step != WHOLE))

    def slices(self, part: Part, n: range, k: range) -> tuple[slice, ...]:
        """Index slices of ``part`` that hold elements ``n`` of N and ``k`` of K (``formats.md`` section 9).

        Raises InputError when a cut leaves the linear or falls inside an index.
        """
        out = []
        for axis in part.axes:
            want, extent = (n if axis.dim == "N" else k), self.extent(axis.dim)
            if want.step != 1 or not 0 <= want.start <= want.stop <= extent:
                raise InputError(part.suffix, f"cut {axis.dim}={want.start}:{want.stop} of {extent}", f"a range inside 0:{extent}")
            if axis.step == WHOLE:
                out.append(slice(0, axis.words))
                continue
            if want.start % axis.step or want.stop % axis.step:
                raise InputError(
                    part.suffix,
                    f"cut {axis.dim}={want.start}:{want.stop} falls inside a granule",
                    f"multiples of {axis.step}",
                )
            out.append(slice(want.start // axis.step * axis.words, want.stop // axis.step * axis.words))
        return tuple(out)

    def cut(self, n: range, k: range) -> Geometry:
        """The geometry of elements ``n`` of N and ``k`` of K: what one rank stores. Raises InputError as ``slices`` does."""
        for part in self.parts:
            self.slices(part, n, k)
        n0, k0 = self.origin
        return replace(self, n=len(n), k=len(k), origin=(n0 + n.start, k0 + k.start))


def _axis(dim: str, extent: int, step: int, words: int = 1) -> Axis:
    """An axis of which the last ``step`` may be short: then the dim is one piece that no cut divides."""
    if extent % step == 0:
        return Axis(dim, step, words)
    return Axis(dim, extent, math.ceil(extent * words / step))


def _words(dim: str, extent: int, bits: int) -> Axis:
    """Codes of ``bits`` in 32-bit words, a dense stream: 32 codes in ``bits`` words when they straddle words."""
    return _axis(dim, extent, 32 // bits) if 32 % bits == 0 else _axis(dim, extent, 32, bits)


def _bias(dtype: str, bias: bool) -> tuple[Part, ...]:
    return (Part("bias", dtype, (Axis("N"),), kept=True),) if bias else ()


def _refuse(n: int, k: int, what: str, expected: str) -> InputError:
    return InputError(f"linear [{n}, {k}]", what, expected)


def _group_axis(scheme: LinearScheme, n: int, k: int) -> Axis:
    """The axis of scales along K. Raises InputError when the groups do not divide K (ragged groups load nowhere)."""
    g = scheme.group_size
    if g != -1 and (g <= 0 or k % g):
        raise _refuse(n, k, f"{k} input features do not divide into groups of {g}", "a group size that divides K")
    # A group as long as the row is stored once per row, and every cut along K needs all of it.
    return Axis("K", WHOLE) if g in (-1, k) else Axis("K", g)


def _plain(scheme: LinearScheme, n: int, k: int, dtype: str) -> tuple[Part, ...]:
    """An unquantized linear or embedding: ``weight [N, K]``."""
    return (Part("weight", dtype, (Axis("N"), Axis("K")), kept=True),)


def _transposed(scheme: LinearScheme, n: int, k: int, dtype: str) -> tuple[Part, ...]:
    """An unquantized linear stored as ``weight [K, N]`` (the Conv1D of GPT-2)."""
    return (Part("weight", dtype, (Axis("K"), Axis("N")), kept=True),)


def _awq(scheme: LinearScheme, n: int, k: int, dtype: str) -> tuple[Part, ...]:
    """AutoAWQ ``version: gemm``, 4 bits (``formats.md`` 3.1). Raises InputError unless N is a multiple of 8 and K of the group."""
    group = _group_axis(scheme, n, k)
    if n % 8:
        raise _refuse(n, k, f"{n} output features", "a multiple of 8 (eight 4-bit codes per word)")
    return (
        Part("qweight", "I32", (Axis("K"), Axis("N", 8))),
        Part("qzeros", "I32", (group, Axis("N", 8))),
        Part("scales", scheme.scale_dtype, (group, Axis("N"))),
    )


def gemv_columns(k: int, group_size: int) -> int:
    """Words of the padded group axis of AWQ gemv, Z of ``formats.md`` 3.2."""
    pad = 1 if group_size >= 128 else 2 if group_size == 64 else 4
    return math.ceil(math.ceil(k / group_size / 8) / pad) * pad


def _awq_gemv(scheme: LinearScheme, n: int, k: int, dtype: str) -> tuple[Part, ...]:
    """AutoAWQ ``version: gemv`` (``formats.md`` 3.2). The padded group axis cannot be cut: every rank keeps all of it."""
    g = scheme.group_size
    if g not in (32, 64, 128) or k % g:
        raise _refuse(n, k, f"{k} input features in groups of {g}", "groups of 32, 64 or 128 that divide K")
    words = gemv_columns(k, g)
    return (
        Part("qweight", "I32", (Axis("N"), Axis("K", g, g // 8))),
        Part("qzeros", "I32", (Axis("N"), Axis("K", WHOLE, words))),
        Part("scales", scheme.scale_dtype, (Axis("N"), Axis("K", WHOLE, 8 * words))),
    )


def _gptq(scheme: LinearScheme, n: int, k: int, dtype: str) -> tuple[Part, ...]:
    """GPTQ, v1 and v2 (``formats.md`` 2). Raises InputError unless N and K are whole words and K whole groups."""
    b = scheme.bits
    if b not in GPTQ_BITS:
        raise _refuse(n, k, f"{b} bits", f"one of {', '.join(map(str, GPTQ_BITS))}")
    unit = 32 if b == 3 else 32 // b
    for size, what in ((n, "output"), (k, "input")):
        if size % unit:
            raise _refuse(n, k, f"{size} {what} features", f"a multiple of {unit} (whole words of {b}-bit codes)")
    group = _group_axis(scheme, n, k)
    if scheme.act_order and group.step != WHOLE:  # any input may use any group: a cut of the inputs keeps all of them
        group = Axis("K", WHOLE, k // group.step)
    return (
        Part("qweight", "I32", (_words("K", k, b), Axis("N"))),
        Part("qzeros", "I32", (group, _words("N", n, b))),
        Part("scales", scheme.scale_dtype, (group, Axis("N"))),
        Part("g_idx", "I32", (Axis("K"),)),
    )


def _packed(scheme: LinearScheme, n: int, k: int, dtype: str) -> tuple[Part, ...]:
    """compressed-tensors ``pack-quantized`` (``formats.md`` 4.1)."""
    b, group = scheme.bits, _group_axis(scheme, n, k)
    if b not in GPTQ_BITS:
        raise _refuse(n, k, f"{b} bits", f"one of {', '.join(map(str, GPTQ_BITS))}")
    zeros = () if scheme.sym else (Part("weight_zero_point", "I32", (_words("N", n, b), group)),)
    return (
        Part("weight_packed", "I32", (Axis("N"), _words("K", k, b))),
        Part("weight_scale", scheme.scale_dtype, (Axis("N"), group)),
        *zeros,
        Part("weight_shape", "I64", (Axis("N", WHOLE, 2),)),
    )


def _scaled(weight_dtype: str) -> Builder:
    def build(scheme: LinearScheme, n: int, k: int, dtype: str) -> tuple[Part, ...]:
        axes = (Axis("N"), Axis("K", WHOLE)) if scheme.group_size == -1 else (Axis("N", WHOLE),)
        if scheme.group_size not in (-1, 0):
            raise _refuse(n, k, f"groups of {scheme.group_size} in an 8-bit layout", "-1 (one scale per row) or 0 (one per matrix)")
        return (Part("weight", weight_dtype, (Axis("N"), Axis("K"))), Part("weight_scale", scheme.scale_dtype, axes))

    return build


def _fp8_block(scheme: LinearScheme, n: int, k: int, dtype: str) -> tuple[Part, ...]:
    """FP8 in blocks of 128 x 128 (``formats.md`` 4.5); a ragged dim is not cut."""
    return (
        Part("weight", "F8_E4M3", (Axis("N"), Axis("K"))),
        Part("weight_scale_inv", "F32", (_axis("N", n, FP8_BLOCK), _axis("K", k, FP8_BLOCK))),
    )


def _flattened(n: int, k: int, per: int) -> tuple[Axis, Axis]:
    """Axes of one item for each ``per`` consecutive elements of the flattened ``[N, K]``: by rows where rows hold whole items."""
    rows = per // math.gcd(per, k)  # so many rows hold a whole number of items
    if rows == 1:
        return Axis("N"), Axis("K", per)
    if n % rows:
        return Axis("N", max(n, 1)), Axis("K", max(k, 1), math.ceil(n * k / per))
    return Axis("N", rows), Axis("K", k, rows * k // per)


def _bnb4(scheme: LinearScheme, n: int, k: int, dtype: str) -> tuple[Part, ...]:
    """bitsandbytes NF4 and FP4 (``formats.md`` 5.1): codes and block scales run over the flattened matrix."""
    if scheme.group_size not in BNB_BLOCKS:
        raise _refuse(n, k, f"blocks of {scheme.group_size}", f"one of {', '.join(map(str, BNB_BLOCKS))}")
    blocks = _flattened(n, k, scheme.group_size)
    count = math.ceil(n * k / scheme.group_size)
    nested = (
        Part("weight.nested_absmax", "F32", (Axis("N", WHOLE, math.ceil(count / NESTED_BLOCK)),)),
        Part("weight.nested_quant_map", "F32", (Axis("N", WHOLE, 256),)),
    )
    # What follows from dtype, shape and offset: about 60 characters, 150 with double quantization.
    state = Part(
        f"weight.quant_state.bitsandbytes__{scheme.code}", "U8", (Axis("N", WHOLE, 160 if scheme.double_quant else 80),), free=True
    )
    return (
        Part("weight", "U8", _flattened(n, k, 2), flat=(-1, 1)),
        Part("weight.absmax", "U8" if scheme.double_quant else "F32", blocks, flat=(-1,)),
        Part("weight.quant_map", "F32", (Axis("N", WHOLE, 16),)),
        *(nested if scheme.double_quant else ()),
        state,
    )


def _bnb8(scheme: LinearScheme, n: int, k: int, dtype: str) -> tuple[Part, ...]:
    """LLM.int8 (``formats.md`` 5.6): rows of int8 with one scale each."""
    return (Part("weight", "I8", (Axis("N"), Axis("K"))), Part("SCB", "F32", (Axis("N"),)), Part("weight_format", "U8", ()))


def _ggml(scheme: LinearScheme, n: int, k: int, dtype: str) -> tuple[Part, ...]:
    """Blocks of ggml as a GGUF file stores them (``gguf.md`` 2): rows of whole blocks, each of its own scales and codes."""
    if scheme.code not in GGML_BLOCKS:
        raise _refuse(n, k, f"block type {scheme.code!r}", f"one of {', '.join(GGML_BLOCKS)}")
    block = GGML_BLOCKS[scheme.code]
    if k % block.elements:
        raise _refuse(n, k, f"{k} input features do not divide into {scheme.code} blocks", f"a multiple of {block.elements}")
    return (Part("weight", "U8", (Axis("N"), Axis("K", block.elements, block.nbytes))),)


Builder = Callable[[LinearScheme, int, int, str], tuple[Part, ...]]
LAYOUTS: Mapping[str, Builder] = MappingProxyType(
    {
        "plain": _plain,
        "transposed": _transposed,
        "awq": _awq,
        "awq_gemv": _awq_gemv,
        "gptq": _gptq,
        "gptq_v2": _gptq,
        "packed": _packed,
        "int8": _scaled("I8"),
        "fp8": _scaled("F8_E4M3"),
        "fp8_block": _fp8_block,
        "bnb4": _bnb4,
        "bnb8": _bnb8,
        "ggml": _ggml,
    }
)
FLOAT_LAYOUTS = frozenset({"plain", "transposed"})
"""Layouts that hold the weight itself."""
ZERO_ROWS = frozenset({*FLOAT_LAYOUTS, "ggml"})
"""Layouts of which a row of zero bytes is a row of zeros: a vocabulary stored so can be padded."""


def ggml_scheme(kind: str) -> LinearScheme:
    """How a linear is stored that stays in ggml blocks of type ``kind``, a key of GGML_BLOCKS."""
    block = GGML_BLOCKS[kind]
    return LinearScheme("gguf", "ggml", block.bits, block.elements, code=kind)


def geometry_of(scheme: LinearScheme, n: int, k: int, *, dtype: str, bias: bool = False) -> Geometry:
    """The geometry of a linear stored by ``scheme``; ``dtype`` is that of what stays in floats, such as the bias.

    Raises InputError when the layout is unknown or cannot hold this shape.
    """
    if scheme.layout not in LAYOUTS:
        raise InputError(f"linear [{n}, {k}]", f"layout {scheme.layout!r}", f"one of {', '.join(LAYOUTS)}")
    if scheme.scale_dtype not in SCALE_DTYPES:
        raise _refuse(n, k, f"scales of {scheme.scale_dtype}", f"one of {', '.join(sorted(SCALE_DTYPES))}")
    return Geometry(scheme, n, k, (*LAYOUTS[scheme.layout](scheme, n, k, dtype), *_bias(dtype, bias)))


def plain(n: int, k: int, *, dtype: str, bias: bool = False) -> Geometry:
    """The geometry of an unquantized linear or embedding: ``weight [N, K]``."""
    return geometry_of(KEEP, n, k, dtype=dtype, bias=bias)
