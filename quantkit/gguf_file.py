"""Any checkpoint as a GGUF file: where its tensors lie, what type each gets, and their rows encoded, slab by slab, into the file.

A slab is some rows of one tensor. Several are read and encoded at a time, each on one thread, and are written in order, so memory
is that of a few slabs whatever the model, and the number of threads does not change a byte. Knows no option and prints nothing.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, starmap
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from quantkit import fs
from quantkit.arch.table import spec_for
from quantkit.checkpoint.gguf import decoded
from quantkit.checkpoint.gguf_export import ExportTensor, export_plan, read_rows
from quantkit.checkpoint.gguf_writer import GgufWriter, PlannedTensor
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import InputError
from quantkit.formats.floats import rounded, widened
from quantkit.formats.gguf import BY_NAME, GgufFile, GgufTensor, Value, row_bytes, text, u32
from quantkit.mixtures import Choice, FileType, ModelFacts
from quantkit.ops.ggml.encode import RowRefused, encode
from quantkit.progress import Progress, silent
from quantkit.text.gguf_vocabulary import gguf_vocabulary
from quantkit.transcode import QuantizedLinear, dense_weight, quantized_linears

Floats = NDArray[np.float32]
Encoder = Callable[[Floats, str, Floats | None], bytes]
"""Rows, a block type and the importance of their columns -> the blocks."""
T = TypeVar("T")

FLOAT_TYPES = ("F32", "F16", "BF16")
SLAB_ELEMENTS = 1 << 22
"""16 MiB of float32."""
FILE_TYPE = "general.file_type"
_PHI3_TOKENS = frozenset({"</s>", "<unk>", "<s>", "<|endoftext|>"})
QUANTIZATION_VERSION = 2
"""Of the block layouts (``gguf.md`` 1)."""


@dataclass(frozen=True, slots=True)
class InputTensor:
    """A tensor as the source has it: ``shape`` slowest axis first, ``type`` a GGUF type, rows counted over all but the last axis."""

    name: str
    shape: tuple[int, ...]
    type: str
    precision: str
    """The type, no block type, that holds every value of it: float32 for blocks, and for linears that are dequantized as they are read."""
    unit: int
    """Rows that are read together: a head whose rows change places, or 1."""
    floats: Callable[[range], Floats]
    """Some rows as float32 ``[rows, columns]``."""
    stored: Callable[[range], bytes] | None = None
    """Some rows as they are stored, where the source holds them in ``type``."""

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def matrices(self) -> int:
        """Experts in one tensor, or 1."""
        return math.prod(self.shape[:-2])


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model ready to be written: metadata without the type of the file, tensors in order, and what the choice of types looks at."""

    metadata: Mapping[str, Value]
    tensors: tuple[InputTensor, ...]
    nbytes: int
    """Of the tensors as the source stores them."""
    notes: tuple[str, ...] = ()
    """What a user should know of how it is said."""

    @property
    def facts(self) -> ModelFacts:
        """Raises InputError for a size that is none."""
        architecture = str(self.metadata["general.architecture"].value)

        def number(key: str, default: int) -> int:
            value = self.metadata.get(f"{architecture}.{key}")
            if value is None:
                return default
            first = value.value[0] if value.element is not None and len(value.value) else value.value  # a value per layer
            if isinstance(first, bool) or not isinstance(first, (int, np.integer)) or first < 0:
                raise InputError(f"{architecture}.{key}", f"is {first!r:.100}", "a number of them")
            return int(first)

        heads = number("attention.head_count", 1)
        return ModelFacts(
            architecture, number("block_count", 0), heads, number("attention.head_count_kv", heads), number("expert_count", 0)
        )


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: the files with their bytes, and how many tensors an earlier run had left."""

    files: tuple[tuple[Path, int], ...]
    resumed: int


def model_of_gguf(file: GgufFile) -> GgufModel:
    """The model of a GGUF file, of whatever architecture: its metadata and tensors as they are."""
    split = ("split.no", "split.count", "split.tensors.count")
    metadata = {key: value for key, value in file.values().items() if key not in split}
    if "general.architecture" not in metadata:
        raise InputError(f"{file.path}: general.architecture", "is missing", "the architecture of the model")
    if not file.tensors:
        raise InputError(str(file.path), "has no tensors", "a model with weights")
    nbytes = sum(tensor.nbytes for tensor in file.tensors.values())
    return GgufModel(metadata, tuple(_of_gguf(file, tensor) for tensor in file.tensors.values()), nbytes)


def _of_gguf(file: GgufFile, tensor: GgufTensor) -> InputTensor:
    columns = tensor.shape[-1] if tensor.shape else 1
    width = row_bytes(tensor.type, columns)

    def floats(rows: range) -> Floats:
        values = decoded(file, tensor, rows, range(columns))
        return widened(values, tensor.type)

    def stored(rows: range) -> bytes:
        return b"".join(fs.read_range(tensor.file, tensor.offset + rows.start * width, len(rows) * width))

    precision = tensor.type if BY_NAME[tensor.type].elements == 1 else "F32"
    return InputTensor(tensor.name, tensor.shape, tensor.type, precision, 1, floats, stored)


def model_of_checkpoint(checkpoint: Checkpoint, pre_tokenizer: str | None, name: str) -> GgufModel:
    """The model of a Hugging Face checkpoint under GGUF names; quantized linears are dequantized as they are read, and count as F16.

    ``name`` is what it is called where ``config.json`` does not say. Raises InputError for a model that GGUF cannot say, and for such
    a tokenizer.
    """
    spec = spec_for(checkpoint.config)
    plan = export_plan(checkpoint.config, spec, checkpoint.tensors)
    architecture = str(plan.metadata["general.architecture"].value)
    vocabulary = gguf_vocabulary(checkpoint.root, checkpoint.config, architecture, pre_tokenizer)
    metadata = {**plan.metadata, **vocabulary.metadata}
    metadata.setdefault("general.name", text(name))
    metadata["general.name"] = text(_harmless_name(str(metadata["general.name"].value), vocabulary.metadata))
    reader = _FloatReader(checkpoint, quantized_linears(checkpoint))
    return GgufModel(metadata, tuple(_of_checkpoint(tensor, reader) for tensor in plan.tensors), checkpoint.nbytes, plan.notes)


def _harmless_name(name: str, vocabulary: Mapping[str, Value]) -> str:
    """A name that llama.cpp loads: by Phi-3 in it, hyphen and case aside, it looks four tokens up, and fails where one is missing."""
    tokens = vocabulary.get("tokenizer.ggml.tokens")
    if tokens is not None and set(tokens.value) >= _PHI3_TOKENS:
        return name
    return re.sub(r"(phi)-?(3)", r"\1 \2", name, flags=re.IGNORECASE)


def exported_modules(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Tensor of the file -> the modules of the model whose weights it holds."""
    plan = export_plan(checkpoint.config, spec_for(checkpoint.config), checkpoint.tensors)
    return {tensor.name: tuple(s.module for s in tensor.sources if s.suffix == "weight") for tensor in plan.tensors}


class _FloatReader:
    """Tensors of a checkpoint as float32 by their names; of quantized linears the last one stays dequantized, for its next rows."""

    def __init__(self, checkpoint: Checkpoint, linears: Mapping[str, QuantizedLinear]) -> None:
        self._checkpoint, self._linears = checkpoint, linears
        self._last: tuple[str, Floats] | None = None

    def type(self, name: str) -> str:
        """The GGUF type nearest to the dtype that a tensor is stored in."""
        if name not in self._checkpoint.tensors:
            return "F16"
        dtype = self._checkpoint.dtype(name)
        return dtype if dtype in FLOAT_TYPES else "F32" if dtype == "F64" else "F16"

    def precision(self, name: str) -> str:
        """The GGUF type that holds every value of a tensor."""
        return self._checkpoint.dtype(name) if name in self._checkpoint.tensors else "F32"

    def block_type(self, name: str) -> str | None:
        """The block type that a weight is stored in; None where it is stored otherwise."""
        linear = self._linears.get(name.removesuffix(".weight"))
        return linear.geometry.scheme.code if linear is not None and linear.geometry.layout == "ggml" else None

    def blocks(self, name: str, index: tuple[slice, ...] | None = None) -> NDArray[Any]:
        """Rows of a weight that is stored in blocks, as bytes."""
        return self._checkpoint.read(name, index)

    def __call__(self, name: str, index: tuple[slice, ...] | None = None) -> Floats:
        linear = self._linears.get(name.removesuffix(".weight"))
        if linear is None:
            return widened(self._checkpoint.read(name, index), self._checkpoint.dtype(name))
        last = self._last  # another thread may put a newer one in its place
        if last is None or last[0] != name:
            last = self._last = (name, dense_weight(self._checkpoint, linear))
        return last[1] if index is None else last[1][index]


def _of_checkpoint(tensor: ExportTensor, read: _FloatReader) -> InputTensor:
    unit, floats = tensor.head_dim or 1, partial(read_rows, tensor, read=read)
    kinds = {read.block_type(name) for name in tensor.source_names}
    kind = next(iter(kinds)) if len(kinds) == 1 else None
    if kind is None:
        own = "F32" if tensor.float_only else read.type(tensor.source_names[0])
        held = {read.precision(name) for name in tensor.source_names}
        return InputTensor(tensor.name, tensor.shape, own, next(iter(held)) if len(held) == 1 else "F32", unit, floats)
    sources = tuple(
        replace(source, transposed=False) for source in tensor.sources
    )  # blocks are stored along the inputs, whatever floats are
    rows_of_bytes = replace(tensor, shape=(*tensor.shape[:-1], row_bytes(kind, tensor.shape[-1])), sources=sources)
    return InputTensor(
        tensor.name, tensor.shape, kind, "F32", unit, floats, lambda rows: read_rows(rows_of_bytes, rows, read.blocks).tobytes()
    )


def final_metadata(model: GgufModel, file_type: FileType, extra: Mapping[str, Value]) -> dict[str, Value]:
    """The metadata of the file that is written."""
    own = {FILE_TYPE: u32(file_type.id), "general.quantization_version": u32(QUANTIZATION_VERSION)}
    return {**model.metadata, **own, **extra}


def planned(model: GgufModel, choices: Mapping[str, Choice]) -> tuple[PlannedTensor, ...]:
    """The tensors as they are written."""
    return tuple(PlannedTensor(tensor.name, choices[tensor.name].type, tensor.shape) for tensor in model.tensors)


def cpu_encoder(values: Floats, kind: str, importance: Floats | None) -> bytes:
    """Rows as blocks, on the thread that asks."""
    return encode(np.ascontiguousarray(values), kind, importance).tobytes()


def cuda_encoder(values: Floats, kind: str, importance: Floats | None) -> bytes:
    """Rows as the same blocks, made by the GPU, which the threads that ask share."""
    from quantkit.ops.ggml.cuda import encode_staged

    return encode_staged(values, kind, importance).tobytes()


def write_gguf(
    model: GgufModel,
    out: Path,
    *,
    metadata: Mapping[str, Value],
    choices: Mapping[str, Choice],
    importance: Mapping[str, Floats],
    encoder: Encoder,
    threads: int,
    identity: Mapping[str, Any],
    overwrite: bool,
    resume: bool,
    max_part_bytes: int | None,
    source: Path,
    progress: Progress = silent,
) -> Written:
    """Write ``model`` to ``out``, each tensor in the type of its choice; a tensor that has it already is copied.

    ``importance`` is by tensor, ``[matrices, columns]``. Raises InputError naming the tensor and row whose values its type cannot
    hold, and for an ``out`` that is there; MachineError when the disk is full.
    """
    with GgufWriter(
        out,
        metadata=metadata,
        tensors=planned(model, choices),
        identity=identity,
        overwrite=overwrite,
        resume=resume,
        max_part_bytes=max_part_bytes,
        source=source,
    ) as writer:
        committed = writer.committed
        missing = [tensor for tensor in model.tensors if tensor.name not in committed]
        slabs = [(tensor, rows) for tensor in missing for rows in _slabs(tensor)]
        done = len(committed)

        def task(tensor: InputTensor, rows: range) -> Callable[[], bytes]:
            return partial(_encoded, tensor, rows, choices[tensor.name].type, importance.get(tensor.name), encoder)

        with ThreadPoolExecutor(threads) as pool:
            parts = _in_order(pool, starmap(task, slabs), 2 * threads)
            for tensor in missing:
                progress("encode", done, len(model.tensors))
                writer.write(tensor.name, islice(parts, len(_slabs(tensor))))
                done += 1
        progress("encode", done, len(model.tensors))
        return Written(writer.publish(), len(committed))


def _slabs(tensor: InputTensor) -> list[range]:
    """The rows of a tensor in slabs, none of which holds rows of two matrices or a part of a unit."""
    rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    step = max(1, SLAB_ELEMENTS // max(1, tensor.columns * tensor.unit)) * tensor.unit
    return [
        range(first, min(first + step, (matrix + 1) * rows))
        for matrix in range(tensor.matrices)
        for first in range(matrix * rows, (matrix + 1) * rows, step)
    ]


def _encoded(tensor: InputTensor, rows: range, kind: str, importance: Floats | None, encoder: Encoder) -> bytes:
    """Some rows of one matrix in the type ``kind``."""
    if tensor.type == kind and tensor.stored is not None:
        return tensor.stored(rows)
    values = tensor.floats(rows)
    if kind in FLOAT_TYPES:
        return _as_floats(tensor, rows, values, kind)
    matrix = rows.start // tensor.shape[-2] if len(tensor.shape) > 1 else 0
    try:
        return encoder(values, kind, None if importance is None else importance[matrix])
    except RowRefused as exc:
        raise RowRefused(f"{tensor.name} as {kind}", rows.start + exc.row, finite=exc.finite) from exc


def _as_floats(tensor: InputTensor, rows: range, values: Floats, kind: str) -> bytes:
    """Floats rounded to nearest, ties to even (``gguf.md`` 3.8). Raises InputError for what float16 cannot hold."""
    narrow = rounded(values, kind)
    if kind != "F16":
        return narrow.tobytes()
    beyond = np.isinf(narrow) & np.isfinite(values)
    if beyond.any():
        first = tuple(np.argwhere(beyond)[0])
        what = f"holds {values[first]:g} in row {rows.start + first[0]}, which float16 cannot"
        raise InputError(tensor.name, what, "values up to 65504", "bf16 has the range")
    return narrow.tobytes()


def _in_order(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """The results of ``tasks`` in order, ``ahead`` of them begun before they are asked for."""
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
