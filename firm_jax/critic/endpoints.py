"""HTTP to one of several endpoints: deadlines, retries with jitter, failover, and rest for one that does not answer.

A request is sent again only where the server cannot have answered it or says that it may be asked again: no connection,
or one that ends before the reply begins, 429, 502, 503, 504. A try that takes too long is not repeated: a slow server
would only get more to do.
"""

import asyncio
import email.utils
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from firm_jax.critic.questions import MALFORMED_REPLY, OVERLOADED, REJECTED, SERVER_ERROR, TIMEOUT, UNREACHABLE

try:
    import httpx
    import tenacity
except ImportError as error:
    raise ImportError(f"asking a server needs {error.name}: pip install -e '.[remote]'", name=error.name) from error

T = TypeVar("T")

AGAIN = {429: OVERLOADED, 502: UNREACHABLE, 503: OVERLOADED, 504: TIMEOUT}
REPLY_BYTES = 32 << 20
SAID_CHARACTERS = 200  # that are told of what a server says of an error
TOLERATED = 3  # failures in a row after which an endpoint rests
LONGEST_WAIT = 30.0
LOOK_SECONDS = 0.25  # at most, between looks for an endpoint that is free


@dataclass(frozen=True)
class Policy:
    """How patiently a remote critic is asked; seconds.

    concurrency: requests in flight. connect_timeout: for a connection. try_timeout: for one exchange. timeout: for a
    request with all its tries and waits; and for which no endpoint need answer before what waits is given up.
    attempts: most times that a request is sent. backoff: below which the first wait is drawn, doubled with each.
    rest: of an endpoint after its third failure in a row, doubled with each.
    """

    concurrency: int = 16
    connect_timeout: float = 5.0
    try_timeout: float = 300.0
    timeout: float = 600.0
    attempts: int = 5
    backoff: float = 0.5
    rest: float = 1.0


class Failed(Exception):
    """A request has no usable reply. status: one of `questions.FAILURES`; the message names endpoint and cause."""

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.status = status


class Again(Failed):
    """Asking again may help."""


class Endpoint:
    """One base URL and how it fares. problem: the last thing that went wrong there."""

    def __init__(self, url: str):
        self.url = url
        self.failures = self.in_flight = 0
        self.free_at = 0.0
        self.probing = False
        self.problem = "not asked yet"


class Endpoints:
    """Several servers of the same critic. To be used in one event loop; `close` ends the connections.

    sent: exchanges begun. retries: those that were another try.
    """

    def __init__(self, urls: Sequence[str], policy: Policy, headers: Mapping[str, str], *, transport=None):
        self.all = [Endpoint(url) for url in urls]
        self.policy = policy
        self.sent = self.retries = 0
        self._down_since: float | None = None
        self._client = httpx.AsyncClient(
            headers={"Accept": "application/json", "Accept-Encoding": "identity", **headers},
            timeout=httpx.Timeout(None, connect=policy.connect_timeout),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=policy.concurrency),
            follow_redirects=False,
            transport=transport,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, send: Callable[[Endpoint], Awaitable[T]], among: Sequence[Endpoint] | None = None) -> T:
        """What `send(endpoint)` returns, which may raise Failed and Again. Raises Failed when all tries are spent."""
        policy, tries = self.policy, 0
        last: Failed | None = None
        failed_at: set[Endpoint] = set()

        async def attempt() -> T:
            nonlocal tries, last
            endpoint = await self._choose(among or self.all, failed_at)
            tries += 1
            self.retries += tries > 1
            endpoint.in_flight += 1
            if probe := endpoint.failures >= TOLERATED:
                endpoint.probing = True
            try:
                return await send(endpoint)
            except Failed as failed:
                endpoint.problem, last = str(failed), failed
                failed_at.add(endpoint)
                raise
            finally:
                endpoint.in_flight -= 1
                endpoint.probing &= not probe

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(policy.attempts),
            wait=tenacity.wait_random_exponential(multiplier=policy.backoff, max=LONGEST_WAIT),
            retry=tenacity.retry_if_exception_type(Again),
            reraise=True,
        )
        try:
            async with asyncio.timeout(policy.timeout):
                return await retrying(attempt)
        except TimeoutError as error:
            status, said = (last.status, f"; the last: {last}") if last else (TIMEOUT, "")
            where = ", ".join(one.url for one in among or self.all)
            raise Failed(status, f"{where}: no answer within {policy.timeout:g} s, in {tries} tries{said}") from error

    async def exchange(
        self, endpoint: Endpoint, method: str, path: str, content: bytes | None = None, request_id: str = ""
    ) -> bytes:
        """The body of a reply with the status 200. Raises Again and Failed."""
        begun, seconds = False, self.policy.try_timeout
        headers = {"Content-Type": "application/json"} if content is not None else {}
        if request_id:
            headers["X-Request-Id"] = request_id
        self.sent += 1
        try:
            async with asyncio.timeout(seconds):
                sending = self._client.stream(method, endpoint.url + path, content=content, headers=headers)
                async with sending as response:
                    begun = True
                    body = await _body(response, endpoint)
        except TimeoutError as error:
            self._note_failure(endpoint)
            raise Failed(TIMEOUT, f"{endpoint.url} has not answered within {seconds:g} s") from error
        except asyncio.CancelledError:  # the deadline of all tries, or the end of the run
            self._note_failure(endpoint)
            raise
        except httpx.TransportError as error:
            self._note_failure(endpoint)
            cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if begun:
                raise Failed(MALFORMED_REPLY, f"the reply of {endpoint.url} breaks off ({cause})") from error
            raise Again(UNREACHABLE, f"{endpoint.url} cannot be reached ({cause})") from error
        self._check_status(endpoint, response, body)
        self._note_life(endpoint)
        return body

    def _check_status(self, endpoint: Endpoint, response: httpx.Response, body: bytes) -> None:
        code = response.status_code
        if code == 200:
            return
        told = f"{endpoint.url} answers {code}: {_said(body)}"
        (self._note_life if code == 429 or code not in AGAIN else self._note_failure)(endpoint)
        if code in AGAIN:
            pause = min(_retry_after(response.headers.get("Retry-After")), self.policy.timeout)
            endpoint.free_at = max(endpoint.free_at, _now() + pause)
            raise Again(AGAIN[code], told)
        if 300 <= code < 400:
            where = response.headers.get("Location", "elsewhere")[:SAID_CHARACTERS]
            raise Failed(REJECTED, f"{endpoint.url} answers {code}, a redirect to {where!r}, which is not followed")
        if 200 <= code < 300:
            raise Failed(MALFORMED_REPLY, told)
        raise Failed(REJECTED if code < 500 else SERVER_ERROR, told)

    def _note_life(self, endpoint: Endpoint) -> None:
        endpoint.failures, self._down_since = 0, None

    def _note_failure(self, endpoint: Endpoint) -> None:
        endpoint.failures += 1
        if endpoint.failures >= TOLERATED:
            rest = min(self.policy.rest * 2 ** min(endpoint.failures - TOLERATED, 16), LONGEST_WAIT)
            endpoint.free_at = max(endpoint.free_at, _now() + rest * random.uniform(0.75, 1.25))
        if self._down_since is None and all(one.failures >= TOLERATED for one in self.all):
            self._down_since = _now()

    async def _choose(self, among: Sequence[Endpoint], failed_at: set[Endpoint]) -> Endpoint:
        """The endpoint to ask next, when one is free: one at which this request has not failed, then the least busy.

        One that has rested is tried by one request alone. Raises Failed when none has answered for too long.
        """
        while True:
            now = _now()
            free = [one for one in among if one.free_at <= now and not (one.failures >= TOLERATED and one.probing)]
            if free:
                return min(free, key=lambda one: (one in failed_at, one.in_flight))
            if self._down_since is not None and now - self._down_since > self.policy.timeout:
                self._give_up(among, now)
            pause = min(max(min(one.free_at for one in among) - now, 0.01), LOOK_SECONDS)
            await asyncio.sleep(pause * random.uniform(1, 1.5))

    def _give_up(self, among: Sequence[Endpoint], now: float) -> NoReturn:
        problems = "; ".join(one.problem for one in among)
        raise Failed(UNREACHABLE, f"no endpoint has answered for {now - self._down_since:.0f} s: {problems}")


async def _body(response: httpx.Response, endpoint: Endpoint) -> bytes:
    """As it was sent: what unpacks to more than it is would be no answer to our Accept-Encoding."""
    if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
        raise Failed(MALFORMED_REPLY, f"the reply of {endpoint.url} is packed with {encoding[:40]!r}")
    parts, size = [], 0
    async for part in response.aiter_raw():
        parts.append(part)
        size += len(part)
        if size > REPLY_BYTES:
            raise Failed(MALFORMED_REPLY, f"the reply of {endpoint.url} is larger than {REPLY_BYTES} bytes")
    return b"".join(parts)


def _said(body: bytes) -> str:
    text = body[: 4 * SAID_CHARACTERS].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in text)[:SAID_CHARACTERS] or "(nothing)"


def _retry_after(value: str | None) -> float:
    """Seconds, of a number or a date; 0 for what is neither."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _now() -> float:
    return time.monotonic()
