"""Which blocks of the KV cache are free, held, or free and kept for a prefix that may come again. Plain numbers: no torch, no ranks.

A block holds the keys and values of ``BLOCK`` neighbouring tokens of a sequence. Sequences with the same beginning share its
full blocks. A full block has a name, a hash of its tokens and of the name before it, under which it is found again, even
after its last holder has gone: until its memory is needed, and then those that were let go first are the first to go.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from quantkit.plan import KV_BLOCK

BLOCK = KV_BLOCK
_AHEAD = 64
"""How far from the place that was asked for a free block is looked for."""
_EVICTED = 64
"""One in so many blocks is a kept one that gives way with the others: neighbours, most often, which a text that grows gets side by side."""


def blocks_for(tokens: int) -> int:
    """How many blocks hold ``tokens``."""
    return -(-tokens // BLOCK)


def first_name(salt: str) -> bytes:
    """What stands before the first block: texts of another ``salt`` share nothing."""
    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def next_name(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block of ``tokens`` behind the block ``before``."""
    assert len(tokens) == BLOCK
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """``count`` blocks, numbered from 0. A block is held as often as it was taken or shared, and free when nobody holds it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._holders = [0] * count
        self._name: list[bytes | None] = [None] * count
        self._named: dict[bytes, int] = {}
        self._blank = OrderedDict.fromkeys(range(count))
        self._kept: OrderedDict[int, None] = OrderedDict()  # free and named, in the order in which they were let go

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._blank) + len(self._kept)

    @property
    def kept(self) -> int:
        """Blocks that nobody holds and that can be found by name."""
        return len(self._kept)

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of as many of ``names``, from the first on, as there are."""
        found = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def free_among(self, blocks: Sequence[int]) -> int:
        """How many of ``blocks`` nobody holds."""
        return sum(not self._holders[block] for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Hold ``blocks``, which were found."""
        for block in blocks:
            if not self._holders[block]:
                del self._kept[block]
            self._holders[block] += 1

    def take(self, count: int, near: int) -> list[int]:
        """``count`` blocks that nobody holds, at most ``available``, side by side and from block ``near`` on where that can be."""
        assert count <= self.available, (count, self.available)
        taken = []
        for _ in range(count):
            if not self._blank:
                self._evict()
            block = next((b for b in range(near, near + _AHEAD) if b in self._blank), None)
            if block is None:
                block, _none = self._blank.popitem(last=False)
            else:
                del self._blank[block]
            self._holders[block] = 1
            taken.append(block)
            near = block + 1
        return taken

    def _evict(self) -> None:
        """Forget the names of the kept blocks that were let go first."""
        gone = [self._kept.popitem(last=False)[0] for _ in range(min(1 + self.count // _EVICTED, len(self._kept)))]
        for block in sorted(gone):
            name, self._name[block] = self._name[block], None
            assert name is not None
            del self._named[name]
            self._blank[block] = None

    def seal(self, block: int, name: bytes) -> None:
        """Let ``block``, which is held and full, be found as ``name``; nothing changes where that is another block already."""
        assert self._holders[block] and self._name[block] is None
        if name not in self._named:
            self._named[name], self._name[block] = block, name

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's ``blocks``. Of those kept the last gives way first: the first may begin other texts too."""
        for block in reversed(blocks):
            assert self._holders[block], block
            self._holders[block] -= 1
            if not self._holders[block]:
                (self._blank if self._name[block] is None else self._kept)[block] = None
