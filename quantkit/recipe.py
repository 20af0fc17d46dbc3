"""What a quantization run is asked to do: the strict recipe, read from YAML, and the ``--override`` rule.

Knows the structure alone. Which methods, formats and options exist is known to the quantizers, which check them.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, field_validator, model_validator

from quantkit.errors import InputError

MAX_RECIPE_BYTES = 1 << 16
MAX_PATTERN = 1000
OVERRIDE_FORM = "PATTERN:bits=8, PATTERN:group_size=32,sym=true or PATTERN:keep"

Bits = Annotated[StrictInt, Field(ge=1, le=16)]
GroupSize = Annotated[StrictInt, Field(ge=-1, le=1 << 20)]
Count = Annotated[StrictInt, Field(ge=1, le=1 << 24)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_.+-]+$")]


def _group_size(value: int | None) -> int | None:
    if value == 0:
        raise ValueError("0 is no group size, expected -1 (one group per row) or a positive number")
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Strict):
    """Which text the method sees. None means the default of the run."""

    source: Annotated[StrictStr, Field(min_length=1, max_length=4096)] | None = None
    """A text or JSONL file, ``self`` (sampled from the model) or ``builtin``."""
    samples: Count | None = None
    seq_len: Count | None = None


class Override(_Strict):
    """What is different for the linears whose module path ``pattern`` (a regular expression) is found in."""

    pattern: Annotated[StrictStr, Field(min_length=1, max_length=MAX_PATTERN)]
    method: Name | None = None
    bits: Bits | None = None
    group_size: GroupSize | None = None
    sym: StrictBool | None = None
    keep: StrictBool = False
    """Leave them unquantized."""

    _group = field_validator("group_size")(_group_size)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as exc:
            raise ValueError(f"{value!r} is not a regular expression ({exc})") from exc
        return value

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        settings = [self.method, self.bits, self.group_size, self.sym]
        if self.keep and any(value is not None for value in settings):
            raise ValueError("keep leaves a linear unquantized, so it goes with no other setting")
        if not self.keep and all(value is None for value in settings):
            raise ValueError("changes nothing, expected method, bits, group_size, sym or keep")
        return self


class Recipe(_Strict):
    """One quantization run, as data. ``options`` belongs to the method, which validates it. None is the method's own default."""

    method: Name
    bits: Bits | None = None
    group_size: GroupSize | None = None
    """Weights per scale along the input, or -1 for one group per row."""
    sym: StrictBool | None = None
    format: Name | None = None
    """The layout on disk; None is the method's own."""
    calibration: Calibration = Calibration()
    overrides: Annotated[list[Override], Field(max_length=1000)] = []
    """The first that matches a linear decides."""
    options: dict[str, Any] = {}

    _group = field_validator("group_size")(_group_size)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key said twice, and aliases: the one hides a choice, the other hides size."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "an alias (*name), expected the value itself", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r}, expected a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the field {key!r} twice, expected it once", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _yaml(text: str, where: str) -> Any:
    try:
        loader = _StrictLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as exc:
        line = f"line {exc.problem_mark.line + 1}: " if exc.problem_mark else ""
        raise InputError(where, f"{line}{exc.problem or 'is not YAML'}") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise InputError(where, f"is not YAML ({type(exc).__name__})", "a recipe") from exc


def _complaint(error: ValidationError) -> tuple[str, str]:
    """The first defect as (field, what is wrong), in words of ours where pydantic speaks of its types."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "recipe"
    message = first["msg"].removeprefix("Value error, ")
    message = {
        "extra_forbidden": "unknown field",
        "missing": "is missing",
    }.get(first["type"], message[:1].lower() + message[1:])
    value = first.get("input")
    if isinstance(value, str | int | float | bool) and first["type"] not in ("extra_forbidden", "value_error"):
        message = f"{value!r:.80}: {message}"
    return field, message


def checked_recipe(data: Mapping[str, Any], where: str) -> Recipe:
    """The recipe with these fields. Raises InputError naming ``where`` and the first field that is wrong."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as exc:
        field, what = _complaint(exc)
        owner: Any = Override if field.startswith("overrides.") else Calibration if field.startswith("calibration.") else Recipe
        known = f"one of {', '.join(owner.model_fields)}" if what == "unknown field" else None
        raise InputError(f"{where}: {field}", what, known) from exc


def parse_recipe(text: str, where: str) -> Recipe:
    """The recipe that ``text`` (YAML) holds. Raises InputError naming ``where`` and the field."""
    data = _yaml(text, where)
    if not isinstance(data, dict):
        raise InputError(where, f"holds {'nothing' if data is None else type(data).__name__}", "a mapping with a method")
    return checked_recipe(data, where)


def bundled_recipes() -> dict[str, Path]:
    """Recipes that quantkit brings, by name: beside the package in a source tree, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    folder = package / "recipes"
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: ``name`` itself, or the bundled recipe of that name. Raises InputError when there is neither."""
    path = Path(name)
    if path.is_file():
        return path
    bundled = bundled_recipes()
    if str(name) in bundled:
        return bundled[str(name)]
    if path.exists():
        return path
    raise InputError(str(name), "no such recipe", f"a YAML file or one of {', '.join(bundled)}")


def read_recipe_text(name: str | Path) -> tuple[Path, str]:
    """The file of a recipe and its text. Raises InputError when it is no small UTF-8 file."""
    path = find_recipe(name)
    try:
        if not path.is_file():
            raise InputError(str(path), "is not a file", "a recipe")
        with path.open("rb") as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as exc:
        raise InputError(str(path), exc.strerror or "cannot be read", "a recipe") from exc
    if len(data) > MAX_RECIPE_BYTES:
        raise InputError(str(path), "is too large for a recipe", f"at most {MAX_RECIPE_BYTES} bytes")
    try:
        return path, data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InputError(str(path), f"is not UTF-8 (byte {exc.start})", "a YAML text") from exc


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe from a file or by its bundled name. Raises InputError naming the file and the field."""
    path, text = read_recipe_text(name)
    return parse_recipe(text, str(path))


def parse_override(text: str) -> Override:
    """``PATTERN:bits=8``, ``PATTERN:group_size=32,sym=true`` or ``PATTERN:keep``; the last colon divides. Raises InputError."""
    where = f"--override {text!r}"
    pattern, colon, settings = text.rpartition(":")
    if not colon or not pattern or not settings:
        raise InputError(where, "has no settings" if not settings or not colon else "has no pattern", OVERRIDE_FORM)
    values: dict[str, Any] = {"pattern": pattern}
    for setting in settings.split(","):
        key, equals, value = (part.strip() for part in setting.partition("="))
        key = key.replace("-", "_")
        if key in values:
            raise InputError(where, f"sets {key!r} twice", "each setting once")
        if key == "keep" and not equals:
            values[key] = True
        elif key == "method" and value:
            values[key] = value
        elif key in ("bits", "group_size") and re.fullmatch(r"-?\d{1,9}", value):
            values[key] = int(value)
        elif key in ("sym", "keep") and value in ("true", "false"):
            values[key] = value == "true"
        else:
            raise InputError(where, f"{setting.strip()!r} is no setting", OVERRIDE_FORM)
    try:
        return Override.model_validate(values)
    except ValidationError as exc:
        field, what = _complaint(exc)
        raise InputError(where, what if field == "recipe" else f"{field}: {what}", OVERRIDE_FORM) from exc
