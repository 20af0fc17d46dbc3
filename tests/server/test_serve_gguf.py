"""``quantkit serve model.gguf``: from blocks of mixed types, on one rank and on two, comes what the decoded floats say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from decoder_fixtures import logits_of
from gguf_fixtures import gguf_values, metadata_of, write_gguf
from numpy.typing import NDArray

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.convert import keep_blocks
from quantkit.model.load import load_decoder
from quantkit.ops.ggml.encode import encode
from quantkit.text.tokenizer import load_tokenizer

TINY = Path(__file__).parents[1] / "data" / "models" / "llama"
PROMPT = "Once upon a time there was a"
TOKENS = 16
START_SECONDS = 90.0


def _floats(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    return (checkpoint.read(name).astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny trained Llama as Q4_K with values, down projections and the tied table in Q6_K."""
    checkpoint = open_checkpoint(TINY)
    config = {**checkpoint.config, "rope_theta": checkpoint.config["rope_parameters"]["rope_theta"]}
    tensors: dict[str, Any] = gguf_values(config, {name: _floats(checkpoint, name) for name in checkpoint.tensors})
    for name, value in tensors.items():
        if value.ndim == 2:
            kind = "Q6_K" if "attn_v" in name or "down" in name or "embd" in name else "Q4_K"
            tensors[name] = (kind, encode(np.ascontiguousarray(value), kind))
    data = json.loads((TINY / "tokenizer.json").read_bytes())
    words = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in data["model"]["merges"]],
        "tokenizer.ggml.token_type": [3 if index < 4 else 1 for index in range(len(words))],
    }
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", {**metadata_of(config), **keys}, tensors)


@pytest.fixture(scope="module")
def wanted(file: Path) -> str:
    """What the decoded floats say after PROMPT, token by token the likeliest."""
    tokenizer = load_tokenizer(file)
    decoder = load_decoder(open_checkpoint(file), dtype=torch.float32)
    prompt = tokenizer.encode(PROMPT, special=True)
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(TOKENS):
            ids.append(int(logits_of(decoder, [torch.tensor(ids)])[0][-1].argmax()))
    return tokenizer.decode(ids)[len(tokenizer.decode(prompt)) :]


def said(path: Path, *more: str) -> tuple[str, dict[str, Any]]:
    """What a server of ``path`` answers to PROMPT, and its report once it was asked to end."""
    command = [
        sys.executable,
        "-m",
        "quantkit",
        "serve",
        str(path),
        "--port",
        "0",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--json",
        *more,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        end = time.monotonic() + START_SECONDS
        log: list[str] = []
        while True:
            log.append(process.stderr.readline())
            found = re.search(r"at (http://127\.0\.0\.1:\d+)", log[-1])
            if found:
                break
            assert log[-1] and time.monotonic() < end, log
        body = {"model": path.stem, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{found[1]}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        return answer.json()["choices"][0]["text"], json.loads(out)
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.communicate()


@pytest.mark.parametrize("tp", [1, 2])
def test_a_file_is_served_from_its_blocks(file: Path, wanted: str, tp: int) -> None:
    text, report = said(file, "--tp", str(tp))
    assert text == wanted and report["tp"] == tp


def test_its_directory_of_blocks_is_served_too(file: Path, wanted: str, tmp_path: Path) -> None:
    keep_blocks(open_checkpoint(file), tmp_path / "kept", max_shard_size=1 << 30, overwrite=False)
    assert said(tmp_path / "kept")[0] == wanted
