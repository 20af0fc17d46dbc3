"""What does each GGUF mixture cost in quality, with and without an importance matrix? One base, every mixture, one text.

Makes the importance matrix of BASE from the built-in calibration text, quantizes BASE to every type below plainly and with it, measures
perplexity and KL divergence from BASE on TEXT, and appends one JSON line per artifact to gguf_quality.jsonl in OUT. ``--also`` measures
files of other tools beside them. With ``--jobs N`` so many run at a time: the figures do not depend on it.

    python benchmarks/gguf_quality.py BASE --text wiki.test.raw --tokens 40960 --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quantkit import __version__

TYPES = (
    *("q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "iq4_xs", "iq4_nl", "q4_k_s", "q4_k_m"),
    *("q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "q8_0"),
)
METHODS, CORRECTED = ("awq", "gptq"), ("q2_k", "q3_k_m", "q4_0", "q4_k_s", "q4_k_m", "q5_k_m")
"""Methods whose weights are written as GGUF too, and the types that are made so."""


def quantkit(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "quantkit", *map(str, arguments), "--quiet"], check=True, stdout=subprocess.DEVNULL)


def measured(base: Path, artifact: Path, arguments: tuple[str, ...], scratch: Path) -> dict[str, Any]:
    """The figures of one artifact against its base."""
    report = scratch / f"report-{artifact.stem}"
    quantkit("report", base, artifact, "--kld", *arguments, "--out", report)
    found = json.loads((report / "report.json").read_text())
    return {"base_ppl": found["models"][0]["ppl"], "text": found["text"], "convention": found["convention"], **found["models"][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="*", choices=TYPES, default=list(TYPES))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[])
    parser.add_argument("--also", nargs="*", type=Path, default=[])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    text = () if options.text is None else ("--text", str(options.text))
    arguments = (*text, "--tokens", str(options.tokens), "--device", options.device)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        scratch = Path(folder)
        imatrix = scratch / "imatrix.gguf"
        quantkit("imatrix", options.base, imatrix, "--samples", str(options.samples), "--device", options.device)

        def made(kind: str, how: str) -> dict[str, Any]:
            out = scratch / f"{kind}-{how}.gguf"
            device = ("--device", options.device)
            if how in METHODS:
                calibrated = ("--samples", str(options.samples))
                quantkit("quantize", options.base, out, "--method", how, "--format", kind, *calibrated, *device)
            else:
                chosen = ("--imatrix", str(imatrix)) if how == "imatrix" else ()
                quantkit("quantize", options.base, out, "--method", "gguf", "--type", kind, *chosen, *device)
            found = measured(options.base, out, arguments, scratch)
            out.unlink()
            return {"type": kind, "how": how, **found}

        tasks = [(kind, how) for kind in options.only if kind in CORRECTED for how in options.methods]  # the longest first
        tasks += [(kind, how) for kind in options.only for how in ("plain", "imatrix")]
        tasks = [(kind, how) for kind, how in tasks if (kind, how) != ("q2_k_s", "plain")]  # which needs an importance matrix
        pending = [pool.submit(made, *task) for task in tasks]
        pending += [
            pool.submit(lambda path=path: {"type": path.stem, "how": "given", **measured(options.base, path, arguments, scratch)})
            for path in options.also
        ]
        with (options.out / "gguf_quality.jsonl").open("a") as file:
            for future in pending:
                line = {"quantkit": __version__, "samples": options.samples, **future.result()}
                line.pop("path", None)
                file.write(json.dumps(line) + "\n")
                file.flush()
                kld = line["kld"]
                ppl = f"ppl {line['ppl']:8.3f} (base {line['base_ppl']:.3f})"
                far = f"KL {kld['mean']:.5f} ± {kld['error']:.5f}, same top token {kld['same_top']:.2%}"
                print(f"{line['type']:8} {line['how']:8} {line['disk_bytes'] / 1e6:7.1f} MB  {ppl}  {far}", flush=True)


if __name__ == "__main__":
    main()
