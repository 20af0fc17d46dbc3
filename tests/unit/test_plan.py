"""Plans of known models, the divisibility table of formats.md section 10, and the errors a plan can end in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.commands.plan import PlanOptions, parse_bytes, run
from quantkit.errors import InputError
from quantkit.geometry import ggml_scheme
from quantkit.plan import Obstacle, ParallelPlan, equal_split_obstacles, make_plan, rank_memory
from quantkit.scheme import KEEP, Assignment, LinearScheme

MODELS = Path(__file__).parent.parent / "data" / "models"
DEMO = (576, 1536, 9, 3, 64)


def spec_of(hidden: int, ffn: int, heads: int, kv: int, head_dim: int, **more: Any) -> ModelSpec:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    return spec_for({**config, **more})


def awq(spec: ModelSpec, group: int) -> Assignment:
    return {name: KEEP if name == "lm_head" else LinearScheme("awq", "awq", 4, group) for name in spec.all_linears()}


def spans(ranges: tuple[range, ...]) -> list[tuple[int, int]]:
    return [(r.start, r.stop) for r in ranges]


def test_the_demo_model_on_two_ranks_is_dealt_whole_kv_groups() -> None:
    spec = spec_of(*DEMO)
    plan = make_plan(spec, awq(spec, 64), 2, dtype="BF16")
    assert spans(plan.ranges["heads"]) == [(0, 6), (6, 9)]
    assert spans(plan.ranges["kv_heads"]) == [(0, 2), (2, 3)]
    assert spans(plan.ranges["ffn"]) == [(0, 768), (768, 1536)]
    assert (plan.modes["o"], plan.modes["down"]) == ("row", "row")
    assert plan.cut("o", 1) == (range(576), range(384, 576))
    assert plan.cut("v", 1) == (range(128, 192), range(576))
    assert plan.sizes("vocab") == (24576, 24576)


def test_the_demo_model_on_eight_ranks_copies_kv_heads() -> None:
    spec = spec_of(*DEMO)
    plan = make_plan(spec, awq(spec, 64), 8, dtype="BF16")
    assert [r.start for r in plan.ranges["kv_heads"]] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [len(r) for r in plan.ranges["heads"]] == [1, 1, 1, 1, 1, 1, 2, 1]
    assert plan.modes["o"] == "row"


def test_a_head_that_is_half_a_group_makes_o_proj_gather() -> None:
    spec = spec_of(256, 512, 4, 2, 64)
    plan = make_plan(spec, awq(spec, 128), 4, dtype="BF16")
    assert (plan.modes["o"], plan.modes["down"]) == ("gather", "row")
    assert spans(plan.ranges["hidden"]) == [(0, 64), (64, 128), (128, 192), (192, 256)]
    assert plan.cut("o", 1) == (range(64, 128), range(256))


def test_heads_are_dealt_in_pairs_where_that_spares_a_gather() -> None:
    spec = spec_of(2048, 5632, 32, 32, 64)
    plan = make_plan(spec, awq(spec, 128), 3, dtype="BF16")
    assert ([len(r) for r in plan.ranges["heads"]], plan.modes["o"]) == ([12, 10, 10], "row")


def test_fewer_granules_than_ranks_makes_down_proj_gather_and_cuts_ffn_finer() -> None:
    spec = spec_of(256, 512, 4, 2, 64)
    plan = make_plan(spec, awq(spec, 128), 5, dtype="BF16")
    assert plan.modes["down"] == "gather"
    assert [len(r) for r in plan.ranges["ffn"]] == [112, 112, 96, 96, 96]
    assert [len(r) for r in plan.ranges["heads"]] == [1, 1, 0, 1, 1]
    assert [len(r) for r in plan.ranges["kv_heads"]] == [1, 1, 0, 1, 1], "a rank without query heads stores no KV"


def test_an_ffn_of_231_groups_runs_on_eight_ranks() -> None:
    spec = spec_of(8192, 29568, 64, 8, 128)
    plan = make_plan(spec, awq(spec, 128), 8, dtype="BF16")
    assert [len(r) // 128 for r in plan.ranges["ffn"]] == [29] * 7 + [28]


def test_the_vocabulary_is_padded_to_64_rows() -> None:
    spec = spec_of(*DEMO, vocab_size=32001, tie_word_embeddings=False)
    plan = make_plan(spec, awq(spec, 64), 4, dtype="BF16")
    assert (plan.vocab, plan.dims["vocab"].size) == (32001, 32064)
    assert [len(r) // 64 for r in plan.ranges["vocab"]] == [126, 125, 125, 125]


def test_layers_stored_differently_share_the_granules_of_all() -> None:
    spec = spec_of(256, 512, 4, 2, 64)
    mixed = {name: LinearScheme("awq", "awq", 4, 128) if ".1.mlp.down" in name else KEEP for name in spec.all_linears()}
    assert [len(r) for r in make_plan(spec, mixed, 3, dtype="BF16").ranges["ffn"]] == [256, 128, 128]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("group", [64, 128, -1])
def test_the_tiny_models_run_on_one_to_eight_ranks(name: str, group: int) -> None:
    spec = spec_for(json.loads((MODELS / name / "config.json").read_text()))
    for tp in range(1, 9):
        assert make_plan(spec, awq(spec, group), tp, dtype="BF16").tp == tp


# formats.md section 10: the TP degrees among 1, 2, 4, 8 that equal splits pass, by model (hidden, intermediate, heads, KV heads,
# head_dim) and format. "-": none, not even 1, since a group or block does not divide a row. Of the last model but three only the MLP.
FORMATS = ("heads", "g128", "g64", "g32", "nf4", "q4_k", "fp8_block", "channel")
TABLE = {
    "Llama-2-7B": ((4096, 11008, 32, 32, 128), "1248 12 124 1248 124 1 12 1248"),
    "Llama-2-13B": ((5120, 13824, 40, 40, 128), "1248 124 1248 1248 1248 12 124 1248"),
    "Llama-3-8B": ((4096, 14336, 32, 8, 128), "1248 1248 1248 1248 1248 1248 1248 1248"),
    "Llama-3-70B": ((8192, 28672, 64, 8, 128), "1248 1248 1248 1248 1248 1248 1248 1248"),
    "Mistral-7B": ((4096, 14336, 32, 8, 128), "1248 1248 1248 1248 1248 1248 1248 1248"),
    "Qwen2.5-0.5B": ((896, 4864, 14, 2, 64), "12 1 12 12 12 - 1 12"),
    "Qwen2.5-1.5B": ((1536, 8960, 12, 2, 128), "124 12 124 124 124 1 12 124"),
    "Qwen2.5-7B": ((3584, 18944, 28, 4, 128), "124 124 124 124 124 12 124 124"),
    "Qwen2.5-14B": ((5120, 13824, 40, 8, 128), "1248 124 1248 1248 1248 12 124 1248"),
    "Qwen2.5-32B": ((5120, 27648, 40, 8, 128), "1248 1248 1248 1248 1248 124 1248 1248"),
    "Qwen2.5-72B": ((8192, 29568, 64, 8, 128), "1248 1 12 124 12 - 1 1248"),
    "Qwen2.5-72B padded": ((8192, 29696, 64, 8, 128), "1248 1248 1248 1248 1248 124 1248 1248"),
    "Phi-3-mini": ((3072, 8192, 32, 32, 96), "1248 1248 1248 1248 1248 124 1248 1248"),
    "Qwen1.5-14B": ((5120, 13696, 40, 40, 128), "1248 1 12 124 12 - 1 1248"),
    "DeepSeek-V2-Lite MLP": ((2048, 10944, 16, 16, 128), "1248 - 1 12 1 - 1 1248"),
    "Qwen3-30B-A3B experts": ((2048, 768, 32, 4, 128), "1248 12 124 1248 124 1 12 1248"),
    "TinyLlama-1.1B": ((2048, 5632, 32, 4, 64), "1248 124 1248 1248 1248 12 12 1248"),
    "SmolLM-135M": ((576, 1536, 9, 3, 64), "1 - 1 1 1 - 1 1"),
}


def schemes(name: str) -> tuple[LinearScheme, ...]:
    """Everything of a column of TABLE."""
    if name.startswith("g"):
        group = int(name[1:])
        packed = (LinearScheme("rtn", "packed", 4, group, sym, "BF16") for sym in (True, False))
        return LinearScheme("awq", "awq", 4, group), LinearScheme("gptq", "gptq", 4, group, True), *packed
    eight = (LinearScheme("int8", "bnb8", 8, -1, True, "F32"), LinearScheme("w8a8", "int8", 8, -1, True, "BF16"))
    return {
        "heads": (KEEP,),
        "nf4": (
            LinearScheme("nf4", "bnb4", 4, 64, True, "F32", "nf4"),
            LinearScheme("nf4", "bnb4", 4, 64, True, "F32", "nf4", double_quant=True),
        ),
        "q4_k": (ggml_scheme("Q4_K"), ggml_scheme("Q6_K"), ggml_scheme("IQ4_XS")),
        "fp8_block": (LinearScheme("fp8", "fp8_block", 8, 128, True, "F32"),),
        "channel": (KEEP, *eight, LinearScheme("fp8", "fp8", 8, 0, True, "F32"), LinearScheme("fp8", "fp8", 8, -1, True, "BF16")),
    }[name]


def assigned(spec: ModelSpec, scheme: LinearScheme) -> Assignment:
    return {path: KEEP if path == "lm_head" else scheme for path in spec.all_linears()}


CELLS = [(name, form, cell) for name, (_, row) in TABLE.items() for form, cell in zip(FORMATS, row.split(" "), strict=True)]


@pytest.mark.parametrize(("name", "form", "cell"), CELLS, ids=[f"{name} {form}" for name, form, _ in CELLS])
def test_equal_split_verdicts(name: str, form: str, cell: str) -> None:
    spec = spec_of(*TABLE[name][0])
    where = "attention" if form == "heads" else ".mlp." if name.endswith("MLP") else ""
    for scheme in schemes(form):
        found = {tp: equal_split_obstacles(spec, assigned(spec, scheme), tp, dtype="BF16") for tp in (1, 2, 4, 8)}
        passing = "".join(str(tp) for tp, obstacles in found.items() if not any(where in o.where for o in obstacles))
        assert (passing or "-") == cell, scheme
        named = [obstacle for obstacles in found.values() for obstacle in obstacles]
        assert all(obstacle.where and re.search(r"\d", obstacle.what) and obstacle.remedy for obstacle in named)


@pytest.mark.parametrize(("name", "form", "cell"), CELLS, ids=[f"{name} {form}" for name, form, _ in CELLS])
def test_what_equal_splits_refuse_quantkit_still_plans(name: str, form: str, cell: str) -> None:
    """Every degree from 1 to 8, where rows hold whole groups at all; else the error names the layer, the numbers and a remedy."""
    spec = spec_of(*TABLE[name][0])
    for scheme in schemes(form):
        for tp in range(1, 9):
            if cell != "-":
                assert make_plan(spec, assigned(spec, scheme), tp, dtype="BF16").tp == tp
                continue
            with pytest.raises(InputError, match=r"layers\.0\.(self_attn|mlp)\.\w+: \d+ input features") as caught:
                make_plan(spec, assigned(spec, scheme), tp, dtype="BF16")
            assert caught.value.expected.startswith("a ") and caught.value.hint


def test_forty_heads_on_three_ranks_run_here_and_the_plan_says_where_they_do_not(tmp_path: Path) -> None:
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 40}
    report = run(PlanOptions(str(write_config(tmp_path, **sizes)), 3, method="awq", group_size=128))
    assert [high - low for low, high in report.data["plan"]["ranges"]["heads"]] == [14, 13, 13]
    heads, *_ = report.data["equal_split"]["obstacles"]
    assert heads == {"where": "attention", "what": "40 heads / 3 ranks is not whole", "remedy": "--tp 1, 2, 4, 5, 8"}
    own, first, *_ = report.tables[3].rows
    assert own == ("quantkit", "yes", "-", "uneven ranges of whole granules", "-")
    assert first == ("equal split (vLLM, SGLang)", "no", *heads.values())


def test_obstacles_name_the_layer_the_numbers_and_the_remedy() -> None:
    spec = spec_of(8192, 29568, 64, 8, 128)
    assert equal_split_obstacles(spec, awq(spec, 128), 8, dtype="BF16") == (
        Obstacle("model.layers.0.mlp.down_proj", "K = 29568 / 8 ranks is no multiple of 128", "pad intermediate_size to 29696 with zeros"),
    )
    (half,) = equal_split_obstacles(spec, awq(spec, 128), 2, dtype="BF16")
    assert half.remedy == "--group-size 64, or pad intermediate_size to 29696 with zeros"


@pytest.mark.parametrize("tp", [0, -1, 1025])
def test_a_tp_out_of_range_is_refused(tp: int) -> None:
    spec = spec_of(*DEMO)
    with pytest.raises(InputError, match="--tp"):
        make_plan(spec, awq(spec, 64), tp, dtype="BF16")


def test_a_group_that_does_not_divide_names_the_layer_and_a_group_that_does() -> None:
    spec = spec_of(*DEMO)
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj: 576 input features do not divide into groups of 128") as caught:
        make_plan(spec, awq(spec, 128), 2, dtype="BF16")
    assert caught.value.hint == "--group-size 64 divides 576"


def test_kv_heads_that_no_cut_parts_are_held_together() -> None:
    """Eight heads of 4, two to a packed word: on four ranks two each; on eight, ranks without heads. KV heads of 64, two to a block of
    128: the query heads of both are divided, and both ranks hold both."""
    spec = spec_of(64, 128, 8, 8, 4)
    assert [len(r) for r in make_plan(spec, awq(spec, 32), 4, dtype="BF16").ranges["kv_heads"]] == [2, 2, 2, 2]
    eight = make_plan(spec, awq(spec, 32), 8, dtype="BF16")
    assert spans(eight.ranges["heads"])[:4] == spans(eight.ranges["kv_heads"])[:4] == [(0, 2), (2, 2), (2, 4), (4, 4)]
    spec = spec_of(256, 512, 8, 4, 64)
    blocks = assigned(spec, LinearScheme("fp8", "fp8_block", 8, 128, True, "F32"))
    plan = make_plan(spec, blocks, 3, dtype="BF16")
    assert (spans(plan.ranges["heads"]), spans(plan.ranges["kv_heads"])) == ([(0, 2), (2, 4), (4, 8)], [(0, 2), (0, 2), (2, 4)])
    assert plan.cut("k", 1) == (range(128), range(256)) and plan.modes["o"] == "row"
    for held in ([0, 1], [0, 3], [0, 4]):  # inside a block, and more than is needed
        data = plan.to_json()
        data["ranges"]["kv_heads"][1] = held
        with pytest.raises(InputError, match="rank 1"):
            ParallelPlan.from_json(data).check(spec, blocks, dtype="BF16")


def test_a_quantized_head_cannot_be_padded() -> None:
    spec = spec_of(*DEMO, vocab_size=32008, tie_word_embeddings=False)
    scheme = LinearScheme("awq", "awq", 4, 64)
    with pytest.raises(InputError, match="lm_head: is quantized, and its 32008 rows are no multiple of 64"):
        make_plan(spec, dict.fromkeys(spec.all_linears(), scheme), 2, dtype="BF16")


def test_an_assignment_that_lacks_a_linear_is_refused() -> None:
    spec = spec_of(*DEMO)
    with pytest.raises(InputError, match=r"layers\.1\.mlp.down_proj: the assignment does not say"):
        make_plan(spec, {k: v for k, v in awq(spec, 64).items() if ".1.mlp.down" not in k}, 2, dtype="BF16")


def test_memory_of_the_demo_model_is_exact() -> None:
    spec = spec_of(*DEMO)
    assignment = awq(spec, 64)
    (one,) = rank_memory(spec, assignment, make_plan(spec, assignment, 1, dtype="BF16"), dtype="BF16", kv_dtype="BF16")
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    assert one.linears == 2 * sum(k * n // 2 + 2 * (k // 64) * n + (k // 64) * n // 2 for n, k in shapes)
    assert one.vocabulary == 49152 * 576 * 2
    assert one.norms == (2 * 2 + 1) * 576 * 2
    assert one.kv_per_token == 2 * 2 * 3 * 64 * 2
    eight = rank_memory(spec, assignment, make_plan(spec, assignment, 8, dtype="BF16"), dtype="BF16", kv_dtype="BF16")
    assert {rank.kv_per_token for rank in eight} == {2 * 2 * 64 * 2}


def write_config(root: Path, **more: Any) -> Path:
    config = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 49152, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    (root / "config.json").write_text(json.dumps({**config, **sizes, **more}))
    return root


@pytest.mark.parametrize(
    "text,size", [("24GiB", 24 << 30), ("24GB", 24 * 10**9), ("1.5gib", 3 << 29), ("1000", 1000), (" 8 MiB ", 8 << 20)]
)
def test_sizes_are_read_in_both_systems(text: str, size: int) -> None:
    assert parse_bytes(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["", "GiB", "24 apples", "-1", "0", "24GiBB", "1e9", "0x10", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--gpu-memory"):
        parse_bytes(text, "--gpu-memory")


def test_the_plan_command_needs_nothing_but_a_configuration(tmp_path: Path) -> None:
    root = write_config(tmp_path)
    by_directory = run(PlanOptions(str(root), 2, method="awq", group_size=64))
    by_file = run(PlanOptions(str(root / "config.json"), 2, method="awq", group_size=64))
    assert by_directory == by_file
    data = by_directory.data
    assert [rank["kv_per_token"] for rank in data["ranks"]] == [2 * 2 * 128 * 2, 2 * 2 * 64 * 2]
    assert data["dtype"] == "BF16"
    assert data["fits"] is None
    assert not data["equal_split"]["runs"]
    assert [table.title for table in by_directory.tables] == ["Ranges per rank", "Linears", "Memory per rank", "Verdicts"]
    assert by_directory.tables[0].rows[1][1:4] == ("6:9", "2:3", "768:1536")


def test_a_configuration_of_an_artifact_says_how_its_linears_are_stored(tmp_path: Path) -> None:
    quantized = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "modules_to_not_convert": ["mlp.down_proj"]}
    report = run(PlanOptions(str(write_config(tmp_path, quantization_config=quantized)), 1))
    assignment = report.data["assignment"]
    assert assignment["model.layers.0.mlp.down_proj"]["layout"] == "plain"
    assert (assignment["model.layers.1.mlp.up_proj"]["layout"], assignment["model.layers.1.mlp.up_proj"]["group_size"]) == ("awq", 64)
    with pytest.raises(InputError, match="is already quantized"):
        run(PlanOptions(str(tmp_path), 1, method="awq"))


def test_memory_decides_how_many_tokens_fit_and_whether_the_check_passes(tmp_path: Path) -> None:
    root = str(write_config(tmp_path))
    plenty = run(PlanOptions(root, 2, gpu_memory="24GiB", max_model_len=1000))
    worst = max(rank["weights"] for rank in plenty.data["ranks"])
    assert plenty.failed is None
    beside = worst + plenty.data["pass_bytes"] + plenty.data["runtime_bytes"]
    assert plenty.data["kv_tokens_that_fit"] == (int((24 << 30) * 0.9) - beside) // 1024
    tight = run(PlanOptions(root, 2, gpu_memory=str(int((beside + 500 * 1024) / 0.9) + 2), max_model_len=1000))
    assert (tight.data["kv_tokens_that_fit"], tight.data["kv_blocks_that_fit"]) == (500, 500 // 16)
    assert tight.failed is not None
    assert "rank 0 needs" in tight.failed
    nothing = run(PlanOptions(root, 2, gpu_memory="1MiB"))
    assert nothing.data["kv_tokens_that_fit"] == 0 and nothing.failed is not None
    assert "may use 0 B of 1.00 MiB: a pass and the runtime itself take " in nothing.failed
    assert "a pass" not in tight.failed


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"tp": 0}, "--tp"),
        ({"max_model_len": 0}, "--max-model-len"),
        ({"gpu_memory": "much"}, "--gpu-memory"),
        ({"method": "hqq"}, "--method"),
        ({"method": "awq", "bits": 5}, "--bits"),
        ({"method": "awq", "group_size": 128}, "model.layers.0.self_attn.q_proj"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, more: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError) as caught:
        run(PlanOptions(**{"path": str(write_config(tmp_path)), "tp": 2, **more}))
    assert caught.value.where == where


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, '"x"'])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        run(PlanOptions(str(tmp_path), 2))


def test_planning_imports_no_torch() -> None:
    program = "import sys, quantkit.commands.plan, quantkit.commands.shard, quantkit.commands.unshard; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
