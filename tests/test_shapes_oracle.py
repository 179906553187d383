"""The oracle against scenes it has not seen: drawn, deliberately changed, and spoiled."""

import dataclasses

import numpy as np
import pytest

from firm_jax.errors import DataError
from firm_jax.shapes import oracle
from firm_jax.shapes.render import degrade, render
from firm_jax.shapes.scene import (
    KINDS,
    TAGS,
    Include,
    Prompt,
    Scene,
    Selector,
    Shape,
    corrupt_prompt,
    sample_prompt,
    sample_scene,
)

RED_CIRCLE = Shape("circle", "red", "large", 0.25, 0.25)
BLUE_SQUARE = Shape("square", "blue", "small", 0.75, 0.28)
PAIR = Scene("white", (RED_CIRCLE, BLUE_SQUARE))


def random_scenes(count, seed):
    rng = np.random.default_rng(seed)
    for i in range(count):
        prompt = sample_prompt(rng, tuple(TAGS)[i % 3])
        yield prompt, sample_scene(rng, corrupt_prompt(rng, prompt, 0.5))


def described(scene):
    return scene.background, sorted((shape.kind, shape.color, shape.size) for shape in scene.shapes)


def test_reads_clean_renders():
    agreed = []
    for prompt, scene in random_scenes(2000, seed=11):
        image = render(scene)
        verdicts = tuple(requirement.holds(scene) for requirement in prompt.requirements)
        reading = oracle.inspect(image)
        agreed.append(
            described(reading.scene) == described(scene) and oracle.check_reading(reading, prompt) == verdicts
        )
    assert np.mean(agreed) >= 0.99


@pytest.mark.parametrize("size", [48, 96, 257])
def test_reads_other_sizes(size):
    scenes = [scene for _, scene in random_scenes(60, seed=12)]
    assert all(described(oracle.read(render(scene, size))) == described(scene) for scene in scenes)


def test_finds_the_places():
    for _, scene in random_scenes(60, seed=13):
        for seen in oracle.read(render(scene)).shapes:
            nearest = min(np.hypot(seen.x - shape.x, seen.y - shape.y) for shape in scene.shapes)
            assert nearest < 0.5 / 64


@pytest.mark.parametrize(("name", "severity"), [("blur", 0.35), ("noise", 0.3), ("bleed", 0.5), ("contrast", 0.2)])
def test_reads_through_what_an_autoencoder_does_to_a_picture(name, severity):
    rng = np.random.default_rng(14)
    agreed = [
        described(oracle.read(degrade(rng, render(scene), name, severity))) == described(scene)
        for _, scene in random_scenes(150, seed=14)
    ]
    assert np.mean(agreed) >= 0.97


def changed(index=None, background=None, **attributes):
    """PAIR with one shape's attributes, or the background, replaced."""
    shapes = list(PAIR.shapes)
    if index is not None:
        shapes[index] = dataclasses.replace(shapes[index], **attributes)
    return Scene(background or PAIR.background, tuple(shapes))


ATTRIBUTES = Prompt(
    "a large red circle and a small blue square on a white background",
    "color_attr",
    "hard",
    (Include(Selector("circle", "red", "large")), Include(Selector("square", "blue", "small"))),
    "white",
)
POSITION = Prompt(
    "a blue square right of a red circle",
    "position",
    "hard",
    (Include(Selector("circle", "red")), Include(Selector("square", "blue"), position=("right of", 0))),
)
TWO = Prompt(
    "a red circle and a blue square",
    "two_object",
    "medium",
    (Include(Selector("circle", "red")), Include(Selector("square", "blue"))),
)
THIRD = Shape("triangle", "green", "small", 0.25, 0.75)


@pytest.mark.parametrize(
    ("prompt", "scene", "broken"),
    [
        (ATTRIBUTES, PAIR, set()),
        (POSITION, PAIR, set()),
        (TWO, PAIR, set()),
        (TWO, changed(0, color="orange"), {"one red circle"}),
        (TWO, changed(1, kind="triangle"), {"one square", "one blue square"}),
        (TWO, Scene("white", (RED_CIRCLE,)), {"one square", "one blue square", "two shapes in all"}),
        (TWO, Scene("white", (*PAIR.shapes, THIRD)), {"two shapes in all"}),
        (
            TWO,
            Scene("white", (*PAIR.shapes, dataclasses.replace(RED_CIRCLE, y=0.75))),
            {"one circle", "one red circle", "two shapes in all"},
        ),
        (TWO, Scene("white", ()), {requirement.text for requirement in TWO.requirements}),
        (
            POSITION,
            Scene("white", (dataclasses.replace(RED_CIRCLE, x=0.75), dataclasses.replace(BLUE_SQUARE, x=0.25))),
            {"blue square right of red circle"},
        ),
        (POSITION, changed(1, x=0.25, y=0.75), {"blue square right of red circle"}),
        (POSITION, changed(0, color="blue"), {"one red circle", "blue square right of red circle"}),
        (ATTRIBUTES, changed(0, size="small"), {"red circle is large"}),
        (ATTRIBUTES, changed(1, size="large"), {"blue square is small"}),
        (ATTRIBUTES, changed(background="gray"), {"background is white"}),
        (ATTRIBUTES, Scene("white", ()), {requirement.text for requirement in ATTRIBUTES.requirements}),
    ],
)
def test_a_deliberate_change_breaks_the_requirements_it_concerns(prompt, scene, broken):
    image = render(scene)
    verdicts = oracle.check(image, prompt)
    missed = {r.text for r, holds in zip(prompt.requirements, verdicts, strict=True) if not holds}
    assert missed == broken
    assert oracle.fraction(image, prompt) == pytest.approx(1 - len(broken) / len(verdicts))
    assert oracle.accuracy(image, prompt) == float(not broken)
    assert (oracle.alignment_score(image, prompt) == 5) == (not broken)


@pytest.mark.parametrize("drawn", [0, 1, 2, 4])
def test_credit_for_a_count_is_exact(drawn):
    prompt = Prompt("three green crosses", "counting", "medium", (Include(Selector("cross", "green"), count=3),))
    corners = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]
    shapes = tuple(Shape("cross", "green", "small", x, y) for x, y in corners[:drawn])
    held = dict(
        zip([r.text for r in prompt.requirements], oracle.check(render(Scene("black", shapes)), prompt), strict=True)
    )
    assert not held["three green crosses"] and not held["three shapes in all"]
    assert held["all shapes are crosses"] == held["all shapes are green"] == (drawn > 0)


def test_alignment_score_rises_with_the_share():
    scores = [oracle.share_to_score(share) for share in np.linspace(0, 1, 61)]
    assert scores == sorted(scores) and set(scores) == {1, 2, 3, 4, 5}
    assert oracle.share_to_score(0.99) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_most_molten_shapes_count_as_strays(kind):
    rng = np.random.default_rng(15)
    image = render(Scene("white", (Shape(kind, "red", "large", 0.5, 0.5),)))
    readings = [oracle.inspect(degrade(rng, image, "distort", 1.0)) for _ in range(40)]
    assert np.mean([len(reading.scene.shapes) for reading in readings]) < 0.2  # some melt into a fair disc
    assert np.mean([reading.strays > 0 for reading in readings]) > 0.8


GRID_X, GRID_Y = np.meshgrid(np.arange(64) - 32, np.arange(64) - 32)


@pytest.mark.parametrize(
    "blob",
    [
        (abs(GRID_X) < 14) & (abs(GRID_Y) < 7),  # a bar
        np.hypot(GRID_X / 13, GRID_Y / 8) < 1,  # an ellipse
        (np.hypot(GRID_X, GRID_Y) < 12) & (GRID_Y < 0),  # half a disc
        (np.hypot(GRID_X, GRID_Y) < 12) & (np.hypot(GRID_X, GRID_Y) > 6),  # a ring
        (np.hypot(GRID_X - 8, GRID_Y) < 10) | (np.hypot(GRID_X + 8, GRID_Y) < 10),  # two discs grown together
        abs(GRID_X) + abs(GRID_Y - 5 * np.sin(GRID_X / 4)) < 14,  # a bent diamond
        (abs(GRID_X) < 12) & (abs(GRID_Y) < 12) & ~((GRID_X > -4) & (GRID_Y < 4)),  # a corner
        np.hypot(GRID_X, GRID_Y) < 22,  # a disc far too large
        np.hypot(GRID_X, GRID_Y) < 3.5,  # and far too small
    ],
)
def test_other_outlines_are_strays(blob):
    image = np.ones((64, 64, 3), np.float32)
    image[blob] = (0.85, 0.05, 0.10)
    reading = oracle.inspect(image)
    assert reading.scene.shapes == () and reading.strays == 1


def test_a_stray_breaks_the_exact_total():
    image = render(PAIR)
    image[46:60, 8:11] = (0.05, 0.65, 0.20)
    image[46:49, 8:30] = (0.05, 0.65, 0.20)
    missed = [not holds for holds in oracle.check(image, TWO)]
    assert missed == [False, False, False, False, True]


def test_two_colours_or_no_palette_colour_are_no_shape():
    scene = Scene("white", (Shape("square", "red", "large", 0.5, 0.5),))
    halves = render(scene)
    inside = halves[..., 1] < 0.5
    halves[:, :32][inside[:, :32]] = (0.1, 0.3, 0.95)
    grey = render(scene)
    grey[inside] = 0.3
    for image in (halves, grey):
        assert oracle.read(image).shapes == ()


def test_labels_equal_a_flood_fill():
    rng = np.random.default_rng(16)
    for _ in range(20):
        mask = rng.random((17, 23)) < rng.uniform(0.3, 0.7)
        labels, count = oracle.label(mask)
        expected = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
        while True:
            padded = np.pad(expected, 1)
            around = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
            spread = np.where(mask, np.max([expected, *around], axis=0), 0)
            if (spread == expected).all():
                break
            expected = spread
        pairs = set(zip(labels[mask].tolist(), expected[mask].tolist(), strict=True))
        assert len(pairs) == count == len({old for old, _ in pairs}) == len({new for _, new in pairs})
        assert ((labels > 0) == mask).all()


@pytest.mark.parametrize(("name", "index"), [("contrast", 0), ("blur", 1), ("noise", 1), ("distort", 2)])
def test_quality_falls_with_severity_on_the_scale_it_concerns(name, index):
    rng = np.random.default_rng(17)
    images = [render(scene) for _, scene in random_scenes(25, seed=17)]
    assert all(oracle.quality_scores(image) == (5, 5, 5) for image in images)
    means = [
        np.mean([oracle.quality_scores(degrade(rng, image, name, severity))[index] for image in images])
        for severity in (0.15, 0.5, 0.95)
    ]
    assert means[0] > means[1] + 0.5 > means[2] + 1.0
    assert oracle.quality_scores(np.ones((64, 64, 3), np.float32)) == (1, 1, 1)


@pytest.mark.parametrize(
    "image",
    [np.zeros((64, 64)), np.zeros((32, 32, 3)), np.full((64, 64, 3), 255.0), np.full((64, 64, 3), np.nan)],
)
def test_refuses_what_is_no_picture(image):
    with pytest.raises(DataError, match="the oracle reads"):
        oracle.inspect(image)
