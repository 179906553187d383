"""Selection of training examples: doubles, leaks and contradictions go, scores are balanced, deterministically."""

import collections
import io
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from firm_jax.curation.select import (
    Benchmark,
    NearThumbnails,
    balance,
    contradicts,
    normalised,
    thumbnail,
    without_duplicates,
    without_near_duplicates,
)
from firm_jax.errors import ConfigError
from firm_jax.shapes.render import render, to_pil
from firm_jax.shapes.scene import prompts, quarter, sample_scene

UNHURRIED = settings(deadline=None)
THUMBNAILS = st.binary(min_size=6, max_size=6)


def scene(seed: int, size=(96, 64)) -> Image.Image:
    """A picture of large patches of colour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def variants(picture: Image.Image) -> list[Image.Image]:
    """The same picture, saved and scaled otherwise."""
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=80)
    half, larger = ((round(side * by) for side in picture.size) for by in (0.5, 1.5))
    return [
        Image.open(jpeg), picture.resize(tuple(half), Image.Resampling.LANCZOS),
        picture.resize(tuple(larger), Image.Resampling.BICUBIC), picture.point(lambda value: value * 0.9),
    ]  # fmt: skip


def stripes(*rows: str) -> Image.Image:
    """A picture that changes from top to bottom alone."""
    picture = Image.new("RGB", (64, 64))
    for place, color in enumerate(rows):
        picture.paste(color, (0, 64 * place // len(rows), 64, 64))
    return picture


def near(a: Image.Image, b: Image.Image) -> bool:
    known = NearThumbnails()
    known.add(thumbnail(a), 0)
    return known.near(thumbnail(b)) == {0}


PLAIN = [
    stripes("red"), stripes("blue"), stripes("red", "blue"), stripes("blue", "red"),
    stripes("white", "black", "white"), stripes("black", "white", "black"),
]  # fmt: skip


@pytest.mark.parametrize("picture", [*map(scene, range(5)), *PLAIN])
def test_a_picture_saved_or_scaled_otherwise_is_near_and_another_is_not(picture):
    assert all(near(picture, other) for other in variants(picture))
    assert not any(near(picture, other) for other in [*map(scene, range(100, 110)), *PLAIN] if other is not picture)


def test_pictures_of_the_shapes_world_are_found_again_and_told_apart():
    """The figures that `thumbnail` gives are of 2,000 pictures; these are 250."""
    draw = np.random.default_rng(0)
    scenes = [sample_scene(draw, prompt) for prompt in prompts("train", 250)]
    pictures = [to_pil(render(one)) for one in scenes]
    known = NearThumbnails()
    for name, picture in enumerate(pictures):
        known.add(thumbnail(picture), name)

    def words(name: int):
        shapes = ((one.kind, one.color, one.size, quarter(one.x, one.y)) for one in scenes[name].shapes)
        return scenes[name].background, sorted(shapes)

    doubles = sum(
        words(name) != words(other)
        for name, picture in enumerate(pictures)
        for other in known.near(thumbnail(picture)) - {name}
    )
    assert doubles <= 2
    for name, picture in enumerate(pictures[:100]):
        assert all(name in known.near(thumbnail(other)) for other in variants(picture))


@UNHURRIED
@given(st.lists(THUMBNAILS, max_size=20), THUMBNAILS, st.integers(0, 254), st.data())
def test_near_thumbnails_are_those_that_comparing_each_value_finds(values, asked, levels, data):
    moved = bytes(min(255, value + data.draw(st.sampled_from([0, levels, levels + 1]))) for value in asked)
    values = [*values, moved, asked]
    known = NearThumbnails(levels)
    assert known.near(asked) == set()
    for name, value in enumerate(values):
        known.add(value, name)
    assert known.near(asked) == {
        name
        for name, value in enumerate(values)
        if all(abs(one - other) <= levels for one, other in zip(value, asked, strict=True))
    }


@pytest.mark.parametrize("levels", [-1, 255])
def test_levels_that_a_pixel_does_not_have_are_refused(levels):
    with pytest.raises(ConfigError, match="levels of 255"):
        NearThumbnails(levels)


@UNHURRIED
@given(st.lists(st.integers(0, 5)))
def test_the_first_of_each_key_stays(keys):
    kept = without_duplicates(keys)
    assert kept == sorted(kept) and [keys[index] for index in kept] == list(dict.fromkeys(keys))


@UNHURRIED
@given(st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 15), min_size=1, max_size=2))))
def test_no_two_that_stay_are_near_and_each_that_goes_is_near_one_that_stays(examples):
    keys, images = [key for key, _ in examples], [[bytes([one]) for one in values] for _, values in examples]
    kept = without_near_duplicates(keys, images, levels=1)

    def near(a: int, b: int) -> bool:
        return (
            keys[a] == keys[b]
            and len(images[a]) == len(images[b])
            and all(abs(one[0] - other[0]) <= 1 for one, other in zip(images[a], images[b], strict=True))
        )

    assert kept == sorted(kept)
    assert not any(near(a, b) for a in kept for b in kept if a < b)
    assert all(any(near(index, one) for one in kept if one < index) for index in set(range(len(keys))) - set(kept))


def test_the_same_picture_with_another_instruction_stays():
    assert without_near_duplicates(["a cat", "a dog", "a cat"], [[b"5"], [b"5"], [b"4"]], levels=1) == [0, 1]


def test_what_is_the_benchmark_s_is_found():
    benchmark = Benchmark([thumbnail(scene(1))], ["Make the Cat  red!"])
    assert benchmark.leak("paint a dog", [thumbnail(scene(2)), thumbnail(scene(1, (48, 32)))]) == "image"
    assert benchmark.leak("make the cat red", [thumbnail(scene(2))]) == "prompt"
    assert benchmark.leak("make the cat redder", [thumbnail(scene(2))]) is None


@UNHURRIED
@given(st.text())
def test_normalised_prompts_have_no_case_and_spacing(text):
    assert normalised(normalised(text)) == normalised(text) == normalised(f"  {text}\n")


@pytest.mark.parametrize(
    ("score", "reason", "expected"),
    [
        (5, "The hat is missing.", True),
        (5, "The colour is wrong, although the cat is there.", True),
        (5, "The dog is not present in the second image.", True),
        (5, "Nothing is missing and everything was preserved.", False),
        (5, "There are no unintended changes.", False),
        (5, "No part of it is incorrect.", False),
        (5, "Nothing else moved. The hat is missing.", True),
        (5, "All requirements are met.", False),
        (4, "The hat is missing.", False),
        (1, "All of the stated requirements are met.", True),
        (1, "The edit was perfectly carried out.", True),
        (1, "The scene is flawless, but the cat is missing.", False),
        (1, "The picture shows a dog.", False),
    ],
)
def test_a_reason_that_speaks_against_its_score(score, reason, expected):
    assert contradicts(score, reason) == expected


LABELS = st.lists(st.sampled_from([("alignment", 1), ("alignment", 5), ("edit", 5)]), max_size=40)


@UNHURRIED
@given(LABELS, st.integers(1, 6), st.integers(0, 3))
def test_each_label_has_up_to_the_cap(labels, cap, seed):
    ids = [f"r{number}" for number in range(len(labels))]
    kept = balance(ids, labels, cap, seed)
    counts, before = collections.Counter(labels[index] for index in kept), collections.Counter(labels)
    assert kept == sorted(set(kept)) and counts == {label: min(cap, before[label]) for label in before}
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    turned = balance([ids[index] for index in order], [labels[index] for index in order], cap, seed)
    assert {ids[order[index]] for index in turned} == {ids[index] for index in kept}


def test_another_seed_draws_others_and_more_data_change_few():
    ids = [f"r{number}" for number in range(200)]
    kept = balance(ids, [5] * 200, 50, seed=0)
    assert kept != balance(ids, [5] * 200, 50, seed=1)
    grown = balance([*ids, "one more"], [5] * 201, 50, seed=0)
    assert len(set(kept) & set(grown)) >= 49
    with pytest.raises(ConfigError, match="give 1 or more"):
        balance(ids, [5] * 200, 0, seed=0)
