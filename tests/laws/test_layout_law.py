"""The layout law: ``dequant(split(p)) == split(dequant(p))``, bit for bit, for every registered layout.

Parts are random bits in the shapes and dtypes that the geometry states, but for those whose content the format fixes (a quant
state, the group of each input). A layout that is added to the registry is tested without a change to this file.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.errors import InputError
from quantkit.formats.quant_state import quant_state_json
from quantkit.geometry import CODES, LAYOUTS, Geometry, geometry_of
from quantkit.layouts.registry import CODECS, codec
from quantkit.ops.dtypes import TORCH_DTYPES, as_bytes
from quantkit.plan import block_geometries, make_plan
from quantkit.scheme import LinearScheme

FLOATS = ("BF16", "F16", "F32")
GROUPS = (-1, 8, 16, 32, 64)


def random_parts(geometry: Geometry, seed: int) -> dict[str, Tensor]:
    """Parts of random content: any bits in integer parts, normal numbers in float parts."""
    generator = torch.Generator().manual_seed(seed)
    scheme, parts = geometry.scheme, dict[str, Tensor]()
    for part in geometry.parts:
        dtype, shape = TORCH_DTYPES[part.dtype], geometry.shape(part)
        if part.free:
            state = quant_state_json(scheme.code, scheme.group_size, "bfloat16", geometry.whole, 0.5 if scheme.double_quant else None)
            parts[part.suffix] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        elif part.suffix == "g_idx":
            size = geometry.k if scheme.group_size == -1 else scheme.group_size
            order = torch.randperm(geometry.k, generator=generator) if scheme.act_order else torch.arange(geometry.k)
            parts[part.suffix] = (order // size).to(dtype)
        elif dtype.is_floating_point:
            # Through a clamp: a float8 past its range is not a number, and no two of those compare as bits.
            parts[part.suffix] = torch.randn(shape, generator=generator).clamp(-400, 400).to(dtype)
        else:
            width = dtype.itemsize
            raw = torch.randint(0, 256, (math.prod(shape) * width,), generator=generator, dtype=torch.uint8)
            parts[part.suffix] = raw.view(dtype).reshape(shape)
    return parts


def cut_parts(geometry: Geometry, parts: dict[str, Tensor], n: range, k: range) -> dict[str, Tensor]:
    return {
        part.suffix: parts[part.suffix] if part.free else parts[part.suffix][geometry.slices(part, n, k)].contiguous()
        for part in geometry.parts
    }


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """The same bits; a NaN may be any other, since random bits are scales too, and which one arithmetic makes of two is chance."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.equal(got.isnan(), want.isnan())
    got, want = (value.masked_fill(value.isnan(), 0) for value in (got, want))
    # A copy: a matrix of one row or column counts as contiguous under any stride.
    assert bytes(as_bytes(got.clone(memory_format=torch.contiguous_format))) == bytes(
        as_bytes(want.clone(memory_format=torch.contiguous_format))
    )


@st.composite
def schemes(draw: st.DrawFn, groups: tuple[int, ...]) -> LinearScheme:
    """Any combination of settings; what a layout does not take it refuses, and that example is dropped."""
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    return LinearScheme(
        layout,
        layout,
        draw(st.sampled_from([2, 3, 4, 8])),
        draw(st.sampled_from([*groups, 0, 128])),
        sym=draw(st.booleans()),
        scale_dtype=draw(st.sampled_from(FLOATS)),
        code=draw(st.sampled_from(CODES.get(layout, ("",)))),
        double_quant=draw(st.booleans()),
        act_order=draw(st.booleans()),
    )


@st.composite
def linears(draw: st.DrawFn) -> Geometry:
    n, k = draw(st.one_of(st.integers(1, 40), st.integers(1, 12).map(lambda x: 32 * x))), 0
    k = draw(st.one_of(st.integers(1, 40), st.integers(1, 12).map(lambda x: 32 * x)))
    scheme = draw(schemes((*GROUPS, k)))
    try:
        return geometry_of(scheme, n, k, dtype=draw(st.sampled_from(FLOATS)), bias=True)
    except InputError:
        assume(False)
        raise


def granular_range(draw: st.DrawFn, geometry: Geometry, dim: str) -> range:
    granule, extent = geometry.granule(dim), geometry.extent(dim)
    ends = sorted(draw(st.integers(0, extent // granule)) * granule for _ in range(2))
    return range(*ends)


def check_cut(geometry: Geometry, n: range, k: range, seed: int) -> None:
    parts = random_parts(geometry, seed)
    chosen = codec(geometry.layout)
    whole = chosen.dequant(parts, geometry)
    assert whole.shape == (geometry.n, geometry.k)
    cut, cut_geometry = cut_parts(geometry, parts, n, k), geometry.cut(n, k)
    for part in cut_geometry.parts:
        assert part.free or cut[part.suffix].shape == cut_geometry.shape(part)
    if n and k:  # a rank that owns nothing dequantizes nothing: load_linear runs it as dense zeros
        assert_same_bits(chosen.dequant(cut, cut_geometry), whole[n.start : n.stop, k.start : k.stop])
    assert_same_bits(cut["bias"], parts["bias"][n.start : n.stop])


def test_every_layout_has_a_codec_and_every_codec_a_layout() -> None:
    assert set(LAYOUTS) == set(CODECS)


@settings(deadline=None, max_examples=300)
@given(st.data(), linears(), st.integers(0, 2**31))
def test_dequantizing_a_cut_is_cutting_the_dequantized(data: st.DataObject, geometry: Geometry, seed: int) -> None:
    check_cut(geometry, granular_range(data.draw, geometry, "N"), granular_range(data.draw, geometry, "K"), seed)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_law_holds_for_each_layout_at_every_quarter(layout: str, act_order: bool, double_quant: bool) -> None:
    codes, seen = CODES.get(layout, ("",)), set[object]()
    for bits, group, code in itertools.product((2, 3, 4, 8), (-1, 0, 64, 128), codes):
        scheme = LinearScheme(layout, layout, bits, group, code=code, double_quant=double_quant, act_order=act_order)
        try:
            geometry = geometry_of(scheme, 256, 512, dtype="BF16", bias=True)
        except InputError:
            continue
        if (geometry.parts, code) in seen:  # the layout does not ask for these bits or groups
            continue
        seen.add((geometry.parts, code))
        for n in (range(256), range(128), range(128, 256)):
            for k in (range(512), range(128, 256), range(256, 512)):
                if not (k.start % geometry.granule("K") or k.stop % geometry.granule("K")):
                    check_cut(geometry, n, k, bits)
    assert seen


@settings(deadline=None, max_examples=100)
@given(linears(), st.integers(0, 2**31))
def test_a_cut_off_the_granule_is_refused(geometry: Geometry, seed: int) -> None:
    for dim in ("N", "K"):
        granule = geometry.granule(dim)
        if granule == 1:
            continue
        off = range(seed % (granule - 1) + 1)
        n, k = (off, range(geometry.k)) if dim == "N" else (range(geometry.n), off)
        with pytest.raises(InputError, match="falls inside a granule"):
            geometry.cut(n, k)


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, object], LinearScheme, int]:
    kv, group_heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 4)), 8 * draw(st.integers(1, 8))
    unit = draw(st.sampled_from([1, 8, 32, 64, 128]))
    config: dict[str, object] = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": unit * draw(st.integers(1, 3)),
        "intermediate_size": unit * draw(st.integers(1, 6)),
        "num_attention_heads": kv * group_heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "vocab_size": draw(st.integers(1, 200)),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": True,
    }
    return config, draw(schemes(GROUPS)), draw(st.integers(1, 9))


def check_ranks(config: dict[str, object], scheme: LinearScheme, tp: int, seed: int) -> bool:
    """Whether there is a plan; where there is, the ranks hold exactly the weight. A refusal names a linear of the model."""
    spec = spec_for(config)
    assignment = dict.fromkeys(spec.all_linears(), scheme)
    try:
        plan = make_plan(spec, assignment, tp, dtype="BF16")
    except InputError as exc:
        assert exc.where.removesuffix(".weight") in spec.all_linears() and exc.expected and exc.hint
        return False
    for role, _, geometry in block_geometries(spec, assignment, dtype="BF16"):
        parts = random_parts(geometry, seed)
        chosen = codec(geometry.layout)
        whole = chosen.dequant(parts, geometry)
        seen = torch.zeros(geometry.n, geometry.k, dtype=torch.bool)
        for rank in range(tp):
            n, k = plan.cut(role, rank)
            cut, local = cut_parts(geometry, parts, n, k), geometry.cut(n, k)
            if n and k:
                assert_same_bits(chosen.dequant(cut, local), whole[n.start : n.stop, k.start : k.stop])
            seen[n.start : n.stop, k.start : k.stop] = True
        assert bool(seen.all())
    return True


@settings(deadline=None, max_examples=150)
@given(models(), st.integers(0, 2**31))
def test_the_ranks_of_every_plan_hold_the_weight_exactly(drawn: tuple[dict[str, object], LinearScheme, int], seed: int) -> None:
    config, scheme, tp = drawn
    assume(check_ranks(config, scheme, tp, seed))


@pytest.mark.parametrize(("layout", "code"), [(layout, code) for layout in sorted(LAYOUTS) for code in CODES.get(layout, ("",))])
@pytest.mark.parametrize(("hidden", "ffn", "head_dim"), [(256, 512, 64), (200, 1100, 64), (96, 264, 24)])
@pytest.mark.parametrize("tp", [1, 2, 3, 8])
def test_odd_shapes_have_a_plan_or_a_clear_refusal(layout: str, code: str, hidden: int, ffn: int, head_dim: int, tp: int) -> None:
    config: dict[str, object] = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "vocab_size": 100,
        "tie_word_embeddings": True,
    }
    group = {"int8": -1, "fp8": -1, "bnb8": -1, "fp8_block": 128}.get(layout, 64)
    planned = check_ranks(config, LinearScheme(layout, layout, 8 if group == -1 else 4, group, code=code), tp, 1)
    assert planned or tp > 1 or hidden % 64
