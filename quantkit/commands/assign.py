"""From a recipe and a model to an assignment: which linear is stored how, and how large that is. Torch-free, nothing is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import TABLE
from quantkit.checkpoint.reader import Checkpoint
from quantkit.convert import GGUF_DTYPE
from quantkit.errors import InputError
from quantkit.geometry import DTYPE_BYTES, geometry_of
from quantkit.method_facts import METHODS, MethodFacts, fitting_formats, make_scheme
from quantkit.plan import stored_geometry
from quantkit.quant_config import EMBEDDING_FORMAT, is_kept, refuse_embedding
from quantkit.recipe import Override, Recipe
from quantkit.scheme import KEEP, LinearScheme, Rule, resolve


def float_dtype(checkpoint: Checkpoint, spec: ModelSpec) -> str:
    """The safetensors dtype of a model's floats, by its embedding."""
    name = f"{spec.architecture.embedding}.weight"
    return GGUF_DTYPE if checkpoint.kind == "gguf" or name not in checkpoint.tensors else checkpoint.dtype(name)


def _format(recipe: Recipe, facts: Mapping[str, MethodFacts]) -> str:
    return recipe.format or fitting_formats(facts[recipe.method], recipe.bits)[0]


def _means(pattern: str, name: str, linears: Iterable[str]) -> bool:
    """Whether an override means ``name``, which lies outside the blocks: it matches that and none of ``linears``."""
    return re.search(pattern, name) is not None and not any(re.search(pattern, linear) for linear in linears)


def _embedding_scheme(recipe: Recipe, facts: Mapping[str, MethodFacts], dtype: str, override: Override, name: str) -> LinearScheme:
    """How the embedding ``name`` is stored by an override that means it: rounded to nearest, to 8 bits and symmetric with a scale for each
    row where ``override`` does not say otherwise; what the recipe says of linears is not meant for it.

    Rows of 8 bits lie unpacked, as transformers loads them; anything else is packed, as vLLM looks it up. Raises InputError for a
    format that cannot hold it, and for a method that has nothing to solve here: no activations reach it.
    """
    if override.keep:
        return KEEP
    refuse_embedding(name, _format(recipe, facts))
    where = f"override {override.pattern!r}"
    if override.method not in (None, "rtn"):
        raise InputError(where, f"method {override.method!r} for {name}, which is looked up and not multiplied by", "rtn, or no method")
    scheme = make_scheme(
        "rtn",
        METHODS["rtn"],
        fmt=EMBEDDING_FORMAT,
        bits=8 if override.bits is None else override.bits,
        group_size=-1 if override.group_size is None else override.group_size,
        sym=override.sym is not False,
        options={},
        dtype=dtype,
        where=dict.fromkeys(("bits", "group_size", "sym", "format"), where),
    )
    return replace(scheme, layout="int8") if (scheme.bits, scheme.group_size, scheme.sym) == (8, -1, True) else scheme


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
        fmt=_format(recipe, facts),
        bits=values["bits"],
        group_size=values["group_size"],
        sym=values["sym"],
        options=recipe.options if same else {},
        dtype=dtype,
        where=where,
    )


def check_recipe(recipe: Recipe, facts: Mapping[str, MethodFacts]) -> LinearScheme:
    """The scheme of ``recipe`` for a 16-bit model. Raises InputError when no model could be quantized by it; what an override for
    an embedding says is judged with the model."""
    main = _scheme(recipe, facts, "F16")
    for override in recipe.overrides:
        others = ((arch.embedding, [arch.head, *(arch.block.format(layer=0) + linear.name for linear in arch.linears)]) for arch in TABLE)
        if not any(_means(override.pattern, name, linears) for name, linears in others):
            _scheme(recipe, facts, "F16", override)
    return main


def assign(spec: ModelSpec, recipe: Recipe, facts: Mapping[str, MethodFacts], dtype: str) -> dict[str, LinearScheme]:
    """Which linear is stored how: overrides, then every other linear of the blocks by the recipe; routers and gates are kept.

    Head and embedding are quantized, rounded to nearest, by an override that means nothing else. Either unties them: a tied head
    is then stored beside the embedding. An embedding in floats has no entry. Raises InputError naming the linear, the numbers and
    the remedy when a layout cannot hold its shape, or the format no embedding.
    """
    head, embedding = spec.architecture.head, spec.architecture.embedding
    blocks = [name for name in spec.all_linears() if name != head]
    main = _scheme(recipe, facts, dtype)
    tables = [o for o in recipe.overrides if _means(o.pattern, embedding, blocks)]
    rules = [Rule(o.pattern, _scheme(recipe, facts, dtype, o)) for o in recipe.overrides if o not in tables or re.search(o.pattern, head)]
    assignment = resolve([*rules, Rule("", main)], [*blocks, head])
    chosen = next((rule.scheme for rule in rules if _means(rule.pattern, head, blocks)), KEEP)
    table = _embedding_scheme(recipe, facts, dtype, tables[0], embedding) if tables else KEEP
    assignment[head] = chosen if is_kept(chosen) else replace(chosen, method="rtn")
    if is_kept(chosen) and is_kept(table) and spec.tied:
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
    for name, scheme in ((head, chosen), (embedding, table)):
        if is_kept(scheme):
            continue
        try:
            geometry_of(scheme, spec.dims["vocab"].elements, spec.dims["hidden"].elements, dtype="F16")
        except InputError as exc:
            raise InputError(name, exc.what, exc.expected, "group_size=-1 in its override makes each row a group") from exc
    return assignment if is_kept(table) else {**assignment, embedding: table}


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
    if spec.tied and head in assignment and f"{head}.weight" not in checkpoint.tensors:  # untied: the embedding stays beside it
        rows, hidden = spec.dims["vocab"].elements, spec.dims["hidden"].elements
        after += geometry_of(assignment[head], rows, hidden, dtype=float_dtype(checkpoint, spec)).total_bytes
    return before, after
