"""From a Checkpoint to a Decoder, a block, an embedding or a head: only the slices that this rank needs are read.

Names, shapes and dtypes are compared with the spec before anything is read or allocated. This module knows no method:
how a linear is stored comes from the assignment, where it may be cut from its geometry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import Checkpoint
from quantkit.comm import Comm, Solo
from quantkit.errors import InputError
from quantkit.geometry import FLOAT_LAYOUTS, FLOATS, Geometry, plain
from quantkit.layouts.base import LinearOp
from quantkit.layouts.plain import DenseLinear
from quantkit.layouts.registry import SharedRounding, load_linear
from quantkit.layouts.table import PackedTable
from quantkit.model.attention import Attention, kv_index
from quantkit.model.decoder import Block, Decoder, Embedding, Head, LayerNorm, Norm, ParallelLinear, RmsNorm
from quantkit.model.merge import merge_linears
from quantkit.model.reading import ReadAhead, Wanted
from quantkit.model.rope import Rotary
from quantkit.ops.ggml.tensor import encode_q8_0
from quantkit.plan import (
    COLUMN,
    EMBEDDING,
    GATHER,
    HEAD,
    ROW,
    ParallelPlan,
    embedding_geometry,
    encoded_head,
    linear_geometry,
    replace_rows,
    stored_geometry,
)
from quantkit.progress import Progress, silent
from quantkit.quant_config import stored_assignment
from quantkit.scheme import KEEP, Assignment
from quantkit.slices import fused_name


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the tensors come from, and which part of each is this rank's. ``presliced``: the checkpoint holds only those."""

    checkpoint: Checkpoint
    spec: ModelSpec
    assignment: Assignment
    plan: ParallelPlan | None
    rank: int
    presliced: bool

    def _part(self, name: str, whole: tuple[int, ...], dtypes: frozenset[str], index: tuple[slice, ...]) -> Wanted:
        """``index`` of a tensor of shape ``whole``; in a rank's own file the tensor is that part already."""
        if not self.presliced:
            return Wanted(name, whole, dtypes, index)
        cut = tuple(s.stop - s.start for s in index)
        return Wanted(name, cut, dtypes, tuple(slice(0, size) for size in cut))

    def _cut(self, role: str, n: int, k: int) -> tuple[range, range]:
        return (range(n), range(k)) if self.plan is None else self.plan.cut(role, self.rank)

    def norm(self, module: str, width: str) -> dict[str, Wanted]:
        """What a norm of ``width`` "hidden" or "head" stores, by suffix: whole on every rank."""
        size = self.spec.head_dim if width == "head" else self.spec.dims["hidden"].elements
        return {suffix: self._part(f"{module}.{suffix}", (size,), FLOATS, (slice(0, size),)) for suffix in self.spec.norm_parts}

    def positions(self) -> Wanted | None:
        """The table of learned positions: whole on every rank."""
        if self.spec.position_table is None:
            return None
        shape = self.spec.max_positions, self.spec.dims["hidden"].elements
        return self._part(f"{self.spec.position_table}.weight", shape, FLOATS, (slice(0, shape[0]), slice(0, shape[1])))

    def linear(self, path: str, role: str) -> tuple[Geometry, dict[str, Wanted]]:
        """The rank's geometry of a block's linear, and its stored parts by suffix."""
        whole = stored_geometry(self.spec, role, path, self.assignment.get(path, KEEP), dtype="BF16")
        n, k = self._cut(role, *self.spec.linear_shape(role))
        first = self.spec.rows(role).start
        return self._parts(path, role, whole, range(n.start + first, n.stop + first), k, not self.spec.linears[role].fused)

    def _parts(self, path: str, role: str, whole: Geometry, n: range, k: range, alone: bool) -> tuple[Geometry, dict[str, Wanted]]:
        """Elements ``n`` and ``k`` of the linear ``whole``, which is stored at ``path``."""
        cut, parts = whole.cut(n, k), {}
        for part in whole.parts:
            # What is kept in floats may be of any float dtype: BF16 above stands for all of them.
            dtypes = FLOATS if part.kept else frozenset({part.dtype})
            if self.presliced:
                name, shape = fused_name(path, part.suffix, role, alone), cut.shape(part)
                index = tuple(slice(0, size) for size in shape)
                parts[part.suffix] = Wanted(name, None if part.free else shape, dtypes, index)
                continue
            view = None if part.flat is None else whole.shape(part)
            shape = whole.stored_shape(part)
            parts[part.suffix] = Wanted(f"{path}.{part.suffix}", None if part.free else shape, dtypes, whole.slices(part, n, k), 0, view)
        return cut, parts

    def vocabulary(self, module: str, role: str) -> Wanted:
        """Rows of an embedding or a head in floats: the plan's rows, of which the last may lie past the true vocabulary."""
        name, vocab, hidden = f"{module}.weight", self.spec.dims["vocab"].elements, self.spec.dims["hidden"].elements
        rows, _ = self._cut(role, vocab, hidden)
        if self.presliced:
            return Wanted(name, (len(rows), hidden), FLOATS, (slice(0, len(rows)), slice(0, hidden)))
        start, stop = min(rows.start, vocab), min(rows.stop, vocab)
        index = (slice(start, stop), slice(0, hidden))
        return Wanted(name, (vocab, hidden), FLOATS, index, len(rows) - (stop - start))

    def packed_embedding(self) -> tuple[Geometry, dict[str, Wanted]] | None:
        """The rank's rows of a quantized embedding, with the pad rows when it is the head too; None when it is in floats."""
        whole = embedding_geometry(self.spec, self.assignment, dtype="BF16")
        if whole is None:
            return None
        return self._table(self.spec.architecture.embedding, EMBEDDING, whole, padded=self.spec.tied)

    def _table(self, path: str, role: str, whole: Geometry, *, padded: bool) -> tuple[Geometry, dict[str, Wanted]]:
        """The rank's rows of a quantized table of the vocabulary, with those of the padding when ``padded``."""
        rows = range(whole.n) if self.plan is None else self.plan.rows(self.rank)
        cut, parts = self._parts(path, role, whole, rows, range(whole.k), True)
        more = 0 if self.plan is None or not padded else len(self.plan.elements("vocab", self.rank)) - len(rows)
        if not more:
            return cut, parts
        return replace_rows(cut, cut.n + more), {suffix: replace(part, pad_rows=more) for suffix, part in parts.items()}

    def head(self) -> tuple[Geometry, dict[str, Wanted]]:
        """The rank's rows of a head of its own (not tied)."""
        name, hidden = self.spec.architecture.head, self.spec.dims["hidden"].elements
        scheme, vocab = self.assignment.get(name, KEEP), self.spec.dims["vocab"].elements
        if scheme.layout not in FLOAT_LAYOUTS:
            whole = linear_geometry(name, vocab, hidden, scheme, dtype="BF16", bias=False)
            return self._table(name, HEAD, whole, padded=True)
        weight = self.vocabulary(name, HEAD)
        rows = weight.index[0].stop - weight.index[0].start + weight.pad_rows
        return plain(rows, hidden, dtype="BF16"), {"weight": weight}

    def block(self, layer: int) -> Iterator[Wanted]:
        """Every tensor of a block."""
        for norm in self.spec.norms.values():
            yield from self.norm(self.spec.tensor(layer, norm.name), norm.width).values()
        for role, path in self.spec.block_linears(layer).items():
            yield from self.linear(path, role)[1].values()

    def embedding(self) -> Iterator[Wanted]:
        """Every tensor of the embedding."""
        packed, table = self.packed_embedding(), self.positions()
        yield from (self.vocabulary(self.spec.architecture.embedding, EMBEDDING),) if packed is None else packed[1].values()
        if table is not None:
            yield table

    def final_norm(self) -> Iterator[Wanted]:
        """Every tensor of the last norm."""
        yield from self.norm(self.spec.architecture.final_norm, "hidden").values()

    def everything(self) -> Iterator[Wanted]:
        """Every tensor of the model, in the order in which ``rank_slices`` puts them into a rank's file."""
        yield from self.embedding()
        for layer in range(self.spec.layers):
            yield from self.block(layer)
        yield from self.final_norm()
        if not self.spec.tied:
            yield from self.head()[1].values()


def _require(checkpoint: Checkpoint, want: Wanted) -> None:
    """Raise InputError when a tensor is missing, of another shape or of a wrong dtype."""
    if want.name not in checkpoint.tensors:
        shaped = "a tensor" if want.shape is None else f"a tensor of shape {list(want.shape)}"
        raise InputError(want.name, "is missing from the checkpoint", shaped)
    stored = tuple(checkpoint.tensors[want.name].shape)
    if want.shape is not None and stored != want.shape:
        raise InputError(want.name, f"has shape {list(stored)}", f"{list(want.shape)} from config.json")
    dtype = checkpoint.dtype(want.name)
    if dtype not in want.dtypes:
        raise InputError(want.name, f"is {dtype}", " or ".join(sorted(want.dtypes)))


def _check(source: _Source) -> None:
    """Raise InputError for the first tensor that does not fit, or that nothing would use: the model would not be the one stored."""
    known, arch = set(), source.spec.architecture
    for want in source.everything():
        _require(source.checkpoint, want)
        known.add(want.name)
    tied = f"{arch.head}.weight" if source.spec.tied else ""
    for name in source.checkpoint.tensors:
        if name not in known and name != tied and not source.spec.ignores(name):
            raise InputError(name, f"is no tensor of a {arch.name} model as config.json describes it", "only tensors that the model uses")


@dataclass(frozen=True, slots=True)
class _Loader:
    """What the tensors of a source become: modules in ``dtype`` on ``device``. They are taken from ``reader``, so in its order."""

    source: _Source
    reader: ReadAhead
    dtype: torch.dtype
    device: str
    comm: Comm
    parity: bool
    head_blocks: Geometry | None = None
    """What a head in floats is encoded to, whole; None: it stays as it is."""
    attention: str = "auto"

    def _op(self, geometry: Geometry, parts: dict[str, Wanted]) -> LinearOp:
        read = {suffix: self.reader.take(part) for suffix, part in parts.items()}
        return load_linear(geometry, read, dtype=self.dtype, device=self.device, parity=self.parity)

    def norm(self, module: str, width: str) -> Norm:
        spec = self.source.spec
        parts = {suffix: self.reader.take(part).to(self.device, self.dtype) for suffix, part in self.source.norm(module, width).items()}
        if "bias" in parts:
            return LayerNorm(parts["weight"], parts["bias"], spec.eps)
        return RmsNorm(parts["weight"], spec.eps, spec.architecture.norm_offset)

    def linear(self, path: str, role: str) -> ParallelLinear:
        geometry, parts = self.source.linear(path, role)
        op, plan = self._op(geometry, parts), self.source.plan
        if plan is None:
            return ParallelLinear(op, COLUMN, self.comm)
        if plan.modes[role] == ROW and plan.tp > 1 and geometry.scheme.activations and not self.parity:
            op = SharedRounding(op, self.comm)
        if plan.modes[role] != GATHER:
            return ParallelLinear(op, plan.modes[role], self.comm)
        out, inp = plan.roles[role]
        return ParallelLinear(op, GATHER, self.comm, plan.sizes(inp), plan.sizes(out))

    def block(self, layer: int, rotary: Rotary | None) -> Block:
        spec, plan = self.source.spec, self.source.plan
        heads, kv_heads = range(spec.dims["heads"].size), range(spec.dims["kv_heads"].size)
        group = len(heads) // len(kv_heads)
        if plan is not None:
            heads, kv_heads = plan.ranges["heads"][self.comm.rank], plan.ranges["kv_heads"][self.comm.rank]
        index = kv_index(heads, kv_heads, group)
        norms = {role: self.norm(spec.tensor(layer, norm.name), norm.width) for role, norm in spec.norms.items()}
        return Block(
            layer,
            {role: self.linear(path, role) for role, path in spec.block_linears(layer).items()},
            norms,
            Attention(spec.head_dim, spec.attention_scale, spec.windows[layer], spec.attention_softcap, index, self.attention),
            rotary,
            spec.activation,
            spec.moe if spec.moe is not None and spec.moe.sparse[layer] else None,
        )

    def embedding(self) -> Embedding:
        packed = self.source.packed_embedding()
        if packed is not None:
            geometry, parts = packed
            read = {suffix: self.reader.take(part) for suffix, part in parts.items()}
            return self.embedding_of(PackedTable(read, geometry, self.dtype, self.device))
        weight = self.reader.take(self.source.vocabulary(self.source.spec.architecture.embedding, EMBEDDING)).to(self.device, self.dtype)
        return self.embedding_of(weight)

    def embedding_of(self, weight: Tensor | PackedTable) -> Embedding:
        """The embedding that looks up in ``weight``, this rank's rows."""
        spec, plan = self.source.spec, self.source.plan
        scale = math.sqrt(spec.dims["hidden"].elements) if spec.architecture.embedding_scale else None
        first = 0 if plan is None else plan.elements("vocab", self.comm.rank).start
        table = self.source.positions()
        return Embedding(weight, first, scale, self.comm, None if table is None else self.reader.take(table).to(self.device, self.dtype))

    def head(self, embedding: Embedding | None) -> Head:
        """The head; of a tied model it shares the memory of ``embedding`` when that is given."""
        spec, plan = self.source.spec, self.source.plan
        if self.head_blocks is not None:
            op = self._encoded(self.head_blocks, embedding)
        else:
            op = self._tied(embedding or self.embedding()) if spec.tied else self._op(*self.source.head())
        vocab, own = spec.dims["vocab"].elements, not spec.tied or self.head_blocks is not None
        return Head(op, vocab, (vocab,) if plan is None else plan.sizes("vocab"), spec.logit_softcap, self.comm, own)

    def _encoded(self, blocks: Geometry, embedding: Embedding | None) -> LinearOp:
        """A head in floats, this rank's rows, as ``blocks``, which are encoded on the device."""
        weight = (embedding or self.embedding()).weight if self.source.spec.tied else self.reader.take(self.source.head()[1]["weight"])
        assert isinstance(weight, Tensor), "a quantized embedding is refused"
        found = encode_q8_0(weight.to(self.device))
        return load_linear(
            replace_rows(blocks, weight.shape[0]), {"weight": found}, dtype=self.dtype, device=self.device, parity=self.parity
        )

    def _tied(self, embedding: Embedding) -> LinearOp:
        weight = embedding.weight
        return DenseLinear(weight, None) if isinstance(weight, Tensor) else weight.linear(parity=self.parity)


def _whole_source(checkpoint: Checkpoint, spec: ModelSpec) -> _Source:
    return _Source(checkpoint, spec, stored_assignment(checkpoint.config, spec, checkpoint.tensors), None, 0, False)


def _reader(source: _Source, wanted: Iterable[Wanted], device: str) -> ReadAhead:
    """``wanted`` of ``source``, each of which fits. Raises InputError as ``_require`` does."""
    found = tuple(wanted)
    for want in found:
        _require(source.checkpoint, want)
    return ReadAhead(source.checkpoint, found, device)


def _rotary(spec: ModelSpec, layer: int, dtype: torch.dtype, device: str) -> Rotary | None:
    if spec.position_table is not None:
        return None
    return Rotary(spec.ropes[layer], spec.rotary_dim, spec.max_positions, dtype, device)


def rank_tensors(
    checkpoint: Checkpoint, *, plan: ParallelPlan | None = None, rank: int = 0, presliced: Assignment | None = None
) -> tuple[Wanted, ...]:
    """What ``load_decoder`` reads of ``checkpoint``, in its order."""
    spec = spec_for(checkpoint.config)
    assignment = presliced or stored_assignment(checkpoint.config, spec, checkpoint.tensors)
    return tuple(_Source(checkpoint, spec, assignment, plan, rank, presliced is not None).everything())


def load_decoder(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    plan: ParallelPlan | None = None,
    comm: Comm | None = None,
    parity: bool = False,
    presliced: Assignment | None = None,
    merge: bool = False,
    lm_head: str = "auto",
    attention: str = "auto",
    progress: Progress = silent,
) -> Decoder:
    """The model of ``checkpoint``, or with ``plan`` the slices of rank ``comm.rank``.

    ``presliced`` is how the parent stores its linears, when the checkpoint holds only this rank's slices.

    ``dtype`` is that of activations and unquantized weights. ``parity`` dequantizes packed linears exactly in ``dtype`` at
    each call instead of using a fast kernel. ``merge``: linears of one input become one product where they can. ``lm_head``: a key of
    ``plan.LM_HEADS``. ``attention``: one of ``attention.BACKENDS``. Raises InputError, before anything is read, for a tensor that is
    missing, has another shape or dtype than the model needs, or has no place in it, for a plan that is not for this model and group, and
    for a head that cannot be as ``lm_head`` says.
    """
    spec, comm = spec_for(checkpoint.config), comm or Solo()
    assignment = presliced or stored_assignment(checkpoint.config, spec, checkpoint.tensors)
    ranks = 1 if plan is None else plan.tp
    if ranks != comm.size:
        raise InputError("plan", f"is for {ranks} ranks, {comm.size} are running", "a rank for each part", f"--tp {ranks}")
    if plan is not None:
        plan.check(spec, assignment, dtype="BF16", where="plan")
    head_blocks = encoded_head(spec, assignment, lm_head)
    source = _Source(checkpoint, spec, assignment, plan, comm.rank, presliced is not None)
    rotaries: list[Rotary | None] = []
    for layer in range(spec.layers):
        known = next((rotary for rotary in rotaries if rotary is not None and rotary.rope == spec.ropes[layer]), None)
        rotaries.append(known or _rotary(spec, layer, dtype, device))
    _check(source)
    with ReadAhead(checkpoint, source.everything(), device, progress) as reader:
        loader = _Loader(source, reader, dtype, device, comm, parity, head_blocks, attention)
        embedding = loader.embedding()
        blocks = []
        for layer, rotary in enumerate(rotaries):
            blocks.append(loader.block(layer, rotary))
            if merge:
                merge_linears(blocks[-1])
        norm = loader.norm(spec.architecture.final_norm, "hidden")
        head = loader.head(embedding)
    kv_heads = spec.dims["kv_heads"].size if plan is None else len(plan.ranges["kv_heads"][comm.rank])
    return Decoder(spec, embedding, blocks, norm, head, comm, kv_heads)


def load_block(
    checkpoint: Checkpoint, spec: ModelSpec, layer: int, *, dtype: torch.dtype, device: str = "cpu", parity: bool = False
) -> Block:
    """Block ``layer`` alone, whole. Raises InputError as ``load_decoder`` does."""
    source = _whole_source(checkpoint, spec)
    with _reader(source, source.block(layer), device) as reader:
        return _Loader(source, reader, dtype, device, Solo(), parity).block(layer, _rotary(spec, layer, dtype, device))


EMBEDDING_ROWS = 4096
"""Rows of the vocabulary that are read at a time."""


def embedded(checkpoint: Checkpoint, spec: ModelSpec, tokens: Tensor, *, dtype: torch.dtype) -> Tensor:
    """``tokens [B, t]``, each sequence from its beginning -> ``[B, t, hidden]``: what the embedding gives.

    Only rows that are asked for stay in memory, however large the vocabulary. Raises InputError as ``load_decoder`` does.
    """
    source = _whole_source(checkpoint, spec)
    positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0])
    if source.packed_embedding() is not None:
        with _reader(source, source.embedding(), "cpu") as reader:
            table = _Loader(source, reader, dtype, "cpu", Solo(), False).embedding()
        return table(tokens.reshape(-1), positions).reshape(*tokens.shape, -1)
    want, *others = source.embedding()
    ids, index = torch.unique(tokens, return_inverse=True)
    rows = torch.empty(ids.shape[0], spec.dims["hidden"].elements, dtype=dtype)
    starts = torch.unique(ids // EMBEDDING_ROWS).mul(EMBEDDING_ROWS).tolist()
    some = [replace(want, index=(slice(first, min(first + EMBEDDING_ROWS, want.index[0].stop)), want.index[1])) for first in starts]
    with _reader(source, (*some, *others), "cpu") as reader:
        for part in some:
            here = (ids >= part.index[0].start) & (ids < part.index[0].stop)
            rows[here] = reader.take(part)[ids[here] - part.index[0].start].to(dtype)
        table = _Loader(source, reader, dtype, "cpu", Solo(), False).embedding_of(rows)
    return replace(table, first=0)(index.reshape(-1), positions).reshape(*tokens.shape, -1)


def load_head(
    checkpoint: Checkpoint, spec: ModelSpec, *, dtype: torch.dtype, device: str = "cpu", parity: bool = False
) -> tuple[Norm, Head]:
    """The final norm and the head alone, whole: ``logits = head(norm(x))``. Raises InputError as ``load_decoder`` does."""
    source = _whole_source(checkpoint, spec)
    head = source.embedding() if spec.tied else source.head()[1].values()
    with _reader(source, (*source.final_norm(), *head), device) as reader:
        loader = _Loader(source, reader, dtype, device, Solo(), parity)
        return loader.norm(spec.architecture.final_norm, "hidden"), loader.head(None)
