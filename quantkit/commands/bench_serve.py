"""``quantkit bench serve``: requests to a server that runs, over HTTP, as clients send them; any that speaks OpenAI's completions."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.commands.bench_requests import Load, Timed, asks, check_out, facts_of, figures, write_figures
from quantkit.commands.prompt_file import Line, api_fields
from quantkit.errors import InputError, MachineError
from quantkit.progress import Progress, silent
from quantkit.report import Report

LOAD = Load()
MAX_LINE = 1 << 20


@dataclass(frozen=True, slots=True)
class BenchServeOptions:
    """``url`` of the server, without /v1. ``model`` None: the first that it names. ``concurrency``: requests under way at most.

    ``request_rate`` per second, at random moments (a Poisson process); None sends as fast as ``concurrency`` lets it.
    """

    url: str = "http://127.0.0.1:8000"
    load: Load = LOAD
    model: str | None = None
    api_key: str | None = None
    concurrency: int = 32
    request_rate: float | None = None
    timeout: float = 600.0
    out: Path | None = None


def run(options: BenchServeOptions, progress: Progress = silent) -> Report:
    """Send all requests, wait for all answers. Raises InputError for a bad URL or refused request, MachineError when no one answers."""
    check_out(options.out)
    wanted = asks(options.load)
    client = _Client(options)
    model = options.model or client.first_model()
    moments = _moments(options, len(wanted))
    progress("measure", 0, len(wanted))
    start = time.perf_counter()
    stop = threading.Event()

    def send(line: Line, moment: float) -> Timed:
        stop.wait(max(0.0, moment - (time.perf_counter() - start)))
        return client.complete(model, line, start)

    answers = []
    with ThreadPoolExecutor(options.concurrency) as pool:
        sent = [pool.submit(send, line, moment) for line, moment in zip(wanted, moments, strict=True)]
        try:
            for number, one in enumerate(as_completed(sent), 1):
                answers.append(one.result())
                progress("measure", number, len(wanted))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    data = {"model": model, "url": options.url, "concurrency": options.concurrency, "request_rate": options.request_rate}
    data |= figures(answers, time.perf_counter() - start)
    write_figures(options.out, data)
    return Report("bench serve", data, facts=(("server", f"{options.url}, {model}, {options.concurrency} at once"), *facts_of(data)))


def _moments(options: BenchServeOptions, count: int) -> list[float]:
    """When each request is due, in seconds."""
    draw, now, moments = random.Random(options.load.seed), 0.0, []
    for _ in range(count):
        moments.append(now)
        now += draw.expovariate(options.request_rate) if options.request_rate else 0.0
    return moments


class _Client:
    """A server at an address."""

    def __init__(self, options: BenchServeOptions) -> None:
        parts = urllib.parse.urlsplit(options.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("--url", f"{options.url!r:.200} is no address of a server", "http://HOST:PORT")
        self._https, self._where, self._base = parts.scheme == "https", parts.netloc, parts.path.rstrip("/")
        self._timeout, self._url = options.timeout, options.url
        self._headers = {"Content-Type": "application/json"}
        if options.api_key:
            self._headers["Authorization"] = f"Bearer {options.api_key}"

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = kind(self._where, timeout=self._timeout)
        connection.request(method, f"{self._base}/v1/{path}", None if body is None else json.dumps(body), self._headers)
        response = connection.getresponse()
        if response.status != 200:
            raise InputError(self._url, f"answers {response.status}: {response.read(500).decode('utf-8', 'replace')}", "200")
        return response

    def first_model(self) -> str:
        try:
            with self._send("GET", "models", None) as response:
                return str(json.loads(response.read(MAX_LINE))["data"][0]["id"])
        except (OSError, http.client.HTTPException) as exc:
            raise MachineError(self._url, f"does not answer ({exc})", "a server", "quantkit serve MODEL") from exc
        except (ValueError, LookupError, TypeError) as exc:
            raise InputError(self._url, "does not say which models it has", "an OpenAI-compatible server", "--model NAME") from exc

    def complete(self, model: str, line: Line, start: float) -> Timed:
        """One streamed answer; its times are since ``start``."""
        body = {"model": model, **api_fields(line), "stream": True, "stream_options": {"include_usage": True}}
        sent, came, usage = time.perf_counter() - start, list[float](), dict[str, int]()
        try:
            with self._send("POST", "chat/completions" if line.chat else "completions", body) as response:
                for event in _events(response):
                    if event.get("choices") and not _opens(event["choices"][0]):
                        came.append(time.perf_counter() - start)
                    if isinstance(event.get("error"), dict):
                        raise MachineError(self._url, f"ends an answer: {event['error'].get('message')!s:.300}", "a whole answer")
                    usage = event.get("usage") or usage
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise MachineError(self._url, f"breaks off an answer ({exc})", "a whole answer") from exc
        if not came or "completion_tokens" not in usage:
            raise MachineError(self._url, "gives an answer without tokens or usage", "a stream that ends with its usage")
        return Timed(sent, tuple(came), usage.get("prompt_tokens", 0), usage["completion_tokens"])


def _opens(choice: Any) -> bool:
    """Whether an item of a stream only says who speaks."""
    delta = choice.get("delta") if isinstance(choice, dict) else None
    return isinstance(delta, dict) and "role" in delta and not delta.get("content")


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of server-sent events, up to [DONE]."""
    while line := response.readline(MAX_LINE):
        text = line.decode().strip()
        if text == "data: [DONE]":
            return
        if text.startswith("data: "):
            event = json.loads(text.removeprefix("data: "))
            if isinstance(event, dict):
                yield event
