"""What a critic is fine-tuned on: conversations, in training and held-out ones, as batches of arrays.

Which examples make up step `i` follows from the seed and `i`, so a resumed run sees what an uninterrupted one would
have seen, and the step is all the data state there is.
"""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from firm_jax.critic.packing import PackedBatches, measure
from firm_jax.critic.parse import Parsed, parse_alignment, parse_quality
from firm_jax.critic.processing import Processor, Sequence, collate, image_table
from firm_jax.critic.rubric import Rubric, rubrics_from
from firm_jax.data.conversations import Conversation, Conversations, load_conversations
from firm_jax.data.records import MalformedRecord
from firm_jax.embedded import embedded_path
from firm_jax.errors import ConfigError, DataError
from firm_jax.mesh import shard_batch
from firm_jax.shapes import edit_teach, teach
from firm_jax.shapes.conversations import ShapesConversations, ShapesEditConversations

# `data.source` -> the shapes world's examples of that kind, and the rubrics that they answer.
SHAPES = {
    "shapes": (ShapesConversations, teach.RUBRICS),
    "shapes_edits": (ShapesEditConversations, edit_teach.RUBRICS),
}

# On a requirement, at the end of its line; on one of the differences between two pictures, at the end of its clause.
VERDICT = re.compile(r"\b(yes|no|fine|significant|minor)(?=$|;)", re.MULTILINE)
WINDOW = 16  # batches that are sorted by length together
HELD_OUT = 4  # the stream of random numbers that draws held-out examples
AHEAD = 2  # batches that are made while the devices are busy

Examples = ShapesConversations | Conversations


def read_scores(answer: str) -> Parsed:
    """The scores in an answer of any rubric: three in JSON, or one, boxed or in JSON."""
    three = parse_quality(answer)
    return three if three.scores else parse_alignment(answer)


# Sources


@dataclass(frozen=True)
class Some:
    """Some of a source's examples, by their numbers, in that order."""

    examples: Examples
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Conversation:
        return self.examples[int(self.numbers[index])]

    def text_length(self, index: int) -> int:
        """Characters of question and answer."""
        return self.examples.text_length(int(self.numbers[index]))


def rubrics_of(config) -> dict[str, Rubric] | None:
    """The rubrics that the config names or its data were made with; None leaves the choice to the base folder."""
    if config.critic.rubrics:
        return rubrics_from(embedded_path(config.critic.rubrics) or config.critic.rubrics)
    return rubrics_from(SHAPES[config.data.source][1]) if config.data.source in SHAPES else None


def sources(
    config, rubrics: dict[str, Rubric] | None, processor: Processor | None = None, quarantine: Path | None = None
):
    """Examples to train on and held-out ones, by `config.data`.

    processor: the base folder's, by which conversations that are too long are left out; a miniature is made from the
    examples and cannot tell beforehand. quarantine: the JSONL file that receives what is left out.
    """
    data = config.data
    if data.source in SHAPES:
        conversations, _ = SHAPES[data.source]
        options = {"rubrics": rubrics, "seed": config.seed, "samples": data.samples, "share": data.samples_share}
        return (
            conversations(data.examples, stream=0, **options),
            conversations(config.eval.examples, stream=1, **options),
        )
    if not data.source:
        raise ConfigError("data.source is not set: give conversations to train on, a file, a folder or a tfds: name")
    if not 0 <= data.held_out_share < 1 or not (data.held_out or data.held_out_share):
        raise ConfigError(
            f"data.held_out is not set and data.held_out_share is {data.held_out_share}: give a conversation file of "
            "examples that are not trained on, or the share of the examples to keep for that, more than 0 and below 1"
        )
    options = {
        "columns": {part: name for part, name in data.columns.items() if name},
        "image_folder": data.image_folder,
        "max_bad_fraction": data.max_bad_fraction,
    }
    if processor is not None:
        options["check"] = length_check(processor, max(config.train.lengths))
    examples = load_conversations(data.source, quarantine_file=quarantine, **options)
    if data.held_out:
        beside = quarantine and quarantine.with_stem(f"{quarantine.stem}_held_out")
        return examples, load_conversations(data.held_out, quarantine_file=beside, **options)
    return draw_held_out(examples, data.held_out_share, config.seed)


def draw_held_out(examples: Examples, share: float, seed: int) -> tuple[Some, Some]:
    """The examples to train on and a `share` of them, drawn by the seed, that is held out; each at least one."""
    count = len(examples)
    if count < 2:
        raise DataError(f"of {count} example none can be held out; give more, or held-out ones as data.held_out")
    held_out = min(max(1, round(share * count)), count - 1)
    order = np.random.default_rng([seed, HELD_OUT]).permutation(count)
    return Some(examples, np.sort(order[held_out:])), Some(examples, np.sort(order[:held_out]))


def length_check(processor: Processor, longest: int) -> Callable[[Conversation], None]:
    """A check for `load_conversations`: MalformedRecord for a conversation of more than `longest` tokens.

    It is left out then, and never cut: a cut would fall into an image or take the answer's score.
    """

    def check(conversation: Conversation) -> None:
        sizes = [(image.height, image.width) for image in conversation.images]
        tokens = processor.length(sizes, conversation.prompt, conversation.answer)
        if tokens > longest:
            raise MalformedRecord(f"has {tokens} tokens, more than the {longest} that are trained on")

    return check


# Batches


def micro_batches(batch: int, per_device: int, devices: int) -> tuple[int, int]:
    """(A, b): in how many micro-batches of how many rows a batch is worked on; A * b is `batch` or a little more.

    per_device: most rows that a device works on at once. devices: into how many parts a micro-batch is split.
    """
    count = -(-batch // (per_device * devices))
    rows = -(-batch // count)
    return count, rows + -rows % devices


def encode(examples: Examples | Some, processor: Processor, longest: int, index: int) -> Sequence:
    """Example number `index` as arrays; DataError when it has more than `longest` tokens."""
    example = examples[index]
    spans, verdicts = read_scores(example.answer).spans or (), [m.span(1) for m in VERDICT.finditer(example.answer)]
    sequence = processor.sequence(example.images, example.prompt, example.answer, scores=spans, verdicts=verdicts)
    if len(sequence) > longest:
        raise DataError(
            f"example {index} has {len(sequence)} tokens, more than the {longest} of the last of train.lengths; add a "
            f"greater length, shrink the images, or leave the example out"
        )
    return sequence


def stacked(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Micro-batches of one shape as one batch; one without any image gets an empty table like the others'."""
    tables = next(({name: part[name] for name in ("patches", "grids")} for part in parts if "patches" in part), {})
    empty = {name: np.zeros_like(array) for name, array in tables.items()}
    return {name: np.stack([(empty | part)[name] for part in parts]) for name in parts[0].keys() | tables.keys()}


@dataclass(frozen=True)
class Batches:
    """Examples as training batches: `batch_size` of about one length, padded to the next of `lengths`.

    A batch comes as `shape` = (A, b) micro-batches and rows of each, see `micro_batches`: every array has these two
    dimensions first, but for positions [A, 3, b, T]. Rows without an example are padding that nothing is learned from.
    """

    examples: Examples | Some
    processor: Processor
    batch_size: int
    lengths: tuple[int, ...]
    shape: tuple[int, int]
    seed: int

    def __len__(self) -> int:
        """Steps of one pass over the examples; the last of them has what is left."""
        return -(-len(self.examples) // self.batch_size)

    def at(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of one training step; every pass over the examples has an order of its own.

        WINDOW batches are drawn together and sorted by the length of their texts, then taken in random order.
        """
        epoch, place = divmod(step, len(self))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        window, place = divmod(place, WINDOW)
        drawn = order[window * WINDOW * self.batch_size :][: WINDOW * self.batch_size]
        drawn = drawn[np.argsort([self.examples.text_length(int(index)) for index in drawn], kind="stable")]
        batches = [drawn[start : start + self.batch_size] for start in range(0, len(drawn), self.batch_size)]
        turn = np.random.default_rng([self.seed, epoch, window]).permutation(len(batches))[place]
        return self.take(batches[turn])

    def in_order(self) -> Iterator[dict[str, np.ndarray]]:
        """Every example once, by their numbers."""
        for start in range(0, len(self.examples), self.batch_size):
            yield self.take(range(start, min(start + self.batch_size, len(self.examples))))

    def take(self, indices) -> dict[str, np.ndarray]:
        """The arrays of some examples; DataError for one that is longer than the last of `lengths`."""
        numbers = list(map(int, indices))
        one = partial(encode, self.examples, self.processor, max(self.lengths))
        sequences: list[Sequence | None] = list(self._pool.map(one, numbers))
        longest = max(map(len, sequences))
        length = next(length for length in sorted(self.lengths) if length >= longest)
        count, rows = self.shape
        sequences += [None] * (count * rows - len(sequences))
        parts = [sequences[start : start + rows] for start in range(0, count * rows, rows)]
        images = [{image.digest: len(image.patches) for s in part if s for image in s.images} for part in parts]
        least = max(map(len, images)), max((patches for part in images for patches in part.values()), default=0)
        return stacked([self._part(part, length, least) for part in parts])

    def _part(self, sequences: list[Sequence | None], length: int, least: tuple[int, int]) -> dict[str, np.ndarray]:
        table, found = image_table(sequences, multiple=self.shape[1], least=least)
        merged = table["patches"].shape[1] // self.processor.images.merge_size**2
        batch = collate(sequences, found, merged, batch=len(sequences), length=length, side="right")
        return batch | table if found else batch

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count())


@dataclass(frozen=True)
class PackedMicroBatches:
    """`PackedBatches` in micro-batches of `shape` = (A, b): a batch is as many rows, however they are divided."""

    packed: PackedBatches
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.packed)

    def at(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of one training step, as `Batches.at` returns them."""
        count, rows = self.shape
        packs = self.packed.examples_at(step)
        packs += [[]] * (count * rows - len(packs))
        part = replace(self.packed, batch_size=rows)
        return stacked([part.take(packs[start : start + rows]) for start in range(0, count * rows, rows)])


def training_batches(examples, processor: Processor, settings, shape: tuple[int, int], seed: int, progress=iter):
    """The batches of `config.train`: an example a row, or several with `train.packing`.

    Packed rows are as long as the last of `train.lengths`; `progress` wraps the numbers of the examples while they are
    measured.
    """
    lengths = tuple(settings.lengths)
    if not settings.packing:
        return Batches(examples, processor, settings.batch_size, lengths, shape, seed)
    packed = PackedBatches(
        partial(encode, examples, processor, max(lengths)),
        measure(examples, processor, progress),
        batch_size=settings.batch_size,
        length=max(lengths),
        max_images=settings.packed_images,
        merge_size=processor.images.merge_size,
        multiple=shape[1],
        seed=seed,
    )
    return PackedMicroBatches(packed, shape)


def ahead(make: Callable[[int], dict], steps: range) -> Iterator[dict]:
    """`make(step)` for each of the steps, made on another thread while the one before is being used."""
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(make, step) for step in steps[:AHEAD]]
        for place in range(len(steps)):
            yield pending.pop(0).result()
            if place + AHEAD < len(steps):
                pending.append(pool.submit(make, steps[place + AHEAD]))


def on_mesh(batch: dict[str, np.ndarray], mesh) -> dict:
    """A host batch on the mesh, the rows of each micro-batch split over its batch axes."""
    split = shard_batch({name: array for name, array in batch.items() if name != "positions"}, mesh, axis=1)
    return split | {"positions": shard_batch(batch["positions"], mesh, axis=2)}
