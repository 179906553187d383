"""The bounded queue in front of the critic, and the one thread that owns the devices."""

import collections
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from firm_jax.critic.decode import Generation
from firm_jax.critic.processing import Sequence
from firm_jax.errors import FirmError
from firm_jax.service.fixed import FixedDecoder, Likely, Shape, Writing
from firm_jax.service.limits import Limits
from firm_jax.service.observed import Observed

GATHER_SECONDS = 0.005  # that a batch with free rows waits for company


class Full(Exception):
    """There is no room for a question. retry_seconds: after which there may be."""

    def __init__(self, retry_seconds: int):
        super().__init__("the queue is full")
        self.retry_seconds = retry_seconds


class Failed(Exception):
    """The device could not answer a question; the log says why."""


@dataclass(eq=False)
class Question:
    """A prompt that waits for its answer; who no longer waits cancels that."""

    prompt: Sequence
    new_tokens: int
    shape: Shape
    submitted: float = field(default_factory=time.monotonic)
    answer: "Future[tuple[Generation, Likely | None]]" = field(default_factory=Future)

    @property
    def image_bytes(self) -> int:
        return sum(image.patches.nbytes for image in self.prompt.images)

    def succeed(self, answer: tuple[Generation, Likely | None]) -> None:
        with contextlib.suppress(InvalidStateError):  # cancelled in this moment
            self.answer.set_result(answer)

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):
            self.answer.set_exception(error)


class Engine:
    """Answers questions with a critic that `load` returns, in a thread of its own.

    load: called in that thread; returns the FixedDecoder to answer with. loaded: called there with None when it can
    answer, else with the error.
    """

    def __init__(
        self,
        load: Callable[[], FixedDecoder],
        loaded: Callable[[Exception | None], None],
        limits: Limits,
        observed: Observed,
    ):
        self.limits, self.observed = limits, observed
        self._load, self._loaded = load, loaded
        self._waiting: collections.deque[Question] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._fixed: FixedDecoder | None = None
        self._admitted = 0
        self._image_bytes = 0
        self._seconds_each = 1.0  # that a question takes of the device, of late
        self._thread = threading.Thread(target=self._work, name="critic", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread after the batch that it is at; one that still loads is left behind. Questions are failed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._fixed is not None:
            self._thread.join(self.limits.drain_seconds)

    @property
    def waiting(self) -> int:
        """Questions that no batch has taken yet."""
        return len(self._waiting)

    @contextlib.contextmanager
    def admitted(self, questions: int) -> Iterator[None]:
        """Room for so many questions while the block lasts. Raises Full."""
        with self._changed:
            if self._admitted + questions > self.limits.queue:
                raise Full(self.retry_seconds())
            self._admitted += questions
        try:
            yield
        finally:
            with self._changed:
                self._admitted -= questions

    def retry_seconds(self) -> int:
        """After which about half of what is admitted will be answered."""
        return min(max(math.ceil(self._admitted * self._seconds_each / 2), 1), 60)

    def shape(self, prompt: Sequence, likely: int = 0) -> Shape:
        return self._fixed.shape(prompt, likely)

    def submit(self, prompt: Sequence, new_tokens: int, *, likely: int = 0, first=False) -> Question:
        """Put a question at the end of the line, or `first`. Raises Full when its images find no room."""
        question = Question(prompt, new_tokens, self.shape(prompt, likely))
        with self._changed:
            if self._image_bytes + question.image_bytes > self.limits.queue_bytes:
                raise Full(self.retry_seconds())
            self._image_bytes += question.image_bytes
            (self._waiting.appendleft if first else self._waiting.append)(question)
            self._changed.notify_all()
        return question

    def _work(self) -> None:
        try:
            self._fixed = self._load()
        except Exception as error:
            if not isinstance(error, FirmError):
                logging.exception("the critic cannot be loaded")
            self._loaded(error)
            return
        self._loaded(None)
        while batch := self._next_batch():
            begun = time.monotonic()
            try:
                self._answer(batch)
            finally:
                seconds = (time.monotonic() - begun) / len(batch)
                self._seconds_each += 0.2 * (seconds - self._seconds_each)
                with self._changed:
                    self._image_bytes -= sum(question.image_bytes for question in batch)
        for question in self._waiting:
            question.fail(Failed())

    def _next_batch(self) -> list[Question]:
        """Questions of one shape, that of the first in line, as many as there are rows; none at the end."""
        with self._changed:
            while True:
                self._drop_given_up()
                if self._closed:
                    return []
                if self._waiting:
                    first = self._waiting[0]
                    batch = [one for one in self._waiting if one.shape == first.shape][: self._fixed.rows]
                    patience = first.submitted + GATHER_SECONDS - time.monotonic()
                    if len(batch) == self._fixed.rows or patience <= 0:
                        break
                    self._changed.wait(patience)
                else:
                    self._changed.wait()
            taken = set(map(id, batch))
            self._waiting = collections.deque(one for one in self._waiting if id(one) not in taken)
        now = time.monotonic()
        for question in batch:
            self.observed.waited.observe(now - question.submitted)
        return batch

    def _drop_given_up(self) -> None:
        kept = []
        for question in self._waiting:
            if question.answer.done():
                self._image_bytes -= question.image_bytes
            else:
                kept.append(question)
        self._waiting = collections.deque(kept)

    def _answer(self, batch: list[Question]) -> None:
        """Answer a batch; when the device refuses it, each of its questions alone: one cannot spoil the rest."""
        try:
            self._write(batch)
        except Exception:
            logging.exception("a batch of %d questions failed", len(batch))
            self.observed.failed_batches.inc()
            for question in batch:
                if question.answer.done():
                    continue
                if len(batch) == 1:
                    question.fail(Failed())
                else:
                    self._answer([question])

    def _write(self, batch: list[Question]) -> None:
        ends = self._fixed.decoder.rules.ends
        going = {row: Writing(ends, question.new_tokens) for row, question in enumerate(batch)}
        begun, tokens = time.monotonic(), 0
        for number, written in enumerate(self._fixed.write(batch[0].shape, [question.prompt for question in batch])):
            if number == 0:
                self.observed.batch(batch[0].shape, len(batch), time.monotonic() - begun)
            for row in list(going):
                if batch[row].answer.done():
                    del going[row]
                elif answer := going[row].add(tuple(array[row] for array in written)):
                    tokens += len(answer[0].tokens)
                    batch[row].succeed(answer)
                    del going[row]
            if not going:
                break
        self.observed.tokens.inc(tokens)
        self.observed.device_seconds.inc(time.monotonic() - begun)
