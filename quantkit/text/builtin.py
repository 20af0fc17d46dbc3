"""English text that every Python installation carries, cut into calibration and held-out topics that share nothing.

It lets a machine without any data calibrate and measure; real text of the user's domain is better, and callers say so.
"""

from __future__ import annotations

import importlib
from typing import Literal

Part = Literal["calibration", "held-out"]


def builtin_text(part: Part) -> str:
    """The topics of ``pydoc_data.topics`` in name order: every fourth is held out, the rest calibrate."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    names = sorted(topics)
    chosen = [name for index, name in enumerate(names) if (index % 4 == 3) == (part == "held-out")]
    return "\n\n".join(topics[name].strip() for name in chosen) + "\n"
