"""The block loop: read a block, see its inputs, fit, pack, commit, go on. The one function to read first is ``quantize_models``.

At any time one block's weights, the calibration activations and one block's statistics are in memory, whatever the size of the
model. Several methods can share a run: they see the same block, and those that want the float model's activations the same capture.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.arch.spec import ModelSpec
from quantkit.checkpoint.artifact import ArtifactWriter, StoredTensor
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import InputError
from quantkit.geometry import geometry_of
from quantkit.layouts.base import Neutral, stacked, with_bias
from quantkit.layouts.plain import DenseLinear
from quantkit.layouts.registry import dense_weight
from quantkit.model.decoder import Block
from quantkit.model.load import embedded, load_block
from quantkit.ops.dtypes import DTYPE_NAMES, TORCH_DTYPES, as_bytes, as_tensor
from quantkit.plan import quantized_size, role_scheme
from quantkit.progress import Progress
from quantkit.quant_config import is_kept
from quantkit.quantizers.base import FLOAT, QUANTIZED, BlockFit, BlockWeights, InputStats, Quantizer
from quantkit.quantizers.calibration import CalibrationStream, CalibrationTokens, StatsCollector, gathered, owners, stages
from quantkit.quantizers.devices import each
from quantkit.quantizers.rtn import quantize_weight
from quantkit.scheme import LinearScheme
from quantkit.transcode import stored_parts

OUTER_UNIT = "outer"
TILE_TOKENS = 4096
"""Statistics are summed over tiles of about this many tokens, in order: part of what makes two runs equal."""
GLIBC_MMAP_THRESHOLD, LARGE = -3, 1 << 20
"""mallopt's name for the size from which memory is mapped by itself, and the bytes that are worth it."""
FLOAT16_ALARM = 3e4
"""Activations beyond this are close to float16's 65504; kernels that compute in float16 would overflow."""


@dataclass(frozen=True, slots=True)
class Job:
    """One artifact to make: how each linear is stored, the methods by name that do it, and where it goes."""

    assignment: Mapping[str, LinearScheme]
    quantizers: Mapping[str, Quantizer]
    writer: ArtifactWriter

    def wants(self, inputs: str) -> frozenset[str]:
        """The statistics that its methods need of these activations; empty for none."""
        return frozenset().union(*(q.needs for q in self.quantizers.values() if q.inputs == inputs))


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """What the loop did: tensors written, their bytes, the float bytes of the same linears, and the greatest activation."""

    tensors: int
    quantized_weights: int
    quantized_bytes: int
    peak_activation: float | None
    facts: Mapping[str, Any]
    coverage: Mapping[str, Any]
    """Layer -> tokens that reached each expert, of models that have experts."""


def block_unit(layer: int) -> str:
    """The commit unit of a block."""
    return f"block-{layer:05d}"


class _Weights(Mapping[str, Tensor]):
    """Weights by role, read each time they are asked for: only who uses one has it in memory."""

    def __init__(self, roles: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._roles, self._read = tuple(roles), read

    def __getitem__(self, role: str) -> Tensor:
        if role not in self._roles:
            raise KeyError(role)
        return self._read(role)

    def __contains__(self, role: object) -> bool:
        return role in self._roles  # Mapping's own would read the weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint that is read, and how: ``float_dtype`` is what the floats of a GGUF source are written as.

    With several ``devices`` each runs its part of the calibration and its part of the methods' work; weights and statistics are
    gathered on the first.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    float_dtype: str
    compute_dtype: torch.dtype
    devices: tuple[str, ...]

    @property
    def device(self) -> str:
        """The device where weights are read to and results are packed."""
        return self.devices[0]

    def stored_dtype(self, name: str) -> str:
        """The dtype in which a tensor is written: its own, or ``float_dtype`` for a source that holds GGUF blocks."""
        return self.float_dtype if self.checkpoint.kind == "gguf" else self.checkpoint.dtype(name)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        """One tensor as float32 on the device."""
        return as_tensor(self.checkpoint.read(name, index), self.checkpoint.dtype(name)).to(self.device).float()

    def weight(self, layer: int, role: str) -> Tensor:
        """The weight ``[N, K]`` of one linear: its rows of the stored tensor, which may be transposed."""
        linear, rows = self.spec.linears[role], self.spec.rows(role)
        name = f"{self.spec.tensor(layer, linear.name)}.weight"
        both = self.checkpoint.tensors[name].shape
        cut = slice(rows.start, rows.stop)
        if linear.transposed:
            return self.read(name, (slice(0, both[0]), cut)).T.contiguous()
        return self.read(name, (cut, slice(0, both[1])))

    def block(self, layer: int) -> BlockWeights:
        """The float32 weights, biases and norms of one block; the weights are read when they are used."""
        biases, norms, norm_biases, norm_dtypes, dtypes = ({} for _ in range(5))
        for role, path in self.spec.block_linears(layer).items():
            rows = self.spec.rows(role)
            dtypes[role] = TORCH_DTYPES[self.stored_dtype(f"{path}.weight")]
            if f"{path}.bias" in self.checkpoint.tensors:
                biases[role] = self.read(f"{path}.bias", (slice(rows.start, rows.stop),))
        for role, norm in self.spec.norms.items():
            name = self.spec.tensor(layer, norm.name)
            norms[role] = self.read(f"{name}.weight")
            norm_dtypes[role] = TORCH_DTYPES[self.stored_dtype(f"{name}.weight")]
            if "bias" in self.spec.norm_parts:
                norm_biases[role] = self.read(f"{name}.bias")
        linears = _Weights(self.spec.block_linears(layer), lambda role: self.weight(layer, role))
        return BlockWeights(layer, linears, biases, norms, norm_dtypes, dtypes, norm_biases, self.devices)

    def loaded(self, layer: int) -> list[Block]:
        """One block ready to run, in the compute dtype, on each device."""

        def load(_: int, device: str) -> Block:
            return load_block(self.checkpoint, self.spec, layer, dtype=self.compute_dtype, device=device)

        return each(self.devices, load)

    def collectors(self, layer: int, roles: Iterable[str], needs: frozenset[str]) -> list[StatsCollector]:
        """What gathers the statistics ``needs`` of these linears, for each device."""
        return [StatsCollector(owners(self.spec, layer), roles, needs) for _ in self.devices]

    def copied(self, name: str) -> StoredTensor:
        """A tensor that is written as it was read; GGUF blocks are written as ``float_dtype``."""
        value = as_tensor(self.checkpoint.read(name), self.checkpoint.dtype(name))
        return _store(name, value.to(TORCH_DTYPES[self.stored_dtype(name)]))


def _store(name: str, value: Tensor) -> StoredTensor:
    return StoredTensor(name, DTYPE_NAMES[value.dtype], tuple(value.shape), as_bytes(value))


def _packed(path: str, result: Neutral, scheme: LinearScheme, shape: tuple[int, int], bias_dtype: str) -> Iterator[StoredTensor]:
    """The stored parts of one quantized linear, its bias in ``bias_dtype``."""
    if result.bias is not None:
        result = with_bias(result, result.bias.to(TORCH_DTYPES[bias_dtype]))
    yield from stored_parts(path, result, geometry_of(scheme, *shape, dtype=bias_dtype, bias=result.bias is not None))


def block_tensors(source: Source, block: BlockWeights, fit: BlockFit, schemes: Mapping[str, LinearScheme]) -> Iterator[StoredTensor]:
    """Every tensor of a block as it is written: packed linears, changed floats, and the rest byte for byte."""
    checkpoint, spec = source.checkpoint, source.spec
    changed: dict[str, Tensor] = {}
    packed: set[str] = set()
    for path, roles in spec.block_modules(block.layer).items():
        if roles[0] in fit.results:
            biased = f"{path}.bias" in checkpoint.tensors
            kept_dtype = source.stored_dtype(f"{path}.bias" if biased else f"{path}.weight")
            shape = spec.stored_shape(roles[0])
            try:
                result = stacked([fit.results[role] for role in roles])
            except InputError as exc:
                raise InputError(path, exc.what, exc.expected) from exc
            yield from _packed(path, result, schemes[roles[0]], shape, kept_dtype)
            packed |= {f"{path}.weight", f"{path}.bias"}
            continue
        if any(role in fit.linears for role in roles):
            whole = torch.cat([fit.linears[role] if role in fit.linears else block.linears[role] for role in roles])
            changed[f"{path}.weight"] = whole.T.contiguous() if spec.linears[roles[0]].transposed else whole
        if any(role in fit.biases for role in roles) and f"{path}.bias" in checkpoint.tensors:
            changed[f"{path}.bias"] = torch.cat([fit.biases.get(role, block.biases[role]) for role in roles])
    for role, norm in spec.norms.items():
        if role in fit.norms:
            changed[spec.tensor(block.layer, norm.name) + ".weight"] = fit.norms[role]
        if role in fit.norm_biases:
            changed[spec.tensor(block.layer, norm.name) + ".bias"] = fit.norm_biases[role]
    prefix = spec.tensor(block.layer, "")
    for name in sorted(name for name in checkpoint.tensors if name.startswith(prefix) and name not in packed):
        if name in changed:
            yield _store(name, changed[name].to(TORCH_DTYPES[source.stored_dtype(name)]))
        else:
            yield source.copied(name)


@dataclass(slots=True)
class _Streams:
    """The calibration activations of one run: the float model's, and those of each artifact that wants its own."""

    source: Source
    tokens: Tensor
    offload: Callable[[str, Tensor], Tensor]
    found: dict[str, CalibrationStream] = field(default_factory=dict)

    def at(self, name: str, layer: int, writer: ArtifactWriter | None) -> CalibrationStream:
        """The stream called ``name`` at the input of ``layer``: in memory, from the resume point of ``writer``, or from the tokens.

        Without a writer that carries it, the float model is run again up to ``layer``.
        """
        if name not in self.found:
            hidden = embedded(self.source.checkpoint, self.source.spec, self.tokens, dtype=self.source.compute_dtype)
            stream = CalibrationStream(self.offload(name, hidden), TILE_TOKENS // self.tokens.shape[1])
            if layer and writer is not None:
                carry = writer.carry()
                assert carry is not None
                stream.restore(carry)
            for earlier in range(layer if writer is None else 0):
                stream.advance(self.source.loaded(earlier), None, self.source.devices)
            self.found[name] = stream
        return self.found[name]


def _free_at_once() -> None:
    """Have glibc give freed tensors back to the system. Left to itself it keeps those of up to 32 MiB in a heap that grows with every
    block, as small things come to lie between them. Another C library is left as it is."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(GLIBC_MMAP_THRESHOLD, LARGE)


def quantize_models(
    source: Source,
    jobs: Mapping[str, Job],
    calibration: CalibrationTokens | None,
    *,
    offload: Callable[[str, Tensor], Tensor],
    progress: Progress,
) -> dict[str, QuantizedModel]:
    """Make every artifact of ``jobs`` from one pass over the blocks of ``source``, each continued after its last committed block.

    ``calibration`` is needed exactly when a method says so; ``offload`` says where a stream's activations lie. Raises InputError
    for weights or activations that cannot be used, naming the tensor.
    """
    _free_at_once()
    spec = source.spec
    streams = None if calibration is None else _Streams(source, calibration.tokens, offload)
    done = {name: sum(block_unit(layer) in job.writer.committed for layer in range(spec.layers)) for name, job in jobs.items()}
    for layer in range(min(done.values()), spec.layers):
        progress("quantize", layer, spec.layers)
        pending = {name: job for name, job in jobs.items() if done[name] <= layer}
        block = source.block(layer)
        fits: dict[str, tuple[BlockFit, Mapping[str, Any], CalibrationStream | None]] = {}
        shared = {name: job for name, job in pending.items() if job.wants(FLOAT)}
        carries = next((job.writer for job in shared.values()), None)
        for name, job in pending.items():
            if job.wants(QUANTIZED):
                assert streams is not None
                fits[name] = _fit_in_stages(source, job, block, streams, name, carries)
        stats: Mapping[str, InputStats] = {}
        stream = None
        if shared or (streams is not None and FLOAT in streams.found):
            assert streams is not None
            stream = streams.at(FLOAT, layer, carries)
            needs = frozenset().union(*(job.wants(FLOAT) for job in shared.values()))
            collectors = source.collectors(layer, spec.block_linears(layer), needs) if needs else None
            stream.advance(source.loaded(layer), collectors, source.devices)
            stats = {} if collectors is None else gathered(collectors, source.device)
        for name, job in pending.items():
            if name not in fits:
                used = stream if name in shared else None
                fits[name] = (_fit(job, block, stats if used is not None else {}, spec), _activations(used, stats), used)
            fit, facts, carried = fits.pop(name)
            schemes = _schemes(spec, job, layer)
            last = layer == spec.layers - 1
            job.writer.commit(
                block_unit(layer),
                block_tensors(source, block, fit, schemes),
                facts={"linears": fit.facts, **facts},
                carry=None if carried is None or last else carried.carry(),
            )
            del fit  # the codes of a whole block, which the next one has no room for
    for job in jobs.values():
        if OUTER_UNIT not in job.writer.committed:
            job.writer.commit(OUTER_UNIT, _outer(source, job), facts={})
    progress("quantize", spec.layers, spec.layers)
    return {name: _summary(spec, job) for name, job in jobs.items()}


def _schemes(spec: ModelSpec, job: Job, layer: int) -> dict[str, LinearScheme]:
    return {role: role_scheme(spec, role, job.assignment[path]) for role, path in spec.block_linears(layer).items()}


def _activations(stream: CalibrationStream | None, stats: Mapping[str, InputStats]) -> dict[str, Any]:
    """What the manifest says of a block's calibration: the greatest activation, and how many tokens reached each expert."""
    peak = None if stream is None else max([stream.peak, *(s.peak for s in stats.values())])
    gates = {role.split(".")[1]: s for role, s in stats.items() if role.startswith("experts.") and role.endswith(".gate")}
    coverage = {expert: 0 if s.borrowed else s.tokens for expert, s in gates.items()}
    return {"peak_activation": peak, **({"expert_tokens": coverage} if coverage else {})}


def _merged(first: BlockFit, second: BlockFit) -> BlockFit:
    return BlockFit(
        *({**getattr(first, f), **getattr(second, f)} for f in ("results", "linears", "biases", "norms", "norm_biases", "facts"))
    )


def _fit(job: Job, block: BlockWeights, stats: Mapping[str, InputStats], spec: ModelSpec) -> BlockFit:
    """The block by every method of ``job``, those first that change what the others see."""
    schemes = _schemes(spec, job, block.layer)
    fit = BlockFit({})
    for name, quantizer in sorted(job.quantizers.items(), key=lambda item: not item[1].needs):
        mine = {role: s for role, s in schemes.items() if role in block.linears and not is_kept(s) and s.method == name}
        if not mine:
            continue
        changed: Mapping[str, Tensor] = fit.linears

        def current(role: str, changed: Mapping[str, Tensor] = changed) -> Tensor:
            return changed[role] if role in changed else block.linears[role]

        # A method without statistics looks at one weight after the other; the others compare and change those of the whole block.
        linears = {role: current(role) for role in block.linears} if quantizer.needs else _Weights(mine, current)
        seen = replace(block, linears=linears, biases={**block.biases, **fit.biases})
        kept = {role: s if role in mine else replace(s, layout="plain") for role, s in schemes.items()}
        fit = _merged(fit, quantizer.fit(seen, stats, kept, spec))
    return replace(fit, linears={role: w for role, w in fit.linears.items() if role not in fit.results})


def _fit_in_stages(
    source: Source, job: Job, block: BlockWeights, streams: _Streams, name: str, float_writer: ArtifactWriter | None
) -> tuple[BlockFit, Mapping[str, Any], CalibrationStream]:
    """The block stage by stage on the activations of the model as quantized so far; its stream is advanced past the block.

    ``float_writer`` is that of a job which carries the float model's activations at this block, if there is one.
    """
    spec, layer, devices = source.spec, block.layer, source.devices
    stream = streams.at(name, layer, job.writer)
    schemes, needs = _schemes(spec, job, layer), job.wants(QUANTIZED)
    copies = source.loaded(layer)
    reference = None
    if "cross" in needs:
        reference = streams.at(FLOAT, layer, float_writer), source.loaded(layer)
    fit, seen = BlockFit({}), dict[str, InputStats]()
    for stage in stages(spec, layer):
        wanted = [role for role in stage if not is_kept(schemes[role])]
        if not wanted:
            continue
        stats: Mapping[str, InputStats] = {}
        if any(job.quantizers[schemes[role].method].needs for role in wanted):
            collectors = source.collectors(layer, stage, needs)
            stream.observe(copies, collectors, frozenset(stage), devices, reference)
            stats = gathered(collectors, source.device)
            seen |= {role: replace(s, gram=s.gram.new_zeros(0, 0), cross=None) for role, s in stats.items()}
        linears = _Weights(wanted, block.linears.__getitem__)
        biases = {role: block.biases[role] for role in wanted if role in block.biases}
        found = _fit(job, replace(block, linears=linears, biases=biases, norms={}, norm_biases={}), stats, spec)
        for role, result in found.results.items():
            dense = dense_weight(result, schemes[role], source.compute_dtype)
            bias = None if result.bias is None else result.bias.to(source.compute_dtype)
            for device, copy in zip(devices, copies, strict=True):
                copy.replace(role, DenseLinear(dense.to(device), None if bias is None else bias.to(device)))
        fit = _merged(fit, found)
    stream.advance(copies, None, devices)
    return fit, _activations(stream, seen), stream


def _outer(source: Source, job: Job) -> Iterator[StoredTensor]:
    """What lies outside the blocks, as it is; or an embedding and a head that are quantized, rounded to nearest, or untied."""
    spec, checkpoint = source.spec, source.checkpoint
    inside = tuple(spec.tensor(layer, "") for layer in range(spec.layers))
    head, embedding = spec.architecture.head, spec.architecture.embedding
    schemes = {path: job.assignment[path] for path in (embedding, head) if path in job.assignment}
    # A head that is stored beside the embedding that it was tied to, and whatever is quantized.
    changed = {path: s for path, s in schemes.items() if not is_kept(s) or (path == head and spec.tied)}
    for name in sorted(name for name in checkpoint.tensors if not name.startswith(inside)):
        if name.rpartition(".")[0] not in changed:
            yield source.copied(name)
    for path, scheme in changed.items():
        name = f"{embedding if spec.tied else path}.weight"
        if is_kept(scheme):
            yield replace(source.copied(name), name=f"{path}.weight")
            continue
        weight, dtype = source.read(name), source.stored_dtype(name)
        result = quantize_weight(weight, scheme, TORCH_DTYPES[dtype], path)
        yield from _packed(path, result, scheme, (weight.shape[0], weight.shape[1]), dtype)


def _summary(spec: ModelSpec, job: Job) -> QuantizedModel:
    peaks, facts, coverage = [], {}, {}
    for layer in range(spec.layers):
        stored = job.writer.facts(block_unit(layer))
        facts[str(layer)] = stored["linears"]
        if stored["peak_activation"] is not None:
            peaks.append(stored["peak_activation"])
        if "expert_tokens" in stored:
            coverage[str(layer)] = stored["expert_tokens"]
    return QuantizedModel(*quantized_size(spec, job.assignment), max(peaks, default=None), facts, coverage)
