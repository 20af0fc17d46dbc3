"""Ranks as processes on this host: how they are started, told apart from the dead, and ended. What is said to them is the executor's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import quantkit
from quantkit.errors import MachineError, RuntimeDied
from quantkit.runtime.threads import thread_variables
from quantkit.runtime.wire import Message

STDERR_BYTES = 1 << 14
ECHO_SECONDS = 1.0
"""How long the last words of a process that has ended may take to come."""


def module_command(module: str, fd: int) -> list[str]:
    """The command line of a process of ours that obeys the socket ``fd``."""
    return [sys.executable, "-P", "-m", module, str(fd)]


def module_environment() -> dict[str, str]:
    """This process's environment, with which a process of ours finds this very quantkit."""
    root = str(Path(quantkit.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


class LastWords:
    """The end of what a process writes to stderr, read by a thread so that the process never waits for a reader."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self._kept = process, bytearray()
        self._thread = threading.Thread(target=self._read, name="stderr", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            while data := os.read(stream.fileno(), 1 << 16):
                self._kept += data
                del self._kept[:-STDERR_BYTES]

    def line(self) -> str:
        """The last line, in brackets behind a blank; nothing when there is none."""
        self._thread.join(ECHO_SECONDS)
        lines = bytes(self._kept).decode("utf-8", "replace").strip().splitlines()
        return f" ({lines[-1].strip()[:300]})" if lines else ""


@dataclass(slots=True)
class ProcessRank:
    """One rank process."""

    name: str
    connection: socket.socket
    start: Message
    process: subprocess.Popen[bytes]
    words: LastWords

    def ended(self) -> bool:
        return self.process.poll() is not None

    def obituary(self) -> RuntimeDied:
        """Why the process ended, from its status and the last line that it wrote."""
        status = self.process.poll()
        last = self.words.line() if status is not None else ""
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            return RuntimeDied(
                self.name, how + last, "every rank alive", "the system may have run out of memory" if status == -signal.SIGKILL else None
            )
        ended = "closed its connection" if status is None else f"ended with status {status}"
        return RuntimeDied(self.name, ended + last, "every rank alive")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@dataclass(slots=True)
class Processes:
    """The ranks of one model as processes of this host. They meet in a file without a name, in memory, that only they have open.

    ``names`` of the ranks and their ``devices``; ``host_ranks`` share this host. All end with this process, however it ends.
    """

    names: tuple[str, ...]
    devices: tuple[str, ...]
    host_ranks: int
    _done: threading.Event = field(default_factory=threading.Event)

    def start(self) -> list[ProcessRank]:
        """Start them, on a thread that lives until ``close``: a process dies with the thread that started it (PR_SET_PDEATHSIG)."""
        started, ranks, failed = threading.Event(), list[ProcessRank](), list[OSError]()

        def keep() -> None:
            try:
                store = os.memfd_create("quantkit-ranks")
                try:
                    for number in range(len(self.names)):
                        ranks.append(self._start(number, store))
                finally:
                    os.close(store)
            except OSError as exc:
                failed.append(exc)
            started.set()
            self._done.wait()

        threading.Thread(target=keep, name="ranks", daemon=True).start()
        started.wait()
        if failed:
            for rank in ranks:
                rank.end()
                rank.connection.close()
            self.close()
            raise MachineError("ranks", f"cannot be started ({failed[0].strerror})", f"{len(self.names)} processes") from failed[0]
        return ranks

    def _start(self, number: int, store: int) -> ProcessRank:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                module_command("quantkit.runtime.worker", theirs.fileno()),
                pass_fds=[theirs.fileno(), store],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=module_environment() | thread_variables(self.host_ranks),
                process_group=0,  # the terminal's Ctrl-C is for us
            )
        start = {"rank": number, "device": self.devices[number], "host_ranks": self.host_ranks}
        start |= {"store": f"/proc/self/fd/{store}", "parent": os.getpid()}
        return ProcessRank(self.names[number], ours, start, process, LastWords(process))

    def close(self) -> None:
        """Let go of the thread that the processes would die with; they have ended."""
        self._done.set()


@dataclass(frozen=True, slots=True)
class ThisHost:
    """This host, for ``replicas`` of ``tp`` ranks each on ``place``: of GPUs each replica takes its ``tp`` in turn."""

    place: str
    tp: int
    replicas: int

    def home(self, replica: int) -> Processes:
        names = rank_names(self.tp, self.replicas)[replica]
        devices = [f"cuda:{replica * self.tp + rank}" if self.place == "cuda" else "cpu" for rank in range(self.tp)]
        return Processes(names, tuple(devices), self.tp * self.replicas)

    def close(self) -> None:
        return


def rank_names(tp: int, replicas: int) -> list[tuple[str, ...]]:
    """What each replica's ranks are called in an error."""
    return [
        tuple(f"replica {replica}, rank {rank}" if replicas > 1 else f"rank {rank}" for rank in range(tp)) for replica in range(replicas)
    ]
