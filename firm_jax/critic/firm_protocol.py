"""The protocol of our own service: `POST /v1/score`, with pictures and instructions out and judgements in.

The server fills in its own rubrics, reads its critic's answers and tells who it is in every reply.
"""

import json
import math
from collections.abc import Sequence

from pydantic import ValidationError

from firm_jax.critic.endpoints import Failed
from firm_jax.critic.questions import (
    MALFORMED_REPLY,
    OVERLOADED,
    REJECTED,
    SERVER_ERROR,
    Question,
    png,
)
from firm_jax.critic.rubric import Rubric
from firm_jax.critic.score import Judgement
from firm_jax.errors import ConfigError
from firm_jax.service.protocol import Identity, Models, ScoredItem, ScoreResponse

STATUSES = {"invalid_input": REJECTED, "overloaded": OVERLOADED, "internal": SERVER_ERROR}
SUM_TOLERANCE = 1e-3  # of probabilities


class FirmProtocol:
    """rubrics: those that the server must have, where the run names some."""

    path, together = "/v1/score", 8

    def __init__(self, model: str | None, rubrics: dict[str, Rubric] | None, deadline: float):
        self.model, self.rubrics, self.deadline = model, rubrics, deadline
        self.expected = True

    async def greet(self, get, post) -> dict:
        """Who the server is. Raises Failed, and ConfigError for another critic than the one that is asked for."""
        try:
            [found] = Models.model_validate_json(await get("/v1/models")).data
        except ValidationError as error:
            raise ConfigError(
                "it is no `firm-jax serve`: /v1/models does not say which critic answers. Ask other servers with "
                "critic.backend = 'openai'."
            ) from error
        if self.model is not None and found.id != self.model:
            raise ConfigError(f"it serves {found.id!r}; set critic.model to that, or serve {self.model!r} there")
        self._check_rubrics(found.server)
        return _pinned(found.server)

    def _check_rubrics(self, server: Identity) -> None:
        for name, rubric in (self.rubrics or {}).items():
            if server.rubrics.get(name, rubric.sha256) != rubric.sha256:
                raise ConfigError(
                    f"it does not judge {name} by the rubric of critic.rubrics: serve that folder with --rubrics, or "
                    "leave critic.rubrics out"
                )

    def check(self, question: Question, identity: dict) -> None:
        """Raises ConfigError for a criterion that the server has no rubric for."""
        if question.criterion not in identity["rubrics"]:
            known = ", ".join(sorted(identity["rubrics"]))
            raise ConfigError(f"the server has no rubric for {question.criterion!r}; it judges {known}")

    def rubric_of(self, question: Question, identity: dict) -> str:
        return identity["rubrics"].get(question.criterion, "")

    def body(self, questions: Sequence[Question], request_id: str) -> bytes:
        """Each picture goes once, with the first question that shows it."""
        sent: set[str] = set()
        items = []
        for question in questions:
            images = []
            for picture in question.pictures:
                # The service names pictures by their files.
                file = png(picture)
                images.append({"sha256": file.sha256} | ({} if picture.digest in sent else {"b64": file.b64}))
                sent.add(picture.digest)
            item = {"id": question.id, "axis": question.criterion, "instruction": question.prompt, "images": images}
            items.append(item | ({"requirement": question.requirement} if question.requirement else {}))
        asked = {"request_id": request_id, "deadline_ms": max(1, int(1000 * self.deadline)), "items": items}
        return json.dumps(asked).encode()

    def read(
        self, content: bytes, questions: Sequence[Question], request_id: str, identity: dict
    ) -> tuple[dict, dict[str, Judgement]]:
        """Who answered, and a judgement for each question's id. Raises Failed for what is no answer to them."""
        try:
            reply = ScoreResponse.model_validate_json(content, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the body"
            raise Failed(MALFORMED_REPLY, f"the reply is not that of /v1/score: {place}: {first['msg']}") from error
        who = _pinned(reply.server)
        if who != identity:
            return who, {}
        if reply.request_id != request_id:
            raise Failed(MALFORMED_REPLY, "the reply is to another request")
        asked, answered = {question.id: question for question in questions}, [item.id for item in reply.items]
        if sorted(answered) != sorted(asked):
            raise Failed(MALFORMED_REPLY, f"{len(asked)} questions, and the reply has other items ({len(answered)})")
        return who, {item.id: _judgement(item, asked[item.id], identity) for item in reply.items}


def _pinned(server: Identity) -> dict:
    """All but the versions and devices, which round differently and are no other critic."""
    return server.model_dump(exclude={"engine"})


def _judgement(item: ScoredItem, question: Question, identity: dict) -> Judgement:
    rubric, detail = identity["rubrics"].get(question.criterion, ""), item.detail or ""
    if item.status in STATUSES:
        return question.missing(STATUSES[item.status], detail, rubric)
    if item.status == "unparseable":
        status = detail or "no_score"
        return Judgement(question.criterion, None, None, None, item.text or "", status, item.reasoning or "", rubric)
    if problem := _problem(item, question, rubric):
        return question.missing(MALFORMED_REPLY, problem, rubric)
    score = tuple(item.score) if isinstance(item.score, list) else item.score
    return Judgement(
        question.criterion,
        score,
        item.expected,
        item.entropy,
        item.text or "",
        "ok",
        item.reasoning or "",
        rubric,
        None if item.probs is None else tuple(item.probs),
    )


def _problem(item: ScoredItem, question: Question, rubric: str) -> str | None:
    """What is wrong with a judgement that says it is in order."""
    scores = item.score if isinstance(item.score, list) else [item.score]
    if isinstance(item.score, list) != (question.criterion == "quality") or (
        question.criterion == "quality" and len(scores) != 3
    ):
        return "the score has not as many parts as the criterion"
    if not all(score is not None and 1 <= score <= 5 for score in scores):
        return f"the score {item.score} is not 1 to 5"
    if item.expected is not None and not 1 <= item.expected <= 5:
        return f"the expected score {item.expected} is not 1 to 5"
    if item.probs is not None and not _is_distribution(item.probs):
        return "the probabilities are none"
    if item.entropy is not None and not 0 <= item.entropy <= math.log(5) + SUM_TOLERANCE:
        return f"the entropy {item.entropy} is none of five probabilities"
    return None if item.rubric_sha256 == rubric else "it was judged by another rubric"


def _is_distribution(values: Sequence[float]) -> bool:
    return len(values) == 5 and all(0 <= one <= 1 for one in values) and abs(sum(values) - 1) <= SUM_TOLERANCE
