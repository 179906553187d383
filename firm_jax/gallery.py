"""Judged pictures that a run keeps in `images/judged/`, so that a person can see whether to trust the critic.

A file is `<set>_<epoch>_<image>.png`, exactly what the critic was shown; an edit's sources lie beside it as
`<the same>.source1.png` and so on. It carries its record as JSON under the key `judged`: `set` ("train" or "eval"),
`epoch` (epochs done, as in metrics.jsonl), `image`, `kept` (why), `prompt`, `requirement`, `sources` (names), `reward`,
and `judgements`, each with `criterion`, `score`, `expected`, `entropy`, `status`, `reason`, `text`, `rubric`, `value`
(on [0, 1], as the reward takes it; null when it is missing) and `oracle` (the truth on [0, 1]; null where unknown).
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from firm_jax import storage

FOLDER = "judged"  # within a run's images/
BY_CHANCE, THE_SAME, FAILED = "by chance", "the same each time", "failed judgement"
SAMPLE = 3  # pictures of an epoch that are not chosen for what the critic says
_KEY = "judged"

Record = dict[str, Any]


def is_due(epoch: int, every: int, last: int) -> bool:
    """Whether pictures of this epoch are kept: of numbers 0, 1, 2, 3, 4, 6, 8, 12, 16, ... in units of `every`, and of
    the last. So they are about as dense in proportion early and late, and their number grows as a logarithm."""
    number, rest = divmod(epoch, every)
    below_two_digits = max(number.bit_length() - 2, 0)
    return epoch == last or (rest == 0 and number >> below_two_digits << below_two_digits == number)


def choose(records: Sequence[Record], rng: np.random.Generator, *, same: bool) -> dict[int, str]:
    """Which of the records' pictures to keep, at most 12, and why: index -> reason.

    For no reason two of one prompt are kept. Ties are broken by chance.

    same: keep the first SAMPLE, where these are the same pictures every time, instead of some by chance.
    """
    shuffled = rng.permutation(len(records)).tolist()
    chosen = dict.fromkeys(range(len(records))[:SAMPLE] if same else shuffled[:SAMPLE], THE_SAME if same else BY_CHANCE)
    with_oracle = has_oracle(records)

    def add(reason: str, count: int, measure: Callable[[Record], float | None], sign: int = 1) -> None:
        known = [(sign * value, i) for i in shuffled if i not in chosen and (value := measure(records[i])) is not None]
        known.sort(key=lambda pair: -pair[0])
        first = {}  # of each prompt
        for _, index in known:
            first.setdefault((records[index]["prompt"], *records[index]["sources"]), index)
        chosen.update((index, reason) for index in list(first.values())[:count])

    add("highest reward", 2, lambda record: record["reward"])
    add("lowest reward", 2, lambda record: record["reward"], -1)
    add("highest entropy", 2, entropy)
    add("largest disagreement", 2, lambda record: disagreement(record, with_oracle) or None)
    add(FAILED, 1, lambda record: has_failed(record) or None)
    return chosen


def has_failed(record: Record) -> bool:
    """Whether a judgement of the picture has no score."""
    return any(judgement["value"] is None for judgement in record["judgements"])


def entropy(record: Record) -> float | None:
    """The highest of the judgements' entropies at the score, in nats."""
    return max((j["entropy"] for j in record["judgements"] if j["entropy"] is not None), default=None)


def has_oracle(records: Iterable[Record]) -> bool:
    """Whether the truth is known about any of the pictures."""
    return any(judgement["oracle"] is not None for record in records for judgement in record["judgements"])


def disagreement(record: Record, with_oracle: bool) -> float | None:
    """How far apart, on [0, 1], two opinions on the picture are for the criterion in which they differ most.

    The critic's and the oracle's or, without an oracle, the score that the critic wrote and the one expected under its
    probabilities. None where there are no two.
    """
    if with_oracle:
        pairs = [(j["value"], j["oracle"]) for j in record["judgements"]]
    else:
        pairs = [(unit(j["score"]), unit(j["expected"])) for j in record["judgements"]]
    return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=None)


def unit(score: float | Sequence[float] | None) -> float | None:
    """A score of 1 to 5 on [0, 1]; of several sub-scores the lowest."""
    return None if score is None else (float(np.min(score)) - 1) / 4


def write(folder: Path, picture: Image.Image, sources: Sequence[Image.Image], record: Record) -> str:
    """Keep a picture with its record and its sources. Returns the file's name. Raises WorkdirError."""
    info = PngInfo()
    info.add_text(_KEY, json.dumps(record))
    stem = f"{record['set']}_{record['epoch']:05d}_{record['image']:05d}"
    with storage.writing(folder):
        folder.mkdir(exist_ok=True)
    for number, source in enumerate(sources, 1):
        with storage.writing_whole(path := folder / f"{stem}.source{number}.png"):
            source.save(path)
    with storage.writing_whole(path := folder / f"{stem}.png"):
        picture.save(path, pnginfo=info)
    return path.name


def forget(folder: Path, after: int) -> None:
    """Remove the pictures of epochs beyond `after`: a resumed run does these again."""
    for path in folder.glob("*_*_*.png"):
        ours = re.fullmatch(r"[a-z]+_(\d+)_\d+(\.source\d+)?\.png", path.name)
        if ours and int(ours[1]) > after:
            path.unlink()


def read(folder: Path) -> tuple[list[tuple[Path, Record]], list[str]]:
    """The pictures with their records, in the order of their names, and the names of those that cannot be read."""
    found, broken = [], []
    for path in sorted(folder.glob("*_*_*.png")):
        if ".source" in path.name:
            continue
        try:
            for file in (*sources_of(path), path):
                with Image.open(file) as image:
                    image.load()
            found.append((path, json.loads(image.info[_KEY])))
        except (OSError, ValueError, KeyError, SyntaxError):  # the last is what Pillow says of a damaged PNG
            broken.append(path.name)
    return found, broken


def sources_of(path: Path) -> list[Path]:
    """The files of the sources beside a kept picture."""
    return sorted(path.parent.glob(f"{path.stem}.source*.png"))
