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
from quantkit.geometry import DTYPE_BYTES
from quantkit.plan import HEAD, ParallelPlan, block_geometries, head_geometry
from quantkit.scheme import Assignment


class Stored(Protocol):
    """A tensor as its header describes it."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class RankSlice:
    """One tensor of one rank: ``index`` of the parent's tensor ``name``, then ``pad_rows`` rows of zeros."""

    name: str
    dtype: str
    index: tuple[slice, ...]
    pad_rows: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = [s.stop - s.start for s in self.index]
        return (sizes[0] + self.pad_rows, *sizes[1:]) if sizes else ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def _whole(name: str, stored: Stored) -> RankSlice:
    return RankSlice(name, stored.dtype, tuple(slice(0, size) for size in stored.shape))


def _found(tensors: Mapping[str, Stored], name: str, shape: tuple[int, ...], dtype: str | None = None) -> Stored:
    if name not in tensors:
        raise InputError(name, "is missing from the checkpoint", f"a tensor of shape {list(shape)}")
    stored = tensors[name]
    if tuple(stored.shape) != shape or (dtype is not None and stored.dtype != dtype):
        raise InputError(name, f"is {stored.dtype} {list(stored.shape)}", f"{dtype or stored.dtype} {list(shape)} from config.json")
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

    def norm(module: str, width: str) -> RankSlice:
        size = spec.head_dim if width == "head" else spec.dims["hidden"].elements
        name = f"{module}.weight"
        return out(_whole(name, _found(tensors, name, (size,))))

    yield out(_vocab_slice(f"{arch.embedding}.weight", plan, rank, tensors))
    linears = list(block_geometries(spec, assignment, dtype="BF16"))  # of kept tensors the file's own dtype counts
    for layer in range(spec.layers):
        for item in spec.norms.values():
            yield norm(spec.tensor(layer, item.name), item.width)
        for role, path, geometry in linears[layer * len(spec.linears) : (layer + 1) * len(spec.linears)]:
            n, k = plan.cut(role, rank)
            for part in geometry.parts:
                name, kept = f"{path}.{part.suffix}", part.suffix == "bias" or geometry.layout == "plain"
                stored = _found(tensors, name, geometry.shape(part), None if kept else part.dtype)
                yield out(RankSlice(name, stored.dtype, geometry.slices(part, n, k)))
    yield norm(arch.final_norm, "hidden")
    if not spec.tied and assignment[arch.head].layout != "plain":
        geometry = head_geometry(spec, assignment, dtype="BF16")
        for part in geometry.parts:
            name = f"{arch.head}.{part.suffix}"
            stored = _found(tensors, name, geometry.shape(part), part.dtype)
            yield out(RankSlice(name, stored.dtype, geometry.slices(part, *plan.cut(HEAD, rank))))
    elif not spec.tied or f"{arch.head}.weight" in tensors:
        yield out(_vocab_slice(f"{arch.head}.weight", plan, rank, tensors))
    modules = {*spec.all_linears(), arch.head, arch.embedding}
    for name in sorted(set(tensors) - known):
        if name.rpartition(".")[0] in modules or len(tensors[name].shape) > 1:
            raise InputError(name, "is not a tensor of this architecture", f"the tensors of {arch.name} as config.json describes them")
        yield _whole(name, _found(tensors, name, tuple(tensors[name].shape)))
