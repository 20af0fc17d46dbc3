"""An engine whose ranks are threads of this process, and a client that collects what it says about one request."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit.arch.table import spec_for
from quantkit.comm import Comm, Solo, thread_group
from quantkit.errors import QuantkitError
from quantkit.model.decoder import Decoder
from quantkit.model.load import load_decoder
from quantkit.plan import make_plan
from quantkit.quant_config import stored_assignment
from quantkit.runtime.engine import Delta, Engine, EngineLimits, SamplingParams
from quantkit.runtime.sampler import Drawn, Sampled, TokenLogprob
from quantkit.runtime.wire import RankJob, Step, step_from_json, step_to_json
from quantkit.runtime.worker import Runner, rank_facts
from quantkit.shard import open_rank
from quantkit.text.tokenizer import load_tokenizer


class GroupExecutor:
    """All ranks as threads of this process, each with its own runner. ``source``: a checkpoint, or the directory of its shards."""

    def __init__(
        self,
        source: Any,
        tp: int,
        dtype: torch.dtype = torch.float32,
        *,
        kv_fp8: bool = False,
        parity: bool = True,
        ahead: bool = False,
        merge: bool = False,
    ) -> None:
        how = {"dtype": dtype, "parity": parity, "merge": merge}
        decoder = _from_shards(source, how) if isinstance(source, Path) else _from_checkpoint(source, tp, how)
        self._threads = [ThreadPoolExecutor(1) for _ in range(tp)]
        self.ahead = ahead
        self.steps: list[Step] = []
        self._under_way: deque[list[Future[Drawn | None]]] = deque()

        def load(comm: Comm) -> Runner:
            return Runner(decoder(comm), kv_fp8=kv_fp8, sequences=64)

        comms: Sequence[Comm] = thread_group(tp) if tp > 1 else [Solo()]
        self.runners = [thread.submit(load, comm).result() for thread, comm in zip(self._threads, comms, strict=True)]
        job = RankJob("", False, tp, "float32", "cpu", True, 60.0, kv_fp8, 0.9, 1024, 8)
        self.facts = tuple(rank_facts(runner.decoder, job, tp) for runner in self.runners)

    def open_cache(self, blocks: int) -> None:
        for runner in self.runners:
            runner.open_cache(blocks)

    def launch(self, step: Step) -> None:
        self.steps.append(step_from_json(step_to_json(step)))
        self._under_way.append(
            [thread.submit(runner.launch, self.steps[-1]) for thread, runner in zip(self._threads, self.runners, strict=True)]
        )

    def collect(self) -> list[Sampled]:
        drawn = [future.result() for future in self._under_way.popleft()]
        first, *others = [[] if one is None else one.result() for one in drawn]
        assert all([one.token for one in other] == [one.token for one in first] for other in others)
        return first

    def check(self) -> None:
        return

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()


def _from_checkpoint(checkpoint: Any, tp: int, how: dict[str, Any]) -> Callable[[Comm], Decoder]:
    spec = spec_for(checkpoint.config)
    plan = make_plan(spec, stored_assignment(checkpoint.config, spec, checkpoint.tensors), tp, dtype="BF16")
    return lambda comm: load_decoder(checkpoint, plan=plan, comm=comm, **how)


def _from_shards(root: Path, how: dict[str, Any]) -> Callable[[Comm], Decoder]:
    def load(comm: Comm) -> Decoder:
        checkpoint, plan, assignment = open_rank(root, comm.rank)
        return load_decoder(checkpoint, plan=plan, comm=comm, presliced=assignment, **how)

    return load


@dataclass
class Answer:
    """Everything that a request got."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str | None = None
    deltas: int = 0


class Client:
    """Collects what the engine says about one request."""

    def __init__(self, engine: Engine, prompt: Sequence[int], params: SamplingParams) -> None:
        self._said: queue.SimpleQueue[Delta | QuantkitError] = queue.SimpleQueue()
        self.number = engine.submit(prompt, params, self._said.put)

    def answer(self) -> Answer:
        """Wait for the end. Raises the error if that is how it ends."""
        out = Answer()
        while out.reason is None:
            said = self._said.get(timeout=60)
            if isinstance(said, QuantkitError):
                raise said
            out.text += said.text
            out.tokens += said.tokens
            out.logprobs += said.logprobs
            out.reason = said.finish_reason
            out.deltas += 1
        assert self._said.empty(), "nothing comes after the end"
        return out


def engine_on(executor: Any, path: Path, checkpoint: Any, **limits: Any) -> Engine:
    given: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 8, "max_queue": 64, "kv_blocks": 128, **limits}
    return Engine(executor, load_tokenizer(path), spec_for(checkpoint.config), EngineLimits(**given), dtype="float32")
