"""A critic on a server that plays what a test tells it: right answers in both protocols, and every way to fail.

Its scores are those of `ScriptedCritic`, read from the pictures that were sent.
"""

import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image
from scripted import ScriptedCritic

from firm_jax.critic.endpoints import Policy
from firm_jax.critic.remote import RemoteCritic

RUBRIC = "a1b2"  # as in the judgements of `ScriptedCritic`
IDENTITY = {
    "model": "critic",
    "weights_sha256": "w" * 64,
    "template_sha256": "t" * 64,
    "preprocess_sha256": "p" * 64,
    "rubrics": dict.fromkeys(("alignment", "quality", "edit_execution", "edit_consistency"), RUBRIC),
    "dtype": "bfloat16",
    "engine": "fake",
    "mode": "parity+E",
}


@dataclass
class Play:
    """What to do instead of answering as asked.

    status, headers, body: of the reply; None for the right body. after: seconds before it. drop: close the connection
    in place of a reply; cut: after half of the body. change: made to the right reply before it is sent.
    """

    status: int = 200
    headers: dict = field(default_factory=dict)
    body: bytes | None = None
    after: float = 0.0
    drop: bool = False
    cut: bool = False
    change: Callable[[dict], dict] | None = None


def right(number: int, request: dict) -> Play:
    """Answers every question."""
    return Play()


class FakeCritic:
    """A server on loopback. `play(number, request)` says what to do with the POST request of that number, from 0.

    requests: the bodies of all POST requests. judged: questions answered. most: requests in work at once. gone:
    clients that went away before their reply.
    """

    def __init__(self, play: Callable[[int, dict], Play] = right, *, key: str | None = None, port: int = 0):
        self.play, self.key, self.identity = play, key, IDENTITY
        self.fingerprint: str | None = "fp_1"
        self.logprobs = True
        self.critic = ScriptedCritic()
        self.requests: list[dict] = []
        self.times: list[float] = []
        self.judged = self.most = self.gone = self._active = 0
        self._lock, self._connections = threading.Lock(), set()
        self._port, self._server = port, None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler())
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Die: refuse connections, and break those that are there."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _handler(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                fake._connections.add(self.connection)

            def finish(self):
                fake._connections.discard(self.connection)
                with contextlib.suppress(OSError):
                    super().finish()

            def do_GET(self):
                self._send(Play(), fake._models() if self.path == "/v1/models" else {"no": "such path"})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake._serve(self, request)

            def _send(self, play: Play, reply: dict) -> None:
                if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
                    play, reply = Play(401), {"error": "no key"}
                if play.change is not None:
                    reply = play.change(reply)
                body = json.dumps(reply).encode() if play.body is None else play.body
                self.send_response(play.status)
                for name, value in {"Content-Length": str(len(body)), **play.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if play.cut else body)
                self.close_connection = self.close_connection or play.cut

            def log_message(self, *_):
                pass

        return Handler

    def _serve(self, handler, request: dict) -> None:
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.times.append(time.monotonic())
            self._active += 1
            self.most = max(self.most, self._active)
        try:
            play = self.play(number, request)
            if play.after:
                time.sleep(play.after)
            if play.drop:
                handler.close_connection = True
                return
            scoring = "items" in request
            reply = self._scores(request) if scoring else self._chat(request)
            if play.status == 200 and play.body is None:
                with self._lock:
                    self.judged += len(request["items"]) if scoring else 1
            try:
                handler._send(play, reply)
            except OSError:
                handler.close_connection = True
                self.gone += 1
        finally:
            with self._lock:
                self._active -= 1

    def _models(self) -> dict:
        model = {"id": self.identity["model"], "object": "model", "created": 1, "owned_by": "firm-jax"}
        return {"object": "list", "data": [model | {"max_model_len": 4096, "server": self.identity}]}

    def _scores(self, request: dict) -> dict:
        sent = {
            one.get("sha256") or hashlib.sha256(base64.b64decode(one["b64"])).hexdigest(): one["b64"]
            for item in request["items"]
            for one in item["images"]
            if "b64" in one
        }
        items = [self._item(item, [sent[one["sha256"]] for one in item["images"]]) for item in request["items"]]
        return {"request_id": request["request_id"], "server": self.identity, "items": items}

    def _item(self, item: dict, images: list[str]) -> dict:
        found = self._judgement(item["axis"], item["instruction"], images)
        ok = found.status == "ok"
        return {
            "id": item["id"],
            "status": "ok" if ok else "unparseable",
            "detail": None if ok else found.status,
            "score": list(found.score) if isinstance(found.score, tuple) else found.score,
            "expected": found.expected,
            "probs": None,
            "entropy": found.entropy,
            "reasoning": found.reason,
            "text": found.text,
            "rubric_sha256": self.identity["rubrics"][item["axis"]],
            "finish_reason": "stop",
            "prompt_tokens": 1,
            "tokens": 1,
            "ms": 1,
        }

    def _judgement(self, axis: str, text: str, images: list[str]):
        pictures = [Image.open(io.BytesIO(base64.b64decode(one))) for one in images]
        return self.critic._judge({"criterion": axis, "prompt": text, "images": pictures})

    def _chat(self, request: dict) -> dict:
        """A score around the expected one, in tokens of a character each, with the probabilities of its digits."""
        *images, text = request["messages"][0]["content"]
        axis = "quality" if "Judge the visual quality" in text["text"] else "alignment"
        urls = [one["image_url"]["url"].removeprefix("data:image/png;base64,") for one in images]
        found = self._judgement(axis, text["text"], urls)
        score = f"[5, {found.score[1]}, 5]" if axis == "quality" else str(found.score)
        answer = f'{{"score": {score}, "reasoning": "why"}}' if axis == "quality" else f"why \\boxed{{{score}}}"
        place = answer.index(", ") + 2 if axis == "quality" else answer.index("{") + 1
        content = [self._token(one, found.expected if at == place else None) for at, one in enumerate(answer)]
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": self.identity["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}],
        }
        reply["choices"][0]["logprobs"] = {"content": content} if request.get("logprobs") and self.logprobs else None
        return reply | {"system_fingerprint": self.fingerprint}

    def _token(self, character: str, expected: float | None) -> dict:
        """Of a score two neighbours of the expected one, so that their mean is that; anything else is certain."""
        likely = {character: 1.0}
        if expected is not None:
            low = min(math.floor(expected), 4)
            likely = {str(low): low + 1 - expected, str(low + 1): expected - low}
        tokens = [
            {"token": text, "logprob": math.log(share) if share > 0 else -9999.0, "bytes": list(text.encode())}
            for text, share in likely.items()
        ]
        own = next((one for one in tokens if one["token"] == character), {"token": character, "logprob": -9999.0})
        return own | {"top_logprobs": tokens}


@contextlib.contextmanager
def fake(*given, **named) -> Iterator[FakeCritic]:
    """A server while the block lasts."""
    server = FakeCritic(*given, **named)
    try:
        yield server
    finally:
        server.stop()


def red(value: int, size: int = 8) -> np.ndarray:
    """A picture of one red, from which its score follows; no two values give the same one."""
    picture = np.zeros((size, size, 3), np.uint8)
    picture[..., 0], picture[..., 1] = value % 256, value // 256
    return picture


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# A client of it

QUICK = Policy(concurrency=4, connect_timeout=2, try_timeout=30, timeout=60, attempts=3, backoff=0.01, rest=0.02)
AXES = ("alignment", "quality")


def requests(count: int = 4, first: int = 0) -> list[dict]:
    """Two criteria of `count` pictures, no two alike."""
    return [
        {"images": [red(first + 10 * number)], "prompt": "a red circle", "criterion": axis}
        for axis in AXES
        for number in range(count)
    ]


def expected(asked: list[dict]):
    return [ScriptedCritic()._judge(one) for one in asked]


def critic(*servers, **changed) -> RemoteCritic:
    policy = dataclasses.replace(QUICK, **{name: changed.pop(name) for name in list(changed) if hasattr(QUICK, name)})
    return RemoteCritic([getattr(one, "url", one) for one in servers], policy=policy, **changed)


def patient(asking: RemoteCritic, **changed) -> RemoteCritic:
    """The same critic with other patience: it has greeted the server with that of QUICK."""
    asking.endpoints.policy = dataclasses.replace(asking.policy, **changed)
    return asking


def statuses(judgements) -> set[str]:
    for one in judgements:
        assert (one.status == "ok") == (one.score is not None) == (one.expected is not None)
    return {one.status for one in judgements}
