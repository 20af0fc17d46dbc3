"""``quantkit --list-methods``: the quantization methods that can be asked for, and where each comes from."""

from __future__ import annotations

from quantkit.report import Report, Table


def run() -> Report:
    """Report every registered method. Raises InputError when an installed package registers something that is no method."""
    from quantkit.quantizers.base import methods

    found = methods().values()
    rows = tuple((m.name, m.summary, ", ".join(m.facts.formats), m.origin) for m in found)
    return Report(
        command="methods",
        data={"methods": [{"name": m.name, "summary": m.summary, "formats": list(m.facts.formats), "origin": m.origin} for m in found]},
        tables=(Table("Methods", ("method", "summary", "formats", "origin"), rows),),
        next_steps=("quantkit recipe init --method METHOD my.yaml", "quantkit quantize MODEL OUT --method METHOD"),
    )
