"""The contiguous cache returns what was put in, grows within a sequence's room, counts its bytes and gives them back."""

from __future__ import annotations

import pytest
import torch
from decoder_fixtures import GrowingCache, awq_checkpoint, batch_of, config_of, logits_of, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.model.load import load_decoder
from quantkit.runtime.kv_cache import ContiguousCache, cache_for, contiguous_cache

CPU = torch.device("cpu")


def small(layers: int = 2, kv_heads: int = 3) -> ContiguousCache:
    return ContiguousCache(layers, kv_heads, 4, torch.float32, CPU)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 90)), max_size=12), st.integers(0, 3))
def test_it_returns_all_that_was_put_in(passes: list[tuple[int, int]], kv_heads: int) -> None:
    """Any mix of passes over three sequences: both layers see what a cache that only concatenates would show."""
    ours, plain = small(kv_heads=kv_heads), GrowingCache()
    for sequence in range(3):
        ours.open(sequence, sum(count for owner, count in passes if owner == sequence))
    for number, (sequence, count) in enumerate(passes):
        for layer in range(2):
            k = torch.randn(count, kv_heads, 4, generator=torch.Generator().manual_seed(100 * number + layer))
            got, want = ours.update(layer, sequence, k, -k), plain.update(layer, sequence, k, -k)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    for sequence in range(3):
        assert ours.tokens(sequence) == sum(count for owner, count in passes if owner == sequence)


def test_memory_is_counted_bounded_by_the_room_and_given_back() -> None:
    cache = small()
    assert cache.bytes_per_token == 2 * 2 * 3 * 4 * 4 and cache.nbytes == 0
    cache.open(7, 1000)
    cache.open(8, 5)
    assert cache.nbytes == (64 + 5) * cache.bytes_per_token
    for step in (50, 50, 400, 500):
        for layer in range(2):
            cache.update(layer, 7, torch.ones(step, 3, 4), torch.ones(step, 3, 4))
    assert cache.nbytes == (1000 + 5) * cache.bytes_per_token
    with pytest.raises(AssertionError):
        cache.update(0, 7, torch.ones(1, 3, 4), torch.ones(1, 3, 4))
    cache.free(7)
    assert cache.nbytes == 5 * cache.bytes_per_token and cache.sequences == (8,)
    cache.free(8)
    assert cache.nbytes == 0 and cache.sequences == ()
    cache.open(7, 10)
    assert cache.tokens(7) == 0


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_cached_is_uncached(family: str) -> None:
    """Sliding and full layers, a prompt in two pieces and then token by token: the logits of the whole text in one pass."""
    checkpoint = awq_checkpoint(config_of(family) | {"head_dim": 16, "intermediate_size": 96, "tie_word_embeddings": True}, 16)
    decoder = load_decoder(checkpoint, dtype=torch.float64, parity=True)
    (text,) = texts_of((23,))
    want = logits_of(decoder, [text])[0]
    for cache in (contiguous_cache(decoder, 23), cache_for(decoder)):
        if not cache.sequences:
            cache.open(0, 23, allocate=1)
        rows = []
        for start, stop in ((0, 9), (9, 14), *((i, i + 1) for i in range(14, 23))):
            rows.append(decoder.logits(decoder.forward(text[start:stop], batch_of([(start, stop)], (0,)), cache)))
        assert float((torch.cat(rows) - want).abs().max()) < 1e-10
        assert cache.nbytes == 23 * cache.bytes_per_token
