"""``quantkit quantize``: a checkpoint into one or several quantized artifacts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__, fs
from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.checkpoint.journal import changed_field
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_manifest
from quantkit.commands import quantize_gguf
from quantkit.commands.assign import artifact_bytes, assign, check_recipe, float_dtype
from quantkit.commands.quantize_gguf import DEFAULT_TYPE, GgufChoices, GgufOptions
from quantkit.commands.quantize_report import ArtifactPlan, Run, calibration_facts, done_report, dry_run_report
from quantkit.convert import GGUF_DTYPE
from quantkit.errors import InputError, MachineError
from quantkit.geometry import GGML_BLOCKS
from quantkit.mixtures import FILE_TYPES
from quantkit.progress import Progress, silent
from quantkit.quant_config import is_kept, quantization_config
from quantkit.recipe import Calibration, Recipe, checked_recipe, load_recipe, parse_override
from quantkit.report import Report
from quantkit.scheme import KEEP, assignment_to_json
from quantkit.verify import expected_tensors, tensor_defects

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.checkpoint.artifact import ArtifactWriter
    from quantkit.quantizers.base import Method, Quantizer
    from quantkit.quantizers.calibration import CalibrationTokens
    from quantkit.quantizers.pipeline import Job, QuantizedModel

DEFAULT_SAMPLES, BUILTIN_SEQ_LEN, TEXT_SEQ_LEN = 128, 512, 2048
DEFAULT_SHARD_BYTES = 5_000_000_000
GGUF = "gguf"
"""The method whose types come from a mixture: it writes one file, and nothing of the block loop is in it."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Options of ``quantkit quantize``; None means "as the recipe says, else the default"."""

    path: str
    out: Path
    method: str | None = None
    """One method, or several with commas between them, each of which then writes ``out/<method>``."""
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    format: str | None = None
    recipe: Path | None = None
    override: tuple[str, ...] = ()
    option: tuple[str, ...] = ()
    """``KEY=VALUE`` for the method, or ``METHOD.KEY=VALUE`` for one of several."""
    inputs: str | None = None
    calib: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    device: str = "auto"
    devices: int = 1
    """GPUs to split the work over."""
    compute_dtype: str = "auto"
    offload: bool = False
    max_shard_size: int | None = None
    """Bytes; None is 5 GB of safetensors, and one GGUF file whatever its size."""
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False
    gguf: GgufChoices = field(default_factory=GgufChoices)


NOT_GGUF = (
    *("bits", "group_size", "sym", "format", "recipe", "override", "option", "inputs", "calib", "samples", "seq_len"),
    *("devices", "compute_dtype", "offload"),
)
"""Options that say nothing of a GGUF file whose types its mixture decides."""


def _flag(name: str) -> str:
    return "--sym/--asym" if name == "sym" else f"--{name.replace('_', '-')}"


def _gguf_options(options: QuantizeOptions) -> GgufOptions:
    """What method gguf is asked to do. Raises InputError for options that it has no use for."""
    plain = QuantizeOptions(options.path, options.out)
    for name in NOT_GGUF:
        if getattr(options, name) != getattr(plain, name):
            expected = "--type, and --tensor-type PATTERN=TYPE for some tensors"
            raise InputError(_flag(name), "was given, and method gguf has no such setting", expected)
    return GgufOptions(
        options.path,
        options.out,
        options.gguf.type or DEFAULT_TYPE,
        options.gguf,
        device=options.device,
        max_part_bytes=options.max_shard_size,
        resume=options.resume,
        overwrite=options.overwrite,
        dry_run=options.dry_run,
    )


def _refuse_gguf_choices(options: QuantizeOptions) -> None:
    """Raise InputError when something was asked of a GGUF file and none is written."""
    plain = GgufChoices()
    for name in GgufChoices.__dataclass_fields__:
        if getattr(options.gguf, name) != getattr(plain, name):
            raise InputError(_flag(name), f"was given with method {options.method}", "method gguf")


def method_names(options: QuantizeOptions) -> tuple[str, ...]:
    """The methods that were asked for. Raises InputError when there is none, or one twice."""
    if options.method is None:
        base = load_recipe(options.recipe) if options.recipe else None
        if base is None:
            raise InputError("--method", "no method given", "--method or a --recipe that names one")
        return (base.method,)
    names = tuple(name.strip() for name in options.method.split(","))
    if len(set(names)) != len(names) or "" in names:
        raise InputError("--method", f"is {options.method!r:.100}", "method names with commas between them, each once")
    if len(names) > 1 and options.recipe is not None:
        raise InputError("--recipe", "was given with several methods", "one method: a recipe is for one")
    return names


def _value(text: str) -> Any:
    """What an option's text means: true, false, a number, or a word."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _own_options(options: QuantizeOptions, name: str, names: tuple[str, ...], base: Mapping[str, Any]) -> dict[str, Any]:
    """The options of method ``name``: the recipe's, then those of the command line. Raises InputError for what names no option."""
    found = dict(base)
    for text in options.option:
        key, equals, value = text.partition("=")
        owner, dot, own = key.partition(".")
        if not equals or not key or (dot and owner not in names):
            raise InputError(f"--option {text!r:.100}", "is no option", "KEY=VALUE, or METHOD.KEY=VALUE with one of the methods")
        if not dot or owner == name:
            found[own if dot else key] = _value(value)
    if options.inputs is not None and name == "gptq":
        found["inputs"] = options.inputs
    return found


def effective_recipe(options: QuantizeOptions, method: str | None = None, max_positions: int | None = None) -> Recipe:
    """The recipe file, if any, with every option that was given on the command line laid over it, and defaults filled in.

    ``method`` is one of several; ``max_positions`` of the model, when there is one, bounds the calibration windows. Raises
    InputError when nothing names a method, and for a value out of range.
    """
    base = load_recipe(options.recipe) if options.recipe else None
    names = method_names(options)
    method = method or names[0]
    if options.inputs is not None and "gptq" not in names:
        raise InputError("--inputs", f"was given, and {', '.join(names)} has no such choice", "method gptq")
    calibration = base.calibration if base else Calibration()
    source = options.calib if options.calib is not None else calibration.source
    samples = options.samples if options.samples is not None else calibration.samples
    seq_len = options.seq_len if options.seq_len is not None else calibration.seq_len
    if seq_len is None:
        default = BUILTIN_SEQ_LEN if source in (None, "builtin", "self") else TEXT_SEQ_LEN
        seq_len = default if max_positions is None else min(default, max_positions)
    elif max_positions is not None and seq_len > max_positions:
        raise InputError("--seq-len", f"is {seq_len}", f"at most {max_positions}, the positions of the model")

    def pick(name: str) -> Any:
        given = getattr(options, name)
        return given if given is not None or base is None else getattr(base, name)

    fields = {
        "method": method,
        **{name: pick(name) for name in ("bits", "group_size", "sym", "format")},
        "calibration": {
            "source": "builtin" if source is None else source,
            "samples": DEFAULT_SAMPLES if samples is None else samples,
            "seq_len": seq_len,
        },
        "overrides": [*(parse_override(text) for text in options.override), *(base.overrides if base else [])],
        "options": _own_options(options, method, names, base.options if base else {}),
    }
    return checked_recipe(fields, "quantize")


def _check_source(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raise InputError unless ``checkpoint`` is a whole float model: a method would spend hours before it met the gap."""
    if checkpoint.config.get("quantization_config"):
        raise InputError(
            checkpoint.root.name,
            "is already quantized (config.json has a quantization_config)",
            "an unquantized checkpoint",
            "quantkit convert --to hf makes floats of it",
        )
    expected = expected_tensors(spec, dict.fromkeys([*spec.all_linears(), spec.architecture.head], KEEP))
    for defect in tensor_defects(spec, checkpoint.tensors, expected, checkpoint.dtype):
        raise InputError(defect.where, defect.what, defect.expected)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device", "cuda was asked for, and torch sees no GPU", "--device cpu, or a machine with a GPU")
    if name not in ("cpu", "cuda"):
        raise InputError("--device", f"{name!r} is unknown", "auto, cpu or cuda")
    return name


def _devices(name: str, count: int) -> tuple[str, ...]:
    """The torch devices that ``--device`` and ``--devices`` name. Raises InputError for several CPUs, MachineError for too few GPUs."""
    import torch

    device = _device(name)
    if count == 1:
        return (device,)
    if name == "cpu":
        raise InputError("--devices", f"is {count} with --device cpu", "--device cuda, or no --devices")
    present = torch.cuda.device_count()
    if count > present:
        devices = "1 CUDA device" if present == 1 else f"{present} CUDA devices"
        right = f"at most {present}" if present else "no --devices, or a machine with GPUs"
        raise MachineError("--devices", f"{count} asked, this machine has {devices}", right)
    return tuple(f"cuda:{index}" for index in range(count))


def _compute_dtype(name: str, device: str, stored: str) -> torch.dtype:
    """The dtype of calibration's forward passes: float32 on a CPU, on a GPU that in which a 16-bit model is stored."""
    from quantkit.ops.dtypes import TORCH_DTYPES
    from quantkit.ops.dtypes import float_dtype as named

    if name != "auto":
        return named(name, "--compute-dtype")
    return TORCH_DTYPES[stored if device != "cpu" and stored in ("BF16", "F16") else "F32"]


def run(options: QuantizeOptions, progress: Progress = silent) -> Report:
    """Quantize ``options.path`` into ``options.out``. With ``dry_run`` report the plan and write nothing."""
    from quantkit.quantizers.base import methods

    known = methods()
    names = method_names(options)
    for name in names:
        if name not in (*known, GGUF):
            raise InputError("--method", f"{name!r} is unknown", f"one of {', '.join((*known, GGUF))}")
    if GGUF in names:
        if len(names) > 1:
            raise InputError("--method", f"is {options.method}", f"{GGUF} alone: it writes a file, and the others directories")
        return quantize_gguf.run(_gguf_options(options), progress)
    if options.format is not None and options.format.lower() in FILE_TYPES:
        return _quantize_blocks(options, names, known, progress)
    _refuse_gguf_choices(options)
    facts = {name: found.facts for name, found in known.items()}
    recipes = {name: effective_recipe(options, name) for name in names}
    for recipe in recipes.values():
        check_recipe(recipe, facts)
    quantizers = {name: _quantizers(recipe, known) for name, recipe in recipes.items()}
    if not any(q.needs for found in quantizers.values() for q in found.values()):
        _refuse_calibration(options, ", ".join(names))
    checkpoint = open_checkpoint(options.path)
    spec = spec_for(checkpoint.config)
    _check_source(checkpoint, spec)
    plans = {}
    for name in names:
        recipe = effective_recipe(options, name, spec.max_positions)
        assignment = assign(spec, recipe, facts, float_dtype(checkpoint, spec))
        used = {s.method for s in assignment.values() if not is_kept(s)}
        plans[name] = ArtifactPlan(
            recipe,
            options.out if len(names) == 1 else options.out / name,
            assignment,
            {method: q for method, q in quantizers[name].items() if method in used},
            quantization_config(assignment, spec.architecture.head, spec.architecture.embedding),
            *artifact_bytes(checkpoint, spec, assignment),
        )
    work = Run(options, checkpoint, spec, plans)
    if options.dry_run:
        return dry_run_report(work)
    return _quantize(work, progress)


BLOCK_METHODS = ("awq", "gptq")
"""Methods that make ggml's blocks: an artifact of blocks, which is then written as a GGUF file."""


def _block_method(options: QuantizeOptions, names: tuple[str, ...]) -> str:
    """The method that makes blocks for a GGUF file. Raises InputError where it cannot, and for options that say nothing of blocks."""
    form, method = str(options.format), names[0]
    if len(names) > 1 or method not in BLOCK_METHODS or FILE_TYPES[form.lower()].default not in GGML_BLOCKS:
        expected = f"a quantized type with one method of {', '.join(BLOCK_METHODS)}, or --method gguf --type {form}"
        raise InputError("--format", f"is {form} with method {', '.join(names)}", expected)
    for name in ("type", "imatrix"):
        if getattr(options.gguf, name) is not None:
            what = f"was given with --format {form}" + ("" if name == "type" else f", and {method} gathers its own statistics")
            raise InputError(_flag(name), what, f"no {_flag(name)}")
    plain = replace(options, format=None)
    recipe = effective_recipe(plain, method)
    for option in ("bits", "group_size", "sym", "format", "override"):
        name = "overrides" if option == "override" else option
        if getattr(recipe, name) not in (None, []):
            where = f"--recipe {options.recipe}: {name}" if getattr(plain, option) in (None, ()) else _flag(option)
            raise InputError(where, f"was given with --format {form}", "--tensor-type PATTERN=TYPE for some tensors")
    return method


def _quantize_blocks(options: QuantizeOptions, names: tuple[str, ...], known: Mapping[str, Method], progress: Progress) -> Report:
    """``--method awq --format q4_k_m``: the linears of the blocks by the method, in the types of the mixture; the rest as method gguf does.

    The artifact in between lies beside OUT until the file is there, and is what ``--resume`` goes on from.
    """
    method, form = _block_method(options, names), str(options.format).lower()
    checkpoint = open_checkpoint(options.path)
    if checkpoint.kind != "hf":
        hint = f"quantkit convert {options.path} FLOATS makes one"
        raise InputError(options.path, "is a GGUF file", f"a directory, for --format {form} with method {method}", hint)
    spec = spec_for(checkpoint.config)
    _check_source(checkpoint, spec)
    recipe = effective_recipe(replace(options, format=None), method, spec.max_positions)
    between = options.out.with_name(f"{options.out.name}.blocks")
    target = GgufOptions(
        options.path,
        options.out,
        form,
        options.gguf,
        weighed=True,
        device=options.device,
        max_part_bytes=options.max_shard_size,
        resume=options.resume,
        overwrite=options.overwrite,
        dry_run=options.dry_run,
    )
    quantizers = {method: known[method].factory(recipe.options)}
    if options.dry_run:
        return _by_method(quantize_gguf.run(target, progress), method, None)
    quantize_gguf.refuse_out(target, checkpoint.root)
    assignment = quantize_gguf.block_assignment(target, spec, method)
    plan = ArtifactPlan(
        recipe,
        between,
        assignment,
        quantizers,
        quantization_config(assignment, spec.architecture.head, spec.architecture.embedding),
        *artifact_bytes(checkpoint, spec, assignment),
    )
    work = Run(replace(options, out=between), checkpoint, spec, {method: plan})
    finished = options.resume and _is_finished(between)
    if finished:
        _refuse_other_work(work, plan, progress)
    made = None if finished else _quantize(work, progress)
    report = quantize_gguf.run(replace(target, path=str(between), origin=options.path), progress)
    fs.remove_tree(between)
    return _by_method(report, method, made)


def _refuse_other_work(work: Run, plan: ArtifactPlan, progress: Progress) -> None:
    """Raise InputError, naming the field, when the artifact that is there was made from other inputs than those of ``work``."""
    calibration = _calibration(plan.recipe, work.checkpoint, _device(work.options.device), progress) if plan.calibrated else None
    facts = _identity(replace(work, calibration=calibration), plan, work.checkpoint.fingerprint())
    now = json.loads(json.dumps({**facts, "assignment": assignment_to_json(plan.assignment)}))
    then = read_manifest(plan.out) or {}
    if changed := changed_field({key: then.get(key) for key in now}, now):
        field, before, after = changed
        hint = "run as before to continue, or --overwrite to start over"
        raise InputError(f"{plan.out}: {field}", f"was {before!r:.200} when it was made and is {after!r:.200} now", "no change", hint)


def _by_method(report: Report, method: str, made: Report | None) -> Report:
    """The report of a GGUF file whose blocks ``method`` made, with what ``made`` says of that."""
    calibrated = [] if made is None else [fact for fact in made.facts if fact[0] == "calibrated on"]
    return replace(
        report,
        data={**report.data, "method": method, **({} if made is None else {"calibrated": made.data})},
        facts=(("method", method), *calibrated, *report.facts),
        warnings=(*report.warnings, *(made.warnings if made else ())),
    )


def _quantizers(recipe: Recipe, known: Mapping[str, Method]) -> dict[str, Quantizer]:
    """The recipe's method with its options, and those of its overrides and of a quantized head with their defaults."""
    others = {o.method for o in recipe.overrides if o.method is not None} | {"rtn"}
    found = {name: known[name].factory({}) for name in sorted(others - {recipe.method}) if name in known}
    return {recipe.method: known[recipe.method].factory(recipe.options), **found}


def _refuse_calibration(options: QuantizeOptions, name: str) -> None:
    """Raise InputError when calibration was asked for and would be ignored. A recipe's own section may serve other methods."""
    given = {"--calib": options.calib, "--samples": options.samples, "--seq-len": options.seq_len}
    for option, value in given.items():
        if value is not None:
            raise InputError(option, f"was given, and method {name} uses no calibration", f"no {option}, or a method such as awq")
    if options.offload:
        raise InputError("--offload", f"was given, and method {name} has no activations", "a method that calibrates, such as awq")


def _calibration(recipe: Recipe, checkpoint: Checkpoint, device: str, progress: Progress) -> CalibrationTokens:
    from quantkit.quantizers.calibration import text_tokens
    from quantkit.quantizers.self_calibration import sampled_tokens
    from quantkit.text.tokenizer import load_tokenizer

    wanted = recipe.calibration
    assert wanted.source is not None and wanted.samples is not None and wanted.seq_len is not None
    tokenizer = load_tokenizer(checkpoint.root)
    if wanted.source == "self":
        return sampled_tokens(checkpoint, tokenizer, wanted.samples, wanted.seq_len, progress, device)
    return text_tokens(tokenizer, wanted.source, wanted.samples, wanted.seq_len)


def _environment(devices: Sequence[str], compute_dtype: torch.dtype) -> dict[str, Any]:
    """What besides the inputs decides the bytes of the result; ``devices`` where there are several, whose parts were summed."""
    import torch

    names = [device if device == "cpu" else torch.cuda.get_device_name(device) for device in devices]
    return {
        "quantkit": __version__,
        "torch": torch.__version__,
        "device": names[0] if len(set(names)) == 1 else ", ".join(names),
        **({"devices": len(devices)} if len(devices) > 1 else {}),
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _quantize(work: Run, progress: Progress) -> Report:
    """Check the outputs, gather the calibration, quantize, publish."""
    import torch

    options, checkpoint = work.options, work.checkpoint
    many = len(work.plans) > 1
    finished = {name for name, p in work.plans.items() if many and options.resume and _is_finished(p.out)}
    plans = {name: plan for name, plan in work.plans.items() if name not in finished}
    if not plans:
        raise InputError(str(options.out), "holds every artifact already", "one that is missing")
    for plan in plans.values():
        # The writer asks the same; asked here, it is answered before the calibration is made.
        fs.refuse_source(plan.out, checkpoint.root)
        if not options.resume:
            fs.refuse_existing(plan.out, options.overwrite)
    started = time.monotonic()
    devices = _devices(options.device, options.devices)
    dtype = _compute_dtype(options.compute_dtype, devices[0], float_dtype(checkpoint, work.spec))
    wanting = [plan for plan in plans.values() if plan.calibrated]
    calibration = _calibration(wanting[0].recipe, checkpoint, devices[0], progress) if wanting else None
    if devices[0] != "cpu":
        torch.cuda.synchronize()  # before its first use there is nothing to reset on the other devices
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
    work = replace(work, plans=plans, calibration=calibration, devices=devices)
    models, files = _write(work, dtype, progress)
    return done_report(work, models, files, time.monotonic() - started)


def _is_finished(out: Path) -> bool:
    return out.is_dir() and not out.with_name(f"{out.name}.partial").exists()


def _identity(work: Run, plan: ArtifactPlan, fingerprint: str) -> dict[str, Any]:
    """The inputs that decide the bytes of one artifact."""
    return {
        "source": {"fingerprint": fingerprint},
        # Where the text lies is no part of the result; what it says is, and its digest stands beside it.
        "recipe": plan.recipe.model_dump(mode="json", exclude={"calibration"}),
        "calibration": calibration_facts(work.calibration) if plan.calibrated else None,
    }


def _write(work: Run, dtype: torch.dtype, progress: Progress) -> tuple[dict[str, QuantizedModel], dict[str, list[str]]]:
    """Quantize every block into the artifacts and publish them; what was done, and the names of the files."""
    import torch

    from quantkit.checkpoint.artifact import ArtifactWriter
    from quantkit.quantizers.pipeline import Job, Source, quantize_models

    options, checkpoint, spec = work.options, work.checkpoint, work.spec
    environment, fingerprint = _environment(work.devices, dtype), checkpoint.fingerprint()
    identities = {name: _identity(work, plan, fingerprint) for name, plan in work.plans.items()}
    width = spec.dims["hidden"].elements * dtype.itemsize
    states = 0 if work.calibration is None else work.calibration.tokens.numel() * width
    if len(work.plans) > 1:
        fs.make_dir(options.out)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        jobs: dict[str, Job] = {}
        for name, plan in work.plans.items():
            writer = ArtifactWriter(
                plan.out,
                identity={**identities[name], **environment, "devices": len(work.devices)},
                overwrite=options.overwrite,
                resume=options.resume,
                need_bytes=plan.bytes_after + (states if plan.calibrated else 0),  # the resume point lies on the disk too
                source=checkpoint.root,
            )
            jobs[name] = Job(plan.assignment, plan.quantizers, stack.enter_context(writer))
        source = Source(checkpoint, spec, GGUF_DTYPE, dtype, work.devices)
        offload = _offload(jobs) if options.offload else _in_memory(work.devices[0])
        models = quantize_models(source, jobs, work.calibration, offload=offload, progress=progress)
        files = {}
        for name, plan in work.plans.items():
            facts = {**identities[name], "environment": environment}
            files[name] = _publish(work, plan, jobs[name].writer, models[name], facts)
    return models, files


def _in_memory(device: str) -> Callable[[str, Tensor], Tensor]:
    """Activations in the host's memory, where a GPU can fetch them from without a copy in between."""
    return lambda name, hidden: hidden if device == "cpu" else hidden.pin_memory()


def _offload(jobs: Mapping[str, Job]) -> Callable[[str, Tensor], Tensor]:
    """Where activations lie when they are not to be in memory: a file beside the units of the artifact that they are for."""
    from quantkit.quantizers.calibration import in_file

    def place(name: str, hidden: Tensor) -> Tensor:
        writer = jobs[name].writer if name in jobs else next(iter(jobs.values())).writer
        return in_file(writer.scratch(f"activations-{name}"), hidden)

    return place


def _publish(work: Run, plan: ArtifactPlan, writer: ArtifactWriter, model: QuantizedModel, facts: Mapping[str, Any]) -> list[str]:
    """Assemble one artifact and put it in its place, with ``facts`` in its manifest; the names of its files."""
    checkpoint, head = work.checkpoint, work.spec.architecture.head
    totals = {
        "bytes_before": plan.bytes_before,
        "bytes_after": writer.tensor_bytes,
        "quantized_weights": model.quantized_weights,
        "quantized_bytes": model.quantized_bytes,
    }
    manifest = {
        "kind": "artifact",
        "method": plan.recipe.method,
        **facts,
        "assignment": assignment_to_json(plan.assignment),
        "totals": totals,
        "blocks": model.facts,
        **({"expert_tokens": model.coverage} if model.coverage else {}),
    }
    config = {**checkpoint.config, "quantization_config": dict(plan.config)}
    if work.spec.tied and head in plan.assignment:
        config["tie_word_embeddings"] = False
    size = DEFAULT_SHARD_BYTES if work.options.max_shard_size is None else work.options.max_shard_size
    published = writer.publish(config=config, files=checkpoint.extra_files(), manifest=manifest, max_shard_size=size)
    return [name for name, _ in published.files]
