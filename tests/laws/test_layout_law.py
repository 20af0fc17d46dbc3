"""The layout law: ``dequant(split(p)) == split(dequant(p))``, bit for bit, for every registered layout.

Nothing here names a layout: parts are random bits in the shapes and dtypes that the geometry states. A layout that is
added to the registry is tested without a change to this file.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.errors import InputError
from quantkit.geometry import LAYOUTS, Geometry
from quantkit.layouts.registry import CODECS, codec
from quantkit.ops.dtypes import TORCH_DTYPES, as_bytes
from quantkit.plan import block_geometries, make_plan
from quantkit.scheme import LinearScheme

FLOATS = ("BF16", "F16", "F32")
GROUPS = (-1, 8, 16, 32, 64)


def random_parts(geometry: Geometry, seed: int) -> dict[str, Tensor]:
    """Parts of random content: any bits in integer parts, normal numbers in float parts."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for part in geometry.parts:
        dtype, shape = TORCH_DTYPES[part.dtype], geometry.shape(part)
        if dtype.is_floating_point:
            parts[part.suffix] = torch.randn(shape, generator=generator).to(dtype)
        else:
            width = dtype.itemsize
            raw = torch.randint(0, 256, (math.prod(shape) * width,), generator=generator, dtype=torch.uint8)
            parts[part.suffix] = raw.view(dtype).reshape(shape)
    return parts


def cut_parts(geometry: Geometry, parts: dict[str, Tensor], n: range, k: range) -> dict[str, Tensor]:
    return {part.suffix: parts[part.suffix][geometry.slices(part, n, k)].contiguous() for part in geometry.parts}


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert bytes(as_bytes(got)) == bytes(as_bytes(want))


def build(layout: str, n: int, k: int, dtype: str, group: int, bias: bool = True) -> Geometry:
    """The geometry, or a rejected example where the layout does not take the shape."""
    try:
        return LAYOUTS[layout](n, k, dtype=dtype, bias=bias, group_size=group)
    except InputError:
        assume(False)
        raise


@st.composite
def linears(draw: st.DrawFn) -> Geometry:
    n, k = 8 * draw(st.integers(1, 12)), 8 * draw(st.integers(1, 24))
    group = draw(st.sampled_from([g for g in (*GROUPS, k) if g == -1 or k % g == 0]))
    return build(draw(st.sampled_from(sorted(LAYOUTS))), n, k, draw(st.sampled_from(FLOATS)), group)


def granular_range(draw: st.DrawFn, geometry: Geometry, dim: str) -> range:
    granule, extent = geometry.granule(dim), geometry.extent(dim)
    ends = sorted(draw(st.integers(0, extent // granule)) * granule for _ in range(2))
    return range(*ends)


def test_every_layout_has_a_codec_and_every_codec_a_layout() -> None:
    assert set(LAYOUTS) == set(CODECS)


@settings(deadline=None, max_examples=150)
@given(st.data(), linears(), st.integers(0, 2**31))
def test_dequantizing_a_cut_is_cutting_the_dequantized(data: st.DataObject, geometry: Geometry, seed: int) -> None:
    n, k = granular_range(data.draw, geometry, "N"), granular_range(data.draw, geometry, "K")
    parts = random_parts(geometry, seed)
    chosen = codec(geometry.layout)
    whole = chosen.dequant(parts, geometry)
    assert whole.shape == (geometry.n, geometry.k)
    cut, cut_geometry = cut_parts(geometry, parts, n, k), geometry.cut(n, k)
    for part in cut_geometry.parts:
        assert cut[part.suffix].shape == cut_geometry.shape(part)
    assert_same_bits(chosen.dequant(cut, cut_geometry), whole[n.start : n.stop, k.start : k.stop])
    assert_same_bits(cut["bias"], parts["bias"][n.start : n.stop])


@settings(deadline=None, max_examples=60)
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
    kv, group_heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 4)), 8 * draw(st.integers(1, 4))
    group = draw(st.sampled_from(GROUPS))
    unit = max(group, 8)
    hidden, ffn = unit * draw(st.integers(1, 3)), unit * draw(st.integers(1, 6))
    config: dict[str, object] = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": kv * group_heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "vocab_size": draw(st.integers(1, 200)),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": True,
    }
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    assume(group == -1 or (kv * group_heads * head_dim) % group == 0)
    return config, LinearScheme(layout, layout, 4, group), draw(st.integers(1, 9))


@settings(deadline=None, max_examples=60)
@given(models(), st.integers(0, 2**31))
def test_the_ranks_of_every_plan_hold_the_weight_exactly(drawn: tuple[dict[str, object], LinearScheme, int], seed: int) -> None:
    config, scheme, tp = drawn
    spec = spec_for(config)
    assignment = dict.fromkeys(spec.all_linears(), scheme)
    plan = make_plan(spec, assignment, tp, dtype="BF16")
    for role, _, geometry in block_geometries(spec, assignment, dtype="BF16"):
        parts = random_parts(geometry, seed)
        chosen = codec(geometry.layout)
        whole = chosen.dequant(parts, geometry)
        seen = torch.zeros(geometry.n, geometry.k, dtype=torch.bool)
        for rank in range(tp):
            n, k = plan.cut(role, rank)
            local = chosen.dequant(cut_parts(geometry, parts, n, k), geometry.cut(n, k))
            assert_same_bits(local, whole[n.start : n.stop, k.start : k.stop])
            seen[n.start : n.stop, k.start : k.stop] = True
        assert bool(seen.all())
