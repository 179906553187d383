"""Pictures that exist and are to be judged: from a list that names them, or a folder of them and a list of prompts.

A list is `.jsonl` (objects) or `.json` (one list of objects) with `image`, a path below its folder, `prompt`, and where
there is one, `requirement`; edits have `source` besides, a path or a list of paths. Beside a folder of pictures stands
a list of prompts, or for edits of instructions with their source images, as a training run reads it: the pictures, in
the order of their names, numbers in them by value, belong to its records one after the other.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from firm_jax.data.edits import parse_edit
from firm_jax.data.images import FORMATS, decode_image, read_image_file
from firm_jax.data.prompts import PromptRecord, parse_prompt
from firm_jax.data.records import (
    MalformedRecord,
    QuarantinedRecord,
    check_text,
    collect,
    collect_json,
    decode_text,
    read_lines,
)
from firm_jax.errors import DataError

ENDINGS = tuple(f".{kind.lower()}" for kind in (*FORMATS, "jpg"))


@dataclasses.dataclass(frozen=True)
class Picture:
    """A path as it stands in a record, and the folder that it must not leave."""

    path: str
    folder: Path

    def open(self) -> tuple[Image.Image, str]:
        """The image, upright, RGB, and the sha256 of its file in hexadecimal. DataError as `load_image` raises it."""
        content = read_image_file(self.path, self.folder)
        return decode_image(content, self.path), hashlib.sha256(content).hexdigest()

    def sha256(self) -> str:
        """Of the file, in hexadecimal, without decoding it."""
        return hashlib.sha256(read_image_file(self.path, self.folder)).hexdigest()


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A picture with what it was made from. sources: of an edit; empty for a picture made from text."""

    image: Picture
    sources: tuple[Picture, ...]
    asked: PromptRecord

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """In the order in which a critic is shown them."""
        return (*self.sources, self.image)


def read_candidates(
    source: str | os.PathLike, prompts: str | os.PathLike | None, *, edits: bool
) -> tuple[list[Candidate | QuarantinedRecord], str]:
    """Every record, in order, usable or set aside with the reason; and a hash of what the list, or both lists, say.

    Images are not opened. Raises DataError for a list that cannot be read at all, or that does not fit the folder.
    """
    source = Path(source)
    if source.is_dir() == (prompts is None):
        need = "needs a list of prompts beside it" if prompts is None else "names its prompts itself"
        raise DataError(f"{source} {need}: give a folder together with --prompts, or a .jsonl file alone")
    lists = source if prompts is None else Path(prompts)
    if not lists.is_file():
        raise DataError(f"{lists} is not an existing file. Give a .jsonl file, or a folder of pictures and --prompts.")
    try:
        digest = hashlib.sha256(lists.read_bytes())
        parse = _asked_edit if edits else _asked
        if prompts is None:
            return _in_order(lists, lambda fields, line: listed(fields, line, lists, edits)), digest.hexdigest()
        names = sorted((file.name for file in source.iterdir() if file.suffix.lower() in ENDINGS), key=_by_number)
        asked = _in_order(lists, lambda fields, line: parse(fields, line, lists))
    except OSError as error:
        raise DataError(f"cannot read {error.filename or lists}: {error.strerror}. Check its permissions.") from error
    digest.update("\0".join(names).encode(errors="surrogateescape"))
    if len(names) != len(asked):
        raise DataError(
            f"{source} holds {len(names)} pictures ({', '.join(ENDINGS)}) and {lists} {len(asked)} records: they "
            "belong together one by one, in order. Name the picture of each in a .jsonl file instead."
        )
    paired = zip(names, asked, strict=True)
    found = [
        one if isinstance(one, QuarantinedRecord) else Candidate(Picture(name, source), *one) for name, one in paired
    ]
    return found, digest.hexdigest()


def listed(fields: Any, line: int, file: Path, edits: bool) -> Candidate:
    """One record of a list that names its pictures; MalformedRecord with the reason."""
    sources: Any = ()
    if edits and isinstance(fields, dict):
        fields = dict(fields)
        sources = fields.pop("source", None) or []
        sources = [sources] if isinstance(sources, str) else sources
        if not isinstance(sources, list) or not sources or not all(isinstance(path, str) for path in sources):
            raise MalformedRecord("source is neither a path nor a list of paths: what was edited is to be shown too")
        for path in sources:
            check_text(path)
    record, paths = parse_edit(fields, str(file), line)
    if len(paths) > 1:
        raise MalformedRecord(f"{len(paths)} images; one is judged")
    return Candidate(Picture(paths[0], file.parent), tuple(Picture(path, file.parent) for path in sources), record)


def _asked(fields: Any, line: int, file: Path) -> tuple[tuple, PromptRecord]:
    return (), parse_prompt(fields, str(file), line)


def _asked_edit(fields: Any, line: int, file: Path) -> tuple[tuple, PromptRecord]:
    record, paths = parse_edit(fields, str(file), line)
    return tuple(Picture(path, file.parent) for path in paths), record


def _in_order(file: Path, parse: Callable[[Any, int], Any]) -> list:
    """What `parse(fields, line)` makes of every record, and those that it, or the file's format, refuses."""

    def attempt(fields: Any, line: int):
        try:
            return line, parse(fields, line)
        except MalformedRecord as error:
            return line, QuarantinedRecord(str(file), line, str(error))

    if file.suffix == ".txt":
        lines = read_lines(file)
        found, refused = collect(str(file), lines, lambda raw, line: attempt({"prompt": decode_text(raw)}, line))
    elif file.suffix in (".json", ".jsonl"):
        found, refused = collect_json(str(file), attempt)
    else:
        raise DataError(f"{file}: unknown ending {file.suffix!r}. Supported are .txt, .json and .jsonl.")
    found += [(bad.line, bad) for bad in refused]
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def _by_number(name: str) -> tuple:
    """For sorting: 2.png before 10.png."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)), name
