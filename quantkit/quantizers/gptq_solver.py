"""The GPTQ solver: codes of one weight matrix that lose least in the outputs over the calibration inputs. Knows tensors only.

Source: Frantar et al. 2022 (arXiv 2210.17323), in the form that needs no inverse (Chen et al. 2025, arXiv 2507.18553): with
``H = R R^T``, R upper triangular in the order of visit, the output error of D = W - What is ``sum((D R)^2)``, and column j of D R is
``r_jj (x_j - what_j)`` for ``x_j = w_j + sum_{i<j} d_i R_ij / r_jj``: each column is rounded from ``x_j``, which holds the errors of
all columns before it. It is the rounding that the paper's inverse gives, from one Cholesky decomposition.

H is ``gram / tokens``, the mean outer product of an input. The weight is worked on transposed, ``[K, N]`` in the order of visit: a
column of it is then one run of memory.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.ops.ggml.recode import BlockGrid
from quantkit.ops.grouped import dequantize, scales_and_zeros

ORDERS = ("static", "act", "none")
BITS = (2, 3, 4, 8)
MAX_DAMP = 1.0
"""Damping beyond the mean of the diagonal would be rounding to nearest: the Gram matrix itself is wrong."""
SEGMENT = 32
"""Columns whose errors reach one another one by one; those of segments before come as one product."""
AIM_SHRINK = 3
"""The correction for the float inputs, fitted to T tokens, is multiplied by T / (T + 3 K): about what serves other tokens best."""
MIN_SCALE = 1e-5
"""As ``scales_and_zeros`` has it."""
NO_SCALE = 1e-30
"""In place of a scale of 0 that was given."""
SLAB = 1 << 22
"""Weights that the range search and the loss look at at a time."""
PANEL = 1 << 24
"""Values of a K x K matrix that are converted at a time."""
SEARCH = {2: (30, 0.4), 3: (24, 0.5), 4: (20, 0.6), 8: (8, 0.8)}
"""By bits: steps of the range search, and the least part of the range that it tries."""


@dataclass(frozen=True, slots=True)
class SolverOptions:
    """How to solve.

    ``group_size`` -1 is one group for the whole row. ``min_zero`` is 1 for a format that cannot store a zero point of 0.
    ``damp``: this part of the mean of H's diagonal is added to it. ``block``: columns whose errors are brought in together.
    ``order``: "static" visits the inputs by descending diagonal, in groups of consecutive inputs whose scales are fixed before;
    "act" visits them so too and forms groups in that order (``g_idx``); "none" takes them as they come. Scales of "act" and "none"
    come from the weights as corrected when the group is reached. ``mse``: search the range of each group for the least error.
    ``sweeps``: how often all columns are then rounded again, each after the errors of all others; with ``mse``, after the scales.
    """

    bits: int
    group_size: int
    sym: bool
    scale_dtype: torch.dtype = torch.float16
    min_zero: int = 0
    damp: float = 0.01
    block: int = 128
    order: str = "static"
    mse: bool = True
    sweeps: int = 3


@dataclass(frozen=True, slots=True)
class Solved:
    """``codes [N, K]`` uint8 in the order of the inputs, ``scales [N, G]``, ``zeros [N, G]`` uint8, ``g_idx [K]`` int32 or None.

    ``loss`` is tr(D H D^T) for D = W - What: the squared output error of a mean token, summed over outputs, on the inputs of ``gram``
    whatever was aimed at; ``total`` is tr(W H W^T). ``damp`` was used in the last of ``attempts`` decompositions. ``dead`` inputs were
    always 0.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor | None
    loss: float
    total: float
    damp: float
    dead: int
    attempts: int

    @property
    def error(self) -> float:
        """sqrt(loss / total)."""
        return math.sqrt(self.loss / self.total) if self.total else 0.0


def joined(parts: Sequence[Solved], device: str) -> Solved:
    """One linear from parts of its rows, which were solved each with the statistics of all, on ``device``."""
    first = parts[0]
    g_idx = None if first.g_idx is None else first.g_idx.to(device)

    def whole(name: str) -> Tensor:
        found = [getattr(part, name).to(device) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    lost, total = sum(part.loss for part in parts), sum(part.total for part in parts)
    return Solved(whole("codes"), whole("scales"), whole("zeros"), g_idx, lost, total, first.damp, first.dead, first.attempts)


@dataclass(frozen=True, slots=True)
class _Factor:
    """H = R R^T: ``feed [K, K]`` float32 is R^T with each row divided by its diagonal; ``diagonal [K]`` that of R."""

    feed: Tensor
    diagonal: Tensor
    damp: float
    attempts: int


@dataclass(frozen=True, slots=True)
class _Grid:
    """``scales [G, N]`` and ``zeros [G, N]`` as they are stored."""

    scales: Tensor
    zeros: Tensor

    def rows(self, index: Tensor | None, count: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, least and greatest ``code - zero``, float32 ``[count, N]``: of the groups ``index [count]``, or of the only one."""
        if index is None:
            scales, low = self.scales.float(), -self.zeros.float()
            return scales.expand(count, -1), low.expand(count, -1), (low + (2**bits - 1)).expand(count, -1)
        scales, low = self.scales.index_select(0, index).float(), self.zeros.index_select(0, index).float().neg_()
        return scales, low, low + (2**bits - 1)


def _level(gram: Tensor, tokens: int, dead: Tensor) -> float:
    """The mean of H's diagonal over the inputs that are not dead; 1 when all are."""
    return float(gram.diagonal().sum(dtype=torch.float64)) / tokens / max(int((~dead).sum()), 1) or 1.0


def _added(dead: Tensor, damp: float) -> Tensor:
    """What is added to the diagonal, float64 ``[K]``."""
    return torch.where(dead, 1.0, torch.tensor(damp, dtype=torch.float64, device=dead.device))


def _panels(k: int) -> Iterator[slice]:
    """The rows of a K x K matrix, some at a time."""
    some = max(1, PANEL // k)
    return (slice(first, min(first + some, k)) for first in range(0, k, some))


def _reversed_single(lower: Tensor) -> Tensor:
    """``lower [K, K]`` float64 as float32 with both axes reversed, in its own memory: converted to the front, reversed to the back."""
    k = lower.shape[0]
    front, back = lower.view(torch.float32).reshape(2, k, k).unbind()
    for rows in _panels(k):
        front[rows] = lower[rows].float()
    for rows in _panels(k):
        back[k - rows.stop : k - rows.start] = front[rows].flip(0, 1)
    return back


def _factorize(gram: Tensor, tokens: int, dead: Tensor, perm: Tensor, damp: float, where: str) -> _Factor:
    """Decompose the damped H, in float64 and in place: 8 K^2 bytes. Raises InputError when no damping up to ``MAX_DAMP`` helps."""
    k = gram.shape[0]
    level = _level(gram, tokens, dead)
    backward = perm.flip(0)  # lower triangular backwards is upper triangular forwards
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    attempts = 0
    while True:
        attempts += 1
        lower = torch.empty(k, k, dtype=torch.float64, device=gram.device)
        for rows in _panels(k):
            lower[rows] = gram.index_select(0, backward[rows]).index_select(1, backward)
        lower.div_(tokens)
        lower.diagonal().add_(_added(dead, damp * level)[backward])
        torch.linalg.cholesky_ex(lower.mT, out=(lower.mT, info))  # H is symmetric: its transpose will do
        pivots = lower.diagonal().clone()
        if int(info) == 0 and bool(torch.isfinite(pivots).all()):
            break
        if damp >= MAX_DAMP or not math.isfinite(level):
            raise InputError(
                where,
                f"has calibration statistics that cannot be decomposed, even damped by {damp:g} of their mean",
                "the Gram matrix of finite inputs",
            )
        damp = min(damp * 10, MAX_DAMP)
        del lower, pivots  # before the next attempt makes its own
    return _Factor(_reversed_single(lower.div_(pivots.unsqueeze(1))), pivots.flip(0).float(), damp, attempts)


def _aim_at_float(weight: Tensor, gram: Tensor, cross: Tensor, tokens: int, perm: Tensor, factor: _Factor) -> Tensor:
    """What to add to W so that it makes of the quantized inputs X~ what it makes of the float inputs X, transposed ``[K, N]`` by ``perm``.

    Least squares, damped towards no change: ``W (X X~^T - X~ X~^T) (X~ X~^T + damping)^-1``. Source: the aim of Li et al. 2025
    (arXiv 2504.02692), solved before rounding.
    """
    add = torch.empty(weight.shape[1], weight.shape[0], device=weight.device)
    for rows in _panels(gram.shape[0]):
        add[rows] = (cross.index_select(0, perm[rows]) - gram.index_select(0, perm[rows])) @ weight.mT
    add = torch.linalg.solve_triangular(factor.feed.mT, add.div_(tokens), upper=True, unitriangular=True)
    add.div_(factor.diagonal.square().unsqueeze(1))
    found: Tensor = torch.linalg.solve_triangular(factor.feed, add, upper=False, unitriangular=True)
    return found.mul_(tokens / (tokens + AIM_SHRINK * gram.shape[0]))


def _fit_grid(groups: Tensor, importance: Tensor, options: SolverOptions) -> _Grid:
    """The grid of ``groups [G, g, N]``: their ranges, or those parts of them that round with the least error.

    ``importance [G, g]`` weighs the squared errors. Raises InputError for scales beyond their dtype.
    """
    top = 2**options.bits - 1
    low, high = groups.amin(1).clamp_(max=0), groups.amax(1).clamp_(min=0)
    scales, zeros = scales_and_zeros(low, high, options.bits, options.sym, options.scale_dtype, options.min_zero)
    if not options.mse:
        return _Grid(scales, zeros)
    steps, least = SEARCH[options.bits]
    best = torch.full_like(low, torch.inf)
    for step in range(steps + 1):
        part = 1 - step * (1 - least) / steps
        s, z = scales_and_zeros(low * part, high * part, options.bits, options.sym, options.scale_dtype, options.min_zero)
        wide, floor = s.float().unsqueeze(1), -z.float().unsqueeze(1)
        error = (groups / wide).round_().clamp_(floor, floor + top).mul_(wide).sub_(groups).square_().mul_(importance.unsqueeze(2)).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, s, scales), torch.where(better, z, zeros)
    return _Grid(scales, zeros)


def _fixed_grid(weight: Tensor, importance: Tensor, inverse: Tensor, g: int, options: SolverOptions) -> _Grid:
    """The grid of groups of consecutive inputs, some groups at a time. ``weight [K, N]`` and ``importance [K]`` in the order of visit."""
    k, n = weight.shape
    some = max(1, SLAB // (g * max(n, 1))) * g
    found = []
    for first in range(0, k, some):
        inputs = inverse[first : first + some]
        found.append(_fit_grid(weight.index_select(0, inputs).reshape(len(inputs) // g, g, n), importance[inputs].reshape(-1, g), options))
    return _Grid(torch.cat([grid.scales for grid in found]), torch.cat([grid.zeros for grid in found]))


def round_columns(x: Tensor, weight: Tensor, feed: Tensor, scales: Tensor, low: Tensor, high: Tensor) -> None:
    """Round ``x [b, N]`` column by column, each after the errors of those before it: ``x`` becomes ``code - zero``.

    ``weight [b, N]`` becomes its error ``weight - scale * x``. ``feed [b, b]`` unit lower triangular; the rest ``[b, N]``; all float32.
    Five small kernels a column.
    """
    for j in range(x.shape[0]):
        column = x[j]
        if j:
            torch.addmv(column, weight[:j].mT, feed[j, :j], out=column)
        column.div_(scales[j]).round_().clamp_(low[j], high[j])
        weight[j].addcmul_(column, scales[j], value=-1)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _round_block(x: Tensor, weight: Tensor, feed: Tensor, scales: Tensor, low: Tensor, high: Tensor) -> None:
    """``round_columns`` in segments, whose errors reach later ones as one product; on CUDA by the Triton kernel where there is one."""
    width, round_segment = SEGMENT, round_columns
    if x.is_cuda and _has_triton():
        from quantkit.quantizers import gptq_triton

        width, round_segment = gptq_triton.COLUMNS, gptq_triton.round_columns
    for first in range(0, x.shape[0], width):
        part = slice(first, min(first + width, x.shape[0]))
        if first:
            x[part].addmm_(feed[part, :first], weight[:first])
        round_segment(x[part], weight[part], feed[part, part], scales[part], low[part], high[part])


def _blocks(k: int, block: int, g: int | None) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``block`` columns: whole groups of ``g``, or parts of one group; anything without ``g``."""
    if g is not None and g <= block:
        block -= block % g
    stride = k if g is None or g <= block else g
    for base in range(0, k, stride):
        for start in range(base, base + stride, block):
            yield start, min(start + block, base + stride)


def _visit(weight: Tensor, factor: _Factor, fixed: _Grid | None, group: Tensor, g: int, options: SolverOptions) -> tuple[Tensor, _Grid]:
    """Round every column of ``weight [K, N]`` (which becomes its error): codes uint8 ``[K, N]``, and the grid of each group.

    ``fixed`` is the grid of all groups, ``group [K]`` that of each column; without it the grid of each ``g`` columns is found on the way.
    """
    k, feed = weight.shape[0], factor.feed
    codes = torch.empty_like(weight, dtype=torch.uint8)
    found: list[_Grid] = []

    def find(x: Tensor, first: int, last: int) -> None:
        """Add the grid of a group, whose ``x`` knows the errors before it: that of the best weights that are left to it."""
        rest = weight[first:last]
        if first:
            gone = torch.linalg.solve_triangular(feed[first:last, first:last], x - rest, upper=False, unitriangular=True)
            rest = gone.add_(rest)
        found.append(_fit_grid(rest.unsqueeze(0), factor.diagonal[first:last].square().unsqueeze(0), options))

    for start, stop in _blocks(k, options.block, None if fixed else g):
        if not fixed and g > stop - start and start % g == 0:
            whole = slice(start, start + g)
            find(torch.addmm(weight[whole], feed[whole, :start], weight[:start]) if start else weight[whole], start, start + g)
        x = torch.addmm(weight[start:stop], feed[start:stop, :start], weight[:start])
        stride = stop - start if fixed else min(g, stop - start)
        for first in range(start, stop, stride):
            last = first + stride
            part, before = slice(first, last), slice(start, first)
            mine = x[first - start : last - start].addmm_(feed[part, before], weight[before])
            if fixed:
                scales, low, high = fixed.rows(group[part], stride, options.bits)
            else:
                if g <= stride:
                    find(mine, first, last)
                scales, low, high = found[-1].rows(None, stride, options.bits)
            _round_block(mine, weight[part], feed[part, part], scales, low, high)
            codes[part] = mine.sub_(low)
    if fixed:
        return codes, fixed
    return codes, _Grid(torch.cat([grid.scales for grid in found]), torch.cat([grid.zeros for grid in found]))


@dataclass(frozen=True, slots=True)
class _Damped:
    """The damped H in the order of visit: ``rows [K, K]`` float32, each divided by its ``diagonal [K]``."""

    rows: Tensor
    diagonal: Tensor


def _refit(error: Tensor, codes: Tensor, hessian: _Damped, grid: _Grid, members: Sequence[Tensor | slice]) -> None:
    """Give each group in turn the scale that its codes and the errors of all others call for, where it lowers the loss as stored.

    ``error [K, N]`` is W - What and becomes the new one, as the scales of ``grid`` do; ``members`` are the columns of each group.
    """
    for scale, zero, columns in zip(grid.scales, grid.zeros, members, strict=True):
        step = codes[columns].float().sub_(zero)  # [g, N], what a unit of scale adds to What
        rows, weigh = hessian.rows[columns], hessian.diagonal[columns].unsqueeze(1)
        gain = (rows @ error).mul_(weigh).mul_(step).sum(0)
        cost = (rows[:, columns] @ step).mul_(weigh).mul_(step).sum(0)
        new = (scale.float() + gain / cost).to(scale.dtype)
        move = new.float() - scale.float()
        better = (move * (move * cost - 2 * gain) < 0) & (new >= MIN_SCALE)  # false for all that is not finite
        scale.copy_(torch.where(better, new, scale))
        error[columns] -= step.mul_(move.masked_fill_(~better, 0))


def _sweep(error: Tensor, codes: Tensor, hessian: _Damped, grid: _Grid, group: Tensor, options: SolverOptions) -> None:
    """Round every column again, given the errors of all others: coordinate descent, which can only lower the loss.

    The best value of a column is ``what_j + (H D)_j / h_jj``. ``error [K, N]``, W - What, and ``codes`` become the new ones; ``group [K]``
    is that of each column. Source: Behdin et al. 2023 (arXiv 2309.01885).
    """
    for start, stop in _blocks(error.shape[0], options.block, None):
        part = slice(start, stop)
        scales, low, high = grid.rows(group[part], stop - start, options.bits)
        value = low.add(codes[part]).mul_(scales)
        x = torch.addmm(value, hessian.rows[part], error)
        _round_block(x, value, hessian.rows[part, part], scales, low, high)  # value is now how far the error moved
        error[part] += value
        codes[part] = x.sub_(low)


def _losses(weight: Tensor, gram: Tensor, tokens: int, codes: Tensor, grid: _Grid, g_idx: Tensor | None) -> tuple[float, float]:
    """tr(D H D^T) and tr(W H W^T), some rows at a time, summed in float64."""
    lost = total = 0.0
    some = max(1, SLAB // weight.shape[1])
    for first in range(0, weight.shape[0], some):
        rows = slice(first, first + some)
        part = weight[rows]
        error = part - dequantize(codes[rows], grid.scales[:, rows].mT, grid.zeros[:, rows].mT, g_idx=g_idx)
        lost += float(((error @ gram) * error).sum(dtype=torch.float64))
        total += float(((part @ gram) * part).sum(dtype=torch.float64))
    return max(lost, 0.0) / tokens, max(total, 0.0) / tokens


def _check(weight: Tensor, gram: Tensor, tokens: int, options: SolverOptions, where: str, cross: Tensor | None) -> int:
    """The group size in inputs. Raises InputError naming ``where`` for what cannot be solved."""
    k = weight.shape[1]
    g = k if options.group_size == -1 else options.group_size
    assert gram.shape == (k, k) and (cross is None or cross.shape == (k, k)), (weight.shape, gram.shape)
    assert options.order in ORDERS and options.block >= 1 and options.damp > 0, options
    if g < 1 or k % g:
        raise InputError(where, f"has {k} inputs, which groups of {g} do not divide", f"a --group-size that divides {k}, or -1")
    if tokens < 1:
        raise InputError(where, "was reached by no calibration token", "text that reaches it")
    return g


@dataclass(frozen=True, slots=True)
class _Found:
    """``codes [K, N]`` in the order of visit, their ``grid``, ``inverse [K]``: the place of each input in that order."""

    codes: Tensor
    grid: _Grid
    inverse: Tensor
    damp: float
    dead: int
    attempts: int


def _find(
    weight: Tensor, gram: Tensor, tokens: int, options: SolverOptions, where: str, cross: Tensor | None, g: int, given: BlockGrid | None
) -> _Found:
    """The codes that ``solve`` and ``solve_on_grid`` are about."""
    k = weight.shape[1]
    diagonal = gram.diagonal()
    dead = diagonal == 0
    position = torch.arange(k, device=weight.device)
    perm = position if options.order == "none" else diagonal.argsort(descending=True, stable=True)
    inverse = torch.empty_like(perm)
    inverse[perm] = position
    factor = _factorize(gram, tokens, dead, perm, options.damp, where)
    group = (perm if options.order == "static" else position) // g  # of each column as visited
    work = weight.mT.index_select(0, perm)  # [K, N]
    if cross is not None:
        work += _aim_at_float(weight, gram, cross, tokens, perm, factor)
    if given is None and not dead.all():
        work.masked_fill_(dead[perm].unsqueeze(1), 0)
    if given is not None and given.offsets is not None:
        work -= given.offsets.mT.index_select(0, group)
    try:
        fixed = _fixed_grid(work, factor.diagonal.square(), inverse, g, options) if options.order == "static" and given is None else None
        fixed = fixed if given is None else _as_fixed(given)
        codes, grid = _visit(work, factor, fixed, group, g, options)
    except InputError as exc:
        raise InputError(where, exc.what, exc.expected, exc.hint) from exc
    attempts, damp = factor.attempts, factor.damp
    del factor
    if options.sweeps:
        damped = gram.index_select(0, perm).index_select(1, perm).div_(tokens)
        damped.diagonal().add_(_added(dead, damp * _level(gram, tokens, dead))[perm])
        heights = damped.diagonal().clone()
        hessian = _Damped(damped.div_(heights.unsqueeze(1)), heights)
        members = [inverse[first : first + g] if options.order == "static" else slice(first, first + g) for first in range(0, k, g)]
        for _ in range(options.sweeps):
            if options.mse:
                _refit(work, codes, hessian, grid, members)
            _sweep(work, codes, hessian, grid, group, options)
        del damped, hessian
    return _Found(codes, grid, inverse, damp, int(dead.sum()), attempts)


def _as_fixed(given: BlockGrid) -> _Grid:
    """The grid without its offsets. A scale of 0 becomes one so small that it makes 0 of any code, and divides."""
    scales = torch.where(given.scales == 0, NO_SCALE, given.scales).mT.contiguous()
    return _Grid(scales, torch.full_like(scales, given.zero, dtype=torch.uint8))


def solve(weight: Tensor, gram: Tensor, tokens: int, options: SolverOptions, where: str, gram_cross: Tensor | None = None) -> Solved:
    """Quantize ``weight [N, K]`` float32 so that ``||W X - What X||`` is small. ``gram [K, K]`` float32 is X^T X summed over ``tokens``.

    With ``gram_cross [K, K]``, X~^T X for the inputs X~ of the quantized model (those of ``gram``) and X of the float model, the aim is
    ``||W X - What X~||``. Inputs that were always 0 (dead) get a diagonal of 1 and their weights become 0, as in the paper's code; if
    all are, the weights are rounded to nearest. Nothing given is changed; with ``gram`` itself 12 K^2 bytes are used, and 5 N K beyond
    the weight (with ``gram_cross`` 20 K^2 and 12 N K).

    Raises InputError naming ``where``: a group that does not divide K, statistics that no damping makes positive definite, weights
    whose scale leaves its dtype.
    """
    assert options.bits in BITS, options
    g = _check(weight, gram, tokens, options, where, gram_cross)
    found = _find(weight, gram, tokens, options, where, gram_cross, g, None)
    codes, grid = found.codes.index_select(0, found.inverse).mT.contiguous(), found.grid
    g_idx = (found.inverse // g).to(torch.int32) if options.order == "act" else None
    lost, total = _losses(weight, gram, tokens, codes, grid, g_idx)
    scales, zeros = grid.scales.mT.contiguous(), grid.zeros.mT.contiguous()
    return Solved(codes, scales, zeros, g_idx, lost, total, found.damp, found.dead, found.attempts)


def solve_on_grid(
    weight: Tensor, gram: Tensor, tokens: int, grid: BlockGrid, options: SolverOptions, where: str, gram_cross: Tensor | None = None
) -> Tensor:
    """As ``solve``, on a grid that is given and stays: the codes uint8 ``[N, K]``.

    Of ``options`` only ``damp``, ``block`` and ``sweeps`` count. Dead inputs keep their weights, rounded to nearest. Raises InputError as
    ``solve`` does.
    """
    k, groups = weight.shape[1], grid.scales.shape[1]
    options = replace(options, bits=grid.bits, group_size=k // groups, mse=False, order="static")
    g = _check(weight, gram, tokens, options, where, gram_cross)
    found = _find(weight, gram, tokens, options, where, gram_cross, g, grid)
    return found.codes.index_select(0, found.inverse).mT.contiguous()
