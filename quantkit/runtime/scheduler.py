"""Which tokens of which sequences the next pass runs: first come, first served, under a token budget and with so many blocks.

A sequence enters when a seat is free and there are blocks for the tokens that it has; it gets more as it grows. When there
are none left, who came last gives its blocks back and waits; later it is computed again, and ends as if nothing had happened.
Plain numbers and lists: this module knows no torch, no text, no parameters and no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from quantkit.runtime.blocks import BLOCK, BlockPool, blocks_for, first_name, next_name

UNKNOWN = -1
"""In place of a token that a pass under way samples: the ranks take what they sampled last for that sequence."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``seats``: sequences that run at once. ``step_tokens``: of one pass, at least ``seats``. ``blocks``: what the cache holds.

    ``prefix_caching``: whether blocks of earlier texts are used again.
    """

    seats: int
    step_tokens: int
    blocks: int
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        assert 1 <= self.seats <= self.step_tokens and self.blocks >= 1, self


@dataclass(frozen=True, slots=True)
class Chunk:
    """``tokens`` of ``sequence`` from position ``start`` on; ``sample`` when they are its last, so that the next one is wanted.

    ``blocks`` are those that the sequence got since its last chunk, behind those that it had.
    """

    sequence: int
    start: int
    tokens: tuple[int, ...]
    sample: bool
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """One pass: forget ``freed``; take all blocks of ``preempted``; begin ``admitted``; then run ``chunks``."""

    freed: tuple[int, ...]
    preempted: tuple[int, ...]
    admitted: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def __bool__(self) -> bool:
        return bool(self.freed or self.preempted or self.chunks)


@dataclass(slots=True)
class Counts:
    """Since the start: prompt tokens that were looked up among the kept blocks, those found there, and preemptions."""

    looked_up: int = 0
    found: int = 0
    preemptions: int = 0


@dataclass(slots=True)
class _Sequence:
    tokens: list[int]
    room: int
    names: list[bytes]
    """Of its full blocks, as far as they were needed, behind the name of its salt."""
    reuse: bool
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    told: int = 0
    """Blocks that the ranks know of."""
    sealed: int = 0
    """Blocks that can be found, or that others have under the same name."""
    unknown: int = 0
    """Of the tokens, how many at the end are still being sampled."""
    seat: int = -1
    begun: bool = False

    @property
    def lacking(self) -> int:
        return len(self.tokens) - self.computed

    def names_of(self, count: int) -> list[bytes]:
        """The names of its first ``count`` blocks, which are full."""
        while len(self.names) <= count:
            at = BLOCK * (len(self.names) - 1)
            self.names.append(next_name(self.names[-1], self.tokens[at : at + BLOCK]))
        return self.names[1 : count + 1]


class Scheduler:
    """The waiting queue, the running sequences and the blocks. All who run came before all who wait."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.counts = limits, Counts()
        self._pool = BlockPool(limits.blocks)
        self._waiting: deque[tuple[int, _Sequence]] = deque()
        self._running: dict[int, _Sequence] = {}  # in the order in which they came
        self._freed: list[int] = []
        self._seats = set(range(limits.seats))

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def blocks_held(self) -> int:
        """Blocks of the running sequences, a shared one once."""
        return self._pool.count - self._pool.available

    @property
    def blocks_kept(self) -> int:
        """Free blocks that may serve another text."""
        return self._pool.kept

    def add(self, sequence: int, prompt: Sequence[int], room: int, salt: str = "", *, reuse: bool = True) -> None:
        """Queue ``prompt``; ``room`` is the most tokens whose keys and values it may come to hold, within the capacity.

        Its blocks are shared with sequences of the same ``salt`` alone. Without ``reuse`` all of ``prompt`` is run, whatever there is.
        """
        assert 1 <= len(prompt) <= room and blocks_for(room) <= self.limits.blocks, (len(prompt), room, self.limits)
        self._waiting.append((sequence, _Sequence(list(prompt), room, [first_name(salt)], reuse)))

    def expect(self, schedule: Schedule) -> None:
        """Have the next pass run what ``schedule`` samples, of those who have room for it, before it is known: ``append`` tells it."""
        for chunk in schedule.chunks:
            state = self._running[chunk.sequence]
            if chunk.sample and len(state.tokens) < state.room:
                state.tokens.append(UNKNOWN)
                state.unknown += 1

    def append(self, sequence: int, token: int) -> None:
        """Give a sequence its sampled token: the first that is expected, else one that a later pass runs."""
        state = self._running.get(sequence) or next(state for number, state in self._waiting if number == sequence)
        if state.unknown:
            state.tokens[-state.unknown] = token
            state.unknown -= 1
            self._seal(state)
            return
        assert state.lacking == 0 and len(state.tokens) < state.room, (state.computed, len(state.tokens), state.room)
        state.tokens.append(token)

    def remove(self, sequence: int) -> None:
        """Take out a sequence that is done or is no longer wanted; unknown ones are ignored."""
        if sequence in self._running:
            self._leave(sequence)
            self._freed.append(sequence)
            return
        self._freed += [number for number, state in self._waiting if number == sequence and state.begun]
        self._waiting = deque(item for item in self._waiting if item[0] != sequence)

    def _leave(self, sequence: int) -> _Sequence:
        """Take ``sequence`` from the running ones, and its blocks from it."""
        state = self._running.pop(sequence)
        self._pool.release(state.blocks)
        self._seats.add(state.seat)
        state.blocks, state.told, state.computed, state.sealed = [], 0, 0, 0
        return state

    def schedule(self) -> Schedule:
        """The next pass; empty when there is nothing to run or to free. What it names counts as computed from now on.

        Sequences that lack one token go first: nobody who is already answering waits for a long prompt. The others share
        what is left of the budget in the order they came; as the budget covers every seat, the first of them always advances.
        """
        freed, self._freed = tuple(self._freed), []
        preempted = self._grow()
        admitted = () if preempted else self._admit()
        return Schedule(freed, preempted, admitted, self._chunks())

    def _grow(self) -> tuple[int, ...]:
        """Give every running sequence blocks for its tokens, the first to come first; returns whose blocks were taken for that."""
        preempted: list[int] = []
        for sequence, state in list(self._running.items()):
            need = blocks_for(len(state.tokens)) - len(state.blocks)
            while sequence in self._running and need > self._pool.available:
                last = next(reversed(self._running))
                self._waiting.appendleft((last, self._leave(last)))
                preempted.append(last)
            if sequence not in self._running:
                break  # nor is anyone who came later
            self._take(state, need)
        self.counts.preemptions += len(preempted)
        return tuple(preempted)

    def _take(self, state: _Sequence, count: int) -> None:
        """Give ``state`` blocks: behind its last, or in the part of the cache that is its seat's, where others are not in the way."""
        if count:
            near = state.blocks[-1] + 1 if state.blocks else state.seat * self._pool.count // self.limits.seats
            state.blocks += self._pool.take(count, near)

    def _admit(self) -> tuple[int, ...]:
        """Let in who waits while there are seats, tokens in the budget, and blocks beside one for each who runs to grow on."""
        admitted = []
        left = self.limits.step_tokens - sum(state.lacking for state in self._running.values())
        while self._waiting and self._seats and left > 0:
            sequence, state = self._waiting[0]
            assert not state.unknown, "who gave way in the last pass, or has not begun, is sampling nothing"
            found: list[int] = []
            look = self.limits.prefix_caching and state.reuse
            if look:  # at least one token is computed: the next comes from its logits
                found = self._pool.find(state.names_of((len(state.tokens) - 1) // BLOCK))
            need = blocks_for(len(state.tokens)) - len(found)
            if need + self._pool.free_among(found) + len(self._running) > self._pool.available:
                break
            self._waiting.popleft()
            self._running[sequence] = state
            state.seat = min(self._seats)
            self._seats.remove(state.seat)
            self._pool.share(found)
            state.blocks, state.computed, state.sealed = found, BLOCK * len(found), len(found)
            self._take(state, need)
            left -= state.lacking
            if not state.begun:
                state.begun = True
                admitted.append(sequence)
                self.counts.looked_up += len(state.tokens) if look else 0
                self.counts.found += state.computed
        return tuple(admitted)

    def _chunks(self) -> tuple[Chunk, ...]:
        """The tokens of the pass. Their full blocks can be found from the next pass on."""
        left = self.limits.step_tokens
        chunks = []
        for sequence, state in sorted(self._running.items(), key=lambda item: item[1].lacking != 1):  # stable: as they came
            count = min(state.lacking, left)
            if not count:
                continue
            start, stop = state.computed, state.computed + count
            blocks = tuple(state.blocks[state.told :])
            chunks.append(Chunk(sequence, start, tuple(state.tokens[start:stop]), stop == len(state.tokens), blocks))
            state.computed, state.told = stop, len(state.blocks)
            left -= count
            self._seal(state)
        return tuple(chunks)

    def _seal(self, state: _Sequence) -> None:
        """Let the full blocks of ``state`` be found whose tokens are known; they are computed by now, or by the pass that is scheduled."""
        full = min(state.computed, len(state.tokens) - state.unknown) // BLOCK
        if self.limits.prefix_caching and state.sealed < full:
            for block, name in zip(state.blocks[state.sealed : full], state.names_of(full)[state.sealed :], strict=True):
                self._pool.seal(block, name)
            state.sealed = full
