"""Rules -> Assignment <-> quantization_config: which linear gets which method, bits, group and layout.

Knows names and numbers, never data. An Assignment is resolved once and stored in the manifest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.errors import InputError


@dataclass(frozen=True, slots=True)
class LinearScheme:
    """How one linear is stored. ``layout`` is a key of ``geometry.LAYOUTS``; ``group_size`` -1 is one group per row."""

    method: str
    layout: str
    bits: int = 4
    group_size: int = 128
    sym: bool = False


KEEP = LinearScheme(method="keep", layout="plain", bits=16, group_size=-1, sym=True)


@dataclass(frozen=True, slots=True)
class Rule:
    """The first rule whose ``pattern`` (a regular expression, searched in the module path) matches decides."""

    pattern: str
    scheme: LinearScheme


Assignment = Mapping[str, LinearScheme]
"""Full module path of a linear (``model.layers.0.self_attn.q_proj``) -> how it is stored."""


def resolve(rules: Iterable[Rule], linears: Iterable[str]) -> dict[str, LinearScheme]:
    """Give each linear the scheme of the first rule that matches it; KEEP when none does.

    Raises InputError for a pattern that is no regular expression or that matches nothing.
    """
    names = list(linears)
    compiled = []
    for rule in rules:
        try:
            compiled.append((re.compile(rule.pattern), rule))
        except re.error as exc:
            raise InputError(f"rule {rule.pattern!r}", f"not a regular expression ({exc})", "a Python regular expression") from exc
    for pattern, rule in compiled:
        if not any(pattern.search(name) for name in names):
            raise InputError(f"rule {rule.pattern!r}", "matches no linear of the model", f"one of {', '.join(names[:3])}, ...")
    return {name: next((rule.scheme for pattern, rule in compiled if pattern.search(name)), KEEP) for name in names}


def awq_config(assignment: Assignment) -> dict[str, Any]:
    """The ``quantization_config`` of an AutoAWQ artifact (``formats.md`` 3.5).

    Raises InputError when the quantized linears do not share one bit width and group size: the format has one of each.
    """
    quantized = {name: s for name, s in assignment.items() if s.layout == "awq"}
    shapes = {(s.bits, s.group_size) for s in quantized.values()}
    if len(shapes) != 1:
        raise InputError("quantization_config", f"the AWQ format holds one bit width and group size, found {sorted(shapes)}", "one of each")
    bits, group_size = shapes.pop()
    kept = sorted(name for name, s in assignment.items() if s.layout == "plain")
    return {
        "quant_method": "awq",
        "bits": bits,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": kept or None,
    }


def assignment_from_config(config: Mapping[str, Any], linears: Iterable[str], tensors: Iterable[str]) -> dict[str, LinearScheme]:
    """Read back how a checkpoint on disk stores its linears, from ``config.json`` and the tensor names.

    Raises InputError for a quantization method or version that quantkit does not read.
    """
    names, present = list(linears), set(tensors)
    quant = config.get("quantization_config")
    if not quant:
        return dict.fromkeys(names, KEEP)
    if not isinstance(quant, Mapping):
        raise InputError("config.json: quantization_config", f"is {type(quant).__name__}", "an object")
    method = quant.get("quant_method")
    if method != "awq":
        raise InputError("config.json: quantization_config", f"quant_method {method!r}", "awq")
    version = str(quant.get("version", "gemm")).lower()
    if version != "gemm":
        raise InputError("config.json: quantization_config", f"AWQ version {version!r}", "gemm")
    bits, group = quant.get("bits", quant.get("w_bit", 4)), quant.get("group_size", quant.get("q_group_size", 128))
    if bits != 4 or not isinstance(group, int) or (group != -1 and group <= 0):
        raise InputError(
            "config.json: quantization_config", f"bits {bits!r}, group_size {group!r}", "bits 4 and a positive group size or -1"
        )
    awq = LinearScheme(method="awq", layout="awq", bits=4, group_size=group)
    return {name: awq if f"{name}.qweight" in present else KEEP for name in names}


def assignment_to_json(assignment: Assignment) -> dict[str, dict[str, Any]]:
    """The assignment as JSON data, for the manifest."""
    return {name: asdict(scheme) for name, scheme in sorted(assignment.items())}
