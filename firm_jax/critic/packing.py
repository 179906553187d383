"""Several training examples in one row: less padding, and every batch of one shape.

An example keeps to itself: it has a segment id of its own, positions that were computed before packing, and no token of
it is predicted from the example before. So a packed batch has the loss and the gradients of its examples unpacked.

Examples are packed once, from their sizes and the seed; an epoch is those rows in an order of its own. Which examples
make up step `i` follows from the seed and `i`, so the step is all the data state there is.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import PIL.Image

from firm_jax.critic.processing import Processor, Sequence, collate, image_table
from firm_jax.data.patches import smart_resize
from firm_jax.errors import DataError

WINDOW = 1024  # examples that are packed together


@dataclass(frozen=True)
class Sizes:
    """The room that each of N examples takes: its tokens, its images, and patches of the largest of them; int64 [N]."""

    tokens: np.ndarray
    images: np.ndarray
    patches: np.ndarray


def measure(examples, processor: Processor, progress=iter) -> Sizes:
    """The sizes of all examples (`sft.Batches.examples`), as `Processor.sequence` would lay them out.

    Looks at every example once, several at a time. `progress` wraps the numbers of the examples as they are done.
    """
    patch, factor = processor.images.patch_size, processor.images.patch_size * processor.images.merge_size
    limits = {"min_pixels": processor.images.min_pixels, "max_pixels": processor.images.max_pixels}

    def size(index: int) -> tuple[int, int, int]:
        example = examples[index]
        shapes = [
            (image.height, image.width) if isinstance(image, PIL.Image.Image) else np.shape(image)[:2]
            for image in example.images
        ]
        resized = [smart_resize(*shape, factor=factor, **limits) for shape in shapes]
        patches = max((height * width // patch**2 for height, width in resized), default=0)
        return processor.length(shapes, example.prompt, example.answer), len(shapes), patches

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(size, range(len(examples)))
        table = [next(found) for _ in progress(range(len(examples)))]
    return Sizes(*np.array(table, np.int64).reshape(-1, 3).T)


def pack(tokens: np.ndarray, images: np.ndarray, *, length: int, max_images: int) -> list[list[int]]:
    """Examples as rows of at most `length` tokens and `max_images` images: first fit, the longest example first.

    tokens, images [N], none above what a row holds. Returns the examples' numbers, each in one row; no two rows would
    fit into one.
    """
    rows: list[list[int]] = []
    tokens_left, images_left = (np.zeros(len(tokens), np.int64) for _ in range(2))
    for example in np.argsort(-tokens, kind="stable"):
        count = len(rows)
        fits = (tokens_left[:count] >= tokens[example]) & (images_left[:count] >= images[example])
        row = int(fits.argmax()) if fits.any() else count
        if row == count:
            rows.append([])
            tokens_left[row], images_left[row] = length, max_images
        rows[row].append(int(example))
        tokens_left[row] -= tokens[example]
        images_left[row] -= images[example]
    return rows


def collate_packed(
    packs: list[list[Sequence]], rows: dict[str, int], merged: int, *, length: int
) -> dict[str, np.ndarray]:
    """What `collate` returns, with all sequences of a pack in one row [B, `length`], one behind the other.

    segments count 1, 2, ... along a row and are 0 for padding. positions are the sequences' own. An empty pack is a row
    of padding.
    """
    flat = [sequence for pack in packs for sequence in pack]
    longest = max(map(len, flat), default=0)
    single = collate(flat, rows, merged, batch=len(flat), length=longest, side="right")
    batch = {name: np.zeros((*array.shape[:-2], len(packs), length), array.dtype) for name, array in single.items()}
    batch["image_index"][:] = -1
    number = 0
    for row, pack in enumerate(packs):
        start = 0
        for segment, sequence in enumerate(pack, 1):
            place = slice(start, start + len(sequence))
            for name, array in single.items():
                batch[name][..., row, place] = array[..., number, : len(sequence)]
            batch["segments"][row, place] = segment
            batch["targets"][row, start] = 0  # a first token is predicted from nothing, here as in a row of its own
            start, number = place.stop, number + 1
    return batch


@dataclass(frozen=True)
class PackedBatches:
    """Examples as training batches of `batch_size` rows that are `length` tokens long and hold several examples each.

    Every batch has the same shapes (one without any image has no table of them). The last of an epoch is filled up with
    rows of padding, so that an epoch shows each example once.

    encode: an example's number -> its Sequence. sizes: what `measure` returns. max_images: images a row.
    merge_size: `ImageConfig.merge_size`. multiple: the image table's rows are a power of two times it.

    Raises DataError for an example that does not fit into a row: it is never split.
    """

    encode: Callable[[int], Sequence]
    sizes: Sizes
    batch_size: int
    length: int
    max_images: int
    merge_size: int
    multiple: int
    seed: int

    def __post_init__(self):
        if not len(self.sizes.tokens):
            raise DataError("there are no examples to pack")
        for sizes, limit, what, remedy in (
            (self.sizes.tokens, self.length, "tokens", "make the rows longer, shrink the images"),
            (self.sizes.images, self.max_images, "images", "allow more images a row"),
        ):
            over = np.flatnonzero(sizes > limit)
            if len(over):
                raise DataError(
                    f"{len(over)} of {len(sizes)} examples do not fit into a row; example {over[0]} has "
                    f"{sizes[over[0]]} {what}, more than its {limit}: {remedy}, or leave them out"
                )

    def __len__(self) -> int:
        """Steps an epoch."""
        return -(-len(self.packs) // self.batch_size)

    @cached_property
    def packs(self) -> list[list[int]]:
        """The rows of an epoch: the numbers of the examples in each."""
        order = np.random.default_rng(self.seed).permutation(len(self.sizes.tokens))
        packs = []
        for start in range(0, len(order), WINDOW):
            drawn = order[start : start + WINDOW]
            tokens, images = self.sizes.tokens[drawn], self.sizes.images[drawn]
            rows = pack(tokens, images, length=self.length, max_images=self.max_images)
            packs += [drawn[row].tolist() for row in rows]
        return packs

    @property
    def efficiency(self) -> float:
        """The share of an epoch's tokens that are not padding, in (0, 1]."""
        return float(self.sizes.tokens.sum() / (len(self) * self.batch_size * self.length))

    def examples_at(self, step: int) -> list[list[int]]:
        """The numbers of the examples in each row of one step; the rows of an epoch come in an order of its own."""
        epoch, place = divmod(step, len(self))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.packs))
        taken = [self.packs[row] for row in order[place * self.batch_size :][: self.batch_size]]
        return taken + [[]] * (self.batch_size - len(taken))

    def at(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of one training step, as `sft_loss` takes them."""
        return self.take(self.examples_at(step))

    def take(self, packs: list[list[int]]) -> dict[str, np.ndarray]:
        """The arrays of some rows; DataError for an example that is no longer as long as it was measured."""
        encoded = [[self._encode(index) for index in pack] for pack in packs]
        least = (self.batch_size * self.max_images, int(self.sizes.patches.max()))
        sequences = [sequence for pack in encoded for sequence in pack]
        table, rows = image_table(sequences, multiple=self.multiple, least=least)
        merged = table["patches"].shape[1] // self.merge_size**2
        batch = collate_packed(encoded, rows, merged, length=self.length)
        return batch | table if rows else batch

    def _encode(self, index: int) -> Sequence:
        sequence = self.encode(index)
        if len(sequence) != self.sizes.tokens[index]:
            raise DataError(
                f"example {index} has {len(sequence)} tokens and was measured with {self.sizes.tokens[index]}: the "
                f"data or the processor changed since; start again"
            )
        return sequence
