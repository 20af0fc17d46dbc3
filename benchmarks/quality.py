"""Does AWQ beat plain rounding at the same bits? One base, the methods side by side, on texts that no calibration saw.

Quantizes BASE with every method and setting below, calibrated on the built-in text, measures perplexity on the built-in
held-out text and on each TEXT, and appends one JSON line per text to quality.jsonl in OUT.

    python benchmarks/quality.py BASE --text wiki.test.raw --tokens 40960 --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from quantkit import __version__

SETTINGS = (("rtn", "64", "--asym"), ("awq", "64", "--asym"), ("rtn", "64", "--sym"), ("awq", "64", "--sym"))


def quantkit(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "quantkit", *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        made = []
        for method, group, sym in SETTINGS:
            artifact = Path(scratch) / f"{method}-g{group}{'-sym' if sym == '--sym' else ''}"
            calibration = ("--samples", str(options.samples)) if method == "awq" else ()
            quantkit("quantize", options.base, artifact, "--method", method, "--group-size", group, sym, *calibration)
            made.append(artifact)
        for text in (None, *options.text):
            report = Path(scratch) / "report"
            chosen = () if text is None else ("--text", text)
            quantkit("report", options.base, *made, *chosen, "--tokens", str(options.tokens), "--out", report)
            found = json.loads((report / "report.json").read_text())
            line = {
                "quantkit": __version__,
                "samples": options.samples,
                "text": found["text"],
                "convention": found["convention"],
                "models": found["models"],
            }
            options.out.mkdir(parents=True, exist_ok=True)
            with (options.out / "quality.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
