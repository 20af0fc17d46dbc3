"""Where a model runs and in which dtype, as far as the user leaves it open."""

from __future__ import annotations

import torch

from quantkit.errors import InputError, MachineError

DEVICES = ("auto", "cpu", "cuda")


def place_for(device: str, gpus: int = 1) -> str:
    """ "cpu" or "cuda". Raises InputError for another word, MachineError when cuda is meant and there are fewer than ``gpus``."""
    if device not in DEVICES:
        raise InputError("--device", f"is {device!r}", f"one of {', '.join(DEVICES)}")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < gpus:
        raise MachineError(
            "--device cuda", f"{count} of {gpus} GPUs are here", "a GPU for each rank", f"--tp {count}" if count else "--device cpu"
        )
    return "cuda"


def default_dtype(device: str, parity: bool) -> str:
    """What activations are computed in where nobody says: bfloat16, or float16 on a GPU here without it; float32 with ``parity``."""
    if parity:
        return "float32"
    ours = device == "cuda" and torch.cuda.is_available()  # of another host's nothing is known
    return "float16" if ours and not torch.cuda.is_bf16_supported(including_emulation=False) else "bfloat16"
