"""Hugging Face to GGUF, asked of llama.cpp: its converter writes the same file but for what is named here, and it computes what we do.

The converter is that of llama.cpp's source tree, as the source archive of llama-cpp-python 0.3.36 carries it; it runs in the
project's environment. Tokenizers are left out: each file that is loaded gets tokens that stand for nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from gguf_export_fixtures import FAMILIES, config_of, values_of, write_family
from numpy.typing import NDArray
from safetensors.numpy import save_file

from quantkit.arch.table import spec_for
from quantkit.checkpoint.gguf import decoded
from quantkit.checkpoint.gguf_export import ExportPlan, export_plan, read_rows
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.formats.gguf import F32, I32, Value, array, boolean, read_gguf, text, texts, u32
from quantkit.model.decoder import Batch
from quantkit.model.load import load_decoder

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(1800)]

HERE = Path(__file__).parent
MODELS = HERE.parent / "data" / "models"
SOURCE = HERE / ".venv" / "llama.cpp"
TRAINED = ("llama", "qwen2", "gemma3")
LENGTHS = (1, 2, 4, 5, 9, 17, 33, 40)
EXACT, TABLED = 2e-5, 1e-2
"""How far logarithms of probabilities may be apart, both in float32; llama.cpp looks GELU up in a table of float16."""
WINDOWED = {"mistral": 5, "mixtral-sliding": 5, "phi3": 5, "qwen2-sliding-tied": 4, "qwen2-moe-sliding": 4}
"""Families of which llama.cpp ignores the window, which the plan's note says: equal up to so many tokens, and not beyond."""
LONG_ONLY = {"llama-longrope": 16, "phi3-longrope": 16}
"""llama.cpp takes the long factors from its first token, where its context is long: equal beyond so many tokens, and not before."""

ALWAYS = {"attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base", "vocab_size"}
"""We write these for every family, and the converter for some; what a reader does without them is what they say."""
EXTRA: dict[str, set[str]] = {
    # The window that config.json has and no reader heeds; it comes back with the model.
    **{family: {"attention.sliding_window"} for family in ("mistral", "mixtral-sliding")},
    **{family: {"attention.sliding_window", "attention.sliding_window_pattern"} for family in ("qwen2-sliding-tied", "qwen2-moe-sliding")},
    # Layers that a reader would not guess, and which it heeds.
    **{family: {"attention.sliding_window_pattern"} for family in ("gemma2-types", "gemma2-windows", "gemma3-types", "trained gemma3")},
    # llama.cpp reads the tables of longrope for Llama, and its converter writes them for Phi-3 alone.
    "llama-longrope": {"rope.scaling.attn_factor", "rope.scaling.original_context_length"},
    # The type says what the tables mean; the converter leaves it to the tables.
    "phi3-longrope": {"rope.scaling.type"},
    # mscale of config.json, which the converter does not know, as the factor that llama.cpp reads.
    "qwen3-yarn": {"rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"},
    # The loader asks for the root mean square's epsilon, and the converter writes the other one.
    "qwen": {"attention.layer_norm_rms_epsilon", "attention.head_count_kv"},
    "qwen-partial": {"attention.layer_norm_rms_epsilon", "attention.head_count_kv"},
    "gpt2": {"attention.head_count_kv"},
    "gpt2-inner": {"attention.head_count_kv"},
}
LEFT_OUT: dict[str, set[str]] = {
    # Of the other kind of norm.
    "qwen": {"attention.layer_norm_epsilon"},
    "qwen-partial": {"attention.layer_norm_epsilon"},
    # The rotary base of layers that the model does not have.
    "gemma3-full": {"rope.freq_base_swa"},
    "gemma3-windows": {"rope.scaling.type", "rope.scaling.factor"},
}
OTHER: dict[str, set[str]] = {
    # The converter writes four times the hidden size, whatever config.json says.
    "gpt2-inner": {"feed_forward_length"},
    # No layer uses it.
    "gemma3-windows": {"rope.freq_base"},
}
TABLES: dict[str, set[str]] = {"llama-longrope": {"rope_factors_long.weight", "rope_factors_short.weight"}}
"""Tensors that the converter does not write."""
UNSAID = frozenset({"llama-longrope", "qwen-partial", "gpt2-inner"})
"""Models of which the converter leaves out what makes them: factors, the rotated share, the width of the MLP."""
NAMES = frozenset(f"general.{key}" for key in ("name", "basename", "version", "finetune", "file_type"))
"""Told from the directory's name by the converter, and by who writes the file here."""


class Runs(Protocol):
    def run(self, *arguments: object) -> None: ...


@dataclass(frozen=True)
class Case:
    """A model, its tensors in float32, and the plan of its file."""

    config: dict[str, Any]
    values: dict[str, NDArray[np.float32]]
    plan: ExportPlan

    def rows(self, name: str) -> NDArray[np.float32]:
        tensor = next(tensor for tensor in self.plan.tensors if tensor.name == name)

        def read(source: str, index: tuple[slice, ...] | None) -> NDArray[np.float32]:
            return self.values[source] if index is None else self.values[source][index]

        return read_rows(tensor, range(tensor.rows), read).reshape(tensor.shape)


def case_of(name: str) -> Case:
    if name.startswith("trained "):
        checkpoint = open_checkpoint(MODELS / name.removeprefix("trained "))
        config = dict(checkpoint.config)
        values = {key: (checkpoint.read(key).astype(np.uint32) << 16).view(np.float32) for key in checkpoint.tensors}
    else:
        config = config_of(name)
        values = values_of(config)
    return Case(config, values, export_plan(config, spec_for(config), values))


CASES = (*FAMILIES, *(f"trained {name}" for name in TRAINED))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as llama.cpp's converter writes it."""
    if not (SOURCE / "conversion").is_dir():
        pytest.fail(f"{SOURCE} has no source tree of llama.cpp: `make oracle` lays it out", pytrace=False)
    root, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("converted")
    for name in CASES:
        case, folder = case_of(name), root / name
        config = {**case.config, "architectures": list(spec_for(case.config).architecture.hf_classes)}
        if config["model_type"] == "gpt2":  # as published configs have it
            config = {"layer_norm_epsilon": 1e-5, **config, "n_ctx": config["n_positions"]}
        if config["model_type"] == "qwen":
            config["max_position_embeddings"] = config["seq_length"]
        vocabulary = {str(token): token for token in range(config["vocab_size"])}
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
        save_file(case.values, folder / "model.safetensors")
    script = str(HERE / "gguf_convert_reference.py")
    command = [sys.executable, "-W", "ignore", script, "convert", str(SOURCE), str(out), *(str(root / name) for name in CASES)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((out / "failed.json").read_text()) == {}
    return out


@pytest.mark.parametrize("name", CASES)
def test_the_converter_writes_the_same_metadata(converted: Path, name: str) -> None:
    case, theirs = case_of(name), read_gguf(converted / f"{name}.gguf").values()
    ours = case.plan.metadata
    prefix = f"{ours['general.architecture'].value}."
    assert next(iter(theirs)) == next(iter(ours)) == "general.architecture"

    def own(keys: set[str]) -> set[str]:
        return {prefix + key for key in keys}

    assert ours.keys() - theirs.keys() - own(ALWAYS) == own(EXTRA.get(name, set()))
    assert theirs.keys() - ours.keys() - NAMES == own(LEFT_OUT.get(name, set()))
    for key in (ours.keys() & theirs.keys()) - NAMES:
        assert (ours[key] == rounded(theirs[key])) == (key not in own(OTHER.get(name, set()))), key


def rounded(value: Value) -> Value:
    return Value(F32, float(np.float32(value.value))) if value.kind == F32 else value


@pytest.mark.parametrize("name", CASES)
def test_the_converter_writes_the_same_tensors(converted: Path, name: str) -> None:
    case, theirs = case_of(name), read_gguf(converted / f"{name}.gguf")
    ours = {tensor.name: tensor for tensor in case.plan.tensors}
    assert ours.keys() - theirs.tensors.keys() == TABLES.get(name, set())
    assert theirs.tensors.keys() <= ours.keys()
    for key, tensor in theirs.tensors.items():
        assert (tensor.type, tensor.shape) == ("F32", ours[key].shape), key
        want = decoded(theirs, tensor, range(ours[key].rows), range(tensor.shape[-1])).reshape(tensor.shape)
        if key == "rope_freqs.weight":  # which the converter computes in float32
            np.testing.assert_allclose(case.rows(key), want, rtol=1e-6)
        else:
            np.testing.assert_array_equal(case.rows(key), want, err_msg=key)


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNSAID])
def test_what_the_converter_writes_comes_back(converted: Path, name: str) -> None:
    """Its files are read as ours are: the tensors of the model, and its spec but for what the file leaves out."""
    case, found = case_of(name), open_checkpoint(converted / f"{name}.gguf")
    assert set(found.tensors) == set(case.values)
    for key, value in case.values.items():
        if "norm" in key and spec_for(case.config).architecture.norm_offset:  # the sum with 1 is what the file holds
            np.testing.assert_array_equal(found.read(key) + np.float32(1), value + np.float32(1), err_msg=key)
        else:
            np.testing.assert_array_equal(found.read(key), value, err_msg=key)
    got, want = spec_for(found.config), spec_for(case.config)
    fields = ("layers", "dims", "head_dim", "eps", "activation", "tied", "attention_scale", "attention_softcap", "rotary_dim", "moe")
    for field in (*fields, "linears"):
        assert getattr(got, field) == getattr(want, field), field
    left = EXTRA.get(name, set())
    assert (got.windows == want.windows) == (not any(key.startswith("attention.sliding") for key in left))


def vocabulary(size: int) -> dict[str, Value]:
    """Tokens that stand for nothing, so that the file is loaded."""
    tokens = {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text("gpt-2"),
        "tokenizer.ggml.tokens": texts([f"<t{token}>" for token in range(size)]),
        "tokenizer.ggml.token_type": array(I32, [1] * size),
        "tokenizer.ggml.merges": texts(["a b"]),
        "tokenizer.ggml.add_bos_token": boolean(False),
    }
    return {**tokens, **{f"tokenizer.ggml.{end}_token_id": u32(token) for end, token in (("bos", 1), ("eos", 2))}}


@pytest.fixture(scope="module")
def computed(oracle: Callable[[str, str], Runs], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What llama.cpp computes from the file of every model."""
    root = tmp_path_factory.mktemp("files")
    files = {}
    for name in CASES:
        case = case_of(name)
        files[name] = write_family(root / f"{name}.gguf", case.config, case.values, vocabulary(case.config["vocab_size"]))
    (root / "ids").write_text(json.dumps(IDS))
    (root / "lengths").write_text(json.dumps(LENGTHS))
    oracle("llama-cpp", "gguf_convert_reference.py").run("logits", root / "ids", root / "lengths", root / "out", *files.values())
    found = json.loads((root / "out").read_text())
    yield {name: found[str(file)] for name, file in files.items()}


IDS = np.random.default_rng(3).integers(3, 131, 64).tolist()


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_the_model_does(computed: dict[str, Any], name: str, figures: list[str], tmp_path: Path) -> None:
    """From the model as it was before, not from the file."""
    case, theirs = case_of(name), computed[name]
    assert not isinstance(theirs, str), theirs
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    save_file(case.values, tmp_path / "model.safetensors")
    with torch.inference_mode():
        decoder = load_decoder(open_checkpoint(tmp_path), dtype=torch.float32)
        errors = {}
        for length, found in zip(LENGTHS, theirs, strict=True):
            hidden = decoder.forward(torch.tensor(IDS[:length]), Batch(torch.arange(length), (length,), None))
            ours = torch.log_softmax(decoder.logits(hidden)[-1].double(), -1)
            assert len(found) == len(ours)
            errors[length] = float((ours - torch.tensor(found, dtype=torch.float64)).abs().max())
    good = TABLED if case.config["model_type"] in ("gpt2", "gemma2", "gemma3_text") else EXACT
    alike = [length for length in LENGTHS if LONG_ONLY.get(name, 0) < length <= WINDOWED.get(name, 1 << 20) or length == 1]
    worst = max(errors[length] for length in alike)
    figures.append(f"{name:20} log-probabilities of llama.cpp differ by {worst:.1e} up to {max(alike)} tokens")
    assert worst < good
    assert all(errors[length] > TABLED for length in LENGTHS if length not in alike), "and the plan's note is true"
    assert bool(case.plan.notes) == (len(alike) < len(LENGTHS) or name in ("llama-dynamic", "qwen3-yarn"))
