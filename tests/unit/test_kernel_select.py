"""The table of configurations: written, read, merged and looked up; what may be measured is distinct and of known families."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.errors import InputError
from quantkit.ops import kernel_select
from quantkit.ops.kernel_select import DENSE, MMA, RULE, WGMMA, Config, Gpu, choose, configs, family, merged, read_tables, write_tables
from quantkit.ops.tiles import Format

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132)
H200 = Gpu("NVIDIA H200", (9, 0), 132)
A100 = Gpu("NVIDIA A100", (8, 0), 108)
ENTRIES = {
    ("INT4", 4096, 4096): ((1, Config(MMA, 8, 1)), (16, Config(MMA, 16, 2, 0x144)), (256, Config(WGMMA, 128, 2, -1, 3))),
    ("NF4", 4096, 4096): ((4096, Config(DENSE)),),
}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The files of the table that comes with quantkit and of the user's, neither of which is there."""
    files = tmp_path / "ours.json", tmp_path / "cache" / "users.json"
    monkeypatch.setattr(kernel_select, "TABLE", files[0])
    monkeypatch.setattr(kernel_select, "user_table", lambda: files[1])
    forget()
    yield files
    forget()


def forget() -> None:
    kernel_select._entries.cache_clear()
    choose.cache_clear()


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    write_tables(path, {H100: ENTRIES, A100: {}})
    assert read_tables(path) == {H100: ENTRIES, A100: {}}
    assert [line.count("best") for line in path.read_text().splitlines() if "best" in line] == [1, 1]
    assert read_tables(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"gpus": [{}]}', '{"gpus": 1}', '{"gpus": [{"name": "x", "capability": [9], "entries": []}]}']
)
def test_what_is_no_table_is_one_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(
        InputError, match=r"table.json: is not a table of kernels \(.*\), expected a file that quantkit bench kernels --tune"
    ):
        read_tables(path)


def test_what_was_found_stands_over_what_was_known() -> None:
    found = {("INT4", 4096, 4096): ((16, Config(RULE)), (32, Config(MMA, 32)))}
    known = merged({H100: ENTRIES, A100: {}}, H100, found)
    assert [config for _, config in known[H100]["INT4", 4096, 4096]] == [
        Config(MMA, 8, 1), Config(RULE), Config(MMA, 32), Config(WGMMA, 128, 2, -1, 3),
    ]  # fmt: skip
    assert known[H100]["NF4", 4096, 4096] == ENTRIES["NF4", 4096, 4096]
    assert known[A100] == {}


def test_choice(tables: tuple[Path, Path]) -> None:
    write_tables(tables[0], {H100: ENTRIES})
    chosen = [choose(H100, Format.INT4, 4096, 4096, tokens) for tokens in (1, 2, 16, 17, 256, 9000)]
    one, two, three = (config for _, config in ENTRIES["INT4", 4096, 4096])
    assert chosen == [one, two, two, three, three, three]
    assert choose(H100, Format.INT4Z, 4096, 4096, 1) == one
    assert choose(H100, Format.NF4N, 4096, 4096, 1) == Config(DENSE)
    assert choose(H200, Format.INT4, 4096, 4096, 1) == one
    assert [
        choose(gpu, form, n, 4096, 1) for gpu, form, n in ((A100, Format.INT4, 4096), (H100, Format.Q8_0, 4096), (H100, Format.INT4, 64))
    ] == [None] * 3


def test_the_user_s_table_stands_over_ours(tables: tuple[Path, Path]) -> None:
    assert choose(H100, Format.INT4, 4096, 4096, 1) is None
    write_tables(tables[0], {H100: ENTRIES})
    write_tables(tables[1], {H100: {("INT4", 4096, 4096): ((1, Config(RULE)),), ("INT4", 64, 64): ((1, Config(MMA, 8)),)}})
    forget()
    assert choose(H100, Format.INT4, 4096, 4096, 1) == Config(RULE)
    assert choose(H100, Format.INT4, 4096, 4096, 2) == Config(MMA, 16, 2, 0x144)
    assert choose(H100, Format.INT4, 64, 64, 1) == Config(MMA, 8)


def test_the_table_that_comes_with_quantkit_is_one() -> None:
    for gpu, entries in read_tables(kernel_select.TABLE).items():
        assert gpu.name and gpu.multiprocessors > 0
        for (form, n, k), best in entries.items():
            assert form in {family(each) for each in Format} and n > 0 and k > 0
            assert all(tokens > 0 and config.kernel in kernel_select.NAMES for tokens, config in best)


@pytest.mark.parametrize("gpu", [H100, A100])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16, 33, 64, 100, 256, 1024, 4096])
def test_what_may_be_measured(gpu: Gpu, tokens: int) -> None:
    found = list(configs(gpu, Format.INT4, 4096, 4096, tokens))
    assert len(found) == len(set(found)) < 200
    families = {config.kernel for config in found}
    assert RULE in families
    assert (WGMMA in families) == (gpu == H100 and tokens > 8)
    assert (DENSE in families) == (tokens >= 64)
    assert (MMA in families) == (tokens <= 64)


def test_how_a_configuration_reads() -> None:
    assert [str(each) for each in (Config(RULE), Config(DENSE), Config(MMA, 8, 0x1002))] == ["rule", "dense", "mma 8,0x1002,0x0,0x0"]
