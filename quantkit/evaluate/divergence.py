"""How far the predictions of one model are from those of another over a text: Kullback-Leibler divergence and its company.

The figures are those that llama.cpp prints for a quantized model (``gguf.md`` 7). Knows two decoders and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.evaluate.perplexity import LikelihoodSums, Perplexity, groups_of, scored_logits, windows_of
from quantkit.model.decoder import Decoder
from quantkit.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(base || model) in nats over scored positions: mean with its standard error, quantiles, greatest; and what became of the
    probabilities: ``rms_change`` of that of the true token, and in which share of positions both hold the same token for likeliest."""

    mean: float
    error: float
    median: float
    p99: float
    p999: float
    maximum: float
    rms_change: float
    same_top: float
    perplexity: Perplexity
    """Of the model, not the base."""


@torch.inference_mode()
def divergence(
    base: Decoder,
    model: Decoder,
    ids: Sequence[int],
    *,
    window: int,
    stride: int,
    bos: int | None = None,
    progress: Progress = silent,
    stage: str = "divergence",
) -> Divergence:
    """Both models over the windows that ``perplexity`` makes of ``ids``, side by side. Raises InputError as it does, and for models of
    other vocabularies."""
    windows = windows_of(ids, window, stride, bos)
    sums, found, done = LikelihoodSums(), list[Tensor](), 0
    changes, same = 0.0, 0
    for group in groups_of(windows, window):
        progress(stage, done, len(windows))
        for (reference, _), (logits, wanted) in zip(scored_logits(base, group), scored_logits(model, group), strict=True):
            if reference.shape != logits.shape:
                raise InputError("report", f"a vocabulary of {logits.shape[1]}, and {reference.shape[1]} of the base", "the same tokens")
            log_p, log_q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
            found.append((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).clamp_min(0).cpu())
            true_p, true_q = (of.gather(1, wanted[:, None])[:, 0] for of in (log_p, log_q))
            sums.add(-true_q)
            changes += float((true_q.double().exp() - true_p.double().exp()).square().sum())
            same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        done += len(group)
    progress(stage, done, len(windows))
    figures = sums.perplexity(len(ids), window, stride, bos is not None)
    values = torch.cat(found).sort().values
    count = values.numel()

    def quantile(share: float) -> float:
        return float(values[min(count - 1, math.ceil(share * count) - 1)])

    return Divergence(
        float(values.mean()),
        float(values.std()) / math.sqrt(count) if count > 1 else math.inf,
        quantile(0.5),
        quantile(0.99),
        quantile(0.999),
        float(values[-1]),
        math.sqrt(changes / count),
        same / count,
        figures,
    )
