"""Any readable checkpoint -> a Hugging Face directory of floats, with every rounding measured; an integer artifact -> another format;
a GGUF file -> a directory of its blocks.

All go a block at a time, and a block is what its tensors' names say. A conversion is a function of its inputs, so a run that
was killed is simply continued.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from quantkit import __version__
from quantkit.arch.table import spec_for
from quantkit.checkpoint.artifact import ArtifactWriter, PublishedArtifact, StoredTensor
from quantkit.checkpoint.blocks import as_blocks
from quantkit.checkpoint.reader import NUMPY_DTYPES, Checkpoint
from quantkit.errors import InputError
from quantkit.formats.floats import rounded, widened
from quantkit.geometry import DTYPE_BYTES, FLOATS, GGML_BLOCKS, Geometry
from quantkit.progress import Progress, silent
from quantkit.quant_config import stored_assignment
from quantkit.scheme import assignment_to_json
from quantkit.transcode import ExactConversion, QuantizedLinear, dense_weight, exact_conversion, quantized_linears, transcoded

DTYPES: Mapping[str, str] = MappingProxyType({"float16": "F16", "bfloat16": "BF16", "float32": "F32"})
"""``--dtype`` -> the safetensors dtype."""
CONFIG_NAMES: Mapping[str, str] = MappingProxyType({stored: name for name, stored in DTYPES.items()})
GGUF_DTYPE = "F16"
"""What GGUF blocks become when nothing else is asked for: they have no dtype of their own."""
CHUNK_ELEMENTS = 4 << 20
"""Values that are rounded and compared at a time."""
OUTER_UNIT = "outer"
T = TypeVar("T")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,6})\.")


@dataclass(slots=True)
class Change:
    """What became of the values of some tensors: ``changed`` of ``values`` are not what they were, ``to_zero`` of them are now 0."""

    tensors: int = 0
    changed_tensors: int = 0
    values: int = 0
    changed: int = 0
    to_zero: int = 0
    max_relative: float = 0.0
    """The greatest \\|new - old\\| / \\|old\\|."""
    max_absolute: float = 0.0

    def add(self, other: Change) -> None:
        """Count ``other`` as well."""
        self.tensors += other.tensors
        self.changed_tensors += other.changed_tensors
        self.values += other.values
        self.changed += other.changed
        self.to_zero += other.to_zero
        self.max_relative = max(self.max_relative, other.max_relative)
        self.max_absolute = max(self.max_absolute, other.max_absolute)


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written. ``changes`` by how the source stored the values ("Q4_1", "BF16", "awq, 4 bits")."""

    published: PublishedArtifact
    dtypes: tuple[str, ...]
    changes: Mapping[str, Change]
    fingerprint: str
    resumed_units: int

    @property
    def total(self) -> Change:
        total = Change()
        for change in self.changes.values():
            total.add(change)
        return total


@dataclass(frozen=True, slots=True)
class _Job:
    """One tensor to write: ``name`` in ``dtype``; with ``linear`` it is the dense weight of a quantized one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    label: str
    linear: QuantizedLinear | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def convert_to_hf(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: str | None,
    max_shard_size: int,
    overwrite: bool,
    origin: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Converted:
    """Write ``checkpoint`` to the directory ``out``, its floats in ``dtype`` (a key of DTYPES); None is their own, float16 for GGUF.

    ``origin`` is what else the manifest says of the source. An unfinished conversion of the same source is continued.
    Raises InputError for a source that cannot be read as floats, a value that ``dtype`` cannot hold, or an ``out`` that exists;
    MachineError when the disk is full.
    """
    if max_shard_size <= 0:
        raise InputError("--max-shard-size", f"is {max_shard_size}", "a positive number of bytes")
    units = _units(checkpoint, dtype)
    fingerprint = checkpoint.fingerprint()
    identity = {"command": "convert", "quantkit": __version__, "source": fingerprint, "dtype": dtype}
    need = sum(job.nbytes for jobs in units.values() for job in jobs)
    with ArtifactWriter(
        out, identity=identity, overwrite=overwrite, resume=not overwrite, need_bytes=need, source=checkpoint.root
    ) as writer:
        committed = writer.committed
        for done, (unit, jobs) in enumerate(units.items(), 1):
            if unit not in committed:
                _commit(writer, checkpoint, unit, jobs)
            progress("convert", done, len(units))
        changes = _collected(writer, list(units))
        total = Change()
        for change in changes.values():
            total.add(change)
        dtypes = tuple(sorted({job.dtype for jobs in units.values() for job in jobs}))
        manifest = {
            "kind": "checkpoint",
            "method": "convert",
            "source": {"fingerprint": fingerprint, "kind": checkpoint.kind, **(origin or {})},
            "conversion": {
                "dtype": dtype,
                "exact": not total.changed,
                "changes": {label: asdict(change) for label, change in changes.items()},
            },
        }
        published = writer.publish(
            config=_config(checkpoint, dtype, units),
            files=checkpoint.extra_files(),
            manifest=manifest,
            max_shard_size=max_shard_size,
        )
    return Converted(published, dtypes, changes, fingerprint, len(committed))


def _units(checkpoint: Checkpoint, dtype: str | None) -> dict[str, list[_Job]]:
    """The tensors to write by the unit that they are committed in: what is outside the blocks first, then block by block."""
    return _by_block(_jobs(checkpoint, dtype), lambda job: job.name)


def _by_block(items: Iterable[T], name: Callable[[T], str]) -> dict[str, list[T]]:
    grouped: dict[int, list[T]] = {}
    for item in items:
        found = _LAYER.search(name(item))
        grouped.setdefault(int(found[1]) if found else -1, []).append(item)
    return {OUTER_UNIT if layer < 0 else f"block-{layer:05d}": grouped[layer] for layer in sorted(grouped)}


def _jobs(checkpoint: Checkpoint, dtype: str | None) -> Iterator[_Job]:
    linears = quantized_linears(checkpoint)
    owners = {name: linear for linear in linears.values() for name in linear.parts}
    declared = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    dense = DTYPES.get(dtype or str(declared), "F16")
    done: set[str] = set()
    for name, ref in checkpoint.tensors.items():
        linear = owners.get(name)
        if linear is not None:
            if linear.path not in done:
                n, k = linear.geometry.n, linear.geometry.k
                yield _Job(f"{linear.path}.weight", (k, n) if linear.transposed else (n, k), dense, linear.label, linear)
            done.add(linear.path)
            continue
        own = checkpoint.dtype(name)
        if own not in DTYPE_BYTES:
            raise InputError(name, f"is stored as {own}", f"one of {', '.join(DTYPE_BYTES)}")
        target = own if own not in FLOATS else dtype or (GGUF_DTYPE if checkpoint.kind == "gguf" else None)
        yield _Job(name, ref.shape, DTYPES.get(str(target), target or own), ref.dtype)


def _commit(writer: ArtifactWriter, checkpoint: Checkpoint, unit: str, jobs: list[_Job]) -> None:
    facts: dict[str, dict[str, Any]] = {}

    def stored() -> Iterator[StoredTensor]:
        for job in jobs:
            tensor, change = _tensor(checkpoint, job)
            total = Change(**facts.get(job.label, {}))
            total.add(change)
            facts[job.label] = asdict(total)
            yield tensor

    writer.commit(unit, stored(), facts=facts)  # which are complete when the tensors are written, and stored after that


def _collected(writer: ArtifactWriter, units: list[str]) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for unit in units:
        for label, facts in writer.facts(unit).items():
            changes.setdefault(label, Change()).add(Change(**facts))
    return dict(sorted(changes.items()))


def _tensor(checkpoint: Checkpoint, job: _Job) -> tuple[StoredTensor, Change]:
    """One tensor as it is written, and how its values differ from what the source holds. Raises InputError when one does not fit."""
    out = np.empty(job.shape, dtype=NUMPY_DTYPES[job.dtype])
    change = Change(tensors=1, values=out.size)
    flat = out.reshape(-1)
    done = 0
    for own, values in _chunks(checkpoint, job):
        part = flat[done : done + values.size].reshape(values.shape)
        done += values.size
        if own == job.dtype:
            part[...] = values
            continue
        wide = values if own == "F64" else widened(values, own)
        part[...] = rounded(wide, job.dtype)
        _compare(job, wide, part if job.dtype == "F64" else widened(part, job.dtype), change)
    change.changed_tensors = int(change.changed > 0)
    return StoredTensor(job.name, job.dtype, job.shape, flat.view(np.uint8).data), change


def _chunks(checkpoint: Checkpoint, job: _Job) -> Iterator[tuple[str, NDArray[Any]]]:
    """The values of one tensor in order, some rows at a time, and the dtype that they are in."""
    if job.linear is not None:
        yield "F32", dense_weight(checkpoint, job.linear)
        return
    own = checkpoint.dtype(job.name)
    if not job.shape or own == job.dtype:
        yield own, checkpoint.read(job.name)
        return
    rows = max(1, CHUNK_ELEMENTS // max(1, math.prod(job.shape[1:])))
    for start in range(0, job.shape[0], rows):
        inner = [slice(0, size) for size in job.shape[1:]]
        yield own, checkpoint.read(job.name, (slice(start, min(start + rows, job.shape[0])), *inner))


def _compare(job: _Job, before: NDArray[Any], after: NDArray[Any], change: Change) -> None:
    """Count into ``change`` where ``after`` differs from ``before``. Raises InputError when a value became infinite."""
    differs = before != after
    if not differs.any():
        return
    differs &= np.isfinite(before)  # a NaN differs from itself and is none the less what it was
    old, new = before[differs].astype(np.float64), after[differs].astype(np.float64)
    if not np.isfinite(new).all():
        worst = old[np.argmax(np.abs(old))] if old.size else 0.0
        hint = "--dtype bfloat16 or float32 has the range"
        raise InputError(
            job.name, f"holds {worst:g}, which {CONFIG_NAMES[job.dtype]} cannot", f"values within {CONFIG_NAMES[job.dtype]}'s range", hint
        )
    if not old.size:
        return
    distance = np.abs(new - old)
    change.changed += int(old.size)
    change.to_zero += int(np.count_nonzero(new == 0))
    change.max_absolute = max(change.max_absolute, float(distance.max()))
    change.max_relative = max(change.max_relative, float((distance / np.abs(old)).max()))


def _config(checkpoint: Checkpoint, dtype: str | None, units: Mapping[str, list[_Job]]) -> dict[str, Any]:
    """``config.json`` without a quantization, and with the dtype that was written."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    written = dtype
    if written is None and (checkpoint.kind == "gguf" or "quantization_config" in checkpoint.config):
        dense = [job.dtype for jobs in units.values() for job in jobs if len(job.shape) == 2]
        written = next((CONFIG_NAMES[name] for name in dense if name in CONFIG_NAMES), None)
    if written is not None:
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": written}
    return config


@dataclass(frozen=True, slots=True)
class Transcoded:
    """What was written. ``counts``: how linears were stored ("awq, 4 bits") -> how many of them."""

    published: PublishedArtifact
    counts: Mapping[str, int]
    symmetric: bool
    fingerprint: str
    resumed_units: int

    @property
    def linears(self) -> int:
        return sum(self.counts.values())


def convert_exactly(
    checkpoint: Checkpoint, out: Path, *, to: str, max_shard_size: int, overwrite: bool, progress: Progress = silent
) -> Transcoded:
    """Write the integers of ``checkpoint`` to the directory ``out`` in the format ``to`` (a key of ``transcode.TARGETS``).

    Everything else is copied byte for byte. An unfinished conversion of the same source is continued. Raises InputError for a
    source that ``to`` cannot hold exactly, or an ``out`` that exists; MachineError when the disk is full.
    """
    target = exact_conversion(checkpoint, to)
    return write_linears(
        checkpoint,
        out,
        target,
        what={"to": to},
        transcode=partial(transcoded, checkpoint),
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
    )


def write_linears(
    checkpoint: Checkpoint,
    out: Path,
    target: ExactConversion,
    *,
    what: Mapping[str, Any],
    transcode: Callable[[QuantizedLinear, Geometry], Iterator[StoredTensor]],
    max_shard_size: int,
    overwrite: bool,
    progress: Progress = silent,
) -> Transcoded:
    """Write ``checkpoint`` to ``out``: the linears of ``target`` as ``transcode`` gives them, and every other tensor as it is.

    ``what`` (JSON data) is done to it, for the manifest, and so that an unfinished run goes on with the same. Raises as
    ``convert_exactly``.
    """
    if max_shard_size <= 0:
        raise InputError("--max-shard-size", f"is {max_shard_size}", "a positive number of bytes")
    owners = {name: path for path, (linear, _) in target.linears.items() for name in linear.parts}
    # A linear counts where its first part lies; every other tensor is written where it is.
    units = _by_block(dict.fromkeys(owners.get(name, name) for name in checkpoint.tensors), lambda item: f"{item}.")
    fingerprint = checkpoint.fingerprint()
    identity = {"command": "convert", "quantkit": __version__, "source": fingerprint, **what}
    copied = sum(ref.nbytes for name, ref in checkpoint.tensors.items() if name not in owners)
    need = copied + sum(geometry.total_bytes for _, geometry in target.linears.values())
    counts = Counter(linear.label for linear, _ in target.linears.values())

    def stored(items: Iterable[str]) -> Iterator[StoredTensor]:
        for item in items:
            if item in target.linears:
                yield from transcode(*target.linears[item])
            else:
                yield _as_it_is(checkpoint, item)

    with ArtifactWriter(
        out, identity=identity, overwrite=overwrite, resume=not overwrite, need_bytes=need, source=checkpoint.root
    ) as writer:
        committed = writer.committed
        for done, (unit, items) in enumerate(units.items(), 1):
            if unit not in committed:
                writer.commit(unit, stored(items), facts={})
            progress("convert", done, len(units))
        manifest = {
            "kind": "artifact",
            "method": "convert",
            "source": {"fingerprint": fingerprint, "kind": checkpoint.kind},
            "assignment": assignment_to_json(target.assignment),
            "conversion": {"exact": True, **what, "linears": len(target.linears)},
        }
        published = writer.publish(
            config={**checkpoint.config, "quantization_config": dict(target.quantization_config)},
            files=checkpoint.extra_files(),
            manifest=manifest,
            max_shard_size=max_shard_size,
        )
    symmetric = all(geometry.scheme.sym for _, geometry in target.linears.values())
    return Transcoded(published, counts, symmetric, fingerprint, len(committed))


@dataclass(frozen=True, slots=True)
class KeptBlocks:
    """What was written. ``counts``: block type -> how many modules stay in it."""

    published: PublishedArtifact
    counts: Mapping[str, int]
    fingerprint: str
    resumed_units: int


def keep_blocks(
    checkpoint: Checkpoint,
    out: Path,
    *,
    max_shard_size: int,
    overwrite: bool,
    origin: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> KeptBlocks:
    """Write the GGUF file ``checkpoint`` to the directory ``out`` with its blocks as they are, byte for byte, and its floats likewise.

    The directory is quantkit's own container: quantkit serves, cuts, verifies and converts it, and no other loader reads it. Rows of
    queries and keys are put back in the model's order; types without a layout (IQ2, MXFP4, ...) become float32. ``origin`` is what else
    the manifest says of the source. An unfinished conversion of the same source is continued. Raises InputError for a source without
    blocks, or an ``out`` that exists; MachineError when the disk is full.
    """
    if max_shard_size <= 0:
        raise InputError("--max-shard-size", f"is {max_shard_size}", "a positive number of bytes")
    source = as_blocks(checkpoint)
    if source is checkpoint:
        what = "holds no blocks that can be kept" if checkpoint.kind == "gguf" else "is no GGUF file"
        raise InputError(str(checkpoint.root), what, f"a GGUF file with tensors of {', '.join(GGML_BLOCKS)}")
    spec = spec_for(source.config)
    assignment = stored_assignment(source.config, spec, source.tensors)
    sizes = {name: math.prod(ref.shape) * DTYPE_BYTES[source.dtype(name)] for name, ref in source.tensors.items()}
    units = _by_block(source.tensors, lambda name: name)
    fingerprint = checkpoint.fingerprint()
    identity = {"command": "convert", "quantkit": __version__, "source": fingerprint, "to": "blocks"}
    with ArtifactWriter(
        out, identity=identity, overwrite=overwrite, resume=not overwrite, need_bytes=sum(sizes.values()), source=checkpoint.root
    ) as writer:
        committed = writer.committed
        for done, (unit, names) in enumerate(units.items(), 1):
            if unit not in committed:
                writer.commit(unit, (_as_it_is(source, name) for name in names), facts={})
            progress("convert", done, len(units))
        counts = Counter(scheme.code for scheme in assignment.values() if scheme.layout == "ggml")
        manifest = {
            "kind": "artifact",
            "method": "convert",
            "source": {"fingerprint": fingerprint, "kind": checkpoint.kind, **(origin or {})},
            "assignment": assignment_to_json(assignment),
            "conversion": {"exact": True, "to": "blocks", "linears": counts.total()},
        }
        published = writer.publish(
            config=dict(source.config), files=checkpoint.extra_files(), manifest=manifest, max_shard_size=max_shard_size
        )
    return KeptBlocks(published, counts, fingerprint, len(committed))


def _as_it_is(checkpoint: Checkpoint, name: str) -> StoredTensor:
    array = checkpoint.read(name)
    return StoredTensor(name, checkpoint.dtype(name), array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
