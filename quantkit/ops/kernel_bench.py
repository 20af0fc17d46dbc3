"""How long products on tiles take on this GPU, beside cuBLAS and a read of their bytes, in one run.

The method (``kernels/README.md``): weights rotate over copies that together pass L2; a CUDA graph of launches, events around each replay,
the median, divided by the launches. Every configuration is compared with float32 on the dequantized weight before it is timed, on the
first and on the last copy, its output full of NaN before. Knows kernels and formats; knows no peer and no bar.
"""

from __future__ import annotations

import ctypes
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quantkit.errors import MachineError
from quantkit.ops import cuda_tiles, tiles
from quantkit.ops.codebook import CODEBOOKS, NESTED_MAP
from quantkit.ops.cuda_library import HINT, find_library, load_library
from quantkit.ops.kernel_select import DENSE, RULE, Config, Gpu, choose, configs, gpu_of
from quantkit.ops.tiles import Tiles

COLD_BYTES = 160e6
"""The copies that a measurement rotates over pass this together: three times the L2 of an H100."""
LAUNCHES, REPLAYS, MOST_US = 64, 9, 8000
"""Of a graph: at most so many launches, replays, and about so many microseconds of one replay, but every copy once."""
WORST_ERROR = 1e-2
"""The largest relative error of a product that is timed at all; the contract of the kernels is 3e-3."""
_BLOCK_BYTES: Mapping[str, tuple[int, int, tuple[tuple[int, float], ...]]] = MappingProxyType(
    {
        "q4_k": (256, 144, ((0, 0.001), (2, 0.001))),
        "q5_k": (256, 176, ((0, 0.001), (2, 0.001))),
        "q6_k": (256, 210, ((208, 0.0003),)),
        "q8_0": (32, 34, ((0, 0.001),)),
        "q4_0": (32, 18, ((0, 0.01),)),
    }
)
"""ggml's blocks: weights, bytes, and where float16 factors are, with the largest that a random block gets."""
FORMATS = ("int4", "nf4", *_BLOCK_BYTES)
"""int4: symmetric, groups of 128; nf4: blocks of 64, scales quantized again."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One product, in microseconds. ``config`` None: the library's rule. ``error``: ``|y - reference| / |reference|`` in float32."""

    us: float
    config: Config | None
    error: float


class Bench:
    """What measurements on one GPU share. Raises MachineError without a GPU that the kernels run on, or without kernels."""

    def __init__(self, dtype: torch.dtype) -> None:
        if not torch.cuda.is_available():
            raise MachineError("GPU", "torch sees none", "a CUDA GPU of compute capability 8.0 or later")
        self.device, self.dtype = torch.device("cuda", torch.cuda.current_device()), dtype
        self.gpu: Gpu = gpu_of(self.device)
        if self.gpu.capability < (8, 0):
            raise MachineError(self.gpu.name, "is too old", "a GPU of compute capability 8.0 or later")
        self._library = load_library()
        found = find_library()
        assert found is not None, "what was loaded was found"
        self.kernels = found
        try:
            self._read, self._multiply = self._library.quantkit_bench_read, self._library.quantkit_matmul
            self._empty, self._dequantize = self._library.quantkit_bench_empty, self._library.quantkit_dequantize
        except AttributeError as error:
            raise MachineError("CUDA kernels", f"lack a function ({error})", "a library of this version of quantkit", HINT) from error
        self._workspace = cuda_tiles.workspace(self.device)
        self._generator = torch.Generator(self.device)
        torch.backends.cuda.matmul.allow_tf32 = False

    # what is measured

    def empty_us(self) -> float:
        """What a launch of a kernel that does nothing takes: it is in every figure."""
        return self._timed(lambda i: _started(self._empty(self._stream())), 1)

    def read_us(self, weight: Weights) -> float:
        """A read of the packed bytes, once."""
        sink = self._pointer(self._workspace, 1 << 20)

        def launch(i: int) -> None:
            data = weight.copies[i].data
            _started(self._read(self._pointer(data), ctypes.c_int64(data.nbytes // 16 * 16), sink, self._stream()))

        return self._timed(launch, len(weight.copies))

    def cublas_us(self, n: int, k: int, tokens: int) -> float:
        """torch's product with a dense weight of the activations' dtype."""
        copies = [self._normal(n, k) for _ in range(_copies(n * k * self.dtype.itemsize))]
        x, out = self.inputs(tokens, k), self._nan(tokens, n)
        return self._timed(lambda i: torch.mm(x, copies[i].T, out=out), len(copies))

    def dequantize_us(self, weight: Weights) -> tuple[float, bool]:
        """The dense weight, written; and whether every value is the reference's, rounded once."""
        out = self._nan(*weight.shape)

        def launch(i: int) -> None:
            self._dense(weight.copies[i], out)

        launch(0)
        exact = torch.equal(out, weight.dense.to(self.dtype))
        return self._timed(launch, len(weight.copies)), exact

    def product(self, weight: Weights, x: Tensor, tune: bool) -> Measured | None:
        """The product that ``TiledLinear`` makes of ``x [T, K]``; with ``tune`` the fastest of all configurations. None: none was right."""
        reference = functional.linear(x.float(), weight.dense)
        n, k = weight.shape
        chosen = choose(self.gpu, weight.first.format, n, k, x.shape[0])
        if not tune:
            return self._one(weight, x, reference, chosen, REPLAYS)
        every = configs(self.gpu, weight.first.format, n, k, x.shape[0])
        quick = [found for each in every if (found := self._one(weight, x, reference, each, 2)) is not None]
        best = sorted(quick, key=lambda found: found.us)[:5]
        exact = [found for each in best if (found := self._one(weight, x, reference, each.config, REPLAYS)) is not None]
        return min(exact, key=lambda found: found.us, default=None)

    def _one(self, weight: Weights, x: Tensor, reference: Tensor, config: Config | None, replays: int) -> Measured | None:
        """One configuration; None where the kernel has none of its kind, or its result is wrong."""
        out = self._nan(x.shape[0], weight.shape[0])
        scratch = torch.empty(weight.shape, dtype=self.dtype, device=self.device) if config and config.kernel == DENSE else None
        worst = 0.0
        for copy in (weight.copies[0], weight.copies[-1]):
            out.fill_(math.nan)
            if not self._run(copy, x, out, config, scratch):
                return None
            worst = max(worst, _error(out, reference))
        if not worst < WORST_ERROR:
            return None
        us = self._timed(lambda i: self._run(weight.copies[i], x, out, config, scratch), len(weight.copies), replays)
        return Measured(us, config, worst)

    def _run(self, weight: Tiles, x: Tensor, out: Tensor, config: Config | None, scratch: Tensor | None) -> bool:
        """Start one product; False where the library has no such kernel, but for its own rule, which then dequantizes as a linear does."""
        if scratch is not None:
            self._dense(weight, scratch)
            torch.mm(x, scratch.T, out=out)
            return True
        given = None if config is None else ctypes.byref(cuda_tiles.Config(*config))
        found = self._multiply(
            *(ctypes.byref(_described(weight)), self._pointer(x), ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.stride(0))),
            *(cuda_tiles.TYPES[x.dtype], None, self._pointer(out), self._pointer(self._workspace)),
            *(ctypes.c_int64(self._workspace.numel()), given, self._stream()),
        )
        if found == cuda_tiles.UNSUPPORTED:
            if config is not None and config.kernel != RULE:
                return False
            return self._run(weight, x, out, None, torch.empty(weight.n, weight.k, dtype=self.dtype, device=self.device))
        _started(found)
        return True

    def _dense(self, weight: Tiles, out: Tensor) -> None:
        described = ctypes.byref(_described(weight))
        _started(self._dequantize(described, self._pointer(out), cuda_tiles.TYPES[out.dtype], self._stream()))

    # how

    def _timed(self, launch: Callable[[int], object], copies: int, replays: int = REPLAYS) -> float:
        """Microseconds of one launch. ``launch(i)`` is given the number of a copy."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            launch(0)
            once = self._elapsed(stream, lambda: launch(copies - 1))
            launches = max(1, min(LAUNCHES, round(MOST_US / once)) // copies) * copies
            with torch.cuda.graph(graph, stream=stream):
                for i in range(launches):
                    launch(i % copies)
            graph.replay()
            return statistics.median(self._elapsed(stream, graph.replay) / launches for _ in range(replays))

    @staticmethod
    def _elapsed(stream: torch.cuda.Stream, work: Callable[[], object]) -> float:
        """Microseconds between an event before ``work`` and one after it."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    def _stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    @staticmethod
    def _pointer(tensor: Tensor, offset: int = 0) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr() + offset)

    def _nan(self, *shape: int) -> Tensor:
        return torch.full(shape, math.nan, dtype=self.dtype, device=self.device)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).to(self.dtype)

    # on what

    def inputs(self, tokens: int, k: int) -> Tensor:
        """``x [T, K]``: normal, with a few columns that are large, as activations have them."""
        self._generator.manual_seed(tokens)
        x = self._normal(tokens, k)
        x[:, :: max(k // 7, 1)] *= 30
        return x

    def weights(self, form: str, n: int, k: int) -> Weights:
        """A random weight of one of FORMATS, with large scales and zero scales among its own."""
        self._generator.manual_seed(n + k)
        first = self._packed(form, n, k)
        copies = [first] + [replace(first, data=first.data.clone()) for _ in range(_copies(first.data.nbytes) - 1)]
        return Weights(copies, tiles.dequantize(first))

    def _packed(self, form: str, n: int, k: int) -> Tiles:
        def integers(high: int, *shape: int) -> Tensor:
            return torch.randint(0, high, shape, dtype=torch.uint8, device=self.device, generator=self._generator)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, device=self.device, generator=self._generator)

        if form == "int4":
            scales = uniform(n, k // 128) * 0.02 + 0.001
            scales[:, ::7] *= 4
            scales[::5, k // 256] = 0
            codes, zeros = integers(16, n, k), torch.full((n, k // 128), 8, dtype=torch.uint8, device=self.device)
            return tiles.pack_int4(codes, scales.to(self.dtype), zeros)
        if form == "nf4":
            table, code = CODEBOOKS["nf4"].to(self.device), NESTED_MAP.to(self.device)
            absmax2 = uniform(math.ceil(n * k / 64 / 256)) * 0.05
            return tiles.pack_nested(integers(16, n, k), integers(256, n, k // 64), table, code, absmax2, 0.06, 0, k // 64)
        elements, size, factors = _BLOCK_BYTES[form]
        blocks = integers(256, n * k // elements, size)
        for at, largest in factors:
            blocks[:, at : at + 2] = (uniform(blocks.shape[0], 1) * largest).half().view(torch.uint8)
        return tiles.pack_ggml(blocks.view(n, -1), form.upper())


@dataclass(frozen=True, slots=True)
class Weights:
    """Copies of one weight in tiles, and what it is worth: float32 ``[N, K]``."""

    copies: Sequence[Tiles]
    dense: Tensor

    @property
    def first(self) -> Tiles:
        return self.copies[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.n, self.first.k


def columns_of(form: str, k: int) -> int:
    """``k`` as ``form`` can hold it: a multiple of its blocks."""
    unit = 128 if form in ("int4", "nf4") else _BLOCK_BYTES[form][0]
    return math.ceil(k / unit) * unit


def _copies(nbytes: int) -> int:
    return max(2, math.ceil(COLD_BYTES / nbytes))


def _described(weight: Tiles) -> Any:
    side = (None if part is None else part.data_ptr() for part in (weight.table, weight.code, weight.absmax2, weight.offsets))
    return cuda_tiles.Weight(weight.data.data_ptr(), *side, *cuda_tiles.facts(weight))


def _started(code: int) -> None:
    if code:
        raise MachineError("CUDA kernels", f"a kernel did not start (error {code})", "a GPU that they were built for", HINT)


def _error(out: Tensor, reference: Tensor) -> float:
    """The relative error; infinite where something was not written."""
    found = float((out.float() - reference).norm() / reference.norm())
    return found if math.isfinite(found) else math.inf
