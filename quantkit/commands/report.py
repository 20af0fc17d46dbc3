"""``quantkit report``: what an artifact costs in quality and saves in memory, against its base; and the gate for CI."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import fs
from quantkit.arch.table import spec_for
from quantkit.checkpoint.blocks import as_blocks
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_manifest
from quantkit.errors import InputError
from quantkit.formats.jsonfile import read_object
from quantkit.progress import Progress, silent
from quantkit.quant_config import is_kept, stored_assignment
from quantkit.report import Report, Table, to_markdown
from quantkit.text.builtin import builtin_text

if TYPE_CHECKING:
    from quantkit.evaluate.divergence import Divergence
    from quantkit.model.decoder import Decoder

MAX_BASELINE_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """Options of ``quantkit report``. ``text`` None is the built-in held-out text; ``tokens`` None is all of it."""

    base: str
    artifacts: tuple[str, ...]
    out: Path | None = None
    text: Path | None = None
    window: int = 1024
    stride: int | None = None
    tokens: int | None = None
    baseline: Path | None = None
    max_ppl_increase: float | None = None
    """As a fraction: 0.05 is 5 %."""
    max_memory: int | None = None
    """Bytes of weights in process, for every artifact."""
    dtype: str = "float32"
    """In which perplexity is computed; speed and memory are always measured in bfloat16, as served."""
    device: str = "auto"
    kld: bool = False
    """Compare the predictions of every artifact with the base's, both in memory at once."""
    max_kld: float | None = None
    """Nats, for every artifact."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One model's figures."""

    path: str
    method: str
    disk_bytes: int
    memory_bytes: int
    ms_per_token: float
    ppl: float
    ppl_error: float
    convention: str
    divergence: Divergence | None = None


def _label(checkpoint: Checkpoint) -> str:
    """What made the model, in words: the method of its manifest (rounding is written in AWQ's format too), bits and group."""
    quant = checkpoint.config.get("quantization_config")
    if not isinstance(quant, dict):
        return "GGUF" if checkpoint.kind == "gguf" else "unquantized"
    manifest = read_manifest(checkpoint.root) or {}
    name = str(manifest.get("method") or quant.get("quant_method"))
    spec = spec_for(checkpoint.config)
    schemes = [s for s in stored_assignment(checkpoint.config, spec, checkpoint.tensors).values() if not is_kept(s)]
    if not schemes:
        return name
    if all(s.layout == "ggml" for s in schemes):
        return f"GGUF {'/'.join(sorted({s.code for s in schemes}))}"
    bits, groups = sorted({s.bits for s in schemes}), sorted({s.group_size for s in schemes})
    shown = "/".join("row" if g == -1 else str(g) for g in groups)
    return f"{name} {'/'.join(map(str, bits))}-bit g{shown}"


def _disk_bytes(checkpoint: Checkpoint) -> int:
    return sum(path.stat().st_size for path in {ref.file for ref in checkpoint.tensors.values()})


def _decode_speed(checkpoint: Checkpoint, prompt: Sequence[int], device: str, steps: int = 16) -> tuple[int, float]:
    """Bytes of weights as served (bfloat16), and the median milliseconds of one decoded token after ``prompt``."""
    import torch

    from quantkit.model.decoder import Batch
    from quantkit.model.load import load_decoder
    from quantkit.runtime.kv_cache import whole_cache

    decoder = load_decoder(checkpoint, dtype=torch.bfloat16, device=device)
    cache = whole_cache(decoder, len(prompt) + steps)
    times = []
    with torch.inference_mode():
        decoder.forward(torch.tensor(list(prompt)), Batch(torch.arange(len(prompt)), (len(prompt),), (0,)), cache)
        token = torch.tensor([prompt[-1]])
        for step in range(steps):
            start = time.perf_counter()
            hidden = decoder.forward(token, Batch(torch.tensor([len(prompt) + step]), (1,), (0,)), cache)
            token = decoder.logits(hidden).argmax(-1).cpu()
            times.append(time.perf_counter() - start)
    return decoder.nbytes, 1000 * sorted(times)[steps // 2]


def _measure(path: str, text: str, options: ReportOptions, device: str, base: Decoder | None, progress: Progress) -> Measured:
    """One model's figures, with ``base`` those of its divergence from that."""
    from quantkit.evaluate.divergence import divergence
    from quantkit.evaluate.perplexity import perplexity
    from quantkit.quantizers.calibration import window_bos
    from quantkit.text.tokenizer import load_tokenizer

    checkpoint = as_blocks(open_checkpoint(path))
    spec = spec_for(checkpoint.config)
    tokenizer = load_tokenizer(checkpoint.root)
    ids = tokenizer.encode(text, special=False)[: options.tokens]
    window = min(options.window, spec.max_positions)
    stride, bos = min(options.stride or window, window), window_bos(tokenizer)
    decoder = _decoder(path, options, device)
    distance = None
    if base is None:
        stage = f"perplexity of {Path(path).name}"
        result = perplexity(decoder, ids, window=window, stride=stride, bos=bos, progress=progress, stage=stage)
    else:
        stage = f"divergence of {Path(path).name}"
        distance = divergence(base, decoder, ids, window=window, stride=stride, bos=bos, progress=progress, stage=stage)
        result = distance.perplexity
    del decoder
    memory, speed = _decode_speed(checkpoint, ids[:64], device)
    return Measured(
        path,
        _label(checkpoint),
        _disk_bytes(checkpoint),
        memory,
        speed,
        result.value,
        result.error,
        f"{options.dtype}, {result.convention}",
        distance,
    )


def _decoder(path: str, options: ReportOptions, device: str) -> Decoder:
    """A model as its quality is measured: in ``options.dtype``, each weight as it dequantizes."""
    from quantkit.model.load import load_decoder
    from quantkit.ops.dtypes import float_dtype

    return load_decoder(as_blocks(open_checkpoint(path)), dtype=float_dtype(options.dtype), device=device, parity=True)


def _text(options: ReportOptions) -> tuple[str, str]:
    from quantkit.quantizers.calibration import read_text

    if options.text is None:
        return builtin_text("held-out"), "built-in held-out text"
    return read_text(options.text), options.text.name


def _baseline(options: ReportOptions) -> dict[str, float]:
    """Perplexity by method of an earlier ``report.json``. Raises InputError unless it has the method of every artifact."""
    assert options.baseline is not None
    data = read_object(options.baseline, MAX_BASELINE_BYTES, "a report.json")
    try:
        found = {str(model["method"]): float(model["ppl"]) for model in data["models"]}
    except (ValueError, KeyError, TypeError) as exc:
        raise InputError(str(options.baseline), "is not a quantkit report", "the report.json of an earlier run") from exc
    for method, ppl in found.items():
        if not 1 <= ppl < math.inf:  # a perplexity that no model has would let every artifact through, or none
            raise InputError(str(options.baseline), f"says that the perplexity of {method!r:.100} is {ppl}", "a number from 1 on")
    for artifact in options.artifacts:
        method = _label(as_blocks(open_checkpoint(artifact)))
        if method not in found:
            raise InputError(
                str(options.baseline), f"has no {method}, as {artifact} is", f"one of {', '.join(found)}" if found else "a report of it"
            )
    return found


def _gate(options: ReportOptions, models: Sequence[Measured], reference: Mapping[str, float] | None) -> list[str]:
    """Why the gate says no: one line for each model and limit that it crosses. ``reference`` replaces the base's perplexity."""
    failures = []
    for model in models[1:]:
        base = models[0].ppl if reference is None else reference[model.method]
        increase, limit = model.ppl / base - 1, options.max_ppl_increase
        if limit is not None and not increase <= limit:
            failures.append(
                f"{model.path}: perplexity {model.ppl:.3f} is {increase:+.2%} from {base:.3f}, expected at most +{100 * limit:g}%"
            )
        if options.max_memory is not None and model.memory_bytes > options.max_memory:
            failures.append(f"{model.path}: {model.memory_bytes} bytes of weights in memory, expected at most {options.max_memory}")
        far = model.divergence
        if options.max_kld is not None and far is not None and not far.mean <= options.max_kld:
            failures.append(f"{model.path}: a mean KL divergence of {far.mean:.4f}, expected at most {options.max_kld:g}")
    return failures


def _divergence_data(model: Measured) -> dict[str, Any]:
    found = model.divergence
    if found is None:
        return {}
    names = ("mean", "error", "median", "p99", "p999", "maximum", "rms_change", "same_top")
    values = {name: float(getattr(found, name)) for name in names}
    return {"kld": {name: value if math.isfinite(value) else None for name, value in values.items()}}


def _divergence_table(models: Sequence[Measured]) -> tuple[Table, ...]:
    """How far each artifact's predictions are from the base's."""
    rows = tuple(
        (
            Path(m.path).name,
            f"{far.mean:.5f} ± {far.error:.5f}",
            *(f"{value:.4f}" for value in (far.median, far.p99, far.p999, far.maximum)),
            f"{far.rms_change:.2%}",
            f"{far.same_top:.2%}",
        )
        for m in models
        if (far := m.divergence) is not None
    )
    columns = ("model", "mean KL", "median", "99 %", "99.9 %", "greatest", "RMS change of p", "same top token")
    return (Table("Divergence from the base, in nats", columns, rows),) if rows else ()


def run(options: ReportOptions, progress: Progress = silent) -> Report:
    """Measure base and artifacts on the same text, write ``report.json`` and ``report.md`` when ``out`` is given, apply the gates."""
    from quantkit.runtime.devices import place_for

    device = place_for(options.device, 1)
    text, source = _text(options)
    reference = _baseline(options) if options.baseline else None
    for path in (options.base, *options.artifacts):
        open_checkpoint(path)  # a slip in the last of them must not cost the measuring of the first
    base = _measure(options.base, text, options, device, None, progress)
    reference_model = _decoder(options.base, options, device) if options.kld or options.max_kld is not None else None
    models = [base, *(_measure(path, text, options, device, reference_model, progress) for path in options.artifacts)]
    rows = tuple(
        (
            Path(m.path).name,
            m.method,
            f"{m.disk_bytes / 1e6:.1f}",
            f"{m.memory_bytes / 1e6:.1f}",
            f"{m.ms_per_token:.1f}",
            f"{m.ppl:.3f} ± {m.ppl_error:.3f}",
            "" if m is base else f"{m.ppl / base.ppl - 1:+.2%}",
        )
        for m in models
    )
    failures = _gate(options, models, reference)
    data: dict[str, Any] = {
        "text": source,
        "convention": base.convention,
        "models": [
            {
                "path": Path(m.path).name,
                "method": m.method,
                "disk_bytes": m.disk_bytes,
                "memory_bytes": m.memory_bytes,
                "ms_per_token": round(m.ms_per_token, 3),
                "ppl": m.ppl if math.isfinite(m.ppl) else None,
                "ppl_error": m.ppl_error if math.isfinite(m.ppl_error) else None,
                **_divergence_data(m),
            }
            for m in models
        ],
        "failures": failures,
    }
    written = [] if options.out is None else [str(options.out / "report.json"), str(options.out / "report.md")]
    report = Report(
        command="report",
        data=data,
        facts=(
            ("text", source),
            ("perplexity", base.convention),
            ("memory and speed", f"weights as served in bfloat16; decoding one sequence on {device}"),
            *((("written", ", ".join(written)),) if written else ()),
        ),
        tables=(
            Table("Memory and perplexity", ("model", "method", "disk MB", "memory MB", "ms/token", "perplexity", "increase"), rows),
            *_divergence_table(models),
        ),
        failed="; ".join(failures) or None,
    )
    if options.out is not None:
        fs.make_dir(options.out)
        fs.write_bytes(options.out / "report.json", (json.dumps(data, indent=2, sort_keys=True) + "\n").encode())
        fs.write_bytes(options.out / "report.md", to_markdown(report).encode())
    return report
