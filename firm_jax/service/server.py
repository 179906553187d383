"""The process: listens at once, loads the critic, and on SIGTERM answers what it has accepted before it ends."""

import asyncio
import hashlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import jax
import uvicorn

from firm_jax.critic import Critic
from firm_jax.errors import ConfigError
from firm_jax.service.app import create_app
from firm_jax.service.limits import Limits
from firm_jax.service.protocol import Identity
from firm_jax.service.service import Service

CONNECTIONS = 1024
IDLE_SECONDS = 30
LONGEST_HEADERS = 32 << 10
LOOPBACK = ("127.0.0.1", "::1", "localhost")
DRAIN_LOOK_SECONDS = 0.05


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """A socket that is bound, and not listening yet. ConfigError without a token where others could reach it."""
    if host not in LOOPBACK and token is None:
        raise ConfigError(
            f"--host {host} can be reached from elsewhere, and there is no token. Put one in the environment variable "
            "FIRM_JAX_TOKEN, or leave --host out."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}. Choose another --port.") from error
    return found


class Server(uvicorn.Server):
    """uvicorn, but for signals: the first one drains, a second one ends the process at once."""

    def __init__(self, service: Service, token: str | None):
        self.service, self.guard = service, create_app(service, token)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked = False
        super().__init__(
            uvicorn.Config(
                self.guard,
                loop="asyncio",
                http="h11",
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                limit_concurrency=CONNECTIONS,
                h11_max_incomplete_event_size=LONGEST_HEADERS,
            )
        )

    async def startup(self, sockets=None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.service.start()

    def handle_exit(self, sig: int, frame) -> None:
        if self._asked:
            os._exit(128 + sig)
        self._asked = True
        self.drain()

    def drain(self) -> None:
        """Refuse new requests, and end when those that were accepted are answered. From any thread."""
        self.service.state = "draining"
        if self._loop is None:
            self.should_exit = True
            return
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._end_when_answered()))

    async def _end_when_answered(self) -> None:
        deadline = self._loop.time() + self.service.limits.drain_seconds
        while self.guard.active and self._loop.time() < deadline:
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        self.should_exit = True


def serve(
    load: Callable[[], tuple[Critic, Identity]],
    sock: socket.socket,
    *,
    rows: int,
    limits: Limits,
    warm_up: Sequence[tuple[int, int]] = (),
    token: str | None = None,
) -> None:
    """Serve on a socket until a signal has been answered. Raises the error for which a critic cannot be served."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)

    def opened() -> None:
        print(f"ready: {service.identity.model}", flush=True)

    service = Service(load, rows=rows, limits=limits, warm_up=warm_up, opened=opened, failed=lambda: server.drain())
    server = Server(service, token)
    host, port = sock.getsockname()[:2]
    print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}, loading the critic", flush=True)
    server.run(sockets=[sock])
    service.close()
    if service.error is not None:
        raise service.error


def identity_of(folder: Path, critic: Critic, name: str, dtype: str) -> Identity:
    """Who answers: hashes of all that decides an answer."""
    rubrics = {rubric.name: rubric.sha256 for rubric in critic.rubrics.values()}
    versions = " ".join(f"{package} {metadata.version(package)}" for package in ("jax", "flax"))
    own = "firm-jax"
    try:
        own += f" {metadata.version('firm-jax')}"
    except metadata.PackageNotFoundError:
        own += " (from its source folder)"
    weights = [*sorted(folder.glob("*.safetensors")), folder / "config.json", folder / "generation_config.json"]
    return Identity(
        model=name,
        weights_sha256=_hash_of(file for file in weights if file.exists()),
        template_sha256=hashlib.sha256("\n".join(f"{k} {v}" for k, v in sorted(rubrics.items())).encode()).hexdigest(),
        preprocess_sha256=_hash_of([folder / "tokenizer.json"], repr(critic.processor.images)),
        rubrics=rubrics,
        dtype=dtype,
        engine=f"{own}, {versions}, {jax.device_count()} x {jax.devices()[0].device_kind}",
    )


def _hash_of(files, text: str = "") -> str:
    """sha256 of names and contents of files, and of a text."""
    digest = hashlib.sha256(text.encode())
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()
