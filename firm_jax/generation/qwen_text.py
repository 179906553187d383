"""From instructions, and the source images of an edit, to the text tokens of the Qwen-Image transformer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from firm_jax.data.patches import ImageConfig, PatchedImage, patch_image, patch_table
from firm_jax.data.records import check_request_text
from firm_jax.errors import ConfigError, DataError
from firm_jax.generation.text import SHOWN_CHARACTERS, text_batches
from firm_jax.mesh import batch_size, on_mesh, shard_batch, to_host
from firm_jax.models.qwen_text import rope_positions


class Template(NamedTuple):
    """What stands around an instruction: part of what a pipeline's weights were trained with.

    system: the system turn. dropped: so many states from the start are not shown to the transformer. picture: what
    announces source image n, `{}` in the place of n.
    """

    system: str
    dropped: int
    picture: str = ""


TEXT_TO_IMAGE = Template(
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:",
    dropped=34,
)
EDIT = Template(
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain "
    "how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.",
    dropped=64,
)
EDIT_PLUS = EDIT._replace(picture="Picture {}: ")

MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


class TextSequence(NamedTuple):
    """One prompt as arrays over its T tokens.

    ids; positions [3, T]; image: which of `images` a token stands for, -1 for text; patch: which merged patch of it.
    """

    ids: np.ndarray
    positions: np.ndarray
    image: np.ndarray
    patch: np.ndarray
    images: tuple[PatchedImage, ...]


class QwenTextEncoder:
    """Tokenizer, image settings and Qwen2.5-VL of a Qwen-Image pipeline.

    tokenizer: the transformers one, None for networks that are only compiled. images: how the condition images are
    cut, None for pipelines without.
    """

    def __init__(self, tokenizer, network: nnx.Module, images: ImageConfig | None, template: Template, mesh=None):
        self.tokenizer, self.images, self.template = tokenizer, images, template
        self.mesh: Mesh | None = mesh
        self.config = network.config
        self.graphdef, self.params = nnx.split(network)
        self.encode_jitted = jax.jit(self.encode)
        if tokenizer is not None:
            self._words = tokenizer.backend_tokenizer
            self._words.encode_special_tokens = True  # a user's "<|image_pad|>" is text
            self._marks = {mark: self._words.token_to_id(mark) for mark in MARKS}
            if unknown := sorted(mark for mark, found in self._marks.items() if found is None):
                raise ConfigError(f"the tokenizer has no {', '.join(unknown)}; it is not that of a Qwen-Image pipeline")

            opening = len(self.sequence("")[0].ids) - len(self._closing())
            if opening < template.dropped:
                raise ConfigError(
                    f"the tokenizer writes what stands before an instruction in {opening} tokens, fewer than the "
                    f"{template.dropped} that are dropped there; it is not that of a Qwen-Image pipeline"
                )

    def _closing(self) -> list[int]:
        start, end = self._marks[MARKS[0]], self._marks[MARKS[1]]
        return [end, *self._encode("\n"), start, *self._encode("assistant\n")]

    def sequence(self, prompt: str, images: Sequence[PatchedImage] = (), max_text_tokens: int | None = None):
        """One prompt in the pipeline's template, after its pictures; cut after `max_text_tokens`, pictures not counted.

        Returns the TextSequence and whether it was cut.
        """
        start, end, vision_start, pad, vision_end = (self._marks[mark] for mark in MARKS)
        ids: list[int] = []
        runs: list[int | tuple[int, int]] = []
        image_of: list[int] = []
        patch_of: list[int] = []

        def add(*tokens: int) -> None:
            ids.extend(tokens)
            image_of.extend([-1] * len(tokens))
            patch_of.extend([-1] * len(tokens))
            runs.append(len(tokens))

        add(start, *self._encode(f"system\n{self.template.system}"), end, *self._encode("\n"), start)
        words = "user\n"
        for number, image in enumerate(images):
            add(*self._encode(words + self.template.picture.format(number + 1)), vision_start)
            grid = tuple(side // self.images.merge_size for side in image.grid)
            count = grid[0] * grid[1]
            ids.extend([pad] * count)
            image_of.extend([number] * count)
            patch_of.extend(range(count))
            runs.append(grid)
            add(vision_end)
            words = ""
        add(*self._encode(words + prompt), *self._closing())
        positions, _ = rope_positions(runs)
        limit = len(ids)
        if max_text_tokens is not None:
            pads = sum(number >= 0 for number in image_of)
            limit = self.template.dropped + pads + max_text_tokens
        arrays = (np.array(ids, np.int32)[:limit], positions[:, :limit], np.array(image_of)[:limit])
        return TextSequence(*arrays, np.array(patch_of)[:limit], tuple(images)), len(ids) > limit

    def _encode(self, text: str) -> list[int]:
        return self._words.encode(text, add_special_tokens=False).ids

    def sequences(
        self, prompts: Sequence[str], images: Sequence[Sequence], max_text_tokens: int | None
    ) -> list[TextSequence]:
        """The prompts, each with its condition images (of the size at which they are to be seen).

        A warning says when prompts are cut. Raises DataError for a prompt that is no text or too long to be one.
        """
        for number, prompt in enumerate(prompts):
            check_request_text(prompt, f"prompt {number}")
        patched = [[patch_image(image, self.images) for image in own] for own in images]
        made = [self.sequence(*pair, max_text_tokens) for pair in zip(prompts, patched, strict=True)]
        if cut := [prompt for prompt, (_, was_cut) in zip(prompts, made, strict=True) if was_cut]:
            logging.warning(
                "%d of %d prompts are longer than max_text_tokens = %d, and are cut; the first: %r",
                *(len(cut), len(prompts), max_text_tokens, cut[0][:SHOWN_CHARACTERS]),
            )
        return [sequence for sequence, _ in made]

    def encode(self, params, batch: Mapping):
        """The states of prompts after the dropped ones, [B, T, D]. Pure; `batch` is what `collate` returns."""
        model = nnx.merge(self.graphdef, params)
        features = model.encode_images(batch["patches"], batch["grids"]) if "patches" in batch else None
        embeddings = model.splice(batch["ids"], features, batch["image_index"])
        positions = jnp.moveaxis(batch["positions"], 1, 0)
        return model(embeddings, positions, batch["segments"])[:, self.template.dropped :]

    def collate(self, sequences: Sequence[TextSequence], length: int, size: int) -> dict[str, np.ndarray]:
        """At most `size` sequences as one batch of that size, `length` tokens behind the dropped ones, padded behind.

        Returns ids, segments (1, or 0 for padding), image_index [B, L], positions [B, 3, L], and with images patches
        and grids, a table whose rows image_index points into.
        """
        width = self.template.dropped + length
        table, rows = patch_table(
            [image for sequence in sequences for image in sequence.images], multiple=batch_size(self.mesh)
        )
        merged = table["patches"].shape[1] // self.images.merge_size**2 if rows else 0
        ids = np.zeros((size, width), np.int32)
        segments = np.zeros((size, width), np.int32)
        image_index = np.full((size, width), -1, np.int32)
        positions = np.zeros((size, 3, width), np.int32)
        for row, sequence in enumerate(sequences):
            count = len(sequence.ids)
            if count > width:
                raise DataError(f"a prompt with its pictures has {count} tokens, more than the {width} it was given")
            ids[row, :count], segments[row, :count], positions[row, :, :count] = sequence.ids, 1, sequence.positions
            first = np.array([rows[image.digest] * merged for image in sequence.images] + [0])
            image_index[row, :count] = np.where(sequence.image >= 0, first[sequence.image] + sequence.patch, -1)
        batch = {"ids": ids, "segments": segments, "image_index": image_index, "positions": positions}
        return batch | table if rows else batch

    def __call__(self, sequences: Sequence[TextSequence], length: int) -> tuple[np.ndarray, np.ndarray]:
        """States [P, length, D] and mask int32 [P, length], 0 for padding, on the host."""
        parts = []
        for rows in text_batches(len(sequences), batch_size(self.mesh)):
            batch = self.collate([sequences[row] for row in rows], length, len(rows))
            with on_mesh(self.mesh):
                parts.append(to_host(self.encode_jitted(self.params, shard_batch(batch, self.mesh))))
        counts = np.array([len(sequence.ids) - self.template.dropped for sequence in sequences])
        mask = (np.arange(length) < counts[:, None]).astype(np.int32)
        return np.concatenate(parts)[: len(sequences)], mask

    def network(self) -> nnx.Module:
        """The encoder itself."""
        return nnx.merge(self.graphdef, self.params)
