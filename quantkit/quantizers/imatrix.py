"""The capture of an importance matrix: sums of squares at the input of every linear, block by block (``gguf.md`` 6).

At any time one block's weights, the calibration activations and a vector for each linear of the model are in memory. Knows the
names of GGUF tensors from the architecture table; knows no file form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from quantkit.arch.spec import ModelSpec
from quantkit.errors import InputError
from quantkit.formats.imatrix import Imatrix, ImatrixEntry
from quantkit.model.decoder import LayerNorm, Norm, RmsNorm
from quantkit.model.load import embedded
from quantkit.progress import Progress
from quantkit.quantizers.calibration import CalibrationStream, CalibrationTokens, owners
from quantkit.quantizers.pipeline import TILE_TOKENS, Source

HEAD = "output.weight"


class SquareSums:
    """Sums the squares of each input column, tile by tile in a fixed order: in float32 within a tile, in float64 over them."""

    def __init__(self, shared: Mapping[str, str]) -> None:
        self._owners = frozenset(shared.values())
        self.sums: dict[str, Tensor] = {}
        """Role -> ``[K]`` float64, of the roles whose input others share."""
        self.tokens: dict[str, int] = {}

    def tap(self, role: str, x: Tensor) -> None:
        """Add one tile: ``x [T, K]`` is the input of the linear ``role``."""
        if role not in self._owners or not x.shape[0]:
            return
        if role not in self.sums:
            self.sums[role], self.tokens[role] = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device), 0
        self.sums[role] += x.float().square().sum(0)
        self.tokens[role] += x.shape[0]


def tensor_roles(spec: ModelSpec, layer: int) -> dict[str, tuple[str, ...]]:
    """GGUF name of each weight of a block -> the roles whose inputs its matrices read: one, or an expert after the other."""
    found: dict[str, list[str]] = {}
    for role in spec.block_linears(layer):
        roles = found.setdefault(f"blk.{layer}.{spec.linears[role].gguf}.weight", [])
        if not roles or role.startswith("experts."):  # roles that are fused in one tensor have one input
            roles.append(role)
    return {name: tuple(roles) for name, roles in found.items()}


@torch.inference_mode()
def captured(
    source: Source, calibration: CalibrationTokens, *, output: bool, offload: Callable[[Tensor], Tensor], progress: Progress
) -> Imatrix:
    """The importance matrix of ``source`` over ``calibration``, every window from its beginning; with ``output`` the head's too, which
    is one of its own.

    ``offload`` says where the activations lie. An expert that no token reached has a count of 0. Raises InputError for activations
    that are not finite.
    """
    spec = source.spec
    assert not (output and spec.tied)
    hidden = embedded(source.checkpoint, spec, calibration.tokens, dtype=source.compute_dtype)
    stream = CalibrationStream(offload(hidden), TILE_TOKENS // calibration.tokens.shape[1])
    entries: dict[str, ImatrixEntry] = {}
    for layer in range(spec.layers):
        progress("imatrix", layer, spec.layers)
        collector = SquareSums(owners(spec, layer))
        stream.advance(source.loaded(layer), [collector], [source.device])
        entries |= _entries(spec, layer, collector)
    if output:
        collector = SquareSums({HEAD: HEAD})
        norm = _final_norm(source)
        for _, tile, _ in stream.tiles(source.device, slice(0, calibration.tokens.shape[0])):
            collector.tap(HEAD, norm(tile))
        entries[HEAD] = _entry(HEAD, [(collector.sums[HEAD], collector.tokens[HEAD])])
    progress("imatrix", spec.layers, spec.layers)
    samples, length = calibration.tokens.shape
    return Imatrix(MappingProxyType(entries), (calibration.source,), samples, length)


def _final_norm(source: Source) -> Norm:
    """The norm before the head, in the compute dtype."""
    spec, arch = source.spec, source.spec.architecture
    parts = {part: source.read(f"{arch.final_norm}.{part}").to(source.compute_dtype) for part in spec.norm_parts}
    if "bias" in parts:
        return LayerNorm(parts["weight"], parts["bias"], spec.eps)
    return RmsNorm(parts["weight"], spec.eps, arch.norm_offset)


def _entries(spec: ModelSpec, layer: int, collector: SquareSums) -> Iterator[tuple[str, ImatrixEntry]]:
    """What ``collector`` saw of one block, by GGUF name."""
    shared = owners(spec, layer)
    for name, roles in tensor_roles(spec, layer).items():
        _, k = spec.linear_shape(roles[0])
        unreached = torch.zeros(k, dtype=torch.float64), 0
        seen = [
            (collector.sums[owner], collector.tokens[owner]) if owner in collector.sums else unreached
            for owner in (shared[role] for role in roles)
        ]
        yield name, _entry(name, seen)


def _entry(name: str, seen: list[tuple[Tensor, int]]) -> ImatrixEntry:
    """The entry of the sums and tokens of each matrix. Raises InputError for sums that float32 does not hold."""
    sums = torch.stack([total.cpu() for total, _ in seen]).float().numpy()  # [n_mat, K]
    if not np.isfinite(sums).all():
        raise InputError(name, "the squares of its inputs are too large for float32", "a model whose activations are smaller")
    return ImatrixEntry(sums, np.array([tokens for _, tokens in seen], np.float32))
