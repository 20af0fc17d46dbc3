"""What is told while an engine starts: the bytes of its weights, of all ranks together."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.runtime.start import start_engine

LLAMA = Path(__file__).parent.parent / "data" / "models" / "llama"


@pytest.mark.parametrize("tp", [1, 2])
def test_the_bytes_of_all_ranks_are_told_as_they_come(tp: int) -> None:
    told: list[tuple[str, int, int]] = []
    start_engine(str(LLAMA), tp=tp, device="cpu", progress=lambda *progress: told.append(progress)).close()
    tensors = open_checkpoint(LLAMA).tensors
    total = sum(ref.nbytes * (tp if "norm" in name else 1) for name, ref in tensors.items())
    assert told[-1] == ("weights", total, total)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told}) and {name for name, _, _ in told} == {"weights"}
