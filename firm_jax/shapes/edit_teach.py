"""What the editing half of the miniature is taught: sources, instructions and edited pictures for the generator, and
for the critic pairs of pictures with the answers that the edit oracle would give in the critic's output format."""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from firm_jax.shapes import oracle
from firm_jax.shapes.edit_oracle import Comparison, compare_readings, name
from firm_jax.shapes.edits import DIFFICULTIES, OPERATIONS, Edit, edits, sample_edit, sample_source, sample_target
from firm_jax.shapes.oracle import Reading
from firm_jax.shapes.render import render, to_pil
from firm_jax.shapes.scene import BACKGROUNDS, COLORS, KINDS, QUARTERS, SIZES, Scene, choice, quarter
from firm_jax.shapes.teach import COUNTS, aged, place_in

RUBRICS = Path(__file__).parent / "edit_rubrics"
CRITERIA = ("edit_execution", "edit_consistency")

_TRIES = 40  # draws in search of an example with the wanted score


def sample_task(rng: np.random.Generator) -> tuple[Scene, Edit]:
    """A source and an edit of it, of any difficulty."""
    source = sample_source(rng)
    return source, sample_edit(rng, source, choice(rng, DIFFICULTIES))


def generator_batch(
    rng: np.random.Generator, count: int, *, untouched: float = 0.0, wrong: float = 0.35, careless: float = 0.1
) -> tuple[list[Edit], np.ndarray, list[Scene], np.ndarray]:
    """Edits, sources [count, 64, 64, 3], target scenes and their pictures [count, 64, 64, 3], float32 in [0, 1].

    The three probabilities are those of `sample_target`: an editor trained on such pairs draws every change crisply,
    follows the instruction part of the time, and has accidents with the rest of the picture.
    """
    tasks = [sample_task(rng) for _ in range(count)]
    targets = [
        sample_target(rng, source, edit, untouched=untouched, wrong=wrong, careless=careless) for source, edit in tasks
    ]
    sources = np.stack([render(source) for source, _ in tasks])
    return [edit for _, edit in tasks], sources, targets, np.stack([render(target) for target in targets])


def write_edits(folder: Path, split: str, sources: int, seed: int = 0) -> None:
    """Write `edits(split, sources, seed)` as `{split}_metadata.jsonl`, sources as PNG files, for `data.edits`."""
    folder, names = Path(folder), {}
    (folder / "sources").mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}_metadata.jsonl").open("w") as out:
        for source, edit in edits(split, sources, seed):
            if source not in names:
                names[source] = f"sources/{split}_{len(names):03d}.png"
                to_pil(render(source)).save(folder / names[source], optimize=True)
            out.write(json.dumps({**edit.to_json(), "image": names[source]}) + "\n")


# Of an instruction, for its first and its second change: operation, subject's kind and colour, value's kind, colour
# and size, place, background.
INSTRUCTION_CLASSES = 2 * tuple(
    1 + len(values) for values in (OPERATIONS, KINDS, COLORS, KINDS, COLORS, SIZES, QUARTERS, BACKGROUNDS)
)


def instruction_classes(edit: Edit) -> np.ndarray:
    """What an instruction says, int32 [16], as INSTRUCTION_CLASSES counts it; 0 is what it leaves open."""
    said = np.zeros((2, len(INSTRUCTION_CLASSES) // 2), np.int32)
    for slot, change in enumerate(edit.changes):
        said[slot] = (
            place_in(OPERATIONS, change.operation),
            place_in(KINDS, change.subject.kind),
            place_in(COLORS, change.subject.color),
            place_in(KINDS, change.value.kind),
            place_in(COLORS, change.value.color),
            place_in(SIZES, change.value.size),
            place_in(QUARTERS, change.place),
            place_in(BACKGROUNDS, change.background),
        )
    return said.reshape(-1)


def edit_answer(criterion: str, source: np.ndarray, edited: np.ndarray, edit: Edit) -> str:
    """The right answer about two pictures for "edit_execution" or "edit_consistency": JSON, reasoning then score."""
    before, after = oracle.inspect(source), oracle.inspect(edited)
    return reading_answer(criterion, before, after, compare_readings(before, after, edit))


def reading_answer(criterion: str, before: Reading, after: Reading, comparison: Comparison) -> str:
    """`edit_answer` for pictures that have been read and compared already."""
    reasons = _executed if criterion == "edit_execution" else _preserved
    answer = {
        "reasoning": "; ".join(reasons(before, after, comparison)),
        "score": [score_of(criterion, comparison)],
    }
    return json.dumps(answer)


def score_of(criterion: str, comparison: Comparison) -> int:
    """The score, 1 to 5, of "edit_execution" or "edit_consistency"."""
    return comparison.execution_score if criterion == "edit_execution" else comparison.consistency_score


def _differences(before: Reading, after: Reading) -> dict[str, str]:
    """What every quarter and the background show, first and now: side by side, so that nothing has to be searched."""
    said = {}
    for place in QUARTERS:
        shown = [
            [name(thing) for thing in reading.components if quarter(thing.x, thing.y) == place][:2]
            for reading in (before, after)
        ]
        said[place] = f"{place} {' now '.join(' and '.join(names) or 'nothing' for names in shown)}"
    said["background"] = f"{before.background or 'unclear'} now {after.background or 'unclear'}"
    return said


def _executed(before: Reading, after: Reading, comparison: Comparison) -> list[str]:
    """The differences; each aspect of what was asked for with what was found and a verdict; how many hold of each
    change. Every step follows from what is written just before it."""
    parts = list(_differences(before, after).values())
    for change in comparison.aspects:
        parts += [f"{aspect.text}: {aspect.seen} {'yes' if aspect.holds else 'no'}" for aspect in change]
        parts.append(f"{COUNTS[sum(aspect.holds for aspect in change)]} of {COUNTS[len(change)]}")
    return parts


def _preserved(before: Reading, after: Reading, comparison: Comparison) -> list[str]:
    """The differences, each with a verdict on what nobody asked for; how many such changes there are in all."""
    parts, total = [], Counter(_weight(slip) for slip in comparison.slips)
    for place, text in _differences(before, after).items():
        slips = [slip for slip in comparison.slips if slip.place == place]
        shifted = " shifted" if any(slip.what == "place" and slip.minor for slip in slips) else ""
        counts = Counter(_weight(slip) for slip in slips)
        verdict = " ".join(
            f"{COUNTS[min(counts[weight], 6)]} {weight}" for weight in ("significant", "minor") if counts[weight]
        )
        parts.append(f"{text}{shifted}: {verdict or 'fine'}")
    sums = [f"{COUNTS[min(total[weight], 6)]} {weight}" for weight in ("significant", "minor")]
    sums += ["hardly anything kept"] * (comparison.consistency_score == 1)
    return [*parts, ", ".join(sums)]


def _weight(slip) -> str:
    return "minor" if slip.minor else "significant"


def critic_example(rng: np.random.Generator) -> tuple[tuple[np.ndarray, np.ndarray], str, str, str]:
    """(source, edited picture), the criterion, the instruction, and the right answer.

    The wanted score is drawn first, evenly from 1 to 5, and then a pair that has it or comes near, so that the scores
    are about balanced: nothing done, done in part, to another shape, with accidents beside it, something else entirely.
    """
    criterion, wanted = choice(rng, CRITERIA), int(rng.integers(1, 6))
    for _ in range(_TRIES):
        source = sample_source(rng)
        # Only an edit of several parts can be carried out in part.
        in_part = criterion == "edit_execution" and wanted in (2, 4)
        edit = sample_edit(rng, source, "hard" if in_part else choice(rng, DIFFICULTIES))
        target = _attempt(rng, source, edit)
        ideal = compare_readings(oracle.ideal(source), oracle.ideal(target), edit)
        if score_of(criterion, ideal) == wanted:
            break
    images = render(source), aged(rng, render(target))
    return images, criterion, edit.text, edit_answer(criterion, *images, edit)


def _attempt(rng: np.random.Generator, source: Scene, edit: Edit) -> Scene:
    """What an editor of any skill might make of the source."""
    if rng.random() < 0.15:
        return sample_source(rng)
    wrong, careless = rng.random(2)
    return sample_target(rng, source, edit, untouched=0.1, wrong=wrong, careless=careless * rng.integers(0, 2))
