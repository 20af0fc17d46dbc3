"""The work of ``quantkit quantize``: calibrate, quantize block by block, publish; options and plans are made before."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__, fs
from quantkit.arch.spec import ModelSpec
from quantkit.checkpoint.artifact import DEFAULT_SHARD_BYTES
from quantkit.checkpoint.padding import PaddedCheckpoint
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.assign import float_dtype
from quantkit.commands.quantize_report import ArtifactPlan, Run, calibration_facts, done_report
from quantkit.convert import GGUF_DTYPE
from quantkit.errors import InputError, MachineError
from quantkit.progress import Progress
from quantkit.recipe import Recipe
from quantkit.report import Report
from quantkit.scheme import KEEP, assignment_to_json
from quantkit.verify import expected_tensors, tensor_defects

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.checkpoint.artifact import ArtifactWriter
    from quantkit.quantizers.calibration import CalibrationTokens
    from quantkit.quantizers.pipeline import Job, QuantizedModel


def check_source(checkpoint: Checkpoint, spec: ModelSpec) -> None:
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


def devices_of(name: str, count: int) -> tuple[str, ...]:
    """The torch devices that ``--device`` and ``--devices`` name. Raises InputError for several CPUs, MachineError for too few GPUs."""
    import torch

    from quantkit.runtime.devices import place_for

    device = place_for(name)
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


def calibration_of(recipe: Recipe, checkpoint: Checkpoint, device: str, progress: Progress) -> CalibrationTokens:
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


def quantize_plans(work: Run, progress: Progress) -> Report:
    """Check the outputs, gather the calibration, quantize, publish."""
    import torch

    options, checkpoint = work.options, work.checkpoint
    many = len(work.plans) > 1
    finished = {name for name, p in work.plans.items() if many and options.resume and is_finished(p.out)}
    plans = {name: plan for name, plan in work.plans.items() if name not in finished}
    if not plans:
        raise InputError(str(options.out), "holds every artifact already", "one that is missing")
    for plan in plans.values():
        # The writer asks the same; asked here, it is answered before the calibration is made.
        fs.refuse_source(plan.out, checkpoint.root)
        if not options.resume:
            fs.refuse_existing(plan.out, options.overwrite)
    started = time.monotonic()
    devices = devices_of(options.device, options.devices)
    dtype = _compute_dtype(options.compute_dtype, devices[0], float_dtype(checkpoint, work.spec))
    wanting = [plan for plan in plans.values() if plan.calibrated]
    calibration = calibration_of(wanting[0].recipe, checkpoint, devices[0], progress) if wanting else None
    if devices[0] != "cpu":
        torch.cuda.synchronize()  # before its first use there is nothing to reset on the other devices
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
    work = replace(work, plans=plans, calibration=calibration, devices=devices)
    models, files = _write(work, dtype, progress)
    return done_report(work, models, files, time.monotonic() - started)


def is_finished(out: Path) -> bool:
    return out.is_dir() and not out.with_name(f"{out.name}.partial").exists()


def identity_of(work: Run, plan: ArtifactPlan, fingerprint: str) -> dict[str, Any]:
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
    identities = {name: identity_of(work, plan, fingerprint) for name, plan in work.plans.items()}
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
        **({"padding": checkpoint.padding.to_json()} if isinstance(checkpoint, PaddedCheckpoint) else {}),
    }
    config = {**checkpoint.config, "quantization_config": dict(plan.config)}
    if work.spec.tied and head in plan.assignment:
        config["tie_word_embeddings"] = False
    size = DEFAULT_SHARD_BYTES if work.options.max_shard_size is None else work.options.max_shard_size
    published = writer.publish(config=config, files=checkpoint.extra_files(), manifest=manifest, max_shard_size=size)
    return [name for name, _ in published.files]
