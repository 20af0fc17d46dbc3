"""``quantkit bench latency``: how long one batch of requests takes, again and again: to the first token, and from token to token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.commands.bench_requests import Load, asks, check_out, facts_of, figures, write_figures
from quantkit.commands.bench_throughput import timed
from quantkit.commands.generate import ENGINE, EngineOptions
from quantkit.errors import InputError
from quantkit.progress import Progress, silent
from quantkit.report import Report

LOAD = Load(num_prompts=1)


@dataclass(frozen=True, slots=True)
class BenchLatencyOptions:
    """``load.num_prompts`` requests are one batch, run ``rounds`` times after ``warmup`` rounds. ``out``: a JSON file for all figures."""

    path: str
    load: Load = LOAD
    rounds: int = 5
    warmup: int = 1
    out: Path | None = None
    engine: EngineOptions = ENGINE


def run(options: BenchLatencyOptions, progress: Progress = silent) -> Report:
    """Measure. Raises InputError for a batch that the engine does not run at once, MachineError, RuntimeDied."""
    check_out(options.out)
    batch = options.load.count
    seats = options.engine.max_num_seqs or batch
    if batch > seats:
        raise InputError("--batch-size", f"is {batch}", f"at most --max-num-seqs, {seats}")
    rounds = options.warmup + options.rounds
    answers, seconds = [], 0.0
    with replace(options.engine, max_num_seqs=seats).start(options.path, progress) as llm:
        for number in range(rounds):
            progress("measure", number, rounds)
            # Other tokens in each round, so that none finds its prompt computed already.
            got, took = timed(llm, asks(replace(options.load, seed=options.load.seed + number)), silent)
            if number >= options.warmup:
                answers += got
                seconds += took
        progress("measure", rounds, rounds)
        data = {"model": options.path, "batch_size": batch, "rounds": options.rounds}
        data |= {"tp": llm.engine.tp, "dtype": llm.engine.dtype, **figures(answers, seconds)}
    write_figures(options.out, data)
    named = f"{options.path}, tp {data['tp']}, {data['dtype']}, batches of {batch}, {options.rounds} rounds"
    return Report("bench latency", data, facts=(("model", named), *facts_of(data)))
