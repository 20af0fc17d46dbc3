"""``quantkit version``: which quantkit this is, and what it stands on; nothing heavy is imported to find out."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from quantkit import __version__
from quantkit.report import Report, Table

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "pydantic", "typer", "rich")
OPTIONAL = ("fastapi", "uvicorn", "triton", "ray")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def run() -> Report:
    """Report the versions of quantkit, Python and the packages that decide what a run gives."""
    packages = {name: _installed(name) for name in (*PACKAGES, *OPTIONAL)}
    machine = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    rows = tuple((name, found or ("not installed (optional)" if name in OPTIONAL else "not installed")) for name, found in packages.items())
    return Report(
        command="version",
        data={"quantkit": __version__, **machine, "packages": packages},
        facts=(("quantkit", __version__), ("python", machine["python"]), ("platform", f"{machine['system']} {machine['machine']}")),
        tables=(Table("Packages", ("package", "version"), rows),),
    )
