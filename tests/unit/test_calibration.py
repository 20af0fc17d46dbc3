"""Calibration: text sources, windows, statistics, the stream of hidden states, and text sampled from the model."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
import torch
from decoder_fixtures import MemoryCheckpoint, batch_of, config_of, random_twin, texts_of

from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.errors import InputError
from quantkit.model.load import embedded, load_block, load_decoder
from quantkit.progress import silent
from quantkit.quantizers.calibration import (
    CalibrationStream,
    CalibrationTokens,
    StatsCollector,
    cut_windows,
    owners,
    read_text,
    text_tokens,
    window_bos,
)
from quantkit.quantizers.self_calibration import SEQUENCES, sampled_tokens, silent_tokens, start_tokens
from quantkit.text.builtin import builtin_text
from quantkit.text.tokenizer import Tokenizer, load_tokenizer

MODELS = Path(__file__).parent.parent / "data" / "models"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(MODELS / "llama")


@pytest.fixture(scope="module")
def llama() -> Checkpoint:
    return open_checkpoint(MODELS / "llama")


def test_text_files_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo é", encoding="utf-8")
    assert read_text(path) == "one\ntwo é"


def test_jsonl_texts_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # U+2028 and U+0085 may stand unescaped in a JSON string; they end no line.
    lines = [json.dumps({"text": "first"}), "", json.dumps({"text": "a\u2028b\u0085c", "n": 1}, ensure_ascii=False) + "\r"]
    path.write_bytes("\n".join(lines).encode())
    assert read_text(path) == "first\n\na\u2028b\u0085c"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xff", "is not UTF-8 at byte 2"),
        ("a.jsonl", b'{"text": "x"}\nnot json\n', r"a\.jsonl:2: is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: is not JSON"),
        ("a.jsonl", b'{"txt": "x"}', r"a\.jsonl:1: has no text"),
        ("a.jsonl", b'["text"]', r"a\.jsonl:1: has no text"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: has no text"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(tmp_path / name)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.txt", Path("/dev/zero")):
        with pytest.raises(InputError):
            read_text(path)


def test_windows_are_spread_evenly_and_do_not_overlap() -> None:
    windows = cut_windows(range(105), 4, 10, None, "text")
    assert windows.shape == (4, 10)
    assert windows[:, 0].tolist() == [0, 20, 50, 70]
    assert all(row.tolist() == list(range(row[0], row[0] + 10)) for row in windows)
    with_bos = cut_windows(range(105), 4, 10, 999, "text")
    assert with_bos[:, 0].tolist() == [999] * 4
    assert with_bos[:, 1].tolist() == [0, 18, 45, 72]


def test_windows_need_enough_text() -> None:
    with pytest.raises(InputError, match="text: has 39 tokens, enough for 3 windows of 10, expected 4 windows") as caught:
        cut_windows(range(39), 4, 10, None, "text")
    assert caught.value.hint == "use fewer --samples or a shorter --seq-len"
    with pytest.raises(InputError, match="--seq-len: is 1, expected at least 2"):
        cut_windows(range(39), 1, 1, 5, "text")


def test_builtin_topics_are_disjoint_and_all_used() -> None:
    calibration, held_out = builtin_text("calibration"), builtin_text("held-out")
    topics = pydoc_data.topics.topics
    sides = {name: (topics[name].strip() in calibration, topics[name].strip() in held_out) for name in topics}
    assert all(any(side) for side in sides.values())
    whole = [name for name, side in sides.items() if all(side)]
    assert not [name for name in whole if len(topics[name]) > 200], "a topic of some length is on both sides"
    assert len(held_out) > 50_000 and len(calibration) > 3 * len(held_out) / 2


def test_text_tokens_name_their_source_and_never_a_path(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(builtin_text("held-out"))
    found = text_tokens(tokenizer, str(path), 3, 50)
    assert found.tokens.shape == (3, 50) and found.tokens.dtype == torch.int64
    assert found.source.startswith("text sha256:") and "mine" not in found.source
    assert text_tokens(tokenizer, "builtin", 3, 50).source == "builtin"
    assert found.digest != text_tokens(tokenizer, "builtin", 3, 50).digest
    assert found.digest == text_tokens(tokenizer, str(path), 3, 50).digest


class _Words:
    """A tokenizer of bytes, with or without a BOS of its own."""

    vocab_size, eos_ids, chat_template = 256, (2,), None

    def __init__(self, bos: int | None, puts_it: bool) -> None:
        self.bos_id, self._puts_it = bos, puts_it

    def encode(self, text: str, *, special: bool) -> list[int]:
        ids = list(text.encode())
        return [self.bos_id, *ids] if special and self._puts_it and self.bos_id is not None else ids

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        return bytes(ids).decode("utf-8", "replace")


def test_windows_begin_with_bos_where_the_tokenizer_puts_one() -> None:
    assert window_bos(_Words(1, True)) == 1  # type: ignore[arg-type]
    assert window_bos(_Words(1, False)) is None  # type: ignore[arg-type]
    assert window_bos(_Words(None, False)) is None  # type: ignore[arg-type]
    assert text_tokens(_Words(1, True), "builtin", 2, 9).tokens[:, 0].tolist() == [1, 1]  # type: ignore[arg-type]


def test_roles_that_read_one_input_share_its_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = owners(spec_for(config_of("llama")), 0)
    assert roles == {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}
    collector = StatsCollector(roles, roles, frozenset({"gram"}))
    monkeypatch.setattr("quantkit.quantizers.calibration.GRAM_PANEL", 4)  # so that six columns are two panels
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    for start in range(0, 40, 16):
        for role in roles:
            collector.tap(role, x[start : start + 16])
    stats = collector.stats()
    assert stats["v"] is stats["q"] and stats["up"] is stats["gate"]
    assert torch.allclose(stats["v"].gram, x.T @ x, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats["v"].gram, stats["v"].gram.T)
    assert torch.allclose(stats["v"].abs_sum, x.abs().sum(0))
    assert stats["v"].tokens == 40
    assert stats["v"].peak == float(x.abs().max())


def test_the_stream_is_the_model_itself() -> None:
    _, checkpoint = random_twin(config_of("gemma3"), torch.float32)
    spec = spec_for(checkpoint.config)
    texts = texts_of((20, 20, 20))
    tokens = torch.stack(texts)
    hidden = embedded(checkpoint, spec, tokens, dtype=torch.float32)
    stream = CalibrationStream(hidden.clone(), 2)
    seen: list[tuple[str, int]] = []

    class Collector(StatsCollector):
        def tap(self, role: str, x: torch.Tensor) -> None:
            seen.append((role, x.shape[0]))
            super().tap(role, x)

    for layer in range(spec.layers):
        collector = Collector(owners(spec, layer), spec.block_linears(layer), frozenset({"gram"}))
        stream.advance([load_block(checkpoint, spec, layer, dtype=torch.float32)], [collector], ["cpu"])
    decoder = load_decoder(checkpoint, dtype=torch.float32)
    expected = decoder.forward(torch.cat(texts), batch_of([(0, 20)] * 3))
    assert torch.allclose(decoder.norm(stream.hidden.reshape(60, -1)), expected, rtol=1e-4, atol=1e-4)
    assert {rows for _, rows in seen} == {40, 20}
    assert stream.peak == float(stream.hidden.abs().max())


def test_a_resume_point_is_the_states_bit_for_bit() -> None:
    hidden = torch.randn(2, 3, 4)
    stream, other = CalibrationStream(hidden.clone(), 1), CalibrationStream(torch.zeros(2, 3, 4), 1)
    other.restore([bytes(stream.carry())])
    assert torch.equal(other.hidden, hidden)
    with pytest.raises(InputError, match="resume point: holds 95 bytes of activations, expected 96"):
        other.restore([bytes(stream.carry())[:-1]])


def test_activations_that_are_not_finite_are_refused() -> None:
    _, checkpoint = random_twin(config_of("llama"), torch.float32)
    spec = spec_for(checkpoint.config)
    values = {
        **checkpoint.values,
        "model.layers.0.mlp.down_proj.weight": checkpoint.values["model.layers.0.mlp.down_proj.weight"] * float("inf"),
    }
    block = load_block(MemoryCheckpoint(checkpoint.config, values), spec, 0, dtype=torch.float32)
    stream = CalibrationStream(torch.ones(1, 4, spec.dims["hidden"].size), 1)
    with pytest.raises(InputError, match="block 0: its activations on the calibration text are not finite"):
        stream.advance([block], [StatsCollector(owners(spec, 0), spec.block_linears(0), frozenset({"gram"}))], ["cpu"])


def test_the_digest_is_of_the_tokens() -> None:
    tokens = torch.arange(6).reshape(2, 3)
    assert CalibrationTokens(tokens, "a").digest == CalibrationTokens(tokens.clone(), "b").digest
    assert CalibrationTokens(tokens, "a").digest != CalibrationTokens(tokens + 1, "a").digest


def test_the_model_speaks_for_itself(llama: Checkpoint, tokenizer: Tokenizer) -> None:
    """Sampled with a cache, tokens are as likely under the model, read in one pass, as its own entropy says they are."""
    calls: list[tuple[int, int]] = []
    found = sampled_tokens(llama, tokenizer, SEQUENCES + 4, 40, lambda _, done, total: calls.append((done, total)))
    assert found.tokens.shape == (SEQUENCES + 4, 40) and found.source == "self"
    assert calls == [(0, 36), (32, 36), (36, 36)]
    again = sampled_tokens(llama, tokenizer, SEQUENCES + 4, 40, silent)
    assert torch.equal(found.tokens, again.tokens)
    silenced = silent_tokens(tokenizer, spec_for(llama.config))
    assert not set(silenced) & set(found.tokens.flatten().tolist())
    assert len(set(found.tokens[:, 0].tolist())) == SEQUENCES + 4
    decoder = load_decoder(llama, dtype=torch.float32)
    with torch.inference_mode():
        hidden = decoder.forward(found.tokens.reshape(-1), batch_of([(0, 40)] * (SEQUENCES + 4)))
        logits = decoder.logits(hidden).reshape(SEQUENCES + 4, 40, -1)[:, :-1]
        logits[..., silenced] = -torch.inf
        logp = logits.log_softmax(-1)
        nll = -logp.gather(-1, found.tokens[:, 1:, None]).mean()
        entropy = -(logp.exp() * logp.clamp(min=-1e9)).sum(-1).mean()
    assert float(nll) == pytest.approx(float(entropy), abs=0.15)
    assert float(entropy) < 0.7 * np.log(1024)


def test_it_starts_with_bos_where_the_tokenizer_puts_one(llama: Checkpoint) -> None:
    spec = spec_for(llama.config)
    assert start_tokens(_Words(1, True), spec, 3).tolist() == [1, 1, 1]  # type: ignore[arg-type]
    starts = start_tokens(_Words(1, False), spec, 200).tolist()  # type: ignore[arg-type]
    assert len(set(starts)) < 200, "few tokens are dealt again and again"
    assert silent_tokens(_Words(None, False), spec) == [0, 2, *range(256, 1024)]  # type: ignore[arg-type]


def test_a_window_longer_than_the_model_is_refused(llama: Checkpoint, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="--seq-len: is 1025, expected 2 to 1024, the positions of the model"):
        sampled_tokens(llama, tokenizer, 1, 1025, silent)
