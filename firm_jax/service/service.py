"""The critic behind the routes: loaded, tried with a canary, asked, remembered."""

import asyncio
import collections
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image as Pillow

from firm_jax.critic import Critic
from firm_jax.critic.decode import Generation
from firm_jax.critic.processing import Sequence as Prompt
from firm_jax.errors import ConfigError, CriticError, DataError
from firm_jax.service.engine import Engine, Failed, Full, Question
from firm_jax.service.fixed import FixedDecoder, Likely
from firm_jax.service.judging import Images, Invalid, contents, item_prompt, question_key, scored
from firm_jax.service.limits import Limits
from firm_jax.service.observed import Observed
from firm_jax.service.protocol import Identity, Item, Readiness, ScoredItem, ScoreRequest

CANARY_SECONDS = 60.0  # for which an answer to the canary holds
CANARY_PATIENCE_SECONDS = 5.0  # that /readyz waits for one
LATE = "the deadline has passed"
STALL_SECONDS = 300.0  # without an answer to the canary, which is first in line: more than any batch takes


class Overdue(Exception):
    """The deadline of a question has passed before it was answered."""


class Service:
    """One critic and all that is asked of it.

    load: loads the critic and says who it is; called in the thread that owns the devices. rows: questions answered at
    once. warm_up: sizes (width, height) of images whose programs are compiled before the service is ready. opened:
    called when it is; failed: when the critic cannot be loaded or cannot answer.

    state: "loading", "ok" or "draining". error: why there will be no critic.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Critic, Identity]],
        *,
        rows: int,
        limits: Limits,
        warm_up: Sequence[tuple[int, int]] = (),
        opened: Callable[[], None] = lambda: None,
        failed: Callable[[], None] = lambda: None,
    ):
        self.limits, self.rows, self.observed = limits, rows, Observed()
        self.state, self.error = "loading", None
        self.engine = Engine(self._loading(load, warm_up), self._loaded, limits, self.observed)
        self._opened, self._failed = opened, failed
        self._pool = ThreadPoolExecutor(thread_name_prefix="images")
        self._remembered: collections.OrderedDict[str, Generation] = collections.OrderedDict()
        self._canary: Question | None = None
        self._canary_answer: np.ndarray | None = None
        self._canary_seen, self._canary_problem = 0.0, None
        self._canary_lock = threading.Lock()

    def start(self) -> None:
        self.engine.start()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.engine.close()

    def closed(self) -> str | None:
        """Why nothing can be asked, if so."""
        return None if self.state == "ok" else self.state

    def _loading(self, load, warm_up) -> Callable[[], FixedDecoder]:
        def loading() -> FixedDecoder:
            self.critic, self.identity = load()
            room = self.critic.max_length - self.limits.new_tokens
            if room <= 0:
                raise ConfigError(
                    f"--max-new-tokens {self.limits.new_tokens} leaves no room for a question: the critic was made for "
                    f"{self.critic.max_length} tokens; lower it"
                )
            axis = min(self.critic.rubrics)
            try:
                self._canary_prompt = self._prompt_of(axis, canary_picture())
                self._warm_up = [
                    self._prompt_of(name, Pillow.new("RGB", size)) for size in warm_up for name in self.critic.rubrics
                ]
            except DataError as error:
                raise ConfigError(f"the critic cannot be asked about its own canary: {error}") from error
            self._canary_item = Item(id="canary", axis=axis, instruction="a red square", images=[{"b64": ""}])
            return FixedDecoder(self.critic.decoder, self.rows, self.limits.new_tokens)

        return loading

    def _prompt_of(self, axis: str, picture: Pillow.Image) -> Prompt:
        images = [picture] * (2 if axis.startswith("edit_") else 1)
        request = {"images": images, "prompt": "a red square", "criterion": axis}
        return self.critic.prompt(request, self.limits.new_tokens, name="the canary")

    def _loaded(self, error: Exception | None) -> None:
        if error is not None:
            self._give_up(error)
            return
        for prompt in self._warm_up:
            self.engine.submit(prompt, 1)
        self._ask_canary()

    def _give_up(self, error: Exception) -> None:
        self.error = error
        self._failed()

    def _ask_canary(self) -> None:
        self._canary = self.engine.submit(self._canary_prompt, self.limits.new_tokens, first=self._canary is not None)
        self._canary.answer.add_done_callback(self._canary_answered)

    def _canary_answered(self, answer: Future) -> None:
        """Called with each answer to the canary: the first one opens the service, all others must be equal to it."""
        try:
            generation, _ = answer.result()
            self._canary_seen = time.monotonic()
            self._canary_scored = scored(self.critic, self._canary_item, self._canary_prompt, generation)
            if self._canary_answer is None:
                self._open(generation)
        except Exception as error:  # a callback's own would be lost, and the service never open
            self._canary_problem = "the canary could not be answered"
            if self._canary_answer is None:
                failed = CriticError("the critic cannot answer its canary; the log says why")
                self._give_up(failed if isinstance(error, Failed) else error)
            self.observed.ready.set(False)
            return
        same = np.array_equal(generation.tokens, self._canary_answer)
        self._canary_problem = None if same else "the canary is answered otherwise than at the start"
        self.observed.ready.set(same)

    def _open(self, generation: Generation) -> None:
        found = self._canary_scored
        if found.status != "ok":
            raise CriticError(
                f"the critic's answer to its canary has no score ({found.detail}): {found.text[:200]!r}. Is it served "
                "with the rubrics it was trained with (--rubrics), and with room for its answers (--max-new-tokens)?"
            )
        self._canary_answer = generation.tokens
        if self.state == "loading":
            self.state = "ok"
            self._opened()

    async def readiness(self) -> Readiness:
        """Whether questions are answered as they were at first: by a canary that is not much older than a minute."""
        if self.state != "ok":
            return Readiness(status=self.state)
        if time.monotonic() - self._canary_seen > CANARY_SECONDS:
            with self._canary_lock:
                if self._canary.answer.done():
                    self._ask_canary()
                question = self._canary
            await asyncio.wait([asyncio.wrap_future(question.answer)], timeout=CANARY_PATIENCE_SECONDS)
            since = time.monotonic() - question.submitted
            if not question.answer.done() and since > STALL_SECONDS:
                return Readiness(status="failing", detail=f"no answer for {since:.0f} s", server=self.identity)
        if self._canary_problem:
            return Readiness(status="failing", detail=self._canary_problem, server=self.identity)
        return Readiness(status="ok", canary=self._canary_scored, server=self.identity)

    async def score(self, request: ScoreRequest, begun: float) -> list[ScoredItem]:
        """An answer to every item, in order. Raises Full, and Overdue when no item could be answered in time."""
        seconds = self.limits.deadline_seconds
        if request.deadline_ms is not None:
            seconds = min(seconds, request.deadline_ms / 1000)
        deadline = begun + seconds
        with self.engine.admitted(len(request.items)):
            prompts = await self.in_pool(self._prompts, request.items)
            answers = [
                self._item(item, prompt, deadline, begun) for item, prompt in zip(request.items, prompts, strict=True)
            ]
            found = await asyncio.gather(*answers)
        if all(one.detail == LATE for one in found):
            raise Overdue
        for one in found:
            self._observe(request.items, one)
        return found

    def _observe(self, items: Sequence[Item], one: ScoredItem) -> None:
        axis = next(item.axis for item in items if item.id == one.id)
        axis = axis if axis in self.critic.rubrics else "unknown"
        self.observed.items.labels(axis, one.status).inc()
        if one.status == "unparseable":
            self.observed.unreadable.labels(axis, one.detail).inc()
        if one.score is not None:
            self.observed.scores.labels(axis).observe(np.min(one.score))

    def _prompts(self, items: Sequence[Item]) -> list[Prompt | Invalid]:
        sent, images, prompts = contents(items), Images(self.critic, self.limits), []
        for item in items:
            try:
                prompts.append(item_prompt(self.critic, self.limits, item, sent, images))
            except Invalid as error:
                prompts.append(error)
        return prompts

    async def _item(self, item: Item, prompt: Prompt | Invalid, deadline: float, begun: float) -> ScoredItem:
        def without(status: str, detail: str) -> ScoredItem:
            return ScoredItem(id=item.id, status=status, detail=detail, ms=_milliseconds(begun))

        if isinstance(prompt, Invalid):
            return without("invalid_input", str(prompt))
        key = question_key(item, prompt)
        generation = self._remembered.get(key)
        if generation is not None:
            self._remembered.move_to_end(key)
            self.observed.remembered.inc()
        else:
            try:
                generation, _ = await self.answer(prompt, self.limits.new_tokens, deadline)
            except Full:
                return without("overloaded", "too many large images are waiting; try again")
            except Overdue:
                return without("overloaded", LATE)
            except Failed:
                return without("internal", "the device could not answer this question")
            self._remembered[key] = generation
            if len(self._remembered) > self.limits.remembered:
                self._remembered.popitem(last=False)
        answer = scored(self.critic, item, prompt, generation)
        answer.ms = _milliseconds(begun)
        return answer

    async def answer(
        self, prompt: Prompt, new_tokens: int, deadline: float, likely: int = 0
    ) -> tuple[Generation, Likely | None]:
        """What the critic writes. Raises Full, Overdue or Failed; the question is dropped when this is cancelled."""
        question = self.engine.submit(prompt, new_tokens, likely=likely)
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                return await asyncio.wrap_future(question.answer)
        except TimeoutError as error:
            raise Overdue from error

    async def in_pool(self, function, *arguments):
        """What a function of images returns, computed beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


def _milliseconds(begun: float) -> int:
    return round(1000 * (time.monotonic() - begun))


def canary_picture() -> Pillow.Image:
    """A red square on white."""
    image = Pillow.new("RGB", (64, 64), "white")
    image.paste((217, 13, 26), (6, 6, 27, 27))
    return image
