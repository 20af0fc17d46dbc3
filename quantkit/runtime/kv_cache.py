"""Keys and values of running sequences, one contiguous store per sequence, grown by doubling up to its room.

Keeps the ``KVCache`` protocol of ``model.attention``. It knows layers, heads and tokens; no requests, no ranks, no schedule.
Sliding layers keep all their tokens too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.model.decoder import Decoder

FIRST_TOKENS = 64
"""A sequence starts with room for this many tokens, or for what its first pass brings."""


@dataclass(slots=True)
class _Store:
    """One sequence: per layer ``(keys, values)``, two views ``[capacity, KV, D]`` of ``memory``; and the tokens each layer holds."""

    room: int
    memory: Tensor  # [L, 2, capacity, KV, D]
    views: list[tuple[Tensor, Tensor]]
    held: list[int]

    @property
    def capacity(self) -> int:
        return int(self.memory.shape[2])


def _views(memory: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(keys, values) for keys, values in (layer.unbind(0) for layer in memory.unbind(0))]


class ContiguousCache:
    """A KV cache for the KV heads of one rank."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._layers, self._kv_heads, self._head_dim = layers, kv_heads, head_dim
        self._dtype, self._device = dtype, device
        self._stores: dict[int, _Store] = {}

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes over all layers."""
        return 2 * self._layers * self._kv_heads * self._head_dim * self._dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return sum(store.memory.nbytes for store in self._stores.values())

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences that hold memory here."""
        return tuple(self._stores)

    def tokens(self, sequence: int) -> int:
        """How many tokens of ``sequence`` every layer holds."""
        return min(self._stores[sequence].held)

    def open(self, sequence: int, room: int, *, allocate: int = FIRST_TOKENS) -> None:
        """Begin ``sequence``, which may come to hold ``room`` tokens; memory for ``allocate`` of them is taken now."""
        assert sequence not in self._stores and room >= 0
        memory = self._empty(min(room, allocate))
        self._stores[sequence] = _Store(room, memory, _views(memory), [0] * self._layers)

    def free(self, sequence: int) -> None:
        """Forget ``sequence`` and give its memory back."""
        del self._stores[sequence]

    def update(self, layer: int, sequence: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``k``, ``v [t, KV, D]``; return all of the sequence so far: two ``[S, KV, D]``, views of the store."""
        keys, values = self.reserve(layer, sequence, k.shape[0])
        first = keys.shape[0] - k.shape[0]
        keys[first:] = k
        values[first:] = v
        return keys, values

    def reserve(self, layer: int, sequence: int, tokens: int) -> tuple[Tensor, Tensor]:
        """``update`` for a caller that writes the last ``tokens`` rows of what is returned itself, at once."""
        store = self._stores[sequence]
        stop = store.held[layer] + tokens
        if stop > store.capacity:
            self._grow(store, stop)
        store.held[layer] = stop
        keys, values = store.views[layer]
        return keys[:stop], values[:stop]

    def _empty(self, tokens: int) -> Tensor:
        return torch.empty(self._layers, 2, tokens, self._kv_heads, self._head_dim, dtype=self._dtype, device=self._device)

    def _grow(self, store: _Store, tokens: int) -> None:
        assert tokens <= store.room, (tokens, store.room)
        memory = self._empty(min(store.room, max(tokens, 2 * store.capacity)))
        held = max(store.held)
        memory[:, :, :held] = store.memory[:, :, :held]
        store.memory, store.views = memory, _views(memory)


def cache_for(decoder: Decoder) -> ContiguousCache:
    """An empty cache for the layers and KV heads that ``decoder`` holds, in its dtype and on its device."""
    return ContiguousCache(decoder.spec.layers, decoder.kv_heads, decoder.spec.head_dim, decoder.dtype, decoder.device)


def contiguous_cache(decoder: Decoder, tokens: int) -> ContiguousCache:
    """A cache for ``decoder`` with memory for ``tokens`` of sequence 0, taken now."""
    cache = cache_for(decoder)
    cache.open(0, tokens, allocate=tokens)
    return cache
