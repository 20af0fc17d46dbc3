"""Which tokens of which sequences the next pass runs: first come, first served, under a token budget and a KV capacity.

A sequence is admitted when a seat is free and its whole room fits into the KV capacity, so an admitted sequence always
runs to its end. Plain numbers and lists: this module knows no torch, no text, no parameters and no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """``seats``: sequences that run at once. ``step_tokens``: of one pass, at least ``seats``. ``kv_tokens``: what the cache holds."""

    seats: int
    step_tokens: int
    kv_tokens: int

    def __post_init__(self) -> None:
        assert 1 <= self.seats <= self.step_tokens and self.kv_tokens >= 1, self


@dataclass(frozen=True, slots=True)
class Chunk:
    """``tokens`` of ``sequence`` from position ``start`` on; ``sample`` when they are its last, so that the next one is wanted."""

    sequence: int
    start: int
    tokens: tuple[int, ...]
    sample: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """One pass: free ``freed``, open ``admitted`` (each with its room), then run ``chunks``."""

    freed: tuple[int, ...]
    admitted: tuple[tuple[int, int], ...]
    chunks: tuple[Chunk, ...]

    def __bool__(self) -> bool:
        return bool(self.freed or self.chunks)


@dataclass(slots=True)
class _Sequence:
    tokens: list[int]
    room: int
    computed: int = 0


class Scheduler:
    """The waiting queue and the running sequences."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._waiting: deque[tuple[int, _Sequence]] = deque()
        self._running: dict[int, _Sequence] = {}
        self._freed: list[int] = []
        self._reserved = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def kv_used(self) -> int:
        """Tokens whose keys and values are held."""
        return sum(sequence.computed for sequence in self._running.values())

    @property
    def kv_reserved(self) -> int:
        """Tokens that the running sequences may come to hold."""
        return self._reserved

    def add(self, sequence: int, prompt: Sequence[int], room: int) -> None:
        """Queue ``prompt``; ``room`` is the most tokens whose keys and values it may come to hold, within the capacity."""
        assert 1 <= len(prompt) <= room <= self.limits.kv_tokens, (len(prompt), room, self.limits)
        self._waiting.append((sequence, _Sequence(list(prompt), room)))

    def append(self, sequence: int, token: int) -> None:
        """Give a running sequence its sampled token, which a later pass runs."""
        found = self._running[sequence]
        assert found.computed == len(found.tokens) < found.room, (found.computed, len(found.tokens), found.room)
        found.tokens.append(token)

    def remove(self, sequence: int) -> None:
        """Take out a sequence that is done or is no longer wanted; unknown ones are ignored."""
        found = self._running.pop(sequence, None)
        if found is not None:
            self._reserved -= found.room
            self._freed.append(sequence)
            return
        self._waiting = deque(item for item in self._waiting if item[0] != sequence)

    def _admit(self) -> tuple[tuple[int, int], ...]:
        admitted = []
        while self._waiting and len(self._running) < self.limits.seats:
            sequence, state = self._waiting[0]
            if self._reserved + state.room > self.limits.kv_tokens:
                break
            self._waiting.popleft()
            self._running[sequence] = state
            self._reserved += state.room
            admitted.append((sequence, state.room))
        return tuple(admitted)

    def schedule(self) -> Schedule:
        """The next pass; empty when there is nothing to run or to free. What it names counts as computed from now on.

        Sequences that lack one token go first: nobody who is already answering waits for a long prompt. The others share
        what is left of the budget in the order they came; as the budget covers every seat, the first of them always advances.
        """
        admitted = self._admit()
        freed, self._freed = tuple(self._freed), []
        left = self.limits.step_tokens
        chunks = []
        lacking = {sequence: len(state.tokens) - state.computed for sequence, state in self._running.items()}
        for sequence in sorted(lacking, key=lambda key: lacking[key] != 1):  # stable: within each kind as they came
            count = min(lacking[sequence], left)
            if count:
                state = self._running[sequence]
                stop = state.computed + count
                chunks.append(Chunk(sequence, state.computed, tuple(state.tokens[state.computed : stop]), stop == len(state.tokens)))
                state.computed = stop
                left -= count
        return Schedule(freed, admitted, tuple(chunks))
