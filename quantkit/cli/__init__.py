"""The command line: parse, call a command, render its report, map errors to exit codes.

Knows the commands' options and nothing of their work.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import typer

from quantkit.cli import bench, offline  # noqa: F401  they give their commands to app
from quantkit.cli.app import app
from quantkit.cli.exits import machine_error, report_bug, usage_error
from quantkit.console import note, show_error
from quantkit.errors import InputError, QuantkitError

INTERRUPTED, TERMINATED, PIPE_CLOSED = 130, 143, 141


class _Terminated(BaseException):
    """SIGTERM came. No Exception, so that nothing on the way up takes it for an error of its own."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def _close_pipes() -> None:
    """Nobody reads what is left: let the interpreter flush it into nothing rather than complain."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_closed_streams() -> None:
    """Give a standard stream that came closed (``>&-``) the null device: else the next file to be opened takes its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) == number:  # the lowest that is free
                setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  it lives as long as we do


def run(arguments: Sequence[str]) -> int:
    """Do what ``arguments`` ask for and return the exit code."""
    try:
        code = typer.main.get_command(app).main(args=list(arguments), prog_name="quantkit", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer makes this of a KeyboardInterrupt
            note("interrupted")
        return code if isinstance(code, int) else 0
    except QuantkitError as exc:
        show_error(exc)
        return exc.exit_code
    except typer.TyperException as exc:
        show_error(usage_error(exc))
        return InputError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        note("interrupted")
        return INTERRUPTED
    except _Terminated:
        note("terminated")
        return TERMINATED
    except BrokenPipeError:
        _close_pipes()
        return PIPE_CLOSED
    except SystemExit as exc:
        # typer ends this way after completion, and with 1 when a pipe is closed, which would read as a check that said no.
        if not isinstance(exc.__context__, BrokenPipeError):
            raise
        _close_pipes()
        return PIPE_CLOSED
    except Exception as exc:  # noqa: BLE001  the last line of defence: whatever comes here is the machine's or a bug of ours
        if (refused := machine_error(exc)) is not None:
            show_error(refused)
            return refused.exit_code
        return report_bug(exc)


def main() -> NoReturn:
    """The console script: run the command line of this process and exit."""
    _open_closed_streams()
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        # A file name need not be Unicode, and a terminal need not take all of it; neither may end in a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))
