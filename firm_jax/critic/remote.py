"""A critic on a server, asked over HTTP: the same requests in and judgements out as of `Critic`."""

import asyncio
import concurrent.futures
import hashlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence

from firm_jax.critic.endpoints import Again, Endpoint, Endpoints, Failed, Policy
from firm_jax.critic.firm_protocol import FirmProtocol
from firm_jax.critic.openai_protocol import OpenAIProtocol
from firm_jax.critic.questions import OVERLOADED, Question, calls_of, questions_of
from firm_jax.critic.rubric import rubrics_from
from firm_jax.critic.score import Judgement
from firm_jax.errors import ConfigError, CriticError, FirmError

KEY_VARIABLE = "FIRM_JAX_CRITIC_KEY"
LOOK_SECONDS = 0.5


class RemoteCritic:
    """A critic behind one or several servers.

    endpoints: their base URLs, such as "http://host:8000". protocol: "firm" for `firm-jax serve`, whose own rubrics are
    asked by; "openai" for vLLM, SGLang and other servers of that chat protocol, which get the filled-in rubric as text.
    model: the name under which it is served; needed where a server has several. rubrics: a folder; for "openai" the
    rubrics to ask by (None: the package's), for "firm" those that the server must have. expected: whether a server that
    cannot tell the expected score is refused. A key, where the servers want one, is in the environment variable
    FIRM_JAX_CRITIC_KEY.

    Who answers is asked at once, kept in `identity`, and compared with every reply. Raises CriticError and ConfigError,
    with endpoint, cause and remedy, when none can be asked or one is another critic.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        protocol: str = "firm",
        model: str | None = None,
        rubrics=None,
        expected: bool = False,
        policy: Policy | None = None,
    ):
        policy, urls, headers = policy or Policy(), [base_url(url) for url in endpoints], key_header()
        given = None if rubrics is None else rubrics_from(rubrics)
        if protocol == "firm":
            self._protocol = FirmProtocol(model, given, policy.try_timeout)
        else:
            self._protocol = OpenAIProtocol(model, given, expected)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request otherwise
        self.policy, self.identity = policy, {}
        self._other: CriticError | None = None
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="remote-critic", daemon=True)
        thread.start()
        self.endpoints, self._turns = self._run(self._open(urls, headers))
        self.close = weakref.finalize(self, _close, self._loop, thread, self.endpoints)
        try:
            self.identity = self._run(self._greet())
        except BaseException:
            self.close()
            raise

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _open(self, urls: Sequence[str], headers: Mapping) -> tuple[Endpoints, asyncio.Semaphore]:
        return Endpoints(urls, self.policy, headers), asyncio.Semaphore(self.policy.concurrency)

    # Who answers

    async def _greet(self) -> dict:
        """Who the servers are: all of them the same, those that cannot be reached left out."""
        everybody = self.endpoints.all
        answers = await asyncio.gather(*(self._greet_one(one) for one in everybody), return_exceptions=True)
        identity, silent = None, []
        for endpoint, found in zip(everybody, answers, strict=True):
            if isinstance(found, FirmError):
                raise type(found)(f"the critic at {endpoint.url} cannot judge this run: {found}") from found
            if isinstance(found, Failed):
                silent.append(str(found))
            elif isinstance(found, BaseException):
                raise found
            elif identity not in (None, found):
                raise CriticError(
                    f"{endpoint.url} is not the critic of the endpoints before: {_other(identity, found)}"
                )
            else:
                identity = found
        if identity is None:
            raise CriticError(
                f"no critic can be asked: {'; '.join(silent)}. Start the server and wait until it is ready, set "
                f"critic.endpoints to where it listens, and {KEY_VARIABLE} to the key that it wants, if any."
            )
        for problem in silent:
            logging.getLogger(__name__).warning("an endpoint of the critic is left out for now: %s", problem)
        return identity

    async def _greet_one(self, endpoint: Endpoint) -> dict:
        async def get(path: str) -> bytes:
            return await self.endpoints.ask(lambda one: self.endpoints.exchange(one, "GET", path), [endpoint])

        async def post(body: bytes) -> bytes:
            path = self._protocol.path
            return await self.endpoints.ask(lambda one: self.endpoints.exchange(one, "POST", path, body), [endpoint])

        deadline = time.monotonic() + self.policy.timeout
        while True:
            try:
                return await self._protocol.greet(get, post)
            except Failed as failed:  # one that still loads is waited for
                if failed.status != OVERLOADED or time.monotonic() > deadline:
                    raise

    # Judging

    def judge(self, requests: Sequence[Mapping], max_new_tokens: int = 512, progress=iter) -> list[Judgement]:
        """As `Critic.judge`. A question without an answer is a judgement without a score, whose status says why.

        `progress` wraps an iterable of rounds of waiting. Raises ConfigError and DataError for a request that cannot be
        asked, CriticError when another critic answers than at the start.
        """
        asked = self.ask(requests, max_new_tokens)
        for _ in progress(asked.rounds()):
            pass
        return asked.judgements()

    def ask(self, requests: Sequence[Mapping], max_new_tokens: int = 512) -> "Asked":
        """Begin to ask, without waiting for an answer. Raises as `judge` for requests that cannot be asked."""
        questions = questions_of(requests, max_new_tokens)
        for question in questions:
            self._protocol.check(question, self.identity)
        calls = calls_of(questions, self._protocol.together)
        return Asked(questions, [asyncio.run_coroutine_threadsafe(self._call(call), self._loop) for call in calls])

    async def _call(self, questions: list[Question]) -> dict[str, Judgement]:
        """A judgement for the id of each of the questions, which go in one request."""
        found: dict[str, Judgement] = {}

        async def send(endpoint: Endpoint) -> None:
            if self._other is not None:
                raise self._other
            open_ = [question for question in questions if question.id not in found]
            name = hashlib.sha256("".join(question.id for question in open_).encode()).hexdigest()
            body = await asyncio.to_thread(self._protocol.body, open_, name)
            reply = await self.endpoints.exchange(endpoint, "POST", self._protocol.path, body, name)
            try:
                who, answers = self._protocol.read(reply, open_, name, self.identity)
            except Failed as failed:
                raise Failed(failed.status, f"{endpoint.url}: {failed}") from failed
            if who != self.identity:
                self._other = CriticError(
                    f"the critic at {endpoint.url} is no longer the one that this run began with: "
                    f"{_other(self.identity, who)}. Its judgements are not comparable. Serve the first one again and "
                    "start the same command, or begin another run."
                )
                raise self._other
            busy = {name: answer for name, answer in answers.items() if answer.status == OVERLOADED}
            found.update({name: answer for name, answer in answers.items() if name not in busy})
            if busy:
                reason = next(iter(busy.values())).reason
                raise Again(OVERLOADED, f"{endpoint.url} could not answer {len(busy)} of {len(answers)}: {reason}")

        async with self._turns:
            try:
                await self.endpoints.ask(send)
            except Failed as failed:
                for question in questions:
                    if question.id not in found:
                        rubric = self._protocol.rubric_of(question, self.identity)
                        found[question.id] = question.missing(failed.status, str(failed), rubric)
        return found


class Asked:
    """Questions on their way to a remote critic.

    begun, ended: by time.perf_counter, when they were asked and when the last one was answered, None before that.
    """

    def __init__(self, questions: Sequence[Question], answers: Sequence[concurrent.futures.Future]):
        self._questions, self._answers = questions, answers
        self.begun, self.ended = time.perf_counter(), None
        self._open = len(answers)
        self._lock = threading.Lock()
        if not answers:
            self.ended = self.begun
        for answer in answers:
            answer.add_done_callback(self._answered)

    def _answered(self, _) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0:
                self.ended = time.perf_counter()

    def wait(self, seconds: float) -> bool:
        """Whether all are answered, or one has shown that none should be, within so many seconds."""
        when = concurrent.futures.FIRST_EXCEPTION
        done, waiting = concurrent.futures.wait(self._answers, seconds, return_when=when)
        return not waiting or any(answer.cancelled() or answer.exception() for answer in done)

    def rounds(self) -> Iterator[None]:
        """An item for every moment of waiting."""
        while not self.wait(LOOK_SECONDS):
            yield

    def judgements(self) -> list[Judgement]:
        """Of the requests, in order; all are to be answered. Raises CriticError when another critic answers."""
        found: dict[str, Judgement] = {}
        try:
            for answer in self._answers:
                found |= answer.result()
        except BaseException:
            for answer in self._answers:
                answer.cancel()
            raise
        return [found[question.id] for question in self._questions]


def base_url(url: str, named: str = "critic.endpoints", variable: str = KEY_VARIABLE) -> str:
    """A server's URL without the `/v1` and the slash that may end it.

    Raises ConfigError for what is none; named: the config's key that it comes from, variable: where its key belongs.
    """
    found = url.rstrip("/").removesuffix("/v1").rstrip("/")
    scheme, separator, host = found.partition("://")
    if not separator or scheme not in ("http", "https") or not host or "@" in host or set(host) & set("?# "):
        shown = "it" if "@" in url else repr(url)
        raise ConfigError(
            f"{shown} in {named} is no base URL; one is like http://host:8000, without a user or a key (that "
            f"goes into the environment variable {variable})"
        )
    return found


def key_header(variable: str = KEY_VARIABLE) -> dict[str, str]:
    """The header that carries the key of that environment variable, if it is set. Raises ConfigError."""
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"the key in {variable} holds characters that no header can carry")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _other(before: Mapping, now: Mapping) -> str:
    differing = [name for name in before if before[name] != now.get(name)]
    return ", ".join(f"{name} {before[name]!r} -> {now.get(name)!r}" for name in differing)


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread, endpoints: Endpoints) -> None:
    """End what is being asked, so that the server need not go on with it, then the loop."""

    async def end() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await endpoints.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)
    if threading.current_thread() is not thread:  # who lets go of the critic last may be its own thread
        thread.join(5)
        if not thread.is_alive():
            loop.close()
