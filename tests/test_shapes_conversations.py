"""The shapes world as training data of a critic, with and without a generator's own pictures."""

import json

import numpy as np
import pytest

from firm_jax.critic.rubric import Rubric
from firm_jax.errors import DataError
from firm_jax.shapes import edit_teach, teach
from firm_jax.shapes.conversations import ShapesConversations, ShapesEditConversations
from firm_jax.shapes.render import render
from firm_jax.shapes.scene import prompts, sample_scene

RUBRICS = {name: Rubric(name, f"{name}: {{prompt}}", "") for name in ("alignment", "quality")}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Sixteen pictures, each brighter by its number in one corner, so that it can be told which they are."""
    rng, asked = np.random.default_rng(0), prompts("train", 16)
    images = np.stack([np.round(255 * render(sample_scene(rng, prompt))).astype(np.uint8) for prompt in asked])
    images[:, 0, 0, 0] = np.arange(16)
    file = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(file, images=images, prompts=[json.dumps(prompt.to_json()) for prompt in asked])
    return file


@pytest.mark.parametrize(("stream", "numbers"), [(0, set(range(14))), (1, {14, 15})])
def test_held_out_pictures_of_a_generator_are_never_trained_on(samples, stream, numbers):
    examples = ShapesConversations(120, RUBRICS, seed=0, stream=stream, samples=samples, share=1.0)
    assert {int(example.images[0][0, 0, 0]) for example in examples} == numbers
    for example in examples:
        image, prompt = example.images[0] / np.float32(255), examples.prompts[int(example.images[0][0, 0, 0])]
        if example.criterion == "alignment_samples":
            assert example.prompt == f"alignment: {prompt.text}"
            assert example.answer == teach.alignment_answer(image, prompt)
        else:
            assert example.criterion == "quality_samples" and example.answer == teach.quality_answer(image)


def test_a_share_of_the_examples_is_the_generators(samples):
    examples = ShapesConversations(200, RUBRICS, seed=0, stream=0, samples=samples, share=0.3)
    drawn = np.mean([example.criterion.endswith("_samples") for example in examples])
    assert 0.2 < drawn < 0.4
    without = ShapesConversations(5, RUBRICS, seed=0, stream=0, share=0.3)
    assert {example.criterion for example in without} <= {"alignment", "quality"}


def test_examples_do_not_depend_on_what_was_asked_before():
    first = ShapesConversations(4, RUBRICS, seed=3, stream=0)
    again = ShapesConversations(4, RUBRICS, seed=3, stream=0)
    assert first[2].answer == [example.answer for example in again][2]
    other = ShapesConversations(4, RUBRICS, seed=3, stream=1)
    assert [example.answer for example in other] != [example.answer for example in first]


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": np.zeros((8, 4, 4, 3), np.uint8)},
        {"images": np.zeros((2, 4, 4, 3), np.uint8), "prompts": ["{}"] * 2},
        {"images": np.zeros((8, 4, 4, 3), np.float32), "prompts": []},
    ],
)
def test_files_that_hold_something_else_are_named(tmp_path, arrays):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(DataError, match=r"odd\.npz"):
        ShapesConversations(4, RUBRICS, seed=0, stream=0, samples=tmp_path / "odd.npz", share=0.5)


EDIT_RUBRICS = {name: Rubric(name, f"{name}: {{prompt}}", "") for name in edit_teach.CRITERIA}


def test_edits_show_the_source_first_and_are_answered_by_the_edit_oracle(tmp_path):
    tasks = [edit_teach.sample_task(np.random.default_rng(number)) for number in range(16)]
    sources = np.stack([np.round(255 * render(source)).astype(np.uint8) for source, _ in tasks])
    edited = sources[::-1].copy()
    sources[:, 0, 0, 0] = np.arange(16)
    np.savez(
        tmp_path / "samples.npz", sources=sources, images=edited, edits=[json.dumps(e.to_json()) for _, e in tasks]
    )
    options = {"seed": 0, "stream": 1, "samples": tmp_path / "samples.npz"}
    for example in ShapesEditConversations(20, EDIT_RUBRICS, share=1.0, **options):
        number = int(example.images[0][0, 0, 0])
        assert number >= 14 and (example.images[1] == edited[number]).all()
        criterion = example.criterion.removesuffix("_samples")
        edit = tasks[number][1]
        assert example.prompt == f"{criterion}: {edit.text}"
        first, second = (image / np.float32(255) for image in example.images)
        assert example.answer == edit_teach.edit_answer(criterion, first, second, edit)
    drawn = [example.criterion for example in ShapesEditConversations(60, EDIT_RUBRICS, share=0.3, **options)]
    assert {*drawn} == {*edit_teach.CRITERIA, *(f"{name}_samples" for name in edit_teach.CRITERIA)}
    with pytest.raises(DataError, match=r"samples\.npz is not an \.npz file with images and prompts"):
        ShapesConversations(4, RUBRICS, seed=0, stream=0, samples=tmp_path / "samples.npz", share=0.5)
