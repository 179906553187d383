"""The edit oracle against pairs of pictures whose difference is known: drawn, faulty, spoiled."""

import dataclasses

import numpy as np
import pytest

from firm_jax.errors import DataError
from firm_jax.shapes.edit_oracle import compare, compare_readings
from firm_jax.shapes.edits import DIFFICULTIES, Change, Edit, sample_edit, sample_source, sample_target
from firm_jax.shapes.oracle import ideal, inspect
from firm_jax.shapes.render import degrade, render
from firm_jax.shapes.scene import Scene, Selector, Shape

CIRCLE = Shape("circle", "red", "large", 0.25, 0.25)
SQUARE = Shape("square", "blue", "small", 0.75, 0.28)
CROSS = Shape("cross", "green", "small", 0.27, 0.75)
SOURCE = Scene("white", (CIRCLE, SQUARE, CROSS))

RECOLOR = Change("recolor", Selector("circle"), Selector(color="yellow"))
ADD = Change("add", value=Selector("triangle", "purple", "large"), place="bottom right")
REMOVE = Change("remove", Selector("square", "blue"))
MOVE = Change("move", Selector("circle"), place="bottom right")
REPLACE = Change("replace", Selector("cross"), Selector("square", "orange"))
BACKGROUND = Change("background", background="black")
TRIANGLE = Shape("triangle", "purple", "large", 0.75, 0.74)
YELLOW = dataclasses.replace(CIRCLE, color="yellow")
MOVED = dataclasses.replace(CIRCLE, x=0.74, y=0.76)
ORANGE = dataclasses.replace(CROSS, kind="square", color="orange")


def changed(shape, **attributes):
    return dataclasses.replace(shape, **attributes)


def shown(*shapes, background="white"):
    return Scene(background, shapes)


# The changes asked for, what is shown, execution, the share kept as (kept, of), the slips, the consistency score.
CASES = {
    "recoloured": ([RECOLOR], shown(YELLOW, SQUARE, CROSS), 1, (13, 13), [], 5),
    "recoloured wrongly": ([RECOLOR], shown(changed(CIRCLE, color="green"), SQUARE, CROSS), 0, (13, 13), [], 5),
    "and resized": ([RECOLOR], shown(changed(YELLOW, size="small"), SQUARE, CROSS), 1, (12, 13), ["size"], 4),
    "another recoloured": (
        [RECOLOR],
        shown(CIRCLE, changed(SQUARE, color="yellow"), CROSS),
        0,
        (12, 13),
        ["color"],
        4,
    ),
    "added": ([ADD], shown(*SOURCE.shapes, TRIANGLE), 1, (14, 14), [], 5),
    "added in another colour": (
        [ADD],
        shown(*SOURCE.shapes, changed(TRIANGLE, color="red")),
        0.75,
        (14, 14),
        [],
        5,
    ),
    "added, and another changed": (
        [Change("add", value=Selector("triangle", "purple"))],
        shown(CIRCLE, SQUARE, TRIANGLE, changed(TRIANGLE, size="small", x=0.25)),
        1,
        (12, 14),
        ["kind", "color"],
        3,
    ),
    "removed": ([REMOVE], shown(CIRCLE, CROSS), 1, (10, 10), [], 5),
    "another removed": ([REMOVE], shown(CIRCLE, SQUARE), 0, (6, 10), ["green cross gone"], 4),
    "all removed": ([REMOVE], shown(), 1, (2, 10), ["red circle gone", "green cross gone"], 1),
    "something else in its place": (
        [REMOVE],
        shown(CIRCLE, changed(SQUARE, kind="cross", color="orange"), CROSS),
        1,
        (9, 10),
        ["new small orange cross"],
        4,
    ),
    "moved": ([MOVE], shown(MOVED, SQUARE, CROSS), 1, (13, 13), [], 5),
    "moved and recoloured": (
        [MOVE],
        shown(changed(MOVED, color="purple"), SQUARE, CROSS),
        1,
        (12, 13),
        ["color"],
        4,
    ),
    "copied": ([MOVE], shown(CIRCLE, MOVED, SQUARE, CROSS), 0.5, (13, 13), [], 5),
    "moved, and another put there": (
        [MOVE],
        shown(MOVED, changed(CIRCLE, color="orange"), SQUARE, CROSS),
        1,
        (12, 13),
        ["new large orange circle"],
        4,
    ),
    "lost on the way": ([MOVE], shown(SQUARE, CROSS), 0, (10, 13), ["red circle gone"], 4),
    "replaced": ([REPLACE], shown(CIRCLE, SQUARE, changed(ORANGE, size="large")), 1, (11, 11), [], 5),
    "replaced by half": ([REPLACE], shown(CIRCLE, SQUARE, changed(ORANGE, kind="cross")), 0.5, (11, 11), [], 5),
    "background": ([BACKGROUND], shown(*SOURCE.shapes, background="black"), 1, (13, 13), [], 5),
    "another background": ([BACKGROUND], shown(*SOURCE.shapes, background="gray"), 0, (13, 13), [], 5),
    "background too": ([REMOVE], shown(CIRCLE, CROSS, background="gray"), 1, (9, 10), ["now gray"], 4),
    "shifted a little": (
        [REMOVE],
        shown(changed(CIRCLE, x=0.34), CROSS),
        1,
        (9, 10),
        ["place"],
        4,
    ),
    "both": ([REMOVE, RECOLOR], shown(YELLOW, CROSS), 1, (9, 9), [], 5),
    "one of two": ([REMOVE, RECOLOR], shown(CIRCLE, CROSS), 0.5, (9, 9), [], 5),
    "added where another went": (
        [REMOVE, Change("add", value=Selector("triangle", "purple"))],
        shown(CIRCLE, changed(TRIANGLE, y=0.25), CROSS),
        1,
        (10, 10),
        [],
        5,
    ),
    "places exchanged": (
        [BACKGROUND],
        shown(changed(CIRCLE, x=0.75, y=0.28), changed(SQUARE, x=0.25, y=0.25), CROSS, background="black"),
        1,
        (7, 13),
        ["kind", "color", "size"] * 2,
        2,
    ),
    "nearly all different": (
        [RECOLOR],
        shown(changed(TRIANGLE, x=0.25, y=0.75, color="orange"), background="gray"),
        0,
        (2, 13),
        ["red circle gone", "blue square gone", "kind", "color", "size", "now gray"],
        1,
    ),
}


@pytest.mark.parametrize(("changes", "target", "execution", "kept", "slips", "consistency"), CASES.values(), ids=CASES)
def test_a_known_difference_counts_where_it_belongs(changes, target, execution, kept, slips, consistency):
    found = compare(render(SOURCE), render(target), Edit("", tuple(changes)))
    assert found.execution == execution
    assert (sum(found.kept), len(found.kept)) == kept
    assert sorted(slip.what for slip in found.slips) == sorted(slips)
    assert found.consistency_score == consistency
    assert found.preservation == pytest.approx(kept[0] / kept[1])
    assert found.score == pytest.approx(found.execution * found.preservation)
    assert found.accurate == (execution == 1 and kept[0] == kept[1])


def pairs(count, seed, **faults):
    rng = np.random.default_rng(seed)
    for number in range(count):
        source = sample_source(rng)
        edit = sample_edit(rng, source, tuple(DIFFICULTIES)[number % 3])
        yield source, edit, sample_target(rng, source, edit, **faults)


def test_pictures_are_read_as_their_scenes():
    for source, edit, target in pairs(240, 6, untouched=0.1, wrong=0.4, careless=0.25):
        assert compare(render(source), render(target), edit) == compare_readings(ideal(source), ideal(target), edit)


def test_the_source_itself_is_kept_in_full_and_executes_nothing():
    for source, edit, _ in pairs(120, 7):
        found = compare_readings(ideal(source), ideal(source), edit)
        assert (found.execution, found.preservation, found.score) == (0, 1, 0)
        assert (found.execution_score, found.consistency_score) == (1, 5)


@pytest.mark.parametrize(("name", "severity"), [("noise", 0.3), ("blur", 0.35), ("bleed", 0.5), ("contrast", 0.2)])
def test_reads_through_what_an_autoencoder_does_to_a_picture(name, severity):
    rng = np.random.default_rng(8)
    agreed = []
    for source, edit, target in pairs(90, 8, wrong=0.4, careless=0.2):
        before = inspect(render(source))
        clean, spoiled = render(target), degrade(rng, render(target), name, severity)
        agreed.append(
            compare_readings(before, inspect(spoiled), edit) == compare_readings(before, inspect(clean), edit)
        )
    assert np.mean(agreed) >= 0.97


def test_a_shape_that_melted_is_a_slip_and_a_blob():
    picture = render(SOURCE)
    picture[4:28, 4:28] = 1.0
    picture[14:18, 4:28] = (0.85, 0.05, 0.10)  # a bar in the circle's place
    found = compare(render(SOURCE), picture, Edit("", (REMOVE,)))
    assert ("top left", "kind", False) in [dataclasses.astuple(slip) for slip in found.slips]
    assert not compare(render(SOURCE), picture, Edit("", (Change("remove", Selector("circle")),))).accurate


def test_what_is_no_pair_is_refused():
    with pytest.raises(DataError, match="exactly one triangle to remove; 0 of its 3 shapes"):
        compare(render(SOURCE), render(SOURCE), Edit("", (Change("remove", Selector("triangle")),)))
    with pytest.raises(DataError, match="the oracle reads"):
        compare(render(SOURCE), np.zeros((32, 32, 3)), Edit("", (REMOVE,)))
