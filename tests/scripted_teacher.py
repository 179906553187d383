"""A teacher in the place of the network: plays what a test tells it, and keeps the bill as a provider would."""

import asyncio
import base64
import io
import json
from collections.abc import Callable

import httpx
import numpy as np
from PIL import Image

from firm_jax.critic.endpoints import Policy
from firm_jax.curation.teacher import Teacher, TeacherSettings

QUICK = Policy(concurrency=4, connect_timeout=2, try_timeout=5, timeout=10, attempts=3, backoff=0.001, rest=0.01)
SETTINGS = TeacherSettings("wise", ("http://one", "http://two/v1"), price_in=0.15, price_out=0.6, image_tokens=100)


def chat(text: str | None, *, tokens=(30, 10), ended="stop", **message) -> dict:
    """A chat completion; tokens None for a server that does not count them."""
    reply = {"choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": ended}]}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]} if tokens else None
    return reply | {"model": "wise", "usage": usage}


class ScriptedTeacher(httpx.AsyncBaseTransport):
    """`play(number, text, pictures)` gives what the request of that number, from 0, is answered.

    A text becomes a chat completion, a dict the reply's JSON, bytes its body, an int or (int, headers) its status;
    an exception is raised. after: seconds before each reply. asked: the requests' JSON. most: requests at once.
    """

    def __init__(self, play: Callable, after: float = 0.0):
        self.play, self.after = play, after
        self.asked: list[dict] = []
        self.urls: list[str] = []
        self.headers: list[httpx.Headers] = []
        self.active = self.most = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        asked = json.loads(await request.aread())
        number = len(self.asked)
        self.asked.append(asked)
        self.urls.append(str(request.url))
        self.headers.append(request.headers)
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            await asyncio.sleep(self.after)
            *images, text = asked["messages"][0]["content"]
            played = self.play(number, text["text"], [_pixels(one["image_url"]["url"]) for one in images])
        finally:
            self.active -= 1
        if isinstance(played, Exception):
            raise played
        if isinstance(played, str):
            played = chat(played)
        if isinstance(played, dict):
            played = json.dumps(played).encode()
        if isinstance(played, bytes):
            return httpx.Response(200, content=_Stream(played))
        status, headers = played if isinstance(played, tuple) else (played, {})
        return httpx.Response(status, headers=headers, content=_Stream(b"no"))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, body: bytes):
        self._body = body

    async def __aiter__(self):
        yield self._body


def _pixels(url: str) -> np.ndarray:
    head, _, content = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content, validate=True))))


def teacher(play, *, policy: Policy = QUICK, settings: TeacherSettings = SETTINGS, after: float = 0.0):
    """The teacher and its script."""
    script = ScriptedTeacher(play, after)
    return Teacher(settings, policy, transport=script), script
