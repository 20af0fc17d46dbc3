"""AWQ: its searches against running the layer, its folding against the unfolded model, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from decoder_fixtures import MemoryCheckpoint, config_of, logits_of, random_twin, texts_of
from torch import Tensor

from quantkit.arch.spec import ModelSpec, ScaleGroup
from quantkit.arch.table import spec_for
from quantkit.errors import InputError
from quantkit.model.decoder import Batch
from quantkit.model.load import embedded, load_block, load_decoder
from quantkit.ops.grouped import dequantize
from quantkit.quantizers import awq, rtn
from quantkit.quantizers.awq import Awq, AwqOptions, candidate_scale, create, fold_scale, output_error
from quantkit.quantizers.base import BlockFit, BlockWeights, InputStats
from quantkit.quantizers.calibration import StatsCollector, owners
from quantkit.quantizers.pipeline import Source
from quantkit.scheme import KEEP, LinearScheme

FOLDED = ("llama", "llama-biases", "llama-mqa", "mistral", "qwen2", "qwen3-bias-sliding", "gemma3", "gemma3-pattern-softcap")
W4 = LinearScheme("awq", "awq", 4, 8, False)


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def block_of(family: str, layer: int = 0) -> tuple[ModelSpec, BlockWeights, dict[str, InputStats], dict[str, Tensor], MemoryCheckpoint]:
    """A random block, the statistics of its inputs over a text, and those inputs themselves by role."""
    _, checkpoint = random_twin(config_of(family), torch.float32)
    spec = spec_for(checkpoint.config)
    collector, inputs = StatsCollector(owners(spec, layer), spec.block_linears(layer), frozenset({"gram"})), dict[str, Tensor]()

    def tap(role: str, x: Tensor) -> None:
        collector.tap(role, x)
        inputs[role] = x

    with torch.inference_mode():
        x = embedded(checkpoint, spec, texts_of((60,))[0][None], dtype=torch.float32)[0]
        load_block(checkpoint, spec, layer, dtype=torch.float32).forward(x, Batch(torch.arange(60), (60,), None), None, tap)
    return spec, Source(checkpoint, spec, "F32", torch.float32, ("cpu",)).block(layer), collector.stats(), inputs, checkpoint


def plain_round(weight: Tensor, group: int) -> Tensor:
    """Asymmetric 4-bit rounding, written out from its definition (``formats.md`` 2.3)."""
    groups = weight.reshape(weight.shape[0], -1, group)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-5).half().float()
    zero = torch.round(-low / scale).clamp(0, 15)
    return ((torch.round(groups / scale) + zero).clamp(0, 15) - zero).mul(scale).reshape(weight.shape)


def test_output_error_is_that_of_running_the_layer() -> None:
    x, error = (
        torch.randn(200, 48, generator=generator(), dtype=torch.float64),
        torch.randn(30, 48, generator=generator(1), dtype=torch.float64),
    )
    assert output_error(error, x.T @ x) == pytest.approx(float((x @ error.T).square().sum()), rel=1e-12)


def test_candidate_scale_multiplies_its_extremes_to_one() -> None:
    scale = candidate_scale(torch.tensor([0.0, 0.5, 3.0, 40.0]), 0.7)
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-5)
    assert torch.equal(candidate_scale(torch.tensor([0.2, 5.0]), 0.0), torch.ones(2))


def test_scale_search_takes_what_running_the_layer_would_take() -> None:
    spec, block, stats, inputs, _ = block_of("llama")
    fit = Awq(AwqOptions(clip=False, duo=False)).fit(block, stats, dict.fromkeys(spec.linears, W4), spec)
    for first, roles in (("q", ("q", "k", "v")), ("gate", ("gate", "up")), ("down", ("down",))):
        x = inputs[first]
        errors = []
        for point in range(20):
            scale = candidate_scale(x.abs().mean(0), point / 20)
            errors.append(
                sum(float((x @ (block.linears[r] - plain_round(block.linears[r] * scale, 8) / scale).T).square().sum()) for r in roles)
            )
        chosen = round(fit.facts[first].get("scale_ratio", 0.0) * 20)
        assert errors[chosen] == pytest.approx(min(errors), rel=1e-3)
        assert min(errors) < errors[0], "a search that cannot help would prove nothing"


def test_scales_that_look_at_the_weights_too_are_taken_where_they_lose_less() -> None:
    spec, block, stats, _, _ = block_of("llama")
    schemes = dict.fromkeys(spec.linears, W4)
    plain, duo = (Awq(AwqOptions(clip=False, duo=duo)).fit(block, stats, schemes, spec).facts for duo in (False, True))
    assert any(facts.get("duo") for facts in duo.values())
    for roles in (("q", "k", "v"), ("down",)):
        whole = {r: float((block.linears[r] @ stats[r].gram * block.linears[r]).sum()) for r in roles}
        lost = [sum(facts[r]["output_error"] ** 2 * whole[r] for r in roles) for facts in (plain, duo)]
        assert lost[1] <= lost[0] * (1 + 1e-3)
    assert duo["down"]["output_error"] <= plain["down"]["output_error"]


def test_the_scale_of_o_is_shared_by_the_query_heads_of_a_kv_head() -> None:
    spec, block, stats, inputs, _ = block_of("llama")
    group = next(group for group in spec.scale_groups(0) if group.prev == "v")
    scale, kind = Awq(AwqOptions(duo=False))._search_scale(
        group, block.linears, stats, dict.fromkeys(spec.linears, W4), spec, block.devices
    )
    assert scale is not None
    ratio = kind["scale_ratio"]
    kv, per_kv = spec.dims["kv_heads"].size, spec.dims["heads"].size // spec.dims["kv_heads"].size
    heads = scale.reshape(kv, per_kv, spec.head_dim)
    assert per_kv == 2 and torch.equal(heads, heads[:, :1].expand_as(heads))
    mean = inputs["o"].abs().mean(0).reshape(kv, per_kv, -1).mean(1).reshape(-1)
    errors = []
    for point in range(20):
        shared = candidate_scale(mean, point / 20).reshape(kv, 1, -1).expand(kv, per_kv, -1).reshape(-1)
        error = block.linears["o"] - plain_round(block.linears["o"] * shared, 8) / shared
        errors.append(float((inputs["o"] @ error.T).square().sum()))
    assert errors[round(ratio * 20)] == pytest.approx(min(errors), rel=1e-3)
    assert ratio > 0 and float(scale.std()) > 0


def test_the_error_it_states_is_that_of_running_the_scaled_layer() -> None:
    """And so the clipping is judged on the inputs that the scaled layer will see, not on those before scaling."""
    spec, block, stats, inputs, _ = block_of("llama")
    fit = Awq(AwqOptions()).fit(block, stats, dict.fromkeys(spec.linears, W4), spec)
    for norm, role in (("pre_attention", "v"), ("pre_ffn", "gate")):
        scale = block.norms[norm] / fit.norms[norm]
        assert float((scale - 1).abs().max()) > 0.01
        weight = dequantized(fit, role)
        before, after = inputs[role] @ block.linears[role].T, (inputs[role] / scale) @ weight.T
        if role == "v":  # its rows were divided for o
            rows = ((after * before).sum(0) / (before * before).sum(0)).unsqueeze(0)
            after = after / rows
        found = float((after - before).norm() / before.norm())
        assert fit.facts[role]["output_error"] == pytest.approx(found, rel=1e-3 if role == "gate" else 0.2)


def test_clip_search_takes_the_best_of_each_group_on_its_own_inputs() -> None:
    spec, block, stats, inputs, _ = block_of("llama")
    del spec
    weight, x = block.linears["o"], inputs["o"]
    chosen = Awq(AwqOptions())._search_clip(weight, stats["o"].gram, W4)  # [N, G]
    candidates = 1 - torch.arange(11) * 0.05
    groups = weight.reshape(weight.shape[0], -1, 8)
    losses = []
    for shrink in candidates:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0) * shrink, groups.amax(-1, keepdim=True).clamp(min=0) * shrink
        scale = ((high - low) / 15).clamp(min=1e-5).half().float()
        zero = torch.round(-low / scale).clamp(0, 15)
        error = groups - ((torch.round(groups / scale) + zero).clamp(0, 15) - zero) * scale
        losses.append(torch.einsum("tgk,ngk->ngt", x.reshape(x.shape[0], -1, 8), error).square().sum(-1))
    table = torch.stack(losses)  # [steps, N, G]
    picked = torch.stack([(chosen - c).abs() for c in candidates]).argmin(0)
    assert torch.allclose(table.gather(0, picked[None])[0], table.amin(0), rtol=1e-2, atol=1e-6)
    assert float((chosen < 1).float().mean()) > 0.1


@pytest.mark.parametrize("family", FOLDED)
@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16])
def test_folding_leaves_the_model_as_it_was(family: str, stored: torch.dtype) -> None:
    _, checkpoint = random_twin(config_of(family))
    spec, values = spec_for(checkpoint.config), dict(checkpoint.values)
    kv, queries = spec.dims["kv_heads"].size, spec.dims["heads"].size
    for layer in range(spec.layers):
        names = {role: spec.tensor(layer, item.name) for role, item in spec.linears.items()}
        norm_names = {role: spec.tensor(layer, item.name) + ".weight" for role, item in spec.norms.items()}
        linears = {role: values[f"{name}.weight"] for role, name in names.items()}
        biases = {role: values[f"{name}.bias"] for role, name in names.items() if f"{name}.bias" in values}
        norms = {role: values[name] for role, name in norm_names.items()}
        for place, group in enumerate(spec.scale_groups(0)):
            width = linears[group.targets[0]].shape[1]
            scale = torch.exp(torch.randn(width, generator=generator(10 * layer + place), dtype=torch.float64))
            if group.prev == "v":
                scale = scale.reshape(kv, queries // kv, -1)[:, :1].expand(-1, queries // kv, -1).reshape(-1)
            fold_scale(group, scale, linears, biases, norms, {}, dict.fromkeys(norms, stored), spec)
        for role, name in names.items():
            assert not torch.equal(values[f"{name}.weight"], linears[role]) or role not in ("q", "o", "gate", "down")
            values[f"{name}.weight"] = linears[role]
            if role in biases:
                values[f"{name}.bias"] = biases[role]
        values |= {name: norms[role] for role, name in norm_names.items()}
    texts = texts_of((9, 14))
    before = logits_of(load_decoder(checkpoint, dtype=torch.float64), texts)
    after = logits_of(load_decoder(MemoryCheckpoint(checkpoint.config, values), dtype=torch.float64), texts)
    # RmsNorm computes in float32, so a folded norm differs by that rounding; a wrong fold differs by whole numbers.
    assert max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)) < 2e-4
    assert max(float(a.abs().max()) for a in before) > 1


@pytest.mark.parametrize(("gain", "scale"), [(2.0**-8, 50.0), (0.0, 3.0), (1e4, 1e-36)])
def test_a_gain_that_its_dtype_cannot_hold_stays_as_it_is(gain: float, scale: float) -> None:
    """Gemma stores gain - 1: in bfloat16 a small gain would fold to nothing; in float16 a great one to infinity."""
    spec = spec_for(config_of("gemma3"))
    hidden = spec.dims["hidden"].size
    norms = {"pre_ffn": torch.full((hidden,), gain - 1, dtype=torch.float64)}
    linears = {"gate": torch.ones(8, hidden, dtype=torch.float64), "up": torch.ones(8, hidden, dtype=torch.float64)}
    dtypes = {"pre_ffn": torch.float16 if gain > 1 else torch.bfloat16}
    folded = fold_scale(
        ScaleGroup("pre_ffn", ("gate", "up")), torch.full((hidden,), scale, dtype=torch.float64), linears, {}, norms, {}, dtypes, spec
    )
    assert torch.isfinite(norms["pre_ffn"]).all()
    assert torch.isfinite(folded).all()
    assert torch.allclose((norms["pre_ffn"] + 1) * linears["gate"][0], torch.full((hidden,), gain, dtype=torch.float64), rtol=1e-12)


def dequantized(fit: BlockFit, role: str) -> Tensor:
    found = fit.results[role]
    return dequantize(found.codes, found.scales, found.zeros)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("kept", [(), ("v",), ("o",), ("q", "k", "v"), ("up", "down"), ("gate",)])
def test_a_fitted_block_computes_nearly_what_it_did(family: str, kept: tuple[str, ...]) -> None:
    """Whatever is kept in floats: every consumer of what was folded is scaled, and v's bias is divided."""
    spec, block, stats, _, checkpoint = block_of(family)
    schemes = {role: KEEP if role in kept else W4 for role in spec.linears}
    fit = Awq(AwqOptions()).fit(block, stats, schemes, spec)
    assert set(fit.results) == set(spec.linears) - set(kept)
    assert set(fit.linears) <= set(kept)
    values = dict(checkpoint.values)
    for role, item in spec.linears.items():
        path = spec.tensor(0, item.name)
        values[f"{path}.weight"] = fit.linears.get(role, block.linears[role]) if role in kept else dequantized(fit, role)
        if role in fit.biases:
            values[f"{path}.bias"] = fit.biases[role]
            assert role not in fit.results or torch.equal(fit.results[role].bias, fit.biases[role])  # type: ignore[arg-type]
    values |= {spec.tensor(0, spec.norms[role].name) + ".weight": norm for role, norm in fit.norms.items()}
    x = embedded(checkpoint, spec, texts_of((60,))[0][None], dtype=torch.float32)[0]
    batch = Batch(torch.arange(60), (60,), None)
    before = load_block(checkpoint, spec, 0, dtype=torch.float32).forward(x, batch) - x
    after = load_block(MemoryCheckpoint(checkpoint.config, values), spec, 0, dtype=torch.float32).forward(x, batch) - x
    assert float((after - before).norm() / before.norm()) < 0.25


def test_nothing_is_scaled_for_a_group_that_is_kept_whole() -> None:
    spec, block, stats, _, _ = block_of("llama")
    schemes = {role: KEEP if role in ("gate", "up", "down") else W4 for role in spec.linears}
    fit = Awq(AwqOptions()).fit(block, stats, schemes, spec)
    assert not fit.linears
    assert torch.equal(fit.norms["pre_ffn"], block.norms["pre_ffn"])
    assert not torch.equal(fit.norms["pre_attention"], block.norms["pre_attention"])


def test_without_scaling_and_clipping_it_is_rtn() -> None:
    spec, block, stats, _, _ = block_of("llama")
    schemes = dict.fromkeys(spec.linears, W4)
    fit = Awq(AwqOptions(scale_points=1, clip=False)).fit(block, stats, schemes, spec)
    plain = rtn.METHODS[0].factory({}).fit(block, {}, schemes, spec)
    for role in spec.linears:
        assert torch.equal(fit.results[role].codes, plain.results[role].codes)
        assert torch.equal(fit.results[role].scales, plain.results[role].scales)


@pytest.mark.parametrize("group", [8, -1])
@pytest.mark.parametrize("sym", [False, True])
def test_it_beats_rtn_on_the_outputs_of_every_linear_it_scales(group: int, sym: bool) -> None:
    spec, block, stats, _, _ = block_of("qwen2")
    schemes = dict.fromkeys(spec.linears, LinearScheme("awq", "awq", 4, group, sym))
    fit = Awq(AwqOptions()).fit(block, stats, schemes, spec)
    plain = rtn.METHODS[0].factory({}).fit(block, {}, schemes, spec)
    ours = theirs = 0.0
    for role in spec.linears:
        gram, weight = stats[role].gram, block.linears[role]
        ours += fit.facts[role]["output_error"]
        theirs += math.sqrt(output_error(weight - dequantized(plain, role), gram) / output_error(weight, gram))
        assert not sym or bool((fit.results[role].zeros == 8).all())
    assert ours < 0.97 * theirs


def test_the_same_fit_twice_is_the_same() -> None:
    spec, block, stats, _, _ = block_of("llama")
    first, second = (Awq(AwqOptions()).fit(block, stats, dict.fromkeys(spec.linears, W4), spec) for _ in range(2))
    assert first.facts == second.facts
    assert all(torch.equal(first.results[role].codes, second.results[role].codes) for role in spec.linears)


def test_weights_that_are_not_finite_are_named() -> None:
    spec, block, stats, _, _ = block_of("llama")
    block.linears["gate"][1, 2] = float("inf")  # type: ignore[index]
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.gate_proj: holds 1 values that are not finite"):
        Awq(AwqOptions()).fit(block, stats, dict.fromkeys(spec.linears, W4), spec)


def test_statistics_that_are_not_finite_are_refused() -> None:
    spec, block, stats, _, _ = block_of("llama")
    broken = {role: InputStats(s.gram * float("nan"), s.abs_sum, s.abs_max, s.tokens) for role, s in stats.items()}
    with pytest.raises(InputError, match="calibration: gave no usable scale for q, k, v"):
        Awq(AwqOptions()).fit(block, broken, dict.fromkeys(spec.linears, W4), spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 3}, "unknown option 'points', expected one of scale_points, clip, duo"),
        ({"scale_points": 0}, "is 0"),
        ({"scale_points": True}, "is True"),
        ({"clip": "yes"}, "is 'yes'"),
    ],
)
def test_options_are_validated(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create(options)
    assert create({"scale_points": 5, "clip": False}).options == AwqOptions(5, False)
    assert awq.METHOD.facts.formats[0] == "awq"
