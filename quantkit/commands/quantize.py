"""``quantkit quantize``: a checkpoint into one or several quantized artifacts."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__, fs
from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.commands.assign import GGUF_FLOAT_DTYPE, artifact_bytes, assign, check_recipe, float_dtype
from quantkit.errors import InputError
from quantkit.progress import Progress, silent
from quantkit.quant_config import is_kept, quantization_config
from quantkit.recipe import Calibration, Recipe, checked_recipe, load_recipe, parse_override
from quantkit.report import Report, Table, next_step
from quantkit.scheme import KEEP, LinearScheme, assignment_to_json
from quantkit.verify import expected_tensors, mixed_siblings, tensor_defects

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.checkpoint.artifact import ArtifactWriter
    from quantkit.quantizers.base import Method, Quantizer
    from quantkit.quantizers.calibration import CalibrationTokens
    from quantkit.quantizers.pipeline import Job, QuantizedModel

DEFAULT_SAMPLES, BUILTIN_SEQ_LEN, TEXT_SEQ_LEN = 128, 512, 2048
PORTABLE_GROUPS = frozenset({32, 64, 128})
"""Group sizes that transformers, vLLM and SGLang all run (``formats.md`` 13); whole rows (-1) only where the format is not AWQ."""


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
    compute_dtype: str = "auto"
    offload: bool = False
    max_shard_size: int = 5_000_000_000
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False


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


def _compute_dtype(name: str, device: str, stored: str) -> torch.dtype:
    """The dtype of calibration's forward passes: float32 on a CPU, on a GPU that in which a 16-bit model is stored."""
    from quantkit.ops.dtypes import TORCH_DTYPES
    from quantkit.ops.dtypes import float_dtype as named

    if name != "auto":
        return named(name, "--compute-dtype")
    return TORCH_DTYPES[stored if device != "cpu" and stored in ("BF16", "F16") else "F32"]


@dataclass(frozen=True, slots=True)
class _Plan:
    """One artifact, decided: its recipe, what becomes of each linear, its methods, and the tensor bytes before and after."""

    recipe: Recipe
    out: Path
    assignment: Mapping[str, LinearScheme]
    quantizers: Mapping[str, Quantizer]
    config: Mapping[str, Any]
    bytes_before: int
    bytes_after: int

    @property
    def calibrated(self) -> bool:
        return any(q.needs for q in self.quantizers.values())


@dataclass(frozen=True, slots=True)
class _Run:
    """What all artifacts of a run share."""

    options: QuantizeOptions
    checkpoint: Checkpoint
    spec: ModelSpec
    plans: Mapping[str, _Plan]
    calibration: CalibrationTokens | None = None
    device: str = "cpu"
    compute_dtype: str = "float32"
    facts: Mapping[str, Any] = field(default_factory=dict)


def run(options: QuantizeOptions, progress: Progress = silent) -> Report:
    """Quantize ``options.path`` into ``options.out``. With ``dry_run`` report the plan and write nothing."""
    from quantkit.quantizers.base import methods

    known = methods()
    names = method_names(options)
    for name in names:
        if name not in known:
            raise InputError("--method", f"{name!r} is unknown", f"one of {', '.join(known)}")
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
        plans[name] = _Plan(
            recipe,
            options.out if len(names) == 1 else options.out / name,
            assignment,
            {method: q for method, q in quantizers[name].items() if method in used},
            quantization_config(assignment, spec.architecture.head),
            *artifact_bytes(checkpoint, spec, assignment),
        )
    work = _Run(options, checkpoint, spec, plans)
    if options.dry_run:
        return _dry_run(work)
    return _quantize(work, progress)


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


def _calibration_facts(calibration: CalibrationTokens | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    return {"source": calibration.source, "tokens_sha256": calibration.digest, "shape": list(calibration.tokens.shape)}


def _environment(device: str, compute_dtype: torch.dtype) -> dict[str, Any]:
    """What besides the inputs decides the bytes of the result."""
    import torch

    return {
        "quantkit": __version__,
        "torch": torch.__version__,
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _quantize(work: _Run, progress: Progress) -> Report:
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
    device = _device(options.device)
    dtype = _compute_dtype(options.compute_dtype, device, float_dtype(checkpoint, work.spec))
    wanting = [plan for plan in plans.values() if plan.calibrated]
    calibration = _calibration(wanting[0].recipe, checkpoint, device, progress) if wanting else None
    environment = _environment(device, dtype)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    work = _Run(options, checkpoint, work.spec, plans, calibration, device, str(dtype).removeprefix("torch."), environment)
    models, files = _write(work, dtype, progress)
    return _report(work, models, files, time.monotonic() - started)


def _is_finished(out: Path) -> bool:
    return out.is_dir() and not out.with_name(f"{out.name}.partial").exists()


def _identity(work: _Run, plan: _Plan) -> dict[str, Any]:
    return {
        "source": {"fingerprint": work.facts["fingerprint"]},
        # Where the text lies is no part of the result; what it says is, and its digest stands beside it.
        "recipe": plan.recipe.model_dump(mode="json", exclude={"calibration"}),
        "calibration": _calibration_facts(work.calibration) if plan.calibrated else None,
    }


def _write(work: _Run, dtype: torch.dtype, progress: Progress) -> tuple[dict[str, QuantizedModel], dict[str, list[str]]]:
    """Quantize every block into the artifacts and publish them; what was done, and the names of the files."""
    import torch

    from quantkit.checkpoint.artifact import ArtifactWriter
    from quantkit.quantizers.pipeline import Job, Source, quantize_models

    options, checkpoint, spec = work.options, work.checkpoint, work.spec
    environment = dict(work.facts)
    shared = {"fingerprint": checkpoint.fingerprint()}
    width = spec.dims["hidden"].elements * dtype.itemsize
    states = 0 if work.calibration is None else work.calibration.tokens.numel() * width
    if len(work.plans) > 1:
        fs.make_dir(options.out)
    work = _Run(options, checkpoint, spec, work.plans, work.calibration, work.device, work.compute_dtype, shared)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        jobs: dict[str, Job] = {}
        for name, plan in work.plans.items():
            writer = ArtifactWriter(
                plan.out,
                identity={**_identity(work, plan), **environment},
                overwrite=options.overwrite,
                resume=options.resume,
                need_bytes=plan.bytes_after + (states if plan.calibrated else 0),  # the resume point lies on the disk too
                source=checkpoint.root,
            )
            jobs[name] = Job(plan.assignment, plan.quantizers, stack.enter_context(writer))
        source = Source(checkpoint, spec, GGUF_FLOAT_DTYPE, dtype, work.device)
        offload = _offload(jobs) if options.offload else _in_memory(work.device)
        models = quantize_models(source, jobs, work.calibration, offload=offload, progress=progress)
        files = {name: _publish(work, plan, jobs[name].writer, models[name], environment) for name, plan in work.plans.items()}
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


def _publish(work: _Run, plan: _Plan, writer: ArtifactWriter, model: QuantizedModel, environment: Mapping[str, Any]) -> list[str]:
    """Assemble one artifact and put it in its place; the names of its files."""
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
        **_identity(work, plan),
        "assignment": assignment_to_json(plan.assignment),
        "environment": environment,
        "totals": totals,
        "blocks": model.facts,
        **({"expert_tokens": model.coverage} if model.coverage else {}),
    }
    config = {**checkpoint.config, "quantization_config": dict(plan.config)}
    if work.spec.tied and head in plan.assignment:
        config["tie_word_embeddings"] = False
    published = writer.publish(config=config, files=checkpoint.extra_files(), manifest=manifest, max_shard_size=work.options.max_shard_size)
    return [name for name, _ in published.files]


def _warnings(work: _Run, plan: _Plan, model: QuantizedModel) -> tuple[str, ...]:
    from quantkit.quantizers.pipeline import FLOAT16_ALARM

    warnings = mixed_siblings(work.spec, plan.assignment)
    ints = [s for s in plan.assignment.values() if s.layout in ("awq", "gptq", "gptq_v2", "packed")]
    groups = {s.group_size for s in ints if s.group_size != -1 or s.layout == "awq"}
    if others := sorted(groups - PORTABLE_GROUPS):
        warnings.append(
            f"group size {others[0]} runs here; other runtimes load these formats only with groups of 32, 64, 128 or whole rows"
        )
    if any(s.layout in ("gptq", "gptq_v2") and not s.sym for s in plan.assignment.values()):
        warnings.append("asymmetric GPTQ runs here and in transformers; vLLM and SGLang load symmetric GPTQ only (--sym)")
    if any(s.act_order for s in plan.assignment.values()):
        warnings.append("act-order scatters the groups: vLLM refuses it, and row-parallel ranks keep all scales; order=static does neither")
    if plan.calibrated and work.calibration is not None and work.calibration.source == "builtin":
        warnings.append("calibrated on the built-in English text; text of your own domain is better (--calib FILE)")
    if model.peak_activation is not None and model.peak_activation > FLOAT16_ALARM:
        warnings.append(f"activations reach {model.peak_activation:.0f}; float16 kernels (limit 65504) may overflow: serve it in bfloat16")
    borrowed = sum(bool(facts.get("borrowed_statistics")) for block in model.facts.values() for facts in block.values())
    if borrowed:
        warnings.append(f"{borrowed} expert linears saw too few tokens and used the statistics of their whole layer; more --samples helps")
    return tuple(warnings)


def _setting(recipe: Recipe, assignment: Mapping[str, LinearScheme]) -> str:
    """The scheme of most linears, in words."""
    schemes = [s for s in assignment.values() if not is_kept(s)]
    most = max(schemes, key=schemes.count)
    group = (
        "whole rows"
        if most.group_size == -1
        else f"blocks of {most.group_size}"
        if most.layout.startswith(("bnb", "fp8"))
        else f"group {most.group_size}"
    )
    return f"{recipe.method}, {most.bits} bits, {group}, {'symmetric' if most.sym else 'asymmetric'}"


def _inputs(plan: _Plan) -> str | None:
    """Whose activations the methods saw."""
    found = sorted({q.inputs for q in plan.quantizers.values() if q.needs})
    words = {"float": "the float model's activations", "quantized": "activations of the model as quantized so far"}
    return ", ".join(words[name] for name in found) or None


def _report(work: _Run, models: Mapping[str, QuantizedModel], files: Mapping[str, list[str]], seconds: float) -> Report:
    options = work.options
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    machine: dict[str, Any] = {"seconds": seconds, "peak_memory_bytes": peak_memory}
    if work.device != "cpu":
        import torch

        machine["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    tables, facts, warnings, data = [], [], list[str](), dict[str, Any]()
    for name, plan in work.plans.items():
        model, before, after = models[name], plan.bytes_before, plan.bytes_after
        bits = 8 * model.quantized_bytes / model.quantized_weights
        seen = _inputs(plan)
        data[name] = {
            "out": str(plan.out),
            "method": name,
            "tensors": model.tensors,
            "bits_per_weight": bits,
            "bytes_before": before,
            "bytes_after": after,
            "peak_activation": model.peak_activation,
            "calibration": _calibration_facts(work.calibration) if plan.calibrated else None,
            "inputs": seen,
            "expert_tokens": model.coverage or None,
            "files": files[name],
            "warnings": list(_warnings(work, plan, model)),
        }
        warnings += [w for w in _warnings(work, plan, model) if w not in warnings]
        facts += [("method", _setting(plan.recipe, plan.assignment)), ("written", str(plan.out))]
        if seen is not None:
            facts.append(("calibrated on", seen))
        rows = [
            ("linears quantized", f"{model.tensors} of {len(plan.assignment)}"),
            ("bits per quantized weight", f"{bits:.3f}"),
            ("size before", f"{before / 1e6:.1f} MB"),
            ("size after", f"{after / 1e6:.1f} MB ({after / before:.1%})"),
        ]
        if name == list(work.plans)[-1]:
            rows += [("time", f"{seconds:.1f} s"), ("peak memory", f"{peak_memory / 2**20:.0f} MiB")]
            if "peak_device_bytes" in machine:
                rows.append(("peak GPU memory", f"{machine['peak_device_bytes'] / 2**20:.0f} MiB"))
        tables.append(Table("Summary" if len(work.plans) == 1 else name, ("", ""), tuple(rows)))
        if model.coverage:
            tables.append(_coverage(model.coverage))
    first = next(iter(work.plans.values())).out
    outs = [plan.out for plan in work.plans.values()]
    return Report(
        command="quantize",
        data={**data[next(iter(data))], **machine} if len(data) == 1 else {"artifacts": data, **machine},
        facts=tuple(facts),
        tables=tuple(tables),
        warnings=tuple(warnings),
        next_steps=(next_step("verify", first, "--deep"), next_step("report", options.path, *outs), next_step("serve", first)),
    )


def _coverage(coverage: Mapping[str, Mapping[str, int]]) -> Table:
    """How many calibration tokens reached the experts of each layer."""
    rows = []
    for layer, experts in coverage.items():
        counts = sorted(experts.values())
        starved = [expert for expert, tokens in experts.items() if tokens == 0]
        rows.append((layer, counts[0], counts[len(counts) // 2], counts[-1], ", ".join(starved) or "none"))
    return Table("Tokens per expert", ("layer", "least", "median", "most", "experts on their layer's statistics"), tuple(rows))


def _dry_run(work: _Run) -> Report:
    data, facts, tables, warnings = dict[str, Any](), list[tuple[str, str]](), [], list[str]()
    for name, plan in work.plans.items():
        rows = tuple((path, s.method, s.layout, s.bits, s.group_size) for path, s in plan.assignment.items())
        data[name] = {
            "dry_run": True,
            "recipe": plan.recipe.model_dump(mode="json"),
            "assignment": assignment_to_json(plan.assignment),
            "bytes_before": plan.bytes_before,
            "bytes_after": plan.bytes_after,
        }
        facts += [
            ("size before", f"{plan.bytes_before / 1e6:.1f} MB"),
            (
                "size after",
                f"{plan.bytes_after / 1e6:.1f} MB, {'about' if 'bnb4' in {s.layout for s in plan.assignment.values()} else 'exact'}",
            ),
        ]
        title = "Assignment" if len(work.plans) == 1 else f"Assignment, {name}"
        tables.append(Table(title, ("linear", "method", "layout", "bits", "group"), rows))
        warnings += [w for w in mixed_siblings(work.spec, plan.assignment) if w not in warnings]
    return Report(
        command="quantize",
        data=data[next(iter(data))] if len(data) == 1 else {"dry_run": True, "artifacts": data},
        facts=(*facts, ("written", "nothing (dry run)")),
        tables=tuple(tables),
        warnings=tuple(warnings),
    )
