"""What went wrong, whoever noticed it, as the one line that a person reads and an exit code: the parser, the machine, or a bug of ours."""

from __future__ import annotations

import errno
import re
import sys
import tempfile
import traceback
from pathlib import Path

import typer

from quantkit.console import show_error
from quantkit.errors import InputError, MachineError, QuantkitError

BUG = 70
MACHINE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO})
EXTRAS = {"fastapi": "serve", "uvicorn": "serve", "sse_starlette": "serve", "starlette": "serve", "ray": "ray"}
"""Optional packages, and the extra that brings each."""


def usage_error(error: typer.TyperException) -> QuantkitError:
    """A complaint of the parser in the form of every other error."""
    context, param = getattr(error, "ctx", None), getattr(error, "param", None)
    where = context.command_path if context is not None else "quantkit"
    hint = f"{where} --help"
    option = getattr(error, "option_name", None)
    kind = type(error).__name__
    if param is not None:
        named = param.opts[0] if param.param_type_name == "option" else param.metavar or param.name
        if kind == "MissingParameter":
            return InputError(where, f"{named} is missing", "it to be given", hint)
        message = re.sub(r"\s+", " ", error.message).strip().rstrip(".")
        return InputError(named, message[:1].lower() + message[1:], None, hint)
    if kind == "NoSuchOption":
        close = getattr(error, "possibilities", None)
        return InputError(where, f"no such option: {option}", " or ".join(sorted(close)) if close else None, hint)
    message = re.sub(r"\s+", " ", error.format_message()).strip().rstrip(".")
    suggestion = re.fullmatch(r"(.*?)\. Did you mean (.*)\?", message)
    if suggestion:
        return InputError(where, suggestion[1][:1].lower() + suggestion[1][1:], suggestion[2], hint)
    return InputError(where, message[:1].lower() + message[1:], None, hint)


def machine_error(error: Exception) -> QuantkitError | None:
    """The error as the machine's, if it is one: no memory, no disk, no descriptor, an optional package that is not installed."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return MachineError("device memory", str(error).split(". ")[0], "more, or less to do at once")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        return MachineError("memory", "the machine has no more", "more, or a smaller piece of work")
    if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
        return MachineError(
            str(error.filename or "system"),
            error.strerror or str(error),
            None,
            "the same command may be run again, with --resume where it has it",
        )
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        if package in EXTRAS:
            return MachineError(package, "is not installed", "it for this command", f"pip install 'quantkit[{EXTRAS[package]}]'")
    return None


def report_bug(error: Exception) -> int:
    """Say in one line that quantkit has a bug, and leave the traceback in a file."""
    from quantkit import fs

    text = "".join(traceback.format_exception(error))
    summary = f"{type(error).__name__}: {error}"
    path: Path | None = None
    try:
        path = Path(tempfile.mkdtemp(prefix="quantkit-")) / "traceback.txt"
        fs.write_bytes(path, text.encode(errors="backslashreplace"))
    except (OSError, QuantkitError):
        path = None
        sys.stderr.write(text)
    hint = f"please report it with {path}" if path is not None else "please report it with the traceback above"
    show_error(QuantkitError("quantkit", f"a bug in quantkit ({summary})", None, hint))
    return BUG
