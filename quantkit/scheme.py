"""Rules -> Assignment: which linear gets which method, bits, group and layout.

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
    """How one linear is stored. ``layout`` is a key of ``geometry.LAYOUTS``.

    ``group_size`` is weights per scale along the input: -1 one per row, 0 one per matrix; of ``bnb4`` it is the block length over
    the flattened matrix, of ``fp8_block`` both sides of a block, of ``ggml`` the weights of a block. ``scale_dtype`` is the safetensors
    dtype of stored scales.
    """

    method: str
    layout: str
    bits: int = 4
    group_size: int = 128
    sym: bool = False
    scale_dtype: str = "F16"
    code: str = ""
    """"nf4" or "fp4": the codebook of ``bnb4``; the block type of ``ggml``, such as "Q4_K"."""
    double_quant: bool = False
    """The scales of ``bnb4`` are quantized themselves."""
    act_order: bool = False
    """Groups are scattered over the input (``g_idx``), as GPTQ's ``desc_act`` makes them."""
    activations: str = ""
    """"int8_token" or "fp8_token": the input is quantized per token when the linear runs; "int8_outlier" as LLM.int8 does."""


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


def assignment_to_json(assignment: Assignment) -> dict[str, dict[str, Any]]:
    """The assignment as JSON data, for the manifest."""
    return {name: asdict(scheme) for name, scheme in sorted(assignment.items())}
