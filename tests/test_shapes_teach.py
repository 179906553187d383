import collections
import json

import numpy as np
import pytest

from firm_jax.critic.parse import parse_alignment, parse_quality
from firm_jax.shapes import oracle
from firm_jax.shapes.render import render
from firm_jax.shapes.scene import Include, Prompt, Scene, Selector, Shape
from firm_jax.shapes.teach import RUBRICS, alignment_answer, critic_example, quality_answer

TWO = Prompt(
    "a red circle and a blue square",
    "two_object",
    "medium",
    (Include(Selector("circle", "red")), Include(Selector("square", "blue"))),
)


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
        "1. one circle: yes",
        "2. one red circle: yes",
        "3. one square: yes",
        "4. one blue square: no",
        "5. two shapes in all: yes",
        "**Final Alignment Rating: 4**",
        "\\boxed{4}",
    ]


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
    assert 90 < len(alignment) < 160
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
