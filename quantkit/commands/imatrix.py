"""``quantkit imatrix``: how much each input column of each weight matters, as a file that ``quantize --imatrix`` and llama.cpp read."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import fs
from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.commands.assign import float_dtype
from quantkit.convert import GGUF_DTYPE
from quantkit.errors import InputError
from quantkit.formats.imatrix import Imatrix, encode_dat, encode_gguf, read_imatrix
from quantkit.progress import Progress, silent
from quantkit.quant_config import stored_assignment
from quantkit.report import Report, next_step
from quantkit.verify import expected_tensors, tensor_defects

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.quantizers.calibration import CalibrationTokens
    from quantkit.text.tokenizer import Tokenizer

GGUF, DAT = "gguf", "dat"
ENCODE = {GGUF: encode_gguf, DAT: encode_dat}
DEFAULT_SAMPLES, DEFAULT_SEQ_LEN = 128, 512


@dataclass(frozen=True, slots=True)
class ImatrixOptions:
    """Options of ``quantkit imatrix``. ``seq_len`` None is 512, or the positions of a model that has fewer."""

    path: str
    out: Path
    calib: str = "builtin"
    """``builtin``, ``self``, or a text or JSONL file."""
    samples: int = DEFAULT_SAMPLES
    seq_len: int | None = None
    format: str | None = None
    """``gguf`` or ``dat``; None is what the end of ``out`` says, and gguf where it says nothing."""
    output: bool = False
    device: str = "auto"
    compute_dtype: str = "auto"
    offload: bool = False
    overwrite: bool = False


def run(options: ImatrixOptions, progress: Progress = silent) -> Report:
    """Gather the importance matrix of ``options.path`` and write it to ``options.out``, whole or not at all.

    Raises InputError for options, a model or a text that cannot be used, and for an ``out`` that exists; MachineError where the disk
    or the device says no.
    """
    form = _form(options)
    if options.samples < 1:
        raise InputError("--samples", f"is {options.samples}", "at least 1")
    _refuse_existing(options.out, options.overwrite)
    checkpoint = open_checkpoint(options.path)
    spec = spec_for(checkpoint.config)
    _check_source(checkpoint, spec)
    if options.output and spec.tied:
        what = "was given, and the model's head is its embedding, which has no importance matrix"
        raise InputError("--output", what, "a model with a head of its own")
    seq_len = _seq_len(options, spec)
    started = time.monotonic()
    with fs.lock(options.out.with_name(f"{options.out.name}.lock")):
        imatrix, calibration, bos = _gather(options, checkpoint, spec, seq_len, progress)
        raw = ENCODE[form](imatrix)
        _refuse_existing(options.out, options.overwrite)
        fs.write_bytes(options.out, raw)
    return _report(options, form, imatrix, calibration, bos, len(raw), time.monotonic() - started)


def _form(options: ImatrixOptions) -> str:
    if options.format is None:
        return DAT if options.out.suffix == f".{DAT}" else GGUF
    if options.format not in ENCODE:
        raise InputError("--format", f"{options.format!r:.100} is unknown", f"{GGUF}, or {DAT} for old readers")
    return options.format


def _refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise InputError when ``out`` is there; with ``overwrite`` only when it is no importance matrix: a slip must not cost a model."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InputError(str(out), "exists", "a path that does not exist", "--overwrite replaces it")
    expected = "an importance matrix, or a new path"
    if out.is_symlink() or not out.is_file():
        raise InputError(str(out), "cannot be overwritten: it is no file", expected)
    try:
        read_imatrix(out)
    except InputError as exc:
        raise InputError(str(out), "cannot be overwritten: it is no importance matrix", expected, "remove it first") from exc


def _check_source(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raise InputError for a model with a gap: the capture would run up to it."""
    expected = expected_tensors(spec, stored_assignment(checkpoint.config, spec, checkpoint.tensors))
    for defect in tensor_defects(spec, checkpoint.tensors, expected, checkpoint.dtype):
        raise InputError(defect.where, defect.what, defect.expected)


def _seq_len(options: ImatrixOptions, spec: ModelSpec) -> int:
    if options.seq_len is None:
        return min(DEFAULT_SEQ_LEN, spec.max_positions)
    if not 2 <= options.seq_len <= spec.max_positions:
        raise InputError("--seq-len", f"is {options.seq_len}", f"2 to {spec.max_positions}, the positions of the model")
    return options.seq_len


def _compute_dtype(name: str, device: str, stored: str) -> torch.dtype:
    """The dtype of the forward passes: float32 on a CPU, on a GPU that in which a 16-bit model is stored."""
    from quantkit.ops.dtypes import TORCH_DTYPES
    from quantkit.ops.dtypes import float_dtype as named

    if name != "auto":
        return named(name, "--compute-dtype")
    return TORCH_DTYPES[stored if device != "cpu" and stored in ("BF16", "F16") else "F32"]


def _tokens(
    options: ImatrixOptions, checkpoint: Checkpoint, tokenizer: Tokenizer, seq_len: int, device: str, progress: Progress
) -> CalibrationTokens:
    from quantkit.quantizers.calibration import text_tokens
    from quantkit.quantizers.self_calibration import sampled_tokens

    if options.calib == "self":
        return sampled_tokens(checkpoint, tokenizer, options.samples, seq_len, progress, device)
    return text_tokens(tokenizer, options.calib, options.samples, seq_len)


def _gather(
    options: ImatrixOptions, checkpoint: Checkpoint, spec: ModelSpec, seq_len: int, progress: Progress
) -> tuple[Imatrix, CalibrationTokens, bool]:
    """The matrix, the tokens that it comes from, and whether every window begins with BOS."""
    from quantkit.quantizers.calibration import in_file, window_bos
    from quantkit.quantizers.imatrix import captured
    from quantkit.quantizers.pipeline import Source
    from quantkit.runtime.devices import place_for
    from quantkit.text.tokenizer import load_tokenizer

    device = place_for(options.device, 1)
    dtype = _compute_dtype(options.compute_dtype, device, float_dtype(checkpoint, spec))
    tokenizer = load_tokenizer(checkpoint.root)
    calibration = _tokens(options, checkpoint, tokenizer, seq_len, device, progress)
    scratch = options.out.with_name(f".{options.out.name}.activations")

    def place(hidden: Tensor) -> Tensor:
        if options.offload:
            return in_file(scratch, hidden)
        return hidden if device == "cpu" else hidden.pin_memory()

    source = Source(checkpoint, spec, GGUF_DTYPE, dtype, (device,))
    try:
        imatrix = captured(source, calibration, output=options.output, offload=place, progress=progress)
    finally:
        if options.offload:
            fs.remove_file(scratch)
    return imatrix, calibration, window_bos(tokenizer) is not None


def _unreached(imatrix: Imatrix) -> dict[str, int]:
    """Tensor -> how many of its matrices (experts) no token reached, where there are any."""
    found = {name: int((entry.counts == 0).sum()) for name, entry in imatrix.entries.items()}
    return {name: count for name, count in found.items() if count}


def _warnings(options: ImatrixOptions, form: str, imatrix: Imatrix, unreached: Mapping[str, int]) -> tuple[str, ...]:
    warnings = []
    if options.calib == "builtin":
        warnings.append("gathered on the built-in English text; text of your own domain is better (--calib FILE)")
    if unreached:
        total = sum(imatrix.entries[name].counts.size for name in unreached)
        what = f"no token reached {sum(unreached.values())} of {total} experts' matrices in {len(unreached)} tensors"
        warnings.append(f"{what}: all their columns count alike; more --samples helps")
    silent_ones = [name for name, count in unreached.items() if count == imatrix.entries[name].counts.size]
    if form == DAT and silent_ones:
        warnings.append(f"{len(silent_ones)} tensors that no token reached are left out: a .dat file cannot say so")
    return tuple(warnings)


def _report(
    options: ImatrixOptions, form: str, imatrix: Imatrix, calibration: CalibrationTokens, bos: bool, nbytes: int, seconds: float
) -> Report:
    samples, length = calibration.tokens.shape
    unreached = _unreached(imatrix)
    warnings = _warnings(options, form, imatrix, unreached)
    data: dict[str, Any] = {
        "out": str(options.out),
        "format": form,
        "entries": len(imatrix.entries),
        "chunks": samples,
        "chunk_size": length,
        "calibration": {"source": calibration.source, "tokens_sha256": calibration.digest, "shape": [samples, length], "bos": bos},
        "unreached": dict(sorted(unreached.items())),
        "bytes": nbytes,
        "seconds": seconds,
        "warnings": list(warnings),
    }
    begun = ", each begun with BOS" if bos and options.calib != "self" else ""
    facts = (
        ("calibration", f"{calibration.source}, {samples} windows of {length} tokens{begun}"),
        ("entries", f"{len(imatrix.entries)} tensors"),
        ("written", f"{options.out}, {nbytes / 1e6:.2f} MB of {form}"),
        ("time", f"{seconds:.1f} s"),
    )
    step = next_step("quantize", options.path, "OUT.gguf", "--method", "gguf", "--imatrix", options.out)
    return Report(command="imatrix", data=data, facts=facts, warnings=warnings, next_steps=(step,))
