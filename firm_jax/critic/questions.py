"""What a remote critic is asked, one criterion of one picture each, named by its content."""

import base64
import functools
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from firm_jax.critic.score import Judgement
from firm_jax.data.patches import image_digest, to_pixels
from firm_jax.data.records import check_request_text
from firm_jax.errors import DataError
from firm_jax.service.limits import IMAGES, TEXT_CHARACTERS

# Why a question has no judgement, beside what the parser says of an answer that was read.
UNREACHABLE = "unreachable"  # no connection, or no endpoint that answers
TIMEOUT = "timeout"  # no answer within the deadline
OVERLOADED = "overloaded"  # the server has no room, or is loading or draining
REJECTED = "rejected"  # the server refuses the question
SERVER_ERROR = "server_error"  # the server failed at it
MALFORMED_REPLY = "malformed_reply"  # what came back is no answer to it
FAILURES = (UNREACHABLE, TIMEOUT, OVERLOADED, REJECTED, SERVER_ERROR, MALFORMED_REPLY)
# The critic was not heard; asked later it may be.
UNANSWERED = frozenset(FAILURES) - {REJECTED}

PNG_COMPRESSION = 1  # fast; the pixels are the same at any
SENT_PIXELS = 8 << 20  # of all distinct images of one call


@dataclass(frozen=True)
class Picture:
    """uint8 [H, W, 3] and a digest of it."""

    pixels: np.ndarray = field(compare=False, repr=False)
    digest: str


@dataclass(frozen=True)
class File:
    """An image file: its bytes in base64, and their sha256."""

    b64: str
    sha256: str


@functools.lru_cache(maxsize=64)
def png(picture: Picture) -> File:
    """A picture as a PNG. The last ones are kept: several criteria ask about each."""
    out = io.BytesIO()
    Image.fromarray(picture.pixels).save(out, "PNG", compress_level=PNG_COMPRESSION)
    return File(base64.b64encode(out.getvalue()).decode(), hashlib.sha256(out.getvalue()).hexdigest())


@dataclass(frozen=True)
class Question:
    """A request to `judge`. id: of all that decides the answer, so that asking again is harmless."""

    criterion: str
    prompt: str
    requirement: str
    pictures: tuple[Picture, ...]
    max_new_tokens: int
    id: str

    def missing(self, status: str, reason: str, rubric: str = "") -> Judgement:
        """The judgement that there is not."""
        return Judgement(self.criterion, None, None, None, "", status, reason, rubric)


def questions_of(requests: Sequence[Mapping], max_new_tokens: int) -> list[Question]:
    """The requests of `judge`, whose images are read once each. Raises DataError for one that cannot be asked."""
    known: dict[int, Picture] = {}
    return [_question(f"request {number}", one, max_new_tokens, known) for number, one in enumerate(requests)]


def _question(name: str, request: Mapping, max_new_tokens: int, known: dict[int, Picture]) -> Question:
    prompt, requirement = request.get("prompt") or "", request.get("requirement") or ""
    for text, what in ((prompt, "prompt"), (requirement, "requirement")):
        check_request_text(text, f"{name}: the {what}")
        if len(text) > TEXT_CHARACTERS:
            raise DataError(f"{name}: the {what} has {len(text)} characters, more than {TEXT_CHARACTERS}; shorten it")
    images = request.get("images") or ()
    if not 1 <= len(images) <= IMAGES:
        raise DataError(f"{name} has {len(images)} images; a question shows 1 to {IMAGES}")
    pictures = tuple(_picture(image, known) for image in images)
    asked = [request["criterion"], prompt, requirement, max_new_tokens, *(picture.digest for picture in pictures)]
    return Question(
        request["criterion"],
        prompt,
        requirement,
        pictures,
        max_new_tokens,
        hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
    )


def _picture(image, known: dict[int, Picture]) -> Picture:
    if id(image) not in known:
        pixels = to_pixels(image)
        known[id(image)] = Picture(pixels, image_digest(pixels))
    return known[id(image)]


def calls_of(questions: Sequence[Question], most: int) -> Iterator[list[Question]]:
    """Distinct questions in calls of up to `most`, those about the same pictures together."""
    distinct = {question.id: question for question in questions}.values()
    first: dict[tuple, int] = {}
    for place, question in enumerate(distinct):
        first.setdefault(_shown(question), place)
    call: list[Question] = []
    for question in sorted(distinct, key=lambda one: first[_shown(one)]):
        if call and (len(call) == most or _pixels([*call, question]) > SENT_PIXELS):
            yield call
            call = []
        call.append(question)
    if call:
        yield call


def _shown(question: Question) -> tuple[str, ...]:
    return tuple(picture.digest for picture in question.pictures)


def _pixels(questions: Sequence[Question]) -> int:
    distinct = {picture.digest: picture.pixels for question in questions for picture in question.pictures}
    return sum(pixels.size // 3 for pixels in distinct.values())
