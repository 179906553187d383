"""Routes, statuses and the one form of errors."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from firm_jax.service.engine import Failed, Full
from firm_jax.service.guard import Guard, error_body
from firm_jax.service.judging import Invalid, chat_answer, chat_prompt
from firm_jax.service.limits import LIKELY
from firm_jax.service.protocol import (
    ChatRequest,
    ChatResponse,
    Error,
    Health,
    Model,
    Models,
    Readiness,
    ScoreRequest,
    ScoreResponse,
)
from firm_jax.service.service import Overdue, Service

CLIENT_IS_GONE = 499
SHOWN_ERRORS = 5


def _errors(*statuses: int) -> dict:
    return {status: {"model": Error} for status in statuses}


def create_app(service: Service, token: str | None = None) -> Guard:
    """The ASGI application of a service; with a token, only who sends it is answered."""
    app = FastAPI(title="firm-jax", description="A FIRM critic.", docs_url=None, redoc_url=None)
    begun = int(time.time())

    @app.post("/v1/score", response_model=ScoreResponse, responses=_errors(400, 401, 408, 413, 415, 429, 503, 504))
    async def score(body: ScoreRequest, http: Request):
        """Judge images: one answer an item, in order, each with a status of its own."""
        items = await _while_connected(http, service.score(body, http.state.begun))
        return ScoreResponse(request_id=body.request_id, server=service.identity, items=items)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatResponse,
        responses=_errors(400, 401, 404, 408, 413, 415, 429, 500, 503, 504),
    )
    async def chat(body: ChatRequest, http: Request):
        """The critic's greedy answer to a chat with images, as OpenAI's clients ask for it."""
        return await _while_connected(http, _chat(service, body, http.state.begun))

    @app.get("/v1/models", response_model=Models, responses=_errors(401, 503))
    async def models():
        """The one critic that is served, and who it is."""
        length = service.critic.max_length
        return Models(
            data=[Model(id=service.identity.model, created=begun, max_model_len=length, server=service.identity)]
        )

    @app.get("/healthz", response_model=Health)
    async def healthz():
        """Whether the process lives."""
        return Health(status=service.state)

    @app.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
    async def readyz():
        """Whether a canary is judged, and as it was at first."""
        found = await service.readiness()
        return JSONResponse(found.model_dump(), 200 if found.status == "ok" else 503)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **_errors(401)}, response_class=Response)
    async def metrics():
        """For Prometheus."""
        service.observed.queue.set(service.engine.waiting)
        return Response(generate_latest(service.observed.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error: RequestValidationError):
        found = error.errors()
        if any(one["type"] == "json_invalid" for one in found):
            return _error(400, "not_json", "the body is not JSON")
        told = [f"{'.'.join(str(part)[:64] for part in one['loc'])}: {one['msg']}" for one in found[:SHOWN_ERRORS]]
        return _error(422, "invalid", "; ".join(told))

    @app.exception_handler(HTTPException)
    async def refused(_, error: HTTPException):
        return _error(
            error.status_code,
            "not_found" if error.status_code == 404 else "refused",
            str(error.detail)[:200],
            error.headers,
        )

    @app.exception_handler(Invalid)
    async def unusable(_, error: Invalid):
        return _error(400, "invalid_input", str(error))

    @app.exception_handler(Full)
    async def full(_, error: Full):
        return _error(429, "overloaded", "the queue is full; try again", {"Retry-After": str(error.retry_seconds)})

    @app.exception_handler(Overdue)
    async def overdue(*_):
        return _error(504, "deadline", "the deadline has passed")

    @app.exception_handler(Failed)
    async def failed(*_):
        return _error(500, "internal", "the device could not answer this question")

    @app.exception_handler(_Gone)
    async def gone(*_):
        return Response(status_code=CLIENT_IS_GONE)

    @app.exception_handler(Exception)
    async def broken(*_):
        logging.getLogger(__name__).error("a request could not be answered", exc_info=True)
        return _error(500, "internal", "the service could not answer; its log says why")

    return Guard(app, service.limits, token, service.observed, service.closed)


async def _chat(service: Service, body: ChatRequest, begun: float) -> ChatResponse:
    if body.model != service.identity.model:
        raise HTTPException(404, f"there is no model of this name; this service has {service.identity.model}")
    if body.top_logprobs is not None and not body.logprobs:
        raise Invalid("top_logprobs goes together with logprobs: true")
    limit = service.limits.new_tokens
    new_tokens = body.max_completion_tokens or body.max_tokens or limit
    if new_tokens > limit:
        raise Invalid(f"an answer has at most {limit} tokens")
    with service.engine.admitted(1):
        prompt = await service.in_pool(chat_prompt, service.critic, service.limits, body, new_tokens)
        deadline = begun + service.limits.deadline_seconds
        written = await service.answer(prompt, new_tokens, deadline, LIKELY if body.logprobs else 0)
    return chat_answer(service.critic, service.identity, body, prompt, written)


class _Gone(Exception):
    """The client no longer waits for its answer."""


async def _while_connected(http: Request, answering: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns; it is cancelled, and its questions with it, when the client goes away."""
    work = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise _Gone
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse(error_body(message, kind, code), status, headers)
