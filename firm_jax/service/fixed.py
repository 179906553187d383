"""Greedy answers in batches of a few fixed shapes.

A question alone decides the shape of its batch, and every batch of a shape has the same rows, so nothing is compiled
for a mixture of questions, and no question meets other programs in company than alone. So that this holds, rows that
have ended stay in the batch, and what questions share is read once for each: the price is tokens that are computed and
not used.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from firm_jax.critic.decode import (
    CHUNK,
    NOTHING,
    Decoder,
    Generation,
    decode_chunk,
    embed,
    encode_images,
    prefill,
    shard_positions,
)
from firm_jax.critic.processing import Sequence, collate, image_table
from firm_jax.data.patches import power_of_two
from firm_jax.mesh import on_mesh, shard_batch, to_host

SHORTEST = 64  # tokens or patches that are padded to at least


@dataclass(frozen=True)
class Shape:
    """tokens: of a prompt. images: of a prompt. patches: of an image. likely: alternatives told of each token."""

    tokens: int
    images: int
    patches: int
    likely: int


@dataclass(frozen=True)
class Likely:
    """Of each written token: the logarithm of its probability [T], and the most probable tokens [T, likely] in its
    place with theirs [T, likely]."""

    own: np.ndarray
    ids: np.ndarray
    best: np.ndarray


class FixedDecoder:
    """Answers of one `Decoder`'s model, always `rows` at once, none longer than `new_tokens`."""

    def __init__(self, decoder: Decoder, rows: int, new_tokens: int):
        self.decoder, self.rows = decoder, power_of_two(rows, decoder.multiple)
        self.room = -(-new_tokens // CHUNK) * CHUNK

    def shape(self, prompt: Sequence, likely: int = 0) -> Shape:
        """Of the batches in which a prompt is answered."""
        patches = max((len(image.patches) for image in prompt.images), default=0)
        return Shape(_step(len(prompt)), len(prompt.images), _step(patches) if patches else 0, likely)

    def write(self, shape: Shape, prompts: list[Sequence]) -> Iterator[tuple[np.ndarray, ...]]:
        """What up to `rows` prompts of a shape are answered, a chunk at a time, until all have ended or have no room.

        Yields tokens [prompts, CHUNK], NOTHING behind an end; the digits' logits, and where `shape.likely` asks for
        them, logarithms of probabilities, as `decode_chunk` returns them.
        """
        decoder = self.decoder
        rules, weights = decoder.rules, (decoder.graphdef, decoder.params)
        with on_mesh(decoder.mesh):
            state = self._read(shape, prompts)
        for _ in range(self.room // CHUNK):
            with on_mesh(decoder.mesh):
                state, *written = decode_chunk(*weights, state, rules=rules, steps=CHUNK, likely=shape.likely)
                *written, ended = to_host((*written, state["ended"]))
            yield tuple(array[: len(prompts)] for array in written)
            if ended.all():
                return

    def _read(self, shape: Shape, prompts: list[Sequence]) -> dict:
        """The decoding state behind the prompts."""
        decoder = self.decoder
        rows = [*prompts, *[None] * (self.rows - len(prompts))]
        least = (self.rows * shape.images, shape.patches)
        table, place = image_table(rows, multiple=decoder.multiple, least=least)
        vision, merged = None, 0
        if place:
            merged = table["patches"].shape[1] // decoder.merge**2
            vision = encode_images(decoder.graphdef, decoder.params, shard_batch(table, decoder.mesh))
        host = collate(rows, place, merged, batch=self.rows, length=shape.tokens, side="left")
        arrays = shard_batch({name: host[name] for name in ("ids", "segments", "image_index")}, decoder.mesh)
        read = embed(decoder.graphdef, decoder.params, arrays["ids"], arrays["image_index"], vision)
        following = np.array([0 if row is None else row.next_position for row in rows], np.int32)
        given = (*read, shard_positions(host["positions"], decoder.mesh), arrays["segments"], None, None)
        following = shard_batch(following, decoder.mesh)
        return prefill(decoder.graphdef, decoder.params, *given, following, new_slots=self.room)


class Writing:
    """One row's answer while it is written, ended by its own end token or its own limit."""

    def __init__(self, ends: tuple[int, ...], limit: int):
        self.ends, self.limit = ends, limit
        self._chunks: list[tuple[np.ndarray, ...]] = []
        self._length = 0

    def add(self, written: tuple[np.ndarray, ...]) -> tuple[Generation, Likely | None] | None:
        """Take a chunk of this row; the answer, once it is whole."""
        self._chunks.append(written)
        self._length += len(written[0])
        ended = np.isin(written[0], (*self.ends, NOTHING)).any()
        if not ended and self._length < self.limit:
            return None
        tokens, digits, *likely = (np.concatenate(parts)[: self.limit] for parts in zip(*self._chunks, strict=True))
        ends = np.flatnonzero(np.isin(tokens, self.ends))
        length = ends[0] if len(ends) else len(tokens)
        generation = Generation(tokens[:length], digits[:length], "stop" if len(ends) else "length")
        return generation, Likely(*(part[:length] for part in likely)) if likely else None


def _step(size: int) -> int:
    """The smallest of 64, 96, 128, 192, 256, ... that holds `size`: at most half is padding, mostly a fifth."""
    whole = power_of_two(max(size, SHORTEST))
    return whole * 3 // 4 if size <= whole * 3 // 4 and whole > SHORTEST else whole
