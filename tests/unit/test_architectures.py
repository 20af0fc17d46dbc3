"""The architecture table: what its rows say of each family, the names that checkpoints use, and that a new row is all it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_fixtures import FAMILIES, MemoryCheckpoint, config_of, logits_of, plan_of, random_twin, rope, texts_of
from quantize_fixtures import two_layers
from safetensors.torch import save_file
from torch import Tensor

from quantkit.arch import table
from quantkit.arch.spec import ScaleGroup
from quantkit.arch.table import TABLE, spec_for
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.comm import Comm, run_threads
from quantkit.commands import quantize
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.errors import InputError
from quantkit.model.load import load_decoder
from quantkit.verify import verify

LENGTHS = (23, 12)
BAR = 1e-8


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    return max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True))


def logits(checkpoint: Any) -> list[Tensor]:
    return logits_of(load_decoder(checkpoint, dtype=torch.float64), texts_of(LENGTHS))


def saved(root: Path, config: Mapping[str, Any], values: Mapping[str, Tensor]) -> Path:
    root.mkdir()
    (root / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in values.items()}, root / "model.safetensors")
    return root


# rows


def test_every_row_is_compared_with_transformers() -> None:
    """Qwen's first generation is not in transformers; it is below."""
    assert {family["model_type"] for family in FAMILIES.values()} | {"qwen"} == {arch.model_type for arch in TABLE}
    assert len({arch.name for arch in TABLE}) == len(TABLE)


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_rows_and_modules_agree(family: str) -> None:
    """Stored tensors hold the rows of their roles without gap or overlap; every linear of a block is in one, and has one scale group."""
    spec = spec_for(config_of(family))
    for layer in range(spec.layers):
        paths, modules = spec.block_linears(layer), spec.block_modules(layer)
        assert [role for roles in modules.values() for role in roles] == list(paths)
        for path, roles in modules.items():
            assert {paths[role] for role in roles} == {path}
            starts = [spec.rows(role).start for role in roles]
            assert starts == [0, *(spec.rows(role).stop for role in roles[:-1])]
            assert {spec.stored_shape(role) for role in roles} == {(spec.rows(roles[-1]).stop, spec.linear_shape(roles[0])[1])}
        targets = [role for group in spec.scale_groups(layer) for role in group.targets]
        assert len(targets) == len(set(targets)) and set(targets) <= set(paths)
        assert set(paths) - set(targets) == ({"down"} if family.startswith("gpt2") else set())
        for group in spec.scale_groups(layer):
            assert group.prev in spec.norms or group.prev in paths
            assert len({spec.linears[role].inp for role in group.targets}) == 1
    assert spec.all_linears() == [path for n in range(spec.layers) for path in spec.block_modules(n)] + ([] if spec.tied else ["lm_head"])


def test_a_fused_tensor_is_rows_of_its_roles() -> None:
    spec = spec_for(config_of("phi3"))  # 6 heads and 3 KV heads of 12, an MLP of 80
    assert spec.block_modules(1) == {
        "model.layers.1.self_attn.qkv_proj": ("q", "k", "v"),
        "model.layers.1.self_attn.o_proj": ("o",),
        "model.layers.1.mlp.gate_up_proj": ("gate", "up"),
        "model.layers.1.mlp.down_proj": ("down",),
    }
    assert [spec.rows(role) for role in ("q", "k", "v", "o")] == [range(72), range(72, 108), range(108, 144), range(48)]
    assert spec.rows("up") == range(80, 160) and spec.stored_shape("up") == (160, 48) and spec.stored_shape("k") == (144, 48)


def test_no_scale_passes_an_activation() -> None:
    """A gated MLP multiplies by up's output, so its rows can be scaled; without a gate the activation stands between."""
    groups = (ScaleGroup("pre_attention", ("q", "k", "v")), ScaleGroup("v", ("o",)), ScaleGroup("pre_ffn", ("up",)))
    assert spec_for(config_of("gpt2")).scale_groups(0) == groups
    assert ScaleGroup("up", ("down",)) in spec_for(config_of("phi3")).scale_groups(0)


# configurations


def test_gpt2_speaks_its_own_keys() -> None:
    spec = spec_for(config_of("gpt2"))
    assert (spec.layers, spec.dims["hidden"].size, spec.dims["heads"].size, spec.dims["ffn"].size, spec.head_dim) == (3, 48, 6, 192, 8)
    assert (spec.eps, spec.activation, spec.tied, spec.max_positions, spec.rotary_dim) == (1e-5, "gelu_tanh", True, 64, 0)
    inner = spec_for(config_of("gpt2-inner"))
    assert (inner.dims["ffn"].size, inner.eps, inner.activation) == (80, 1e-2, "gelu")


@pytest.mark.parametrize(
    ("family", "change", "where"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "relu"}, "activation_function"),
        ("gpt2", {"n_embd": 50}, "num_attention_heads"),
        ("phi3", {"partial_rotary_factor": 0.26}, "partial_rotary_factor"),
        ("phi3", {"partial_rotary_factor": True}, "partial_rotary_factor"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
    ],
)
def test_what_a_row_does_not_compute_is_refused(family: str, change: dict[str, Any], where: str) -> None:
    values = config_of(family)
    values["rope_parameters"] = {key: v for key, v in values.get("rope_parameters", {}).items() if key != "partial_rotary_factor"}
    with pytest.raises(InputError, match=rf"config\.json: {where}"):
        spec_for(values | change)


def test_gemma2_slides_in_every_other_layer() -> None:
    spec = spec_for(config_of("gemma2"))
    assert spec.windows == (5, None, 5) and (spec.attention_softcap, spec.logit_softcap) == (4.0, 3.0)
    assert spec_for({"model_type": "gemma2", **{k: v for k, v in config_of("gemma2").items() if "cap" not in k}}).attention_softcap == 50.0


# Qwen of the first generation


QWEN: dict[str, Any] = {
    "model_type": "qwen",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "kv_channels": 8,
    "layer_norm_epsilon": 1e-3,
    "rotary_emb_base": 500.0,
    "rotary_pct": 1.0,
    "seq_length": 64,
    "max_position_embeddings": 512,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "scale_attn_weights": True,
    "no_bias": True,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def qwen_and_its_twin() -> tuple[Any, MemoryCheckpoint]:
    """A Qwen2 model with as many KV heads as heads, and the Qwen checkpoint that is the same model."""
    changes = {"num_key_value_heads": 6, "head_dim": 8, "rms_norm_eps": 1e-3, "use_sliding_window": False}
    model, twin = random_twin(config_of("qwen2") | changes | rope("default"))
    old, values = twin.values, {}
    for name, module in {"embed_tokens": "wte", "norm": "ln_f"}.items():
        values[f"transformer.{module}.weight"] = old[f"model.{name}.weight"]
    values["lm_head.weight"] = old["lm_head.weight"]
    renamed = {"self_attn.o_proj": "attn.c_proj", "mlp.gate_proj": "mlp.w2", "mlp.up_proj": "mlp.w1", "mlp.down_proj": "mlp.c_proj"}
    renamed |= {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}
    for layer in range(3):
        here, there = f"model.layers.{layer}.", f"transformer.h.{layer}."
        values |= {f"{there}{new}.weight": old[f"{here}{name}.weight"] for name, new in renamed.items()}
        for kind in ("weight", "bias"):
            values[f"{there}attn.c_attn.{kind}"] = torch.cat([old[f"{here}self_attn.{role}_proj.{kind}"] for role in "qkv"])
    return model, MemoryCheckpoint(QWEN, values)


def test_qwen_of_the_first_generation_is_an_equal_qwen2() -> None:
    model, checkpoint = qwen_and_its_twin()
    want = [model(text[None]).logits[0] for text in texts_of(LENGTHS)]
    assert worst(logits(checkpoint), want) < BAR
    spec = spec_for(QWEN)
    assert spec.dims["ffn"].size == 80 and spec.max_positions == 64 and spec.dims["kv_heads"].size == 6
    buffers = {f"transformer.h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(3)}
    buffers["transformer.rotary_emb.inv_freq"] = torch.ones(4)
    assert worst(logits(replace(checkpoint, values={**checkpoint.values, **buffers})), want) < BAR
    for tp in (2, 4):
        plan = plan_of(checkpoint, tp)

        def rank(comm: Comm, plan: Any = plan) -> list[Tensor]:
            with torch.no_grad():
                return logits_of(load_decoder(checkpoint, dtype=torch.float64, plan=plan, comm=comm), texts_of(LENGTHS))

        assert worst(run_threads(tp, rank)[tp - 1], want) < BAR


def test_a_qwen_that_rotates_a_part_or_has_biases() -> None:
    assert spec_for(QWEN | {"rotary_pct": 0.5}).rotary_dim == 4
    with pytest.raises(InputError, match=r"config\.json: no_bias"):
        spec_for(QWEN | {"no_bias": False})
    with pytest.raises(InputError, match=r"config\.json: intermediate_size"):
        spec_for(QWEN | {"intermediate_size": 1})


# names that checkpoints use


def transformers_directory(root: Path, model: Any, config: Mapping[str, Any]) -> Path:
    """What transformers saves, beside the config of the test, which other tests compare with."""
    model.save_pretrained(root)
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe-steps", "qwen3-moe"])
def test_experts_are_read_apart_or_stacked(family: str, tmp_path: Path) -> None:
    """As transformers saves them, each by itself, and as it holds them: a tensor for all, and Mixtral's router by another name."""
    config = config_of(family)
    model, apart = random_twin(config)
    want = [model(text[None]).logits[0] for text in texts_of(LENGTHS)]
    published = open_checkpoint(transformers_directory(tmp_path / "saved", model, config))
    stacked = open_checkpoint(saved(tmp_path / "stacked", config, model.state_dict()))
    assert set(published.tensors) == set(stacked.tensors) == set(apart.values)
    for checkpoint in (published, stacked):
        for name, value in apart.values.items():
            assert torch.equal(torch.from_numpy(checkpoint.read(name)), value), name
            cut = tuple(slice(size // 3, size - 1) for size in value.shape)
            assert torch.equal(torch.from_numpy(checkpoint.read(name, cut)), value[cut]), name
        assert worst(logits(checkpoint), want) < BAR
    files = {ref.file for ref in stacked.tensors.values()}
    assert len(files) == 1 and stacked.fingerprint() == open_checkpoint(tmp_path / "stacked").fingerprint() != published.fingerprint()


STACK = "model.layers.1.mlp.experts"


def stacked_with(root: Path, change: Any) -> Path:
    config = config_of("qwen3-moe") | {"num_hidden_layers": 2}
    values = dict(random_twin(config, torch.float32)[0].state_dict())
    change(values)
    return saved(root, config, values)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gate_up_proj", (5, 32, 48)),
        ("gate_up_proj", (6, 16, 48)),
        ("gate_up_proj", (6, 48, 32)),
        ("gate_up_proj", (6, 32)),
        ("gate_up_proj", (0, 32, 48)),
        ("gate_up_proj", ()),
        ("down_proj", (6, 16, 48)),
        ("down_proj", (6, 48, 16, 1)),
    ],
)
def test_stacks_of_another_shape_are_refused(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    root = stacked_with(tmp_path / "m", lambda values: values.update({f"{STACK}.{name}": torch.zeros(shape)}))
    with pytest.raises(InputError, match=rf"{STACK}\.{name}: has shape \[.*, expected \[6, ") as caught:
        open_checkpoint(root)
    assert "\n" not in str(caught.value)


def test_an_expert_stacked_and_apart_is_refused(tmp_path: Path) -> None:
    root = stacked_with(tmp_path / "m", lambda values: values.update({f"{STACK}.3.up_proj.weight": torch.zeros(16, 48)}))
    with pytest.raises(InputError, match=r"experts\.3\.up_proj\.weight.*once more"):
        open_checkpoint(root)
    config = config_of("mixtral")
    values = dict(random_twin(config, torch.float32)[1].values)
    values["model.layers.0.mlp.gate.weight"] = values["model.layers.0.block_sparse_moe.gate.weight"].clone()
    with pytest.raises(InputError, match=r"layers\.0\.block_sparse_moe\.gate\.weight.*once more"):
        open_checkpoint(saved(tmp_path / "x", config, values))


def test_a_stack_in_a_layer_without_experts_has_no_place(tmp_path: Path) -> None:
    config = config_of("qwen3-moe") | {"mlp_only_layers": [1]}
    values = dict(random_twin(config, torch.float32)[1].values)
    values[f"{STACK}.gate_up_proj"] = torch.zeros(6, 32, 48)
    checkpoint = open_checkpoint(saved(tmp_path / "m", config, values))
    with pytest.raises(InputError, match=rf"{STACK}\.gate_up_proj: is no tensor"):
        load_decoder(checkpoint, dtype=torch.float32)


@pytest.mark.parametrize("family", ["gpt2", "llama-tied-mha"])
def test_a_checkpoint_of_the_base_model_is_read_by_the_names_of_the_whole(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    model, whole = random_twin(config)
    want = [model(text[None]).logits[0] for text in texts_of(LENGTHS)]
    base = open_checkpoint(transformers_directory(tmp_path / "base", model.base_model, config))
    assert set(base.tensors) == set(whole.values)
    assert worst(logits(base), want) < BAR
    assert base.fingerprint() == open_checkpoint(tmp_path / "base").fingerprint()


def test_old_buffers_of_gpt2_are_let_pass(tmp_path: Path) -> None:
    """The files of the published models: no prefix, and masks beside the weights."""
    config = config_of("gpt2")
    model, whole = random_twin(config)
    values = {name.removeprefix("transformer."): value for name, value in whole.values.items()}
    for layer in range(3):
        values |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril(), f"h.{layer}.attn.masked_bias": torch.tensor(-1e4)}
    checkpoint = open_checkpoint(saved(tmp_path / "m", config, values))
    assert worst(logits(checkpoint), [model(text[None]).logits[0] for text in texts_of(LENGTHS)]) < BAR
    assert not spec_for(config).ignores("transformer.h.0.attn.c_attn.bias")


def test_an_untied_base_model_lacks_its_head(tmp_path: Path) -> None:
    config = config_of("llama")
    model = random_twin(config)[0]
    with pytest.raises(InputError, match=r"^lm_head\.weight: is missing"):
        logits(open_checkpoint(transformers_directory(tmp_path / "base", model.base_model, config)))


def test_names_of_an_unknown_architecture_stay(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path / "m", {"model_type": "other"}, {"mlp.experts.gate_up_proj": torch.zeros(2, 4, 3)}))
    assert list(checkpoint.tensors) == ["mlp.experts.gate_up_proj"]


# a new row


@pytest.fixture
def bespoke(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Llama under other names, some of them fused, as a row that the table gets for one test."""
    llama = next(arch for arch in TABLE if arch.name == "llama")
    names = {"q": "mix.qk", "k": "mix.qk", "v": "mix.value", "o": "mix.out", "gate": "wide.g", "up": "wide.u", "down": "wide.d"}
    linears = tuple(
        replace(linear, name=names[linear.role], fused=("q", "k") if linear.role in "qk" else (), bias=False) for linear in llama.linears
    )
    norms = tuple(replace(norm, name=f"{norm.role}.scale") for norm in llama.norms)
    row = replace(
        llama,
        name="bespoke",
        model_type="bespoke",
        gguf=None,
        hf_classes=("BespokeModel",),
        linears=linears,
        norms=norms,
        block="stack.{layer}.",
        embedding="stack.words",
        final_norm="stack.last",
        head="readout",
        prefix="stack.",
        keys={"hidden_size": "width"},
    )
    monkeypatch.setattr(table, "BY_MODEL_TYPE", {**table.BY_MODEL_TYPE, "bespoke": row})
    yield "bespoke"


def as_bespoke(config: dict[str, Any], values: dict[str, Tensor]) -> None:
    """The tiny Llama as the row above has it."""
    names = {"self_attn.v_proj": "mix.value", "self_attn.o_proj": "mix.out", "mlp.gate_proj": "wide.g", "mlp.up_proj": "wide.u"}
    names |= {"mlp.down_proj": "wide.d", "input_layernorm": "pre_attention.scale", "post_attention_layernorm": "pre_ffn.scale"}
    outer = {"model.embed_tokens": "stack.words", "model.norm": "stack.last", "lm_head": "readout"}
    old = dict(values)
    values.clear()
    values |= {f"{new}.weight": old[f"{name}.weight"] for name, new in outer.items() if f"{name}.weight" in old}
    for layer in range(config["num_hidden_layers"]):
        here, there = f"model.layers.{layer}.", f"stack.{layer}."
        values |= {f"{there}{new}.weight": old[f"{here}{name}.weight"] for name, new in names.items()}
        values[f"{there}mix.qk.weight"] = torch.cat([old[f"{here}self_attn.{role}_proj.weight"] for role in "qk"])
    config["model_type"], config["width"] = "bespoke", config.pop("hidden_size")


def test_a_row_is_all_that_a_new_architecture_needs(bespoke: str, tmp_path: Path) -> None:
    """Loading, logits, ranks, and two methods of quantization from end to end, of a family that no other file has heard of."""
    like = open_checkpoint(two_layers(tmp_path / "llama"))
    new = open_checkpoint(two_layers(tmp_path / bespoke, as_bespoke))
    tokens = torch.randint(4, 1024, (60,), generator=torch.Generator().manual_seed(3))

    def of(checkpoint: Checkpoint) -> Tensor:
        return logits_of(load_decoder(checkpoint, dtype=torch.float64), [tokens])[0]

    want = of(like)
    assert torch.equal(of(new), want)
    plan = plan_of(new, 2)  # type: ignore[arg-type]

    def rank(comm: Comm) -> Tensor:
        with torch.no_grad():
            return logits_of(load_decoder(new, dtype=torch.float64, plan=plan, comm=comm), [tokens])[0]

    assert all(float((part - want).abs().max()) < BAR for part in run_threads(2, rank))
    for method in ("rtn", "awq"):
        calibrated = {} if method == "rtn" else {"samples": 4, "seq_len": 64, "option": ("scale_points=3",)}
        for source in (like, new):
            out = tmp_path / f"{source.root.name}-{method}"
            quantize.run(QuantizeOptions(path=str(source.root), out=out, method=method, group_size=64, device="cpu", **calibrated))  # type: ignore[arg-type]
            assert verify(out, deep=True).defects == []
        # One fused tensor or two, the codes are the same: groups run along the inputs.
        outs = [of(open_checkpoint(tmp_path / f"{source.root.name}-{method}")) for source in (like, new)]
        assert torch.equal(*outs) and 0.01 < float((outs[0] - want).abs().mean()) < 1.0
