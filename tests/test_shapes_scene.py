import numpy as np
import pytest

from firm_jax.errors import DataError
from firm_jax.shapes.render import DEGRADATIONS, degrade, render
from firm_jax.shapes.scene import (
    BACKGROUNDS,
    SIZES,
    TAGS,
    VOCABULARY,
    Prompt,
    Scene,
    corrupt_prompt,
    prompts,
    sample_prompt,
    sample_scene,
)
from firm_jax.shapes.teach import autoencoder_batch, generator_batch


def many_prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng, [sample_prompt(rng, tuple(TAGS)[i % 3]) for i in range(count)]


def test_captions_keep_to_the_vocabulary_and_length():
    _, drawn = many_prompts(1500)
    assert {word for prompt in drawn for word in prompt.text.split()} <= set(VOCABULARY)
    assert len(VOCABULARY) < 60
    assert max(len(prompt.text.split()) for prompt in drawn) <= 16
    assert {prompt.tag for prompt in drawn} == {tag for tags in TAGS.values() for tag in tags}
    assert {len(prompt.requirements) for prompt in drawn} == {2, 3, 4, 5, 6}


def test_every_requirement_holds_in_a_scene_of_the_prompt_and_none_in_an_empty_one():
    rng, drawn = many_prompts(600)
    for prompt in drawn:
        for asked in (prompt, corrupt_prompt(rng, prompt, 0.6)):
            scene = sample_scene(rng, asked)
            assert all(requirement.holds(scene) for requirement in asked.requirements), asked
            empty = Scene(scene.background, ())
            assert not any(requirement.holds(empty) for requirement in asked.requirements), asked


def test_shapes_keep_clear_of_each_other_and_of_the_border():
    rng, drawn = many_prompts(600)
    for prompt in drawn:
        shapes = sample_scene(rng, corrupt_prompt(rng, prompt, 0.5)).shapes
        for i, shape in enumerate(shapes):
            radius = SIZES[shape.size]
            assert radius + 1 / 64 < min(shape.x, shape.y, 1 - shape.x, 1 - shape.y)
            for other in shapes[:i]:
                gap = max(abs(shape.x - other.x), abs(shape.y - other.y)) - radius - SIZES[other.size]
                assert gap > 4 / 64


def test_corruption_changes_attributes_at_about_the_asked_rate():
    rng, drawn = many_prompts(600)
    assert all(corrupt_prompt(rng, prompt, 0.0).include == prompt.include for prompt in drawn)
    faithful = np.mean(
        [
            all(r.holds(sample_scene(rng, corrupt_prompt(rng, prompt, 0.35))) for r in prompt.requirements)
            for prompt in drawn
        ]
    )
    assert 0.1 < faithful < 0.4


def test_geneval_record_round_trip():
    _, drawn = many_prompts(200)
    for prompt in drawn:
        assert Prompt.from_json(prompt.to_json()) == prompt
    record = {
        "tag": "position",
        "include": [
            {"class": "circle", "count": 1, "color": "yellow"},
            {"class": "square", "count": 1, "color": "blue", "position": ["left of", 0]},
        ],
        "prompt": "a blue square left of a yellow circle",
    }
    texts = [requirement.text for requirement in Prompt.from_json(record).requirements]
    assert "blue square left of yellow circle" in texts


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tag": "mood"}, "mood"),
        ({"include": [{"class": "cat", "count": 1}]}, "cat"),
        ({"include": [{"class": "circle", "count": 9}]}, "9"),
        ({"include": [{"class": "circle", "count": 1, "position": ["left of", 4]}]}, "position"),
        ({"include": []}, "1 to 4"),
        ({"background": "plaid"}, "plaid"),
    ],
)
def test_records_outside_the_world_are_refused_by_name(change, named):
    record = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "x"}
    with pytest.raises(DataError, match=named):
        Prompt.from_json(record | change)


def test_splits_are_disjoint_deterministic_and_balanced():
    train, test = prompts("train", 600, seed=0), prompts("test", 150, seed=3)
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in test}
    combinations = [{(p.include, p.background) for p in part} for part in (train, test)]
    assert not combinations[0] & combinations[1]
    assert prompts("train", 600, seed=0) == train != prompts("train", 600, seed=1)
    assert len({prompt.text for prompt in test}) == 150
    for difficulty in TAGS:
        assert sum(prompt.difficulty == difficulty for prompt in test) == 50
    with pytest.raises(DataError, match="validation"):
        prompts("validation", 1)


def test_render_scales_and_paints_the_background():
    rng, drawn = many_prompts(30)
    for prompt in drawn:
        scene = sample_scene(rng, prompt)
        image = render(scene)
        assert image.shape == (64, 64, 3) and image.dtype == np.float32
        assert image.min() >= 0 and image.max() <= 1
        np.testing.assert_allclose(image[0, 0], BACKGROUNDS[scene.background], atol=1e-6)
        halved = render(scene, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(halved - image).mean() < 0.01


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_degradations_grow_with_severity(name):
    rng, drawn = many_prompts(8)
    images = [render(sample_scene(rng, prompt)) for prompt in drawn]
    damage = [
        np.mean([np.abs(degrade(rng, image, name, severity) - image).mean() for image in images])
        for severity in (0.1, 0.4, 1.0)
    ]
    assert 0 < damage[0] < damage[1] < damage[2]


def test_batches_are_a_function_of_the_generator():
    prompts, scenes, images = generator_batch(np.random.default_rng(5), 6)
    again, _, same = generator_batch(np.random.default_rng(5), 6)
    assert prompts == again and (images == same).all()
    assert (images == np.stack([render(scene) for scene in scenes])).all()
    assert images.shape == (6, 64, 64, 3) and images.dtype == np.float32
    assert autoencoder_batch(np.random.default_rng(5), 3).shape == (3, 64, 64, 3)
