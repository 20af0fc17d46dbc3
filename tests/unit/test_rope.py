"""Frequencies of every rotary kind equal transformers'; bad numbers are refused; angles depend on their own sequence only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_fixtures import FAMILIES, LONG, config_of, rope

from quantkit.arch.spec import Rope
from quantkit.arch.table import spec_for
from quantkit.errors import InputError
from quantkit.model.rope import Rotary, frequencies
from quantkit.ops.fused import rotate

SCALED = [family for family in FAMILIES if family.startswith("rope-")]


@pytest.mark.parametrize("family", SCALED)
@pytest.mark.parametrize("length", [1, 16, 17, 64, 100])
def test_frequencies_are_those_of_transformers(family: str, length: int) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = config_of(family)
    spec = spec_for(config)
    hf = AutoConfig.for_model(**config)
    known = None if length <= 64 and spec.ropes[0].kind == "dynamic" else torch.tensor(length)
    want, scaling = ROPE_INIT_FUNCTIONS[spec.ropes[0].kind](hf, None, seq_len=known)
    got, factor = frequencies(spec.ropes[0], spec.head_dim, spec.max_positions, length)
    assert torch.equal(got, want) and factor == scaling
    assert not torch.equal(got, frequencies(Rope(500.0, "default", {}), 12, 64, length)[0]) or (length <= 64 and "dynamic" in family)


def test_rotation_turns_each_pair_by_position_times_frequency() -> None:
    rotary = Rotary(Rope(10000.0, "default", {}), 4, 64, torch.float64, "cpu")
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]], dtype=torch.float64)
    turned = rotate(x, *rotary.angles(torch.tensor([3]), (1,)))[0, 0]
    angle = torch.tensor([3.0, 3.0 / 100])
    want = torch.stack([angle[0].cos(), -2 * angle[1].sin(), angle[0].sin(), 2 * angle[1].cos()])
    assert torch.allclose(turned.float(), want, atol=1e-6)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_sequence_does_not_change_its_neighbours(kind: str) -> None:
    parameters = LONG if kind == "longrope" else {"factor": 2.0}
    rotary = Rotary(Rope(500.0, kind, parameters), 12, 32, torch.float32, "cpu")
    short, long = torch.arange(10), torch.arange(50)
    cos, sin = rotary.angles(torch.cat([short, long, short[:0], short]), (10, 50, 0, 10))
    for part, rows in ((short, slice(0, 10)), (long, slice(10, 60)), (short, slice(60, 70))):
        alone = rotary.angles(part, (len(part),))
        assert torch.equal(cos[rows], alone[0]) and torch.equal(sin[rows], alone[1])
    assert not torch.equal(cos[:10], cos[10:20])


@pytest.mark.parametrize(
    ("kind", "parameters", "names"),
    [
        ("linear", {}, "factor"),
        ("linear", {"factor": 0}, "factor"),
        ("linear", {"factor": float("nan")}, "factor"),
        ("dynamic", {"factor": "2"}, "factor"),
        ("yarn", {"factor": 2.0, "beta_fast": -1}, "beta_fast"),
        ("yarn", {"factor": True}, "factor"),
        ("llama3", {"factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor"),
        ("llama3", {"factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq_factor"),
        ("longrope", {**LONG, "short_factor": [1.0]}, "short_factor"),
        ("longrope", {**LONG, "long_factor": [1.0] * 5 + ["x"]}, "long_factor"),
        ("longrope", {**LONG, "original_max_position_embeddings": "16"}, "original_max_position_embeddings"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused(kind: str, parameters: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=names):
        Rotary(Rope(500.0, kind, parameters), 12, 64, torch.float32, "cpu")


def test_a_share_of_each_head_is_rotated() -> None:
    """The first elements, by frequencies that count only them; the rest stay."""
    spec = spec_for({**config_of("llama"), **rope("default", partial_rotary_factor=0.5)})
    assert spec.rotary_dim == 6 and spec_for(config_of("llama")).rotary_dim == 12
    rotary = Rotary(spec.ropes[0], spec.rotary_dim, 64, torch.float64, "cpu")
    x = torch.randn(5, 2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = rotary.angles(torch.arange(5), (5,))
    turned = rotate(x, *angles)
    assert torch.equal(turned[..., 6:], x[..., 6:]) and torch.equal(turned[..., :6], rotate(x[..., :6], *angles))
    assert not torch.equal(turned[1:, :, :6], x[1:, :, :6])


@pytest.mark.parametrize("share", [0, -0.5, 1.5, 0.25, 0.01, True, "half", float("nan")])
def test_a_share_that_cannot_be_rotated_is_refused(share: Any) -> None:
    with pytest.raises(InputError, match="partial_rotary_factor"):
        spec_for({**config_of("llama"), **rope("default", partial_rotary_factor=share)})


def test_the_original_length_beside_rope_parameters_wins() -> None:
    config = {**config_of("rope-yarn"), "original_max_position_embeddings": 8}
    assert spec_for(config).ropes[0].parameters["original_max_position_embeddings"] == 8
