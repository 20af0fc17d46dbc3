"""``quantkit report``: figures of real models on the same text, what is written, and when the gate says no."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.commands.quantize import run as quantize
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.commands.report import ReportOptions, run
from quantkit.errors import InputError

LLAMA = Path(__file__).parent.parent / "data" / "models" / "llama"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "rtn"
    quantize(QuantizeOptions(path=str(LLAMA), out=out, method="rtn", group_size=128))
    return out


@pytest.fixture(scope="module")
def report(artifact: Path) -> Callable[..., Any]:
    def measured(**options: Any) -> Any:
        return run(ReportOptions(base=str(LLAMA), artifacts=(str(artifact),), **{"window": 256, "tokens": 4096, **options}))

    return measured


def test_figures_and_files(report: Callable[..., Any], artifact: Path, tmp_path: Path) -> None:
    done = report(out=tmp_path / "out")
    base, rtn = done.data["models"]
    assert (base["method"], rtn["method"]) == ("unquantized", "rtn 4-bit g128")
    assert 5 < base["ppl"] < rtn["ppl"] < 200
    assert base["disk_bytes"] == (LLAMA / "model.safetensors").stat().st_size
    assert rtn["disk_bytes"] == (artifact / "model.safetensors").stat().st_size < base["disk_bytes"] / 2
    assert rtn["memory_bytes"] < base["memory_bytes"] / 2
    assert done.data["convention"] == "float32, window 256, stride 256, windows do not overlap, 4080 tokens scored"
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == done.data
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert f"{rtn['ppl']:.3f}" in markdown and "| rtn |" in markdown
    assert done.failed is None


def test_perplexity_is_that_of_transformers(report: Callable[..., Any]) -> None:
    from transformers import AutoModelForCausalLM

    from quantkit.text.builtin import builtin_text
    from quantkit.text.tokenizer import load_tokenizer

    ids = torch.tensor(load_tokenizer(LLAMA).encode(builtin_text("held-out"), special=False)[:4096]).view(-1, 256)
    model = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert report().data["models"][0]["ppl"] == pytest.approx(float(nll.exp()), rel=1e-5)


def test_the_gate(report: Callable[..., Any], artifact: Path, tmp_path: Path) -> None:
    base, rtn = report(out=tmp_path).data["models"]
    rise = rtn["ppl"] / base["ppl"] - 1
    assert report(max_ppl_increase=rise + 0.001, max_memory=rtn["memory_bytes"]).failed is None
    failed = report(max_ppl_increase=rise - 0.001, max_memory=rtn["memory_bytes"] - 1).failed
    assert "expected at most" in failed and "bytes of weights in memory" in failed
    # Against an earlier report of the same method nothing has risen.
    assert report(max_ppl_increase=0.0, baseline=tmp_path / "report.json").failed is None


def test_a_baseline_must_have_the_method(report: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    for text, what in (
        ('{"models": [{"method": "unquantized", "ppl": 3.0}]}', "has no rtn 4-bit g128"),
        ('{"models": 3}', "is not a quantkit report"),
        ("[]", "holds list"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=what):
            report(baseline=path)


def test_a_text_of_the_users(report: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "One day a bird sat on a tree."}\n{"text": "It sang until the sun went down."}\n')
    done = report(text=path, stride=64)
    assert done.data["text"] == "text.jsonl"
    assert "stride 64" in done.data["convention"]
    with pytest.raises(InputError, match=r"nothing\.txt"):
        report(text=tmp_path / "nothing.txt")


@pytest.mark.parametrize("ppl", [0, -3.0, 0.5, "nan", "inf"])
def test_a_baseline_of_no_perplexity_is_refused(report: Callable[..., Any], tmp_path: Path, ppl: Any) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({"models": [{"method": "rtn 4-bit g128", "ppl": ppl}]}))
    with pytest.raises(InputError, match=r"says that the perplexity of .* is .*, expected a number from 1 on"):
        report(baseline=path, max_ppl_increase=0.05)


def test_a_slip_in_the_last_path_is_found_before_anything_is_measured(artifact: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    with pytest.raises(InputError, match="no such file or directory"):
        run(
            ReportOptions(base=str(LLAMA), artifacts=(str(artifact), str(tmp_path / "nowhere")), window=256, tokens=4096),
            lambda stage, done, total: stages.append(stage),
        )
    assert stages == []


def test_the_gate_says_its_limit_as_it_was_given(report: Callable[..., Any]) -> None:
    assert report(max_ppl_increase=0.00001).failed.endswith("expected at most +0.001%")


def test_divergence_is_in_the_report_and_has_a_gate(report: Callable[..., Any], tmp_path: Path) -> None:
    plain = report(tokens=1024)
    assert "kld" not in plain.data["models"][1] and len(plain.tables) == 1
    done = report(tokens=1024, kld=True, out=tmp_path)
    base, rtn = done.data["models"]
    assert "kld" not in base
    assert rtn["ppl"] == pytest.approx(plain.data["models"][1]["ppl"], rel=1e-6)
    found = rtn["kld"]
    assert 0 < found["median"] < found["p99"] <= found["p999"] <= found["maximum"] and 0 < found["error"] < found["mean"]
    assert 0.5 < found["same_top"] < 1 and 0 < found["rms_change"] < 0.5
    markdown = (tmp_path / "report.md").read_text()
    assert "Divergence from the base, in nats" in markdown and f"{found['mean']:.5f}" in markdown
    mean = found["mean"]
    assert report(tokens=1024, max_kld=mean * 1.01).failed is None
    failed = report(tokens=1024, max_kld=mean * 0.99).failed
    assert failed.endswith(f"a mean KL divergence of {mean:.4f}, expected at most {mean * 0.99:g}")


def test_a_model_is_at_no_distance_from_itself() -> None:
    done = run(ReportOptions(base=str(LLAMA), artifacts=(str(LLAMA),), window=64, tokens=128, max_kld=0.0))
    assert done.failed is None
    assert done.data["models"][1]["kld"] | {"error": 0.0} == dict.fromkeys(("mean", "error", "median", "p99", "p999", "maximum"), 0.0) | {
        "rms_change": 0.0,
        "same_top": 1.0,
    }


def test_one_scored_position_is_still_json(tmp_path: Path) -> None:
    run(ReportOptions(base=str(LLAMA), artifacts=(str(LLAMA),), window=2, tokens=2, kld=True, out=tmp_path))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)["models"][1]["kld"]["error"] is None
