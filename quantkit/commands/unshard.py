"""``quantkit unshard``: the checkpoint that a shard directory was cut from, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.progress import Progress, silent
from quantkit.report import Report, Table, next_step
from quantkit.shard import unshard


@dataclass(frozen=True, slots=True)
class UnshardOptions:
    """Options of ``quantkit unshard``."""

    path: Path
    out: Path
    overwrite: bool = False


def run(options: UnshardOptions, progress: Progress = silent) -> Report:
    """Restore ``options.path`` into ``options.out``; errors as ``unshard``."""
    done = unshard(options.path, options.out, overwrite=options.overwrite, progress=progress)
    proof = "every hash in the parent's SHA256SUMS" if done.proven else "the shards' own SHA256SUMS; the parent had none"
    return Report(
        command="unshard",
        data={"out": str(options.out), "files": dict(done.files), "proven": done.proven},
        facts=(("written", str(options.out)), ("checked", proof)),
        tables=(Table("Files", ("file", "sha256"), tuple(sorted(done.files.items()))),),
        next_steps=(next_step("verify", options.out),),
    )
