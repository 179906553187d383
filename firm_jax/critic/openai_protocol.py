"""The chat protocol of vLLM, SGLang, our own service and others: the rubric filled in here, the answer read here.

A picture is a PNG in a data URL. The expected score comes from the logarithms of probabilities that the server tells of
the tokens in the digit's place; where it tells none there is no expected score.
"""

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from firm_jax.critic.endpoints import Failed
from firm_jax.critic.questions import MALFORMED_REPLY, REJECTED, SERVER_ERROR, Question, png, questions_of
from firm_jax.critic.rubric import FOLDER, Rubric, rubrics_from
from firm_jax.critic.score import Judgement, read_judgement, rubric_of
from firm_jax.errors import ConfigError, CriticError

TOP_LOGPROBS = 20  # of each token; the most that vLLM tells unless it is told otherwise
IMPOSSIBLE = -9999.0  # stands for minus infinity
CANARY_TOKENS = 4


class OpenAIProtocol:
    """rubrics: those to ask by; the package's own where None. expected: whether a server without logarithms of
    probabilities is refused."""

    path, together = "/v1/chat/completions", 1

    def __init__(self, model: str | None, rubrics: dict[str, Rubric] | None, expected: bool):
        self.model, self.expected = model, expected
        self.rubrics = rubrics or rubrics_from(FOLDER)
        self.logprobs = True

    async def greet(self, get, post) -> dict:
        """Who the server is, as far as it tells. Asks it about a picture, so that one that cannot judge is refused.

        Raises Failed, and ConfigError and CriticError for a server that is not the one asked for, or tells too little.
        """
        served = json_object(await get("/v1/models")).get("data")
        if not isinstance(served, list) or not all(isinstance(one, dict) and "id" in one for one in served):
            raise ConfigError("its /v1/models lists no models: is this the base URL of an OpenAI-compatible server?")
        known = {str(one["id"]): one for one in served}
        if self.model is None and len(known) == 1:
            [self.model] = known
        if self.model not in known:
            raise ConfigError(f"it serves {', '.join(known) or 'nothing'}, not {self.model!r}; set critic.model to one")
        picture = np.full((64, 64, 3), 255, np.uint8)
        criterion = min(self.rubrics)
        [canary] = questions_of([{"criterion": criterion, "prompt": "a cat", "images": [picture]}], CANARY_TOKENS)
        try:
            reply = json_object(await post(self.body([canary], "")))
        except Failed as failed:
            if failed.status not in (REJECTED, SERVER_ERROR):
                raise
            self.logprobs = False
            reply = json_object(await post(self.body([canary], "")))
        told = the_choice(reply).get("logprobs")
        self.logprobs = self.logprobs and isinstance(told, dict) and bool(told.get("content"))
        if self.expected and not self.logprobs:
            raise CriticError(
                "its answers come without logprobs, from which the expected score is made. Set critic.score = "
                "'parsed', or have the server tell them (vLLM: --max-logprobs 20)."
            )
        return self._who(reply) | {"rubrics": {name: rubric.sha256 for name, rubric in self.rubrics.items()}}

    def _who(self, reply: Mapping) -> dict:
        return {
            "model": self.model,
            "answers_as": reply.get("model"),
            "system_fingerprint": reply.get("system_fingerprint"),
        }

    def check(self, question: Question, identity: dict) -> None:
        """Raises ConfigError for a criterion without a rubric, and a requirement that the rubric would drop."""
        rubric_of(self.rubrics, question.criterion).fill(question.prompt, question.requirement)

    def rubric_of(self, question: Question, identity: dict) -> str:
        return self.rubrics[question.criterion].sha256

    def body(self, questions: Sequence[Question], request_id: str) -> bytes:
        """Images first and text last, as the critics of this package are trained."""
        [question] = questions
        text = self.rubrics[question.criterion].fill(question.prompt, question.requirement)
        urls = [f"data:image/png;base64,{png(picture).b64}" for picture in question.pictures]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
            "temperature": 0,
            "max_tokens": question.max_new_tokens,
        }
        return json.dumps(asked | ({"logprobs": True, "top_logprobs": TOP_LOGPROBS} if self.logprobs else {})).encode()

    def read(
        self, content: bytes, questions: Sequence[Question], request_id: str, identity: dict
    ) -> tuple[dict, dict[str, Judgement]]:
        """Who answered, and the judgement by the question's id. Raises Failed for what is no answer."""
        [question] = questions
        reply = json_object(content)
        who = self._who(reply) | {"rubrics": identity["rubrics"]}
        if who != identity:
            return who, {}
        return who, {question.id: self._judgement(the_choice(reply), question)}

    def _judgement(self, answer: Mapping, question: Question) -> Judgement:
        message, tokens = answer.get("message"), answer.get("logprobs")
        if not isinstance(message, dict) or not isinstance(text := message.get("content"), str):
            raise Failed(MALFORMED_REPLY, "the reply's choice has no text")
        tokens = tokens.get("content") if isinstance(tokens, dict) else None
        return read_judgement(
            question.criterion,
            self.rubrics[question.criterion],
            text,
            cut=answer.get("finish_reason") == "length",
            probabilities=lambda places: digit_probabilities(text, places, tokens),
        )


def digit_probabilities(text: str, places: Sequence[int], tokens) -> np.ndarray | None:
    """float64 [scores, 5] of the digits 1 to 5 in the places of a text, from `logprobs.content` of a chat completion.

    A digit that is not among the likeliest tokens of its place counts as impossible. None where that cannot be told:
    no tokens, or tokens that do not make up the text, or a digit that is not a token of its own.
    """
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        return None
    written = [_bytes(token) for token in tokens]
    start = b"".join(written).find(text.encode())
    if start < 0:
        return None
    ends = np.cumsum([len(one) for one in written])
    rows = []
    for place in places:
        at = start + len(text[:place].encode())
        token = tokens[int(np.searchsorted(ends, at, side="right"))]
        row = _digits(token, text[place])
        if row is None:
            return None
        rows.append(row)
    return np.array(rows)


def _digits(token: Mapping, digit: str) -> np.ndarray | None:
    """Probabilities of 1 to 5 in the place of a token that writes `digit`, and nothing but spaces before it."""
    own, likely = token.get("token"), token.get("top_logprobs")
    if not isinstance(own, str) or own.lstrip() != digit or not isinstance(likely, list) or not likely:
        return None
    before, weights = own[: -len(digit)], np.zeros(5)
    for one in [token, *likely]:
        name, value = (one.get("token"), one.get("logprob")) if isinstance(one, dict) else (None, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value <= 1e-3:
            return None
        for number in range(5):
            if name == f"{before}{number + 1}" and value > IMPOSSIBLE:
                weights[number] = max(weights[number], math.exp(value))
    total = weights.sum()
    return weights / total if total > 0 else None


def _bytes(token: Mapping) -> bytes:
    """What a token writes; half a character has bytes, and no text of its own."""
    found, text = token.get("bytes"), token.get("token")
    if isinstance(found, list) and all(isinstance(one, int) and 0 <= one < 256 for one in found):
        return bytes(found)
    return text.encode() if isinstance(text, str) else b""


def the_choice(reply: Mapping) -> Mapping:
    """The one choice of a chat completion. Raises Failed."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Failed(MALFORMED_REPLY, "the reply has not one choice")
    return choices[0]


def json_object(content: bytes) -> Mapping:
    """A reply's JSON object. Raises Failed."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Failed(MALFORMED_REPLY, "the reply is not JSON") from error
    if not isinstance(found, dict):
        raise Failed(MALFORMED_REPLY, "the reply is not a JSON object")
    return found
