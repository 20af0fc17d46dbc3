"""``quantkit plan``: who owns what on N ranks, what it costs, and whether it fits; from ``config.json`` alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.checkpoint.blocks import as_blocks
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.errors import InputError
from quantkit.formats.jsonfile import read_object
from quantkit.geometry import DTYPE_BYTES, FLOATS
from quantkit.method_facts import METHODS, make_scheme
from quantkit.plan import (
    GROUP_BYTES,
    KV_BLOCK,
    KV_DTYPES,
    LM_HEADS,
    PASS_SEQUENCES,
    PASS_TOKENS,
    RUNTIME_BYTES,
    Obstacle,
    ParallelPlan,
    RankMemory,
    block_geometries,
    equal_split_obstacles,
    make_plan,
    pass_bytes,
    rank_memory,
)
from quantkit.progress import Progress, silent
from quantkit.quant_config import Stored, claimed_tensors, is_kept, stored_assignment
from quantkit.report import Cell, Report, Table, next_step
from quantkit.scheme import KEEP, Assignment, assignment_to_json

UNITS: Mapping[str, int] = {"": 1, "B": 1} | {
    f"{letter}{tail}": base**power for power, letter in enumerate("KMGT", start=1) for tail, base in (("B", 1000), ("iB", 1024), ("", 1000))
}
CONFIG_LIMIT = 16 << 20
FLOAT_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
EQUAL_SPLIT = "equal split (vLLM, SGLang)"


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of ``quantkit plan``. ``path`` may also be a ``config.json`` or a directory with nothing else in it.

    With ``method`` the linears are planned as if quantized that way. ``gpu_memory`` is per rank: ``24GiB``, ``24GB`` or bytes.
    ``lm_head``: what the runtime is to make of the head. The rest as the runtime has it on a GPU: they decide what is left for tokens.
    """

    path: str
    tp: int
    method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    gpu_memory: str | None = None
    max_model_len: int | None = None
    lm_head: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: str = "auto"


def parse_bytes(text: str, where: str) -> int:
    """Bytes of ``24GiB`` (1024-based), ``24GB`` (1000-based) or a plain number. Raises InputError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]{0,3})\s*", text)
    unit = next((size for name, size in UNITS.items() if match and name.lower() == match[2].lower()), None)
    if match is None or unit is None or int(float(match[1]) * unit) <= 0:
        raise InputError(where, f"{text!r} is not a size", "a number with KiB, MiB, GiB, KB, MB, GB or no unit, such as 24GiB")
    return int(float(match[1]) * unit)


def human(nbytes: int) -> str:
    """``nbytes`` as a person reads it, in 1024-based units."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"


@dataclass(frozen=True, slots=True)
class _Model:
    """What the path says: facts, how linears are stored now, and the dtype of what is kept."""

    spec: ModelSpec
    assignment: Assignment
    dtype: str
    dtype_source: str
    kind: str | None
    """Of the checkpoint: hf or gguf; None when there is only a configuration."""


def _bare_config(path: Path) -> dict[str, Any] | None:
    """The configuration when ``path`` is a ``config.json``, or a directory that holds no weights; else None."""
    if path.is_dir():
        holds = any(child.suffix in (".safetensors", ".gguf", ".bin") for child in path.iterdir())
        path = path / "config.json"
        if holds or not path.is_file():
            return None
    elif path.suffix != ".json" or not path.is_file():
        return None
    return read_object(path, CONFIG_LIMIT, "a config.json")


def _read(options: PlanOptions) -> _Model:
    config = _bare_config(Path(options.path))
    if config is not None:
        spec = spec_for(config)
        tensors: Mapping[str, Stored] = claimed_tensors(config, spec.all_linears(), spec.architecture.head, spec.architecture.embedding)
        stored = kind = None
    else:
        checkpoint = open_checkpoint(options.path)
        if options.method is None:  # which would quantize what the blocks decode to
            checkpoint = as_blocks(checkpoint)
        config, spec, tensors = dict(checkpoint.config), spec_for(checkpoint.config), checkpoint.tensors
        kind, table = checkpoint.kind, f"{spec.architecture.embedding}.weight"
        stored = checkpoint.dtype(table) if kind == "hf" and table in checkpoint.tensors else None
        if stored not in FLOATS:  # a quantized embedding
            stored = None
    declared = FLOAT_NAMES.get(str(config.get("dtype") or config.get("torch_dtype")))
    dtype = stored or declared or "BF16"
    source = "the embedding's" if stored else "config.json" if declared else "assumed"
    return _Model(spec, stored_assignment(config, spec, tensors), dtype, source, kind)


def _as_quantized(model: _Model, options: PlanOptions) -> Assignment:
    if options.method is None:
        return model.assignment
    if any(scheme != KEEP for scheme in model.assignment.values()):
        raise InputError("--method", f"{options.path} is already quantized", "an unquantized model, or no --method")
    if options.method not in METHODS:
        raise InputError("--method", f"{options.method!r} has no layout to plan with", f"one of {', '.join(METHODS)}")
    scheme = make_scheme(
        options.method,
        METHODS[options.method],
        fmt=None,
        bits=options.bits,
        group_size=options.group_size,
        sym=None,
        options={},
        dtype=model.dtype,
        where={"bits": "--bits", "group_size": "--group-size", "format": "--format", "sym": "--sym"},
    )
    kept = {
        path
        for layer in range(model.spec.layers)
        for role, path in model.spec.block_linears(layer).items()
        if not model.spec.linears[role].quantize
    }
    return {name: KEEP if name in kept or name == model.spec.architecture.head else scheme for name in model.assignment}


def ranges_table(plan: ParallelPlan, rank_bytes: tuple[int, ...]) -> Table:
    """Who owns what: one row per rank, each dim as ``start:stop`` in its units."""
    dims = [dim for dim in ("heads", "kv_heads", "ffn", "expert_ffn", "shared_ffn", "hidden", "vocab") if dim in plan.ranges]
    owned = [[f"{plan.ranges[dim][rank].start}:{plan.ranges[dim][rank].stop}" for dim in dims] for rank in range(plan.tp)]
    rows: tuple[tuple[Cell, ...], ...] = tuple((rank, *texts, human(rank_bytes[rank])) for rank, texts in enumerate(owned))
    return Table("Ranges per rank", ("rank", *dims, "weights"), rows)


def mode_facts(plan: ParallelPlan) -> tuple[tuple[str, str], ...]:
    """What is unusual about a plan, for a person: replicated KV heads, gathered linears, padding, ranks that own nothing."""
    facts = []
    copies = sum(len(r) for r in plan.ranges["kv_heads"]) - plan.dims["kv_heads"].size
    if copies:
        more = f"{copies} {'copy' if copies == 1 else 'copies'}"
        facts.append(("KV heads", f"{plan.dims['kv_heads'].size}, with {more} so that every rank's query heads have theirs"))
    gathered = sorted(role for role, mode in plan.modes.items() if mode == "gather")
    if gathered:
        facts.append(("gathered", f"{', '.join(gathered)}: fewer or other granules than ranks, so cut on the output"))
    idle = [str(rank) for rank, owned in enumerate(plan.ranges["heads"]) if not owned]
    if idle:
        facts.append(("without heads", f"rank {', '.join(idle)}"))
    if plan.dims["vocab"].size != plan.vocab:
        facts.append(("vocabulary", f"{plan.vocab} rows, padded to {plan.dims['vocab'].size}"))
    return tuple(facts)


def _verdicts(plan: ParallelPlan, obstacles: tuple[Obstacle, ...]) -> Table:
    even = all(len({len(r) for r in plan.ranges[dim]}) == 1 for dim in ("heads", "kv_heads", "ffn", "vocab"))
    own = ("quantkit", "yes", "-", "even ranges" if even else "uneven ranges of whole granules", "-")
    others = [(EQUAL_SPLIT, "no", o.where, o.what, o.remedy) for o in obstacles] or [(EQUAL_SPLIT, "yes", "-", "every cut is even", "-")]
    return Table("Verdicts", ("runtime", "runs", "where", "why", "remedy"), (own, *others))


def _cuts(model: _Model, assignment: Assignment, plan: ParallelPlan) -> Table:
    rows: dict[tuple[str, int, int, int, int], str] = {}
    for role, _, geometry in block_geometries(model.spec, assignment, dtype=model.dtype):
        rows[role, geometry.n, geometry.k, geometry.granule("N"), geometry.granule("K")] = plan.modes[role]
    return Table(
        "Linears",
        ("role", "N", "K", "granule N", "granule K", "cut"),
        tuple((role, n, k, gn, gk, cut) for (role, n, k, gn, gk), cut in rows.items()),
    )


@dataclass(frozen=True, slots=True)
class _Fit:
    """How ``length`` tokens, the weights and a pass lie in ``limit`` bytes on every rank."""

    limit: int
    length: int
    tokens: int
    """Tokens whose keys and values fit beside the weights on every rank."""
    worst: int
    """The rank that needs most, for ``length`` tokens."""
    needs: int
    usable: int
    """Bytes for weights, keys and values."""
    passes: int
    """Bytes that a pass and the runtime itself take."""

    @property
    def fits(self) -> bool:
        return self.tokens >= self.length


def _fit(memory: tuple[RankMemory, ...], limit: int, share: float, length: int, passes: int) -> _Fit:
    usable = max(0, int(limit * share) - passes)
    needs = [m.weights + length * m.kv_per_token for m in memory]
    left = [(usable - m.weights) // m.kv_per_token for m in memory if m.kv_per_token]
    tokens = 0 if any(m.weights > usable for m in memory) else min(left)
    return _Fit(limit, length, tokens, needs.index(max(needs)), max(needs), usable, passes)


def _facts(model: _Model, assignment: Assignment, plan: ParallelPlan, fit: _Fit | None, share: float) -> tuple[tuple[str, str], ...]:
    name, layers = model.spec.architecture.name, model.spec.layers
    stored = {s for s in assignment.values() if not is_kept(s)}
    layouts = sorted(s.code if s.layout == "ggml" else f"{s.layout}, {s.bits} bits, group {s.group_size}" for s in stored)
    facts = [
        ("model", f"{name}, {layers} layers, {plan.dims['heads'].size} heads, {plan.dims['kv_heads'].size} KV heads"),
        ("linears", "; ".join(dict.fromkeys(layouts)) or "unquantized"),
        ("kept tensors and KV cache", f"{model.dtype} ({model.dtype_source})"),
        *mode_facts(plan),
    ]
    if fit is not None:
        left = f"beside {human(fit.passes)} for a pass and the runtime itself (estimates) and {1 - share:.0%} left alone"
        facts.append(("KV cache", f"{fit.tokens} tokens fit in {human(fit.limit)} per rank, {left}"))
        facts.append(("fits", f"{'yes' if fit.fits else 'no'}, for {fit.length} tokens"))
    return tuple(facts)


def _memory_table(memory: tuple[RankMemory, ...], length: int) -> Table:
    rows = tuple(
        (rank, human(m.linears), human(m.vocabulary), human(m.norms), human(m.weights), m.kv_per_token, human(m.kv_per_token * length))
        for rank, m in enumerate(memory)
    )
    return Table("Memory per rank", ("rank", "linears", "vocabulary", "norms", "weights", "KV bytes/token", f"KV, {length} tokens"), rows)


def _next_steps(options: PlanOptions, model: _Model) -> tuple[str, ...]:
    """What brings the plan about; nothing where there are no weights yet."""
    if model.kind is None:
        return ()
    if options.method is not None:
        how = ("--method", options.method, "--group-size", str(options.group_size))
        return (next_step("quantize", options.path, "OUT", *how), next_step("shard", "OUT", "SHARDS", "--tp", str(options.tp)))
    if model.kind == "gguf":
        keep = next_step("convert", options.path, "OUT", "--to", "blocks")
        return (
            next_step("serve", options.path, "--tp", str(options.tp)),
            keep,
            next_step("shard", "OUT", "SHARDS", "--tp", str(options.tp)),
        )
    return (next_step("shard", options.path, "SHARDS", "--tp", str(options.tp)),)


def run(options: PlanOptions, progress: Progress = silent) -> Report:
    """Plan ``options.path`` on ``options.tp`` ranks; the check fails when it does not fit ``gpu_memory``.

    Raises InputError naming the layer, the numbers and the remedy when it cannot be cut.
    """
    limit = parse_bytes(options.gpu_memory, "--gpu-memory") if options.gpu_memory is not None else None
    if options.max_model_len is not None and options.max_model_len < 1:
        raise InputError("--max-model-len", f"is {options.max_model_len}", "at least 1")
    seats = options.max_num_seqs or PASS_SEQUENCES["cuda"]
    tokens = options.max_num_batched_tokens or max(seats, PASS_TOKENS["cuda"])
    if tokens < seats:
        raise InputError("--max-num-batched-tokens", f"is {tokens}", f"at least --max-num-seqs, {seats}")
    if not 0 < options.gpu_memory_utilization <= 1:
        raise InputError("--gpu-memory-utilization", f"is {options.gpu_memory_utilization}", "more than 0, up to 1")
    if options.kv_cache_dtype not in KV_DTYPES:
        raise InputError("--kv-cache-dtype", f"is {options.kv_cache_dtype!r}", f"one of {', '.join(KV_DTYPES)}")
    model = _read(options)
    assignment = _as_quantized(model, options)
    plan = make_plan(model.spec, assignment, options.tp, dtype=model.dtype)
    memory = rank_memory(
        model.spec, assignment, plan, dtype=model.dtype, kv_dtype=KV_DTYPES[options.kv_cache_dtype] or model.dtype, lm_head=options.lm_head
    )
    obstacles = equal_split_obstacles(model.spec, assignment, options.tp, dtype=model.dtype)
    progress("plan", 1, 1)
    head = (("head", f"encoded to {options.lm_head} when it is loaded"),) if LM_HEADS[options.lm_head] else ()
    length = options.max_model_len or model.spec.max_positions
    one = pass_bytes(model.spec, options.tp, tokens=tokens, sequences=seats, itemsize=DTYPE_BYTES[model.dtype])
    beside = RUNTIME_BYTES + (GROUP_BYTES if options.tp > 1 else 0)
    fit = None if limit is None else _fit(memory, limit, options.gpu_memory_utilization, length, one + beside)
    failed = None
    if fit is not None and not fit.fits:
        needs = f"rank {fit.worst} needs {human(fit.needs)} for weights and {length} tokens"
        failed = f"{needs}, and may use {human(fit.usable)} of {human(fit.limit)}"
        if not fit.usable:
            failed += f": a pass and the runtime itself take {human(fit.passes)}"
    data = {
        "plan": plan.to_json(),
        "assignment": assignment_to_json(assignment),
        "dtype": model.dtype,
        "ranks": [{**asdict(m), "weights": m.weights} for m in memory],
        "lm_head": options.lm_head,
        "max_model_len": length,
        "gpu_memory": limit,
        "kv_tokens_that_fit": None if fit is None else fit.tokens,
        "kv_blocks_that_fit": None if fit is None else fit.tokens // KV_BLOCK,
        "pass_bytes": one,
        "runtime_bytes": beside,
        "fits": None if fit is None else fit.fits,
        "equal_split": {"runs": not obstacles, "obstacles": [asdict(o) for o in obstacles]},
    }
    tables = (
        ranges_table(plan, tuple(m.weights for m in memory)),
        _cuts(model, assignment, plan),
        _memory_table(memory, length),
        _verdicts(plan, obstacles),
    )
    return Report(
        command="plan",
        data=data,
        facts=(*_facts(model, assignment, plan, fit, options.gpu_memory_utilization), *head),
        tables=tables,
        next_steps=_next_steps(options, model),
        failed=failed,
    )
