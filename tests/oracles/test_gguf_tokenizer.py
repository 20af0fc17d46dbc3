"""Tokenizers as GGUF metadata against llama.cpp itself, both ways: what we write and it reads, and what its own vocabularies become.

The vocabularies and their vectors are those of llama.cpp's sources, in ``.venv/llama.cpp/models``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import sentencepiece

from quantkit.formats.gguf import GgufFile, Value, encode_header, f32, read_gguf, text, u32
from quantkit.text.builtin import builtin_text
from quantkit.text.gguf_tokenizer import hf_files
from quantkit.text.gguf_vocabulary import gguf_vocabulary
from quantkit.text.pre_tokenizers import PRE_TOKENIZERS
from quantkit.text.tokenizer import load_tokenizer

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(600)]


class Oracle(Protocol):
    def run(self, *arguments: object) -> None: ...


HERE = Path(__file__).parent
MODELS = HERE.parent / "data" / "models"
VOCABULARIES = HERE / ".venv" / "llama.cpp" / "models"
SEPARATOR = "\n__ggml_vocab_test__\n"
TEXTS = (
    "The capital of France is Paris. I'm sure they're here; we'll see. DON'T SHOUT, O'Neil's 'RE 'Ll",
    "机器学习正在改变世界。2023年，人工智能的发展速度超过了所有人的预期！你好，世界……「引号」（括号）",
    "Быстрая коричневая лиса прыгает через ленивую собаку. ПРИВЕТ, Мир! Ёлка №5 — 3,14",
    "الذكاء الاصطناعي يغيّر العالم بسرعة. مرحبًا بالعالم ١٢٣٤٥؟",
    "मशीन लर्निंग दुनिया को बदल रही है। नमस्ते दुनिया १२३ कि क्या है?",
    "日本語のテキスト、カタカナとひらがな。한국어 텍스트도 있습니다. ภาษาไทย Tiếng Việt Ελληνικά עברית",
    "emoji 😀👩‍👩‍👧🇫🇷 ✅❤️ \U0001f680\U0001f9d1\u200d\U0001f4bb end",
    "def f(x: int) -> None:\n\tprint(f'{x!r}')  # done\n\n\n    return x[1:-1] ** 2 != 3 // 4\r\n",
    "for (int i = 0; i < n; ++i) { a[i] += b->c * 0x1F; } // --x != ~y && z || w\n#include <stdio.h>",
    "1 12 123 1234 12345 123456 1234567 3.14159e-10 a1b22c333 2,000,000 ٣٤٥ Ⅷ ½ ²",
    "  leading, trailing  ", "tabs\t\tand   spaces \n \n x", " \n\n  \n", "a" * 300, "\u00a0nbsp\u3000wide\u2009thin\u200bzero",
    'https://example.org/a?b=c&d=%20#e [x](y) {"k": [1, null]} \\n <b>&amp;</b> ~~~ ``` === *** $$$ ^^^ |||',
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|>y <|eot_id|>\n\n<|end|> z",
    "camelCaseHTTPServer XMLHttpRequest naïve café Straße aB cD", "x  \n  y   \r\n\r\n z\t \n",
    "'s't're've'm'll'd 'S'T 's  's", "!!!???...,,,;;; (a)[b]{c} «d» “e” ‘f’ —–- _x_ __init__",
    "E=mc² ∑∫√∞ ≠ ≤ → ⇒ £€¥ ©®™ °C µm", "\U0001d400\U0001d401 𠀀𠀁 \ue000", "word\nword\n\nword\n\n\nword", "7", " 7", "", " ", "\n",
    *("a" + " " * count + "the" for count in range(2, 70, 3)),
)  # fmt: skip
CAPITALS = ("ÉCOLE École ŒUVRE ДОМ Дом", "कि क्या", "e\u0301e\u0301")
"""Capitals outside ASCII and combining marks: where llama.cpp approximates a pre-tokenizer, and does not normalize."""
HEAD: Mapping[str, Value] = {
    "general.architecture": text("llama"),
    **{f"llama.{key}": u32(64) for key in ("context_length", "embedding_length", "feed_forward_length", "rope.dimension_count")},
    **{f"llama.{key}": u32(1) for key in ("block_count", "attention.head_count")},
    "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
}
READ = ("gpt-2", "llama-bpe", "llama-spm", "qwen2", "qwen35", "phi-3", "deepseek-llm", "deepseek-coder", "command-r", "starcoder", "refact",
        "falcon", "mpt")  # fmt: skip
"""llama.cpp's vocabularies of the kinds that quantkit reads and that have vectors."""
HASHES = {"llama-bpe": "0ef9807a", "qwen2": "e636dc30", "gpt-2": "3ce83efd", "deepseek-llm": "049ecf76", "command-r": "9c2227e4"}
"""How the SHA-256 of the ids of one of the texts begins, by which llama.cpp's converter knows a tokenizer (``gguf.md`` 5.5)."""
DISTINCT = {(str(pre.pre_tokenizer), str(pre.normalizer), pre.ignore_merges): name for name, pre in reversed(PRE_TOKENIZERS.items())}


@pytest.fixture(scope="module")
def llamacpp(oracle: Callable[[str, str], Oracle]) -> Oracle:
    return oracle("llama-cpp", "llamacpp_tokenize.py")


def random_texts(count: int, alphabet: str) -> list[str]:
    rng = random.Random(count)
    return ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 50))) for _ in range(count)]


FUZZ = random_texts(1000, "  \n\t\r abcABC thing12345.,!'\"()<>/_日本ひらがな語ру中한국²½é")


def read_by(llamacpp: Oracle, folder: Path, metadata: Mapping[str, Value], texts: Sequence[str]) -> dict[str, Any]:
    """The ids of ``texts``, and the ids that end a text, that llama.cpp makes of a file with ``metadata``."""
    (folder / "vocab.gguf").write_bytes(encode_header({**HEAD, **metadata}, []))
    (folder / "texts.json").write_text(json.dumps(texts))
    llamacpp.run(folder / "vocab.gguf", folder / "texts.json", folder / "ids.json")
    found: dict[str, Any] = json.loads((folder / "ids.json").read_text())
    return found


def same(llamacpp: Oracle, folder: Path, root: Path, texts: Sequence[str], architecture: str = "llama") -> list[str]:
    """Those of ``texts`` of which llama.cpp makes other tokens of our metadata than the tokenizer in ``root``; its ends are checked."""
    tokenizer = load_tokenizer(root)
    found = read_by(llamacpp, folder, gguf_vocabulary(root, {}, architecture).metadata, texts)
    assert set(tokenizer.eos_ids) <= set(found["ends"])
    return [given for given, ids in zip(texts, found["ids"], strict=True) if tokenizer.encode(given, special=True) != ids]


def laid_out(folder: Path, metadata: Mapping[str, Any]) -> Path:
    """The tokenizer files that the way in makes."""
    folder.mkdir(exist_ok=True)
    for name, data in hf_files(GgufFile(Path("model.gguf"), 3, metadata, {})).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_the_tiny_models(tmp_path: Path, llamacpp: Oracle, name: str) -> None:
    assert same(llamacpp, tmp_path, MODELS / name, [*TEXTS, *CAPITALS, *FUZZ, builtin_text("held-out")[:50_000]]) == []


@pytest.mark.parametrize("name", sorted(set(DISTINCT.values()) - {"default"}))
def test_every_pre_tokenizer(tmp_path: Path, llamacpp: Oracle, name: str) -> None:
    """A byte-level vocabulary trained with it, so that every piece it cuts has merges."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers

    pre = PRE_TOKENIZERS[name]
    model = {"type": "BPE", "vocab": {}, "merges": []}
    backend = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": pre.pre_tokenizer, "model": model}))
    trainer = trainers.BpeTrainer(
        vocab_size=2500, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([builtin_text("calibration")[:60_000], *TEXTS * 20, *CAPITALS * 20, *FUZZ[:300]], trainer)
    data = json.loads(backend.to_str()) | {"normalizer": pre.normalizer}
    data["model"]["ignore_merges"] = pre.ignore_merges
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    other = same(llamacpp, tmp_path, tmp_path, [*TEXTS, *CAPITALS, *FUZZ])
    if pre.approximated:  # as the note says
        assert 0 < len(other) < len(FUZZ) // 10
        assert set(other[:3]) & {*CAPITALS, *TEXTS}
    else:
        assert other == ([] if pre.normalizer is None else ["e\u0301e\u0301"])


def sentencepiece_files(folder: Path, *, prefix: bool) -> Path:
    (folder / "text.txt").write_text(builtin_text("calibration")[:120_000] + "\n".join(TEXTS) * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=1500,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path: Path, llamacpp: Oracle, prefix: bool) -> None:
    """From tokenizer.model llama.cpp makes what SentencePiece makes; from the tokenizer.json of it too."""
    root = sentencepiece_files(tmp_path, prefix=prefix)
    model = sentencepiece.SentencePieceProcessor(model_file=str(root / "tokenizer.model"))
    texts = [*TEXTS, *CAPITALS, *FUZZ]
    found = gguf_vocabulary(root, {}, "llama")
    assert read_by(llamacpp, tmp_path, found.metadata, texts)["ids"] == [[1, *model.encode(given)] for given in texts]
    metadata = {"general.architecture": "llama", **{key: value.value for key, value in found.metadata.items()}}
    (tmp_path / "tokenizer.model").unlink()
    assert same(llamacpp, tmp_path, laid_out(tmp_path / "json", metadata), texts) == []


@pytest.mark.parametrize("name", READ)
def test_its_own_vocabularies(tmp_path: Path, llamacpp: Oracle, name: str) -> None:
    """The way in gives the ids of its vectors, and the way out a file of which llama.cpp makes the same tokens."""
    path = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.fail("the vocabularies of llama.cpp's sources are not there: `make oracle` lays them out", pytrace=False)
    file = read_gguf(path)
    root = laid_out(tmp_path / "files", file.metadata)
    tokenizer = load_tokenizer(root)
    lines = Path(f"{path}.out").read_text().splitlines()
    given = Path(f"{path}.inp").read_text().split(SEPARATOR)[: len(lines)]
    assert len(given) > 40
    assert [tokenizer.encode(item, special=False) for item in given] == [[int(index) for index in line.split()] for line in lines]
    if name in HASHES:
        known = {hashlib.sha256(str(tokenizer.encode(item, special=True)).encode()).hexdigest()[:8] for item in given}
        assert HASHES[name] in known
        assert gguf_vocabulary(root, {}, "llama").metadata["tokenizer.ggml.pre"].value == name
    normalized = [CAPITALS[2]] if name in ("command-r", "mpt", "qwen2") else []
    architecture = str(file.metadata["general.architecture"])
    assert same(llamacpp, tmp_path, root, [*given, *TEXTS, *CAPITALS, *FUZZ], architecture) == normalized
