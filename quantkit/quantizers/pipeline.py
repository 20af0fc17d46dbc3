"""The block loop: read a block, see its inputs, fit, pack, commit, go on. The one function to read first.

At any time one block's weights, the calibration activations and one block's statistics are in memory, whatever the
size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.arch.spec import ModelSpec
from quantkit.checkpoint.artifact import ArtifactWriter, StoredTensor
from quantkit.checkpoint.reader import Checkpoint
from quantkit.geometry import LAYOUTS
from quantkit.layouts.base import GroupedInt
from quantkit.layouts.registry import codec
from quantkit.model.load import load_block, load_embedding
from quantkit.ops.dtypes import DTYPE_NAMES, TORCH_DTYPES, as_bytes, as_tensor
from quantkit.progress import Progress
from quantkit.quantizers.base import BlockFit, BlockWeights, InputStats, Quantizer
from quantkit.quantizers.calibration import CalibrationStream, CalibrationTokens, StatsCollector, input_roles
from quantkit.scheme import LinearScheme

OUTER_UNIT = "outer"
TILE_TOKENS = 4096
"""Statistics are summed over tiles of about this many tokens, in order: part of what makes two runs equal."""
FLOAT16_ALARM = 3e4
"""Activations beyond this are close to float16's 65504; kernels that compute in float16 would overflow."""


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """What the loop did: tensors written, their bytes, the float bytes of the same linears, and the greatest activation."""

    tensors: int
    quantized_weights: int
    quantized_bytes: int
    peak_activation: float | None
    facts: Mapping[str, Any]


def block_unit(layer: int) -> str:
    """The commit unit of a block."""
    return f"block-{layer:05d}"


def stored_dtype(checkpoint: Checkpoint, name: str, float_dtype: str) -> str:
    """The dtype in which a tensor is written: its own, or ``float_dtype`` for a source that holds GGUF blocks."""
    return float_dtype if checkpoint.kind == "gguf" else checkpoint.dtype(name)


def read_float(checkpoint: Checkpoint, name: str, device: str) -> Tensor:
    """One tensor of the source as float32 on ``device``."""
    return as_tensor(checkpoint.read(name), checkpoint.dtype(name)).to(device).float()


def read_block(checkpoint: Checkpoint, spec: ModelSpec, layer: int, float_dtype: str, device: str) -> BlockWeights:
    """The float32 weights, biases and norms of one block, on ``device``."""
    linears, biases, norms, norm_dtypes = {}, {}, {}, {}
    for role, linear in spec.linears.items():
        path = spec.tensor(layer, linear.name)
        linears[role] = read_float(checkpoint, f"{path}.weight", device)
        if f"{path}.bias" in checkpoint.tensors:
            biases[role] = read_float(checkpoint, f"{path}.bias", device)
    for role, norm in spec.norms.items():
        name = spec.tensor(layer, norm.name) + ".weight"
        norms[role] = read_float(checkpoint, name, device)
        norm_dtypes[role] = TORCH_DTYPES[stored_dtype(checkpoint, name, float_dtype)]
    return BlockWeights(layer, linears, biases, norms, norm_dtypes)


def _store(name: str, value: Tensor) -> StoredTensor:
    return StoredTensor(name, DTYPE_NAMES[value.dtype], tuple(value.shape), as_bytes(value))


def _packed(path: str, result: GroupedInt, scheme: LinearScheme, bias_dtype: str) -> Iterator[StoredTensor]:
    """The stored parts of one quantized linear, checked against its geometry."""
    if result.bias is not None:
        result = GroupedInt(result.codes, result.scales, result.zeros, result.bits, result.bias.to(TORCH_DTYPES[bias_dtype]))
    n, k = result.codes.shape
    geometry = LAYOUTS[scheme.layout](n, k, dtype=bias_dtype, bias=result.bias is not None, group_size=scheme.group_size)
    parts = codec(scheme.layout).pack(result)
    for part in geometry.parts:
        value = parts[part.suffix]
        assert tuple(value.shape) == geometry.shape(part), (path, part.suffix)
        yield _store(f"{path}.{part.suffix}", value)


def block_tensors(
    checkpoint: Checkpoint, spec: ModelSpec, block: BlockWeights, fit: BlockFit, schemes: Mapping[str, LinearScheme], float_dtype: str
) -> Iterator[StoredTensor]:
    """Every tensor of a block as it is written: packed linears, changed floats, and the rest byte for byte."""
    changed: dict[str, Tensor] = {}
    packed: set[str] = set()
    for role, linear in spec.linears.items():
        path = spec.tensor(block.layer, linear.name)
        if role in fit.results:
            biased = f"{path}.bias" in checkpoint.tensors
            kept_dtype = stored_dtype(checkpoint, f"{path}.bias" if biased else f"{path}.weight", float_dtype)
            yield from _packed(path, fit.results[role], schemes[role], kept_dtype)
            packed |= {f"{path}.weight", f"{path}.bias"}
            continue
        if role in fit.linears:
            changed[f"{path}.weight"] = fit.linears[role]
        if role in fit.biases:
            changed[f"{path}.bias"] = fit.biases[role]
    for role, norm in spec.norms.items():
        if role in fit.norms:
            changed[spec.tensor(block.layer, norm.name) + ".weight"] = fit.norms[role]
    prefix = spec.tensor(block.layer, "")
    for name in sorted(name for name in checkpoint.tensors if name.startswith(prefix) and name not in packed):
        if name in changed:
            yield _store(name, changed[name].to(TORCH_DTYPES[stored_dtype(checkpoint, name, float_dtype)]))
        else:
            yield copied(checkpoint, name, float_dtype)


def copied(checkpoint: Checkpoint, name: str, float_dtype: str) -> StoredTensor:
    """A tensor that is written as it was read; GGUF blocks are written as ``float_dtype``."""
    value = as_tensor(checkpoint.read(name), checkpoint.dtype(name))
    return _store(name, value.to(TORCH_DTYPES[stored_dtype(checkpoint, name, float_dtype)]))


def quantize_model(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    assignment: Mapping[str, LinearScheme],
    quantizer: Quantizer,
    calibration: CalibrationTokens | None,
    writer: ArtifactWriter,
    *,
    float_dtype: str,
    compute_dtype: torch.dtype,
    device: str,
    progress: Progress,
) -> QuantizedModel:
    """Quantize every block of ``checkpoint`` into ``writer``, one commit per block, continuing after the last committed one.

    ``calibration`` is needed exactly when ``quantizer.needs`` says so. Raises InputError for weights or activations that
    cannot be used, naming the tensor.
    """
    stream = None
    if quantizer.needs:
        assert calibration is not None
        tokens = calibration.tokens
        hidden = load_embedding(checkpoint, spec, dtype=compute_dtype)(tokens.reshape(-1)).reshape(*tokens.shape, -1)
        stream = CalibrationStream(hidden, TILE_TOKENS // tokens.shape[1])
    done = [layer for layer in range(spec.layers) if block_unit(layer) in writer.committed]
    if stream is not None and 0 < len(done) < spec.layers:
        carry = writer.carry()
        assert carry is not None
        stream.restore(carry)
    for layer in range(len(done), spec.layers):
        progress("quantize", layer, spec.layers)
        schemes = {role: assignment[path] for role, path in spec.block_linears(layer).items()}
        stats: Mapping[str, InputStats] = {}
        if stream is not None:
            collector = StatsCollector(input_roles(spec))
            stream.advance(load_block(checkpoint, spec, layer, dtype=compute_dtype, device=device), collector, device)
            stats = collector.stats()
        block = read_block(checkpoint, spec, layer, float_dtype, device)
        fit = quantizer.fit(block, stats, schemes, spec)
        peak = None if stream is None else max([stream.peak, *(s.peak for s in stats.values())])
        writer.commit(
            block_unit(layer),
            block_tensors(checkpoint, spec, block, fit, schemes, float_dtype),
            facts={"linears": fit.facts, "peak_activation": peak},
            carry=None if stream is None or layer == spec.layers - 1 else stream.carry(),
        )
    if OUTER_UNIT not in writer.committed:
        inside = tuple(spec.tensor(layer, "") for layer in range(spec.layers))
        names = sorted(name for name in checkpoint.tensors if not name.startswith(inside))
        writer.commit(OUTER_UNIT, (copied(checkpoint, name, float_dtype) for name in names), facts={})
    progress("quantize", spec.layers, spec.layers)
    return _summary(spec, assignment, writer)


def _summary(spec: ModelSpec, assignment: Mapping[str, LinearScheme], writer: ArtifactWriter) -> QuantizedModel:
    weights = nbytes = count = 0
    peaks, facts = [], {}
    for layer in range(spec.layers):
        stored = writer.facts(block_unit(layer))
        facts[str(layer)] = stored["linears"]
        if stored["peak_activation"] is not None:
            peaks.append(stored["peak_activation"])
        for role, path in spec.block_linears(layer).items():
            scheme = assignment[path]
            if scheme.layout == "plain":
                continue
            n, k = spec.linear_shape(role)
            geometry = LAYOUTS[scheme.layout](n, k, dtype="F16", group_size=scheme.group_size)
            weights, nbytes, count = weights + n * k, nbytes + geometry.total_bytes, count + 1
    return QuantizedModel(count, weights, nbytes, max(peaks, default=None), facts)
