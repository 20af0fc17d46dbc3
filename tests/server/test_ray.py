"""Ranks as actors of a real Ray cluster of two nodes, each with an address of its own, and of one that quantkit starts for itself."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from engine_fixtures import Client

from quantkit import fs
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.errors import InputError, MachineError, QuantkitError, RuntimeDied
from quantkit.runtime import ray_hosts
from quantkit.runtime.engine import Engine, SamplingParams
from quantkit.runtime.ray_hosts import RayHome, RayRank
from quantkit.runtime.start import start_engine
from quantkit.runtime.wire import Message, frame
from quantkit.shard import rank_file, shard_checkpoint

LLAMA = Path(__file__).parent.parent / "data" / "models" / "llama"
GREEDY = SamplingParams(16, temperature=0, ignore_eos=True)
SEEDED = SamplingParams(16, seed=5, ignore_eos=True)
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster()
for address in ("127.0.0.1", "127.0.0.2"):
    cluster.add_node(node_ip_address=address, num_cpus=1, num_gpus=0, object_store_memory=80_000_000, include_dashboard=False)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
"""Two nodes of one CPU each on this machine's loopback: two ranks must go to both."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as name:  # sockets' names must be short
        yield Path(name)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Where the cluster's head listens. The environment that joins it is set too."""
    (folder / "ray").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ray_hosts._LOCAL | {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": str(folder)}).items():
            patch.setenv(name, value)
        process = subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdin is not None and process.stdout is not None
            found = process.stdout.readline().strip()
            patch.setenv("RAY_ADDRESS", found)
            family = psutil.Process(process.pid).children(recursive=True)
            yield found
            process.stdin.close()
            process.wait(30)
            assert psutil.wait_procs(family, timeout=10)[1] == [], "what the cluster had started has ended"
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def wanted() -> tuple[str, str]:
    """What one rank in this process says, and two processes too: greedy, and with a seed."""
    said = []
    for tp in (1, 2):
        engine = start_engine(str(LLAMA), tp=tp, device="cpu", parity=True)
        try:
            said.append((ask(engine, "The capital"), ask(engine, "The capital", SEEDED)))
        finally:
            engine.close()
    assert said[0] == said[1]
    return said[0]


def ask(engine: Engine, text: str, params: SamplingParams = GREEDY) -> str:
    return Client(engine, engine.tokenizer.encode(text, special=True), params).answer().text


def actors(engine: Engine) -> list[RayRank]:
    return list(engine._executor.ranks)  # type: ignore[attr-defined]


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_ranks_on_two_nodes_say_what_one_process_says_and_a_killed_actor_is_noticed(
    address: str, wanted: tuple[str, str], wait_for: Callable[..., None]
) -> None:
    engine = start_engine(str(LLAMA), tp=2, device="cpu", parity=True, executor="ray")
    try:
        ranks = actors(engine)
        assert [rank.start["host"] for rank in ranks] == ["127.0.0.1", "127.0.0.2"], "a rank on each node"
        assert (ask(engine, "The capital"), ask(engine, "The capital", SEEDED)) == wanted
        ours = [psutil.Process(), *psutil.Process().children(), *(psutil.Process(rank.pid) for rank in ranks)]
        peers = {peer.raddr.ip.removeprefix("::ffff:") for one in ours for peer in one.net_connections("tcp") if peer.raddr}
        assert len(peers) >= 1 and peers <= {"127.0.0.1", "127.0.0.2"}
        os.kill(ranks[1].pid, signal.SIGKILL)
        with pytest.raises(RuntimeDied, match=r"rank 1 on 127\.0\.0\.2: was lost \(Worker unexpectedly exits"):
            ask(engine, "The capital")
        assert engine.failure is not None and engine.failure.exit_code == 4
        wait_for(lambda: gone([rank.pid for rank in ranks]), 10)
    finally:
        engine.close()


def test_replicas_share_the_cluster_and_give_their_places_back(
    address: str, wanted: tuple[str, str], wait_for: Callable[..., None]
) -> None:
    """The places of the test before are free again; a third replica finds none, and none of those that had one keeps it.

    One that is closed, or that hangs then, leaves no process behind, while the other works.
    """
    with pytest.raises(MachineError, match=r"--executor ray: the cluster has 2 CPUs, 0 of them free, after 1 s, expected 1 free"):
        start_engine(str(LLAMA), dp=3, device="cpu", parity=True, executor="ray", timeout=1)
    engine = start_engine(str(LLAMA), dp=2, device="cpu", parity=True, executor="ray")
    try:
        assert (engine.tp, engine.dp) == (1, 2)
        assert [ask(engine, "The capital", SEEDED) for _ in range(3)] == [wanted[1]] * 3
        first, second = engine._engines  # type: ignore[attr-defined]
        [stopped] = actors(first)
        os.kill(stopped.pid, signal.SIGSTOP)
        first.close()
        wait_for(lambda: gone([stopped.pid]), 15)
        assert ask(second, "The capital", SEEDED) == wanted[1]
    finally:
        engine.close()


def test_a_cluster_of_another_token_is_not_joined(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "2")  # which Ray waits a second for each
    with pytest.raises(MachineError, match=f"--executor ray: joins no cluster at {address}") as caught:
        start_engine(str(LLAMA), tp=2, device="cpu", executor="ray")
    assert caught.value.hint == "RAY_AUTH_MODE and RAY_AUTH_TOKEN must be those of its head"


def test_a_silent_actor_and_a_bad_file_on_another_host(
    address: str, tmp_path: Path, wanted: tuple[str, str], monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., None]
) -> None:
    monkeypatch.setattr("quantkit.runtime.executor.SILENT_SECONDS", 3.0)
    shards = tmp_path / "shards"
    shard_checkpoint(open_checkpoint(LLAMA), shards, 2, overwrite=False)
    engine = start_engine(str(shards), device="cpu", parity=True, executor="ray")
    ranks = actors(engine)
    try:
        assert ask(engine, "The capital") == wanted[0]
        os.kill(ranks[1].pid, signal.SIGSTOP)
        with pytest.raises(RuntimeDied, match="rank 1: has said nothing for 3 s"):
            ask(engine, "The capital")
    finally:
        engine.close()
    wait_for(lambda: gone([rank.pid for rank in ranks]), 15)
    file = shards / rank_file(1, 2)
    data = fs.read_bytes(file, 1 << 30)
    file.write_bytes(data[:-10])
    with pytest.raises(InputError, match=r"rank-1-of-2\.safetensors on 127\.0\.0\.2") as caught:
        start_engine(str(shards), device="cpu", executor="ray")
    assert caught.value.exit_code == 2


@pytest.fixture
def alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Without a cluster: an empty folder for what is temporary."""
    root = folder / secrets.token_hex(2)
    root.mkdir()
    for name in (*ray_hosts._LOCAL, "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(root))
    return root


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "quantkit", "generate", str(LLAMA), "The capital", "--executor", "ray", "--device", "cpu", *more]


def started(folder: Path) -> list[psutil.Process]:
    """Processes of a cluster that has its files in ``folder``."""
    return [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or ())]


def test_a_cluster_of_its_own_is_started_and_ends_with_the_command(alone: Path, wait_for: Callable[..., None]) -> None:
    """Then Ctrl-C while the ranks load, and SIGKILL, of which the command knows nothing."""
    asked = command("--tp", "2", "--max-tokens", "8")
    texts = [
        subprocess.run(each, capture_output=True, text=True, timeout=120, check=True).stdout
        for each in (asked, [part for part in asked if part not in ("--executor", "ray")])
    ]
    assert texts[0] == texts[1] != ""
    assert started(alone) == [] and list(alone.iterdir()) == []
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        running = subprocess.Popen(command("--tp", "2", "--max-tokens", "999"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: any("raylet" in one.name() for one in started(alone)), 60)
            family = psutil.Process(running.pid).children(recursive=True)
            running.send_signal(number)
            assert running.wait(30) == code
            assert psutil.wait_procs(family, timeout=30)[1] == []
            wait_for(lambda: started(alone) == [] and list(alone.iterdir()) == [], 10)
        finally:
            running.kill()
            running.wait()


def test_the_end_of_the_process_that_speaks_with_ray_is_the_engines(alone: Path) -> None:
    engine = start_engine(str(LLAMA), device="cpu", executor="ray")
    try:
        [keeper] = [one for one in psutil.Process().children() if "quantkit.runtime.ray_keeper" in one.cmdline()]
        family = keeper.children(recursive=True)
        assert ask(engine, "The capital")
        keeper.kill()
        with pytest.raises(RuntimeDied, match="rank 0: was lost with the connection to Ray"):
            while True:
                ask(engine, "The capital")
        assert psutil.wait_procs(family, timeout=10)[1] == [] and list(alone.iterdir()) == []
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("where", "kind", "line"),
    [
        (
            "127.0.0.1:9",
            MachineError,
            r"RAY_ADDRESS: 127\.0\.0\.1:9 does not answer \(Connection refused\), expected the head",
        ),
        ("ray://127.0.0.1:9", InputError, r"RAY_ADDRESS: is ray://127\.0\.0\.1:9, of Ray's client, expected HOST:PORT of the head"),
    ],
)
def test_an_address_without_a_cluster(where: str, kind: type[QuantkitError], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", where)
    start = time.monotonic()
    with pytest.raises(kind, match=line):
        start_engine(str(LLAMA), tp=2, device="cpu", executor="ray")
    assert time.monotonic() - start < 30


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError) as caught:
        start_engine(str(LLAMA), tp=2, device="cpu", executor="ray")
    assert caught.value.line == "--executor ray: ray is not installed, expected the ray extra"
    assert caught.value.hint == "pip install 'quantkit[ray]'"
    with pytest.raises(InputError, match="--executor: is 'rays', expected one of local, ray"):
        start_engine(str(LLAMA), executor="rays")


def test_callers_that_are_slow_wrong_or_too_long_hold_up_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that calls last is heard at once, and what it says behind its name is left for the engine."""
    monkeypatch.setattr(ray_hosts, "HELLO_SECONDS", 1.0)
    hello = {"secret": "s" * 64, "replica": 0, "rank": 1}
    with socket.create_server(("127.0.0.1", 0)) as listener, ray_hosts._Callers(listener, "s" * 64) as callers:

        def call(data: bytes) -> socket.socket:
            connection = socket.create_connection(listener.getsockname(), 5)
            connection.sendall(data)
            return connection

        def look(seconds: float) -> list[tuple[tuple[int, int], socket.socket]]:
            until, found = time.monotonic() + seconds, []
            while time.monotonic() < until and not found:
                found += callers.look(0.02)
            return found

        others = [call(b""), call(frame(hello | {"secret": "x" * 64})), call(frame(hello | {"more": "x" * 2000}))]
        start = time.monotonic()
        rank = call(frame(hello) + b"beat")
        [(who, connection)] = look(5)
        assert who == (0, 1) and time.monotonic() - start < 0.9 and connection.recv(9) == b"beat"
        for byte in frame(hello)[:20]:  # a byte now and then is no more time
            others[0].send(bytes([byte]))
            assert look(0.1) == []
            if not callers._callers:
                break
        assert callers._callers == {} and 0.9 < time.monotonic() - start < 1.9
        for each in (rank, connection, *others):
            each.close()


def test_a_home_is_closed_when_its_ranks_have_ended_or_ray_was_told_to_end_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_hosts, "END_SECONDS", 1.0)
    told: list[Message] = []
    keeper: Any = SimpleNamespace(tell=told.append)
    pairs = [socket.socketpair() for _ in range(2)]
    ranks = [RayRank(f"rank {number}", ours, {}, (3, number), 0, keeper) for number, (ours, _) in enumerate(pairs)]
    hosts: Any = SimpleNamespace(ranks=lambda replica: ranks, leave=lambda: told.append({"left": True}))
    ended = threading.Event()

    def be_a_rank() -> None:
        while pairs[0][1].recv(1):
            pass
        pairs[0][1].sendall(b"last words")
        time.sleep(0.3)
        ended.set()
        pairs[0][1].close()

    threading.Thread(target=be_a_rank, daemon=True).start()
    for rank in ranks:
        rank.end()
    start = time.monotonic()
    RayHome(hosts, 3).close()
    assert ended.is_set() and 0.9 < time.monotonic() - start < 5
    assert told == [{"end": [3, 1]}, {"left": True}], "one that hangs"
    for ours, theirs in pairs:
        ours.close()
        theirs.close()
