"""``quantkit bench throughput``: how many tokens a second a model makes for many requests at once; ``bench latency`` shares its loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.commands.bench_requests import TOKENS, Load, Timed, asks, check_out, facts_of, figures, whole, write_figures
from quantkit.commands.generate import ENGINE, EngineOptions, ranks_named
from quantkit.commands.prompt_file import Line
from quantkit.errors import InputError
from quantkit.progress import Progress, silent
from quantkit.report import Report
from quantkit.runtime.params import SamplingParams

if TYPE_CHECKING:
    from quantkit.runtime.engine import Delta
    from quantkit.runtime.llm import LLM

    Keep = Callable[[int, Delta], None]

LOAD, WARMUP = Load(), whole(list(TOKENS[:32]), 2)


@dataclass(frozen=True, slots=True)
class BenchThroughputOptions:
    """``out``: a JSON file for all figures."""

    path: str
    load: Load = LOAD
    out: Path | None = None
    engine: EngineOptions = ENGINE


def run(options: BenchThroughputOptions, progress: Progress = silent) -> Report:
    """All requests at once. Raises InputError for a request that does not fit the model, MachineError, RuntimeDied."""
    check_out(options.out)
    wanted = asks(options.load)
    with options.engine.start(options.path, progress) as llm:
        timed(llm, [WARMUP], silent)  # what is built or tuned on first use is not timed
        answers, seconds = timed(llm, wanted, progress)
        data = {"model": options.path, "tp": llm.engine.tp, "dp": llm.engine.dp, "dtype": llm.engine.dtype}
        data["max_num_seqs"] = llm.engine.max_num_seqs
        data |= figures(answers, seconds)
    write_figures(options.out, data)
    return Report("bench throughput", data, facts=(("model", _named(data)), *facts_of(data)))


def _named(data: dict[str, Any]) -> str:
    return f"{data['model']}, {ranks_named(data['tp'], data['dp'])}, {data['dtype']}, {data['max_num_seqs']} at once"


def _forget(number: int, delta: Delta) -> None:
    return


def timed(llm: LLM, wanted: Sequence[Line], progress: Progress, keep: Keep = _forget) -> tuple[list[Timed], float]:
    """Run ``wanted``, as many under way as the engine takes, and say when what came; and the seconds of it all.

    ``keep(number, delta)`` is told what comes of each.
    """
    jobs = []
    for line in wanted:
        ids, params = line.tokens(llm), line.sampling
        if len(ids) + params.max_tokens > llm.engine.max_model_len:
            what = f"a request has {len(ids)} tokens and {params.max_tokens} of answer"
            raise InputError("load", what, f"at most {llm.engine.max_model_len} together", "--input-len, --output-len, --max-model-len")
        llm.engine.check(ids, params)
        jobs.append((ids, params))
    sent, came, made = list[float](), [list[float]() for _ in jobs], [0] * len(jobs)
    done = 0

    def leaving() -> Iterator[tuple[list[int], SamplingParams]]:
        for job in jobs:
            sent.append(time.perf_counter() - start)
            yield job

    progress("measure", 0, len(jobs))
    start = time.perf_counter()
    with closing(llm.deltas(leaving())) as deltas:
        for number, when, delta in deltas:
            came[number].append(when - start)
            made[number] += len(delta.tokens)
            keep(number, delta)
            if delta.finish_reason is not None:
                done += 1
                progress("measure", done, len(jobs))
    seconds = time.perf_counter() - start
    return [Timed(sent[n], tuple(came[n]), len(jobs[n][0]), made[n]) for n in range(len(jobs))], seconds
