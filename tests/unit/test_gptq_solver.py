"""The GPTQ solver against the paper's method written out, against rounding to nearest, and on what it must refuse or survive."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import InputError
from quantkit.ops.grouped import dequantize, encode, group_range, scales_and_zeros
from quantkit.quantizers import gptq_solver
from quantkit.quantizers.gptq_solver import BITS, ORDERS, Solved, SolverOptions, round_columns, solve

PAPER = SolverOptions(4, 16, False, mse=False, sweeps=0)
"""What the paper does; the defaults do more."""


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(tokens: int = 500, k: int = 96, seed: int = 0) -> Tensor:
    """Correlated inputs ``[T, K]`` of uneven size, as a network has them."""
    source = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, k // 4, generator=source) @ torch.randn(k // 4, k, generator=source)
    own = torch.randn(tokens, k, generator=source)
    return (mixed * 0.3 + own) * (torch.rand(k, generator=source) * 3 + 0.1)


def weights(n: int = 40, k: int = 96, seed: int = 1) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def rounded(solved: Solved) -> Tensor:
    return dequantize(solved.codes, solved.scales, solved.zeros, g_idx=solved.g_idx)


def nearest(weight: Tensor, options: SolverOptions) -> Tensor:
    """``weight`` rounded to nearest."""
    g = weight.shape[1] if options.group_size == -1 else options.group_size
    grid = scales_and_zeros(*group_range(weight, g), options.bits, options.sym, options.scale_dtype, options.min_zero)
    return dequantize(encode(weight, *grid, options.bits), *grid)


def lost(weight: Tensor, other: Tensor, x: Tensor) -> float:
    """``||W X - What X||^2`` by running the inputs through both."""
    return float((x.double() @ (weight - other).double().T).square().sum())


def as_in_the_paper(weight: Tensor, gram: Tensor, tokens: int, options: SolverOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros in float64, one column after the other, by the Cholesky decomposition of the inverse."""
    n, k = weight.shape
    g = k if options.group_size == -1 else options.group_size
    hessian = gram.double() / tokens
    hessian += torch.eye(k, dtype=torch.float64) * options.damp * hessian.diagonal().mean()
    perm = torch.arange(k) if options.order == "none" else gram.diagonal().argsort(descending=True, stable=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[perm][:, perm]), upper=True)
    codes = torch.zeros(n, k)
    scales, zeros = scales_and_zeros(*group_range(weight, g), options.bits, options.sym)
    left = weight.double()[:, perm]
    for j in range(k):
        group = int(perm[j]) // g if options.order == "static" else j // g
        if options.order != "static" and j % g == 0:
            ranges = group_range(left[:, j : j + g], g)
            scale, zero = scales_and_zeros(*ranges, options.bits, options.sym)
            scales[:, group], zeros[:, group] = scale[:, 0], zero[:, 0]
        scale, zero = scales[:, group].double(), zeros[:, group].double()
        code = (torch.round(left[:, j] / scale) + zero).clamp(0, 2**options.bits - 1)
        error = (left[:, j] - scale * (code - zero)) / upper[j, j]
        left -= torch.outer(error, upper[j])
        codes[:, perm[j]] = code.float()
    return codes.to(torch.uint8), scales, zeros


def same_rows(a: Tensor, b: Tensor) -> float:
    """The part of the rows that are equal. One rounding that falls the other way, as float32 may have it, changes the rest of its row."""
    return float((a == b).all(1).float().mean())


@pytest.mark.parametrize(("order", "bits", "sym"), list(itertools.product(ORDERS, BITS, (False, True))))
def test_the_codes_are_those_of_the_paper(order: str, bits: int, sym: bool) -> None:
    x, weight = inputs(), weights()
    for group in (16, 48, -1):
        options = dataclasses.replace(PAPER, bits=bits, sym=sym, order=order, group_size=group)
        codes, scales, zeros = as_in_the_paper(weight, x.T @ x, 500, options)
        solved = solve(weight, x.T @ x, 500, options, "w")
        assert same_rows(solved.codes, codes) >= 0.95
        assert same_rows(solved.scales, scales) >= 0.95 and same_rows(solved.zeros, zeros) >= 0.95


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group", [16, 48, -1])
def test_blocks_change_the_work_and_not_the_result(order: str, group: int) -> None:
    x, weight = inputs(), weights()
    for options in (dataclasses.replace(PAPER, order=order, group_size=group), SolverOptions(3, group, False, order=order)):
        first, *others = (solve(weight, x.T @ x, 500, dataclasses.replace(options, block=block), "w") for block in (1, 20, 32, 128))
        for other in others:
            assert same_rows(first.codes, other.codes) >= 0.95 and same_rows(first.scales, other.scales) >= 0.95


@pytest.mark.parametrize(("order", "bits", "sym"), list(itertools.product(ORDERS, BITS, (False, True))))
def test_each_part_lowers_the_loss(order: str, bits: int, sym: bool) -> None:
    """GPTQ against rounding to nearest; then the range search and the sweeps against GPTQ, at the widths that need them."""
    x, weight = inputs(), weights()
    options = dataclasses.replace(PAPER, bits=bits, sym=sym, order=order)
    plain, searched, swept = (
        solve(weight, x.T @ x, 500, dataclasses.replace(options, mse=mse, sweeps=sweeps), "w")
        for mse, sweeps in ((False, 0), (True, 0), (True, 3))
    )
    assert plain.loss < 0.8 * lost(weight, nearest(weight, options), x) / 500
    assert swept.loss < searched.loss
    if bits < 4:
        assert searched.loss < plain.loss


@pytest.mark.parametrize(("order", "mse"), list(itertools.product(ORDERS, (False, True))))
def test_no_sweep_raises_the_loss(order: str, mse: bool) -> None:
    """They lower the loss under the damped H; the damping is small enough here for that to be the loss."""
    for bits, sym, dtype in ((2, True, torch.float16), (3, False, torch.bfloat16), (4, False, torch.float16)):
        x, weight = inputs(seed=bits), weights(seed=bits)
        options = SolverOptions(bits, 16, sym, dtype, damp=1e-4, order=order, mse=mse)
        solved = [solve(weight, x.T @ x, 500, dataclasses.replace(options, sweeps=sweeps), "w") for sweeps in range(5)]
        losses = [s.loss for s in solved]
        assert losses == sorted(losses, reverse=True) and losses[1] < 0.999 * losses[0]
        assert all(torch.equal(solved[0].zeros, s.zeros) for s in solved)
        assert torch.equal(solved[0].scales, solved[4].scales) is not mse  # scales belong to the search of ranges


@pytest.mark.parametrize("order", ORDERS)
def test_the_loss_is_that_of_the_returned_weights(order: str) -> None:
    x, weight = inputs(), weights()
    solved = solve(weight, x.T @ x, 500, SolverOptions(4, 32, False, order=order), "w")
    loss = lost(weight, rounded(solved), x)
    assert solved.loss == pytest.approx(loss / 500, rel=1e-4)
    assert solved.error == pytest.approx(math.sqrt(loss / lost(weight, torch.zeros_like(weight), x)), rel=1e-4)
    assert solved.attempts == 1 and solved.damp == 0.01 and solved.dead == 0


def test_the_loss_of_many_rows_is_summed_slab_by_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(), weights()
    whole = solve(weight, x.T @ x, 500, SolverOptions(3, 16, False), "w")
    monkeypatch.setattr(gptq_solver, "SLAB", 96 * 7)
    parts = solve(weight, x.T @ x, 500, SolverOptions(3, 16, False), "w")
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scales, parts.scales) and torch.equal(whole.zeros, parts.zeros)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)


def test_act_order_forms_its_groups_by_the_diagonal() -> None:
    x, weight = inputs(), weights()
    solved = solve(weight, x.T @ x, 500, SolverOptions(4, 16, False, order="act"), "w")
    assert solved.g_idx is not None and solved.g_idx.dtype == torch.int32
    assert torch.bincount(solved.g_idx.long()).tolist() == [16] * 6
    size = x.square().sum(0)
    assert all(size[solved.g_idx == group].min() > size[solved.g_idx == group + 1].max() for group in range(5))
    for order in ("static", "none"):
        assert solve(weight, x.T @ x, 500, SolverOptions(4, 16, False, order=order), "w").g_idx is None
    one_group = solve(weight, x.T @ x, 500, SolverOptions(4, -1, False, order="act"), "w").g_idx
    assert one_group is not None and not one_group.any()


def test_static_scales_are_those_of_the_weights_as_given() -> None:
    x, weight = inputs(), weights()
    solved = solve(weight, x.T @ x, 500, PAPER, "w")
    scales, zeros = scales_and_zeros(*group_range(weight, 16), 4, False)
    assert torch.equal(solved.scales, scales) and torch.equal(solved.zeros, zeros)


def test_inputs_that_do_not_correlate_leave_rounding_to_nearest() -> None:
    weight, diagonal = weights(), torch.rand(96, generator=torch.Generator().manual_seed(3)) + 0.1
    for order in ORDERS[::2]:  # act-order would form other groups
        for sweeps in (0, 3):
            solved = solve(weight, torch.diag(diagonal), 500, dataclasses.replace(PAPER, order=order, sweeps=sweeps), "w")
            assert torch.equal(rounded(solved), nearest(weight, PAPER))


def test_dead_inputs_are_zeroed_and_widen_no_group() -> None:
    x, weight = inputs(), weights()
    dead = torch.zeros(96, dtype=torch.bool)
    dead[[3, 4, 90]] = True
    x[:, dead], weight[:, dead] = 0, 1000
    for order in ORDERS:
        solved = solve(weight, x.T @ x, 500, SolverOptions(4, 16, False, order=order), "w")
        assert solved.dead == 3 and not rounded(solved)[:, dead].any()
        assert rounded(solved).abs().max() < 20
        assert solved.loss == pytest.approx(lost(weight, rounded(solved), x) / 500, rel=1e-4)


def test_without_any_live_input_the_weights_are_rounded_to_nearest() -> None:
    weight = weights()
    solved = solve(weight, torch.zeros(96, 96), 500, PAPER, "w")
    assert torch.equal(rounded(solved), nearest(weight, PAPER))
    assert (solved.loss, solved.error, solved.dead) == (0, 0, 96)


def test_fewer_tokens_than_inputs_are_enough() -> None:
    x, weight = inputs(tokens=20), weights()
    solved = solve(weight, x.T @ x, 20, SolverOptions(4, 16, False), "w")
    assert solved.attempts == 1 and solved.loss < 0.2 * lost(weight, nearest(weight, PAPER), x) / 20


def test_two_equal_inputs_share_their_error() -> None:
    x, weight = inputs(), weights()
    x[:, 1] = x[:, 0]
    solved = solve(weight, x.T @ x, 500, dataclasses.replace(PAPER, damp=1e-6), "w")
    assert solved.loss < lost(weight, nearest(weight, PAPER), x) / 500 and math.isfinite(solved.error)


def test_damping_grows_until_the_decomposition_succeeds() -> None:
    x, weight = inputs(), weights()
    gram = x.T @ x
    least, level = float(torch.linalg.eigvalsh(gram.double())[0]), float(gram.diagonal().mean())
    gram.diagonal().sub_(least + 0.05 * level)  # the least eigenvalue is now -0.05 of what the damping is a part of
    solved = solve(weight, gram, 500, PAPER, "w")
    assert solved.attempts == 2 and solved.damp == pytest.approx(0.1)
    assert solve(weight, gram, 500, dataclasses.replace(PAPER, damp=0.001), "w").attempts == 3


@pytest.mark.parametrize("broken", ["indefinite", "nan", "nan-diagonal", "inf"])
def test_statistics_that_no_damping_saves_are_refused(broken: str) -> None:
    x = inputs()
    gram = x.T @ x
    if broken == "indefinite":
        gram[0, 1] = gram[1, 0] = 100 * gram.diagonal().max()
    else:
        at = (2, 2) if broken == "nan-diagonal" else (0, 1)
        gram[at] = gram[at[::-1]] = math.inf if broken == "inf" else math.nan
    with pytest.raises(InputError, match=r"model\.layers\.3\.mlp\.up_proj: has calibration statistics that cannot be decomposed"):
        solve(weights(), gram, 500, PAPER, "model.layers.3.mlp.up_proj")


def test_what_cannot_be_solved_is_refused_by_name() -> None:
    x, weight = inputs(), weights()
    for group in (64, 0, 97):
        with pytest.raises(InputError, match=rf"a\.b: has 96 inputs, which groups of {group} do not divide"):
            solve(weight, x.T @ x, 500, dataclasses.replace(PAPER, group_size=group), "a.b")
    with pytest.raises(InputError, match=r"a\.b: was reached by no calibration token"):
        solve(weight, x.T @ x, 0, PAPER, "a.b")
    for order in ORDERS:
        with pytest.raises(InputError, match=r"a\.b: .*float16"):
            solve(weight * 1e7, x.T @ x, 500, dataclasses.replace(PAPER, order=order), "a.b")


def test_nothing_given_is_changed_and_the_same_comes_out_twice() -> None:
    x, weight = inputs(), weights()
    gram, cross = x.T @ x, x.T @ (x + 0.1)
    given_ = [t.clone() for t in (weight, gram, cross)]
    for order in ORDERS:
        first, second = (solve(weight, gram, 500, SolverOptions(4, 16, False, order=order), "w", cross) for _ in range(2))
        assert torch.equal(first.codes, second.codes) and torch.equal(first.scales, second.scales) and first.loss == second.loss
    assert all(torch.equal(a, b) for a, b in zip(given_, (weight, gram, cross), strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 4])
def test_the_float_inputs_are_aimed_at_when_they_are_known(order: str, bits: int) -> None:
    """``||W X - What X~||`` on the calibration tokens and on others."""
    x, other, weight = inputs(4000), inputs(6000)[4000:], weights()
    twist = torch.eye(96) + 0.05 * weights(96, seed=5)  # what the quantized blocks before did to the inputs
    noise = torch.Generator().manual_seed(6)

    def seen(values: Tensor) -> Tensor:
        return values @ twist + 0.05 * torch.randn(values.shape, generator=noise)

    xq, otherq = seen(x), seen(other)
    options = SolverOptions(bits, 16, False, order=order)
    without = rounded(solve(weight, xq.T @ xq, 4000, options, "w"))
    aimed = rounded(solve(weight, xq.T @ xq, 4000, options, "w", xq.T @ x))
    for float_inputs, quantized_inputs in ((x, xq), (other, otherq)):
        before, after = (float((float_inputs @ weight.T - quantized_inputs @ w.T).square().sum()) for w in (without, aimed))
        assert after < 0.8 * before


def test_inputs_that_are_those_of_the_float_model_need_no_correction() -> None:
    x, weight = inputs(), weights()
    gram = x.T @ x
    assert torch.equal(solve(weight, gram, 500, PAPER, "w", gram.clone()).codes, solve(weight, gram, 500, PAPER, "w").codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_belong_to_the_stored_scales(dtype: torch.dtype) -> None:
    """With bfloat16 scales the codes make up for the coarser grid: had they come from other scales, the loss would show it."""
    x, weight = inputs(), weights()
    solved = solve(weight, x.T @ x, 500, SolverOptions(8, 16, False, scale_dtype=dtype), "w")
    assert solved.scales.dtype == dtype
    assert solved.loss < 3 * solve(weight, x.T @ x, 500, SolverOptions(8, 16, False), "w").loss


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(BITS),
    st.booleans(),
    st.sampled_from(ORDERS),
    st.sampled_from([(32, 8), (32, -1), (40, 20), (8, 8)]),
    st.integers(0, 5),
    st.integers(0, 1),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from([1, 7, 128]),
    st.integers(0, 1000),
)
def test_laws(
    bits: int,
    sym: bool,
    order: str,
    shape: tuple[int, int],
    n: int,
    min_zero: int,
    mse: bool,
    sweeps: int,
    block: int,
    seed: int,
) -> None:
    (k, group), weight = shape, weights(n, shape[0], seed) + (seed % 3 - 1)
    x = inputs(k // 2, k, seed)
    options = SolverOptions(bits, group, sym, min_zero=min_zero, order=order, mse=mse, sweeps=sweeps, block=block)
    solved = solve(weight, x.T @ x, k // 2, options, "w")
    groups = 1 if group == -1 else k // group
    assert solved.codes.shape == (n, k) and solved.codes.dtype == torch.uint8 and solved.codes.is_contiguous()
    assert solved.scales.shape == solved.zeros.shape == (n, groups) and solved.zeros.dtype == torch.uint8
    assert bool((solved.codes.int() < 2**bits).all()) and bool((solved.scales > 0).all())
    assert bool((solved.zeros >= min_zero).all()) and bool((solved.zeros.int() < 2**bits).all())
    if sym:
        assert bool((solved.zeros == 2 ** (bits - 1)).all())
    assert (solved.g_idx is not None) == (order == "act")
    assert solved.loss == pytest.approx(lost(weight, rounded(solved), x) / (k // 2), rel=1e-3, abs=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("columns", [1, 33, 128])
def test_the_kernel_rounds_as_torch_does(columns: int) -> None:
    """Equal bits where every sum is exact; elsewhere another order of summing may turn a rounding, and what follows in its row."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    from quantkit.quantizers import gptq_triton

    source = torch.Generator().manual_seed(columns)
    n = 300
    few = (torch.rand(columns, columns, generator=source) < 0.05).tril(-1)
    exact = (
        torch.randint(-64, 64, (columns, n), generator=source) / 8,
        torch.randint(-64, 64, (columns, n), generator=source) / 8,
        torch.randint(-4, 5, (columns, columns), generator=source) / 16 * few + torch.eye(columns),
        torch.tensor(0.5).pow(torch.randint(0, 3, (columns, n), generator=source)),
    )
    free = (
        torch.randn(columns, n, generator=source),
        torch.randn(columns, n, generator=source),
        torch.randn(columns, columns, generator=source).tril(-1) * 0.05 + torch.eye(columns),
        torch.rand(columns, n, generator=source) * 0.2 + 0.1,
    )
    low = -torch.randint(0, 16, (columns, n), generator=source).float()
    for (x, weight, feed, scales), needed in ((exact, 1.0), (free, 0.98)):
        for shared in (False, True):
            grid = [t[:1].expand(columns, -1) if shared else t for t in (scales.cuda(), low.cuda(), low.cuda() + 15)]
            (code, error), (theirs, their_error) = (x.cuda(), weight.cuda()), (x.cuda(), weight.cuda())
            round_columns(code, error, feed.cuda(), grid[0], grid[1], grid[2])
            gptq_triton.round_columns(theirs, their_error, feed.cuda(), grid[0], grid[1], grid[2])
            assert same_rows(code.T, theirs.T) >= needed
            agree = (code == theirs).all(0)
            torch.testing.assert_close(error[:, agree], their_error[:, agree], rtol=0, atol=0 if needed == 1 else 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group", [16, 128, 384])
def test_cuda_finds_what_the_cpu_finds(order: str, group: int) -> None:
    x, weight = inputs(2000, 768), weights(100, 768)
    options = SolverOptions(4, group, False, order=order)
    here = solve(weight, x.T @ x, 2000, options, "w", x.T @ (x + 0.1))
    there = solve(weight.cuda(), (x.T @ x).cuda(), 2000, options, "w", (x.T @ (x + 0.1)).cuda())
    assert there.codes.is_cuda and same_rows(here.zeros, there.zeros.cpu()) > 0.9
    assert float((here.codes == there.codes.cpu()).float().mean()) > 0.9
    assert there.loss == pytest.approx(here.loss, rel=0.01)


@pytest.mark.parametrize("order", ORDERS)
def test_large_matrices_are_converted_in_panels_to_the_same_bits(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    weight, x = weights(), inputs()
    options = SolverOptions(4, 16, False, order=order)
    whole = solve(weight, x.T @ x, len(x), options, "w")
    monkeypatch.setattr(gptq_solver, "PANEL", 7 * 96 + 5)
    parts = solve(weight, x.T @ x, len(x), options, "w")
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in ("codes", "scales", "zeros"))
    assert (whole.loss, whole.damp) == (parts.loss, parts.damp)


@pytest.mark.parametrize("panel", [1, 40, 1000])
def test_the_factor_becomes_float32_in_its_own_memory(monkeypatch: pytest.MonkeyPatch, panel: int) -> None:
    monkeypatch.setattr(gptq_solver, "PANEL", panel)
    lower = torch.randn(17, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, memory = lower.float().flip(0, 1), lower.untyped_storage().data_ptr()
    found = gptq_solver._reversed_single(lower)
    assert torch.equal(found, expected)
    assert found.is_contiguous() and found.untyped_storage().data_ptr() == memory
