"""8-bit weights and linears: LLM.int8 against bytes that bitsandbytes made, rounded activations against those of compressed-tensors,
the rest against the format's vectors and definitions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit.errors import InputError
from quantkit.ops.dtypes import as_bytes
from quantkit.ops.eightbit import (
    FP8,
    dequantize_scaled,
    fp8_block_quantize,
    fp8_channel_quantize,
    int8_channel_quantize,
    llm_int8_dequantize,
    llm_int8_linear,
    llm_int8_quantize,
    quantize_tokens_fp8,
    quantize_tokens_int8,
    rounded_linear,
    smooth_scale,
)

DATA = Path(__file__).parent.parent / "data"
GOLDEN, CT = load_file(DATA / "bnb_golden.safetensors"), load_file(DATA / "ct_golden.safetensors")
CASES = sorted({key.partition(".")[0] for key in GOLDEN if key.startswith("int8/")})
PRODUCTS = sorted({key.rpartition(".")[0] for key in GOLDEN if key.startswith("multiply/")})


def gaussian(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert bytes(as_bytes(got)) == bytes(as_bytes(want))


@pytest.mark.parametrize("case", CASES)
def test_llm_int8_stores_the_bytes_of_the_reference(case: str) -> None:
    want = {name: GOLDEN[f"{case}.{name}"] for name in ("weight", "SCB", "dequantized")}
    values, scb = llm_int8_quantize(GOLDEN[f"{case.partition('/')[2]}.input"])
    assert_same_bits(values, want["weight"])
    assert_same_bits(scb, want["SCB"])
    assert_same_bits(llm_int8_dequantize(values, scb, torch.float32), want["dequantized"])


def test_llm_int8_follows_the_vectors_of_the_format() -> None:
    values, scb = llm_int8_quantize(torch.tensor([[1.0, -2.0, 0.5, 0.25], [0.1, 0.2, -0.3, 0.4], [0.0, 0.0, 0.0, 0.0]]))
    assert values.tolist() == [[64, -127, 32, 16], [32, 64, -95, 127], [0, 0, 0, 0]]
    assert scb.tolist() == pytest.approx([2.0, 0.4, 0.0], abs=1e-4)  # 0.4 as float16


@pytest.mark.parametrize("product", PRODUCTS)
def test_llm_int8_multiplies_as_the_reference(product: str) -> None:
    name, _, threshold = product.partition("/")[2].partition("-")
    x, want = GOLDEN[f"{product}.x"], GOLDEN[f"{product}.y"]
    values, scb = llm_int8_quantize(GOLDEN[f"normal_{name}.input"])
    got = llm_int8_linear(x, values, scb, float(threshold))
    assert got.dtype == want.dtype == x.dtype
    # Outlier columns are a float product, whose last bit depends on the machine.
    step = 0.0 if threshold == "0" else torch.finfo(x.dtype).eps
    assert float((got.double() - want.double()).abs().max()) <= step * float(want.abs().max())
    assert not got[6].any()  # a token of zeros


def test_llm_int8_keeps_outlier_columns_in_float() -> None:
    x, weight = gaussian(5, 64), gaussian(32, 64, 1)
    x[1, 7] = 300.0
    values, scb = llm_int8_quantize(weight)
    exact = x @ llm_int8_dequantize(values, scb, torch.float32).T
    split, rounded = (float((llm_int8_linear(x, values, scb, threshold) - exact).abs().max()) for threshold in (6.0, 0.0))
    assert split < 0.3 < 2 < rounded
    assert torch.isfinite(llm_int8_linear((x * 1e4).bfloat16(), values, scb)).all()  # 3e6 is an outlier, though no float16


def test_llm_int8_leaves_its_input_alone() -> None:
    x = gaussian(3, 16).half()
    x[0, 0] = 9.0
    before = x.clone()
    llm_int8_linear(x, *llm_int8_quantize(gaussian(4, 16)))
    assert torch.equal(x, before)


def test_scales_follow_the_vectors_of_the_format() -> None:
    weight = torch.tensor([[-1.5, 3.0, 0.3, 0.0]])
    values, scales = int8_channel_quantize(weight, torch.float32)
    assert scales.item() == pytest.approx(0.0235294, abs=1e-7)
    assert values.tolist() == [[-64, 127, 13, 0]]
    values, scales = fp8_channel_quantize(weight, torch.float32)
    assert scales.item() == pytest.approx(0.00669643, abs=1e-8)
    assert values.float().tolist() == [[-224.0, 448.0, 44.0, 0.0]]


def test_fp8_values_are_those_of_the_format() -> None:
    given = torch.tensor([[448.0, 1.0, -0.5, 240.0, 0.0175, 2**-9, 2**-10]])
    values, scales = fp8_channel_quantize(given, torch.float32)
    assert scales.item() == 1.0
    assert [f"{word:02x}" for word in values.view(torch.uint8)[0].tolist()] == ["7e", "38", "b0", "77", "09", "01", "00"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantize", [int8_channel_quantize, fp8_channel_quantize])
def test_codes_fit_the_scale_that_is_stored(quantize: object, dtype: torch.dtype) -> None:
    assert callable(quantize)
    weight = gaussian(64, 96) * torch.logspace(-3, 2, 64).unsqueeze(1)
    values, scales = quantize(weight, dtype)
    assert (scales.dtype, scales.shape, values.shape) == (dtype, (64, 1), (64, 96))
    ratio = weight.double() / scales.double()
    if values.dtype == torch.int8:
        assert float((ratio.clamp(-128, 127) - values.double()).abs().max()) <= 0.5 + 1e-4
        assert int(values.float().abs().max()) >= 127
    else:
        assert bool((values.double().abs().amax(1) >= 416).all())
        assert float((values.double() - ratio.clamp(-448, 448)).abs().div(ratio.abs().clamp(min=2**-6)).max()) <= 2**-4 + 1e-6
    assert torch.isfinite(values.float()).all()
    back = dequantize_scaled(values, scales, None, torch.float64)
    assert torch.equal(back, (values.float() * scales.float()).double())


@pytest.mark.parametrize(("n", "k", "block"), [(256, 128, 128), (130, 200, 128), (1, 1, 128), (7, 9, 4)])
def test_each_fp8_block_has_its_own_scale(n: int, k: int, block: int) -> None:
    weight = gaussian(n, k)
    values, scales = fp8_block_quantize(weight, block)
    assert (values.dtype, scales.dtype, scales.shape) == (FP8, torch.float32, (-(-n // block), -(-k // block)))
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            tile = weight[row * block : (row + 1) * block, column * block : (column + 1) * block]
            assert float(scales[row, column]) == pytest.approx(float(tile.abs().max()) / 448, rel=1e-6)
    back = dequantize_scaled(values, scales, block, torch.float32)
    assert back.shape == weight.shape
    by_place = torch.tensor([[float(scales[i // block, j // block]) for j in range(k)] for i in range(n)])
    assert torch.equal(back, values.float() * by_place)
    assert float((back - weight).abs().max()) <= float(weight.abs().max()) * 2**-4


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(3, 5)
    for values, scales in (
        int8_channel_quantize(zeros, torch.float16),
        fp8_channel_quantize(zeros, torch.bfloat16),
        fp8_block_quantize(zeros),
    ):
        assert (scales > 0).all() and not values.float().any()
    for values, scales in (quantize_tokens_int8(zeros), quantize_tokens_fp8(zeros), quantize_tokens_fp8(zeros + 1e-42)):
        assert (scales > 0).all() and not values.float().any()


def test_refuses_what_no_scale_can_hold() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = torch.ones(2, 4)
        weight[1, 2] = bad
        for call in (
            llm_int8_quantize,
            lambda w: int8_channel_quantize(w, torch.float32),
            lambda w: fp8_channel_quantize(w, torch.bfloat16),
            fp8_block_quantize,
        ):
            with pytest.raises(InputError, match="finite"):
                call(weight)
    with pytest.raises(InputError, match="finite float16"):
        llm_int8_quantize(torch.full((1, 4), 7e4))
    for size in (1e8, 1e-7):
        with pytest.raises(InputError, match="not a float16"):
            int8_channel_quantize(torch.full((1, 4), size), torch.float16)
        assert int8_channel_quantize(torch.full((1, 4), size), torch.float32)[0].tolist() == [[127] * 4]


@pytest.mark.parametrize(("kind", "quantize"), [("int", quantize_tokens_int8), ("float", quantize_tokens_fp8)])
def test_tokens_are_rounded_to_the_bits_of_the_reference(kind: str, quantize: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    x, want = CT[f"token-{kind}.input"], CT[f"token-{kind}.rounded"]
    values, scales = quantize(x)
    assert values.dtype == (torch.int8 if kind == "int" else FP8)
    assert_same_bits(scales, CT[f"token-{kind}.scale"])
    assert torch.equal(values.float() * scales, want)
    assert not values[3].float().any() and values[0].float().any()  # a token of zeros, and the smallest one
    wide, wide_scales = quantize(x.double())
    assert wide_scales.dtype == torch.float64
    torch.testing.assert_close(wide_scales.float()[x.any(1)], scales[x.any(1)])
    assert float((wide.float() != values.float()).float().mean()) < 0.01  # those alone that float32 puts on the other side of a tie


ROUNDED = {
    "int8_token": (int8_channel_quantize, quantize_tokens_int8, 0.02),
    "fp8_token": (fp8_channel_quantize, quantize_tokens_fp8, 0.06),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", ROUNDED)
def test_a_linear_of_rounded_tokens_multiplies_what_was_rounded(activations: str, dtype: torch.dtype) -> None:
    by_channel, by_token, loss = ROUNDED[activations]
    x, weight = gaussian(6, 3000, 1).to(dtype), gaussian(40, 3000)
    for values, scales in (by_channel(weight, torch.bfloat16), (by_channel(weight / 0.01, torch.float32)[0], torch.tensor([0.01]))):
        rounded, token = by_token(x)
        dense = dequantize_scaled(values, scales, None, torch.promote_types(dtype, torch.float32))
        exact = (rounded.double() * token.double()) @ dense.double().T
        got = rounded_linear(x, dense, activations)
        assert (got.dtype, got.shape) == (dtype, (6, 40))
        step = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
        assert float((got.double() - exact).norm() / exact.norm()) < step
        unrounded = x.double() @ dense.double().T
        assert 1e-4 < float((got.double() - unrounded).norm() / unrounded.norm()) < loss


def test_tokens_are_rounded_each_by_itself() -> None:
    x = torch.tensor([[-1.0, 2.0, 0.0], [100.0, 51.0, -25.4]])
    values, scales = quantize_tokens_int8(x)
    assert values.tolist() == [[-64, 127, 0], [127, 65, -32]]
    assert scales.view(-1).tolist() == pytest.approx([2 / 127.5, 100 / 127.5])
    for quantize in (quantize_tokens_int8, quantize_tokens_fp8):
        together, alone = quantize(x), quantize(x[1:])
        assert torch.equal(together[0][1:].float(), alone[0].float()) and torch.equal(together[1][1:], alone[1])


def test_smoothing_moves_magnitude_from_activations_to_weights() -> None:
    act, weight = torch.tensor([16.0, 1.0, 4.0, 0.0, 3.0]), torch.tensor([1.0, 4.0, 4.0, 2.0, 0.0])
    scale = smooth_scale(act, weight, 0.5)
    assert scale.tolist() == [4.0, 0.5, 1.0, 1.0, 1.0]
    assert torch.equal((act / scale)[:3], (weight * scale)[:3])  # alpha 0.5 leaves both as hard to quantize
    assert torch.equal(smooth_scale(act, weight, 1.0)[:3], act[:3])
    assert torch.equal(smooth_scale(act, weight, 0.0)[:3], 1 / weight[:3])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InputError):
            smooth_scale(torch.tensor([bad]), torch.ones(1), 0.5)
        with pytest.raises(InputError):
            smooth_scale(torch.ones(1), torch.tensor([bad]), 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_gpu_takes_outliers_as_the_cpu_does_and_in_a_graph(scale: float) -> None:
    """Without outliers and with some, which a graph that was captured without any finds too."""
    values, scb = llm_int8_quantize(gaussian(40, 300))
    x = gaussian(6, 300, 1)
    given, held = x.cuda(), (values.cuda(), scb.cuda())
    llm_int8_linear(given, *held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = llm_int8_linear(given, *held)
    given.mul_(scale)
    graph.replay()
    want = llm_int8_linear(x * scale, values, scb)
    assert bool(((x * scale).abs() >= 6).any()) == (scale > 1)
    assert float((got.cpu() - want).norm() / want.norm()) < 1e-4
