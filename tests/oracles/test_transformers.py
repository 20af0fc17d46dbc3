"""transformers, with gptqmodel's kernels, loads our artifacts as they are and computes what our runtime computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_manifest
from quantkit.geometry import geometry_of
from quantkit.layouts.registry import codec
from quantkit.model.decoder import Batch
from quantkit.model.load import load_decoder
from quantkit.ops.dtypes import as_bytes, as_tensor
from quantkit.scheme import LinearScheme
from quantkit.text.chat import render_chat
from quantkit.text.tokenizer import load_tokenizer

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(1800)]

TOKENS = 64
TEXT = (
    "The zebra is a horse of Africa with black and white stripes. Every animal has a pattern of its own, as a person has a fingerprint. "
    "Zebras graze on grass, live in small herds and run at 65 km/h from lions.\n\n\tNaïve café, 3.14159 — and a second paragraph: "
    "def f(x): return x ** 2  # code, with two spaces\n"
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a zebra?"}]
MODELS = Path(__file__).parent.parent / "data" / "models"
ARTIFACTS = ("llama", "qwen2", "gemma3", "symmetric", "mixed", "demo")
EXACT = 1e-5
"""What float32 leaves between two implementations of one model that multiply by the same weights."""
KERNEL = {"demo": 2e-2}
"""How far the loader's kernel may go astray, else 1e-2: it rounds activations and scales to bfloat16, here 210 times in a row."""


class Runs(Protocol):
    def run(self, *arguments: object) -> None: ...


@dataclass(frozen=True)
class Loaded:
    """An artifact, and what transformers made of it."""

    name: str
    root: Path
    checkpoint: Checkpoint
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


@pytest.fixture(scope="module", params=ARTIFACTS)
def loaded(
    request: pytest.FixtureRequest, gptqmodel: Runs, artifact: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Loaded:
    root, out = artifact(request.param), tmp_path_factory.mktemp("loaded") / request.param
    gptqmodel.run(root, TEXT, TOKENS, out)
    facts = json.loads(out.with_suffix(".json").read_text())
    return Loaded(request.param, root, open_checkpoint(root), facts, load_file(out.with_suffix(".safetensors")))


def test_every_tensor_finds_its_place(loaded: Loaded) -> None:
    assert loaded.facts["complaints"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    manifest = read_manifest(loaded.root)
    assert manifest is not None
    packed = {name for name, scheme in manifest["assignment"].items() if scheme["layout"] == "awq"}
    kept = manifest["assignment"].keys() - packed
    assert set(loaded.facts["packed"]) == packed
    assert set(loaded.facts["plain"]) == kept | {"lm_head"}
    assert bool(kept) == (loaded.name == "mixed")


def test_the_quantization_config_is_understood_unmodified(loaded: Loaded) -> None:
    ours = json.loads((loaded.root / "config.json").read_text())["quantization_config"]
    theirs = loaded.facts["quantization_config"]
    assert ours["quant_method"] == "awq"
    assert {key: theirs[key] for key in ours} == ours


def test_unpacked_weights_are_ours_bit_for_bit(loaded: Loaded) -> None:
    checkpoint, group = loaded.checkpoint, loaded.checkpoint.config["quantization_config"]["group_size"]
    for path in loaded.facts["packed"]:
        parts = {s: as_tensor(checkpoint.read(f"{path}.{s}"), checkpoint.dtype(f"{path}.{s}")) for s in ("qweight", "qzeros", "scales")}
        geometry = geometry_of(LinearScheme("awq", "awq", 4, group), parts["scales"].shape[1], parts["qweight"].shape[0], dtype="F16")
        weight = codec("awq").dequant(parts, geometry, torch.float16).T.contiguous()
        assert bytes(as_bytes(weight)) == bytes(as_bytes(loaded.tensors[path])), path


def test_logits_agree(loaded: Loaded, figures: list[str]) -> None:
    tokens = loaded.tensors["tokens"]
    assert tokens.shape == (TOKENS,)
    with torch.inference_mode():
        decoder = load_decoder(loaded.checkpoint, dtype=torch.float32, parity=True)
        ours = decoder.logits(decoder.forward(tokens, Batch(torch.arange(TOKENS), (TOKENS,), None)))

    def error(name: str) -> float:
        return float((loaded.tensors[name] - ours).norm() / ours.norm())

    errors = {name: error(name) for name in ("dense", "float32", "as_stored")}
    kernel = "+".join(loaded.facts["kernels"])
    stored = loaded.facts["dtype"].removeprefix("torch.")
    figures.append(
        f"{loaded.name:10} relative logit error: {errors['dense']:.2e} from unpacked weights, {errors['float32']:.2e} by {kernel} "
        f"in float32, {errors['as_stored']:.2e} as stored ({stored})"
    )
    assert errors["dense"] < EXACT
    assert errors["float32"] < KERNEL.get(loaded.name, 1e-2)
    assert errors["as_stored"] < KERNEL.get(loaded.name, 1e-2)


def test_tokenizers_agree(loaded: Loaded) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(loaded.root)
    if loaded.facts["tokenizer_class"] == "Qwen2Tokenizer":
        # transformers puts that class's own word splitting in the place of the file's, which for this small tokenizer is another:
        # then the artifact must be read as its source is, and ours as the file says.
        source = MODELS / "qwen2"
        assert loaded.facts["ids"] == AutoTokenizer.from_pretrained(source)(TEXT)["input_ids"]
        assert ours.encode(TEXT, special=True) == load_tokenizer(source).encode(TEXT, special=True)
    else:
        assert ours.encode(TEXT, special=True) == loaded.facts["ids"]
    assert loaded.facts["ids"][:TOKENS] == loaded.tensors["tokens"].tolist()
    assert loaded.facts["eos_id"] in ours.eos_ids
    chat = None if ours.chat_template is None else render_chat(ours, CHAT)
    assert chat == loaded.facts["chat"]
    assert (chat is None) == (loaded.name != "demo")
