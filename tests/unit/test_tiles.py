"""Linears on tiles: what becomes of stored parts, the torch operators, and which linear is chosen; on a GPU against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.errors import MachineError
from quantkit.formats.quant_state import quant_state_json
from quantkit.geometry import Geometry, geometry_of, ggml_scheme
from quantkit.layouts import registry
from quantkit.layouts.registry import UnpackingLinear, codec, load_linear
from quantkit.layouts.tiled import tiles_of
from quantkit.ops import cuda_library, cuda_tiles, fused
from quantkit.ops.codebook import CODEBOOKS, NESTED_MAP
from quantkit.ops.cuda_tiles import TiledLinear, available, facts
from quantkit.ops.tiles import GGML_KINDS, Tiles, concatenate, dequantize
from quantkit.scheme import LinearScheme

SCHEMES = {
    "awq": LinearScheme("awq", "awq"),
    "awq row": LinearScheme("awq", "awq", group_size=-1),
    "awq gemv": LinearScheme("awq", "awq_gemv", group_size=64),
    "gptq": LinearScheme("gptq", "gptq", group_size=32, scale_dtype="BF16"),
    "gptq act-order": LinearScheme("gptq", "gptq", act_order=True),
    "gptq v2": LinearScheme("gptq", "gptq_v2", group_size=64),
    "packed sym": LinearScheme("rtn", "packed", sym=True),
    "packed asym": LinearScheme("rtn", "packed", group_size=256, scale_dtype="BF16"),
    "nf4": LinearScheme("nf4", "bnb4", group_size=64, code="nf4"),
    "nf4 nested": LinearScheme("nf4", "bnb4", group_size=64, code="nf4", double_quant=True),
    "fp4 nested 128": LinearScheme("fp4", "bnb4", group_size=128, code="fp4", double_quant=True),
    **{kind: ggml_scheme(kind) for kind in sorted(GGML_KINDS)},
}
"""What tiles hold."""
OTHERS = {
    "gptq 8": LinearScheme("gptq", "gptq", bits=8),
    "groups of 16": LinearScheme("rtn", "packed", group_size=16),
    "float32 scales": LinearScheme("rtn", "packed", scale_dtype="F32"),
    "Q2_K": ggml_scheme("Q2_K"),
}
"""What they do not."""


def random_parts(geometry: Geometry, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """Parts of ``geometry``: any codes, scales about 0.01."""
    g, scheme = torch.Generator().manual_seed(seed), geometry.scheme
    if scheme.layout == "ggml":
        rows = torch.randint(0, 256, geometry.shape(geometry.parts[0]), generator=g).to(torch.uint8)
        blocks = rows.view(-1, geometry.parts[0].axes[1].words)
        for at in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82)}.get(scheme.code, (0,)):
            blocks[:, at : at + 2] = (torch.randn(len(blocks), 1, generator=g) * 0.01).half().view(torch.uint8)
        return {"weight": rows.to(device)}
    parts = {}
    for part in geometry.parts:
        shape = geometry.shape(part)
        if part.free:
            state = quant_state_json(scheme.code, scheme.group_size, "float32", geometry.whole, 0.02 if scheme.double_quant else None)
            parts[part.suffix] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        elif part.suffix == "g_idx":
            order = torch.randperm(geometry.k, generator=g) if scheme.act_order else torch.arange(geometry.k)
            parts[part.suffix] = (order // scheme.group_size).int()
        elif part.suffix == "weight.quant_map":
            parts[part.suffix] = CODEBOOKS[scheme.code].clone()
        elif part.suffix == "weight.nested_quant_map":
            parts[part.suffix] = NESTED_MAP.clone()
        elif part.dtype in ("I32", "U8"):
            size = shape if part.dtype == "U8" else (*shape[:-1], shape[-1] * 4)
            raw = torch.randint(0, 256, size, generator=g).to(torch.uint8)
            parts[part.suffix] = raw if part.dtype == "U8" else raw.view(torch.int32)
        elif part.dtype == "I64":
            parts[part.suffix] = torch.tensor(geometry.whole)
        else:
            dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[part.dtype]
            parts[part.suffix] = (torch.rand(shape, generator=g) * 0.02).to(dtype)
    return {suffix: part.to(device) for suffix, part in parts.items()}


def geometry(name: str, n: int = 72, k: int = 512) -> Geometry:
    return geometry_of({**SCHEMES, **OTHERS}[name], n, k, dtype="F16")


@pytest.mark.parametrize("name", SCHEMES)
def test_tiles_give_the_weight_of_the_codec(name: str) -> None:
    about = geometry(name)
    parts, chosen = random_parts(about), codec(about.layout)
    tiles = tiles_of(parts, about, chosen)
    assert tiles is not None
    linear = TiledLinear(tiles, torch.bfloat16)
    assert torch.equal(linear.weight(), chosen.dequant(parts, about, torch.bfloat16))


@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in ("gptq act-order", "awq row")])
def test_a_cut_of_a_linear_has_tiles_of_its_own(name: str) -> None:
    whole = geometry(name, 160, 768)
    parts, chosen, n, k = random_parts(whole), codec(whole.layout), range(32, 152), range(256, 512)
    cut = whole.cut(n, k)
    own = {part.suffix: parts[part.suffix] if part.free else parts[part.suffix][whole.slices(part, n, k)] for part in whole.parts}
    tiles = tiles_of(own, cut, chosen)
    assert tiles is not None
    assert torch.equal(dequantize(tiles), chosen.dequant(parts, whole)[n.start : n.stop, k.start : k.stop])


def parts_of(name: str, rows: Sequence[int], k: int = 512) -> list[Tiles]:
    """Tiles of different weights that agree in what ``concatenate`` compares."""
    found, shared = [], {}
    for seed, n in enumerate(rows):
        about = geometry(name, n, k)
        parts = random_parts(about, seed)
        shared = {**parts, **shared}
        kept = {"g_idx"} if "g_idx" in parts else {suffix for suffix in parts if "quant_map" in suffix}
        tiles = tiles_of({suffix: shared[suffix] if suffix in kept else part for suffix, part in parts.items()}, about, codec(about.layout))
        assert tiles is not None
        found.append(tiles)
    return found


@pytest.mark.parametrize("name", SCHEMES)
def test_tiles_below_one_another(name: str) -> None:
    parts = parts_of(name, (128, 64, 72))
    for i, each in enumerate(parts):
        if each.offsets is not None:  # NF4N: as in a model
            parts[i] = replace(each, offsets=each.offsets + i)
    joined = concatenate(parts)
    assert joined is not None and (joined.n, joined.k) == (264, 512)
    assert torch.equal(dequantize(joined), torch.cat([dequantize(each) for each in parts]))
    dense = torch.cat([TiledLinear(each, torch.float16).weight() for each in parts])
    assert torch.equal(TiledLinear(joined, torch.float16).weight(), dense)


def test_what_does_not_fit_below_one_another() -> None:
    (q, k), other = parts_of("gptq act-order", (64, 64)), parts_of("gptq", (64,))[0]
    assert concatenate([q, replace(k, perm=k.perm.flip(0))]) is None  # type: ignore[union-attr]
    assert concatenate([q, replace(k, perm=None)]) is None
    assert concatenate([q, other]) is None
    assert concatenate(parts_of("awq", (72, 64))) is None
    assert concatenate([parts_of("awq", (64,), 512)[0], parts_of("awq", (64,), 256)[0]]) is None
    assert concatenate([parts_of("awq", (64,))[0], parts_of("packed sym", (64,))[0]]) is None
    table = parts_of("nf4", (64, 64))
    assert concatenate([table[0], replace(table[1], table=-table[1].table)]) is None  # type: ignore[operator]
    assert concatenate(parts_of("nf4 nested", (64, 64), 128)) is None  # 128 blocks end within a second scale's 256


@pytest.mark.parametrize("name", OTHERS)
def test_what_tiles_cannot_hold(name: str) -> None:
    about = geometry(name)
    assert tiles_of(random_parts(about), about, codec(about.layout)) is None


def test_act_order_cut_along_the_inputs_has_no_tiles() -> None:
    whole = geometry("gptq act-order")
    parts, n, k = random_parts(whole), range(72), range(256)
    own = {part.suffix: parts[part.suffix][whole.slices(part, n, k)] for part in whole.parts}
    assert tiles_of(own, whole.cut(n, k), codec("gptq")) is None


@pytest.mark.parametrize("name", ["awq", "gptq act-order", "nf4 nested", "Q4_K"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operators_on_a_cpu(name: str, dtype: torch.dtype) -> None:
    about = geometry(name)
    parts = random_parts(about)
    tiles = tiles_of(parts, about, codec(about.layout))
    assert tiles is not None
    x = torch.randn(5, about.k, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = x.float() @ codec(about.layout).dequant(parts, about).T
    got = TiledLinear(tiles, dtype)(x)
    assert got.dtype == dtype
    assert (got.float() - want).norm() / want.norm() < 1e-2


def test_operators_keep_torch_s_rules() -> None:
    about = geometry("nf4 nested")
    tiles = tiles_of(random_parts(about), about, codec("bnb4"))
    assert tiles is not None
    weight = (tiles.data, tiles.table, tiles.code, tiles.absmax2, tiles.offsets, facts(tiles))
    x = torch.randn(3, about.k).half()
    torch.library.opcheck(torch.ops.quantkit.tiles_dequantize, (*weight, torch.float16))
    torch.library.opcheck(torch.ops.quantkit.tiles_matmul, (x, *weight, torch.zeros(about.n).half(), []))


@pytest.mark.parametrize(("dtype", "tiled"), [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False)])
def test_which_linear_runs(dtype: torch.dtype, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "available", lambda _, dtype: dtype in cuda_tiles.TYPES)
    for name in SCHEMES:
        about = geometry(name)
        linear = load_linear(about, random_parts(about), dtype=dtype)
        assert isinstance(linear, TiledLinear) == tiled, name
    about = geometry("gptq 8")
    assert isinstance(load_linear(about, random_parts(about), dtype=torch.float16), UnpackingLinear)
    about = geometry("awq")
    assert isinstance(load_linear(about, random_parts(about), dtype=torch.float16, parity=True), UnpackingLinear)


def test_no_tiles_on_a_cpu() -> None:
    assert not available("cpu", torch.float16)


def test_a_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_library, "find_library", lambda: None)
    with pytest.raises(MachineError, match="are not built"):
        cuda_tiles._function.__wrapped__("quantkit_matmul")


def test_bytes_held() -> None:
    about = geometry("awq", 64, 128)
    linear = TiledLinear(tiles_of(random_parts(about), about, codec("awq")), torch.float16, torch.zeros(64).half())  # type: ignore[arg-type]
    assert linear.nbytes == 4096 + 128 + 64 + 128


needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() or not available("cuda", torch.float16), reason="needs a GPU of capability 8.0 and built kernels"
)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("n", "k"), [(72, 512), (128, 1024), (1, 256), (200, 768)])
def test_dequantize_on_a_gpu_is_the_reference(name: str, n: int, k: int) -> None:
    about = geometry(name, n if name not in ("awq", "awq row") and "gptq" not in name else 8 * n, k)
    parts = random_parts(about, device="cuda")
    tiles = tiles_of(parts, about, codec(about.layout))
    assert tiles is not None
    cpu = tiles_of(random_parts(about), about, codec(about.layout))
    assert cpu is not None and torch.equal(tiles.data.cpu(), cpu.data)
    for dtype in cuda_tiles.TYPES:
        weight = (tiles.data, tiles.table, tiles.code, tiles.absmax2, tiles.offsets, facts(tiles))
        got = torch.ops.quantkit.tiles_dequantize(*weight, dtype)
        assert torch.equal(got.cpu().view(torch.int16), dequantize(cpu, dtype).view(torch.int16))


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    about = geometry(name, 1160, 1024)
    parts = random_parts(about, device="cuda")
    linear = load_linear(about, parts, dtype=dtype, device="cuda")
    assert isinstance(linear, TiledLinear)
    dense = codec(about.layout).dequant(parts, about, torch.float32)
    for rows in (0, 1, 2, 7, 16, 33, 64, 100, 257):
        x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(rows)).to("cuda", dtype)
        want = (x.double() @ dense.double().T).float()
        got = linear(x)
        assert got.shape == want.shape and got.dtype == dtype
        assert not rows or (got.float() - want).norm() / want.norm() < 3e-3, rows


@pytest.mark.gpu
@needs_kernels
def test_products_in_a_graph_and_compiled() -> None:
    about = geometry("gptq act-order", 256, 512)
    linear = load_linear(about, random_parts(about), dtype=torch.float16, device="cuda")
    x = torch.randn(4, 512, device="cuda").half()
    want = linear(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = linear(x)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)
    assert torch.equal(torch.compile(linear.__call__, fullgraph=True)(x), want)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("name", ["packed sym", "awq", "nf4 nested", "Q4_K"])
@pytest.mark.parametrize("rows", [1, 16, 48, 128, 1024])
def test_an_mlp_in_a_graph(name: str, rows: int) -> None:
    """Kernels that start under the tail of the one ahead, one after another, on parts of rows; the graph runs on inputs that came later."""
    n, k = 512, 1024
    up, down = (
        load_linear(about, random_parts(about, i), dtype=torch.bfloat16, device="cuda")
        for i, about in enumerate((geometry(name, 2 * n, k), geometry(name, k, n)))
    )
    wide = torch.randn(rows, 2 * k, device="cuda").bfloat16()
    weight = torch.rand(k, device="cuda").bfloat16()

    def step() -> list[Tensor]:
        h = fused.rms_norm(wide[:, :k], weight, 1e-5, 0.0)
        y = down(fused.silu_mul(*up(h).chunk(2, 1)))
        return [*fused.add_rms_norm(y, h, weight, 1e-5, 0.0), up(wide[:, k:])]

    step()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = step()
    wide.copy_(torch.randn(rows, 2 * k, device="cuda"))
    want = [each.clone() for each in step()]
    for _ in range(20):
        for each in got:
            each.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for one, other in zip(got, want, strict=True):
            assert (one.float() - other.float()).norm() <= 1e-2 * other.float().norm()
