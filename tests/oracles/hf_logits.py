"""transformers loads an artifact on a CPU and computes logits; runs in any environment that has what the artifact needs.

hf_logits.py ARTIFACT IDS OUT DTYPE      IDS is JSON, a list of token ids; DTYPE, float32 or another; OUT gets ``logits`` [T, V] in float32
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    artifact, ids, out = map(Path, sys.argv[1:4])
    dtype = getattr(torch, sys.argv[4])
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=dtype, device_map="cpu")
    # What a bitsandbytes artifact stores in 16 bits, transformers 5.23 leaves in 16 bits, whatever dtype it is asked for.
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(dtype)
    tokens = torch.tensor([json.loads(ids.read_text())])
    with torch.inference_mode():
        save_file({"logits": model(tokens).logits[0].float().contiguous()}, out)


if __name__ == "__main__":
    main()
