"""What stands between the network and the endpoints: bodies within bounds, the API key, clients that leave, errors in one shape.

Knows HTTP and OpenAI's error body; knows no engine that runs and no request's fields.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from quantkit.errors import InputError, MachineError, QuantkitError, RuntimeDied
from quantkit.runtime.engine import QueueFull
from quantkit.server.protocol import ApiError, invalid

T = TypeVar("T")

MAX_BODY = 8 << 20
DRAINED_BODY = 64 << 20
"""A refused body up to this size is read to its end, so that its sender gets to read the 413."""
BODY_SECONDS = 60.0
RETRY_AFTER = 1
"""Seconds that a client is asked to wait when the queue is full."""
CLIENT_GONE = 499
"""The status of an answer that nobody reads."""


def api_error(error: QuantkitError) -> ApiError:
    """An error of quantkit as the client sees it."""
    if isinstance(error, QueueFull):
        return ApiError(429, error.line, type_="rate_limit_error", code="queue_full", retry_after=RETRY_AFTER)
    if isinstance(error, InputError):
        return invalid(None, error.line)
    if isinstance(error, RuntimeDied | MachineError):
        return ApiError(503, error.line, type_="server_error", code="engine_failed")
    return ApiError(500, error.line, type_="server_error")


def _response(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


async def read_body(request: Request) -> bytes:
    """The body of a JSON request. Raises ApiError: 415 for another type, 413 over MAX_BODY, 408 when it does not come."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also what keeps a web page from posting here without being asked
        raise invalid(None, f"the content type is {kind or 'missing'}, expected application/json", "invalid_content_type", 415)
    too_large = invalid(None, f"the body is larger than {MAX_BODY} bytes", "body_too_large", 413)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > DRAINED_BODY:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BODY:
                    parts.append(part)
                elif size > DRAINED_BODY:
                    break
    except TimeoutError as exc:
        raise invalid(None, f"the body did not come within {BODY_SECONDS:.0f} s", "body_timeout", 408) from exc
    if size > MAX_BODY:
        raise too_large
    return b"".join(parts)


async def until_gone(request: Request, work: asyncio.Task[T]) -> T | None:
    """The result of ``work``, or None when the client leaves first; then ``work`` is cancelled. The body must have been read."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(leaves())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        gone.cancel()
        work.cancel()


def key_check(api_key: str | None) -> Callable[[Request], Awaitable[None]]:
    """A dependency that lets a request pass when it brings ``api_key``, or when there is none."""

    def digest(key: bytes) -> bytes:
        return hashlib.sha256(key).digest()

    wanted = None if api_key is None else digest(api_key.encode("utf-8", "surrogateescape"))

    async def check(request: Request) -> None:
        if wanted is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Digests of equal length, so that the time tells neither the key's length nor how much of it is right.
        if not hmac.compare_digest(digest(given.strip().encode("latin-1")), wanted) or scheme.lower() != "bearer":
            raise ApiError(401, "the API key is missing or wrong", type_="invalid_request_error", code="invalid_api_key")

    return check


def add_error_handlers(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape, those of the framework too."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError | QuantkitError)
        return _response(error if isinstance(error, ApiError) else api_error(error))

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return _response(invalid(None, what, "not_found" if error.status_code == 404 else "invalid_request", error.status_code))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    async def bug(request: Request, error: Exception) -> Response:
        return _response(ApiError(500, "the server has a defect; its log says more", type_="server_error"))

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(QuantkitError, ours)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, bug)
