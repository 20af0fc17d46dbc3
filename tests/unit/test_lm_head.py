"""A head in floats, held as 8-bit blocks: its bytes are ggml's, its logits those of the blocks, on any number of ranks; plans know it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_fixtures import MemoryCheckpoint, awq_checkpoint, config_of, logits_of, plan_of, random_twin, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.comm import Comm, run_threads
from quantkit.commands.plan import PlanOptions, run
from quantkit.errors import InputError
from quantkit.layouts.table import PackedTable
from quantkit.model.decoder import Decoder
from quantkit.model.load import load_decoder
from quantkit.ops.cuda_tiles import TiledLinear
from quantkit.ops.ggml.decode import decode
from quantkit.ops.ggml.encode import RowRefused, encode
from quantkit.ops.ggml.tensor import _q8_0, encode_q8_0
from quantkit.plan import encoded_head, make_plan, rank_memory
from quantkit.quant_config import stored_assignment
from quantkit.runtime.llm import LLM
from quantkit.runtime.params import SamplingParams
from quantkit.shard import open_rank, shard_checkpoint

MODELS = Path(__file__).parent.parent / "data" / "models"
WIDE: dict[str, Any] = {"hidden_size": 96, "head_dim": 16}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def checkpoint_of(family: str) -> MemoryCheckpoint:
    return random_twin({**config_of(family), **WIDE}, torch.float32)[1]


@pytest.fixture(scope="module")
def llama() -> MemoryCheckpoint:
    return checkpoint_of("llama")


@pytest.fixture(scope="module")
def tied() -> MemoryCheckpoint:
    return checkpoint_of("llama-tied-mha")


# the blocks


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([1e-44, 1e-40, 1e-38, 1e-9, 1e-3, 1.0, 300.0]), st.sampled_from(["normal", "halves", "few"])
)
def test_torch_makes_the_bytes_that_the_encoder_makes(seed: int, scale: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(5, 96, generator=generator)
    if kind == "halves":  # codes that end in a half of either sign, and in whole numbers
        values = torch.randint(-254, 255, (5, 96), generator=generator) / 2
        values[:, ::32] = 127.0
    if kind == "few":
        values = values * (torch.rand(5, 96, generator=generator) < 0.05) * torch.tensor([1.0, -1.0, 0.0, -0.0, 1.0])[:, None]
    values = values * scale
    assert np.array_equal(_q8_0(values).numpy(), encode(values.numpy(), "Q8_0"))
    assert torch.equal(encode_q8_0(values.bfloat16()), _q8_0(values.bfloat16().float()))


@pytest.mark.parametrize(("value", "finite"), [(float("nan"), False), (float("-inf"), False), (1e9, True)])
def test_a_row_that_blocks_cannot_hold_is_named(value: float, finite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.ops.ggml.tensor.CHUNK_WEIGHTS", 128)  # two rows at a time
    values = torch.ones(9, 64)
    values[5, 40] = value
    for encoder in (encode_q8_0, _q8_0):
        with pytest.raises(RowRefused, match="row 5") as caught:
            encoder(values)
        assert caught.value.row == 5 and ("is not finite" not in caught.value.line) == finite


# the model


def head_weight(checkpoint: MemoryCheckpoint) -> Tensor:
    name = "model.embed_tokens.weight" if checkpoint.config["tie_word_embeddings"] else "lm_head.weight"
    return checkpoint.values[name].float()


@pytest.mark.parametrize("family", ["llama", "llama-tied-mha", "gemma2"])
def test_logits_are_those_of_the_blocks_and_near_the_floats(family: str) -> None:
    checkpoint = checkpoint_of(family)
    weight, texts = head_weight(checkpoint), texts_of((5, 9))
    dense = decode(torch.from_numpy(encode(weight.contiguous().numpy(), "Q8_0")), "Q8_0")
    assert 0 < float((dense - weight).abs().max()) <= float(weight.abs().max()) / 254 * 1.01
    plain, eight = (load_decoder(checkpoint, dtype=torch.float32, lm_head=kind) for kind in ("auto", "q8_0"))
    hidden = plain.forward(torch.cat(texts), _batch(texts))
    assert torch.equal(eight.forward(torch.cat(texts), _batch(texts)), hidden), "tokens are looked up in floats"
    cap = plain.head.softcap
    want = hidden @ dense.T
    want = want if cap is None else torch.tanh(want / cap) * cap
    torch.testing.assert_close(eight.logits(hidden), want, rtol=1e-4, atol=1e-4)
    bound = hidden.abs().sum(1, keepdim=True) * weight.abs().max() / 254 * 1.01 + 1e-4
    assert bool(((eight.logits(hidden) - plain.logits(hidden)).abs() <= bound).all())
    assert not torch.equal(eight.logits(hidden), plain.logits(hidden))


def _batch(texts: list[Tensor]) -> Any:
    from decoder_fixtures import batch_of

    return batch_of([(0, len(text)) for text in texts])


@pytest.mark.parametrize("family", ["llama", "llama-tied-mha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ranks_give_the_logits_of_one(family: str, dtype: torch.dtype) -> None:
    """Of three ranks the last has rows of the padding alone."""
    checkpoint = checkpoint_of(family)
    hidden = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    one = load_decoder(checkpoint, dtype=dtype, lm_head="q8_0").logits(hidden)
    assert one.shape == (7, 131)
    for tp in (2, 3):

        def work(comm: Comm, tp: int = tp) -> Tensor:
            return load_decoder(checkpoint, dtype=dtype, plan=plan_of(checkpoint, tp), comm=comm, lm_head="q8_0").logits(hidden)

        for found in run_threads(tp, work):
            if dtype == torch.float64:  # dequantized, and torch's product of fewer rows sums in another order
                torch.testing.assert_close(found, one, rtol=1e-12, atol=1e-12)
            else:
                assert torch.equal(found, one)


def test_a_shard_directory_has_its_head_encoded_too(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(MODELS / "qwen2")
    texts = [torch.arange(4, 30)]
    want = logits_of(load_decoder(checkpoint, dtype=torch.float32, lm_head="q8_0", parity=True), texts)[0]
    shard_checkpoint(checkpoint, tmp_path / "shards", 2, overwrite=False)

    def work(comm: Comm) -> Tensor:
        own, plan, stored = open_rank(tmp_path / "shards", comm.rank)
        decoder = load_decoder(own, dtype=torch.float32, plan=plan, comm=comm, presliced=stored, lm_head="q8_0", parity=True)
        return logits_of(decoder, texts)[0]

    for found in run_threads(2, work):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


# memory


@pytest.mark.parametrize("family", ["llama", "llama-tied-mha"])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_bytes_in_memory_are_the_plan_s(family: str, tp: int) -> None:
    checkpoint = checkpoint_of(family)
    spec = spec_for(checkpoint.config)
    assignment = stored_assignment(checkpoint.config, spec, checkpoint.tensors)
    plan = make_plan(spec, assignment, tp, dtype="F32")

    def bytes_of(lm_head: str) -> list[int]:
        def work(comm: Comm) -> Decoder:
            return load_decoder(checkpoint, dtype=torch.float32, plan=plan, comm=comm, lm_head=lm_head)

        return [decoder.nbytes for decoder in run_threads(tp, work)]

    found = {kind: bytes_of(kind) for kind in ("auto", "q8_0")}
    for kind, held in found.items():
        planned = rank_memory(spec, assignment, plan, dtype="F32", kv_dtype="F32", lm_head=kind)
        assert held == [memory.weights for memory in planned]
    rows = [len(plan.elements("vocab", rank)) for rank in range(tp)]
    floats = [0 if spec.tied else 96 * 4 * count for count in rows]
    assert found["q8_0"] == [a - b + 3 * 34 * c for a, b, c in zip(found["auto"], floats, rows, strict=True)]


def test_the_command_plan_counts_the_head(tmp_path: Path) -> None:
    plain, eight = (run(PlanOptions(str(MODELS / "llama"), 2, lm_head=kind)) for kind in ("auto", "q8_0"))
    more = [b["weights"] - a["weights"] for a, b in zip(plain.data["ranks"], eight.data["ranks"], strict=True)]
    assert more == [512 * 256 // 32 * 34] * 2, "a tied embedding stays beside it"
    assert ("head", "encoded to q8_0 when it is loaded") in eight.facts and eight.data["lm_head"] == "q8_0"
    assert all(name != "head" for name, _ in plain.facts)


# what cannot be


def test_what_cannot_be_encoded_is_refused(llama: MemoryCheckpoint) -> None:
    spec, keep = spec_for(llama.config), {}
    with pytest.raises(InputError, match="--lm-head: is 'q4_0', expected one of auto, q8_0"):
        encoded_head(spec, keep, "q4_0")
    with pytest.raises(InputError, match="--lm-head: is 'int8'"):
        LLM(str(MODELS / "llama"), lm_head="int8", device="cpu")
    narrow = spec_for({**llama.config, "hidden_size": 48})
    with pytest.raises(InputError, match="--lm-head: is q8_0, and lm_head is 48 wide, expected a multiple of 32"):
        encoded_head(narrow, keep, "q8_0")
    assert encoded_head(narrow, keep, "auto") is None


def test_a_quantized_head_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, tied: MemoryCheckpoint) -> None:
    checkpoint = awq_checkpoint({**config_of("llama"), **WIDE}, 16)
    spec = spec_for(checkpoint.config)
    assignment = stored_assignment(checkpoint.config, spec, checkpoint.tensors)
    some = next(scheme for scheme in assignment.values() if scheme.layout == "awq")
    monkeypatch.setattr("quantkit.model.load.ReadAhead", lambda *_: pytest.fail("something was read"))
    with pytest.raises(InputError, match="--lm-head: is q8_0, and lm_head is quantized already, expected a head in floats"):
        load_decoder(checkpoint, dtype=torch.float32, presliced={**assignment, "lm_head": some}, lm_head="q8_0")
    with pytest.raises(InputError, match=r"and model\.embed_tokens is quantized already"):
        load_decoder(tied, dtype=torch.float32, presliced={"model.embed_tokens": replace(some, layout="packed")}, lm_head="q8_0")


# serving


def test_the_engine_serves_it_on_one_rank_and_on_two() -> None:
    params = SamplingParams(12, temperature=0.0, ignore_eos=True)
    found, weights = [], []
    for options in ({"lm_head": "auto"}, {"lm_head": "q8_0"}, {"lm_head": "q8_0", "tp": 2}):
        with LLM(str(MODELS / "llama"), device="cpu", dtype="float32", max_model_len=64, max_num_seqs=2, **options) as llm:
            found.append([each.token_ids for each in llm.generate([[5, 6, 7], [9]], params)])
            weights.append(sum(llm.engine.stats().weight_bytes))
    assert found[1] == found[2]
    assert weights[1] - weights[0] == 1024 * 256 // 32 * 34


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_encodes_the_same_bytes_and_multiplies_by_its_kernels(tied: MemoryCheckpoint) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-40, 1e-5, 1.0, 1e4):
        values = torch.randn(300, 4096, generator=generator) * scale
        values[3], values[4] = 0.0, torch.arange(4096) % 255 - 127
        for given_as in (values, values.bfloat16(), values.half() if scale == 1.0 else values):
            assert torch.equal(encode_q8_0(given_as.cuda()).cpu(), encode_q8_0(given_as))
    values[7, 5] = float("nan")
    with pytest.raises(RowRefused, match="row 7 is not finite"):
        encode_q8_0(values.cuda())
    big = checkpoint_of("llama-tied-mha")
    decoder = load_decoder(big, dtype=torch.bfloat16, device="cuda", lm_head="q8_0")
    assert isinstance(decoder.head.op, TiledLinear) and not isinstance(decoder.embedding.weight, PackedTable)
    dense = decode(encode_q8_0(head_weight(big).bfloat16()), "Q8_0")
    hidden = torch.randn(3, 96, generator=generator).bfloat16()
    want = hidden.float() @ dense[:131].T
    assert float((decoder.logits(hidden.cuda()).cpu() - want).abs().max() / want.abs().max()) < 2e-2
