"""What does each method cost in quality at the same bits? One base, the methods side by side, on texts that no calibration saw.

Quantizes BASE with every setting below, calibrated on the built-in text, measures perplexity on the built-in held-out text and on each
TEXT, and appends one JSON line per text to quality.jsonl in OUT. ``--also`` measures artifacts of other tools beside them, such as those
that reference_quality.py makes. ``--artifacts`` keeps what is made, and a run that finds some there goes on with them.

    python benchmarks/quality.py BASE --text wiki.test.raw --tokens 40960 --out benchmarks/results --also references/*
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from quantkit import __version__

CALIBRATED = ("awq", "gptq")
SETTINGS = {
    "rtn-asym": ("rtn", "--asym"),
    "awq-asym": ("awq", "--asym"),
    "awq-asym-no-duo": ("awq", "--asym", "--option", "duo=false"),
    "gptq-asym": ("gptq", "--asym"),
    "gptq-asym-upstream": ("gptq", "--asym", "--option", "upstream=true"),
    "rtn-sym": ("rtn", "--sym"),
    "awq-sym": ("awq", "--sym"),
    "gptq-sym": ("gptq", "--sym"),
    "gptq-sym-upstream": ("gptq", "--sym", "--option", "upstream=true"),
    "nf4": ("nf4",),
}
"""Name of the artifact: method and options, at 4 bits in groups of 64."""


def quantkit(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "quantkit", *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--no-builtin", action="store_true", help="measure on each TEXT only")
    parser.add_argument("--kld", action="store_true", help="also the divergence from BASE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--also", nargs="*", type=Path, default=[])
    parser.add_argument("--artifacts", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, made = options.artifacts or Path(scratch), []
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            made.append(folder / name)
            if made[-1].exists():
                continue
            method, *rest = SETTINGS[name]
            if method != "nf4":
                rest += ["--group-size", "64"]
            if method in CALIBRATED:
                rest += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
            quantkit("quantize", options.base, made[-1], "--method", method, "--device", options.device, *rest)
        for text in options.text if options.no_builtin else (None, *options.text):
            report = Path(scratch) / "report"
            chosen = () if text is None else ("--text", text)
            rest = ["--tokens", str(options.tokens), "--device", options.device, *(("--kld",) if options.kld else ())]
            quantkit("report", options.base, *made, *options.also, *chosen, *rest, "--out", report)
            found = json.loads((report / "report.json").read_text())
            line = {
                "quantkit": __version__,
                "samples": options.samples,
                "seq_len": options.seq_len,
                "text": found["text"],
                "convention": found["convention"],
                "models": found["models"],
            }
            options.out.mkdir(parents=True, exist_ok=True)
            with (options.out / "quality.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
