"""``quantkit inspect --plot OUT.png --tensor PATTERN``: what to draw, the picture, and its figures in the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit import fs
from quantkit.errors import InputError
from quantkit.plot import OUTLIER_SD, Histogram, Weights, chosen, draw, histogram, require_matplotlib
from quantkit.progress import Progress
from quantkit.report import Report, Table

PNG_MAGIC = b"\x89PNG"


def check_plot(plot: Path | None, patterns: Sequence[str]) -> None:
    """Raise InputError for options that do not go together and for a PNG that would replace something else; MachineError: no matplotlib."""
    if plot is None:
        if patterns:
            raise InputError("--tensor", "says which tensors --plot draws", "--plot OUT.png beside it")
        return
    if not patterns:
        raise InputError("--plot", "was given without --tensor", "--tensor PATTERN, the tensors to draw")
    if plot.suffix.lower() != ".png":
        raise InputError(f"--plot {str(plot)!r:.200}", "is no PNG", "a file name that ends in .png")
    if os.path.lexists(plot):
        regular = plot.is_file() and not plot.is_symlink()
        head = b"".join(fs.read_range(plot, 0, min(len(PNG_MAGIC), fs.file_size(plot)))) if regular else b""
        if head != PNG_MAGIC:
            raise InputError(str(plot), "exists and is no PNG", "a picture to replace, or a new path")
    require_matplotlib()


def with_plot(
    report: Report, plot: Path | None, patterns: Sequence[str], weights: Callable[[], list[Weights]], progress: Progress
) -> Report:
    """``report`` with the figures of the tensors that ``patterns`` find, once their picture is written; as it is without ``plot``."""
    if plot is None:
        return report
    drawn, panels = chosen(weights(), patterns), list[tuple[Weights, Histogram]]()
    for item in drawn:
        progress("histograms", len(panels), len(drawn))
        panels.append((item, histogram(item)))
    fs.write_bytes(plot, draw(panels))
    rows = tuple(
        (item.name, item.stored, *(_number(figure) for figure in (found.mean, found.sd, found.kurtosis)), f"{found.outliers:.4%}")
        for item, found in panels
    )
    columns = ("name", "stored as", "mean", "sd", "excess kurtosis", f"beyond {OUTLIER_SD} sd")
    return replace(
        report,
        data={**report.data, "plot": str(plot), "histograms": [_figures(*panel) for panel in panels]},
        facts=(*report.facts, ("drawn", f"{plot}, {len(panels)} tensor{'s' * (len(panels) > 1)}")),
        tables=(*report.tables, Table("Weights", columns, rows)),
    )


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _figures(weights: Weights, found: Histogram) -> dict[str, Any]:
    """The figures of a histogram as data, without its bins."""
    return {
        "name": weights.name,
        "stored": weights.stored,
        "shape": list(weights.shape),
        "count": found.count,
        "not_finite": found.not_finite,
        "mean": found.mean,
        "sd": found.sd,
        "kurtosis": found.kurtosis,
        "outliers": found.outliers,
    }
