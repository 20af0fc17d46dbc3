"""What went wrong, whoever noticed it, as the one line that a person reads and an exit code: the parser, the machine, or a bug of ours."""

from __future__ import annotations

import errno
import os
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
PATH_ERRNOS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP})
"""What the system says of a path that may not be looked at, before anything of it is opened."""
EXTRAS = {"fastapi": "serve", "uvicorn": "serve", "sse_starlette": "serve", "starlette": "serve", "ray": "ray"}
"""Optional packages, and the extra that brings each."""


def usage_error(error: typer.TyperException) -> QuantkitError:
    """A complaint of the parser in the form of every other error."""
    context, param = getattr(error, "ctx", None), getattr(error, "param", None)
    where = context.command_path if context is not None else "quantkit"
    hint = f"{where} --help" if context is not None else None
    option = getattr(error, "option_name", None)
    kind = type(error).__name__
    if param is not None:
        named = param.opts[0] if param.param_type_name == "option" else param.metavar or param.name
        if kind == "MissingParameter":
            return InputError(where, f"{named} is missing", "it to be given", hint)
        return InputError(named, *_bad_value(error), hint)
    if kind == "BadOptionUsage":
        return InputError(str(option), _sentence(error.message).removeprefix(f"option {option!r} "), None, hint)
    if kind == "NoSuchOption":
        close = getattr(error, "possibilities", None)
        return InputError(where, f"no such option: {option}", close[0] if close else None, hint)
    message, _, suggestion = _sentence(error.format_message()).partition(". Did you mean ")
    return InputError(where, message, suggestion.rstrip("?") or None, hint)


def _sentence(text: str) -> str:
    """``text`` on one line, as it stands after a colon."""
    text = re.sub(r"\s+", " ", text).strip().rstrip(".")
    return text[:1].lower() + text[1:]


def _bad_value(error: typer.TyperException) -> tuple[str, str | None]:
    """What is wrong with an option's value and what was expected; pydantic, if it was asked, knows the value."""
    message = _sentence(error.message)
    details = getattr(error.__cause__, "errors", None)
    if details is None or not message.startswith("input should be "):
        return message, None
    return f"is {details()[0]['input']!r:.80}", message.removeprefix("input should be ").partition(", unable")[0]


def machine_error(error: Exception) -> QuantkitError | None:
    """The error as the machine's, if it is one: no memory, no disk, no descriptor, an optional package that is not installed.

    A path that may not be looked at is the user's.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return MachineError("device memory", str(error).split(". ")[0], "more, or less to do at once")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        return MachineError("memory", "the machine has no more", "more, or a smaller piece of work")
    if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
        return MachineError(
            str(error.filename or "system"),
            _sentence(error.strerror or str(error)),
            None,
            "the same command may be run again, with --resume where it has it",
        )
    if isinstance(error, OSError) and error.errno in PATH_ERRNOS and isinstance(error.filename, str | bytes):
        from quantkit import fs

        return fs.refusal(error, os.fsdecode(error.filename), "look at it")
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
