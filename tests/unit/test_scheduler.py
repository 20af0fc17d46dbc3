"""Laws of the scheduler: first come first served, budget and blocks kept, nothing lost, leaked, repeated or starved."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.runtime.blocks import BLOCK, blocks_for
from quantkit.runtime.scheduler import UNKNOWN, Chunk, Limits, Schedule, Scheduler


@dataclass(frozen=True)
class Wish:
    """A request: passes between its arrival and the one before, whose prompt it begins with and with how many of its tokens, its own
    prompt tokens, the tokens to make, how many of them are left out as it stops by itself, after how many passes it is cancelled, and its
    salt."""

    gap: int
    like: int
    common: int
    prompt: int
    count: int
    early: int
    patience: int | None
    salt: str


REQUESTS = st.lists(
    st.builds(
        Wish,
        gap=st.integers(0, 6),
        like=st.integers(0, 11),
        common=st.integers(0, 70),
        prompt=st.integers(1, 40),
        count=st.integers(1, 40),
        early=st.just(0) | st.integers(0, 40),
        patience=st.none() | st.integers(0, 60),
        salt=st.sampled_from(["", "", "other"]),
    ),
    min_size=1,
    max_size=10,
)


def prompts_of(requests: list[Wish]) -> list[list[int]]:
    prompts: list[list[int]] = []
    for number, wish in enumerate(requests):
        earlier = prompts[wish.like][: wish.common] if wish.like < number else []
        prompts.append([*earlier, *(1000 * number + i for i in range(wish.prompt))])
    return prompts


class Ranks:
    """What a rank would do with a schedule, and the checks that it may make. ``cells`` is the cache: block and place -> token."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.begun: set[int] = set()
        self.tables: dict[int, list[int]] = {}
        self.held: dict[int, int] = {}
        self.cells: dict[int, tuple[str, list[int]]] = {}  # block -> all tokens of its sequence up to the last that was written in it

    def run(self, schedule: Schedule, tokens: dict[int, list[int]], salts: list[str]) -> list[int]:
        """Returns the sequences that get a token."""
        for sequence in schedule.freed:
            self.begun.remove(sequence)  # KeyError: freed twice, or never begun
            self.tables.pop(sequence, None)
        for sequence in schedule.preempted:
            del self.tables[sequence]
        self.begun |= set(schedule.admitted)
        assert len({chunk.sequence for chunk in schedule.chunks}) == len(schedule.chunks)
        for chunk in schedule.chunks:
            assert chunk.sequence in self.begun and chunk.tokens
            if chunk.sequence not in self.tables:
                self.tables[chunk.sequence], self.held[chunk.sequence] = [], chunk.start
            table, text, salt = self.tables[chunk.sequence], tokens[chunk.sequence], salts[chunk.sequence]
            table += chunk.blocks
            stop = chunk.start + len(chunk.tokens)
            assert chunk.start == self.held[chunk.sequence] and stop <= BLOCK * len(table)
            assert [own if own != UNKNOWN else text[-1] for own in chunk.tokens] == text[chunk.start : stop]
            assert chunk.sample == (stop == len(text)) and UNKNOWN not in chunk.tokens[:-1]
            self.held[chunk.sequence] = stop
            for number in range(chunk.start // BLOCK, blocks_for(stop)):
                self.cells[table[number]] = salt, text[: min(stop, BLOCK * (number + 1))]
        for chunk in schedule.chunks:  # what a pass reads is what its own tokens would have written, whoever wrote it
            text, stop = tokens[chunk.sequence], self.held[chunk.sequence]
            for number, block in enumerate(self.tables[chunk.sequence][: blocks_for(stop)]):
                assert self.cells[block] == (salts[chunk.sequence], text[: min(stop, BLOCK * (number + 1))])
        return [chunk.sequence for chunk in schedule.chunks if chunk.sample]


@settings(max_examples=300, deadline=None)
@given(REQUESTS, st.integers(1, 5), st.integers(0, 60), st.integers(0, 6), st.booleans(), st.integers(0, 1))
def test_laws(requests: list[Wish], seats: int, spare: int, extra: int, prefix_caching: bool, ahead: int) -> None:
    """Requests arrive at any time and some are cancelled; the others are all served, in order, within the limits, whoever is preempted.

    With ``ahead`` a pass is scheduled before what the last one sampled is known.
    """
    tokens = dict(enumerate(prompts_of(requests)))
    prompts = {number: len(prompt) for number, prompt in tokens.items()}
    rooms = [prompts[number] + wish.count - 1 for number, wish in enumerate(requests)]
    salts = [wish.salt for wish in requests]
    limits = Limits(seats, seats + spare, max(map(blocks_for, rooms)) + extra, prefix_caching)
    scheduler, ranks = Scheduler(limits), Ranks(limits.blocks)
    arrivals = list(accumulate(wish.gap for wish in requests))
    admitted: list[int] = []
    gone: set[int] = set()
    left = set(range(len(requests)))
    pending: list[list[tuple[int, int]]] = []
    told = dict.fromkeys(tokens, 0)
    now = 0
    while left:
        for number, wish in enumerate(requests):
            if arrivals[number] == now:
                scheduler.add(number, tokens[number], rooms[number], wish.salt)
            if wish.patience is not None and arrivals[number] + wish.patience == now and number in left:
                left.remove(number)
                gone.add(number)
                scheduler.remove(number)
        schedule = scheduler.schedule()
        admitted += schedule.admitted
        assert sum(len(chunk.tokens) for chunk in schedule.chunks) <= limits.step_tokens
        assert not gone & {chunk.sequence for chunk in schedule.chunks}, "nothing is computed for who has left"
        sampled = ranks.run(schedule, tokens, salts)
        held = {block for table in ranks.tables.values() for block in table}
        assert len(ranks.tables) <= scheduler.running <= seats
        assert len(held) <= scheduler.blocks_held <= limits.blocks - scheduler.blocks_kept
        first = min((number for number in left if arrivals[number] <= now), default=None)
        waits = first is not None and told[first] + sum(who == first for each in pending for who, _ in each) == requests[first].count
        assert first is None or waits or first in {chunk.sequence for chunk in schedule.chunks}, (
            "the first to have come advances in every pass"
        )
        scheduler.expect(schedule)
        pending.append([(number, 1000 * number + 500 + len(tokens[number])) for number in sampled])
        for number, token in pending[-1]:
            tokens[number].append(token)
        for number, token in pending.pop(0) if len(pending) > ahead else ():
            told[number] += number in left
            if number in left and told[number] >= max(1, requests[number].count - requests[number].early):
                left.remove(number)
                gone.add(number)
                scheduler.remove(number)
            elif number in left:
                scheduler.append(number, token)
        now += 1
    assert admitted == sorted(admitted), "first come, first served"
    ranks.run(scheduler.schedule(), tokens, salts)
    assert not ranks.begun and not ranks.tables and scheduler.blocks_held == 0 and not scheduler.schedule()
    if not prefix_caching:
        assert scheduler.blocks_kept == scheduler.counts.found == 0


def test_a_long_prompt_is_cut_and_holds_up_nobody() -> None:
    scheduler = Scheduler(Limits(seats=3, step_tokens=4, blocks=9))
    scheduler.add(1, [11, 12], 10)
    assert scheduler.schedule() == Schedule((), (), (1,), (Chunk(1, 0, (11, 12), True, (0,)),))
    scheduler.append(1, 13)
    scheduler.add(2, list(range(20, 27)), 10)
    scheduler.add(3, [31], 5)
    assert scheduler.schedule().chunks == (Chunk(1, 2, (13,), True), Chunk(2, 0, (20, 21, 22), False, (3,)))
    scheduler.append(1, 14)
    assert scheduler.schedule().chunks == (Chunk(1, 3, (14,), True), Chunk(2, 3, (23, 24, 25), False))
    assert scheduler.schedule().chunks == (Chunk(2, 6, (26,), True), Chunk(3, 0, (31,), True, (6,))), "nobody waits for what is not sampled"


def test_who_came_last_makes_room_and_comes_back_with_all_its_tokens() -> None:
    scheduler = Scheduler(Limits(seats=3, step_tokens=64, blocks=4))
    for number in (1, 2, 3):
        scheduler.add(number, [number] * 16, 48)
    assert scheduler.schedule().admitted == (1, 2), "beside what it needs now, a block for each who runs"
    for number in (1, 2):
        scheduler.append(number, 100 + number)
    assert [len(chunk.blocks) for chunk in scheduler.schedule().chunks] == [1, 1]
    for step in range(15):
        for number in (1, 2):
            scheduler.append(number, 200 + step)
        scheduler.schedule()
    for number in (1, 2):
        scheduler.append(number, 7)
    full = scheduler.schedule()
    assert (full.preempted, full.admitted, [chunk.sequence for chunk in full.chunks]) == ((2,), (), [1])
    assert (scheduler.running, scheduler.waiting, scheduler.counts.preemptions) == (1, 2, 1)
    scheduler.remove(1)
    back = scheduler.schedule()
    assert back.freed == (1,) and back.admitted == (), "2 was begun before; 3 waits for its blocks"
    (chunk,) = back.chunks
    assert chunk.sequence == 2 and chunk.sample and chunk.start in (16, 32) and chunk.start + len(chunk.tokens) == 33
    scheduler.remove(2)
    scheduler.remove(3)
    assert scheduler.schedule().freed == (2,) and scheduler.blocks_held == 0


def test_what_a_text_begins_with_is_computed_once() -> None:
    scheduler = Scheduler(Limits(seats=2, step_tokens=64, blocks=8))
    text = list(range(40))
    scheduler.add(1, text, 40)
    scheduler.schedule()
    scheduler.add(2, text[:32], 40)
    scheduler.add(3, [*text[:20], 5], 40, "salt")
    (chunk,) = scheduler.schedule().chunks
    assert (chunk.sequence, chunk.start, len(chunk.blocks)) == (2, 16, 2), "one token at least is computed, so one block is"
    assert scheduler.blocks_held == 4, "shared with a text that still runs"
    scheduler.remove(1)
    scheduler.remove(2)
    (chunk,) = scheduler.schedule().chunks
    assert (chunk.sequence, chunk.start) == (3, 0), "another salt"
    scheduler.remove(3)
    scheduler.add(4, text, 40)
    (chunk,) = scheduler.schedule().chunks
    assert (chunk.start, len(chunk.tokens), scheduler.counts.found, scheduler.counts.looked_up) == (32, 8, 48, 133)
    scheduler.add(5, text, 40, reuse=False)
    (chunk,) = scheduler.schedule().chunks
    assert (chunk.sequence, chunk.start, len(chunk.tokens)) == (5, 0, 40)
    assert (scheduler.counts.found, scheduler.counts.looked_up) == (48, 133)


def test_who_waits_leaves_without_a_trace() -> None:
    scheduler = Scheduler(Limits(seats=1, step_tokens=8, blocks=1))
    scheduler.add(1, [5], 3)
    scheduler.add(2, [6], 3)
    scheduler.schedule()
    scheduler.remove(2)
    scheduler.remove(2)
    scheduler.remove(9)
    assert scheduler.waiting == 0 and not scheduler.schedule()
