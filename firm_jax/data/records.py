"""Records from text files that nobody vouches for: bounded lines, strict JSON, a quarantine with a budget.

A record that cannot be used never stops the reading and never slips through: it is set aside with its file, line
and reason. How many may be set aside before the file as a whole is refused is the reader's budget.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from firm_jax.errors import ConfigError, DataError, WorkdirError

Record = TypeVar("Record")

# One prompt or conversation is a few kilobytes; a megabyte on one line is a broken file, and is never held whole.
MAX_RECORD_BYTES = 1 << 20
DEFAULT_MAX_BAD_FRACTION = 0.001
SHOWN_IN_ERROR = 5

BYTE_ORDER_MARK = "\ufeff"
_JSON_SPACE = re.compile(r"[ \t\n\r]*")


class MalformedRecord(ValueError):
    """One record that cannot be used; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class QuarantinedRecord:
    """A record set aside: where it is (line from 1) and why it cannot be used."""

    file: str
    line: int
    reason: str


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes | None]]:
    """Yield `(line number from 1, bytes without the line end)`; None for a line longer than `MAX_RECORD_BYTES`.

    A line that is too long is skipped in pieces, so memory stays bounded whatever the file holds. Blank lines at
    the end of the file are not lines.
    """
    with open(path, "rb") as file:
        number = 0
        blank: list[int] = []
        while piece := file.readline(MAX_RECORD_BYTES + 2):
            number += 1
            line: bytes | None = piece.removesuffix(b"\n").removesuffix(b"\r")
            if len(line) > MAX_RECORD_BYTES:
                while piece and not piece.endswith(b"\n"):
                    piece = file.readline(MAX_RECORD_BYTES)
                line = None
            elif not line.strip():
                blank.append(number)
                continue
            yield from ((earlier, b"") for earlier in blank)
            blank.clear()
            yield number, line


def decode_text(raw: bytes | None) -> str:
    """UTF-8 text of one line as `read_lines` yields it; MalformedRecord says why it has none."""
    if raw is None:
        raise MalformedRecord(f"longer than {MAX_RECORD_BYTES} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedRecord("not UTF-8") from error
    check_text(text)
    return text


def read_document(path: str | os.PathLike) -> str:
    """The UTF-8 text of a whole file; MalformedRecord where it is not UTF-8 or begins with a byte order mark."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedRecord("not UTF-8") from error
    if text.startswith(BYTE_ORDER_MARK):
        raise MalformedRecord("begins with a byte order mark (save the file as UTF-8 without BOM)")
    return text


def check_text(text: str) -> None:
    """MalformedRecord for text that is blank, or that no tokenizer and no JSON file should be given."""
    if not text.strip():
        raise MalformedRecord("empty")
    if BYTE_ORDER_MARK in text:
        raise MalformedRecord("holds a byte order mark (save the file as UTF-8 without BOM)")
    if "\0" in text:
        raise MalformedRecord("holds a NUL character")


def parse_json(text: str) -> Any:
    """The JSON value of one line; MalformedRecord with the column where it breaks."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise MalformedRecord(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise MalformedRecord("JSON nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise MalformedRecord("JSON number out of range") from error


def check_storable(value: Any) -> None:
    """MalformedRecord for a parsed value that could not be written out again as bounded, strict UTF-8 JSON."""
    try:
        stored = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise MalformedRecord("holds half of a surrogate pair, which is not text") from error
    except RecursionError as error:
        raise MalformedRecord("JSON nested too deeply") from error
    except ValueError as error:
        raise MalformedRecord("holds NaN or Infinity, which JSON does not have") from error
    if len(stored) > MAX_RECORD_BYTES:
        raise MalformedRecord(f"longer than {MAX_RECORD_BYTES} bytes")


def iterate_json_list(document: str) -> Iterator[tuple[int, Any]]:
    """Yield `(line on which it begins, element)` of a document that is one JSON list.

    Raises MalformedRecord, with line and column, for a document that is not one: what follows a syntax error cannot
    be told apart, so unlike a bad element it spoils the whole document.
    """
    decoder = json.JSONDecoder()

    def skip_space(position: int) -> int:
        return _JSON_SPACE.match(document, position).end()

    line, counted = 1, 0
    try:
        position = skip_space(0)
        if document[position : position + 1] != "[":
            raise MalformedRecord("not a JSON list of objects")
        position = skip_space(position + 1)
        closed = document[position : position + 1] == "]"
        while not closed:
            line += document.count("\n", counted, position)
            counted = position
            element, position = decoder.raw_decode(document, position)
            yield line, element
            position = skip_space(position)
            closed = document[position : position + 1] == "]"
            if not closed:
                if document[position : position + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' delimiter", document, position)
                position = skip_space(position + 1)
        end = skip_space(position + 1)
        if end != len(document):
            raise json.JSONDecodeError("Extra data", document, end)
    except json.JSONDecodeError as error:
        raise MalformedRecord(f"not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise MalformedRecord(f"JSON nested too deeply after line {line}") from error
    except MalformedRecord:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise MalformedRecord(f"JSON number out of range after line {line}") from error


def collect(
    file: str, items: Iterable[tuple[int, Any]], parse: Callable[[Any, int], Record]
) -> tuple[list[Record], list[QuarantinedRecord]]:
    """Parse every `(line, item)` with `parse(item, line)`; what raises MalformedRecord is quarantined."""
    records, quarantined = [], []
    for line, item in items:
        try:
            records.append(parse(item, line))
        except MalformedRecord as error:
            quarantined.append(QuarantinedRecord(file, line, str(error)))
    return records, quarantined


def collect_json(source: str, parse: Callable[[Any, int], Record]) -> tuple[list[Record], list[QuarantinedRecord]]:
    """`collect` over the elements of a .json file (one list) or a .jsonl file (one object a line)."""
    if source.endswith(".jsonl"):
        return collect(source, read_lines(source), lambda raw, line: parse(parse_json(decode_text(raw)), line))
    try:
        return collect(source, iterate_json_list(read_document(source)), parse)
    except MalformedRecord as error:
        raise DataError(
            f"{source}: {error}. Make it one JSON list of objects; a file with one object a line is named .jsonl."
        ) from error


def check_budget(file: str, usable: int, quarantined: list[QuarantinedRecord], max_bad_fraction: float) -> None:
    """DataError when more than `max_bad_fraction` of a file's records are quarantined, or none is usable."""
    if not 0.0 <= max_bad_fraction < 1.0:
        raise ConfigError(f"max_bad_fraction is {max_bad_fraction}; give a fraction in [0, 1)")
    total = usable + len(quarantined)
    if total == 0:
        raise DataError(f"{file} is empty: it holds no record. Give a file with at least one.")
    if usable and len(quarantined) / total <= max_bad_fraction:
        return
    shown = "; ".join(f"line {bad.line}: {bad.reason}" for bad in quarantined[:SHOWN_IN_ERROR])
    more = len(quarantined) - SHOWN_IN_ERROR
    raise DataError(
        f"{file}: {len(quarantined)} of {total} records cannot be used, more than the {max_bad_fraction:.2%} that "
        f"max_bad_fraction allows: {shown}{f'; and {more} more' if more > 0 else ''}. "
        "Correct these lines, or raise max_bad_fraction to leave them out."
    )


def write_quarantine(path: str | os.PathLike, quarantined: Iterable[QuarantinedRecord]) -> None:
    """Replace the JSONL file at `path` by these records (`file`, `line`, `reason`); none of them, no file."""
    path = Path(path)
    lines = [json.dumps(dataclasses.asdict(record)) + "\n" for record in quarantined]
    try:
        if lines:
            path.write_text("".join(lines), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise WorkdirError(f"cannot write the quarantine file {path}: {error}. Make its folder writable.") from error
