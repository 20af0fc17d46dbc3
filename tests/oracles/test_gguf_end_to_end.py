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
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from conftest import DEMO, FIGURES, MODELS, run
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
from quantkit.runtime.engine import Delta, start_engine
from quantkit.runtime.sampler import SamplingParams
from quantkit.text.builtin import builtin_text
from quantkit.text.tokenizer import load_tokenizer

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(1800)]

TRAINED = shlex.split(os.environ.get("QUANTKIT_ORACLE_MODELS", "")) or [*(str(MODELS / name) for name in ("gemma3", "llama", "qwen2")), DEMO]
LARGER = os.environ.get("QUANTKIT_ORACLE_BASE", DEMO)
WIDE: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 512}
WIDE |= {"bos_token_id": 0, "eos_token_id": 0}
RANDOM: dict[str, dict[str, Any]] = {
    "mistral": {**BASE, **FAMILIES["mistral-full"], **WIDE},
    "mixtral": {**BASE, **FAMILIES["mixtral"], **WIDE},
    "qwen2_moe": {**BASE, **FAMILIES["qwen2-moe"], **WIDE, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512},
    "gemma2": {**BASE, **FAMILIES["gemma2"], **WIDE, "sliding_window": 64, "query_pre_attn_scalar": 64},
    "gpt2": {**FAMILIES["gpt2"], "vocab_size": 1024, "n_embd": 256, "n_positions": 512, "bos_token_id": 0, "eos_token_id": 0},
    "qwen": {**FAMILIES["qwen"], "vocab_size": 1536, "hidden_size": 256, "intermediate_size": 1024, "kv_channels": 64, "seq_length": 512},
}
"""Rows are whole super-blocks, so that the mixtures are what they are in large models."""
FILES: dict[str, tuple[str, ...]] = {
    "f32": ("convert", "--to", "gguf", "--dtype", "float32"),
    "f16": ("convert", "--to", "gguf", "--dtype", "float16"),
    "q8_0": ("quantize", "--method", "gguf", "--type", "q8_0"),
    "q4_k_m": ("quantize", "--method", "gguf", "--type", "q4_k_m"),
}
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
    run([sys.executable, "-m", "quantkit", *map(str, arguments), "--quiet"])


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


def ours_of(file: Path, ids: list[int]) -> Answer:
    """Our decoder's logits, and what our runtime continues; both in float32."""
    with torch.inference_mode():
        decoder = load_decoder(open_checkpoint(file), dtype=torch.float32)
        hidden = decoder.forward(torch.tensor(ids), Batch(torch.arange(len(ids)), (len(ids),), None))
        logits = decoder.logits(hidden).numpy()
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
    return Answer(logits, [token for part in parts for token in part.tokens], "".join(part.text for part in parts))


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


def differences(ours: Answer, theirs: Answer, ids: list[int]) -> tuple[float, float, float]:
    """Mean difference of the log-probability of the true next token, the largest of any token, and of logits relative to their spread."""
    a, b = log_softmax(ours.logits), log_softmax(theirs.logits)
    assert a.shape == b.shape and len(a) == len(ids)
    place, following = np.arange(len(ids) - 1), np.array(ids[1:])
    true = np.abs(a[place, following] - b[place, following]).mean()
    x, y = (logits - logits.mean(-1, keepdims=True) for logits in (ours.logits, theirs.logits))
    return float(true), float(np.abs(a - b).max()), float(np.linalg.norm(x - y) / np.linalg.norm(x))


def shared(ours: list[int], theirs: list[int]) -> float:
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


@pytest.mark.parametrize("model", [*TRAINED, *RANDOM], ids=name_of, indirect=True)
def test_a_model_in_llama_cpp(model: Model, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(model.tokenizer)
    assert [tokenizer.encode(text, special=True) for text in TEXTS] == model.texts
    line = f"{request.node.callspec.id:12}"
    for name, file in model.files.items():
        ours, theirs = ours_of(file, model.ids), model.theirs[name]
        true, worst, relative = differences(ours, theirs, model.ids)
        equal = shared(ours.greedy, theirs.greedy)
        line += f" | {name} {true:.1e} {worst:.1e} {relative:.1e} {equal:4.0%} {ours.text == theirs.text}"
    FIGURES.append(line)
