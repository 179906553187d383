"""From a request to prompts, from what the critic wrote to answers. Nothing here waits or opens anything."""

import base64
import binascii
import hashlib
import json
import time
import uuid
from collections.abc import Sequence

from firm_jax.critic import Critic
from firm_jax.critic.decode import Generation
from firm_jax.critic.processing import Sequence as Prompt
from firm_jax.data.images import decode_image
from firm_jax.data.patches import PatchedImage, patch_image
from firm_jax.data.records import check_request_text
from firm_jax.errors import ConfigError, DataError
from firm_jax.service.fixed import Likely
from firm_jax.service.limits import IMAGES, Limits
from firm_jax.service.protocol import (
    Answer,
    ChatRequest,
    ChatResponse,
    Choice,
    Identity,
    Image,
    ImagePart,
    Item,
    Logprobs,
    ScoredItem,
    TokenLogprob,
    TopLogprob,
    Usage,
)

IMAGE_BYTES = 64 << 20
LOWEST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's own way to say "impossible"


class Invalid(Exception):
    """A question that cannot be asked; the message says why."""


class Images:
    """The images of one request, each decoded and cut into patches once."""

    def __init__(self, critic: Critic, limits: Limits):
        self._config, self._limits, self._pixels = critic.processor.images, limits, 0
        self._patched: dict[str, PatchedImage | Invalid] = {}

    def patched(self, content: bytes) -> tuple[str, PatchedImage]:
        """The sha256 of an image file, and its patches. Raises Invalid."""
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._patched:
            try:
                self._patched[digest] = self._patch(content)
            except (DataError, Invalid) as error:
                self._patched[digest] = Invalid(str(error))
        found = self._patched[digest]
        if isinstance(found, Invalid):
            raise found
        return digest, found

    def _patch(self, content: bytes) -> PatchedImage:
        image = decode_image(content, "sent", max_pixels=self._limits.pixels)
        self._pixels += image.width * image.height
        if self._pixels > self._limits.request_pixels:
            raise Invalid(f"the images of a request have at most {self._limits.request_pixels} pixels together")
        return patch_image(image, self._config)


def contents(items: Sequence[Item]) -> dict[str, bytes]:
    """sha256 -> file, of the images that a request holds, but for those that are no base64."""
    found = {}
    for image in (image for item in items for image in item.images if image.b64 is not None):
        try:
            content = _decoded(image.b64)
        except Invalid:
            continue
        found[hashlib.sha256(content).hexdigest()] = content
    return found


def _decoded(text: str) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Invalid("the image's bytes are not valid base64") from error
    if len(content) > IMAGE_BYTES:
        raise Invalid(f"the image's file is larger than {IMAGE_BYTES} bytes")
    return content


def _content(image: Image, sent: dict[str, bytes]) -> bytes:
    if image.b64 is not None:
        content = _decoded(image.b64)
        if image.sha256 not in (None, hashlib.sha256(content).hexdigest()):
            raise Invalid("the image's bytes do not have the sha256 that stands beside them")
        return content
    if image.sha256 is None:
        raise Invalid("the image has neither b64 nor sha256")
    if image.sha256 not in sent:
        raise Invalid("the image's bytes are not in this request; send b64 with one of the items")
    return sent[image.sha256]


def item_prompt(critic: Critic, limits: Limits, item: Item, sent: dict[str, bytes], images: Images) -> Prompt:
    """What the critic is shown for an item. Raises Invalid."""
    if item.axis not in critic.rubrics:
        raise Invalid(f"no rubric for this axis; this critic judges {', '.join(sorted(critic.rubrics))}")
    request = {
        "images": [images.patched(_content(image, sent))[1] for image in item.images],
        "prompt": item.instruction,
        "requirement": item.requirement,
        "criterion": item.axis,
    }
    try:
        return _checked(critic.prompt(request, limits.new_tokens, name="the item"), limits)
    except (DataError, ConfigError) as error:
        raise Invalid(str(error)) from error


def _checked(prompt: Prompt, limits: Limits) -> Prompt:
    if len(prompt) > limits.prompt_tokens:
        raise Invalid(
            f"{len(prompt)} tokens, more than the {limits.prompt_tokens} that a question may have; shorten the text or "
            "send smaller images"
        )
    return prompt


def question_key(item: Item, prompt: Prompt) -> str:
    """What makes two questions the same: the criterion, every token and every pixel."""
    parts = [item.axis, prompt.ids.tobytes().hex(), *(image.digest for image in prompt.images)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def scored(critic: Critic, item: Item, prompt: Prompt, generation: Generation) -> ScoredItem:
    """The answer to an item."""
    judgement = critic.judgement(item.axis, generation)
    ok = judgement.status == "ok"
    return ScoredItem(
        id=item.id,
        status="ok" if ok else "unparseable",
        detail=None if ok else judgement.status,
        score=list(judgement.score) if isinstance(judgement.score, tuple) else judgement.score,
        expected=judgement.expected,
        probs=None if judgement.probabilities is None else list(judgement.probabilities),
        entropy=judgement.entropy,
        reasoning=judgement.reason,
        text=judgement.text,
        rubric_sha256=judgement.rubric,
        finish_reason=generation.finish_reason,
        prompt_tokens=len(prompt),
        tokens=len(generation.tokens),
    )


def chat_prompt(critic: Critic, limits: Limits, request: ChatRequest, new_tokens: int) -> Prompt:
    """What the critic is shown for a chat. Raises Invalid."""
    images, turns, shown = Images(critic, limits), [], 0
    if request.messages[-1].role != "user":
        raise Invalid("the last message is to be the user's")
    for message in request.messages:
        parts = message.content if isinstance(message.content, list) else []
        content: list[str | PatchedImage] = [message.content] if isinstance(message.content, str) else []
        for part in parts:
            if isinstance(part, ImagePart):
                shown += 1
                content.append(images.patched(_decoded(part.image_url.url.partition(",")[2]))[1])
            else:
                content.append(part.text)
        for text in (part for part in content if isinstance(part, str)):
            try:
                check_request_text(text, "a text")
            except DataError as error:
                raise Invalid(str(error)) from error
        turns.append((message.role, content))
    if shown > IMAGES:
        raise Invalid(f"{shown} images, more than the {IMAGES} that a question may show")
    prompt = _checked(critic.processor.conversation(turns), limits)
    if len(prompt) + new_tokens > critic.max_length:
        raise Invalid(
            f"{len(prompt)} tokens with {new_tokens} to come, more than the {critic.max_length} that the model was "
            "made for; shorten the text or use smaller images"
        )
    return prompt


def chat_answer(
    critic: Critic, identity: Identity, request: ChatRequest, prompt: Prompt, written: tuple[Generation, Likely | None]
) -> ChatResponse:
    """The answer to a chat."""
    generation, likely = written
    count = len(generation.tokens)
    logprobs = None
    if request.logprobs:
        logprobs = Logprobs(
            content=[_token_logprob(critic, generation, likely, place, request) for place in range(count)]
        )
    return ChatResponse(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=identity.model,
        system_fingerprint=fingerprint(identity),
        choices=[
            Choice(
                message=Answer(content=critic.processor.decode(generation.tokens)),
                logprobs=logprobs,
                finish_reason=generation.finish_reason,
            )
        ],
        usage=Usage(prompt_tokens=len(prompt), completion_tokens=count, total_tokens=len(prompt) + count),
    )


def fingerprint(identity: Identity) -> str:
    """One name for weights, rubrics, preprocessing, number format and engine."""
    return "fp_" + hashlib.sha256(identity.model_dump_json().encode()).hexdigest()[:16]


def _token_logprob(critic: Critic, generation: Generation, likely: Likely, place: int, request: ChatRequest):
    wanted = request.top_logprobs or 0
    top = zip(likely.ids[place, :wanted], likely.best[place, :wanted], strict=True)
    return TokenLogprob(
        **_told(critic, generation.tokens[place], likely.own[place]),
        top_logprobs=[TopLogprob(**_told(critic, token, value)) for token, value in top],
    )


def _told(critic: Critic, token: int, logprob: float) -> dict:
    text = critic.processor.tokenizer.decode([int(token)], skip_special_tokens=False)
    return {"token": text, "logprob": max(float(logprob), LOWEST_LOGPROB), "bytes": list(text.encode())}
