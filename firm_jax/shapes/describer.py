"""What the miniature's describer learns: to say what a picture shows, and what differs between two. It judges nothing.

`python -m firm_jax.shapes.describer FOLDER` writes conversations for `configs/critic_sft.py` to train on. The describer
is to the miniature what a vision-language model is before it is made a critic: it can see, and has no opinion.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from firm_jax.data.conversation_files import write_sharegpt
from firm_jax.data.conversations import Conversation
from firm_jax.shapes import differences, edit_teach, oracle, teach
from firm_jax.shapes.render import render, to_pil

COUNT, HELD_OUT = 6_000, 64
DESCRIBE = "Describe the image."
COMPARE = "Describe what differs between the two images."
# Apart from the streams that critics are trained on and measured with.
SEED = 70411


def description(rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], str, str]:
    """Pictures as critics see them (float32 [H, W, 3]), the question and its answer: of one picture or of two."""
    if rng.random() < 0.5:
        _, scene = teach.pair_for_alignment(rng, int(rng.integers(1, 6)))
        image = teach.aged(rng, render(scene))
        return (image,), DESCRIBE, f"{teach.describe(oracle.inspect(image))}."
    images, *_ = edit_teach.critic_example(rng)
    found = differences.between(*map(oracle.inspect, images))
    return images, COMPARE, "\n".join(one.text for one in found) or "No difference."


def conversations(first: int, count: int) -> Iterator[Conversation]:
    """The examples from number `first` on, the same ones every time."""
    for number in range(first, first + count):
        images, question, answer = description(np.random.default_rng([SEED, number]))
        yield Conversation(tuple(to_pil(image) for image in images), question, answer, "", f"description_{number}")


def main(folder: str) -> None:
    write_sharegpt(Path(folder) / "examples.jsonl", conversations(0, COUNT))
    write_sharegpt(Path(folder) / "held_out.jsonl", conversations(COUNT, HELD_OUT))


if __name__ == "__main__":
    main(*sys.argv[1:])
