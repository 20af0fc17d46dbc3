"""The GGUF writer: tensors appended to their file in order, committed to a journal, and put in place at the end.

``OUT.partial/`` holds ``journal`` and the file, or the parts of a split model, under the names that they will have. All sizes
are known before the first byte, so nothing is written twice. A kill at any point loses at most the tensors since the last
commit, and the same calls write the same bytes. Knows names, types and bytes; knows no model and no encoder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from quantkit import fs
from quantkit.checkpoint import journal as log
from quantkit.checkpoint.journal import Line
from quantkit.errors import InputError
from quantkit.formats.gguf import (
    ALIGNMENT,
    DEFAULT_ALIGNMENT,
    I32,
    MAGIC,
    MAX_PARTS,
    PART_NAME,
    SPLIT_COUNT,
    SPLIT_KEYS,
    SPLIT_NUMBER,
    SPLIT_TENSORS,
    U16,
    Value,
    encode_header,
    padded,
    part_name,
    tensor_bytes,
    tensor_record,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

JOURNAL = "journal"
WRITTEN = "written"
"""The field of the journal's identity that is the writer's own."""
BATCH_BYTES = 64 << 20
"""What is held in memory before it goes to the disk, and the most of whole tensors that a kill can cost."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to come: ``type`` a name of ``formats.gguf.BLOCK_TYPES``, ``shape`` slowest axis first."""

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor and the padding after it lie: bytes ``begin`` to ``end`` of part number ``part`` (from 0)."""

    tensor: PlannedTensor
    part: int
    begin: int
    end: int

    @property
    def block(self) -> str:
        """What belongs together: the tensors of a layer."""
        return ".".join(self.tensor.name.split(".")[:2]) if self.tensor.name.startswith("blk.") else ""


@dataclass(frozen=True, slots=True)
class _Part:
    """One file: its number (from 0), its final name, its header, its tensors and its size."""

    number: int
    name: str
    header: bytes
    places: tuple[_Place, ...]
    nbytes: int


def _alignment(metadata: Mapping[str, Value]) -> int:
    return int(metadata[ALIGNMENT].value) if ALIGNMENT in metadata else DEFAULT_ALIGNMENT


def _part(number: int, name: str, metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor]) -> _Part:
    alignment = _alignment(metadata)
    header = encode_header(metadata, [(tensor.name, tensor.type, tensor.shape) for tensor in tensors], alignment)
    places, end = list[_Place](), len(header)
    for tensor in tensors:
        begin, end = end, end + padded(tensor_bytes(tensor.type, tensor.shape), alignment)
        places.append(_Place(tensor, number, begin, end))
    return _Part(number, name, header, tuple(places), end)


def _split_keys(number: int, count: int, tensors: int) -> dict[str, Value]:
    return {SPLIT_NUMBER: Value(U16, number), SPLIT_COUNT: Value(U16, count), SPLIT_TENSORS: Value(I32, tensors)}


def _deal(metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor], limit: int) -> Iterator[list[PlannedTensor]]:
    """The tensors of each part, in order. A part is at most ``limit`` bytes long unless its one tensor, or all metadata, are longer."""
    alignment, split = _alignment(metadata), _split_keys(0, 0, 0)
    some: list[PlannedTensor] = []
    head, data = len(encode_header({**metadata, **split}, [], alignment)), 0
    for tensor in tensors:
        more_head = len(tensor_record(tensor.name, tensor.type, tensor.shape, 0))
        more_data = padded(tensor_bytes(tensor.type, tensor.shape), alignment)
        if some and padded(head + more_head, alignment) + data + more_data > limit:
            yield some
            # The other parts have no key but those of the split.
            some, alignment = [], DEFAULT_ALIGNMENT
            head, data = len(encode_header(split, [])), 0
            more_data = padded(tensor_bytes(tensor.type, tensor.shape), alignment)
        some.append(tensor)
        head, data = head + more_head, data + more_data
    yield some


def _parts(name: str, metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor], max_part_bytes: int | None) -> tuple[_Part, ...]:
    """The files to write: one of this ``name`` where that is allowed and small enough, or the parts of a split model."""
    assert not set(SPLIT_KEYS) & set(metadata), "the writer says how it splits"
    if max_part_bytes is not None and max_part_bytes <= 0:
        raise InputError("--max-shard-size", f"is {max_part_bytes}", "a positive number of bytes")
    whole = _part(0, name, metadata, tensors)
    if max_part_bytes is None or whole.nbytes <= max_part_bytes:
        return (whole,)
    dealt = list(_deal(metadata, tensors, max_part_bytes))
    if len(dealt) == 1:
        return (whole,)
    if len(dealt) > MAX_PARTS:
        raise InputError("--max-shard-size", f"{max_part_bytes} makes {len(dealt)} files", f"at most {MAX_PARTS}")
    return tuple(
        _part(
            number,
            part_name(name.removesuffix(".gguf"), number + 1, len(dealt)),
            {**({} if number else metadata), **_split_keys(number, len(dealt), len(tensors))},
            some,
        )
        for number, some in enumerate(dealt)
    )


def file_bytes(
    out: Path, metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor], max_part_bytes: int | None
) -> tuple[tuple[str, int], ...]:
    """The names and exact sizes of the files that a ``GgufWriter`` with these arguments makes. Raises InputError as it does."""
    return tuple((part.name, part.nbytes) for part in _parts(out.name, metadata, tensors, max_part_bytes))


class GgufWriter:
    """Writes one GGUF file, or a split model, tensor by tensor, resumably. Use as a context manager.

    Leaving without ``publish`` keeps OUT.partial.
    ``metadata`` are all keys but those of a split, in order; ``tensors`` all tensors, in the order of their data. With
    ``max_part_bytes`` a model that is larger becomes ``PREFIX-00001-of-0000N.gguf`` and so on beside OUT: the first part has all
    metadata, no tensor is cut, and a tensor that is larger alone gets a part alone. ``identity`` (JSON data) is everything that
    decides the bytes; resuming with another one is refused. ``source`` is the path that is read, so that it is never overwritten.

    Making it raises InputError for what the format cannot hold. Entering raises InputError when a file to write exists, an
    unfinished OUT.partial does and neither ``resume`` nor ``overwrite`` says what to do with it, or it cannot be resumed;
    MachineError when another process writes OUT or the disk is too small.
    """

    def __init__(
        self,
        out: Path,
        *,
        metadata: Mapping[str, Value],
        tensors: Sequence[PlannedTensor],
        identity: Mapping[str, Any],
        overwrite: bool,
        resume: bool,
        max_part_bytes: int | None,
        source: Path | None = None,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        self._overwrite, self._resume, self._source = overwrite, resume, source
        self._parts = _parts(self.out.name, metadata, tensors, max_part_bytes)
        self._places = [place for part in self._parts for place in part.places]
        assert WRITTEN not in identity
        headers = hashlib.sha256(b"".join(part.header for part in self._parts)).hexdigest()
        own = {WRITTEN: {"parts": len(self._parts), "headers": headers}}
        self._identity: dict[str, Any] = json.loads(json.dumps({**identity, **own}, allow_nan=False))
        self._held = ExitStack()
        self._disk = ThreadPoolExecutor(1)
        self._storing: Future[None] | None = None
        """The batch that is on its way to the disk; one at most, so two are in memory."""
        self._batch: list[ReadableBuffer] = []
        self._batch_bytes = 0
        self._begun: int | None = None
        self._at = 0
        """How much of the part in hand is on the disk, or on its way there."""
        self._hashes: list[str] = []
        """Of the tensors that were written, committed or not."""
        self._committed, self._length, self._publishing = 0, 0, False

    def __enter__(self) -> Self:
        for part in self._parts:
            self._refuse_source(self._final(part))
            if not self._resume:
                fs.refuse_existing_file(self._final(part), self._overwrite, MAGIC)  # before the lock, which makes files
        with ExitStack() as stack:
            stack.enter_context(fs.lock(self.out.with_name(f"{self.out.name}.lock")))
            self._open()
            self._held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._disk.shutdown()
        self._held.close()

    def _final(self, part: _Part) -> Path:
        return self.out.with_name(part.name)

    def _refuse_source(self, final: Path) -> None:
        if self._source is None:
            return
        fs.refuse_source(final, self._source)
        ours, theirs = PART_NAME.fullmatch(final.name), PART_NAME.fullmatch(self._source.name)
        beside = os.path.realpath(final.parent) == os.path.realpath(self._source.parent)
        if beside and ours and theirs and ours.group("prefix", "count") == theirs.group("prefix", "count"):
            raise InputError(str(final), "is a part of the source", "another path than those of the source")

    # opening

    def _open(self) -> None:
        lines = self._unfinished()
        if not lines:
            for part in self._parts:
                fs.refuse_existing_file(self._final(part), self._overwrite, MAGIC)
            fs.discard(self.partial)
        else:
            self._adopt(lines)
        left = sum(part.nbytes for part in self._parts) - sum(place.end - place.begin for place in self._places[: self._committed])
        fs.require_free(self.out.parent, left, str(self.out))
        if not lines:
            fs.make_dir(self.partial)
            line = log.first_line(self._identity)
            fs.write_bytes(self.partial / JOURNAL, line)
            self._length = len(line)

    def _is_ours(self, name: str) -> bool:
        """Whether a writer of OUT may have put ``name`` into OUT.partial, in however many parts."""
        name = name.removeprefix(".").removesuffix(".tmp") if name.startswith(".") else name
        found = PART_NAME.fullmatch(name)
        return name in (JOURNAL, self.out.name) or (found is not None and found["prefix"] == self.out.name.removesuffix(".gguf"))

    def _unfinished(self) -> tuple[Line, ...]:
        """The journal to resume from; () to start afresh. Raises InputError unless the caller said which."""
        if not os.path.lexists(self.partial):
            return ()
        where = str(self.partial)
        if not (self._resume or self._overwrite):
            raise InputError(where, "an unfinished run left it", "no such directory", "--resume continues it, --overwrite starts over")
        if self.partial.is_symlink() or not self.partial.is_dir():
            raise InputError(where, "is not what an unfinished run leaves", "a directory of quantkit", "move it away")
        strange = sorted(name for name in os.listdir(self.partial) if not self._is_ours(name))
        if strange:
            what = f"holds {strange[0]!r:.100}, which this writer did not put there"
            raise InputError(where, what, "the directory of an unfinished run", "move it away")
        if not self._resume:
            return ()
        lines = log.read_lines(self.partial / JOURNAL)
        if lines:
            then = dict(lines[0].data["identity"])
            changed = self._changed(then, own=False) or self._changed(then, own=True)
            if changed:
                field, before, now = changed
                hint = "run as before to continue, or --overwrite to start over"
                raise InputError(f"{where}: {field}", f"was {before!r:.200} when the work began and is {now!r:.200} now", "no change", hint)
        return lines

    def _changed(self, then: Mapping[str, Any], *, own: bool) -> tuple[str, Any, Any] | None:
        """What the caller says comes first: a changed type explains a changed header, and not the other way round."""
        before, now = ({key: value for key, value in some.items() if (key == WRITTEN) == own} for some in (then, self._identity))
        return log.changed_field(before, now)

    def _adopt(self, lines: Sequence[Line]) -> None:
        """Take over the committed tensors: the files must hold what the journal says, and everything else goes.

        Data are synced before their line is written, so no crash makes the two differ: that is an error, not an uncommitted tensor.
        """
        self._length = lines[-1].end
        for line in lines[1:]:
            place = self._places[len(self._hashes)] if len(self._hashes) < len(self._places) else None
            if place is None and line.data == {"publish": True}:
                self._publishing = True
            elif place is not None and line.data.get("tensor") == place.tensor.name and isinstance(line.data.get("sha256"), str):
                self._hashes.append(line.data["sha256"])
            else:
                where = f"{self.partial / JOURNAL}: line {line.number}"
                raise InputError(where, "is not what follows the lines before it", "each tensor once, in order", log.START_OVER)
        self._committed = len(self._hashes)
        hashes = iter(self._hashes)
        for part in self._parts:
            path, final = self.partial / part.name, self._final(part)
            held = tuple(zip(part.places, hashes, strict=False))
            if self._publishing and not os.path.lexists(path):
                self._check(part, final, held)
                continue
            if not (os.path.lexists(final) and os.path.lexists(path) and os.path.samestat(os.lstat(final), os.lstat(path))):
                fs.refuse_existing_file(final, self._overwrite, MAGIC)
            if held or self._publishing:
                self._begun, self._at = part.number, fs.append(path, b"", at=self._check(part, path, held))
            else:
                fs.remove_tree(path)
        for name in set(os.listdir(self.partial)) - {JOURNAL, *(part.name for part in self._parts)}:
            fs.remove_tree(self.partial / name)

    def _check(self, part: _Part, path: Path, held: Sequence[tuple[_Place, str]]) -> int:
        """Where the committed bytes of a part end, once they are found at ``path``; ``held`` are its tensors with their hashes."""
        end = held[-1][0].end if held else len(part.header)
        expected = f"the {end} bytes that were committed"
        if path.is_symlink() or not path.is_file() or fs.file_size(path) < end:
            raise InputError(str(path), "is not what was committed", expected, log.START_OVER)
        spans = [(0, len(part.header), hashlib.sha256(part.header).hexdigest())]
        for begin, stop, sha256 in (*spans, *((place.begin, place.end, sha256) for place, sha256 in held)):
            digest = hashlib.sha256()
            for chunk in fs.read_range(path, begin, stop - begin):
                digest.update(chunk)
            if digest.hexdigest() != sha256:
                raise InputError(str(path), f"has changed between bytes {begin} and {stop}", expected, log.START_OVER)
        return end

    # writing

    @property
    def committed(self) -> frozenset[str]:
        """The names of the tensors that are on the disk and need not be written again."""
        return frozenset(place.tensor.name for place in self._places[: self._committed])

    def write(self, name: str, chunks: Iterable[ReadableBuffer]) -> None:
        """Write the next tensor, ``name``, from C-contiguous buffers, which must not change after; together they are its exact bytes.

        Raises MachineError when the disk is full. What ``chunks`` raises ends the writer: only a resumed one goes on.
        """
        place = self._places[len(self._hashes)]
        assert place.tensor.name == name, (place.tensor.name, name)
        if self._begun != place.part:
            self._commit()
            self._begin(place.part)
        assert self._at + self._batch_bytes == place.begin, "a tensor before this one was not written whole"
        digest, left = hashlib.sha256(), tensor_bytes(place.tensor.type, place.tensor.shape)
        padding = bytes(place.end - place.begin - left)
        for chunk in chunks:
            view = memoryview(chunk)
            if view.nbytes:
                left -= view.nbytes
                assert left >= 0, f"{name} is longer than its type and shape say"
                digest.update(view)
                self._put(view.cast("B"))
        assert left == 0, f"{name} is {left} bytes shorter than its type and shape say"
        digest.update(padding)
        self._put(memoryview(padding))
        self._hashes.append(digest.hexdigest())
        following = self._places[len(self._hashes)] if len(self._hashes) < len(self._places) else None
        uncommitted = place.end - self._places[self._committed].begin
        if following is None or following.block != place.block or uncommitted >= BATCH_BYTES:
            self._commit()

    def _begin(self, number: int) -> None:
        self._settle()
        part = self._parts[number]
        fs.write_bytes(self.partial / part.name, part.header)
        self._begun, self._at = number, len(part.header)

    def _put(self, view: memoryview) -> None:
        self._batch.append(view)
        self._batch_bytes += view.nbytes
        if self._batch_bytes >= BATCH_BYTES:
            self._flush(b"")

    def _flush(self, lines: bytes) -> None:
        """Send the batch to the disk, and ``lines`` of the journal after it; the batch before it is there when this returns."""
        self._settle()
        batch, at, begun, length = self._batch, self._at, self._begun, self._length
        self._batch, self._at, self._length = [], at + self._batch_bytes, length + len(lines)
        self._batch_bytes = 0

        def store() -> None:
            if batch:
                assert begun is not None
                fs.append(self.partial / self._parts[begun].name, *batch, at=at)
            if lines:
                fs.append(self.partial / JOURNAL, lines, at=length)

        self._storing = self._disk.submit(store)

    def _settle(self) -> None:
        """Wait for the disk. Raises what it said."""
        if self._storing is not None:
            storing, self._storing = self._storing, None
            storing.result()

    def _commit(self) -> None:
        """Make the tensors written so far survive a kill, once the disk has them."""
        names = [place.tensor.name for place in self._places[self._committed : len(self._hashes)]]
        if names:
            pairs = zip(names, self._hashes[self._committed :], strict=True)
            self._flush(b"".join(log.encode_line({"tensor": name, "sha256": sha256}) for name, sha256 in pairs))
            self._committed = len(self._hashes)

    def publish(self) -> tuple[tuple[Path, int], ...]:
        """Put the file, or the parts, in place, the first part last; returns their paths and sizes in order.

        Raises InputError when one has appeared meanwhile. A kill in between is resumable.
        """
        assert len(self._hashes) == len(self._places), "not every tensor was written"
        self._commit()
        self._settle()
        if not self._publishing:
            if not self._places:
                self._begin(0)
            self._length = fs.append(self.partial / JOURNAL, log.encode_line({"publish": True}), at=self._length)
            self._publishing = True
        moving = [part for part in self._parts if os.path.lexists(self.partial / part.name)]
        if self._overwrite and len(self._parts) > 1 and self._parts[0] in moving:
            # An old first part must not stand beside new others: it is the one that a model is opened from.
            fs.refuse_existing_file(self._final(self._parts[0]), True, MAGIC)
            fs.remove_file(self._final(self._parts[0]))
            fs.fsync_dir(self.out.parent)
        for part in reversed(moving):
            fs.publish_file(self.partial / part.name, self._final(part), self._overwrite)
        fs.discard(self.partial)
        return tuple((self._final(part), part.nbytes) for part in self._parts)
