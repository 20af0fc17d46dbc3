"""``quantkit serve`` as a process: it says where it listens, ends cleanly when asked to, and loudly when a rank dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from quantkit.commands.serve import ServeOptions, _is_loopback, bind, model_name, run
from quantkit.errors import InputError, MachineError

NAME = "tiny-llama"
STORY: list[Any] = [{"role": "user", "content": "Tell me a story."}]
GREEDY: dict[str, Any] = {"model": NAME, "messages": STORY, "temperature": 0, "max_tokens": 12}
START_SECONDS = 90.0


@dataclass
class Server:
    """A running server, what it wrote to stderr so far, and where it listens."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def family(self) -> list[psutil.Process]:
        """The server's process and all that it started."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def end(self, number: signal.Signals | None = None, seconds: float = 20.0) -> tuple[int, str]:
        """Wait for the end, after a signal if one is given; the exit code and stdout. Nothing that it started may be left."""
        family = self.family()
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(seconds)
        assert self.process.stdout is not None
        _, left = psutil.wait_procs(family, timeout=10)
        assert left == []
        return code, self.process.stdout.read()


@contextmanager
def serving(*command: str) -> Iterator[Server]:
    """A server that is ready; killed at the end if it is still there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, process_group=0
    )
    server = Server(process)
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: server.log.extend(line.rstrip("\n") for line in process.stderr or ()))
    reader.start()
    try:
        end = time.monotonic() + START_SECONDS
        while not server.url:
            assert process.poll() is None and time.monotonic() < end, "\n".join(server.log)
            found = [match for line in server.log if (match := re.fullmatch(r"serving (\S+) at (http://127\.0\.0\.1:\d+)", line))]
            if found:
                assert found[0][1] == NAME
                server.url = found[0][2]
            time.sleep(0.02)
        yield server
    finally:
        if process.poll() is None:
            for one in server.family():
                one.kill()
        process.wait()
        reader.join()
        assert process.stdout is not None
        process.stdout.close()
        process.stderr.close()


def command(model: Path, *more: str) -> tuple[str, ...]:
    return ("-m", "quantkit", "serve", str(model), "--port", "0", "--device", "cpu", "--dtype", "float32", "--json", *more)


def test_it_serves_until_sigterm_and_says_what_was_served(model: Path) -> None:
    with serving(*command(model)) as server, server.client() as client:
        assert client.models.list().data[0].id == NAME
        whole = client.chat.completions.create(**GREEDY)
        pieces = list(client.chat.completions.create(stream=True, **GREEDY))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
        assert httpx.get(f"{server.url}/health").status_code == 200
        # A stream that runs when the signal comes still ends as it would have.
        stream = client.completions.create(
            model=NAME,
            prompt="Once upon a time",
            max_tokens=200,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
        code, out = server.end()
    assert code == 0, server.log
    data = json.loads(out)
    assert whole.usage is not None
    assert data["requests"] == 3 and data["url"] == server.url and data["model"] == NAME and data["tp"] == 1
    assert data["completion_tokens"] == 2 * whole.usage.completion_tokens + 200
    assert server.log == [f"serving {NAME} at {server.url}"]


IMPATIENT = """
import sys
from quantkit.commands import serve
serve.GRACE = 0.3
report = serve.run(serve.ServeOptions(sys.argv[1], port=0, device="cpu", dtype="float32"))
sys.stdout.write(report.facts[1][1])
"""


def test_what_runs_on_after_the_grace_gets_its_error(model: Path) -> None:
    fields: dict[str, Any] = {"model": NAME, "prompt": "Once upon a time", "max_tokens": 1000, "n": 4, "extra_body": {"ignore_eos": True}}
    failures: list[openai.APIError] = []
    with serving("-c", IMPATIENT, str(model)) as server, server.client() as client:

        def ask_whole() -> None:
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(**fields)
            failures.append(caught.value)

        stream = client.completions.create(stream=True, **fields)
        next(iter(stream))
        asking = threading.Thread(target=ask_whole)
        asking.start()
        end = time.monotonic() + 30
        while httpx.get(f"{server.url}/health").json()["running"] < 8:  # both have their seats, so neither waits for the other
            assert time.monotonic() < end
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        asking.join()
        code, out = server.end(seconds=10)
    assert code == 0, server.log
    assert "closed" in caught.value.message and failures[0].code == "engine_failed"
    assert out.startswith("2 in ")


def test_two_ranks_say_the_same_and_end_with_their_server(model: Path, url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        wanted = client.chat.completions.create(**{**GREEDY, "model": "tiny/llama"}).choices[0].message.content
    with serving(*command(model, "--tp", "2")) as server, server.client() as client:
        assert len(server.family()) == 3
        assert client.chat.completions.create(**GREEDY).choices[0].message.content == wanted
        code, out = server.end(signal.SIGTERM)
    assert code == 0 and json.loads(out)["tp"] == 2


def test_a_killed_rank_is_503_then_exit_4(model: Path) -> None:
    with serving(*command(model, "--tp", "2")) as server, server.client() as client:
        stream = client.completions.create(model=NAME, prompt="Once", max_tokens=1000, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        rank = server.family()[-1]
        died = time.monotonic()
        rank.kill()
        with pytest.raises(openai.APIError, match="SIGKILL"):
            list(stream)
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503 and "SIGKILL" in health.json()["reason"]
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**GREEDY)
        assert caught.value.status_code == 503
        code, out = server.end()
        assert time.monotonic() - died < 20
    assert (code, out) == (4, "")
    assert server.log[1:] == [
        "error: rank 1: was killed by SIGKILL, expected every rank alive",
        "hint: the system may have run out of memory",
    ]


def test_two_replicas_share_the_requests_and_one_death_ends_both(model: Path, url: str) -> None:
    """Figures are of both; a client that leaves frees its seat on the replica that has it; then one replica's rank is killed."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        wanted = client.chat.completions.create(**{**GREEDY, "model": "tiny/llama"}).choices[0].message.content
    long: dict[str, Any] = {"model": NAME, "prompt": "Once", "max_tokens": 1000, "stream": True, "extra_body": {"ignore_eos": True}}
    with serving(*command(model, "--dp", "2", "--max-num-seqs", "2")) as server, server.client() as client:
        assert len(server.family()) == 3
        assert [client.chat.completions.create(**GREEDY).choices[0].message.content for _ in range(3)] == [wanted] * 3
        streams = [client.completions.create(**long) for _ in range(4)]
        for stream in streams:
            next(iter(stream))
        assert httpx.get(f"{server.url}/health").json()["running"] == 4, "twice the seats of one"
        for stream in streams[:3]:
            stream.close()
        end = time.monotonic() + 30
        while httpx.get(f"{server.url}/health").json()["running"] > 1:
            assert time.monotonic() < end
        figures = httpx.get(f"{server.url}/metrics").text
        prompts = re.search(r"^quantkit_prompt_tokens_total (\d+)$", figures, re.MULTILINE)
        assert prompts is not None and int(prompts[1]) > 0 and "quantkit_requests_running 1\n" in figures
        server.family()[-1].kill()
        while (health := httpx.get(f"{server.url}/health")).status_code == 200:
            assert time.monotonic() < end
        assert health.status_code == 503 and re.match(r"replica 1, rank 0: was killed by SIGKILL", health.json()["reason"])
        with contextlib.suppress(openai.APIError):  # the last stream may be of the replica that lives
            list(streams[3])
        code, out = server.end()
    assert (code, out) == (4, "")
    assert server.log[1] == "error: replica 1, rank 0: was killed by SIGKILL, expected every rank alive"


def test_a_taken_port_is_one_error_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MachineError) as caught:
            run(ServeOptions(str(tmp_path / "no model is read"), port=port))
    assert caught.value.line == f"127.0.0.1:{port}: cannot listen (address already in use), expected a free port"


def test_bad_options_are_refused(tmp_path: Path) -> None:
    for options, where in (
        (ServeOptions("x", port=70000), "--port"),
        (ServeOptions("x", host="no such host"), "--host"),
        (ServeOptions("x", port=0, api_key=""), "--api-key"),
        (ServeOptions(str(tmp_path / "absent"), port=0), str(tmp_path / "absent")),
    ):
        with pytest.raises(InputError) as caught:
            run(options)
        assert caught.value.where == where


def test_only_other_machines_can_make_an_address_public() -> None:
    for host, loopback in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)):
        with bind(host, 0) as sock:  # bound, not listening: nobody can connect
            assert _is_loopback(sock) is loopback


@pytest.mark.parametrize(
    ("path", "name"),
    [("pkg:llm_demo", "llm_demo"), ("/models/Some-7B", "Some-7B"), ("/models/some-q4.gguf", "some-q4"), ("/models/v1.5/", "v1.5")],
)
def test_the_default_name_is_the_models(path: str, name: str) -> None:
    assert model_name(path) == name
