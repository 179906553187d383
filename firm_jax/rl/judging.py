"""Who judges the images of an RL run: the critic in its own processes, or one on a server.

A remote critic is asked about the first images of an epoch while the later ones are still being drawn. That changes
nothing that is learnt: a judgement depends on its image alone, and all are waited for before the epoch's update. The
next epoch's images cannot be drawn meanwhile: their policy is what that update makes of these judgements.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from firm_jax.critic import Judgement
from firm_jax.critic.questions import FAILURES
from firm_jax.critic.rubric import FOLDER, RUBRICS, rubrics_from
from firm_jax.critic.score import prompt_check, rubric_of
from firm_jax.data.prompts import PromptRecord
from firm_jax.errors import ConfigError, CriticError, FirmError
from firm_jax.rl.rollout import failures, judge, judgement_metrics, merged, questions, shown_size

LOCAL = "local"
BACKENDS = (LOCAL, "firm", "openai")
POLICY = ("concurrency", "connect_timeout", "try_timeout", "timeout", "attempts")
LOOK_SECONDS = 0.5


def is_remote(settings) -> bool:
    """Whether `config.critic` names a critic on a server."""
    return settings.backend != LOCAL


def critic_name(settings) -> str:
    """What a run says of its critic when it loads it."""
    return f"asking {settings.model} at {', '.join(settings.endpoints)}" if is_remote(settings) else settings.model


def check_critic(settings) -> None:
    """ConfigError for a `config.critic` whose settings of a remote critic are missing, in vain or out of range."""
    if not is_remote(settings):
        if settings.get("endpoints", ()):
            raise ConfigError("critic.endpoints is set, and critic.backend is 'local'; set that to firm or openai")
        return
    if missing := [name for name in ("endpoints", *POLICY) if name not in settings]:
        raise ConfigError(f"critic.backend is {settings.backend!r}, and the config has no critic.{missing[0]}")
    if settings.get("answer", "whole") != "whole":
        raise ConfigError(
            f"critic.answer is {settings.answer!r}, and critic.backend is {settings.backend!r}: only a local critic "
            "can be stopped at its score. Set critic.answer to whole."
        )
    if not settings.endpoints:
        raise ConfigError(
            f"critic.backend is {settings.backend!r}, and critic.endpoints names no server; for example "
            "--config.critic.endpoints=http://host:8000"
        )
    for name in POLICY:
        if not settings[name] > 0:
            raise ConfigError(f"critic.{name} is {settings[name]}; it is above 0")
    if settings.try_timeout > settings.timeout:
        raise ConfigError(
            f"critic.try_timeout is {settings.try_timeout}, longer than critic.timeout = {settings.timeout}, which all "
            "tries have together"
        )


def check_of_prompts(config, criteria: Sequence[str], folder, edits: bool) -> Callable[[PromptRecord], None]:
    """The check that `load_prompts` makes of every prompt: whether the critic could be asked about its images.

    folder: the local critic's. A remote one's tokenizer and limits are not at hand: a prompt that is too long for it is
    a judgement that fails.
    """
    settings, drawn = config.critic, (config.rollout, config.eval)
    names = [RUBRICS[criterion] for criterion in criteria]
    if not is_remote(settings):
        sizes = {(section.height, section.width) for section in drawn}

        def sources(record):
            largest = max(drawn, key=lambda section: section.source_area)
            return [shown_size(image.height, image.width, largest) for image in record.images]

        given = {"sources": sources} if edits else {}
        return prompt_check(folder, settings.rubrics, names, sizes, settings.max_new_tokens, **given)
    if settings.backend == "firm" and settings.rubrics is None:
        return lambda record: None
    rubrics = rubrics_from(settings.rubrics or FOLDER)
    asked = [rubric_of(rubrics, name) for name in names]

    def check(record: PromptRecord) -> None:
        for rubric in asked:
            rubric.fill(record.text, record.requirement)

    return check


def connect(settings, criteria: Sequence[str]) -> "RemoteJudge | None":
    """The remote critic of `config.critic`, or None where it is local. Raises ConfigError and CriticError."""
    if not is_remote(settings):
        return None
    try:
        from firm_jax.critic.endpoints import Policy
        from firm_jax.critic.remote import RemoteCritic
    except ImportError as error:
        raise ConfigError(f"critic.backend = {settings.backend!r}: {error}") from error

    def critic() -> RemoteCritic:
        found = RemoteCritic(
            settings.endpoints,
            protocol=settings.backend,
            model=settings.model,
            rubrics=settings.rubrics,
            expected=settings.score == "expected",
            policy=Policy(**{name: settings[name] for name in POLICY}),
        )
        for criterion in criteria:
            rubric_of(found.identity["rubrics"], RUBRICS[criterion])
        return found

    return RemoteJudge(critic)


class RemoteJudge:
    """A remote critic in the place of `Critic`: process 0 asks it, and every process gets the same answers.

    identity: who it is, as JSON.
    """

    def __init__(self, connecting: Callable[[], Any]):
        self.critic, found = None, None
        if jax.process_index() == 0:
            try:
                self.critic = connecting()
                found = {"identity": self.critic.identity}
            except FirmError as error:
                found = _told(error)
        self.identity = _opened(_shared(found))["identity"]

    def ask(self, requests: Sequence[Mapping], max_new_tokens: int):
        """Begin to ask; what `collect` wants of it."""
        return self.critic.ask(requests, max_new_tokens) if self.critic else None

    def judge(self, requests: Sequence[Mapping], max_new_tokens: int, progress=iter) -> list[Judgement]:
        """As `Critic.judge`. Raises CriticError when another critic answers than at the start."""
        return self.collect([self.ask(requests, max_new_tokens)], progress)

    def collect(self, asked: Sequence, progress=iter) -> list[Judgement]:
        """The judgements of all that was asked, in order. Raises as `judge`."""
        for _ in progress(self._rounds(asked)):
            pass
        found = None
        if self.critic:
            try:
                found = {"judgements": [dataclasses.asdict(one) for part in asked for one in part.judgements()]}
            except FirmError as error:
                found = _told(error)
        return [_judgement(one) for one in _opened(_shared(found))["judgements"]]

    def _rounds(self, asked: Sequence) -> Iterator[None]:
        while not _shared(self.critic and all(part.wait(LOOK_SECONDS) for part in asked)):
            yield

    def sent(self) -> dict[str, int]:
        """Requests so far, and how many of them were another try; nothing in processes that do not ask."""
        return {"requests": self.critic.endpoints.sent, "retries": self.critic.endpoints.retries} if self.critic else {}


def _judgement(told: dict) -> Judgement:
    tuples = {name: tuple(value) for name, value in told.items() if isinstance(value, list)}
    return Judgement(**told | tuples)


def _told(error: FirmError) -> dict:
    return {"error": str(error), "config": isinstance(error, ConfigError)}


def _opened(found: dict) -> dict:
    if "error" in found:
        raise (ConfigError if found["config"] else CriticError)(found["error"])
    return found


def _shared(value):
    """Process 0's JSON, in every process."""
    if jax.process_count() == 1:
        return value
    content = json.dumps(value).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    bytes_ = np.frombuffer(content.ljust(size), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(bytes_), np.uint8).tobytes())


class Judging:
    """The judging of one epoch's images.

    prompts, sources: [M] of each image, as for `rollout.judge`; criteria: of the reward; settings: `config.critic`.
    metrics: what is to be told of it beside the judgements.
    """

    def __init__(self, critic, prompts, sources, criteria: Sequence[str], settings):
        self.critic, self.prompts, self.sources, self.criteria = critic, prompts, sources, criteria
        self.settings, self.metrics = settings, {}

    def drawn(self, images: np.ndarray) -> None:
        """To be called with the next of the images [B, H, W, 3], in their order, when they are there."""

    def judgements(self, images: np.ndarray, progress: Callable) -> dict[str, list[Judgement]]:
        """Of all images [M, H, W, 3], by criterion. Raises CriticError."""
        return judge(self.critic, images, self.prompts, self.sources, self.criteria, self.settings, progress)


class StreamedJudging(Judging):
    """Asks a remote critic about images as soon as they are drawn."""

    def __init__(self, critic: RemoteJudge, *given):
        super().__init__(critic, *given)
        self._asked, self._shown, self._before = [], [], critic.sent()

    def drawn(self, images: np.ndarray) -> None:
        first = sum(map(len, self._shown))
        rows = slice(first, first + len(images))
        shown, requests = questions(images, self.prompts[rows], self.sources[rows], self.criteria)
        self._shown.append(shown)
        self._asked.append(self.critic.ask(requests, self.settings.max_new_tokens))

    def judgements(self, images: np.ndarray, progress: Callable) -> dict[str, list[Judgement]]:
        waiting = time.perf_counter()
        found = iter(self.critic.collect(self._asked, progress))
        parts = [merged(shown, self.criteria, found) for shown in self._shown]
        self._measure(time.perf_counter() - waiting)
        return {criterion: [one for part in parts for one in part[criterion]] for criterion in self.criteria}

    def _measure(self, waited: float) -> None:
        """`time/judge`, from the first question to the last answer; `time/judge_wait`, the part of it for which the
        epoch had to wait, when all was drawn; the requests of the epoch, and those that were another try."""
        if self.critic.critic:
            asked = [part for part in self._asked if part.ended is not None]
            seconds = max(part.ended for part in asked) - min(part.begun for part in asked)
            self.metrics = {"time/judge": seconds, "time/judge_wait": waited} | {
                f"critic/{name}": count - self._before[name] for name, count in self.critic.sent().items()
            }


def judging_of(critic, *given) -> Judging:
    """The judging of an epoch by this critic; the arguments of `Judging`."""
    return (StreamedJudging if isinstance(critic, RemoteJudge) else Judging)(critic, *given)


def too_many_failures(judged: dict[str, list[Judgement]], settings) -> str | None:
    """What to tell, and to do, when more judgements are missing than `critic.max_failure_rate`; None when not."""
    kind, limit = settings.score, settings.max_failure_rate
    rate = judgement_metrics(judged, kind)["critic/failure_rate"]
    if rate <= limit:
        return None
    found = failures(judged, kind)
    listed = ", ".join(f"{status}: {count}" for status, count in found.most_common())
    told = (
        f"{rate:.0%} of the critic's judgements have no {kind} score ({listed}), more than critic.max_failure_rate = "
        f"{limit}. judgements.jsonl holds the answers."
    )
    if found.most_common(1)[0][0] not in FAILURES:
        return (
            f"{told} Is this critic served with the rubrics it was trained with (critic.rubrics), and "
            "critic.max_new_tokens long enough?"
        )
    reasons = Counter(one.reason for part in judged.values() for one in part if one.status in FAILURES)
    reason, count = reasons.most_common(1)[0]
    return (
        f"{told} Most often ({count}): {reason}. Look at the server and its log, or set critic.endpoints to another "
        "one of the same critic; the same command then goes on."
    )
