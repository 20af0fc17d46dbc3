"""Copies of the tiny models, cut short and changed as a test needs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MODELS = Path(__file__).parent.parent / "data" / "models"


def two_layers(root: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None] | None = None, name: str = "llama") -> Path:
    """A copy of a tiny model cut to two layers, which is as good for what follows and twice as fast."""
    root.mkdir()
    config = json.loads((MODELS / name / "config.json").read_text())
    config["num_hidden_layers"] = 2
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:2]
    tensors = {
        key: value
        for key, value in load_file(MODELS / name / "model.safetensors").items()
        if ".layers.2." not in key and ".layers.3." not in key
    }
    if change:
        change(config, tensors)
    (root / "config.json").write_text(json.dumps(config))
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS / name / file, root / file)
    return root
