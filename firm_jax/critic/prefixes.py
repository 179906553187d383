"""Which tokens of a list of requests are read in which row of which program, so that what requests share is read once.

Many requests begin alike: all candidates of an edit with the picture that was edited, and all criteria that judge a
picture with that picture too. Such a prefix is read in a row of its own, and its keys and values are copied into the
rows of all that go on from it. There are two levels of prefixes: `GROUP`, up to the last picture but one, and
`PICTURE`, up to the last. Requests whose prefixes are equal are neighbours, and rows of the first level, which all
candidates go on from, are handed from batch to batch while they are needed. Rows of the second level, which a few
criteria go on from, are not: where a border between batches cuts them apart, they are read on both sides.

The requests are cut into one run of neighbours for each part of a mesh, and each part reads the prefixes of its own
requests: no keys and values ever move between devices. A group that is cut is read on both sides, in a row that would
mostly have been padding.

Rows and tokens are padded, and how much decides whether a level pays: the levels are chosen by counting. With the sizes
of Qwen3-VL 8B, pictures of 512 x 512 and batches of 64, judging 24 groups of 12 edits by two criteria takes 0.63 of the
operations that it takes to read every request whole, vision tower and padding included (0.70 with GROUP alone, 0.76
with PICTURE alone), and judging 48 groups of 16 generated pictures 0.88.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from firm_jax.critic.processing import Sequence
from firm_jax.data.patches import bucket, power_of_two

GROUP, PICTURE = range(2)
CHOICES = ((), (GROUP,), (PICTURE,), (GROUP, PICTURE))  # of levels
PASS = 1 / 16  # what each level has to save of the tokens: it reads all weights once more
SHORTEST = 16  # tokens that a row is padded to at least


@dataclass(frozen=True)
class Stage:
    """What one program reads, in equally many rows on every part of the mesh.

    pieces: what the rows of each part of the mesh read; those beyond are padding. parents [parts of the mesh, rows]
    int32: the row of the level before, counted on the same part, that each goes on from, -1 where it begins. length:
    tokens a row, padded on the left.
    """

    pieces: tuple[tuple[Sequence, ...], ...]
    parents: np.ndarray
    length: int

    @property
    def rows(self) -> list[Sequence | None]:
        """All rows in order, None for padding."""
        width = self.parents.shape[1]
        return [row for own in self.pieces for row in (*own, *[None] * (width - len(own)))]

    @property
    def tokens(self) -> int:
        """Run through the model, padding included."""
        return self.parents.size * self.length


@dataclass(frozen=True)
class Batch:
    """Requests that are decoded together.

    requests: for each part of the mesh the indices of its requests, in the order of its rows. prefixes: by level, in
    order. own: what is left of the requests. kept [parts of the mesh, rows] int32: the rows of GROUP that the next
    batch goes on with, counted through those that this one was handed and then those that it read; -1 is padding, and
    there may be no rows.
    """

    requests: tuple[tuple[int, ...], ...]
    prefixes: dict[int, Stage]
    own: Stage
    kept: np.ndarray

    @property
    def tokens(self) -> int:
        """Run through the model, padding included."""
        return sum(stage.tokens for stage in (*self.prefixes.values(), self.own))


@dataclass(frozen=True)
class _Prefix:
    """Up to where a request's prefix goes, 0 where it has none, and what makes it equal to another's."""

    stop: int
    key: tuple


def plan_batches(sequences: list[Sequence], parts: int, rows: int, choices=CHOICES) -> list[Batch]:
    """The batches that generate for the sequences, with those levels of `choices` that leave the fewest tokens to run.

    parts: of the mesh, into which a batch is split. rows: of requests, a power of two, that each takes at most.
    """
    prefixes = [(_prefix(sequence, 1), _prefix(sequence, 0)) for sequence in sequences]
    first: dict[tuple, int] = {}
    for index, levels in enumerate(prefixes):
        for prefix in levels:
            first.setdefault(prefix.key, index)
    order = sorted(range(len(sequences)), key=lambda index: [first[prefix.key] for prefix in prefixes[index]])
    shares = [share.tolist() for share in np.array_split(np.array(order, int), parts)]
    plans = {levels: list(_batches(sequences, prefixes, shares, rows, levels)) for levels in choices}
    return plans[min(plans, key=lambda levels: (1 + PASS * len(levels)) * sum(batch.tokens for batch in plans[levels]))]


def _prefix(sequence: Sequence, left: int) -> _Prefix:
    """Through the last image but `left`, with the token that marks its end."""
    shown = len(sequence.images) - left
    if shown < 1:
        return _Prefix(0, ())
    stop = int(np.flatnonzero(sequence.image == shown - 1)[-1]) + 2
    return _Prefix(stop, (sequence.ids[:stop].tobytes(), *(image.digest for image in sequence.images[:shown])))


def _batches(sequences, prefixes, shares, rows, levels) -> Iterator[Batch]:
    handed: list[list] = [[] for _ in shares]  # keys of the rows of GROUP that each part has from the batch before
    for start in range(0, len(shares[0]), rows):
        requests, later = (tuple(tuple(share[at : at + rows]) for share in shares) for at in (start, start + rows))
        row = {index: -1 for own in requests for index in own}  # of the level before, that a request goes on from
        stop = dict.fromkeys(row, 0)  # up to where it is read by then
        stages, kept = {}, _table([[] for _ in shares], bucket)
        for level in levels:
            prefix = {index: prefixes[index][level] for index in row}
            longest = max(prefix[index].stop - stop[index] for index in row)
            if longest == 0:
                continue
            tables = handed if level == GROUP else [[] for _ in shares]
            unread = [_unread(own, prefix, table) for own, table in zip(requests, tables, strict=True)]
            pieces = [[sequences[index].part(stop[index], prefix[index].stop) for index in own] for own in unread]
            parents = [[row[index] for index in own] for own in unread]
            stages[level] = _stage(pieces, parents, longest, bucket)
            for own, new, table in zip(requests, unread, tables, strict=True):
                table += [prefix[index].key for index in new]
                row |= {index: table.index(prefix[index].key) for index in own if prefix[index].stop}
            stop |= {index: prefix[index].stop for index in row}
            if level == GROUP:
                handed, kept = _handed(tables, [[prefixes[index][GROUP].key for index in own] for own in later])
        pieces = [[sequences[index].part(stop[index], len(sequences[index])) for index in own] for own in requests]
        parents = [[row[index] for index in own] for own in requests]
        longest = max(len(piece) for own in pieces for piece in own)
        yield Batch(requests, stages, _stage(pieces, parents, longest, power_of_two), kept)


def _unread(own: tuple[int, ...], prefix: dict[int, _Prefix], table: list) -> list[int]:
    """The first request with each of the prefixes that are not in the table."""
    found: dict[tuple, int] = {}
    for index in own:
        if prefix[index].stop and prefix[index].key not in table:
            found.setdefault(prefix[index].key, index)
    return list(found.values())


def _handed(tables: list[list], wanted: list[list]) -> tuple[list[list], np.ndarray]:
    """What the next batch wants of each part's table: the keys, None for padding, and their rows."""
    keys = [[key for key in dict.fromkeys(own) if key in table] for own, table in zip(wanted, tables, strict=True)]
    kept = _table([[table.index(key) for key in own] for own, table in zip(keys, tables, strict=True)], bucket)
    return [own + [None] * (kept.shape[1] - len(own)) for own in keys], kept


def _stage(pieces: list[list[Sequence]], parents: list[list[int]], longest: int, padded) -> Stage:
    return Stage(tuple(map(tuple, pieces)), _table(parents, padded), bucket(longest, SHORTEST))


def _table(rows: list[list[int]], padded) -> np.ndarray:
    """Rows for each part of the mesh, to equal number, -1 for padding."""
    most = max(map(len, rows))
    table = np.full((len(rows), padded(most) if most else 0), -1, np.int32)
    for own, numbers in zip(table, rows, strict=True):
        own[: len(numbers)] = numbers
    return table
