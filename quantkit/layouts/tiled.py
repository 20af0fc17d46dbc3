"""From the stored parts of a linear to the tiles of the CUDA kernels: exact, on the device that the parts are on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.formats.quant_state import parse_quant_state
from quantkit.geometry import Geometry
from quantkit.layouts.base import Codebook, Codec, GroupedInt, SuperBlock
from quantkit.layouts.bnb import state_suffix
from quantkit.ops import tiles as ops
from quantkit.ops.tiles import Tiles


def tiles_of(parts: Mapping[str, Tensor], geometry: Geometry, codec: Codec) -> Tiles | None:
    """The tiles of ``parts``; None where tiles cannot hold them (other widths, groups or scales), and they run as they are stored.

    Raises InputError as ``codec.unpack`` does.
    """
    scheme = geometry.scheme
    if scheme.code not in ops.GGML_KINDS if scheme.layout == "ggml" else scheme.bits != 4:
        return None
    result = codec.unpack(parts, geometry)
    if isinstance(result, GroupedInt):
        return _grouped(result)
    if isinstance(result, Codebook):
        return _codebook(result, parts, geometry)
    return ops.pack_ggml(result.blocks, result.kind) if isinstance(result, SuperBlock) else None


def _grouped(result: GroupedInt) -> Tiles | None:
    k, group = result.codes.shape[1], result.codes.shape[1] // result.scales.shape[1]
    if result.scales.dtype not in (torch.float16, torch.bfloat16):
        return None
    if result.g_idx is None:
        return ops.pack_int4(result.codes, result.scales, result.zeros) if ops.group_supported(k, group) else None
    # Act-order: inputs in the order of their groups. A cut along K has parts of groups; it stays as it is stored.
    counts = torch.bincount(result.g_idx.long(), minlength=result.scales.shape[1])
    if not ops.group_supported(k, group) or bool((counts != group).any()):
        return None
    perm = result.g_idx.argsort(stable=True)
    return ops.pack_int4(result.codes[:, perm], result.scales, result.zeros, perm.to(torch.int32))


def _codebook(result: Codebook, parts: Mapping[str, Tensor], geometry: Geometry) -> Tiles | None:
    table, block, k = parts["weight.quant_map"], result.block_size, result.codes.shape[1]
    if not ops.codebook_group(k, block):
        return None
    if not geometry.scheme.double_quant or block != 64 or geometry.whole[1] % block or not bool((table == 0).any()):
        return ops.pack_codebook(result.codes, result.absmax, table, block)
    suffix = state_suffix(geometry)
    offset = parse_quant_state(bytes(parts[suffix].cpu().numpy().tobytes()), suffix).nested_offset
    assert offset is not None, "unpack has compared the state with the scheme"
    stride = geometry.whole[1] // block
    side = (table, parts["weight.nested_quant_map"], parts["weight.nested_absmax"], offset)
    return ops.pack_nested(result.codes, parts["weight.absmax"], *side, geometry.origin[0] * stride + geometry.origin[1] // block, stride)
