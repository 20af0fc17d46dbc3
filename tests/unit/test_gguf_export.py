"""Hugging Face to GGUF: every family comes back from the file as it went in, and what a file cannot say is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from decoder_fixtures import logits_of, texts_of
from gguf_export_fixtures import (
    FAMILIES,
    checkpoint_of,
    config_of,
    values_of,
    write_family,
)
from numpy.typing import NDArray

from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import TABLE, spec_for
from quantkit.checkpoint.gguf_export import ExportPlan, ExportTensor, export_plan, read_rows
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.errors import InputError
from quantkit.formats.gguf import u32
from quantkit.model.load import load_decoder
from quantkit.model.rope import frequencies

IDS = {"tokenizer.ggml.bos_token_id": u32(1), "tokenizer.ggml.eos_token_id": u32(2)}
FIELDS = ("layers", "dims", "head_dim", "linears", "norms", "activation", "tied", "attention_scale", "attention_softcap", "logit_softcap")
MORE = ("eps", "windows", "max_positions", "bos_ids", "eos_ids", "rotary_dim", "moe", "position_table")


def plan_of(config: dict[str, Any]) -> tuple[ExportPlan, dict[str, NDArray[np.float32]]]:
    values = values_of(config)
    return export_plan(config, spec_for(config), values), values


def tensor_of(plan: ExportPlan, name: str) -> ExportTensor:
    return next(tensor for tensor in plan.tensors if tensor.name == name)


def metadata_of(family: str, **changes: Any) -> dict[str, Any]:
    plan, _ = plan_of({**config_of(family), **changes})
    return {key: value.value for key, value in plan.metadata.items()}


def assert_same_model(got: ModelSpec, want: ModelSpec) -> None:
    for name in (*FIELDS, *MORE):
        assert getattr(got, name) == getattr(want, name), name
    if want.position_table is not None:
        return
    for ours, theirs in zip(got.ropes, want.ropes, strict=True):
        assert ours.theta == theirs.theta
        for length in (1, want.max_positions):
            found, scale = frequencies(ours, got.rotary_dim, got.max_positions, length)
            expected, scale_of = frequencies(theirs, want.rotary_dim, want.max_positions, length)
            np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=2e-5)
            assert scale == pytest.approx(scale_of, rel=1e-6)


# the way there and back


def test_every_row_of_the_table_is_here() -> None:
    rows = {config_of(family)["model_type"] for family in FAMILIES}
    assert rows == {arch.model_type for arch in TABLE if arch.gguf}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_from_its_file(tmp_path: Path, family: str) -> None:
    """The same tensors bit for bit, an equal spec, and equal logits."""
    config = config_of(family)
    values = values_of(config)
    found = open_checkpoint(write_family(tmp_path / "m.gguf", config, values, IDS))
    assert_same_model(spec_for(found.config), spec_for(config))
    assert set(found.tensors) == set(values)
    for name, value in values.items():
        assert found.dtype(name) == "F32" and tuple(found.tensors[name].shape) == value.shape, name
        np.testing.assert_array_equal(found.read(name), value, err_msg=name)
    texts = texts_of((9, 40))
    with torch.inference_mode():
        want = logits_of(load_decoder(checkpoint_of(config, values), dtype=torch.float32), texts)
        got = logits_of(load_decoder(found, dtype=torch.float32), texts)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert theirs.std() > 0.05, "the model says something"


@pytest.mark.parametrize("family", ["llama-biases", "mixtral", "phi3", "gpt2", "qwen2-moe"])
def test_any_rows_are_those_of_the_whole(family: str) -> None:
    """Cut at heads where they are interleaved and within experts; and only what is asked for is read."""
    plan, values = plan_of(config_of(family))
    seen: list[int] = []

    def read(name: str, index: tuple[slice, ...] | None) -> NDArray[np.float32]:
        part = values[name] if index is None else values[name][index]
        seen.append(part.size)
        return part

    for tensor in plan.tensors:
        whole = read_rows(tensor, range(tensor.rows), read)
        unit = tensor.head_dim or 1
        for start, stop in ((0, tensor.rows), (unit, 3 * unit), (tensor.rows - unit, tensor.rows), (tensor.rows // 2, tensor.rows // 2)):
            if 0 <= start <= stop <= tensor.rows:
                seen.clear()
                part = read_rows(tensor, range(start, stop), read)
                np.testing.assert_array_equal(part, whole[start:stop], err_msg=tensor.name)
                if len(tensor.shape) > 1:
                    assert sum(seen) == (stop - start) * tensor.shape[-1], tensor.name
        if len(tensor.shape) == 3:
            rows = tensor.shape[1]
            np.testing.assert_array_equal(read_rows(tensor, range(rows - 1, rows + 2), read), whole[rows - 1 : rows + 2])


# what a file says


def test_metadata_are_those_of_the_format() -> None:
    found = metadata_of("llama", _name_or_path="/somewhere/Some-Model/")
    assert list(found)[:4] == ["general.architecture", "general.type", "general.name", "general.size_label"]
    want = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Some-Model",
        "general.size_label": "128K",
        "llama.block_count": 3,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.attention.key_length": 24,
        "llama.attention.value_length": 24,
        "llama.vocab_size": 131,
        "llama.rope.dimension_count": 24,
        "llama.rope.freq_base": 500.0,
        "general.quantization_version": 2,
    }
    assert found == want
    assert "general.name" not in metadata_of("llama")


@pytest.mark.parametrize(
    ("family", "want"),
    [
        (
            "mixtral",
            {"general.architecture": "llama", "llama.expert_count": 4, "llama.expert_used_count": 2, "llama.feed_forward_length": 96},
        ),
        ("qwen", {"qwen.feed_forward_length": 192, "qwen.attention.layer_norm_rms_epsilon": 1e-6, "qwen.rope.freq_base": 500.0}),
        ("qwen-partial", {"qwen.rope.dimension_count": 8}),
        (
            "qwen2-moe",
            {
                "qwen2moe.feed_forward_length": 96,
                "qwen2moe.expert_feed_forward_length": 32,
                "qwen2moe.expert_shared_feed_forward_length": 64,
                "qwen2moe.expert_count": 5,
            },
        ),
        ("gemma2", {"gemma2.attention.sliding_window": 5, "gemma2.attn_logit_softcapping": 4.0, "gemma2.final_logit_softcapping": 3.0}),
        ("gemma3", {"gemma3.attention.sliding_window": 5, "gemma3.rope.freq_base_swa": 100.0, "gemma3.rope.scaling.factor": 8.0}),
        ("phi3-partial", {"phi3.attention.sliding_window": 0, "phi3.rope.dimension_count": 12}),
        ("phi3-longrope", {"phi3.rope.scaling.type": "longrope", "phi3.rope.scaling.original_context_length": 16}),
        ("gpt2", {"gpt2.attention.layer_norm_epsilon": 1e-5, "gpt2.feed_forward_length": 256}),
        ("mistral", {"llama.attention.sliding_window": 5}),
        ("llama-yarn", {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}),
    ],
)
def test_a_family_has_its_own_keys(family: str, want: dict[str, Any]) -> None:
    found = metadata_of(family)
    assert {key: found.get(key) for key in want} == want


def test_keys_that_readers_do_not_need_are_not_there() -> None:
    assert not any("rope" in key or "key_length" in key for key in metadata_of("gpt2"))
    assert not any("sliding" in key for family in ("mistral-full", "qwen2", "gemma3-full", "llama") for key in metadata_of(family))
    assert not any("pattern" in key for family in ("gemma2", "gemma3", "mistral", "phi3") for key in metadata_of(family))
    assert not any("yarn_" in key or key.endswith("attn_factor") for key in metadata_of("llama-yarn"))
    assert not any("scaling" in key for key in metadata_of("llama-3"))


def test_layers_that_no_reader_would_guess_are_listed() -> None:
    assert metadata_of("gemma3-types")["gemma3.attention.sliding_window_pattern"].tolist() == [True, False, True]
    assert metadata_of("gemma2-types")["gemma2.attention.sliding_window_pattern"].tolist() == [False, False, True, False]
    assert metadata_of("qwen2-sliding-tied")["qwen2.attention.sliding_window_pattern"].tolist() == [False, True, True]


def test_the_scale_of_longrope_is_that_of_its_stretch() -> None:
    assert metadata_of("phi3-longrope")["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + np.log(4) / np.log(16)) ** 0.5)
    given = {"attention_factor": 1.19, "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    changed = metadata_of("phi3-longrope", rope_parameters=given)
    assert changed["phi3.rope.scaling.attn_factor"] == 1.19


def test_readers_take_yarns_scale_as_a_factor_on_their_own() -> None:
    scaling = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.9}
    found = metadata_of("llama-yarn", rope_parameters=scaling)
    assert found["llama.rope.scaling.yarn_attn_factor"] == 0.9
    assert found["llama.rope.scaling.attn_factor"] == pytest.approx(0.9 / (1 + 0.1 * np.log(4)))


@pytest.mark.parametrize(
    ("family", "arch"),
    [
        ("llama-biases", gguf.MODEL_ARCH.LLAMA),
        ("mixtral", gguf.MODEL_ARCH.LLAMA),
        ("qwen", gguf.MODEL_ARCH.QWEN),
        ("qwen2", gguf.MODEL_ARCH.QWEN2),
        ("qwen2-moe", gguf.MODEL_ARCH.QWEN2MOE),
        ("qwen3", gguf.MODEL_ARCH.QWEN3),
        ("qwen3-moe", gguf.MODEL_ARCH.QWEN3MOE),
        ("gemma2", gguf.MODEL_ARCH.GEMMA2),
        ("gemma3", gguf.MODEL_ARCH.GEMMA3),
        ("phi3-longrope", gguf.MODEL_ARCH.PHI3),
        ("gpt2", gguf.MODEL_ARCH.GPT2),
    ],
)
def test_tensors_are_called_as_the_gguf_package_calls_them(family: str, arch: Any) -> None:
    plan, values = plan_of(config_of(family))
    names = gguf.get_tensor_name_map(arch, spec_for(config_of(family)).layers)
    mapped = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in values if ".experts." not in name}
    if any(".experts." in name for name in values):  # the package knows them stacked
        mapped |= {f"blk.{layer}.ffn_{kind}_exps.weight" for layer in range(3) for kind in ("gate", "up", "down")}
    tables = {"rope_factors_long.weight", "rope_factors_short.weight"} if family == "phi3-longrope" else set()
    assert {tensor.name for tensor in plan.tensors} == mapped | tables


def test_what_readers_want_in_float32() -> None:
    plan, _ = plan_of(config_of("qwen2-moe"))
    kept = {
        tensor.name.removeprefix("blk.0.")
        for tensor in plan.tensors
        if tensor.float_only and not tensor.name.startswith(("blk.1", "blk.2"))
    }
    assert kept == {
        *("attn_norm.weight", "ffn_norm.weight", "attn_q.bias", "attn_k.bias", "attn_v.bias"),
        *("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "output_norm.weight"),
    }
    assert tensor_of(plan_of(config_of("gpt2"))[0], "position_embd.weight").float_only
    assert not tensor_of(plan, "blk.0.ffn_gate_exps.weight").float_only and not tensor_of(plan, "token_embd.weight").float_only


def test_sources_are_named() -> None:
    plan, _ = plan_of(config_of("mixtral"))
    stacked = tensor_of(plan, "blk.1.ffn_up_exps.weight")
    assert stacked.shape == (4, 96, 64)
    assert stacked.source_names == tuple(f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight" for expert in range(4))
    assert tensor_of(plan, "blk.1.attn_q.weight").head_dim == 16 and tensor_of(plan, "blk.1.attn_v.weight").head_dim is None
    assert tensor_of(plan_of(config_of("gemma3"))[0], "output_norm.weight").offset == 1.0
    (source,) = tensor_of(plan_of(config_of("gpt2"))[0], "blk.0.ffn_up.weight").sources
    assert source.transposed


def test_sizes_are_for_people() -> None:
    assert metadata_of("mixtral")["general.size_label"].startswith("4x")
    assert metadata_of("gpt2")["general.size_label"] == "163K"


def test_quantized_linears_are_known_by_their_module() -> None:
    config = config_of("llama")
    names = set(values_of(config))
    packed = {name for name in names if name.endswith("_proj.weight")}
    parts = {name.removesuffix("weight") + part for name in packed for part in ("qweight", "qzeros", "scales")}
    plan = export_plan(config, spec_for(config), (names - packed) | parts)
    assert tensor_of(plan, "blk.0.ffn_up.weight").source_names == ("model.layers.0.mlp.up_proj.weight",)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("mistral", "ignores the sliding window of a mistral model: beyond 5 tokens"),
        ("phi3", "beyond 5 tokens"),
        ("qwen2-sliding-tied", "beyond 4 tokens"),
        ("llama-dynamic", "dynamic rotary scaling: beyond 64 tokens"),
        ("qwen3-yarn", "takes 32 for yarn's beta_fast, not 8"),
        ("phi3-longrope", "when its context is more than 16 tokens"),
    ],
)
def test_where_readers_differ_the_plan_says_so(family: str, words: str) -> None:
    (note,) = plan_of(config_of(family))[0].notes
    assert words in note


def test_most_models_need_no_note() -> None:
    assert not any(plan_of(config_of(family))[0].notes for family in ("llama", "gemma2-types", "gemma3", "llama-yarn", "gpt2", "mixtral"))
    assert not plan_of({**config_of("mistral"), "sliding_window": 64})[0].notes


# refusals

PLAIN = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act: is gelu, expected silu: GGUF cannot say otherwise"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function: is gelu, expected gelu_new"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings: is false, expected true of a gemma2 model"),
        ("qwen2-moe", {"tie_word_embeddings": True}, "tie_word_embeddings: is true, expected false"),
        ("qwen3", {"attention_bias": True}, "attention_bias: gives self_attn.o_proj a bias, expected none there in a qwen3 model"),
        ("qwen2", {"head_dim": 24}, "head_dim: makes 4 heads 96 wide, expected 64, the hidden size"),
        ("qwen", {"num_key_value_heads": 2}, "num_key_value_heads: is 2, expected 4, a key head for each query head"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: rotates 12 of 24, expected whole heads"),
        ("gemma2", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar: is 20, expected 16"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping: is 30.0, expected none in a gemma3 model"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: is 30.0"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping: is none, expected a number in a gemma2 model"),
        ("gemma2", {"layer_types": ["full_attention"] * 4}, "layer_types: give no layer a sliding window, expected one in some layers"),
        ("qwen2-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step, mlp_only_layers: leave some layers without experts"),
        ("qwen2-moe", {"norm_topk_prob": True}, "norm_topk_prob: is true, expected false of a qwen2_moe model"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob: is false, expected true of a qwen3_moe model"),
        ("qwen3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}}, "rope_type: is llama3, expected a kind that a qwen3"),
        ("llama-yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate: is false, expected true"),
        ("llama-yarn", {"rope_parameters": {"rope_type": "yarn", "factor": -4.0}}, "factor: is -4.0, expected a positive number"),
        (
            "llama-longrope",
            {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}},
            "long_factor: is not a factor per rotary pair",
        ),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention: is linear, expected the default kind",
        ),
        (
            "gemma2",
            {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": {**PLAIN, "rope_theta": 100.0}}},
            "rope_parameters: differ from layer to layer",
        ),
    ],
)
def test_what_a_reader_would_compute_otherwise_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    config = {**config_of(family), **changes}
    with pytest.raises(InputError) as caught:
        export_plan(config, spec_for(config), values_of(config))
    assert message in caught.value.line and "\n" not in caught.value.line


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    config = config_of("llama")
    spec, names = spec_for(config), set(values_of(config))
    block = "model.layers.1."
    for wrong, message in (
        (names - {f"{block}mlp.up_proj.weight"}, "mlp.up_proj.weight: is missing from the checkpoint"),
        (names | {f"{block}mlp.up_proj.bias"}, "mlp.up_proj.bias: is no tensor of a llama model"),
        (names | {f"{block}mlp.extra.weight"}, "mlp.extra.weight: is no tensor of a llama model"),
        (names | {"model.layers.3.mlp.up_proj.weight"}, "layers.3.mlp.up_proj.weight: is no tensor"),
        (names - {"lm_head.weight"}, "lm_head.weight: is missing"),
        (names | {"lm_head.bias"}, "lm_head.bias: is no tensor of a llama model"),
    ):
        with pytest.raises(InputError) as caught:
            export_plan(config, spec, wrong)
        assert message in caught.value.line
    export_plan(config, spec, names | {f"{block}self_attn.rotary_emb.inv_freq"})
    tied = config_of("llama-tied")
    export_plan(tied, spec_for(tied), {*values_of(tied), "lm_head.weight"})
    biased = config_of("qwen2")
    with pytest.raises(InputError, match=r"q_proj\.bias: is missing"):
        export_plan(biased, spec_for(biased), set(values_of(biased)) - {"model.layers.0.self_attn.q_proj.bias"})
