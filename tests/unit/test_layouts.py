"""The codecs against the vectors of the formats and tensors that the reference libraries wrote; whole artifacts, cut and verified."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_fixtures import LLAMA, artifact
from decoder_fixtures import logits_of, texts_of
from safetensors.torch import load_file
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.comm import Comm, run_threads
from quantkit.errors import InputError
from quantkit.geometry import Geometry, geometry_of
from quantkit.layouts.base import Codebook, GroupedInt, Scaled
from quantkit.layouts.registry import UnpackingLinear, codec
from quantkit.model.load import load_block, load_decoder
from quantkit.ops.codebook import CODEBOOKS
from quantkit.ops.dtypes import FLOAT_DTYPES, as_bytes
from quantkit.ops.eightbit import quantize_tokens_fp8, quantize_tokens_int8
from quantkit.scheme import LinearScheme
from quantkit.shard import open_rank, shard_checkpoint, unshard
from quantkit.verify import verify

DATA = Path(__file__).parent.parent / "data"
SCALE_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def golden(file: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of a golden file by case."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(DATA / f"{file}_golden.safetensors").items():
        case, _, part = name.partition(".")
        found.setdefault(case, {})[part] = value
    return found


GPTQ, CT, GEMV, BNB = golden("gptq"), golden("ct"), golden("awq_gemv"), golden("bnb")


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert bytes(as_bytes(got.contiguous())) == bytes(as_bytes(want.contiguous()))


def hexes(value: Tensor) -> list[int]:
    return [int(word) & 0xFFFFFFFF for word in value.reshape(-1)]


def grouped(codes: Tensor, zeros: Tensor, bits: int) -> GroupedInt:
    return GroupedInt(codes.to(torch.uint8), torch.ones(zeros.shape), zeros.to(torch.uint8), bits)


def gptq(n: int, k: int, bits: int = 4, group: int = -1, layout: str = "gptq", **more: Any) -> Geometry:
    return geometry_of(LinearScheme("gptq", layout, bits, group, **more), n, k, dtype="F16")


def test_gptq_words_of_the_format() -> None:
    codes = (torch.arange(16)[None] + torch.arange(8)[:, None]) % 16  # [N, K]
    zeros = torch.arange(1, 9)[:, None]
    v1 = codec("gptq").pack(grouped(codes, zeros, 4), gptq(8, 16))
    v2 = codec("gptq_v2").pack(grouped(codes, zeros, 4), gptq(8, 16, layout="gptq_v2"))
    assert hexes(v1["qweight"])[:3] == [0x76543210, 0x87654321, 0x98765432] and hexes(v1["qweight"][1])[0] == 0xFEDCBA98
    assert (hexes(v1["qzeros"]), hexes(v2["qzeros"])) == ([0x76543210], [0x87654321])
    three = codec("gptq").pack(grouped(torch.arange(32).repeat(32, 1) % 8, torch.full((32, 1), 4), 3), gptq(32, 32, 3))
    assert hexes(three["qweight"][:, 0]) == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    assert hexes(three["qzeros"]) == [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]
    for bits, words in ((4, (0x77777777, 0x88888888)), (8, (0x7F7F7F7F, 0x80808080))):
        made = [
            codec(name).pack(grouped(codes, torch.full((8, 1), 2 ** (bits - 1)), bits), gptq(8, 16, bits, layout=name))
            for name in ("gptq", "gptq_v2")
        ]
        assert [hexes(parts["qzeros"])[0] for parts in made] == list(words)


def test_gptq_shapes_of_the_format() -> None:
    geometry = gptq(11008, 4096, 4, 128)
    shapes = {part.suffix: geometry.shape(part) for part in geometry.parts}
    assert shapes == {"qweight": (512, 11008), "qzeros": (32, 1376), "scales": (32, 11008), "g_idx": (4096,)}


def test_v1_cannot_hold_a_zero_point_of_zero_and_v2_can() -> None:
    result = grouped(torch.zeros(8, 16), torch.tensor([8, 0, 8, 8, 8, 8, 8, 8])[:, None], 4)
    with pytest.raises(InputError, match="layout gptq: a zero point of 0, expected 1 or more") as caught:
        codec("gptq").pack(result, gptq(8, 16))
    assert caught.value.hint == "--format gptq_v2 can hold it"
    assert hexes(codec("gptq_v2").pack(result, gptq(8, 16, layout="gptq_v2"))["qzeros"]) == [0x88888808]


def test_scattered_groups_are_refused_where_the_config_says_there_are_none() -> None:
    geometry = gptq(8, 16, 4, 8, act_order=True)
    order = (torch.arange(16) % 2).to(torch.int32)
    parts = codec("gptq").pack(replace(grouped(torch.zeros(8, 16), torch.full((8, 2), 8), 4), g_idx=order), geometry)
    assert torch.equal(codec("gptq").unpack(parts, geometry).g_idx, order)  # type: ignore[union-attr,arg-type]
    with pytest.raises(InputError, match="desc_act false"):
        codec("gptq").unpack(parts, gptq(8, 16, 4, 8))
    for bad in (-1, 2):
        with pytest.raises(InputError, match=r"g_idx: holds groups .*, expected 0 to 1"):
            codec("gptq").unpack({**parts, "g_idx": torch.full((16,), bad, dtype=torch.int32)}, geometry)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("case", sorted(GPTQ))
def test_gptq_is_that_of_the_reference(case: str, version: str) -> None:
    parts = dict(GPTQ[case])
    stored = {name: parts[name] for name in ("qweight", "scales", "g_idx")}
    stored["qzeros"] = parts["qzeros" if version == "gptq" else "qzeros_v2"]
    bits, act = int(case[0]), case.endswith("act")
    (k, n), groups = parts["codes"].shape, parts["scales"].shape[0]
    geometry = gptq(n, k, bits, k // groups, version, act_order=act)
    result = GroupedInt(parts["codes"].T, parts["scales"].T, parts["zeros"].T, bits, g_idx=parts["g_idx"] if act else None)
    made = codec(version).pack(result, geometry)
    assert made.keys() == stored.keys()
    for name, value in stored.items():
        assert_same_bits(made[name], value)
    again = codec(version).unpack(stored, geometry)
    assert isinstance(again, GroupedInt)
    assert_same_bits(again.codes, parts["codes"].T)
    assert_same_bits(again.zeros, parts["zeros"].T)
    assert_same_bits(codec(version).dequant(stored, geometry), parts["dense"].T)


def test_awq_gemv_words_and_widths_of_the_format() -> None:
    def gemv(k: int, group: int) -> Geometry:
        return geometry_of(LinearScheme("awq", "awq_gemv", 4, group), 8, k, dtype="F16")

    for k, group, words in ((11008, 128, 11), (29568, 128, 29), (64, 32, 4), (192, 64, 2)):
        geometry = gemv(k, group)
        assert [geometry.shape(geometry.part(s)) for s in ("qzeros", "scales")] == [(8, words), (8, 8 * words)]
    parts = codec("awq_gemv").pack(grouped(torch.arange(64).repeat(8, 1) % 8, torch.full((8, 2), 8), 4), gemv(64, 32))
    assert hexes(parts["qweight"])[0] == 0x76543210
    assert hexes(parts["qzeros"][0]) == [0x88, 0, 0, 0]


@pytest.mark.parametrize("case", sorted(GEMV))
def test_awq_gemv_is_that_of_the_reference(case: str) -> None:
    parts = GEMV[case]
    stored = {name: parts[name] for name in ("qweight", "qzeros", "scales", "bias") if name in parts}
    (n, k), group = parts["codes"].shape, int(case[1 : case.index("-")])
    geometry = geometry_of(LinearScheme("awq", "awq_gemv", 4, group), n, k, dtype="F16", bias="bias" in parts)
    result = codec("awq_gemv").unpack(stored, geometry)
    assert isinstance(result, GroupedInt)
    assert_same_bits(result.codes, parts["codes"])
    assert_same_bits(result.zeros, parts["zeros"])
    for name, value in codec("awq_gemv").pack(result, geometry).items():
        assert_same_bits(value, stored[name])
    assert_same_bits(codec("awq_gemv").dequant(stored, geometry, torch.float16), parts["weight"])


def packed(n: int, k: int, bits: int, *, sym: bool, group: int = -1, scales: str = "F16") -> Geometry:
    return geometry_of(LinearScheme("rtn", "packed", bits, group, sym, scales), n, k, dtype="F16")


def test_pack_quantized_words_of_the_format() -> None:
    def words(signed: list[int], bits: int) -> list[int]:
        middle = 2 ** (bits - 1)
        result = grouped(torch.tensor([signed]) + middle, torch.full((1, 1), middle), bits)
        parts = codec("packed").pack(result, packed(1, len(signed), bits, sym=True))
        assert parts["weight_shape"].tolist() == [1, len(signed)] and "weight_zero_point" not in parts
        return hexes(parts["weight_packed"])

    assert words(list(range(-8, 8)), 4) == [0x76543210, 0xFEDCBA98]
    assert words([-128, -1, 0, 127], 8) == [0xFF807F00]
    assert words(list(range(-4, 4)) * 4, 3) == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    assert words([1] * 12, 4) == [0x99999999, 0x00009999]
    zeros = torch.tensor([0, 1, -8, 7, 0, 0, 0, 0])[:, None] + 8
    parts = codec("packed").pack(grouped(torch.zeros(8, 8), zeros, 4), packed(8, 8, 4, sym=False))
    assert hexes(parts["weight_zero_point"]) == [0x8888F098]
    with pytest.raises(InputError, match="zero points of its own in a symmetric linear"):
        codec("packed").pack(grouped(torch.zeros(8, 8), zeros, 4), packed(8, 8, 4, sym=True))


@pytest.mark.parametrize("case", sorted(name for name in CT if name.startswith("pack")))
def test_pack_quantized_is_that_of_the_reference(case: str) -> None:
    parts = CT[case]
    stored = {name: value for name, value in parts.items() if name.startswith("weight")}
    (n, k), groups = parts["codes"].shape, parts["weight_scale"].shape[1]
    bits, sym = int(case[len("pack-int")]), "-sym-" in case
    group = -1 if groups == 1 else k // groups
    geometry = packed(n, k, bits, sym=sym, group=group, scales=SCALE_DTYPES[parts["weight_scale"].dtype])
    assert {part.suffix: geometry.stored_shape(part) for part in geometry.parts} == {s: tuple(v.shape) for s, v in stored.items()}
    result = codec("packed").unpack(stored, geometry)
    assert isinstance(result, GroupedInt)
    assert torch.equal(result.codes.int() - 2 ** (bits - 1), parts["codes"].int())
    for name, value in codec("packed").pack(result, geometry).items():
        assert_same_bits(value, stored[name])
    assert_same_bits(codec("packed").dequant(stored, geometry, parts["dense"].dtype), parts["dense"])


def test_float8_bytes_of_the_format() -> None:
    values = torch.tensor([1.0, -0.5, 448.0, 240.0, 0.0175, 2.0**-9, 2.0**-10]).to(torch.float8_e4m3fn)
    assert values.view(torch.uint8).tolist() == [0x38, 0xB0, 0x7E, 0x77, 0x09, 0x01, 0x00]


@pytest.mark.parametrize("case", sorted(name for name in CT if not name.startswith(("pack", "token")) and "-asym-" not in name))
def test_eight_bits_are_those_of_the_reference(case: str) -> None:
    parts = CT[case]
    stored = {name: parts[name] for name in ("weight", "weight_scale")}
    layout, group = ("fp8" if case.startswith("float") else "int8"), (0 if "tensor" in case else -1)
    scheme = LinearScheme(layout, layout, 8, group, True, SCALE_DTYPES[parts["weight_scale"].dtype])
    geometry = geometry_of(scheme, *parts["weight"].shape, dtype="BF16")
    assert {part.suffix: geometry.stored_shape(part) for part in geometry.parts} == {s: tuple(v.shape) for s, v in stored.items()}
    result = codec(layout).unpack(stored, geometry)
    assert isinstance(result, Scaled)
    for name, value in codec(layout).pack(result, geometry).items():
        assert_same_bits(value, stored[name])
    assert_same_bits(codec(layout).dequant(stored, geometry, parts["dense"].dtype), parts["dense"])


def nf4(n: int, k: int, code: str = "nf4", block: int = 64, *, nested: bool = False) -> Geometry:
    return geometry_of(LinearScheme(code, "bnb4", 4, block, True, "F32", code, nested), n, k, dtype="BF16")


def test_nf4_bytes_of_the_format() -> None:
    i = torch.arange(64)
    codes = torch.stack([i % 16, 7 * i % 16]).to(torch.uint8)
    book = Codebook(codes, torch.tensor([2.0, 0.5]), "nf4", 64, torch.float32)
    plain = codec("bnb4").pack(book, nf4(2, 64))
    flat = plain["weight"].reshape(-1)
    assert bytes(flat[:8].tolist()).hex() == "0123456789abcdef" and bytes(flat[32:40].tolist()).hex() == "07e5c3a18f6d4b29"
    state = bytes(plain["weight.quant_state.bitsandbytes__nf4"].tolist())
    assert state == b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]}' and len(state) == 76
    want = torch.stack([2.0 * CODEBOOKS["nf4"][codes[0].long()], 0.5 * CODEBOOKS["nf4"][codes[1].long()]])
    assert_same_bits(codec("bnb4").dequant(plain, nf4(2, 64)), want)
    nested = codec("bnb4").pack(replace(book, dtype=torch.bfloat16), nf4(2, 64, nested=True))
    assert len(nested["weight.quant_state.bitsandbytes__nf4"]) == 152
    assert nested["weight.absmax"].reshape(-1).tolist() == [255, 0] and nested["weight.nested_absmax"].tolist() == [0.75]
    back = codec("bnb4").unpack(nested, nf4(2, 64, nested=True))
    assert isinstance(back, Codebook)
    assert back.absmax.tolist() == pytest.approx([2.0, 0.505273], abs=1e-6)


@pytest.mark.parametrize("case", sorted(name for name in BNB if name.startswith(("nf4-", "fp4-"))))
def test_bitsandbytes_is_that_of_the_reference(case: str) -> None:
    parts = BNB[case]
    stored = {name if name == "weight" else f"weight.{name}": value for name, value in parts.items() if name != "dequantized"}
    code, block, *nested = case.partition("/")[0].split("-")
    n, k = parts["dequantized"].shape
    geometry = nf4(n, k, code, int(block), nested=bool(nested))
    assert {p.suffix: geometry.stored_shape(p) for p in geometry.parts if not p.free} == {
        s: tuple(v.shape) for s, v in stored.items() if "quant_state" not in s
    }
    viewed = {p.suffix: stored[p.suffix] if p.free else stored[p.suffix].reshape(geometry.shape(p)) for p in geometry.parts}
    dense = codec("bnb4").dequant(viewed, geometry, parts["dequantized"].dtype)
    # The second zero of FP4 comes back as -0 from the reference's kernel, and as 0 from the codebook that the file holds.
    assert_same_bits(dense + 0.0, parts["dequantized"] + 0.0)
    book = codec("bnb4").unpack(viewed, geometry)
    assert isinstance(book, Codebook) and book.dtype in FLOAT_DTYPES.values()
    made = codec("bnb4").pack(book, geometry)
    assert made.keys() == viewed.keys()
    for name in viewed:  # scales that were quantized themselves are not quantized to the same again (`formats.md` 5.3)
        if not nested or name in ("weight", "weight.quant_map", "weight.nested_quant_map"):
            assert_same_bits(made[name], viewed[name])


def test_llm_int8_of_the_format() -> None:
    geometry = geometry_of(LinearScheme("int8", "bnb8", 8, -1, True, "F32"), 2, 4, dtype="F16")
    values = torch.tensor([[64, -127, 32, 16], [32, 64, -95, 127]], dtype=torch.int8)
    parts = codec("bnb8").pack(Scaled(values, torch.tensor([[2.0], [0.4]]), divisor=127), geometry)
    assert (parts["SCB"].dtype, parts["SCB"].tolist()) == (torch.float32, pytest.approx([2.0, 0.4]))
    assert parts["weight_format"].shape == () and int(parts["weight_format"]) == 0
    dense = codec("bnb8").dequant(parts, geometry)
    assert dense[0, 0] == pytest.approx(64 * 2 / 127) and dense[1, 2] == pytest.approx(-95 * 0.4 / 127)


ARTIFACTS = {
    "awq": LinearScheme("awq", "awq", 4, 32),
    "gptq": LinearScheme("gptq", "gptq", 4, 32, True),
    "gptq-3": LinearScheme("gptq", "gptq_v2", 3, 32),
    "gptq-act": LinearScheme("gptq", "gptq_v2", 4, 32, act_order=True),
    "packed-sym": LinearScheme("rtn", "packed", 8, 32, True, "BF16"),
    "packed-asym": LinearScheme("rtn", "packed", 4, 32, False, "BF16"),
    "int8": LinearScheme("w8a8", "int8", 8, -1, True, "BF16", activations="int8_token"),
    "fp8": LinearScheme("fp8", "fp8", 8, -1, True, "BF16", activations="fp8_token"),
    "fp8_block": LinearScheme("fp8", "fp8_block", 8, 128, True, "F32"),
    "nf4": LinearScheme("nf4", "bnb4", 4, 64, True, "F32", "nf4"),
    "nf4-nested": LinearScheme("nf4", "bnb4", 4, 64, True, "F32", "nf4", double_quant=True),
    "bnb8": LinearScheme("int8", "bnb8", 8, -1, True, "F32", activations="int8_outlier"),
}


WIDE = {**LLAMA, "intermediate_size": 512, "head_dim": 128, "num_key_value_heads": 4}
"""Heads of whole blocks of 128, which is where block FP8 can be cut."""


@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifacts_are_cut_restored_and_verified(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    artifact(source, ARTIFACTS[name], WIDE if name == "fp8_block" else {**LLAMA, "intermediate_size": 256})
    found = verify(source, deep=True)
    assert not found.defects and found.unpacked == 14
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for tp in (1, 2, 3, 4):
        shards, back = tmp_path / f"shards{tp}", tmp_path / f"back{tp}"
        shard_checkpoint(open_checkpoint(source), shards, tp, overwrite=False)
        assert not verify(shards, deep=True).defects
        unshard(shards, back, overwrite=False)
        after = {path.name: path.read_bytes() for path in back.iterdir()}
        assert after.pop("SHA256SUMS") and after == before
    rank = shards / "rank-1-of-4.safetensors"
    data = bytearray(rank.read_bytes())
    data[-1] ^= 1
    rank.write_bytes(data)
    assert [d.where for d in verify(shards, deep=False).defects] == [rank.name]
    shutil.rmtree(shards)


@pytest.mark.parametrize("activations", ["int8_token", "fp8_token"])
@pytest.mark.parametrize("name", ["packed-asym", "int8", "fp8"])
def test_whatever_the_weights_are_the_tokens_are_rounded(tmp_path: Path, name: str, activations: str) -> None:
    artifact(tmp_path / "q", replace(ARTIFACTS[name], activations=activations))
    checkpoint = open_checkpoint(tmp_path / "q")
    spec = spec_for(checkpoint.config)
    block, plain = (load_block(checkpoint, spec, 0, dtype=torch.float32, parity=parity) for parity in (False, True))
    for role, linear in block.linears.items():
        dense = plain.linears[role].op
        weight = dense.weight() if isinstance(dense, UnpackingLinear) else None
        assert weight is not None
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(2))
        values, scales = (quantize_tokens_int8 if activations == "int8_token" else quantize_tokens_fp8)(x)
        got = linear.op(x)
        torch.testing.assert_close(got, (values.float() * scales) @ weight.T)
        assert not torch.allclose(got, dense(x))


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", ARTIFACTS)
def test_ranks_of_shards_compute_what_the_whole_artifact_computes(tmp_path: Path, name: str, tp: int) -> None:
    artifact(tmp_path / "source", ARTIFACTS[name], WIDE if name == "fp8_block" else {**LLAMA, "intermediate_size": 256})
    source, texts = open_checkpoint(tmp_path / "source"), texts_of((5, 3))
    shard_checkpoint(source, tmp_path / "shards", tp, overwrite=False)
    with torch.no_grad():
        want = logits_of(load_decoder(source, dtype=torch.float64, parity=True), texts)

    def rank(comm: Comm) -> list[Tensor]:
        checkpoint, plan, assignment = open_rank(tmp_path / "shards", comm.rank)
        with torch.no_grad():
            own = load_decoder(checkpoint, dtype=torch.float64, plan=plan, comm=comm, presliced=assignment, parity=True)
            return logits_of(own, texts)

    for got in run_threads(tp, rank):
        for a, b in zip(got, want, strict=True):
            assert float((a - b).abs().max()) <= 1e-9 * max(1.0, float(b.abs().max()))
