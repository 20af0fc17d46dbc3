"""``--override 'embed_tokens:bits=8'`` on the command line: what it says, what the next commands say, and the one line that refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
FORMAT = ("--method", "rtn", "--format", "compressed-tensors", "--group-size", "32", "--sym")


@pytest.mark.parametrize(
    ("override", "stored", "warning"),
    [
        ("embed_tokens:bits=8", "8 bits, whole rows, symmetric", "an embedding of whole rows runs here and in transformers"),
        ("embed_tokens:bits=8,group_size=32", "8 bits, group 32, symmetric", "a packed embedding runs here, and vLLM reads it"),
        ("embed_tokens:bits=8,sym=false", "8 bits, whole rows, asymmetric", "a packed embedding runs here; vLLM reads symmetric ones"),
    ],
)
def test_an_embedding_at_8_bits_from_quantize_to_unshard(
    quantkit: Run, models: Path, tmp_path: Path, override: str, stored: str, warning: str
) -> None:
    out = tmp_path / "out"
    done = quantkit("quantize", models / "qwen2", out, *FORMAT, "--override", override)
    assert done.code == 0, done.err
    assert f"embedding                  {stored}, and the head untied from it" in done.out
    assert warning in " ".join(done.err.split())
    shown = json.loads(quantkit("inspect", out, "--json").out)
    assert [item["count"] for item in shown["linears"] if item["format"].endswith("8 bits (embedding)")] == [1]
    assert shown["tied"] is False
    for arguments in (
        ("verify", out, "--deep"),
        ("plan", out, "--tp", "2"),
        ("shard", out, tmp_path / "shards", "--tp", "2"),
        ("verify", tmp_path / "shards", "--deep"),
        ("inspect", tmp_path / "shards"),
        ("unshard", tmp_path / "shards", tmp_path / "again"),
        ("convert", out, tmp_path / "floats"),
        ("verify", tmp_path / "floats", "--deep"),
    ):
        result = quantkit(*arguments)
        assert result.code == 0, (arguments, result.out, result.err)
    assert (tmp_path / "again" / "SHA256SUMS").read_bytes() == (out / "SHA256SUMS").read_bytes()


@pytest.mark.parametrize(
    ("options", "name"), [(("--method", "gptq"), "gptq"), (("--method", "awq"), "awq"), (("--method", "nf4"), "bnb")], ids=str
)
def test_a_format_that_cannot_hold_it_refuses_in_one_line(
    quantkit: Run, models: Path, tmp_path: Path, options: tuple[str, ...], name: str
) -> None:
    refused = quantkit("quantize", models / "qwen2", tmp_path / "out", *options, "--override", "embed_tokens:bits=8")
    assert refused.code == 2 and refused.out == ""
    first, *hints = refused.err.strip().splitlines()
    assert first.startswith(
        f"error: model.embed_tokens: cannot be quantized in the {name} format, whose loaders read an embedding as floats"
    )
    assert "--format compressed-tensors" in first and all(hint.startswith("hint: ") for hint in hints)
    assert not list(tmp_path.iterdir())
