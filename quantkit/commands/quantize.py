"""``quantkit quantize``: a checkpoint into a quantized artifact."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__, fs
from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.commands.plan import METHOD_LAYOUTS
from quantkit.errors import InputError
from quantkit.geometry import DTYPE_BYTES, LAYOUTS
from quantkit.progress import Progress, silent
from quantkit.recipe import Calibration, Override, Recipe, checked_recipe, load_recipe, parse_override
from quantkit.report import Report, Table, next_step
from quantkit.scheme import KEEP, LinearScheme, Rule, assignment_to_json, awq_config, resolve
from quantkit.verify import expected_tensors, mixed_siblings, tensor_defects

if TYPE_CHECKING:
    from quantkit.quantizers.base import Quantizer
    from quantkit.quantizers.calibration import CalibrationTokens
    from quantkit.quantizers.pipeline import QuantizedModel

DEFAULT_SAMPLES, BUILTIN_SEQ_LEN, TEXT_SEQ_LEN = 128, 512, 2048
COMPUTE_BYTES = 4
"""Calibration runs in float32."""
PORTABLE_GROUPS = frozenset({32, 64, 128})
"""AWQ group sizes that transformers, vLLM and SGLang all run (``formats.md`` 13)."""
GGUF_FLOAT_DTYPE = "F16"
"""What the unquantized tensors of a GGUF source are written as: its blocks have no dtype of their own."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Options of ``quantkit quantize``; None means "as the recipe says, else the default"."""

    path: str
    out: Path
    method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    format: str | None = None
    recipe: Path | None = None
    override: tuple[str, ...] = ()
    calib: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    device: str = "auto"
    max_shard_size: int = 5_000_000_000
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False


def effective_recipe(options: QuantizeOptions, max_positions: int | None = None) -> Recipe:
    """The recipe file, if any, with every option that was given on the command line laid over it, and defaults filled in.

    ``max_positions`` of the model, when there is one, bounds the calibration windows. Raises InputError when neither names
    a method, and for a value out of range.
    """
    base = load_recipe(options.recipe) if options.recipe else None
    method = options.method or (base.method if base else None)
    if method is None:
        raise InputError("--method", "no method given", "--method or a --recipe that names one")
    calibration = base.calibration if base else Calibration()
    source = options.calib if options.calib is not None else calibration.source
    samples = options.samples if options.samples is not None else calibration.samples
    seq_len = options.seq_len if options.seq_len is not None else calibration.seq_len
    if seq_len is None:
        default = BUILTIN_SEQ_LEN if source in (None, "builtin", "self") else TEXT_SEQ_LEN
        seq_len = default if max_positions is None else min(default, max_positions)
    elif max_positions is not None and seq_len > max_positions:
        raise InputError("--seq-len", f"is {seq_len}", f"at most {max_positions}, the positions of the model")
    fields = {
        "method": method,
        "bits": options.bits if options.bits is not None else (base.bits if base else 4),
        "group_size": options.group_size if options.group_size is not None else (base.group_size if base else 128),
        "sym": options.sym if options.sym is not None else (base.sym if base else False),
        "format": options.format or (base.format if base else None) or METHOD_LAYOUTS.get(method),
        "calibration": {
            "source": "builtin" if source is None else source,
            "samples": DEFAULT_SAMPLES if samples is None else samples,
            "seq_len": seq_len,
        },
        "overrides": [*(parse_override(text) for text in options.override), *(base.overrides if base else [])],
        "options": base.options if base else {},
    }
    return checked_recipe(fields, "quantize")


def _scheme(recipe: Recipe, layouts: tuple[str, ...], override: Override | None = None) -> LinearScheme:
    if override is not None and override.keep:
        return KEEP
    layout = recipe.format or layouts[0]
    if layout not in layouts or layout not in LAYOUTS:
        raise InputError("--format", f"{layout!r} cannot hold what method {recipe.method} makes", f"one of {', '.join(layouts)}")

    def pick(name: str) -> Any:
        value = getattr(override, name) if override is not None else None
        return getattr(recipe, name) if value is None else value

    bits, group_size, sym = pick("bits"), pick("group_size"), pick("sym")
    if layout == "awq" and bits != 4:
        where = f"override {override.pattern!r}" if override is not None else "--bits"
        raise InputError(where, f"{bits} bits in the {layout} format", "4", "leave such layers unquantized: --override 'PATTERN:keep'")
    if group_size != -1 and group_size < 8:
        raise InputError("--group-size", f"is {group_size}", "-1 (whole rows) or at least 8")
    return LinearScheme(recipe.method, layout, bits, group_size, sym)


def check_recipe(recipe: Recipe, layouts: tuple[str, ...]) -> None:
    """Raise InputError when no model could be quantized by ``recipe``: what it asks for does not fit its format."""
    for override in (None, *recipe.overrides):
        _scheme(recipe, layouts, override)


def assign(spec: ModelSpec, recipe: Recipe, layouts: tuple[str, ...]) -> dict[str, LinearScheme]:
    """Which linear is stored how: the head kept, then overrides, then every other linear of the blocks by the recipe.

    Raises InputError naming the linear, the numbers and the remedy when a layout cannot hold its shape, and for an override
    that would quantize the head alone.
    """
    head = spec.architecture.head
    rules = [Rule(o.pattern, _scheme(recipe, layouts, o)) for o in recipe.overrides]
    rules.append(Rule("", _scheme(recipe, layouts)))
    assignment = resolve(rules, spec.all_linears())
    if not spec.tied:
        for override in recipe.overrides:
            if not override.keep and [name for name in assignment if re.search(override.pattern, name)] == [head]:
                raise InputError(
                    f"override {override.pattern!r}", f"would quantize {head}", "linears of the blocks", "the head stays in floats"
                )
        assignment[head] = KEEP
    if all(scheme.layout == "plain" for scheme in assignment.values()):
        raise InputError("--override", "leaves every linear unquantized", "at least one to quantize")
    for layer in range(spec.layers):
        for role, path in spec.block_linears(layer).items():
            n, k = spec.linear_shape(role)
            scheme = assignment[path]
            if scheme.layout == "plain":
                continue
            try:
                LAYOUTS[scheme.layout](n, k, dtype="F16", group_size=scheme.group_size)
            except InputError as exc:
                fits = [str(g) for g in (128, 64, 32) if k % g == 0]
                hint = f"--group-size {fits[0]} divides {k}" if fits else f"--override '{spec.linears[role].name}:keep'"
                raise InputError(path, exc.what, exc.expected, hint) from exc
    return assignment


def artifact_bytes(checkpoint: Checkpoint, spec: ModelSpec, assignment: Mapping[str, LinearScheme]) -> tuple[int, int]:
    """Tensor bytes of the source as floats, and of the artifact: (before, after)."""
    before = after = 0
    for name, ref in checkpoint.tensors.items():
        dtype = GGUF_FLOAT_DTYPE if checkpoint.kind == "gguf" else ref.dtype
        count = DTYPE_BYTES[dtype]
        for size in ref.shape:
            count *= size
        before += count
        module, _, suffix = name.rpartition(".")
        scheme = assignment.get(module, KEEP)
        if scheme.layout == "plain" or suffix != "weight":
            after += count
        else:
            n, k = ref.shape
            after += LAYOUTS[scheme.layout](n, k, dtype=dtype, group_size=scheme.group_size).total_bytes
    return before, after


def _check_source(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raise InputError unless ``checkpoint`` is a whole float model: a method would spend hours before it met the gap."""
    if checkpoint.config.get("quantization_config"):
        raise InputError(checkpoint.root.name, "is already quantized (config.json has a quantization_config)", "an unquantized checkpoint")
    expected = expected_tensors(spec, dict.fromkeys(spec.all_linears(), KEEP))
    for defect in tensor_defects(checkpoint.tensors, expected, checkpoint.dtype):
        raise InputError(defect.where, defect.what, defect.expected)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", "cuda was asked for, and torch sees no GPU", "--device cpu, or a machine with a GPU")
    if name not in ("cpu", "cuda"):
        raise InputError("--device", f"{name!r} is unknown", "auto, cpu or cuda")
    return name


@dataclass(frozen=True, slots=True)
class _Job:
    """One quantization, decided: what is read, what becomes of each linear, and the tensor bytes before and after."""

    options: QuantizeOptions
    recipe: Recipe
    checkpoint: Checkpoint
    spec: ModelSpec
    assignment: Mapping[str, LinearScheme]
    bytes_before: int
    bytes_after: int


def run(options: QuantizeOptions, progress: Progress = silent) -> Report:
    """Quantize ``options.path`` into ``options.out``. With ``dry_run`` report the plan and write nothing."""
    from quantkit.quantizers.base import method

    recipe = effective_recipe(options)
    chosen = method(recipe.method)
    quantizer = chosen.factory(recipe.options)
    if not quantizer.needs:
        _refuse_calibration(options, recipe.method)
    check_recipe(recipe, chosen.layouts)
    checkpoint = open_checkpoint(options.path)
    spec = spec_for(checkpoint.config)
    recipe = effective_recipe(options, spec.max_positions)
    _check_source(checkpoint, spec)
    assignment = assign(spec, recipe, chosen.layouts)
    quantization_config = awq_config(assignment)
    job = _Job(options, recipe, checkpoint, spec, assignment, *artifact_bytes(checkpoint, spec, assignment))
    if options.dry_run:
        return _dry_run(job)
    # The writer asks the same; asked here, it is answered before the calibration is made.
    fs.refuse_source(options.out, checkpoint.root)
    if not options.resume:
        fs.refuse_existing(options.out, options.overwrite)
    started = time.monotonic()
    device = _device(options.device)
    calibration = _calibration(recipe, checkpoint, device, progress) if quantizer.needs else None
    model, files = _write(job, quantizer, quantization_config, calibration, device, progress)
    return _report(job, model, files, calibration, time.monotonic() - started)


def _refuse_calibration(options: QuantizeOptions, name: str) -> None:
    """Raise InputError when calibration was asked for and would be ignored. A recipe's own section may serve other methods."""
    given = {"--calib": options.calib, "--samples": options.samples, "--seq-len": options.seq_len}
    for option, value in given.items():
        if value is not None:
            raise InputError(option, f"was given, and method {name} uses no calibration", f"no {option}, or a method such as awq")


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


def _calibration_facts(calibration: CalibrationTokens | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    return {"source": calibration.source, "tokens_sha256": calibration.digest, "shape": list(calibration.tokens.shape)}


def _environment(device: str) -> dict[str, Any]:
    """What besides the inputs decides the bytes of the result."""
    import torch

    return {
        "quantkit": __version__,
        "torch": torch.__version__,
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _write(
    job: _Job,
    quantizer: Quantizer,
    quantization_config: Mapping[str, Any],
    calibration: CalibrationTokens | None,
    device: str,
    progress: Progress,
) -> tuple[QuantizedModel, list[str]]:
    """Quantize every block into the artifact and publish it; the names of its files."""
    import torch

    from quantkit.checkpoint.artifact import ArtifactWriter
    from quantkit.quantizers.pipeline import quantize_model

    options, checkpoint, environment = job.options, job.checkpoint, _environment(device)
    facts = {
        "source": {"fingerprint": checkpoint.fingerprint()},
        # Where the text lies is no part of the result; what it says is, and its digest stands beside it.
        "recipe": job.recipe.model_dump(mode="json", exclude={"calibration"}),
        "calibration": _calibration_facts(calibration),
    }
    states = 0 if calibration is None else calibration.tokens.numel() * job.spec.dims["hidden"].elements * COMPUTE_BYTES
    with (
        ArtifactWriter(
            options.out,
            identity={**facts, **environment},
            overwrite=options.overwrite,
            resume=options.resume,
            need_bytes=job.bytes_after + states,  # the resume point lies on the disk too
            source=checkpoint.root,
        ) as writer,
        torch.inference_mode(),
    ):
        model = quantize_model(
            checkpoint,
            job.spec,
            job.assignment,
            quantizer,
            calibration,
            writer,
            float_dtype=GGUF_FLOAT_DTYPE,
            compute_dtype=torch.float32,
            device=device,
            progress=progress,
        )
        totals = {
            "bytes_before": job.bytes_before,
            "bytes_after": job.bytes_after,
            "quantized_weights": model.quantized_weights,
            "quantized_bytes": model.quantized_bytes,
        }
        manifest = {
            "kind": "artifact",
            "method": job.recipe.method,
            **facts,
            "assignment": assignment_to_json(job.assignment),
            "environment": environment,
            "totals": totals,
            "blocks": model.facts,
        }
        config = {**checkpoint.config, "quantization_config": dict(quantization_config)}
        published = writer.publish(config=config, files=checkpoint.extra_files(), manifest=manifest, max_shard_size=options.max_shard_size)
    return model, [name for name, _ in published.files]


def _warnings(job: _Job, model: QuantizedModel, calibration: CalibrationTokens | None) -> tuple[str, ...]:
    from quantkit.quantizers.pipeline import FLOAT16_ALARM

    warnings = mixed_siblings(job.spec, job.assignment)
    others = sorted({s.group_size for s in job.assignment.values() if s.layout == "awq"} - PORTABLE_GROUPS)
    if others:
        portable = ", ".join(map(str, sorted(PORTABLE_GROUPS)))
        warnings.append(f"group size {others[0]} runs here; other runtimes load AWQ only with groups of {portable}")
    if calibration is not None and calibration.source == "builtin":
        warnings.append("calibrated on the built-in English text; text of your own domain is better (--calib FILE)")
    if model.peak_activation is not None and model.peak_activation > FLOAT16_ALARM:
        warnings.append(f"activations reach {model.peak_activation:.0f}; float16 kernels (limit 65504) may overflow: serve it in bfloat16")
    return tuple(warnings)


def _report(job: _Job, model: QuantizedModel, files: list[str], calibration: CalibrationTokens | None, seconds: float) -> Report:
    options, recipe, before, after = job.options, job.recipe, job.bytes_before, job.bytes_after
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    warnings = _warnings(job, model, calibration)
    bits = 8 * model.quantized_bytes / model.quantized_weights
    data = {
        "out": str(options.out),
        "method": recipe.method,
        "tensors": model.tensors,
        "bits_per_weight": bits,
        "bytes_before": before,
        "bytes_after": after,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory,
        "peak_activation": model.peak_activation,
        "calibration": _calibration_facts(calibration),
        "files": files,
        "warnings": list(warnings),
    }
    rows = (
        ("linears quantized", f"{model.tensors} of {len(job.assignment)}"),
        ("bits per quantized weight", f"{bits:.3f}"),
        ("size before", f"{before / 1e6:.1f} MB"),
        ("size after", f"{after / 1e6:.1f} MB ({after / before:.1%})"),
        ("time", f"{seconds:.1f} s"),
        ("peak memory", f"{peak_memory / 2**20:.0f} MiB"),
    )
    return Report(
        command="quantize",
        data=data,
        facts=(
            ("method", f"{recipe.method}, {recipe.bits} bits, group {recipe.group_size}, {'symmetric' if recipe.sym else 'asymmetric'}"),
            ("written", str(options.out)),
        ),
        tables=(Table("Summary", ("", ""), rows),),
        warnings=warnings,
        next_steps=(
            next_step("verify", options.out, "--deep"),
            next_step("report", options.path, options.out),
            next_step("serve", options.out),
        ),
    )


def _dry_run(job: _Job) -> Report:
    recipe, before, after = job.recipe, job.bytes_before, job.bytes_after
    rows = tuple((name, s.method, s.layout, s.bits, s.group_size) for name, s in job.assignment.items())
    data = {
        "dry_run": True,
        "recipe": recipe.model_dump(mode="json"),
        "assignment": assignment_to_json(job.assignment),
        "bytes_before": before,
        "bytes_after": after,
    }
    return Report(
        command="quantize",
        data=data,
        facts=(("size before", f"{before / 1e6:.1f} MB"), ("size after", f"{after / 1e6:.1f} MB, exact"), ("written", "nothing (dry run)")),
        tables=(Table("Assignment", ("linear", "method", "layout", "bits", "group"), rows),),
        warnings=tuple(mixed_siblings(job.spec, job.assignment)),
    )
