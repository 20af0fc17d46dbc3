"""What a quantization was asked to do, decided and did, and the Reports of it."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.arch.spec import ModelSpec
from quantkit.checkpoint.reader import Checkpoint
from quantkit.quant_config import is_kept
from quantkit.recipe import Recipe
from quantkit.report import Report, Table, next_step
from quantkit.scheme import LinearScheme, assignment_to_json
from quantkit.verify import mixed_siblings

if TYPE_CHECKING:
    from quantkit.commands.quantize_options import QuantizeOptions
    from quantkit.quantizers.base import Quantizer
    from quantkit.quantizers.calibration import CalibrationTokens
    from quantkit.quantizers.pipeline import QuantizedModel

PORTABLE_GROUPS = frozenset({32, 64, 128})
"""Group sizes that transformers, vLLM and SGLang all run (``formats.md`` 13); whole rows (-1) only where the format is not AWQ."""


@dataclass(frozen=True, slots=True)
class ArtifactPlan:
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
class Run:
    """One run of the command: what its artifacts share, and each of them by its method."""

    options: QuantizeOptions
    checkpoint: Checkpoint
    spec: ModelSpec
    plans: Mapping[str, ArtifactPlan]
    calibration: CalibrationTokens | None = None
    devices: tuple[str, ...] = ("cpu",)


def calibration_facts(calibration: CalibrationTokens | None) -> dict[str, Any] | None:
    """What the manifest and the report say of the calibration."""
    if calibration is None:
        return None
    return {"source": calibration.source, "tokens_sha256": calibration.digest, "shape": list(calibration.tokens.shape)}


def _warnings(work: Run, plan: ArtifactPlan, model: QuantizedModel) -> tuple[str, ...]:
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
    table = plan.assignment.get(work.spec.architecture.embedding)
    if table is not None and table.layout == "int8":
        warnings.append(
            "an embedding of whole rows runs here and in transformers; vLLM reads one in groups only (group_size=N in its override)"
        )
    elif table is not None:
        where = "here, and vLLM reads it" if table.sym else "here; vLLM reads symmetric ones"
        warnings.append(
            f"a packed embedding runs {where}; transformers loads 8-bit symmetric whole rows only (an override of bits=8 alone)"
        )
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
    kind = "blocks of" if most.layout in ("bnb4", "fp8_block") else "group"
    group = "whole rows" if most.group_size == -1 else f"{kind} {most.group_size}"
    return f"{recipe.method}, {most.bits} bits, {group}, {'symmetric' if most.sym else 'asymmetric'}"


def _inputs(plan: ArtifactPlan) -> str | None:
    """Whose activations the methods saw."""
    found = sorted({q.inputs for q in plan.quantizers.values() if q.needs})
    words = {"float": "the float model's activations", "quantized": "activations of the model as quantized so far"}
    return ", ".join(words[name] for name in found) or None


def done_report(work: Run, models: Mapping[str, QuantizedModel], files: Mapping[str, list[str]], seconds: float) -> Report:
    """What became of each artifact, its warnings, and what the run took."""
    options = work.options
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    machine: dict[str, Any] = {"seconds": seconds, "peak_memory_bytes": peak_memory}
    if work.devices[0] != "cpu":
        import torch

        machine["peak_device_bytes"] = max(torch.cuda.max_memory_allocated(device) for device in work.devices)
    tables, facts, warnings, data = [], [], list[str](), dict[str, Any]()
    for name, plan in work.plans.items():
        model, before, after = models[name], plan.bytes_before, plan.bytes_after
        bits = 8 * model.quantized_bytes / model.quantized_weights
        seen, own_warnings = _inputs(plan), _warnings(work, plan, model)
        data[name] = {
            "out": str(plan.out),
            "method": name,
            "tensors": model.tensors,
            "bits_per_weight": bits,
            "bytes_before": before,
            "bytes_after": after,
            "peak_activation": model.peak_activation,
            "calibration": calibration_facts(work.calibration) if plan.calibrated else None,
            "inputs": seen,
            "expert_tokens": model.coverage or None,
            "files": files[name],
            "warnings": list(own_warnings),
        }
        warnings += [w for w in own_warnings if w not in warnings]
        facts += [("method", _setting(plan.recipe, plan.assignment)), ("written", str(plan.out))]
        if seen is not None:
            facts.append(("calibrated on", seen))
        rows = [
            ("linears quantized", f"{model.tensors} of {sum(path != work.spec.architecture.embedding for path in plan.assignment)}"),
            *_embedding_row(work, plan),
            ("bits per quantized weight", f"{bits:.3f}"),
            ("size before", f"{before / 1e6:.1f} MB"),
            ("size after", f"{after / 1e6:.1f} MB ({after / before:.1%})"),
        ]
        if name == list(work.plans)[-1]:
            rows += [("time", f"{seconds:.1f} s"), ("peak memory", f"{peak_memory / 2**20:.0f} MiB")]
            if "peak_device_bytes" in machine:
                rows.append(
                    (
                        "peak GPU memory" if len(work.devices) == 1 else "peak memory of one GPU",
                        f"{machine['peak_device_bytes'] / 2**20:.0f} MiB",
                    )
                )
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


def _embedding_row(work: Run, plan: ArtifactPlan) -> list[tuple[str, str]]:
    scheme = plan.assignment.get(work.spec.architecture.embedding)
    if scheme is None:
        return []
    untied = ", and the head untied from it" if work.spec.tied else ""
    group = "whole rows" if scheme.group_size == -1 else f"group {scheme.group_size}"
    return [("embedding", f"{scheme.bits} bits, {group}, {'symmetric' if scheme.sym else 'asymmetric'}{untied}")]


def _coverage(coverage: Mapping[str, Mapping[str, int]]) -> Table:
    """How many calibration tokens reached the experts of each layer."""
    rows = []
    for layer, experts in coverage.items():
        counts = sorted(experts.values())
        starved = [expert for expert, tokens in experts.items() if tokens == 0]
        rows.append((layer, counts[0], counts[len(counts) // 2], counts[-1], ", ".join(starved) or "none"))
    return Table("Tokens per expert", ("layer", "least", "median", "most", "experts on their layer's statistics"), tuple(rows))


def dry_run_report(work: Run) -> Report:
    """What would become of each artifact."""
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
        certain = "about" if any(s.layout == "bnb4" for s in plan.assignment.values()) else "exact"
        facts += [
            ("size before", f"{plan.bytes_before / 1e6:.1f} MB"),
            ("size after", f"{plan.bytes_after / 1e6:.1f} MB, {certain}"),
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
