"""Checkpoints as transformers itself writes them, with its config.json; stacked experts through quantize; and where names may be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_fixtures import config_of, logits_of, random_twin, texts_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.arch import table
from quantkit.arch.table import TABLE
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.commands import quantize
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.model.load import load_decoder
from quantkit.verify import verify

SOURCE = Path(table.__file__).parent.parent
SPARSE = ("mixtral", "qwen2-moe-steps", "qwen3-moe-dense-first")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def write(root: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    root.mkdir()
    (root / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, root / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.mark.parametrize("family", ["phi3", "phi3-partial", "gpt2", "gpt2-inner", *SPARSE])
def test_what_transformers_saves_gives_its_logits(family: str, tmp_path: Path) -> None:
    """Config keys are its own, too: it writes Qwen3-MoE's number of experts as ``num_local_experts``, and leaves defaults out."""
    model, _ = random_twin(config_of(family))
    model.save_pretrained(tmp_path)
    decoder, texts = load_decoder(open_checkpoint(tmp_path), dtype=torch.float64), texts_of((19, 7))
    want = [model(text[None]).logits[0] for text in texts]
    assert max(float((got - logits).abs().max()) for got, logits in zip(logits_of(decoder, texts), want, strict=True)) < 1e-8


def test_every_byte_of_stacked_experts_is_of_one_tensor(tmp_path: Path) -> None:
    """Views, not copies: their ranges cover the file's data once."""
    model, checkpoint = random_twin(config_of("qwen3-moe"))
    stored = open_checkpoint(write(tmp_path / "stacked", dict(checkpoint.config), dict(model.state_dict())))
    spans = sorted((ref.offset, ref.offset + ref.nbytes) for ref in stored.tensors.values())
    assert all(stop == start for (_, stop), (start, _) in pairwise(spans))
    assert spans[-1][1] == (tmp_path / "stacked" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("family", SPARSE)
def test_stacked_experts_are_quantized_as_separate_ones(family: str, tmp_path: Path) -> None:
    """The artifacts hold the same tensors: every expert by itself, and routers as they were."""
    config = config_of(family) | {"head_dim": 16} | ({} if family == "mixtral" else {"moe_intermediate_size": 32})
    model, apart = random_twin(config, torch.float32)
    outs = []
    for name, values in (("stacked", model.state_dict()), ("apart", apart.values)):
        path = write(tmp_path / name, config, dict(values))
        outs.append(tmp_path / f"{name}-out")
        quantize.run(QuantizeOptions(str(path), outs[-1], method="rtn", format="gptq", group_size=16, device="cpu"))
        assert verify(outs[-1], deep=True).defects == []
    first, second = (load_file(out / "model.safetensors") for out in outs)
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
    kept = [name for name in first if name.endswith((".gate.weight", "shared_expert_gate.weight"))]
    assert len(kept) == sum(name.endswith((".gate.weight", "shared_expert_gate.weight")) for name in apart.values) > 0
    assert all(torch.equal(first[name].float(), apart.values[name].to(first[name].dtype).float()) for name in kept)
    assert any(name.endswith(("experts.1.down_proj.qweight", "experts.1.w2.qweight")) for name in first)


def test_no_other_file_names_a_family_or_its_modules() -> None:
    """A row would not be enough if code elsewhere asked for a model by name. GGUF's words for tokenizers, and the models that llama.cpp's
    choice of types looks at, are no families."""
    families = {arch.model_type for arch in TABLE} | {name for arch in TABLE for name in arch.hf_classes}
    modules = {linear.name for arch in TABLE for linear in arch.linears} | {norm.name for arch in TABLE for norm in arch.norms}
    known = re.compile(f"[\"']({'|'.join(re.escape(word) for word in sorted(families | modules))})[\"']")
    allowed = {
        "text/gguf_tokenizer.py": {"gpt2", "llama", "qwen2"},
        "text/gguf_vocabulary.py": {"gpt2", "llama"},
        "text/vocabulary.py": {"gpt2", "llama"},
        "text/tiktoken_ranks.py": {"gpt2", "qwen2"},
        "text/pre_tokenizers.py": {"qwen2"},
        "mixtures.py": {"llama", "qwen2"},
        "checkpoint/gguf_config.py": {"gemma2"},
        "arch/spec.py": {"mlp.up_proj"},
    }  # the last, in a docstring; gemma2 in GGUF has a query scale that no key states
    assert known.search((SOURCE / "arch" / "table.py").read_text())
    for path in sorted(SOURCE.rglob("*.py")):
        where = path.relative_to(SOURCE).as_posix()
        if where != "arch/table.py":
            assert {match[1] for match in known.finditer(path.read_text())} <= allowed.get(where, set()), where


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_the_first_names_of_long_rotary_scaling_are_read(kind: str) -> None:
    """Phi-3 called it "su", then "yarn", which with a factor for every pair it is not; both sides of the original 16 tokens."""
    model, twin = random_twin(config_of("phi3-old-config"))  # "longrope", as it is called now
    scaling, texts = twin.config["rope_scaling"] | {"type": kind}, texts_of((9, 23))
    checkpoint: Any = replace(twin, config={**twin.config, "rope_scaling": scaling})
    got = logits_of(load_decoder(checkpoint, dtype=torch.float64), texts)
    assert max(float((g - model(text[None]).logits[0]).abs().max()) for g, text in zip(got, texts, strict=True)) < 1e-8
