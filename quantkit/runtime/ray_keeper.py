"""The process that speaks with Ray: ``python -m quantkit.runtime.ray_keeper FD``. It joins or starts a cluster, places an actor per rank,
and tells the engine, whose own process obeys no signal of Ray's and prints none of its lines, what became of them.

It obeys the socket FD; when that closes, so does everything it has placed. This module knows no model, and loads no torch.
"""

from __future__ import annotations

import os
import queue
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit import __version__
from quantkit.errors import InputError, MachineError, QuantkitError
from quantkit.runtime.ray_rank import RankActor
from quantkit.runtime.wire import Message, error_to_json, frame, received

TOGETHER_SECONDS = 5.0
"""How long a host that could hold all ranks of a replica is waited for before they are placed on several."""
ANSWER_SECONDS = 120.0
"""How long an actor may take to start, which imports Python's modules on a host that may be busy."""
LOOK_SECONDS = 0.5
STORE_BYTES = 80 << 20
"""Ray's object store, which nothing of ours goes through: near the least that Ray takes."""
WHERE = "--executor ray"


@dataclass(slots=True)
class _Placed:
    """An actor, and the run of its rank once it has begun."""

    actor: Any
    where: dict[str, Any]
    replica: int
    rank: int
    running: Any = None


class _Cluster:
    """Holds what was placed in the cluster."""

    def __init__(self, ray: Any, say: Callable[[Message], None], orders: queue.SimpleQueue[Message | None]) -> None:
        self._ray, self._say, self._orders = ray, say, orders
        self._groups: list[Any] = []
        self._placed: list[_Placed] = []

    def join(self, asked: Message) -> str:
        """Join or start the cluster; "cpu" or "cuda". Raises MachineError."""
        quiet = {"log_to_driver": False, "configure_logging": False}
        address = os.environ.get("RAY_ADDRESS")
        try:
            if address:
                _reachable(address, asked["timeout"])
                self._ray.init(address=address, **quiet)
            else:
                ranks = asked["tp"] * asked["dp"]
                gpus = ranks if asked["device"] == "cuda" else 0
                local = {"include_dashboard": False, "object_store_memory": STORE_BYTES, "_temp_dir": asked["folder"]}
                self._ray.init(address="local", num_cpus=ranks, num_gpus=gpus, **local, **quiet)
        except QuantkitError:
            raise
        except Exception as exc:  # what Ray raises at its start has no base of its own
            what = f"joins no cluster at {address}" if address else "starts no cluster here"
            hint = "RAY_AUTH_MODE and RAY_AUTH_TOKEN must be those of its head" if address else None
            raise MachineError(WHERE, f"{what} ({_first_line(exc)})", "one that runs this version of Ray and of Python", hint) from exc
        if asked["device"] != "auto":
            return str(asked["device"])
        return "cuda" if self._ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"

    def place(self, tp: int, dp: int, place: str, timeout: float) -> None:
        """An actor for each rank. Raises MachineError."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        kind = "GPU" if place == "cuda" else "CPU"
        remote = self._ray.remote(RankActor)
        for replica in range(dp):
            group = self._group(kind, tp, timeout)
            actors = []
            for bundle in range(tp):
                spot = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
                uses = {"num_gpus": 1, "num_cpus": 0} if kind == "GPU" else {"num_cpus": 1}
                actors.append(remote.options(**uses, max_restarts=0, max_task_retries=0, scheduling_strategy=spot).remote())
            places = self._where(actors)
            here = self._ray.util.get_node_ip_address()
            hosts = list(dict.fromkeys([here, *(where["address"] for where in places)]))
            # Ranks of one host are neighbours, and rank 0, which answers, is near the engine.
            order = sorted(range(tp), key=lambda bundle: hosts.index(places[bundle]["address"]))
            self._placed += [_Placed(actors[bundle], places[bundle], replica, rank) for rank, bundle in enumerate(order)]

    def _group(self, kind: str, tp: int, timeout: float) -> Any:
        """A placement group of ``tp`` bundles: on one host where one can hold them, else on as few as can be."""
        from ray.util.placement_group import placement_group, remove_placement_group

        together = any(node["Alive"] and node["Resources"].get(kind, 0) >= tp for node in self._ray.nodes())
        for strategy in ["STRICT_PACK", "PACK"] if together else ["PACK"]:
            group = placement_group([{kind: 1}] * tp, strategy=strategy)
            self._groups.append(group)
            if self._wait(group, min(timeout, TOGETHER_SECONDS) if strategy == "STRICT_PACK" else timeout):
                return group
            remove_placement_group(group)
            self._groups.remove(group)
        has, free = self._ray.cluster_resources().get(kind, 0), self._ray.available_resources().get(kind, 0)
        what = f"the cluster has {has:.0f} {kind}s, {free:.0f} of them free, after {timeout:.0f} s"
        raise MachineError(WHERE, what, f"{tp} free for each replica", "ray status shows who has them")

    def _wait(self, group: Any, seconds: float) -> bool:
        """Whether ``group`` gets its place in time, while the engine still wants it."""
        until = time.monotonic() + seconds
        while not group.wait(LOOK_SECONDS):
            if time.monotonic() > until:
                return False
            self._obey(0.0)
        return True

    def _where(self, actors: Sequence[Any]) -> list[dict[str, Any]]:
        asked = [actor.where.remote() for actor in actors]
        until = time.monotonic() + ANSWER_SECONDS
        while len(self._ray.wait(asked, num_returns=len(asked), timeout=LOOK_SECONDS)[0]) < len(asked):
            self._obey(0.0)
            if time.monotonic() > until:
                raise MachineError(WHERE, f"actors do not start within {ANSWER_SECONDS:.0f} s", "hosts that have quantkit")
        try:
            places: list[dict[str, Any]] = self._ray.get(asked)
        except self._ray.exceptions.RayError as exc:
            raise MachineError(
                WHERE, f"an actor does not start ({_last_line(exc)})", "a host that has this quantkit", "pip install it on every host"
            ) from exc
        for where in places:
            if where["version"] != __version__:
                raise MachineError(WHERE, f"{where['address']} has quantkit {where['version']}", f"{__version__} on every host")
        return places

    def describe(self) -> Message:
        """Where the ranks are, and this process."""
        return {
            "here": self._ray.util.get_node_ip_address(),
            "ranks": [[one.replica, one.rank, one.where] for one in self._placed],
        }

    def run(self, order: Message) -> None:
        """Begin every rank: each connects to the engine."""
        for one in self._placed:
            group = [other.where for other in self._placed if other.replica == one.replica]
            host_ranks = sum(other.where["address"] == one.where["address"] for other in self._placed)
            hello = {"secret": order["secret"], "replica": one.replica, "rank": one.rank}
            one.running = one.actor.run.remote(tuple(order["engine"]), hello, host_ranks, group)

    def watch(self) -> None:
        """Say which ranks have ended, and why, until told to close."""
        while True:
            running = [one.running for one in self._placed if one.running is not None]
            done = self._ray.wait(running, timeout=0)[0] if running else []
            for one in self._placed:
                if one.running in done:
                    self._say({"ended": [one.replica, one.rank], "why": self._why(one.running)})
                    one.running = None
            self._obey(LOOK_SECONDS if not done else 0.0)

    def _why(self, running: Any) -> str:
        try:
            return f"ended with status {self._ray.get(running)}"
        except self._ray.exceptions.RayError as exc:
            return f"was lost ({_last_line(exc)})"

    def _obey(self, seconds: float) -> None:
        """Take in an order that comes within ``seconds``. Raises _Over for the end."""
        try:
            order = self._orders.get(timeout=seconds) if seconds else self._orders.get_nowait()
        except queue.Empty:
            return
        if order is None or "close" in order:
            raise _Over
        if "end" in order:
            self.end(*order["end"])
        else:
            self.run(order["run"])

    def end(self, replica: int, rank: int) -> None:
        """End the actor of one rank, whatever it does."""
        for one in self._placed:
            if (one.replica, one.rank) == (replica, rank):
                self._ray.kill(one.actor, no_restart=True)

    def close(self) -> None:
        """End every actor, give back every place, leave the cluster or end it."""
        from ray.util.placement_group import remove_placement_group

        for one in self._placed:
            self._ray.kill(one.actor, no_restart=True)
        for group in self._groups:
            remove_placement_group(group)
        self._ray.shutdown()


class _Over(Exception):
    """The engine wants no more of this."""


def _reachable(address: str, timeout: float) -> None:
    """Raise MachineError where nobody answers at ``address``, InputError for Ray's client, which is not a part of the cluster."""
    if address.startswith("ray://"):
        raise InputError("RAY_ADDRESS", f"is {address}, of Ray's client", "HOST:PORT of the head, on a host of the cluster", "ray start")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise MachineError("RAY_ADDRESS", f"{address} does not answer ({reason})", "the head of a cluster", "ray start --head") from exc


def _last_line(error: BaseException) -> str:
    """The line of an error of Ray's that says most: of a remote exception its own, of a death how it came."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    for line in lines:
        _, found, detail = line.partition("Worker exit detail: ")
        if found:
            return detail.partition(". Some common causes")[0][:300]
    return lines[-1][:300] if lines else type(error).__name__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _listen(connection: socket.socket, orders: queue.SimpleQueue[Message | None]) -> None:
    for message in received(connection, "engine"):
        orders.put(message)
    orders.put(None)


def main(connection: socket.socket) -> int:
    """Keep what the engine behind ``connection`` asks for, until it is gone."""
    orders: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, orders), daemon=True).start()
    asked = orders.get()
    if asked is None:
        return 0

    def say(message: Message) -> None:
        try:
            connection.sendall(frame(message))
        except OSError:
            orders.put(None)

    import ray

    cluster = _Cluster(ray, say, orders)
    try:
        place = cluster.join(asked)
        cluster.place(asked["tp"], asked["dp"], place, asked["timeout"])
        say({"joined": {"place": place, **cluster.describe()}})
        cluster.watch()
    except _Over:
        return 0
    except QuantkitError as exc:
        say({"error": error_to_json(exc)})
        return exc.exit_code
    finally:
        cluster.close()
        if asked["folder"] is not None:  # the engine does so too, but it may be dead
            shutil.rmtree(asked["folder"], ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(socket.socket(fileno=int(sys.argv[1]))))
