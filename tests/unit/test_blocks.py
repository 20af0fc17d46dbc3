"""A GGUF file that stays in blocks: the same model bit for bit, less memory, any number of ranks, and a directory of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_fixtures import logits_of
from gguf_export_fixtures import config_of as config_of_any
from gguf_export_fixtures import values_of as values_of_any
from gguf_export_fixtures import write_family
from gguf_fixtures import ARCHES, config_of, gguf_values, metadata_of, values_of, write_gguf
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.checkpoint.blocks import as_blocks
from quantkit.checkpoint.gguf import GgufSource, decoded
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.comm import Comm, run_threads
from quantkit.commands.plan import PlanOptions
from quantkit.commands.plan import run as plan_command
from quantkit.convert import convert_to_hf, keep_blocks
from quantkit.errors import InputError
from quantkit.formats.gguf import read_gguf
from quantkit.geometry import ggml_scheme
from quantkit.layouts.registry import UnpackingLinear
from quantkit.layouts.table import PackedTable
from quantkit.model.load import embedded, load_decoder
from quantkit.ops.ggml.encode import BLOCKS, encode
from quantkit.ops.ggml.linear import BlockCpuLinear
from quantkit.ops.grouped import Int4CpuLinear
from quantkit.plan import GATHER, ROW, head_geometry, make_plan, rank_memory
from quantkit.quant_config import assignment_from_config, quantization_config, stored_assignment
from quantkit.scheme import KEEP, LinearScheme
from quantkit.shard import open_rank, shard_checkpoint, unshard
from quantkit.transcode import exact_conversion
from quantkit.verify import verify

BIG = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1280, "vocab_size": 100}
MIXED = {
    "token_embd": "Q6_K",
    "attn_q": "Q4_K",
    "attn_k": "IQ4_NL",
    "attn_v": "Q6_K",
    "attn_output": "Q5_K",
    "output.": "Q5_0",
    "ffn_gate": "Q3_K",
    "ffn_up": "Q4_1",
    "blk.0.ffn_down": "Q6_K",
    "blk.1.ffn_down": "Q8_0",
}
"""Types as mixtures give them: of one role they differ from layer to layer, and some are fallbacks of 32."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def encoded(tensors: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> dict[str, Any]:
    """``tensors``, each matrix in the block type of the first prefix of ``kinds`` that its name contains; other ones as they are."""
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        kind = next((kind for part, kind in kinds.items() if part in name), None)
        found[name] = (kind, encode(np.ascontiguousarray(value), kind)) if kind is not None and value.ndim == 2 else value
    return found


LETTERS = [chr(code) for code in range(33, 127)]
TOKENS: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *LETTERS, "th", "he", "the"],
    "tokenizer.ggml.merges": ["t h", "h e", "th e"],
    "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(LETTERS) + 3),
}
"""A vocabulary of 100."""
MORE = [f"<{index}>" for index in range(31)]
TOKENS_OF_131 = {
    **TOKENS,
    "tokenizer.ggml.tokens": [*TOKENS["tokenizer.ggml.tokens"], *MORE],
    "tokenizer.ggml.token_type": [*TOKENS["tokenizer.ggml.token_type"], *[3] * len(MORE)],
}


def model_file(path: Path, family: str, kinds: Mapping[str, str] = MIXED, **changes: Any) -> Path:
    """A random model of ``family``, wide enough for blocks of 256, in mixed types."""
    config = config_of(family, **{**BIG, **changes})
    tensors = encoded(gguf_values(config, values_of(config)), kinds)
    return write_gguf(path, ARCHES[config["model_type"]][1], {**metadata_of(config), **TOKENS}, tensors)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_file(tmp_path_factory.mktemp("llama") / "mixed.gguf", "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embedding is its head: of 100 rows, that are padded to 128 when they are cut."""
    return model_file(tmp_path_factory.mktemp("tied") / "mixed.gguf", "llama-tied", num_key_value_heads=8)


def texts() -> list[Tensor]:
    return [torch.tensor([5, 99, 17, 98, 0, 42, 70]), torch.tensor([64, 63])]


def plan_for(checkpoint: Checkpoint, tp: int) -> Any:
    spec = spec_for(checkpoint.config)
    return make_plan(spec, stored_assignment(checkpoint.config, spec, checkpoint.tensors), tp, dtype="BF16")


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(float((a - b).abs().max()) < 1e-9 * float(b.abs().max()) for a, b in zip(got, want, strict=True))


# the view


@pytest.mark.parametrize("family", ["llama", "llama-biases", "llama-tied", "qwen2", "qwen3", "gemma3"])
def test_blocks_give_the_logits_of_the_decoded_floats_bit_for_bit(tmp_path: Path, family: str) -> None:
    changes = {"num_key_value_heads": 8} if family == "llama-tied" else {}
    checkpoint = open_checkpoint(model_file(tmp_path / "model.gguf", family, **changes))
    kept = as_blocks(checkpoint)
    assert set(kept.tensors) == set(checkpoint.tensors)
    want = logits_of(load_decoder(checkpoint, dtype=torch.float32), texts())
    decoder = load_decoder(kept, dtype=torch.float32, parity=True)
    assert isinstance(decoder.blocks[0].linears["q"].op, UnpackingLinear) and isinstance(decoder.embedding.weight, PackedTable)
    assert all(torch.equal(a, b) for a, b in zip(logits_of(decoder, texts()), want, strict=True))


def family_file(path: Path, family: str) -> Path:
    """A random model of ``family`` whose matrices, stacked experts too, are Q8_0, its down projections Q5_1; a router stays floats."""
    values = values_of_any(config_of_any(family))
    before = read_gguf(write_family(path.with_suffix(".before"), config_of_any(family), values))
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in before.metadata.items()}
    tensors: dict[str, Any] = {}
    for name, tensor in before.tensors.items():
        rows = decoded(before, tensor, range(math.prod(tensor.shape[:-1])), range(tensor.shape[-1]))
        kind = "Q5_1" if "ffn_down" in name else "Q8_0"
        quantized = len(tensor.shape) > 1 and "gate_inp" not in name and "position" not in name
        if quantized:
            tensors[name] = (kind, encode(np.ascontiguousarray(rows), kind).reshape(*tensor.shape[:-1], -1))
        else:
            tensors[name] = rows.reshape(tensor.shape)
    return write_gguf(path, plain.pop("general.architecture"), plain | TOKENS_OF_131, tensors)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "qwen3-moe", "phi3", "gpt2", "qwen", "gemma2"])
def test_experts_fused_and_transposed_linears_stay_in_blocks(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(family_file(tmp_path / "model.gguf", family))
    kept = as_blocks(checkpoint)
    spec = spec_for(kept.config)
    modules = kept.config["quantization_config"]["modules"]
    linears = [path for layer in range(spec.layers) for path, roles in spec.block_modules(layer).items() if spec.linears[roles[0]].quantize]
    assert set(modules) == {*linears, spec.architecture.embedding, *(() if spec.tied else (spec.architecture.head,))}
    assert {kind for name, kind in modules.items() if name in linears} == {"Q8_0", "Q5_1"}
    want = logits_of(load_decoder(checkpoint, dtype=torch.float32), texts())
    assert all(
        torch.equal(a, b) for a, b in zip(logits_of(load_decoder(kept, dtype=torch.float32, parity=True), texts()), want, strict=True)
    )
    wide, plan = logits_of(load_decoder(checkpoint, dtype=torch.float64), texts()), plan_for(kept, 2)

    def rank(comm: Comm) -> list[Tensor]:
        with torch.no_grad():
            return logits_of(load_decoder(kept, dtype=torch.float64, plan=plan, comm=comm, parity=True), texts())

    assert all(same(found, wide) for found in run_threads(2, rank))
    keep_blocks(checkpoint, tmp_path / "kept", max_shard_size=1 << 30, overwrite=False)
    assert verify(tmp_path / "kept", deep=True).defects == []
    again = load_decoder(open_checkpoint(tmp_path / "kept"), dtype=torch.float32, parity=True)
    assert all(torch.equal(a, b) for a, b in zip(logits_of(again, texts()), want, strict=True))
    shard_checkpoint(open_checkpoint(tmp_path / "kept"), tmp_path / "shards", 2, overwrite=False)
    assert unshard(tmp_path / "shards", tmp_path / "again", overwrite=False).proven


def test_rows_of_queries_are_put_back_as_bytes_for_any_range(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    kept, name = as_blocks(checkpoint), "model.layers.0.self_attn.q_proj.weight"
    whole = kept.read(name)
    assert whole.dtype == np.uint8 and whole.shape == (512, 144) == kept.tensors[name].shape and kept.dtype(name) == "U8"
    every = slice(0, 144)
    for rows, columns in ((slice(0, 512), every), (slice(70, 71), slice(3, 9)), (slice(100, 260), every), (slice(5, 5), every)):
        assert np.array_equal(kept.read(name, (rows, columns)), whole[rows, columns])


def test_what_has_no_layout_stays_floats(tmp_path: Path) -> None:
    """Norms, a router, types that nothing here runs on; a file without any block is left alone."""
    path = model_file(tmp_path / "model.gguf", "llama", {"attn_q": "Q8_0"})
    kept = as_blocks(open_checkpoint(path))
    modules = kept.config["quantization_config"]["modules"]
    assert set(modules.values()) == {"Q8_0"} and all(name.endswith("q_proj") for name in modules) and len(modules) == 2
    assert kept.dtype("model.embed_tokens.weight") == "F32"
    plain = open_checkpoint(model_file(tmp_path / "plain.gguf", "llama", {}))
    assert as_blocks(plain) is plain and isinstance(plain.gguf, GgufSource)


# the runtime


def test_memory_is_that_of_the_blocks(llama: Path) -> None:
    kept = as_blocks(open_checkpoint(llama))
    decoder = load_decoder(kept, dtype=torch.float32)
    assert decoder.nbytes == sum(ref.nbytes for ref in kept.tensors.values())
    spec = spec_for(kept.config)
    assignment = stored_assignment(kept.config, spec, kept.tensors)
    (planned,) = rank_memory(spec, assignment, plan_for(kept, 1), dtype="F32", kv_dtype="F32")
    assert planned.linears == sum(ref.nbytes for name, ref in kept.tensors.items() if "proj" in name)


def test_a_tied_table_is_looked_up_and_multiplied_by_and_held_once(tied: Path) -> None:
    kept = as_blocks(open_checkpoint(tied))
    decoder = load_decoder(kept, dtype=torch.float32)
    assert isinstance(decoder.head.op, BlockCpuLinear)
    assert decoder.nbytes == sum(ref.nbytes for ref in kept.tensors.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernels_of_a_cpu_give_the_logits_within_rounding(llama: Path, dtype: torch.dtype) -> None:
    kept = as_blocks(open_checkpoint(llama))
    want = torch.cat(logits_of(load_decoder(kept, dtype=torch.float64, parity=True), texts()))
    got = torch.cat(logits_of(load_decoder(kept, dtype=dtype), texts())).double()
    dense = torch.cat(logits_of(load_decoder(open_checkpoint(llama), dtype=dtype), texts())).double()
    assert float((got - want).norm()) < 1.5 * float((dense - want).norm()) + 1e-5 * float(want.norm())


def test_four_bit_types_run_on_the_int4_kernel_in_bfloat16_alone(llama: Path) -> None:
    kept = as_blocks(open_checkpoint(llama))
    narrow, wide = (load_decoder(kept, dtype=dtype).blocks[0].linears for dtype in (torch.bfloat16, torch.float32))
    assert {role for role, linear in narrow.items() if isinstance(linear.op, Int4CpuLinear)} == {"q", "up"}
    assert all(isinstance(linear.op, BlockCpuLinear) for linear in wide.values())


def test_embedding_rows_are_looked_up_without_the_rest(llama: Path) -> None:
    kept, tokens = as_blocks(open_checkpoint(llama)), torch.tensor([[3, 99, 3]])
    spec = spec_for(kept.config)
    assert torch.equal(
        embedded(kept, spec, tokens, dtype=torch.float32), embedded(open_checkpoint(llama), spec, tokens, dtype=torch.float32)
    )


# ranks


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("which", ["llama", "tied"])
def test_ranks_give_the_logits_of_one(request: pytest.FixtureRequest, which: str, tp: int) -> None:
    """Uneven at 3 ranks: 5 blocks of 256 along the FFN; the heads' 512 inputs of o are two, so more ranks gather."""
    checkpoint = open_checkpoint(request.getfixturevalue(which))
    kept = as_blocks(checkpoint)
    plan = plan_for(kept, tp)
    assert {len(owned) % 256 for owned in plan.ranges["ffn"]} == {0}
    assert plan.modes["down"] == ROW and plan.modes["o"] == (ROW if tp == 2 else GATHER)
    want = logits_of(load_decoder(checkpoint, dtype=torch.float64), texts())

    def rank(comm: Comm) -> tuple[list[Tensor], int]:
        with torch.no_grad():
            decoder = load_decoder(kept, dtype=torch.float64, plan=plan, comm=comm, parity=True)
            return logits_of(decoder, texts()), decoder.nbytes

    found = run_threads(tp, rank)
    assert all(same(logits, want) for logits, _ in found)
    assert max(nbytes for _, nbytes in found) < load_decoder(kept, dtype=torch.float64).nbytes
    assert all(torch.equal(a, b) for logits, _ in found for a, b in zip(logits, found[0][0], strict=True))


def test_more_ranks_than_blocks_along_the_ffn_gather_it(tmp_path: Path) -> None:
    kept = as_blocks(open_checkpoint(model_file(tmp_path / "model.gguf", "llama", intermediate_size=512)))
    assert plan_for(kept, 2).modes["down"] == ROW
    plan = plan_for(kept, 4)
    assert plan.modes["down"] == GATHER and [len(owned) for owned in plan.ranges["ffn"]] == [128] * 4
    want = logits_of(load_decoder(kept, dtype=torch.float64, parity=True), texts())

    def rank(comm: Comm) -> list[Tensor]:
        with torch.no_grad():
            return logits_of(load_decoder(kept, dtype=torch.float64, plan=plan, comm=comm, parity=True), texts())

    assert all(same(found, want) for found in run_threads(4, rank))


# the directory


def keep(path: Path, out: Path) -> Checkpoint:
    keep_blocks(open_checkpoint(path), out, max_shard_size=1 << 30, overwrite=False)
    return open_checkpoint(out)


@pytest.mark.parametrize("which", ["llama", "tied"])
def test_a_directory_of_blocks_is_the_file_byte_for_byte(request: pytest.FixtureRequest, tmp_path: Path, which: str) -> None:
    path = request.getfixturevalue(which)
    kept, found = as_blocks(open_checkpoint(path)), keep(path, tmp_path / "out")
    assert found.config == dict(kept.config) and set(found.tensors) == set(kept.tensors)
    for name in kept.tensors:
        assert found.dtype(name) == kept.dtype(name) and np.array_equal(found.read(name), kept.read(name)), name
    checked = verify(tmp_path / "out", deep=True)
    assert checked.defects == [] and checked.unpacked == len(kept.config["quantization_config"]["modules"])


def test_a_directory_goes_back_to_the_floats_that_the_file_has(llama: Path, tmp_path: Path) -> None:
    convert_to_hf(keep(llama, tmp_path / "out"), tmp_path / "floats", dtype="float32", max_shard_size=1 << 30, overwrite=False)
    floats, source = open_checkpoint(tmp_path / "floats"), open_checkpoint(llama)
    assert "quantization_config" not in floats.config
    for name in source.tensors:
        assert np.array_equal(floats.read(name).view(np.uint32), source.read(name).astype(np.float32).view(np.uint32)), name


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("which", ["llama", "tied"])
def test_shards_of_a_directory_run_and_restore_it(request: pytest.FixtureRequest, tmp_path: Path, which: str, tp: int) -> None:
    checkpoint = keep(request.getfixturevalue(which), tmp_path / "out")
    shard_checkpoint(checkpoint, tmp_path / "shards", tp, overwrite=False)
    assert verify(tmp_path / "shards", deep=True).defects == []
    unshard(tmp_path / "shards", tmp_path / "again", overwrite=False)
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    want = logits_of(load_decoder(checkpoint, dtype=torch.float64, parity=True), texts())

    def rank(comm: Comm) -> list[Tensor]:
        with torch.no_grad():
            own, plan, stored = open_rank(tmp_path / "shards", comm.rank)
            return logits_of(load_decoder(own, dtype=torch.float64, plan=plan, comm=comm, presliced=stored, parity=True), texts())

    assert all(same(found, want) for found in run_threads(tp, rank))


def test_only_gguf_files_with_blocks_are_kept(tmp_path: Path, llama: Path) -> None:
    found = keep(llama, tmp_path / "out")
    for checkpoint, what in (
        (found, "is no GGUF file"),
        (open_checkpoint(model_file(tmp_path / "plain.gguf", "llama", {})), "holds no blocks"),
    ):
        with pytest.raises(InputError, match=what):
            keep_blocks(checkpoint, tmp_path / "other", max_shard_size=1 << 30, overwrite=False)
    with pytest.raises(InputError, match="is quantized, which gptq cannot hold"):
        exact_conversion(found, "gptq")


def test_a_scale_that_is_no_number_is_found(tmp_path: Path) -> None:
    config = config_of("llama", **BIG)
    tensors = encoded(gguf_values(config, values_of(config)), MIXED)
    kind, blocks = tensors["blk.1.attn_v.weight"]
    blocks[3, 208:210] = (0, 0x7C)  # infinite
    path = write_gguf(tmp_path / "model.gguf", "llama", {**metadata_of(config), **TOKENS}, tensors)
    keep_blocks(open_checkpoint(path), tmp_path / "out", max_shard_size=1 << 30, overwrite=False)
    (defect,) = verify(tmp_path / "out", deep=True).defects
    assert defect.where == "model.layers.1.self_attn.v_proj" and "1 blocks" in defect.what and BLOCKS[kind] == (256, 210)


# config.json


def test_a_configuration_names_the_type_of_each_module_and_is_read_back(llama: Path) -> None:
    kept = as_blocks(open_checkpoint(llama))
    spec = spec_for(kept.config)
    assignment = stored_assignment(kept.config, spec, kept.tensors)
    assert {scheme.code for scheme in assignment.values()} == set(MIXED.values())
    assert quantization_config(assignment, "lm_head", "model.embed_tokens") == kept.config["quantization_config"]


@pytest.mark.parametrize(
    ("modules", "what"), [(None, "modules"), ([], "modules"), ({"a": "IQ2_S"}, "says 'IQ2_S' of 'a'"), ({"a": 4}, "says 4 of 'a'")]
)
def test_a_configuration_of_other_types_is_refused(modules: Any, what: str) -> None:
    with pytest.raises(InputError, match=what):
        assignment_from_config({"quantization_config": {"quant_method": "gguf", "modules": modules}}, ["a"], {})


def test_modules_that_are_not_named_are_floats() -> None:
    config = {"quantization_config": {"quant_method": "gguf", "modules": {"a": "Q4_K"}}}
    found = assignment_from_config(config, ["a", "b"], {})
    assert (found["a"].code, found["a"].bits, found["a"].group_size) == ("Q4_K", 4, 256) and found["b"] == KEEP


def test_plan_says_what_a_file_takes_and_where_it_is_cut(llama: Path) -> None:
    report = plan_command(PlanOptions(str(llama), 2))
    kept = as_blocks(open_checkpoint(llama))
    assert sum(rank["linears"] for rank in report.data["ranks"]) == sum(ref.nbytes for name, ref in kept.tensors.items() if "_proj" in name)
    assert dict(report.facts)["linears"] == "; ".join(sorted(set(MIXED.values())))
    cuts = {(row[0], row[4], row[5]) for row in report.tables[1].rows}
    assert {("down", 256, "row"), ("down", 32, "row"), ("o", 256, "row"), ("k", 32, "column")} <= cuts
    # As a source of floats it can be planned in any format.
    assert (
        plan_command(PlanOptions(str(llama), 2, method="awq", group_size=64)).data["assignment"]["model.layers.0.mlp.up_proj"]["layout"]
        == "awq"
    )


def test_a_head_in_blocks_is_padded_where_one_of_words_is_refused(llama: Path) -> None:
    spec = spec_for(as_blocks(open_checkpoint(llama)).config)
    assignment = {**dict.fromkeys(spec.all_linears(), KEEP), "lm_head": ggml_scheme("Q6_K")}
    assert head_geometry(spec, assignment, dtype="F16").n == 128
    with pytest.raises(InputError, match="no multiple of 64"):
        head_geometry(spec, {**assignment, "lm_head": LinearScheme("rtn", "packed", 4, 64, True)}, dtype="F16")


def test_a_directory_whose_configuration_lies_is_refused_before_anything_is_read(llama: Path, tmp_path: Path) -> None:
    keep(llama, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for kind, what in (
        ("Q4_K", r"up_proj\.weight: has shape \[1280, 160\], expected \[1280, 144\]"),
        (None, r"up_proj\.weight: has shape \[1280, 160\], expected \[1280, 256\]"),
    ):
        modules = {name: kind if name.endswith("0.mlp.up_proj") else was for name, was in config["quantization_config"]["modules"].items()}
        told = {name: was for name, was in modules.items() if was is not None}
        changed = {**config, "quantization_config": {"quant_method": "gguf", "modules": told}}
        (tmp_path / "out" / "config.json").write_text(json.dumps(changed))
        checkpoint = open_checkpoint(tmp_path / "out")
        with pytest.raises(InputError, match=what):
            load_decoder(checkpoint, dtype=torch.float32)
        assert any("up_proj" in defect.where for defect in verify(tmp_path / "out", deep=True).defects)
