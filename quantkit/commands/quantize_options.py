"""What ``quantkit quantize`` is asked to do: its options, and the recipe that they and a file make together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.commands.quantize_gguf import GgufChoices
from quantkit.errors import InputError
from quantkit.recipe import Calibration, Recipe, checked_recipe, load_recipe, parse_override

if TYPE_CHECKING:
    pass


DEFAULT_SAMPLES, BUILTIN_SEQ_LEN, TEXT_SEQ_LEN = 128, 512, 2048
GGUF = "gguf"
"""The method whose types come from a mixture: it writes one file, and nothing of the block loop is in it."""


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
    devices: int = 1
    """GPUs to split the work over."""
    compute_dtype: str = "auto"
    offload: bool = False
    for_tp: int | None = None
    """Ranks that get equal parts of every MLP, which is widened with zeros for it."""
    max_shard_size: int | None = None
    """Bytes; None is 5 GB of safetensors, and one GGUF file whatever its size."""
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False
    gguf: GgufChoices = field(default_factory=GgufChoices)


def flag(name: str) -> str:
    return "--sym/--asym" if name == "sym" else f"--{name.replace('_', '-')}"


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
