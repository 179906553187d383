"""The JSON of requests and answers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from firm_jax.service.limits import IMAGES, ITEMS, LIKELY, TEXT_CHARACTERS

MODE = "parity+E"  # greedy text in the order of the rubrics' training, and the expectation at the score's place

Text = Annotated[str, Field(max_length=TEXT_CHARACTERS)]
Name = Annotated[str, Field(min_length=1, max_length=128)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Given(BaseModel):
    """What a client sends: a field that is not known is refused, so that none is believed to have an effect."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class Image(Given):
    """PNG, JPEG or WebP. An image that several items of a request show may have its bytes in one of them only."""

    sha256: Sha256 | None = Field(None, description="Of the file; tells which image is meant where b64 is left out.")
    b64: str | None = Field(None, description="The file in base64.")


class Item(Given):
    id: Name
    axis: Name = Field(description="The rubric to judge by: alignment, quality, edit_execution, edit_consistency.")
    instruction: Text = ""
    requirement: Text | None = None
    images: Annotated[list[Image], Field(min_length=1, max_length=IMAGES)] = Field(
        description="The images that were edited, where there are any, then the one that is judged."
    )


class ScoreRequest(Given):
    request_id: Name | None = None
    deadline_ms: Annotated[int, Field(ge=1)] | None = Field(None, description="At most the service's own.")
    mode: Literal["parity+E"] = MODE
    items: Annotated[list[Item], Field(min_length=1, max_length=ITEMS)]

    @field_validator("items")
    @classmethod
    def _distinct(cls, items: list[Item]) -> list[Item]:
        if len({item.id for item in items}) < len(items):
            raise ValueError("two items have the same id")
        return items


class Identity(BaseModel):
    """Which critic answers: equal for equal answers, as long as the devices are alike."""

    model: str
    weights_sha256: str
    template_sha256: str
    preprocess_sha256: str
    rubrics: dict[str, str]
    dtype: str
    engine: str
    mode: str = MODE


class ScoredItem(BaseModel):
    """One judgement. Everything that is not known is null; a score is never made up."""

    id: str
    status: Literal["ok", "invalid_input", "unparseable", "overloaded", "internal"]
    detail: str | None = Field(None, description="What is wrong with the input or the answer, and the remedy.")
    score: int | list[int] | None = Field(None, description="1 to 5; of quality its three scores.")
    expected: float | None = Field(
        None, description="The mean score under the critic's probabilities, of several scores the lowest."
    )
    probs: list[float] | None = Field(None, description="Of 1 to 5, those whose mean is `expected`.")
    entropy: float | None = Field(None, description="Of the probabilities, in nats, averaged over several scores.")
    reasoning: str | None = None
    text: str | None = Field(None, description="All that the critic wrote.")
    rubric_sha256: str | None = None
    finish_reason: Literal["stop", "length"] | None = None
    prompt_tokens: int | None = None
    tokens: int | None = Field(None, description="Written by the critic.")
    ms: int | None = Field(None, description="From the request's arrival to this answer.")


class ScoreResponse(BaseModel):
    request_id: str | None
    server: Identity
    items: list[ScoredItem]


class ImageUrl(Given):
    url: Annotated[str, Field(pattern="^data:image/(png|jpeg|jpg|webp);base64,")] = Field(
        description="A data URL. No other URL is ever opened."
    )
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Has no effect.")


class ImagePart(Given):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(Given):
    type: Literal["text"]
    text: Text


Part = Annotated[ImagePart | TextPart, Field(discriminator="type")]


class Message(Given):
    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=64)]
    name: Name | None = Field(None, description="Has no effect.")


class ChatRequest(Given):
    """Answers are greedy. Settings of sampling that would ask for something else are refused."""

    model: Annotated[str, Field(max_length=512)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=64)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Literal[0] | None = None
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LIKELY)] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Has no effect on a greedy answer.")
    seed: int | None = Field(None, description="Has no effect on a greedy answer.")
    user: Text | None = Field(None, description="Has no effect.")

    @field_validator("temperature", "frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        """0.0 is 0."""
        return int(value) if isinstance(value, float) and value == 0 else value


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int = 0
    message: Answer
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["firm-jax"] = "firm-jax"
    max_model_len: int
    server: Identity


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "loading", "draining", "failing"]


class Readiness(Health):
    detail: str | None = None
    canary: ScoredItem | None = None
    server: Identity | None = None


class ErrorBody(BaseModel):
    message: str
    type: str
    code: str
    param: str | None = None


class Error(BaseModel):
    error: ErrorBody
