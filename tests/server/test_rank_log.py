"""What a rank process logs is logged by the engine, with the rank's name."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from quantkit.runtime.start import start_engine

LLAMA = Path(__file__).parent.parent / "data" / "models" / "llama"
SITE = """
import logging, sys, threading, time
def say():
    log = logging.getLogger("quantkit")
    while not log.handlers:
        time.sleep(0.01)
    log.warning("warning: told %d", 7)
if "quantkit.runtime.worker" in sys.orig_argv:
    threading.Thread(target=say, daemon=True).start()
"""
"""Python runs this in each rank: a warning as soon as the rank listens."""


def test_a_rank_s_warnings_reach_the_engine_s_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    engine = start_engine(str(LLAMA), tp=2, device="cpu", max_model_len=32)
    try:
        until = time.monotonic() + 20
        while len(caplog.messages) < 2 and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        engine.close()
    assert sorted(caplog.messages) == ["rank 0: warning: told 7", "rank 1: warning: told 7"]
    assert {record.levelname for record in caplog.records} == {"WARNING"}
