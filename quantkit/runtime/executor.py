"""Who runs a step: this process, or ranks that live elsewhere, which are told, heard and judged here.

An executor knows steps and ranks; it knows no requests, no text and no schedule, nor how a rank is started.
"""

from __future__ import annotations

import gc
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch

from quantkit.comm import Solo
from quantkit.errors import MachineError, QuantkitError, RuntimeDied
from quantkit.progress import Progress, silent
from quantkit.runtime.sampler import Drawn, Sampled
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
CACHE_HINT = "--gpu-memory-utilization, --max-model-len or --max-num-seqs"


class Executor(Protocol):
    """Runs steps in the order in which they were launched, for one thread. ``close`` may come from any thread."""

    @property
    def facts(self) -> tuple[RankFacts, ...]:
        """What each rank holds, in rank order."""

    @property
    def ahead(self) -> bool:
        """Whether to launch a step before the one ahead of it is collected: where it would else find its devices idle."""

    def open_cache(self, blocks: int) -> None:
        """Have every rank take memory for ``blocks`` blocks of keys and values, once, before the first step. Raises MachineError."""

    def launch(self, step: Step) -> None:
        """Give ``step`` to every rank and wait for none of them."""

    def collect(self) -> list[Sampled]:
        """Wait for the oldest step that was launched and not collected; the tokens of its chunks that sample, in order.

        Raises RuntimeDied when a rank is lost.
        """

    def check(self) -> None:
        """Raise RuntimeDied when a rank was lost since the last step; to be called every second or so while there is none."""

    def close(self) -> None:
        """End all ranks; a second call does nothing."""


class LocalExecutor:
    """One rank, in this process and on the thread that launches steps."""

    def __init__(self, job: RankJob, progress: Progress = silent) -> None:
        assert job.tp == 1
        runner = Runner(load_rank(job, Solo(), job.device, progress), kv_fp8=job.kv_fp8, sequences=job.sequences)
        self._runner: Runner | None = runner
        with _pass_failures():
            self.facts = (rank_facts(runner.decoder, job, 1),)
        self.ahead = job.device == "cuda"
        self._drawn = deque[Drawn | None]()

    @property
    def runner(self) -> Runner:
        if self._runner is None:
            raise RuntimeDied("model", "was closed", "an open engine")
        return self._runner

    def open_cache(self, blocks: int) -> None:
        try:
            self.runner.open_cache(blocks)
        except RuntimeError as exc:  # torch.OutOfMemoryError is one; a CPU's has no name of its own
            if self.ahead and not isinstance(exc, torch.OutOfMemoryError):
                raise
            raise MachineError("keys and values", f"{blocks} blocks are more than there is memory for", "less", CACHE_HINT) from exc

    def launch(self, step: Step) -> None:
        with _pass_failures():
            self._drawn.append(self.runner.launch(step))

    def collect(self) -> list[Sampled]:
        drawn = self._drawn.popleft()
        with _pass_failures():
            return [] if drawn is None else drawn.result()

    def check(self) -> None:
        return

    def close(self) -> None:
        """Give the memory back: a program may go on without the model."""
        self._runner = None
        self._drawn.clear()
        if self.ahead:
            gc.collect()
            torch.cuda.empty_cache()


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


class Rank(Protocol):
    """A rank that was started somewhere."""

    @property
    def name(self) -> str: ...

    @property
    def connection(self) -> socket.socket:
        """The socket that it obeys."""

    @property
    def start(self) -> Message:
        """What it is told first, beside the job: ``rank``, ``device``, ``store``, and what its kind needs."""

    def ended(self) -> bool:
        """Whether it is known to have ended."""

    def obituary(self) -> RuntimeDied:
        """Why it ended."""

    def end(self) -> None:
        """End it, whatever it does. It has ended when this or its home's ``close`` returns, unless only others can end it."""


class Home(Protocol):
    """Where the ranks of one model live."""

    def start(self) -> Sequence[Rank]:
        """Start all, or none and raise MachineError."""

    def close(self) -> None:
        """Let go of what the ranks needed, all of which were told to end. Their connections are still open."""


@dataclass(slots=True)
class _Heard:
    """A rank, and what it has said."""

    rank: Rank
    frames: Frames
    when: float = field(default_factory=time.monotonic)
    """When it last said anything, or was started."""
    spoke: bool = False
    read: tuple[int, int] = (0, 0)
    """Bytes of its weights that it has, and all of them; 0 before it knows."""
    loaded: bool = False
    facts: RankFacts | None = None
    opened: bool = False
    """Whether it has taken memory for keys and values."""
    error: QuantkitError | None = None
    gone: bool = False

    @property
    def ended(self) -> bool:
        return self.gone or self.rank.ended()


class RankExecutor:
    """Ranks with a socket each, wherever they live. They load when this is made; ``load`` and ``measure`` wait until it can run steps.

    All are ended when one is lost, when this is closed, and when this process dies, however it does; then nothing is left.
    """

    def __init__(self, job: RankJob, home: Home) -> None:
        self._job, self._home, self.ahead = job, home, job.device == "cuda"
        self._answers = deque[Message]()
        self._lock, self._closed, self._closing = threading.Lock(), False, threading.Lock()
        self._failure: QuantkitError | None = None
        self._selector = selectors.DefaultSelector()
        self._looked, self._begun = time.monotonic(), False
        self._ranks = [_Heard(rank, Frames(rank.name)) for rank in home.start()]
        self.facts: tuple[RankFacts, ...] = ()
        for heard in self._ranks:
            connection = heard.rank.connection
            connection.settimeout(SILENT_SECONDS)  # of sends; what comes in is read when it is there
            self._selector.register(connection, selectors.EVENT_READ, heard)
            self._send(heard, frame({"job": asdict(job), **heard.rank.start}))

    @property
    def ranks(self) -> tuple[Rank, ...]:
        """The ranks, in order."""
        return tuple(heard.rank for heard in self._ranks)

    def load(self, progress: Progress = silent) -> None:
        """Wait until every rank has loaded. Raises what went wrong on one."""
        told = -1
        while True:
            done, total = (sum(heard.read[i] for heard in self._ranks) for i in (0, 1))
            if done != told and all(heard.read[1] for heard in self._ranks):
                progress("weights", told := done, total)
            if all(heard.loaded for heard in self._ranks):
                return
            self._watch(POLL_SECONDS)

    def measure(self) -> None:
        """Have every rank say what it holds and has room for, once all that share their memory have loaded."""
        self._tell({"measure": True})
        while any(heard.facts is None for heard in self._ranks):
            self._watch(POLL_SECONDS)
        self.facts = tuple(heard.facts for heard in self._ranks if heard.facts is not None)

    def begin_cache(self, blocks: int) -> None:
        """Have every rank begin with what ``open_cache`` waits for: the memory, and the graphs that are captured over it."""
        if not self._begun:
            self._begun = True
            self._tell({"cache": blocks})

    def open_cache(self, blocks: int) -> None:
        self.begin_cache(blocks)
        while not all(heard.opened for heard in self._ranks):
            self._watch(POLL_SECONDS)

    def launch(self, step: Step) -> None:
        self._tell({"step": step_to_json(step)})

    def collect(self) -> list[Sampled]:
        patience = self._job.timeout + SILENT_SECONDS
        deadline = time.monotonic() + patience
        while not self._answers:
            self._watch(POLL_SECONDS)
            if time.monotonic() > deadline and not self._answers:
                self._fail(RuntimeDied("ranks", f"gave no token within {patience:.0f} s", "a step to end", "--timeout"))
        return sampled_from_json(self._answers.popleft()["sampled"])

    def check(self) -> None:
        self._watch(0.0)

    def _tell(self, message: Message) -> None:
        data = frame(message)
        for heard in self._ranks:
            self._send(heard, data)

    def _send(self, heard: _Heard, data: bytes) -> None:
        try:
            heard.rank.connection.sendall(data)
        except OSError:  # gone or stuck: the next look says which
            heard.gone = True

    def _watch(self, wait: float) -> None:
        """Take in what the ranks say within ``wait`` seconds. Raises the failure when one is lost, after ending all."""
        if self._failure is not None:
            raise self._failure
        now = time.monotonic()
        if now - self._looked > SILENT_SECONDS / 2:  # it was we who slept: judge nobody by it
            for heard in self._ranks:
                heard.when = now
        self._looked = now
        self._listen(wait)
        now = time.monotonic()
        for heard in self._ranks:
            if heard.error is not None or heard.ended:
                self._fail(self._cause())
            patience = SILENT_SECONDS if heard.spoke else START_SECONDS
            if now - heard.when > patience:
                self._fail(RuntimeDied(heard.rank.name, f"has said nothing for {patience:.0f} s", "a rank that runs"))

    def _listen(self, wait: float) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeDied("ranks", "were ended", "an open engine")
            for key, _ in self._selector.select(wait):
                self._hear(key.data)

    def _hear(self, heard: _Heard) -> None:
        try:
            data = heard.rank.connection.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            heard.gone = True
            self._selector.unregister(heard.rank.connection)
            return
        heard.when, heard.spoke = time.monotonic(), True
        for message in heard.frames.feed(data):
            if "sampled" in message:
                self._answers.append(message)
            elif "error" in message:
                heard.error = _from(heard.rank, error_from_json(message["error"]))
            elif "store" in message:  # where the others meet the first
                for other in self._ranks:
                    if other is not heard:
                        self._send(other, frame(message))
            elif "read" in message:
                done, total = message["read"]
                heard.read = done, total
            elif "loaded" in message:
                heard.loaded = True
            elif "ready" in message:
                heard.facts = RankFacts(**message["ready"])
            elif "opened" in message:
                heard.opened = True
            elif "log" in message:
                _LOG.log(message["level"], "%s: %s", heard.rank.name, message["log"])

    def _cause(self) -> QuantkitError:
        """The failure behind what was noticed: an error that is no echo, else a rank that died, else the first echo."""
        until = time.monotonic() + GRACE_SECONDS
        while True:
            self._listen(POLL_SECONDS)
            own = [heard.error for heard in self._ranks if heard.error is not None and not isinstance(heard.error, RuntimeDied)]
            all_ended = all(heard.gone and heard.rank.ended() for heard in self._ranks)
            if own or all_ended or time.monotonic() > until:
                break
        dead = [heard.rank for heard in self._ranks if heard.error is None and heard.ended]
        echoes = [heard.error for heard in self._ranks if heard.error is not None]
        return own[0] if own else dead[0].obituary() if dead else echoes[0]

    def _fail(self, error: QuantkitError) -> None:
        self._failure = error
        self.close()
        raise error

    def close(self) -> None:
        with self._closing:
            closed, self._closed = self._closed, True  # first, so that a thread that listens lets go of the lock
        if closed:
            return
        with self._lock:
            if self._failure is None:
                self._tell({"close": True})
                until = time.monotonic() + GRACE_SECONDS
                while time.monotonic() < until and not all(heard.rank.ended() for heard in self._ranks):
                    time.sleep(0.01)
            for heard in self._ranks:
                heard.rank.end()
            self._home.close()
            self._selector.close()
            for heard in self._ranks:
                heard.rank.connection.close()


def _from(rank: Rank, error: QuantkitError) -> QuantkitError:
    """``error`` of a rank, with its host where that is not this one."""
    if "host" not in rank.start:
        return error
    return type(error)(f"{error.where} on {rank.start['host']}", error.what, error.expected, error.hint)


class Hosts(Protocol):
    """What ranks run on: this host, or a cluster."""

    @property
    def place(self) -> str:
        """ "cpu" or "cuda"."""

    def home(self, replica: int) -> Home:
        """Where the ranks of one replica live."""

    def close(self) -> None:
        """Let go of everything; a second call does nothing."""


def start_executors(job: RankJob, hosts: Hosts, replicas: int, progress: Progress = silent) -> list[RankExecutor]:
    """``replicas`` executors of ``job`` on ``hosts``, which end with the last of them. All load at the same time.

    Raises what went wrong on a rank, and leaves nothing then.
    """
    started: list[RankExecutor] = []
    try:
        started.extend(RankExecutor(job, hosts.home(number)) for number in range(replicas))
        for number, executor in enumerate(started):
            executor.load(_part(progress, number, replicas))
        for executor in started:
            executor.measure()
    except BaseException:
        for executor in started:
            executor.close()
        hosts.close()
        raise
    return started


def _part(progress: Progress, number: int, parts: int) -> Progress:
    """Part ``number`` of a Progress of ``parts`` equal ones."""
    return lambda stage, done, total: progress(stage, number * total + done, parts * total)
