"""The shapes world as a source of critic training data: the oracle's answers in the critic's output formats."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from firm_jax.data.conversations import Conversation
from firm_jax.errors import DataError
from firm_jax.shapes import teach
from firm_jax.shapes.scene import Prompt


class ShapesConversations:
    """`count` examples, each drawn from its own random stream, so that example `i` is the same in every run.

    rubrics: `alignment` and `quality`. stream: which of the independent sets of examples, 0 to train on, 1 held out.
    samples: an .npz file with a generator's own pictures (`images`, uint8 [N, H, W, 3]) and what each was asked to
    show (`prompts`, N JSON texts of `Prompt.to_json`); `share` of the examples are then drawn from it, held-out ones
    from its last eighth, others from the rest. Their criterion is `alignment_samples` or `quality_samples`.
    """

    def __init__(self, count: int, rubrics: Mapping, *, seed: int, stream: int, samples=None, share=0.0):
        self.count, self.rubrics, self.seed, self.stream = count, rubrics, seed, stream
        self.share = share if samples else 0.0
        self.images, self.prompts = _read_samples(samples) if samples else (None, None)
        self._made: dict[int, Conversation] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < self.count:
            raise IndexError(f"example {index} of {self.count}")
        if index not in self._made:
            self._made[index] = self._make(np.random.default_rng([self.seed, self.stream, index]))
        return self._made[index]

    def text_length(self, index: int) -> int:
        """Characters of question and answer."""
        return len(self[index].prompt) + len(self[index].answer)

    def _make(self, rng: np.random.Generator) -> Conversation:
        if rng.random() < self.share:
            border = len(self.images) * 7 // 8
            number = int(rng.integers(border, len(self.images)) if self.stream else rng.integers(border))
            image, prompt = self.images[number].astype(np.float32) / 255, self.prompts[number]
            if rng.random() < teach.ALIGNMENT_SHARE:
                rubric, text, answer = "alignment", prompt.text, teach.alignment_answer(image, prompt)
            else:
                rubric, text, answer = "quality", "", teach.quality_answer(image)
            criterion = f"{rubric}_samples"
        else:
            image, rubric, text, answer = teach.critic_example(rng)
            criterion = rubric
        pixels = np.round(image * 255).astype(np.uint8)
        return Conversation((pixels,), self.rubrics[rubric].fill(text), answer, criterion)


def _read_samples(file) -> tuple[np.ndarray, list[Prompt]]:
    try:
        with np.load(Path(file), allow_pickle=False) as arrays:
            images, prompts = arrays["images"], [Prompt.from_json(json.loads(text)) for text in arrays["prompts"]]
    except (OSError, KeyError, ValueError, DataError) as error:
        raise DataError(f"{file} is not an .npz file with images and prompts: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(prompts) or len(images) < 8:
        raise DataError(
            f"{file}: images must be uint8 [N, H, W, 3], 8 or more, with one prompt each; got {images.shape}"
        )
    return images, prompts
