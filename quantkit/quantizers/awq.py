"""AWQ: scale the channels that matter before rounding, then clip each group. Source: Lin et al. 2023 (arXiv 2306.00978).

Both searches judge the error of the linear's output over the calibration tokens, through the Gram matrix of its
inputs: for an error matrix D the summed squared output error is tr(D H D^T), which is what running the tokens through
the layer would give, at a fraction of the work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.arch.spec import ModelSpec, ScaleGroup
from quantkit.errors import InputError
from quantkit.layouts.base import Neutral, SuperBlock, on_device, with_bias
from quantkit.ops.dtypes import TORCH_DTYPES
from quantkit.ops.ggml.decode import decode
from quantkit.ops.ggml.tensor import encode_tensor
from quantkit.ops.grouped import dequantize, fake_quantize
from quantkit.quant_config import is_kept
from quantkit.quantizers.base import FLOAT, BlockFit, BlockWeights, InputStats, built_in, choice, number, refuse_unknown_options
from quantkit.quantizers.devices import each, spread
from quantkit.quantizers.rtn import group_of, min_zero, refuse_not_finite, round_to_nearest
from quantkit.scheme import LinearScheme

CLIP_STEPS = 10
CLIP_FLOOR = 0.5
UNCLIPPED_ROLES = frozenset({"q", "k"})
"""Their outputs meet in a product before the softmax; clipping them by their own output error hurts (AWQ, section 5.1)."""


@dataclass(frozen=True, slots=True)
class AwqOptions:
    """``scale_points``: candidates of the scale exponent in [0, 1); 1 turns scaling off. ``clip``: search the clipping too.

    ``duo``: also try scales that shrink with the size of the weights that they multiply.
    """

    scale_points: int = 20
    clip: bool = True
    duo: bool = True


def output_error(error: Tensor, gram: Tensor) -> float:
    """tr(D H D^T) for ``error`` D [N, K] and ``gram`` H [K, K]: rows in their own dtype, summed in float64."""
    return float(((error @ gram) * error).sum(-1).sum(dtype=torch.float64))


def candidate_scale(mean_abs: Tensor, ratio: float, weight_mean: Tensor | None = None) -> Tensor:
    """``mean_abs [K]`` to the power ``ratio``, over ``weight_mean [K]`` to the power ``1 - ratio`` where that is given.

    Centred so that the greatest and the least scale multiply to 1.
    """
    scale = mean_abs.clamp(min=1e-4).pow(ratio)
    if weight_mean is not None:
        scale = (scale / weight_mean.clamp(min=1e-4).pow(1 - ratio)).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def mean_weight(weights: Sequence[Tensor], group_size: int) -> Tensor:
    r"""How large the weights of each input are within their group, [K]: the mean over all outputs of \|w\| / max of the group."""
    total = sum(w.shape[0] for w in weights)
    k = weights[0].shape[1]
    summed = weights[0].new_zeros(k)
    for weight in weights:
        groups = weight.abs().reshape(weight.shape[0], k // group_size, group_size)
        summed += (groups / groups.amax(-1, keepdim=True).clamp(min=1e-6)).sum(0).reshape(-1)
    return summed / total


def _share_over_query_heads(values: Tensor, spec: ModelSpec) -> Tensor:
    """Mean over the query heads that read one KV head: ``[heads * head_dim]`` -> ``[kv_heads * head_dim]``."""
    kv = spec.dims["kv_heads"].size
    return values.reshape(kv, -1, spec.head_dim).mean(1).reshape(-1)


def _repeat_to_query_heads(scale: Tensor, spec: ModelSpec) -> Tensor:
    """Inverse of the sharing: ``[kv_heads * head_dim]`` -> ``[heads * head_dim]``."""
    kv, queries = spec.dims["kv_heads"].size, spec.dims["heads"].size
    return scale.reshape(kv, 1, spec.head_dim).expand(kv, queries // kv, spec.head_dim).reshape(-1)


def _blocks(weight: Tensor, scheme: LinearScheme, gram: Tensor) -> SuperBlock:
    """``weight [N, K]`` in ggml's blocks, whose search weighs each input by its mean square: the diagonal of ``gram [K, K]``."""
    power = gram.diagonal()
    mean = power.mean()
    return SuperBlock(encode_tensor(weight, scheme.code, power / mean if mean > 0 else None), scheme.code)


def _on_grid(weight: Tensor, scheme: LinearScheme, shrink: Tensor | float = 1.0) -> Tensor:
    """``weight [N, K]`` as ``scheme`` would store it."""
    scales = TORCH_DTYPES[scheme.scale_dtype]
    return fake_quantize(weight, group_of(weight, scheme), scheme.bits, scheme.sym, shrink, scales, min_zero(scheme))


def _named_blocks(weight: Tensor, scheme: LinearScheme, gram: Tensor, where: str) -> SuperBlock:
    try:
        return _blocks(weight, scheme, gram)
    except InputError as exc:
        raise InputError(where, exc.what, exc.expected, exc.hint) from exc


def _relative_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """The output error of ``rounded`` relative to the outputs themselves."""
    error = output_error(weight - rounded, gram)
    return round(math.sqrt(max(error, 0.0) / max(output_error(weight, gram), 1e-30)), 6)


def _rounding_error(weight: Tensor, scale: Tensor, gram: Tensor, scheme: LinearScheme) -> float:
    """Output error of ``weight [N, K]`` when it is rounded as ``weight * scale``; infinite where that leaves float16."""
    try:
        scaled = weight * scale
        if scheme.layout == "ggml":
            rounded = decode(_blocks(scaled, scheme, gram / torch.outer(scale, scale)).blocks, scheme.code) / scale
        else:
            rounded = _on_grid(scaled, scheme) / scale
    except InputError:  # this scale makes weights too large to store; another will not
        return math.inf
    return output_error(weight - rounded, gram)


def fold_scale(
    group: ScaleGroup,
    scale: Tensor,
    linears: dict[str, Tensor],
    biases: dict[str, Tensor],
    norms: dict[str, Tensor],
    norm_biases: dict[str, Tensor],
    norm_dtypes: Mapping[str, Any],
    spec: ModelSpec,
) -> Tensor:
    """Divide the op before ``group`` by ``scale [K]`` and multiply the targets' inputs by it: the block computes the same.

    Changes ``linears``, ``biases``, ``norms`` and ``norm_biases`` by role. ``scale`` of the group after v is one for all query heads
    of a KV head. Returns the scale that was really folded, after rounding to the norm's stored dtype.
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
        if prev in norm_biases:
            norm_biases[prev] = norm_biases[prev] / scale
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
    inputs = FLOAT

    def __init__(self, options: AwqOptions) -> None:
        self.options = options

    def fit(self, block: BlockWeights, stats: Mapping[str, InputStats], schemes: Mapping[str, LinearScheme], spec: ModelSpec) -> BlockFit:
        before = dict(block.linears)
        for role, weight in before.items():
            refuse_not_finite(weight, spec.tensor(block.layer, spec.linears[role].name))
        linears, biases = dict(before), dict(block.biases)
        norms, norm_biases = dict(block.norms), dict(block.norm_biases)
        input_scales: dict[str, Tensor] = {}  # role -> [K], the scale that its input was divided by
        facts: dict[str, Any] = {}
        for group in spec.scale_groups(block.layer):
            if all(is_kept(schemes[role]) or schemes[role].method != self.name for role in group.targets):
                continue
            scale, kind = self._search_scale(group, linears, stats, schemes, spec, block.devices)
            if scale is None:
                continue
            scale = fold_scale(group, scale, linears, biases, norms, norm_biases, block.norm_dtypes, spec)
            for role in group.targets:
                input_scales[role] = scale
                if not is_kept(schemes[role]):
                    facts.setdefault(role, {}).update(kind)
        roles = [role for role in linears if not is_kept(schemes[role]) and schemes[role].method == self.name]

        def work(job: int, device: str) -> tuple[Neutral, dict[str, Any]]:
            role = roles[job]
            where = spec.tensor(block.layer, spec.linears[role].name)
            gram, scale = stats[role].gram.to(device), input_scales.get(role)
            if scale is not None:
                gram = gram / torch.outer(scale, scale).to(device)
            return self._round(role, linears[role].to(device), gram, schemes[role], where)

        costs = [linears[role].numel() * linears[role].shape[1] for role in roles]
        results = {}
        for role, (found, measured) in zip(roles, spread(block.devices, costs, work), strict=True):
            results[role] = with_bias(on_device(found, block.devices[0]), biases.get(role))
            borrowed = {"borrowed_statistics": True} if stats[role].borrowed else {}
            facts[role] = {**facts.get(role, {}), **borrowed, **measured}
        changed = {role: weight for role, weight in linears.items() if role not in results and weight is not before[role]}
        return BlockFit(results, changed, biases, norms, norm_biases, facts)

    def _round(self, role: str, weight: Tensor, gram: Tensor, scheme: LinearScheme, where: str) -> tuple[Neutral, dict[str, Any]]:
        """``weight [N, K]`` on its grid, clipped where that helps its outputs over ``gram [K, K]``; and how good that is.

        ggml's blocks are not clipped: their encoder searches each block's range itself.
        """
        if scheme.layout == "ggml":
            blocks = _named_blocks(weight, scheme, gram, where)
            return blocks, {"output_error": _relative_error(weight, decode(blocks.blocks, scheme.code), gram)}
        shrink = weight.new_ones(weight.shape[0], weight.shape[1] // group_of(weight, scheme))  # [N, G]
        if self.options.clip and role not in UNCLIPPED_ROLES:
            shrink = self._search_clip(weight, gram, scheme)
        found = round_to_nearest(weight, scheme, where, shrink)
        return found, {
            "clipped": round(float((shrink < 1).float().mean()), 6),
            "output_error": _relative_error(weight, dequantize(found.codes, found.scales, found.zeros), gram),
        }

    def _search_scale(
        self,
        group: ScaleGroup,
        linears: Mapping[str, Tensor],
        stats: Mapping[str, InputStats],
        schemes: Mapping[str, LinearScheme],
        spec: ModelSpec,
        devices: tuple[str, ...],
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The per-input scale [K] with the least summed output error of the group's targets, None for no scaling; and its facts.

        The candidates are dealt over ``devices``, to each of which the weights and Gram matrices are copied. Raises InputError when no
        candidate gives a finite error.
        """
        chosen = [role for role in group.targets if not is_kept(schemes[role]) and schemes[role].method == self.name]
        first = stats[group.targets[0]]
        mean_abs = first.abs_sum / first.tokens
        shared = group.prev == "v"
        if shared:
            mean_abs = _share_over_query_heads(mean_abs, spec)
        weights = mean_weight([linears[role] for role in chosen], group_of(linears[chosen[0]], schemes[chosen[0]]))
        if shared:
            weights = _share_over_query_heads(weights, spec)
        points = self.options.scale_points
        candidates: list[tuple[Tensor | None, dict[str, Any]]] = [(None, {})]
        candidates += [(candidate_scale(mean_abs, point / points), {"scale_ratio": point / points}) for point in range(1, points)]
        duo = range(points if self.options.duo and points > 1 else 0)
        candidates += [(candidate_scale(mean_abs, point / points, weights), {"scale_ratio": point / points, "duo": True}) for point in duo]
        if shared:
            candidates = [(None if scale is None else _repeat_to_query_heads(scale, spec), kind) for scale, kind in candidates]

        def search(index: int, device: str) -> list[float]:
            """The losses of every candidate that is this device's: one of as many as there are devices."""
            grams = {id(stats[role].gram): stats[role].gram.to(device) for role in chosen}
            mine = [(linears[role].to(device), grams[id(stats[role].gram)], schemes[role]) for role in chosen]
            losses = []
            for candidate, _ in candidates[index :: len(devices)]:
                scale = torch.ones_like(mine[0][0][0]) if candidate is None else candidate.to(device)
                losses.append(sum(_rounding_error(weight, scale, gram, scheme) for weight, gram, scheme in mine))
            return losses

        found = each(devices, search)
        losses = [found[place % len(devices)][place // len(devices)] for place in range(len(candidates))]
        usable = [place for place, loss in enumerate(losses) if math.isfinite(loss)]
        if not usable:
            raise InputError("calibration", f"gave no usable scale for {', '.join(group.targets)}", "finite weights and activations")
        return candidates[min(usable, key=losses.__getitem__)]

    def _search_clip(self, weight: Tensor, gram: Tensor, scheme: LinearScheme) -> Tensor:
        """The shrink factor of each group's range, [N, G], with the least output error through the group's own Gram block."""
        g = group_of(weight, scheme)
        count = weight.shape[1] // g
        blocks = gram.reshape(count, g, count, g).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [G, g, g]
        best_loss = weight.new_full((weight.shape[0], count), torch.inf)
        best = weight.new_ones(weight.shape[0], count)
        for step in range(CLIP_STEPS + 1):
            shrink = 1.0 - step * (1.0 - CLIP_FLOOR) / CLIP_STEPS
            error = weight - _on_grid(weight, scheme, shrink)
            error = error.reshape(-1, count, g).transpose(0, 1)  # [G, N, g]
            loss = ((error @ blocks) * error).sum(-1).T  # [N, G]
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best = torch.where(better, shrink, best)
        return best


def create(options: Mapping[str, Any]) -> Awq:
    """Build the method from a recipe's options. Raises InputError for an unknown option or a value out of range."""
    refuse_unknown_options("awq", options, ("scale_points", "clip", "duo"))
    points = int(number("awq", options, "scale_points", 20, 1, 1000))
    flags = {key: choice("awq", options, key, True, (True, False)) for key in ("clip", "duo")}
    return Awq(AwqOptions(points, **flags))


METHOD = built_in("awq", "activation-aware scaling and clipping", create)
