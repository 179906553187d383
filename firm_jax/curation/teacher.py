"""A teacher: a model behind OpenAI-compatible chat endpoints, asked patiently, within its limits, on the books.

Every try is entered in the ledger before it is sent and settled when it ends, so that what is paid for is counted
whatever happens. HTTP, deadlines, tries and failover are those of a remote critic.
"""

import asyncio
import itertools
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from firm_jax.critic.endpoints import Endpoint, Endpoints, Failed, Policy
from firm_jax.critic.openai_protocol import json_object, the_choice
from firm_jax.critic.questions import MALFORMED_REPLY, TIMEOUT, Picture, png
from firm_jax.critic.remote import base_url, key_header
from firm_jax.curation.ledger import Answered, Cost, Ledger
from firm_jax.errors import ConfigError

PATH = "/v1/chat/completions"
# What an answer is besides "ok": final, for asking again would give the same and cost as much.
REFUSED = "refused"  # the model or its provider declines
EMPTY = "empty"  # no text
CUT = "cut"  # the text ends at the most tokens that it may have

MAY_BE_BILLED = (MALFORMED_REPLY, TIMEOUT)  # the server had begun to work; other failures count as free
MINUTE = 60.0
OVERHEAD_TOKENS = 64  # of the chat's form, at the most


@dataclass(frozen=True)
class TeacherSettings:
    """Which model is asked, where, and what it costs.

    model: its name there. endpoints: base URLs that serve it. price_in, price_out: of a million tokens, in any one
    currency. requests_per_minute, tokens_per_minute: limits over all endpoints in any 60 s; None for none.
    image_tokens: the most that one image counts as. key_variable: the environment variable that holds the key.

    Raises ConfigError for a value that cannot work.
    """

    model: str
    endpoints: tuple[str, ...]
    price_in: float
    price_out: float
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    image_tokens: int = 4096
    temperature: float = 0.0
    key_variable: str = "FIRM_JAX_TEACHER_KEY"

    def __post_init__(self):
        if not self.model or not self.endpoints or isinstance(self.endpoints, str):
            raise ConfigError("a teacher needs the name of its model and a list of one endpoint or more")
        for name in ("price_in", "price_out", "temperature", "image_tokens"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"the teacher's {name} is {getattr(self, name)}; give a number from 0 on")
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ConfigError(f"the teacher's {name} is {value}; give a number from 1 on, or None for no limit")

    def cost(self, tokens_in: int, tokens_out: int) -> Cost:
        """Of one exchange; a price of 1 for a million tokens is 1000 billionths a token."""
        return Cost(tokens_in, tokens_out, round(1000 * (tokens_in * self.price_in + tokens_out * self.price_out)))


class Pace:
    """Waits until one more request, of so many tokens, is within the limits of the last 60 s. In turn."""

    def __init__(self, requests: int | None, tokens: int | None):
        self._requests, self._tokens = requests or math.inf, tokens or math.inf
        self._window: dict[int, list] = {}  # of each request its time and tokens, oldest first
        self._numbers = itertools.count()
        self._turn = asyncio.Lock()

    async def take(self, tokens: int) -> int:
        """The request's number, by which to `correct` its tokens. One larger than the limit goes alone."""
        async with self._turn:
            while True:
                now = time.monotonic()
                while (oldest := next(iter(self._window), None)) is not None:
                    if self._window[oldest][0] > now - MINUTE:
                        break
                    del self._window[oldest]
                taken = sum(entry[1] for entry in self._window.values())
                if oldest is None or (len(self._window) < self._requests and taken + tokens <= self._tokens):
                    number = next(self._numbers)
                    if self._requests < math.inf or self._tokens < math.inf:
                        self._window[number] = [now, tokens]
                    return number
                # Some of what is taken may be given back before the oldest entry is a minute old.
                await asyncio.sleep(min(max(self._window[oldest][0] + MINUTE - now, 0.001), MINUTE / 200))

    def correct(self, number: int, tokens: int) -> None:
        """What the request took is known."""
        if number in self._window:
            self._window[number][1] = tokens


class Teacher:
    """To be used in one event loop; `close` ends the connections. transport: httpx's, in place of the network.

    pace: keeps the settings' limits. To be exchanged where several processes ask, which share them.

    Raises ConfigError for an endpoint that is no URL.
    """

    def __init__(self, settings: TeacherSettings, policy: Policy | None = None, *, transport=None):
        self.settings, self.policy = settings, policy or Policy()
        urls = [base_url(url, "a teacher's endpoints", settings.key_variable) for url in settings.endpoints]
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request otherwise
        self._endpoints = Endpoints(urls, self.policy, key_header(settings.key_variable), transport=transport)
        self._turns = asyncio.Semaphore(self.policy.concurrency)
        self.pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)

    async def close(self) -> None:
        await self._endpoints.close()

    def parameters(self, max_tokens: int) -> dict:
        """What decides an answer besides the question."""
        return {"temperature": self.settings.temperature, "max_tokens": max_tokens}

    async def ask(
        self, ledger: Ledger, key: str, stage: str, text: str, pictures: Sequence[Picture], max_tokens: int
    ) -> Answered:
        """The answer to a text and the pictures before it, entered in the ledger under `key`.

        The outcome is "ok", or REFUSED, EMPTY or CUT, which are final; or one of `questions.FAILURES`: then there is
        no answer, and the call may be asked again. Raises BudgetError and WorkdirError as the ledger does.
        """
        settings = self.settings
        # A token is a byte or more.
        most = settings.cost(len(text.encode()) + settings.image_tokens * len(pictures) + OVERHEAD_TOKENS, max_tokens)
        tokens = most.tokens_in + most.tokens_out
        async with self._turns:
            # The first try waits for its turn outside the deadline: no server is late while we wait.
            number: int | None = await self.pace.take(tokens)
            body = await asyncio.to_thread(self._body, text, pictures, max_tokens)

            async def send(endpoint: Endpoint) -> Answered:
                nonlocal number
                number, paced = None, number if number is not None else await self.pace.take(tokens)
                ledger.begin(key, stage=stage, model=settings.model, most=most)
                return await self._try(ledger, key, endpoint, body, paced)

            try:
                return await self._endpoints.ask(send)
            except Failed as failed:
                return Answered(failed.status, "", str(failed))

    async def _try(self, ledger: Ledger, key: str, endpoint: Endpoint, body: bytes, paced: int) -> Answered:
        cost, begun = None, time.monotonic()
        try:
            content = await self._endpoints.exchange(endpoint, "POST", PATH, body, key)
            try:
                reply = json_object(content)
                if cost := self._cost_of(reply):
                    self.pace.correct(paced, cost.tokens_in + cost.tokens_out)
                answer = _answer(reply)
            except Failed as failed:
                raise Failed(failed.status, f"{endpoint.url}: {failed}") from failed
        except asyncio.CancelledError:  # the deadline of all tries, or the end of the run
            ledger.settle(key, cost, outcome=TIMEOUT, done=False, reason="given up", latency=time.monotonic() - begun)
            raise
        except Failed as failed:
            if cost is None and failed.status not in MAY_BE_BILLED:
                cost = Cost()
            spent = time.monotonic() - begun
            ledger.settle(key, cost, outcome=failed.status, done=False, reason=str(failed), latency=spent)
            raise
        ledger.settle(
            key, cost, outcome=answer.outcome, done=True, answer=answer.answer, reason=answer.reason,
            latency=time.monotonic() - begun,
        )  # fmt: skip
        return answer

    def _cost_of(self, reply) -> Cost | None:
        """Of an exchange that tells its tokens; None where it does not."""
        usage = reply.get("usage")
        counts = [
            usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
        ]
        if not all(isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**40 for count in counts):
            return None
        return self.settings.cost(*counts)

    def _body(self, text: str, pictures: Sequence[Picture], max_tokens: int) -> bytes:
        """Images first and text last, as critics are asked."""
        urls = [f"data:image/png;base64,{png(picture).b64}" for picture in pictures]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        asked = {"model": self.settings.model, "messages": [message], **self.parameters(max_tokens)}
        return json.dumps(asked).encode()


def _answer(reply) -> Answered:
    """What a chat completion answers. Raises Failed for what is none."""
    choice = the_choice(reply)
    message, ended = choice.get("message"), choice.get("finish_reason")
    if not isinstance(message, dict):
        raise Failed(MALFORMED_REPLY, "the reply's choice has no message")
    text, refusal = message.get("content"), message.get("refusal")
    if not isinstance(text, str | None):
        raise Failed(MALFORMED_REPLY, "the reply's choice has no text")
    if refusal or ended == "content_filter":
        return Answered(REFUSED, text or "", str(refusal or "stopped by the provider's filter"))
    if ended == "length":
        return Answered(CUT, text or "", "the answer reached the most tokens that it may have")
    if not (text or "").strip():
        return Answered(EMPTY, text or "", "the answer has no text")
    return Answered("ok", text, "")
