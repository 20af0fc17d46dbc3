"""AWQ: scale the channels that matter before rounding, then clip each group. Source: Lin et al. 2023 (arXiv 2306.00978).

Both searches judge the error of the linear's output over the calibration tokens, through the Gram matrix of its
inputs: for an error matrix D the summed squared output error is tr(D H D^T), which is what running the tokens through
the layer would give, at a fraction of the work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.arch.spec import ModelSpec, ScaleGroup
from quantkit.errors import InputError
from quantkit.ops.grouped import dequantize, fake_quantize
from quantkit.quantizers.base import BlockFit, BlockWeights, InputStats, Method, refuse_unknown_options
from quantkit.quantizers.rtn import group_of, refuse_not_finite, round_to_nearest
from quantkit.scheme import LinearScheme

CLIP_STEPS = 10
CLIP_FLOOR = 0.5
UNCLIPPED_ROLES = frozenset({"q", "k"})
"""Their outputs meet in a product before the softmax; clipping them by their own output error hurts (AWQ, section 5.1)."""


@dataclass(frozen=True, slots=True)
class AwqOptions:
    """``scale_points``: candidates of the scale exponent in [0, 1); 1 turns scaling off. ``clip``: search the clipping too."""

    scale_points: int = 20
    clip: bool = True


def output_error(error: Tensor, gram: Tensor) -> float:
    """tr(D H D^T) for ``error`` D [N, K] and ``gram`` H [K, K]: rows in their own dtype, summed in float64."""
    return float(((error @ gram) * error).sum(-1).sum(dtype=torch.float64))


def candidate_scale(mean_abs: Tensor, ratio: float) -> Tensor:
    """``mean_abs [K]`` to the power ``ratio``, centred so that the greatest and the least scale multiply to 1."""
    scale = mean_abs.clamp(min=1e-4).pow(ratio)
    return scale / (scale.max() * scale.min()).sqrt()


def _share_over_query_heads(values: Tensor, spec: ModelSpec) -> Tensor:
    """Mean over the query heads that read one KV head: ``[heads * head_dim]`` -> ``[kv_heads * head_dim]``."""
    kv = spec.dims["kv_heads"].size
    return values.reshape(kv, -1, spec.head_dim).mean(1).reshape(-1)


def _repeat_to_query_heads(scale: Tensor, spec: ModelSpec) -> Tensor:
    """Inverse of the sharing: ``[kv_heads * head_dim]`` -> ``[heads * head_dim]``."""
    kv, queries = spec.dims["kv_heads"].size, spec.dims["heads"].size
    return scale.reshape(kv, 1, spec.head_dim).expand(kv, queries // kv, spec.head_dim).reshape(-1)


def _rounding_error(weight: Tensor, scale: Tensor, gram: Tensor, scheme: LinearScheme) -> float:
    """Output error of ``weight [N, K]`` when it is rounded as ``weight * scale``; infinite where that leaves float16."""
    try:
        rounded = fake_quantize(weight * scale, group_of(weight, scheme), scheme.bits, scheme.sym) / scale
    except InputError:  # this scale makes weights too large to store; another will not
        return math.inf
    return output_error(weight - rounded, gram)


def fold_scale(
    group: ScaleGroup,
    scale: Tensor,
    linears: dict[str, Tensor],
    biases: dict[str, Tensor],
    norms: dict[str, Tensor],
    norm_dtypes: Mapping[str, Any],
    spec: ModelSpec,
) -> Tensor:
    """Divide the op before ``group`` by ``scale [K]`` and multiply the targets' inputs by it: the block computes the same.

    Changes ``linears``, ``biases`` and ``norms`` by role. ``scale`` of the group after v is one for all query heads of a KV
    head. Returns the scale that was really folded, after rounding to the norm's stored dtype.
    """
    prev = group.prev
    if prev in norms:
        offset = spec.architecture.norm_offset
        gain = norms[prev] + offset
        folded = (gain / scale - offset).to(norm_dtypes[prev]).to(gain.dtype)
        # A gain that its dtype would round to nothing, or beyond its range, could not be undone: it stays as it is.
        usable = torch.isfinite(folded) & (folded + offset != 0) & (gain != 0)
        norms[prev] = torch.where(usable, folded, norms[prev])
        # The norm is stored in its own dtype: multiply the targets by what the rounding really divided by.
        scale = torch.where(usable, gain / torch.where(usable, folded + offset, 1.0), 1.0)
    else:
        rows = scale
        if prev == "v":
            kv, queries = spec.dims["kv_heads"].size, spec.dims["heads"].size
            rows = scale.reshape(kv, queries // kv, spec.head_dim)[:, 0].reshape(-1)
        linears[prev] = linears[prev] / rows.unsqueeze(1)
        if prev in biases:
            biases[prev] = biases[prev] / rows
    for role in group.targets:
        linears[role] = linears[role] * scale
    return scale


class Awq:
    """The method ``awq``."""

    name = "awq"
    needs: frozenset[str] = frozenset({"gram"})

    def __init__(self, options: AwqOptions) -> None:
        self.options = options

    def fit(self, block: BlockWeights, stats: Mapping[str, InputStats], schemes: Mapping[str, LinearScheme], spec: ModelSpec) -> BlockFit:
        for role, weight in block.linears.items():
            refuse_not_finite(weight, spec.tensor(block.layer, spec.linears[role].name))
        linears, biases, norms = dict(block.linears), dict(block.biases), dict(block.norms)
        input_scales: dict[str, Tensor] = {}  # role -> [K], the scale that its input was divided by
        facts: dict[str, Any] = {}
        for group in spec.architecture.scale_groups:
            if all(schemes[role].layout == "plain" for role in group.targets):
                continue
            scale, ratio = self._search_scale(group, linears, stats, schemes, spec)
            if ratio == 0.0:
                continue
            scale = fold_scale(group, scale, linears, biases, norms, block.norm_dtypes, spec)
            for role in group.targets:
                input_scales[role] = scale
                facts.setdefault(role, {})["scale_ratio"] = ratio
        results = {}
        for role, weight in linears.items():
            scheme = schemes[role]
            if scheme.layout == "plain":
                continue
            where = spec.tensor(block.layer, spec.linears[role].name)
            gram = stats[role].gram
            if role in input_scales:
                gram = gram / torch.outer(input_scales[role], input_scales[role])
            shrink = weight.new_ones(weight.shape[0], weight.shape[1] // group_of(weight, scheme))  # [N, G]
            if self.options.clip and role not in UNCLIPPED_ROLES:
                shrink = self._search_clip(weight, gram, scheme)
            found = round_to_nearest(weight, scheme, biases.get(role), where, shrink)
            results[role] = found
            error = output_error(weight - dequantize(found.codes, found.scales, found.zeros), gram)
            facts.setdefault(role, {}).update(
                clipped=round(float((shrink < 1).float().mean()), 6),
                output_error=round(math.sqrt(max(error, 0.0) / max(output_error(weight, gram), 1e-30)), 6),
            )
        changed = {role: weight for role, weight in linears.items() if role not in results and weight is not block.linears[role]}
        return BlockFit(results, changed, biases, norms, facts)

    def _search_scale(
        self,
        group: ScaleGroup,
        linears: Mapping[str, Tensor],
        stats: Mapping[str, InputStats],
        schemes: Mapping[str, LinearScheme],
        spec: ModelSpec,
    ) -> tuple[Tensor, float]:
        """The per-input scale [K] with the least summed output error of the group's targets, and its exponent.

        Raises InputError when no candidate gives a finite error.
        """
        first = stats[group.targets[0]]
        mean_abs = first.abs_sum / first.tokens
        shared = group.prev == "v"
        if shared:
            mean_abs = _share_over_query_heads(mean_abs, spec)
        best: tuple[float, Tensor, float] | None = None
        for point in range(self.options.scale_points):
            ratio = point / self.options.scale_points
            scale = candidate_scale(mean_abs, ratio)
            if shared:
                scale = _repeat_to_query_heads(scale, spec)
            loss = 0.0
            for role in group.targets:
                scheme, weight = schemes[role], linears[role]
                if scheme.layout == "plain":
                    continue
                loss += _rounding_error(weight, scale, stats[role].gram, scheme)
            if math.isfinite(loss) and (best is None or loss < best[0]):
                best = (loss, scale, ratio)
        if best is None:
            raise InputError("calibration", f"gave no usable scale for {', '.join(group.targets)}", "finite weights and activations")
        return best[1], best[2]

    def _search_clip(self, weight: Tensor, gram: Tensor, scheme: LinearScheme) -> Tensor:
        """The shrink factor of each group's range, [N, G], with the least output error through the group's own Gram block."""
        g = group_of(weight, scheme)
        count = weight.shape[1] // g
        blocks = gram.reshape(count, g, count, g).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [G, g, g]
        best_loss = weight.new_full((weight.shape[0], count), torch.inf)
        best = weight.new_ones(weight.shape[0], count)
        for step in range(CLIP_STEPS + 1):
            shrink = 1.0 - step * (1.0 - CLIP_FLOOR) / CLIP_STEPS
            error = weight - fake_quantize(weight, g, scheme.bits, scheme.sym, shrink)
            error = error.reshape(-1, count, g).transpose(0, 1)  # [G, N, g]
            loss = ((error @ blocks) * error).sum(-1).T  # [N, G]
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best = torch.where(better, shrink, best)
        return best


def create(options: Mapping[str, Any]) -> Awq:
    """Build the method from a recipe's options. Raises InputError for an unknown option or a value out of range."""
    refuse_unknown_options("awq", options, ("scale_points", "clip"))
    points, clip = options.get("scale_points", 20), options.get("clip", True)
    if not isinstance(points, int) or isinstance(points, bool) or not 1 <= points <= 1000:
        raise InputError("options of awq: scale_points", f"is {points!r}", "a whole number from 1 to 1000")
    if not isinstance(clip, bool):
        raise InputError("options of awq: clip", f"is {clip!r}", "true or false")
    return Awq(AwqOptions(points, clip))


METHOD = Method("awq", "activation-aware scaling and clipping", ("awq",), "built-in", create)
