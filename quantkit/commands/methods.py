"""``quantkit --list-methods``: the quantization methods that can be asked for, and where each comes from."""

from __future__ import annotations

from quantkit.commands.quantize_options import GGUF
from quantkit.mixtures import FILE_TYPES
from quantkit.report import Report, Table


def run() -> Report:
    """Report every registered method, and gguf, which no registry has. Raises InputError when an installed package registers something
    that is no method."""
    from quantkit.quantizers.base import methods

    found = [(m.name, m.summary, m.facts.formats, m.origin) for m in methods().values()]
    found.append((GGUF, "a file of llama.cpp's block types", tuple(FILE_TYPES), "built-in"))
    rows = tuple((name, summary, ", ".join(formats), origin) for name, summary, formats, origin in found)
    return Report(
        command="methods",
        data={"methods": [{"name": n, "summary": summary, "formats": list(formats), "origin": o} for n, summary, formats, o in found]},
        tables=(Table("Methods", ("method", "summary", "formats", "origin"), rows),),
        next_steps=(
            "quantkit recipe init --method METHOD my.yaml",
            "quantkit quantize MODEL OUT --method METHOD",
            f"quantkit quantize MODEL OUT.gguf --method {GGUF}",
        ),
    )
