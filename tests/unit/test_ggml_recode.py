"""Codes put into ggml's blocks: taken out and put back they are the same bytes, and others decode to what the grid says of them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from quantkit.ops.ggml.encode import encode
from quantkit.ops.ggml.recode import ZEROS, codes, grid, recode


def blocks(kind: str) -> torch.Tensor:
    values = np.random.default_rng(3).standard_normal((5, 768)).astype(np.float32)
    values[0, :256] = 0
    return torch.from_numpy(encode(values, kind))


@pytest.mark.parametrize("kind", ZEROS)
def test_codes_put_back_are_the_same_bytes(kind: str) -> None:
    data = blocks(kind)
    found = codes(data, kind)
    assert found.shape == (5, 768)
    assert int(found.max()) == 2 ** grid(data, kind).bits - 1
    assert torch.equal(recode(data, kind, found), data)


@pytest.mark.parametrize("kind", ZEROS)
def test_other_codes_decode_to_what_the_grid_says(kind: str) -> None:
    data = blocks(kind)
    found = grid(data, kind)
    other = torch.randint(0, 2**found.bits, (5, 768), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    group = 768 // found.scales.shape[1]
    assert group == (16 if kind in ("Q2_K", "Q3_K", "Q6_K") else 32)
    expected = (other.float() - found.zero).reshape(5, -1, group) * found.scales.unsqueeze(-1)
    if found.offsets is not None:
        expected += found.offsets.unsqueeze(-1)
    changed = recode(data, kind, other)
    decoded = gguf.quants.dequantize(changed.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(decoded, expected.reshape(5, 768).numpy())
    assert torch.equal(codes(changed, kind), other)
    assert torch.equal(data, blocks(kind)), "what was given is not changed"
