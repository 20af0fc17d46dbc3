"""Ranks as actors of Ray's, on any number of hosts. The cluster is spoken with by a process of its own (``ray_keeper.py``); the ranks, over
TCP, by the executor, as it speaks with those of this host. What is said is the executor's."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

from quantkit.errors import MachineError, QuantkitError, RuntimeDied
from quantkit.runtime.devices import place_for
from quantkit.runtime.processes import LastWords, module_command, module_environment, rank_names
from quantkit.runtime.wire import Frames, Message, error_from_json, frame

WHERE = "--executor ray"
JOIN_SECONDS = 240.0
"""How long a cluster may take, beside ``timeout`` for places in it: one that begins here imports Ray a few times."""
CALL_SECONDS = 120.0
"""How long the actors may take to call the engine."""
HELLO_SECONDS = 5.0
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
        self._left, self._closed = replicas, False
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
        listener.settimeout(POLL_SECONDS)
        called: dict[tuple[int, int], socket.socket] = {}
        until = time.monotonic() + CALL_SECONDS
        try:
            while missing - called.keys():
                with contextlib.suppress(TimeoutError):
                    caller, _ = listener.accept()
                    who = _hello(caller, secret)
                    if who is None or who not in missing or who in called:
                        caller.close()
                    else:
                        called[who] = caller
                lost = next((who for who in sorted(missing - called.keys()) if self._keeper.why(who) is not None), None)
                if lost is not None:
                    raise MachineError(f"rank {lost[1]}", f"{self._keeper.why(lost)} before it called", "hosts that reach one another")
                if time.monotonic() > until:
                    raise MachineError(f"rank {min(missing - called.keys())[1]}", f"has not called within {CALL_SECONDS:.0f} s", "a rank")
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
        self._left -= 1
        if not self._left:
            self.close()

    def close(self) -> None:
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
        """It ends itself when its connection does; Ray ends it, at the latest, when the last home is closed."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


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
        frames = Frames("ray")
        while True:
            try:
                data = self._connection.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                self._gone = True
                self._answers.put(None)
                return
            for message in frames.feed(data):
                if "ended" in message:
                    replica, rank = message["ended"]
                    self._ended[replica, rank] = message["why"]
                else:
                    self._answers.put(message)

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


def _hello(caller: socket.socket, secret: str) -> tuple[int, int] | None:
    """Which rank calls; None for one that does not know ``secret``."""
    frames = Frames("rank")
    caller.settimeout(HELLO_SECONDS)
    caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        while data := caller.recv(1 << 10):
            for message in frames.feed(data):
                if secrets.compare_digest(str(message.get("secret")).encode(), secret.encode()):
                    return int(message["replica"]), int(message["rank"])
                return None
    except (OSError, QuantkitError):
        pass
    return None
