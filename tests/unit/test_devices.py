"""Work over several devices: dealt alike every time, added in order, and near enough what one device makes.

Two CPUs stand for two GPUs: every step is the same, in threads.
"""

from __future__ import annotations

import json
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_fixtures import two_layers
from safetensors.torch import load_file
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.commands import quantize, quantize_run
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.errors import InputError, MachineError
from quantkit.layouts.base import GroupedInt
from quantkit.model.load import embedded, load_block
from quantkit.quantizers.base import BlockFit, InputStats, methods
from quantkit.quantizers.calibration import CalibrationStream, StatsCollector, gathered
from quantkit.quantizers.devices import deal, each, shares, spread
from quantkit.quantizers.gptq_solver import Solved, joined
from quantkit.quantizers.pipeline import Source
from quantkit.report import Report
from quantkit.scheme import LinearScheme
from quantkit.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")

ONE, TWO, THREE = ("cpu",), ("cpu", "cpu"), ("cpu", "cpu", "cpu")
WINDOWS = {"samples": 5, "seq_len": 64}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_layers(tmp_path_factory.mktemp("small") / "model")


def test_shares_are_contiguous_even_and_whole() -> None:
    assert shares(7, 3) == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert shares(1, 2) == [slice(0, 0), slice(0, 1)]
    assert shares(6, 1) == [slice(0, 6)]


def test_jobs_are_dealt_dearest_first_to_the_idlest() -> None:
    assert deal([103, 69, 481, 842], 2) == [1, 1, 1, 0]
    assert deal([1, 1, 1], 3) == [0, 1, 2]
    assert deal([5, 1, 1, 1], 1) == [0, 0, 0, 0]


def test_each_device_has_a_thread_and_results_keep_their_order() -> None:
    together = threading.Barrier(2, timeout=30)

    def work(job: int, device: str) -> tuple[int, str, int, bool]:
        if job < 2:
            together.wait()  # which passes only when both devices work at once
        return job, device, threading.get_ident(), torch.is_inference_mode_enabled()

    with torch.inference_mode():
        found = spread(TWO, [3.0, 2.0, 1.0, 1.0], work)
    assert [job for job, *_ in found] == [0, 1, 2, 3] and all(inference for *_, inference in found)
    chosen = deal([3.0, 2.0, 1.0, 1.0], 2)
    threads = [thread for _, _, thread, _ in found]
    assert len(set(threads)) == 2 and all((threads[0] == threads[job]) == (chosen[0] == chosen[job]) for job in range(4))
    assert not any(inference for *_, inference in spread(TWO, [1.0, 1.0], work))
    assert each(ONE, lambda index, _: (index, threading.get_ident())) == [(0, threading.get_ident())]


def test_the_first_job_that_fails_is_the_one_that_is_told() -> None:
    def work(job: int, device: str) -> int:
        if job in (1, 2):
            raise InputError(f"job {job}", "fails")
        return job

    for devices in (ONE, TWO, THREE):
        with pytest.raises(InputError, match="job 1: fails"):
            spread(devices, [1.0, 2.0, 9.0, 1.0], work)


def seen_by(devices: tuple[str, ...], root: Path) -> tuple[dict[str, InputStats], Tensor, float]:
    """The statistics of the first block's inputs, the hidden states after it, and their peak."""
    checkpoint = open_checkpoint(root)
    spec = spec_for(checkpoint.config)
    tokens = torch.randint(3, 200, (5, 32), generator=torch.Generator().manual_seed(0))
    stream = CalibrationStream(embedded(checkpoint, spec, tokens, dtype=torch.float32), 2)
    source = Source(checkpoint, spec, "F32", torch.float32, devices)
    collectors = source.collectors(0, spec.block_linears(0), frozenset({"gram", "cross"}))
    observed = source.collectors(0, spec.block_linears(0), frozenset({"gram", "cross"}))
    stream.observe(source.loaded(0), observed, frozenset(spec.block_linears(0)), devices, (stream, source.loaded(0)))
    stream.advance(source.loaded(0), collectors, devices)
    advanced = gathered(collectors, devices[0])
    stats = gathered(observed, devices[0])
    assert all(torch.equal(advanced[role].gram, stats[role].gram) for role in stats)
    return stats, stream.hidden, stream.peak


@pytest.mark.parametrize("devices", [TWO, THREE, ("cpu",) * 6])
def test_the_sums_of_several_devices_are_those_of_one(small: Path, devices: tuple[str, ...]) -> None:
    (one, hidden, peak), (many, hidden_too, peak_too) = seen_by(ONE, small), seen_by(devices, small)
    assert torch.allclose(hidden, hidden_too, rtol=1e-5, atol=1e-6) and peak == pytest.approx(peak_too, rel=1e-6)
    assert one.keys() == many.keys() and many["k"] is many["q"]
    for role in one:
        assert one[role].tokens == many[role].tokens == 160
        assert torch.allclose(one[role].abs_max, many[role].abs_max, rtol=1e-5)
        for name in ("gram", "cross", "abs_sum"):
            want, got = getattr(one[role], name), getattr(many[role], name)
            assert float((want - got).norm() / want.norm()) < 1e-6, (role, name)
        assert torch.equal(many[role].gram, many[role].gram.T)
        assert torch.allclose(many[role].cross, many[role].gram, rtol=1e-4, atol=1e-4), "here both models are the float one"


def test_a_linear_that_only_one_device_saw_is_in_the_sums() -> None:
    x, y = torch.randn(40, 4), torch.randn(30, 4)
    shared = {"experts.0.up": "experts.0.up", "router": "router"}
    first, second = (StatsCollector(shared, shared, frozenset({"gram"})) for _ in range(2))
    first.tap("router", x)
    second.tap("router", y)
    for _ in range(5):
        second.tap("experts.0.up", y)
    stats = gathered([first, second], "cpu")
    assert stats["router"].tokens == 70 and torch.allclose(stats["router"].gram, x.T @ x + y.T @ y, atol=1e-4)
    assert torch.equal(stats["router"].abs_max, torch.cat([x, y]).abs().amax(0))
    up = stats["experts.0.up"]
    assert up.tokens == 150 and not up.borrowed and torch.allclose(up.gram, 5 * y.T @ y, atol=1e-3)


SCHEMES = {
    "awq": LinearScheme("awq", "awq", 4, 64, False),
    "gptq": LinearScheme("gptq", "gptq", 4, 64, True),
    "rtn": LinearScheme("rtn", "awq", 4, 64, False),
}


def fitted(root: Path, devices: tuple[str, ...], method: str, stats: dict[str, InputStats], *roles: str, **options: Any) -> BlockFit:
    """What a method makes of the first block, or of ``roles`` of it."""
    checkpoint = open_checkpoint(root)
    spec = spec_for(checkpoint.config)
    block = Source(checkpoint, spec, "F32", torch.float32, devices).block(0)
    if roles:
        block = replace(block, linears={role: block.linears[role] for role in roles})
    return methods()[method].factory(options).fit(block, stats, dict.fromkeys(spec.block_linears(0), SCHEMES[method]), spec)


@pytest.fixture(scope="module")
def stats(small: Path) -> dict[str, InputStats]:
    found = seen_by(ONE, small)[0]
    alone = {id(s): replace(s, cross=None) for s in found.values()}
    return {role: alone[id(s)] for role, s in found.items()}


def parts_of(result: Any) -> dict[str, Tensor]:
    return {f.name: value for f in fields(result) if isinstance(value := getattr(result, f.name), Tensor)}


@pytest.mark.parametrize("method", ["awq", "gptq", "rtn"])
@pytest.mark.parametrize("devices", [TWO, THREE])
def test_work_that_is_dealt_whole_gives_the_same_bits(
    small: Path, stats: dict[str, InputStats], method: str, devices: tuple[str, ...]
) -> None:
    one, many = (fitted(small, chosen, method, stats) for chosen in (ONE, devices))
    assert one.facts == many.facts and len(one.results) == 7
    for name in ("results", "linears", "biases", "norms"):
        assert list(getattr(one, name)) == list(getattr(many, name))
    for role, result in one.results.items():
        want, got = parts_of(result), parts_of(many.results[role])
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want), role
    assert all(torch.equal(value, many.norms[role]) for role, value in one.norms.items())


@pytest.mark.parametrize("order", ["static", "act", "none"])
@pytest.mark.parametrize("roles", [("q", "k", "v"), ("down",)])
def test_one_solve_is_cut_by_rows(small: Path, stats: dict[str, InputStats], roles: tuple[str, ...], order: str) -> None:
    one, many = (fitted(small, devices, "gptq", stats, *roles, order=order) for devices in (ONE, THREE))
    for role in roles:
        want, got = one.results[role], many.results[role]
        assert isinstance(want, GroupedInt) and isinstance(got, GroupedInt)
        assert want.codes.shape == got.codes.shape and float((want.codes != got.codes).float().mean()) < 1e-3
        assert torch.allclose(want.scales.float(), got.scales.float(), rtol=2e-2)
        assert (want.g_idx is None) == (got.g_idx is None) == (order != "act")
        assert want.g_idx is None or (got.g_idx is not None and torch.equal(want.g_idx, got.g_idx))
        assert one.facts[role]["output_error"] == pytest.approx(many.facts[role]["output_error"], rel=1e-3)


def test_the_error_of_a_linear_that_was_cut_is_that_of_all_its_rows() -> None:
    def part(rows: int, loss: float, total: float) -> Solved:
        return Solved(torch.ones(rows, 4), torch.ones(rows, 1), torch.ones(rows, 1), None, loss, total, 0.01, 2, 1)

    whole = joined([part(3, 1.0, 10.0), part(2, 3.0, 15.0)], "cpu")
    assert whole.codes.shape == (5, 4) and whole.scales.shape == whole.zeros.shape == (5, 1)
    assert (whole.loss, whole.total, whole.error, whole.dead) == (4.0, 25.0, 0.4, 2)


def on(monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...]) -> None:
    monkeypatch.setattr(quantize_run, "devices_of", lambda name, count: devices)


def quantized(source: Path, out: Path, method: str, **fields: Any) -> Report:
    calibration = WINDOWS if method in ("awq", "gptq", "w8a8") else {}
    return quantize.run(QuantizeOptions(path=str(source), out=out, method=method, device="cpu", **calibration, **fields))


BOUNDS = {"awq": 0.02, "w8a8": 0.01, "gptq": 0.3}
GPU_BOUNDS = {"awq": 0.3, "w8a8": 0.05, "nf4": 1e-6, "gptq": 0.3}
"""How far the weights of two artifacts may be apart, relative. GPTQ's roundings follow one another through the whole model: one that
falls to the other side makes all later ones fall anew, and no worse. A GPU also sums a smaller batch in another order, so AWQ may take
the other of two scales that are as good."""


def assert_alike(one: Path, other: Path, bound: float) -> None:
    """Two artifacts of one model lose as much in the outputs of every linear, and hold weights that are within ``bound``."""
    facts = [json.loads((root / "quantkit.json").read_text())["blocks"] for root in (one, other)]
    for layer, roles in facts[0].items():
        for role, fact in roles.items():
            if "output_error" in fact:
                assert facts[1][layer][role]["output_error"] == pytest.approx(fact["output_error"], rel=0.03), (layer, role)
    spec = spec_for(open_checkpoint(one).config)
    for layer in range(spec.layers):
        want, got = (load_block(open_checkpoint(root), spec, layer, dtype=torch.float32, parity=True).linears for root in (one, other))
        for role in want:
            whole = want[role].op.weight()
            apart = float((whole - got[role].op.weight()).norm() / whole.norm())
            assert apart < bound, (layer, role)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awq", {"group_size": 64, "option": ("scale_points=4",)}),
        ("gptq", {"group_size": 64}),
        ("gptq", {"group_size": 64, "inputs": "float", "option": ("order=act",)}),
        ("gptq", {"group_size": 64, "option": ("upstream=true",)}),
        ("w8a8", {}),
    ],
)
def test_two_devices_make_nearly_what_one_makes_and_the_same_every_time(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any]
) -> None:
    one = quantized(small, tmp_path / "one", method, **options)
    on(monkeypatch, TWO)
    two = [quantized(small, tmp_path / name, method, **options) for name in ("a", "b")]
    assert (tmp_path / "a" / "SHA256SUMS").read_bytes() == (tmp_path / "b" / "SHA256SUMS").read_bytes()
    assert verify(tmp_path / "a", deep=True).defects == []
    assert two[0].data["peak_activation"] == pytest.approx(one.data["peak_activation"], rel=1e-2)
    assert_alike(tmp_path / "one", tmp_path / "a", BOUNDS[method])
    environments = [json.loads((tmp_path / name / "quantkit.json").read_text())["environment"] for name in ("one", "a")]
    assert environments[0] | {"devices": 2} == environments[1] and "devices" not in environments[0]


@pytest.mark.parametrize("method", ["rtn", "nf4", "int8", "fp8"])
def test_without_calibration_two_devices_write_the_same_bytes_as_one(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    quantized(small, tmp_path / "one", method)
    on(monkeypatch, TWO)
    quantized(small, tmp_path / "two", method)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(
        torch.equal(one[key].view(torch.uint8), two[key].view(torch.uint8)) for key in one if one[key].dim()
    )


class Stop(BaseException):
    pass


def test_a_run_goes_on_with_as_many_devices_or_not_at_all(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantize", 1):
            raise Stop

    on(monkeypatch, TWO)
    quantized(small, tmp_path / "straight", "gptq", group_size=64)
    with pytest.raises(Stop):
        quantize.run(QuantizeOptions(path=str(small), out=tmp_path / "out", method="gptq", group_size=64, device="cpu", **WINDOWS), stop)
    for devices, count in ((ONE, 1), (THREE, 3)):
        on(monkeypatch, devices)
        with pytest.raises(InputError, match=f"devices: was 2 when the work began and is {count} now"):
            quantized(small, tmp_path / "out", "gptq", group_size=64, resume=True)
    on(monkeypatch, TWO)
    quantized(small, tmp_path / "out", "gptq", group_size=64, resume=True)
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (tmp_path / "straight" / "SHA256SUMS").read_bytes()


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (0, "--devices: 2 asked, this machine has 0 CUDA devices, expected no --devices, or a machine with GPUs"),
        (1, "--devices: 2 asked, this machine has 1 CUDA device, expected at most 1"),
    ],
)
def test_more_devices_than_there_are_is_the_machines_no(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, present: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    for device in ("auto", "cuda") if present else ("auto",):
        with pytest.raises(MachineError) as caught:
            quantize.run(QuantizeOptions(str(small), tmp_path / "out", method="rtn", device=device, devices=2))
        assert caught.value.line == message
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert quantize_run.devices_of("auto", 3) == ("cuda:0", "cuda:1", "cuda:2") and quantize_run.devices_of("cuda", 1) == ("cuda",)


def test_a_cpu_is_one_device(tmp_path: Path, small: Path) -> None:
    with pytest.raises(InputError, match="--devices: is 2 with --device cpu, expected --device cuda, or no --devices"):
        quantize.run(QuantizeOptions(str(small), tmp_path / "out", method="rtn", device="cpu", devices=2))
    assert not list(tmp_path.iterdir())


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("method", ["awq", "gptq", "w8a8", "nf4"])
def test_two_gpus_make_nearly_what_one_makes_and_the_same_every_time(tmp_path: Path, small: Path, method: str) -> None:
    shared: dict[str, Any] = {"path": str(small), "method": method, "device": "cuda", "compute_dtype": "float32"}
    shared |= {} if method == "nf4" else WINDOWS
    shared |= {"group_size": 64} if method in ("awq", "gptq") else {}
    torch.cuda.init()
    for name, devices in (("one", 1), ("a", 2), ("b", 2)):
        before = torch.cuda.memory_allocated(1)
        torch.cuda.reset_peak_memory_stats(1)
        quantize.run(QuantizeOptions(out=tmp_path / name, devices=devices, **shared))
        assert (torch.cuda.max_memory_allocated(1) > before) == (devices == 2), "the second GPU works when two were asked for"
    assert (tmp_path / "a" / "SHA256SUMS").read_bytes() == (tmp_path / "b" / "SHA256SUMS").read_bytes()
    assert verify(tmp_path / "a", deep=True).defects == []
    assert_alike(tmp_path / "one", tmp_path / "a", GPU_BOUNDS[method])
