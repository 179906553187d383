"""The items of FIRM-Bench: what a critic is shown, joined to what people said of it.

A benchmark's folder holds `bench_v1.jsonl`, a line for each picture, and `result/human_bench_v1.jsonl`, people's
scores of them; paths of pictures are relative to the folder. How the fields are called is declared in `Fields`. What
cannot be used is set aside with file, line and reason, and every picture is decoded once before anything is judged, so
that all critics are measured on the same items.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from firm_jax.data.candidates import Picture
from firm_jax.data.prompts import parse_prompt
from firm_jax.data.records import (
    MalformedRecord,
    QuarantinedRecord,
    check_budget,
    check_storable,
    check_text,
    collect,
    collect_json,
)
from firm_jax.embedded import embedded_path
from firm_jax.errors import ConfigError, DataError

ITEMS, HUMAN = "bench_v1.jsonl", "result/human_bench_v1.jsonl"
CRITERIA = {"gen": ("instruction",), "edit": ("execution", "consistency")}
DIFFICULTIES = ("easy", "hard")
# A benchmark is small: with the budget of training data, one broken line of 250 would refuse it.
MAX_BAD_FRACTION = 0.05


@dataclasses.dataclass(frozen=True)
class Fields:
    """The field of the files that holds each part of an item; a part whose field is "" is not read.

    The names of the published files are not known to us; these are a guess, to be corrected by `fields_from`.

    Attributes:
      id: names an item in both files, a text or a whole number; human_id: in the scores, where it is another field.
      prompt: caption or instruction; requirement: what is to be checked beside it.
      image: path of the picture that is judged, or a list of paths, the source first.
      source: path of the picture that was edited.
      difficulty: "easy" or "hard".
      score: people's score, 1..5, for the criterion named by `criterion` in either file.
      execution, consistency: people's score for that criterion, where a line holds both.
    """

    id: str = "id"
    human_id: str = "id"
    prompt: str = "prompt"
    requirement: str = "requirement"
    image: str = "image"
    source: str = "source"
    difficulty: str = "difficulty"
    criterion: str = "criterion"
    score: str = "score"
    execution: str = "execution"
    consistency: str = "consistency"


def fields_from(given: Iterable[str]) -> Fields:
    """The usual fields with those of `given` ("name=field") in their place. ConfigError for a name that is none."""
    known, chosen = [field.name for field in dataclasses.fields(Fields)], {}
    for text in given:
        name, equals, field = text.partition("=")
        if name not in known or not equals:
            raise ConfigError(f"--fields {text}: give NAME=FIELD, the name being one of {', '.join(known)}")
        chosen[name] = field
    if "id" in chosen:
        chosen.setdefault("human_id", chosen["id"])
    return Fields(**chosen)


@dataclasses.dataclass(frozen=True)
class Item:
    """One criterion of one picture.

    pictures: in the order in which a critic is shown them, the source first. sha256: of their files. human: people's
    score 1..5. difficulty: "easy", "hard" or None.
    """

    id: str
    criterion: str
    prompt: str
    requirement: str
    pictures: tuple[Picture, ...]
    sha256: tuple[str, ...]
    human: int
    difficulty: str | None


@dataclasses.dataclass(frozen=True)
class Bench:
    """The usable items of a benchmark in the order of its file, what was set aside, and a hash of all that counts."""

    task: str
    items: tuple[Item, ...]
    quarantined: tuple[QuarantinedRecord, ...]
    sha256: str


@dataclasses.dataclass(frozen=True)
class _Asked:
    """An item before its score is known; criteria: those that its line speaks of."""

    line: int
    id: str
    criteria: tuple[str, ...]
    named: bool
    prompt: str
    requirement: str
    pictures: tuple[Picture, ...]
    difficulty: str | None


def read_bench(
    folder: str | Path, task: str, fields: Fields | None = None, max_bad_fraction: float = MAX_BAD_FRACTION
) -> Bench:
    """The benchmark in a folder or `embedded:` part, for the task "gen" or "edit".

    Raises ConfigError for another task, and DataError when a file is missing, when no line has a field that is needed
    (with the fields that there are and what to do), or when of either file more than `max_bad_fraction` of the lines
    cannot be used, or all of them.
    """
    if task not in CRITERIA:
        raise ConfigError(f"the task is {task!r}; give one of {', '.join(CRITERIA)}")
    folder, fields = embedded_path(str(folder)) or Path(folder), fields or Fields()
    items_file, human_file = folder / ITEMS, folder / HUMAN
    lines, refused = _objects(items_file)
    said, also_refused = _objects(human_file)
    counts = {items_file: len(lines) + len(refused), human_file: len(said) + len(also_refused)}
    _check_fields(items_file, lines, {name: [getattr(fields, name)] for name in ("id", "prompt", "image")})
    if task == "edit" and not any(isinstance(content.get(fields.image), list) for _, content in lines):
        _check_fields(items_file, lines, {"source": [fields.source]})
    scored = {"score": [fields.score, *(getattr(fields, name) for name in CRITERIA[task] if task == "edit")]}
    _check_fields(human_file, said, {"human_id": [fields.human_id], **scored})
    asked, bad = collect(str(items_file), lines, lambda content, line: _asked(content, line, items_file, task, fields))
    scores, bad_scores = collect(str(human_file), said, lambda content, line: _scores(content, line, task, fields))
    items, left_over = _joined(asked, [one for row in scores for one in row], items_file, human_file)
    usable, bad_images = _verified(items, items_file)
    refused += also_refused + bad + bad_scores + left_over + bad_images
    refused.sort(key=lambda one: (one.file, one.line))
    for file, count in counts.items():
        bad = list({one.line: one for one in refused if one.file == str(file)}.values())
        check_budget(str(file), count - len(bad), bad, max_bad_fraction)
    digest = hashlib.sha256(repr((task, [dataclasses.replace(one, pictures=()) for one in usable])).encode())
    return Bench(task, tuple(usable), tuple(refused), digest.hexdigest())


def _objects(file: Path) -> tuple[list[tuple[int, dict]], list[QuarantinedRecord]]:
    """The lines that are JSON objects, with their numbers."""

    def parse(content: Any, line: int) -> tuple[int, dict]:
        check_storable(content)
        if not isinstance(content, dict):
            raise MalformedRecord("not a JSON object")
        return line, content

    try:
        return collect_json(str(file), parse)
    except OSError as error:
        raise DataError(
            f"cannot read {file}: {error.strerror}. The benchmark is a folder with {ITEMS} and {HUMAN} in it."
        ) from error


def _check_fields(file: Path, lines: Sequence[tuple[int, dict]], wanted: dict[str, list[str]]) -> None:
    """DataError unless, for every part, some line has one of its fields."""
    for name, fields in wanted.items():
        if not any(field in content for _, content in lines for field in fields):
            number, first = lines[0] if lines else (1, {})
            shown = ", ".join(repr(field)[:60] for field in first) or "none"
            raise DataError(
                f"{file}: no line has the field {' or '.join(map(repr, fields))} for the {name.replace('_', ' ')}. "
                f"Line {number} has the fields {shown}. Say which it is with --fields {name}=FIELD, in a config with "
                f"fields.{name}."
            )


def _asked(content: dict, line: int, file: Path, task: str, fields: Fields) -> _Asked:
    record = parse_prompt(
        {"prompt": content.get(fields.prompt), "requirement": content.get(fields.requirement)}, str(file), line
    )
    paths = [path for field in (fields.source, fields.image) for path in _paths(content.get(field), field)]
    if task == "gen":
        paths = _paths(content.get(fields.image), fields.image)
    count = {"gen": 1, "edit": 2}[task]
    if len(paths) != count:
        raise MalformedRecord(f"{len(paths)} pictures; {'one is' if count == 1 else 'source and edit are'} judged")
    criterion = _criterion(content.get(fields.criterion), task)
    return _Asked(
        line,
        _id(content.get(fields.id), fields.id),
        (criterion,) if criterion else CRITERIA[task],
        criterion is not None,
        record.text,
        record.requirement,
        tuple(Picture(path, file.parent) for path in paths),
        _difficulty(content.get(fields.difficulty)),
    )


def _scores(content: dict, line: int, task: str, fields: Fields) -> list[tuple[int, str, str | None, int]]:
    """(line, id, criterion, score) of one line of people's scores; the criterion None where the item is to say it."""
    name = _id(content.get(fields.human_id), fields.human_id)
    if task == "edit":
        both = [(one, content.get(getattr(fields, one))) for one in CRITERIA[task]]
        if found := [(line, name, one, _score(value)) for one, value in both if value is not None]:
            return found
    criterion = _criterion(content.get(fields.criterion), task)
    return [(line, name, criterion, _score(content.get(fields.score)))]


def _joined(
    asked: Sequence[_Asked], scores: Sequence[tuple[int, str, str | None, int]], items_file: Path, human_file: Path
) -> tuple[list[tuple[int, Item]], list[QuarantinedRecord]]:
    """Items with their line; an item or a score that comes twice, or without the other, is set aside."""
    refused: list[QuarantinedRecord] = []
    known: dict[tuple, tuple[int, int]] = {}
    twice = set()
    for line, name, criterion, score in scores:
        if (name, criterion) in known:
            twice.add((name, criterion))
            reason = f"scores {name!r} again after line {known[name, criterion][0]}: neither counts"
            refused.append(QuarantinedRecord(str(human_file), line, reason))
        else:
            known[name, criterion] = line, score
    items, seen, used = [], set(), set()
    for one in asked:
        fresh = [criterion for criterion in one.criteria if (one.id, criterion) not in seen]
        if not fresh:
            refused.append(QuarantinedRecord(str(items_file), one.line, f"the item {one.id!r} comes again"))
            continue
        seen.update((one.id, criterion) for criterion in fresh)
        before = len(items)
        for criterion in fresh:
            # What a line of scores leaves open is about the one criterion that the item names, or that there is.
            keys = [(one.id, criterion)] + [(one.id, None)] * (one.named or len(one.criteria) == 1)
            if key := next((key for key in keys if key in known), None):
                used.add(key)
                if key not in twice:
                    shown = (one.prompt, one.requirement, one.pictures, ())
                    items.append((one.line, Item(one.id, criterion, *shown, known[key][1], one.difficulty)))
        if len(items) == before:
            refused.append(QuarantinedRecord(str(items_file), one.line, f"no usable human score of {one.id!r}"))
    refused += [
        QuarantinedRecord(str(human_file), line, f"a score of {key[0]!r}, which is no usable item")
        for key, (line, _) in known.items()
        if key not in used
    ]
    return items, refused


def _verified(items: Sequence[tuple[int, Item]], file: Path) -> tuple[list[Item], list[QuarantinedRecord]]:
    """The items whose pictures can all be decoded, with the hashes of their files."""

    def look(picture: Picture) -> str | DataError:
        try:
            return picture.open()[1]
        except DataError as error:
            return error

    pictures = list(dict.fromkeys(picture for _, item in items for picture in item.pictures))
    with ThreadPoolExecutor() as pool:
        found = dict(zip(pictures, pool.map(look, pictures), strict=True))
    usable, refused = [], {}
    for line, item in items:
        hashes = tuple(found[picture] for picture in item.pictures)
        if problem := next((one for one in hashes if isinstance(one, DataError)), None):
            refused[line] = QuarantinedRecord(str(file), line, str(problem))
        else:
            usable.append(dataclasses.replace(item, sha256=hashes))
    return usable, list(refused.values())


def _id(value: Any, field: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise MalformedRecord(f"{field} names no item: it is neither a text nor a whole number")
    return str(value)


def _paths(value: Any, field: str) -> list[str]:
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise MalformedRecord(f"{field} is neither a path nor a list of paths")
    for path in paths:
        check_text(path)
    return paths


def _criterion(value: Any, task: str) -> str | None:
    if value is None:
        return None
    names = {name: name for name in CRITERIA[task]} | {f"{task}_{name}": name for name in CRITERIA[task]}
    if not isinstance(value, str) or value.lower() not in names:
        raise MalformedRecord(f"criterion {str(value)[:40]!r} is none of {', '.join(CRITERIA[task])}")
    return names[value.lower()]


def _difficulty(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value.lower() not in DIFFICULTIES:
        raise MalformedRecord(
            f"difficulty {str(value)[:40]!r} is neither easy nor hard (an empty field for difficulty leaves it out)"
        )
    return value.lower()


def _score(value: Any) -> int:
    """A whole number 1..5, given as a number or as text."""
    try:
        score = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else 0
    except (ValueError, OverflowError):
        score = 0
    if score not in (1, 2, 3, 4, 5):
        raise MalformedRecord(f"the human score {str(value)[:40]!r} is no whole number from 1 to 5")
    return int(score)
