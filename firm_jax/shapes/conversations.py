"""The shapes world as a source of critic training data: the oracles' answers in the critics' output formats."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from firm_jax.data.conversations import Conversation
from firm_jax.errors import DataError
from firm_jax.shapes import edit_teach, teach
from firm_jax.shapes.edits import Edit
from firm_jax.shapes.scene import Prompt, choice


class ShapesConversations:
    """`count` examples, each drawn from its own random stream, so that example `i` is the same in every run.

    rubrics: `alignment` and `quality`. stream: which of the independent sets of examples, 0 to train on, 1 held out.
    samples: an .npz file with a generator's own pictures (`images`, uint8 [N, H, W, 3]) and what each was asked to
    show (`prompts`, N JSON texts of `Prompt.to_json`); `share` of the examples are then drawn from it, held-out ones
    from its last eighth, others from the rest. Their criterion is `alignment_samples` or `quality_samples`.
    """

    pictures, instructions = ("images",), "prompts"  # the arrays of a samples file

    def __init__(self, count: int, rubrics: Mapping, *, seed: int, stream: int, samples=None, share=0.0):
        self.count, self.rubrics, self.seed, self.stream = count, rubrics, seed, stream
        self.share = share if samples else 0.0
        self.images, self.prompts = self._read_samples(samples) if samples else (None, None)
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
            images = tuple(self.images[number].astype(np.float32) / 255)
            rubric, text, answer = self._about(rng, images, self.prompts[number])
            criterion = f"{rubric}_samples"
        else:
            images, rubric, text, answer = self._draw(rng)
            criterion = rubric
        pixels = tuple(np.round(image * 255).astype(np.uint8) for image in images)
        return Conversation(pixels, self.rubrics[rubric].fill(text), answer, criterion)

    def _draw(self, rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], str, str, str]:
        """Images, criterion, instruction and answer of a new example."""
        image, *rest = teach.critic_example(rng)
        return (image,), *rest

    def _about(self, rng: np.random.Generator, images, prompt: Prompt) -> tuple[str, str, str]:
        """Criterion, instruction and answer for a picture of a generator."""
        if rng.random() < teach.ALIGNMENT_SHARE:
            return "alignment", prompt.text, teach.alignment_answer(*images, prompt)
        return "quality", "", teach.quality_answer(*images)

    def _parse(self, record: dict):
        return Prompt.from_json(record)

    def _read_samples(self, file) -> tuple[np.ndarray, list]:
        """Pictures uint8 [N, pictures an example, H, W, 3] and what each example was asked for."""
        try:
            with np.load(Path(file), allow_pickle=False) as arrays:
                asked = [self._parse(json.loads(text)) for text in arrays[self.instructions]]
                images = np.stack([arrays[name] for name in self.pictures], axis=1)
        except (OSError, KeyError, ValueError, DataError) as error:
            wanted = f"{', '.join(self.pictures)} and {self.instructions}"
            raise DataError(f"{file} is not an .npz file with {wanted}: {error}") from error
        if images.dtype != np.uint8 or images.ndim != 5 or len(images) != len(asked) or len(images) < 8:
            raise DataError(
                f"{file}: {', '.join(self.pictures)} must be uint8 [N, H, W, 3], 8 or more, with one of "
                f"{self.instructions} each; got {[images.shape[0], *images.shape[2:]]}"
            )
        return images, asked


class ShapesEditConversations(ShapesConversations):
    """The editing half: source first, edited picture second; rubrics `edit_execution` and `edit_consistency`.

    samples: an .npz file with `sources` and `images` (uint8 [N, H, W, 3]) and `edits` (N JSON texts of
    `Edit.to_json`).
    """

    pictures, instructions = ("sources", "images"), "edits"

    def _draw(self, rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], str, str, str]:
        return edit_teach.critic_example(rng)

    def _about(self, rng: np.random.Generator, images, edit: Edit) -> tuple[str, str, str]:
        criterion = choice(rng, edit_teach.CRITERIA)
        return criterion, edit.text, edit_teach.edit_answer(criterion, *images, edit)

    def _parse(self, record: dict):
        return Edit.from_json(record)
