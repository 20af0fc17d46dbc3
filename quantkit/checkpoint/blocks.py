"""A GGUF file as a checkpoint of quantized linears: its blocks as they are, in the layout ``ggml``, under Hugging Face names.

``open_checkpoint`` gives the same file as floats. What stays in blocks is every linear that an architecture may quantize, the
embedding and the head, where their type is one of GGML_BLOCKS; all else, and other types, are floats as before.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from quantkit.arch.table import spec_for
from quantkit.checkpoint.gguf import GgufSource
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.gguf import GgufFile
from quantkit.geometry import GGML_BLOCKS, ggml_scheme
from quantkit.quant_config import quantization_config

BYTES = "U8"


class BlockSource:
    """The tensors of ``source``, of which the weights named in ``blocks`` are read as rows of bytes."""

    def __init__(self, source: GgufSource, blocks: frozenset[str]) -> None:
        self._source, self._blocks = source, blocks

    @property
    def file(self) -> GgufFile:
        return self._source.file

    def dtype(self, name: str) -> str:
        """The safetensors dtype of what ``read`` returns: of blocks, U8."""
        return BYTES if name in self._blocks else self._source.dtype(name)

    def fill(self, out: NDArray[Any], name: str, index: tuple[slice, ...]) -> None:
        """As ``GgufSource.fill``, of blocks ``[N, bytes of a row]`` uint8 in the model's order of rows."""
        if name not in self._blocks:
            self._source.fill(out, name, index)
            return
        rows, columns = index
        self._source.fill_blocks(out, name, range(rows.start, rows.stop), range(columns.start, columns.stop))


def as_blocks(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` with the blocks of a GGUF file as they are, and a ``quantization_config`` that says so.

    The checkpoint itself when it is no GGUF file, or one without blocks that can stay. Raises InputError as ``spec_for``.
    """
    source = checkpoint.gguf
    if not isinstance(source, GgufSource):
        return checkpoint
    spec = spec_for(checkpoint.config)
    modules = {
        path: roles for layer in range(spec.layers) for path, roles in spec.block_modules(layer).items() if spec.linears[roles[0]].quantize
    }
    kinds = {path: source.block_type(f"{path}.weight") for path in (spec.architecture.embedding, *modules)}
    if not spec.tied:
        kinds[spec.architecture.head] = source.block_type(f"{spec.architecture.head}.weight")
    assignment = {path: ggml_scheme(kind) for path, kind in kinds.items() if kind is not None and kind in GGML_BLOCKS}
    if not assignment:
        return checkpoint
    config = {**checkpoint.config, "quantization_config": quantization_config(assignment, spec.architecture.head)}
    blocks = frozenset(f"{path}.weight" for path in assignment)
    tensors = dict(checkpoint.tensors)
    for name in blocks:
        tensors[name] = replace(tensors[name], dtype=BYTES, shape=source.block_shape(name))
    return replace(checkpoint, config=MappingProxyType(config), tensors=MappingProxyType(tensors), gguf=BlockSource(source, blocks))
