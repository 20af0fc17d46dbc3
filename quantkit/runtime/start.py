"""From a path to what takes requests: the checkpoint opened, ranks started and measured, memory divided, an engine for each replica.

What an engine does is ``engine.py``'s, where ranks live is ``processes.py``'s and ``ray_hosts.py``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.checkpoint.blocks import as_blocks
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_manifest, resolve_path
from quantkit.errors import InputError, MachineError
from quantkit.model.attention import BACKENDS
from quantkit.ops.dtypes import float_dtype
from quantkit.plan import KV_DTYPES, LM_HEADS, PASS_SEQUENCES, PASS_TOKENS, make_plan
from quantkit.progress import Progress, silent
from quantkit.quant_config import stored_assignment
from quantkit.runtime.blocks import BLOCK, blocks_for
from quantkit.runtime.devices import default_dtype, place_for
from quantkit.runtime.engine import Engine, EngineLimits, Front
from quantkit.runtime.executor import Executor, Hosts, LocalExecutor, start_executors
from quantkit.runtime.processes import ThisHost
from quantkit.runtime.ray_hosts import RayHosts
from quantkit.runtime.replicas import Replicas
from quantkit.runtime.wire import RankJob
from quantkit.shard import open_rank
from quantkit.text.tokenizer import load_tokenizer

MEMORY_SHARE = 0.9
EXECUTORS = ("local", "ray")


def start_engine(
    path: str,
    *,
    tp: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    seqs_by_device: Mapping[str, int] = PASS_SEQUENCES,
    max_num_batched_tokens: int | None = None,
    memory_share: float = MEMORY_SHARE,
    kv_cache_dtype: str = "auto",
    lm_head: str = "auto",
    attention_backend: str = "auto",
    prefix_caching: bool = True,
    max_queue: int = 64,
    timeout: float = 60.0,
    parity: bool = False,
    dp: int = 1,
    executor: str = "local",
    progress: Progress = silent,
) -> Front:
    """Load the model PATH and start serving it: one rank in this process, more as processes of their own or as actors of Ray's.

    ``dp`` replicas, each of ``tp`` ranks and with the limits below, stand behind one front. ``executor`` "local" runs all on this host,
    "ray" on the hosts of the cluster RAY_ADDRESS, or of one that it starts here.

    A shard directory brings its own ``tp``; anything else is cut for ``tp`` ranks (1 when None) as it is read. ``device``
    "auto" is CUDA where there is any. ``dtype`` None is bfloat16, whatever the checkpoint stores (float16 on a GPU without
    it, float32 with ``parity``). ``max_model_len`` None is what the model was trained for, or less where the memory is less.
    ``memory_share`` of a GPU's memory (on a CPU of what is free) is for weights, passes, and keys and values; those are stored in
    ``kv_cache_dtype``: "auto" as computed, "fp8" in half the memory of 16 bits. ``lm_head`` "q8_0" encodes a head in floats to 8 bits.
    ``attention_backend``: one of ``attention.BACKENDS``.
    ``max_num_seqs`` None is what ``seqs_by_device`` says; ``max_num_batched_tokens``, of one pass, is 4096 then on a GPU and 1024 on a CPU.
    ``timeout`` in seconds ends a rank that others wait for. Raises InputError and MachineError for what cannot be.
    """
    if (max_num_seqs is not None and max_num_seqs < 1) or max_queue < 0 or timeout <= 0:
        raise InputError("engine", f"max_num_seqs {max_num_seqs}, max_queue {max_queue}, timeout {timeout}", "at least 1, 0 and above 0")
    if not 0 < memory_share <= 1:
        raise InputError("--gpu-memory-utilization", f"is {memory_share}", "more than 0, up to 1")
    if kv_cache_dtype not in KV_DTYPES:
        raise InputError("--kv-cache-dtype", f"is {kv_cache_dtype!r}", f"one of {', '.join(KV_DTYPES)}")
    if lm_head not in LM_HEADS:
        raise InputError("--lm-head", f"is {lm_head!r}", f"one of {', '.join(LM_HEADS)}")
    if attention_backend not in BACKENDS:
        raise InputError("--attention-backend", f"is {attention_backend!r}", f"one of {', '.join(BACKENDS)}")
    root = resolve_path(path)
    manifest = read_manifest(root)
    sharded = manifest is not None and manifest.get("kind") == "shards"
    checkpoint, ranks = _open(root, sharded, tp)
    spec = spec_for(checkpoint.config)
    longest = _longest(spec, max_model_len)
    tokenizer = load_tokenizer(root)
    if dp < 1:
        raise InputError("--dp", f"is {dp}", "at least 1")
    if executor not in EXECUTORS:
        raise InputError("--executor", f"is {executor!r}", f"one of {', '.join(EXECUTORS)}")
    if dtype is not None:
        float_dtype(dtype)
    with ExitStack() as undo:
        hosts: Hosts = RayHosts(device, ranks, dp, timeout) if executor == "ray" else ThisHost(place_for(device, ranks * dp), ranks, dp)
        undo.callback(hosts.close)
        place, name = hosts.place, dtype or default_dtype(hosts.place, parity)
        seats = max_num_seqs or seqs_by_device[place]
        tokens = max(seats, PASS_TOKENS[place]) if max_num_batched_tokens is None else max_num_batched_tokens
        if tokens < seats:
            raise InputError("--max-num-batched-tokens", f"is {tokens}", f"at least --max-num-seqs, {seats}")
        fp8 = kv_cache_dtype == "fp8"
        given = (str(root), sharded, ranks, name, place, parity, timeout, fp8, memory_share, tokens, seats)
        job = RankJob(*given, lm_head=lm_head, attention=attention_backend)
        alone = executor == "local" and ranks == dp == 1
        started = [] if alone else start_executors(job, hosts, dp, progress)
        executors: Sequence[Executor] = started or [LocalExecutor(job, progress)]
        for each in executors:
            undo.callback(each.close)
        rooms = [_kv_room(each, place, longest, max_model_len is not None, seats) for each in executors]
        longest = min(length for length, _ in rooms)
        for replica, (_, blocks) in zip(started, rooms, strict=False):
            replica.begin_cache(blocks)  # all at the same time
        engines: list[Engine] = []
        for each, (_, blocks) in zip(executors, rooms, strict=True):
            limits = EngineLimits(longest, seats, max_queue, blocks, tokens, prefix_caching)
            engines.append(Engine(each, tokenizer, spec, limits, dtype=name))
            undo.callback(engines[-1].close)
        undo.pop_all()
    return engines[0] if dp == 1 else Replicas(engines, prefix_caching=prefix_caching)


def _open(root: Path, sharded: bool, tp: int | None) -> tuple[Checkpoint, int]:
    """The checkpoint (of a shard directory, rank 0's) and the number of ranks, once it is known that the model can be cut so."""
    if sharded:
        checkpoint, plan, _ = open_rank(root, 0)
        if tp not in (None, plan.tp):
            hint = f"leave --tp out, or shard again: quantkit shard ART OUT --tp {tp}"
            raise InputError(str(root), f"was cut for {plan.tp} ranks, --tp says {tp}", f"--tp {plan.tp}", hint)
        return checkpoint, plan.tp
    checkpoint, ranks = as_blocks(open_checkpoint(root)), 1 if tp is None else tp
    spec = spec_for(checkpoint.config)
    make_plan(spec, stored_assignment(checkpoint.config, spec, checkpoint.tensors), ranks, dtype="BF16")
    return checkpoint, ranks


def _longest(spec: ModelSpec, asked: int | None) -> int:
    """The tokens of the longest text: as asked, else as trained."""
    if asked is None:
        return spec.max_positions
    if asked < 2 or (asked > spec.max_positions and not spec.stretches):
        raise InputError("--max-model-len", f"is {asked}", f"2 to {spec.max_positions}, which the model was made for")
    return asked


def _kv_room(executor: Executor, place: str, longest: int, asked: bool, max_num_seqs: int) -> tuple[int, int]:
    """The longest text and the blocks that the caches hold: what every rank has memory for.

    On a CPU no more than the seats can fill: what is left belongs to others too.
    """
    full = blocks_for(longest) * max_num_seqs
    blocks = min((rank.kv_blocks for rank in executor.facts if rank.kv_blocks is not None), default=full)
    fits = BLOCK * blocks
    if not fits or (asked and fits < longest):
        where = "--max-model-len" if asked else "keys and values"
        raise MachineError(
            where, f"{longest} tokens do not fit into the memory that the weights leave", f"at most {fits}", "more memory or ranks"
        )
    return min(longest, fits), min(blocks, full) if place == "cpu" else blocks
