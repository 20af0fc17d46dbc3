"""The only place that opens files for writing: confined names, hashed and synced writes, locks, publishing.

Knows paths, bytes and errno values; knows no checkpoint, tensor or format. Every system call that changes the disk is
looked up on ``os`` at the moment of the call, so that a test can make any one of them fail.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from quantkit.errors import InputError, MachineError, QuantkitError

if TYPE_CHECKING:
    import numpy as np
    from _typeshed import ReadableBuffer
    from numpy.typing import NDArray

CHUNK_BYTES = 8 << 20
"""The most that is copied or hashed at a time."""
ROW_READ_BYTES = 4 << 10
"""From this many bytes on, which is a page, parts of rows are read one by one; shorter ones are cut from all that lies there."""
MAX_NAME_BYTES = 255
TEMPORARY = ".{name}.tmp"
REPLACED = ".{name}.replaced"
"""Where ``publish`` puts an old output for the moment between two renames."""
DISCARDED = ".{name}.discarded"
"""Where ``discard`` puts what it removes."""
REPLACEABLE = ("config.json", "quantkit.json", "SHA256SUMS", "model.safetensors", "model.safetensors.index.json")
"""``--overwrite`` replaces a directory only if it holds one of these: a slip must not cost a home directory."""

_DISK_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file size limit is reached"}
_BAD_PATH = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})


def refusal(error: OSError, path: str | Path, doing: str) -> QuantkitError:
    """``error`` as the one-line error it deserves: a bad path is the user's, everything else the machine's."""
    if error.errno in _DISK_FULL:
        hint = "free some space and run again; with --resume where the command has it"
        return MachineError(str(path), f"{_DISK_FULL[error.errno]}, cannot {doing}", "room to write", hint)
    reason = f"cannot {doing} ({error.strerror or error})"
    if error.errno in _BAD_PATH:
        return InputError(str(path), reason, "a path that can be used")
    return MachineError(str(path), reason)


@contextmanager
def _refusals(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise refusal(exc, path, doing) from exc


def confined(root: Path, name: str, where: str) -> Path:
    """``root / name`` for a ``name`` that came from a file: one plain component that stays inside ``root``.

    Raises InputError, blaming ``where``, for a path, a special or unprintable name, or a link that leaves ``root``.
    """
    expected = "the plain name of a file in the same directory"
    if name in ("", ".", "..") or any(c in "/\\" or ord(c) < 32 or ord(c) == 127 for c in name):
        raise InputError(where, f"file name {name!r:.200}", expected)
    try:
        encoded = name.encode()
    except UnicodeEncodeError as exc:
        raise InputError(where, f"file name {name!r:.200} is not UTF-8", expected) from exc
    if len(encoded) > MAX_NAME_BYTES:
        raise InputError(where, f"a file name of {len(encoded)} bytes", f"at most {MAX_NAME_BYTES}")
    path = root / name
    if path.is_symlink():
        with _refusals(path, "resolve it"):
            target, home = Path(os.path.realpath(path)), Path(os.path.realpath(root))
        # The hub's cache keeps a model as links from snapshots/REVISION into the blobs beside snapshots.
        cached = home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")
        if not cached and not target.is_relative_to(home):
            raise InputError(
                where, f"{name!r} is a link that leaves the directory", expected, "copy the directory with its links followed: cp -rL"
            )
    return path


@contextmanager
def _open_regular(path: Path) -> Iterator[int]:
    """A descriptor to read a regular file; a pipe or a device in its place must not block or feed us."""
    with _refusals(path, "read it"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InputError(str(path), "is not a regular file", "a file")
        yield fd
    finally:
        os.close(fd)


def file_size(path: Path) -> int:
    """The size of a regular file in bytes. Raises InputError when it is none."""
    with _open_regular(path) as fd:
        return os.fstat(fd).st_size


def read_range(path: Path, offset: int, nbytes: int) -> Iterator[bytes]:
    """Bytes ``offset : offset + nbytes`` of a regular file, in chunks. Raises InputError when the file ends before."""
    with _open_regular(path) as fd:
        end = offset + nbytes
        while offset < end:
            with _refusals(path, "read it"):
                chunk = os.pread(fd, min(CHUNK_BYTES, end - offset), offset)
            if not chunk:
                raise InputError(str(path), f"ends at byte {offset}", f"{end} bytes")
            offset += len(chunk)
            yield chunk


def read_rows(path: Path, offset: int, stride: int, out: NDArray[np.uint8]) -> None:
    """Fill ``out [rows, bytes]``, C-contiguous: row r with the bytes of a regular file from ``offset + r * stride`` on.

    Nothing is copied on the way, unless the rows are short parts of what lies there. Raises InputError when the file ends before.
    """
    import numpy as np

    assert out.ndim == 2 and out.flags.c_contiguous and stride >= out.shape[1], (out.shape, stride)
    if not out.size:
        return
    count, width = out.shape
    with _open_regular(path) as fd, _refusals(path, "read it"):
        if stride == width:
            _fill(fd, path, offset, out.reshape(-1))
        elif width >= ROW_READ_BYTES:
            for row, view in enumerate(out):
                _fill(fd, path, offset + row * stride, view)
        else:
            for first in range(0, count, step := max(1, CHUNK_BYTES // stride)):
                some = out[first : first + step]
                whole = np.empty((len(some), stride), np.uint8)
                _fill(fd, path, offset + first * stride, whole.reshape(-1)[: stride * (len(some) - 1) + width])
                some[...] = whole[:, :width]


def _fill(fd: int, path: Path, offset: int, out: NDArray[np.uint8]) -> None:
    """Fill the vector ``out`` from ``offset`` of the file on."""
    view, done = out.data, 0
    while done < len(view):
        got = os.preadv(fd, [view[done : done + CHUNK_BYTES]], offset + done)
        if not got:
            raise InputError(str(path), f"ends at byte {offset + done}", f"{offset + len(view)} bytes")
        done += got


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole small file. Raises InputError when it is no regular file or is longer than ``limit`` bytes."""
    size = file_size(path)
    if size > limit:
        raise InputError(str(path), f"is {size} bytes long", f"at most {limit}")
    return b"".join(read_range(path, 0, size))


def sha256_file(path: Path) -> str:
    """The sha256 of a regular file, in hex. Raises InputError when it cannot be read."""
    digest = hashlib.sha256()
    for chunk in read_range(path, 0, file_size(path)):
        digest.update(chunk)
    return digest.hexdigest()


class HashingFile:
    """A new file, open for writing, that is hashed as it is written; a file of that name is replaced, a link not followed.

    ``close`` syncs it to the disk. A full disk raises MachineError and leaves what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._hash = hashlib.sha256()
        with _refusals(path, "create it"):
            if os.path.lexists(path):
                os.unlink(path)
            self._fd: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: ReadableBuffer) -> None:
        """Append the bytes of any C-contiguous buffer."""
        assert self._fd is not None, "closed"
        view = memoryview(data)
        if not view.nbytes:
            return
        with view.cast("B") as flat:
            _write_all(self._fd, flat, self.path)
            self._hash.update(flat)
            self.size += flat.nbytes

    @property
    def sha256(self) -> str:
        """The sha256 of what was written so far, in hex."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Sync to the disk and close; once closed, do nothing."""
        if self._fd is None:
            return
        try:
            with _refusals(self.path, "sync it"):
                os.fsync(self._fd)
        finally:
            self._abandon()

    def _abandon(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()


def _write_all(fd: int, data: memoryview, path: Path) -> None:
    with _refusals(path, "write to it"):
        done = 0
        while done < data.nbytes:
            done += os.write(fd, data[done : done + CHUNK_BYTES])


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader or a crash sees the old content or the new, never a part of it."""
    temporary = path.with_name(TEMPORARY.format(name=path.name))
    try:
        with HashingFile(temporary) as file:
            file.write(data)
        with _refusals(path, "put it in place"):
            os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_dir(path.parent)


def scratch_array(path: Path, nbytes: int) -> NDArray[np.uint8]:
    """A new file of ``nbytes`` bytes, mapped into memory for reading and writing. It is no part of any result and is never synced."""
    import numpy as np

    with _refusals(path, "make a scratch file"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(nbytes, 1))  # a full disk is an error here, not a signal at some later write
            return np.memmap(file, dtype=np.uint8, mode="r+", shape=(nbytes,))


def append(path: Path, *data: ReadableBuffer, at: int) -> int:
    """Cut an existing file to ``at`` bytes, append ``data``, sync; returns the new length. Links are not followed."""
    with _refusals(path, "append to it"):
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, at)
            os.lseek(fd, at, os.SEEK_SET)
            for buffer in data:
                with memoryview(buffer) as view, view.cast("B") as flat:
                    _write_all(fd, flat, path)
                    at += flat.nbytes
            os.fsync(fd)
        finally:
            os.close(fd)
    return at


def make_dir(path: Path) -> None:
    """Make a directory and its parents, durably; one that exists is fine. Raises InputError where it cannot be."""
    if path.is_dir():
        return
    make_dir(path.parent)
    with _refusals(path, "make the directory"):
        try:
            os.mkdir(path)
        except FileExistsError:
            if not path.is_dir():
                raise InputError(str(path), "is not a directory", "a directory or nothing") from None
    fsync_dir(path.parent)


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    with _refusals(path, "sync the directory"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remove_file(path: Path) -> None:
    """Remove a file or a link; one that is not there is fine."""
    with _refusals(path, "remove it"), suppress(FileNotFoundError):
        os.unlink(path)


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it, or a file; links are removed, not followed; what is not there is fine."""
    if path.is_symlink() or not path.is_dir():
        remove_file(path)
        return
    with _refusals(path, "remove it"):
        shutil.rmtree(path)


def discard(path: Path) -> None:
    """Remove a directory, if there is one, so that a crash leaves all of it under its name or nothing."""
    away = path.with_name(DISCARDED.format(name=path.name))
    remove_tree(away)
    if os.path.lexists(path):
        with _refusals(path, "move it away"):
            os.rename(path, away)
        fsync_dir(path.parent)
        remove_tree(away)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold ``path`` as a lock file, made for the purpose and removed at the end; a dead process holds nothing.

    Raises MachineError at once when another process holds it.
    """
    make_dir(path.parent)
    while True:
        with _refusals(path, "open the lock"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                hint = "wait for the other quantkit to end, or choose another output"
                raise MachineError(str(path), "is locked: another process is writing this output", "one writer", hint) from None
            # The holder before us removes the file as it lets go; then the name is another file's, or free.
            if _same_file(fd, path):
                try:
                    yield
                finally:
                    with _refusals(path, "remove the lock"):
                        os.unlink(path)
                return
        finally:
            os.close(fd)


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def require_free(directory: Path, nbytes: int, where: str, reason: str | None = None) -> None:
    """Raise MachineError unless the disk of ``directory`` (or of its nearest parent that exists) has ``nbytes`` free."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    with _refusals(directory, "ask for its free space"):
        state = os.statvfs(directory)
    free = state.f_bavail * state.f_frsize
    if free < nbytes:
        needs = f"needs {nbytes} bytes of disk{f' ({reason})' if reason else ''}"
        raise MachineError(where, f"{needs}, {free} are free", f"{nbytes - free} bytes more", "free some space, or write to another disk")


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise InputError when ``out`` exists and may not be replaced.

    ``overwrite`` allows a directory that is empty or holds a checkpoint; never a link, a file, or any other directory.
    """
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InputError(str(out), "exists", "a path that does not exist", "--overwrite replaces it")
    with _refusals(out, "list it"):
        replaceable = not out.is_symlink() and out.is_dir() and (not os.listdir(out) or any((out / name).exists() for name in REPLACEABLE))
    if not replaceable:
        raise InputError(str(out), "cannot be overwritten: it is no checkpoint directory", "a directory with a checkpoint, or a new path")


def refuse_existing_file(out: Path, overwrite: bool, magic: bytes) -> None:
    """Raise InputError when the file ``out`` exists and may not be replaced.

    ``overwrite`` allows a regular file that is empty or begins with ``magic``; never a link, a directory, or any other file.
    """
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InputError(str(out), "exists", "a path that does not exist", "--overwrite replaces it")
    replaceable = not out.is_symlink() and out.is_file()
    if replaceable and (size := min(file_size(out), len(magic))):
        replaceable = b"".join(read_range(out, 0, size)) == magic
    if not replaceable:
        raise InputError(str(out), f"cannot be overwritten: it is no {magic.decode()} file", "such a file, or a new path")


def refuse_source(out: Path, source: Path) -> None:
    """Raise InputError when ``out`` is ``source`` or holds it, so that replacing ``out`` would destroy what is read."""
    target, origin = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if origin.is_relative_to(target):
        raise InputError(str(out), "is where the source lies", "another path than the source and the directories around it")


def _replaced(out: Path) -> Path:
    return out.with_name(REPLACED.format(name=out.name))


def clear_replaced(out: Path) -> None:
    """Remove what a crash in ``publish`` left of the output that ``out`` replaced; nothing while ``out`` does not exist."""
    if os.path.lexists(out):
        remove_tree(_replaced(out))


def publish(partial: Path, out: Path, overwrite: bool) -> None:
    """Sync the directory ``partial`` and rename it to ``out``, on the same disk; its files are synced already.

    Nothing but an empty directory is ever replaced without ``overwrite``. With it the old output is renamed away first and removed last: a
    crash in between leaves the new output under ``partial`` or ``out``. Raises InputError when ``out`` exists.
    """
    refuse_existing(out, overwrite)
    fsync_dir(partial)
    replaced = _replaced(out)
    moved = os.path.lexists(out)
    if moved:
        remove_tree(replaced)
        with _refusals(out, "move the old output away"):
            os.rename(out, replaced)
    try:
        # rename(2) puts a directory over nothing or over an empty directory, never over one that holds anything.
        os.rename(partial, out)
    except OSError as exc:
        if exc.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            hint = "--overwrite replaces it"
            raise InputError(str(out), "appeared while its replacement was being made", "a path that does not exist", hint) from exc
        with _refusals(out, "put it in place"):
            if moved:
                os.rename(replaced, out)
            raise
    fsync_dir(out.parent)
    if partial.parent != out.parent:
        fsync_dir(partial.parent)
    clear_replaced(out)


_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def publish_file(partial: Path, out: Path, overwrite: bool) -> None:
    """Rename a file, which is synced already, to ``out`` on the same disk, durably.

    Without ``overwrite`` nothing is replaced; with it a file is. Raises InputError when ``out`` exists.
    """
    if not overwrite:
        try:
            # rename(2) would replace a file that appeared a moment ago; link(2) does not.
            os.link(partial, out)
        except FileExistsError as exc:
            if not os.path.samestat(os.lstat(partial), os.lstat(out)):
                hint = "--overwrite replaces it"
                raise InputError(str(out), "appeared while it was being made", "a path that does not exist", hint) from exc
        except OSError as exc:
            if exc.errno not in _NO_HARD_LINKS:
                raise refusal(exc, out, "put it in place") from exc
            refuse_existing_file(out, False, b"")
            with _refusals(out, "put it in place"):
                os.rename(partial, out)
        remove_file(partial)
    else:
        with _refusals(out, "put it in place"):
            os.rename(partial, out)
    fsync_dir(out.parent)
