"""What is refused before it is read, and how much is read: the outermost layer of the application."""

import asyncio
import hmac
import json
import time
from collections.abc import Callable

from firm_jax.service.limits import Limits
from firm_jax.service.observed import Observed

OPEN = ("/healthz", "/readyz")  # to everybody, at any time; they tell nothing that is judged
ANSWERED_WHILE_DRAINING = (*OPEN, "/metrics")
RETRY_SECONDS = "10"


def error_body(message: str, kind: str, code: str) -> dict:
    """An error in the form that OpenAI's clients read."""
    return {"error": {"message": message, "type": kind, "code": code, "param": None}}


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = error_body(message, kind, code)


class Guard:
    """Wraps an ASGI application. `active`: requests that it is answering. `closed`: says whether it takes new ones."""

    def __init__(self, app, limits: Limits, token: str | None, observed: Observed, closed: Callable[[], str | None]):
        self.app, self.limits, self.token, self.observed, self.closed = app, limits, token, observed, closed
        self.active = 0
        self._bytes = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        begun, sent = time.monotonic(), {"status": 500}

        async def counted(message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
            await send(message)

        scope.setdefault("state", {})["begun"] = begun
        self.active += 1
        held = [0]
        try:
            self._check(scope)
            body = await self._read(scope, receive, held)
            await self.app(scope, _replayed(body, receive), counted)
        except _Refused as refused:
            await _respond(refused, counted)
        finally:
            self.active -= 1
            self._bytes -= held[0]
            route = scope.get("route")
            path = route.path if route is not None else "other"
            self.observed.requests.labels(path, sent["status"]).inc()
            self.observed.request_seconds.labels(path).observe(time.monotonic() - begun)

    def _check(self, scope) -> None:
        path, headers = scope["path"], _headers(scope)
        if (reason := self.closed()) and path not in ANSWERED_WHILE_DRAINING:
            message = "the service is being stopped" if reason == "draining" else "the critic is being loaded"
            raise _Refused(503, reason, f"{message}; try again, or another instance", **{"Retry-After": RETRY_SECONDS})
        if self.token is not None and path not in OPEN:
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                message = "send the service's token in the header Authorization: Bearer TOKEN"
                raise _Refused(401, "unauthorized", message, **{"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST":
            if headers.get("content-encoding", "identity") != "identity":
                raise _Refused(415, "content_encoding", "send the body as it is, without a Content-Encoding")
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise _Refused(415, "content_type", "send JSON, with the header Content-Type: application/json")
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or len(declared) > 15 or int(declared) > self.limits.body_bytes:
            raise self._too_large()

    async def _read(self, scope, receive, held: list[int]) -> bytes:
        """The whole body; `held` counts its bytes in what all requests hold together."""
        parts, more = [], scope["method"] not in ("GET", "HEAD")
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Refused(400, "disconnected", "the body did not arrive")
                    part, more = message.get("body", b""), message.get("more_body", False)
                    parts.append(part)
                    held[0] += len(part)
                    self._bytes += len(part)
                    if held[0] > self.limits.body_bytes:
                        raise self._too_large()
                    if self._bytes > self.limits.bodies_bytes:
                        message = "too many large requests at once; try again"
                        raise _Refused(429, "overloaded", message, **{"Retry-After": RETRY_SECONDS})
        except TimeoutError as error:
            message = f"the body did not arrive within {self.limits.body_seconds:.0f} s"
            raise _Refused(408, "slow_body", message, Connection="close") from error
        return b"".join(parts)

    def _too_large(self) -> _Refused:
        message = f"a body has at most {self.limits.body_bytes} bytes; send fewer or smaller images"
        return _Refused(413, "body_too_large", message, Connection="close")


def _headers(scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _replayed(body: bytes, receive):
    """`receive` once more from the body's start."""
    given = False

    async def again():
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _respond(refused: _Refused, send) -> None:
    content = json.dumps(refused.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **refused.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})
