"""From images and a text to the arrays that Qwen3-VL takes: patches, token ids and 3-axis positions.

Host work in numpy. Ids equal those of transformers' processor, with one difference on purpose: a prompt's own text is
always text, also where it spells a special token such as `<|image_pad|>`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from firm_jax.data.patches import (
    ImageConfig,
    PatchedImage,
    image_digest,
    patch_image,
    patch_table,
    smart_resize,
    to_pixels,
)
from firm_jax.errors import ConfigError, WeightsError
from firm_jax.models.qwen_text import rope_positions


@dataclass(frozen=True)
class Sequence:
    """One conversation as arrays.

    ids: int32 [T]. positions: int32 [3, T] (time, row, column). image: int32 [T], which of `images` a token stands
    for, -1 for text. patch: int32 [T], which merged patch of that image. next_position: the position of the token
    that would follow. targets: int8 [T], 1 for the tokens of the assistant's turn, 2 for those of its scores, 3 for
    those of its verdicts; None for a prompt.
    """

    ids: np.ndarray
    positions: np.ndarray
    image: np.ndarray
    patch: np.ndarray
    next_position: int
    images: tuple[PatchedImage, ...]
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Processor:
    """Tokenizer and image settings of one Qwen3-VL folder.

    Raises WeightsError when tokenizer.json or the image processor's file is missing, ConfigError when the tokenizer
    lacks a token that the chat template needs.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.images = ImageConfig.from_folder(self.folder)
        file = self.folder / "tokenizer.json"
        if not file.exists():
            raise WeightsError(f"{self.folder} has no tokenizer.json: copy it from the model the folder was made from")
        self.tokenizer = Tokenizer.from_file(str(file))
        self.tokenizer.encode_special_tokens = True  # a user's "<|image_pad|>" is text
        self.turn_start, self.turn_end = self.token_id("<|im_start|>"), self.token_id("<|im_end|>")
        self.vision_start, self.vision_end = self.token_id("<|vision_start|>"), self.token_id("<|vision_end|>")
        self.image_pad = self.token_id("<|image_pad|>")
        self.digits = tuple(self.token_id(digit) for digit in "12345")

    def token_id(self, token: str) -> int:
        """The id of a token; ConfigError when the tokenizer does not know it."""
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ConfigError(
                f"{self.folder / 'tokenizer.json'} has no token {token!r}; it is not a Qwen3-VL tokenizer"
            )
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        """The text of generated tokens, special tokens left out."""
        return self.tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def sequence(
        self, images, text: str, answer: str | None = None, *, scores=(), verdicts=(), patched: dict | None = None
    ) -> Sequence:
        """One user turn (images first, text last, no system prompt) and the opening of the assistant's turn.

        With `answer`, the assistant's turn follows and is what `targets` marks, its end token included; `scores` and
        `verdicts` are the spans [start, end) of the answer's characters that hold them. `patched`: a cache digest ->
        PatchedImage that this call uses and fills, so that a repeated image is resized once.
        """
        images = tuple(self._patch(image, patched) for image in images)
        merge = self.images.merge_size
        grids = [(rows // merge, columns // merge) for rows, columns in (image.grid for image in images)]
        # Token ids, and which image and merged patch each stands for, run by run.
        opening = [self.turn_start, *self.encode("user\n" if images else "user\n" + text)]
        runs: list[int | tuple[int, int]] = [len(opening)]
        ids, image_of, patch_of = list(opening), [-1] * len(opening), [-1] * len(opening)

        def add_text(tokens: list[int]) -> None:
            ids.extend(tokens)
            image_of.extend([-1] * len(tokens))
            patch_of.extend([-1] * len(tokens))
            runs.append(len(tokens))

        for number, grid in enumerate(grids):
            count = grid[0] * grid[1]
            add_text([self.vision_start])
            ids.extend([self.image_pad] * count)
            image_of.extend([number] * count)
            patch_of.extend(range(count))
            runs.append(grid)
            add_text([self.vision_end])
        add_text(
            (self.encode(text) if images else [])
            + [self.turn_end, *self.encode("\n"), self.turn_start, *self.encode("assistant\n")]
        )
        targets = None
        if answer is not None:
            encoding = self.tokenizer.encode(answer, add_special_tokens=False)
            spans = [(2, span) for span in scores] + [(3, span) for span in verdicts]
            marks = [
                max((mark for mark, (a, b) in spans if a < end and start < b), default=1)
                for start, end in encoding.offsets
            ]
            targets = np.array([0] * len(ids) + marks + [1], np.int8)
            add_text([*encoding.ids, self.turn_end])
        positions, following = rope_positions(runs)
        return Sequence(
            ids=np.array(ids, np.int32),
            positions=positions,
            image=np.array(image_of, np.int32),
            patch=np.array(patch_of, np.int32),
            next_position=following,
            images=images,
            targets=targets,
        )

    def length(self, sizes, text: str) -> int:
        """The tokens of `sequence` for images of these (height, width) and a text, without any pixels."""
        patch, merge = self.images.patch_size, self.images.merge_size
        limits = {"min_pixels": self.images.min_pixels, "max_pixels": self.images.max_pixels}
        resized = [smart_resize(*size, factor=patch * merge, **limits) for size in sizes]
        images = sum(2 + height * width // (patch * merge) ** 2 for height, width in resized)
        question = ["user\n", text] if sizes else ["user\n" + text]
        return 3 + images + sum(len(self.encode(part)) for part in (*question, "\n", "assistant\n"))

    def _patch(self, image, patched: dict | None) -> PatchedImage:
        if patched is None:
            return patch_image(image, self.images)
        pixels = to_pixels(image)
        digest = image_digest(pixels)
        if digest not in patched:
            patched[digest] = patch_image(pixels, self.images)
        return patched[digest]


def image_table(sequences: list[Sequence], *, multiple: int = 1) -> tuple[dict, dict[str, int]]:
    """The distinct images of a batch, padded to one bucket, and the row of each by its digest.

    Returns ({"patches": float32 [M, P, C], "grids": int32 [M, 2]}, digest -> row). M is a power of two times
    `multiple`; empty rows have a grid of no patches. Without any image, M is 0.
    """
    return patch_table([image for sequence in sequences for image in sequence.images], multiple=multiple)


def collate(
    sequences: list[Sequence], rows: dict[str, int], merged: int, *, batch: int, length: int, side: str
) -> dict[str, np.ndarray]:
    """Sequences as one batch of fixed shape, padded on the `side` "left" (generation) or "right" (training).

    `rows`: an image's digest -> its row in the image table; `merged`: merged patches a row. Returns ids [B, T],
    positions [3, B, T], segments [B, T] (1 for tokens, 0 for padding), image_index [B, T] (into the flattened table
    of merged patches, -1 for text) and targets [B, T]. Rows beyond the sequences are padding throughout.
    """
    ids = np.zeros((batch, length), np.int32)
    positions = np.zeros((3, batch, length), np.int32)
    segments = np.zeros((batch, length), np.int32)
    image_index = np.full((batch, length), -1, np.int32)
    targets = np.zeros((batch, length), np.int8)
    for row, sequence in enumerate(sequences):
        size = len(sequence)
        place = slice(length - size, length) if side == "left" else slice(0, size)
        ids[row, place] = sequence.ids
        positions[:, row, place] = sequence.positions
        segments[row, place] = 1
        first = np.array([rows[image.digest] * merged for image in sequence.images] + [0])
        image_index[row, place] = np.where(sequence.image >= 0, first[sequence.image] + sequence.patch, -1)
        if sequence.targets is not None:
            targets[row, place] = sequence.targets
    return {
        "ids": ids,
        "positions": positions,
        "segments": segments,
        "image_index": image_index,
        "targets": targets,
    }
