"""Quantized linears as the tensors of a checkpoint: to dense weights, to the same integers in another format (``formats.md`` 8), and from
neutral results.

Knows layouts and names; writes nothing. torch is imported when the first linear is read, not before.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantkit.arch.table import architecture_of, spec_for
from quantkit.checkpoint.artifact import StoredTensor
from quantkit.checkpoint.reader import Checkpoint, read_manifest
from quantkit.errors import InputError
from quantkit.formats.quant_state import parse_quant_state
from quantkit.geometry import FLOAT_LAYOUTS, Geometry, Part, geometry_of
from quantkit.plan import linear_geometry, stored_linears
from quantkit.quant_config import EMBEDDING_FORMAT, assignment_from_config, quantization_config, stored_assignment
from quantkit.scheme import KEEP, LinearScheme

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from quantkit.layouts.base import GroupedInt, Neutral

INTEGER_LAYOUTS = frozenset({"awq", "awq_gemv", "gptq", "gptq_v2", "packed"})
"""Layouts of one neutral form: codes, scales and zero points per group."""
TARGETS: Mapping[str, str] = MappingProxyType({"gptq": "gptq", "gptq_v2": "gptq_v2", "awq": "awq", "compressed-tensors": "packed"})
"""What ``exact_conversion`` writes: format -> layout."""
_MARKS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "weight.absmax", "SCB")
"""Each quantized linear has one of these parts."""
_PARTS = (
    *_MARKS,
    *("qzeros", "scales", "g_idx", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_format", "input_scale"),
    *("weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
)
"""Names of parts that no float tensor has: whatever ends in one belongs to a quantized linear."""


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One stored linear, fused ones as they are stored. ``transposed``: the architecture stores its float weight ``[K, N]``."""

    path: str
    geometry: Geometry
    transposed: bool = False

    @property
    def label(self) -> str:
        """How the linear is stored, for people: "gptq, 4 bits"."""
        return f"{self.geometry.scheme.code or self.geometry.layout}, {self.geometry.scheme.bits} bits"

    @property
    def parts(self) -> Mapping[str, Part]:
        """Full tensor name -> part, of what the format adds; a bias is a tensor like any other."""
        return {f"{self.path}.{part.suffix}": part for part in self.geometry.parts if not part.kept}


def quantized_linears(checkpoint: Checkpoint) -> dict[str, QuantizedLinear]:
    """The quantized linears of ``checkpoint`` by module path, none when it is unquantized; every part is there, as its layout says.

    Of an architecture that the table has, shapes follow from ``config.json``, of another one from the tensors. Raises InputError
    for a format that is not read, for parts that are missing or of another shape, and for parts of no linear of the model.
    """
    if checkpoint.kind != "hf" or not checkpoint.config.get("quantization_config"):
        return {}
    known = architecture_of(checkpoint.config) is not None
    found = {item.path: item for item in (_by_table(checkpoint) if known else _by_name(checkpoint))}
    parts = {name: (item, part) for item in found.values() for name, part in item.parts.items()}
    for name, (item, part) in parts.items():
        _check(checkpoint, name, item.geometry, part)
    for name in checkpoint.tensors:
        if name not in parts and name.endswith(tuple(f".{suffix}" for suffix in _PARTS)):
            raise InputError(name, "is part of no quantized linear that config.json describes", "parts of the layouts that quantkit reads")
    return found


def _by_table(checkpoint: Checkpoint) -> Iterator[QuantizedLinear]:
    spec = spec_for(checkpoint.config)
    assignment = stored_assignment(checkpoint.config, spec, checkpoint.tensors)
    for roles, path, geometry in stored_linears(spec, assignment, dtype="BF16"):
        if geometry.layout not in FLOAT_LAYOUTS:
            yield QuantizedLinear(path, geometry, roles[0] in spec.linears and spec.linears[roles[0]].transposed)


def _by_name(checkpoint: Checkpoint) -> Iterator[QuantizedLinear]:
    marks = tuple(f".{mark}" for mark in _MARKS)
    modules = dict.fromkeys(name.removesuffix(mark) for name in checkpoint.tensors for mark in marks if name.endswith(mark))
    for path, scheme in assignment_from_config(checkpoint.config, modules, checkpoint.tensors).items():
        if scheme.layout not in FLOAT_LAYOUTS:
            yield QuantizedLinear(path, linear_geometry(path, *_shape(checkpoint, path, scheme), scheme, dtype="BF16", bias=False))


def _shape(checkpoint: Checkpoint, path: str, scheme: LinearScheme) -> tuple[int, int]:
    """``(N, K)`` of a quantized linear by its own parts. Raises InputError when the one that says so is missing or malformed."""
    suffix = {"packed": "weight_shape", "bnb4": f"weight.quant_state.bitsandbytes__{scheme.code}"}.get(scheme.layout)
    if suffix is not None:
        name = f"{path}.{suffix}"
        if name not in checkpoint.tensors:
            raise InputError(name, "is missing", "the shape of the linear, which no table says")
        if scheme.layout == "bnb4":
            return parse_quant_state(checkpoint.read(name).tobytes(), name).shape
        values = checkpoint.read(name).reshape(-1).tolist()
        if len(values) != 2 or not all(isinstance(value, int) and value > 0 for value in values):
            raise InputError(name, f"holds {values!r:.50}", "N and K")
        return values[0], values[1]
    name = f"{path}.{'qweight' if scheme.layout in INTEGER_LAYOUTS else 'weight'}"
    ref = checkpoint.tensors.get(name)
    if ref is None or len(ref.shape) != 2:
        raise InputError(name, "is missing" if ref is None else f"has shape {list(ref.shape)}", "a matrix")
    rows, columns = ref.shape
    if scheme.layout == "awq":
        return columns * 8, rows
    if scheme.layout == "awq_gemv":
        return rows, columns * 8
    return (columns, rows * 32 // scheme.bits) if scheme.layout in INTEGER_LAYOUTS else (rows, columns)


def _check(checkpoint: Checkpoint, name: str, geometry: Geometry, part: Part) -> None:
    """Raise InputError unless the stored part has the dtype and shape that its layout says."""
    ref, shape = checkpoint.tensors.get(name), geometry.stored_shape(part)
    if ref is None or ref.dtype != part.dtype or (ref.shape != shape and not part.free):
        found = "is missing" if ref is None else f"is {ref.dtype} {list(ref.shape)}"
        raise InputError(name, found, part.dtype if part.free else f"{part.dtype} {list(shape)}")


def _read(checkpoint: Checkpoint, linear: QuantizedLinear, *, without: str = "") -> dict[str, Tensor]:
    """The parts of a linear by suffix, in the shapes of their axes; ``without`` names one that is left empty along K.

    Raises InputError for parts that say they are something else than config.json says.
    """
    import torch

    from quantkit.ops.dtypes import TORCH_DTYPES, as_tensor

    parts, geometry = {}, linear.geometry
    for name, part in linear.parts.items():
        if part.suffix == without:
            shape = [0 if axis.dim == "K" else size for axis, size in zip(part.axes, geometry.shape(part), strict=True)]
            parts[part.suffix] = torch.empty(shape, dtype=TORCH_DTYPES[part.dtype])
            continue
        view = None if part.flat is None or part.free else geometry.shape(part)
        parts[part.suffix] = as_tensor(checkpoint.read(name, None, view), part.dtype)
    if "weight_shape" in parts and parts["weight_shape"].tolist() != [geometry.n, geometry.k]:
        raise InputError(f"{linear.path}.weight_shape", f"holds {parts['weight_shape'].tolist()}", f"{[geometry.n, geometry.k]}")
    if "weight_format" in parts and int(parts["weight_format"]) != 0:
        raise InputError(f"{linear.path}.weight_format", f"is {int(parts['weight_format'])}, a layout of old GPUs", "0 (row-major)")
    return parts


def _named(linear: QuantizedLinear, exc: InputError, hint: str | None = None) -> InputError:
    return InputError(f"{linear.path}: {exc.where}", exc.what, exc.expected, hint)


def dense_weight(checkpoint: Checkpoint, linear: QuantizedLinear) -> NDArray[np.float32]:
    """The weight that a linear multiplies by, ``[N, K]``, or ``[K, N]`` where the architecture stores it so. Raises InputError."""
    from quantkit.layouts.registry import codec

    parts = _read(checkpoint, linear)
    try:
        dense = codec(linear.geometry.layout).dequant(parts, linear.geometry)
    except InputError as exc:
        raise _named(linear, exc) from exc
    array: NDArray[np.float32] = (dense.T if linear.transposed else dense).contiguous().numpy()
    return array


@dataclass(frozen=True, slots=True)
class ExactConversion:
    """A whole model to write in another integer format: ``linears`` by path, each with the geometry that it gets."""

    linears: Mapping[str, tuple[QuantizedLinear, Geometry]]
    assignment: Mapping[str, LinearScheme]
    quantization_config: Mapping[str, Any]


def exact_conversion(checkpoint: Checkpoint, to: str) -> ExactConversion:
    """How the integers of ``checkpoint`` are stored in the format ``to``, a key of TARGETS; scales and zero points are looked at.

    Raises InputError when it is not quantized, or the format cannot hold a linear exactly as it is.
    """
    spec, root = spec_for(checkpoint.config), shlex.quote(str(checkpoint.root))
    options = f"--method {'awq' if to == 'awq' else 'gptq'} --format {to}"
    again = f"quantkit convert {root} FLOATS, and quantkit quantize FLOATS OUT {options}"
    linears = quantized_linears(checkpoint)
    if not linears:
        kind = "is a GGUF file" if checkpoint.kind == "gguf" else "is not quantized"
        hint = again if checkpoint.kind == "gguf" else f"quantkit quantize {root} OUT {options}"
        raise InputError(root, f"{kind}, and --to {to} is for integers that are there already", "gptq, awq or compressed-tensors", hint)
    if spec.architecture.embedding in linears and to != EMBEDDING_FORMAT:
        raise InputError(spec.architecture.embedding, f"is quantized, which {to} cannot hold", "an embedding in floats", again)
    for linear in linears.values():
        if linear.geometry.layout not in INTEGER_LAYOUTS:
            raise InputError(linear.path, f"is {linear.label}, which is not exactly convertible to {to}", "integers in groups", again)
    if all(linear.geometry.layout == TARGETS[to] for linear in linears.values()):
        raise InputError("--to", f"{root} is {to} already", f"another of hf, {', '.join(TARGETS)}")
    grids = {path: _grid(checkpoint, linear) for path, linear in linears.items()}
    # AWQ does not say whether it is symmetric; other formats do, and have another form for it.
    unsaid = [path for path, linear in linears.items() if linear.geometry.layout.startswith("awq")]
    symmetric = all(grids[path].symmetric for path in unsaid)
    methods = _methods(checkpoint)
    assignment = dict.fromkeys(spec.all_linears(), KEEP)
    converted = {}
    for path, linear in linears.items():
        sym = symmetric if path in unsaid else linear.geometry.scheme.sym
        scheme = replace(_target(linear, grids[path], to, sym, again), method=methods.get(path, linear.geometry.scheme.method))
        try:
            geometry = geometry_of(scheme, linear.geometry.n, linear.geometry.k, dtype="BF16")
        except InputError as exc:
            raise _named(linear, exc) from exc
        assignment[path], converted[path] = scheme, (linear, geometry)
    try:
        config = quantization_config(assignment, spec.architecture.head)
    except InputError as exc:
        raise InputError(exc.where, exc.what, exc.expected, "--to compressed-tensors can mix") from exc
    return ExactConversion(converted, assignment, config)


@dataclass(frozen=True, slots=True)
class _Grid:
    """What the scales and zero points of a linear say of it."""

    symmetric: bool
    least_zero: int
    scattered: bool


def _grid(checkpoint: Checkpoint, linear: QuantizedLinear) -> _Grid:
    """Raises InputError when the zero points are not those of the symmetric linear that config.json says it is."""
    import torch

    codes = "weight_packed" if linear.geometry.layout == "packed" else "qweight"
    result = _unpacked(linear, _read(checkpoint, linear, without=codes))
    scheme, middle = linear.geometry.scheme, 2 ** (linear.geometry.scheme.bits - 1)
    symmetric = bool((result.zeros == middle).all())
    if scheme.sym and not symmetric:
        found = f"is symmetric by config.json and has zero points from {int(result.zeros.min())} to {int(result.zeros.max())}"
        raise InputError(
            linear.path, found, f"{middle} everywhere", "the checkpoint_format of config.json may be wrong: quantkit verify says"
        )
    scattered = False
    if result.g_idx is not None:
        size = linear.geometry.k // result.scales.shape[1]
        scattered = not torch.equal(result.g_idx.long(), torch.arange(linear.geometry.k) // size)
    return _Grid(symmetric, int(result.zeros.min()), scattered)


def neutral(checkpoint: Checkpoint, linear: QuantizedLinear) -> Neutral:
    """What a stored linear holds. Raises InputError for parts that are not what they say."""
    return _neutral(linear, _read(checkpoint, linear))


def _neutral(linear: QuantizedLinear, parts: Mapping[str, Tensor]) -> Neutral:
    from quantkit.layouts.registry import codec

    try:
        return codec(linear.geometry.layout).unpack(parts, linear.geometry)
    except InputError as exc:
        raise _named(linear, exc) from exc


def _unpacked(linear: QuantizedLinear, parts: Mapping[str, Tensor]) -> GroupedInt:
    from quantkit.layouts.base import GroupedInt

    result = _neutral(linear, parts)
    assert isinstance(result, GroupedInt), linear
    return result


def _target(linear: QuantizedLinear, grid: _Grid, to: str, sym: bool, again: str) -> LinearScheme:
    """The scheme of ``linear`` in the format ``to``. Raises InputError when it cannot hold the linear exactly."""
    scheme, layout = linear.geometry.scheme, TARGETS[to]
    if layout == "awq" and scheme.bits != 4:
        raise InputError(linear.path, f"has {scheme.bits} bits, and awq holds 4", "4 bits", "--to compressed-tensors or gptq can hold it")
    if not layout.startswith("gptq") and grid.scattered:
        what = f"has groups scattered over its inputs (act-order), which {to} cannot hold"
        raise InputError(linear.path, what, "groups of consecutive inputs", again)
    if layout == "gptq" and grid.least_zero == 0:
        raise InputError(linear.path, "has a zero point of 0, which gptq (v1) cannot hold", "1 or more", "--to gptq_v2 can hold it")
    if layout != "packed" and scheme.activations:
        raise InputError(linear.path, f"quantizes its activations too, which {to} cannot say", "quantized weights alone", again)
    # The reader of AWQ takes every linear as asymmetric: so its scheme says.
    return replace(
        scheme,
        layout=layout,
        sym=sym and layout != "awq",
        act_order=scheme.act_order and layout.startswith("gptq"),
    )


def _methods(checkpoint: Checkpoint) -> dict[str, str]:
    """Which method made each linear, as the artifact's manifest has it."""
    assignment = (read_manifest(checkpoint.root) or {}).get("assignment")
    if not isinstance(assignment, dict):
        return {}
    named = {path: scheme.get("method") for path, scheme in assignment.items() if isinstance(scheme, dict)}
    return {path: method for path, method in named.items() if isinstance(method, str)}


def stored_parts(path: str, result: Neutral, geometry: Geometry) -> Iterator[StoredTensor]:
    """The tensors of a quantized linear as ``geometry`` stores them at ``path``. Raises InputError for what the layout cannot hold."""
    from quantkit.layouts.registry import codec
    from quantkit.ops.dtypes import DTYPE_NAMES, as_bytes

    parts = codec(geometry.layout).pack(result, geometry)
    for part in geometry.parts:
        value = parts[part.suffix]
        assert DTYPE_NAMES[value.dtype] == part.dtype, (path, part.suffix, value.dtype)
        assert part.free or tuple(value.shape) == geometry.shape(part), (path, part.suffix, value.shape)
        shape = tuple(value.shape) if part.free else geometry.stored_shape(part)
        yield StoredTensor(f"{path}.{part.suffix}", part.dtype, shape, as_bytes(value))


def transcoded(checkpoint: Checkpoint, linear: QuantizedLinear, geometry: Geometry) -> Iterator[StoredTensor]:
    """The parts of ``linear`` as ``geometry`` stores them: the same codes, scales and zero points. Raises InputError."""
    result = _unpacked(linear, _read(checkpoint, linear))
    yield from stored_parts(linear.path, result if geometry.scheme.act_order else replace(result, g_idx=None), geometry)
