import collections
import json

import numpy as np
import pytest

from firm_jax.critic.parse import parse_alignment, parse_quality
from firm_jax.shapes import oracle
from firm_jax.shapes.render import render
from firm_jax.shapes.scene import COLORS, KINDS, SIZES, Include, Prompt, Scene, Selector, Shape
from firm_jax.shapes.teach import (
    CAPTION_CLASSES,
    PICTURE_CLASSES,
    RUBRICS,
    alignment_answer,
    caption_classes,
    critic_example,
    picture_classes,
    quality_answer,
    vision_batch,
)

TWO = Prompt(
    "a red circle and a blue square",
    "two_object",
    "medium",
    (Include(Selector("circle", "red")), Include(Selector("square", "blue"))),
)
SMALL_CIRCLE, SMALL_CROSS = (Include(Selector(kind, size="small")) for kind in ("circle", "cross"))
SQUARE_RIGHT = Include(Selector("square", "green"), position=("right of", 0))


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(21)
    return [critic_example(rng) for _ in range(250)]


def test_an_alignment_answer_says_what_is_seen_and_what_follows():
    scene = Scene(
        "black",
        (Shape("square", "green", "small", 0.75, 0.75), Shape("circle", "red", "large", 0.25, 0.25)),
    )
    assert alignment_answer(render(scene), TWO).splitlines() == [
        "top left large red circle, top right nothing, bottom left nothing, bottom right small green square on black",
        "one circle: one yes",
        "one red circle: red yes",
        "one square: one yes",
        "one blue square: green no",
        "two shapes in all: two yes",
        "four of five hold",
        "**Final Alignment Rating: 4**",
        "\\boxed{4}",
    ]


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        (Prompt("", "single_object", "easy", (SMALL_CIRCLE,)), "circle is small: large no"),
        (Prompt("", "single_object", "easy", (SMALL_CROSS,)), "cross is small: none no"),
        (Prompt("", "counting", "medium", (Include(Selector("square", "red"), 2),)), "all shapes are red: green no"),
        (Prompt("", "counting", "medium", (Include(Selector("cross", "red"), 2),)), "two red crosses: none no"),
        (Prompt("", "colors", "easy", (Include(Selector("circle", "red")),), "gray"), "background is gray: black no"),
        (
            Prompt("", "position", "hard", (Include(Selector("circle", "red")), SQUARE_RIGHT)),
            "green square right of red circle: bottom right and top left yes",
        ),
    ],
)
def test_every_kind_of_requirement_names_what_was_found(prompt, line):
    scene = Scene(
        "black",
        (Shape("square", "green", "small", 0.75, 0.75), Shape("circle", "red", "large", 0.25, 0.25)),
    )
    assert line in alignment_answer(render(scene), prompt).splitlines()


def test_pieces_that_are_no_shapes_are_named_beside_the_count():
    image = np.zeros((64, 64, 3), np.float32)
    image[4:8, 4:60] = (0.85, 0.05, 0.10)
    assert "two shapes in all: zero and blobs no" in alignment_answer(image, TWO).splitlines()


def test_a_pictures_classes_are_those_of_its_quarters():
    shapes = (Shape("square", "green", "small", 0.75, 0.3), Shape("cross", "red", "large", 0.2, 0.8))
    assert picture_classes(Scene("gray", shapes)).tolist() == [[0, 0, 0, 2], [2, 2, 1, 2], [4, 1, 2, 2], [0, 0, 0, 2]]
    assert len(PICTURE_CLASSES) == 4


def test_a_quality_answer_is_json_with_the_score_first():
    image = render(Scene("white", (Shape("circle", "red", "large", 0.25, 0.25),)))
    answer = quality_answer(image)
    assert answer.startswith('{"score": [5, 5, 5], "reasoning": "')
    assert json.loads(answer)["score"] == list(oracle.quality_scores(image))


def test_answers_are_read_by_the_critics_own_parser(examples):
    for image, task, _, answer in examples:
        assert len(answer.split()) <= 70
        if task == "quality":
            assert parse_quality(answer).scores == oracle.quality_scores(image)
        else:
            assert parse_alignment(answer).scores == (int(answer[-2]),)


def test_scores_and_tasks_are_about_balanced(examples):
    alignment = [int(answer[-2]) for _, task, _, answer in examples if task == "alignment"]
    quality = [min(json.loads(answer)["score"]) for _, task, _, answer in examples if task == "quality"]
    assert 150 < len(alignment) < 200
    for scores in (alignment, quality):
        shares = [collections.Counter(scores)[score] / len(scores) for score in range(1, 6)]
        assert min(shares) > 0.08 and max(shares) < 0.36


def test_examples_are_a_function_of_the_generator(examples):
    rng = np.random.default_rng(21)
    for image, *texts in examples[:5]:
        again, *same = critic_example(rng)
        assert texts == same and (image == again).all()
        assert image.shape == (64, 64, 3) and image.dtype == np.float32


def test_rubrics_are_short_and_have_the_placeholder():
    alignment, quality = ((RUBRICS / f"{name}.txt").read_text() for name in ("alignment", "quality"))
    assert "{prompt}" in alignment and "{" not in quality
    assert all(15 <= len(text.split()) <= 35 for text in (alignment, quality))


def test_a_captions_classes_say_what_it_says_and_nothing_else():
    first = Include(Selector("cross", "red", "small"), position=("above", 1))
    prompt = Prompt("", "position", "hard", (first, Include(Selector("circle"), count=2)), "gray")
    slots, background = np.split(caption_classes(prompt), [10])
    assert slots.reshape(2, 5).tolist() == [[4, 1, 1, 1, 3], [1, 0, 0, 2, 0]] and background == [3]
    alone = Prompt("", "single_object", "easy", (Include(Selector("square")),))
    assert caption_classes(alone).tolist() == [2, 0, 0, 1, 0] + 6 * [0]
    assert len(CAPTION_CLASSES) == len(slots) + 1


def test_vision_batches_are_labelled_with_what_the_oracle_reads():
    images, labels, quality = vision_batch(np.random.default_rng(3), 60)
    assert (labels[..., 3] == np.arange(4)).all() and labels.max((0, 1)).tolist() == [4, 6, 2, 3]
    agreement = []
    for image, quarters, scores in zip(images, labels, quality, strict=True):
        assert tuple(scores + 1) == oracle.quality_scores(image)
        if scores.min() == 4:
            found = np.zeros((4, 3), int)
            for shape in oracle.read(image).shapes:
                place = 2 * (shape.y > 0.5) + (shape.x > 0.5)
                names = (KINDS, shape.kind), (tuple(COLORS), shape.color), (tuple(SIZES), shape.size)
                found[place] = [1 + values.index(value) for values, value in names]
            agreement.append((found == quarters[:, :3]).all())
    assert len(agreement) > 10 and np.mean(agreement) > 0.9
    assert {0, 4} <= set(quality.ravel()) and (quality < 4).any(1).mean() > 0.2
