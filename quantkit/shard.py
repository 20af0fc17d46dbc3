"""shard and unshard: byte slicing between a checkpoint and one file per rank, without torch and in bounded memory.

A shard directory holds ``rank-R-of-TP.safetensors`` (the parent's tensor names, in load order, data on a page boundary; whose
file it is and the parent's hash in its metadata), the parent's small files, a ``parent.*`` copy of whatever else is needed to
restore it byte for byte, ``quantkit.json`` and ``SHA256SUMS``. This module knows ranges and bytes; it never computes with a weight
(``formats.md`` section 9).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit import __version__, fs
from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.checkpoint.artifact import INDEX, MANIFEST, SUMS, encode_json, encode_sums, parse_sums
from quantkit.checkpoint.reader import Checkpoint, TensorRef, fingerprint_of, read_manifest
from quantkit.errors import CheckFailed, InputError
from quantkit.formats.jsonfile import parse_object
from quantkit.formats.safetensors import Header, TensorEntry, encode_header, parse_header, read_header
from quantkit.plan import ParallelPlan, make_plan
from quantkit.progress import Progress, silent
from quantkit.quant_config import stored_assignment
from quantkit.scheme import Assignment, assignment_to_json
from quantkit.slices import RankSlice, rank_slices

CHUNK_BYTES = 64 << 20
"""The most of one tensor that is in memory at a time."""
PAGE = 4096
SMALL_FILE_LIMIT = 256 << 20
PARENT, HEADER = "parent.", ".header"
PARENT_SHA256, RANK = "parent_sha256", "rank"
"""Keys in the metadata of a rank file."""
AGAIN = "shard the parent again"
KEPT_FACTS = ("method", "recipe", "source", "environment", "totals")


def rank_file(rank: int, tp: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank}-of-{tp}.safetensors"


def _metadata(rank: int, tp: int, parent_sha256: str) -> dict[str, str]:
    """What a rank file says of itself."""
    return {"format": "pt", PARENT_SHA256: parent_sha256, RANK: f"{rank} of {tp}"}


def _entries(slices: Iterable[RankSlice]) -> list[TensorEntry]:
    found, end = [], 0
    for piece in slices:
        found.append(TensorEntry(piece.stored_as, piece.dtype, piece.shape, end, end + piece.nbytes))
        end += piece.nbytes
    return found


def _chunks(rows: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that keep a tensor of ``rows`` rows and ``nbytes`` bytes within CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES * rows // max(nbytes, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _bytes(array: NDArray[Any]) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _refuse(out: Path, source: Path, overwrite: bool) -> None:
    fs.refuse_existing(out, overwrite)
    fs.refuse_source(out, source)


@contextmanager
def _partial(out: Path, overwrite: bool, need_bytes: int) -> Iterator[Path]:
    """A locked, empty ``OUT.partial`` that is published at the end, and removed when the work fails: it cannot be resumed."""
    partial = out.with_name(out.name + ".partial")
    fs.require_free(out.parent, need_bytes, str(out))
    with fs.lock(out.with_name(out.name + ".lock")):
        if partial.exists():
            if not overwrite:
                raise InputError(str(partial), "an unfinished run left it here", "no such directory", "--overwrite discards it")
            fs.remove_tree(partial)
        fs.make_dir(partial)
        try:
            yield partial
            fs.publish(partial, out, overwrite)
        except BaseException:
            fs.remove_tree(partial)
            raise


@dataclass(frozen=True, slots=True)
class Sharded:
    """What ``shard_checkpoint`` wrote: the plan, the tensor bytes of each rank, and the hash of what was cut."""

    plan: ParallelPlan
    rank_bytes: tuple[int, ...]
    parent_sha256: str


def shard_checkpoint(checkpoint: Checkpoint, out: Path, tp: int, *, overwrite: bool, progress: Progress = silent) -> Sharded:
    """Cut ``checkpoint`` (safetensors) into ``tp`` rank files under ``out``, reading each tensor once.

    The parent's hash is the sha256 of its SHA256SUMS, or where it has none its fingerprint, for which all of it is read once more.
    Raises InputError when the model cannot be cut or ``out`` exists, MachineError when the disk is too small.
    """
    where = checkpoint.root.name
    if checkpoint.kind != "hf":
        raise InputError(where, "is a GGUF file", "a checkpoint directory", "quantkit convert --to blocks makes one of its blocks")
    in_files = {name for path in {ref.file for ref in checkpoint.tensors.values()} for name in read_header(path).entries}
    if renamed := sorted(set(checkpoint.tensors) - in_files):
        what = f"holds {renamed[0]} under another name or stacked with others"
        raise InputError(where, what, "a tensor for each linear", "quantkit convert --to hf writes it so")
    spec = spec_for(checkpoint.config)
    assignment = stored_assignment(checkpoint.config, spec, checkpoint.tensors)
    plan = make_plan(spec, assignment, tp, dtype="BF16")
    ranks = [list(rank_slices(spec, assignment, plan, rank, checkpoint.tensors)) for rank in range(tp)]
    sizes = tuple(sum(piece.nbytes for piece in pieces) for pieces in ranks)
    restored, kept = _kept_files(checkpoint, tp)
    _refuse(out, checkpoint.root, overwrite)  # before all of it is read
    sums_sha256 = _digest(kept[PARENT + SUMS]) if PARENT + SUMS in kept else None
    parent_sha256 = sums_sha256 or checkpoint.fingerprint()
    heads = [encode_header(_entries(ranks[rank]), _metadata(rank, tp, parent_sha256), align=PAGE) for rank in range(tp)]
    need = sum(sizes) + sum(map(len, heads)) + sum(map(len, kept.values()))
    with _partial(out, overwrite, need) as partial:
        hashes = _write_ranks(checkpoint, ranks, heads, partial, progress)
        for name, data in kept.items():
            hashes[name] = _write_small(partial, name, data)
        manifest = {
            "quantkit": __version__,
            "schema": 1,
            "kind": "shards",
            "plan": plan.to_json(),
            "assignment": assignment_to_json(assignment),
            "parent": {
                "sha256": parent_sha256,
                "sums_sha256": sums_sha256,
                "weights": {ref.file.name: PARENT + ref.file.name + HEADER for ref in checkpoint.tensors.values()},
                "files": {name: PARENT + name if PARENT + name in kept else name for name in restored},
            },
            **{key: value for key, value in (read_manifest(checkpoint.root) or {}).items() if key in KEPT_FACTS},
        }
        hashes[MANIFEST] = _write_small(partial, MANIFEST, encode_json(manifest))
        _write_small(partial, SUMS, encode_sums(hashes))
    return Sharded(plan, sizes, parent_sha256)


def _write_ranks(
    checkpoint: Checkpoint, ranks: list[list[RankSlice]], heads: list[bytes], partial: Path, progress: Progress
) -> dict[str, str]:
    """Write every rank file in one pass over the parent; returns their hashes. One chunk of rows is in memory."""
    names = [rank_file(rank, len(ranks)) for rank in range(len(ranks))]
    with ExitStack() as stack:
        files = [stack.enter_context(fs.HashingFile(fs.confined(partial, name, "rank file"))) for name in names]
        for file, head in zip(files, heads, strict=True):
            file.write(head)
        for done, pieces in enumerate(zip(*ranks, strict=True)):
            ref = checkpoint.tensors[pieces[0].name]
            shape = ref.shape if pieces[0].view is None else pieces[0].view
            for chunk_start, chunk_stop in _chunks(shape[0] if shape else 1, ref.nbytes):
                index = (slice(chunk_start, chunk_stop), *(slice(0, size) for size in shape[1:])) if shape else ()
                chunk = checkpoint.read(ref.name, index, shape)
                for file, piece in zip(files, pieces, strict=True):
                    file.write(_bytes(chunk[_inside(piece.index, chunk_start, chunk_stop)]))
            for file, piece in zip(files, pieces, strict=True):
                if piece.pad_rows:
                    file.write(bytes(piece.nbytes // piece.shape[0] * piece.pad_rows))
            progress("shard", done + 1, len(ranks[0]))
    return {name: file.sha256 for name, file in zip(names, files, strict=True)}


def _inside(index: tuple[slice, ...], start: int, stop: int) -> tuple[slice, ...]:
    """``index`` of a tensor as an index of its rows ``start:stop``; empty when they do not meet."""
    if not index:
        return ()
    first = max(index[0].start, start)
    last = max(first, min(index[0].stop, stop))
    return slice(first - start, last - start), *index[1:]


def _write_small(partial: Path, name: str, data: bytes) -> str:
    fs.write_bytes(fs.confined(partial, name, "file"), data)
    return _digest(data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_small(root: Path, name: str, where: str) -> bytes:
    return fs.read_bytes(fs.confined(root, name, where), SMALL_FILE_LIMIT)


def _kept_files(checkpoint: Checkpoint, tp: int) -> tuple[set[str], dict[str, bytes]]:
    """The names of the parent's small files, and they and the weight headers by the name they get beside the rank files.

    What would be mistaken for the shards' own (manifest, sums, index) is prefixed; weight headers are kept as they are
    because their key order and padding are the parent writer's choice.
    """
    root = checkpoint.root
    weights = {ref.file.name: ref.file for ref in checkpoint.tensors.values()}
    names = {"config.json", *checkpoint.extra_files()}
    prefixed = {name for name in (MANIFEST, SUMS, INDEX) if (root / name).is_file()}
    if SUMS in prefixed:
        names |= set(parse_sums(_read_small(root, SUMS, str(root)), str(root / SUMS))) - set(weights) - prefixed
    ours = {PARENT + name for name in prefixed} | {PARENT + name + HEADER for name in weights} | {rank_file(rank, tp) for rank in range(tp)}
    if taken := sorted(ours & names):
        raise InputError(f"{root}: {taken[0]}", "has the name of a file that shard writes", "another name")
    kept = {name: _read_small(root, name, str(root)) for name in names}
    kept |= {PARENT + name: _read_small(root, name, str(root)) for name in prefixed}
    for name, path in weights.items():
        kept[PARENT + name + HEADER] = b"".join(fs.read_range(path, 0, read_header(path).data_start))
    return names | prefixed, kept


@dataclass(frozen=True, slots=True)
class _Shards:
    """A shard directory whose manifest, plan and parent headers agree with each other."""

    root: Path
    config: dict[str, Any]
    spec: ModelSpec
    assignment: Assignment
    plan: ParallelPlan
    parents: Mapping[str, tuple[bytes, Header]]
    """Weight file of the parent -> its first bytes, up to the data, and what they say."""
    files: Mapping[str, str]
    """Other file of the parent -> its name here."""
    headers: tuple[str, ...]
    """The files here that hold the headers of the parent's weight files."""
    sha256: str | None
    """The parent's hash, which every rank file has too; directories of earlier versions have none."""
    sums_sha256: object
    """What the manifest says is the sha256 of the parent's SHA256SUMS."""

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        return {name: entry for _, header in self.parents.values() for name, entry in header.entries.items()}

    def rank(self, rank: int) -> tuple[list[RankSlice], Checkpoint]:
        """What ``rank`` stores, and its file. Raises InputError unless the file holds exactly what the plan says."""
        pieces = list(rank_slices(self.spec, self.assignment, self.plan, rank, self.tensors))
        path = fs.confined(self.root, rank_file(rank, self.plan.tp), str(self.root))
        if not path.is_file():
            raise InputError(str(path), "is missing", f"the file of rank {rank}")
        header = read_header(path)
        self._check_metadata(header, rank, str(path))
        for entry in _entries(pieces):
            if header.entries.get(entry.name) != entry:
                raise InputError(str(path), f"{entry.name} is not as the plan says", f"{entry.dtype} {list(entry.shape)} at {entry.begin}")
        if len(header.entries) != len(pieces):
            raise InputError(str(path), f"holds {len(header.entries)} tensors", f"the {len(pieces)} of the plan")
        refs = {
            entry.name: TensorRef(entry.name, entry.dtype, entry.shape, path, header.data_start + entry.begin, entry.nbytes)
            for entry in header.entries.values()
        }
        return pieces, Checkpoint(self.root, "hf", self.config, refs)

    def _check_metadata(self, header: Header, rank: int, where: str) -> None:
        """Raise InputError for the file of another rank or of another parent, and for one that shard did not write."""
        if header.data_start % PAGE:
            raise InputError(where, f"its data begin at byte {header.data_start}", f"a multiple of {PAGE}", AGAIN)
        if self.sha256 is None:
            return
        of, parent, want = header.metadata.get(RANK), header.metadata.get(PARENT_SHA256), f"{rank} of {self.plan.tp}"
        if of is None or parent is None:
            raise InputError(where, "does not say whose file it is", f"{RANK} and {PARENT_SHA256} in its metadata", AGAIN)
        if of != want:
            raise InputError(where, f"is the file of rank {of:.50}", f"that of rank {want}", AGAIN)
        if parent != self.sha256:
            raise InputError(where, f"was cut from a checkpoint of sha256 {parent:.64}", f"{self.sha256} as in {MANIFEST}", AGAIN)


def _open_shards(path: Path) -> _Shards:
    manifest = read_manifest(path)
    if manifest is None or manifest.get("kind") != "shards":
        raise InputError(str(path), "is not a shard directory", "the output of quantkit shard")
    plan, where = ParallelPlan.from_json(manifest.get("plan"), f"{path / MANIFEST}: plan"), str(path / MANIFEST)
    parent = manifest.get("parent")
    weights, files = (parent.get("weights"), parent.get("files")) if isinstance(parent, dict) else (None, None)
    for names in (weights, files):
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise InputError(where, "does not say which files the parent had", "parent: weights and files")
    assert isinstance(weights, dict) and isinstance(files, dict)
    config = parse_object(_read_small(path, "config.json", str(path)), str(path / "config.json"))
    spec = spec_for(config)
    parents = {}
    for name, stored in weights.items():
        raw = _read_small(path, stored, where)
        parents[name] = raw, parse_header(raw, str(path / stored))
    names = [name for _, header in parents.values() for name in header.entries]
    if len(names) != len(set(names)):
        raise InputError(where, "names a tensor in two files of the parent", "each tensor once")
    assert isinstance(parent, dict)
    sha256, sums_sha256 = parent.get("sha256"), parent.get("sums_sha256")
    if sha256 is not None and (not isinstance(sha256, str) or sums_sha256 not in (None, sha256)):
        raise InputError(f"{where}: parent.sha256", f"is {sha256!r:.80}", f"{sums_sha256 or 'a hash'!s:.80}")
    shards = _Shards(path, config, spec, {}, plan, parents, files, tuple(weights.values()), sha256, sums_sha256)
    assignment = stored_assignment(config, spec, shards.tensors)
    plan.check(spec, assignment, dtype="BF16", where=where)
    return replace(shards, assignment=assignment)


def read_plan(path: Path) -> ParallelPlan:
    """The stored plan of a shard directory, checked against its ``config.json``. Raises InputError when ``path`` is none."""
    return _open_shards(path).plan


def parent_sha256(path: Path) -> str | None:
    """The hash of what a shard directory was cut from, None in those of earlier versions.

    Raises InputError as ``read_plan``, and CheckFailed when the parent's SHA256SUMS, of which a copy is kept, has another.
    """
    shards = _open_shards(path)
    _parent_sums(shards)
    return shards.sha256


def open_rank(path: Path, rank: int) -> tuple[Checkpoint, ParallelPlan, Assignment]:
    """The tensors of one rank, already cut, the stored plan they were cut by, and how the parent stores its linears.

    Raises InputError when ``path`` is no shard directory, or the rank's file is not what its plan says.
    """
    shards = _open_shards(path)
    if not 0 <= rank < shards.plan.tp:
        raise InputError(str(path), f"has no rank {rank}", f"0 to {shards.plan.tp - 1}")
    return shards.rank(rank)[1], shards.plan, shards.assignment


@dataclass(frozen=True, slots=True)
class Unsharded:
    """What ``unshard`` wrote: file name -> sha256, and whether the parent's own SHA256SUMS proves every file."""

    files: Mapping[str, str]
    proven: bool


def unshard(path: Path, out: Path, *, overwrite: bool, progress: Progress = silent) -> Unsharded:
    """Restore the checkpoint that ``path`` was cut from: the same files, the same bytes.

    Raises InputError when the shards do not fit their plan or disagree with each other, and CheckFailed when a restored
    file has not the hash that the parent recorded; then nothing is published.
    """
    shards = _open_shards(path)
    ranks = [shards.rank(rank) for rank in range(shards.plan.tp)]
    _refuse(out, path, overwrite)
    parent_sums = _parent_sums(shards)
    if parent_sums is None or not {*shards.parents, *shards.files} - {SUMS} <= set(parent_sums):
        _check_own_sums(shards)
    need = sum(len(raw) + sum(entry.nbytes for entry in header.entries.values()) for raw, header in shards.parents.values())
    by_name: dict[str, list[tuple[RankSlice, Checkpoint]]] = {}
    for pieces, source in ranks:
        for piece in pieces:
            by_name.setdefault(piece.name, []).append((piece, source))
    total, hashes = len(by_name), dict[str, str]()
    with _partial(out, overwrite, need) as partial:
        done = 0
        for name, (raw, header) in shards.parents.items():
            with fs.HashingFile(fs.confined(partial, name, str(path / MANIFEST))) as file:
                file.write(raw)
                for entry in sorted(header.entries.values(), key=lambda e: e.begin):
                    for chunk in _assembled(entry, by_name[entry.name]):
                        file.write(_bytes(chunk))
                    done += 1
                    progress("unshard", done, total)
            hashes[name] = file.sha256
        for name, stored in shards.files.items():
            if name != SUMS:
                hashes[name] = _write_small(partial, name, _read_small(path, stored, str(path)))
        for name, digest in (parent_sums or {}).items():
            if hashes.get(name) != digest:
                raise CheckFailed(name, "was not restored as the parent recorded it", digest, "the shards or their parent were changed")
        if parent_sums is None:
            found = fingerprint_of(shards.config, [hashes[name] for name in sorted(shards.parents)])
            if shards.sha256 not in (None, found):
                raise CheckFailed(str(path), f"gives a checkpoint of fingerprint {found}", f"{shards.sha256}, its parent's")
            _write_small(partial, SUMS, encode_sums(hashes))
        else:
            _write_small(partial, SUMS, _read_small(path, shards.files[SUMS], str(path)))
    return Unsharded(hashes, parent_sums is not None)


def _parent_sums(shards: _Shards) -> dict[str, str] | None:
    """The parent's SHA256SUMS; None when it had none. Raises CheckFailed when it is not the one that the manifest recorded."""
    stored = shards.files.get(SUMS)
    if stored is None:
        return None
    data, where = _read_small(shards.root, stored, str(shards.root)), str(shards.root / stored)
    if _digest(data) != shards.sums_sha256:
        raise CheckFailed(where, "was changed", f"sha256 {shards.sums_sha256!s:.64} as in {MANIFEST}", AGAIN)
    return parse_sums(data, where)


def _check_own_sums(shards: _Shards) -> None:
    """Every file that is put together again against the shard directory's own SHA256SUMS. Raises CheckFailed."""
    path = shards.root
    sums = parse_sums(_read_small(path, SUMS, str(path)), str(path / SUMS))
    ranks = [rank_file(rank, shards.plan.tp) for rank in range(shards.plan.tp)]
    for name in (*ranks, *shards.headers, *sorted(shards.files.values())):
        if fs.sha256_file(fs.confined(path, name, str(path))) != sums.get(name):
            raise CheckFailed(str(path / name), f"is not what {SUMS} says", f"sha256 {sums.get(name)}", AGAIN)


def _assembled(entry: TensorEntry, parts: list[tuple[RankSlice, Checkpoint]]) -> Iterator[NDArray[Any]]:
    """The rows of a parent's tensor in chunks, put together from its ranks; copies must be equal bit for bit."""
    shape = entry.shape if parts[0][0].view is None else parts[0][0].view
    for start, stop in _chunks(shape[0] if shape else 1, entry.nbytes) if entry.nbytes else ():
        chunk: NDArray[Any] | None = None
        covered, seen = 0, set[tuple[tuple[int, int], ...]]()
        for piece, source in parts:
            inside = _inside(piece.index, start, stop)
            if any(s.start == s.stop for s in inside):
                continue
            if inside:
                first = max(piece.index[0].start, start) - piece.index[0].start
                local = (slice(first, first + inside[0].stop - inside[0].start), *(slice(0, s.stop - s.start) for s in inside[1:]))
            else:
                local = ()
            values = source.read(piece.stored_as, local)
            if chunk is None:
                chunk = np.empty((stop - start, *shape[1:]) if shape else (), dtype=values.dtype)
            key = tuple((s.start, s.stop) for s in inside)
            if key in seen:
                if _bytes(chunk[inside]) != _bytes(values):
                    raise InputError(entry.name, "differs between ranks that hold copies of it", "equal copies", AGAIN)
                continue
            seen.add(key)
            chunk[inside] = values
            covered += values.size
        if chunk is None or covered != chunk.size:
            raise InputError(entry.name, f"the ranks hold {covered} of its values", "all of them")
        yield chunk
