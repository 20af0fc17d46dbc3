"""Several engines of one model behind one front, each on ranks of its own: which of them gets a request, and what all together are.

Knows prompts as tokens, and what engines say of themselves; how one of them computes is its own affair.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from quantkit.arch.spec import ModelSpec
from quantkit.errors import QuantkitError
from quantkit.runtime.blocks import BLOCK, first_name, next_name
from quantkit.runtime.engine import Engine, EngineStats, OnDelta, QueueFull
from quantkit.runtime.params import SamplingParams
from quantkit.text.tokenizer import Tokenizer

SLACK = 2
"""A replica that has computed what a prompt begins with gets it while it has at most so many requests more than another."""
REMEMBERED = 1 << 16
"""Blocks of prompts of which it is known who computed them."""


class Replicas:
    """``engines`` of one model, all alike, as one. When one dies all have: the front refuses requests with its failure.

    ``prefix_caching``: whether they remember what they have computed, so that it matters who gets a prompt. A request gives the same text
    on any of them. Its callback must not call the front.
    """

    def __init__(self, engines: Sequence[Engine], *, prefix_caching: bool = True) -> None:
        assert engines
        self._engines = tuple(engines)
        first = engines[0]
        self.tokenizer: Tokenizer = first.tokenizer
        self.spec: ModelSpec = first.spec
        self.dtype, self.tp, self.dp = first.dtype, first.tp, len(engines)
        self.max_model_len, self.max_num_seqs = first.max_model_len, first.max_num_seqs
        self._prefix_caching = prefix_caching
        self._lock = threading.Lock()
        self._computed: OrderedDict[bytes, int] = OrderedDict()  # a block's name -> the replica that computed it last

    def submit(self, prompt: Sequence[int], params: SamplingParams, on_delta: OnDelta, *, cache_salt: str = "") -> int:
        """As ``Engine.submit``, on the replica that has the least to do, or one that has computed most of the prompt before."""
        self.check(prompt, params)
        failure = self.failure
        if failure is not None:
            raise failure
        names = self._names(prompt, cache_salt) if self._prefix_caching else []
        for replica in self._order(names):
            try:
                number = self._engines[replica].submit(prompt, params, on_delta, cache_salt=cache_salt)
            except QueueFull:
                continue
            self._remember(names, replica)
            return number * self.dp + replica
        waiting = sum(engine.stats().waiting for engine in self._engines)
        raise QueueFull("engine", f"{waiting} requests wait on {self.dp} replicas", "fewer", "try again later")

    @staticmethod
    def _names(prompt: Sequence[int], cache_salt: str) -> list[bytes]:
        """The names of the full blocks of ``prompt``."""
        name, names = first_name(cache_salt), list[bytes]()
        for at in range(0, len(prompt) - BLOCK + 1, BLOCK):
            name = next_name(name, prompt[at : at + BLOCK])
            names.append(name)
        return names

    def _order(self, names: Sequence[bytes]) -> list[int]:
        """The replicas in the order in which a prompt of blocks ``names`` asks them."""
        loads = [engine.load for engine in self._engines]
        order = sorted(range(self.dp), key=loads.__getitem__)
        with self._lock:
            known = next((self._computed[name] for name in reversed(names) if name in self._computed), None)
        if known is not None and loads[known] <= loads[order[0]] + SLACK:
            order.remove(known)
            order.insert(0, known)
        return order

    def _remember(self, names: Sequence[bytes], replica: int) -> None:
        with self._lock:
            for name in names:
                self._computed[name] = replica
                self._computed.move_to_end(name)
            while len(self._computed) > REMEMBERED:
                self._computed.popitem(last=False)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """As ``Engine.check``."""
        self._engines[0].check(prompt, params)

    def cancel(self, request: int) -> None:
        """As ``Engine.cancel``."""
        self._engines[request % self.dp].cancel(request // self.dp)

    @property
    def capacity(self) -> int:
        """Requests that all take at once."""
        return sum(engine.capacity for engine in self._engines)

    @property
    def failure(self) -> QuantkitError | None:
        """Why the first replica that died did; None while all live."""
        return next((engine.failure for engine in self._engines if engine.failure is not None), None)

    def stats(self) -> EngineStats:
        """The sums of what the replicas say, and the ranks of all, one replica's after another's."""
        return add_stats([engine.stats() for engine in self._engines])

    def close(self) -> None:
        """End all. A second call does nothing."""
        for engine in self._engines:
            engine.close()


def add_stats(each: Sequence[EngineStats]) -> EngineStats:
    """Figures of several engines as one's: numbers summed, those of ranks one after the other."""
    sums: dict[str, Any] = {}
    for field in dataclasses.fields(EngineStats):
        values = [getattr(stats, field.name) for stats in each]
        sums[field.name] = sum(values[1:], start=values[0])  # tuples are put together by the same sign
    return EngineStats(**sums)
