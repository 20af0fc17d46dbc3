"""llama.cpp's tokens of texts; runs in the llama-cpp environment, by its xllamacpp, which has no quantkit.

    llamacpp_tokenize.py MODEL.gguf TEXTS.json OUT.json

TEXTS.json is a list of strings; OUT.json has ``ids`` (of each text, special tokens recognized and added around it) and ``ends``, the
ids that end a generation. Only the vocabulary of the model is loaded.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOM = 256
"""More bytes than the parameters of a model take: they travel by value, and the rest is not looked at."""
VOCAB_ONLY = 72
"""Where that flag lies among the parameters."""


class Parameters(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_ubyte * ROOM)]


def library() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        sys.exit("xllamacpp is not installed")
    found: Any = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    found.llama_model_default_params.restype = Parameters
    found.llama_model_load_from_file.argtypes, found.llama_model_load_from_file.restype = [ctypes.c_char_p, Parameters], ctypes.c_void_p
    found.llama_model_get_vocab.argtypes, found.llama_model_get_vocab.restype = [ctypes.c_void_p], ctypes.c_void_p
    found.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
    found.llama_vocab_is_eog.argtypes, found.llama_vocab_is_eog.restype = [ctypes.c_void_p, ctypes.c_int32], ctypes.c_bool
    pointers = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32]
    found.llama_tokenize.argtypes = [*pointers, ctypes.c_bool, ctypes.c_bool]
    return found


def vocabulary(lib: Any, path: Path) -> Any:
    lib.llama_backend_init()
    parameters = lib.llama_model_default_params()
    # vocab_only, check_tensors, use_extra_bufts: no, no, yes. Another version that has them elsewhere must not pass unnoticed.
    if bytes(parameters.raw[VOCAB_ONLY : VOCAB_ONLY + 3]) != b"\0\0\1":
        sys.exit("the parameters of this xllamacpp are laid out otherwise")
    parameters.raw[VOCAB_ONLY] = 1
    model = lib.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        sys.exit(f"llama.cpp does not load {path}")
    return lib.llama_model_get_vocab(model)


def main(model: Path, texts: Path, out: Path) -> None:
    lib = library()
    vocab = vocabulary(lib, model)
    ids = []
    for text in json.loads(texts.read_text()):
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 16))()
        ids.append(list(room[: lib.llama_tokenize(vocab, data, len(data), room, len(room), True, True)]))
    ends = [index for index in range(lib.llama_vocab_n_tokens(vocab)) if lib.llama_vocab_is_eog(vocab, index)]
    out.write_text(json.dumps({"ids": ids, "ends": ends}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
