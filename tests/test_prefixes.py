"""What requests share is read once: the plan of rows by itself. That answers stay the same is in test_critic.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firm_jax.critic.prefixes import CHOICES, GROUP, PICTURE, plan_batches
from firm_jax.critic.processing import lay_out
from firm_jax.data.patches import PatchedImage, power_of_two

OPENING, START, END, PAD, CLOSING = [1, 2, 3], [4], [5], 6, [7, 8]


def prompt(shown, text):
    """A request that shows images, given as (name, rows, columns) in patches, and asks a text."""
    parts = [OPENING]
    for name, *grid in shown:
        parts += [START, PatchedImage(np.zeros((grid[0] * grid[1], 1), np.float32), tuple(grid), name), END]
    return lay_out([*parts, [*text, *CLOSING]], PAD, 2)


def edits(groups, candidates, texts=((9,) * 70, (10,) * 90), side=16):
    """Criterion by criterion, as the job asks: each group's source and one of its candidates."""
    return [
        prompt([(f"source {g}", side, side), (f"candidate {g} {c}", side, side)], text)
        for text in texts
        for g in range(groups)
        for c in range(candidates)
    ]


# Few of them, so that images, whole prompts and mere beginnings are shared.
IMAGES = st.sampled_from([("a", 4, 6), ("b", 2, 2), ("c", 12, 10), ("d", 4, 6)])
REQUESTS = st.lists(
    st.tuples(st.lists(IMAGES, max_size=3), st.lists(st.integers(9, 10), max_size=30)), min_size=1, max_size=40
)


def walk(batches, parts):
    """What every request is read from, in order: (index, its pieces); holds the tables as the devices do."""
    handed = [[] for _ in range(parts)]
    for batch in batches:
        tables = [[] for _ in range(parts)]
        for level, stage in batch.prefixes.items():
            read = [rows_of(stage, part, tables[part]) for part in range(parts)]
            tables = [a + b for a, b in zip(handed, read, strict=True)] if level == GROUP else read
            if level == GROUP:
                assert stage.length >= max(sum(map(len, row)) for table in tables for row in table if row)
                handed = [
                    [tables[part][row] if row >= 0 else None for row in rows] for part, rows in enumerate(batch.kept)
                ]
        if GROUP not in batch.prefixes:
            assert batch.kept.size == 0
        for part, own in enumerate(batch.requests):
            yield from zip(own, rows_of(batch.own, part, tables[part]), strict=False)


def rows_of(stage, part, table):
    """The pieces of each row of a stage on one part of the mesh; None for padding."""
    own, parents = stage.pieces[part], stage.parents[part]
    assert all(0 < len(piece) <= stage.length for piece in own)
    assert (parents[len(own) :] == -1).all()
    rows = [(*(table[parent] if parent >= 0 else ()), piece) for piece, parent in zip(own, parents, strict=False)]
    return rows + [None] * (len(parents) - len(own))


@settings(max_examples=150, deadline=None)
@given(REQUESTS, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([*CHOICES, None]))
def test_every_token_is_read_in_its_place(requests, parts, rows, levels):
    """The pieces that a request is read from are the request, whatever it shares, and no batch is too large."""
    sequences = [prompt(*request) for request in requests]
    batches = plan_batches(sequences, parts, rows, **({} if levels is None else {"choices": (levels,)}))
    assert_whole(sequences, batches, parts)
    for batch in batches:
        assert all(len(own) <= rows for own in batch.requests)
        assert batch.own.parents.shape == (parts, power_of_two(max(map(len, batch.requests))))
    if levels is None:
        assert tokens(batches) <= tokens(plan_batches(sequences, parts, rows, choices=((),)))


def assert_whole(sequences, batches, parts):
    """Every request is read once, from pieces that together are what it says."""
    found = dict(walk(batches, parts))
    assert sorted(found) == list(range(len(sequences)))
    for index, pieces in found.items():
        whole = sequences[index]
        for name in ("ids", "positions", "patch"):
            joined = np.concatenate([getattr(piece, name) for piece in pieces], axis=-1)
            np.testing.assert_array_equal(joined, getattr(whole, name))
        assert [digest for piece in pieces for digest in shown(piece)] == shown(whole)
        assert pieces[-1].next_position == whole.next_position


def test_a_part_that_keeps_nothing_counts_its_rows_behind_those_of_one_that_does():
    """Of two parts, in batches of two, the first goes over the border with its group and the second begins one."""
    groups = [0, 0, 0, 1, 2, 2, 3, 3]
    sequences = [prompt([(f"source {g}", 8, 8), (f"{n}", 4, 4)], [9]) for n, g in enumerate(groups)]
    batches = plan_batches(sequences, 2, 2, choices=((GROUP,),))
    assert batches[0].kept.tolist() == [[0], [-1]] and batches[1].own.parents.tolist() == [[0, 1], [1, 1]]
    assert_whole(sequences, batches, 2)


def shown(sequence):
    """The image that each token stands for, by its digest."""
    return [sequence.images[number].digest if number >= 0 else None for number in sequence.image]


def tokens(batches):
    return sum(batch.tokens for batch in batches)


def pieces_read(batches, level=None):
    stages = [batch.own if level is None else batch.prefixes[level] for batch in batches]
    return [piece for stage in stages for piece in stage.rows if piece is not None]


@pytest.mark.parametrize("rows", [64, 16, 4])
def test_sources_and_candidates_are_read_once(rows):
    """Also where a group goes over borders of batches, and in whatever order its requests come."""
    sequences = edits(groups=5, candidates=6)
    batches = plan_batches(sequences, 1, rows)
    sources, candidates, questions = (pieces_read(batches, level) for level in (GROUP, PICTURE, None))
    assert len(batches) == -(-60 // rows)
    assert sorted(piece.images[0].digest for piece in sources) == [f"source {g}" for g in range(5)]
    assert len(candidates) == len({piece.images[0].digest for piece in candidates}) == 30
    assert len(questions) == 60 and not any(piece.images for piece in questions)
    shared = len(OPENING) + 66 + 66
    assert sum(map(len, sources)) == 5 * (shared - 66)
    assert sum(map(len, candidates)) == 30 * 66
    assert sum(map(len, questions)) == sum(map(len, sequences)) - 60 * shared
    assert sum(batch.kept.size for batch in batches) <= len(batches) - 1  # one source at a border, none behind the last


def test_a_part_of_the_mesh_reads_the_sources_of_its_own_requests():
    """Sixty requests in four runs of fifteen: each of the three borders cuts a group of twelve."""
    batches = plan_batches(edits(groups=5, candidates=6), 4, 4)
    assert len(batches) == 4
    assert len(pieces_read(batches, GROUP)) == 5 + 3


def test_criteria_of_one_picture_share_it():
    pictures = [[(f"picture {n}", 16, 16)] for n in range(6)]
    batches = plan_batches([prompt(shown, [9] * size) for size in (50, 60) for shown in pictures], 1, 4)
    assert [list(batch.prefixes) for batch in batches] == [[PICTURE]] * 3
    assert len(pieces_read(batches, PICTURE)) == 6
    assert batches[0].tokens == 2 * 80 + 4 * 64


def test_without_pictures_prompts_are_read_whole():
    sequences = [prompt([], [9] * size) for size in (70, 80, 90)]
    [batch] = plan_batches(sequences, 1, 8)
    assert not batch.prefixes
    assert [len(row or ()) for row in batch.own.rows] == [*map(len, sequences), 0]


def test_equal_pictures_after_unlike_words_are_not_shared():
    """Prompts of another layout: what comes before a picture is a part of what it is shared by."""
    image = PatchedImage(np.zeros((256, 1), np.float32), (16, 16), "picture")
    sequences = [lay_out([[first], image, [9] * 5], PAD, 2) for first in (1, 2, 1)]
    batches = plan_batches(sequences, 1, 4, choices=((PICTURE,),))
    assert len(pieces_read(batches, PICTURE)) == 2


def test_a_level_has_to_be_worth_a_pass_over_the_weights():
    """Prompts in two pieces may have less padding than whole ones; a little less is no reason to cut them."""
    lone = [prompt([(f"picture {n}", 12, 10)], [9] * 100) for n in range(32)]
    assert tokens(plan_batches(lone, 1, 32, choices=((PICTURE,),))) < tokens(plan_batches(lone, 1, 32, choices=((),)))
    assert not plan_batches(lone, 1, 32)[0].prefixes
