"""Histograms of weights, of any checkpoint, as a PNG: which tensors, their figures in two passes over a chunk at a time, and the drawing.

Knows no options and writes nothing. matplotlib is an extra, imported when there is something to draw.
"""

from __future__ import annotations

import importlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantkit.checkpoint.gguf import DECODED, PLAIN, GgufSource, decoded
from quantkit.errors import InputError, MachineError
from quantkit.formats.floats import widened
from quantkit.transcode import QuantizedLinear, dense_weight, quantized_linears

if TYPE_CHECKING:
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.formats.gguf import GgufFile, GgufTensor

Floats = NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 20
"""8 MiB of float64 at a time; a quantized linear that is no GGUF tensor is dequantized whole."""
FLOATS = ("F64", "F32", "F16", "BF16")
LEAST_BINS, MOST_BINS = 21, 201
OUTLIER_SD = 4
"""Weights further from the mean than so many standard deviations are outliers; of a normal distribution 63 in a million are."""
MOST_PANELS = 12
PNG_DPI = 110
WEIGHTS_COLOUR, NORMAL_COLOUR = "#5b8db8", "#c8472f"


@dataclass(frozen=True, slots=True)
class Weights:
    """A tensor that can be looked at: ``chunks()`` goes over its values, and can be called again. ``aliases`` are names it also has."""

    name: str
    stored: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Floats]]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Histogram:
    """What the finite values of a tensor look like: ``counts [B]`` between ``edges [B + 1]``, and figures in float64.

    ``kurtosis`` is the excess over a normal distribution's (None where all values are equal), ``outliers`` the share of values more
    than OUTLIER_SD standard deviations from the mean.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    count: int
    not_finite: int
    mean: float
    sd: float
    kurtosis: float | None
    outliers: float

    @property
    def density(self) -> NDArray[np.float64]:
        """``[B]``, of area 1."""
        density: NDArray[np.float64] = self.counts / (self.count * np.diff(self.edges))
        return density


# figures


def histogram(weights: Weights) -> Histogram:
    """The histogram of a tensor, in two passes, in the root of its size of bins. Raises InputError when it has no finite value."""
    count, not_finite, mean, squares = 0, 0, 0.0, 0.0
    least, most = math.inf, -math.inf
    for values, dropped in _finite(weights):
        not_finite += dropped
        if values.size:
            # Means and squares of parts are put together as Chan, Golub and LeVeque do: no sum of squares of raw values cancels.
            own, total = float(values.mean()), count + values.size
            squares += float(np.square(values - own).sum()) + (own - mean) ** 2 * count * values.size / total
            mean += (own - mean) * values.size / total
            count, least, most = total, min(least, float(values.min())), max(most, float(values.max()))
    if not count:
        raise InputError(weights.name, "holds no finite value", "weights to draw")
    sd, bins = math.sqrt(squares / count), min(max(math.isqrt(count), LEAST_BINS), MOST_BINS)
    edges = np.histogram_bin_edges(np.zeros(0), bins, (least, most))  # widened by a half each way where all values are equal
    counts, fourth, far = np.zeros(bins, np.int64), 0.0, 0
    for values, _ in _finite(weights):
        counts += np.histogram(values, bins, (least, most))[0]
        away = np.abs(values - mean)
        fourth += float((away**4).sum())
        far += int((away > OUTLIER_SD * sd).sum())
    kurtosis = fourth / count / sd**4 - 3 if sd**4 > 0 else None
    return Histogram(edges, counts, count, not_finite, mean, sd, kurtosis, far / count)


def _finite(weights: Weights) -> Iterator[tuple[NDArray[np.float64], int]]:
    """Chunks of the finite values, and how many others each chunk had."""
    for chunk in weights.chunks():
        flat = chunk.reshape(-1)
        finite = np.isfinite(flat)
        yield flat[finite].astype(np.float64), int(flat.size - finite.sum())


# tensors


def weights_of(checkpoint: Checkpoint) -> list[Weights]:
    """What there is to look at in a checkpoint: float tensors, and quantized linears as their weights. Raises InputError.

    A GGUF file gives its own tensors, as they are stored, which also go by the names of the model's.
    """
    if isinstance(checkpoint.gguf, GgufSource):
        aliases: dict[str, list[str]] = {}
        for name, tensor in checkpoint.gguf.tensors.items():
            aliases.setdefault(tensor.name, []).append(name)
        return gguf_weights(checkpoint.gguf.file, aliases)
    linears = quantized_linears(checkpoint)
    parts = {name for linear in linears.values() for name in linear.parts}
    plain = [_of_floats(checkpoint, name) for name, ref in checkpoint.tensors.items() if ref.dtype in FLOATS and name not in parts]
    return [*plain, *(_of_linear(checkpoint, linear) for linear in linears.values())]


def _of_floats(checkpoint: Checkpoint, name: str) -> Weights:
    shape = checkpoint.tensors[name].shape

    def chunks() -> Iterator[Floats]:
        if not shape:
            yield widened(checkpoint.read(name), checkpoint.dtype(name))
            return
        step = max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            index = (slice(start, min(start + step, shape[0])), *(slice(0, size) for size in shape[1:]))
            yield widened(checkpoint.read(name, index), checkpoint.dtype(name))

    return Weights(name, checkpoint.tensors[name].dtype, shape, chunks)


def _of_linear(checkpoint: Checkpoint, linear: QuantizedLinear) -> Weights:
    shape = (linear.geometry.n, linear.geometry.k)
    return Weights(f"{linear.path}.weight", linear.label, shape, lambda: iter([dense_weight(checkpoint, linear)]))


def gguf_weights(file: GgufFile, aliases: Mapping[str, Sequence[str]]) -> list[Weights]:
    """The tensors of a GGUF file that hold weights, of whatever architecture."""
    held = [tensor for tensor in file.tensors.values() if tensor.type in PLAIN or tensor.type in DECODED]
    return [_of_gguf(file, tensor, tuple(aliases.get(tensor.name, ()))) for tensor in held]


def _of_gguf(file: GgufFile, tensor: GgufTensor, aliases: tuple[str, ...]) -> Weights:
    rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1] if tensor.shape else 1

    def chunks() -> Iterator[Floats]:
        step = max(1, CHUNK_ELEMENTS // max(1, columns))
        for start in range(0, rows, step):
            yield widened(decoded(file, tensor, range(start, min(start + step, rows)), range(columns)), tensor.type)

    return Weights(tensor.name, tensor.type, tensor.shape, chunks, aliases)


def chosen(weights: Sequence[Weights], patterns: Sequence[str]) -> list[Weights]:
    """Those of ``weights`` that a pattern (a regular expression, searched in a name) finds, in their order.

    Raises InputError for a pattern that is none or finds nothing, and when more are found than fit on one picture.
    """
    found: set[str] = set()
    for text in patterns:
        try:
            pattern = re.compile(text)
        except re.error as exc:
            raise InputError(f"--tensor {text!r:.100}", f"is not a regular expression ({exc})", "a Python regular expression") from exc
        matched = {item.name for item in weights if any(pattern.search(name) for name in (item.name, *item.aliases))}
        if not matched:
            some = ", ".join(item.name for item in weights[:3]) or "no tensor"
            raise InputError(f"--tensor {text!r:.100}", "matches no tensor of weights", f"a part of a name, like {some}")
        found |= matched
    if len(found) > MOST_PANELS:
        raise InputError("--tensor", f"matches {len(found)} tensors", f"at most {MOST_PANELS} on one picture", "narrow the pattern")
    return [item for item in weights if item.name in found]


# drawing


def _matplotlib(part: str) -> ModuleType:
    try:
        return importlib.import_module(f"matplotlib.{part}")
    except ImportError as exc:
        raise MachineError("--plot", "needs matplotlib, which is not installed", hint="pip install 'quantkit[plot]'") from exc


def require_matplotlib() -> None:
    """Raise MachineError, before anything is read, when there is nothing to draw with."""
    _matplotlib("figure")


def draw(panels: Sequence[tuple[Weights, Histogram]]) -> bytes:
    """A PNG of 1 to MOST_PANELS histograms: density on a log scale, and the normal curve of the same mean and standard deviation.

    Raises MachineError when matplotlib is not installed.
    """
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    size = (7.2, 4.6) if len(panels) == 1 else (4.8 * columns, 3.5 * rows)
    figure = _matplotlib("figure").Figure(figsize=size, dpi=PNG_DPI, layout="constrained")
    _matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    for place, (weights, found) in enumerate(panels, start=1):
        _panel(figure.add_subplot(rows, columns, place), weights, found)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})  # no version of the library: equal data, equal bytes
    return out.getvalue()


def _panel(axes: Any, weights: Weights, found: Histogram) -> None:
    one = 1 / (found.count * float(found.edges[1] - found.edges[0]))  # the density of a bin that holds one value
    top = float(found.density.max())
    bars = axes.stairs(found.density, found.edges, fill=True, baseline=one / 3, color=WEIGHTS_COLOUR, label=_figures(found))
    handles = [bars]
    if found.sd > 0:
        x = np.linspace(found.edges[0], found.edges[-1], 600)
        normal = np.exp(-(((x - found.mean) / found.sd) ** 2) / 2) / (found.sd * math.sqrt(2 * math.pi))
        top = max(top, float(normal.max()))
        handles += axes.plot(x, normal, color=NORMAL_COLOUR, linewidth=1.3, label="normal, same mean and sd")
    axes.set_yscale("log")
    axes.minorticks_off()
    # Room above for the legend, which then hides no tail.
    decades = math.log10(top) - math.log10(one / 3)
    axes.set_ylim(one / 3, 10 ** (math.log10(top) + 0.5 * decades))
    axes.set_xlim(found.edges[0], found.edges[-1])
    axes.set_title(f"{weights.name}\n{weights.stored}, {' x '.join(map(str, weights.shape)) or 'scalar'}", fontsize=9)
    axes.set_xlabel("weight", fontsize=8)
    axes.set_ylabel("density", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=handles, fontsize=7, loc="upper right", framealpha=0.9)


def _figures(found: Histogram) -> str:
    kurtosis = "none" if found.kurtosis is None else f"{found.kurtosis:.3g}"
    lines = [
        f"{found.count:,} weights",
        f"mean {found.mean:.3g}, sd {found.sd:.3g}",
        f"excess kurtosis {kurtosis}",
        f"beyond {OUTLIER_SD} sd: {100 * found.outliers:.3g} %",
    ]
    return "\n".join([*lines, *([f"{found.not_finite:,} not finite"] if found.not_finite else [])])
