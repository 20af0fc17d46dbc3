"""GPTQ: quantize a column, correct the ones that are still to come, in the order that matters most.

Source: Frantar et al. 2022 (arXiv 2210.17323).
By default each linear sees the activations of the model as quantized so far, so that it also makes up for what was lost before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.arch.spec import ModelSpec
from quantkit.errors import InputError
from quantkit.layouts.base import GroupedInt
from quantkit.ops.dtypes import TORCH_DTYPES
from quantkit.quant_config import is_kept
from quantkit.quantizers.base import (
    FLOAT,
    QUANTIZED,
    BlockFit,
    BlockWeights,
    InputStats,
    built_in,
    choice,
    number,
    refuse_unknown_options,
)
from quantkit.quantizers.gptq_solver import SolverOptions, solve
from quantkit.quantizers.rtn import min_zero, refuse_not_finite
from quantkit.scheme import LinearScheme

OPTIONS = ("damp", "order", "mse", "sweeps", "block", "inputs", "upstream")


@dataclass(frozen=True, slots=True)
class Gptq:
    """The method ``gptq``. ``upstream``: aim at what the float model computes from its own inputs, not from the quantized ones."""

    damp: float
    order: str
    mse: bool
    sweeps: int
    block: int
    inputs: str
    upstream: bool
    name: str = "gptq"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "cross"} if self.upstream else {"gram"})

    def fit(self, block: BlockWeights, stats: Mapping[str, InputStats], schemes: Mapping[str, LinearScheme], spec: ModelSpec) -> BlockFit:
        """As ``Quantizer.fit``. Linears that share inputs and a scheme are solved as one."""
        alike: dict[tuple[int, LinearScheme], list[str]] = {}
        for role, weight in block.linears.items():
            if is_kept(schemes[role]):
                continue
            where = spec.tensor(block.layer, spec.linears[role].name)
            refuse_not_finite(weight, where)
            if role not in stats:
                raise InputError(where, "no calibration token reached it", "text that does", "more --samples, or --override to keep it")
            alike.setdefault((id(stats[role]), schemes[role]), []).append(role)
        results: dict[str, GroupedInt] = {}
        facts: dict[str, Any] = {}
        for (_, scheme), roles in alike.items():
            seen = stats[roles[0]]
            options = SolverOptions(
                bits=scheme.bits,
                group_size=scheme.group_size,
                sym=scheme.sym,
                scale_dtype=TORCH_DTYPES[scheme.scale_dtype],
                min_zero=min_zero(scheme),
                damp=self.damp,
                block=self.block,
                order=self.order,
                mse=self.mse,
                sweeps=self.sweeps,
            )
            where = spec.tensor(block.layer, spec.linears[roles[0]].name)
            weights = [block.linears[role] for role in roles]
            stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
            solved = solve(stacked, seen.gram, seen.tokens, options, where, seen.cross)
            first = 0
            for role, weight in zip(roles, weights, strict=True):
                rows = slice(first, first + weight.shape[0])
                first = rows.stop
                codes, scales, zeros = (part[rows].contiguous() for part in (solved.codes, solved.scales, solved.zeros))
                results[role] = GroupedInt(codes, scales, zeros, scheme.bits, block.biases.get(role), solved.g_idx)
                facts[role] = {
                    "output_error": round(solved.error, 6),
                    "damp": solved.damp,
                    **({"dead_inputs": solved.dead} if solved.dead else {}),
                    **({"borrowed_statistics": True} if seen.borrowed else {}),
                }
        return BlockFit(results, facts=facts)


def create(options: Mapping[str, Any]) -> Gptq:
    """Build the method from a recipe's options. Raises InputError for an unknown option or a value out of range."""
    refuse_unknown_options("gptq", options, OPTIONS)
    inputs = choice("gptq", options, "inputs", QUANTIZED, (QUANTIZED, FLOAT))
    upstream = choice("gptq", options, "upstream", False, (True, False))
    if upstream and inputs == FLOAT:
        raise InputError(
            "options of gptq: upstream", "is true with inputs float", "inputs quantized: the float inputs have nothing upstream"
        )
    return Gptq(
        damp=float(number("gptq", options, "damp", 0.01, 1e-6, 1.0)),
        order=choice("gptq", options, "order", "static", ("static", "act", "none")),
        mse=choice("gptq", options, "mse", True, (True, False)),
        sweeps=int(number("gptq", options, "sweeps", 3, 0, 100)),
        block=int(number("gptq", options, "block", 128, 1, 4096)),
        inputs=inputs,
        upstream=upstream,
    )


METHOD = built_in("gptq", "error-compensating rounding", create)
