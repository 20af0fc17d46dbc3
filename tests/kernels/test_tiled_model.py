"""A whole model on a GPU whose linears run on tiles, beside the same model dequantized at each call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_fixtures import logits_of
from quantize_fixtures import two_layers

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.commands.quantize import run
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.model.load import load_decoder
from quantkit.ops.cuda_tiles import TiledLinear, available


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not available("cuda", torch.float16), reason="needs a GPU of capability 8.0 and built kernels"
)
@pytest.mark.parametrize(("method", "options"), [("rtn", {"format": "awq", "group_size": 32}), ("nf4", {})])
def test_a_model_on_tiles_gives_the_logits_of_its_weights(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    run(QuantizeOptions(path=str(two_layers(tmp_path / "m")), out=tmp_path / "q", method=method, device="cpu", **options))
    checkpoint = open_checkpoint(tmp_path / "q")
    tiled, parity = (load_decoder(checkpoint, dtype=torch.float16, device="cuda", parity=parity) for parity in (False, True))
    assert all(isinstance(linear.op, TiledLinear) for block in tiled.blocks for linear in block.linears.values())
    ids = torch.arange(3, 40)
    for ours, theirs in zip(logits_of(tiled, [ids]), logits_of(parity, [ids]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
