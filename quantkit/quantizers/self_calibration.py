"""Calibration text from the model itself: sampled from it at temperature 1, always the same for the same model.

What a model says of its own accord reaches the channels that its training used, without any data of the user's
(Liu et al. 2023, LLM-QAT, arXiv 2305.17888, section 3.1). The whole model is in memory while it speaks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import InputError
from quantkit.model.decoder import Batch, Decoder
from quantkit.model.load import load_decoder
from quantkit.progress import Progress
from quantkit.quantizers.calibration import CalibrationTokens, window_bos
from quantkit.runtime.kv_cache import whole_cache
from quantkit.text.builtin import builtin_text
from quantkit.text.tokenizer import Tokenizer

SEED = 0
SEQUENCES = 32
"""Sequences that are sampled side by side: their KV cache is what bounds the number."""


def start_tokens(tokenizer: Tokenizer, spec: ModelSpec, samples: int) -> Tensor:
    """The first token of each sample, [samples]: BOS where the tokenizer puts one, else different tokens of English text.

    Raises InputError when the model has no row for any of them.
    """
    bos = window_bos(tokenizer)
    if bos is not None and bos < spec.dims["vocab"].size:
        return torch.full((samples,), bos, dtype=torch.int64)
    ids = {token for token in tokenizer.encode(builtin_text("calibration"), special=False) if token < spec.dims["vocab"].size}
    known = torch.tensor(sorted(ids - set(silent_tokens(tokenizer, spec))), dtype=torch.int64)
    if not known.numel():
        raise InputError("--calib self", "the tokenizer shares no token with the model", "a tokenizer of this model")
    order = torch.randperm(known.numel(), generator=torch.Generator().manual_seed(SEED))
    return known[order[torch.arange(samples) % known.numel()]]


def silent_tokens(tokenizer: Tokenizer, spec: ModelSpec) -> list[int]:
    """Tokens that are never sampled: those that end a text, since a window is filled to its end, and rows without a token."""
    vocab = spec.dims["vocab"].size
    ends = {token for token in (*tokenizer.eos_ids, *spec.eos_ids) if 0 <= token < vocab}
    return sorted(ends | set(range(tokenizer.vocab_size, vocab)))


@torch.inference_mode()
def _continue(decoder: Decoder, starts: Tensor, seq_len: int, silent: Sequence[int], generator: torch.Generator) -> Tensor:
    """Sample a sequence from each of ``starts [B]``: [B, seq_len], the start first."""
    count = starts.shape[0]
    cache = whole_cache(decoder, seq_len, count)
    out = torch.empty(count, seq_len, dtype=torch.int64)
    out[:, 0] = token = starts
    banned = torch.tensor(silent, dtype=torch.int64)
    for step in range(1, seq_len):
        batch = Batch(torch.full((count,), step - 1), (1,) * count, tuple(range(count)))
        logits = decoder.logits(decoder.forward(token, batch, cache)).float().cpu()  # [B, V]
        if not torch.isfinite(logits).all():
            raise InputError("--calib self", "the model's logits are not finite", "a model that runs", "give a text file: --calib FILE")
        logits[:, banned] = -torch.inf
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        out[:, step] = token
    return out


def sampled_tokens(
    checkpoint: Checkpoint, tokenizer: Tokenizer, samples: int, seq_len: int, progress: Progress, device: str = "cpu"
) -> CalibrationTokens:
    """``samples`` windows of ``seq_len`` tokens that the model says at temperature 1, with a fixed seed.

    The model runs in bfloat16 where it is stored in 16 bits, else in float32. Raises InputError for a window that is
    longer than the model's positions, and for a model whose logits are not finite.
    """
    spec = spec_for(checkpoint.config)
    if not 2 <= seq_len <= spec.max_positions:
        raise InputError("--seq-len", f"is {seq_len}", f"2 to {spec.max_positions}, the positions of the model")
    name = f"{spec.architecture.embedding}.weight"
    stored = checkpoint.dtype(name) if name in checkpoint.tensors else "BF16"  # a packed embedding has no dtype of its own
    decoder = load_decoder(checkpoint, dtype=torch.bfloat16 if stored in ("BF16", "F16") else torch.float32, device=device)
    starts, silent = start_tokens(tokenizer, spec, samples), silent_tokens(tokenizer, spec)
    generator = torch.Generator().manual_seed(SEED)
    windows = []
    for first in range(0, samples, SEQUENCES):
        progress("sample", first, samples)
        windows.append(_continue(decoder, starts[first : first + SEQUENCES], seq_len, silent, generator))
    progress("sample", samples, samples)
    return CalibrationTokens(torch.cat(windows), "self")
