"""Laws of the scheduler: first come first served, budget and capacity kept, nothing lost, leaked, repeated or starved."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.runtime.scheduler import Chunk, Limits, Schedule, Scheduler


@dataclass(frozen=True)
class Wish:
    """A request: passes between its arrival and the one before, its tokens, and after how many passes it is cancelled."""

    gap: int
    prompt: int
    count: int
    patience: int | None

    @property
    def room(self) -> int:
        return self.prompt + self.count - 1


REQUESTS = st.lists(
    st.builds(Wish, st.integers(0, 6), st.integers(1, 30), st.integers(1, 12), st.none() | st.integers(0, 20)), min_size=1, max_size=12
)


class Ranks:
    """What a rank would do with a schedule, and the checks that it may make."""

    def __init__(self) -> None:
        self.open: dict[int, int] = {}
        self.held: dict[int, list[int]] = {}

    def run(self, schedule: Schedule) -> list[int]:
        """Returns the sequences that get a token."""
        for sequence in schedule.freed:
            del self.open[sequence], self.held[sequence]  # KeyError: freed twice, or never opened
        for sequence, room in schedule.admitted:
            assert sequence not in self.open
            self.open[sequence], self.held[sequence] = room, []
        assert len({chunk.sequence for chunk in schedule.chunks}) == len(schedule.chunks)
        for chunk in schedule.chunks:
            assert chunk.tokens and chunk.start == len(self.held[chunk.sequence])
            self.held[chunk.sequence] += chunk.tokens
            assert len(self.held[chunk.sequence]) <= self.open[chunk.sequence]
        return [chunk.sequence for chunk in schedule.chunks if chunk.sample]


@settings(max_examples=200, deadline=None)
@given(REQUESTS, st.integers(1, 5), st.integers(0, 20), st.integers(0, 60))
def test_laws(requests: list[Wish], seats: int, spare: int, extra: int) -> None:
    """Requests arrive at any time and some are cancelled; the others are all served, in order, within the limits."""
    limits = Limits(seats, seats + spare, max(wish.room for wish in requests) + extra)
    scheduler, ranks = Scheduler(limits), Ranks()
    arrivals = list(accumulate(wish.gap for wish in requests))
    made: dict[int, list[int]] = {}
    admitted: list[int] = []
    cancelled: set[int] = set()
    for now in range(arrivals[-1] + sum(wish.prompt + wish.count for wish in requests) + 1):
        for number, wish in enumerate(requests):
            if arrivals[number] == now:
                scheduler.add(number, [1000 * number + i for i in range(wish.prompt)], wish.room)
                made[number] = []
            if wish.patience is not None and arrivals[number] + wish.patience == now:
                if len(made[number]) < wish.count:
                    cancelled.add(number)
                scheduler.remove(number)
        schedule = scheduler.schedule()
        admitted += [sequence for sequence, _ in schedule.admitted]
        assert sum(len(chunk.tokens) for chunk in schedule.chunks) <= limits.step_tokens
        assert not cancelled & {chunk.sequence for chunk in schedule.chunks}, "nothing is computed for who has left"
        sampled = ranks.run(schedule)
        assert len(ranks.open) == scheduler.running <= seats
        assert sum(ranks.open.values()) == scheduler.kv_reserved <= limits.kv_tokens
        assert sum(map(len, ranks.held.values())) == scheduler.kv_used <= scheduler.kv_reserved
        assert bool(schedule.chunks) == bool(scheduler.running), "somebody advances in every pass: nobody starves"
        for number in sampled:
            made[number].append(1000 * number + 500 + len(made[number]))
            if len(made[number]) == requests[number].count:
                scheduler.remove(number)
            else:
                scheduler.append(number, made[number][-1])
    assert admitted == sorted(admitted), "first come, first served"
    for number, wish in enumerate(requests):
        assert len(made[number]) == wish.count or number in cancelled
    ranks.run(scheduler.schedule())
    assert not ranks.open and scheduler.kv_used == scheduler.kv_reserved == 0 and not scheduler.schedule()


def test_a_long_prompt_is_cut_and_holds_up_nobody() -> None:
    scheduler = Scheduler(Limits(seats=3, step_tokens=4, kv_tokens=100))
    scheduler.add(1, [11, 12], 10)
    first = scheduler.schedule()
    assert first == Schedule((), ((1, 10),), (Chunk(1, 0, (11, 12), True),))
    scheduler.append(1, 13)
    scheduler.add(2, list(range(20, 27)), 10)
    scheduler.add(3, [31], 5)
    assert scheduler.schedule().chunks == (Chunk(1, 2, (13,), True), Chunk(3, 0, (31,), True), Chunk(2, 0, (20, 21), False))
    scheduler.append(1, 14)
    scheduler.append(3, 32)
    assert scheduler.schedule().chunks == (Chunk(1, 3, (14,), True), Chunk(3, 1, (32,), True), Chunk(2, 2, (22, 23), False))
    assert scheduler.schedule().chunks == (Chunk(2, 4, (24, 25, 26), True),), "tokens that are not sampled yet are not waited for"


def test_the_first_in_the_queue_waits_for_its_room_and_is_not_overtaken() -> None:
    scheduler = Scheduler(Limits(seats=4, step_tokens=8, kv_tokens=10))
    for number, room in ((1, 6), (2, 6), (3, 2)):
        scheduler.add(number, [0, 1], room)
    assert scheduler.schedule().admitted == ((1, 6),)
    assert (scheduler.running, scheduler.waiting, scheduler.kv_reserved) == (1, 2, 6)
    scheduler.remove(1)
    assert scheduler.schedule() == Schedule((1,), ((2, 6), (3, 2)), (Chunk(2, 0, (0, 1), True), Chunk(3, 0, (0, 1), True)))


def test_who_waits_leaves_without_a_trace() -> None:
    scheduler = Scheduler(Limits(seats=1, step_tokens=8, kv_tokens=10))
    scheduler.add(1, [5], 3)
    scheduler.add(2, [6], 3)
    scheduler.schedule()
    scheduler.remove(2)
    scheduler.remove(2)
    scheduler.remove(9)
    assert scheduler.waiting == 0 and not scheduler.schedule()
