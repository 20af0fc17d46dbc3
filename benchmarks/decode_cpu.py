"""Is a 4-bit artifact as fast as its float base on a CPU? Both decode the same tokens, step by step in turns, in bfloat16.

    python benchmarks/decode_cpu.py BASE ARTIFACT

Prints one JSON line: median and best milliseconds per token of each, the ratio of the medians, and bytes of weights in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

from quantkit.runtime.threads import thread_variables

os.environ.update(thread_variables())  # as the command line does, before torch is loaded

import torch

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.model.decoder import Batch, Decoder
from quantkit.model.load import load_decoder
from quantkit.runtime.kv_cache import whole_cache

PROMPT, WARM = 64, 8


def stepper(decoder: Decoder, steps: int) -> Callable[[], float]:
    """A function that decodes one token more and says how many seconds it took."""
    cache = whole_cache(decoder, PROMPT + WARM + steps)
    decoder.forward(torch.arange(PROMPT), Batch(torch.arange(PROMPT), (PROMPT,), (0,)), cache)
    position, token = PROMPT, torch.tensor([7])

    def step() -> float:
        nonlocal position, token
        start = time.perf_counter()
        token = decoder.logits(decoder.forward(token, Batch(torch.tensor([position]), (1,), (0,)), cache)).argmax(-1)
        position += 1
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("artifact")
    parser.add_argument("--steps", type=int, default=128)
    options = parser.parse_args()
    with torch.inference_mode():
        decoders = [load_decoder(open_checkpoint(path), dtype=torch.bfloat16) for path in (options.base, options.artifact)]
        step = [stepper(decoder, options.steps) for decoder in decoders]
        for _ in range(WARM):
            for each in step:
                each()
        seconds = [[each() for each in step] for _ in range(options.steps)]
    base, artifact = ([1000 * row[i] for row in seconds] for i in (0, 1))
    line = {
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "base_ms": {"median": round(statistics.median(base), 2), "best": round(min(base), 2)},
        "artifact_ms": {"median": round(statistics.median(artifact), 2), "best": round(min(artifact), 2)},
        "ratio_of_medians": round(statistics.median(artifact) / statistics.median(base), 3),
        "weight_bytes": [decoder.nbytes for decoder in decoders],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
