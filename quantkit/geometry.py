"""Layouts without torch: which tensors a packed linear consists of, their shapes, and where they may be cut.

A linear is ``[N, K]`` (out, in). Every index of every part covers a whole number of elements along N or K; that one
fact gives shapes, bytes, granules and the slice rule. This module never touches data and knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from quantkit.errors import InputError

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}
)


WHOLE = 0
"""A step: one index covers the whole dim, however far it extends, so a cut of the dim keeps it whole."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a stored tensor: each index covers ``step`` elements of ``dim`` ("N" or "K"), or WHOLE."""

    dim: str
    step: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a linear: its name is ``<linear>.<suffix>``."""

    suffix: str
    dtype: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The parts of one linear in one layout, for out features ``n`` and in features ``k``."""

    layout: str
    n: int
    k: int
    parts: tuple[Part, ...]

    def extent(self, dim: str) -> int:
        return self.n if dim == "N" else self.k

    def shape(self, part: Part) -> tuple[int, ...]:
        """The stored shape of ``part``."""
        return tuple(1 if axis.step == WHOLE else self.extent(axis.dim) // axis.step for axis in part.axes)

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
                out.append(slice(0, 1))
                continue
            if want.start % axis.step or want.stop % axis.step:
                raise InputError(
                    part.suffix,
                    f"cut {axis.dim}={want.start}:{want.stop} falls inside a granule",
                    f"multiples of {axis.step}",
                )
            out.append(slice(want.start // axis.step, want.stop // axis.step))
        return tuple(out)

    def cut(self, n: range, k: range) -> Geometry:
        """The geometry of elements ``n`` of N and ``k`` of K: what one rank stores. Raises InputError as ``slices`` does."""
        for part in self.parts:
            self.slices(part, n, k)
        return replace(self, n=len(n), k=len(k))


def _bias(dtype: str, bias: bool) -> tuple[Part, ...]:
    return (Part("bias", dtype, (Axis("N"),)),) if bias else ()


def plain(n: int, k: int, *, dtype: str, bias: bool = False, group_size: int = -1) -> Geometry:
    """An unquantized linear or embedding: ``weight [N, K]``. ``group_size`` is not used by this layout."""
    return Geometry("plain", n, k, (Part("weight", dtype, (Axis("N"), Axis("K"))), *_bias(dtype, bias)))


def awq_gemm(n: int, k: int, *, dtype: str, bias: bool = False, group_size: int = 128) -> Geometry:
    """AutoAWQ ``version: gemm``, 4 bits (``formats.md`` 3.1). ``dtype`` is the dtype of the bias; scales are F16.

    Raises InputError when K is not a multiple of the group or N not of 8.
    """
    if group_size != -1 and (group_size <= 0 or k % group_size):
        raise InputError(
            f"linear [{n}, {k}]", f"{k} input features do not divide into groups of {group_size}", "a group size that divides K"
        )
    if n % 8:
        raise InputError(f"linear [{n}, {k}]", f"{n} output features", "a multiple of 8 (eight 4-bit codes per word)")
    # A group as long as the row is stored once per row, and every cut along K needs all of it.
    g = WHOLE if group_size in (-1, k) else group_size
    return Geometry(
        "awq",
        n,
        k,
        (
            Part("qweight", "I32", (Axis("K"), Axis("N", 8))),
            Part("qzeros", "I32", (Axis("K", g), Axis("N", 8))),
            Part("scales", "F16", (Axis("K", g), Axis("N"))),
            *_bias(dtype, bias),
        ),
    )


Builder = Callable[..., Geometry]
LAYOUTS: Mapping[str, Builder] = MappingProxyType({"plain": plain, "awq": awq_gemm})
