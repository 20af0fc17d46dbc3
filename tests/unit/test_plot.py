"""Histograms of weights: their figures, which tensors there are, and the picture where there is something to draw it with."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from artifact_fixtures import artifact
from gguf_fixtures import config_of, gguf_values, values_of, write_gguf, write_model
from numpy.typing import NDArray

from quantkit import plot
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.commands.inspect import InspectOptions, run
from quantkit.errors import InputError, MachineError
from quantkit.plot import Weights, chosen, draw, histogram, weights_of
from quantkit.scheme import LinearScheme

TINY = Path(__file__).parents[1] / "data" / "models" / "llama"
PNG = b"\x89PNG\r\n\x1a\n"
drawing = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed (the extra `plot`)")


def weights(values: NDArray[Any], parts: int = 1, name: str = "w") -> Weights:
    def chunks() -> Iterator[NDArray[np.float32]]:
        yield from np.array_split(values.astype(np.float32), parts)

    return Weights(name, "F32", values.shape, chunks)


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("mean,sd", [(0.0, 0.02), (1000.0, 0.5), (-3.0, 1e-6)])
def test_figures_are_those_of_numpy(mean: float, sd: float, parts: int) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(mean, sd, 20000), rng.standard_t(3, 500) * sd + mean]).astype(np.float32)
    found, exact = histogram(weights(values, parts)), values.astype(np.float64)
    assert (found.count, found.not_finite) == (20500, 0)
    assert found.mean == pytest.approx(exact.mean(), rel=1e-12, abs=1e-12)
    assert found.sd == pytest.approx(exact.std(), rel=1e-9)
    away = exact - exact.mean()
    assert found.kurtosis == pytest.approx((away**4).mean() / (away**2).mean() ** 2 - 3, rel=1e-6)
    assert found.kurtosis is not None and found.kurtosis > 0.5
    assert found.outliers == (np.abs(away) > 4 * exact.std()).mean() > 0
    counts, edges = np.histogram(exact, 143)  # the root of 20500
    assert (found.counts == counts).all() and np.array_equal(found.edges, edges)
    assert float((found.density * np.diff(found.edges)).sum()) == pytest.approx(1)


def test_values_that_are_not_finite_are_counted_apart() -> None:
    found = histogram(weights(np.array([1.0, np.nan, 3.0, np.inf, -np.inf, 2.0]), 3))
    assert (found.count, found.not_finite, found.mean) == (3, 3, 2.0)
    assert (found.edges[0], found.edges[-1]) == (1.0, 3.0)


def test_equal_values_have_no_kurtosis() -> None:
    found = histogram(weights(np.full(10, 2.5)))
    assert (found.mean, found.sd, found.kurtosis, found.outliers) == (2.5, 0.0, None, 0.0)
    assert (found.counts.sum(), found.edges[0], found.edges[-1]) == (10, 2.0, 3.0)


@pytest.mark.parametrize("values", [np.zeros((0, 4)), np.array([np.nan])])
def test_without_a_value_there_is_nothing_to_draw(values: NDArray[Any]) -> None:
    with pytest.raises(InputError, match="w: holds no finite value"):
        histogram(weights(values))


def whole(item: Weights) -> NDArray[np.float32]:
    return np.concatenate([chunk.reshape(-1) for chunk in item.chunks()])


def test_a_checkpoint_of_floats_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "CHUNK_ELEMENTS", 1000)
    found = {item.name: item for item in weights_of(open_checkpoint(TINY))}
    stored = {name: open_checkpoint(TINY).read(name) for name in found}
    assert set(found) == set(open_checkpoint(TINY).tensors)
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.norm.weight"):
        item = found[name]
        assert item.stored == "BF16" and item.shape == stored[name].shape
        assert max(chunk.size for chunk in item.chunks()) <= 1000
        assert np.array_equal(whole(item), (stored[name].astype(np.uint32) << 16).view(np.float32).reshape(-1))


@pytest.mark.parametrize("scheme", [LinearScheme("awq", "awq", group_size=32), LinearScheme("fp8", "fp8", 8, -1, True, "F32")])
def test_quantized_linears_as_their_weights(scheme: LinearScheme, tmp_path: Path) -> None:
    made = artifact(tmp_path / "q", scheme)
    checkpoint = open_checkpoint(tmp_path / "q")
    found = {item.name: item for item in weights_of(checkpoint)}
    assert set(found) == {f"{path}.weight" for path in made} | {
        name for name in checkpoint.tensors if "norm" in name or "embed" in name or "lm_head" in name
    }
    for path, (geometry, dense) in made.items():
        item = found[f"{path}.weight"]
        assert (item.stored, item.shape) == (f"{scheme.layout}, {scheme.bits} bits", (geometry.n, geometry.k))
        assert np.array_equal(whole(item), dense.numpy().reshape(-1))


def test_a_gguf_file_by_either_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "CHUNK_ELEMENTS", 100)
    config = config_of("llama")
    values = gguf_values(config, values_of(config))
    raw = gguf.quants.quantize(values["blk.0.ffn_up.weight"], gguf.GGMLQuantizationType.Q8_0)
    path = write_model(tmp_path / "m.gguf", config, tensors={"blk.0.ffn_up.weight": ("Q8_0", raw)})
    found = weights_of(open_checkpoint(path))
    assert [item.name for item in chosen(found, [r"blk\.0\.ffn_up"])] == [item.name for item in chosen(found, [r"layers\.0\..*up_proj"])]
    item = chosen(found, [r"blk\.0\.ffn_up"])[0]
    assert (item.name, item.stored, item.shape) == ("blk.0.ffn_up.weight", "Q8_0", (64, 32))
    assert np.array_equal(whole(item), gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0).reshape(-1))
    assert np.array_equal(whole(chosen(found, ["output_norm"])[0]), values["output_norm.weight"])


def test_patterns_choose_in_the_order_of_the_tensors() -> None:
    some = [weights(np.ones(1), name=name) for name in ("a.0", "b.0", "a.1", "c")]
    assert [item.name for item in chosen(some, ["c", r"^a", "a.1"])] == ["a.0", "a.1", "c"]


@pytest.mark.parametrize(
    "pattern,what",
    [("z", "matches no tensor of weights, expected a part of a name, like t0, t1, t2"), ("(", "is not a regular expression")],
)
def test_patterns_that_choose_nothing(pattern: str, what: str) -> None:
    with pytest.raises(InputError) as error:
        chosen([weights(np.ones(1), name=f"t{n}") for n in range(4)], ["t", pattern])
    assert error.value.line.startswith(f"--tensor '{pattern}': {what}")


def test_more_than_fit_on_a_picture() -> None:
    some = [weights(np.ones(1), name=f"t{n}") for n in range(13)]
    assert len(chosen(some[:12], ["t"])) == 12
    with pytest.raises(InputError, match="--tensor: matches 13 tensors, expected at most 12 on one picture"):
        chosen(some, ["t"])


def inspect(path: Path, out: Path | None, *patterns: str) -> Any:
    return run(InspectOptions(str(path), plot=out, tensor=patterns))


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--tensor: says which tensors"):
        inspect(TINY, None, "q_proj")
    with pytest.raises(InputError, match="--plot: was given without --tensor"):
        inspect(TINY, tmp_path / "a.png")
    with pytest.raises(InputError, match="is no PNG, expected a file name"):
        inspect(TINY, tmp_path / "a.jpg", "q_proj")


def test_a_file_that_is_no_picture_is_never_replaced(tmp_path: Path) -> None:
    for name, data in (("model.png", b"weights"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="exists and is no PNG"):
            inspect(TINY, tmp_path / name, "q_proj")
        assert (tmp_path / name).read_bytes() == data
    (tmp_path / "link.png").symlink_to(tmp_path / "none")
    with pytest.raises(InputError, match="exists and is no PNG"):
        inspect(TINY, tmp_path / "link.png", "q_proj")


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MachineError) as error:
        inspect(TINY, tmp_path / "a.png", "q_proj")
    assert error.value.line == "--plot: needs matplotlib, which is not installed"
    assert error.value.hint == "pip install 'quantkit[plot]'" and not (tmp_path / "a.png").exists()


@drawing
def test_the_picture_and_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    report = inspect(TINY, out, r"layers\.[01]\.mlp\.down")
    first = out.read_bytes()
    assert first.startswith(PNG) and len(first) > 10_000
    assert [(item["name"], item["count"]) for item in report.data["histograms"]] == [
        (f"model.layers.{n}.mlp.down_proj.weight", 131072) for n in (0, 1)
    ]
    bits = open_checkpoint(TINY).read("model.layers.0.mlp.down_proj.weight").astype(np.uint32)
    assert report.data["histograms"][0]["sd"] == pytest.approx((bits << 16).view(np.float32).astype(np.float64).std())
    assert dict(report.facts)["drawn"] == f"{out}, 2 tensors"
    assert [row[0] for table in report.tables if table.title == "Weights" for row in table.rows][1] == "model.layers.1.mlp.down_proj.weight"
    inspect(TINY, out, r"layers\.[01]\.mlp\.down")
    assert out.read_bytes() == first  # a picture is replaced, and equal weights are equal bytes


@drawing
@pytest.mark.parametrize("count", [1, 3, 12])
def test_any_number_of_panels(count: int) -> None:
    rng = np.random.default_rng(1)
    some = [weights(rng.normal(size=500), name=f"t{n}") for n in range(count - 1)] + [weights(np.full(3, 7.0))]
    assert draw([(item, histogram(item)) for item in some]).startswith(PNG)


@drawing
def test_the_weights_of_a_gguf_file_of_another_architecture(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "c.gguf", "clip", {}, {"v.q.weight": np.arange(64, dtype=np.float16).reshape(2, 32), "i": np.ones(3, np.int32)}
    )
    found = inspect(path, tmp_path / "c.png", "q").data["histograms"]
    assert (found[0]["name"], found[0]["mean"], found[0]["stored"]) == ("v.q.weight", 31.5, "F16")
    assert math.isclose(found[0]["sd"], np.arange(64).std())
    with pytest.raises(InputError, match="matches no tensor of weights"):
        inspect(path, tmp_path / "c.png", "^i$")
