"""Which kernel, in which configuration, multiplies a weight by how many tokens: a table of measurements, and what may be measured.

``kernel_table.json`` beside this file has what was measured on the GPUs that it names; ``quantkit bench kernels --tune`` writes another
into the user's cache, which is read over it. Where neither knows a shape, the library's own rule decides. Knows no tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantkit import fs
from quantkit.errors import InputError, MachineError
from quantkit.ops.cuda_library import cache_folder
from quantkit.ops.tiles import Format

TABLE = Path(__file__).with_name("kernel_table.json")
RULE, MMA, WGMMA, GEMV, DENSE = range(5)
"""Families of kernels: those of ``kernels/quantkit.h``, and dequantizing for a product of torch's."""
NAMES: Mapping[int, str] = {RULE: "rule", MMA: "mma", WGMMA: "wgmma", GEMV: "gemv", DENSE: "dense"}
_MAX_BYTES = 16 << 20


class Config(NamedTuple):
    """``QkConfig`` of ``kernels/quantkit.h``: a family, and four numbers whose meaning is the family's (``kernels/README.md``)."""

    kernel: int
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0

    def __str__(self) -> str:
        name = NAMES.get(self.kernel, str(self.kernel))
        return name if self.kernel in (RULE, DENSE) else f"{name} {self.a},{self.b:#x},{self.c:#x},{self.d:#x}"


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a table is of. Where no table has the name, one of the same capability and as many multiprocessors serves."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int


Entries = Mapping[tuple[str, int, int], tuple[tuple[int, Config], ...]]
"""``(family of formats, N, K)`` -> of each number of tokens that was measured, ascending, the best configuration."""


def family(form: Format) -> str:
    """Formats that share a table: those whose kernels do the same work."""
    return {Format.INT4Z: "INT4", Format.NF4N: "NF4", Format.Q5_K: "Q4_K"}.get(form, form.name)


def gpu_of(device: torch.device) -> Gpu:
    """The facts of a CUDA device."""
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, (found.major, found.minor), found.multi_processor_count)


# the table


def read_tables(path: Path) -> dict[Gpu, dict[tuple[str, int, int], tuple[tuple[int, Config], ...]]]:
    """The tables in a file; none when it is not there. Raises InputError for a file that is no table."""
    if not path.is_file():
        return {}
    try:
        return {_gpu(each): dict(_entry(line) for line in each["entries"]) for each in json.loads(fs.read_bytes(path, _MAX_BYTES))["gpus"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), f"is not a table of kernels ({error})", "a file that quantkit bench kernels --tune wrote") from error


def _gpu(said: Mapping[str, Any]) -> Gpu:
    major, minor = said["capability"]
    return Gpu(str(said["name"]), (int(major), int(minor)), int(said["multiprocessors"]))


def _entry(said: Mapping[str, Any]) -> tuple[tuple[str, int, int], tuple[tuple[int, Config], ...]]:
    found = sorted((int(tokens), Config(*(int(number) for number in config))) for tokens, config in said["best"])
    return (str(said["format"]), int(said["n"]), int(said["k"])), tuple(found)


def write_tables(path: Path, tables: Mapping[Gpu, Entries]) -> None:
    """Write ``tables``: a line for each weight, so that a change reads well."""

    def line(key: tuple[str, int, int], best: tuple[tuple[int, Config], ...]) -> str:
        return json.dumps({"format": key[0], "n": key[1], "k": key[2], "best": [[tokens, list(config)] for tokens, config in best]})

    parts = []
    for gpu, entries in sorted(tables.items(), key=lambda item: item[0].name):
        lines = ",\n".join(f"  {line(key, best)}" for key, best in sorted(entries.items()))
        head = json.dumps({"name": gpu.name, "capability": gpu.capability, "multiprocessors": gpu.multiprocessors})[:-1]
        parts.append(f' {head}, "entries": [\n{lines}\n ]}}')
    fs.make_dir(path.parent)
    fs.write_bytes(path, ('{"gpus": [\n' + ",\n".join(parts) + "\n]}\n").encode())


def merged(tables: Mapping[Gpu, Entries], gpu: Gpu, found: Entries) -> dict[Gpu, Entries]:
    """``tables`` with what was ``found`` on ``gpu`` over what was known of the same weights and numbers of tokens."""
    known = dict(tables.get(gpu, {}))
    for key, best in found.items():
        known[key] = tuple(sorted({**dict(known.get(key, ())), **dict(best)}.items()))
    return {**tables, gpu: known}


@cache
def user_table() -> Path:
    """Where ``--tune`` writes what it measured on this machine."""
    return cache_folder() / "kernel_table.json"


@cache
def _entries(gpu: Gpu) -> Entries:
    """What is known of ``gpu``: the table that comes with quantkit, and the user's over it."""
    paths = [TABLE]
    with suppress(MachineError):  # without a home nothing was written there
        paths.append(user_table())
    known: dict[Gpu, Entries] = {}
    for path in paths:
        tables = read_tables(path)
        like = [each for each in tables if (each.capability, each.multiprocessors) == (gpu.capability, gpu.multiprocessors)]
        known = merged(known, gpu, tables.get(gpu) or next((tables[each] for each in like), {}))
    return known[gpu]


@lru_cache(maxsize=1 << 16)
def choose(gpu: Gpu, form: Format, n: int, k: int, tokens: int) -> Config | None:
    """The configuration of the least measured number of tokens that is not below ``tokens``; None where the library's rule decides."""
    best = _entries(gpu).get((family(form), n, k), ())
    return next((config for measured, config in best if measured >= tokens), best[-1][1] if best else None)


@lru_cache(maxsize=1 << 16)
def chosen(device: torch.device, form: int, n: int, k: int, tokens: int) -> Config:
    """``choose`` on a CUDA device, with the library's rule in place of None."""
    return choose(gpu_of(device), Format(form), n, k, tokens) or Config(RULE)


# what may be measured


def configs(gpu: Gpu, form: Format, n: int, k: int, tokens: int) -> Iterator[Config]:
    """Every configuration that may be the best one for this product; a kernel that has none of its kind answers so and is passed over."""
    yield Config(RULE)
    if tokens <= 64:
        yield from mma_configs(tokens)
    if gpu.capability[0] == 9 and tokens > 8:
        yield from wgmma_configs(gpu, n, k, tokens)
    if tokens >= 64:
        yield Config(DENSE)


_MMA_SHAPES: Mapping[int, tuple[tuple[int, int, int, int], ...]] = {
    8: (
        *((2, 8, 1, 1), (2, 8, 1, 2), (2, 8, 2, 1), (2, 4, 2, 2), (2, 4, 4, 1)),
        *((4, 8, 1, 1), (4, 8, 1, 2), (4, 8, 2, 1), (4, 4, 2, 1), (4, 4, 2, 2), (4, 4, 4, 1)),
    ),
    16: ((2, 8, 1, 1), (2, 8, 1, 2), (2, 8, 2, 1), (2, 4, 2, 2), (2, 4, 4, 1)),
    32: ((2, 8, 1, 1), (2, 8, 2, 1), (4, 8, 1, 1)),
}
"""Rows of x in a block -> 16-row blocks of a warp, warps of a team, teams of a block, blocks to a multiprocessor."""


def mma_configs(tokens: int) -> Iterator[Config]:
    """Of ``kernels/decode``: its ``launch.cuh`` reads them. All are launched before the kernel ahead of them has ended."""
    for rows, shapes in _MMA_SHAPES.items():
        if 2 * rows < tokens or rows >= max(16, 2 * tokens):
            continue
        for blocks, warps, teams, resident in shapes:
            for splits in (1, 2, 4, 8):
                yield Config(MMA, rows, splits, blocks | warps << 4 | teams << 12 | resident << 20, 1 << 9)


_WGMMA_SHAPES = ((16, 2), (16, 4), (32, 2), (32, 3), (32, 4), (64, 2), (64, 3), (64, 4), (128, 2), (128, 3), (128, 4), (256, 2))
"""Rows of y in a tile, and warpgroups."""
_EVEN = -3
"""A cut: the blocks are dealt out evenly over tiles of y along K, and each block that shares a tile adds up a part of it."""


def wgmma_configs(gpu: Gpu, n: int, k: int, tokens: int) -> Iterator[Config]:
    """Of ``kernels/prefill``: its ``matmul.cu`` reads them. All are launched before the kernel ahead of them has ended."""
    shapes: tuple[tuple[int, int], ...] = _WGMMA_SHAPES
    cuts: tuple[int, ...] = (-1, 1, 2, 3, 4, 5, 6, 8)
    if tokens >= 1024:  # tiles in plenty
        shapes, cuts = ((128, 2), (256, 2)), (0, -1, -2, 1, 2)
    elif tokens >= 256:
        cuts = (0, -1, -2, 1, 2, 3, 4, 5)
    for rows, groups in shapes:
        if not min(tokens, 128) <= rows <= max(tokens, 16) and rows != next(each for each, _ in _WGMMA_SHAPES if each >= min(tokens, 256)):
            continue
        tiles = -(-tokens // rows) * -(-n // (64 * groups))
        for cut in cuts:
            if cut > 1 and (cut - 1) * tiles > 2 * gpu.multiprocessors:  # busy without splitting K further
                continue
            for flags in (2, 3) if cut <= 0 else (2,):  # 1: x by multicast, 2: dependent launch
                yield Config(WGMMA, rows, groups, cut, flags)
        at_once = gpu.multiprocessors * (2 if rows <= 64 and groups == 2 else 1)
        shares = [each for each in range(2, 17) if tiles * each <= at_once and k >= 256 * each]
        for each in shares[-2:]:
            yield Config(WGMMA, rows, groups | tiles * each << 8, _EVEN, 2)
