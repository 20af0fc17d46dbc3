"""llama.cpp's choice of types: the golden file is what it chooses today, and what it writes when it quantizes for real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from gguf_fixtures import config_of, write_model

from quantkit.formats.gguf import read_gguf
from quantkit.mixtures import FILE_TYPES, MixtureOptions, ModelFacts, choose_types

pytestmark = pytest.mark.oracle

GOLDEN = Path(__file__).parent.parent / "data" / "mixtures.json"


class Runs(Protocol):
    def run(self, *arguments: object) -> None: ...


@pytest.fixture
def reference(oracle: Callable[[str, str], Runs]) -> Runs:
    return oracle("llama-cpp", "mixture_reference.py")


def test_the_golden_file_is_what_the_reference_chooses_today(reference: Runs, tmp_path: Path) -> None:
    reference.run("golden", tmp_path / "mixtures.json")
    assert (tmp_path / "mixtures.json").read_bytes() == GOLDEN.read_bytes()


@pytest.mark.parametrize("file_type", sorted(set(FILE_TYPES) - {"q2_k_s"}))
def test_a_file_quantized_for_real_has_the_types(file_type: str, reference: Runs, tmp_path: Path) -> None:
    config = config_of("llama", hidden_size=256, head_dim=64, intermediate_size=288, num_hidden_layers=9, vocab_size=64)
    source = write_model(tmp_path / "in.gguf", config)
    reference.run("quantize", source, tmp_path / "out.gguf", FILE_TYPES[file_type].name)
    tensors = [(tensor.name, tensor.type, tensor.shape) for tensor in read_gguf(source).tensors.values()]
    chosen = choose_types(tensors, FILE_TYPES[file_type], ModelFacts("llama", 9, 4, 2, 0), MixtureOptions(), False)
    written = read_gguf(tmp_path / "out.gguf")
    assert {name: choice.type for name, choice in chosen.items()} == {name: tensor.type for name, tensor in written.tensors.items()}
    assert np.int64(written.metadata["general.file_type"]) == FILE_TYPES[file_type].id
