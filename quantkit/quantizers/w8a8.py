"""INT8 weights and activations, with SmoothQuant: outliers move from the activations into the weights.

Source: Xiao et al. 2022 (arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.arch.spec import ModelSpec
from quantkit.ops.eightbit import smooth_scale
from quantkit.quant_config import is_kept
from quantkit.quantizers.awq import fold_scale
from quantkit.quantizers.base import FLOAT, BlockFit, BlockWeights, InputStats, built_in, number, refuse_unknown_options
from quantkit.quantizers.rtn import quantize_linears, refuse_not_finite
from quantkit.scheme import LinearScheme


@dataclass(frozen=True, slots=True)
class W8A8:
    """The method ``w8a8``. ``alpha`` is how much of the difficulty moves into the weights; 0 turns smoothing off."""

    alpha: float
    name: str = "w8a8"
    inputs: str = FLOAT

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"range"}) if self.alpha else frozenset()

    def fit(self, block: BlockWeights, stats: Mapping[str, InputStats], schemes: Mapping[str, LinearScheme], spec: ModelSpec) -> BlockFit:
        before = dict(block.linears)
        for role, weight in before.items():
            refuse_not_finite(weight, spec.tensor(block.layer, spec.linears[role].name))
        linears, biases = dict(before), dict(block.biases)
        norms, norm_biases = dict(block.norms), dict(block.norm_biases)
        facts: dict[str, Any] = {}
        for group in spec.scale_groups(block.layer) if self.alpha else ():
            smoothed = [role for role in group.targets if not is_kept(schemes[role])]
            if group.prev not in block.norms or not smoothed:
                continue
            first = stats[group.targets[0]]
            widest = torch.stack([linears[role].abs().amax(0) for role in smoothed]).amax(0)
            scale = smooth_scale(first.abs_max, widest, self.alpha)
            fold_scale(group, scale, linears, biases, norms, norm_biases, block.norm_dtypes, spec)
            for role in smoothed:
                facts.setdefault(role, {})["smoothed"] = round(float(scale.max() / scale.min()), 3)
        results = quantize_linears(block, linears, biases, schemes, spec)
        changed = {role: weight for role, weight in linears.items() if role not in results and weight is not before[role]}
        return BlockFit(results, changed, biases, norms, norm_biases, facts)


def create(options: Mapping[str, Any]) -> W8A8:
    """Build the method from a recipe's options. Raises InputError for an unknown option or a value out of range."""
    refuse_unknown_options("w8a8", options, ("alpha",))
    return W8A8(float(number("w8a8", options, "alpha", 0.5, 0.0, 1.0)))


METHOD = built_in("w8a8", "int8 weights and inputs, SmoothQuant", create)
