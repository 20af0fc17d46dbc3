"""Laws of ParallelPlan over random models: cover, granules, determinism, the JSON round trip, tampering, balance, bytes."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.errors import InputError
from quantkit.geometry import GGML_BLOCKS, ggml_scheme
from quantkit.plan import ParallelPlan, block_geometries, equal_split_obstacles, make_plan, rank_memory
from quantkit.scheme import KEEP, Assignment, LinearScheme


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelSpec, Assignment]:
    """A model whose layers may be stored differently, each in a way that holds its shapes."""
    kv, group, head_dim = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.sampled_from([8, 32, 64, 96, 128]))
    unit = draw(st.sampled_from([8, 32, 64, 128]))
    spec = spec_for(
        {
            "model_type": draw(st.sampled_from(["llama", "qwen2", "qwen3"])),
            "num_hidden_layers": 2,
            "hidden_size": unit * draw(st.integers(1, 6)),
            "intermediate_size": unit * draw(st.integers(1, 40)),
            "num_attention_heads": kv * group,
            "num_key_value_heads": kv,
            "head_dim": head_dim,
            "vocab_size": draw(st.integers(1, 1000)),
            "tie_word_embeddings": draw(st.booleans()),
        }
    )
    assignment = {}
    for name in spec.all_linears():
        role = next((role for role, linear in spec.linears.items() if name.endswith(linear.name)), None)
        assignment[name] = KEEP
        if role is not None and draw(st.booleans()):
            k = spec.linear_shape(role)[1]
            fitting = [LinearScheme("awq", "awq", 4, size) for size in (-1, 8, 32, 64, 128) if size == -1 or k % size == 0]
            fitting += [ggml_scheme(kind) for kind in ("Q5_0", "Q4_K", "Q6_K") if k % GGML_BLOCKS[kind].elements == 0]
            fitting += [LinearScheme("fp8", "fp8_block", 8, 128, True, "F32")]
            assignment[name] = draw(st.sampled_from(fitting))
    return spec, assignment


def together(spec: ModelSpec, assignment: Assignment) -> int:
    """How many KV heads no cut parts: the fewest whose keys, values and queries end where every granule does."""
    heads, kv, width = spec.dims["heads"].size, spec.dims["kv_heads"].size, spec.head_dim
    granules: dict[str, int] = {}
    for role, _, geometry in block_geometries(spec, assignment, dtype="BF16"):
        granules[role] = math.lcm(granules.get(role, 1), geometry.granule("N"))
    sizes = {"q": heads // kv * width, "k": width, "v": width}
    return next(n for n in range(1, kv + 1) if all(n * size % granules[role] == 0 for role, size in sizes.items()))


@settings(deadline=None, max_examples=200)
@given(models(), st.integers(1, 17))
def test_ranges_cover_every_dim_once_in_rank_order(model: tuple[ModelSpec, Assignment], tp: int) -> None:
    spec, assignment = model
    plan = make_plan(spec, assignment, tp, dtype="BF16")
    for dim, ranges in plan.ranges.items():
        assert len(ranges) == tp
        owned = [unit for r in ranges for unit in r]
        if dim == "kv_heads":
            assert set(owned) == set(range(spec.dims["kv_heads"].size))
        else:
            assert owned == list(range(plan.dims[dim].size))
    total, group, bundle = spec.dims["kv_heads"].size, spec.dims["heads"].size // spec.dims["kv_heads"].size, together(spec, assignment)
    for heads, kv in zip(plan.ranges["heads"], plan.ranges["kv_heads"], strict=True):
        read = {head // group for head in heads}
        assert set(kv) == {bundle * (head // bundle) + n for head in read for n in range(bundle)}, "what is read, in whole bundles"
        # The attention of one rank pairs its query heads with its KV heads evenly, or has one KV head.
        assert bundle > 1 or len(kv) <= 1 or len(heads) == group * len(kv)
    if tp <= total // bundle:
        assert len([head for kv in plan.ranges["kv_heads"] for head in kv]) == total, "replicated without need"


@settings(deadline=None, max_examples=200)
@given(models(), st.integers(1, 17))
def test_every_cut_is_on_a_granule_and_every_element_is_stored(model: tuple[ModelSpec, Assignment], tp: int) -> None:
    spec, assignment = model
    plan = make_plan(spec, assignment, tp, dtype="BF16")
    for role, _, geometry in block_geometries(spec, assignment, dtype="BF16"):
        cuts = [plan.cut(role, rank) for rank in range(tp)]
        cut_dim = "K" if plan.modes[role] == "row" else "N"
        for n, k in cuts:
            geometry.cut(n, k)
            own, other = (k, n) if cut_dim == "K" else (n, k)
            assert own.start % geometry.granule(cut_dim) == own.stop % geometry.granule(cut_dim) == 0
            assert other == range(geometry.extent("N" if cut_dim == "K" else "K"))
        assert {index for n, k in cuts for index in (k if cut_dim == "K" else n)} == set(range(geometry.extent(cut_dim)))


@settings(deadline=None, max_examples=100)
@given(models(), st.integers(1, 17))
def test_plans_are_deterministic_and_survive_json(model: tuple[ModelSpec, Assignment], tp: int) -> None:
    spec, assignment = model
    plan = make_plan(spec, assignment, tp, dtype="BF16")
    again = make_plan(spec, dict(reversed(list(assignment.items()))), tp, dtype="F16")
    text = json.dumps(plan.to_json(), sort_keys=True)
    assert text == json.dumps(again.to_json(), sort_keys=True)
    read = ParallelPlan.from_json(json.loads(text))
    assert read == plan
    read.check(spec, assignment, dtype="BF16")


def _tampered(data: dict[str, Any], draw: st.DrawFn) -> dict[str, Any]:
    """One number of one range changed, or one whole entry removed."""
    changed = copy.deepcopy(data)
    dim = draw(st.sampled_from(sorted(changed["ranges"])))
    kind = draw(st.sampled_from(["bound", "rank", "dim", "key", "tp"]))
    if kind == "bound":
        pair = draw(st.sampled_from(changed["ranges"][dim]))
        pair[draw(st.integers(0, 1))] += draw(st.sampled_from([-1, 1, 2**20]))
    elif kind == "rank":
        changed["ranges"][dim].pop()
    elif kind == "dim":
        del changed["ranges"][dim]
    elif kind == "key":
        del changed[draw(st.sampled_from(sorted(changed)))]
    else:
        changed["tp"] += 1
    return changed


@settings(deadline=None, max_examples=200)
@given(st.data(), models(), st.integers(1, 9))
def test_tampered_plans_are_refused(data: st.DataObject, model: tuple[ModelSpec, Assignment], tp: int) -> None:
    spec, assignment = model
    plan = make_plan(spec, assignment, tp, dtype="BF16").to_json()
    changed = _tampered(plan, data.draw)
    with pytest.raises(InputError):
        ParallelPlan.from_json(changed).check(spec, assignment, dtype="BF16")


@pytest.mark.parametrize(
    "data",
    [None, [], {}, {"tp": 1}, "plan", {"tp": True, "vocab": 1, "dims": {}, "ranges": {}, "roles": {}, "modes": {}}],
)
def test_data_that_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(InputError, match="is not a plan"):
        ParallelPlan.from_json(data)


@settings(deadline=None, max_examples=100)
@given(models(), st.integers(1, 17))
def test_granules_are_dealt_evenly(model: tuple[ModelSpec, Assignment], tp: int) -> None:
    spec, assignment = model
    plan = make_plan(spec, assignment, tp, dtype="BF16")
    for dim in set(plan.ranges) - {"heads", "kv_heads"}:
        sizes = [len(r) for r in plan.ranges[dim]]
        assert sizes == sorted(sizes, reverse=True)
        assert max(sizes) - min(sizes) <= math.gcd(*sizes), "more than one granule apart"


@settings(deadline=None, max_examples=100)
@given(models())
def test_one_rank_holds_the_model_and_more_ranks_hold_no_less(model: tuple[ModelSpec, Assignment]) -> None:
    spec, assignment = model
    whole = sum(geometry.total_bytes for _, _, geometry in block_geometries(spec, assignment, dtype="BF16"))
    for tp in (1, 3):
        memory = rank_memory(spec, assignment, make_plan(spec, assignment, tp, dtype="BF16"), dtype="BF16", kv_dtype="F16")
        held = sum(rank.linears for rank in memory)
        assert held == whole if tp == 1 else held >= whole
        rows = math.ceil(spec.dims["vocab"].size / 64) * 64
        assert sum(rank.vocabulary for rank in memory) == rows * spec.dims["hidden"].size * 2 * (1 if spec.tied else 2)


@settings(deadline=None, max_examples=100)
@given(models(), st.sampled_from([1, 2, 4, 8]))
def test_what_an_equal_split_can_cut_quantkit_cuts_equally(model: tuple[ModelSpec, Assignment], tp: int) -> None:
    spec, assignment = model
    assume(not equal_split_obstacles(spec, assignment, tp, dtype="BF16"))
    plan = make_plan(spec, assignment, tp, dtype="BF16")
    assert plan.modes["o"] == plan.modes["down"] == "row"
    for dim in ("heads", "kv_heads"):
        assert len({len(r) for r in plan.ranges[dim]}) == 1
