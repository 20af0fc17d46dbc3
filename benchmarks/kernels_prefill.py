"""Are the wgmma kernels (kernels/prefill/) right, and how fast are they next to cuBLAS, a read pass and the best peer?

On a machine with a Hopper GPU and torch; LIBRARY holds quantkit_matmul_wgmma and what kernels_prefill_check.cu adds:

    python benchmarks/kernels_prefill.py LIBRARY --out DIR [--check] [--time] [--m 64,128,...] [--shapes l3_qkv,...]

Timing as everywhere: launches rotate over 160 MB of weight copies, in a CUDA graph; the median of replays over the launches.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from quantkit.geometry import GGML_BLOCKS
from quantkit.ops import tiles as ops
from quantkit.ops.codebook import CODEBOOKS, NESTED_MAP
from quantkit.ops.tiles import Format

SHAPES = {
    "l3_gateup": (28672, 4096), "l3_qkv": (6144, 4096), "l3_o": (4096, 4096), "l3_down": (4096, 14336),
    "q72_gateup": (7424, 8192), "q72_down": (8192, 3712), "q72_qkv": (1280, 8192), "q72_o": (8192, 1024),
}  # fmt: skip
TYPES = {torch.float16: 0, torch.bfloat16: 1}
PEERS = dict.fromkeys((Format.INT4, Format.INT4Z), "int4_g128_best_us") | dict.fromkeys((Format.NF4, Format.NF4N), "nf4_best_us")
PEERS |= {form: f"gguf_{form.name}_us" for form in (Format.Q4_K, Format.Q5_K, Format.Q6_K, Format.Q8_0)}
COLD = 160e6
COUNTERS = 65536
TILES = [(256, 2), *((rows, groups) for rows in (128, 64, 32) for groups in (4, 3, 2)), (16, 4), (16, 2)]


class Weight(ctypes.Structure):
    _fields_ = [
        ("tiles", ctypes.c_void_p), ("table", ctypes.c_void_p), ("code", ctypes.c_void_p), ("absmax2", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p), ("format", ctypes.c_int32), ("scale_type", ctypes.c_int32), ("group", ctypes.c_int32),
        ("n", ctypes.c_int64), ("k", ctypes.c_int64), ("block0", ctypes.c_int64), ("block_row_stride", ctypes.c_int64),
    ]  # fmt: skip


class Config(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("kernel", "a", "b", "c", "d")]


def random_tiles(form: Format, n: int, k: int, group: int, scale_type: torch.dtype, *, edge: bool = False) -> ops.Tiles:
    """A random quantized matrix; edge: with outliers, groups of one value and scales of zero."""
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    if form in (Format.INT4, Format.INT4Z, Format.NF4):
        scales = torch.rand(n, k // group, device="cuda") * 0.02 + 0.002
        if edge:
            scales[::7, 0] *= 30
            scales[3::9] = 0
            codes.view(n, k // group, group)[::5] = 11
        if form == Format.NF4:
            return ops.pack_codebook(codes, scales, CODEBOOKS["nf4"].cuda(), group)
        zeros = (
            torch.randint(0, 17, scales.shape, device="cuda", dtype=torch.uint8)
            if form == Format.INT4Z
            else torch.full_like(scales, 8).byte()
        )
        return ops.pack_int4(codes, scales.to(scale_type), zeros)
    if form == Format.NF4N:
        inner = torch.randint(0, 256, (n, k // 64), device="cuda", dtype=torch.uint8)
        outer = torch.rand(n * k // 64 // 256 + 20, device="cuda") * 0.05
        return ops.pack_nested(codes, inner, CODEBOOKS["nf4"].cuda(), NESTED_MAP.cuda(), outer, 0.04, 130, k // 64 + 3)
    block = GGML_BLOCKS[form.name]
    blocks = torch.randint(0, 256, (n * k // block.elements, block.nbytes), device="cuda", dtype=torch.uint8)
    for at, size in {Format.Q4_K: ((0, 1e-3), (2, 5e-3)), Format.Q5_K: ((0, 5e-4), (2, 5e-3)), Format.Q6_K: ((208, 1e-4),)}.get(
        form, ((0, 1e-3),)
    ):
        d = torch.rand(len(blocks), 1, device="cuda") * size
        if edge:
            d[::11] = 0
            d[5::97] *= 20
        blocks[:, at : at + 2] = d.half().view(torch.uint8)
    return ops.pack_ggml(blocks.reshape(n, -1), form.name)


class Linear:
    """A matrix in tiles, as float32, and as the kernels take it."""

    def __init__(self, tiles: ops.Tiles) -> None:
        self.tiles, self.dense = tiles, ops.dequantize(tiles, torch.float32)
        self.bytes = tiles.data.numel()

    def struct(self, data: torch.Tensor | None = None) -> Weight:
        t = self.tiles
        group = t.group if t.group in ops.GROUPS or t.format == Format.Q6_K else 128
        sides = (t.data if data is None else data, t.table, t.code, t.absmax2, t.offsets)
        pointers = [0 if side is None else side.data_ptr() for side in sides]
        return Weight(*pointers, int(t.format), TYPES[t.scale_dtype], group, t.n, t.k, t.block0, t.block_stride)


class Library:
    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))
        self.workspace = torch.zeros(COUNTERS + 132 * 2 * 2 * 131072, dtype=torch.uint8, device="cuda")

    def matmul(self, weight: Weight, x: torch.Tensor, y: torch.Tensor, config: Config, bias: torch.Tensor | None = None) -> int:
        code: int = self.lib.quantkit_matmul_wgmma(
            ctypes.byref(weight), ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.stride(0)),
            TYPES[x.dtype], ctypes.c_void_p(bias.data_ptr() if bias is not None else 0), ctypes.c_void_p(y.data_ptr()),
            ctypes.c_void_p(self.workspace.data_ptr()), ctypes.c_int64(self.workspace.numel()), ctypes.byref(config),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
        return code


def error(y: torch.Tensor, ref: torch.Tensor) -> float:
    return float((y.float() - ref).norm() / ref.norm())


def units(library: Library) -> None:
    lib = library.lib
    for n in (16, 32, 64, 96, 128, 192, 256):
        a, b = torch.randn(64, 64, device="cuda").half(), torch.randn(n, 64, device="cuda").half()
        d = torch.full((64, n), math.nan, device="cuda")
        code = lib.check_multiply(n, ctypes.c_void_p(a.data_ptr()), ctypes.c_void_p(b.data_ptr()), ctypes.c_void_p(d.data_ptr()))
        e = float((d - a.float() @ b.float().t()).norm() / d.norm())
        print(f"unit wgmma n={n}: {'ok' if code == 0 and e < 1e-5 else 'bad'} code {code} error {e:.1e}")
    source = torch.randint(-(2**31), 2**31 - 1, (4096,), device="cuda", dtype=torch.int32)
    copied = torch.zeros_like(source)
    code = lib.check_copy(ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(copied.data_ptr()))
    print(f"unit bulk copy: {'ok' if code == 0 and torch.equal(source, copied) else 'bad'} code {code}")


def configs(tiles: list[tuple[int, int]], modes: set[str], m: int | None = None) -> Iterator[Config]:
    """Every configuration, or those that can make sense for m rows."""
    for tile, groups in tiles:
        if m is not None and not (tile >= min(m, 128) and tile <= max(m, 16)):
            continue
        for split in (0, -1, -2, -3, 1, 2, 3, 4, 5, 6, 7, 8):
            for flags, blocks in itertools.product((0, 1) if split <= 0 else (0,), (0, 3, 7, 40) if split == -3 else (0,)):
                if ("split" if split > 0 else "pair" if flags else "plain") in modes:
                    yield Config(2, tile, groups | blocks << 8, split, flags)


def check(library: Library, tiles: list[tuple[int, int]], modes: set[str], forms: list[Format]) -> int:
    """Ragged sizes, edge values, every configuration; returns how many answers are wrong."""
    bad = done = 0
    cases = [
        (256, 512, 128, 1),
        (1000, 904, 904, 77),
        (200, 256, 32, 300),
        (264, 1024, 64, 17),
        (1025, 640, 128, 129),
        (640, 2048, 256, 130),
        (70, 96, 96, 5),
        (7, 128, 128, 200),
    ]
    nested = [(256, 512, 64, 1), (200, 192, 64, 300), (1025, 1024, 64, 77)]
    super_blocks = [(256, 512, 32, 1), (200, 256, 32, 300), (1025, 1024, 32, 77)]
    for form in forms:
        for n, k, group, m in cases if form <= Format.INT4Z else nested if form in (Format.NF4, Format.NF4N) else super_blocks:
            for dtype in TYPES:
                for scale_type in TYPES if form <= Format.INT4Z and m == 1 else (dtype,):
                    linear = Linear(random_tiles(form, n, k, group, scale_type, edge=True))
                    # Of one row of y, a few outliers are all of the error.
                    limit = 1e-3 if dtype == torch.float16 else 5e-3 if m == 1 else 3e-3
                    x = torch.randn(m, k + 8, device="cuda").to(dtype)[:, :k]
                    x[:, :: k // 8] *= 20
                    bias = torch.randn(n, device="cuda").to(dtype)
                    ref = x.float() @ linear.dense.t() + bias.float()
                    for config in configs(tiles, modes):
                        y = torch.full((m, n), math.nan, device="cuda", dtype=dtype)
                        weight = linear.struct()
                        code = library.matmul(weight, x, y, config, bias)
                        if code == -1:
                            continue
                        try:
                            torch.cuda.synchronize()
                        except Exception as failure:
                            print("DIED", form.name, n, k, group, m, dtype, config.a, config.b, config.c, config.d, failure)
                            raise SystemExit(1) from failure
                        e = error(y, ref)
                        done += 1
                        if code != 0 or not e < limit:
                            bad += 1
                            if bad < 40:
                                where = f"{form.name} N {n} K {k} g {group} M {m} {dtype} {scale_type}"
                                print(f"BAD {where} config {config.a} {config.b} {config.c} {config.d} code {code} error {e:.2e}")
    left = int(library.workspace[:COUNTERS].count_nonzero())
    print(f"checked {done}, bad {bad}, counters left {left}")
    return bad


def timed(launch: Callable[[int], None], copies: int, launches: int, replays: int) -> float:
    """Microseconds of one launch: launch(i) enqueues on copy i."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                launch(i % copies)
        graph.replay()
        times = []
        for _ in range(replays):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            times.append((start, end))
        stream.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times) * 1e3 / launches


def alternate(first: Callable[[int], None], copies: int, second: Callable[[int], None], others: int, launches: int) -> tuple[float, float]:
    """Microseconds of a launch of each, their replays in turn: a card that slows down when hot slows both."""
    stream = torch.cuda.Stream()
    graphs = []
    with torch.cuda.stream(stream):
        for launch, count in ((first, copies), (second, others)):
            launch(0)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for i in range(launches):
                    launch(i % count)
            graphs.append(graph)
        marks = []
        for _ in range(11):
            for graph in graphs:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record(stream)
                graph.replay()
                end.record(stream)
                marks.append((start, end))
        stream.synchronize()
    times = [a.elapsed_time(b) * 1e3 / launches for a, b in marks]
    return statistics.median(times[::2]), statistics.median(times[1::2])


def budget(estimate: float) -> int:
    """Launches in a graph, so that a replay takes about a millisecond and a half."""
    return max(4, min(64, int(1500 / estimate)))


def launcher(library: Library, weights: list[Weight], x: torch.Tensor, y: torch.Tensor, config: Config) -> Callable[[int], None]:
    def launch(i: int) -> None:
        library.matmul(weights[i], x, y, config)

    return launch


def name(config: Config) -> str:
    mode = "split" + str(config.c) if config.c > 0 else "stream" if config.c == 0 else "whole" if config.c == -1 else "late"
    if config.c == -3:
        mode = f"even {config.b >> 8 or 'all'}"
    return f"{config.a}x{(config.b & 255) * 64} {mode}{' pair' if config.d & 1 else ''}{' pdl' if config.d & 2 else ''}"


def measure(library: Library, args: argparse.Namespace, tile_list: list[tuple[int, int]], modes: set[str], form: Format) -> None:
    cells = json.loads((Path(__file__).parent / "peers" / "kernel_peers_h100.json").read_text())["cells"]
    peers = {(c["shape"], c["M"]): c for c in cells}
    dtype = getattr(torch, args.dtype)
    ms = [int(m) for m in args.m.split(",")]
    rows = []
    for shape in args.shapes.split(","):
        n, k = SHAPES[shape]
        if form.name.endswith("_K"):
            k = -(-k // 256) * 256
        linear = Linear(random_tiles(form, n, k, 128 if form <= Format.INT4Z else 64, dtype))
        copies = max(1, math.ceil(COLD / linear.bytes))
        tiles = [linear.tiles.data] + [linear.tiles.data.clone() for _ in range(copies - 1)]
        weights = [linear.struct(t) for t in tiles]
        wide = [linear.dense.to(dtype)]
        wide += [wide[0].clone() for _ in range(math.ceil(COLD / (2 * n * k)) - 1)]
        sink = torch.zeros(4, device="cuda", dtype=torch.int32)

        def reading(i: int, tiles: list[torch.Tensor] = tiles, bytes_: int = linear.bytes, sink: torch.Tensor = sink) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            library.lib.read_pass(ctypes.c_void_p(tiles[i].data_ptr()), ctypes.c_int64(bytes_), ctypes.c_void_p(sink.data_ptr()), stream)

        read = timed(reading, copies, 32, 9)
        for m in ms:
            x = torch.randn(m, k, device="cuda").to(dtype)
            y = torch.empty(m, n, device="cuda", dtype=dtype)
            ref = x.float() @ linear.dense.t()
            floor = 2 * n * k * m / 780e6
            launches = budget(max(floor, read))

            def dense(i: int, x: torch.Tensor = x, y: torch.Tensor = y, wide: list[torch.Tensor] = wide) -> None:
                torch.mm(x, wide[i].t(), out=y)

            results = []
            for config in configs(tile_list, modes, m):
                config.d |= 2 * args.dependent
                tile_n = (config.b & 255) * 64 * (2 if config.d & 1 else 1)
                parts = math.ceil(m / config.a) * math.ceil(n / tile_n) * max(config.c, 1)
                if (config.c > 1 and parts > 160) or config.c > k // 256:
                    continue
                y.fill_(math.nan)
                code = library.matmul(weights[-1], x, y, config)
                if code == -1:
                    continue
                e = error(y, ref)
                if code != 0 or not e < 3e-3:
                    print(f"BAD {shape} M {m} {name(config)} code {code} error {e:.2e}")
                    continue
                quick = timed(launcher(library, weights, x, y, config), copies, max(4, launches // 4), 3)
                results.append((quick, e, config))
            results.sort(key=lambda r: r[0])
            final = []
            for _, e, config in results[:3]:
                us, cublas = alternate(launcher(library, weights, x, y, config), copies, dense, len(wide), launches)
                final.append((us, cublas, e, config))
            final.sort(key=lambda r: r[0] / r[1])
            us, cublas, e, config = final[0]
            peer = peers.get((shape, m), {})
            row = {
                "shape": shape, "n": n, "k": k, "m": m, "dtype": str(dtype)[6:], "us": round(us, 2), "config": name(config),
                "error": e, "cublas_us": round(cublas, 2), "read_us": round(read, 2),
                "peer_us": peer.get(PEERS[form]), "format": form.name, "all": {name(c): round(t, 2) for t, _, c in results},
            }  # fmt: skip
            rows.append(row)
            fast = "  ".join(f"{name(c)} {t:.1f}" for t, _, c in results[:5])
            print(f"{shape} M {m}: {us:.2f} us ({name(config)}; error {e:.1e}), cuBLAS {cublas:.2f} | {fast}")
        del tiles, weights, wide
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "kernels_prefill.json").write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    print(f"{'shape':11} {'M':>5} {'us':>8} {'cuBLAS/us':>9} {'peer/us':>8} {'read':>6} {'TFLOP/s':>7}  config")
    for r in rows:
        peer_ratio = f"{r['peer_us'] / r['us']:8.2f}" if r["peer_us"] else "       -"
        tflops = 2 * r["n"] * r["k"] * r["m"] / r["us"] / 1e6
        ratios = f"{r['us']:8.2f} {r['cublas_us'] / r['us']:9.3f} {peer_ratio} {r['read_us']:6.2f} {tflops:7.0f}"
        print(f"{r['shape']:11} {r['m']:5} {ratios}  {r['config']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--m", default="64,128,256,1024,4096")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16"])
    parser.add_argument("--dependent", action="store_true", help="launch with programmatic dependent launch")
    parser.add_argument("--tiles", default=",".join(f"{m}x{groups}" for m, groups in TILES), help="rows of y x warpgroups")
    parser.add_argument("--modes", default="plain,split,pair")
    parser.add_argument("--formats", default="INT4,INT4Z", help="to check; the first is timed")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    library = Library(args.library.resolve())
    tiles = [(int(m), int(groups)) for m, groups in (tile.split("x") for tile in args.tiles.split(","))]
    forms = [Format[form] for form in args.formats.split(",")]
    modes = set(args.modes.split(","))
    if args.check:
        units(library)
        check(library, tiles, modes, forms)
    if args.time:
        print(torch.cuda.get_device_name())
        measure(library, args, tiles, modes, forms[0])


if __name__ == "__main__":
    main()
