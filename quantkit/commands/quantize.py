"""``quantkit quantize``: a checkpoint into one or several quantized artifacts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.arch.spec import FFN_DIMS, ModelSpec
from quantkit.arch.table import spec_for
from quantkit.checkpoint.padding import padded, padding_for
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.commands import quantize_gguf
from quantkit.commands.assign import artifact_bytes, assign, check_recipe, float_dtype
from quantkit.commands.pad import check_tp, refuse_obstacles
from quantkit.commands.quantize_blocks import quantize_blocks
from quantkit.commands.quantize_gguf import DEFAULT_TYPE, GgufChoices, GgufOptions
from quantkit.commands.quantize_options import GGUF, QuantizeOptions, effective_recipe, flag, method_names
from quantkit.commands.quantize_report import ArtifactPlan, Run, dry_run_report
from quantkit.commands.quantize_run import check_source, quantize_plans
from quantkit.errors import InputError
from quantkit.method_facts import MethodFacts
from quantkit.mixtures import FILE_TYPES
from quantkit.plan import WIDE, ffn_granules, widened
from quantkit.progress import Progress, silent
from quantkit.quant_config import is_kept, quantization_config
from quantkit.recipe import Recipe
from quantkit.report import Report

if TYPE_CHECKING:
    from quantkit.quantizers.base import Method, Quantizer


NOT_GGUF = (
    *("bits", "group_size", "sym", "format", "recipe", "override", "option", "inputs", "calib", "samples", "seq_len"),
    *("devices", "compute_dtype", "offload", "for_tp"),
)
"""Options that say nothing of a GGUF file whose types its mixture decides."""


def _gguf_options(options: QuantizeOptions) -> GgufOptions:
    """What method gguf is asked to do. Raises InputError for options that it has no use for."""
    plain = QuantizeOptions(options.path, options.out)
    for name in NOT_GGUF:
        if getattr(options, name) != getattr(plain, name):
            expected = "--type, and --tensor-type PATTERN=TYPE for some tensors"
            raise InputError(flag(name), "was given, and method gguf has no such setting", expected)
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
            raise InputError(flag(name), f"was given with method {options.method}", "method gguf")


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


def _padded(
    checkpoint: Checkpoint, spec: ModelSpec, recipes: Mapping[str, Recipe], facts: Mapping[str, MethodFacts], tp: int
) -> Checkpoint:
    """``checkpoint`` with MLPs that ``tp`` ranks can cut evenly in every artifact; itself where they can. Raises as ``pad``."""
    check_tp(tp)
    dtype = float_dtype(checkpoint, spec)
    sizes = {dim: WIDE for dim in FFN_DIMS if dim in spec.dims}  # any group divides it: what a method stores does not depend on the width
    assignments = [assign(widened(spec, sizes), recipe, facts, dtype) for recipe in recipes.values()]
    found = [ffn_granules(spec, assignment, dtype=dtype) for assignment in assignments]
    padding = padding_for(spec, tp, {dim: math.lcm(*(each[dim] for each in found)) for dim in sizes}, mixed=True)
    result = padded(checkpoint, padding) if padding.sizes else checkpoint
    for assignment in assignments:
        refuse_obstacles(spec_for(result.config), assignment, tp)
    return result


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
        return quantize_blocks(options, names, known, progress)
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
    check_source(checkpoint, spec)
    if options.for_tp is not None:
        checkpoint = _padded(checkpoint, spec, recipes, facts, options.for_tp)
        spec = spec_for(checkpoint.config)
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
    return quantize_plans(work, progress)
