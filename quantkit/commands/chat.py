"""``quantkit chat``: a conversation at the terminal. The engine answers; what is shown and typed is the terminal's affair."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quantkit.commands.generate import EngineOptions
from quantkit.errors import InputError
from quantkit.progress import Progress, silent
from quantkit.report import Report
from quantkit.runtime.params import SamplingParams

if TYPE_CHECKING:
    from quantkit.runtime.llm import LLM

HELP = "/reset begins again, /system TEXT sets the system prompt and begins again, /exit or Ctrl-D ends; Ctrl-C stops an answer"


SAMPLING, ENGINE = SamplingParams(temperature=0.7), EngineOptions(max_num_seqs=1)


class Dialogue(Protocol):
    """Where the conversation is held."""

    def ask(self) -> str | None:
        """What the user types; None when there is no more."""

    def say(self, text: str) -> None:
        """Show a piece of an answer at once."""

    def note(self, text: str) -> None:
        """Show a line about the conversation."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """``system``: what the model is told first. ``max_tokens`` None: an answer may take the rest of the context."""

    path: str
    system: str | None = None
    max_tokens: int | None = None
    sampling: SamplingParams = SAMPLING
    engine: EngineOptions = ENGINE


def run(options: ChatOptions, dialogue: Dialogue, progress: Progress = silent) -> Report:
    """Talk until the user ends it. Raises InputError for a model without a chat template, MachineError, RuntimeDied."""
    with options.engine.start(options.path, progress) as llm:
        llm.chat_tokens([{"role": "user", "content": "?"}])  # a model that cannot chat is refused before anyone types
        session = _Session(llm, options, dialogue)
        dialogue.note(HELP)
        while (text := dialogue.ask()) is not None and session.turn(text.strip()):
            pass
    data = {"answers": session.answers, "completion_tokens": session.tokens, "seconds": session.seconds}
    rate = f", {session.tokens / session.seconds:.0f} tokens per second" if session.seconds else ""
    return Report("chat", data, facts=(("answers", f"{session.answers}, {session.tokens} tokens{rate}"),))


class _Session:
    """The messages so far, and what answering them took."""

    def __init__(self, llm: LLM, options: ChatOptions, dialogue: Dialogue) -> None:
        self._llm, self._options, self._dialogue = llm, options, dialogue
        self.answers, self.tokens, self.seconds = 0, 0, 0.0
        self._begin(options.system)

    def _begin(self, system: str | None) -> None:
        self._system = system
        self._messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]

    def turn(self, text: str) -> bool:
        """Do what was typed; False when that is to end."""
        command, _, rest = text.partition(" ")
        if command == "/exit":
            return False
        if command == "/reset":
            self._begin(self._system)
            self._dialogue.note("begun again")
        elif command == "/system":
            self._begin(rest.strip() or None)
            self._dialogue.note("begun again")
        elif command.startswith("/"):
            self._dialogue.note(HELP)
        elif text:
            self._answer(text)
        return True

    def _answer(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        try:
            said = "".join(self._pieces())
        except InputError as exc:  # too long, most often: the conversation goes on without it
            self._messages.pop()
            self._dialogue.note(f"{exc.line}; /reset begins again")
            return
        self._messages.append({"role": "assistant", "content": said})
        self.answers += 1

    def _pieces(self) -> Iterator[str]:
        """The answer as it comes; Ctrl-C ends it, and what was said by then stays."""
        ids = self._llm.chat_tokens(self._messages)
        room = max(1, self._llm.engine.max_model_len - len(ids))
        sampling = dataclasses.replace(self._options.sampling, max_tokens=min(room, self._options.max_tokens or room))
        start = time.monotonic()
        stopped = False
        with contextlib.closing(self._llm.stream(ids, sampling)) as deltas:
            try:
                for delta in deltas:
                    self.tokens += len(delta.tokens)
                    self._dialogue.say(delta.text)
                    yield delta.text
            except KeyboardInterrupt:
                stopped = True
        self.seconds += time.monotonic() - start
        self._dialogue.say("\n")
        if stopped:
            self._dialogue.note("stopped")
