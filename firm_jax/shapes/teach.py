"""What the miniature is taught: pictures for the autoencoder, captioned pictures for the generator, and for the
critic pictures with the answers that the oracle would give in the critic's output formats."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from firm_jax.errors import DataError
from firm_jax.shapes import oracle
from firm_jax.shapes.oracle import Reading
from firm_jax.shapes.render import degrade, render
from firm_jax.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    MAX_SHAPES,
    QUARTERS,
    RELATIONS,
    SIZES,
    TAGS,
    Prompt,
    Requirement,
    Scene,
    Selector,
    corrupt_prompt,
    in_relation,
    quarter,
    sample_prompt,
    sample_scene,
)

RUBRICS = Path(__file__).parent / "rubrics"

ALIGNMENT_SHARE = 0.7  # of the critic's examples: quality has shorter answers, with less to work out
_PAIR_TRIES, _QUALITY_TRIES = 40, 12  # draws in search of an example with the wanted score
_SEVERITY = {5: (0.0, 0.2), 4: (0.1, 0.5), 3: (0.25, 0.7), 2: (0.4, 0.9), 1: (0.5, 1.0)}  # by wanted quality
COUNTS = ("zero", "one", "two", "three", "four", "five", "six")
_REMARKS = (
    (
        "poor colours or stray pieces",
        "dull colours or stray pieces",
        "slightly dull",
        "good colours",
        "clear colours",
    ),
    (
        "very blurred or noisy",
        "blurred or noisy",
        "somewhat blurred or noisy",
        "slightly soft",
        "clean and sharp",
    ),
    ("no proper shapes", "crooked shapes", "uneven shapes", "nearly regular shapes", "regular shapes"),
)


def generator_batch(
    rng: np.random.Generator, count: int, wrong: float = 0.35
) -> tuple[list[Prompt], list[Scene], np.ndarray]:
    """Prompts, scenes, and their images float32 [count, 64, 64, 3] in [0, 1], for the base generator.

    Each attribute of a scene is drawn anew with probability `wrong`, whatever its prompt says: a generator
    trained on such pairs draws every concept crisply, and follows the prompt about half the time.
    """
    prompts = [_any_prompt(rng) for _ in range(count)]
    scenes = [sample_scene(rng, corrupt_prompt(rng, prompt, wrong)) for prompt in prompts]
    return prompts, scenes, np.stack([render(scene) for scene in scenes])


# Of a caption: kind, colour, size, count and relation of the first and the second thing it names, and the background.
CAPTION_CLASSES = 2 * (1 + len(KINDS), 1 + len(COLORS), 1 + len(SIZES), 1 + MAX_SHAPES, 1 + len(RELATIONS))
CAPTION_CLASSES += (1 + len(BACKGROUNDS),)


def caption_classes(prompt: Prompt) -> np.ndarray:
    """What a caption says, int32 [11], as CAPTION_CLASSES counts it; 0 is what it leaves open."""
    said = []
    for slot in range(2):
        item = prompt.include[slot] if slot < len(prompt.include) else None
        selector = item.selector if item else Selector()
        said += [
            place_in(KINDS, selector.kind),
            place_in(COLORS, selector.color),
            place_in(SIZES, selector.size),
            item.count if item else 0,
            place_in(RELATIONS, item.position[0] if item and item.position else None),
        ]
    return np.array([*said, place_in(BACKGROUNDS, prompt.background)], np.int32)


def place_in(values, value) -> int:
    """1 + the index of a value among the known ones; 0 for None."""
    return 0 if value is None else 1 + list(values).index(value)


def autoencoder_batch(rng: np.random.Generator, count: int) -> np.ndarray:
    """Clean images float32 [count, 64, 64, 3] in [0, 1]."""
    return np.stack([render(sample_scene(rng, _any_prompt(rng))) for _ in range(count)])


def _any_prompt(rng: np.random.Generator) -> Prompt:
    difficulties = tuple(TAGS)
    return sample_prompt(rng, difficulties[int(rng.integers(len(difficulties)))])


SHAPE_CLASSES = (1 + len(KINDS), 1 + len(COLORS), 1 + len(SIZES))  # of a quarter: class 0 is "no shape"
# Of what a quarter of a picture shows: its shape, and the background.
PICTURE_CLASSES = (*SHAPE_CLASSES, len(BACKGROUNDS))


def picture_classes(scene: Scene) -> np.ndarray:
    """What the quarters of a picture show in reading order, int32 [4, 4], as PICTURE_CLASSES counts it."""
    return np.concatenate([_shape_classes(scene), np.full((4, 1), place_in(BACKGROUNDS, scene.background) - 1)], axis=1)


def _shape_classes(scene: Scene) -> np.ndarray:
    classes = np.zeros((4, len(SHAPE_CLASSES)), np.int32)
    for shape in scene.shapes:
        classes[list(QUARTERS).index(quarter(shape.x, shape.y))] = (
            place_in(KINDS, shape.kind),
            place_in(COLORS, shape.color),
            place_in(SIZES, shape.size),
        )
    return classes


QUARTER_CLASSES = (*SHAPE_CLASSES, 4)  # of a quarter: its shape, and which quarter it is
QUALITY_CLASSES = (5, 5, 5)  # of a whole picture: aesthetics, technical, structure, class 0 being the score 1


def vision_batch(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures [count, 64, 64, 3] in every state, what their quarters hold, int32 [count, 4, 4], and their quality,
    int32 [count, 3].

    Quarters in reading order; classes as QUARTER_CLASSES and QUALITY_CLASSES count them.
    """
    images, labels = [], np.zeros((count, 4, len(QUARTER_CLASSES)), np.int32)
    labels[..., 3] = np.arange(4)
    for row in range(count):
        scene = sample_scene(rng, corrupt_prompt(rng, _any_prompt(rng), 0.5))
        image = render(scene)
        images.append(degrade(rng, image) if rng.random() < 0.35 else aged(rng, image))
        labels[row, :, :3] = _shape_classes(scene)
    quality = np.array([oracle.quality_scores(image) for image in images], np.int32) - 1
    return np.stack(images), labels, quality


def alignment_answer(image: np.ndarray, prompt: Prompt) -> str:
    """What each quarter of the picture shows; each requirement with what was found of it and a verdict; how many hold;
    the rating, plain and boxed. Every step follows from what is written just before it."""
    reading = oracle.inspect(image)
    verdicts = oracle.check_reading(reading, prompt)
    score = oracle.share_to_score(float(np.mean(verdicts)))
    lines = [describe(reading)]
    for requirement, holds in zip(prompt.requirements, verdicts, strict=True):
        lines.append(f"{requirement.text}: {evidence(requirement, reading)} {'yes' if holds else 'no'}")
    lines.append(f"{COUNTS[sum(verdicts)]} of {COUNTS[len(verdicts)]} hold")
    return "\n".join([*lines, f"**Final Alignment Rating: {score}**", f"\\boxed{{{score}}}"])


def describe(reading: Reading) -> str:
    """Quarter by quarter in a fixed order, so that what is to be named next never has to be searched for."""
    seen = {place: [] for place in QUARTERS}
    for component in reading.components:
        name = f"{component.size} {component.color} {component.kind}" if component.is_shape else "blob"
        seen[quarter(component.x, component.y)].append(name)
    parts = [f"{place} {' and '.join(names[:2]) or 'nothing'}" for place, names in seen.items()]
    return f"{', '.join(parts)} on {reading.background or 'unclear'}"


def evidence(requirement: Requirement, reading: Reading) -> str:
    """What the picture shows of a requirement, found by one property at a time: the number of shapes of a kind, or of
    all; where a colour is named, the colours of all shapes of the kind; the first value that does not fit, or the one
    that all have; the places of the first two shapes in question; the background."""
    shapes = reading.scene.shapes
    found = requirement.subject.select(shapes)
    match requirement.check:
        case "exactly":
            if requirement.subject.color is None:
                blobs = requirement.subject == Selector() and reading.strays
                return f"{COUNTS[min(len(found), 6)]}{' and blobs' if blobs else ''}"
            colors = [shape.color for shape in shapes if shape.kind == requirement.subject.kind]
            return " ".join(colors[:4]) or "none"
        case "every":
            misfits = [shape for shape in found if not requirement.value.select((shape,))]
            name = next(name for name in ("kind", "color", "size") if getattr(requirement.value, name))
            return getattr((misfits or found)[0], name) if found else "none"
        case "relation":
            pairs = [(shape, other) for shape in found for other in requirement.value.select(shapes)]
            pairs.sort(key=lambda pair: in_relation(pair[0], requirement.relation, pair[1]))
            return " and ".join(quarter(shape.x, shape.y) for shape in pairs[0]) if pairs else "none"
        case "background":
            return reading.background or "unclear"
    raise DataError(f"requirement {requirement.text!r}: unknown check {requirement.check!r}")


def quality_answer(image: np.ndarray) -> str:
    """Strict JSON: the three scores (aesthetics, technical, structure), then the reasoning."""
    scores = oracle.quality_scores(image)
    remarks = [words[score - 1] for words, score in zip(_REMARKS, scores, strict=True)]
    return json.dumps({"score": list(scores), "reasoning": ", ".join(remarks)})


def critic_example(rng: np.random.Generator) -> tuple[np.ndarray, str, str, str]:
    """An image, the task ("alignment" or "quality"), the caption ("" for quality), and the right answer.

    The wanted score is drawn first, evenly from 1 to 5, and then a picture that has it or comes near, so that the
    scores are about balanced. Quality is balanced on the lowest of its three scores, which is the one that counts.
    """
    wanted = int(rng.integers(1, 6))
    if rng.random() < ALIGNMENT_SHARE:
        prompt, scene = pair_for_alignment(rng, wanted)
        image = aged(rng, render(scene))
        return image, "alignment", prompt.text, alignment_answer(image, prompt)
    for _ in range(_QUALITY_TRIES):
        image = render(sample_scene(rng, corrupt_prompt(rng, _any_prompt(rng), 0.5)))
        image = degrade(rng, image, severity=rng.uniform(*_SEVERITY[wanted]))
        if min(oracle.quality_scores(image)) == wanted:
            break
    return image, "quality", "", quality_answer(image)


def pair_for_alignment(rng: np.random.Generator, wanted: int) -> tuple[Prompt, Scene]:
    """A prompt, and a scene that meets the share of its requirements that makes the wanted score."""
    for _ in range(_PAIR_TRIES):
        prompt = _any_prompt(rng)
        if wanted == 5:
            shown = prompt
        elif rng.random() < 0.4:
            shown = _recolored(rng, prompt)
        elif wanted <= 2 and rng.random() < 0.3:
            shown = _any_prompt(rng)
        else:
            shown = corrupt_prompt(rng, prompt, rng.uniform(0.2, 1.0))
        scene = sample_scene(rng, shown)
        share = np.mean([requirement.holds(scene) for requirement in prompt.requirements])
        if oracle.share_to_score(float(share)) == wanted:
            break
    return prompt, scene


def _recolored(rng: np.random.Generator, prompt: Prompt) -> Prompt:
    """The prompt with nothing but colours changed: what a critic confuses last, and would else seldom see alone."""

    def redraw(value, choices):
        return list(choices)[int(rng.integers(len(choices)))] if value and rng.random() < 0.7 else value

    selectors = [replace(item.selector, color=redraw(item.selector.color, COLORS)) for item in prompt.include]
    include = tuple(replace(item, selector=selector) for item, selector in zip(prompt.include, selectors, strict=True))
    return replace(prompt, include=include, background=redraw(prompt.background, BACKGROUNDS))


def aged(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The picture as a generator might have drawn it: clean, slightly spoiled, or with blobs for shapes."""
    draw = rng.random()
    if draw < 0.45:
        return image
    if draw < 0.9:
        return degrade(rng, image, severity=rng.uniform(0.03, 0.25))
    return degrade(rng, image, "distort", rng.uniform(0.4, 1.0))
