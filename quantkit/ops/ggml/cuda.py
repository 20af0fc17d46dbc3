"""``encode`` on a GPU: float32 rows to ggml's blocks, the same bytes.

The kernels are in ``kernels/ggml``; here are the checks and the call.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import InputError, MachineError
from quantkit.ops.cuda_library import HINT, find_library, load_library
from quantkit.ops.ggml.encode import BLOCKS, Bytes, Floats, RowRefused

_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (ctypes.c_char_p, _POINTER, _COUNT, _COUNT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER)


def available() -> bool:
    """Whether the kernels are built. Raises MachineError when ``QUANTKIT_KERNELS`` names no file."""
    return find_library() is not None


def launch(values: Tensor, kind: str, importance: Tensor | None, spreads: Tensor | None, out: Tensor, flags: Tensor) -> None:
    """Start the kernels of a checked call on the current stream of the values' GPU; nothing is waited for.

    ``spreads``: float32 [rows], scratch, given with ``importance``. ``flags``: int64 [2], both at least the number of rows; they get the
    first row with a value that is not finite, and the first with a scale that does not fit in float16. Raises MachineError.
    """
    library = load_library()
    try:
        encode, message = library.quantkit_ggml_encode, library.quantkit_ggml_error
    except AttributeError as error:
        raise MachineError("CUDA kernels", f"lack a function ({error})", "a library of this version of quantkit", HINT) from error
    encode.argtypes, encode.restype = _ARGUMENTS, ctypes.c_int
    message.argtypes, message.restype = (ctypes.c_int,), ctypes.c_char_p
    rows, columns = values.shape
    weights, scratch = (None if each is None else each.data_ptr() for each in (importance, spreads))
    with torch.cuda.device(values.device):
        stream = torch.cuda.current_stream().cuda_stream
        code = encode(kind.encode(), values.data_ptr(), rows, columns, weights, scratch, out.data_ptr(), flags.data_ptr(), stream)
    if code:
        reason = message(code).decode(errors="replace")
        raise MachineError(
            f"{kind} on {values.device}", f"the kernel did not start ({reason})", "a GPU that the kernels were built for", HINT
        )


def encode_cuda(values: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """Encode a matrix by rows, as ``encode`` does; give several GB in chunks of rows.

    ``values``: float32 [rows, columns] on a GPU, contiguous, finite. ``kind``: a key of ``BLOCKS``. ``importance``: float32 [columns] on
    the same GPU, finite and not negative. Returns uint8 [rows, columns // elements * bytes] there, finished; no other memory of the values'
    size is taken. Raises ``InputError`` and ``RowRefused`` as ``encode``; ``MachineError`` when the kernels are not built or do not run.
    """
    if kind not in BLOCKS:
        raise InputError(kind, "unknown block type", f"one of {', '.join(BLOCKS)}")
    elements, size = BLOCKS[kind]
    where = f"{kind} values"
    if values.ndim != 2 or values.dtype != torch.float32 or not values.is_contiguous():
        raise InputError(where, _described(values), "a C-contiguous float32 matrix")
    if values.device.type != "cuda":
        raise InputError(where, f"on {values.device}", "values on a GPU")
    rows, columns = values.shape
    if columns % elements:
        raise InputError(where, f"{columns} columns", f"a multiple of {elements}")
    flags = torch.full((3,), rows, dtype=torch.int64, device=values.device)  # first row not finite, first too large, bad importance
    spreads = None
    if importance is not None:
        if importance.shape != (columns,) or importance.dtype != torch.float32 or importance.device != values.device:
            expected = f"float32 of shape ({columns},) on {values.device}"
            raise InputError("importance", f"{_described(importance)} on {importance.device}", expected)
        importance = importance.contiguous()
        flags[2] = (torch.isfinite(importance) & (importance >= 0)).all()
        spreads = torch.empty(rows, dtype=torch.float32, device=values.device)
    out = torch.empty((rows, columns // elements * size), dtype=torch.uint8, device=values.device)
    if out.numel():
        launch(values, kind, importance, spreads, out, flags)
    not_finite, infinite, fine = flags.tolist()
    if importance is not None and not fine:
        raise InputError("importance", "has a value that is negative or not finite", "finite values, 0 or more")
    if not_finite < rows:
        raise RowRefused(where, not_finite, finite=False)
    if infinite < rows:
        raise RowRefused(where, infinite, finite=True)
    return out


def encode_staged(values: Floats, kind: str, importance: Floats | None = None) -> Bytes:
    """``encode`` by the GPU, for values in the processor's memory; any number of threads may call at once.

    Each call works on a stream of its own and copies by way of page-locked memory, so that the copies of one thread go on beside the
    kernels of another. torch keeps both for the calls to come: GPU memory for up to 32 calls of this size, the streams that it has.
    Arguments, result and errors are those of ``encode`` and ``encode_cuda``.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        weights = None if importance is None else _sent(importance, stream.device)
        found = encode_cuda(_sent(values, stream.device), kind, weights)
        out = torch.empty(found.shape, dtype=torch.uint8, pin_memory=True)
        out.copy_(found, non_blocking=True)
        stream.synchronize()
    return out.numpy()


def _sent(array: Floats, device: torch.device) -> Tensor:
    """A copy on the GPU, which the current stream makes; torch gives the staging memory to no other before that is done."""
    staged = torch.empty(array.shape, dtype=torch.float32, pin_memory=True)
    np.copyto(staged.numpy(), array, casting="no")
    return staged.to(device, non_blocking=True)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
