"""The records of a miniature curation: pictures drawn right and wrong, edits right, wrong, careless and untouched."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from firm_jax import storage
from firm_jax.curation.stage import Example
from firm_jax.data.images import load_image, to_array
from firm_jax.shapes import edit_teach, oracle, teach
from firm_jax.shapes.edit_oracle import compare_readings
from firm_jax.shapes.edits import Edit, sample_target
from firm_jax.shapes.oracle import Reading
from firm_jax.shapes.other_instructions import by_text
from firm_jax.shapes.render import render, to_pil
from firm_jax.shapes.scene import TAGS, Prompt, choice, corrupt_prompt, sample_prompt, sample_scene

SOURCE = "shapes"
# Apart from the streams of critics' training data and of the benchmark, which begin with other numbers.
_STREAM = 26031
FAULTS = {"gen": ("wrong",), "edit": ("untouched", "wrong", "careless")}


def draw_records(folder: Path, task: str, count: int, seed: int, faults: Mapping[str, float]) -> Path:
    """Write `count` records of the task "gen" or "edit" with their pictures; returns the list. The same every time.

    faults: the probabilities of FAULTS, as `corrupt_prompt` and `sample_target` take them.
    """
    file = folder / "records.jsonl"
    if file.exists():
        return file
    with storage.writing(file):
        storage.make_folder(folder)
        lines = []
        for number in range(count):
            rng = np.random.default_rng([_STREAM, task == "edit", seed, number])
            asked, pictures = _generated(rng, **faults) if task == "gen" else _edited(rng, **faults)
            record = {"id": f"{task}_{number:05d}", **asked.to_json()}
            for field, pixels in pictures.items():
                record[field] = f"{number:05d}_{field}.png"
                to_pil(pixels).save(folder / record[field])
            lines.append(json.dumps(record) + "\n")
        with storage.whole(file) as staging:  # last: once it is there, all is
            staging.write_text("".join(lines))
    return file


def _generated(rng: np.random.Generator, *, wrong: float) -> tuple[Prompt, dict[str, np.ndarray]]:
    prompt = sample_prompt(rng, choice(rng, TAGS))
    scene = sample_scene(rng, corrupt_prompt(rng, prompt, wrong))
    return prompt, {"image": teach.aged(rng, render(scene))}


def _edited(rng: np.random.Generator, **faults: float) -> tuple[Edit, dict[str, np.ndarray]]:
    source, edit = edit_teach.sample_task(rng)
    target = sample_target(rng, source, edit, **faults)
    return edit, {"source": render(source), "image": teach.aged(rng, render(target))}


def asked_of(file: Path, task: str) -> list[Prompt | Edit]:
    """What the instructions of a list mean."""
    kind = Prompt if task == "gen" else Edit
    return [kind.from_json(json.loads(line)) for line in file.read_text().splitlines()]


class Truth:
    """The oracle's own scores of examples about these records, whatever a teacher has said."""

    def __init__(self, file: Path, task: str):
        self._folder, self._asked = file.parent, by_text(asked_of(file, task))
        self._readings: dict[str, Reading] = {}

    def score(self, example: Example) -> int:
        """1 to 5."""
        asked, readings = self._asked[example.prompt], [self._read(path) for path in example.images]
        if isinstance(asked, Prompt):
            return oracle.share_to_score(float(np.mean(oracle.check_reading(*readings, asked))))
        return edit_teach.score_of(example.criterion, compare_readings(*readings, asked))

    def _read(self, path: str) -> Reading:
        if path not in self._readings:
            self._readings[path] = oracle.inspect(to_array(load_image(path, self._folder)))
        return self._readings[path]
