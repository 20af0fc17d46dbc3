"""``quantize --method awq|gptq --format q4_k_m``: better than plain blocks, one file, nothing beside it, and resumable in either step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_fixtures import MODELS, two_layers

from quantkit.checkpoint.artifact import ArtifactWriter
from quantkit.checkpoint.blocks import as_blocks
from quantkit.checkpoint.gguf_writer import GgufWriter
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.commands.convert import ConvertOptions
from quantkit.commands.convert import run as convert
from quantkit.commands.quantize import run
from quantkit.commands.quantize_gguf import GgufChoices
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.errors import InputError
from quantkit.evaluate.divergence import divergence
from quantkit.formats.gguf import read_gguf
from quantkit.model.load import load_decoder
from quantkit.report import Report
from quantkit.text.builtin import builtin_text
from quantkit.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ("awq", "gptq")
QUICK: dict[str, Any] = {"samples": 4, "seq_len": 64}
FAST = {"awq": ("scale_points=4", "duo=false"), "gptq": ("sweeps=1",)}
"""What is looked for is not the best result."""


def made(source: Path, out: Path, method: str, form: str = "q4_0", *, choices: Mapping[str, Any] | None = None, **options: Any) -> Report:
    given = {"format": form, "device": "cpu", "option": FAST.get(method, ()), "gguf": GgufChoices(**(choices or {})), **QUICK, **options}
    return run(QuantizeOptions(path=str(source), out=out, method=method, **given))


def plain(source: Path, out: Path, kind: str = "q4_0", **options: Any) -> Report:
    return run(QuantizeOptions(path=str(source), out=out, method="gguf", device="cpu", gguf=GgufChoices(type=kind), **options))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def distance(source: Path, path: Path) -> float:
    """The mean divergence from the source over text that it was calibrated on."""
    base, model = (load_decoder(as_blocks(open_checkpoint(p)), dtype=torch.float32, parity=True) for p in (source, path))
    ids = load_tokenizer(source).encode(builtin_text("calibration"), special=False)[:1024]
    return divergence(base, model, ids, window=256, stride=256).mean


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_layers(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small: Path, method: str) -> Path:
    """A file by ``method`` alone in its directory."""
    out = tmp_path_factory.mktemp(method) / "out.gguf"
    done = made(small, out, method)
    assert done.data["method"] == method and dict(done.facts)["method"] == method
    assert names(out.parent) == ["out.gguf"], "what lay in between is gone"
    return out


def test_the_file_is_of_the_mixture_and_says_whose_it_is(tmp_path: Path, small: Path, whole: Path) -> None:
    plain(small, tmp_path / "plain.gguf")
    ours, theirs = read_gguf(whole), read_gguf(tmp_path / "plain.gguf")
    assert {name: t.shape for name, t in ours.tensors.items()} == {name: t.shape for name, t in theirs.tensors.items()}
    assert {t.type for t in ours.tensors.values()} == {"Q4_0", "Q6_K", "F32"}
    assert ours.metadata["general.file_type"] == 2
    assert ours.metadata["general.name"] == theirs.metadata["general.name"] == "model", "the name of the source, not of what lay between"


def test_it_is_nearer_to_the_model_than_plain_blocks(tmp_path: Path, method: str) -> None:
    source = MODELS / "llama"
    plain(source, tmp_path / "plain.gguf", "q4_0")
    made(source, tmp_path / "out.gguf", method, "q4_0", samples=8, seq_len=128)
    assert distance(source, tmp_path / "out.gguf") < distance(source, tmp_path / "plain.gguf")
    assert (tmp_path / "out.gguf").stat().st_size == (tmp_path / "plain.gguf").stat().st_size


def test_a_dry_run_says_the_exact_size_and_the_method(tmp_path: Path, small: Path, method: str, whole: Path) -> None:
    said = made(small, tmp_path / "out.gguf", method, dry_run=True)
    assert said.data["files"] == [{"name": "out.gguf", "bytes": whole.stat().st_size}]
    assert said.data["method"] == method and dict(said.facts)["method"] == method
    assert names(tmp_path) == []


@pytest.mark.parametrize(("method", "step"), [("gptq", "blocks"), ("awq", "file")], indirect=["method"])
def test_a_run_that_was_ended_goes_on_in_either_step(
    tmp_path: Path, small: Path, whole: Path, method: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    kind: Any = ArtifactWriter if step == "blocks" else GgufWriter
    verb = "commit" if step == "blocks" else "write"
    work, count = getattr(kind, verb), 0

    def ending(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        work(self, *args, **kwargs)

    monkeypatch.setattr(kind, verb, ending)
    with pytest.raises(KeyboardInterrupt):
        made(small, tmp_path / "out.gguf", method)
    monkeypatch.setattr(kind, verb, work)
    assert not (tmp_path / "out.gguf").exists()
    with pytest.raises(InputError):
        made(small, tmp_path / "out.gguf", method)
    other = next(name for name in METHODS if name != method)
    for name, changed in ((method, {"seq_len": 32}), (other, {})):
        with pytest.raises(InputError, match=r"when the work began|it was made"):
            made(small, tmp_path / "out.gguf", name, resume=True, **changed)
    done = made(small, tmp_path / "out.gguf", method, resume=True)
    assert done.data["method"] == method
    assert (tmp_path / "out.gguf").read_bytes() == whole.read_bytes()
    assert names(tmp_path) == ["out.gguf"]


def test_a_file_that_is_there_is_replaced_on_request_only(tmp_path: Path, small: Path, whole: Path, method: str) -> None:
    shutil.copy(whole, tmp_path / "out.gguf")
    with pytest.raises(InputError, match="exists"):
        made(small, tmp_path / "out.gguf", method)
    made(small, tmp_path / "out.gguf", method, "q8_0", overwrite=True)
    assert read_gguf(tmp_path / "out.gguf").metadata["general.file_type"] == 7
    assert names(tmp_path) == ["out.gguf"]


def test_the_choices_of_a_file_hold_here_too(tmp_path: Path, small: Path) -> None:
    choices = {"tensor_type": ("ffn_down=q5_0",), "token_embedding_type": "q8_0", "pre_tokenizer": "smollm"}
    made(small, tmp_path / "out.gguf", "gptq", "q4_k_m", choices=choices, max_shard_size=400_000)
    parts = sorted(tmp_path.glob("out-*.gguf"))
    assert len(parts) > 1 and names(tmp_path) == [path.name for path in parts]
    file = read_gguf(parts[0])
    assert {t.type for name, t in file.tensors.items() if "ffn_down" in name} == {"Q5_0"}
    assert {t.type for name, t in file.tensors.items() if "ffn_up" in name} == {"Q4_K"}
    assert file.tensors["token_embd.weight"].type == "Q8_0" and file.metadata["tokenizer.ggml.pre"] == "smollm"


def test_a_gguf_file_is_no_source(tmp_path: Path, small: Path) -> None:
    convert(ConvertOptions(str(small), tmp_path / "floats.gguf", to="gguf"))
    with pytest.raises(InputError, match="is a GGUF file, expected a directory"):
        made(tmp_path / "floats.gguf", tmp_path / "out.gguf", "awq")
    assert names(tmp_path) == ["floats.gguf"]


@pytest.mark.parametrize(
    ("method", "form", "options", "message"),
    [
        ("awq", "q4_k_m", {"bits": 4}, "--bits: was given with --format q4_k_m, expected --tensor-type PATTERN=TYPE"),
        ("gptq", "q4_k_m", {"group_size": 32}, "--group-size: was given with --format q4_k_m"),
        ("awq", "q4_k_m", {"sym": True}, "--sym/--asym: was given"),
        ("awq", "q4_k_m", {"override": ("down:keep",)}, "--override: was given"),
        ("awq", "q4_k_m", {"recipe": Path("awq-w4-g64")}, "--recipe awq-w4-g64: bits: was given with --format q4_k_m"),
        ("awq", "q4_k_m", {"choices": {"type": "q4_k_m"}}, "--type: was given with --format q4_k_m, expected no --type"),
        ("awq", "q4_k_m", {"choices": {"imatrix": Path("i.gguf")}}, "awq gathers its own statistics, expected no --imatrix"),
        ("awq", "f16", {}, "--format: is f16"),
        ("gptq", "BF16", {}, "--format: is BF16"),
        ("rtn", "q4_k_m", {}, "or --method gguf --type q4_k_m"),
        ("nf4", "q8_0", {}, "expected a quantized type with one method of awq, gptq"),
        ("awq,gptq", "q4_k_m", {}, "is q4_k_m with method awq, gptq"),
        ("gguf", "q4_k_m", {}, "--format: was given, and method gguf has no such setting"),
        ("awq", "q4_k_m", {"choices": {"tensor_type": ("nowhere=q8_0",)}}, "matches no tensor"),
        ("awq", "q4_k_m", {"option": ("scale_pionts=5",)}, "scale_pionts"),
        ("awq", "q4_k_m", {"inputs": "float"}, "awq has no such choice"),
        ("awq", "q4_k_m", {"device": "tpu"}, "--device"),
        ("awq", "q4_k_m", {"calib": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, small: Path, method: str, form: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        made(small, tmp_path / "out.gguf", method, form, **options)
    assert message in caught.value.line
    assert names(tmp_path) == []


def test_the_name_of_the_file_and_the_source_are_checked_first(tmp_path: Path, small: Path) -> None:
    with pytest.raises(InputError, match=r"expected the name of a \.gguf file"):
        made(small, tmp_path / "out", "awq")
    art = tmp_path / "art"
    run(QuantizeOptions(path=str(small), out=art, method="rtn", device="cpu"))
    with pytest.raises(InputError, match="is already quantized"):
        made(art, tmp_path / "out.gguf", "awq")
    (tmp_path / "out.gguf.blocks").mkdir()
    (tmp_path / "out.gguf.blocks" / "mine.txt").write_text("keep me")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"out\.gguf\.blocks"):
            made(small, tmp_path / "out.gguf", "awq", overwrite=overwrite)
    assert (tmp_path / "out.gguf.blocks" / "mine.txt").read_text() == "keep me"
    assert names(tmp_path) == ["art", "out.gguf.blocks"]


def test_resume_takes_no_directory_that_it_did_not_make(tmp_path: Path, small: Path) -> None:
    shutil.copytree(small, tmp_path / "out.gguf.blocks")
    with pytest.raises(InputError, match=r"out\.gguf\.blocks"):
        made(small, tmp_path / "out.gguf", "awq", resume=True)
    assert json.loads((tmp_path / "out.gguf.blocks" / "config.json").read_text())["num_hidden_layers"] == 2
