"""What llama.cpp makes of whole GGUF files: tokens, logits and a greedy text; runs in the llama-cpp environment, which has no quantkit.

    llama_cpp_reference.py JOB.json OUT

JOB.json has ``files``, ``texts``, ``ids`` (one list of tokens for each file), ``prompt`` (how many of them a text is continued from) and
``generate`` (how many tokens it gets). OUT/NUMBER.npz has for each file ``logits`` [T, vocabulary] at every position of its ids, all
read at once, and ``greedy``, the likeliest tokens, read one by one; OUT/NUMBER.json the tokens of each text, the greedy text and the
ids that end one; or, in ``refused``, llama.cpp's words. A split model is named by its first file.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from imatrix_reference import F32_TYPE, PACKAGE, Batch, ContextParameters, ModelParameters, library
from numpy.typing import NDArray

MAX_PIECE = 512


class Refused(Exception):
    """llama.cpp does not load a file."""


class Library:
    """libllama with the types of the functions that are called here, on one thread of the CPU, and what it logs."""

    def __init__(self) -> None:
        library("libggml-base.so.0")
        ggml, self.llama = library("libggml.so.0"), library("libllama.so.0")
        spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        assert spec is not None and spec.origin is not None
        ggml.ggml_backend_load.restype = ctypes.c_void_p
        assert ggml.ggml_backend_load(str(Path(spec.origin).parent / "bin" / "libggml-cpu.so").encode())
        self.log: list[str] = []
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._callback = kind(lambda _level, text, _data: self.log.append(text.decode(errors="replace")))
        self.llama.llama_log_set(self._callback, None)
        pointer, number, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
        types: dict[str, tuple[Any, list[Any]]] = {
            "llama_model_default_params": (ModelParameters, []),
            "llama_context_default_params": (ContextParameters, []),
            "llama_model_load_from_file": (pointer, [ctypes.c_char_p, ModelParameters]),
            "llama_model_free": (None, [pointer]),
            "llama_model_get_vocab": (pointer, [pointer]),
            "llama_vocab_n_tokens": (number, [pointer]),
            "llama_vocab_is_eog": (flag, [pointer, number]),
            "llama_tokenize": (number, [pointer, ctypes.c_char_p, number, pointer, number, flag, flag]),
            "llama_token_to_piece": (number, [pointer, number, ctypes.c_char_p, number, number, flag]),
            "llama_init_from_model": (pointer, [pointer, ContextParameters]),
            "llama_free": (None, [pointer]),
            "llama_batch_init": (Batch, [number, number, number]),
            "llama_batch_free": (None, [Batch]),
            "llama_decode": (number, [pointer, Batch]),
            "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, number]),
            "llama_get_memory": (pointer, [pointer]),
            "llama_memory_clear": (None, [pointer, flag]),
        }
        for name, (result, arguments) in types.items():
            function = getattr(self.llama, name)
            function.restype, function.argtypes = result, arguments

    def load(self, file: str) -> Any:
        self.log.clear()
        model = self.llama.llama_model_load_from_file(file.encode(), self.llama.llama_model_default_params())
        if not model:
            raise Refused("".join(self.log)[-2000:])
        return model

    def context(self, model: Any, length: int) -> Any:
        """A context for ``length`` tokens, whose keys and values are float32: they are no part of what is compared."""
        given = self.llama.llama_context_default_params()
        assert (given.n_ctx, given.n_batch, given.n_ubatch) == (512, 2048, 512) and (given.type_k, given.type_v) == (1, 1)
        given.n_ctx = given.n_batch = given.n_ubatch = length
        given.threads = given.threads_batch = 1
        given.type_k = given.type_v = F32_TYPE
        given.flash = 0
        context = self.llama.llama_init_from_model(model, given)
        if not context:
            raise Refused("".join(self.log)[-2000:])
        return context

    def logits(self, context: Any, ids: Sequence[int], first: int, vocabulary: int) -> NDArray[np.float32]:
        """Of ``ids``, which come at position ``first``: [T, vocabulary]."""
        batch = self.llama.llama_batch_init(len(ids), 0, 1)
        batch.count = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.position[place], batch.sequences[place] = token, first + place, 1
            batch.sequence[place][0], batch.output[place] = 0, 1
        failed = self.llama.llama_decode(context, batch)
        assert not failed, "".join(self.log)[-2000:]
        rows = [np.ctypeslib.as_array(self.llama.llama_get_logits_ith(context, place), (vocabulary,)).copy() for place in range(len(ids))]
        self.llama.llama_batch_free(batch)
        return np.stack(rows)

    def tokens(self, vocab: Any, text: str) -> list[int]:
        """With the tokens around a text, and special tokens in it known as such."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 16))()
        count = self.llama.llama_tokenize(vocab, data, len(data), room, len(room), True, True)
        assert count >= 0
        return list(room[:count])

    def text(self, vocab: Any, ids: Sequence[int]) -> str:
        """Special tokens become nothing."""
        found, room = b"", ctypes.create_string_buffer(MAX_PIECE)
        for token in ids:
            count = self.llama.llama_token_to_piece(vocab, token, room, MAX_PIECE, 0, False)
            assert count >= 0
            found += room.raw[:count]
        return found.decode(errors="replace")


def answer(lib: Library, file: str, ids: Sequence[int], job: dict[str, Any], out: Path) -> dict[str, Any]:
    model = lib.load(file)
    vocab = lib.llama.llama_model_get_vocab(model)
    vocabulary = lib.llama.llama_vocab_n_tokens(vocab)
    texts = [lib.tokens(vocab, text) for text in job["texts"]]
    ends = [token for token in range(vocabulary) if lib.llama.llama_vocab_is_eog(vocab, token)]
    prompt = list(ids[: job["prompt"]])
    context = lib.context(model, max(len(ids), len(prompt) + job["generate"]))
    found = lib.logits(context, ids, 0, vocabulary)
    lib.llama.llama_memory_clear(lib.llama.llama_get_memory(context), True)
    row, greedy = lib.logits(context, prompt, 0, vocabulary)[-1], []
    for place in range(job["generate"]):
        greedy.append(int(row.argmax()))
        row = lib.logits(context, greedy[-1:], len(prompt) + place, vocabulary)[-1]
    np.savez(out, logits=found, greedy=np.array(greedy, np.int32))
    lib.llama.llama_free(context)
    text = lib.text(vocab, greedy)
    lib.llama.llama_model_free(model)
    return {"texts": texts, "ends": ends, "greedy": text}


def main(job_path: str, out: str) -> None:
    job, lib = json.loads(Path(job_path).read_text()), Library()
    for number, (file, ids) in enumerate(zip(job["files"], job["ids"], strict=True)):
        try:
            found = answer(lib, file, ids, job, Path(out) / f"{number}.npz")
        except Refused as exc:
            found = {"refused": str(exc)}
        (Path(out) / f"{number}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # the libraries were unloaded by nobody, and free each other's memory when Python does


if __name__ == "__main__":
    main(*sys.argv[1:])
