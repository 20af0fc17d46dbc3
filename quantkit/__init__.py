"""quantkit: quantize, prove, shard and serve language models.

``from quantkit import LLM, SamplingParams`` runs a model in a program of your own; importing quantkit alone loads nothing heavy.
What type checkers see is in ``__init__.pyi``.
"""

from importlib import import_module

__version__ = "0.1.0"
_HOMES = {"LLM": "quantkit.runtime.llm", "Generated": "quantkit.runtime.llm", "SamplingParams": "quantkit.runtime.params"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
