"""ggml's block types: hashes of ggml's own bytes, decoding by the gguf package, laws of rounding, bad input."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import gguf
import numpy as np
import pytest

from quantkit.errors import InputError, MachineError
from quantkit.ops.ggml.encode import BLOCKS, encode

# Kind -> the first 16 hex digits of the SHA-256 of: bytes, bytes decoded to float32, bytes made with importance.
GOLDEN = {
    "Q8_0": ("85196a8f4ebca267", "62b870ef5b25cacf", "85196a8f4ebca267"),
    "Q4_0": ("52aaad9b64977bf3", "3d953262ad8cc34c", "1e2a5627059eb1a4"),
    "Q4_1": ("3825bfb150d0aaec", "6634bfd464f60ac4", "36088bdee5f9eded"),
    "Q5_0": ("627b7f18bc1fa96e", "c560a18b8ed91dfa", "c1587802b236507d"),
    "Q5_1": ("010d2fa7ace914a8", "6a4edfaf1f17d00a", "c64546855395c055"),
    "Q2_K": ("27a84850e68a045d", "5bcc28cee0ab1c91", "2a47882b88324cb6"),
    "Q3_K": ("16477c29e1d4a0a5", "50fb4df8c06647f0", "27c9b92c030b04d8"),
    "Q4_K": ("0fb84ac20ecd08dc", "2720631d1622afa1", "11128513a805796a"),
    "Q5_K": ("156726614bb73614", "410926b9931a65ce", "c75019e7208486fc"),
    "Q6_K": ("da6e0a07b4ef2b5b", "5ca1b2242bbcefce", "19f737579a772ced"),
    "IQ4_NL": ("3668b5fb5f8a7677", "3bb7cbe2fa38b00f", "8d63dd67aac23872"),
    "IQ4_XS": ("2306d4d525056571", "c65325d583bd95cb", "f398cf5e2c6339bf"),
}
# Kind -> the largest root mean square error, of that of the values, on Gaussian values.
ERRORS = {
    "Q8_0": 0.006, "Q4_0": 0.09, "Q4_1": 0.08, "Q5_0": 0.045, "Q5_1": 0.04, "Q2_K": 0.32, "Q3_K": 0.17, "Q4_K": 0.075, "Q5_K": 0.038,
    "Q6_K": 0.019, "IQ4_NL": 0.08, "IQ4_XS": 0.08,
}  # fmt: skip


def sequence(seed: int, count: int) -> np.ndarray:
    """The upper 24 bits of a linear congruential generator, int64 [count]."""
    numbers = np.empty(count, np.int64)
    for i in range(count):
        seed = (1664525 * seed + 1013904223) % 2**32
        numbers[i] = seed >> 8
    return numbers


def bell(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def decode(data: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def golden() -> tuple[np.ndarray, np.ndarray]:
    """Values float32 [64, 512] with outliers, importance float32 [512]."""
    values = (sequence(42, 4 * 64 * 512).reshape(-1, 4).sum(axis=1) - 2.0**25) * 2.0**-24 * 0.05
    values[::97] *= 20
    importance = sequence(7, 512) * 2.0**-24 + 2.0**-10
    return values.astype(np.float32).reshape(64, 512), importance.astype(np.float32)


def test_the_golden_input_is_the_one_that_was_hashed(golden: tuple[np.ndarray, np.ndarray]) -> None:
    assert (digest(golden[0]), digest(golden[1])) == ("f5a458aec469a8a3", "ee7e3a0fd549146b")


@pytest.mark.parametrize("kind", BLOCKS)
def test_bytes_are_those_of_ggml(kind: str, golden: tuple[np.ndarray, np.ndarray]) -> None:
    values, importance = golden
    plain = encode(values, kind)
    assert (digest(plain), digest(decode(plain, kind)), digest(encode(values, kind, importance))) == GOLDEN[kind]


def test_blocks_are_those_of_the_gguf_package() -> None:
    assert {kind: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] for kind in BLOCKS} == dict(BLOCKS)


@pytest.mark.parametrize("kind", BLOCKS)
def test_error_of_gaussian_values(kind: str) -> None:
    values = bell(16, 1024)
    for importance in (None, np.ones(1024, np.float32)):
        error = np.sqrt(np.mean((decode(encode(values, kind, importance), kind) - values) ** 2))
        assert ERRORS[kind] / 2 < error < ERRORS[kind]


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind != "Q8_0"])
def test_importance_moves_error_to_the_other_columns(kind: str) -> None:
    values = bell(64, 512)
    importance = np.where(np.arange(512) % 4 == 0, 100, 1).astype(np.float32)
    plain, weighed = (np.square(decode(encode(values, kind, each), kind) - values) for each in (None, importance))
    assert weighed[:, ::4].mean() < plain[:, ::4].mean()
    assert (weighed * importance).mean() < (plain * importance).mean()


def test_q8_0_of_what_q8_0_decodes_is_the_same() -> None:
    first = encode(bell(32, 256), "Q8_0")
    scales = first.reshape(-1, 34)[:, :2].copy().view(np.float16)
    again = encode(decode(first, "Q8_0"), "Q8_0")
    assert np.array_equal(first.reshape(-1, 34)[:, 2:], again.reshape(-1, 34)[:, 2:])
    assert np.array_equal(scales, again.reshape(-1, 34)[:, :2].copy().view(np.float16))


def test_q8_0_rounds_half_away_from_zero() -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, :6] = [127, 0.5, -0.5, 1.5, -2.5, 0.49999997]
    assert encode(values, "Q8_0")[0, 2:8].view(np.int8).tolist() == [127, 1, -1, 2, -3, 0]


@pytest.mark.parametrize("kind", BLOCKS)
def test_threads_do_not_change_a_byte(kind: str) -> None:
    values, importance = bell(7, 768), np.random.default_rng(1).random(768, np.float32)
    for weights in (None, importance):
        one = encode(values, kind, weights)
        assert np.array_equal(one, encode(values, kind, weights, threads=3))
        assert np.array_equal(one, encode(values, kind, weights, threads=20))
        assert np.array_equal(one[5:6], encode(values[5:6], kind, weights))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("weighed", [False, True])
def test_zero_blocks_decode_to_zero(kind: str, weighed: bool) -> None:
    importance = np.random.default_rng(1).random(512, np.float32) if weighed else None
    assert not decode(encode(np.zeros((3, 512), np.float32), kind, importance), kind).any()
    assert not decode(encode(bell(3, 512) * np.float32(1e-30), kind, importance), kind).any()


@pytest.mark.parametrize("kind", BLOCKS)
def test_odd_shapes_of_data_decode_near_them(kind: str) -> None:
    noise = bell(2, 512)
    holes = np.random.default_rng(1).random(512, np.float32)
    holes[::3] = 0
    holes[:256] = 0  # a whole block, and the second one has columns that do not count
    for values in (np.full((2, 512), -0.37, np.float32), abs(noise), -abs(noise), noise * np.float32(1e4), np.sign(noise)):
        for importance in (None, holes):
            error = np.abs(decode(encode(values, kind, importance), kind) - values)[:, 256:][:, holes[256:] > 0]
            assert error.max() < 0.5 * np.abs(values).max()


def test_first_of_equal_extremes_and_blocks_of_one_sign_are_as_in_the_gguf_package() -> None:
    """What the vector way through a block leaves to the scalar one."""
    values = bell(12, 256)
    values[0], values[1] = abs(values[0]), -abs(values[1])
    values[2, :64], values[3, ::2] = 0, 0
    values[4, ::32], values[4, 5::32] = 7, -7
    values[5, ::32], values[5, 5::32] = -7, 7
    values[6] = 0  # of nothing but -0.0 the package makes another zero than ggml
    values[8] = np.where(np.arange(256) % 3 == 0, np.float32(-0.0), abs(values[8]))
    values[9] = np.where(np.arange(256) % 3 == 1, np.float32(-0.0), -abs(values[9]))
    values[10], values[11] = 0.3, -0.3
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        assert np.array_equal(encode(values, kind), expected), (kind, np.flatnonzero((encode(values, kind) != expected).any(axis=1)))


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_may_be_none(kind: str) -> None:
    elements, size = BLOCKS[kind]
    assert encode(np.empty((0, 2 * elements), np.float32), kind).shape == (0, 2 * size)


def test_halves_are_those_of_numpy() -> None:
    from quantkit.ops.ggml import kernels

    every = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    sorted_ = np.sort(every[np.isfinite(every)]).astype(np.float64)
    ties = ((sorted_[1:] + sorted_[:-1]) / 2).astype(np.float32)
    random = np.random.default_rng(0).integers(0, 2**32, 1 << 20, dtype=np.uint32).view(np.float32)
    near = [np.nextafter(ties, np.float32(end)) for end in (np.inf, -np.inf)]
    values = np.concatenate([every, ties, *near, random, np.array([65519.996, 65520, -65520, 1e30], np.float32)])
    halves, back = np.empty(values.size, np.uint16), np.empty(values.size, np.float32)
    kernels.halves(values, halves, back)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    number = ~np.isnan(values)
    assert np.array_equal(halves[number], expected.view(np.uint16)[number])
    assert np.array_equal(back[number], expected.astype(np.float32)[number])
    assert np.isnan(back[~number]).all()
    assert set(halves[~number].tolist()) == {0x7E00, 0xFE00}


@pytest.mark.parametrize("kind", BLOCKS)
def test_values_too_large_for_a_float16_scale_are_an_error(kind: str) -> None:
    values = bell(4, 512)
    values[2, 300] = 1e30
    with pytest.raises(InputError, match="row 2 does not fit in float16"):
        encode(values, kind)


BAD = {
    "kind": (lambda: encode(bell(1, 256), "Q9_K"), "Q9_K: unknown block type, expected one of Q4_0"),
    "columns": (lambda: encode(bell(1, 288), "Q4_K"), "288 columns, expected a multiple of 256"),
    "dims": (lambda: encode(bell(1, 256)[0], "Q4_K"), r"float32 of shape \(256,\), expected a C-contiguous float32 matrix"),
    "dtype": (lambda: encode(bell(1, 256).astype(np.float64), "Q4_K"), "float64 of shape"),
    "order": (lambda: encode(np.asfortranarray(bell(256, 256)), "Q4_K"), "expected a C-contiguous"),
    "nan": (lambda: encode(np.where(np.arange(512).reshape(2, 256) == 300, np.float32(np.nan), 1), "Q4_0"), "row 1 is not finite"),
    "inf": (lambda: encode(np.full((1, 32), np.float32(-np.inf)), "Q8_0"), "row 0 is not finite"),
    "importance": (lambda: encode(bell(2, 256), "Q4_K", np.ones(128, np.float32)), r"importance: float32 of shape \(128,\), expected"),
    "negative": (lambda: encode(bell(2, 256), "Q4_K", -np.ones(256, np.float32)), "importance: has a value that is negative"),
    "not finite": (lambda: encode(bell(2, 256), "Q4_K", np.full(256, np.float32(np.nan))), "importance: has a value"),
    "threads": (lambda: encode(bell(2, 256), "Q4_K", threads=0), "threads: 0, expected at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(InputError, match=message):
        call()


def test_without_numba_there_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "quantkit.ops.ggml.kernels", raising=False)
    monkeypatch.delattr("quantkit.ops.ggml.kernels", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(MachineError, match="numba: cannot be imported") as caught:
        encode(bell(1, 256), "Q4_K")
    assert caught.value.hint == "pip install numba"


def test_numba_is_imported_only_to_encode() -> None:
    code = "import sys, quantkit.ops.ggml.encode; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
