"""Fused operations: as torch operators they are their references, in a decoder they change nothing, and on a GPU they round alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from decoder_fixtures import batch_of, config_of, random_twin, texts_of
from torch import Tensor

from quantkit.errors import MachineError
from quantkit.model.load import load_decoder
from quantkit.ops import fused
from quantkit.runtime.kv_cache import whole_cache

HALVES = (torch.float16, torch.bfloat16)


def values(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0) -> Tensor:
    """Normal values with a few that are large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.01, 30 * x, x).to(device, dtype)


def angles(tokens: int, half: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    turns = torch.arange(tokens).unsqueeze(-1) * 0.7 ** torch.arange(half)
    return turns.cos().to(device, dtype).unsqueeze(1), turns.sin().to(device, dtype).unsqueeze(1)


def rotary_case(
    lengths: Sequence[int], heads: int, kv_heads: int, dim: int, half: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """``q``, ``k``, ``v``, cosine and sine of sequences of ``lengths`` tokens."""
    tokens = sum(lengths)
    sizes = (heads, kv_heads, kv_heads)
    q, k, v = (values(tokens, count, dim, dtype=dtype, device=device, seed=i) for i, count in enumerate(sizes))
    return q, k, v, *angles(tokens, half, dtype, device)


def test_the_operators_are_sound() -> None:
    """Schema, fake and what they say they write, by torch's own check."""
    x, w = values(3, 16), values(16)
    q, k, v, cos, sin = rotary_case((2, 1), 4, 2, 8, 3, torch.bfloat16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused.silu_mul, (x, values(3, 16, seed=1)), test_utils=tests)
    torch.library.opcheck(fused.rms_norm, (x, w, 1e-5, 1.0), test_utils=tests)
    torch.library.opcheck(fused.add_rms_norm, (x, values(3, 16, seed=1), w, 1e-5, 0.0), test_utils=tests)
    pool = values(2, 9, 2, 8)
    torch.library.opcheck(fused.rotary_write, (q, k, v, cos, sin, torch.tensor([4, -1, 7]), *pool.unbind()), test_utils=tests)


def pool_case(tokens: int, kv_heads: int, dim: int, stored: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Scattered ``slots`` of ``tokens``, every third of them none, and a layer's keys and values: zeros of more places."""
    places = torch.randperm(2 * tokens + 1, generator=torch.Generator().manual_seed(tokens))[:tokens]
    slots = torch.where(torch.arange(tokens) % 3 == 2, -1, places)
    pool = torch.zeros(2, 2 * tokens + 1, kv_heads, dim, device=device).to(stored)
    return slots.to(device), *pool.unbind()


@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e4m3fn])
def test_rotary_writes_the_slots_it_is_given(stored: torch.dtype) -> None:
    q, k, v, cos, sin = rotary_case((2, 5, 1), 4, 2, 8, 3, torch.float32)
    v[0] *= 1e4  # beyond float8
    slots, keys, store = pool_case(8, 2, 8, stored)
    want = [torch.zeros(keys.shape), torch.zeros(keys.shape)]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want[0][slot], want[1][slot] = fused.rotate(k, cos, sin)[token], v[token]
    if stored == torch.float8_e4m3fn:
        want = [each.clamp(-448, 448).to(stored) for each in want]
    assert torch.equal(fused.rotary_write(q, k, v, cos.squeeze(1), sin.squeeze(1), slots, keys, store), fused.rotate(q, cos, sin))
    assert torch.equal(keys.float(), want[0].float())
    assert torch.equal(store.float(), want[1].float())
    assert bool((store.float().abs().amax(-1) > 0).sum() == 2 * (slots >= 0).sum())


def test_nothing_is_fused_on_a_cpu() -> None:
    assert not fused.usable(values(2, 2))


def test_a_missing_kernel_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_functions", lambda: None)
    with pytest.raises(MachineError, match=r"^CUDA kernels: lack quantkit_silu_mul, expected") as caught:
        fused._launch("silu_mul", torch.device("cuda", 0))
    assert caught.value.hint == "quantkit doctor --build-kernels"


@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen3", "gemma2", "gemma3", "phi3-partial", "gpt2", "qwen2-moe"])
def test_a_fused_decoder_is_the_decoder(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' references in their places, prefill and decode of three sequences: the same bits; and every operator is called."""
    _, checkpoint = random_twin(config_of(family), torch.bfloat16)
    decoder = load_decoder(checkpoint, dtype=torch.bfloat16)
    called: set[str] = set()
    for name in ("silu_mul", "rms_norm", "add_rms_norm", "rotary_write"):
        monkeypatch.setattr(fused, name, _counted(getattr(fused, name), name, called))
    plain = _served(decoder)
    assert called == set()
    monkeypatch.setattr(fused, "usable", lambda x: True)
    assert all(torch.equal(one, other) for one, other in zip(plain, _served(decoder), strict=True))
    missing = {"gpt2": {"silu_mul", "rms_norm", "add_rms_norm", "rotary_write"}, "qwen2-moe": {"silu_mul"}}
    activation = {"silu_mul"} if family.startswith("gemma") else set()
    assert called == {"silu_mul", "rms_norm", "add_rms_norm", "rotary_write"} - missing.get(family, set()) - activation


def _counted(operator: Callable[..., object], name: str, called: set[str]) -> Callable[..., object]:
    def call(*arguments: object) -> object:
        called.add(name)
        return operator(*arguments)

    return call


@torch.inference_mode()
def _served(decoder: object) -> list[Tensor]:
    cache = whole_cache(decoder, 40, 3)
    texts = texts_of((7, 1, 12))
    found = []
    for steps in ([(0, 5), (0, 1), (0, 9)], [(5, 6), (1, 1), (9, 12)], [(6, 7)]):
        tokens = torch.cat([text[start:stop] for text, (start, stop) in zip(texts, steps, strict=False)])
        batch = batch_of(steps, tuple(range(len(steps))))
        found.append(decoder.forward(tokens, batch, cache))
    return found


# on a GPU


@pytest.fixture(scope="module")
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if not fused.usable(torch.empty(1, dtype=torch.float16, device="cuda")):
        pytest.skip("the CUDA kernels are not built: quantkit doctor --build-kernels")
    return "cuda"


def near(got: Tensor, want: Tensor, steps: int = 1) -> bool:
    """Whether no element is further off than ``steps`` roundings."""
    assert got.shape == want.shape and got.dtype == want.dtype
    ulp = torch.finfo(got.dtype).eps * want.float().abs().clamp(min=torch.finfo(got.dtype).tiny)
    return bool(((got.float() - want.float()).abs() <= steps * ulp).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows,columns", [(1, 14336), (7, 256), (130, 80), (5, 33), (70000, 8), (0, 64)])
def test_gpu_silu_mul(rows: int, columns: int, dtype: torch.dtype, gpu: str) -> None:
    both = values(rows, 2 * columns, dtype=dtype, device=gpu)
    for gate, up in ((both[:, :columns], both[:, columns:]), (both[:, ::2], both[:, 1::2])):
        assert near(fused.silu_mul(gate, up), fused.silu_mul_reference(gate, up))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 4096), (3, 8192), (2, 12288), (2, 28672), (5, 33), (7, 4, 128), (300, 8, 64), (0, 64)])
def test_gpu_norms(shape: tuple[int, ...], offset: float, dtype: torch.dtype, gpu: str) -> None:
    x, residual = (values(*shape, dtype=dtype, device=gpu, seed=seed) for seed in (1, 2))
    weight = values(shape[-1], dtype=dtype, device=gpu, seed=3)
    steps = 2 if offset == 0 else 1  # a quotient rounded the other way is then multiplied
    assert near(fused.rms_norm(x, weight, 1e-5, offset), fused.rms_norm_reference(x, weight, 1e-5, offset), steps)
    total, normed = fused.add_rms_norm(x, residual, weight, 1e-5, offset)
    assert torch.equal(total, x + residual)
    assert near(normed, fused.rms_norm_reference(total, weight, 1e-5, offset), steps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    "tokens,heads,kv_heads,dim,half",
    [
        (1, 32, 8, 128, 64),
        (150, 4, 2, 64, 32),
        (310, 6, 3, 16, 6),
        (5, 5, 5, 12, 6),
        (4, 3, 0, 128, 64),
        (0, 4, 2, 64, 32),
        (9, 4, 1, 96, 24),
    ],
)
def test_gpu_rotary_write(tokens: int, heads: int, kv_heads: int, dim: int, half: int, fp8: bool, dtype: torch.dtype, gpu: str) -> None:
    q, k, v, cos, sin = rotary_case((tokens,), heads, kv_heads, dim, half, dtype, gpu)
    v[:, :, ::5] *= 100  # beyond float8
    stored = torch.float8_e4m3fn if fp8 else dtype
    joined = torch.cat([q, k, v], 1)  # as one fused product would give them: tokens further apart
    for given in ((q, k, v), joined.split([heads, kv_heads, kv_heads], 1)):
        (slots, *got), (_, *want) = (pool_case(tokens, kv_heads, dim, stored, gpu) for _ in range(2))
        rotated = fused.rotary_write(*given, cos.squeeze(1), sin.squeeze(1), slots, *got)
        assert torch.equal(rotated, fused.rotary_write_reference(q, k, v, cos, sin, slots, *want))
        assert all(torch.equal(one.float(), other.float()) for one, other in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_gpu_fused_decoder_errs_as_the_plain_one(family: str, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = random_twin(config_of(family), torch.bfloat16)
    exact = _served(load_decoder(checkpoint, dtype=torch.float64))
    decoder = load_decoder(checkpoint, dtype=torch.bfloat16, device=gpu)
    fast = _served(decoder)
    monkeypatch.setattr(fused, "usable", lambda x: False)
    error = [
        max(float((one.cpu().double() - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True))
        for found in (fast, _served(decoder))
    ]
    assert error[0] < 1.3 * error[1], error


@pytest.mark.gpu
def test_gpu_operators_run_in_a_graph(gpu: str) -> None:
    """Inputs as fused products give them: halves and parts of rows. Replays read what is in the inputs then, slots among them."""
    tokens, heads, kv_heads, dim = 5, 8, 2, 64
    x, residual, weight = (values(*shape, device=gpu, seed=i) for i, shape in enumerate(((tokens, 512), (tokens, 512), (512,))))
    gate_up = values(tokens, 2 * 512, device=gpu, seed=3)
    qkv = values(tokens, (heads + 2 * kv_heads) * dim, device=gpu, seed=4)
    parts = [part.unflatten(1, (-1, dim)) for part in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)]
    cos, sin = (each.squeeze(1) for each in angles(tokens, dim // 2, torch.bfloat16, gpu))
    slots, keys, store = pool_case(tokens, kv_heads, dim, torch.float8_e4m3fn, gpu)

    def step() -> list[Tensor]:
        total, normed = fused.add_rms_norm(x, residual, weight, 1e-5, 0.0)
        out = fused.silu_mul(*gate_up.chunk(2, 1))
        return [total, normed, out, fused.rms_norm(out, weight, 1e-5, 1.0), fused.rotary_write(*parts, cos, sin, slots, keys, store)]

    step()  # what is looked up once
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for each in (x, gate_up, qkv):
        each.copy_(values(*each.shape, device=gpu, seed=9))
    slots.copy_(slots.flip(0))
    for each in captured:
        each.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    _, keys_want, values_want = pool_case(tokens, kv_heads, dim, torch.float8_e4m3fn, gpu)
    rotated = fused.rotary_write_reference(*parts, cos, sin, slots, keys_want, values_want)
    total, normed = fused.add_rms_norm_reference(x, residual, weight, 1e-5, 0.0)
    out = fused.silu_mul_reference(*gate_up.chunk(2, 1))
    assert torch.equal(captured[0], total)
    assert near(captured[1], normed, 2)
    assert near(captured[2], out)
    assert near(captured[3], fused.rms_norm_reference(captured[2], weight, 1e-5, 1.0))
    assert torch.equal(captured[4], rotated)
    written = (slots >= 0).nonzero().flatten()
    assert torch.equal(keys[slots[written]].float(), keys_want[slots[written]].float())
    assert torch.equal(store[slots[written]].float(), values_want[slots[written]].float())
