"""GPTQ: quantize a column, correct the ones that are still to come, in the order that matters most.

Source: Frantar et al. 2022 (arXiv 2210.17323).
By default each linear sees the activations of the model as quantized so far, so that it also makes up for what was lost before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.arch.spec import ModelSpec
from quantkit.errors import InputError
from quantkit.layouts.base import GroupedInt, Neutral, SuperBlock
from quantkit.ops.dtypes import TORCH_DTYPES
from quantkit.ops.ggml.tensor import encoder_on
from quantkit.quant_config import is_kept
from quantkit.quantizers import ggml_grid
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
from quantkit.quantizers.devices import shares, spread
from quantkit.quantizers.gptq_solver import Solved, SolverOptions, joined, solve
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
        facts: dict[str, Any] = {}
        results: dict[str, Neutral] = {}
        self._fit_blocks(block, stats, [(s, roles) for (_, s), roles in alike.items() if s.layout == "ggml"], spec, results, facts)
        groups = [(scheme, roles) for (_, scheme), roles in alike.items() if scheme.layout != "ggml"]
        for (scheme, roles), solved in zip(groups, self._solve(block, stats, groups, spec), strict=True):
            first = 0
            for role in roles:
                rows = slice(first, first + spec.linear_shape(role)[0])
                first = rows.stop
                codes, scales, zeros = (part[rows].contiguous() for part in (solved.codes, solved.scales, solved.zeros))
                results[role] = GroupedInt(codes, scales, zeros, scheme.bits, block.biases.get(role), solved.g_idx)
                facts[role] = {
                    "output_error": round(solved.error, 6),
                    "damp": solved.damp,
                    **({"dead_inputs": solved.dead} if solved.dead else {}),
                    **({"borrowed_statistics": True} if stats[role].borrowed else {}),
                }
        return BlockFit(results, facts=facts)

    def _fit_blocks(
        self,
        block: BlockWeights,
        stats: Mapping[str, InputStats],
        groups: Sequence[tuple[LinearScheme, Sequence[str]]],
        spec: ModelSpec,
        results: dict[str, Neutral],
        facts: dict[str, Any],
    ) -> None:
        """Put into ``results`` and ``facts`` the linears that are stored in ggml's blocks, dealt over the devices."""
        jobs = [(scheme, role) for scheme, roles in groups for role in roles]

        def work(job: int, device: str) -> ggml_grid.GridFit:
            scheme, role = jobs[job]
            seen, where = stats[role].on(device), spec.tensor(block.layer, spec.linears[role].name)
            weight = block.linears[role].to(device)
            return ggml_grid.fit(weight, seen, scheme.code, self._options(scheme), where, encoder_on(device))

        costs = [block.linears[role].numel() * spec.linear_shape(role)[1] for _, role in jobs]
        for (scheme, role), found in zip(jobs, spread(block.devices, costs, work), strict=True):
            results[role] = SuperBlock(torch.from_numpy(found.blocks).to(block.devices[0]), scheme.code, block.biases.get(role))
            facts[role] = {
                "output_error": round(math.sqrt(found.loss / max(found.total, 1e-30)), 6),
                "output_error_searched": round(math.sqrt(found.weighed / max(found.total, 1e-30)), 6),
                "rows_solved": round(found.solved, 6),
                **({"borrowed_statistics": True} if stats[role].borrowed else {}),
            }

    def _solve(
        self, block: BlockWeights, stats: Mapping[str, InputStats], groups: Sequence[tuple[LinearScheme, Sequence[str]]], spec: ModelSpec
    ) -> Iterator[Solved]:
        """Each of ``groups``, linears of one input and scheme as one. Dealt whole over the devices when there is one for each; else each
        is cut by rows, which know nothing of each other: every device decomposes the same Gram matrix."""
        rows = [sum(spec.linear_shape(role)[0] for role in roles) for _, roles in groups]
        cuts = 1 if len(groups) >= len(block.devices) else len(block.devices)
        jobs = [(group, part) for group, total in enumerate(rows) for part in shares(total, cuts) if part.stop > part.start]
        costs = [(part.stop - part.start) * spec.linear_shape(groups[group][1][0])[1] ** 2 for group, part in jobs]

        def work(job: int, device: str) -> Solved:
            group, part = jobs[job]
            scheme, roles = groups[group]
            weights = [block.linears[role] for role in roles]
            stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
            seen = stats[roles[0]].on(device)
            where = spec.tensor(block.layer, spec.linears[roles[0]].name)
            return solve(stacked[part].to(device), seen.gram, seen.tokens, self._options(scheme), where, seen.cross)

        solved = spread(block.devices, costs, work)
        for group in range(len(groups)):
            yield joined([solved.pop(0) for owner, _ in jobs if owner == group], block.devices[0])

    def _options(self, scheme: LinearScheme) -> SolverOptions:
        return SolverOptions(
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
