"""The paged cache returns what was put in, wherever its blocks lie; float8 rounds it; sequences share blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_fixtures import GrowingCache, awq_checkpoint, batch_of, config_of, logits_of, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.model.load import load_decoder
from quantkit.runtime.blocks import BLOCK, blocks_for
from quantkit.runtime.kv_cache import PagedCache, cache_for, kv_block_bytes, whole_cache

CPU = torch.device("cpu")


def small(blocks: int, kv_heads: int = 3, *, fp8: bool = False) -> PagedCache:
    cache = PagedCache(2, kv_heads, 4, torch.float32, CPU, blocks, fp8=fp8)
    cache.pool.view(torch.uint8).fill_(255)  # NaN in every dtype: what was not put in must not be seen
    return cache


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50)), max_size=12),
    st.integers(0, 3),
    st.permutations(range(60)) | st.just(list(range(60))),
    st.booleans(),
)
def test_it_returns_all_that_was_put_in(passes: list[tuple[int, int]], kv_heads: int, blocks: list[int], fp8: bool) -> None:
    """Any mix of passes over three sequences, alone or two at once, in blocks that come one after the other or in any order."""
    ours, plain, left = small(60, kv_heads, fp8=fp8), GrowingCache(), list(blocks)
    lengths = [0, 0, 0]
    while passes:
        now = passes[: 1 + (len(passes) > 1 and passes[0][0] < passes[1][0])]
        passes = passes[len(now) :]
        stretches = []
        for sequence, count in now:
            need = blocks_for(lengths[sequence] + count) - blocks_for(lengths[sequence])
            ours.extend(sequence, left[:need], 0)
            del left[:need]
            stretches.append((lengths[sequence], lengths[sequence] + count))
            lengths[sequence] += count
        batch = batch_of(stretches, tuple(sequence for sequence, _ in now))
        for layer in range(2):
            k = torch.randn(len(batch.positions), kv_heads, 4, generator=torch.Generator().manual_seed(sum(lengths) + layer))
            stored = k.to(torch.float8_e4m3fn).float() if fp8 else k
            ours.write(layer, batch, k, -k)
            plain.write(layer, batch, stored, -stored)
            for sequence, _ in now:
                for got, want in zip(ours.held(layer, sequence), plain.held(layer, sequence), strict=True):
                    assert torch.equal(got, want)
    for sequence in ours.sequences:
        assert ours.tokens(sequence) == lengths[sequence]


def test_neighbouring_blocks_are_not_copied() -> None:
    cache = small(8)
    cache.extend(0, [2, 3, 4], 0)
    batch = batch_of([(0, 40)], (0,))
    cache.write(0, batch, torch.ones(40, 3, 4), torch.ones(40, 3, 4))
    keys, values = cache.held(0, 0)
    assert keys.data_ptr() == cache.pool[0, 0, 2].data_ptr() and values.data_ptr() == cache.pool[0, 1, 2].data_ptr()
    keys, values = cache.places(1)
    assert keys[2 * BLOCK].data_ptr() == cache.pool[1, 0, 2].data_ptr() and values.shape == (9 * BLOCK, 3, 4)
    assert cache.slots(batch).tolist() == list(range(2 * BLOCK, 2 * BLOCK + 40)) and cache.nowhere == 8 * BLOCK
    with pytest.raises(AssertionError):
        cache.write(0, batch_of([(40, 49)], (0,)), torch.ones(9, 3, 4), torch.ones(9, 3, 4))


def test_a_second_sequence_sees_the_blocks_of_the_first() -> None:
    cache = small(8)
    cache.extend(0, [5, 1], 0)
    k, more = torch.randn(20, 3, 4), torch.randn(3, 3, 4)
    batch = batch_of([(0, 20)], (0,))
    for layer in range(2):
        cache.write(layer, batch, k, -k)
    cache.free(0)
    cache.extend(1, [5, 6], BLOCK)
    batch = batch_of([(BLOCK, BLOCK + 3)], (1,))
    for layer in range(2):
        cache.write(layer, batch, more, -more)
        keys, values = cache.held(layer, 1)
        assert torch.equal(keys, torch.cat((k[:BLOCK], more))) and torch.equal(values, -keys)
    assert cache.sequences == (1,) and cache.tokens(1) == BLOCK + 3
    cache.free(7)


def test_float8_takes_half_of_16_bits_and_large_values_stay_numbers() -> None:
    cache = PagedCache(2, 3, 4, torch.bfloat16, CPU, 5, fp8=True)
    assert cache.nbytes * 2 == PagedCache(2, 3, 4, torch.bfloat16, CPU, 5).nbytes == 2 * 2 * 6 * BLOCK * 3 * 4 * 2
    cache.extend(0, [4], 0)
    cache.write(1, batch_of([(0, 1)], (0,)), torch.full((1, 3, 4), 1e4), torch.full((1, 3, 4), -1e4))
    keys, values = cache.held(1, 0)
    assert set(keys.flatten().tolist()) == {448} and set(values.flatten().tolist()) == {-448} and keys.dtype == torch.bfloat16


def test_every_float8_is_read_as_what_it_is() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)
    cache = PagedCache(1, 1, 254, torch.float32, CPU, 1, fp8=True)
    cache.extend(0, [0], 0)
    k = numbers.float().view(1, 1, 254)
    cache.write(0, batch_of([(0, 1)], (0,)), k, -k)
    keys, values = cache.held(0, 0)
    assert torch.equal(keys, k) and torch.equal(values, -k)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_cached_is_uncached(family: str) -> None:
    """Sliding and full layers, a prompt in two pieces and then token by token: the logits of the whole text in one pass."""
    checkpoint: Any = awq_checkpoint(config_of(family) | {"head_dim": 16, "intermediate_size": 96, "tie_word_embeddings": True}, 16)
    decoder = load_decoder(checkpoint, dtype=torch.float64, parity=True)
    (text,) = texts_of((43,))
    want = logits_of(decoder, [text])[0]
    scattered = cache_for(decoder, 9)
    scattered.extend(0, [7, 2, 4], 0)
    assert scattered.nbytes == 10 * kv_block_bytes(decoder, False)  # one is nobody's
    for cache in (whole_cache(decoder, 43), scattered):
        rows = []
        for start, stop in ((0, 19), (19, 24), *((i, i + 1) for i in range(24, 43))):
            rows.append(decoder.logits(decoder.forward(text[start:stop], batch_of([(start, stop)], (0,)), cache)))
        assert float((torch.cat(rows) - want).abs().max()) < 1e-10


def test_what_a_graph_is_told() -> None:
    """A token more of each: where it goes, how many keys there are with it, and a block that the table on the device lacks."""
    cache = PagedCache(1, 1, 4, torch.float32, CPU, 9, sequences=2, longest=40)
    assert cache.table.shape == (3, 3)
    cache.extend(5, [8, 3], 0)
    cache.extend(6, [1], 0)
    batch = batch_of([(0, 16), (0, 3)], (5, 6))
    cache.write(0, batch, torch.ones(19, 1, 4), torch.ones(19, 1, 4))
    assert cache.decode((5, 6)) is None, "two blocks at once"
    cache.pages(batch, 1)
    first, second = cache.row(5), cache.row(6)
    assert {first, second} == {1, 2} and cache.table[first].tolist() == [8, 3, 0]
    assert cache.decode((5, 6)) == [(16, 3 * BLOCK, 17, first, 0, 0), (3, BLOCK + 3, 4, second, 0, 0)]
    for _ in range(15):
        cache.decode((5,))
    cache.extend(5, [4], 0)
    assert cache.decode((5,)) == [(32, 4 * BLOCK, 33, first, 3 * first + 2, 4)]
    cache.free(5)
    cache.extend(7, [0], 0)
    assert cache.row(7) == first
