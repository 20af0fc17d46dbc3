"""What each rank stores: every tensor of a checkpoint as an index of the parent's tensor, in load order.

The one place that walks a whole model by its plan. It knows names, shapes and ranges; never a file or a byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from quantkit.arch.spec import ModelSpec
from quantkit.errors import InputError
from quantkit.geometry import DTYPE_BYTES, FLOAT_LAYOUTS, Geometry, Part
from quantkit.plan import HEAD, ParallelPlan, embedding_geometry, linear_geometry, stored_geometries
from quantkit.scheme import Assignment


class Stored(Protocol):
    """A tensor as its header describes it."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class RankSlice:
    """One tensor of one rank: ``index`` of the parent's tensor ``name``, then ``pad_rows`` rows of zeros.

    ``view`` is the shape under which ``index`` is meant when the parent stores it flattened. ``stored_as`` is the name in the
    rank's file: another one where the parent fuses linears that are cut separately.
    """

    name: str
    dtype: str
    index: tuple[slice, ...]
    pad_rows: int = 0
    view: tuple[int, ...] | None = None
    stored_as: str = ""

    def __post_init__(self) -> None:
        if not self.stored_as:
            object.__setattr__(self, "stored_as", self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = [s.stop - s.start for s in self.index]
        return (sizes[0] + self.pad_rows, *sizes[1:]) if sizes else ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def fused_name(path: str, suffix: str, role: str, alone: bool) -> str:
    """The name in a rank's file of one part of the linear ``role``, which lies at ``path`` ``alone`` or fused with others."""
    return f"{path}.{suffix}" if alone else f"{path}.{suffix}@{role}"


def part_index(geometry: Geometry, part: Part, stored: Stored, n: range, k: range) -> tuple[tuple[slice, ...], tuple[int, ...] | None]:
    """Which slices of a stored part hold ``n`` and ``k``, and the view that they are of where the part lies flattened."""
    if part.free:
        return tuple(slice(0, size) for size in stored.shape), None
    return geometry.slices(part, n, k), None if part.flat is None else geometry.shape(part)


def _whole(name: str, stored: Stored) -> RankSlice:
    return RankSlice(name, stored.dtype, tuple(slice(0, size) for size in stored.shape))


def _found(tensors: Mapping[str, Stored], name: str, shape: tuple[int, ...] | None, dtype: str | None = None) -> Stored:
    if name not in tensors:
        raise InputError(name, "is missing from the checkpoint", f"a tensor of shape {list(shape)}" if shape is not None else "a tensor")
    stored = tensors[name]
    if (shape is not None and tuple(stored.shape) != shape) or (dtype is not None and stored.dtype != dtype):
        want = "" if shape is None else f" {list(shape)} from config.json"
        raise InputError(name, f"is {stored.dtype} {list(stored.shape)}", f"{dtype or stored.dtype}{want}")
    if stored.dtype not in DTYPE_BYTES:
        raise InputError(name, f"has type {stored.dtype}", "a safetensors dtype", "quantkit convert makes a checkpoint that can be sharded")
    return stored


def _vocab_slice(name: str, plan: ParallelPlan, rank: int, tensors: Mapping[str, Stored]) -> RankSlice:
    rows, hidden = plan.cut(HEAD, rank)
    stored = _found(tensors, name, (plan.vocab, len(hidden)))
    start, stop = min(rows.start, plan.vocab), min(rows.stop, plan.vocab)
    return RankSlice(name, stored.dtype, (slice(start, stop), slice(0, len(hidden))), pad_rows=len(rows) - (stop - start))


def rank_slices(
    spec: ModelSpec, assignment: Assignment, plan: ParallelPlan, rank: int, tensors: Mapping[str, Stored]
) -> Iterator[RankSlice]:
    """Every tensor that ``rank`` stores, in load order: embedding, blocks, final norm, head.

    Norms and other vectors are on every rank; the bias of a linear cut on N is cut with it, that of one cut on K is whole.
    Raises InputError for a tensor that is missing, of another shape than ``config.json`` says, or unknown.
    """
    arch = spec.architecture
    known: set[str] = set()

    def out(piece: RankSlice) -> RankSlice:
        known.add(piece.name)
        return piece

    def norm(module: str, width: str) -> Iterator[RankSlice]:
        size = spec.head_dim if width == "head" else spec.dims["hidden"].elements
        for suffix in spec.norm_parts:
            name = f"{module}.{suffix}"
            yield out(_whole(name, _found(tensors, name, (size,))))

    def packed(module: str, geometry: Geometry, n: range, k: range) -> Iterator[RankSlice]:
        for part in geometry.parts:
            name = f"{module}.{part.suffix}"
            stored = _found(tensors, name, None if part.free else geometry.stored_shape(part), part.dtype)
            index, view = part_index(geometry, part, stored, n, k)
            yield out(RankSlice(name, stored.dtype, index, 0, view))

    table = embedding_geometry(spec, assignment, dtype="BF16")
    if table is None:
        yield out(_vocab_slice(f"{arch.embedding}.weight", plan, rank, tensors))
    else:
        yield from packed(arch.embedding, table, plan.rows(rank), range(table.k))
    if spec.position_table is not None:
        name = f"{spec.position_table}.weight"
        yield out(_whole(name, _found(tensors, name, (spec.max_positions, spec.dims["hidden"].elements))))
    for layer in range(spec.layers):
        for item in spec.norms.values():
            yield from norm(spec.tensor(layer, item.name), item.width)
        for roles, path, geometry in stored_geometries(
            spec, assignment, layer, dtype="BF16"
        ):  # of kept tensors the file's own dtype counts
            for role in roles:
                n, k = plan.cut(role, rank)
                first = spec.rows(role).start
                rows = range(n.start + first, n.stop + first)
                for part in geometry.parts:
                    name = f"{path}.{part.suffix}"
                    shape = None if part.free else geometry.stored_shape(part)
                    stored = _found(tensors, name, shape, None if part.kept else part.dtype)
                    index, view = part_index(geometry, part, stored, rows, k)
                    piece = RankSlice(name, stored.dtype, index, 0, view, fused_name(path, part.suffix, role, len(roles) == 1))
                    yield out(piece)
    yield from norm(arch.final_norm, "hidden")
    if not spec.tied and assignment[arch.head].layout not in FLOAT_LAYOUTS:
        head = linear_geometry(arch.head, plan.vocab, spec.dims["hidden"].elements, assignment[arch.head], dtype="BF16", bias=False)
        yield from packed(arch.head, head, plan.rows(rank), range(head.k))
    elif not spec.tied or f"{arch.head}.weight" in tensors:
        yield out(_vocab_slice(f"{arch.head}.weight", plan, rank, tensors))
    modules = {*spec.all_linears(), arch.head, arch.embedding}
    for name in sorted(set(tensors) - known):
        if spec.ignores(name):
            yield _whole(name, _found(tensors, name, None))
            continue
        if name.rpartition(".")[0] in modules or len(tensors[name].shape) > 1:
            raise InputError(name, "is not a tensor of this architecture", f"the tensors of {arch.name} as config.json describes them")
        yield _whole(name, _found(tensors, name, tuple(tensors[name].shape)))
