"""Codes in 32-bit words, least significant bits first: a dense stream along one axis (``formats.md`` 2.1 and 4.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """``codes [K, N]`` -> int32 ``[ceil(K * bits / 32), N]``: a stream of codes down each column, zero bits at its end."""
    per, words = _unit(bits)
    k, n = codes.shape
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -k % per)).to(torch.int64).reshape(-1, per, n)
    out = torch.zeros(padded.shape[0], words, n, dtype=torch.int64, device=codes.device)
    for index in range(per):
        word, shift = divmod(index * bits, 32)
        out[:, word] |= padded[:, index] << shift
        if shift + bits > 32:
            out[:, word + 1] |= padded[:, index] >> (32 - shift)
    flat = out.reshape(-1, n)[: math.ceil(k * bits / 32)]
    return flat.to(torch.int32)  # int64 -> int32 keeps the low 32 bits


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of ``pack_rows``: int32 ``[words, N]`` -> uint8 codes ``[count, N]``, for widths of whole codes to a byte a view of
    ``[N, count]``."""
    if 8 % bits == 0:
        stored = packed.T.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # [N, 4 * words]
        codes = torch.empty(*stored.shape, 8 // bits, dtype=torch.uint8, device=packed.device)
        for index in range(8 // bits):
            codes[..., index] = (stored >> index * bits) & (2**bits - 1)
        return codes.flatten(1)[:, :count].T
    per, words = _unit(bits)
    n = packed.shape[1]
    padded = torch.nn.functional.pad(packed, (0, 0, 0, -packed.shape[0] % words))
    wide = (padded.to(torch.int64) & 0xFFFFFFFF).reshape(-1, words, n)
    out = torch.empty(wide.shape[0], per, n, dtype=torch.uint8, device=packed.device)
    top = 2**bits - 1
    for index in range(per):
        word, shift = divmod(index * bits, 32)
        code = wide[:, word] >> shift
        if shift + bits > 32:
            code = code | (wide[:, word + 1] << (32 - shift))
        out[:, index] = (code & top).to(torch.uint8)
    return out.reshape(-1, n)[:count]


def _unit(bits: int) -> tuple[int, int]:
    """(codes, words) of the smallest run of whole words that holds whole codes."""
    return (32 // bits, 1) if 32 % bits == 0 else (32, bits)
