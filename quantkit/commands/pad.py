"""``quantkit pad``: MLPs made wider by zeros, so that a runtime that needs equal parts can cut the model on N ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.checkpoint.artifact import DEFAULT_SHARD_BYTES, PublishedArtifact, StoredTensor
from quantkit.checkpoint.padding import PaddedCheckpoint, Padding, padded, padding_for
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.convert import convert_to_hf, write_linears
from quantkit.errors import InputError
from quantkit.geometry import Geometry, geometry_of
from quantkit.plan import MAX_TP, equal_split_obstacles, ffn_granules
from quantkit.progress import Progress, silent
from quantkit.quant_config import stored_assignment
from quantkit.report import Report, Table, next_step
from quantkit.scheme import Assignment
from quantkit.transcode import ExactConversion, QuantizedLinear, neutral, quantized_linears, stored_parts

DEFAULT_MULTIPLE = 128


@dataclass(frozen=True, slots=True)
class PadOptions:
    """Options of ``quantkit pad``. ``multiple``: of a float model, what each rank's part is a multiple of; None is 128."""

    path: str
    out: Path
    tp: int
    multiple: int | None = None
    max_shard_size: int | None = None
    overwrite: bool = False


def run(options: PadOptions, progress: Progress = silent) -> Report:
    """Write ``options.path`` to ``options.out`` with as many zeros as ``options.tp`` equal parts need.

    Of a float model zeros lie between the channels, so that no group of a later quantization is all zeros; of a quantized one whole
    groups of zeros follow, and the codes that are there stay. Raises InputError where nothing is missing, or zeros do not help.
    """
    check_tp(options.tp)
    checkpoint = open_checkpoint(options.path)
    spec = spec_for(checkpoint.config)
    linears = quantized_linears(checkpoint)
    assignment = stored_assignment(checkpoint.config, spec, checkpoint.tensors)
    granules = ffn_granules(spec, assignment, dtype="BF16")
    if linears:
        if options.multiple is not None:
            raise InputError("--multiple", "was given, and the model is quantized", "none: its groups decide")
    else:
        multiple = DEFAULT_MULTIPLE if options.multiple is None else options.multiple
        if not 1 <= multiple <= 1 << 16:
            raise InputError("--multiple", f"is {multiple}", "1 to 65536")
        granules = dict.fromkeys(granules, multiple)
    padding = padding_for(spec, options.tp, granules, mixed=not linears)
    if not padding.sizes:
        raise InputError("--tp", f"{options.tp} ranks get equal parts of every MLP as it is", "a model that needs padding")
    wider = padded(checkpoint, padding, without={name for linear in linears.values() for name in linear.parts})
    refuse_obstacles(spec_for(wider.config), assignment, options.tp)
    size = DEFAULT_SHARD_BYTES if options.max_shard_size is None else options.max_shard_size
    if linears:
        published = _pad_linears(options, wider, granules, linears, assignment, size, progress)
    else:
        origin = {"padding": padding.to_json()}
        published = convert_to_hf(
            wider, options.out, dtype=None, max_shard_size=size, overwrite=options.overwrite, origin=origin, progress=progress
        ).published
    return _report(options, padding, published, checkpoint.nbytes, quantized=bool(linears))


def check_tp(tp: int) -> None:
    """Raise InputError unless ``tp`` is a number of ranks."""
    if not 2 <= tp <= MAX_TP:
        raise InputError("--tp", f"is {tp}", f"2 to {MAX_TP}")


def refuse_obstacles(spec: ModelSpec, assignment: Assignment, tp: int) -> None:
    """Raise InputError for what keeps equal parts from a model whose MLPs are padded: its heads, most often."""
    for obstacle in equal_split_obstacles(spec, assignment, tp, dtype="BF16"):
        hint = f"quantkit shard --tp {tp} cuts it unevenly, for quantkit's own runtime"
        raise InputError(obstacle.where, f"{obstacle.what}, and only MLPs can be padded", obstacle.remedy, hint)


def _pad_linears(
    options: PadOptions,
    wider: PaddedCheckpoint,
    granules: Mapping[str, int],
    linears: Mapping[str, QuantizedLinear],
    assignment: Assignment,
    size: int,
    progress: Progress,
) -> PublishedArtifact:
    checkpoint, padding = wider.source, wider.padding
    spec = spec_for(checkpoint.config)
    for dim, (before, _) in padding.sizes.items():
        if before % granules[dim]:
            what = f"is {before}, no multiple of {granules[dim]}, so that zeros would share a group with weights"
            raise InputError(dim, what, "whole groups", "quantkit pad the float model, then quantize it")
    roles = {path: names for layer in range(spec.layers) for path, names in spec.block_modules(layer).items()}
    touched = {path: names for path, names in roles.items() if padding.grows(spec, names)}
    target = {}
    for path, linear in linears.items():
        if path not in touched:
            target[path] = linear, linear.geometry
            continue
        if linear.geometry.scheme.double_quant:
            hint = "quantkit pad the float model, then quantize it"
            raise InputError(path, "has double-quantized scales, which zeros would change", "plain scales", hint)
        n, k = len(padding.rows(spec, touched[path])), len(padding.columns(spec, touched[path]))
        target[path] = linear, geometry_of(linear.geometry.scheme, n, k, dtype="BF16")

    def transcode(linear: QuantizedLinear, geometry: Geometry) -> Iterator[StoredTensor]:
        from quantkit.layouts.padding import with_zeros

        result = neutral(checkpoint, linear)
        if linear.path in touched:
            names = touched[linear.path]
            columns = padding.columns(spec, names)
            group = linear.geometry.scheme.group_size
            result = with_zeros(result, padding.rows(spec, names), columns, group if group > 0 else len(columns))
        yield from stored_parts(linear.path, result, geometry)

    done = write_linears(
        wider,
        options.out,
        ExactConversion(target, assignment, checkpoint.config["quantization_config"]),
        what={"padding": padding.to_json()},
        transcode=transcode,
        max_shard_size=size,
        overwrite=options.overwrite,
        progress=progress,
    )
    return done.published


def _report(options: PadOptions, padding: Padding, published: PublishedArtifact, before: int, *, quantized: bool) -> Report:
    after = sum(size for name, size in published.files if name.endswith(".safetensors"))
    rows = tuple((dim, *both, f"{both[1] / both[0] - 1:.2%}") for dim, both in padding.sizes.items())
    where = "whole groups behind the others; the codes are what they were" if quantized else "between the first channels"
    data: dict[str, Any] = {
        "out": str(options.out),
        "tp": options.tp,
        "padding": padding.to_json(),
        "bytes_before": before,
        "weight_bytes": after,
        "files": [name for name, _ in published.files],
        "sums_sha256": published.sums_sha256,
    }
    facts = (
        ("written", f"{options.out}, {after / 1e6:.1f} MB (before: {before / 1e6:.1f} MB)"),
        ("zeros", where),
        ("values", "exact: all else is what the source holds"),
    )
    quantize = () if quantized else (next_step("quantize", options.out, f"{options.out}-awq", "--method", "awq"),)
    return Report(
        command="pad",
        data=data,
        facts=facts,
        tables=(Table("Widths", ("dim", "channels", "padded", "more"), rows),),
        next_steps=(*quantize, next_step("plan", options.out, "--tp", str(options.tp))),
    )
