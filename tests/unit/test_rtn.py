"""Round to nearest: the grid, the stored scale, and what is refused."""

from __future__ import annotations

import pytest
import torch

from quantkit.arch.table import spec_for
from quantkit.errors import InputError
from quantkit.quantizers.base import BlockWeights, method, methods
from quantkit.quantizers.rtn import METHODS, round_to_nearest
from quantkit.scheme import KEEP, LinearScheme

RTN = METHODS[0]
create = RTN.factory

ASYM, SYM = LinearScheme("rtn", "awq", 4, 16, False), LinearScheme("rtn", "awq", 4, 16, True)


def weights(n: int = 24, k: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("scheme", [ASYM, SYM])
def test_codes_come_from_the_scale_that_is_stored(scheme: LinearScheme) -> None:
    weight = weights()
    found = round_to_nearest(weight, scheme, "w")
    assert found.scales.dtype == torch.float16 and found.codes.dtype == torch.uint8
    scale = found.scales.double().repeat_interleave(16, 1)
    zero = found.zeros.double().repeat_interleave(16, 1)
    # In float64, away from ties, the codes of the stored scale are unambiguous.
    exact = weight.double() / scale
    clear = ((exact % 1) - 0.5).abs() > 1e-4
    assert torch.equal(found.codes[clear].double(), ((exact.round() + zero).clamp(0, 15))[clear])
    assert bool(clear.float().mean() > 0.99)


def test_symmetric_zeros_are_all_eight() -> None:
    assert bool((round_to_nearest(weights(), SYM, "w").zeros == 8).all())


def test_group_of_minus_one_is_the_row() -> None:
    found = round_to_nearest(weights(), LinearScheme("rtn", "awq", 4, -1, False), "w")
    assert found.scales.shape == (24, 1)
    assert torch.equal(found.codes, round_to_nearest(weights(), LinearScheme("rtn", "awq", 4, 64, False), "w").codes)


def test_a_group_of_zeros_stays_zero() -> None:
    weight = weights()
    weight[3, 16:32] = 0
    found = round_to_nearest(weight, ASYM, "w")
    assert bool((found.codes[3, 16:32] == found.zeros[3, 1]).all())
    assert float(found.scales[3, 1]) > 0


@pytest.mark.parametrize(("bad", "message"), [(float("nan"), "holds 1 values that are not finite"), (2e6, "scale is not a float16")])
def test_the_weight_that_cannot_be_stored_is_named(bad: float, message: str) -> None:
    weight = weights()
    weight[0, 0] = bad
    with pytest.raises(InputError, match=f"layer.q: .*{message}"):
        round_to_nearest(weight, ASYM, "layer.q")


def test_it_leaves_what_is_kept_alone_and_passes_biases_on() -> None:
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 16,
    }
    spec = spec_for(config)
    linears = {role: weights(*spec.linear_shape(role)) for role in spec.linears}
    block = BlockWeights(0, linears, {"q": torch.ones(32)}, {}, {}, dict.fromkeys(linears, torch.float32))
    schemes = {role: KEEP if role == "v" else ASYM for role in spec.linears}
    fit = create({}).fit(block, {}, schemes, spec)
    assert set(fit.results) == set(spec.linears) - {"v"}
    assert not fit.linears and not fit.norms
    assert torch.equal(fit.results["q"].bias, torch.ones(32))  # type: ignore[arg-type]
    assert fit.results["k"].bias is None


def test_the_registry_knows_its_methods() -> None:
    assert list(methods())[:2] == ["rtn", "awq"]
    assert all(found.origin == "built-in" for found in (methods()["rtn"], methods()["awq"]))
    with pytest.raises(InputError, match="--method: 'gptx' is unknown, expected one of rtn, awq"):
        method("gptx")
    with pytest.raises(InputError, match="unknown option 'clip', expected no options"):
        create({"clip": True})


class _Point:
    name, value, dist = "extra", "extra.module:METHOD", None

    def __init__(self, loaded: object) -> None:
        self._loaded = loaded

    def load(self) -> object:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (ImportError("no module named extra"), "cannot be loaded"),
        (3, "is a int"),
        ("rtn", "method 'rtn' is already registered"),
    ],
)
def test_an_entry_point_that_is_no_method_is_named(monkeypatch: pytest.MonkeyPatch, loaded: object, message: str) -> None:
    from quantkit.quantizers import base, rtn

    value = rtn.METHODS[0] if loaded == "rtn" else loaded
    monkeypatch.setattr(base, "entry_points", lambda group: [_Point(value)])
    with pytest.raises(InputError, match=f"entry point extra: .*{message}"):
        methods()


def test_an_entry_point_adds_a_method_with_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.quantizers import base

    mine = base.Method("mine", "a method of another package", RTN.facts, "built-in", create)
    monkeypatch.setattr(base, "entry_points", lambda group: [_Point(mine)])
    assert methods()["mine"].origin == "extra.module:METHOD"
