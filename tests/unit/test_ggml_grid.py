"""GPTQ in ggml's blocks, on layers of a trained model and what its calibration text puts into them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.errors import InputError
from quantkit.model.load import embedded
from quantkit.ops.ggml.encode import BLOCKS, encode
from quantkit.quantizers.base import InputStats
from quantkit.quantizers.calibration import CalibrationStream, gathered, text_tokens
from quantkit.quantizers.ggml_grid import fit, row_losses
from quantkit.quantizers.gptq_solver import SolverOptions
from quantkit.quantizers.pipeline import Source
from quantkit.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = Path(__file__).parents[1] / "data" / "models" / "llama"
OPTIONS = SolverOptions(4, 32, False)
LEFT = 0.5
"""Of the loss of the same type with importance, at most, on the calibration text itself."""


def decoded(blocks: np.ndarray, kind: str) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]))


@pytest.fixture(scope="module")
def calibrated() -> tuple[Source, dict[str, InputStats]]:
    """The model, and the statistics of its first block on 16 windows of 128 tokens."""
    checkpoint = open_checkpoint(MODEL)
    spec = spec_for(checkpoint.config)
    source = Source(checkpoint, spec, "F16", torch.float32, ("cpu",))
    tokens = text_tokens(load_tokenizer(MODEL), "builtin", 16, 128).tokens
    stream = CalibrationStream(embedded(checkpoint, spec, tokens, dtype=torch.float32), 4)
    collectors = source.collectors(0, spec.block_linears(0), frozenset({"gram"}))
    with torch.inference_mode():
        stream.advance(source.loaded(0), collectors, source.devices)
    return source, gathered(collectors, "cpu")


@pytest.mark.parametrize(
    ("role", "kind"), [("q", "Q4_K"), ("q", "Q4_0"), *(("down", kind) for kind in ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q4_0", "Q8_0"))]
)
def test_less_of_the_outputs_is_lost_than_with_importance(calibrated: tuple[Source, dict[str, InputStats]], role: str, kind: str) -> None:
    source, stats = calibrated
    weight, seen = source.weight(0, role), stats[role]
    found = fit(weight, seen, kind, OPTIONS, role)
    assert found.blocks.shape == (weight.shape[0], weight.shape[1] // BLOCKS[kind][0] * BLOCKS[kind][1])
    error = (weight - decoded(found.blocks, kind)).double()
    assert found.loss == pytest.approx(float(((error @ seen.gram.double()) * error).sum()) / seen.tokens, rel=1e-3)
    plain = float(row_losses(weight, encode(weight.numpy(), kind), kind, seen.gram, seen.tokens).sum())
    assert found.loss < LEFT * found.weighed
    assert found.loss < plain


def test_scales_stay_those_of_the_search(calibrated: tuple[Source, dict[str, InputStats]]) -> None:
    source, stats = calibrated
    weight, seen = source.weight(0, "q"), stats["q"]
    searched = encode(weight.numpy(), "Q4_K", seen.gram.diagonal().div(seen.tokens).numpy()).reshape(-1, 144)
    found = fit(weight, seen, "Q4_K", OPTIONS, "q").blocks.reshape(-1, 144)
    assert np.array_equal(searched[:, :16], found[:, :16])
    assert (searched[:, 16:] != found[:, 16:]).mean() > 0.1


def test_types_of_uneven_levels_are_only_searched(calibrated: tuple[Source, dict[str, InputStats]]) -> None:
    source, stats = calibrated
    weight, seen = source.weight(0, "q"), stats["q"]
    found = fit(weight, seen, "IQ4_XS", OPTIONS, "q")
    assert np.array_equal(found.blocks, encode(weight.numpy(), "IQ4_XS", seen.gram.diagonal().div(seen.tokens).numpy()))
    assert found.loss == found.weighed
    assert found.solved == 0


def test_rows_without_weights_and_inputs_that_are_always_zero(calibrated: tuple[Source, dict[str, InputStats]]) -> None:
    source, stats = calibrated
    weight, seen = source.weight(0, "q").clone(), stats["q"]
    weight[3] = 0
    gram = seen.gram.clone()
    gram[5:40], gram[:, 5:40] = 0, 0
    for kind in ("Q3_K", "Q4_K"):
        found = fit(weight, replace(seen, gram=gram), kind, OPTIONS, "q")
        values = decoded(found.blocks, kind)
        assert not values[3].any()
        assert torch.isfinite(values).all()
        assert found.loss < 0.7 * found.weighed
    nothing = fit(weight, replace(seen, gram=torch.zeros_like(gram)), "Q4_K", OPTIONS, "q")
    assert np.array_equal(nothing.blocks, encode(weight.numpy(), "Q4_K"))


def test_the_aim_at_the_float_inputs_brings_outputs_nearer_to_them(calibrated: tuple[Source, dict[str, InputStats]]) -> None:
    """X~ = X (1 + noise of the size of what 3 bits lose): judged by ||W X - What X~||."""
    source, stats = calibrated
    weight = source.weight(0, "q")
    random = torch.Generator().manual_seed(0)
    values, vectors = torch.linalg.eigh(stats["q"].gram.double())
    x = (torch.randn(4096, 256, generator=random).double() * (values.clamp(min=0) / 4096).sqrt()) @ vectors.T
    other = x * 0.9 + 0.02 * x.roll(1, 1)
    quantized = InputStats((other.T @ other).float(), torch.ones(256), torch.ones(256), 4096)
    aimed = replace(quantized, cross=(other.T @ x).float())
    missed = [
        float((x @ weight.double().T - other @ decoded(fit(weight, seen, "Q4_K", OPTIONS, "q").blocks, "Q4_K").double().T).square().sum())
        for seen in (quantized, aimed)
    ]
    assert missed[1] < 0.9 * missed[0]


def test_weights_that_are_not_finite_are_refused(calibrated: tuple[Source, dict[str, InputStats]]) -> None:
    source, stats = calibrated
    weight = source.weight(0, "q").clone()
    weight[7, 7] = torch.nan
    with pytest.raises(InputError, match="row 7 is not finite"):
        fit(weight, stats["q"], "Q4_K", OPTIONS, "q")
