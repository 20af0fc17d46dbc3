"""``quantkit bench kernels``: what it measures and says, with a GPU that is made up here, and on a real one; and without one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantkit.commands import bench_kernels
from quantkit.commands.bench_kernels import BenchKernelsOptions, floor_us, goal_us
from quantkit.errors import InputError, MachineError
from quantkit.ops.cuda_library import find_library
from quantkit.ops.kernel_bench import FORMATS, Bench, Measured, columns_of
from quantkit.ops.kernel_select import MMA, WGMMA, Config, Gpu, read_tables
from quantkit.ops.tiles import Format, Tiles

GPU = Gpu("made up", (9, 0), 132)
ROOT = Path(__file__).parents[2]


class MadeUp:
    """Times that follow from the sizes alone."""

    gpu = GPU
    kernels = Path(__file__)
    wrong: tuple[int, ...] = ()
    exact = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def weights(self, form: str, n: int, k: int) -> Any:
        first = SimpleNamespace(n=n, k=k, data=torch.empty(n * k // 2, device="meta", dtype=torch.uint8), format=Format[_NAME[form]])
        return SimpleNamespace(first=first, shape=(n, k))

    def read_us(self, weight: Any) -> float:
        return float(weight.first.data.nbytes) / 3e6

    def cublas_us(self, n: int, k: int, tokens: int) -> float:
        return n * k / 1.5e6 + tokens

    def dequantize_us(self, weight: Any) -> tuple[float, bool]:
        return weight.first.n * weight.first.k / 1e6, self.exact

    def inputs(self, tokens: int, k: int) -> torch.Tensor:
        return torch.empty(tokens, k, device="meta")

    def product(self, weight: Any, x: torch.Tensor, tune: bool) -> Measured | None:
        if x.shape[0] in self.wrong:
            return None
        config = Config(MMA, 8, x.shape[0]) if x.shape[0] <= 16 else Config(WGMMA, 128)
        return Measured(1.1 * self.read_us(weight), config if tune else None, 2e-4)

    def empty_us(self) -> float:
        return 1.03


_NAME = {"int4": "INT4", "nf4": "NF4N", "q4_k": "Q4_K", "q5_k": "Q5_K", "q6_k": "Q6_K", "q8_0": "Q8_0", "q4_0": "INT4"}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_kernels, "Bench", MadeUp)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bench_kernels, "user_table", lambda: tmp_path / "cache" / "table.json")


def test_every_cell_of_kernels(made_up: None) -> None:
    """Eight shapes, eleven numbers of tokens, five formats; K-quants need whole blocks of 256."""
    seen: list[tuple[str, int, int]] = []
    peers = ROOT / "benchmarks" / "peers" / "kernel_peers_h100.json"
    report = bench_kernels.run(BenchKernelsOptions(peers=peers), lambda *what: seen.append(what))
    cells = [cell for cell in report.data["cells"] if cell["M"] is not None]
    assert len(cells) == 8 * 11 * 5 and len(report.data["cells"]) == len(cells) + 40
    assert seen[-1] == ("measure", 40, 40)
    assert {cell["K"] for cell in cells if cell["shape"] == "q72_down"} == {3712, 3840}
    first = cells[0]
    assert (first["format"], first["shape"], first["M"], first["peer_us"]) == ("int4", "l3_gateup", 1, 25.12)
    assert first["us"] == pytest.approx(1.1 * 28672 * 4096 / 2 / 3e6)
    facts = dict(report.facts)
    assert facts["int4: at or under the best peer"].endswith("of 88 cells")
    assert facts["int4: within the bar"].endswith("of 88 cells")
    assert facts["nf4: times the floor, geometric mean"].startswith("M=1 1.10, M=2 1.10")
    assert report.failed is None
    assert len(report.tables[0].rows) == 440
    assert report.tables[0].rows[0][:4] == ("int4", "l3_gateup", 1, "21.53")
    assert report.tables[1].rows[0] == ("int4", "l3_gateup", "117.44", "2.00", "yes")


def test_figures_are_written(made_up: None, tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    options = BenchKernelsOptions(formats=("nf4",), shapes=("128x256",), tokens=(1, 32), dtype="bfloat16", out=out)
    report = bench_kernels.run(options)
    written = json.loads(out.read_text())
    data = json.loads(json.dumps(report.data))
    assert {"gpu", "driver", "torch", "commit", "kernels", "kernels_sha256", "dtype", "empty_us", "cells"} == set(written) == set(data)
    assert (written["kernels"], len(written["kernels_sha256"])) == (Path(__file__).name, 64)
    for cell, kept in zip(data["cells"], written["cells"], strict=True):
        assert kept == {key: pytest.approx(value, rel=1e-3) if isinstance(value, float) else value for key, value in cell.items()}
    assert written["dtype"] == "bfloat16"
    assert [cell["M"] for cell in written["cells"]] == [None, 1, 32]
    assert report.next_steps == ("quantkit bench kernels --tune",)


def test_tuning_writes_the_table(made_up: None, tmp_path: Path) -> None:
    shape = {"shapes": ("128x256",), "formats": ("int4",)}
    bench_kernels.run(BenchKernelsOptions(**shape, tokens=(1, 64), tune=True))
    bench_kernels.run(BenchKernelsOptions(**shape, tokens=(16,), tune=True))
    users = tmp_path / "cache" / "table.json"
    best = ((1, Config(MMA, 8, 1)), (16, Config(MMA, 8, 16)), (64, Config(WGMMA, 128)))
    assert read_tables(users) == {GPU: {("INT4", 128, 256): best}}
    other = tmp_path / "other.json"
    report = bench_kernels.run(BenchKernelsOptions(**shape, tokens=(1,), tune=True, table=other))
    assert read_tables(other) == {GPU: {("INT4", 128, 256): best[:1]}}
    assert dict(report.facts)["table"] == str(other)
    assert report.data["cells"][1]["config"] == "mma 8,0x1,0x0,0x0"


def test_a_wrong_result_fails(made_up: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MadeUp, "wrong", (2,))
    report = bench_kernels.run(BenchKernelsOptions(formats=("int4",), shapes=("128x256",), tokens=(1, 2)))
    assert report.failed == "a result was wrong: 1 of 3 cells, the first int4 128x256 M=2"
    assert report.data["cells"][2]["us"] is None
    monkeypatch.setattr(MadeUp, "exact", False)
    report = bench_kernels.run(BenchKernelsOptions(formats=("int4",), shapes=("128x256",), tokens=(1,)))
    assert report.failed == "a result was wrong: 1 of 2 cells, the first int4 128x256 dequantized"


@pytest.mark.parametrize(
    "options,line",
    [
        (BenchKernelsOptions(dtype="float32"), "--dtype: 'float32' is unknown, expected float16 or bfloat16"),
        (BenchKernelsOptions(shapes=("l3",)), "--shape: 'l3' is unknown, expected NxK, or one of l3_gateup"),
        (BenchKernelsOptions(shapes=("64x0",)), "--shape: '64x0' is unknown"),
        (BenchKernelsOptions(table=Path("t")), "--table: is given without --tune, expected both"),
    ],
)
def test_options_that_mean_nothing(options: BenchKernelsOptions, line: str, made_up: None) -> None:
    with pytest.raises(InputError) as caught:
        bench_kernels.run(options)
    assert caught.value.line.startswith(line)


@pytest.mark.parametrize("text", ["", "{}", '{"cells": [{}]}', '{"cells": [1]}'])
def test_a_file_that_has_no_peers(text: str, tmp_path: Path, made_up: None) -> None:
    path = tmp_path / "peers.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"peers.json: is not a file of peers \("):
        bench_kernels.run(BenchKernelsOptions(peers=path))


def test_no_gpu_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError) as caught:
        bench_kernels.run(BenchKernelsOptions())
    assert caught.value.line == "GPU: torch sees none, expected a CUDA GPU of compute capability 8.0 or later"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "m,large,goal", [(1, True, 118), (1, False, 135), (16, True, 125), (64, False, 200), (128, True, 150), (128, False, 900)]
)
def test_bars(m: int, large: bool, goal: float) -> None:
    cell = {"format": "int4", "M": m, "N": 64, "K": 64, "bytes": 3e7 if large else 1e7, "read_pass_us": 100.0, "cublas_us": 900.0}
    assert goal_us(cell) == pytest.approx(goal)
    assert goal_us(cell | {"M": 256}) == pytest.approx(750 if large else 900)
    assert goal_us(cell | {"M": 1024}) == pytest.approx(900 / 0.97)
    others = goal_us(cell | {"format": "nf4"})
    assert others is None if m > 1 or not large else others == pytest.approx(1.4 * 3e7 / 3063e3)
    assert floor_us(cell | {"N": 28672, "K": 4096, "M": 4096}) == pytest.approx(1265.9, rel=1e-3)


@pytest.mark.parametrize("form", FORMATS)
def test_weights_are_random_and_finite(form: str) -> None:
    """On a CPU here: every format packs, its copies are apart, and its values are of a size that float16 holds."""
    bench = object.__new__(Bench)
    bench.device, bench.dtype, bench._generator = torch.device("cpu"), torch.float16, torch.Generator()
    n, k = 64, columns_of(form, 300)
    assert k in (384, 512, 320)
    weight = bench.weights(form, n, k)
    assert isinstance(weight.first, Tiles) and weight.shape == (n, k) == tuple(weight.dense.shape)
    assert len({copy.data.data_ptr() for copy in weight.copies[:5]}) == 5
    assert math.isfinite(float(weight.dense.norm())) and 0 < float(weight.dense.abs().max()) < 100
    assert float(weight.dense.std()) > 1e-3


@pytest.mark.gpu
def test_gpu_small_products() -> None:
    if not torch.cuda.is_available() or find_library() is None:
        pytest.skip("needs a CUDA GPU and the kernels: quantkit doctor --build-kernels")
    report = bench_kernels.run(BenchKernelsOptions(shapes=("192x512",), tokens=(1, 17, 130)))
    assert report.failed is None
    assert all(cell["error"] < 3e-3 and cell["us"] > 0 for cell in report.data["cells"] if cell["M"] is not None)
