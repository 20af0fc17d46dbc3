"""``quantkit quantize --method awq|gptq --format q4_k_m``: a method's own weights as the blocks of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from quantkit import fs
from quantkit.arch.table import spec_for
from quantkit.checkpoint.journal import changed_field
from quantkit.checkpoint.reader import open_checkpoint, read_manifest
from quantkit.commands import quantize_gguf
from quantkit.commands.assign import artifact_bytes
from quantkit.commands.quantize_gguf import GgufOptions
from quantkit.commands.quantize_options import QuantizeOptions, effective_recipe, flag
from quantkit.commands.quantize_report import ArtifactPlan, Run
from quantkit.commands.quantize_run import calibration_of, check_source, identity_of, is_finished, quantize_plans
from quantkit.errors import InputError
from quantkit.geometry import GGML_BLOCKS
from quantkit.mixtures import FILE_TYPES
from quantkit.progress import Progress
from quantkit.quant_config import quantization_config
from quantkit.report import Report
from quantkit.scheme import assignment_to_json

if TYPE_CHECKING:
    from quantkit.quantizers.base import Method


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
            raise InputError(flag(name), what, f"no {flag(name)}")
    if options.for_tp is not None:
        raise InputError("--for-tp", f"was given with --format {form}", "a model that quantkit pad --multiple 256 widened")
    plain = replace(options, format=None)
    recipe = effective_recipe(plain, method)
    for option in ("bits", "group_size", "sym", "format", "override"):
        name = "overrides" if option == "override" else option
        if getattr(recipe, name) not in (None, []):
            where = f"--recipe {options.recipe}: {name}" if getattr(plain, option) in (None, ()) else flag(option)
            raise InputError(where, f"was given with --format {form}", "--tensor-type PATTERN=TYPE for some tensors")
    return method


def quantize_blocks(options: QuantizeOptions, names: tuple[str, ...], known: Mapping[str, Method], progress: Progress) -> Report:
    """``--method awq --format q4_k_m``: the linears of the blocks by the method, in the types of the mixture; the rest as method gguf does.

    The artifact in between lies beside OUT until the file is there, and is what ``--resume`` goes on from.
    """
    method, form = _block_method(options, names), str(options.format).lower()
    checkpoint = open_checkpoint(options.path)
    if checkpoint.kind != "hf":
        hint = f"quantkit convert {options.path} FLOATS makes one"
        raise InputError(options.path, "is a GGUF file", f"a directory, for --format {form} with method {method}", hint)
    spec = spec_for(checkpoint.config)
    check_source(checkpoint, spec)
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
    finished = options.resume and is_finished(between)
    if finished:
        _refuse_other_work(work, plan, progress)
    made = None if finished else quantize_plans(work, progress)
    report = quantize_gguf.run(replace(target, path=str(between), origin=options.path), progress)
    fs.remove_tree(between)
    return _by_method(report, method, made)


def _refuse_other_work(work: Run, plan: ArtifactPlan, progress: Progress) -> None:
    """Raise InputError, naming the field, when the artifact that is there was made from other inputs than those of ``work``."""
    from quantkit.runtime.devices import place_for

    calibration = calibration_of(plan.recipe, work.checkpoint, place_for(work.options.device), progress) if plan.calibrated else None
    facts = identity_of(replace(work, calibration=calibration), plan, work.checkpoint.fingerprint())
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
