"""``quantkit quantize --method gguf`` and ``quantkit convert --to gguf``: any checkpoint as one GGUF file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantkit import __version__, fs
from quantkit.arch.spec import ModelSpec
from quantkit.checkpoint.gguf_writer import file_bytes
from quantkit.checkpoint.reader import open_checkpoint, resolve_path
from quantkit.errors import InputError
from quantkit.formats.gguf import BY_NAME, MAGIC, Value, read_gguf, tensor_bytes, text, u32
from quantkit.formats.imatrix import Imatrix, importance_for, read_imatrix
from quantkit.geometry import GGML_BLOCKS, ggml_scheme
from quantkit.gguf_file import (
    FLOAT_TYPES,
    Encoder,
    Floats,
    GgufModel,
    cpu_encoder,
    cuda_encoder,
    exported_modules,
    final_metadata,
    model_of_checkpoint,
    model_of_gguf,
    planned,
    write_gguf,
)
from quantkit.mixtures import FILE_TYPES, Choice, FileType, MixtureOptions, choose_types, file_type_of, tensor_type_pairs
from quantkit.progress import Progress, silent
from quantkit.report import Report, Table, next_step
from quantkit.runtime.threads import cores
from quantkit.scheme import KEEP, LinearScheme

DEFAULT_TYPE, AUTO = "q4_k_m", "auto"
OUTER = ("token_embd.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class GgufChoices:
    """Options that only a GGUF file has. ``type`` None is the command's default, and "auto" floats as the source stores them."""

    type: str | None = None
    imatrix: Path | None = None
    pure: bool = False
    tensor_type: tuple[str, ...] = ()
    """``PATTERN=TYPE``."""
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    leave_output_tensor: bool = False
    allow_requantize: bool = False
    pre_tokenizer: str | None = None


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """One GGUF file to make."""

    path: str
    out: Path
    type: str
    """A key of ``FILE_TYPES``, or "auto"."""
    choices: GgufChoices = field(default_factory=GgufChoices)
    command: str = "quantize"
    origin: str | None = None
    """The model that ``path`` was made from, for the report; None: ``path`` itself."""
    weighed: bool = False
    """The mixture is that of a file with an importance matrix, though none is given: a method has weighed the inputs itself."""
    device: str = "auto"
    max_part_bytes: int | None = None
    """None: one file, whatever its size."""
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class _Plan:
    """One file, decided."""

    options: GgufOptions
    root: Path
    fingerprint: Callable[[], Any]
    """Of every byte of the source, which takes a while."""
    file_type: FileType
    model: GgufModel
    choices: Mapping[str, Choice]
    metadata: Mapping[str, Value]
    importance: Mapping[str, Floats]
    imatrix: Imatrix | None

    @property
    def files(self) -> tuple[tuple[str, int], ...]:
        """Names and exact sizes."""
        return file_bytes(self.options.out, self.metadata, planned(self.model, self.choices), self.options.max_part_bytes)

    @property
    def fallbacks(self) -> list[str]:
        return [name for name, choice in self.choices.items() if choice.type != choice.wanted]

    @property
    def requantized(self) -> list[str]:
        """Quantized tensors that change their type."""
        kinds = ((t, self.choices[t.name].type) for t in self.model.tensors)
        return [t.name for t, kind in kinds if BY_NAME[t.type].elements > 1 and kind not in (t.type, *FLOAT_TYPES)]

    @property
    def rounded(self) -> Counter[str]:
        """How many tensors get a type that does not hold every value of the source, by "from -> to"."""
        found: Counter[str] = Counter()
        for tensor in self.model.tensors:
            kind = self.choices[tensor.name].type
            copied = tensor.stored is not None and kind == tensor.type
            if not copied and kind != tensor.precision and not (kind == "F32" and tensor.precision in FLOAT_TYPES):
                found[f"{tensor.precision} -> {kind}"] += 1
        return found

    @property
    def without_importance(self) -> list[str]:
        """Tensors that an importance matrix would have helped and has no entry for."""
        if self.imatrix is None:
            return []
        usual = ("Q8_0", *FLOAT_TYPES)  # which round each value alone; and what is no block's input has an entry on request only
        weighed = [t for t in self.model.tensors if self.choices[t.name].type not in (t.type, *usual) and t.name not in OUTER]
        return [t.name for t in weighed if t.name not in self.importance]


def run(options: GgufOptions, progress: Progress = silent) -> Report:
    """Write ``options.path`` as the GGUF file ``options.out``; with ``dry_run`` say the type of every tensor and the exact size.

    Raises InputError for a source, a type or an importance matrix that cannot be used; MachineError for a device that is not there.
    """
    _check_name(options.out)
    plan = _plan(options)
    if options.dry_run:
        return _dry_run_report(plan)
    encoder, device = _encoder(options.device)
    started = time.monotonic()
    written = write_gguf(
        plan.model,
        options.out,
        metadata=plan.metadata,
        choices=plan.choices,
        importance=plan.importance,
        encoder=encoder,
        threads=cores(),
        identity=_identity(plan),
        overwrite=options.overwrite,
        resume=options.resume,
        max_part_bytes=options.max_part_bytes,
        source=plan.root,
        progress=progress,
    )
    return _done_report(plan, written.files, written.resumed, device, time.monotonic() - started)


def _check_name(out: Path) -> None:
    if out.suffix != ".gguf":
        raise InputError("OUT", f"is {str(out)!r:.200}", "the name of a .gguf file")


def refuse_out(options: GgufOptions, source: Path) -> None:
    """Raise InputError when the file could not be written in the end; asked before the hours of work that come first."""
    _check_name(options.out)
    fs.refuse_source(options.out, source)
    if not options.resume:
        fs.refuse_existing_file(options.out, options.overwrite, MAGIC)


def block_assignment(options: GgufOptions, spec: ModelSpec, method: str) -> dict[str, LinearScheme]:
    """How ``method`` stores the linears of the blocks so that the file of ``options`` can copy them; what is kept stays in floats.

    Raises InputError for a model or a mixture that GGUF cannot hold.
    """
    checkpoint = open_checkpoint(options.path)
    model = model_of_checkpoint(checkpoint, options.choices.pre_tokenizer, _name(options))
    _, choices = _choices(options, model, importance=True)
    modules = {module: choices[name].type for name, modules in exported_modules(checkpoint).items() for module in modules}
    assignment = dict.fromkeys(spec.all_linears(), KEEP)
    for layer in range(spec.layers):
        for path in spec.block_modules(layer):
            if modules.get(path) in GGML_BLOCKS:
                assignment[path] = replace(ggml_scheme(modules[path]), method=method)
    return assignment


def _plan(options: GgufOptions) -> _Plan:
    root = resolve_path(options.path)
    imatrix = None if options.choices.imatrix is None else read_imatrix(options.choices.imatrix)
    model, fingerprint = _source(options, root)
    file_type, choices = _choices(options, model, importance=options.weighed or imatrix is not None)
    kept = model.metadata if options.type == AUTO else {}  # a copy of a GGUF file is of the type that it was
    plan = _Plan(
        options,
        root,
        fingerprint,
        file_type,
        model,
        choices,
        final_metadata(model, file_type, {**_imatrix_keys(options.choices.imatrix, imatrix), **kept}),
        {} if imatrix is None else _importance(options.choices.imatrix, imatrix, model, choices),
        imatrix,
    )
    if plan.requantized and not options.choices.allow_requantize:
        first = next(t for t in model.tensors if t.name == plan.requantized[0])
        hint = "quantize the original checkpoint, or --allow-requantize"
        raise InputError(first.name, f"is {first.type} already, and would become {choices[first.name].type}", "a float tensor", hint)
    return plan


def _name(options: GgufOptions) -> str:
    """Of the directory or file that the model came in, for want of a better one."""
    return resolve_path(options.origin or options.path).resolve().name


def _source(options: GgufOptions, root: Path) -> tuple[GgufModel, Callable[[], Any]]:
    """The model, and what tells its bytes from others."""
    if root.is_dir():
        checkpoint = open_checkpoint(options.path)
        return model_of_checkpoint(checkpoint, options.choices.pre_tokenizer, _name(options)), checkpoint.fingerprint
    if options.choices.pre_tokenizer is not None:
        raise InputError("--pre-tokenizer", "was given, and the source is a GGUF file, which has its own", "no --pre-tokenizer")
    file = read_gguf(root)
    return model_of_gguf(file), lambda: [fs.sha256_file(path) for path in file.paths]


def _choices(options: GgufOptions, model: GgufModel, *, importance: bool) -> tuple[FileType, dict[str, Choice]]:
    """What the file calls itself, and the type of each tensor."""
    if options.type == AUTO:
        own = {t.name: t.type for t in model.tensors}
        most = Counter({kind: sum(t.type == kind and len(t.shape) > 1 for t in model.tensors) for kind in own.values()}).most_common(1)
        return _named_after(most[0][0]), {name: Choice(kind, kind) for name, kind in own.items()}
    file_type, chosen = file_type_of(options.type), options.choices
    if chosen.pure and file_type.default in FLOAT_TYPES:
        raise InputError("--pure", f"was given with type {options.type}, which is no mixture", "no --pure, or a quantized type")
    if chosen.leave_output_tensor and all(tensor.name != OUTER[1] for tensor in model.tensors):
        what = f"was given, and the model has no {OUTER[1]}: its embedding is its head"
        raise InputError("--leave-output-tensor", what, "--token-embedding-type TYPE")
    mixture = MixtureOptions(
        pure=chosen.pure,
        tensor_types=tensor_type_pairs(" ".join(chosen.tensor_type)),
        output_type=chosen.output_tensor_type,
        embedding_type=chosen.token_embedding_type,
        leave_output=chosen.leave_output_tensor,
    )
    tensors = [(tensor.name, tensor.type, tensor.shape) for tensor in model.tensors]
    return file_type, choose_types(tensors, file_type, model.facts, mixture, importance)


def _named_after(kind: str) -> FileType:
    """What a file calls itself of which most matrices have this type."""
    found = next((item for item in FILE_TYPES.values() if item.default == kind), None)
    return found or file_type_of("f16")


def _imatrix_keys(path: Path | None, imatrix: Imatrix | None) -> dict[str, Value]:
    """What the file says of its importance matrix; the name of the file, since a path is no part of a result."""
    if path is None or imatrix is None:
        return {}
    keys = {"quantize.imatrix.file": text(path.name), "quantize.imatrix.entries_count": u32(len(imatrix.entries))}
    if imatrix.datasets:
        keys["quantize.imatrix.dataset"] = text(imatrix.datasets[0])
    if imatrix.chunks is not None:
        keys["quantize.imatrix.chunks_count"] = u32(imatrix.chunks)
    return keys


def _importance(path: Path | None, imatrix: Imatrix, model: GgufModel, choices: Mapping[str, Choice]) -> dict[str, Floats]:
    """The importance of each tensor's columns, where the type that it gets can use it. Raises InputError when none can."""
    found = {}
    for tensor in model.tensors:
        if choices[tensor.name].type in FLOAT_TYPES or choices[tensor.name].type == tensor.type:
            continue
        importance = importance_for(imatrix, tensor.name, tensor.matrices, tensor.columns, str(path))
        if importance is not None:
            found[tensor.name] = np.ascontiguousarray(importance, np.float32)
    if not found:
        raise InputError(str(path), "has nothing on any tensor that is quantized here", "the matrix of this model, and a quantized type")
    return found


def _identity(plan: _Plan) -> dict[str, Any]:
    """Everything that decides the bytes; the types are in it one by one, so that no option needs to be."""
    options = plan.options
    return {
        "command": options.command,
        "quantkit": __version__,
        "source": plan.fingerprint(),
        "types": {name: choice.type for name, choice in plan.choices.items()},
        "imatrix": None if options.choices.imatrix is None else fs.sha256_file(options.choices.imatrix),
        "max_part_bytes": options.max_part_bytes,
        "pre_tokenizer": options.choices.pre_tokenizer,
    }


def _encoder(name: str) -> tuple[Encoder, str]:
    """What encodes, and its device. Raises MachineError for a GPU that is not there, or kernels that are not built."""
    if name == "cpu":
        return cpu_encoder, "cpu"
    import torch

    from quantkit.ops.cuda_library import load_library
    from quantkit.ops.ggml.cuda import available
    from quantkit.runtime.devices import place_for

    if place_for(name) == "cpu" or (name == "auto" and not available()):
        return cpu_encoder, "cpu"
    load_library()  # what is not built is told before anything is written
    return cuda_encoder, torch.cuda.get_device_name()


# reports


def _by_type(plan: _Plan) -> Table:
    """What each type holds."""
    counts: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in plan.model.tensors:
        kind = plan.choices[tensor.name].type
        counts[kind] += 1
        weights[kind] += int(np.prod(tensor.shape, dtype=np.int64))
        nbytes[kind] += tensor_bytes(kind, tensor.shape)
    rows = tuple(
        (kind, counts[kind], f"{weights[kind] / 1e6:.2f} M", f"{nbytes[kind] / 1e6:.2f} MB", f"{8 * nbytes[kind] / weights[kind]:.4g}")
        for kind in sorted(counts, key=lambda kind: -nbytes[kind])
    )
    return Table("Types", ("type", "tensors", "weights", "size", "bits per weight"), rows)


def _totals(plan: _Plan) -> tuple[int, int, int]:
    """Weights, their bytes as stored by the source, and as written."""
    weights = sum(int(np.prod(t.shape, dtype=np.int64)) for t in plan.model.tensors)
    before = plan.model.nbytes if plan.options.origin is None else open_checkpoint(plan.options.origin).nbytes
    after = sum(tensor_bytes(plan.choices[t.name].type, t.shape) for t in plan.model.tensors)
    return weights, before, after


def _warnings(plan: _Plan) -> tuple[str, ...]:
    found = list(plan.model.notes)
    if plan.fallbacks:
        names = Counter(f"{plan.choices[name].wanted} -> {plan.choices[name].type}" for name in plan.fallbacks)
        listed = ", ".join(f"{kinds} ({count})" for kinds, count in names.items())
        found.append(f"{len(plan.fallbacks)} tensors have rows that their type does not divide and got another: {listed}")
    if plan.requantized:
        found.append(f"{len(plan.requantized)} tensors were quantized already and lose twice")
    if plan.without_importance:
        count = len(plan.without_importance)
        found.append(f"the importance matrix has no entry for {count} quantized tensors ({plan.without_importance[0]}, ...)")
    return tuple(found)


def _verdict(plan: _Plan) -> str:
    """Exact or lossy, and why."""
    if not plan.rounded:
        return "exact: every value is what the source holds"
    return "lossy: rounded are " + ", ".join(f"{count} tensors ({kinds})" for kinds, count in sorted(plan.rounded.items()))


def _data(plan: _Plan) -> dict[str, Any]:
    weights, before, after = _totals(plan)
    return {
        "out": str(plan.options.out),
        "method": "gguf",
        "type": plan.file_type.name.upper(),
        "weights": weights,
        "bytes_before": before,
        "bytes_after": after,
        "bits_per_weight": 8 * after / weights,
        "types": dict(sorted(Counter(choice.type for choice in plan.choices.values()).items())),
        "fallbacks": len(plan.fallbacks),
        "requantized": len(plan.requantized),
        "exact": not plan.rounded,
        "imatrix": None if plan.imatrix is None else {"entries": len(plan.imatrix.entries), "used": len(plan.importance)},
        "warnings": list(_warnings(plan)),
    }


def _facts(plan: _Plan) -> list[tuple[str, str]]:
    weights, before, after = _totals(plan)
    facts = [("type", plan.file_type.name.upper()), ("bits per weight", f"{8 * after / weights:.3f}")]
    if plan.options.command == "convert":
        facts.append(("values", _verdict(plan)))
    if plan.imatrix is not None:
        facts.append(("importance", f"{len(plan.importance)} tensors, from {plan.options.choices.imatrix}"))
    return [*facts, ("size before", f"{before / 1e6:.1f} MB"), ("size after", f"{after / 1e6:.1f} MB ({after / before:.1%})")]


def _dry_run_report(plan: _Plan) -> Report:
    rows = tuple(
        (t.name, "x".join(map(str, t.shape)), t.type, plan.choices[t.name].type, tensor_bytes(plan.choices[t.name].type, t.shape))
        for t in plan.model.tensors
    )
    tensors = {t.name: {"shape": list(t.shape), "from": t.type, "type": plan.choices[t.name].type} for t in plan.model.tensors}
    return Report(
        command=plan.options.command,
        data={**_data(plan), "dry_run": True, "tensors": tensors, "files": [{"name": name, "bytes": size} for name, size in plan.files]},
        facts=(
            *_facts(plan),
            *((f"file {name}", f"{size:,} bytes, exact") for name, size in plan.files),
            ("written", "nothing (dry run)"),
        ),
        tables=(_by_type(plan), Table("Tensors", ("tensor", "shape", "from", "type", "bytes"), rows)),
        warnings=_warnings(plan),
    )


def _done_report(plan: _Plan, files: tuple[tuple[Path, int], ...], resumed: int, device: str, seconds: float) -> Report:
    weights, _, _ = _totals(plan)
    first = files[0][0]
    machine: dict[str, Any] = {
        "seconds": seconds,
        "device": device,
        "resumed_tensors": resumed,
        "files": [{"name": path.name, "bytes": size} for path, size in files],
    }
    facts = [
        ("written", ", ".join(str(path) for path, _ in files) if len(files) < 4 else f"{first} and {len(files) - 1} more"),
        *_facts(plan),
        ("time", f"{seconds:.1f} s on {device}, {weights / seconds / 1e6:.1f} M weights/s"),
    ]
    if resumed:
        facts.append(("continued", f"{resumed} tensors of an unfinished run were kept"))
    return Report(
        command=plan.options.command,
        data={**_data(plan), **machine},
        facts=tuple(facts),
        tables=(_by_type(plan),),
        warnings=_warnings(plan),
        next_steps=(
            next_step("inspect", first),
            next_step("report", plan.options.origin or plan.options.path, first),
            next_step("serve", first),
        ),
    )
