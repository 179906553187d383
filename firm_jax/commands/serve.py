"""Serve a critic over HTTP: POST /v1/score, and /v1/chat/completions as OpenAI's clients ask it.

Loopback only, unless --host says otherwise and the environment variable FIRM_JAX_TOKEN holds a token, which every
client then has to send. SIGTERM and Ctrl-C end the service when it has answered what it has accepted; a second one ends
it at once. Needs pip install -e '.[serve]'.
"""

import argparse
import os
from pathlib import Path

from firm_jax.commands.critics import add_critic_arguments, given_dtype, load_critic, positive
from firm_jax.errors import ConfigError
from firm_jax.interop.hub import resolve

TOKEN_VARIABLE = "FIRM_JAX_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_critic_arguments(parser, max_new_tokens=512)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free (%(default)s)")
    parser.add_argument("--name", help="of the model for clients; by default that of its folder, or its id")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="answers at once (%(default)s)")
    parser.add_argument("--queue", type=positive, default=256, metavar="N", help="questions at once (%(default)s)")
    parser.add_argument(
        "--warm-up", type=_size, nargs="*", default=(), metavar="WxH", help="image sizes to compile for"
    )


def _size(text: str) -> tuple[int, int]:
    width, height = text.lower().split("x")
    return positive(width), positive(height)


def run(arguments) -> int:
    """Serve until a signal."""
    try:
        from firm_jax.service.limits import Limits
        from firm_jax.service.server import identity_of, listen, serve
    except ImportError as error:
        raise ConfigError(f"the service needs {error.name}: pip install -e '.[serve]'") from error
    token = os.environ.get(TOKEN_VARIABLE) or None
    folder = resolve(arguments.critic)
    name = arguments.name or (arguments.critic if not Path(arguments.critic).is_dir() else folder.resolve().name)
    sock = listen(arguments.host, arguments.port, token)

    def load():
        critic = load_critic(arguments, arguments.batch_size)
        return critic, identity_of(folder, critic, name, given_dtype(arguments))

    limits = Limits(new_tokens=arguments.max_new_tokens, queue=arguments.queue)
    serve(load, sock, rows=arguments.batch_size, limits=limits, warm_up=arguments.warm_up, token=token)
    return 0
