"""The artifact writer: units committed to a journal, assembled into safetensors files and published at the end.

``OUT.partial/`` holds ``journal``, ``spool/`` (one file per committed unit, and the last carry) and, while publishing,
``final/``, which becomes OUT by a rename. A kill at any point loses at most the unit that was being committed.
The same calls write the same bytes. This module knows tensors as names and bytes; it knows no model and no layout.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from quantkit import __version__, fs
from quantkit.checkpoint import journal as log
from quantkit.checkpoint.journal import Blob, Journal, Unit
from quantkit.errors import InputError
from quantkit.formats.index import encode_index
from quantkit.formats.safetensors import TensorEntry, canonical_order, encode_header
from quantkit.geometry import DTYPE_BYTES

CONFIG, MANIFEST, SUMS, INDEX = "config.json", "quantkit.json", "SHA256SUMS", "model.safetensors.index.json"
JOURNAL, SPOOL, FINAL = "journal", "spool", "final"
OURS = frozenset({JOURNAL, SPOOL, FINAL, fs.TEMPORARY.format(name=JOURNAL)})
MANIFEST_SCHEMA = 1
SUMS_LIMIT = 16 << 20
MAX_SHARDS = 99_999
"""What the five digits of ``model-0000i-of-0000N.safetensors`` can count."""
DEFAULT_SHARD_BYTES = 5_000_000_000
"""Of one file of weights, where nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor to write: ``dtype`` as safetensors names it, ``data`` its little-endian row-major bytes, in any C-contiguous buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class PublishedArtifact:
    """What was published: ``files`` as (name, bytes), sorted, and the sha256 of SHA256SUMS, which stands for them all."""

    path: Path
    files: tuple[tuple[str, int], ...]
    sums_sha256: str


def encode_sums(digests: Mapping[str, str]) -> bytes:
    """``SHA256SUMS`` as ``sha256sum -c`` reads it: ``<hex>  <name>``, sorted by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()


def parse_sums(data: bytes, where: str) -> dict[str, str]:
    """``SHA256SUMS`` as name -> hex digest. Raises InputError for a line of any other form, or a name that is there twice."""
    sums: dict[str, str] = {}
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        raise InputError(where, "is not UTF-8", "lines of a sha256 and a name") from exc
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        digest, gap, name = line[:64], line[64:66], line[66:]
        if len(digest) != 64 or digest.strip("0123456789abcdef") or gap not in ("  ", " *") or not name or name in sums:
            raise InputError(where, f"line {number} is {line!r:.100}", "64 hex digits, two spaces and a name, each name once")
        sums[name] = digest
    return sums


def encode_json(data: Mapping[str, Any]) -> bytes:
    """JSON as checkpoints carry it: indented, keys sorted, ASCII, a newline at the end."""
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


class ArtifactWriter:
    """Writes one checkpoint directory, unit by unit, resumably. Use as a context manager; leaving without ``publish`` keeps OUT.partial.

    ``identity`` (JSON data) is everything that decides the bytes; resuming with another one is refused.
    ``need_bytes`` is the size of the tensors to come. ``source`` is the path that is read, so that it is never overwritten.
    Entering raises InputError when OUT exists, an unfinished OUT.partial does and neither ``resume`` nor ``overwrite`` says what to do
    with it, or it cannot be resumed; MachineError when another process writes OUT or the disk is too small.
    """

    def __init__(
        self, out: Path, *, identity: Mapping[str, Any], overwrite: bool, resume: bool, need_bytes: int, source: Path | None = None
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        self._identity: Mapping[str, Any] = json.loads(json.dumps(identity, allow_nan=False))
        self._overwrite, self._resume, self._need_bytes, self._source = overwrite, resume, need_bytes, source
        self._held = ExitStack()
        self._units: list[Unit] = []
        self._length = 0

    def __enter__(self) -> Self:
        if self._source is not None:
            fs.refuse_source(self.out, self._source)
        if not self._resume:
            fs.refuse_existing(self.out, self._overwrite)  # before the lock, which makes files
        with ExitStack() as stack:
            stack.enter_context(fs.lock(self.out.with_name(f"{self.out.name}.lock")))
            self._open()
            self._held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._held.close()

    def _open(self) -> None:
        found = self._unfinished()
        if found is None or not self._is_published(found):
            fs.refuse_existing(self.out, self._overwrite)
        fs.clear_replaced(self.out)
        if found is None:
            fs.discard(self.partial)
        else:
            fs.remove_tree(self.partial / FINAL)
            self._adopt(found)
        committed = sum(unit.spool.size for unit in self._units)
        reason = "publishing needs the committed parts and the finished files at once"
        fs.require_free(self.out.parent, 2 * self._need_bytes - committed, str(self.out), reason)
        if found is None:
            fs.make_dir(self.partial / SPOOL)
            line = log.first_line(self._identity)
            fs.write_bytes(self.partial / JOURNAL, line)
            self._length = len(line)

    def _unfinished(self) -> Journal | None:
        """The journal to resume from; None to start afresh. Raises InputError unless the caller said which."""
        if not os.path.lexists(self.partial):
            return None
        where = str(self.partial)
        if not (self._resume or self._overwrite):
            raise InputError(where, "an unfinished run left it", "no such directory", "--resume continues it, --overwrite starts over")
        spool = self.partial / SPOOL
        if self.partial.is_symlink() or not self.partial.is_dir() or spool.is_symlink():
            raise InputError(where, "is not what an unfinished run leaves", "a directory of quantkit", "move it away")
        strange = sorted(set(os.listdir(self.partial)) - OURS)
        if strange:
            raise InputError(
                where,
                f"holds {strange[0]!r:.100}, which this writer did not put there",
                "the directory of an unfinished run",
                "move it away",
            )
        if not self._resume:
            return None
        found = log.read_journal(self.partial / JOURNAL)
        if found is not None:
            changed = log.changed_field(found.identity, self._identity)
            if changed:
                field, then, now = changed
                hint = "run as before to continue, or --overwrite to start over"
                raise InputError(f"{where}: {field}", f"was {then!r:.200} when the work began and is {now!r:.200} now", "no change", hint)
        return found

    def _is_published(self, found: Journal) -> bool:
        """Whether the run that left the journal had published OUT already, and only its clean-up is missing."""
        sums = self.out / SUMS
        return found.sums is not None and sums.is_file() and fs.sha256_file(sums) == found.sums

    def _adopt(self, found: Journal) -> None:
        """Take over the committed units: their files must be what the journal says, and everything else goes.

        A spool file is synced before its line is written, so no crash makes the two differ: that is an error, not an uncommitted unit.
        """
        self._units, self._length = list(found.units), found.length
        wanted = {self._spool(index).name: unit.spool for index, unit in enumerate(found.units)}
        last = self._last_carry()
        if last is not None:
            wanted[last[0].name] = last[1]
        for name, blob in wanted.items():
            path = fs.confined(self.partial / SPOOL, name, str(self.partial))
            if not path.is_file() or fs.file_size(path) != blob.size or fs.sha256_file(path) != blob.sha256:
                raise InputError(
                    str(path), "is not what was committed", f"{blob.size} bytes of sha256 {blob.sha256[:12]}...", log.START_OVER
                )
        fs.make_dir(self.partial / SPOOL)
        for name in set(os.listdir(self.partial / SPOOL)) - set(wanted):
            fs.remove_tree(self.partial / SPOOL / name)

    def _spool(self, index: int) -> Path:
        return self.partial / SPOOL / f"{index:05d}.bin"

    def _last_carry(self) -> tuple[Path, Blob] | None:
        for index in reversed(range(len(self._units))):
            carry = self._units[index].carry
            if carry is not None:
                return self._spool(index).with_suffix(".carry"), carry
        return None

    @property
    def committed(self) -> tuple[str, ...]:
        """The names of the committed units, in order."""
        return tuple(unit.name for unit in self._units)

    def facts(self, unit: str) -> Mapping[str, Any]:
        """The facts that were committed with ``unit``, as JSON data. Raises KeyError for a unit that was not."""
        for found in self._units:
            if found.name == unit:
                return found.facts
        raise KeyError(unit)

    def carry(self) -> Iterator[bytes] | None:
        """The bytes that the last commit that had any carried to the next unit, in pieces."""
        last = self._last_carry()
        return None if last is None else fs.read_range(last[0], 0, last[1].size)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all committed tensors."""
        return sum(entry.end - entry.begin for unit in self._units for entry in unit.tensors)

    def scratch(self, name: str) -> Path:
        """Where a file may lie that this run alone needs: it goes when the work is published or resumed."""
        return self.partial / SPOOL / f"{name}.scratch"

    def commit(
        self, unit: str, tensors: Iterable[StoredTensor], *, facts: Mapping[str, Any], carry: bytes | memoryview | None = None
    ) -> None:
        """Write a unit so that it survives a kill. ``tensors`` is consumed one at a time; ``carry`` replaces the last one, None keeps it.

        Raises InputError for a tensor that was committed before, MachineError when the disk is full.
        """
        assert unit not in self.committed, unit
        index, known = len(self._units), {entry.name for done in self._units for entry in done.tensors}
        stored: list[tuple[str, str, tuple[int, ...]]] = []
        with fs.HashingFile(self._spool(index)) as spool:
            for tensor in tensors:
                if tensor.name in known:
                    raise InputError(tensor.name, "is written twice", "each tensor once")
                known.add(tensor.name)
                begin = spool.size
                spool.write(tensor.data)
                assert spool.size - begin == math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype], (tensor.name, tensor.dtype, tensor.shape)
                stored.append((tensor.name, tensor.dtype, tuple(tensor.shape)))
        carried = None
        if carry is not None:
            with fs.HashingFile(self._spool(index).with_suffix(".carry")) as file:
                file.write(carry)
            carried = Blob(file.size, file.sha256)
        fs.fsync_dir(self.partial / SPOOL)
        data = json.loads(json.dumps(facts, allow_nan=False))
        done = Unit(unit, Blob(spool.size, spool.sha256), log.layout(stored), data, carried)
        self._length = fs.append(self.partial / JOURNAL, log.unit_line(done), at=self._length)
        before = self._last_carry()
        self._units.append(done)
        if before is not None and carry is not None:
            fs.remove_file(before[0])

    def publish(
        self, *, config: Mapping[str, Any], files: Mapping[str, bytes], manifest: Mapping[str, Any], max_shard_size: int
    ) -> PublishedArtifact:
        """Assemble the committed units into a checkpoint directory and put it at OUT in one rename.

        ``files`` are written as they are; the manifest gets ``quantkit`` and ``schema``. ``max_shard_size`` is in tensor bytes.
        Raises InputError when OUT has appeared meanwhile or a name is taken, MachineError when the disk is full (resumable).
        """
        final = self.partial / FINAL
        fs.remove_tree(final)
        fs.make_dir(final)
        written = self._write_shards(final, max_shard_size)
        schema = {"quantkit": __version__, "schema": MANIFEST_SCHEMA}
        small = {CONFIG: encode_json(config), MANIFEST: encode_json({**schema, **manifest}), **written.index}
        digests = dict(written.digests)
        for name, data in [*small.items(), *sorted(files.items())]:
            if name in digests or name == SUMS:
                raise InputError(name, "is also the name of a file of the artifact", "another name")
            with fs.HashingFile(fs.confined(final, name, "extra file")) as file:
                file.write(data)
            digests[name] = file.sha256
        sums = encode_sums(digests)
        with fs.HashingFile(final / SUMS) as file:
            file.write(sums)
        sizes = tuple((name, fs.file_size(final / name)) for name in sorted([*digests, SUMS]))
        self._length = fs.append(self.partial / JOURNAL, log.sums_line(file.sha256), at=self._length)
        # A run that was killed after its rename finds its own output here, and has only to clean up.
        already = self._resume and (self.out / SUMS).is_file() and fs.read_bytes(self.out / SUMS, SUMS_LIMIT) == sums
        if not already:
            fs.publish(final, self.out, self._overwrite)
        fs.discard(self.partial)
        return PublishedArtifact(self.out, sizes, file.sha256)

    def _write_shards(self, final: Path, max_shard_size: int) -> _Shards:
        placed = [_Placed(entry, index) for index, unit in enumerate(self._units) for entry in unit.tensors]
        shards = list(_pack(placed, max_shard_size))
        if len(shards) > MAX_SHARDS:
            raise InputError("--max-shard-size", f"{max_shard_size} makes {len(shards)} files", f"at most {MAX_SHARDS}")
        many, digests, weight_map = len(shards) > 1, dict[str, str](), dict[str, str]()
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
            by_name = {item.entry.name: item for item in shard}
            order = [entry.name for entry in canonical_order([item.entry for item in shard])]
            entries = log.layout([(n, by_name[n].entry.dtype, by_name[n].entry.shape) for n in order])
            with fs.HashingFile(final / name) as file:
                file.write(encode_header(entries, {"format": "pt"}))
                for tensor in order:
                    item = by_name[tensor]
                    for chunk in fs.read_range(self._spool(item.unit), item.entry.begin, item.nbytes):
                        file.write(chunk)
            digests[name] = file.sha256
            weight_map |= dict.fromkeys(order, name)
        index = {INDEX: encode_index(weight_map, sum(item.nbytes for item in placed))} if many else {}
        return _Shards(digests, index)


@dataclass(frozen=True, slots=True)
class _Shards:
    digests: Mapping[str, str]
    index: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class _Placed:
    """A committed tensor: where it lies in the spool file of unit number ``unit``."""

    entry: TensorEntry
    unit: int

    @property
    def nbytes(self) -> int:
        return self.entry.end - self.entry.begin

    @property
    def module(self) -> str:
        return self.entry.name.rpartition(".")[0]


def _pack(placed: Sequence[_Placed], limit: int) -> Iterator[list[_Placed]]:
    """Deal tensors, in order, to shards of at most ``limit`` tensor bytes; at least one shard, none empty otherwise.

    The parts of one linear, which stand together, stay in one shard unless they alone are larger (``formats.md`` 1.2); a tensor
    larger than ``limit`` gets a shard of its own.
    """
    if limit <= 0:
        raise InputError("--max-shard-size", f"is {limit}", "a positive number of bytes")
    shard: list[_Placed] = []
    room, position = limit, 0
    while position < len(placed):
        stop = position + 1
        while stop < len(placed) and placed[stop].module == placed[position].module and placed[stop].unit == placed[position].unit:
            stop += 1
        size = sum(item.nbytes for item in placed[position:stop])
        if size > limit:
            stop = position + 1
            size = placed[position].nbytes
        if size > room and shard:
            yield shard
            shard, room = [], limit
        shard.extend(placed[position:stop])
        room, position = room - size, stop
    yield shard
