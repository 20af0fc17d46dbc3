"""From a recipe and a model to an assignment: which linear is stored how, and how large that is. Torch-free, nothing is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from quantkit.arch.spec import ModelSpec
from quantkit.checkpoint.reader import Checkpoint
from quantkit.convert import GGUF_DTYPE
from quantkit.errors import InputError
from quantkit.geometry import DTYPE_BYTES, geometry_of
from quantkit.method_facts import MethodFacts, fitting_formats, make_scheme
from quantkit.plan import stored_geometry
from quantkit.quant_config import is_kept
from quantkit.recipe import Override, Recipe
from quantkit.scheme import KEEP, LinearScheme, Rule, resolve


def float_dtype(checkpoint: Checkpoint, spec: ModelSpec) -> str:
    """The safetensors dtype of a model's floats, by its embedding."""
    name = f"{spec.architecture.embedding}.weight"
    return GGUF_DTYPE if checkpoint.kind == "gguf" or name not in checkpoint.tensors else checkpoint.dtype(name)


def _scheme(recipe: Recipe, facts: Mapping[str, MethodFacts], dtype: str, override: Override | None = None) -> LinearScheme:
    """The scheme of the recipe, or of one override. Raises InputError naming where a setting that cannot be came from."""
    if override is not None and override.keep:
        return KEEP
    method = recipe.method if override is None or override.method is None else override.method
    if method not in facts:
        source = f"override {override.pattern!r}" if override else "--method"
        raise InputError(source, f"method {method!r} is unknown", f"one of {', '.join(facts)}")
    same = method == recipe.method
    names = ("bits", "group_size", "sym")
    values = {name: getattr(override, name) if override is not None else None for name in names}
    where = dict.fromkeys((*names, "format"), f"override {override.pattern!r}") if override is not None else {}
    for name in (*names, "format"):
        flag = f"--{name.replace('_', '-')}" if name != "sym" else "--sym/--asym"
        if name in names and values[name] is None and same:
            values[name] = getattr(recipe, name)
            where[name] = flag
        where.setdefault(name, flag)
    return make_scheme(
        method,
        facts[method],
        fmt=recipe.format or fitting_formats(facts[recipe.method], recipe.bits)[0],
        bits=values["bits"],
        group_size=values["group_size"],
        sym=values["sym"],
        options=recipe.options if same else {},
        dtype=dtype,
        where=where,
    )


def check_recipe(recipe: Recipe, facts: Mapping[str, MethodFacts]) -> LinearScheme:
    """The scheme of ``recipe`` for a 16-bit model. Raises InputError when no model could be quantized by it."""
    schemes = [_scheme(recipe, facts, "F16", override) for override in (None, *recipe.overrides)]
    return schemes[0]


def assign(spec: ModelSpec, recipe: Recipe, facts: Mapping[str, MethodFacts], dtype: str) -> dict[str, LinearScheme]:
    """Which linear is stored how: overrides, then every other linear of the blocks by the recipe; routers and gates are kept.

    The head is quantized, rounded to nearest, by an override that means it alone; a tied one is untied. Raises InputError naming
    the linear, the numbers and the remedy when a layout cannot hold its shape.
    """
    head = spec.architecture.head
    names = list(dict.fromkeys([*spec.all_linears(), head]))
    main = _scheme(recipe, facts, dtype)
    rules = [Rule(o.pattern, _scheme(recipe, facts, dtype, o)) for o in recipe.overrides]
    assignment = resolve([*rules, Rule("", main)], names)
    by_itself = [rule for rule in rules if [name for name in names if re.search(rule.pattern, name)] == [head]]
    chosen = by_itself[0].scheme if by_itself else KEEP
    assignment[head] = chosen if is_kept(chosen) else replace(chosen, method="rtn")
    if is_kept(chosen) and spec.tied:
        del assignment[head]
    for layer in range(spec.layers):
        for path, roles in spec.block_modules(layer).items():
            if not spec.linears[roles[0]].quantize:
                assignment[path] = KEEP
    if all(is_kept(scheme) for scheme in assignment.values()):
        raise InputError("--override", "leaves every linear unquantized", "at least one to quantize")
    folding = {s.method for s in assignment.values() if s.method in ("awq", "w8a8")}
    if folding and (clash := {s.method for s in assignment.values()} & {"awq", "w8a8", "gptq"} - {min(folding)}):
        what = f"{clash.pop()} in a model quantized by {min(folding)}, which changes what its linears see"
        raise InputError("--override", what, "methods without calibration beside it")
    for layer in range(spec.layers):
        for path, roles in spec.block_modules(layer).items():
            stored_geometry(spec, roles[0], path, assignment[path], dtype="F16")
    if not is_kept(assignment.get(head, KEEP)):
        try:
            geometry_of(assignment[head], spec.dims["vocab"].elements, spec.dims["hidden"].elements, dtype="F16")
        except InputError as exc:
            raise InputError(head, exc.what, exc.expected) from exc
    return assignment


def artifact_bytes(checkpoint: Checkpoint, spec: ModelSpec, assignment: Mapping[str, LinearScheme]) -> tuple[int, int]:
    """Tensor bytes of the source as floats, and of the artifact: (before, after). A quant state of bitsandbytes is estimated."""
    before = after = 0
    roles = {path: names[0] for layer in range(spec.layers) for path, names in spec.block_modules(layer).items()}
    for name, ref in checkpoint.tensors.items():
        dtype = GGUF_DTYPE if checkpoint.kind == "gguf" else ref.dtype
        count = DTYPE_BYTES[dtype] * math.prod(ref.shape)
        before += count
        module, _, suffix = name.rpartition(".")
        scheme = assignment.get(module, KEEP)
        if is_kept(scheme) or suffix != "weight":
            after += count
        else:
            n, k = spec.stored_shape(roles[module]) if module in roles else ref.shape
            after += geometry_of(scheme, n, k, dtype=dtype).total_bytes
    head = spec.architecture.head
    if spec.tied and head in assignment:  # untied: the embedding stays beside it
        after += geometry_of(assignment[head], spec.dims["vocab"].elements, spec.dims["hidden"].elements, dtype="F16").total_bytes
    return before, after
