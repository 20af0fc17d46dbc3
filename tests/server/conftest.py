"""A model to serve, an engine that says what a test tells it to, and an application that really listens."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from quantkit.runtime.engine import Engine, QueueFull
from quantkit.runtime.start import start_engine
from quantkit.server.app import create_app
from quantkit.text.tokenizer import load_tokenizer

MODELS = Path(__file__).parents[1] / "data" / "models"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template that shows roles, contents and ids as they come in."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny trained Llama, with a chat template."""
    root = tmp_path_factory.mktemp("served") / "tiny-llama"
    shutil.copytree(MODELS / "llama", root)
    (root / "chat_template.jinja").write_text(TEMPLATE)
    return root


@dataclass
class ScriptedEngine:
    """Takes requests like an Engine and answers nothing by itself: the test says what comes, from a thread of its own."""

    tokenizer: Any
    max_model_len: int = 64
    room: int = 8
    """Requests that are taken before the queue is full."""
    capacity: int = 8
    failure: Any = None
    on_delta: dict[int, Callable[[Any], None]] = field(default_factory=dict)
    submitted: list[tuple[list[int], Any]] = field(default_factory=list)
    salts: list[str] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    @property
    def spec(self) -> SimpleNamespace:
        return SimpleNamespace(dims={"vocab": SimpleNamespace(elements=1024)})

    def submit(self, prompt: list[int], params: Any, on_delta: Callable[[Any], None], *, cache_salt: str = "") -> int:
        if self.failure is not None:
            raise self.failure
        if len(self.submitted) >= self.room:
            raise QueueFull("engine", "the queue is full", f"at most {self.room} requests")
        self.submitted.append((list(prompt), params))
        self.salts.append(cache_salt)
        number = len(self.submitted)
        self.on_delta[number] = on_delta
        return number

    def cancel(self, request: int) -> None:
        self.cancelled.append(request)

    def say(self, request: int, *events: Any) -> None:
        """Deliver ``events`` to a request from another thread, as an engine does."""
        thread = threading.Thread(target=lambda: [self.on_delta[request](event) for event in events])
        thread.start()
        thread.join()

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(running=len(self.submitted), waiting=0, kv_tokens_used=0, kv_tokens_total=64)


@pytest.fixture
def scripted(model: Path) -> ScriptedEngine:
    return ScriptedEngine(load_tokenizer(model))


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    """``wait_for(condition)`` returns once the condition holds, and fails the test after some seconds."""

    def wait(condition: Callable[[], object], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s"
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def engine(model: Path) -> Iterator[Engine]:
    """The real engine, one rank in this process."""
    engine = start_engine(str(model), tp=1, device="cpu", dtype="float32", max_num_seqs=4)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def url(engine: Engine, listen: Callable[[Any], str]) -> str:
    """Where the real engine is served, as ``tiny/llama``."""
    return listen(create_app(engine, served_model_name="tiny/llama", api_key=None))


@pytest.fixture(scope="session")
def listen(wait_for: Callable[..., None]) -> Iterator[Callable[[Any], str]]:
    """``listen(app)`` is the URL of a server that serves the application from a thread until the tests are over."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: Any) -> str:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="critical", ws="none", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
        running.append((server, thread))
        thread.start()
        wait_for(lambda: server.started)
        return f"http://127.0.0.1:{sock.getsockname()[1]}"

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(10)
        assert not thread.is_alive()
