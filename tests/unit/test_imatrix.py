"""Importance matrices: both file forms, and the capture against sums made with hooks on the same model in transformers."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from decoder_fixtures import MemoryCheckpoint, config_of, random_twin
from gguf_fixtures import config_of as gguf_config_of
from gguf_fixtures import values_of, write_model
from numpy.typing import NDArray
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.commands import imatrix as command
from quantkit.commands.imatrix import ImatrixOptions, run
from quantkit.errors import InputError
from quantkit.formats.imatrix import Imatrix, ImatrixEntry, encode_dat, encode_gguf, importance_for, read_imatrix
from quantkit.model.load import embedded
from quantkit.progress import silent
from quantkit.quantizers.calibration import CalibrationStream, CalibrationTokens, StatsCollector, owners
from quantkit.quantizers.imatrix import captured, tensor_roles
from quantkit.quantizers.pipeline import Source

MODELS = Path(__file__).parent.parent / "data" / "models"
pytestmark = pytest.mark.usefixtures("one_thread")


def entry(sums: Any, counts: Any) -> ImatrixEntry:
    return ImatrixEntry(np.asarray(sums, np.float32), np.asarray(counts, np.float32))


def small() -> Imatrix:
    """A dense tensor and a stack of three experts, of which one saw nothing."""
    entries = {
        "blk.0.ffn_down_exps.weight": entry([[4.0, 8.0], [0.0, 0.0], [3.0, 0.75]], [4, 0, 3]),
        "blk.0.attn_q.weight": entry([[10.0, 0.0, 0.5, 7.5, 1.0]], [20]),
    }
    return Imatrix(entries, ("builtin",), 2, 10)


def same(found: Imatrix, wanted: Imatrix) -> None:
    assert set(found.entries) == set(wanted.entries)
    for name, item in wanted.entries.items():
        np.testing.assert_array_equal(found.entries[name].sums, item.sums)
        np.testing.assert_array_equal(found.entries[name].counts, item.counts)
    assert (found.datasets, found.chunks, found.chunk_size) == (wanted.datasets, wanted.chunks, wanted.chunk_size)


# values


def test_importance_is_the_mean_square_of_each_column_and_one_where_nothing_was_seen() -> None:
    found = small().entries["blk.0.ffn_down_exps.weight"].importance()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[1.0, 2.0], [1.0, 1.0], [1.0, 0.25]])


def test_importance_is_found_by_name_and_has_the_size_of_the_tensor() -> None:
    imatrix = small()
    found = importance_for(imatrix, "blk.0.ffn_down_exps.weight", 3, 2, "m.gguf")
    assert found is not None and found.shape == (3, 2)
    assert importance_for(imatrix, "blk.1.attn_q.weight", 1, 5, "m.gguf") is None
    with pytest.raises(InputError, match=r"m\.gguf: has 6 values for blk\.0\.ffn_down_exps\.weight, expected 8: 4 x 2 columns"):
        importance_for(imatrix, "blk.0.ffn_down_exps.weight", 4, 2, "m.gguf")


def test_an_old_matrix_of_a_stack_is_cut_into_its_experts() -> None:
    flat = Imatrix({"blk.0.ffn_up_exps.weight": entry([[2.0, 4.0, 6.0, 8.0]], [2])})
    np.testing.assert_array_equal(importance_for(flat, "blk.0.ffn_up_exps.weight", 2, 2, "m.dat"), [[1, 2], [3, 4]])


def test_an_embedding_of_another_size_is_passed_over() -> None:
    imatrix = Imatrix({"token_embd.weight": entry([[1.0, 2.0]], [1])})
    assert importance_for(imatrix, "token_embd.weight", 1, 3, "m.gguf") is None
    assert importance_for(imatrix, "token_embd.weight", 1, 2, "m.gguf") is not None


# files


def test_the_gguf_form_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(encode_gguf(small()))
    same(read_imatrix(path), small())
    assert encode_gguf(read_imatrix(path)) == path.read_bytes()


def test_the_gguf_form_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(encode_gguf(small()))
    reader = gguf.GGUFReader(path)
    fields = {key: reader.get_field(key) for key in ("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")}
    assert {key: field and field.contents() for key, field in fields.items()} == {
        "general.type": "imatrix",
        "imatrix.datasets": ["builtin"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 10,
    }
    kinds = {key: field and [kind.name for kind in field.types] for key, field in fields.items()}
    assert kinds["imatrix.datasets"] == ["ARRAY", "STRING"] and kinds["imatrix.chunk_size"] == ["UINT32"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert [*tensors] == [
        f"blk.0.{name}.weight.{part}" for name in ("attn_q", "ffn_down_exps") for part in ("in_sum2", "counts")
    ]  # sorted, each entry's sums before its counts
    experts = tensors["blk.0.ffn_down_exps.weight.in_sum2"], tensors["blk.0.ffn_down_exps.weight.counts"]
    assert [list(tensor.shape) for tensor in experts] == [[2, 3], [1, 3]]  # fastest first
    np.testing.assert_array_equal(experts[0].data, small().entries["blk.0.ffn_down_exps.weight"].sums)
    np.testing.assert_array_equal(experts[1].data.ravel(), [4, 0, 3])
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in reader.tensors)


def test_a_matrix_that_the_gguf_package_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a.txt", "b.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("blk.0.ffn_up_exps.weight.counts", np.array([[2], [1]], np.float32))  # in any order
    writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum", np.ones((2, 3), np.float32))  # what later versions may add
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wanted = {"blk.0.ffn_up_exps.weight": entry([[0, 1, 2], [3, 4, 5]], [2, 1])}
    same(read_imatrix(path), Imatrix(wanted, ("a.txt", "b.txt"), 7, 512))


def test_sums_of_a_stack_may_share_one_count(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "two.gguf", "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["x"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    writer.add_tensor("a.in_sum2", np.array([[2, 4], [6, 8]], np.float32))
    writer.add_tensor("a.counts", np.array([[2]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(importance_for(read_imatrix(tmp_path / "two.gguf"), "a", 2, 2, "x"), [[1, 2], [3, 4]])


def test_the_dat_form_holds_means_times_calls(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(encode_dat(small()))
    name = b"blk.0.attn_q.weight"
    first = struct.pack("<ii", 2, len(name)) + name + struct.pack("<ii5f", 2, 5, 1.0, 0.0, 0.05, 0.75, 0.1)
    assert path.read_bytes().startswith(first)
    assert path.read_bytes().endswith(struct.pack("<ii", 2, 7) + b"builtin")
    found = read_imatrix(path)
    assert (found.datasets, found.chunks, found.chunk_size) == (("builtin",), 2, None)
    for key, item in small().entries.items():
        n_mat, columns = item.sums.shape
        np.testing.assert_allclose(importance_for(found, key, n_mat, columns, "m.dat"), item.importance(), rtol=1e-6)


def test_a_dat_file_goes_back_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    values = np.random.default_rng(3).random(64, np.float32) * 1e3
    raw = struct.pack("<ii", 1, 4) + b"abcd" + struct.pack("<ii", 77, 64) + values.tobytes() + struct.pack("<ii", 80, 5) + b"x.txt"
    path.write_bytes(raw)
    assert encode_dat(read_imatrix(path)) == raw
    np.testing.assert_array_equal(importance_for(read_imatrix(path), "abcd", 1, 64, "m.dat"), (values / np.float32(77)).reshape(1, -1))


@pytest.mark.parametrize("tail", [b"", struct.pack("<ii", 3, 0)])
def test_a_dat_file_may_end_early_and_count_no_calls(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii2f", 0, 2, 1.5, 2.5) + tail)
    found = read_imatrix(path)
    assert found.datasets == () and found.chunks == (3 if tail else None)
    np.testing.assert_array_equal(found.entries["a"].importance(), [[1.5, 2.5]])


def test_a_dat_matrix_becomes_a_gguf_one(tmp_path: Path) -> None:
    old, new = tmp_path / "m.dat", tmp_path / "m.gguf"
    old.write_bytes(encode_dat(small()))
    new.write_bytes(encode_gguf(read_imatrix(old)))
    for key, item in read_imatrix(old).entries.items():
        np.testing.assert_array_equal(read_imatrix(new).entries[key].importance(), item.importance())


def test_a_dat_file_leaves_out_what_no_token_reached() -> None:
    unseen = entry(np.zeros((2, 3)), [0, 0])
    raw = encode_dat(Imatrix({"a": unseen, "b": entry([[1.0]], [1])}))
    assert raw.startswith(struct.pack("<ii", 1, 1) + b"b")
    with pytest.raises(InputError, match="has no entry that a token reached"):
        encode_dat(Imatrix({"a": unseen}))


# the capture


def brute_force(model: Any, config: dict[str, Any], tokens: Tensor) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """GGUF name -> sums of squares [n_mat, K] and tokens [n_mat], from hooks on the modules of ``model``."""
    spec, seen, hooks = spec_for(config), dict[str, Tensor](), []

    def keep(path: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_: Any, arguments: tuple[Tensor, ...]) -> None:
            seen[path] = arguments[0].reshape(-1, arguments[0].shape[-1])

        return hook

    routed: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def route(layer: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(module: Any, arguments: tuple[Tensor, ...]) -> None:
            routed[layer] = module, arguments[0].reshape(-1, arguments[0].shape[-1]), arguments[1]

        return hook

    for layer in range(spec.layers):
        for role, path in spec.block_linears(layer).items():
            if not role.startswith("experts."):
                hooks.append(model.get_submodule(path).register_forward_pre_hook(keep(path)))
        if spec.moe is not None and spec.moe.sparse[layer]:
            hooks.append(model.get_submodule(f"model.layers.{layer}.mlp.experts").register_forward_pre_hook(route(layer)))
    head = spec.architecture.head
    hooks.append(model.get_submodule(head).register_forward_pre_hook(keep(head)))
    with torch.inference_mode():
        model(tokens)
        for hook in hooks:
            hook.remove()
        found: dict[str, list[Tensor]] = {"output.weight": [seen[head]]}
        for layer in range(spec.layers):
            for role, path in spec.block_linears(layer).items():
                if path in seen:
                    found[f"blk.{layer}.{spec.linears[role].gguf}.weight"] = [seen[path]]
            if layer in routed:
                module, hidden, chosen = routed[layer]
                inputs = [hidden[(chosen == expert).any(-1)] for expert in range(config["num_experts"])]
                found[f"blk.{layer}.ffn_gate_exps.weight"] = found[f"blk.{layer}.ffn_up_exps.weight"] = inputs
                halves = [(x @ w.T).chunk(2, -1) for x, w in zip(inputs, module.gate_up_proj, strict=True)]
                found[f"blk.{layer}.ffn_down_exps.weight"] = [torch.nn.functional.silu(gate) * up for gate, up in halves]
    return {
        name: (np.stack([x.double().square().sum(0).numpy() for x in parts]), np.array([float(len(x)) for x in parts]))
        for name, parts in found.items()
    }


def capture(checkpoint: Any, tokens: Tensor, output: bool = False, dtype: torch.dtype = torch.float64) -> Imatrix:
    source = Source(checkpoint, spec_for(checkpoint.config), "F16", dtype, ("cpu",))
    return captured(source, CalibrationTokens(tokens, "test"), output=output, offload=lambda hidden: hidden, progress=silent)


def tokens_of(samples: int, length: int) -> Tensor:
    return torch.randint(0, 131, (samples, length), generator=torch.Generator().manual_seed(samples))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma3", "qwen2-moe-steps", "qwen3-moe-dense-first"])
def test_the_capture_is_what_hooks_on_transformers_see(family: str) -> None:
    config = config_of(family)
    model, checkpoint = random_twin(config)
    tokens, tied = tokens_of(5, 23), spec_for(config).tied
    wanted = brute_force(model, config, tokens)
    found = capture(checkpoint, tokens, output=not tied)
    if tied:
        del wanted["output.weight"]
    assert set(found.entries) == set(wanted)
    for name, (sums, counts) in wanted.items():
        np.testing.assert_array_equal(found.entries[name].counts, counts, err_msg=name)
        np.testing.assert_allclose(found.entries[name].sums, sums, rtol=1e-5, err_msg=name)
        assert found.entries[name].sums.dtype == np.float32
    assert (found.datasets, found.chunks, found.chunk_size) == (("test",), 5, 23)
    if "moe" in family:
        experts = {name: item for name, item in found.entries.items() if name.endswith("_exps.weight")}
        assert experts and all(item.counts.sum() == 115 * config["num_experts_per_tok"] for item in experts.values())


def test_experts_without_tokens_count_nothing() -> None:
    _, checkpoint = random_twin(config_of("qwen3-moe"))
    found = capture(checkpoint, tokens_of(1, 1)).entries["blk.0.ffn_down_exps.weight"]
    assert sorted(found.counts.tolist()) == [0, 0, 0, 1, 1, 1]
    assert (found.sums[found.counts == 0] == 0).all() and (found.importance()[found.counts == 0] == 1).all()
    assert (found.importance()[found.counts == 1] == found.sums[found.counts == 1]).all()


@pytest.mark.parametrize("family", ["llama", "qwen2-moe"])
def test_the_sums_are_the_diagonal_of_what_gptq_solves_with(family: str) -> None:
    _, checkpoint = random_twin(config_of(family), torch.float32)
    tokens, spec = tokens_of(6, 40), spec_for(checkpoint.config)
    found = capture(checkpoint, tokens, dtype=torch.float32)
    source: Any = Source(checkpoint, spec, "F16", torch.float32, ("cpu",))  # type: ignore[arg-type]
    stream = CalibrationStream(embedded(checkpoint, spec, tokens, dtype=torch.float32), 100)  # type: ignore[arg-type]
    for layer in range(spec.layers):
        collector = StatsCollector(owners(spec, layer), spec.block_linears(layer), frozenset({"gram"}))
        stream.advance(source.loaded(layer), [collector], ["cpu"])
        stats = collector.stats()
        for name, roles in tensor_roles(spec, layer).items():
            for matrix, role in enumerate(roles):
                if stats[role].borrowed:  # the capture borrows nothing
                    continue
                assert found.entries[name].counts[matrix] == stats[role].tokens
                np.testing.assert_allclose(found.entries[name].sums[matrix], stats[role].gram.diagonal().numpy(), rtol=2e-6)


def test_windows_are_independent_of_one_another() -> None:
    _, checkpoint = random_twin(config_of("llama"))
    tokens = tokens_of(3, 16)
    whole = capture(checkpoint, tokens)
    parts = [capture(checkpoint, tokens[row : row + 1]) for row in range(3)]
    for name, item in whole.entries.items():
        np.testing.assert_allclose(item.sums, sum(part.entries[name].sums for part in parts), rtol=1e-5)


# the command


def test_the_command_against_transformers_on_a_stored_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from quantkit.checkpoint.reader import open_checkpoint
    from quantkit.quantizers.calibration import text_tokens
    from quantkit.text.tokenizer import load_tokenizer

    report = run(ImatrixOptions(str(MODELS / "llama"), tmp_path / "m.gguf", samples=4, seq_len=48))
    assert report.data["entries"] == 28 and report.data["chunks"] == 4 and report.data["calibration"]["source"] == "builtin"
    tokens = text_tokens(load_tokenizer(MODELS / "llama"), "builtin", 4, 48).tokens
    model = AutoModelForCausalLM.from_pretrained(MODELS / "llama", dtype=torch.float32).eval()
    wanted = brute_force(model, dict(open_checkpoint(MODELS / "llama").config), tokens)
    del wanted["output.weight"]  # tied to the embedding
    found = read_imatrix(tmp_path / "m.gguf")
    assert set(found.entries) == set(wanted) and found.chunk_size == 48
    for name, (sums, counts) in wanted.items():
        np.testing.assert_array_equal(found.entries[name].counts, counts)
        np.testing.assert_allclose(found.entries[name].sums, sums, rtol=1e-5, err_msg=name)


def test_a_gguf_model_gives_the_matrix_of_the_same_model_in_safetensors(tmp_path: Path) -> None:
    from quantkit.checkpoint.reader import open_checkpoint

    config = gguf_config_of("llama")
    found = [
        capture(checkpoint, torch.arange(40).reshape(2, 20), output=True, dtype=torch.float32)
        for checkpoint in (
            open_checkpoint(write_model(tmp_path / "model.gguf", config)),
            MemoryCheckpoint(config, {name: torch.from_numpy(value) for name, value in values_of(config).items()}),
        )
    ]
    same(*found)


def test_a_quantized_model_has_a_matrix_too(tmp_path: Path) -> None:
    from quantkit.commands import quantize

    quantize.run(quantize.QuantizeOptions(str(MODELS / "llama"), tmp_path / "q", method="rtn", group_size=64))
    options = ImatrixOptions(str(tmp_path / "q"), tmp_path / "m.gguf", samples=2, seq_len=32)
    run(options)
    float_ones = ImatrixOptions(str(MODELS / "llama"), tmp_path / "f.gguf", samples=2, seq_len=32)
    run(float_ones)
    quantized, floats = read_imatrix(tmp_path / "m.gguf").entries, read_imatrix(tmp_path / "f.gguf").entries
    assert set(quantized) == set(floats)
    first = "blk.0.attn_q.weight"
    np.testing.assert_array_equal(quantized[first].sums, floats[first].sums)  # nothing was quantized before it
    last = quantized["blk.3.ffn_down.weight"].sums / floats["blk.3.ffn_down.weight"].sums
    assert not np.array_equal(last, np.ones_like(last)) and 0.5 < np.median(last) < 2


def test_a_model_whose_embedding_is_packed_can_speak_for_itself(tmp_path: Path) -> None:
    from quantkit.commands import quantize

    rule, out = "embed_tokens:bits=8,group_size=64", tmp_path / "q"
    layout = "compressed-tensors"
    quantize.run(quantize.QuantizeOptions(str(MODELS / "llama"), out, method="rtn", format=layout, group_size=64, override=(rule,)))
    report = run(ImatrixOptions(str(out), tmp_path / "m.gguf", calib="self", samples=1, seq_len=16))
    assert report.data["entries"] == 28 and report.data["calibration"]["source"] == "self"


def quick(out: Path, **changes: Any) -> ImatrixOptions:
    return ImatrixOptions(**{"path": str(MODELS / "llama"), "out": out, "samples": 2, "seq_len": 16, **changes})


def test_the_same_run_gives_the_same_bytes_with_or_without_offload(tmp_path: Path) -> None:
    run(quick(tmp_path / "a.gguf"))
    run(quick(tmp_path / "b.gguf", offload=True))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_the_form_follows_the_name_unless_it_is_said(tmp_path: Path) -> None:
    assert run(quick(tmp_path / "a.dat")).data["format"] == "dat"
    assert run(quick(tmp_path / "b.imatrix")).data["format"] == "gguf"
    assert run(quick(tmp_path / "c.dat", format="gguf")).data["format"] == "gguf"
    assert [(tmp_path / name).read_bytes()[:4] == b"GGUF" for name in ("a.dat", "b.imatrix", "c.dat")] == [False, True, True]
    old, new = read_imatrix(tmp_path / "a.dat"), read_imatrix(tmp_path / "b.imatrix")
    for name, item in new.entries.items():
        np.testing.assert_allclose(old.entries[name].importance(), item.importance(), rtol=1e-6)


def test_windows_begin_with_bos_where_the_tokenizer_puts_it(tmp_path: Path) -> None:
    import json

    root = tmp_path / "model"
    shutil.copytree(MODELS / "llama", root)
    tokenizer = json.loads((root / "tokenizer.json").read_text())
    assert not run(quick(tmp_path / "none.gguf")).data["calibration"]["bos"]
    bos = json.loads((root / "tokenizer_config.json").read_text())["bos_token"]
    bos = bos if isinstance(bos, str) else bos["content"]
    number = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == bos)
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
    (root / "tokenizer.json").write_text(json.dumps(tokenizer))
    report = run(quick(tmp_path / "bos.gguf", path=str(root)))
    assert report.data["calibration"]["bos"] and "each begun with BOS" in dict(report.facts)["calibration"]
    assert read_imatrix(tmp_path / "bos.gguf").entries["blk.0.attn_q.weight"].counts.tolist() == [32]  # it is one of the 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "npz"}, "--format: 'npz' is unknown, expected gguf, or dat for old readers"),
        ({"samples": 0}, "--samples: is 0, expected at least 1"),
        ({"seq_len": 1}, "--seq-len: is 1, expected 2 to "),
        ({"seq_len": 1 << 20}, "--seq-len: is 1048576, expected 2 to "),
        ({"samples": 10**6}, r"calibration text \(builtin\): has \d+ tokens, enough for \d+ windows of 16, expected 1000000 windows"),
        ({"calib": "/nowhere/text.txt"}, "/nowhere/text.txt: cannot read it"),
        ({"device": "tpu"}, "--device: is 'tpu'"),
        ({"compute_dtype": "int8"}, "--compute-dtype: "),
        ({"path": str(MODELS / "gemma3"), "output": True}, "--output: was given, and the model's head is its embedding"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_nothing_is_left(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(quick(tmp_path / "m.gguf", **changes))
    assert not [*tmp_path.iterdir()]


def test_an_output_that_exists_is_replaced_only_when_asked_and_only_a_matrix(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    run(quick(out))
    before = out.read_bytes()
    with pytest.raises(InputError, match="exists, expected a path that does not exist") as caught:
        run(quick(out, samples=3))
    assert caught.value.hint == "--overwrite replaces it" and out.read_bytes() == before
    run(quick(out, samples=3, overwrite=True))
    assert out.read_bytes() != before
    model, text, link = write_model(tmp_path / "model.gguf", gguf_config_of("llama")), tmp_path / "notes", tmp_path / "link"
    text.write_text("mine")
    link.symlink_to(out)
    for path in (model, text, link, tmp_path):
        with pytest.raises(InputError, match="cannot be overwritten"):
            run(quick(path, overwrite=True))
    assert text.read_text() == "mine" and link.is_symlink() and model.stat().st_size > 1000


def test_a_failure_leaves_neither_a_file_nor_a_part_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise InputError("x", "is wrong")

    monkeypatch.setitem(command.ENCODE, "gguf", fail)
    with pytest.raises(InputError):
        run(quick(tmp_path / "m.gguf", offload=True))
    assert not [*tmp_path.iterdir()]


def test_starved_experts_are_reported(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = config_of("qwen3-moe")
    _, twin = random_twin(config, torch.float32)
    root = tmp_path / "moe"
    root.mkdir()
    import json

    tokenizer = json.loads((MODELS / "llama" / "tokenizer.json").read_text())
    count = len(tokenizer["model"]["vocab"])
    embedding = torch.randn(count + 300, config["hidden_size"], generator=torch.Generator().manual_seed(0))
    values = {**twin.values, "model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    (root / "config.json").write_text(json.dumps({**config, "vocab_size": count + 300}))
    save_file({name: value.contiguous() for name, value in values.items()}, root / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS / "llama" / name, root / name)
    report = run(quick(tmp_path / "m.dat", path=str(root), samples=1, seq_len=2))
    assert report.data["unreached"] and all(name.endswith("_exps.weight") for name in report.data["unreached"])
    assert any(w.startswith("no token reached") and "more --samples helps" in w for w in report.warnings)
    found = read_imatrix(tmp_path / "m.dat")
    ones = importance_for(found, "blk.0.ffn_down_exps.weight", 6, 16, "m.dat")
    assert ones is not None and (ones == 1).all(-1).sum() == report.data["unreached"]["blk.0.ffn_down_exps.weight"]
