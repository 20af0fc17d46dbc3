"""``quantkit recipe``: show, check and begin a recipe."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from quantkit import fs
from quantkit.errors import InputError
from quantkit.method_facts import MethodFacts
from quantkit.quant_config import format_of
from quantkit.recipe import Recipe, bundled_recipes, load_recipe, parse_recipe, read_recipe_text
from quantkit.report import Report, Table, next_step


@dataclass(frozen=True, slots=True)
class ShowOptions:
    """Options of ``quantkit recipe show``: a bundled name or a file; None lists the bundled ones."""

    name: str | None = None


@dataclass(frozen=True, slots=True)
class ValidateOptions:
    """Options of ``quantkit recipe validate``: a file or a bundled name."""

    path: str


@dataclass(frozen=True, slots=True)
class InitOptions:
    """Options of ``quantkit recipe init``."""

    out: Path
    method: str = "awq"


def _summary(recipe: Recipe) -> str:
    said = {"bits": recipe.bits, "group": recipe.group_size, "format": recipe.format}
    symmetry = () if recipe.sym is None else ("symmetric" if recipe.sym else "asymmetric",)
    return ", ".join([recipe.method, *(f"{name} {value}" for name, value in said.items() if value is not None), *symmetry])


def show(options: ShowOptions) -> Report:
    """The text of one recipe, or a list of the bundled ones. Raises InputError when there is none of that name."""
    if options.name is None:
        recipes = {name: load_recipe(path) for name, path in bundled_recipes().items()}
        rows = tuple((name, _summary(recipe)) for name, recipe in recipes.items())
        return Report(
            command="recipe show",
            data={"recipes": {name: recipe.model_dump(mode="json") for name, recipe in recipes.items()}},
            tables=(Table("Bundled recipes", ("recipe", "what it does"), rows),),
            next_steps=("quantkit recipe show NAME > my.yaml", "quantkit quantize MODEL OUT --recipe NAME"),
        )
    path, text = read_recipe_text(options.name)
    recipe = parse_recipe(text, str(path))
    return Report(command="recipe show", data={"file": str(path), "text": text, "recipe": recipe.model_dump(mode="json")}, text=text)


def validate(options: ValidateOptions) -> Report:
    """Check a recipe down to the options of its method. Raises InputError naming the file and the field."""
    from quantkit.commands.assign import check_recipe
    from quantkit.commands.quantize_options import QuantizeOptions, effective_recipe
    from quantkit.quantizers.base import methods

    path, _ = read_recipe_text(options.path)
    recipe = effective_recipe(QuantizeOptions(path="", out=Path(), recipe=Path(options.path)))
    try:
        known = methods()
        if recipe.method not in known:
            raise InputError("--method", f"{recipe.method!r} is unknown", f"one of {', '.join(known)}")
        known[recipe.method].factory(recipe.options)
        scheme = check_recipe(recipe, {name: found.facts for name, found in known.items()})
    except InputError as exc:
        raise InputError(f"{path}: {exc.where.removeprefix('--').replace('-', '_')}", exc.what, exc.expected, exc.hint) from exc
    return Report(
        command="recipe validate",
        data={"file": str(path), "valid": True, "recipe": recipe.model_dump(mode="json"), "format": format_of(scheme.layout)},
        facts=(("recipe", str(path)), ("valid", "yes"), ("method", _summary(recipe)), ("format", format_of(scheme.layout))),
        next_steps=(next_step("quantize", "MODEL", "OUT", "--recipe", options.path),),
    )


def _template(method: str, facts: MethodFacts, needs_calibration: bool) -> str:
    """A commented recipe that says every field with its default."""
    group = "" if facts.group is None else f"group_size: {facts.group:<15} # weights per scale along the input; -1 is one group per row\n"
    symmetry = "" if facts.sym is None else f"sym: {str(facts.sym).lower():<22} # true: every zero point is the middle of the range\n"
    calibration = """\
calibration:
  source: builtin            # a text or JSONL file, self (sampled from the model) or builtin (English text; your own is better)
  samples: 128
  seq_len: 512
"""
    return f"""\
# A quantkit recipe. Check it:  quantkit recipe validate FILE
# Use it:                       quantkit quantize MODEL OUT --recipe FILE
method: {method}
bits: {facts.bits[0]}
{group}{symmetry}# format: {facts.formats[0]:<18} # what is written: {", ".join(facts.formats)}
{calibration if needs_calibration else ""}
# The first override whose pattern (a regular expression) is found in a linear's name decides.
overrides: []
#  - pattern: layers\\.0\\.mlp
#    group_size: 32
#  - pattern: down_proj
#    keep: true              # left unquantized

# What belongs to the method; quantkit recipe validate names what it knows.
options: {{}}
"""


def init(options: InitOptions) -> Report:
    """Write a recipe to start from. Raises InputError when ``out`` exists or there is no such method."""
    from quantkit.quantizers.base import method

    chosen = method(options.method)
    quantizer = chosen.factory({})
    if os.path.lexists(options.out):
        raise InputError(str(options.out), "exists", "a path that does not exist")
    text = _template(options.method, chosen.facts, bool(quantizer.needs))
    recipe = parse_recipe(text, str(options.out))
    fs.write_bytes(options.out, text.encode())
    return Report(
        command="recipe init",
        data={"out": str(options.out), "recipe": recipe.model_dump(mode="json")},
        facts=(("written", str(options.out)), ("method", _summary(recipe))),
        next_steps=(
            next_step("recipe", "validate", options.out),
            next_step("quantize", "MODEL", "OUT", "--recipe", options.out),
        ),
    )
