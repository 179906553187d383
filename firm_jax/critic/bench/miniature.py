"""The miniature benchmark: pictures of the shapes world in FIRM-Bench's files, scored by the oracle in people's place.

`python -m firm_jax.critic.bench.miniature FOLDER` writes `bench_gen` and `bench_edit`, as they ship with the package.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from firm_jax.critic.bench.records import HUMAN, ITEMS
from firm_jax.critic.parse import parse_edit
from firm_jax.shapes import edit_teach, oracle, teach
from firm_jax.shapes.render import render, to_pil

COUNT = 120
# Apart from the streams that critics are trained on, which begin with a small seed.
SEED = 12032047


def write_bench(folder: Path, task: str, count: int = COUNT) -> None:
    """Write `count` items of the task "gen" or "edit": the same ones every time."""
    folder, files = Path(folder), {ITEMS: [], HUMAN: []}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / HUMAN).parent.mkdir(exist_ok=True)
    for number, (item, human, images) in enumerate(_items(task, count)):
        name = {"id": f"{task}_{number:03d}"}
        for field, image in images.items():
            item[field] = f"images/{number:03d}_{field}.png"
            image.save(folder / item[field], optimize=True)
        files[ITEMS].append(name | item)
        files[HUMAN].append(name | human)
    for file, rows in files.items():
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _items(task: str, count: int) -> Iterator[tuple[dict, dict, dict[str, Image.Image]]]:
    """What is shown, its score, and the pictures by field; scores are about balanced."""
    for number in range(count):
        rng = np.random.default_rng([SEED, task == "edit", number])
        yield _generated(rng, 1 + number % 5) if task == "gen" else _edited(rng)


def _generated(rng: np.random.Generator, wanted: int) -> tuple[dict, dict, dict[str, Image.Image]]:
    prompt, scene = teach.pair_for_alignment(rng, wanted)
    picture = to_pil(teach.aged(rng, render(scene)))
    score = oracle.alignment_score(np.asarray(picture, np.float32) / 255, prompt)
    difficulty = "easy" if prompt.difficulty == "easy" else "hard"
    return {"prompt": prompt.text, "difficulty": difficulty}, {"score": score}, {"image": picture}


def _edited(rng: np.random.Generator) -> tuple[dict, dict, dict[str, Image.Image]]:
    (source, edited), criterion, instruction, answer = edit_teach.critic_example(rng)
    criterion = criterion.removeprefix("edit_")
    (score,) = parse_edit(answer).scores
    item = {"prompt": instruction, "criterion": criterion}
    return item, {"criterion": criterion, "score": score}, {"source": to_pil(source), "image": to_pil(edited)}


def main(folder: str) -> None:
    for task in ("gen", "edit"):
        write_bench(Path(folder) / f"bench_{task}", task)


if __name__ == "__main__":
    main(*sys.argv[1:])
