"""Embeddings at 8 bits against the libraries that read them: compressed-tensors decompresses them, transformers computes with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors.torch import load_file

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.layouts.table import PackedTable
from quantkit.model.decoder import Batch
from quantkit.model.load import load_decoder

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(1800)]


class Oracle(Protocol):
    def run(self, *arguments: object) -> None: ...


Asks = Callable[[str, str], Oracle]
MODELS = Path(__file__).parent.parent / "data" / "models"
FOUR = ("--method", "rtn", "--format", "compressed-tensors", "--group-size", "32", "--sym")
ROWS: dict[str, tuple[str, ...]] = {
    "llama": (*FOUR, "--override", "embed_tokens:bits=8"),
    "qwen2": (*FOUR, "--override", "embed_tokens:bits=8", "--override", "lm_head:bits=8"),
    "gemma3": (*FOUR, "--override", "embed_tokens:bits=8"),
    "llama-w8a8": ("--method", "w8a8", "--samples", "8", "--seq-len", "64", "--override", "embed_tokens:bits=8"),
}
"""Tied models all: the head in floats and at 8 bits, beside linears of 4 bits and of 8."""
PACKED: dict[str, str] = {
    "groups": "embed_tokens:bits=8,group_size=32",
    "asymmetric rows": "embed_tokens:bits=8,sym=false",
    "asymmetric groups": "embed_tokens:bits=8,group_size=64,sym=false",
    "four bits": "embed_tokens:bits=4",
}
IDS = [(17 * i * i + 5 * i + 11) % 1000 + 8 for i in range(48)]


def quantized(model: str, options: tuple[str, ...], out: Path) -> Path:
    subprocess.run([sys.executable, "-m", "quantkit", "quantize", str(MODELS / model), str(out), "--quiet", *options], check=True)
    return out


@pytest.mark.parametrize("name", ROWS)
def test_transformers_loads_an_embedding_at_8_bits_and_computes_what_our_runtime_does(
    name: str, oracle: Asks, tmp_path: Path, figures: list[str]
) -> None:
    artifact = quantized(name.removesuffix("-w8a8"), ROWS[name], tmp_path / "artifact")
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    oracle("compressed-tensors", "embedding_reference.py").run(artifact, tmp_path / "ids.json", tmp_path / "out")
    theirs, facts = load_file(tmp_path / "out.safetensors"), json.loads((tmp_path / "out.json").read_text())
    assert "refused" not in facts, facts["refused"]
    scale = ["model.embed_tokens.embed_scale"] if name == "gemma3" else []  # a buffer that no checkpoint holds
    assert facts["complaints"] == {"missing_keys": scale, "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    assert facts["quantized"] == 28 + 1 + (name == "qwen2")

    decoder = load_decoder(open_checkpoint(artifact), dtype=torch.float32)
    assert isinstance(decoder.embedding.weight, PackedTable)
    rows = decoder.embedding.weight(torch.arange(1024))
    assert torch.equal(rows, theirs["decompressed"]) and torch.equal(rows, theirs["loaded"])
    assert torch.equal(decoder.head.op.weight(), theirs["head"])
    ours = decoder.logits(decoder.forward(torch.tensor(IDS), Batch(torch.arange(len(IDS)), (len(IDS),), None)))
    error = float((theirs["logits"] - ours).norm() / ours.norm())
    figures.append(f"{name}, embedding at 8 bits: logits of transformers differ by {error:.2e} relative")
    assert error < 1e-2


@pytest.mark.parametrize("name", PACKED)
def test_compressed_tensors_decompresses_a_packed_embedding_to_our_rows(
    name: str, oracle: Asks, tmp_path: Path, figures: list[str]
) -> None:
    artifact = quantized("qwen2", (*FOUR, "--override", PACKED[name]), tmp_path / "artifact")
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    oracle("compressed-tensors", "embedding_reference.py").run(artifact, tmp_path / "ids.json", tmp_path / "out")
    theirs, facts = load_file(tmp_path / "out.safetensors"), json.loads((tmp_path / "out.json").read_text())
    table = load_decoder(open_checkpoint(artifact), dtype=torch.float32).embedding.weight
    assert isinstance(table, PackedTable) and torch.equal(table(torch.arange(1024)), theirs["decompressed"])
    assert facts["same_scheme"] == ["model.embed_tokens"] and facts["quantized"] == 29
    figures.append(f"a packed embedding, {name}: transformers {'refuses: ' + facts['refused'] if 'refused' in facts else 'loads it'}")
