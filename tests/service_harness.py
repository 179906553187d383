"""A service in a thread of the test's own process, with the real critic or with one that writes what it is told."""

import base64
import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import numpy as np
from PIL import Image

from firm_jax import Critic
from firm_jax.critic.decode import CHUNK, NOTHING
from firm_jax.interop.hub import resolve
from firm_jax.service import service as service_module
from firm_jax.service.fixed import FixedDecoder
from firm_jax.service.limits import Limits
from firm_jax.service.server import Server, identity_of, listen
from firm_jax.service.service import Service

NAME = "critic"
TOKENS = 128


@dataclass
class Served:
    """A service that listens, and a client of it."""

    service: Service
    server: Server
    url: str
    client: httpx.Client
    thread: threading.Thread

    def wait_until(self, condition, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and self.service.error is None, self.service.error or "too slow"
            time.sleep(0.005)

    def score(self, *items: dict, **more) -> httpx.Response:
        numbered = [{"id": str(number), **item} for number, item in enumerate(items)]
        return self.client.post("/v1/score", json={"items": numbered, **more})


@contextlib.contextmanager
def serving(critic: Critic, *, rows=4, token=None, ready=True, load=None, **limits) -> Iterator[Served]:
    """Serve while the block lasts."""
    folder = resolve("embedded:critic_gen")

    def loaded():
        return critic, identity_of(folder, critic, NAME, "float32")

    sock = listen("127.0.0.1", 0, token)
    limits = Limits(**{"new_tokens": TOKENS} | limits)
    service = Service(load or loaded, rows=rows, limits=limits, failed=lambda: server.drain())
    server = Server(service, token)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=120, headers=headers) as client:
        served = Served(service, server, url, client, thread)
        try:
            served.wait_until(lambda: server.started)
            if ready:
                served.wait_until(lambda: service.state == "ok")
            yield served
        finally:
            server.should_exit = True
            thread.join(60)
            service.close()


@dataclass
class Scripted:
    """Stands in for `FixedDecoder`: writes `text` to everybody, when `gate` is open and nothing `fails`."""

    critic: Critic
    text: str = "**Final Alignment Rating: 4**\n\\boxed{4}"
    fails: Callable = lambda prompts: False
    gate: threading.Event = field(default_factory=threading.Event)
    batches: list = field(default_factory=list)

    def decoder(self, decoder, rows: int, new_tokens: int) -> "Scripted":
        self.real, self.rows, self.decoder = FixedDecoder(decoder, rows, new_tokens), rows, decoder
        return self

    def shape(self, prompt, likely=0):
        return self.real.shape(prompt, likely)

    def write(self, shape, prompts):
        self.batches.append(prompts)
        assert self.gate.wait(60), "the gate was never opened"
        if self.fails(prompts):
            raise RuntimeError("the device says no")
        tokens = np.array([*self.critic.processor.encode(self.text), self.decoder.rules.ends[0]], np.int32)
        tokens = np.pad(tokens, (0, -len(tokens) % CHUNK), constant_values=NOTHING)
        for start in range(0, len(tokens), CHUNK):
            written = np.tile(tokens[start : start + CHUNK], (len(prompts), 1))
            logs = ()
            if k := shape.likely:
                logs = (np.zeros(written.shape), np.zeros((*written.shape, k), int), np.zeros((*written.shape, k)))
            yield written, np.zeros((*written.shape, 5), np.float32), *logs


@contextlib.contextmanager
def scripted(critic: Critic, *, opened=True, text=Scripted.text, **options) -> Iterator[tuple[Served, Scripted]]:
    """A service of which only the device is a stand-in. Its canary is answered before the gate is closed again."""
    script = Scripted(critic, text)
    script.gate.set()
    before = service_module.FixedDecoder
    service_module.FixedDecoder = script.decoder
    try:
        with serving(critic, **options) as served:
            if not opened:
                script.gate.clear()
            try:
                yield served, script
            finally:
                script.gate.set()
    finally:
        service_module.FixedDecoder = before


def b64(content: bytes) -> dict:
    return {"b64": base64.b64encode(content).decode()}


def png(seed: int, size=(64, 64)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()
