"""transformers loads an artifact on a CPU in float32 and computes logits; runs in any environment that has what the artifact needs.

hf_logits.py ARTIFACT IDS OUT      IDS is JSON, a list of token ids; OUT gets ``logits`` [T, V]
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
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32, device_map="cpu")
    tokens = torch.tensor([json.loads(ids.read_text())])
    with torch.inference_mode():
        save_file({"logits": model(tokens).logits[0].float().contiguous()}, out)


if __name__ == "__main__":
    main()
