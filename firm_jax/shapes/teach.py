"""Training examples of the shapes world: pictures and captions for the generator, pictures for the autoencoder."""

import numpy as np

from firm_jax.shapes.render import render
from firm_jax.shapes.scene import TAGS, Prompt, corrupt_prompt, sample_prompt, sample_scene


def generator_batch(
    rng: np.random.Generator, count: int, wrong: float = 0.35
) -> tuple[list[str], np.ndarray]:
    """Captions and images float32 [count, 64, 64, 3] in [0, 1], for the base generator.

    Each attribute of a picture is drawn anew with probability `wrong`, whatever its caption says: a generator
    trained on such pairs draws every concept crisply, and follows the prompt about half the time.
    """
    captions = [_any_prompt(rng) for _ in range(count)]
    images = [render(sample_scene(rng, corrupt_prompt(rng, caption, wrong))) for caption in captions]
    return [caption.text for caption in captions], np.stack(images)


def autoencoder_batch(rng: np.random.Generator, count: int) -> np.ndarray:
    """Clean images float32 [count, 64, 64, 3] in [0, 1]."""
    return np.stack([render(sample_scene(rng, _any_prompt(rng))) for _ in range(count)])


def _any_prompt(rng: np.random.Generator) -> Prompt:
    difficulties = tuple(TAGS)
    return sample_prompt(rng, difficulties[int(rng.integers(len(difficulties)))])
