"""What one rank does: load its slices, run steps, and, as rank 0, sample. ``python -m quantkit.runtime.worker FD`` is a rank process.

A process that serves as a rank, this one or an actor of Ray's, obeys a socket and never outlives whoever holds the other end. This module
knows no requests and no text.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.checkpoint.blocks import as_blocks
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.comm import Comm, ProcessComm, Solo, join_store, serve_store
from quantkit.errors import MachineError, QuantkitError, RuntimeDied
from quantkit.model.decoder import Batch, Decoder
from quantkit.model.load import load_decoder
from quantkit.model.rope import LENGTH_DEPENDENT
from quantkit.ops.dtypes import float_dtype
from quantkit.ops.symmetric import open_sums
from quantkit.ops.transfer import upload
from quantkit.plan import ParallelPlan, make_plan, pass_bytes
from quantkit.progress import Progress, silent
from quantkit.quant_config import stored_assignment
from quantkit.runtime.blocks import BLOCK, blocks_for
from quantkit.runtime.graphs import graph_bytes, make_graphs
from quantkit.runtime.kv_cache import cache_for, kv_block_bytes
from quantkit.runtime.sampler import Drawn, Sampler, SamplingParams
from quantkit.runtime.scheduler import UNKNOWN, Chunk
from quantkit.runtime.wire import (
    Message,
    RankFacts,
    RankJob,
    Step,
    error_to_json,
    frame,
    received,
    sampled_to_json,
    step_from_json,
)
from quantkit.scheme import Assignment
from quantkit.shard import open_rank

_LOG = logging.getLogger("quantkit")
BEAT_SECONDS = 1.0
SCORE_ROWS = 256
"""Positions of a prompt that are scored at a time: it bounds the memory of their logits."""
_PR_SET_PDEATHSIG = 1


class Runner:
    """A rank's model, its cache and its part of sampling. Every rank runs the same steps."""

    def __init__(self, decoder: Decoder, *, kv_fp8: bool = False, sequences: int = 8) -> None:
        self.decoder, self._kv_fp8, self._sequences = decoder, kv_fp8, sequences
        self._sampler = Sampler(decoder.head.columns, decoder.head.vocab, decoder.comm, decoder.device)
        self._by_length = any(rope.kind in LENGTH_DEPENDENT for rope in decoder.spec.ropes)
        self.open_cache(0, graphs=False)

    def open_cache(self, blocks: int, *, graphs: bool = True) -> None:
        """Take memory for ``blocks`` blocks of keys and values, and capture ``graphs`` over them. Raises torch's OutOfMemoryError."""
        self.cache = cache_for(self.decoder, blocks, fp8=self._kv_fp8, sequences=self._sequences)
        self._lengths: dict[int, int] = {}
        self._last = torch.zeros(self._sequences + 1, dtype=torch.int64, device=self.decoder.device)
        self.graphs = make_graphs(self.decoder, self.cache, self._sampler, self._last, self._sequences) if graphs else None

    @torch.inference_mode()
    def launch(self, step: Step) -> Drawn | None:
        """Start ``step``; what its chunks that sample get, in order, which a GPU may still be computing. None when none does."""
        for sequence in step.free:
            self.cache.free(sequence)
            self._sampler.forget(sequence)
            del self._lengths[sequence]
        for sequence in step.preempted:
            self.cache.free(sequence)
        for begin in step.begin:
            self._sampler.begin(begin.sequence, begin.params, begin.seed, begin.ends, begin.prompt)
            self._lengths[begin.sequence] = begin.length
        if not step.chunks:
            return None
        for chunk in step.chunks:
            self.cache.extend(chunk.sequence, chunk.blocks, chunk.start)
        sampled = [chunk.sequence for chunk in step.chunks if chunk.sample]
        replayed = None if self.graphs is None else self.graphs.run(step.chunks)
        if replayed is not None:
            drawn = self._sampler.sample(sampled, *replayed)
            if drawn.found is replayed[1]:  # the graph has kept them
                return drawn
        else:
            hidden = self._forward(step.chunks)
            self._score_prompts(step.chunks, hidden)
            if not sampled:
                return None
            ends = [end - 1 for end, chunk in zip(accumulate(len(c.tokens) for c in step.chunks), step.chunks, strict=True) if chunk.sample]
            last = hidden if len(ends) == hidden.shape[0] else hidden.index_select(0, upload(ends, torch.int64, hidden.device))
            drawn = self._sampler.sample(sampled, self.decoder.head.local(last))  # a collective: every rank
        rows = upload([self.cache.row(sequence) for sequence in sampled], torch.int64, self._last.device)
        self._last.index_copy_(0, rows, drawn.tokens)
        return drawn

    def _forward(self, chunks: tuple[Chunk, ...]) -> Tensor:
        """Hidden states ``[T, hidden]`` of all chunks, one after the other."""
        tokens = [token for chunk in chunks for token in chunk.tokens]
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.start + len(chunk.tokens))]
        device, reach = self.decoder.device, None
        ids, places = upload([tokens, positions], torch.int64, device)  # one transfer
        if UNKNOWN in tokens:
            rows = upload([self.cache.row(chunk.sequence) for chunk in chunks for _ in chunk.tokens], torch.int64, device)
            ids = torch.where(ids < 0, self._last.index_select(0, rows), ids)
        if self._by_length:
            prompts = [self._lengths[chunk.sequence] for chunk in chunks for _ in chunk.tokens]
            reach = torch.maximum(places + 1, upload(prompts, torch.int64, device))
        batch = Batch(places, tuple(len(chunk.tokens) for chunk in chunks), tuple(chunk.sequence for chunk in chunks), reach)
        return self.decoder.forward(ids, batch, self.cache)

    def _score_prompts(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        """Log-probabilities of the prompts that asked for them, from ``hidden [T, hidden]`` of ``chunks``."""
        first = 0
        for chunk in chunks:
            tokens = self._sampler.unscored(chunk.sequence, chunk.start, len(chunk.tokens))
            for at in range(0, len(tokens), SCORE_ROWS):
                part = tokens[at : at + SCORE_ROWS]
                logits = self.decoder.head.local(hidden[first + at : first + at + len(part)])
                self._sampler.score_prompt(chunk.sequence, chunk.start + at, logits, part)
            first += len(chunk.tokens)


def rank_source(root: Path, sharded: bool, tp: int, rank: int) -> tuple[Checkpoint, ParallelPlan | None, Assignment | None]:
    """What rank ``rank`` of ``tp`` loads from: the checkpoint, its plan (None when nothing is cut), and of a rank's own file how the parent
    stores its linears. Raises InputError for a model that cannot be cut so."""
    if sharded:
        return open_rank(root, rank)
    checkpoint = as_blocks(open_checkpoint(root))
    if tp == 1:
        return checkpoint, None, None
    spec = spec_for(checkpoint.config)
    return checkpoint, make_plan(spec, stored_assignment(checkpoint.config, spec, checkpoint.tensors), tp, dtype="BF16"), None


def load_rank(job: RankJob, comm: Comm, device: str, progress: Progress = silent) -> Decoder:
    """The decoder of rank ``comm.rank``. Raises InputError for a checkpoint that does not fit, MachineError when memory is short."""
    how: dict[str, Any] = {"dtype": float_dtype(job.dtype), "device": device, "parity": job.parity, "lm_head": job.lm_head}
    how["progress"], how["attention"], how["merge"] = progress, job.attention, job.device == "cuda" and not job.parity
    checkpoint, plan, presliced = rank_source(Path(job.path), job.sharded, job.tp, comm.rank)
    try:
        return load_decoder(checkpoint, plan=plan, comm=comm, presliced=presliced, **how)
    except torch.OutOfMemoryError as exc:
        raise MachineError(device, "has too little memory for the weights", "more memory", "--tp splits them among GPUs") from exc


def rank_facts(decoder: Decoder, job: RankJob, host_ranks: int) -> RankFacts:
    """What the rank holds, and how many blocks fit into its share of the memory: on a GPU of all of it, on a CPU of what is free, divided
    among the ``host_ranks`` ranks, of this model and of its replicas, that share the host.

    On a GPU a pass is run to see what it takes, on a CPU that is an estimate. Every rank calls this at the same time. Raises MachineError
    for an attention that was asked for and does not run here.
    """
    if decoder.kv_heads:
        stored = torch.float8_e4m3fn if job.kv_fp8 else decoder.dtype
        for each in decoder.blocks:
            each.attention.require(decoder.dtype, stored, decoder.device)
    sequences, device = min(job.sequences, job.step_tokens), decoder.device
    if device.type == "cuda":
        one = _measured_pass(decoder, job.step_tokens, sequences, kv_fp8=job.kv_fp8)
        graphs = graph_bytes(decoder, job.sequences, fp8=job.kv_fp8)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        room = int(total * job.memory_share) - (total - free) - one - graphs
        told = (device, total - free, total, decoder.nbytes, one, graphs, room)
        _LOG.info("%s: %d of %d bytes in use, %d of them weights; %d for a pass, %d for graphs, %d for keys and values", *told)
    else:
        free = free_memory() // host_ranks
        taken = pass_bytes(decoder.spec, job.tp, tokens=job.step_tokens, sequences=sequences, itemsize=decoder.dtype.itemsize)
        room = int((free + decoder.nbytes) * job.memory_share) - decoder.nbytes - taken
    block = kv_block_bytes(decoder, job.kv_fp8)
    return RankFacts(decoder.nbytes, block // BLOCK, max(0, room // block - 1) if block else None)  # one block is nobody's


@torch.inference_mode()
def _measured_pass(decoder: Decoder, tokens: int, sequences: int, *, kv_fp8: bool) -> int:
    """Bytes that the longest pass takes at its height beside weights, keys and values; what it needs is compiled by it. A collective."""
    length = min(tokens, decoder.spec.max_positions)
    lengths = tuple(min(length, tokens - at) for at in range(0, tokens, length))
    each = blocks_for(length)
    cache = cache_for(decoder, each * len(lengths), fp8=kv_fp8, sequences=len(lengths))
    for sequence in range(len(lengths)):
        cache.extend(sequence, range(each * sequence, each * (sequence + 1)), 0)
    sampler = Sampler(decoder.head.columns, decoder.head.vocab, decoder.comm, decoder.device)
    torch.cuda.reset_peak_memory_stats(decoder.device)
    before = torch.cuda.memory_allocated(decoder.device)
    positions = torch.cat([torch.arange(count) for count in lengths]).to(decoder.device)
    hidden = decoder.forward(torch.zeros_like(positions), Batch(positions, lengths, tuple(range(len(lengths)))), cache)
    logits = decoder.head.local(hidden[:sequences])
    del hidden
    for sequence in range(logits.shape[0]):
        sampler.begin(sequence, SamplingParams(top_p=0.5, frequency_penalty=0.1, logprobs=1), 0, (), ())
    sampler.sample(range(logits.shape[0]), logits).result()
    return torch.cuda.max_memory_allocated(decoder.device) - before


def free_memory() -> int:
    """Bytes that this process may still take: the least of what the kernel and the control group have left."""
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    info = Path("/proc/meminfo")
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            found = [int(lines["MemAvailable"].split()[0]) * 1024]
    group = Path("/sys/fs/cgroup")
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        if (group / limit).is_file() and (group / used).is_file():
            text = (group / limit).read_text().strip()
            if text != "max":
                found.append(max(0, int(text) - int((group / used).read_text())))
    return min(found)


# the process


class _Closed(Exception):
    """The engine has ended this rank before it ran a step."""


class _Channel:
    """The rank's end of its socket: messages out from any thread, messages in through a queue that a thread of its own fills.

    When the other end is gone the process ends at once, wherever its main thread may be stuck.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def send(self, message: Message) -> None:
        try:
            with self._lock:
                self._connection.sendall(frame(message))
        except OSError:
            os._exit(RuntimeDied.exit_code)

    def expect(self, name: str) -> Any:
        """What the next message says of ``name``. Raises _Closed when the engine is done with this rank."""
        message = self.inbox.get()
        if "close" in message:
            raise _Closed
        return message[name]

    def _listen(self) -> None:
        for message in received(self._connection, "engine"):
            self.inbox.put(message)
        os._exit(RuntimeDied.exit_code)

    def _beat(self) -> None:
        stop = threading.Event()
        while not stop.wait(BEAT_SECONDS):
            self.send({"alive": True})


class _Logged(logging.Handler):
    """Sends what a rank logs to the engine, which shows it: a rank's stderr is read only when it dies."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send({"log": record.getMessage(), "level": record.levelno})


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when the thread that started it ends; leave at once if that has happened."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(RuntimeDied.exit_code)


def _meet(channel: _Channel, start: Message, job: RankJob) -> Comm:
    """This rank's group, met in a file, or at the address of rank 0, which tells the engine its port, and the engine the others."""
    rank, place = int(start["rank"]), start["store"]
    if job.tp == 1:
        return Solo()
    if isinstance(place, str):
        store: Any = Path(place)
    elif rank == 0:
        store, port = serve_store(place["host"], job.tp, job.timeout)
        channel.send({"store": port})
    else:
        store = join_store(place["host"], channel.expect("store"), job.tp, job.timeout)
    if job.device != "cuda":
        return ProcessComm(rank, job.tp, store, backend="gloo", timeout=job.timeout)
    comm = ProcessComm(rank, job.tp, store, backend="nccl", timeout=job.timeout)
    comm.sums = open_sums(comm, torch.device(start["device"]), job.timeout)
    return comm


def _serve(channel: _Channel, start: Message) -> None:
    """Load, then answer steps until told to close."""
    job, rank = RankJob(**start["job"]), int(start["rank"])
    if job.device == "cuda":
        torch.cuda.set_device(start["device"])
    comm = _meet(channel, start, job)
    decoder = load_rank(job, comm, start["device"], lambda _, done, total: channel.send({"read": [done, total]}))
    runner = Runner(decoder, kv_fp8=job.kv_fp8, sequences=job.sequences)
    channel.send({"loaded": True})
    channel.expect("measure")  # all have loaded, whoever else shares the memory: what is free now is free for keys and values
    facts = rank_facts(runner.decoder, job, start["host_ranks"])
    comm.barrier()
    channel.send({"ready": asdict(facts)})
    drawn: queue.SimpleQueue[Drawn | None] = queue.SimpleQueue()
    threading.Thread(target=_answer, args=(channel, drawn, runner.decoder.device), name="answer", daemon=True).start()
    while True:
        message = channel.inbox.get()
        if "close" in message:
            comm.close()
            return
        if "cache" in message:
            runner.open_cache(message["cache"])
            channel.send({"opened": message["cache"]})
            continue
        tokens = runner.launch(step_from_json(message["step"]))
        if rank == 0:
            drawn.put(tokens)


def _answer(channel: _Channel, drawn: queue.SimpleQueue[Drawn | None], device: torch.device) -> None:
    """Send the tokens of each step when they are there, while the next one is started. On a thread of its own."""
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread's first call would else take memory of the first GPU
        while True:
            tokens = drawn.get()
            channel.send({"sampled": sampled_to_json([] if tokens is None else tokens.result())})
    except BaseException:  # noqa: BLE001  whatever it was, the rank ends with it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(RuntimeDied.exit_code)


def serve(connection: socket.socket) -> int:
    """Be the rank that ``connection`` says, until it says that this is over; returns an exit code. An error of ours goes to the engine."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine decides when ranks end
    channel = _Channel(connection)
    logging.getLogger("quantkit").addHandler(_Logged(channel))
    start = channel.inbox.get()
    if "parent" in start:
        _die_with(int(start["parent"]))
    try:
        _serve(channel, start)
    except _Closed:
        return 0
    except QuantkitError as exc:
        channel.send({"error": error_to_json(exc)})
        return exc.exit_code
    except torch.OutOfMemoryError as exc:
        reason = str(exc).splitlines()[0]
        error = MachineError(
            f"rank {start['rank']}", f"is out of memory ({reason})", "room for a pass", "--max-num-seqs or --max-model-len"
        )
        channel.send({"error": error_to_json(error)})
        return error.exit_code
    return 0


if __name__ == "__main__":
    code = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.stderr.flush()
    os._exit(code)  # at once: the threads and torch have nothing left to do
