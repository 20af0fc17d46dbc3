"""Laws of the block pool: nothing is leaked, lent twice or found wrongly; what was let go first gives way first."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quantkit.runtime.blocks import BLOCK, BlockPool, blocks_for, first_name, next_name


class Pool(RuleBasedStateMachine):
    """A pool beside lists that say who holds what. The name of a block is its content: another content must never be found under it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes | None] = dict.fromkeys(range(12))

    @rule(count=st.integers(0, 12), near=st.integers(0, 15))
    def take(self, count: int, near: int) -> None:
        if count > self.pool.available:
            with pytest.raises(AssertionError):
                self.pool.take(count, near)
            return
        free = set(range(12)) - {block for blocks in self.held for block in blocks}
        blocks = self.pool.take(count, near)
        assert len(set(blocks)) == count and set(blocks) <= free
        self.held.append(blocks)
        self.content.update(dict.fromkeys(blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def seal(self, data: st.DataObject, name: bytes) -> None:
        blocks = [block for block in data.draw(st.sampled_from(self.held)) if self.content[block] is None]
        if blocks:
            first = not self.pool.find([name])
            self.pool.seal(blocks[0], name)
            self.content[blocks[0]] = name
            if first:
                assert self.pool.find([name]) == [blocks[0]]

    @rule(names=st.permutations([b"a", b"b", b"c", b"d"]))
    def share(self, names: list[bytes]) -> None:
        found = self.pool.find(names)
        assert [self.content[block] for block in found] == names[: len(found)]
        self.pool.share(found)
        self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def nothing_is_lost(self) -> None:
        lent = {block for blocks in self.held for block in blocks}
        assert self.pool.available == 12 - len(lent)
        assert self.pool.free_among(range(12)) == self.pool.available >= self.pool.kept


Pool.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPool = Pool.TestCase


def test_what_was_let_go_first_gives_way_first_and_the_end_of_a_text_before_its_beginning() -> None:
    pool = BlockPool(40)
    texts = [pool.take(20, 0), pool.take(20, 0)]
    for text, blocks in enumerate(texts):
        for number, block in enumerate(blocks):
            pool.seal(block, b"%d %d" % (text, number))
    pool.release(texts[1])
    pool.release(texts[0])
    assert pool.kept == pool.available == 40
    pool.take(1, 0)
    assert len(pool.find([b"1 %d" % number for number in range(20)])) < 20
    assert pool.find([b"1 0"]) == [texts[1][0]] and pool.find([b"0 %d" % number for number in range(20)]) == texts[0]


def test_blocks_are_side_by_side_where_that_can_be() -> None:
    pool = BlockPool(200)
    assert pool.take(3, 100) == [100, 101, 102] and pool.take(2, 100) == [103, 104] and pool.take(2, 198) == [198, 199]
    assert pool.take(2, 199) == [0, 1]


def test_names_depend_on_all_that_comes_before_and_on_the_salt() -> None:
    tokens = list(range(BLOCK))
    names = {first_name(""), first_name("a"), next_name(first_name(""), tokens), next_name(first_name("a"), tokens)}
    names |= {next_name(next_name(first_name(""), tokens), tokens), next_name(first_name(""), [*tokens[:-1], 1 << 40])}
    assert len(names) == 6
    assert next_name(first_name(""), tokens) == next_name(first_name(""), tuple(tokens))
    assert [blocks_for(tokens) for tokens in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]
