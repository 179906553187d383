"""Selection of training examples: doubles, leaks and contradictions go, scores are balanced, deterministically."""

import collections
import io
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from firm_jax.curation.select import (
    HASH_BITS,
    Benchmark,
    NearHashes,
    balance,
    contradicts,
    dhash,
    distance,
    normalised,
    without_duplicates,
    without_near_duplicates,
)
from firm_jax.errors import ConfigError

HASHES = st.integers(0, 2**HASH_BITS - 1)


def scene(seed: int, size=(96, 64)) -> Image.Image:
    """A picture of large patches of colour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def flipped(value: int, bits) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


def test_a_hash_has_a_bit_for_every_rise_to_the_right():
    rising = Image.fromarray(np.tile(np.arange(0, 216, 24, dtype=np.uint8), (8, 1)))
    assert dhash(rising) == 2**64 - 1
    assert dhash(rising.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == dhash(Image.new("RGB", (30, 20), "red")) == 0
    half = np.zeros((8, 9), np.uint8)
    half[0] = np.arange(9)  # the first row alone
    assert dhash(Image.fromarray(half)) == 0xFF << 56


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_saved_or_scaled_otherwise_hashes_alike_and_another_does_not(seed):
    picture, jpeg = scene(seed), io.BytesIO()
    picture.save(jpeg, "JPEG", quality=80)
    alike = [Image.open(jpeg), picture.resize((192, 128)), picture.point(lambda value: value * 0.9)]
    assert all(distance(dhash(picture), dhash(other)) <= 3 for other in alike)
    assert all(distance(dhash(picture), dhash(scene(other))) > 10 for other in range(100, 110))


@given(st.lists(HASHES, max_size=20), HASHES, st.integers(0, 8), st.lists(st.integers(0, 63), max_size=10))
def test_near_hashes_are_those_that_comparing_all_finds(values, asked, bits, turned):
    values = [*values, flipped(asked, set(turned)), asked]
    near = NearHashes(bits)
    for name, value in enumerate(values):
        near.add(value, name)
    assert near.near(asked) == {name for name, value in enumerate(values) if distance(value, asked) <= bits}


@pytest.mark.parametrize("bits", [-1, 64])
def test_bits_that_a_hash_does_not_have_are_refused(bits):
    with pytest.raises(ConfigError, match="differing bits"):
        NearHashes(bits)


@given(st.lists(st.integers(0, 5)))
def test_the_first_of_each_key_stays(keys):
    kept = without_duplicates(keys)
    assert kept == sorted(kept) and [keys[index] for index in kept] == list(dict.fromkeys(keys))


@given(st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 15), min_size=1, max_size=2))))
def test_no_two_that_stay_are_near_and_each_that_goes_is_near_one_that_stays(examples):
    keys, hashes = [key for key, _ in examples], [tuple(images) for _, images in examples]
    kept = without_near_duplicates(keys, hashes, bits=1)

    def near(a: int, b: int) -> bool:
        return (
            keys[a] == keys[b]
            and len(hashes[a]) == len(hashes[b])
            and all(distance(one, other) <= 1 for one, other in zip(hashes[a], hashes[b], strict=True))
        )

    assert kept == sorted(kept)
    assert not any(near(a, b) for a in kept for b in kept if a < b)
    assert all(any(near(index, one) for one in kept if one < index) for index in set(range(len(keys))) - set(kept))


def test_the_same_picture_with_another_instruction_stays():
    assert without_near_duplicates(["a cat", "a dog", "a cat"], [(5,), (5,), (4,)], bits=1) == [0, 1]


def test_what_is_the_benchmark_s_is_found():
    benchmark = Benchmark([dhash(scene(1))], ["Make the Cat  red!"])
    assert benchmark.leak("paint a dog", [dhash(scene(2)), dhash(scene(1, (48, 32)))]) == "image"
    assert benchmark.leak("make the cat red", [dhash(scene(2))]) == "prompt"
    assert benchmark.leak("make the cat redder", [dhash(scene(2))]) is None


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
