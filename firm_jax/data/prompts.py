"""The prompts of an RL run: one reader for every format in which they come, and the train / held-out split.

Formats: `.txt` (one prompt a line), `.json` (a ShareGPT-style list of objects), `.jsonl` (GenEval-style with `tag` and
`include`, or plain objects), and `tfds:NAME?split=SPLIT&text=COLUMN&data_dir=FOLDER` (TensorFlow Datasets).
"""

import dataclasses
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from firm_jax.data import tfds
from firm_jax.data.records import (
    DEFAULT_MAX_BAD_FRACTION,
    MalformedRecord,
    QuarantinedRecord,
    check_budget,
    check_storable,
    check_text,
    collect,
    collect_json,
    decode_text,
    read_lines,
    write_quarantine,
)
from firm_jax.errors import DataError

TEXT_KEYS = ("input_prompt", "caption", "prompt", "text")
# The longest prompt of the published sets has 1,440 bytes, and no text encoder here reads 1,024 tokens to the end. What
# is longer is no prompt, and would make the critic's whole batch as long as it is.
MAX_PROMPT_BYTES = 8192
# The split of DiffusionNFT's ShareGPT prompts, kept so that runs are comparable with published ones.
SPLIT_SEED = 42
TRAIN_FRACTION = 0.98


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """One prompt as it stands in its source.

    Attributes:
      text: the whole instruction, never cut or lower-cased.
      requirement: what the critic is asked to check beside the text; "" where the source has none.
      metadata: the record's other fields (`source`, `category`; `tag`, `include`, `exclude` of GenEval).
      source_file: the file or dataset it was read from.
      line: the line on which it begins, from 1 (for a dataset: the row).
    """

    text: str
    requirement: str = ""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    source_file: str = ""
    line: int = 0

    @property
    def group_key(self) -> tuple[str, ...]:
        """What makes two prompts the same one: the full text and requirement, so no two prompts share a group."""
        return (self.text, self.requirement)


@dataclasses.dataclass(frozen=True)
class PromptSplits:
    """Distinct prompts to train on and to evaluate with, and what happened on the way.

    Attributes:
      train, held_out: distinct prompts, in the order in which they are to be used.
      duplicates_merged: records that repeated an earlier one of the same split.
      shared: held-out prompts that are also trained on; 0 unless a separate held-out source repeats the training one.
      quarantined: the records that could not be used.
    """

    train: tuple[PromptRecord, ...]
    held_out: tuple[PromptRecord, ...]
    duplicates_merged: int = 0
    shared: int = 0
    quarantined: tuple[QuarantinedRecord, ...] = ()


def load_prompts(
    source: str | os.PathLike,
    *,
    held_out_source: str | os.PathLike | None = None,
    max_bad_fraction: float = DEFAULT_MAX_BAD_FRACTION,
    quarantine_file: str | os.PathLike | None = None,
    check: Callable[[PromptRecord], None] = lambda record: None,
) -> PromptSplits:
    """Read the prompts of a run and split them into training and held-out ones.

    Args:
      source: a file, a folder (`train.txt` or `train_metadata.jsonl`, with `test.txt` or `test_metadata.jsonl` where
        there is one; else `text_to_image.json`), or a `tfds:` name.
      held_out_source: a file or `tfds:` name with the held-out prompts; without it, and without a test file in the
        folder, 2 % of the distinct prompts are held out (`split_prompts`).
      max_bad_fraction: the share of each source's records that may be unusable.
      quarantine_file: JSONL file that receives the unusable records, also when the budget is exceeded.
      check: raises MalformedRecord for a prompt that this run cannot use: then it is quarantined like the others.

    Raises:
      DataError: a source is missing, empty, ambiguous, or has more unusable records than the budget.
      ConfigError: `max_bad_fraction` is not in [0, 1), or tensorflow-datasets is needed and not installed.
    """
    return load_splits(
        source,
        read_prompts,
        ("train.txt", "train_metadata.jsonl", "text_to_image.json"),
        ("test.txt", "test_metadata.jsonl"),
        held_out_source=held_out_source,
        max_bad_fraction=max_bad_fraction,
        quarantine_file=quarantine_file,
        check=check,
    )


def load_splits(
    source: str | os.PathLike,
    read: Callable[[str], tuple[list[PromptRecord], list[QuarantinedRecord]]],
    train_files: Sequence[str],
    test_files: Sequence[str],
    *,
    held_out_source: str | os.PathLike | None,
    max_bad_fraction: float,
    quarantine_file: str | os.PathLike | None,
    check: Callable[[PromptRecord], None],
) -> PromptSplits:
    """`load_prompts` for any kind of prompt.

    read: gives all records of one file or `tfds:` name, and those that cannot be used. train_files, test_files: the
    names by which they are found in a folder.
    """
    source = os.fspath(source)
    if not source.startswith(tfds.PREFIX) and os.path.isdir(source):
        source, test_file = _resolve_folder(Path(source), train_files, test_files)
        held_out_source = held_out_source or test_file

    sources = [source, os.fspath(held_out_source)] if held_out_source else [source]
    loaded = [_checked(*read(each), check) for each in sources]
    quarantined = [bad for _, bad_records in loaded for bad in bad_records]
    if quarantine_file is not None:
        write_quarantine(quarantine_file, quarantined)
    for each, (records, bad_records) in zip(sources, loaded, strict=True):
        check_budget(each, len(records), bad_records, max_bad_fraction)

    distinct = [merge_duplicates(records) for records, _ in loaded]
    merged = sum(len(records) - len(kept) for (records, _), kept in zip(loaded, distinct, strict=True))
    train, held_out = distinct if held_out_source else split_prompts(distinct[0])
    shared = len({record.group_key for record in train} & {record.group_key for record in held_out})
    logging.info(
        "prompts: %d to train on, %d held out; %d duplicates merged, %d records quarantined",
        *(len(train), len(held_out), merged, len(quarantined)),
    )
    if shared:
        logging.warning("%d held-out prompts of %s are also trained on (%s)", shared, sources[-1], sources[0])
    return PromptSplits(tuple(train), tuple(held_out), merged, shared, tuple(quarantined))


def _checked(
    records: list[PromptRecord], quarantined: list[QuarantinedRecord], check: Callable[[PromptRecord], None]
) -> tuple[list[PromptRecord], list[QuarantinedRecord]]:
    """Records and quarantine, in order, after those that `check` refuses have gone from one to the other."""
    usable, refused = [], []
    for record in records:
        try:
            check(record)
        except MalformedRecord as error:
            refused.append(QuarantinedRecord(record.source_file, record.line, str(error)))
        else:
            usable.append(record)
    return usable, sorted([*quarantined, *refused], key=lambda bad: bad.line)


def read_prompts(source: str | os.PathLike) -> tuple[list[PromptRecord], list[QuarantinedRecord]]:
    """Every record of one file or `tfds:` name, in order, duplicates included; and the records that cannot be used.

    Raises DataError for a source that cannot be read at all.
    """
    source = os.fspath(source)
    if source.startswith(tfds.PREFIX):
        return _read_tfds(source)
    readers = {".txt": _read_text, ".jsonl": _read_json, ".json": _read_json}
    ending = Path(source).suffix
    try:
        if not os.path.exists(source):
            raise DataError(
                f"prompt file {source or repr(source)} does not exist. Give a .txt, .json or .jsonl file, a folder "
                "that holds one, or tfds:NAME."
            )
        if not os.path.isfile(source):
            raise DataError(f"{source} is not a regular file. Give a .txt, .json or .jsonl file.")
        if ending not in readers:
            raise DataError(f"prompt file {source}: unknown ending {ending!r}. Supported are {', '.join(readers)}.")
        return readers[ending](source)
    except OSError as error:
        raise DataError(f"cannot read prompt file {source}: {error.strerror}. Check its permissions.") from error


def _read_text(source: str) -> tuple[list[PromptRecord], list[QuarantinedRecord]]:
    def parse(raw: bytes | None, line: int) -> PromptRecord:
        text = decode_text(raw)
        if "\r" in text:
            raise MalformedRecord("holds a carriage return; lines end with a line feed")
        _check_size(text)
        return PromptRecord(text, source_file=source, line=line)

    return collect(source, read_lines(source), parse)


def _read_json(source: str) -> tuple[list[PromptRecord], list[QuarantinedRecord]]:
    return collect_json(source, lambda fields, line: parse_prompt(fields, source, line))


def parse_prompt(fields: Any, source_file: str, line: int, text_keys: Sequence[str] = TEXT_KEYS) -> PromptRecord:
    """The prompt in one JSON object: ShareGPT-style, GenEval-style or plain.

    The text is the first of `text_keys` that is present; `requirement` is optional; all other fields become metadata.
    Null is the same as absent. Raises MalformedRecord with the reason.
    """
    check_storable(fields)
    if not isinstance(fields, dict):
        raise MalformedRecord(f"{_type_name(fields)} instead of an object")
    present = {key: value for key, value in fields.items() if value is not None}
    text_key = next((key for key in text_keys if key in present), None)
    if text_key is None:
        raise MalformedRecord(f"no prompt: none of the keys {', '.join(text_keys)}")
    text = present.pop(text_key)
    requirement = present.pop("requirement", "")
    for key, value in ((text_key, text), ("requirement", requirement)):
        if not isinstance(value, str):
            raise MalformedRecord(f"{key} is {_type_name(value)}, not text")
        if value or key == text_key:
            check_text(value)
    _check_size(text + requirement)
    if "include" in present:
        _check_geneval(present)
    return PromptRecord(text, requirement, present, source_file, line)


def _check_size(text: str) -> None:
    if (size := len(text.encode())) > MAX_PROMPT_BYTES:
        raise MalformedRecord(f"a prompt of {size} bytes, more than {MAX_PROMPT_BYTES}")


def _check_geneval(fields: dict[str, Any]) -> None:
    """MalformedRecord unless `tag`, `include` and `exclude` have the types that a GenEval scorer relies on."""
    if not isinstance(fields.get("tag"), str):
        raise MalformedRecord("GenEval record without a tag")
    for key in ("include", "exclude"):
        objects = fields.get(key, [])
        if not isinstance(objects, list):
            raise MalformedRecord(f"{key} is {_type_name(objects)}, not a list")
        for item in objects:
            if not (isinstance(item, dict) and isinstance(item.get("class"), str) and type(item.get("count")) is int):
                raise MalformedRecord(f"{key} holds an item without a class name and a whole count")


def _type_name(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    return names.get(type(value)) or ("a list" if isinstance(value, list) else "an object")


def merge_duplicates(records: Iterable[PromptRecord]) -> list[PromptRecord]:
    """The first record of every group key, in order: a prompt listed twice must not become two groups, or one of 2K."""
    first: dict[tuple[str, ...], PromptRecord] = {}
    for record in records:
        first.setdefault(record.group_key, record)
    return list(first.values())


def split_prompts(records: Sequence[PromptRecord]) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Split distinct prompts into `(train, held_out)` as DiffusionNFT does.

    The indices are shuffled with Python's `random.Random(42)`; the first `int(0.98 * n)` train and the rest, at least
    one, is held out. Raises DataError for fewer than two prompts.
    """
    if len(records) < 2:
        raise DataError(
            f"{len(records)} distinct prompt cannot be split into training and held-out ones. "
            "Give at least two prompts, or a separate held-out source."
        )
    indices = list(range(len(records)))
    random.Random(SPLIT_SEED).shuffle(indices)
    cut = int(len(records) * TRAIN_FRACTION)
    return [records[index] for index in indices[:cut]], [records[index] for index in indices[cut:]]


def _resolve_folder(folder: Path, train_files: Sequence[str], test_files: Sequence[str]) -> tuple[str, str | None]:
    """The training file of a prompt folder, and its held-out file where it has one."""

    def find(names: Sequence[str]) -> str | None:
        found = [str(folder / name) for name in names if (folder / name).is_file()]
        if len(found) > 1:
            raise DataError(f"{' and '.join(found)} could both be meant. Name the file instead of the folder.")
        return found[0] if found else None

    train = find(train_files)
    if train is None:
        *others, last = train_files
        raise DataError(
            f"folder {folder} holds no training prompts: looked for {', '.join(others)} and {last}. Add one of them, "
            "or name a file."
        )
    return train, find(test_files)


def _read_tfds(source: str) -> tuple[list[PromptRecord], list[QuarantinedRecord]]:
    """Rows of a dataset: the text column is the prompt, other texts, numbers and labels become metadata."""
    dataset = tfds.Dataset(source, ["text"])
    column = dataset.column("text", TEXT_KEYS, dataset.text_columns, "text")
    return dataset.read(lambda row, line: parse_prompt(dataset.scalars(row), source, line, [column]))
