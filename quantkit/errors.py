"""The exception tree: one branch per exit code of the command line.

Every error prints as one line, ``error: <where>: <what>, expected <what>``, and an optional ``hint:`` line.
This module knows nothing of models, files or terminals.
"""

from __future__ import annotations


class QuantkitError(Exception):
    """Base of every error that quantkit raises on purpose.

    ``where`` names the file, option or tensor; ``what`` says what is wrong; ``expected`` says what would be right;
    ``hint`` says what to do next.
    """

    exit_code = 70

    def __init__(self, where: str, what: str, expected: str | None = None, hint: str | None = None) -> None:
        self.where, self.what, self.expected, self.hint = where, what, expected, hint
        super().__init__(self.line)

    @property
    def line(self) -> str:
        """The error as the one line that a user reads, without the ``error:`` prefix."""
        tail = f", expected {self.expected}" if self.expected else ""
        return f"{self.where}: {self.what}{tail}".replace("\n", " ")


class CheckFailed(QuantkitError):
    """A check said no: ``verify`` found a defect, or a report crossed its gate. Exit 1."""

    exit_code = 1


class InputError(QuantkitError):
    """Bad input or usage: a file, an option or a request that cannot be honoured. Exit 2."""

    exit_code = 2


class MachineError(QuantkitError):
    """The machine said no (disk, memory, lock, device); the work is resumable. Exit 3."""

    exit_code = 3


class RuntimeDied(QuantkitError):
    """The runtime died or hung: a rank exited, a collective timed out. Exit 4."""

    exit_code = 4
