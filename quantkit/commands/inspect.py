"""``quantkit inspect``: what a PATH is, from its headers alone; torch is not imported, and no weight is read but to be drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import fs
from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import GGUF_NAMES, architecture_of, spec_for
from quantkit.checkpoint.gguf import GgufSource
from quantkit.checkpoint.reader import Checkpoint, TensorRef, open_checkpoint, read_manifest, resolve_path
from quantkit.commands.inspect_gguf import gguf_data, gguf_lines, gguf_tables, gguf_warnings, tensor_data, tensor_table
from quantkit.commands.inspect_plot import check_plot, with_plot
from quantkit.commands.plan import human, mode_facts, ranges_table
from quantkit.errors import InputError
from quantkit.formats.gguf import BY_NAME, GgufFile, read_gguf
from quantkit.formats.jsonfile import read_object
from quantkit.geometry import DTYPE_BYTES, geometry_of
from quantkit.plot import gguf_weights, weights_of
from quantkit.progress import Progress, silent
from quantkit.quant_config import READABLE, is_kept, stored_assignment
from quantkit.report import Report, Table, next_step
from quantkit.scheme import Assignment
from quantkit.shard import open_rank
from quantkit.slices import fused_name
from quantkit.text.tokenizer import LIMITS, SENTENCEPIECE, TEMPLATE_FILE, TEMPLATE_JSON, TOKENIZER, TOKENIZER_CONFIG

GGUF_TOKENIZER, GGUF_TEMPLATE = "tokenizer.ggml.model", "tokenizer.chat_template"
PACKED_PARTS = frozenset({"qweight", "qzeros", "scales"})


@dataclass(frozen=True, slots=True)
class InspectOptions:
    """Options of ``quantkit inspect``."""

    path: str
    tensors: bool = False
    plot: Path | None = None
    """A PNG to write, of the weights of the tensors that ``tensor`` names."""
    tensor: tuple[str, ...] = ()
    """Regular expressions, searched in the names of tensors."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """How some linears are stored: ``bits`` per weight with scales and zeros, ``group`` weights to a scale (None: no scales)."""

    format: str
    bits: float
    group: int | None


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is known of a model, whatever it is stored in. ``spec`` is None for an architecture that the table does not have."""

    kind: str
    config: Mapping[str, Any]
    spec: ModelSpec | None
    tensors: tuple[TensorRef, ...]
    linears: Mapping[_Stored, int]
    parameters: int
    files: tuple[Path, ...]
    tokenizer: str | None
    chat_template: bool
    manifest: Mapping[str, Any] | None
    unknown: str = "not in quantkit's table"
    """What to say of the architecture where ``spec`` is None."""

    @property
    def tensor_bytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors)


def run(options: InspectOptions, progress: Progress = silent) -> Report:
    """Say what ``options.path`` is. Raises InputError for what is no model, and for headers that are not what they say.

    A GGUF file that is well formed and that quantkit cannot read as a model is shown with a warning that says why.
    """
    check_plot(options.plot, options.tensor)
    root = resolve_path(options.path)
    manifest = read_manifest(root)
    if manifest is not None and manifest.get("kind") == "shards":
        if options.plot is not None:
            raise InputError("--plot", f"{options.path} is a shard directory", "a whole checkpoint")
        report = _inspect_shards(options, root, manifest)
    elif root.is_dir():
        checkpoint = open_checkpoint(options.path)
        report = _inspect_checkpoint(options, checkpoint, manifest)
        report = with_plot(report, options.plot, options.tensor, lambda: weights_of(checkpoint), progress)
    else:
        report = _inspect_gguf(options, read_gguf(root), progress)
    progress("inspect", 1, 1)
    return report


def _spec(config: Mapping[str, Any]) -> ModelSpec | None:
    """The model, or None when the table does not have its architecture; what is wrong in one that it has is an error."""
    return None if architecture_of(config) is None else spec_for(config)


def _parameters(spec: ModelSpec) -> int:
    """Weights, biases and norms of a model; a tied head counts once."""
    hidden, vocab = spec.dims["hidden"].elements, spec.dims["vocab"].elements
    norms = sum(spec.head_dim if norm.width == "head" else hidden for norm in spec.norms.values()) * len(spec.norm_parts)
    blocks = 0
    for layer in range(spec.layers):
        shapes = [(spec.linear_shape(role), bool(spec.linears[role].bias)) for role in spec.block_linears(layer)]
        blocks += norms + sum(n * k + n * bias for (n, k), bias in shapes)
    table = 0 if spec.position_table is None else spec.max_positions * hidden
    return blocks + hidden * len(spec.norm_parts) + table + vocab * hidden * (1 if spec.tied else 2)


def _counted(checkpoint: Checkpoint) -> int:
    """Values of all tensors, where no table says how many parameters there are; packed words count eight."""
    total = 0
    for name, ref in checkpoint.tensors.items():
        suffix = name.rpartition(".")[2]
        if suffix not in PACKED_PARTS or suffix == "qweight":
            total += math.prod(ref.shape) * (8 if suffix == "qweight" else 1)
    return total


def _inspect_checkpoint(options: InspectOptions, checkpoint: Checkpoint, manifest: Mapping[str, Any] | None) -> Report:
    config, spec = checkpoint.config, _spec(checkpoint.config)
    tokenizer, template = _text_files(checkpoint.root)
    quant = config.get("quantization_config")
    label = "artifact" if quant else str((manifest or {}).get("kind", "checkpoint"))
    facts = _Facts(
        kind=label,
        config=config,
        spec=spec,
        tensors=tuple(checkpoint.tensors.values()),
        linears={} if spec is None else _linears(checkpoint.tensors, spec, _assignment(checkpoint, spec)),
        parameters=_counted(checkpoint) if spec is None else _parameters(spec),
        files=_files(checkpoint.root),
        tokenizer=tokenizer,
        chat_template=template,
        manifest=manifest,
    )
    tables = [*_storage_tables(facts)]
    if options.tensors:
        rows = tuple((ref.name, ref.dtype, _shape(ref.shape), ref.nbytes) for ref in facts.tensors)
        tables.append(Table("Tensors", ("name", "dtype", "shape", "bytes"), rows))
    data = _data(facts) | ({"tensors": _tensor_data(facts.tensors)} if options.tensors else {})
    return Report(
        command="inspect", data=data, facts=_lines(options.path, facts), tables=tuple(tables), next_steps=_next_steps(options.path, facts)
    )


def _inspect_gguf(options: InspectOptions, file: GgufFile, progress: Progress) -> Report:
    checkpoint, names, why = None, dict[str, list[str]](), None
    try:
        checkpoint = open_checkpoint(file.path)
        spec = spec_for(checkpoint.config)
        for name, tensor in GgufSource(file).tensors.items():
            names.setdefault(tensor.name, []).append(name)
    except InputError as exc:
        checkpoint, spec, why = None, None, exc.line
    architecture = file.metadata.get("general.architecture")
    tokenizer, template = _gguf_text(file.metadata)
    facts = _Facts(
        kind="GGUF file",
        config={"model_type": architecture} if checkpoint is None else checkpoint.config,
        spec=spec,
        tensors=tuple(TensorRef(t.name, t.type, t.shape, t.file, t.offset, t.nbytes) for t in file.tensors.values()),
        linears={} if checkpoint is None or spec is None else _linears(checkpoint.tensors, spec, _assignment(checkpoint, spec)),
        parameters=sum(math.prod(t.shape) for t in file.tensors.values()) if spec is None else _parameters(spec),
        files=file.paths,
        tokenizer=tokenizer,
        chat_template=template,
        manifest=None,
        unknown="not read" if architecture in GGUF_NAMES else "not in quantkit's table",
    )
    data = _data(facts) | {"gguf": gguf_data(file)} | ({"tensors": tensor_data(file, names)} if options.tensors else {})
    lines, linears = _lines(options.path, facts), _linears_table(facts)
    report = Report(
        command="inspect",
        data=data,
        facts=(*lines[:2], *gguf_lines(file), *lines[2:]),
        tables=(*linears, *gguf_tables(file), *([tensor_table(file, names)] if options.tensors else [])),
        warnings=gguf_warnings(file) if why is None else (f"quantkit cannot read it as a model: {why}",),
        next_steps=_next_steps(options.path, facts),
    )
    return with_plot(report, options.plot, options.tensor, lambda: gguf_weights(file, names), progress)


def _linears(tensors: Mapping[str, TensorRef], spec: ModelSpec, assignment: Assignment) -> dict[_Stored, int]:
    """How many linears are stored how: those that are there."""
    roles = {path: names for layer in range(spec.layers) for path, names in spec.block_modules(layer).items()}
    modules = {name.partition("@")[0].rpartition(".weight")[0] or name.partition("@")[0].rpartition(".")[0] for name in tensors}
    found: list[_Stored] = []
    for name, scheme in assignment.items():
        if name not in modules:
            continue
        if is_kept(scheme):
            ref = tensors.get(f"{name}.weight") or tensors[fused_name(name, "weight", roles[name][0], False)]
            found.append(_float(ref.dtype))
            continue
        n, k = spec.stored_shape(roles[name][0]) if name in roles else (spec.dims["vocab"].elements, spec.dims["hidden"].elements)
        bits = round(8 * geometry_of(scheme, n, k, dtype="F16").total_bytes / (n * k), 4)
        label = scheme.code or f"{scheme.layout}, {scheme.bits} bits"
        label += " (embedding)" * (name == spec.architecture.embedding)
        found.append(_Stored(label, bits, k if scheme.group_size == -1 else scheme.group_size))
    return dict(Counter(found))


def _float(dtype: str) -> _Stored:
    if dtype in DTYPE_BYTES:
        return _Stored(dtype, 8.0 * DTYPE_BYTES[dtype], None)
    block = BY_NAME[dtype]
    return _Stored(dtype, 8 * block.nbytes / block.elements, block.elements)


def _assignment(checkpoint: Checkpoint, spec: ModelSpec) -> Assignment:
    """How linears are stored; none of them for a quantization that quantkit does not read."""
    quant = checkpoint.config.get("quantization_config")
    if isinstance(quant, dict) and quant.get("quant_method") not in READABLE:
        return {}
    return stored_assignment(checkpoint.config, spec, checkpoint.tensors)


def _files(root: Path) -> tuple[Path, ...]:
    return (root,) if not root.is_dir() else tuple(sorted(path for path in root.iterdir() if path.is_file()))


def _text_files(root: Path) -> tuple[str | None, bool]:
    """The file that holds the tokenizer, and whether there is a chat template."""
    tokenizer = next((name for name in (TOKENIZER, SENTENCEPIECE) if (root / name).is_file()), None)
    template = any((root / name).is_file() for name in (TEMPLATE_FILE, TEMPLATE_JSON))
    if not template and (root / TOKENIZER_CONFIG).is_file():
        config = read_object(fs.confined(root, TOKENIZER_CONFIG, str(root)), LIMITS[TOKENIZER_CONFIG])
        template = bool(config.get("chat_template"))
    return tokenizer, template


def _gguf_text(metadata: Mapping[str, Any]) -> tuple[str | None, bool]:
    model = metadata.get(GGUF_TOKENIZER)
    return (None if model in (None, "none") else f"{model} (in the metadata)"), GGUF_TEMPLATE in metadata


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _dims(facts: _Facts) -> str | None:
    spec = facts.spec
    if spec is None:
        return None
    heads = f"{spec.dims['heads'].size} heads and {spec.dims['kv_heads'].size} KV heads of {spec.head_dim}"
    tied = ", tied" if spec.tied else ""
    sizes = f"hidden {spec.dims['hidden'].size}, FFN {spec.dims['ffn'].size}, {heads}"
    return f"{spec.layers} layers, {sizes}, vocabulary {spec.dims['vocab'].size}{tied}"


def _quantization(config: Mapping[str, Any]) -> str | None:
    quant = config.get("quantization_config")
    if not isinstance(quant, dict):
        return None
    known = "" if quant.get("quant_method") in READABLE else "; quantkit does not read it"
    numbers = [f"{quant[key]} {unit}" for key, unit in (("bits", "bits"),) if key in quant]
    group = [f"group {quant['group_size']}"] if "group_size" in quant else []
    return ", ".join([str(quant.get("quant_method")), *numbers, *group]) + known


def _lines(path: str, facts: _Facts) -> tuple[tuple[str, str], ...]:
    """What a person reads first."""
    architecture = facts.spec.architecture.name if facts.spec else f"{facts.config.get('model_type')!r:.100} ({facts.unknown})"
    disk = sum(fs.file_size(file) for file in facts.files)
    bits = 8 * facts.tensor_bytes / max(facts.parameters, 1)
    lines = [("model", path), ("kind", facts.kind), ("architecture", architecture)]
    lines += [("dims", dims)] if (dims := _dims(facts)) else []
    lines += [("context", f"{facts.spec.max_positions} tokens")] if facts.spec else []
    lines.append(("parameters", f"{facts.parameters:,}"))
    lines += [("quantization", quantization)] if (quantization := _quantization(facts.config)) else []
    files = f"{len(facts.files)} file{'s' * (len(facts.files) > 1)}"
    lines.append(("on disk", f"{human(disk)} in {files}; tensors {human(facts.tensor_bytes)}, {bits:.2f} bits per parameter"))
    lines.append(("tokenizer", facts.tokenizer or "none"))
    lines.append(("chat template", "yes" if facts.chat_template else "no"))
    return (*lines, *_manifest_lines(facts.manifest))


def _manifest_facts(manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """What quantkit.json says of how the artifact was made; it was checked by nobody here, ``verify`` does that."""
    if manifest is None:
        return {}
    return {
        key: manifest[key] for key in ("quantkit", "kind", "method", "recipe", "calibration", "source", "conversion") if key in manifest
    }


def _manifest_lines(manifest: Mapping[str, Any] | None) -> tuple[tuple[str, str], ...]:
    facts = _manifest_facts(manifest)
    lines = []
    if "method" in facts:
        lines.append(("made by", f"quantkit {facts.get('quantkit')}, {facts['method']}"))
    calibration, source = facts.get("calibration"), facts.get("source")
    if isinstance(calibration, dict):
        lines.append(("calibration", f"{calibration.get('source')}, {calibration.get('shape')} tokens"))
    if isinstance(source, dict):
        lines.append(("source", f"fingerprint {source.get('fingerprint')!s:.100}"))
    return tuple((name, value[:300]) for name, value in lines)


def _storage_tables(facts: _Facts) -> tuple[Table, ...]:
    by_dtype = _by_dtype(facts.tensors)
    dtypes = tuple((dtype, count, human(nbytes)) for dtype, (count, nbytes) in by_dtype.items())
    return (*_linears_table(facts), Table("Tensors by dtype", ("dtype", "tensors", "size"), dtypes))


def _linears_table(facts: _Facts) -> tuple[Table, ...]:
    """How the linears are stored; no table where no linear is known."""
    rows = tuple(
        (stored.format, f"{stored.bits:g}", stored.group, count) for stored, count in sorted(facts.linears.items(), key=lambda i: -i[1])
    )
    return (Table("Linears", ("stored as", "bits per weight", "group", "linears"), rows),) if rows else ()


def _by_dtype(tensors: tuple[TensorRef, ...]) -> dict[str, tuple[int, int]]:
    """dtype -> tensors and bytes, the largest first."""
    found: dict[str, tuple[int, int]] = {}
    for ref in tensors:
        count, nbytes = found.get(ref.dtype, (0, 0))
        found[ref.dtype] = count + 1, nbytes + ref.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _tensor_data(tensors: tuple[TensorRef, ...]) -> list[dict[str, Any]]:
    return [{"name": r.name, "dtype": r.dtype, "shape": list(r.shape), "bytes": r.nbytes, "file": r.file.name} for r in tensors]


def _data(facts: _Facts) -> dict[str, Any]:
    spec = facts.spec
    dims = None if spec is None else {name: dim.size for name, dim in spec.dims.items()} | {"head_dim": spec.head_dim}
    return {
        "kind": facts.kind,
        "architecture": None if spec is None else spec.architecture.name,
        "model_type": facts.config.get("model_type"),
        "layers": None if spec is None else spec.layers,
        "dims": dims,
        "max_positions": None if spec is None else spec.max_positions,
        "tied": None if spec is None else spec.tied,
        "parameters": facts.parameters,
        "linears": [{"format": s.format, "bits": s.bits, "group": s.group, "count": count} for s, count in facts.linears.items()],
        "dtypes": {dtype: {"tensors": count, "bytes": nbytes} for dtype, (count, nbytes) in _by_dtype(facts.tensors).items()},
        "tensor_bytes": facts.tensor_bytes,
        "disk_bytes": sum(fs.file_size(file) for file in facts.files),
        "bits_per_parameter": 8 * facts.tensor_bytes / max(facts.parameters, 1),
        "quantization_config": facts.config.get("quantization_config"),
        "tokenizer": facts.tokenizer,
        "chat_template": facts.chat_template,
        "manifest": _manifest_facts(facts.manifest),
    }


def _next_steps(path: str, facts: _Facts) -> tuple[str, ...]:
    if facts.spec is None:
        return ()
    if facts.kind == "GGUF file":
        return (next_step("convert", path, "OUT"),)
    if facts.config.get("quantization_config"):
        return (next_step("verify", path, "--deep"), next_step("shard", path, "SHARDS", "--tp", "2"))
    return (next_step("quantize", path, "OUT", "--method", "awq"), next_step("plan", path, "--tp", "2"))


def _inspect_shards(options: InspectOptions, root: Path, manifest: Mapping[str, Any]) -> Report:
    """A shard directory: the plan, and what every rank holds."""
    first, plan, assignment = open_rank(root, 0)
    ranks = [first, *(open_rank(root, rank)[0] for rank in range(1, plan.tp))]
    spec, (tokenizer, template) = spec_for(first.config), _text_files(root)
    tensors = tuple(ref for rank in ranks for ref in rank.tensors.values())
    facts = _Facts(
        kind=f"shards for {plan.tp} ranks",
        config=first.config,
        spec=spec,
        tensors=tensors,
        linears=_linears(first.tensors, spec, assignment),
        parameters=_parameters(spec),
        files=_files(root),
        tokenizer=tokenizer,
        chat_template=template,
        manifest=manifest,
    )
    rank_bytes = tuple(sum(ref.nbytes for ref in rank.tensors.values()) for rank in ranks)
    tables = [ranges_table(plan, rank_bytes), *_storage_tables(facts)]
    data = _data(facts) | {"tp": plan.tp, "plan": plan.to_json(), "rank_bytes": list(rank_bytes)}
    if options.tensors:
        rows = tuple(
            (n, ref.name, ref.dtype, _shape(ref.shape), ref.nbytes) for n, rank in enumerate(ranks) for ref in rank.tensors.values()
        )
        tables.append(Table("Tensors", ("rank", "name", "dtype", "shape", "bytes"), rows))
        data["tensors"] = _tensor_data(tensors)
    lines = (*_lines(options.path, facts), *mode_facts(plan))
    return Report(command="inspect", data=data, facts=lines, tables=tuple(tables), next_steps=(next_step("serve", options.path),))
