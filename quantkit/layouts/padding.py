"""Quantized linears with channels of zeros appended, the codes that are there untouched (``formats.md`` 11)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.errors import InputError
from quantkit.geometry import GGML_BLOCKS
from quantkit.layouts.base import Codebook, GroupedInt, Neutral, Scaled, SuperBlock

ZERO_CODE = {"nf4": 7, "fp4": 0}
"""The entry of a codebook that is 0."""


def with_zeros(result: Neutral, rows: NDArray[np.int64], columns: NDArray[np.int64], size: int) -> Neutral:
    """``result`` with the rows and columns of the weight where ``rows [N']`` and ``columns [K']`` say; -1 is a row or column of zeros.

    ``size``: columns to a group, of which both widths are whole ones, and zeros begin where one does. Raises InputError for blocks that
    lie across rows.
    """
    groups = _blocks(columns, size)
    bias = None if result.bias is None else _taken(result.bias, rows, 0, 0)
    if isinstance(result, GroupedInt):
        middle = 2 ** (result.bits - 1)
        scales = _taken(_taken(result.scales, rows, 0, 1.0), groups, 1, 1.0)
        zeros = _taken(_taken(result.zeros, rows, 0, middle), groups, 1, middle)
        codes = _taken(_taken(result.codes, rows, 0, middle), columns, 1, middle)
        if len(columns) > result.codes.shape[1] and zeros.shape[1] == 1:  # one group: a zero is its zero point
            codes[:, torch.from_numpy(columns < 0)] = zeros
        order = result.g_idx
        if order is not None:
            fresh = torch.arange(len(columns), dtype=order.dtype) // size
            order = torch.where(torch.from_numpy(columns < 0), fresh, _taken(order, columns, 0, 0))
        return replace(result, codes=codes, scales=scales, zeros=zeros, g_idx=order, bias=bias)
    if isinstance(result, Codebook):
        if result.codes.shape[1] % result.block_size:
            raise InputError("absmax", f"blocks of {result.block_size} lie across rows of {result.codes.shape[1]}", "whole blocks in a row")
        zero = ZERO_CODE[result.kind]
        absmax = result.absmax.reshape(result.codes.shape[0], -1)
        absmax = _taken(_taken(absmax, rows, 0, 0), _blocks(columns, result.block_size), 1, 0)
        return replace(result, codes=_taken(_taken(result.codes, rows, 0, zero), columns, 1, zero), absmax=absmax.reshape(-1), bias=bias)
    if isinstance(result, Scaled):
        scales = result.scales
        if scales.dim() == 2:
            per_row = scales.shape[0] == result.values.shape[0]
            scales = _taken(scales, rows if per_row else _blocks(rows, 128), 0, 1.0)
            scales = scales if scales.shape[1] == 1 and per_row else _taken(scales, _blocks(columns, 128), 1, 1.0)
        bits = result.values.view(torch.int8)
        values = _taken(_taken(bits, rows, 0, 0), columns, 1, 0).view(result.values.dtype)
        return replace(result, values=values, scales=scales, bias=bias)
    assert isinstance(result, SuperBlock)
    block = GGML_BLOCKS[result.kind]
    places = _blocks(columns, block.elements)
    held = np.where(places[:, None] < 0, -1, places[:, None] * block.nbytes + np.arange(block.nbytes)).reshape(-1)
    return replace(result, blocks=_taken(_taken(result.blocks, rows, 0, 0), held, 1, 0), bias=bias)


def _blocks(places: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The same for blocks of ``size``, none of which holds both values and zeros."""
    first = places[::size]
    return np.where(first < 0, -1, first // size)


def _taken(tensor: Tensor, places: NDArray[np.int64], axis: int, fill: float) -> Tensor:
    index = torch.from_numpy(places)
    return tensor.index_select(axis, index.clamp(min=0)).index_fill_(axis, (index < 0).nonzero().flatten(), fill)
