"""A GGUF file as a Hugging Face checkpoint: its tensors under Hugging Face names, beside the ``config.json`` of its metadata.

All names come from the architecture table. What the format does to a tensor is undone as it is read: blocks are decoded to
float32, interleaved query and key rows are put back, the offset of a norm is taken off, experts are cut apart (``gguf.md`` 5.3, 5.4).
Tensors that are missing, unknown or of another shape are refused, so that nothing is read as a model that it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit import fs
from quantkit.arch.spec import ModelSpec, resolve_spec
from quantkit.checkpoint.gguf_config import BLOCK, EMBEDDING, FINAL_NORM, HEAD, POSITIONS, config_of, row_of
from quantkit.errors import InputError
from quantkit.formats.floats import widened
from quantkit.formats.gguf import BY_NAME, GgufFile, GgufTensor

PLAIN: Mapping[str, np.dtype[Any]] = MappingProxyType({"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")})
"""Types that are read as they are; BF16 as its bits."""
NO_WEIGHTS = frozenset(("F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "Q1_0"))
"""Types that models do not have (integers, doubles, the types of intermediate results), or that nothing here decodes."""
DECODED = frozenset(BY_NAME) - frozenset(PLAIN) - NO_WEIGHTS
"""Block types that become float32."""
CHUNK_ELEMENTS = 1 << 17
"""Values decoded at a time, in arrays that stay in the processor's cache; also what bounds the memory that decoding takes."""
CHUNK_BYTES = 16 << 20
"""Bytes of blocks that are read at a time."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file, or one expert's part of it, and how it becomes one of the model.

    ``dtype`` is the safetensors dtype of the result. ``head_dim``: the rows of each head are interleaved. ``offset`` is
    part of every stored value. ``transposed``: the model has it ``[K, N]``.
    """

    tensor: GgufTensor
    dtype: str
    head_dim: int | None = None
    offset: float = 0.0
    transposed: bool = False

    @property
    def named(self) -> GgufTensor:
        """The tensor in the model's shape."""
        return replace(self.tensor, shape=self.tensor.shape[::-1]) if self.transposed else self.tensor


class GgufSource:
    """The model in a GGUF file: ``config`` as ``config.json`` would be, ``tensors`` by Hugging Face name, ``read`` of a slice.

    Raises InputError, before any weight is read, for an architecture that the table does not have, a missing or odd
    hyper-parameter, and tensors that are missing, unknown, of another shape than those say, or of a type without values.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.config, self._stored = gguf_checkpoint_facts(file)
        self.tensors: Mapping[str, GgufTensor] = MappingProxyType({name: stored.named for name, stored in self._stored.items()})

    def dtype(self, name: str) -> str:
        """The safetensors dtype of what ``read`` returns: F16 and BF16 where they are stored, F32 for everything else."""
        return self._stored[name].dtype

    def fill(self, out: NDArray[Any], name: str, index: tuple[slice, ...]) -> None:
        """Read ``index`` of a tensor (plain ranges, one per axis) into ``out``, BF16 as its bits.

        Of the file only the wanted rows are read; where the rows of heads are interleaved, the heads that hold them.
        Raises InputError when the file has become shorter since it was opened.
        """
        stored = self._stored[name]
        if stored.transposed:
            self._rows(out.T, stored, index[::-1])
        else:
            self._rows(out, stored, index)

    def _rows(self, out: NDArray[Any], stored: Stored, index: tuple[slice, ...]) -> None:
        """``index`` of a tensor as the file has its axes."""
        shape = stored.tensor.shape
        ranges = [range(*s.indices(size)) for s, size in zip(index, shape, strict=True)]
        if len(ranges) == 1:  # a vector is small, and its blocks need not lie within the slice
            vector = _undone(decoded(self.file, stored.tensor, range(1), range(shape[0])).reshape(-1, 1), stored)
            out[...] = vector.reshape(-1)[ranges[0].start : ranges[0].stop]
            return
        rows, columns = ranges
        if not out.size:
            return
        unit = stored.head_dim or 1
        step = max(1, CHUNK_ELEMENTS // (unit * max(shape[1], 1))) * unit
        for start in range(rows.start - rows.start % unit, rows.stop, step):
            some = range(start, min(start + step, -(-rows.stop // unit) * unit))
            values = _undone(decoded(self.file, stored.tensor, some, columns), stored)
            first, last = max(some.start, rows.start), min(some.stop, rows.stop)
            out[first - rows.start : last - rows.start] = values[first - some.start : last - some.start]

    def block_type(self, name: str) -> str | None:
        """The block type in which a matrix is stored; None where ``read`` gives it as it is, and for vectors."""
        stored = self._stored[name]
        blocks = stored.tensor.type in DECODED and len(stored.tensor.shape) == 2 and not stored.offset
        return stored.tensor.type if blocks else None

    def block_shape(self, name: str) -> tuple[int, int]:
        """``(N, bytes of a row)`` of a matrix stored in blocks: rows are outputs, however the model has its floats."""
        tensor = self._stored[name].tensor
        return tensor.shape[0], _row_bytes(tensor)

    def fill_blocks(self, out: NDArray[np.uint8], name: str, rows: range, columns: range) -> None:
        """Read bytes ``columns`` of each of ``rows`` of a matrix stored in blocks into ``out``: rows in the model's order.

        Where rows are interleaved, whole heads are read. Raises InputError when the file has become shorter.
        """
        stored = self._stored[name]
        unit, row_bytes = stored.head_dim or 1, _row_bytes(stored.tensor)
        if unit == 1:
            fs.read_rows(stored.tensor.file, stored.tensor.offset + rows.start * row_bytes + columns.start, row_bytes, out)
            return
        step = max(1, CHUNK_BYTES // (unit * max(row_bytes, 1))) * unit
        for start in range(rows.start - rows.start % unit, rows.stop, step):
            some = range(start, min(start + step, -(-rows.stop // unit) * unit))
            raw = _undone(_raw(stored.tensor, some), stored)
            first, last = max(some.start, rows.start), min(some.stop, rows.stop)
            out[first - rows.start : last - rows.start] = raw[first - some.start : last - some.start, columns.start : columns.stop]


# tensors


def _row_bytes(tensor: GgufTensor) -> int:
    block = BY_NAME[tensor.type]
    return tensor.shape[-1] // block.elements * block.nbytes


def _raw(tensor: GgufTensor, rows: range) -> NDArray[np.uint8]:
    """``rows`` as the file has them, ``[len(rows), bytes of a row]``."""
    out = np.empty((len(rows), _row_bytes(tensor)), np.uint8)
    fs.read_rows(tensor.file, tensor.offset + rows.start * out.shape[1], out.shape[1], out)
    return out


def decoded(file: GgufFile, tensor: GgufTensor, rows: range, columns: range) -> NDArray[Any]:
    """``rows`` (over all axes but the last) and ``columns`` as stored, ``[len(rows), len(columns)]``: blocks as float32, BF16 as its bits.

    Of the columns' blocks only those wanted are decoded. Raises InputError when the file has become shorter.
    """
    block = BY_NAME[tensor.type]
    first, last = columns.start // block.elements, -(-columns.stop // block.elements)
    blocks = _raw(tensor, rows).reshape(len(rows), -1, block.nbytes)[:, first:last]
    flat = np.ascontiguousarray(blocks).reshape(-1)
    if tensor.type in PLAIN:
        values = flat.view(PLAIN[tensor.type])
    else:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        with np.errstate(all="ignore"):  # a scale may be infinite: such values are passed on, not warned of
            values = dequantize(flat.reshape(1, -1), GGMLQuantizationType[tensor.type])
    skipped = first * block.elements
    return values.reshape(len(rows), -1)[:, columns.start - skipped : columns.stop - skipped]


def _undone(values: NDArray[Any], stored: Stored) -> NDArray[Any]:
    """``values [N, K]``, whole heads, as the model has them: rows in order, without the offset."""
    if stored.head_dim is not None:
        # Row 2k + p of a head in the file is row p * head_dim/2 + k of the model.
        pairs = values.reshape(-1, stored.head_dim // 2, 2, values.shape[1])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    if stored.offset:
        values = widened(values, stored.tensor.type) - np.float32(stored.offset)
    return values


def _stored_tensors(file: GgufFile, spec: ModelSpec, used: frozenset[str]) -> dict[str, Stored]:
    """Every tensor of the model by its Hugging Face name; ``used`` are tensors that became part of the configuration."""
    arch, found, known = spec.architecture, dict[str, Stored](), set(used)

    def take(gguf: str, name: str, shape: tuple[int, ...], head_dim: int | None = None, offset: float = 0.0) -> Stored:
        where = f"{file.path}: {gguf}"
        if gguf not in file.tensors:
            raise InputError(where, "is missing", f"the {name} of a {arch.name} model, {list(shape)}")
        tensor = file.tensors[gguf]
        if tensor.shape != shape:
            raise InputError(where, f"has shape {list(tensor.shape)}", f"{list(shape)} from the hyper-parameters")
        if tensor.type not in PLAIN and tensor.type not in DECODED:
            raise InputError(where, f"is of type {tensor.type}", f"one of {', '.join((*PLAIN, *sorted(DECODED)))}")
        known.add(gguf)
        return Stored(tensor, tensor.type if tensor.type in PLAIN and not offset else "F32", head_dim, offset)

    def norm(gguf: str, module: str, width: int) -> None:
        for part in spec.norm_parts:
            found[f"{module}.{part}"] = take(f"{gguf}.{part}", f"{module}.{part}", (width,), None, arch.norm_offset)

    def linear(gguf: str, path: str, role: str) -> None:
        (n, k), row = spec.stored_shape(role), spec.linears[role]
        if (expert := expert_of(role)) is not None:
            assert spec.moe is not None
            whole = take(f"{gguf}.weight", f"{path}.weight", (spec.moe.experts, n, k))
            nbytes = whole.tensor.nbytes // spec.moe.experts
            part = replace(whole.tensor, shape=(n, k), offset=whole.tensor.offset + expert * nbytes, nbytes=nbytes)
            found[f"{path}.weight"] = replace(whole, tensor=part)
            return
        interleaved = spec.head_dim if arch.gguf_rope_permuted and role in ("q", "k") else None
        stored = file.tensors.get(f"{gguf}.weight")
        flat = n == 1 and stored is not None and stored.shape == (k,)  # a gate of one row may have lost an axis
        weight = take(f"{gguf}.weight", f"{path}.weight", (k,) if flat else (n, k), interleaved)
        if flat:
            weight = replace(weight, tensor=replace(weight.tensor, shape=(n, k)))
        found[f"{path}.weight"] = replace(weight, transposed=row.transposed)
        if row.bias:
            found[f"{path}.bias"] = take(f"{gguf}.bias", f"{path}.bias", (n,), interleaved)

    hidden, vocab = spec.dims["hidden"].elements, spec.dims["vocab"].elements
    found[f"{arch.embedding}.weight"] = take(f"{EMBEDDING}.weight", f"{arch.embedding}.weight", (vocab, hidden))
    if spec.position_table is not None:
        name = f"{spec.position_table}.weight"
        found[name] = take(f"{POSITIONS}.weight", name, (spec.max_positions, hidden))
    for layer in range(spec.layers):
        block = BLOCK.format(layer=layer)
        for item in spec.norms.values():
            norm(block + item.gguf, spec.tensor(layer, item.name), spec.head_dim if item.width == "head" else hidden)
        for path, roles in spec.block_modules(layer).items():
            linear(block + spec.linears[roles[0]].gguf, path, roles[0])
    norm(FINAL_NORM, arch.final_norm, hidden)
    if not spec.tied:
        found[f"{arch.head}.weight"] = take(f"{HEAD}.weight", f"{arch.head}.weight", (vocab, hidden))
    unknown = sorted(set(file.tensors) - known)
    if unknown:
        raise InputError(f"{file.path}: {unknown[0]}", f"has no place in a {arch.name} model", "only tensors that the model uses")
    return found


def expert_of(role: str) -> int | None:
    """The number of the expert that a role belongs to; None for every other role."""
    return int(role.split(".")[1]) if role.startswith("experts.") else None


def gguf_checkpoint_facts(file: GgufFile) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The ``config.json`` that the file's metadata stand for, and its tensors by Hugging Face name. Raises as ``GgufSource``."""
    arch = row_of(file)
    config, used = config_of(file, arch)
    try:
        spec = resolve_spec(arch, config)
    except InputError as exc:
        raise InputError(f"{file.path}: {exc.where.removeprefix('config.json: ')}", exc.what, exc.expected, exc.hint) from exc
    return config, _stored_tensors(file, spec, used)
