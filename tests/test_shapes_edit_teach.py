import collections
import json

import numpy as np
import pytest

from firm_jax.critic.parse import parse_edit
from firm_jax.critic.rubric import rubrics_from
from firm_jax.critic.sft_data import VERDICT, read_scores
from firm_jax.data.edits import load_edits
from firm_jax.data.images import to_array
from firm_jax.embedded import embedded_path
from firm_jax.shapes import edit_teach
from firm_jax.shapes.edit_oracle import compare
from firm_jax.shapes.edit_teach import CRITERIA, INSTRUCTION_CLASSES, RUBRICS, edit_answer, instruction_classes
from firm_jax.shapes.edits import Change, Edit, edits
from firm_jax.shapes.render import render
from firm_jax.shapes.scene import Scene, Selector, Shape

SOURCE = Scene("white", (Shape("circle", "red", "large", 0.25, 0.25), Shape("cross", "green", "small", 0.72, 0.75)))
TARGET = Scene("gray", (Shape("circle", "blue", "small", 0.25, 0.25), Shape("square", "red", "large", 0.75, 0.25)))
CHANGES = (
    Change("recolor", Selector("circle"), Selector(color="blue")),
    Change("add", value=Selector("square", "orange"), place="bottom left"),
)
EDIT = Edit("make the circle blue and add an orange square in the bottom left", CHANGES)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(21)
    return [edit_teach.critic_example(rng) for _ in range(250)]


def test_an_execution_answer_compares_and_checks_what_was_asked_for():
    answer = json.loads(edit_answer("edit_execution", render(SOURCE), render(TARGET), EDIT))
    assert list(answer) == ["reasoning", "score"]
    assert answer["reasoning"].split("; ") == [
        "top left large red circle now small blue circle",
        "top right nothing now large red square",
        "bottom left nothing now nothing",
        "bottom right small green cross now nothing",
        "white now gray",
        "circle blue: blue yes",
        "one of one",
        "square: square yes",
        "orange: red no",
        "bottom left: top right no",
        "one of three",
    ]
    assert answer["score"] == [3]  # two thirds


def test_a_consistency_answer_compares_and_counts_what_nobody_asked_for():
    answer = json.loads(edit_answer("edit_consistency", render(SOURCE), render(TARGET), EDIT))
    assert answer["reasoning"].split("; ") == [
        "top left large red circle now small blue circle: one minor",
        "top right nothing now large red square: fine",
        "bottom left nothing now nothing: fine",
        "bottom right small green cross now nothing: one significant",
        "white now gray: one significant",
        "two significant, one minor",
    ]
    assert answer["score"] == [3]
    elsewhere = Scene("black", (Shape("triangle", "purple", "small", 0.75, 0.25),))
    lost = json.loads(edit_answer("edit_consistency", render(SOURCE), render(elsewhere), EDIT))
    assert lost["reasoning"].endswith("hardly anything kept") and lost["score"] == [1]
    shifted = Scene("white", (SOURCE.shapes[0], Shape("cross", "green", "small", 0.79, 0.72)))
    assert "now small green cross shifted: one minor" in edit_answer(
        "edit_consistency", render(SOURCE), render(shifted), EDIT
    )


def test_answers_are_read_by_the_critics_own_parser_and_their_verdicts_are_found(examples):
    for (source, edited), criterion, text, answer in examples:
        assert source.shape == edited.shape == (64, 64, 3) and text
        assert parse_edit(answer).scores == read_scores(answer).scores == (json.loads(answer)["score"][0],)
        assert len(answer.split()) <= 75
        found = VERDICT.findall(answer)
        if criterion == "edit_execution":
            assert set(found) <= {"yes", "no"} and found
        else:
            assert len(found) == 5 and set(found) <= {"fine", "significant", "minor"}


def test_scores_and_criteria_are_about_balanced(examples):
    for criterion in CRITERIA:
        scores = [json.loads(answer)["score"][0] for _, name, _, answer in examples if name == criterion]
        assert 95 < len(scores) < 155
        shares = [collections.Counter(scores)[score] / len(scores) for score in range(1, 6)]
        assert min(shares) > 0.07 and max(shares) < 0.38


def test_examples_are_a_function_of_the_generator(examples):
    rng = np.random.default_rng(21)
    for images, *texts in examples[:5]:
        again, *same = edit_teach.critic_example(rng)
        assert texts == same and (np.stack(images) == np.stack(again)).all()


def test_batches_are_what_an_editor_does_part_of_the_time():
    asked, sources, scenes, images = edit_teach.generator_batch(np.random.default_rng(5), 120, untouched=0.2)
    assert sources.shape == images.shape == (120, 64, 64, 3) and images.dtype == np.float32
    assert (images == np.stack([render(scene) for scene in scenes])).all()
    found = [compare(source, image, edit) for source, image, edit in zip(sources, images, asked, strict=True)]
    execution, preservation = np.mean([(one.execution, one.preservation) for one in found], axis=0)
    assert 0.45 < execution < 0.75 and 0.85 < preservation < 0.99
    exact = edit_teach.generator_batch(np.random.default_rng(6), 40, wrong=0.0, careless=0.0)
    assert all(compare(source, image, edit).accurate for edit, source, _, image in zip(*exact, strict=True))
    again = edit_teach.generator_batch(np.random.default_rng(5), 120, untouched=0.2)
    assert again[0] == asked and (again[3] == images).all()


def test_an_instructions_classes_say_what_it_says_and_nothing_else():
    assert instruction_classes(EDIT).reshape(2, 8).tolist() == [[1, 1, 0, 0, 3, 0, 0, 0], [4, 0, 0, 2, 6, 0, 3, 0]]
    last = Edit("", (Change("background", background="gray"),))
    assert instruction_classes(last).tolist() == [3, 0, 0, 0, 0, 0, 0, 3] + 8 * [0]
    assert len(INSTRUCTION_CLASSES) == 16
    rng = np.random.default_rng(0)
    said = np.array([instruction_classes(edit_teach.sample_task(rng)[1]) for _ in range(600)])
    assert (said < INSTRUCTION_CLASSES).all() and (said.max(0) == np.array(INSTRUCTION_CLASSES) - 1).sum() >= 14


def test_edits_are_written_as_the_reader_of_runs_reads_them(tmp_path):
    edit_teach.write_edits(tmp_path, "train", 3)
    edit_teach.write_edits(tmp_path, "test", 2, seed=1)
    splits = load_edits(tmp_path, max_images=1)
    for split, seed, records in (("train", 0, splits.train), ("test", 1, splits.held_out)):
        expected = edits(split, len(records) // 3, seed)
        assert [Edit.from_json({"prompt": record.text, **record.metadata}) for record in records] == [
            edit for _, edit in expected
        ]
        for record, (source, _) in zip(records, expected, strict=True):
            assert np.abs(to_array(record.images[0].open()) - render(source)).max() < 0.003
    assert len({record.images[0].sha256 for record in splits.train}) == 3


def test_the_edits_that_ship_can_be_checked_from_their_pixels():
    splits = load_edits(embedded_path("embedded:edits"), max_images=1)
    assert (len(splits.train), len(splits.held_out), splits.shared, splits.duplicates_merged) == (960, 480, 0, 0)
    assert not {r.images[0].sha256 for r in splits.train} & {r.images[0].sha256 for r in splits.held_out}
    for record in splits.held_out[:60]:
        source = to_array(record.images[0].open())
        found = compare(source, source, Edit.from_json({"prompt": record.text, **record.metadata}))
        assert (found.execution, found.preservation) == (0, 1)


def test_rubrics_are_short_and_have_their_fields():
    rubrics = rubrics_from(RUBRICS)
    assert set(rubrics) == set(CRITERIA)
    for rubric in rubrics.values():
        assert rubric.fill("paint it red").endswith("Instruction: paint it red")
        assert rubric.fill("paint it red", "keep the sky").endswith("\nkeep the sky\nInstruction: paint it red")
        assert len(rubric.text.split()) < 45
