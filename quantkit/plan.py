"""ParallelPlan: which range of each named dim a rank owns, and what that costs in bytes.

Ranges are whole granules (quantization group, packed word, head, 64 vocabulary rows) and may be uneven or empty
(``formats.md`` 9.7). Everything here is numbers from ``config.json`` and an Assignment: no file, no torch, no weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from quantkit.arch.spec import FFN_DIMS, Dim, ModelSpec, padded_size
from quantkit.errors import InputError
from quantkit.geometry import DTYPE_BYTES, FLOAT_LAYOUTS, ZERO_ROWS, Geometry, geometry_of, ggml_scheme, plain
from quantkit.scheme import KEEP, Assignment, LinearScheme

VOCAB_GRANULE = 64
"""The vocabulary is padded with zero rows to a multiple of this, and cut in pieces of this (``formats.md`` 9.9)."""
TILE = 16
"""Where a dim allows it, granules are grown to this many elements: matrix kernels work on tiles of 16."""
MAX_TP = 1024
WIDE = 1 << 15
"""A width that any group, word and block divides."""
COLUMN, ROW, GATHER, COPY = "column", "row", "gather", "copy"
EMBEDDING, HEAD = "embedding", "head"
LM_HEADS: Mapping[str, str | None] = MappingProxyType({"auto": None, "q8_0": "Q8_0"})
"""How the head is held by a runtime: as it is stored, or as blocks of a type that it is encoded to when it is loaded."""


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """Ranges of every named dim for ``tp`` ranks, and how each linear is cut.

    ``dims`` are the model's, with vocab padded; ``vocab`` is its true size. ``ranges`` count in units of the dim (heads,
    channels, rows). ``roles`` gives each role's (out, in) dims. ``modes``: "column" cuts N, the output stays cut; "row"
    cuts K, outputs are summed; "gather" gathers the input, cuts N by "hidden", and gathers the output; "copy" is whole on every rank.
    """

    tp: int
    vocab: int
    dims: Mapping[str, Dim]
    ranges: Mapping[str, tuple[range, ...]]
    roles: Mapping[str, tuple[str, str]]
    modes: Mapping[str, str]

    def elements(self, dim: str, rank: int) -> range:
        """What ``rank`` owns of ``dim``, in elements. The end of vocab may lie in the padding."""
        width, owned = self.dims[dim].width, self.ranges[dim][rank]
        return range(owned.start * width, owned.stop * width)

    def sizes(self, dim: str) -> tuple[int, ...]:
        """Elements of ``dim`` per rank, in rank order: the sizes of an all-gather."""
        return tuple(len(self.elements(dim, rank)) for rank in range(self.tp))

    def cut(self, role: str, rank: int) -> tuple[range, range]:
        """The elements of N and of K of linear ``role`` (or "embedding", "head") that ``rank`` stores."""
        out, inp = self.roles[role]
        n, k = range(self.dims[out].elements), range(self.dims[inp].elements)
        if self.modes[role] == COPY:
            return n, k
        if self.modes[role] == ROW:
            return n, self.elements(inp, rank)
        return self.elements(out, rank), k

    def rows(self, rank: int) -> range:
        """The rows of the vocabulary that ``rank`` owns, none of the padding: what it stores of a quantized embedding."""
        owned = self.elements("vocab", rank)
        return range(min(owned.start, self.vocab), min(owned.stop, self.vocab))

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data, for a manifest."""
        return {
            "tp": self.tp,
            "vocab": self.vocab,
            "dims": {name: [dim.size, dim.width] for name, dim in sorted(self.dims.items())},
            "ranges": {name: [[r.start, r.stop] for r in ranges] for name, ranges in sorted(self.ranges.items())},
            "roles": {role: list(dims) for role, dims in sorted(self.roles.items())},
            "modes": dict(sorted(self.modes.items())),
        }

    @staticmethod
    def from_json(data: Any, where: str = "quantkit.json: plan") -> ParallelPlan:
        """Read a stored plan back. Raises InputError when it is not a plan, or its ranges do not cover each dim once."""
        try:
            plan = ParallelPlan(
                tp=_whole(data["tp"]),
                vocab=_whole(data["vocab"]),
                dims=MappingProxyType({str(name): Dim(_whole(size), _whole(width)) for name, (size, width) in data["dims"].items()}),
                ranges=MappingProxyType(
                    {str(name): tuple(range(_whole(a), _whole(b)) for a, b in ranges) for name, ranges in data["ranges"].items()}
                ),
                roles=MappingProxyType({str(role): (str(out), str(inp)) for role, (out, inp) in data["roles"].items()}),
                modes=MappingProxyType({str(role): str(mode) for role, mode in data["modes"].items()}),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise InputError(where, f"is not a plan ({type(exc).__name__}: {exc})", "tp, vocab, dims, ranges, roles and modes") from exc
        _check_cover(plan, where)
        return plan

    def check(self, spec: ModelSpec, assignment: Assignment, *, dtype: str, where: str = "quantkit.json: plan") -> None:
        """Raise InputError unless this plan is for ``spec``, and cuts no linear of ``assignment`` inside a granule."""
        if dict(self.dims) != _plan_dims(spec) or dict(self.roles) != _plan_roles(spec) or self.vocab != spec.dims["vocab"].size:
            raise InputError(where, "is for a model of other dims or linears", "the plan of the config.json beside it")
        distinct = _distinct(spec, assignment, dtype)
        group, bundle = spec.dims["heads"].size // spec.dims["kv_heads"].size, _bundle(spec, distinct)
        for rank, owned in enumerate(self.ranges["heads"]):
            held, right = self.ranges["kv_heads"][rank], _kv_of(owned, group, bundle)
            if (held.start, held.stop) != (right.start, right.stop):
                raise InputError(where, f"rank {rank} does not hold the KV heads of its query heads", f"{right.start}:{right.stop}")
        for (role, _), (path, geometry) in distinct.items():
            for rank in range(self.tp):
                n, k = self.cut(role, rank)
                try:
                    geometry.cut(self.rows(rank) if role == EMBEDDING else n, k)
                except InputError as exc:
                    raise InputError(where, f"rank {rank}: {path}: {exc.what}", exc.expected) from exc


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1 << 40:
        raise ValueError(f"{value!r} is no count")
    return value


def _plan_dims(spec: ModelSpec) -> dict[str, Dim]:
    vocab = spec.dims["vocab"].size
    return {**spec.dims, "vocab": Dim(math.ceil(vocab / VOCAB_GRANULE) * VOCAB_GRANULE)}


def _plan_roles(spec: ModelSpec) -> dict[str, tuple[str, str]]:
    blocks = {role: (linear.out, linear.inp) for role, linear in spec.linears.items()}
    return {**blocks, EMBEDDING: ("vocab", "hidden"), HEAD: ("vocab", "hidden")}


def _check_cover(plan: ParallelPlan, where: str) -> None:
    if not 1 <= plan.tp <= MAX_TP:
        raise InputError(where, f"tp is {plan.tp}", f"1 to {MAX_TP}")
    cut = {role: mode for role, mode in plan.modes.items() if role in plan.roles and mode != COPY}
    used = {plan.roles[role][1] if mode == ROW else plan.roles[role][0] for role, mode in cut.items()}
    if set(plan.modes) != set(plan.roles) or not set(plan.modes.values()) <= {COLUMN, ROW, GATHER, COPY}:
        known = f"{COLUMN}, {ROW}, {GATHER} or {COPY}"
        raise InputError(where, "has a linear without a mode, or an unknown mode", f"{known} for each of {sorted(plan.roles)}")
    if {dim for pair in plan.roles.values() for dim in pair} - set(plan.dims) or not used <= set(plan.ranges) <= set(plan.dims):
        raise InputError(where, "has a dim without a size or without ranges", "both for every dim that is cut")
    if not 0 <= plan.dims["vocab"].size - plan.vocab < VOCAB_GRANULE:
        raise InputError(
            where, f"vocab {plan.vocab} padded to {plan.dims['vocab'].size}", f"padding to the next multiple of {VOCAB_GRANULE}"
        )
    for name, ranges in plan.ranges.items():
        if len(ranges) != plan.tp:
            raise InputError(where, f"{len(ranges)} ranges of {name} for {plan.tp} ranks", "one each")
        if name == "kv_heads":
            continue
        stops = [0, *(r.stop for r in ranges)]
        if (
            any(r.start != stop for r, stop in zip(ranges, stops, strict=False))
            or stops != sorted(stops)
            or stops[-1] != plan.dims[name].size
        ):
            raise InputError(where, f"the ranges of {name} do not cover 0:{plan.dims[name].size} once, in rank order", "adjoining ranges")
    if "kv_heads" in plan.dims:
        heads, kv = plan.dims["heads"].size, plan.dims["kv_heads"].size
        if not kv or heads % kv:
            raise InputError(where, f"{heads} heads share {kv} KV heads", "a divisor")
        for rank, owned in enumerate(plan.ranges["heads"]):
            held, least = plan.ranges["kv_heads"][rank], _kv_of(owned, heads // kv, 1)
            if bool(held) != bool(owned) or held.stop > kv or (owned and not held.start <= least.start < least.stop <= held.stop):
                raise InputError(where, f"rank {rank} does not hold the KV heads of its query heads", f"{least.start}:{least.stop}")


def _kv_of(heads: range, group: int, bundle: int) -> range:
    """The KV heads that query heads ``heads`` read, ``group`` query heads to each, in whole bundles."""
    start = heads.start // group // bundle * bundle
    return range(start, math.ceil(heads.stop / group / bundle) * bundle if heads else start)


def _bundle(spec: ModelSpec, distinct: Mapping[tuple[str, Geometry], tuple[str, Geometry]]) -> int:
    """KV heads that no cut parts: those that a granule of k and v holds together, or whose query heads one of q does."""

    def unit(dim: str) -> int:
        granules = [geometry.granule("N") for role, geometry in distinct if role in spec.linears and spec.linears[role].out == dim]
        return _units_on(math.lcm(*granules), spec.head_dim)

    group, q_unit = spec.dims["heads"].size // spec.dims["kv_heads"].size, unit("heads")
    return math.lcm(unit("kv_heads"), q_unit // math.gcd(q_unit, group))


def _deal(units: int, ranks: int, unit: int = 1, first: int = 0) -> tuple[range, ...]:
    """``units`` granules of ``unit`` dealt to ``ranks`` in order, the first ranks getting one more; from ``first`` on."""
    base, extra = divmod(units, ranks)
    stops = [first + unit * (rank * base + min(rank, extra)) for rank in range(ranks + 1)]
    return tuple(range(a, b) for a, b in pairwise(stops))


def linear_geometry(path: str, n: int, k: int, scheme: LinearScheme, *, dtype: str, bias: bool) -> Geometry:
    """The geometry of the linear at ``path``, whole. Raises InputError naming it, the numbers and the remedy."""
    try:
        return geometry_of(scheme, n, k, dtype=dtype, bias=bias)
    except InputError as exc:
        fits = [g for g in (128, 64, 32) if k % g == 0]
        grouped = scheme.group_size > 0 and k % scheme.group_size != 0
        hint = f"--group-size {fits[0]} divides {k}" if fits and grouped else f"keep it in floats: --override '{path}:keep'"
        raise InputError(path, exc.what, exc.expected, hint) from exc


def role_scheme(spec: ModelSpec, role: str, scheme: LinearScheme) -> LinearScheme:
    """``scheme``, or how the architecture stores this linear when it stays in floats."""
    if scheme.layout == "plain" and spec.linears[role].transposed:
        return replace(scheme, layout="transposed")
    return scheme


def block_geometries(spec: ModelSpec, assignment: Assignment, *, dtype: str) -> Iterable[tuple[str, str, Geometry]]:
    """(role, module path, whole geometry) of every linear of every block, in order; ``dtype`` of floats kept as they are.

    Of a fused projection each part is a linear of its own here. Raises InputError for a linear that the assignment lacks or
    whose shape its layout cannot hold.
    """
    known: dict[tuple[str, LinearScheme], Geometry] = {}
    for layer in range(spec.layers):
        for role, path in spec.block_linears(layer).items():
            if path not in assignment:
                raise InputError(path, "the assignment does not say how it is stored", "a scheme for every linear")
            key = role, assignment[path]
            if key not in known:
                scheme, (n, k) = role_scheme(spec, role, assignment[path]), spec.linear_shape(role)
                known[key] = linear_geometry(path, n, k, scheme, dtype=dtype, bias=bool(spec.linears[role].bias))
            yield role, path, known[key]


def stored_geometry(spec: ModelSpec, role: str, path: str, scheme: LinearScheme, *, dtype: str) -> Geometry:
    """The geometry of what is stored at ``path``: the linear ``role``, with all that it is fused with.

    Raises InputError as ``linear_geometry`` does.
    """
    n, k = spec.stored_shape(role)
    return linear_geometry(path, n, k, role_scheme(spec, role, scheme), dtype=dtype, bias=bool(spec.linears[role].bias))


def stored_geometries(
    spec: ModelSpec, assignment: Assignment, layer: int, *, dtype: str
) -> Iterable[tuple[tuple[str, ...], str, Geometry]]:
    """(roles, module path, whole geometry) of every stored linear of a block: more than one role where they are fused."""
    for path, roles in spec.block_modules(layer).items():
        if path not in assignment:
            raise InputError(path, "the assignment does not say how it is stored", "a scheme for every linear")
        yield roles, path, stored_geometry(spec, roles[0], path, assignment[path], dtype=dtype)


def embedding_geometry(spec: ModelSpec, assignment: Assignment, *, dtype: str) -> Geometry | None:
    """A quantized embedding, of the true vocabulary: no token looks up a row of the padding. None: it is in floats.

    Raises InputError as ``linear_geometry`` does.
    """
    name, vocab, hidden = spec.architecture.embedding, spec.dims["vocab"].elements, spec.dims["hidden"].elements
    scheme = assignment.get(name, KEEP)
    return None if scheme.layout in FLOAT_LAYOUTS else linear_geometry(name, vocab, hidden, scheme, dtype=dtype, bias=False)


def stored_linears(spec: ModelSpec, assignment: Assignment, *, dtype: str) -> Iterable[tuple[tuple[str, ...], str, Geometry]]:
    """``stored_geometries`` of every block, a quantized embedding before them, with the role EMBEDDING, and a head of its own after
    them, unpadded, with the role HEAD. Raises InputError as a layout does."""
    table = embedding_geometry(spec, assignment, dtype=dtype)
    if table is not None:
        yield (EMBEDDING,), spec.architecture.embedding, table
    for layer in range(spec.layers):
        yield from stored_geometries(spec, assignment, layer, dtype=dtype)
    if not spec.tied:
        name, vocab, hidden = spec.architecture.head, spec.dims["vocab"].elements, spec.dims["hidden"].elements
        yield (HEAD,), name, linear_geometry(name, vocab, hidden, assignment[name], dtype=dtype, bias=False)


def quantized_size(spec: ModelSpec, assignment: Assignment) -> tuple[int, int, int]:
    """How many stored linears of the blocks are quantized, their weights, and their bytes without biases. Raises as a layout does."""
    count = weights = nbytes = 0
    for layer in range(spec.layers):
        for path, roles in spec.block_modules(layer).items():
            if assignment[path].layout not in FLOAT_LAYOUTS:
                n, k = spec.stored_shape(roles[0])
                count, weights, nbytes = count + 1, weights + n * k, nbytes + geometry_of(assignment[path], n, k, dtype="F16").total_bytes
    return count, weights, nbytes


def replace_rows(geometry: Geometry, rows: int) -> Geometry:
    """``geometry``, whole or cut, with ``rows`` rows: of a layout in ZERO_ROWS, padded with zero bytes."""
    return replace(geometry, n=rows, whole=(geometry.whole[0] + rows - geometry.n, geometry.whole[1]))


def head_geometry(spec: ModelSpec, assignment: Assignment, *, dtype: str) -> Geometry:
    """The head, its rows padded. Raises InputError when the vocabulary would need padding that its layout cannot hold."""
    rows, hidden = _plan_dims(spec)["vocab"].size, spec.dims["hidden"].elements
    name = spec.architecture.head
    if name not in assignment:
        raise InputError(name, "the assignment does not say how it is stored", "a scheme for every linear")
    if assignment[name].layout not in ZERO_ROWS and rows != spec.dims["vocab"].size:
        raise InputError(
            name,
            f"is quantized, and its {spec.dims['vocab'].size} rows are no multiple of {VOCAB_GRANULE}",
            "a head in floats, which can be padded",
            f"quantize with --override '{name}:keep'",
        )
    return linear_geometry(name, rows, hidden, assignment[name], dtype=dtype, bias=False)


def encoded_head(spec: ModelSpec, assignment: Assignment, lm_head: str) -> Geometry | None:
    """The blocks, rows of the padding among them, that a head in floats is encoded to where ``lm_head`` says so; None: it stays as it is.

    Of a tied model that is a second matrix: tokens are looked up in the embedding as before. Raises InputError for a name that is none of
    LM_HEADS, a head that is quantized already, and a width that blocks do not divide.
    """
    if lm_head not in LM_HEADS:
        raise InputError("--lm-head", f"is {lm_head!r}", f"one of {', '.join(LM_HEADS)}")
    kind = LM_HEADS[lm_head]
    if kind is None:
        return None
    name = spec.architecture.embedding if spec.tied else spec.architecture.head
    scheme, blocks = assignment.get(name, KEEP), ggml_scheme(kind)
    if scheme.layout not in FLOAT_LAYOUTS:
        raise InputError("--lm-head", f"is {lm_head}, and {name} is quantized already", "a head in floats", "leave --lm-head out")
    rows, hidden = _plan_dims(spec)["vocab"].size, spec.dims["hidden"].elements
    if hidden % blocks.group_size:
        raise InputError("--lm-head", f"is {lm_head}, and {name} is {hidden} wide", f"a multiple of {blocks.group_size}")
    return geometry_of(blocks, rows, hidden, dtype="F32")


def _distinct(spec: ModelSpec, assignment: Assignment, dtype: str) -> dict[tuple[str, Geometry], tuple[str, Geometry]]:
    """Each different (role, geometry) once, with the path of the first linear that has it; the head under "head", a quantized embedding
    under "embedding"."""
    found: dict[tuple[str, Geometry], tuple[str, Geometry]] = {}
    for role, path, geometry in block_geometries(spec, assignment, dtype=dtype):
        found.setdefault((role, geometry), (path, geometry))
    if not spec.tied:
        geometry = head_geometry(spec, assignment, dtype=dtype)
        found[HEAD, geometry] = spec.architecture.head, geometry
    table = embedding_geometry(spec, assignment, dtype=dtype)
    if table is not None:
        found[EMBEDDING, table] = spec.architecture.embedding, table
    return found


def make_plan(spec: ModelSpec, assignment: Assignment, tp: int, *, dtype: str) -> ParallelPlan:
    """Deal every dim of ``spec`` to ``tp`` ranks (``formats.md`` 9.7 to 9.9); the same arguments give the same plan.

    ``dtype`` (safetensors name) is that of the tensors kept as they are. Raises InputError naming the layer, the numbers
    and the remedy when a linear can be cut nowhere.
    """
    if not 1 <= tp <= MAX_TP:
        raise InputError("--tp", f"is {tp}", f"1 to {MAX_TP}")
    distinct = _distinct(spec, assignment, dtype)
    roles = _plan_roles(spec)

    def granule(dim: str, wanted: Iterable[str]) -> int:
        names = set(wanted)
        return math.lcm(*(geometry.granule(dim) for role, geometry in distinct if role in names))

    def producers(name: str) -> list[str]:
        return [role for role in spec.linears if roles[role][0] == name]

    def consumers(name: str) -> list[str]:
        return [role for role in spec.linears if roles[role][1] == name]

    dims = _plan_dims(spec)
    modes = dict.fromkeys(roles, COLUMN)
    modes |= {role: COPY for role, linear in spec.linears.items() if not linear.quantize}
    ranges = {"vocab": _deal(dims["vocab"].size // VOCAB_GRANULE, tp, VOCAB_GRANULE)}
    heads, kv_heads = dims["heads"], dims["kv_heads"]
    q_unit, bundle = _units_on(granule("N", producers("heads")), heads.width), _bundle(spec, distinct)
    o_granule = granule("K", consumers("heads"))
    ranges["heads"] = _deal_heads(spec, tp, q_unit, bundle, _units_on(o_granule, heads.width))
    ranges["kv_heads"] = tuple(_kv_of(owned, heads.size // kv_heads.size, bundle) for owned in ranges["heads"])
    on_granule = all(owned.start * heads.width % o_granule == 0 for owned in ranges["heads"] if owned)
    cut_heads_k = on_granule and heads.elements // o_granule >= tp
    modes |= dict.fromkeys(consumers("heads"), ROW if tp == 1 or cut_heads_k else GATHER)
    for name in (dim for dim in FFN_DIMS if producers(dim)):
        down_granule, ffn_n = granule("K", consumers(name)), granule("N", producers(name))
        whole = _unit(dims[name].size, math.lcm(ffn_n, down_granule), tp)
        cut_k = dims[name].size // whole >= tp
        unit = whole if cut_k else _unit(dims[name].size, ffn_n, tp)
        ranges[name] = _deal(dims[name].size // unit, tp, unit)
        modes |= dict.fromkeys(consumers(name), ROW if tp == 1 or cut_k else GATHER)
    gathered = [role for role, mode in modes.items() if mode == GATHER]
    if gathered:
        unit = _unit(dims["hidden"].size, granule("N", gathered), tp)
        ranges["hidden"] = _deal(dims["hidden"].size // unit, tp, unit)
    plan = ParallelPlan(
        tp=tp,
        vocab=spec.dims["vocab"].size,
        dims=MappingProxyType(dims),
        ranges=MappingProxyType(ranges),
        roles=MappingProxyType(roles),
        modes=MappingProxyType(modes),
    )
    plan.check(spec, assignment, dtype=dtype, where="plan")
    return plan


def _units_on(granule: int, width: int) -> int:
    """The fewest units of ``width`` elements whose end lies on a granule."""
    return granule // math.gcd(granule, width)


def _unit(size: int, granule: int, tp: int) -> int:
    """The elements to deal at once: whole granules, grown to TILE where every rank still gets some."""
    tiled = math.lcm(granule, TILE)
    return tiled if size % tiled == 0 and size // tiled >= tp else granule


def _deal_heads(spec: ModelSpec, tp: int, q_unit: int, bundle: int, o_unit: int) -> tuple[range, ...]:
    """Query heads per rank: those of whole bundles of KV heads while there are enough, else each bundle's among its own ranks.

    The units count heads: cuts of q and of o fall on a granule at multiples of them. o's is met where every rank can still be
    served; q's always.
    """
    heads, kv = spec.dims["heads"].size, spec.dims["kv_heads"].size
    group = heads // kv
    wanted = math.lcm(bundle, o_unit // math.gcd(o_unit, group))
    for each in (wanted, bundle):
        if tp <= kv // each:
            return _deal(kv // each, tp, each * group)
    bundles, size, share = kv // bundle, bundle * group, math.lcm(q_unit, o_unit)
    if size % share or size // share < math.ceil(tp / bundles):
        share = q_unit
    counts = [len(ranks) for ranks in _deal(tp, bundles)]
    return tuple(owned for number, ranks in enumerate(counts) for owned in _deal(size // share, ranks, share, number * size))


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes that one rank holds: exact sizes of stored tensors, and KV bytes per token of context."""

    linears: int
    vocabulary: int
    """Embedding and head (once when tied), pad rows included."""
    norms: int
    kv_per_token: int

    @property
    def weights(self) -> int:
        return self.linears + self.vocabulary + self.norms


def rank_memory(
    spec: ModelSpec, assignment: Assignment, plan: ParallelPlan, *, dtype: str, kv_dtype: str, lm_head: str = "auto"
) -> tuple[RankMemory, ...]:
    """Bytes per rank by geometry, with kept tensors in ``dtype`` and the KV cache in ``kv_dtype`` (safetensors names).

    ``lm_head``: a key of LM_HEADS. Raises InputError as ``encoded_head``.
    """
    widths = {"hidden": spec.dims["hidden"].elements, "head": spec.head_dim}
    norm_elements = spec.layers * sum(widths[norm.width] for norm in spec.norms.values()) + widths["hidden"]
    rows, hidden = plan.dims["vocab"].size, range(widths["hidden"])
    packed = embedding_geometry(spec, assignment, dtype=dtype)
    tables = [] if packed is not None else [plain(rows, len(hidden), dtype=dtype)]
    if packed is not None and spec.tied:  # the head multiplies by it, pad rows and all
        tables, packed = [replace_rows(packed, rows)], None
    encoded = encoded_head(spec, assignment, lm_head)
    if encoded is not None:
        tables.append(encoded)
    elif not spec.tied:
        tables.append(head_geometry(spec, assignment, dtype=dtype))
    counts: dict[tuple[str, Geometry], int] = {}
    for role, _, geometry in block_geometries(spec, assignment, dtype=dtype):
        counts[role, geometry] = counts.get((role, geometry), 0) + 1
    return tuple(
        RankMemory(
            linears=sum(count * geometry.cut(*plan.cut(role, rank)).total_bytes for (role, geometry), count in counts.items()),
            vocabulary=sum(table.cut(*plan.cut(HEAD, rank)).total_bytes for table in tables)
            + (0 if packed is None else packed.cut(plan.rows(rank), hidden).total_bytes),
            norms=norm_elements * DTYPE_BYTES[dtype],
            kv_per_token=2 * spec.layers * len(plan.elements("kv_heads", rank)) * DTYPE_BYTES[kv_dtype],
        )
        for rank in range(plan.tp)
    )


KV_BLOCK = 16
"""Tokens of a block of the KV cache."""
KV_DTYPES: Mapping[str, str | None] = MappingProxyType({"auto": None, "fp8": "F8_E4M3"})
"""How keys and values may be stored: as computed, or as a dtype of safetensors'."""
PASS_TOKENS: Mapping[str, int] = MappingProxyType({"cpu": 1024, "cuda": 4096})
PASS_SEQUENCES: Mapping[str, int] = MappingProxyType({"cpu": 8, "cuda": 128})
"""What one pass of the runtime is over at most, where nobody says otherwise: tokens, and sequences that get one more."""


RUNTIME_BYTES = 3 << 29
"""An estimate of what a rank takes of a GPU beside all that: CUDA's context, the libraries' workspaces, graphs, the allocator's gaps."""
GROUP_BYTES = 7 << 28
"""The same of ranks in a group: NCCL's buffers, memory for sums, and, on the first GPU, what the engine's own process takes."""


def pass_bytes(spec: ModelSpec, tp: int, *, tokens: int, sequences: int, itemsize: int) -> int:
    """An estimate of what a pass takes on each of ``tp`` ranks beside weights, keys and values: ``itemsize`` bytes an element."""
    dims = {name: dim.elements for name, dim in spec.dims.items()}
    wide = max(2 * dims["heads"] + 2 * dims["kv_heads"], 3 * max(dims.get(name, 0) for name in ("ffn", "expert_ffn", "shared_ffn")))
    return itemsize * tokens * (4 * dims["hidden"] + wide // tp) + sequences * dims["vocab"] * (itemsize + 8)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a runtime cannot cut a model: the layer, the numbers, and what to do."""

    where: str
    what: str
    remedy: str


def equal_split_obstacles(spec: ModelSpec, assignment: Assignment, tp: int, *, dtype: str) -> tuple[Obstacle, ...]:
    """What keeps a runtime that cuts every dim into ``tp`` equal pieces (vLLM, SGLang) from it; empty: nothing.

    Source: ``formats.md`` section 10. Each kind of obstacle is named once, at the first layer that has it.
    """
    heads, kv, rows = spec.dims["heads"].size, spec.dims["kv_heads"].size, _plan_dims(spec)["vocab"].size
    found: dict[tuple[str, str], Obstacle] = {}
    if heads % tp:
        found["attention", "heads"] = Obstacle("attention", f"{heads} heads / {tp} ranks is not whole", _divisors(heads))
    if tp <= kv and kv % tp:
        found["attention", "kv"] = Obstacle("attention", f"{kv} KV heads / {tp} ranks is not whole", _divisors(kv))
    if tp > kv and tp % kv:
        found["attention", "kv"] = Obstacle("attention", f"{tp} ranks / {kv} KV heads is not whole", f"--tp a multiple of {kv}")
    if rows % tp:
        name = spec.architecture.embedding
        found[EMBEDDING, name] = Obstacle(name, f"{rows} vocabulary rows / {tp} ranks is not whole", _divisors(rows))
    for layer in range(spec.layers):
        for role, path in spec.block_linears(layer).items():
            if not spec.linears[role].quantize:
                continue  # on every rank
            n, k = spec.linear_shape(role)
            try:
                geometry = linear_geometry(path, n, k, role_scheme(spec, role, assignment[path]), dtype=dtype, bias=False)
            except InputError as exc:
                found.setdefault((role, exc.what), Obstacle(path, exc.what, exc.hint or ""))
                continue
            row = spec.linears[role].inp != "hidden"
            dim, size = ("K", k) if row else ("N", n)
            step = geometry.granule(dim)
            if size % (tp * step):
                what = f"{dim} = {size} / {tp} ranks is " + ("not whole" if step == 1 else f"no multiple of {step}")
                remedy = _remedy(spec.linears[role].inp if row else spec.linears[role].out, size, step, tp)
                found.setdefault((role, what), Obstacle(path, what, remedy))
    return tuple(found.values())


def _divisors(size: int) -> str:
    return "--tp " + ", ".join(str(tp) for tp in (1, 2, 3, 4, 5, 6, 7, 8) if size % tp == 0)


def _remedy(dim: str, size: int, step: int, tp: int) -> str:
    group = next((g for g in (128, 64, 32) if g < step and size % (tp * g) == 0), None)
    smaller = f"--group-size {group}, or " if group else ""
    if dim not in FFN_DIMS:
        return f"{smaller}a smaller --tp"
    return f"{smaller}pad intermediate_size to {padded_size(size, tp, step)} with zeros"


def widened(spec: ModelSpec, sizes: Mapping[str, int]) -> ModelSpec:
    """``spec`` with other sizes of some dims."""
    return replace(spec, dims=MappingProxyType({**spec.dims, **{dim: Dim(size) for dim, size in sizes.items()}}))


def ffn_granules(spec: ModelSpec, assignment: Assignment, *, dtype: str) -> dict[str, int]:
    """Of each MLP's width (FFN_DIMS), what an equal part of it must be a multiple of: whole groups, packed words, blocks.

    Whatever its size is now: raises no error for one that the layouts could not hold.
    """
    spec = widened(spec, {dim: WIDE for dim in FFN_DIMS if dim in spec.dims})
    found = {dim: 1 for dim in FFN_DIMS if dim in spec.dims}
    for role, _, geometry in block_geometries(spec, assignment, dtype=dtype):
        linear = spec.linears[role]
        for dim, axis in ((linear.out, "N"), (linear.inp, "K")):
            if dim in found:
                group = geometry.scheme.group_size if axis == "K" else 1  # which act-order may cut
                found[dim] = math.lcm(found[dim], geometry.granule(axis), max(group, 1))
    return found
