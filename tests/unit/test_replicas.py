"""Replicas behind one front: the texts of one engine, requests dealt by load and by what was computed, one death for all."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import Client, GroupExecutor, engine_on

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.errors import InputError, RuntimeDied
from quantkit.runtime.blocks import BLOCK
from quantkit.runtime.engine import Engine, QueueFull, SamplingParams
from quantkit.runtime.processes import ThisHost
from quantkit.runtime.replicas import SLACK, Replicas, add_stats
from quantkit.runtime.wire import Step
from quantkit.server import metrics

LLAMA = Path(__file__).parent.parent / "data" / "models" / "llama"
LONG = SamplingParams(200, temperature=0, ignore_eos=True)
SHORT = SamplingParams(6, temperature=0, ignore_eos=True)


class Gated(GroupExecutor):
    """Runs steps while its gate is open, and dies when it is told to."""

    def __init__(self) -> None:
        super().__init__(open_checkpoint(LLAMA), 1)
        self.gate = threading.Event()
        self.gate.set()
        self.dead = False

    def launch(self, step: Step) -> None:
        self.gate.wait(30)
        if self.dead:
            raise RuntimeDied("replica 1, rank 0", "was killed by SIGKILL", "every rank alive")
        super().launch(step)

    def close(self) -> None:
        self.gate.set()
        super().close()


@pytest.fixture
def pair() -> Iterator[tuple[Replicas, list[Engine], list[Gated]]]:
    executors = [Gated(), Gated()]
    checkpoint = open_checkpoint(LLAMA)
    engines = [engine_on(executor, LLAMA, checkpoint, max_num_seqs=2, max_queue=1) for executor in executors]
    front = Replicas(engines)
    yield front, engines, executors
    front.close()


def prompt(front: Replicas, blocks: int = 2, first: int = 7) -> list[int]:
    return [first + at % 300 for at in range(BLOCK * blocks + 1)]


def test_texts_are_those_of_one_engine_on_whichever_replica(pair: Any) -> None:
    front, engines, _ = pair
    seeded = SamplingParams(12, temperature=1.1, seed=3, ignore_eos=True)
    for params in (SHORT, seeded):
        [want] = {tuple(Client(engine, [5, 6, 7], params).answer().tokens) for engine in engines}
        clients = [Client(front, [5, 6, 7], params) for _ in range(4)]
        assert {client.number % 2 for client in clients} == {0, 1}, "both replicas work"
        assert {tuple(client.answer().tokens) for client in clients} == {want}
    assert front.dp == 2 and front.tp == 1 and front.max_model_len == engines[0].max_model_len


def test_the_least_loaded_replica_is_next_and_the_queue_is_full_when_both_are(pair: Any) -> None:
    front, engines, executors = pair
    for executor in executors:
        executor.gate.clear()
    clients = [Client(front, [10 + number] * 5, SHORT) for number in range(6)]
    assert [engine.load for engine in engines] == [3, 3] and front.capacity == 6
    with pytest.raises(QueueFull, match="replicas"):
        Client(front, [1, 2], SHORT)
    with pytest.raises(InputError, match="is empty"):
        Client(front, [], SHORT)
    gone = next(client for client in clients if client.number % 2 == 1)
    front.cancel(gone.number)
    assert [engine.load for engine in engines] == [3, 2], "the right replica forgot it"
    last = Client(front, [1, 2], SHORT)
    assert last.number % 2 == 1
    for executor in executors:
        executor.gate.set()
    for client in [*(client for client in clients if client is not gone), last]:
        assert len(client.answer().tokens) == 6


def test_a_prompt_goes_where_its_beginning_was_computed(pair: Any) -> None:
    """Not when its salt is another, nor when that replica has much more to do."""
    front, engines, executors = pair
    ids = prompt(front)
    home = Client(front, ids, SHORT)
    home.answer()
    other = 1 - home.number % 2
    for executor in executors:
        executor.gate.clear()
    again = [Client(front, [*ids, 9, number], SHORT) for number in range(2)]
    assert {client.number % 2 for client in again} == {home.number % 2}
    salted: queue.SimpleQueue[Any] = queue.SimpleQueue()
    assert front.submit([*ids, 9, 9], SHORT, salted.put, cache_salt="mine") % 2 == other
    while engines[home.number % 2].load <= engines[other].load + SLACK and engines[home.number % 2].load < engines[0].capacity:
        again.append(Client(front, [*ids, 8, len(again)], SHORT))
    assert Client(front, [*ids, 9, 10], SHORT).number % 2 == other
    for executor in executors:
        executor.gate.set()
    for client in again:
        client.answer()
    assert front.stats().prefix_tokens_found >= 2 * BLOCK


def test_figures_are_sums_and_ranks_stand_one_after_the_other(pair: Any) -> None:
    front, engines, _ = pair
    for client in [Client(front, [5, 6, number], SHORT) for number in range(3)]:
        client.answer()
    stats, each = front.stats(), [engine.stats() for engine in engines]
    assert stats.generated_tokens == 18 == sum(one.generated_tokens for one in each) and all(one.generated_tokens for one in each)
    assert stats.kv_tokens_total == 2 * each[0].kv_tokens_total and stats.weight_bytes == each[0].weight_bytes * 2
    assert add_stats(each) == stats and "quantkit_generated_tokens_total 18\n" in metrics.exposition(stats)


def test_one_dead_replica_ends_all(pair: Any) -> None:
    """The one that lives still answers what it has, and nothing new is taken."""
    front, engines, executors = pair
    clients = [Client(front, [5, 6, number], LONG) for number in range(2)]
    executors[1].dead = True
    dying = next(client for client in clients if client.number % 2 == 1)
    with pytest.raises(RuntimeDied, match="replica 1, rank 0: was killed"):
        dying.answer()
    living = next(client for client in clients if client is not dying)
    assert len(living.answer().tokens) == 200
    assert engines[0].failure is None and front.failure is engines[1].failure is not None
    with pytest.raises(RuntimeDied, match="replica 1, rank 0"):
        Client(front, [5, 6, 7], SHORT)


def test_gpus_are_dealt_to_replicas_in_turn_and_ranks_are_named_by_both() -> None:
    homes = [ThisHost("cuda", 2, 3).home(replica) for replica in range(3)]
    assert [home.devices for home in homes] == [("cuda:0", "cuda:1"), ("cuda:2", "cuda:3"), ("cuda:4", "cuda:5")]
    assert homes[1].names == ("replica 1, rank 0", "replica 1, rank 1") and {home.host_ranks for home in homes} == {6}
    assert ThisHost("cpu", 2, 1).home(0).devices == ("cpu", "cpu") and ThisHost("cpu", 2, 1).home(0).names == ("rank 0", "rank 1")
