"""The files of a curation: examples to train on, examples held out, and what was set aside and why."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from firm_jax import storage
from firm_jax.curation.selection import Look, Rejected, held_out
from firm_jax.curation.stage import Example
from firm_jax.data.conversation_files import write_parquet, write_sharegpt
from firm_jax.data.conversations import Conversation
from firm_jax.data.images import read_image_file
from firm_jax.data.records import QuarantinedRecord

FORMATS: dict[str, Callable[..., int]] = {"parquet": write_parquet, "jsonl": write_sharegpt}
EXAMPLES, HELD_OUT = "examples", "held_out"
SHOWN = 64  # of 256: of how many examples what the teacher was shown is remembered for the report


def lot(one: Example, seed: int) -> bytes:
    """By which examples are drawn for the report."""
    return hashlib.sha256(f"shown {seed} {one.id}".encode()).digest()


def may_be_shown(one: Example, seed: int) -> bool:
    """Whether an example is one of those drawn for the report."""
    return lot(one, seed)[0] < SHOWN


def write_examples(
    workdir: Path, kept: Sequence[Example], looks: Mapping[str, Look], folder: Path, config
) -> dict[str, list[Example]]:
    """Write both parts in every format of the config, each file whole or as it was before; returns the parts.

    A part without an example has no file: one that an earlier selection has left is removed.
    """
    aside = held_out(kept, looks, config.output.held_out, config.seed)
    parts = {
        EXAMPLES: [one for one, out in zip(kept, aside, strict=True) if not out],
        HELD_OUT: [one for one, out in zip(kept, aside, strict=True) if out],
    }
    for name, examples in parts.items():
        for ending, write in FORMATS.items():
            file = workdir / f"{name}.{ending}"
            if examples and ending in config.output.formats:
                write(file, conversations(examples, folder))
            else:
                file.unlink(missing_ok=True)
    return parts


def conversations(examples: Iterable[Example], folder: Path) -> Iterator[Conversation]:
    """What `data.conversations` gives back of the files, with the images' files as they are."""
    for one in examples:
        images = tuple(read_image_file(path, folder) for path in one.images)
        yield Conversation(images, one.question, one.answer, one.criterion, one.id)


def write_quarantine(
    workdir: Path, records: Iterable[QuarantinedRecord], missing: Iterable[dict], rejected: Iterable[Rejected]
) -> None:
    """Replace `quarantine.jsonl`: records that could not be used, answers that are missing, examples not selected.

    `step` tells them apart ("record", "answer", "selection"); each has a `reason`.
    """
    file = workdir / "quarantine.jsonl"
    lines = [{"step": "record", **dataclasses.asdict(one)} for one in records]
    lines += [{"step": "answer", **one} for one in missing]
    lines += [
        {"step": "selection", "example": one.example.id, "reason": one.reason, "detail": one.detail} for one in rejected
    ]
    with storage.writing(file), storage.whole(file) as staging, staging.open("w", encoding="utf-8") as out:
        for line in lines:
            out.write(json.dumps(line) + "\n")
