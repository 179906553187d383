"""From images and a text to the arrays that Qwen3-VL takes: resizing, patches, token ids and 3-axis positions.

Host work in numpy and Pillow. Numbers and ids equal those of transformers' processor (Pillow backend), with one
difference on purpose: a prompt's own text is always text, also where it spells a special token such as
`<|image_pad|>`.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from tokenizers import Tokenizer

from firm_jax.data.images import from_array
from firm_jax.errors import ConfigError, DataError, WeightsError
from firm_jax.interop.files import read_json
from firm_jax.models.qwen_text import rope_positions

MAX_ASPECT = 200


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) an image is resized to: multiples of `factor`, near the aspect, within the pixel limits.

    Rounds halves to even, as Qwen's reference does. Raises DataError for a side more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise DataError(f"an image of {width}x{height} pixels is too narrow: the sides may differ {MAX_ASPECT} times")
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif tall * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        tall = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return tall, wide


@dataclass(frozen=True)
class ImageConfig:
    """What an image processor's JSON says: patch geometry, pixel limits and normalisation."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float = 1 / 255
    resample: int = int(PIL.Image.Resampling.BICUBIC)

    @classmethod
    def from_folder(cls, folder: Path) -> "ImageConfig":
        """Read processor_config.json or preprocessor_config.json, with old (`min_pixels`) or new (`size`) limits.

        Raises WeightsError when neither file is there or readable, ConfigError for a setting that is not supported.
        """
        return cls.from_json(*_image_processor_json(Path(folder)))

    @classmethod
    def from_json(cls, raw: Mapping, where: str | Path) -> "ImageConfig":
        """The settings in such a file; `where` stands in the errors."""
        for switch in ("do_resize", "do_rescale", "do_normalize"):
            if raw.get(switch, True) is not True:
                raise ConfigError(f"{where}: {switch}={raw[switch]!r} is not supported; it must be true")
        size = raw.get("size") or {}

        def need(value, name: str):
            if value is None:
                raise ConfigError(f"{where} lacks {name}")
            return value

        return cls(
            patch_size=need(raw.get("patch_size"), "patch_size"),
            temporal_patch_size=need(raw.get("temporal_patch_size"), "temporal_patch_size"),
            merge_size=need(raw.get("merge_size"), "merge_size"),
            min_pixels=need(raw.get("min_pixels") or size.get("shortest_edge"), "min_pixels (or size.shortest_edge)"),
            max_pixels=need(raw.get("max_pixels") or size.get("longest_edge"), "max_pixels (or size.longest_edge)"),
            mean=tuple(need(raw.get("image_mean"), "image_mean")),
            std=tuple(need(raw.get("image_std"), "image_std")),
            rescale=raw.get("rescale_factor", 1 / 255),
            resample=raw.get("resample", int(PIL.Image.Resampling.BICUBIC)),
        )


def _image_processor_json(folder: Path) -> tuple[dict, Path]:
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        file = folder / name
        if not file.exists():
            continue
        raw = read_json(file)
        raw = raw.get(key) if key else raw
        if raw:
            return raw, file
    raise WeightsError(
        f"{folder} has no image processor: expected preprocessor_config.json, or processor_config.json with a section "
        f"image_processor. Copy it from the model that the folder was made from."
    )


@dataclass(frozen=True)
class PatchedImage:
    """One image as the vision tower takes it.

    patches: float32 [rows * columns, channels * frames * patch * patch], in blocks of merge x merge patches.
    grid: (rows, columns) in patches. digest: sha256 of the pixels before resizing, which names equal images.
    """

    patches: np.ndarray
    grid: tuple[int, int]
    digest: str


def to_pixels(image) -> np.ndarray:
    """A Pillow image, or an array [H, W, 3] (uint8, or float in [0, 1]), as uint8 [H, W, 3].

    DataError for any other array.
    """
    if isinstance(image, PIL.Image.Image):
        return np.asarray(image.convert("RGB"))
    try:
        pixels = np.asarray(image)
    except ValueError as error:
        raise DataError("an image is neither a Pillow image nor an array [H, W, 3]") from error
    return pixels if pixels.dtype == np.uint8 and pixels.shape[2:] == (3,) else np.asarray(from_array(pixels))


def image_digest(pixels: np.ndarray) -> str:
    """sha256 over the shape and the bytes of uint8 pixels [H, W, 3]."""
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def patch_image(image, config: ImageConfig) -> PatchedImage:
    """Resize, normalise and cut one image (as `to_pixels` takes it) into patches.

    The patch vector runs over (channel, frame, row, column); a still image repeats over the frames.
    """
    pixels = to_pixels(image)
    patch, merge = config.patch_size, config.merge_size
    height, width = smart_resize(
        *pixels.shape[:2], factor=patch * merge, min_pixels=config.min_pixels, max_pixels=config.max_pixels
    )
    resized = PIL.Image.fromarray(pixels).resize((width, height), resample=PIL.Image.Resampling(config.resample))
    values = (np.asarray(resized, np.float64) * config.rescale).astype(np.float32)
    values = (values - np.float32(config.mean)) / np.float32(config.std)
    rows, columns = height // patch, width // patch
    blocks = values.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # block row, block column, row, column, channel, y, x
    still = np.repeat(blocks[:, :, :, :, :, None], config.temporal_patch_size, axis=5)
    return PatchedImage(still.reshape(rows * columns, -1), (rows, columns), image_digest(pixels))


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


def bucket(size: int, smallest: int = 1) -> int:
    """The fixed length that `size` is padded to: 4, 5, 6 or 7 times a power of two, never below `smallest`.

    Few sizes, so few programs to compile, and never more than a quarter of the work on padding.
    """
    size = max(size, smallest)
    if size <= 4:
        return size
    step = 2 ** (math.floor(math.log2(size)) - 2)
    return math.ceil(size / step) * step


def image_table(sequences: list[Sequence], *, multiple: int = 1) -> tuple[dict, dict[str, int]]:
    """The distinct images of a batch, padded to one bucket, and the row of each by its digest.

    Returns ({"patches": float32 [M, P, C], "grids": int32 [M, 2]}, digest -> row). M is a power of two times
    `multiple`; empty rows have a grid of no patches. Without any image, M is 0.
    """
    distinct = {image.digest: image for sequence in sequences for image in sequence.images}
    if not distinct:
        return {"patches": np.zeros((0, 0, 0), np.float32), "grids": np.zeros((0, 2), np.int32)}, {}
    count, length = padded(len(distinct), max(len(image.patches) for image in distinct.values()), multiple)
    patches = np.zeros((count, length, next(iter(distinct.values())).patches.shape[1]), np.float32)
    grids = np.zeros((count, 2), np.int32)
    for row, image in enumerate(distinct.values()):
        patches[row, : len(image.patches)] = image.patches
        grids[row] = image.grid
    return {"patches": patches, "grids": grids}, {digest: row for row, digest in enumerate(distinct)}


def padded(rows: int, length: int, multiple: int) -> tuple[int, int]:
    """The shape that `rows` images of up to `length` patches, or prompts of up to `length` tokens, are padded to."""
    return power_of_two(rows, multiple), bucket(length, smallest=64)


def power_of_two(count: int, multiple: int = 1) -> int:
    """The smallest power of two times `multiple` that is not below `count`."""
    size = multiple
    while size < count:
        size *= 2
    return size


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
