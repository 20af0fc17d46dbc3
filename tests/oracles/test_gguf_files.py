"""Files of the GGUF writer, opened by ggml: the same keys, and every tensor where we say that it is."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
from test_gguf_writer import METADATA, whole

from quantkit.formats.gguf import BLOCK_TYPES, read_gguf, u32

pytestmark = pytest.mark.oracle


class InitParams(ctypes.Structure):
    """``gguf_init_params``: read the header alone, make no tensors."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@pytest.fixture(scope="module")
def ggml(ggml_library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of what is called here."""
    for name, result in {"init_from_file": ctypes.c_void_p, "get_tensor_name": ctypes.c_char_p, "get_key": ctypes.c_char_p}.items():
        getattr(ggml_library, f"gguf_{name}").restype = result
    for name in ("get_n_tensors", "get_n_kv"):
        getattr(ggml_library, f"gguf_{name}").restype = ctypes.c_int64
    for name in ("get_tensor_offset", "get_tensor_size", "get_data_offset"):
        getattr(ggml_library, f"gguf_{name}").restype = ctypes.c_size_t
    return ggml_library


@pytest.mark.parametrize("limit", [None, 1000])
@pytest.mark.parametrize("alignment", [None, 8, 4096])
def test_ggml_opens_it_and_finds_the_same_tensors(tmp_path: Path, ggml: ctypes.CDLL, limit: int | None, alignment: int | None) -> None:
    metadata = {**METADATA, **({} if alignment is None else {"general.alignment": u32(alignment)})}
    assert len(whole(tmp_path / "m.gguf", metadata=metadata, max_part_bytes=limit)) == (1 if limit is None else 3)
    first = next(path for path in sorted(tmp_path.iterdir()))
    wanted, found = read_gguf(first), []
    for number, path in enumerate(wanted.paths):
        handle = ggml.gguf_init_from_file(os.fsencode(path), InitParams(True, None))
        assert handle, path
        context = ctypes.c_void_p(handle)
        keys = [ggml.gguf_get_key(context, ctypes.c_int64(i)).decode() for i in range(ggml.gguf_get_n_kv(context))]
        assert [key for key in keys if not key.startswith("split.")] == ([] if number else list(metadata))
        start = ggml.gguf_get_data_offset(context)
        for i in range(ggml.gguf_get_n_tensors(context)):
            at = ctypes.c_int64(i)
            offset = start + ggml.gguf_get_tensor_offset(context, at)
            kind, size = ggml.gguf_get_tensor_type(context, at), ggml.gguf_get_tensor_size(context, at)
            found.append((ggml.gguf_get_tensor_name(context, at).decode(), BLOCK_TYPES[kind].name, offset, size, path))
        ggml.gguf_free(context)
    assert found == [(t.name, t.type, t.offset, t.nbytes, t.file) for t in wanted.tensors.values()]
