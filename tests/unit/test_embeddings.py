"""Embeddings at 8 bits: what is written, what a lookup gives, tied and untied, on ranks, read back, and where they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_fixtures import logits_of
from quantize_fixtures import two_layers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.comm import Comm, run_threads
from quantkit.commands import inspect, plan
from quantkit.commands.quantize import run
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.convert import convert_to_hf
from quantkit.errors import InputError
from quantkit.geometry import geometry_of
from quantkit.layouts.registry import UnpackingLinear, codec
from quantkit.layouts.table import PackedTable
from quantkit.model.load import embedded, load_decoder
from quantkit.ops.dtypes import as_bytes
from quantkit.plan import make_plan
from quantkit.quant_config import stored_assignment
from quantkit.quantizers.rtn import quantize_weight
from quantkit.report import Report
from quantkit.scheme import LinearScheme
from quantkit.shard import open_rank, shard_checkpoint, unshard
from quantkit.transcode import exact_conversion
from quantkit.verify import verify

EMBEDDING = "model.embed_tokens"
ASKED = ("embed_tokens:bits=8",)
GROUPS = ("embed_tokens:bits=8,group_size=32",)
BOTH = ("^lm_head$|embed_tokens:bits=8,sym=true,group_size=32",)
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


def quantized(source: Path, out: Path, override: tuple[str, ...] = ASKED, method: str = "rtn", **options: Any) -> Report:
    settings = {"format": "compressed-tensors", "group_size": 32, **options}
    return run(QuantizeOptions(path=str(source), out=out, method=method, device="cpu", override=override, **settings))


def untied(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["tie_word_embeddings"] = False
    tensors["lm_head.weight"] = tensors[f"{EMBEDDING}.weight"].flip(0).contiguous()


def of_vocabulary(size: int) -> Change:
    """Cut the vocabulary to ``size`` tokens."""

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["vocab_size"] = size
        tensors[f"{EMBEDDING}.weight"] = tensors[f"{EMBEDDING}.weight"][:size].contiguous()

    return change


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_layers(tmp_path_factory.mktemp("small") / "model")


def config_of(artifact: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((artifact / "config.json").read_text())
    return found


def rewrite(artifact: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = config_of(artifact)
    change(config)
    (artifact / "config.json").write_text(json.dumps(config))


SCHEMES = {
    "group": LinearScheme("rtn", "packed", 8, 32, True, "BF16"),
    "row": LinearScheme("rtn", "packed", 8, -1, True, "F16"),
    "asymmetric": LinearScheme("rtn", "packed", 8, 64, False, "BF16"),
    "three": LinearScheme("rtn", "packed", 3, 32, False, "F32"),
    "int8": LinearScheme("int8", "int8", 8, -1, True, "BF16"),
    "fp8": LinearScheme("fp8", "fp8", 8, -1, True, "F16"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_lookup_gives_the_rows_of_the_dequantized_table(name: str, dtype: torch.dtype) -> None:
    scheme, (n, k) = SCHEMES[name], (96, 128)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.05
    geometry, chosen = geometry_of(scheme, n, k, dtype="BF16"), codec(scheme.layout)
    parts = chosen.pack(quantize_weight(weight, scheme, torch.float32, "table"), geometry)
    again = chosen.pack(chosen.unpack(parts, geometry), geometry)
    assert all(as_bytes(again[suffix]) == as_bytes(part) for suffix, part in parts.items())
    table = PackedTable(parts, geometry, dtype)
    ids = torch.tensor([3, 95, 0, 3, 64, 31, *range(96)])
    found = table(ids)
    assert found.dtype == dtype and torch.equal(found, chosen.dequant(parts, geometry, dtype)[ids])
    assert table(ids[:0]).shape == (0, k)
    if name != "three":  # 3-bit zero points take a byte each once they are apart
        assert table.nbytes == sum(part.nbytes for part in parts.values()) <= geometry.total_bytes
    if scheme.bits == 8:
        assert float((found.float() - weight[ids]).norm() / weight[ids].norm()) < (0.04 if name == "fp8" else 0.015)


@pytest.mark.parametrize("override", [ASKED, GROUPS])
@pytest.mark.parametrize("change", [None, untied])
def test_the_embedding_alone_is_quantized_and_the_head_stays_in_floats(
    tmp_path: Path, change: Change | None, override: tuple[str, ...]
) -> None:
    source = two_layers(tmp_path / "source", change)
    done, out = quantized(source, tmp_path / "out", override), tmp_path / "out"
    before, after, config = load_file(source / "model.safetensors"), load_file(out / "model.safetensors"), config_of(out)
    parts = {"weight", "weight_scale"} if override == ASKED else {"weight_packed", "weight_scale", "weight_shape"}
    assert {name.removeprefix(f"{EMBEDDING}.") for name in after if name.startswith(EMBEDDING)} == parts
    assert config["tie_word_embeddings"] is False and config["quantization_config"]["ignore"] == ["lm_head"]
    group = config["quantization_config"]["config_groups"]["group_1"]
    assert group["targets"] == ["re:^model\\.embed_tokens$"] and group["input_activations"] is None
    assert group["format"] == ("int-quantized" if override == ASKED else "pack-quantized")
    want = (8, "channel", None, True) if override == ASKED else (8, "group", 32, True)
    assert tuple(group["weights"][key] for key in ("num_bits", "strategy", "group_size", "symmetric")) == want
    head = before["lm_head.weight" if change else f"{EMBEDDING}.weight"]
    assert torch.equal(after["lm_head.weight"], head)
    assert verify(out, deep=True).defects == []
    assert done.data["bytes_after"] == sum(value.nbytes for value in after.values())
    decoder = load_decoder(open_checkpoint(out), dtype=torch.float32)
    assert isinstance(decoder.embedding.weight, PackedTable) and torch.equal(decoder.head.op.weight(), head.float())
    rows, want = decoder.embedding.weight(torch.arange(1024)), before[f"{EMBEDDING}.weight"].float()
    assert float((rows - want).norm() / want.norm()) < 0.01
    assert decoder.nbytes == sum(4 * value.numel() if value.dtype == torch.bfloat16 and "scale" not in name else value.nbytes
                                 for name, value in after.items())  # fmt: skip


def test_what_was_planned_is_what_is_written(tmp_path: Path, small: Path) -> None:
    for name, override in (("rows", ASKED), ("groups", GROUPS), ("both", BOTH), ("head", ("lm_head:bits=8",))):
        planned = quantized(small, tmp_path / name, override, dry_run=True)
        done = quantized(small, tmp_path / name, override)
        stored = sum(value.nbytes for value in load_file(tmp_path / name / "model.safetensors").values())
        assert planned.data["bytes_after"] == done.data["bytes_after"] == stored, name


def test_embedding_and_head_of_a_tied_model_are_each_quantized_when_both_are_asked_for(tmp_path: Path, small: Path) -> None:
    quantized(small, tmp_path / "out", BOTH)
    after, config = load_file(tmp_path / "out" / "model.safetensors"), config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is False and config["quantization_config"]["ignore"] == []
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        assert torch.equal(after[f"{EMBEDDING}.{part}"], after[f"lm_head.{part}"])
    assert verify(tmp_path / "out", deep=True).defects == []
    decoder = load_decoder(open_checkpoint(tmp_path / "out"), dtype=torch.float32)
    assert isinstance(decoder.embedding.weight, PackedTable) and isinstance(decoder.head.op, UnpackingLinear)
    assert torch.equal(decoder.embedding.weight(torch.arange(1024)), decoder.head.op.weight())


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("case", ["rows", "groups", "both", "asymmetric", "padded", "idle"])
def test_ranks_look_up_their_own_packed_rows_and_give_the_same_logits(tmp_path: Path, case: str, tp: int) -> None:
    vocab = {"padded": 1000, "idle": 60}.get(case, 1024)  # the one is padded when it is cut, of the other one rank has everything
    source = two_layers(tmp_path / "source", of_vocabulary(vocab))
    override = {"groups": GROUPS, "both": BOTH, "asymmetric": ("embed_tokens:bits=8,sym=false",)}.get(case, ASKED)
    quantized(source, tmp_path / "out", override)
    checkpoint = open_checkpoint(tmp_path / "out")
    spec = spec_for(checkpoint.config)
    assignment = stored_assignment(checkpoint.config, spec, checkpoint.tensors)
    cut = make_plan(spec, assignment, tp, dtype="BF16")
    texts = [torch.tensor([5, 999, 17, 998, 0, 342, 700]) % vocab, torch.tensor([64, 63]) % vocab]
    shard_checkpoint(checkpoint, tmp_path / "shards", tp, overwrite=False)
    assert verify(tmp_path / "shards", deep=True).defects == []
    unshard(tmp_path / "shards", tmp_path / "again", overwrite=False)
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    whole = load_decoder(checkpoint, dtype=torch.float64, parity=True)
    want = logits_of(whole, texts)
    tokens = torch.cat(texts)
    positions = torch.arange(len(tokens))

    def rank(comm: Comm) -> tuple[list[Tensor], Tensor, int]:
        with torch.no_grad():
            found = []
            own, stored_plan, stored = open_rank(tmp_path / "shards", comm.rank)
            for part, presliced in ((checkpoint, None), (own, stored)):
                decoder = load_decoder(part, dtype=torch.float64, plan=stored_plan, comm=comm, presliced=presliced, parity=True)
                assert isinstance(decoder.embedding.weight, PackedTable)
                assert decoder.embedding.weight.shape[0] == len(cut.rows(comm.rank))
                found.append((logits_of(decoder, texts), decoder.embed(tokens, positions), decoder.embedding.nbytes))
            assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True)) and found[0][2] == found[1][2]
            return found[1]

    for logits, looked_up, nbytes in run_threads(tp, rank):
        assert torch.equal(looked_up, whole.embed(tokens, positions)), "exactly one rank adds something that is not 0"
        assert all(float((a - b).abs().max()) < 1e-8 for a, b in zip(logits, want, strict=True))
        assert nbytes < whole.embedding.nbytes or case == "idle"


def test_a_vocabulary_that_no_word_of_zero_points_divides_is_cut_only_when_symmetric(tmp_path: Path) -> None:
    source = two_layers(tmp_path / "source", of_vocabulary(998))
    quantized(source, tmp_path / "asym", ("embed_tokens:bits=8,sym=false",))
    checkpoint = open_checkpoint(tmp_path / "asym")
    assert verify(tmp_path / "asym", deep=True).defects == []
    decoder = load_decoder(checkpoint, dtype=torch.float32)
    want = load_file(source / "model.safetensors")[f"{EMBEDDING}.weight"].float()
    rows = decoder.embed(torch.arange(998), torch.arange(998))
    assert float((rows - want).norm() / want.norm()) < 0.01
    with pytest.raises(InputError, match=r"rank 0: model\.embed_tokens: cut N=0:512 falls inside a granule"):
        shard_checkpoint(checkpoint, tmp_path / "shards", 2, overwrite=False)
    quantized(source, tmp_path / "sym")
    shard_checkpoint(open_checkpoint(tmp_path / "sym"), tmp_path / "shards", 2, overwrite=False)
    assert verify(tmp_path / "shards", deep=True).defects == []


def test_floats_again_are_the_rows_that_are_looked_up(tmp_path: Path, small: Path) -> None:
    quantized(small, tmp_path / "out")
    convert_to_hf(open_checkpoint(tmp_path / "out"), tmp_path / "hf", dtype="float32", max_shard_size=1 << 30, overwrite=False)
    config, dense = config_of(tmp_path / "hf"), load_file(tmp_path / "hf" / "model.safetensors")
    assert "quantization_config" not in config and config["tie_word_embeddings"] is False
    decoder = load_decoder(open_checkpoint(tmp_path / "out"), dtype=torch.float32, parity=True)
    assert isinstance(decoder.embedding.weight, PackedTable)
    assert torch.equal(dense[f"{EMBEDDING}.weight"], decoder.embedding.weight(torch.arange(1024)))
    assert verify(tmp_path / "hf", deep=True).defects == []
    texts = [torch.arange(9)]
    got = logits_of(load_decoder(open_checkpoint(tmp_path / "hf"), dtype=torch.float32), texts)[0]
    assert torch.equal(got, logits_of(decoder, texts)[0])
    with pytest.raises(InputError, match=r"^model\.embed_tokens: is quantized, which gptq cannot hold"):
        exact_conversion(open_checkpoint(tmp_path / "out"), "gptq")


def test_activations_of_calibration_begin_with_the_same_rows(tmp_path: Path, small: Path) -> None:
    quantized(small, tmp_path / "out")
    checkpoint, tokens = open_checkpoint(tmp_path / "out"), torch.tensor([[4, 1023, 4], [9, 0, 77]])
    decoder = load_decoder(checkpoint, dtype=torch.float32)
    want = decoder.embed(tokens.reshape(-1), torch.arange(3).repeat(2)).reshape(2, 3, -1)
    assert torch.equal(embedded(checkpoint, spec_for(checkpoint.config), tokens, dtype=torch.float32), want)


@pytest.mark.parametrize("method", ["w8a8", "fp8", "awq", "gptq"])
def test_every_method_that_the_format_holds_leaves_the_embedding_to_rounding(tmp_path: Path, small: Path, method: str) -> None:
    options: dict[str, Any] = {"group_size": None} if method in ("w8a8", "fp8") else {}
    calibration = {} if method == "fp8" else {"samples": 4, "seq_len": 32}
    done = quantized(small, tmp_path / "out", ASKED, method, **options, **calibration)
    assert dict(done.tables[0].rows)["embedding"] == "8 bits, whole rows, symmetric, and the head untied from it"
    assert any(warning.startswith("an embedding of whole rows runs here and in transformers") for warning in done.warnings)
    assert verify(tmp_path / "out", deep=True).defects == []
    checkpoint = open_checkpoint(tmp_path / "out")
    scheme = stored_assignment(checkpoint.config, spec_for(checkpoint.config), checkpoint.tensors)[EMBEDDING]
    assert (scheme.layout, scheme.bits, scheme.group_size, scheme.sym) == ("int8", 8, -1, True)
    assert scheme.activations == "", "whatever the linears do to their inputs"


# reading


def test_a_group_may_mean_the_class_of_embeddings_or_the_module(tmp_path: Path, small: Path) -> None:
    quantized(small, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    want = stored_assignment(checkpoint.config, spec_for(checkpoint.config), checkpoint.tensors)

    def by_class(targets: list[str]) -> Callable[[dict[str, Any]], None]:
        return lambda config: config["quantization_config"]["config_groups"]["group_1"].update(targets=targets)

    for targets in (["Embedding"], [EMBEDDING]):
        rewrite(tmp_path / "out", by_class(targets))
        again = open_checkpoint(tmp_path / "out")
        assert stored_assignment(again.config, spec_for(again.config), again.tensors) == want
    rewrite(tmp_path / "out", by_class(["Linear"]))
    with pytest.raises(InputError, match=r"no group's targets mean model\.embed_tokens"):
        load_decoder(open_checkpoint(tmp_path / "out"), dtype=torch.float32)


def test_a_head_is_not_tied_to_a_quantized_embedding(tmp_path: Path, small: Path) -> None:
    quantized(small, tmp_path / "out")
    rewrite(tmp_path / "out", lambda config: config.update(tie_word_embeddings=True))
    with pytest.raises(InputError, match=r"^model\.embed_tokens: is quantized, and config\.json ties the head to it"):
        load_decoder(open_checkpoint(tmp_path / "out"), dtype=torch.float32)


def test_a_broken_part_is_named(tmp_path: Path, small: Path) -> None:
    quantized(small, tmp_path / "out", GROUPS)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{EMBEDDING}.weight_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert any(d.where == f"{EMBEDDING}.weight_scale" and d.what == "is missing" for d in verify(tmp_path / "out", deep=True).defects)
    with pytest.raises(InputError, match=r"^model\.embed_tokens\.weight_scale: is missing"):
        load_decoder(open_checkpoint(tmp_path / "out"), dtype=torch.float32)


@pytest.mark.parametrize("override", [ASKED, GROUPS])
def test_plan_and_inspect_count_its_stored_bytes(tmp_path: Path, small: Path, override: tuple[str, ...]) -> None:
    quantized(small, tmp_path / "out", override)
    found = plan.run(plan.PlanOptions(str(tmp_path / "out"), 2)).data
    bare = tmp_path / "config.json"
    bare.write_text((tmp_path / "out" / "config.json").read_text())
    assert found["dtype"] == "BF16", "of what is kept, not of the embedding's codes"
    assert plan.run(plan.PlanOptions(str(bare), 2)).data["ranks"] == found["ranks"]
    layout, group, bits = ("int8", -1, 8.0625) if override == ASKED else ("packed", 32, 8.5005)
    half = geometry_of(LinearScheme("rtn", layout, 8, group, True, "BF16"), 512, 256, dtype="BF16").total_bytes
    assert [rank["vocabulary"] for rank in found["ranks"]] == [half + 2 * 512 * 256] * 2
    stored = inspect.run(inspect.InspectOptions(str(tmp_path / "out"))).data["linears"]
    assert [(s["bits"], s["count"]) for s in stored if s["format"] == f"{layout}, 8 bits (embedding)"] == [(bits, 1)]


# what is refused


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("rtn", {"format": "awq"}, "in the awq format, whose loaders read an embedding as floats"),
        ("rtn", {"format": "gptq"}, "in the gptq format"),
        ("gptq", {"format": None}, "in the gptq format"),
        ("awq", {"format": None}, "in the awq format"),
        ("nf4", {"format": None, "group_size": None}, "in the bnb format"),
        ("int8", {"format": None, "group_size": None}, "in the bnb format"),
        ("fp8", {"format": "fp8", "group_size": None}, "in the fp8 format"),
    ],
)
def test_other_formats_refuse_it_by_name_with_the_remedy(
    tmp_path: Path, small: Path, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        quantized(small, tmp_path / "out", ASKED, method, **options)
    assert caught.value.where == EMBEDDING and message in caught.value.what
    assert caught.value.expected is not None and caught.value.expected.startswith("--format compressed-tensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("embed_tokens:method=gptq,bits=8", "method 'gptq' for model.embed_tokens, which is looked up"),
        ("embed_tokens:bits=5", "5 bits with method rtn"),
        ("embed_tokens:bits=8,group_size=48", "do not divide into groups of 48"),
        ("embed_token$:bits=8", "matches no linear of the model"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, small: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        quantized(small, tmp_path / "out", (override,))
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_only_an_override_that_means_it_quantizes_the_embedding(tmp_path: Path, small: Path) -> None:
    for name, override in (
        ("all", (r"model\.:bits=8",)),
        ("some", (r"layers\.1\.mlp|embed_tokens:bits=8",)),
        ("keep", ("embed_tokens:keep",)),
    ):
        quantized(small, tmp_path / name, override)
        assert f"{EMBEDDING}.weight" in load_file(tmp_path / name / "model.safetensors"), name
        assert config_of(tmp_path / name)["tie_word_embeddings"] is True


@pytest.mark.gpu
@pytest.mark.parametrize("override", [ASKED, GROUPS, BOTH])
def test_a_gpu_looks_up_the_rows_that_a_processor_does(tmp_path: Path, override: tuple[str, ...]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    quantized(two_layers(tmp_path / "m", untied if override is BOTH else None), tmp_path / "q", override)
    checkpoint = open_checkpoint(tmp_path / "q")
    here, there = (load_decoder(checkpoint, dtype=torch.float32, device=device) for device in ("cpu", "cuda"))
    ids = torch.arange(here.spec.dims["vocab"].size)
    tables = [decoder.embedding.weight for decoder in (here, there)]
    assert isinstance(tables[0], PackedTable) and isinstance(tables[1], PackedTable)
    assert torch.equal(tables[1](ids.cuda()).cpu(), tables[0](ids))
    for ours, theirs in zip(logits_of(there, [ids[:20]]), logits_of(here, [ids[:20]]), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
