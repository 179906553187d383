"""Edits of the shapes world: what they ask for, and the targets that editors of any skill leave behind."""

import collections
import itertools
import json

import numpy as np
import pytest

from firm_jax.errors import DataError
from firm_jax.shapes.edit_oracle import compare_readings
from firm_jax.shapes.edits import (
    DIFFICULTIES,
    OPERATIONS,
    Change,
    Edit,
    edits,
    sample_edit,
    sample_source,
    sample_target,
)
from firm_jax.shapes.oracle import ideal
from firm_jax.shapes.scene import SIZES, Scene, Selector, Shape


def tasks(count, seed):
    rng = np.random.default_rng(seed)
    for number in range(count):
        source = sample_source(rng)
        yield rng, source, sample_edit(rng, source, tuple(DIFFICULTIES)[number % 3])


def judged(source, target, edit):
    return compare_readings(ideal(source), ideal(target), edit)


def test_sources_hold_one_to_four_shapes_of_their_own_kind_and_colour():
    counts = collections.Counter()
    for _, source, _ in tasks(300, 0):
        assert len({(shape.kind, shape.color) for shape in source.shapes}) == len(source.shapes)
        counts[len(source.shapes)] += 1
    assert set(counts) == {1, 2, 3, 4} and counts[2] > counts[1]


def test_an_instruction_names_what_is_to_change_and_how():
    tags = collections.Counter()
    for _, source, edit in tasks(600, 1):
        tags[edit.tag] += 1
        assert edit.tag in DIFFICULTIES[edit.difficulty]
        assert len({change.operation for change in edit.changes}) == len(edit.changes) == 1 + (edit.tag == "double")
        subjects = [change.find(source.shapes) for change in edit.changes]
        assert len({index for index in subjects if index is not None}) == sum(index is not None for index in subjects)
        for change, text in zip(edit.changes, edit.text.split(" and "), strict=True):
            for word in (*vars(change.subject).values(), *vars(change.value).values(), change.place, change.background):
                assert word is None or word in text
    assert set(tags) == {*OPERATIONS, "double"} and min(tags.values()) > 20
    with pytest.raises(DataError, match="'harder' is none of easy, medium, hard"):
        sample_edit(np.random.default_rng(0), Scene("white", ()), "harder")


def test_records_go_to_json_and_back():
    for _, _, edit in tasks(120, 2):
        assert Edit.from_json(json.loads(json.dumps(edit.to_json()))) == edit


GOOD = {"operation": "recolor", "subject": {"class": "circle"}, "value": {"color": "red"}}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"changes": [GOOD]}, "without a prompt"),
        ({"prompt": "a", "changes": []}, "one or two changes"),
        ({"prompt": "a", "changes": GOOD}, "one or two changes"),
        ({"prompt": "a", "changes": ["recolor"]}, "not an object"),
        ({"prompt": "a", "changes": [GOOD | {"operation": "melt"}]}, "operation 'melt' is none of"),
        ({"prompt": "a", "changes": [GOOD | {"subject": {"class": "cat"}}]}, "class 'cat' is none of"),
        ({"prompt": "a", "changes": [GOOD | {"subject": "circle"}]}, "'circle', not an object"),
        ({"prompt": "a", "changes": [GOOD | {"subject": {"color": "red"}}]}, "recolor without a subject"),
        ({"prompt": "a", "changes": [GOOD | {"value": {}}]}, "recolor without a value color"),
        ({"prompt": "a", "changes": [GOOD | {"operation": "replace"}]}, "replace without a value class"),
        ({"prompt": "a", "changes": [GOOD | {"operation": "move"}]}, "move without a place"),
        ({"prompt": "a", "changes": [GOOD | {"operation": "background"}]}, "background without a background"),
        ({"prompt": "a", "changes": [GOOD | {"place": "middle"}]}, "place 'middle' is none of"),
    ],
)
def test_records_outside_the_world_are_refused_by_name(record, problem):
    with pytest.raises(DataError, match=problem):
        Edit.from_json(record)


@pytest.mark.parametrize("count", [0, 2])
def test_a_source_must_show_the_subject_once(count):
    circles = [Shape("circle", color, "small", 0.25, y) for color, y in (("red", 0.25), ("blue", 0.75))]
    change = Change("remove", Selector("circle"))
    with pytest.raises(DataError, match=f"exactly one circle to remove; {count} of its {count} shapes"):
        change.find(tuple(circles[:count]))


def test_a_faultless_target_shows_what_was_asked_for_and_nothing_else():
    for rng, source, edit in tasks(400, 3):
        assert judged(source, sample_target(rng, source, edit), edit).accurate, edit


def test_targets_keep_their_shapes_apart_and_inside():
    for rng, source, edit in tasks(300, 4):
        target = sample_target(rng, source, edit, wrong=0.5, careless=0.5)
        for shape in target.shapes:
            assert SIZES[shape.size] + 1 / 64 < min(shape.x, shape.y, 1 - shape.x, 1 - shape.y)
        for one, other in itertools.combinations(target.shapes, 2):
            gap = max(abs(one.x - other.x), abs(one.y - other.y)) - SIZES[one.size] - SIZES[other.size]
            assert gap > 3 / 64


def test_each_probability_spoils_what_it_is_of():
    """Untouched: nothing done, all kept. Wrong: less done, and careless alone: all done, less kept."""
    means = {}
    for name in ("untouched", "wrong", "careless"):
        found = [
            judged(source, sample_target(rng, source, edit, **{name: 0.5}), edit) for rng, source, edit in tasks(400, 5)
        ]
        means[name] = np.mean([(one.execution, one.preservation) for one in found], axis=0)
    np.testing.assert_allclose(means["untouched"], [0.5, 1.0], atol=0.08)
    assert 0.5 < means["wrong"][0] < 0.75 < 0.9 < means["wrong"][1] < 1
    assert means["careless"][0] > 0.95 and 0.6 < means["careless"][1] < 0.85


def test_splits_are_disjoint_deterministic_and_balanced():
    train, test = edits("train", 80), edits("test", 30, seed=3)
    assert edits("train", 80) == train != edits("train", 80, seed=1)
    for part in (train, test):
        for first in range(0, len(part), 3):
            assert len({source for source, _ in part[first : first + 3]}) == 1
            assert [edit.difficulty for _, edit in part[first : first + 3]] == list(DIFFICULTIES)

    def combinations(part):
        found = set()
        for source, edit in part:
            if all(change.operation != "background" for change in edit.changes):
                indices = [change.find(source.shapes) for change in edit.changes]
                subjects = [None if index is None else source.shapes[index] for index in indices]
                found.add(
                    tuple(
                        (change.operation, shape and (shape.kind, shape.color), change.value, change.place)
                        for change, shape in zip(edit.changes, subjects, strict=True)
                    )
                )
        return found

    assert not combinations(train) & combinations(test)
    assert {edit.tag for _, edit in train} == {edit.tag for _, edit in test} == {*OPERATIONS, "double"}
    with pytest.raises(DataError, match="validation"):
        edits("validation", 1)
