"""Tiles, the layout of packed weights that the CUDA kernels read: packing, unpacking and dequantizing, in torch on any device.

``kernels/tiles.cuh`` says where every bit lies. These functions are the reference of ``kernels/tiles`` and make what all kernels of
linears read. Knows neutral numbers (codes, scales, zeros) and ggml's blocks; knows no file and no layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from quantkit.geometry import GGML_BLOCKS, NESTED_BLOCK
from quantkit.ops.ggml.decode import LEVELS, affine, six_bits

ROWS = 64
GROUPS = (32, 64, 128)
"""Columns that may share a scale within a tile; a longer group is written once in each tile."""
CHUNK = 1 << 25
"""Weights that are packed at a time: what bounds the temporaries, of up to four bytes a weight."""


class Format(IntEnum):
    """What a tile holds; the numbers are those of ``kernels/quantkit.h``."""

    INT4 = 0
    INT4Z = 1
    NF4 = 2
    NF4N = 3
    Q4_K = 4
    Q5_K = 5
    Q6_K = 6
    Q8_0 = 7


_BITS = {Format.Q5_K: 5, Format.Q6_K: 6, Format.Q8_0: 8}
_BOOKS = (Format.NF4, Format.NF4N)
_SUPER = (Format.Q4_K, Format.Q5_K, Format.Q6_K)
GGML_KINDS = frozenset({"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS"})
"""ggml's block types that tiles hold: Q4_0 as INT4, IQ4_NL and IQ4_XS as NF4 with a table of their own."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """A packed weight ``[N, K]``, and what its tiles do not hold themselves.

    ``data`` uint8 ``[ceil(N / 64), ceil(K / columns), bytes of a tile]``. ``group``: weights of a row that share a scale; the kernels see
    at most 128. ``table`` float32 [16] of NF4 and NF4N. NF4N: ``code`` float32 [256], ``absmax2`` float32 [C], ``offsets`` float32
    [ceil(N / 64)], and the number of block ``b`` of row ``n`` in the uncut matrix is ``block0 + n * block_stride + b``. ``perm`` int32 [K]:
    column ``k`` of the tiles multiplies input ``perm[k]`` (None: input ``k``).
    """

    data: Tensor
    format: Format
    n: int
    k: int
    group: int
    scale_dtype: torch.dtype = torch.float16
    table: Tensor | None = None
    code: Tensor | None = None
    absmax2: Tensor | None = None
    offsets: Tensor | None = None
    block0: int = 0
    block_stride: int = 0
    perm: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, side tables included."""
        return sum(part.nbytes for part in (self.data, self.table, self.code, self.absmax2, self.offsets, self.perm) if part is not None)


@dataclass(frozen=True, slots=True)
class Values:
    """What tiles hold, in the order of rows and columns.

    ``codes [N, K]`` uint8 (Q8_0: int8). ``scales``: INT4, INT4Z ``[N, G]`` of the scales' dtype; NF4 ``[N, G]`` float32; NF4N ``[N, G]``
    uint8; Q4_K, Q5_K ``[N, K / 256, 8, 2]`` uint8 (scale, minimum); Q6_K ``[N, K / 16]`` int8; Q8_0 ``[N, K / 32]`` float16. ``second``:
    INT4Z zeros ``[N, G]`` uint8; Q4_K, Q5_K ``[N, K / 256, 2]`` float16 (d, dmin); Q6_K ``[N, K / 256]`` float16; else None.
    """

    codes: Tensor
    scales: Tensor
    second: Tensor | None = None


def columns(form: Format) -> int:
    """Columns of a tile."""
    return 256 if form in _SUPER else 128


def _ordered(rows: Tensor) -> Tensor:
    """``[S, 64, ...]`` rows -> row order: a lane's two rows, 8 apart, become neighbours."""
    return torch.unflatten(rows, 1, (4, 2, 8)).transpose(2, 3).flatten(1, 3)


def _natural(rows: Tensor) -> Tensor:
    """Inverse of ``_ordered``."""
    return torch.unflatten(rows, 1, (4, 8, 2)).transpose(2, 3).flatten(1, 3)


def _bytes(values: Tensor) -> Tensor:
    """``[S, T, ...]`` of any dtype -> uint8 ``[S, T, bytes]``."""
    return values.contiguous().flatten(2).view(torch.uint8)


def _by_group(values: Tensor) -> Tensor:
    """``[S * 64, T, J]`` -> the bytes of ``[S, T][J][64 in row order]``."""
    return _bytes(_ordered(torch.unflatten(values, 0, (-1, ROWS))).permute(0, 2, 3, 1))


def _by_row(values: Tensor) -> Tensor:
    """``[S * 64, T, X]`` -> the bytes of ``[S, T][64 in row order][X]``."""
    return _bytes(_ordered(torch.unflatten(values, 0, (-1, ROWS))).transpose(1, 2))


def _from_groups(section: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of ``_by_group``: bytes ``[S, T, J * 64 * size]`` -> ``[S * 64, T, J]``."""
    values = torch.unflatten(section.contiguous().view(dtype), 2, (-1, ROWS))  # [S, T, J, 64]
    return _natural(values.permute(0, 3, 1, 2)).flatten(0, 1)


def _from_rows(section: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of ``_by_row``: bytes ``[S, T, 64 * X * size]`` -> ``[S * 64, T, X]``."""
    values = torch.unflatten(section.contiguous().view(dtype), 2, (ROWS, -1))  # [S, T, 64, X]
    return _natural(values.transpose(1, 2)).flatten(0, 1)


def _code_bytes(codes: Tensor, form: Format, width: int) -> Tensor:
    """``codes [S * 64, T * width]`` uint8 -> the codes and planes of their tiles, uint8 ``[S, T, bytes]``.

    A column is ``64 h + 16 s + 8 c + 2 t + e``, a row ``16 w + 8 r + g``; lane is ``4 g + t``, and pair is ``2 c + r``.
    """
    x = codes.view(-1, 4, 2, 8, codes.shape[1] // width, width // 64, 4, 2, 4, 2)  # S w r g T h s c t e
    bits = _BITS.get(form, 4)
    if form in _BOOKS:  # a byte for each pair
        return _bytes((x[..., 0] | (x[..., 1] << 4)).permute(0, 4, 1, 5, 3, 8, 6, 7, 2))  # S T w h g t s c r
    if bits == 8:
        x = torch.unflatten(x, 6, (2, 2))  # S w r g T h u v c t e
        return _bytes(x.permute(0, 4, 1, 5, 6, 3, 9, 7, 8, 2, 10))  # S T w h u g t v c r e
    r0, r1 = x[:, :, 0], x[:, :, 1]  # S w g T h s c t e
    sections = [_bytes(((r0 & 15) | ((r1 & 15) << 4)).permute(0, 3, 1, 4, 2, 7, 5, 8, 6))]  # S T w h g t s e c
    if bits == 5:
        high = ((r0 >> 4) | (r1 & 16)).permute(0, 3, 1, 4, 2, 7, 8, 6, 5)  # S T w h g t e c s
        sections.append(_bytes(high[..., 0] | (high[..., 1] << 1) | (high[..., 2] << 2) | (high[..., 3] << 3)))
    elif bits == 6:
        high = torch.unflatten((r0 >> 4) | (r1 & 48), 5, (2, 2)).permute(0, 3, 1, 4, 2, 8, 5, 9, 7, 6)  # S T w h g t u e c v
        sections.append(_bytes(high[..., 0] | (high[..., 1] << 2)))
    return torch.cat(sections, 2)


def _codes_of(data: Tensor, form: Format, width: int) -> Tensor:
    """Inverse of ``_code_bytes``, from the whole bytes of tiles: ``[S * 64, T * width]`` uint8."""
    strips, tiles, half, bits = data.shape[0], data.shape[1], width // 64, _BITS.get(form, 4)
    if form in _BOOKS:
        packed = data[..., : ROWS * width // 2].reshape(strips, tiles, 4, half, 8, 4, 4, 2, 2)  # S T w h g t s c r
        x = torch.stack([packed & 15, packed >> 4], -1).permute(0, 2, 8, 4, 1, 3, 6, 7, 5, 9)  # S w r g T h s c t e
    elif bits == 8:
        x = data[..., : ROWS * width].reshape(strips, tiles, 4, half, 2, 8, 4, 2, 2, 2, 2)  # S T w h u g t v c r e
        x = x.permute(0, 2, 9, 5, 1, 3, 4, 7, 8, 6, 10)  # S w r g T h u v c t e
    else:
        low = ROWS * width // 2
        packed = data[..., :low].reshape(strips, tiles, 4, half, 8, 4, 4, 2, 2).permute(0, 2, 4, 1, 3, 6, 8, 5, 7)  # S w g T h s c t e
        r0, r1 = packed & 15, packed >> 4
        if bits == 5:
            plane = data[..., low : low + ROWS * width // 8].reshape(strips, tiles, 4, half, 8, 4, 2, 2)  # S T w h g t e c
            shifts = torch.arange(4, dtype=torch.uint8, device=data.device)
            high = (plane.unsqueeze(-1) >> shifts).permute(0, 2, 4, 1, 3, 8, 7, 5, 6)  # S w g T h s c t e
            r0, r1 = r0 | ((high & 1) << 4), r1 | (high & 16)
        elif bits == 6:
            plane = data[..., low : low + ROWS * width // 4].reshape(strips, tiles, 4, half, 8, 4, 2, 2, 2)  # S T w h g t u e c
            shifts = torch.tensor([0, 2], dtype=torch.uint8, device=data.device)
            high = (plane.unsqueeze(-1) >> shifts).permute(0, 2, 4, 1, 3, 6, 9, 8, 5, 7).flatten(5, 6)  # S w g T h s c t e
            r0, r1 = r0 | ((high & 3) << 4), r1 | (high & 48)
        x = torch.stack([r0, r1], 2)
    return x.reshape(strips * ROWS, tiles * width)


def _padded(matrix: Tensor, n: int, width: int, fill: int = 0) -> Tensor:
    """``[N, C, ...]`` -> ``[n, width, ...]``, contiguous, filled up with ``fill``."""
    if matrix.shape[:2] == (n, width):
        return matrix.contiguous()
    out = matrix.new_full((n, width, *matrix.shape[2:]), fill)
    out[: matrix.shape[0], : matrix.shape[1]] = matrix
    return out


def _pack(form: Format, codes: Tensor, fill: int, scales: Tensor, second: Tensor | None, per_tile: int) -> Tensor:
    """The data of ``Tiles``, a chunk of strips at a time. ``scales [N, G, ...]``, ``second`` likewise; ``per_tile`` of them to a tile."""
    (n, k), width = codes.shape, columns(form)
    tiles = -(-k // width)
    by = _by_row if form in _SUPER else _by_group
    out: Tensor | None = None
    step = max(1, CHUNK // max(k, 1) // ROWS) * ROWS
    for start in range(0, n, step):
        rows = min(step, -(-(n - start) // ROWS) * ROWS)
        sections = [_code_bytes(_padded(codes[start : start + rows], rows, tiles * width, fill).view(torch.uint8), form, width)]
        sections.append(by(_padded(scales[start : start + rows], rows, tiles * per_tile).reshape(rows, tiles, -1)))
        if second is not None:
            per = second.shape[1] * per_tile // scales.shape[1] if form in _SUPER else per_tile
            sections.append(by(_padded(second[start : start + rows], rows, tiles * per).reshape(rows, tiles, -1)))
        some = torch.cat(sections, 2)
        if out is None:
            out = some.new_empty(-(-n // ROWS), tiles, some.shape[2])
        out[start // ROWS : start // ROWS + some.shape[0]] = some
    assert out is not None, "an empty weight has no tiles"
    return out


def _per_tile(values: Tensor, k: int, group: int) -> tuple[Tensor, int]:
    """``[N, K / group]`` -> its values for each ``min(group, 128)`` columns, and how many a tile of 128 columns has."""
    if group in GROUPS:
        return values, 128 // group
    index = torch.arange(-(-k // 128), device=values.device) * 128 // group
    return values[:, index], 1


def group_supported(k: int, group: int) -> bool:
    """Whether scales of ``group`` consecutive columns of ``k`` fit tiles: 32, 64, whole tiles, or the whole row."""
    return group in GROUPS or group == k or (group > 0 and group % 128 == 0)


def pack_int4(codes: Tensor, scales: Tensor, zeros: Tensor, perm: Tensor | None = None) -> Tiles:
    """``scales [N, G] * (codes [N, K] - zeros [N, G])``: codes uint8 below 16, zeros uint8 up to 16, scales float16 or bfloat16.

    INT4 where every zero is 8, else INT4Z. ``perm [K]`` int32: which input each column multiplies.
    """
    k, group = codes.shape[1], codes.shape[1] // scales.shape[1]
    assert group_supported(k, group) and scales.dtype in (torch.float16, torch.bfloat16), (k, group, scales.dtype)
    symmetric = bool((zeros == 8).all())
    form = Format.INT4 if symmetric else Format.INT4Z
    some, per = _per_tile(scales, k, group)
    second = None if symmetric else _per_tile(zeros, k, group)[0]
    data = _pack(form, codes, 8 if symmetric else 0, some, second, per)
    return Tiles(data, form, codes.shape[0], k, group, scales.dtype, perm=perm)


def codebook_group(k: int, block: int) -> int:
    """Columns that surely share an absmax when blocks of ``block`` run over rows of ``k``, one after another; 0: tiles cannot hold it."""
    group = math.gcd(k, block, 128)
    return group if group in GROUPS else 0


def pack_codebook(codes: Tensor, absmax: Tensor, table: Tensor, block: int) -> Tiles:
    """``table [16] * absmax``, float32: ``codes [N, K]`` uint8, ``absmax`` float32 of each ``block`` weights of the flattened matrix."""
    n, k = codes.shape
    group = codebook_group(k, block)
    assert group, (k, block)
    starts = torch.arange(0, n * k, group, device=codes.device)
    values = absmax.reshape(-1)[starts // block].reshape(n, k // group)
    return _codebook(codes, values, table)


def _codebook(codes: Tensor, values: Tensor, table: Tensor) -> Tiles:
    """NF4 tiles of ``values [N, K / group]`` float32, one for each group."""
    group = codes.shape[1] // values.shape[1]
    data = _pack(Format.NF4, codes, _zero_code(table), values, None, 128 // group)
    return Tiles(data, Format.NF4, codes.shape[0], codes.shape[1], group, table=table.float().contiguous())


def _zero_code(table: Tensor) -> int:
    """The code of 0.0, or 0 in a table that has none: there the absmax alone, 0 too, makes padding 0."""
    zeros = (table == 0).nonzero()
    return int(zeros[0]) if zeros.numel() else 0


def pack_nested(
    codes: Tensor, absmax: Tensor, table: Tensor, code: Tensor, absmax2: Tensor, offset: float, block0: int, block_stride: int
) -> Tiles:
    """``table * (code * absmax2 + offset)``: blocks of 64, ``absmax [N, K / 64]`` uint8, the rest as ``Tiles`` says. ``table`` has a 0."""
    n, k = codes.shape
    assert bool((table == 0).any()) and k % 64 == 0
    absmax = absmax.reshape(n, k // 64)
    data = _pack(Format.NF4N, codes, _zero_code(table), absmax, None, 2)
    last = block0 + (data.shape[0] * ROWS - 1) * block_stride + data.shape[1] * 2 - 1  # the last block of the padded matrix
    missing = last // NESTED_BLOCK + 1 - absmax2.numel()
    absmax2 = torch.nn.functional.pad(absmax2.float(), (0, max(missing, 0)))
    offsets = absmax2.new_full((data.shape[0],), offset)
    side = (table.float().contiguous(), code.float().contiguous(), absmax2, offsets)
    return Tiles(data, Format.NF4N, n, k, 64, torch.float16, *side, block0, block_stride)


def concatenate(parts: Sequence[Tiles]) -> Tiles | None:
    """The tiles of ``parts``, one below the other, with the same weights bit for bit: of linears that share their input.

    None where one product cannot take them all: formats, K, groups, scale types, tables or orders of inputs differ, or a part before the
    last ends within a tile (NF4N: or within 256 blocks).
    """
    first = parts[0]
    alike = ("format", "k", "group", "scale_dtype", "table", "code", "block_stride", "perm")
    for each in parts[1:]:
        if not all(_same(getattr(first, name), getattr(each, name)) for name in alike):
            return None
    if any(each.n % ROWS for each in parts[:-1]):
        return None
    absmax2 = offsets = None
    if first.format == Format.NF4N:
        absmax2 = _nested_scales(parts)
        if absmax2 is None:
            return None
        offsets = torch.cat([each.offsets for each in parts if each.offsets is not None])
    data, n = torch.cat([each.data for each in parts]), sum(each.n for each in parts)
    return replace(first, data=data, n=n, absmax2=absmax2, offsets=offsets)


def _same(one: object, other: object) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one is other or one == other


def _nested_scales(parts: Sequence[Tiles]) -> Tensor | None:
    """NF4N: the second scales of ``parts`` in one row of blocks; None where two parts would share one."""
    end, scales = parts[0].block0, []
    for number, each in enumerate(parts):
        assert each.absmax2 is not None
        if number and (end % NESTED_BLOCK or each.block0 % NESTED_BLOCK):
            return None
        end += each.n * each.block_stride
        begin = each.block0 // NESTED_BLOCK if number else 0
        used = None if number == len(parts) - 1 else (each.block0 + each.n * each.block_stride) // NESTED_BLOCK
        scales.append(each.absmax2[begin:used])
    return torch.cat(scales)


def _half_at(flat: Tensor, at: int, count: int = 1) -> Tensor:
    """``count`` float16 at byte ``at`` of each block: ``[B, count]``."""
    return flat[:, at : at + 2 * count].contiguous().view(torch.float16)


def ggml_values(blocks: Tensor, kind: str) -> Values:
    """What ``blocks [N, bytes of a row]`` of Q4_0, Q4_K, Q5_K, Q6_K or Q8_0 hold; scales of Q4_0 are those of INT4, its codes 0 to 15."""
    n, flat = blocks.shape[0], blocks.reshape(-1, GGML_BLOCKS[kind].nbytes)
    codes, second = affine(flat, kind)[0], None
    if kind == "Q4_0":
        codes, scales = (codes + 8).to(torch.uint8), _half_at(flat, 0).reshape(n, -1)
    elif kind == "Q8_0":
        scales = _half_at(flat, 0).reshape(n, -1)
    elif kind == "Q6_K":
        codes, scales = (codes + 32).to(torch.uint8), flat[:, 192:208].contiguous().view(torch.int8).reshape(n, -1)
        second = _half_at(flat, 208).reshape(n, -1)
    else:
        scales = torch.stack(six_bits(flat[:, 4:16]), 2).reshape(n, -1, 8, 2)
        second = _half_at(flat, 0, 2).reshape(n, -1, 2)
    return Values(codes.reshape(n, -1), scales, second)


def pack_ggml(blocks: Tensor, kind: str) -> Tiles:
    """``blocks [N, bytes of a row]`` uint8 of a kind in GGML_KINDS."""
    if kind in ("IQ4_NL", "IQ4_XS"):
        return _pack_levels(blocks, kind)
    values = ggml_values(blocks, kind)
    if kind == "Q4_0":
        return pack_int4(values.codes, values.scales, torch.full_like(values.scales, 8, dtype=torch.uint8))
    form = Format[kind]
    group, per = {Format.Q6_K: (16, 16), Format.Q8_0: (32, 4)}.get(form, (32, 1))
    data = _pack(form, values.codes, 32 if form == Format.Q6_K else 0, values.scales, values.second, per)
    return Tiles(data, form, values.codes.shape[0], values.codes.shape[1], group)


def _pack_levels(blocks: Tensor, kind: str) -> Tiles:
    """IQ4_NL and IQ4_XS: an index into LEVELS times a float32 for each 32 weights."""
    n, flat = blocks.shape[0], blocks.reshape(-1, GGML_BLOCKS[kind].nbytes)
    levels, scales, _ = affine(flat, kind)
    table = torch.tensor(LEVELS, dtype=torch.int8, device=blocks.device)
    codes = torch.bucketize(levels.reshape(n, -1), table).to(torch.uint8)
    return _codebook(codes, scales.reshape(n, -1), table.float())


def unpack(tiles: Tiles) -> Values:
    """What ``tiles`` hold, in the order of their columns: the exact inverse of packing."""
    form, data, n, k = tiles.format, tiles.data, tiles.n, tiles.k
    width, bits = columns(form), _BITS.get(form, 4)
    codes = _codes_of(data, form, width)[:n, :k]
    rest = data[..., ROWS * width * bits // 8 :]
    if form in (Format.Q4_K, Format.Q5_K):
        scales = torch.unflatten(_from_rows(rest[..., : ROWS * 16], torch.uint8), 2, (8, 2))
        return Values(codes, scales[:n], _from_rows(rest[..., ROWS * 16 :], torch.float16)[:n])
    if form == Format.Q6_K:
        scales, d = _from_rows(rest[..., : ROWS * 16], torch.int8), _from_rows(rest[..., ROWS * 16 :], torch.float16)
        return Values(codes, scales.flatten(1)[:n, : k // 16], d.flatten(1)[:n])
    dtype = {Format.NF4: torch.float32, Format.NF4N: torch.uint8, Format.Q8_0: torch.float16}.get(form, tiles.scale_dtype)
    per = 128 // min(tiles.group, 128) if tiles.group in GROUPS else 1

    def grouped(section: Tensor, dtype: torch.dtype) -> Tensor:
        values = _from_groups(section, dtype).flatten(1)[:n, : -(-k // (128 // per))]
        return values[:, :: max(1, tiles.group // 128)] if tiles.group % 128 == 0 else values if tiles.group in GROUPS else values[:, :1]

    size = ROWS * per * dtype.itemsize
    second = grouped(rest[..., size:], torch.uint8) if form == Format.INT4Z else None
    return Values(codes.view(torch.int8) if form == Format.Q8_0 else codes, grouped(rest[..., :size], dtype), second)


def absmax_of(tiles: Tiles, codes: Tensor) -> Tensor:
    """NF4N: the absmax float32 ``[N, K / 64]`` that ``codes [N, K / 64]`` stand for."""
    assert tiles.code is not None and tiles.absmax2 is not None and tiles.offsets is not None
    offsets = tiles.offsets.repeat_interleave(ROWS)[: codes.shape[0]].unsqueeze(1)
    rows = torch.arange(codes.shape[0], device=codes.device).unsqueeze(1) * tiles.block_stride
    index = tiles.block0 + rows + torch.arange(codes.shape[1], device=codes.device)
    return tiles.code[codes.int()].mul_(tiles.absmax2[index // NESTED_BLOCK]).add_(offsets)


def dequantize(tiles: Tiles, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``[N, K]`` in the order of the tiles' columns: computed in float32, rounded once to ``dtype``."""
    out = torch.empty(tiles.n, tiles.k, dtype=dtype, device=tiles.data.device)
    step = max(1, CHUNK // max(tiles.k, 1) // ROWS)
    for start in range(0, tiles.data.shape[0], step):
        rows = slice(start * ROWS, min((start + step) * ROWS, tiles.n))
        first = tiles.block0 + rows.start * tiles.block_stride
        offsets = None if tiles.offsets is None else tiles.offsets[start : start + step]
        some = replace(tiles, data=tiles.data[start : start + step], n=rows.stop - rows.start, block0=first, offsets=offsets)
        out[rows] = _weights(some)
    return out


def _weights(tiles: Tiles) -> Tensor:
    """The weight in float32."""
    form, values = tiles.format, unpack(tiles)
    n, k = values.codes.shape

    def spread(each: Tensor, group: int) -> Tensor:
        return each.float().repeat_interleave(group, 1)[:, :k]

    if form in (Format.Q4_K, Format.Q5_K):
        assert values.second is not None
        both = values.scales.float() * values.second.float().unsqueeze(2)  # [N, K / 256, 8, 2]
        scale, minimum = both[..., 0].reshape(n, -1), both[..., 1].reshape(n, -1)
        return values.codes.float().mul_(spread(scale, 32)).sub_(spread(minimum, 32))
    if form == Format.Q6_K:
        assert values.second is not None
        scale = values.scales.float() * spread(values.second, 16)[:, : k // 16]
        return (values.codes.float() - 32).mul_(spread(scale, 16))
    if form in _BOOKS:
        assert tiles.table is not None
        absmax = absmax_of(tiles, values.scales) if form == Format.NF4N else values.scales
        return tiles.table[values.codes.int()].mul_(spread(absmax, tiles.group))
    codes = values.codes.float()
    if form == Format.INT4Z:
        assert values.second is not None
        codes.sub_(spread(values.second, tiles.group))
    elif form == Format.INT4:
        codes.sub_(8)
    return codes.mul_(spread(values.scales, tiles.group))
