"""Ranks as actors of Ray's, on any number of hosts. The cluster is spoken with by a process of its own (``ray_keeper.py``); the ranks, over
TCP, by the executor, as it speaks with those of this host. What is said is the executor's."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from quantkit.errors import MachineError, QuantkitError, RuntimeDied
from quantkit.runtime.devices import place_for
from quantkit.runtime.processes import LastWords, module_command, module_environment, rank_names
from quantkit.runtime.wire import Frames, Message, error_from_json, frame, received

WHERE = "--executor ray"
JOIN_SECONDS = 240.0
"""How long a cluster may take, beside ``timeout`` for places in it: one that begins here imports Ray a few times."""
CALL_SECONDS = 120.0
"""How long the actors may take to call the engine."""
HELLO_SECONDS = 5.0
"""How long one that connects may take to say which rank it is."""
HELLO_BYTES = 1 << 10
CALLERS = 256
"""How many may be about to say it; the one that connected first gives way."""
END_SECONDS = 3.0
"""How long the actors of a replica may take to end when their connections do, before Ray ends them."""
POLL_SECONDS = 0.1
WHY_SECONDS = 3.0
"""How long Ray may take to say why an actor is gone; its connection is closed at once."""
CLOSE_SECONDS = 20.0
LONG_FOLDER = 40
"""Ray puts sockets below its folder, and their names may have 107 characters."""
_LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a cluster of one host, as Ray has it there: on loopback
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "http_proxy": "http://127.0.0.1:9",  # nobody: Ray asks a cloud's addresses where it runs, and says that it says nothing
    "https_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1,localhost",
}
"""The environment of a cluster that begins here: nothing of it leaves this host."""
_QUIET = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}


class RayHosts:
    """The hosts of the cluster RAY_ADDRESS, or, without that, of one on this host's loopback that lives as long as this.

    ``replicas`` of ``tp`` ranks each have their places when this is made; it ends with the last of their homes. Raises MachineError.
    """

    def __init__(self, device: str, tp: int, replicas: int, timeout: float) -> None:
        if importlib.util.find_spec("ray") is None:
            raise MachineError(WHERE, "ray is not installed", "the ray extra", "pip install 'quantkit[ray]'")
        here = not os.environ.get("RAY_ADDRESS")
        if here:
            device = place_for(device, tp * replicas)
        self._keeper = _Keeper(here)
        self._lock, self._left, self._closed = threading.Lock(), replicas, False
        try:
            asked = {"tp": tp, "dp": replicas, "device": device, "timeout": timeout}
            joined = self._keeper.ask(asked, JOIN_SECONDS + timeout)
            self.place: str = joined["place"]
            self._ranks = self._call(joined, tp, replicas)
        except BaseException:
            self.close()
            raise

    def _call(self, joined: Message, tp: int, replicas: int) -> list[list[RayRank]]:
        """Have every actor connect to this process; the ranks of each replica."""
        places: dict[tuple[int, int], dict[str, Any]] = {(replica, rank): where for replica, rank, where in joined["ranks"]}
        apart = {where["address"] for where in places.values()} != {joined["here"]}
        host, secret = joined["here"] if apart else "127.0.0.1", secrets.token_hex(32)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family, backlog=len(places)) as listener:
            self._keeper.tell({"run": {"engine": listener.getsockname()[:2], "secret": secret}})
            called = self._accept(listener, secret, set(places))
        ranks: list[list[RayRank]] = [[] for _ in range(replicas)]
        names = rank_names(tp, replicas)
        for (replica, rank), where in sorted(places.items()):
            mine = [places[replica, other]["address"] for other in range(tp)]
            start: Message = {"rank": rank, "device": "cpu"}
            if self.place == "cuda":  # an actor sees the GPUs of its replica on its host
                start["device"] = f"cuda:{mine[:rank].count(where['address'])}"
            start["host_ranks"] = sum(other["address"] == where["address"] for other in places.values())
            start["store"] = {"host": mine[0] if len(set(mine)) > 1 else "127.0.0.1"}
            if apart:
                start["host"] = where["address"]
            ranks[replica].append(RayRank(names[replica][rank], called[replica, rank], start, (replica, rank), where["pid"], self._keeper))
        return ranks

    def _accept(self, listener: socket.socket, secret: str, missing: set[tuple[int, int]]) -> dict[tuple[int, int], socket.socket]:
        called: dict[tuple[int, int], socket.socket] = {}
        until = time.monotonic() + CALL_SECONDS
        try:
            with _Callers(listener, secret) as callers:
                while missing - called.keys():
                    for who, connection in callers.look(POLL_SECONDS):
                        if who not in missing or who in called:
                            connection.close()
                        else:
                            called[who] = connection
                    left = sorted(missing - called.keys())
                    lost = next((who for who in left if self._keeper.why(who) is not None), None)
                    if lost is not None:
                        raise MachineError(f"rank {lost[1]}", f"{self._keeper.why(lost)} before it called", "hosts that reach one another")
                    if left and time.monotonic() > until:
                        raise MachineError(f"rank {left[0][1]}", f"has not called within {CALL_SECONDS:.0f} s", "a rank")
        except BaseException:
            for connection in called.values():
                connection.close()
            raise
        return called

    def home(self, replica: int) -> RayHome:
        return RayHome(self, replica)

    def ranks(self, replica: int) -> list[RayRank]:
        """The ranks of ``replica``, which have called."""
        return self._ranks[replica]

    def leave(self) -> None:
        """One home is closed."""
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self.close()

    def close(self) -> None:
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._keeper.close()


@dataclass(frozen=True, slots=True)
class RayHome:
    """Where the ranks of one replica live."""

    hosts: RayHosts
    replica: int

    def start(self) -> list[RayRank]:
        return self.hosts.ranks(self.replica)

    def close(self) -> None:
        """Return when the ranks, which were told to end, have ended; those that do not, Ray ends."""
        until = time.monotonic() + END_SECONDS
        for rank in self.hosts.ranks(self.replica):
            if not rank.wait(until):
                rank.keeper.tell({"end": list(rank.who)})
        self.hosts.leave()


@dataclass(slots=True)
class RayRank:
    """One actor; ``pid`` on its host."""

    name: str
    connection: socket.socket
    start: Message
    who: tuple[int, int]
    pid: int
    keeper: _Keeper

    def ended(self) -> bool:
        return self.keeper.why(self.who) is not None

    def obituary(self) -> RuntimeDied:
        until = time.monotonic() + WHY_SECONDS
        while not self.ended() and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        where = f"{self.name} on {self.start['host']}" if "host" in self.start else self.name
        return RuntimeDied(where, self.keeper.why(self.who) or "closed its connection", "every rank alive")

    def end(self) -> None:
        """It ends itself when its connection does, which ``wait`` sees, or Ray ends it."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)

    def wait(self, until: float) -> bool:
        """Whether the actor's process, which holds the other end of the connection open, is gone by ``until``."""
        try:
            while (left := until - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(1 << 16):
                    return True
        except TimeoutError:
            return False
        except OSError:
            return True
        return False


class _Keeper:
    """The process that speaks with Ray, and what it has said."""

    def __init__(self, here: bool) -> None:
        self._folder: str | None = None
        variables = module_environment() | _QUIET
        if here:
            self._folder = tempfile.mkdtemp(prefix="ray-", dir=None if len(tempfile.gettempdir()) <= LONG_FOLDER else "/tmp")
            variables |= _LOCAL | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                module_command("quantkit.runtime.ray_keeper", theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=variables,
                process_group=0,  # the terminal's Ctrl-C is for us
            )
        self._words = LastWords(self._process)
        self._answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._ended: dict[tuple[int, int], str] = {}
        self._gone = False
        threading.Thread(target=self._listen, name="ray", daemon=True).start()

    def _listen(self) -> None:
        for message in received(self._connection, "ray"):
            if "ended" in message:
                replica, rank = message["ended"]
                self._ended[replica, rank] = message["why"]
            else:
                self._answers.put(message)
        self._gone = True
        self._answers.put(None)

    def ask(self, asked: Message, seconds: float) -> Message:
        """Say what is wanted; what it has joined. Raises what it says is wrong."""
        self.tell(asked | {"folder": self._folder})
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise MachineError(WHERE, f"Ray has not answered within {seconds:.0f} s", "a cluster that runs") from None
        if answer is None:
            raise MachineError(WHERE, f"Ray's part ended{self._words.line()}", "a cluster that runs")
        if "error" in answer:
            raise error_from_json(answer["error"])
        joined: Message = answer["joined"]
        return joined

    def tell(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # gone: whoever waits for an answer hears of it
            self._connection.sendall(frame(message))

    def why(self, who: tuple[int, int]) -> str | None:
        """Why the rank ``who`` (replica, rank) has ended; None while it has not."""
        why = self._ended.get(who)
        return why if why is not None or not self._gone else "was lost with the connection to Ray"

    def close(self) -> None:
        """End what was placed and, if it began here, the cluster."""
        self.tell({"close": True})
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # what a cluster that began here has left, had it no time to end
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(slots=True)
class _Caller:
    """One that has connected and may say until ``until`` who it is."""

    connection: socket.socket
    until: float
    frames: Frames = field(default_factory=lambda: Frames("rank"))
    heard: int = 0

    def hear(self, secret: str) -> tuple[int, int] | None:
        """Take in what is there, and nothing behind the first message; which rank calls, None while it has not said.

        Raises OSError or QuantkitError for one that does not know ``secret``.
        """
        while True:
            try:
                data = self.connection.recv(1)
            except BlockingIOError:
                return None
            self.heard += 1
            if not data or self.heard > HELLO_BYTES:
                raise RuntimeDied("rank", "does not say who it is", f"a message of at most {HELLO_BYTES} bytes")
            for message in self.frames.feed(data):
                if not secrets.compare_digest(str(message.get("secret")).encode(), secret.encode()):
                    raise RuntimeDied("rank", "does not know the secret", "an actor of ours")
                return int(message["replica"]), int(message["rank"])


class _Callers:
    """All that have connected to ``listener`` and not said yet who they are: none waits for another."""

    def __init__(self, listener: socket.socket, secret: str) -> None:
        self._listener, self._secret = listener, secret
        self._callers: dict[socket.socket, _Caller] = {}
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def __enter__(self) -> _Callers:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in list(self._callers):
            self._forget(connection).close()
        self._selector.close()

    def look(self, wait: float) -> Iterator[tuple[tuple[int, int], socket.socket]]:
        """The ranks (replica, rank) that say within ``wait`` seconds who they are, each with its connection, which blocks."""
        for key, _ in self._selector.select(wait):
            caller = self._callers.get(key.fileobj)  # type: ignore[call-overload]
            if key.fileobj is self._listener:
                self._admit()
            elif caller is not None:
                try:
                    who = caller.hear(self._secret)
                except (OSError, QuantkitError):
                    self._forget(caller.connection).close()
                    continue
                if who is not None:
                    connection = self._forget(caller.connection)
                    connection.settimeout(None)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    yield who, connection
        now = time.monotonic()
        for caller in [caller for caller in self._callers.values() if now > caller.until]:
            self._forget(caller.connection).close()

    def _admit(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        if len(self._callers) >= CALLERS:
            self._forget(next(iter(self._callers))).close()
        connection.setblocking(False)
        self._callers[connection] = _Caller(connection, time.monotonic() + HELLO_SECONDS)
        self._selector.register(connection, selectors.EVENT_READ)

    def _forget(self, connection: socket.socket) -> socket.socket:
        self._selector.unregister(connection)
        del self._callers[connection]
        return connection
