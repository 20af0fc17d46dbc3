"""Experts: routing and mixing by their definition, blocks that stop early, and linears put in each other's place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decoder_fixtures import QWEN2_MOE, batch_of, config_of, logits_of, plan_of, random_twin, rope, texts_of
from torch import Tensor
from torch.nn import functional

from quantkit.arch.spec import Moe, ScaleGroup
from quantkit.arch.table import spec_for
from quantkit.comm import Comm, run_threads
from quantkit.errors import InputError
from quantkit.layouts.plain import DenseLinear
from quantkit.model.decoder import Block
from quantkit.model.load import load_block, load_decoder
from quantkit.model.moe import Steps, mix, route
from quantkit.plan import COPY, ROW


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moe(experts: int, top_k: int, normalize: bool = True, shared: bool = False) -> Moe:
    return Moe(experts, top_k, normalize, shared, (True,))


@pytest.mark.parametrize("normalize", [True, False])
def test_tokens_go_to_the_experts_of_the_highest_probability(normalize: bool) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 3.5]], dtype=torch.float64)
    chosen, weights = route(logits, moe(3, 2, normalize))
    assert chosen.tolist() == [[1, 2], [2, 0]] and weights.dtype == torch.float64
    want = logits.softmax(-1).gather(1, chosen)
    torch.testing.assert_close(weights, want / want.sum(-1, keepdim=True) if normalize else want, rtol=1e-6, atol=0)
    assert route(logits.bfloat16(), moe(3, 2, normalize))[1].dtype == torch.bfloat16


def driven(steps: Steps, weights: dict[str, Tensor], seen: dict[str, int]) -> Tensor:
    """What ``steps`` returns when each linear that it asks for is ``weights`` of its role; ``seen`` counts tokens, in order."""
    try:
        role, x = next(steps)
        while True:
            assert role not in seen, "a linear is asked for once"
            seen[role] = x.shape[0]
            role, x = steps.send(functional.linear(x, weights[role]))
    except StopIteration as done:
        out: Tensor = done.value
        return out


def weights_of(experts: int, hidden: int, ffn: int) -> dict[str, Tensor]:
    found = {"router": randn(experts, hidden, seed=1), "shared_gate": randn(1, hidden, seed=2)}
    for place, prefix in enumerate((*(f"experts.{e}" for e in range(experts)), "shared")):
        shapes = {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
        found |= {f"{prefix}.{kind}": randn(*shape, seed=10 * place + 3 + i) for i, (kind, shape) in enumerate(shapes.items())}
    return found


def one_token(h: Tensor, facts: Moe, weights: dict[str, Tensor]) -> Tensor:
    """The mixture by its definition, for ``h [hidden]``."""

    def mlp(prefix: str) -> Tensor:
        gate, up, down = (weights[f"{prefix}.{kind}"] for kind in ("gate", "up", "down"))
        return down @ (functional.silu(gate @ h) * (up @ h))

    scores = (weights["router"] @ h).softmax(-1, dtype=torch.float32)
    best = sorted(range(facts.experts), key=lambda e: -float(scores[e]))[: facts.top_k]
    total = sum(float(scores[e]) for e in best) if facts.normalize else 1.0
    out = sum((mlp(f"experts.{e}") * (float(scores[e]) / total) for e in best), torch.zeros_like(h))
    return out + torch.sigmoid(weights["shared_gate"] @ h) * mlp("shared") if facts.shared else out


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("experts", "top_k", "normalize"), [(5, 2, True), (5, 2, False), (3, 3, False), (4, 1, True), (1, 1, False)])
def test_a_mixture_is_what_its_definition_says(experts: int, top_k: int, normalize: bool, shared: bool) -> None:
    facts, weights, h = moe(experts, top_k, normalize, shared), weights_of(experts, 6, 4), randn(7, 6)
    seen: dict[str, int] = {}
    got = driven(mix(h, facts, functional.silu), weights, seen)
    torch.testing.assert_close(got, torch.stack([one_token(row, facts, weights) for row in h]), rtol=1e-6, atol=1e-7)
    routed = {role: n for role, n in seen.items() if role.startswith("experts.")}
    assert sum(n for role, n in routed.items() if role.endswith(".up")) == 7 * top_k and all(routed.values())
    assert list(routed) == sorted(routed, key=lambda role: int(role.split(".")[1])), "experts are summed in their order"
    assert seen["router"] == 7 and ("shared.down" in seen) == shared
    alone = torch.cat([driven(mix(row[None], facts, functional.silu), weights, {}) for row in h])
    torch.testing.assert_close(alone, got, rtol=1e-12, atol=1e-12)


def test_no_tokens_reach_no_expert() -> None:
    seen: dict[str, int] = {}
    got = driven(mix(randn(0, 6), moe(4, 2, shared=True), functional.silu), weights_of(4, 6, 4), seen)
    assert got.shape == (0, 6) and not any(role.startswith("experts.") for role in seen)


# blocks


def config() -> dict[str, Any]:
    return config_of("qwen2-moe-steps")  # layers 1 and 3 have experts, 0 and 2 do not


def block(layer: int) -> Block:
    checkpoint = random_twin(config())[1]
    return load_block(checkpoint, spec_for(checkpoint.config), layer, dtype=torch.float64)


def test_layers_have_the_linears_of_their_kind() -> None:
    spec = spec_for(config())
    assert spec.moe is not None and spec.moe.sparse == (False, True, False, True)
    dense, sparse = (set(spec.block_linears(layer)) for layer in (0, 1))
    assert dense == {"q", "k", "v", "o", "gate", "up", "down"}
    experts = {f"experts.{e}.{kind}" for e in range(5) for kind in ("gate", "up", "down")}
    shared = {"shared.gate", "shared.up", "shared.down", "shared_gate"}
    assert sparse == {"q", "k", "v", "o", "router"} | experts | shared
    assert set(spec.linears) == dense | sparse
    assert {role for role, linear in spec.linears.items() if not linear.quantize} == {"router", "shared_gate"}
    assert spec.block_linears(1)["experts.3.up"] == "model.layers.1.mlp.experts.3.up_proj"
    assert [spec.linear_shape(role) for role in ("router", "shared_gate", "experts.0.down", "shared.up")] == [
        (5, 48),
        (1, 48),
        (48, 24),
        (32, 48),
    ]


def test_all_that_reads_the_folded_norm_is_one_scale_group() -> None:
    spec = spec_for(config())
    groups = spec.scale_groups(1)
    readers = ("router", *(f"experts.{e}.{kind}" for e in range(5) for kind in ("gate", "up")), "shared.gate", "shared.up", "shared_gate")
    assert groups[:3] == (ScaleGroup("pre_attention", ("q", "k", "v")), ScaleGroup("v", ("o",)), ScaleGroup("pre_ffn", readers))
    inner = [ScaleGroup(f"experts.{e}.up", (f"experts.{e}.down",)) for e in range(5)]
    assert list(groups[3:]) == [*inner, ScaleGroup("shared.up", ("shared.down",))]
    assert [group.prev for group in spec.scale_groups(0)] == ["pre_attention", "v", "pre_ffn", "up"]


def test_a_tap_sees_the_tokens_that_reach_each_linear() -> None:
    found = block(1)
    seen: dict[str, Tensor] = {}
    x = randn(9, 48)
    found.forward(x, batch_of([(0, 9)]), None, lambda role, value: seen.update({role: value.clone()}))
    for role in ("router", "shared.gate", "shared.up", "shared_gate"):
        assert torch.equal(seen[role], seen["router"]) and seen[role].shape == (9, 48)
    chosen, _ = route(found.linears["router"](seen["router"]), found.moe or moe(0, 0))
    for expert in range(5):
        tokens = (chosen == expert).any(-1)
        assert (f"experts.{expert}.gate" in seen) == bool(tokens.any())
        if tokens.any():
            assert torch.equal(seen[f"experts.{expert}.gate"], seen["router"][tokens])
            assert seen[f"experts.{expert}.down"].shape == (int(tokens.sum()), 24)


@pytest.mark.parametrize(("until", "last"), [(("q", "k", "v"), "v"), (("o",), "o"), (("router",), "router"), (("up", "gate"), "up")])
def test_a_block_stops_when_all_that_was_asked_for_is_seen(until: tuple[str, ...], last: str) -> None:
    found = block(1 if "router" in until else 0)
    ran: list[str] = []
    for role, linear in found.linears.items():
        found.replace(role, Counting(linear.op, role, ran))
    seen: list[str] = []
    found.observe(randn(5, 48), batch_of([(0, 5)]), lambda role, _: seen.append(role), frozenset(until))
    assert seen[-1] == last and set(until) <= set(seen)
    assert ran == seen[:-1], "the last linear is not run"


class Counting:
    """A linear that says when it runs."""

    def __init__(self, op: Any, role: str, ran: list[str]) -> None:
        self.op, self.role, self.ran = op, role, ran
        self.bias, self.nbytes = op.bias, op.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        self.ran.append(self.role)
        out: Tensor = self.op(x)
        return out


def test_an_expert_without_tokens_lets_the_block_run_to_its_end() -> None:
    found, seen = block(1), list[str]()
    wanted = frozenset(f"experts.{e}.gate" for e in range(5))
    found.observe(randn(1, 48), batch_of([(0, 1)]), lambda role, _: seen.append(role), wanted)
    assert not wanted <= set(seen) and seen[-1] == "shared.down"


def test_a_replaced_linear_is_the_one_that_runs() -> None:
    found, x, batch = block(1), randn(6, 48), batch_of([(0, 6)])
    before = found.forward(x, batch)
    role = next(role for role in found.linears if role.endswith(".down") and "shared" in role)
    found.replace(role, DenseLinear(torch.zeros(48, 32, dtype=torch.float64), None))
    attended: dict[str, Tensor] = {}
    after = found.forward(x, batch, None, lambda name, value: attended.update({name: value}))
    assert not torch.allclose(before, after)
    found.replace("o", DenseLinear(torch.zeros_like(randn(48, 72)), None))
    assert not torch.allclose(found.forward(x, batch), after)


# ranks


def test_experts_are_cut_within_and_gates_are_whole() -> None:
    checkpoint = random_twin(config_of("qwen2-moe"))[1]
    plan = plan_of(checkpoint, 3)
    assert plan.modes["router"] == plan.modes["shared_gate"] == COPY
    assert plan.modes["experts.4.down"] == plan.modes["shared.down"] == ROW
    texts = texts_of((9, 5))

    def rank(comm: Comm) -> tuple[list[Tensor], dict[str, int]]:
        with torch.no_grad():
            decoder = load_decoder(checkpoint, dtype=torch.float64, plan=plan, comm=comm)
            sizes = {role: linear.op.nbytes for role, linear in decoder.blocks[0].linears.items()}
            return logits_of(decoder, texts), sizes

    parts = run_threads(3, rank)
    assert {sizes["router"] for _, sizes in parts} == {5 * 48 * 8}
    for role, rows in (("experts.0.up", 24), ("shared.up", 32), ("experts.0.down", 24)):
        assert sum(sizes[role] for _, sizes in parts) == rows * 48 * 8, role
    assert all(torch.equal(a, b) for logits, _ in parts[1:] for a, b in zip(parts[0][0], logits, strict=True))


# configurations


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": 100_000}, "num_experts"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
        ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers"),
        ({"mlp_only_layers": [[]]}, "mlp_only_layers"),
    ],
)
def test_expert_facts_out_of_range_are_refused(change: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError, match=f"config.json: {where}"):
        spec_for(config_of("qwen2-moe") | change)


def test_layers_of_a_family_without_a_dense_mlp_all_have_experts() -> None:
    """Keys of other families are not Mixtral's: its layers have nothing else to be."""
    spec = spec_for(config_of("mixtral") | {"decoder_sparse_step": 2, "mlp_only_layers": [0]})
    assert spec.moe is not None and spec.moe.sparse == (True, True, True) and "ffn" not in spec.dims


def test_the_number_of_experts_has_two_names() -> None:
    values = config_of("mixtral")
    del values["num_local_experts"]
    assert spec_for(values).dims["experts"].size == 8
    assert spec_for(values | {"num_experts": 4}).dims["experts"].size == 4


def test_a_model_may_have_experts_nowhere() -> None:
    values = {**config_of("qwen2-moe"), **QWEN2_MOE, **rope("default"), "mlp_only_layers": [0, 1, 2]}
    spec = spec_for(values)
    assert set(spec.linears) == {"q", "k", "v", "o", "gate", "up", "down"} and "expert_ffn" not in spec.dims
    model, checkpoint = random_twin(values)
    (text,) = texts_of((8,))
    (got,) = logits_of(load_decoder(checkpoint, dtype=torch.float64), [text])
    assert float((got - model(text[None]).logits[0]).abs().max()) < 1e-8
