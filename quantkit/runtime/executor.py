"""Where a step is run: in this process, or by rank processes that are started, watched and ended here.

An executor knows steps and ranks; it knows no requests, no text and no schedule.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Protocol

import torch

import quantkit
from quantkit.comm import Solo
from quantkit.errors import MachineError, QuantkitError, RuntimeDied
from quantkit.progress import Progress, silent
from quantkit.runtime.sampler import Sampled
from quantkit.runtime.threads import thread_variables
from quantkit.runtime.wire import Frames, Message, RankFacts, RankJob, Step, error_from_json, frame, sampled_from_json, step_to_json
from quantkit.runtime.worker import Runner, load_rank, rank_facts

_LOG = logging.getLogger("quantkit")
SILENT_SECONDS = 10.0
"""A rank that says nothing for this long hangs: it says that it is alive every second, whatever it computes."""
START_SECONDS = 120.0
"""A rank that has not said its first word this long after its start hangs: until then it only imports torch."""
POLL_SECONDS = 0.2
GRACE_SECONDS = 2.0
"""How long the other ranks have, when one fails, to say what it was: the first to notice is seldom the one to blame."""
STDERR_BYTES = 1 << 14
CACHE_HINT = "--gpu-memory-utilization, --max-model-len or --max-num-seqs"


class Executor(Protocol):
    """Runs steps in the order in which they were launched, for one thread. ``close`` may come from any thread."""

    @property
    def facts(self) -> tuple[RankFacts, ...]:
        """What each rank holds, in rank order."""

    def open_cache(self, blocks: int) -> None:
        """Have every rank take memory for ``blocks`` blocks of keys and values, once, before the first step. Raises MachineError."""

    def launch(self, step: Step) -> None:
        """Give ``step`` to every rank and wait for none of them."""

    def collect(self) -> list[Sampled]:
        """Wait for the oldest step that was launched and not collected; the tokens of its chunks that sample, in order.

        Raises RuntimeDied when a rank is lost.
        """

    def execute(self, step: Step) -> list[Sampled]:
        """Launch ``step``, with none before it under way, and collect it."""

    def check(self) -> None:
        """Raise RuntimeDied when a rank was lost since the last step; to be called every second or so while there is none."""

    def close(self) -> None:
        """End all ranks; a second call does nothing."""


class LocalExecutor:
    """One rank, in this process and on the thread that launches steps."""

    def __init__(self, job: RankJob, progress: Progress = silent) -> None:
        assert job.tp == 1
        progress("load", 0, 1)
        self._runner = Runner(load_rank(job, Solo(), job.device), kv_fp8=job.kv_fp8)
        self.facts = (rank_facts(self._runner.decoder, job),)
        self._sampled = deque[list[Sampled]]()
        progress("load", 1, 1)

    def open_cache(self, blocks: int) -> None:
        try:
            self._runner.open_cache(blocks)
        except (torch.OutOfMemoryError, RuntimeError) as exc:  # RuntimeError: a CPU's
            raise MachineError("keys and values", f"{blocks} blocks are more than there is memory for", "less", CACHE_HINT) from exc

    def launch(self, step: Step) -> None:
        with _pass_failures():
            self._sampled.append(self._runner.run(step))

    def collect(self) -> list[Sampled]:
        return self._sampled.popleft()

    def execute(self, step: Step) -> list[Sampled]:
        self.launch(step)
        return self.collect()

    def check(self) -> None:
        return

    def close(self) -> None:
        return


@contextmanager
def _pass_failures() -> Iterator[None]:
    """What torch raises in a pass, as ours."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        reason = str(exc).splitlines()[0]
        raise MachineError("model", f"is out of memory ({reason})", "room for a pass", "--max-num-seqs or --max-model-len") from exc
    except RuntimeError as exc:  # from a device that is lost to memory that is not there
        reason = (str(exc).splitlines() or [type(exc).__name__])[0]
        raise RuntimeDied("model", f"failed in a pass ({reason})", "every pass to end") from exc


@dataclass(slots=True)
class _Rank:
    """A rank process as its parent sees it."""

    number: int
    process: subprocess.Popen[bytes]
    connection: socket.socket
    frames: Frames
    stderr: bytearray = field(default_factory=bytearray)
    heard: float = field(default_factory=time.monotonic)
    """When it last said anything, or was started."""
    spoke: bool = False
    ready: RankFacts | None = None
    opened: bool = False
    """Whether it has taken memory for keys and values."""
    error: QuantkitError | None = None
    gone: bool = False

    @property
    def name(self) -> str:
        return f"rank {self.number}"

    def obituary(self) -> RuntimeDied:
        """Why the process ended, from its status and the last line that it wrote."""
        status = self.process.poll()
        lines = self.stderr.decode("utf-8", "replace").strip().splitlines()
        last = f" ({lines[-1].strip()[:300]})" if lines else ""
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            return RuntimeDied(
                self.name, how + last, "every rank alive", "the system may have run out of memory" if status == -signal.SIGKILL else None
            )
        ended = "closed its connection" if status is None else f"ended with status {status}"
        return RuntimeDied(self.name, ended + last, "every rank alive")


class ProcessExecutor:
    """``job.tp`` rank processes on this host.

    Ranks meet in a file without a name, in memory, that only they have open; each has a socket of its own for commands. All
    are ended when one is lost, when this is closed, and when this process dies, however it does; then nothing is left.
    """

    def __init__(self, job: RankJob, progress: Progress = silent) -> None:
        assert job.tp > 1
        self._job, self._answers = job, deque[Message]()
        self._lock, self._closed = threading.Lock(), False
        self._failure: QuantkitError | None = None
        self._ranks: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        self._done = threading.Event()
        self._looked = time.monotonic()
        try:
            self._spawn()
            self.facts = self._meet(progress)
        except BaseException:
            self.close()
            raise

    def _spawn(self) -> None:
        """Start the ranks on a thread that lives until ``close``: a rank dies with the thread that started it (PR_SET_PDEATHSIG)."""
        started, failed = threading.Event(), list[OSError]()

        def keep() -> None:
            try:
                store = os.memfd_create("quantkit-ranks")
                try:
                    for number in range(self._job.tp):
                        self._ranks.append(self._start(number, store))
                finally:
                    os.close(store)
            except OSError as exc:
                failed.append(exc)
            started.set()
            self._done.wait()

        threading.Thread(target=keep, name="ranks", daemon=True).start()
        started.wait()
        if failed:
            raise MachineError("ranks", f"cannot be started ({failed[0].strerror})", f"{self._job.tp} processes") from failed[0]

    def _start(self, number: int, store: int) -> _Rank:
        ours, theirs = socket.socketpair()
        root = str(Path(quantkit.__file__).parent.parent)
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "quantkit.runtime.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno(), store],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": paths, **thread_variables(self._job.tp)},
                process_group=0,  # the terminal's Ctrl-C is for us
            )
        rank = _Rank(number, process, ours, Frames(f"rank {number}"))
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        ours.settimeout(SILENT_SECONDS)  # of sends; what comes in is read when it is there
        self._selector.register(ours, selectors.EVENT_READ, rank)
        self._selector.register(process.stderr, selectors.EVENT_READ, rank)
        start = {"job": asdict(self._job), "rank": number, "store": f"/proc/self/fd/{store}", "parent": os.getpid()}
        self._send(rank, frame(start))
        return rank

    def _meet(self, progress: Progress) -> tuple[RankFacts, ...]:
        """Wait until every rank has loaded."""
        while True:
            facts = [rank.ready for rank in self._ranks if rank.ready is not None]
            progress("load ranks", len(facts), self._job.tp)
            if len(facts) == self._job.tp:
                return tuple(facts)
            self._watch(POLL_SECONDS)

    @property
    def pids(self) -> tuple[int, ...]:
        """The process id of each rank."""
        return tuple(rank.process.pid for rank in self._ranks)

    def open_cache(self, blocks: int) -> None:
        message = frame({"cache": blocks})
        for rank in self._ranks:
            self._send(rank, message)
        while not all(rank.opened for rank in self._ranks):
            self._watch(POLL_SECONDS)

    def launch(self, step: Step) -> None:
        message = frame({"step": step_to_json(step)})
        for rank in self._ranks:
            self._send(rank, message)

    def collect(self) -> list[Sampled]:
        patience = self._job.timeout + SILENT_SECONDS
        deadline = time.monotonic() + patience
        while not self._answers:
            self._watch(POLL_SECONDS)
            if time.monotonic() > deadline and not self._answers:
                self._fail(RuntimeDied("ranks", f"gave no token within {patience:.0f} s", "a step to end", "--timeout"))
        return sampled_from_json(self._answers.popleft()["sampled"])

    def execute(self, step: Step) -> list[Sampled]:
        self.launch(step)
        return self.collect()

    def check(self) -> None:
        self._watch(0.0)

    def _send(self, rank: _Rank, data: bytes) -> None:
        try:
            rank.connection.sendall(data)
        except OSError:  # gone or stuck: the next look says which
            rank.gone = True

    def _watch(self, wait: float) -> None:
        """Take in what the ranks say within ``wait`` seconds. Raises the failure when one is lost, after ending all."""
        if self._failure is not None:
            raise self._failure
        now = time.monotonic()
        if now - self._looked > SILENT_SECONDS / 2:  # it was we who slept: judge nobody by it
            for rank in self._ranks:
                rank.heard = now
        self._looked = now
        self._listen(wait)
        now = time.monotonic()
        for rank in self._ranks:
            if rank.error is not None or rank.gone or rank.process.poll() is not None:
                self._fail(self._cause())
            patience = SILENT_SECONDS if rank.spoke else START_SECONDS
            if now - rank.heard > patience:
                self._fail(RuntimeDied(rank.name, f"has said nothing for {patience:.0f} s", "a rank that runs"))

    def _listen(self, wait: float) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeDied("ranks", "were ended", "an open engine")
            for key, _ in self._selector.select(wait):
                rank: _Rank = key.data
                if key.fileobj is rank.connection:
                    self._hear(rank)
                else:
                    self._overhear(rank, key.fd)

    def _hear(self, rank: _Rank) -> None:
        try:
            data = rank.connection.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            rank.gone = True
            self._selector.unregister(rank.connection)
            return
        rank.heard, rank.spoke = time.monotonic(), True
        for message in rank.frames.feed(data):
            if "ready" in message:
                rank.ready = RankFacts(**message["ready"])
            elif "opened" in message:
                rank.opened = True
            elif "error" in message:
                rank.error = error_from_json(message["error"])
            elif "sampled" in message:
                self._answers.append(message)
            elif "log" in message:
                _LOG.log(message["level"], "%s: %s", rank.name, message["log"])

    def _overhear(self, rank: _Rank, fd: int) -> None:
        data = os.read(fd, 1 << 16)
        if data:
            rank.stderr += data
            del rank.stderr[:-STDERR_BYTES]
        else:
            self._selector.unregister(fd)

    def _cause(self) -> QuantkitError:
        """The failure behind what was noticed: an error that is no echo, else a rank that died, else the first echo."""
        until = time.monotonic() + GRACE_SECONDS
        while True:
            self._listen(POLL_SECONDS)
            own = [rank.error for rank in self._ranks if rank.error is not None and not isinstance(rank.error, RuntimeDied)]
            ended = all(rank.gone and rank.process.poll() is not None for rank in self._ranks)
            if own or ended or time.monotonic() > until:
                break
        dead = [rank for rank in self._ranks if rank.error is None and (rank.gone or rank.process.poll() is not None)]
        echoes = [rank.error for rank in self._ranks if rank.error is not None]
        return own[0] if own else dead[0].obituary() if dead else echoes[0]

    def _fail(self, error: QuantkitError) -> None:
        self._failure = error
        self.close()
        raise error

    def close(self) -> None:
        closed, self._closed = self._closed, True  # first, so that a thread that listens lets go of the lock
        if closed:
            return
        with self._lock:
            if self._failure is None:
                for rank in self._ranks:
                    self._send(rank, frame({"close": True}))
                until = time.monotonic() + GRACE_SECONDS
                while time.monotonic() < until and any(rank.process.poll() is None for rank in self._ranks):
                    time.sleep(0.01)
            for rank in self._ranks:
                _end(rank)
            self._done.set()
            self._selector.close()


def _end(rank: _Rank) -> None:
    if rank.process.poll() is None:
        rank.process.kill()
    rank.process.wait()
    rank.connection.close()
    stderr: IO[bytes] | None = rank.process.stderr
    if stderr is not None:
        stderr.close()
