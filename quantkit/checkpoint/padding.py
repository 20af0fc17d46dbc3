"""A checkpoint whose MLPs are wider by channels of zeros, so that every rank can get an equal part of whole groups (``formats.md`` 11).

A view: a tensor is read from where it lies, and zeros are put between or behind its values. silu(0) * 0 = 0, and the columns of zeros in
down multiply it: what the model computes stays the same. Heads and the vocabulary are not padded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.arch.spec import ModelSpec, padded_size
from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import Checkpoint

Places = NDArray[np.int64]
"""Of each place along an axis, where its value lies in the source; -1 is a zero."""


def spread(size: int, padded: int) -> Places:
    """``size`` channels among ``padded``: from the first on, each second place is a zero until no zeros are left.

    So no group along the axis is all zeros, unless there are more zeros than channels.
    """
    zeros = padded - size
    mixed = min(size, zeros)
    places = np.full(padded, -1, np.int64)
    places[0 : 2 * mixed : 2] = np.arange(mixed)
    places[2 * mixed : mixed + size] = np.arange(mixed, size)
    return places


def appended(size: int, padded: int) -> Places:
    """``size`` channels, then zeros."""
    return np.concatenate([np.arange(size), np.full(padded - size, -1, np.int64)])


@dataclass(frozen=True, slots=True)
class Padding:
    """``sizes``: dim -> (channels, channels with zeros), of those that grow. ``mixed``: zeros lie between channels, not behind them."""

    sizes: Mapping[str, tuple[int, int]]
    mixed: bool

    def to_json(self) -> dict[str, list[int]]:
        """As a manifest records it: dim -> [channels, channels with zeros]."""
        return {dim: list(both) for dim, both in self.sizes.items()}

    def grows(self, spec: ModelSpec, roles: tuple[str, ...]) -> bool:
        """Whether the linear that is stored for ``roles`` gets rows or columns of zeros."""
        return not self.sizes.keys().isdisjoint({spec.linears[roles[0]].inp, *(spec.linears[role].out for role in roles)})

    def places(self, spec: ModelSpec, dim: str) -> Places:
        """Along a named dim of the unpadded model."""
        if dim not in self.sizes:
            return np.arange(spec.dims[dim].elements)
        return (spread if self.mixed else appended)(*self.sizes[dim])

    def rows(self, spec: ModelSpec, roles: tuple[str, ...]) -> Places:
        """Along the outputs of the linear that is stored for ``roles``, all of them one after the other."""
        found, first = [], 0
        for role in roles:
            places = self.places(spec, spec.linears[role].out)
            found.append(np.where(places < 0, -1, places + first))
            first += spec.linear_shape(role)[0]
        return np.concatenate(found)

    def columns(self, spec: ModelSpec, roles: tuple[str, ...]) -> Places:
        """Along the inputs of that linear."""
        return self.places(spec, spec.linears[roles[0]].inp)


def padding_for(spec: ModelSpec, tp: int, granules: Mapping[str, int], *, mixed: bool) -> Padding:
    """What has to grow so that ``tp`` ranks get equal parts of whole ``granules`` of every MLP's width (a key of FFN_DIMS)."""
    sizes = {dim: (spec.dims[dim].size, padded_size(spec.dims[dim].size, tp, granule)) for dim, granule in granules.items()}
    return Padding(MappingProxyType({dim: both for dim, both in sizes.items() if both[0] != both[1]}), mixed)


def padded_config(config: Mapping[str, Any], spec: ModelSpec, padding: Padding) -> dict[str, Any]:
    """``config.json`` of the wider model."""
    arch = spec.architecture
    keys = {"ffn": "intermediate_size", "shared_ffn": "shared_expert_intermediate_size"}
    if arch.experts is not None:
        keys["expert_ffn"] = arch.experts.size_key
    sizes = {keys[dim]: after * (arch.ffn_divisor if dim == "ffn" else 1) for dim, (_, after) in padding.sizes.items()}
    return {**config, **{arch.keys.get(key, key): size for key, size in sizes.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedCheckpoint(Checkpoint):
    """``padded``'s result: ``source`` with zeros; ``places`` of every axis of every tensor that grows."""

    source: Checkpoint
    padding: Padding
    places: Mapping[str, tuple[Places, ...]]

    def fill(self, out: NDArray[Any], name: str, index: tuple[slice, ...], view: tuple[int, ...] | None = None) -> None:
        """As ``Checkpoint.fill``; a tensor that grows has no other view."""
        if name not in self.places:
            self.source.fill(out, name, index, view)
            return
        assert view is None, name
        wanted = [each[part] for each, part in zip(self.places[name], index, strict=True)]
        held = [each[each >= 0] for each in wanted]  # ascending
        inner = tuple(slice(int(each[0]), int(each[-1]) + 1) if len(each) else slice(0, 0) for each in held)
        own = self.source.read(name, inner)
        out[...] = 0
        to, since = ([np.flatnonzero(each >= 0) for each in wanted], [each - part.start for each, part in zip(held, inner, strict=True)])
        out[np.ix_(*to)] = own[np.ix_(*since)]


def padded(checkpoint: Checkpoint, padding: Padding, *, without: Collection[str] = ()) -> PaddedCheckpoint:
    """``checkpoint`` with the float weights and biases of its MLPs padded; tensors named in ``without`` stay as they are."""
    spec = spec_for(checkpoint.config)
    found: dict[str, tuple[Places, ...]] = {}
    for layer in range(spec.layers):
        for path, roles in spec.block_modules(layer).items():
            if not padding.grows(spec, roles):
                continue
            both = padding.rows(spec, roles), padding.columns(spec, roles)
            found[f"{path}.weight"] = both[::-1] if spec.linears[roles[0]].transposed else both
            found[f"{path}.bias"] = both[:1]
    found = {name: places for name, places in found.items() if name in checkpoint.tensors and name not in without}
    tensors = dict(checkpoint.tensors)
    for name, places in found.items():
        shape = tuple(map(len, places))
        nbytes = tensors[name].nbytes * math.prod(shape) // math.prod(tensors[name].shape)
        tensors[name] = replace(tensors[name], shape=shape, nbytes=nbytes)
    return PaddedCheckpoint(
        root=checkpoint.root,
        kind=checkpoint.kind,
        config=padded_config(checkpoint.config, spec, padding),
        tensors=MappingProxyType(tensors),
        gguf=checkpoint.gguf,
        source=checkpoint,
        padding=padding,
        places=MappingProxyType(found),
    )
