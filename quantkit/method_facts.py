"""What each method can make, and the scheme of a linear that it quantizes: formats, bits, groups, symmetry, and their defaults.

Knows names and numbers: no config, no weight, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import InputError
from quantkit.scheme import LinearScheme


@dataclass(frozen=True, slots=True)
class MethodFacts:
    """What a method can make, the default first. ``group`` None: there is no choice, the layouts decide."""

    formats: tuple[str, ...]
    bits: tuple[int, ...]
    group: int | None
    sym: bool | None
    """The default; None: there is no choice, the method is symmetric."""
    layouts: Mapping[str, str]
    """Format -> layout."""
    code: str = ""
    activations: str = ""


_GROUPED = {"awq": "awq", "gptq": "gptq", "gptq_v2": "gptq_v2", "compressed-tensors": "packed"}
METHODS: Mapping[str, MethodFacts] = {
    "rtn": MethodFacts(("awq", "gptq", "gptq_v2", "compressed-tensors"), (4, 2, 3, 8), 128, False, _GROUPED),
    "awq": MethodFacts(("awq", "gptq", "gptq_v2", "compressed-tensors"), (4, 2, 3, 8), 128, False, _GROUPED),
    "gptq": MethodFacts(("gptq", "gptq_v2", "compressed-tensors", "awq"), (4, 2, 3, 8), 128, True, _GROUPED),
    "nf4": MethodFacts(("bnb",), (4,), 64, None, {"bnb": "bnb4"}, code="nf4"),
    "fp4": MethodFacts(("bnb",), (4,), 64, None, {"bnb": "bnb4"}, code="fp4"),
    "int8": MethodFacts(("bnb",), (8,), None, None, {"bnb": "bnb8"}, activations="int8_outlier"),
    "fp8": MethodFacts(
        ("compressed-tensors", "fp8"), (8,), None, None, {"compressed-tensors": "fp8", "fp8": "fp8_block"}, activations="fp8_token"
    ),
    "w8a8": MethodFacts(("compressed-tensors",), (8,), None, None, {"compressed-tensors": "int8"}, activations="int8_token"),
}
"""The built-in methods."""


def fitting_formats(facts: MethodFacts, bits: int | None) -> list[str]:
    """The formats of a method that hold codes of ``bits`` (None: its default), the default first."""
    return [name for name in facts.formats if (bits or facts.bits[0]) == 4 or name != "awq"]


def make_scheme(
    method: str,
    facts: MethodFacts,
    *,
    fmt: str | None,
    bits: int | None,
    group_size: int | None,
    sym: bool | None,
    options: Mapping[str, Any],
    dtype: str,
    where: Mapping[str, str],
) -> LinearScheme:
    """How ``method`` stores a linear; None is the method's default. ``dtype`` is the stored dtype of the model's floats.

    ``where`` names the source of each setting for errors. Raises InputError for what the method or the format cannot do.
    """
    bits = facts.bits[0] if bits is None else bits
    if bits not in facts.bits:
        raise InputError(where["bits"], f"{bits} bits with method {method}", f"one of {', '.join(map(str, sorted(facts.bits)))}")
    fitting = fitting_formats(facts, bits)
    fmt = fitting[0] if fmt is None else fmt
    if fmt not in facts.formats:
        raise InputError(where["format"], f"{fmt!r} cannot hold what method {method} makes", f"one of {', '.join(facts.formats)}")
    if fmt not in fitting:
        what = f"{bits} bits in the {fmt} format"
        raise InputError(
            where["bits"], what, "4", "leave such layers unquantized: --override 'PATTERN:keep', or --format compressed-tensors"
        )
    layout = facts.layouts[fmt]
    if group_size is not None and facts.group is None:
        raise InputError(where["group_size"], f"{group_size} with method {method}", "no group size: the format has its own")
    if sym is not None and facts.sym is None:
        raise InputError(where["sym"], f"was given with method {method}", "no such setting: the method is symmetric")
    group = facts.group if group_size is None else group_size
    if group is None:
        group = 128 if layout == "fp8_block" else -1
    elif layout != "bnb4" and group != -1 and group < 8:
        raise InputError(where["group_size"], f"is {group}", "-1 (whole rows) or at least 8")
    scales = {"awq": "F16", "gptq": "F16", "gptq_v2": "F16", "packed": dtype, "int8": dtype, "fp8": dtype}.get(layout, "F32")
    return LinearScheme(
        method,
        layout,
        bits,
        group,
        facts.sym is None or (facts.sym if sym is None else sym),
        scales if scales in ("F16", "BF16", "F32") else "F16",
        code=facts.code,
        double_quant=layout == "bnb4" and options.get("double_quant", True) is True,
        act_order=layout.startswith("gptq") and options.get("order") == "act" and group != -1,
        activations="" if layout == "fp8_block" else facts.activations,
    )
