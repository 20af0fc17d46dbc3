"""Where a text ends because of a stop string. Knows characters only."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Text up to the string among ``stops`` that is complete first, however the text is cut into pieces.

    What may turn out to be the start of one is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""
        self._passed = 0
        """Characters of what is held in which no stop string may end."""

    def push(self, text: str, *, heed: bool = True) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string was found right behind it; none ends in a text that is not heeded."""
        if not self._stops:
            return text, False
        self._held += text
        if not heed:
            self._passed = len(self._held)
        found = [
            (place + len(stop), place)
            for stop in self._stops
            if (place := self._held.find(stop, max(0, self._passed - len(stop) + 1))) >= 0
        ]
        if found:
            certain, self._held = self._held[: min(found)[1]], ""
            return certain, True
        keep = max(self._overlap(stop) for stop in self._stops)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        self._passed = max(0, self._passed - len(certain))
        return certain, False

    def finish(self) -> str:
        """What was held back, when no more comes."""
        return self._held

    def _overlap(self, stop: str) -> int:
        """The most characters at the end of the text that begin ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
