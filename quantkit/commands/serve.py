"""``quantkit serve``: an engine behind OpenAI's endpoints, in this process, until a signal or the engine's death ends it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from quantkit.commands.generate import ranks_named
from quantkit.errors import InputError, MachineError, QuantkitError
from quantkit.progress import Progress, silent
from quantkit.report import Report

if TYPE_CHECKING:
    import uvicorn

    from quantkit.runtime.engine import Front

LOG = logging.getLogger("quantkit.serve")
NEEDED = ("fastapi", "uvicorn", "sse_starlette")
TICK = 0.1
GRACE = 5.0
"""Seconds that running requests may go on after a signal; then the engine is closed and each gets its error."""
GRACE_AFTER = 3
"""Whole seconds beside GRACE until connections that are still open are cut."""
LINGER = 1.5
"""Seconds between the engine's death and the end, in which clients read their errors and /health says 503."""
BACKLOG = 512


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Options of ``quantkit serve``. Port 0 is a free one; ``timeout`` is of collectives, in seconds; limits are of each replica."""

    path: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: str | None = None
    tp: int | None = None
    device: str = "auto"
    dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: str = "auto"
    lm_head: str = "auto"
    attention_backend: str = "auto"
    prefix_caching: bool = True
    max_queue: int = 64
    timeout: float = 60.0
    dp: int = 1
    executor: str = "local"


def model_name(path: str) -> str:
    """The name under which a model is served by default: its directory, its file without ``.gguf``, or its package."""
    if path.startswith("pkg:"):
        return path.removeprefix("pkg:")
    resolved = Path(path).resolve()
    return resolved.stem if resolved.suffix == ".gguf" else resolved.name


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket that does not listen yet. InputError for a bad address, MachineError when the port cannot be had."""
    if not 0 <= port <= 65535:
        raise InputError("--port", f"is {port}", "0 (any free port) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as exc:
        raise InputError("--host", f"{host!r} is no address ({exc})", "a name or an address of this machine") from exc
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose last server has just ended is free
        sock.bind(address)
    except OSError as exc:
        sock.close()
        raise _unusable(host, port, exc) from exc
    return sock


def _unusable(host: str, port: int, error: OSError) -> MachineError:
    reason = error.strerror or str(error)
    return MachineError(f"{host}:{port}", f"cannot listen ({reason[:1].lower() + reason[1:]})", "a free port", "--port 0 picks one")


def _is_loopback(sock: socket.socket) -> bool:
    return ipaddress.ip_address(str(sock.getsockname()[0]).partition("%")[0]).is_loopback


def _url(sock: socket.socket, host: str) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"


@contextlib.contextmanager
def _logs_on_stderr() -> Iterator[bool]:
    """Send our lines and the server's warnings to stderr; its access log too when ``quantkit`` logs at INFO (then True)."""
    verbose = logging.getLogger("quantkit").isEnabledFor(logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    loggers = [(LOG, logging.INFO), (logging.getLogger("uvicorn"), logging.INFO if verbose else logging.WARNING)]
    before = [(logger, logger.level, logger.propagate) for logger, _ in loggers]
    for logger, level in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    try:
        yield verbose
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


@contextlib.contextmanager
def _signals_end(server: uvicorn.Server) -> Iterator[None]:
    """SIGTERM and SIGINT ask ``server`` to end. It has handlers of its own while it runs, then hands its signals to these."""

    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread, whoever runs there
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _watch(server: uvicorn.Server, engine: Front, ready: str) -> None:
    """Say that the port listens; end the server when the engine dies; and once it ends, end what still runs after GRACE."""
    while not server.started and not server.should_exit:
        await asyncio.sleep(TICK / 10)
    if server.started:
        LOG.info(ready)
    while not server.should_exit:
        if engine.failure is not None:
            await asyncio.sleep(LINGER)
            server.should_exit = True
            return
        await asyncio.sleep(TICK)
    await asyncio.sleep(GRACE)
    await asyncio.to_thread(engine.close)


async def _run_server(server: uvicorn.Server, sock: socket.socket, engine: Front, ready: str) -> QuantkitError | None:
    """Serve until a signal or the engine's death; returns why the engine died, or None."""
    watch = asyncio.create_task(_watch(server, engine, ready))
    failure: QuantkitError | None = None
    try:
        await server.serve(sockets=[sock])
        failure = engine.failure
    finally:
        watch.cancel()
    return failure


def _serve(options: ServeOptions, engine: Front, sock: socket.socket, name: str) -> tuple[dict[str, object], float]:
    """Serve ``engine`` on ``sock`` until it is over; what was served, and for how many seconds. Raises why the engine died."""
    import uvicorn

    from quantkit.server.app import create_app

    app = create_app(engine, served_model_name=name, api_key=options.api_key)
    with _logs_on_stderr() as verbose:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=verbose,
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=int(GRACE) + GRACE_AFTER,
        )
        server = uvicorn.Server(config)
        try:
            sock.listen(BACKLOG)
        except OSError as exc:
            raise _unusable(options.host, options.port, exc) from exc
        if not _is_loopback(sock) and options.api_key is None:
            LOG.warning(
                "warning: serving on %s without an API key: whoever reaches this address can use the model (--api-key)", options.host
            )
        start = time.monotonic()
        with _signals_end(server):
            failure = asyncio.run(_run_server(server, sock, engine, f"serving {name} at {_url(sock, options.host)}"))
    if failure is not None:
        raise failure
    served = app.state.served
    counts = {"requests": served.requests, "prompt_tokens": served.prompt_tokens, "completion_tokens": served.completion_tokens}
    return counts, time.monotonic() - start


def run(options: ServeOptions, progress: Progress = silent) -> Report:
    """Serve ``options.path`` until SIGTERM or SIGINT, then say what was served.

    Raises InputError for a bad option or model, MachineError when the port cannot be had or the server is not installed,
    RuntimeDied when the engine dies.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MachineError("serve", f"{', '.join(missing)} not installed", "the serve extra", "pip install 'quantkit[serve]'")
    if options.api_key == "":
        raise InputError("--api-key", "is empty", "a key, or no --api-key")
    name = options.served_model_name or model_name(options.path)
    with contextlib.closing(bind(options.host, options.port)) as sock:  # before the weights are read: a taken port is known at once
        from quantkit.runtime.start import start_engine

        url = _url(sock, options.host)
        engine = start_engine(
            options.path,
            tp=options.tp,
            dp=options.dp,
            executor=options.executor,
            device=options.device,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            memory_share=options.gpu_memory_utilization,
            kv_cache_dtype=options.kv_cache_dtype,
            lm_head=options.lm_head,
            attention_backend=options.attention_backend,
            prefix_caching=options.prefix_caching,
            max_queue=options.max_queue,
            timeout=options.timeout,
            progress=progress,
        )
        try:
            served, seconds = _serve(options, engine, sock, name)
        finally:
            engine.close()
    facts = (
        ("served", f"{name} at {url}, {ranks_named(engine.tp, engine.dp)}, {engine.dtype}, context {engine.max_model_len}"),
        ("requests", f"{served['requests']} in {seconds:.0f} s"),
        ("tokens", f"{served['prompt_tokens']} of prompts, {served['completion_tokens']} generated"),
    )
    data = {"model": name, "url": url, "tp": engine.tp, "dp": engine.dp, "dtype": engine.dtype}
    data |= {"max_model_len": engine.max_model_len, "seconds": seconds}
    return Report(command="serve", data={**data, **served}, facts=facts)
