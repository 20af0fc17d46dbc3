"""Mixtures: every choice that llama.cpp makes, and what options cannot ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantkit.errors import InputError
from quantkit.formats.gguf import BY_NAME
from quantkit.mixtures import (
    BLOCKS,
    FALLBACKS,
    FILE_TYPE_NAMES,
    FILE_TYPES,
    Choice,
    FileType,
    MixtureOptions,
    ModelFacts,
    choose_types,
    file_type_of,
    needs_importance,
    quantizable,
    tensor_type_of,
    tensor_type_pairs,
)
from quantkit.ops.ggml.encode import BLOCKS as ENCODED

Tensors = list[tuple[str, str, tuple[int, ...]]]
GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "mixtures.json").read_bytes())
LLAMA = ModelFacts("llama", 4, 4, 4, 0)


def unpacked(text: str) -> list[str]:
    parts = (part.partition("*") for part in text.split())
    return [item for item, _, count in parts for _ in range(int(count or 1))]


def rows_of(model: dict[str, Any]) -> list[Tensors]:
    """The tensors of each row of a model of the golden file, one or a layer's each."""
    layers = model["facts"]["layers"]
    return [
        [(row.format(layer), kind, tuple(shape)) for layer in range(layers if "{}" in row else 1)]
        for row, (kind, shape) in model["rows"].items()
    ]


def options_of(given: dict[str, Any]) -> MixtureOptions:
    return MixtureOptions(**{**given, "tensor_types": tuple(map(tuple, given.get("tensor_types", ())))})


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_every_choice_is_the_reference_s(name: str) -> None:
    model = GOLDEN["models"][name]
    rows, facts, compared = rows_of(model), ModelFacts(**model["facts"]), 0
    tensors = [tensor for row in rows for tensor in row]
    for _, file_type, importance, options, numbers in (run for run in GOLDEN["runs"] if run[0] == name):
        wanted: dict[str, str] = {}
        for row, number in zip(rows, unpacked(numbers), strict=True):
            wanted |= zip((tensor[0] for tensor in row), unpacked(GOLDEN["types"][int(number)]), strict=True)
        for given in {"no": (False,), "yes": (True,), "any": (False, True)}[importance]:
            chosen = choose_types(tensors, FILE_TYPES[file_type], facts, options_of(options), given)
            assert {tensor: choice.type for tensor, choice in chosen.items()} == wanted, (file_type, given, options)
            compared += len(wanted)
    assert compared > 100


def test_the_order_of_the_tensors_changes_nothing() -> None:
    model = GOLDEN["models"]["llama-shared"]
    tensors, facts = [tensor for row in rows_of(model) for tensor in row], ModelFacts(**model["facts"])
    chosen = choose_types(tensors, FILE_TYPES["q4_k_m"], facts, MixtureOptions(), False)
    backwards = choose_types(tensors[::-1], FILE_TYPES["q4_k_m"], facts, MixtureOptions(), False)
    assert backwards == chosen
    assert list(chosen) == [name for name, _, _ in tensors] and list(backwards) == list(chosen)[::-1]


def test_a_fallback_says_what_was_wanted() -> None:
    tensors: Tensors = [
        ("blk.0.attn_q.weight", "F16", (8, 576)),
        ("blk.0.ffn_up.weight", "F16", (8, 172)),
        ("blk.0.ffn_gate.weight", "F16", (8, 512)),
        ("blk.0.attn_norm.weight", "F32", (576,)),
        ("blk.0.attn_q.bias", "F32", (8, 576)),
        ("blk.0.ffn_gate_inp.weight", "F32", (8, 576)),
    ]
    chosen = choose_types(tensors, FILE_TYPES["q4_k_m"], LLAMA, MixtureOptions(), False)
    assert list(chosen.values()) == [Choice("Q5_0", "Q4_K"), Choice("F16", "Q4_K"), Choice("Q4_K", "Q4_K"), *[Choice("F32", "F32")] * 3]


def test_tables_agree_with_the_format_and_the_encoders() -> None:
    assert {name: BY_NAME[name].elements for name in BLOCKS} == BLOCKS
    assert set(BLOCKS) - {"F32", "F16", "BF16"} == set(ENCODED)
    assert all(BLOCKS[wide] == 256 and BLOCKS[narrow] == 32 for wide, narrow in FALLBACKS.items())
    assert set(FALLBACKS) == {name for name, block in BLOCKS.items() if block == 256}
    assert FILE_TYPES["q4_k"] is FILE_TYPES["q4_k_m"] == FileType("q4_k_m", 15, "Q4_K")
    assert (FILE_TYPE_NAMES[15], FILE_TYPE_NAMES[36], len(FILE_TYPE_NAMES)) == ("Q4_K_M", "TQ1_0", 36)
    named = {int(item): item.name.removeprefix("MOSTLY_").removeprefix("ALL_") for item in gguf.LlamaFileType}
    assert {number: name for number, name in FILE_TYPE_NAMES.items() if number in named}.items() <= named.items()


def test_names_in_either_case() -> None:
    assert file_type_of("Q4_K_M") is FILE_TYPES["q4_k_m"]
    assert (tensor_type_of("q6_k"), tensor_type_of("bf16")) == ("Q6_K", "BF16")
    assert tensor_type_pairs(" attn_V=q8_0\nblk\\.1.*=Q4_K ") == (("attn_V", "Q8_0"), ("blk\\.1.*", "Q4_K"))
    tensors: Tensors = [("blk.0.attn_v.weight", "F16", (8, 256))]
    chosen = choose_types(tensors, FILE_TYPES["q2_k"], LLAMA, MixtureOptions(tensor_types=(("ATTN_V", "q8_0"),)), False)
    assert chosen == {"blk.0.attn_v.weight": Choice("Q8_0", "Q8_0")}


def test_what_is_never_quantized() -> None:
    assert quantizable("blk.0.attn_q.weight", (2, 256)) and quantizable("blk.0.ffn_up_exps.weight", (2, 1, 256))
    assert not quantizable("blk.0.attn_q.weight", (1, 256)) and not quantizable("blk.0.attn_q.weight", ())
    assert not quantizable("blk.0.attn_q.bias", (2, 256)) and not quantizable("blk.0.attn_k_norm.weight", (2, 256))


@pytest.mark.parametrize(
    "options,where,what",
    [
        (MixtureOptions(tensor_types=(("attn_(", "q8_0"),)), "--tensor-type 'attn_('", "is not a regular expression"),
        (MixtureOptions(tensor_types=(("attn_z", "q8_0"),)), "--tensor-type 'attn_z'", "matches no tensor"),
        (MixtureOptions(tensor_types=(("norm", "q8_0"),)), "--tensor-type 'norm'", "matches no tensor"),
        (MixtureOptions(tensor_types=(("attn", "q9_0"),)), "tensor type 'q9_0'", "is not known"),
        (MixtureOptions(output_type="iq2_xs"), "tensor type 'iq2_xs'", "is not known"),
        (MixtureOptions(output_type="q6_k"), "output.weight", "has rows of 288 values"),
        (MixtureOptions(embedding_type="q4_k"), "token_embd.weight", "has rows of 288 values"),
    ],
)
def test_options_that_cannot_be_honoured(options: MixtureOptions, where: str, what: str) -> None:
    tensors: Tensors = [
        ("token_embd.weight", "F16", (8, 288)),
        ("output.weight", "F16", (8, 288)),
        ("blk.0.attn_q.weight", "F16", (8, 256)),
        ("blk.0.attn_norm.weight", "F32", (288,)),
    ]
    with pytest.raises(InputError) as error:
        choose_types(tensors, FILE_TYPES["q4_k_m"], LLAMA, options, False)
    assert error.value.where == where and error.value.what.startswith(what)


def test_types_of_some_tensors_need_a_quantized_file_type() -> None:
    with pytest.raises(InputError, match=r"--type f16: has one type for all tensors"):
        choose_types([("a.weight", "F32", (2, 2))], FILE_TYPES["f16"], LLAMA, MixtureOptions(tensor_types=(("a", "q8_0"),)), False)


@pytest.mark.parametrize("text", ["attn_v", "=q8_0", "attn_v=", "a=q8_0 b"])
def test_what_is_no_pair(text: str) -> None:
    with pytest.raises(InputError, match="is no pair"):
        tensor_type_pairs(text)


def test_an_unknown_file_type_lists_those_that_there_are() -> None:
    with pytest.raises(InputError, match=r"--type 'q4_k_xl': is not known, expected one of f32, .*q4_k_m"):
        file_type_of("q4_k_xl")


def test_q2_k_s_needs_an_importance_matrix() -> None:
    tensors: Tensors = [(name, "F16", (8, 256)) for name in ("token_embd.weight", "output.weight", "blk.0.attn_q.weight")]
    file_type = FILE_TYPES["q2_k_s"]
    with pytest.raises(InputError, match=r"makes 1 tensors Q2_K, blk.0.attn_q.weight first"):
        choose_types(tensors, file_type, LLAMA, MixtureOptions(), False)
    assert choose_types(tensors, file_type, LLAMA, MixtureOptions(), True)["blk.0.attn_q.weight"].type == "Q2_K"
    assert not any(needs_importance(*case, file_type) for case in (("token_embd.weight", "Q2_K"), ("blk.0.attn_q.weight", "Q4_K")))
    assert not needs_importance("blk.0.attn_q.weight", "Q2_K", FILE_TYPES["q2_k"])
