"""From images and a text to the arrays that Qwen3-VL takes: patches, token ids and 3-axis positions.

Host work in numpy. Ids equal those of transformers' processor, with one difference on purpose: a prompt's own text is
always text, also where it spells a special token such as `<|image_pad|>`.
"""

from dataclasses import dataclass, replace
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

    def followed_by(self, ids) -> "Sequence":
        """The prompt with more tokens of text behind it."""
        count = len(ids)
        text = np.full(count, -1, np.int32)
        following = np.broadcast_to(
            np.arange(self.next_position, self.next_position + count, dtype=np.int32), (3, count)
        )
        return replace(
            self,
            ids=np.concatenate([self.ids, np.asarray(ids, np.int32)]),
            positions=np.concatenate([self.positions, following], axis=1),
            image=np.concatenate([self.image, text]),
            patch=np.concatenate([self.patch, text]),
            next_position=self.next_position + count,
        )

    def part(self, start: int, stop: int) -> "Sequence":
        """The prompt's tokens from `start` to `stop`, with those images that they stand for."""
        place = slice(start, stop)
        shown, image = np.unique(self.image[place], return_inverse=True)
        text = shown < 0
        return replace(
            self,
            ids=self.ids[place],
            positions=self.positions[:, place],
            image=image.astype(np.int32) - int(text.any()),
            patch=self.patch[place],
            images=tuple(self.images[number] for number in shown[~text]),
        )


def lay_out(parts: list[list[int] | PatchedImage], image_token: int, merge: int) -> Sequence:
    """Token ids and images in turn as one prompt; an image takes a token for each `merge` x `merge` of its patches."""
    ids, image_of, patch_of, runs, images = [], [], [], [], []
    for part in parts:
        if isinstance(part, PatchedImage):
            rows, columns = (size // merge for size in part.grid)
            runs.append((rows, columns))
            ids += [image_token] * (rows * columns)
            image_of += [len(images)] * (rows * columns)
            patch_of += range(rows * columns)
            images.append(part)
        else:
            runs.append(len(part))
            ids += part
            image_of += [-1] * len(part)
            patch_of += [-1] * len(part)
    positions, following = rope_positions(runs)
    ids, image, patch = (np.array(values, np.int32) for values in (ids, image_of, patch_of))
    return Sequence(ids, positions, image, patch, following, tuple(images))


class Processor:
    """Tokenizer and image settings of one Qwen3-VL folder; `max_pixels` in the place of the folder's limit.

    Raises WeightsError when tokenizer.json or the image processor's file is missing, ConfigError when the tokenizer
    lacks a token that the chat template needs.
    """

    def __init__(self, folder: Path, max_pixels: int | None = None):
        self.folder = Path(folder)
        self.images = ImageConfig.from_folder(self.folder)
        if max_pixels is not None:
            if max_pixels < self.images.min_pixels:
                raise ConfigError(
                    f"data.max_pixels = {max_pixels} is below the {self.images.min_pixels} pixels that {self.folder} "
                    "enlarges every image to"
                )
            self.images = replace(self.images, max_pixels=max_pixels)
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
        `verdicts` are the spans [start, end) of the answer's characters that hold them. An image may be
        cut into patches already. `patched`: a cache digest -> PatchedImage that this call uses and fills, so that a
        repeated image is resized once.
        """
        images = [self._patch(image, patched) for image in images]
        parts: list = [[self.turn_start, *self.encode("user\n" if images else "user\n" + text)]]
        for image in images:
            parts += [[self.vision_start], image, [self.vision_end]]
        question = self.encode(text) if images else []
        parts.append([*question, self.turn_end, *self.encode("\n"), self.turn_start, *self.encode("assistant\n")])
        if answer is None:
            return lay_out(parts, self.image_pad, self.images.merge_size)
        encoding = self.tokenizer.encode(answer, add_special_tokens=False)
        spans = [(2, span) for span in scores] + [(3, span) for span in verdicts]
        marks = [
            max((mark for mark, (a, b) in spans if a < end and start < b), default=1) for start, end in encoding.offsets
        ]
        parts.append([*encoding.ids, self.turn_end])
        whole = lay_out(parts, self.image_pad, self.images.merge_size)
        return replace(whole, targets=np.array([0] * (len(whole) - len(marks) - 1) + marks + [1], np.int8))

    def conversation(self, turns: list[tuple[str, list[str | PatchedImage]]]) -> Sequence:
        """Turns (role, texts and images in their order) and the opening of the assistant's turn."""
        parts: list = []
        for role, content in turns:
            text = role + "\n"
            parts.append([self.turn_start])
            for part in content:
                if isinstance(part, str):
                    text += part
                else:
                    parts += [[*self.encode(text), self.vision_start], part, [self.vision_end]]
                    text = ""
            parts.append([*self.encode(text), self.turn_end, *self.encode("\n")])
        parts.append([self.turn_start, *self.encode("assistant\n")])
        return lay_out(parts, self.image_pad, self.images.merge_size)

    def length(self, sizes, text: str, answer: str | None = None) -> int:
        """The tokens of `sequence` for images of these (height, width), a text and an answer, without any pixels."""
        patch, merge = self.images.patch_size, self.images.merge_size
        limits = {"min_pixels": self.images.min_pixels, "max_pixels": self.images.max_pixels}
        resized = [smart_resize(*size, factor=patch * merge, **limits) for size in sizes]
        images = sum(2 + height * width // (patch * merge) ** 2 for height, width in resized)
        question = ["user\n", text] if sizes else ["user\n" + text]
        answered = 0 if answer is None else len(self.encode(answer)) + 1
        return 3 + images + sum(len(self.encode(part)) for part in (*question, "\n", "assistant\n")) + answered

    def _patch(self, image, patched: dict | None) -> PatchedImage:
        if isinstance(image, PatchedImage):
            return image
        if patched is None:
            return patch_image(image, self.images)
        pixels = to_pixels(image)
        digest = image_digest(pixels)
        if digest not in patched:
            patched[digest] = patch_image(pixels, self.images)
        return patched[digest]


def image_table(
    sequences: list[Sequence | None], *, multiple: int = 1, least: tuple[int, int] = (0, 0)
) -> tuple[dict, dict[str, int]]:
    """The distinct images of a batch, padded to one bucket, and the row of each by its digest; a None has none.

    least: (images, patches an image) that the table has room for in any case.

    Returns ({"patches": float32 [M, P, C], "grids": int32 [M, 2]}, digest -> row). M is a power of two times
    `multiple`; empty rows have a grid of no patches. Without any image, M is 0.
    """
    shown = [image for sequence in sequences if sequence is not None for image in sequence.images]
    return patch_table(shown, multiple=multiple, least=least)


def collate(
    sequences: list[Sequence | None], rows: dict[str, int], merged: int, *, batch: int, length: int, side: str
) -> dict[str, np.ndarray]:
    """Sequences as one batch of fixed shape, padded on the `side` "left" (generation) or "right" (training).

    `rows`: an image's digest -> its row in the image table; `merged`: merged patches a row. Returns ids [B, T],
    positions [3, B, T], segments [B, T] (1 for tokens, 0 for padding), image_index [B, T] (into the flattened table
    of merged patches, -1 for text) and targets [B, T]. Rows beyond the sequences, and those of a None, are padding
    throughout.
    """
    ids = np.zeros((batch, length), np.int32)
    positions = np.zeros((3, batch, length), np.int32)
    segments = np.zeros((batch, length), np.int32)
    image_index = np.full((batch, length), -1, np.int32)
    targets = np.zeros((batch, length), np.int8)
    for row, sequence in enumerate(sequences):
        if sequence is None:
            continue
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
