"""Runs stages over records: many at a time, outcomes in the records' order, nothing asked that the ledger knows."""

import asyncio
import collections
import hashlib
import re
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from firm_jax.critic.questions import FAILURES, Picture
from firm_jax.curation.ledger import Answered, Ledger, Totals, call_key
from firm_jax.curation.stage import Missing, Outcome, Record, Stage, Unreadable, fill, template
from firm_jax.curation.teacher import REFUSED, Teacher
from firm_jax.data.conversations import IMAGE_MARK
from firm_jax.data.images import decode_image, read_image_file
from firm_jax.data.patches import to_pixels
from firm_jax.data.records import MalformedRecord, check_request_text, check_text
from firm_jax.errors import ConfigError, CriticError, DataError, FirmError
from firm_jax.service.limits import TEXT_CHARACTERS

UNREADABLE = "unreadable"  # not in the form asked for, after it was asked to be written again
UPSTREAM = "upstream"  # a stage before has no answer
BAD_RECORD = "bad_record"  # its text or images cannot be shown

SILENT = 50  # calls in a row without an answer after which a teacher is taken to be gone
HASHES = 65_536  # of image files that are remembered
_REPAIR = template("repair")
# How models begin when they decline in plain English: a heuristic on words, looked for only in answers that cannot be
# read. Another way to decline counts as UNREADABLE, after it was asked to be written again; neither becomes an example.
_DECLINES = re.compile(
    r"\W*(?:(?:i'?m|i am) (?:so |very )?sorry|sorry\b|(?:i |we )(?:can'?t|cannot|can not|won'?t|will not|am unable|"
    r"'?m unable|must decline|decline)|as an ai\b)",
    re.I,
)


class StopAsked(FirmError):
    """What `run` raises where it was asked to stop."""

    def __init__(self, message: str = "stopped on request"):
        super().__init__(message)


class Engine:
    """Asks teachers by role, over one ledger, of records whose images lie below `root`.

    concurrency: records in work at once. missing: how often a stage had no answer, by (stage, status); answered: how
    often it had one. Raises ConfigError for a stage whose teacher is not there, or that needs one not before it.
    """

    def __init__(
        self, stages: Sequence[Stage], teachers: Mapping[str, Teacher], ledger: Ledger, root, *, concurrency: int = 64
    ):
        check_stages(stages, teachers)
        self.stages, self.teachers, self.ledger, self.root = tuple(stages), teachers, ledger, Path(root)
        self.concurrency = concurrency
        self.missing: collections.Counter[tuple[str, str]] = collections.Counter()
        self.answered: collections.Counter[str] = collections.Counter()
        self._asking: dict[str, asyncio.Task[Answered]] = {}
        self._hashes: dict[str, str] = {}
        self._silent = 0
        self._stopped: FirmError | None = None

    async def run(self, records: Iterable[Record]) -> AsyncIterator[Outcome]:
        """The outcome of each record, in order. What is asked of a teacher twice is asked once.

        Raises BudgetError, or StopAsked after `stop`, when what was on its way has been answered and kept; CriticError
        when a teacher no longer answers; WorkdirError when the ledger cannot be written.
        """
        gate = asyncio.Semaphore(self.concurrency)
        waiting: collections.deque[asyncio.Task[Outcome]] = collections.deque()

        async def one(record: Record) -> Outcome:
            async with gate:
                return await self.outcome(record)

        try:
            for record in records:
                if isinstance(self._stopped, StopAsked):  # nothing more is of interest, known or not
                    raise self._stopped
                waiting.append(asyncio.create_task(one(record)))
                if len(waiting) >= 4 * self.concurrency:  # so that one slow record does not hold up all others
                    yield await waiting[0]
                    waiting.popleft()
            while waiting:
                yield await waiting[0]
                waiting.popleft()
        except FirmError:
            # What is on its way is paid for: let it be answered.
            await asyncio.gather(*waiting, return_exceptions=True)
            raise
        finally:
            rest = [*waiting, *self._asking.values()]
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    def stop(self) -> None:
        """From now on nothing is asked; a run under way ends early or raises StopAsked."""
        self._stopped = self._stopped or StopAsked()

    async def totals(self) -> Totals:
        """What the ledger has come to."""
        return self.ledger.totals()

    async def outcome(self, record: Record) -> Outcome:
        """The outcome of one record. Raises as `run` does."""
        outcome = Outcome(record)
        try:
            _check_record(record)
            hashes = [await self._hash(image) for image in record.images]
        except (DataError, MalformedRecord) as error:
            for stage in self.stages:
                self._note(outcome, stage, Missing(BAD_RECORD, str(error)))
            return outcome
        for stage in self.stages:
            if lacking := [name for name in stage.needs if name not in outcome.answers]:
                self._note(outcome, stage, Missing(UPSTREAM, f"no answer of {', '.join(lacking)}"))
            else:
                self._note(outcome, stage, await self._stage(stage, record, outcome.answers, hashes))
        return outcome

    def _note(self, outcome: Outcome, stage: Stage, found: Any) -> None:
        if isinstance(found, Missing):
            outcome.missing[stage.name] = found
            self.missing[stage.name, found.status] += 1
        else:
            outcome.answers[stage.name] = found
            self.answered[stage.name] += 1

    async def _stage(self, stage: Stage, record: Record, answers: Mapping, hashes: list[str]) -> Any:
        """What the stage's answer says, or Missing."""
        fields = stage.fields(record, {name: answers[name] for name in stage.needs})
        shown = record.images if stage.shows else ()
        try:
            reply = await self._call(stage, stage.name, stage.template, fields, shown, hashes if stage.shows else [])
        except DataError as error:  # an image that is damaged behind its header
            return Missing(BAD_RECORD, str(error))
        if reply.outcome != "ok":
            return Missing(reply.outcome, reply.reason)
        try:
            return stage.read(reply.answer, record)
        except Unreadable as error:
            problem = str(error)
        if _DECLINES.match(reply.answer):
            return Missing(REFUSED, reply.answer[:200])
        again = {"form": stage.form, "problem": problem, "answer": reply.answer}
        reply = await self._call(stage, f"{stage.name}/repair", _REPAIR, again, (), [])
        if reply.outcome != "ok":
            return Missing(reply.outcome, f"asked to be written again: {reply.reason}")
        try:
            return stage.read(reply.answer, record)
        except Unreadable as error:
            return Missing(UNREADABLE, f"{problem}; written again: {error}")

    async def _call(
        self, stage: Stage, name: str, text: str, fields: dict[str, str], images: Sequence[str], hashes: list[str]
    ) -> Answered:
        teacher = self.teachers[stage.teacher]
        key = call_key(
            stage=name,
            version=stage.version,
            template=text,
            model=teacher.settings.model,
            parameters=teacher.parameters(stage.max_tokens),
            images=hashes,
            fields=fields,
        )
        if found := self.ledger.answered(key):
            return found
        if self._stopped:
            raise self._stopped
        if key not in self._asking:
            task = asyncio.create_task(
                self._ask(teacher, key, name, fill(text, fields), images, hashes, stage.max_tokens)
            )
            self._asking[key] = task
            task.add_done_callback(lambda _: self._asking.pop(key))
        return await asyncio.shield(self._asking[key])  # others may wait for it too

    async def _ask(
        self, teacher: Teacher, key: str, name: str, text: str, images: Sequence[str], hashes: list[str], most: int
    ) -> Answered:
        pictures = [
            await asyncio.to_thread(self._picture, image, digest) for image, digest in zip(images, hashes, strict=True)
        ]
        try:
            reply = await teacher.ask(self.ledger, key, name, text, pictures, most)
        except FirmError as error:
            self._stopped = error
            raise
        self._silent = self._silent + 1 if reply.outcome in FAILURES else 0
        if self._silent >= SILENT:
            self._stopped = CriticError(
                f"the last {SILENT} calls had no answer, the last of {teacher.settings.model!r}: {reply.reason}. See "
                "that its endpoints answer and accept the key; what was answered is kept, and the same command goes on."
            )
            raise self._stopped
        return reply

    async def _hash(self, image: str) -> str:
        """sha256 of an image file."""
        if image not in self._hashes:
            content = await asyncio.to_thread(read_image_file, image, self.root)
            if len(self._hashes) >= HASHES:
                self._hashes.clear()
            self._hashes[image] = hashlib.sha256(content).hexdigest()
        return self._hashes[image]

    def _picture(self, image: str, digest: str) -> Picture:
        content = read_image_file(image, self.root)
        if hashlib.sha256(content).hexdigest() != digest:
            raise DataError(
                f"image {image!r} has changed since it was first read. Leave the data as it is during a run."
            )
        return Picture(to_pixels(decode_image(content, image)), digest)


def check_stages(stages: Sequence[Stage], teachers: Collection[str]) -> None:
    """Raises ConfigError for a stage whose teacher is not there, or that needs one not before it."""
    known: set[str] = set()
    for stage in stages:
        if stage.teacher not in teachers:
            raise ConfigError(f"stage {stage.name!r} asks a {stage.teacher}, and none is set: {', '.join(teachers)}")
        if stage.name in known or not known >= set(stage.needs):
            raise ConfigError(f"stage {stage.name!r} is there twice, or comes before one of {stage.needs}")
        known.add(stage.name)


def _check_record(record: Record) -> None:
    """DataError or MalformedRecord for a record that no teacher should be asked about."""
    texts = {"the instruction": record.prompt} | ({"the requirement": record.requirement} if record.requirement else {})
    for what, text in texts.items():
        check_request_text(text, what)
        check_text(text)
        if len(text) > TEXT_CHARACTERS:
            raise DataError(f"{what} has {len(text)} characters, more than {TEXT_CHARACTERS}")
        if IMAGE_MARK in text:
            raise DataError(f"{what} holds {IMAGE_MARK}, which stands for a picture in conversations")
