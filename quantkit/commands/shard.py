"""``quantkit shard``: one file per rank, cut by a plan, as byte slices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.commands.plan import mode_facts, ranges_table
from quantkit.progress import Progress, silent
from quantkit.report import Report, next_step
from quantkit.shard import rank_file, shard_checkpoint


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """Options of ``quantkit shard``."""

    path: str
    out: Path
    tp: int
    overwrite: bool = False


def run(options: ShardOptions, progress: Progress = silent) -> Report:
    """Shard ``options.path`` into ``options.out``; errors as ``shard_checkpoint``."""
    done = shard_checkpoint(open_checkpoint(options.path), options.out, options.tp, overwrite=options.overwrite, progress=progress)
    files = [rank_file(rank, options.tp) for rank in range(options.tp)]
    return Report(
        command="shard",
        data={
            "out": str(options.out),
            "tp": options.tp,
            "plan": done.plan.to_json(),
            "rank_bytes": dict(zip(files, done.rank_bytes, strict=True)),
            "parent_sha256": done.parent_sha256,
        },
        facts=(("written", str(options.out)), ("parent", f"sha256 {done.parent_sha256}"), *mode_facts(done.plan)),
        tables=(ranges_table(done.plan, done.rank_bytes),),
        next_steps=(next_step("serve", options.out), next_step("verify", options.out)),
    )
