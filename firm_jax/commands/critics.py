"""What the commands that judge have in common: which critic, and how it is held."""

import argparse

from firm_jax.critic import Critic
from firm_jax.devices import default_dtype, default_mesh, say_nothing_of_absent_devices, use_compilation_cache


def add_critic_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int, several: bool = False) -> None:
    """`--critic`, which may be repeated where a command takes several, and how to ask."""
    words = "a Qwen3-VL folder or Hugging Face id; by default the miniature that ships with the package"
    given = {"action": "append"} if several else {"default": "embedded:critic_gen"}
    parser.add_argument("--critic", metavar="DIR_OR_ID", help=words + "; may be repeated" * several, **given)
    parser.add_argument("--rubrics", metavar="DIR", help="the rubrics to judge by, in place of the critic's own")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), help="bfloat16 by default, float32 on a CPU"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=max_new_tokens, metavar="N", help="longest answer (%(default)s)"
    )


def positive(text: str) -> int:
    """The whole number above 0 that an argument says."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def given_dtype(arguments) -> str:
    """What the arguments say, or what fits the device."""
    return arguments.dtype or default_dtype()


def load_critic(arguments, max_batch: int) -> Critic:
    """The critic of the arguments, on all devices."""
    say_nothing_of_absent_devices()
    use_compilation_cache()
    return Critic.from_pretrained(
        arguments.critic,
        dtype=given_dtype(arguments),
        mesh=default_mesh(),
        rubrics=arguments.rubrics,
        max_batch=max_batch,
    )
