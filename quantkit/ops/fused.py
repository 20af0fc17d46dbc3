"""The small operations between two products, each one kernel on a GPU: SiLU times up, RMS norm after a residual, rotary into the KV cache.

Torch operators ``quantkit::...``, each with a reference in torch (what a CPU runs), a kernel of ``kernels/fusions`` for float16 and
bfloat16, and a fake, so that CUDA graphs and torch.compile take them. The kernels round where the reference rounds; only the order of a
norm's sum differs. Letters as in ARCHITECTURE.md; W the rotated elements of a head.

The operators are defined through ``Library`` and not through ``custom_op``, whose wrappers cost 5 µs more on each call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quantkit.errors import MachineError
from quantkit.ops.cuda_call import call
from quantkit.ops.cuda_library import find_library, load_library

_TYPES = {torch.float16: 0, torch.bfloat16: 1}
_FLOAT8, _FLOAT8_MAX = torch.float8_e4m3fn, 448.0
_P, _I64, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "silu_mul": (_P, _I64, _P, _I64, _P, _I64, _I64, _I, _P),
    "rms_norm": (_P, _P, _P, _P, _P, _I64, _I64, _F, _F, _I, _P),
    "rotary_write": (_P, _I64, _P, _I64, _P, _I64, *(_P,) * 6, _I64, _I, _I, _I, _I, _I, _I, _P),
}


@cache
def _functions() -> dict[str, Any] | None:
    """The kernels by name; None where they are not built, or where the library is of other sources."""
    if find_library() is None:
        return None
    library = load_library()
    try:
        found = {name: getattr(library, f"quantkit_{name}") for name in _ARGUMENTS}
    except AttributeError:
        return None
    for name, function in found.items():
        function.argtypes, function.restype = _ARGUMENTS[name], ctypes.c_int
    return found


@cache
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def usable(x: Tensor) -> bool:
    """Whether the kernels take tensors like ``x``: on a GPU of compute capability 8.0 or later, of a 16-bit dtype, and built."""
    return x.is_cuda and x.dtype in _TYPES and _functions() is not None and _capable(x.device)


def _launch(name: str, device: torch.device, *arguments: Any) -> None:
    functions = _functions()
    if functions is None:
        raise MachineError(
            "CUDA kernels", f"lack quantkit_{name}", "a library of this version of quantkit", "quantkit doctor --build-kernels"
        )
    if code := call(functions[name], device, *arguments):
        raise MachineError(f"quantkit_{name} on {device}", f"the kernel did not start (error {code})", "a GPU that it was built for")


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``: two ``[T, F]`` -> ``[T, F]``."""
    return functional.silu(gate) * up


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """``x / rms(x) * (offset + weight)``, the division in float32: ``x [..., D]``, ``weight [D]``. Source: Zhang and Sennrich 2019.

    Without an offset the quotient is cast before it is multiplied, with one after (as Llama and Gemma do).
    """
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if not offset:
        return weight * wide.to(x.dtype)
    return (wide * (offset + weight.to(torch.float32))).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """``x + residual``, and its ``rms_norm``."""
    total = x + residual
    return total, rms_norm_reference(total, weight, eps, offset)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs ``(i, i + W/2)`` of the first W elements of every head of ``x [T, heads, D]`` by ``cos``, ``sin [T, 1, W/2]``."""
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), -1)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def rotary_write_reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """``rotate(q)``, and ``rotate(k)`` and ``v`` written to the places that ``slots`` names: ``q [T, H, D]``, ``k``, ``v [T, KV, D]``.

    ``cos``, ``sin [T, W / 2]`` (or ``[T, 1, W / 2]``). ``slots [T]`` int64: a negative one writes nothing, of several alike any does.
    ``keys``, ``values [places, KV, D]`` of q's dtype, or float8 e4m3 of scale 1, in which values beyond 448 become 448. Returns
    ``[T, H, D]``.
    """
    cos, sin = (x.flatten(1).unsqueeze(1) for x in (cos, sin))
    kept = slots >= 0
    for store, x in ((keys, rotate(k, cos, sin)), (values, v)):
        rows = x[kept]
        if store.dtype == _FLOAT8:  # torch's cast alone makes NaN of what is larger, and index_copy_ knows no float8
            rows = rows.clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(_FLOAT8).view(torch.uint8)
        store.view(rows.dtype).index_copy_(0, slots[kept], rows)
    return rotate(q, cos, sin)


def _rows(x: Tensor) -> Tensor:
    """``x`` with the elements of a row beside each other; rows may be apart, as those of half a product are."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _heads(x: Tensor) -> Tensor:
    """``x [T, heads, D]`` with the elements of a token beside each other."""
    return x if x.stride(-1) == 1 and (x.stride(-2) == x.shape[-1] or x.shape[-2] <= 1) else x.contiguous()


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    gate, up = _rows(gate), _rows(up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    rows, columns = gate.shape
    strides = (gate.stride(0), up.stride(0))
    pointers = (gate.data_ptr(), strides[0], up.data_ptr(), strides[1], out.data_ptr())
    _launch("silu_mul", gate.device, *pointers, rows, columns, _TYPES[gate.dtype])
    return out


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    assert weight.dtype == x.dtype and weight.shape == x.shape[-1:]
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    total = x
    if residual is not None:
        _check(x, residual)
        residual, total = residual.contiguous(), torch.empty_like(x)
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    added = (None, None) if residual is None else (residual.data_ptr(), total.data_ptr())
    pointers = (x.data_ptr(), added[0], weight.data_ptr(), added[1], out.data_ptr())
    _launch("rms_norm", x.device, *pointers, rows, columns, eps, offset, _TYPES[x.dtype])
    return total, out


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return _norm(x, None, weight, eps, offset)[1]


def _rotary_write(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    q, k, v, cos, sin, slots = _heads(q), _heads(k), _heads(v), cos.contiguous(), sin.contiguous(), slots.contiguous()
    tokens, heads, dim = q.shape
    kv_heads, half = k.shape[1], cos.shape[-1]
    assert slots.dtype == torch.int64 and slots.shape == (tokens,) and cos.numel() == sin.numel() == tokens * half, (slots.shape, cos.shape)
    assert k.shape == v.shape == (tokens, kv_heads, dim) and keys.shape == values.shape and keys.shape[1:] == (kv_heads, dim), keys.shape
    assert keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype and keys.dtype in (q.dtype, _FLOAT8), keys.dtype
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    given = [x for each in (q, k, v) for x in (each.data_ptr(), each.stride(0))]
    pointers = [each.data_ptr() for each in (cos, sin, slots, out, keys, values)]
    shape = (tokens, heads, kv_heads, dim, 2 * half, _TYPES[q.dtype], keys.dtype == _FLOAT8)
    _launch("rotary_write", q.device, *given, *pointers, *shape)
    return out


def _check(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape and one.dtype == other.dtype and one.device == other.device, (one.shape, other.shape)


_Implementation = Callable[..., Any]
_SLOTS = "Tensor slots, Tensor(a!) keys, Tensor(b!) values"
_OPERATORS: tuple[tuple[str, _Implementation, _Implementation, _Implementation], ...] = (
    (
        "silu_mul(Tensor gate, Tensor up) -> Tensor",
        silu_mul_reference,
        _silu_mul,
        lambda gate, up: torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
    ),
    (
        "rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor",
        rms_norm_reference,
        _rms_norm,
        lambda x, weight, eps, offset: torch.empty_like(x),
    ),
    (
        "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
        add_rms_norm_reference,
        _norm,
        lambda x, residual, weight, eps, offset: (torch.empty_like(x), torch.empty_like(x)),
    ),
    (
        f"rotary_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, {_SLOTS}) -> Tensor",
        rotary_write_reference,
        _rotary_write,
        lambda q, k, v, cos, sin, slots, keys, values: torch.empty(q.shape, dtype=q.dtype, device=q.device),
    ),
)
"""Schema, reference, kernel and fake of each operator."""

_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Holds the operators for as long as this module lives."""
for _schema, _reference, _kernel, _fake in _OPERATORS:
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _reference, "CPU")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _kernel, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"quantkit::{_name}", _fake, lib=_LIBRARY)

silu_mul = torch.ops.quantkit.silu_mul.default
rms_norm = torch.ops.quantkit.rms_norm.default
add_rms_norm = torch.ops.quantkit.add_rms_norm.default
rotary_write = torch.ops.quantkit.rotary_write.default
