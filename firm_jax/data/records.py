"""Records from text files that nobody vouches for: bounded records, strict JSON, a quarantine with a budget.

A record that cannot be used never stops the reading and never slips through: it is set aside with its file, line
and reason. How many may be set aside before the file as a whole is refused is the reader's budget. Files are read in
pieces, so memory depends on the records that are kept and not on what else a file holds.
"""

import codecs
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from firm_jax.errors import ConfigError, DataError, WorkdirError

Record = TypeVar("Record")

# One prompt or conversation is a few kilobytes; a megabyte on one line is a broken file, and is never held whole.
MAX_RECORD_BYTES = 1 << 20
# Beyond this many a file is of another kind than it was taken for, and its reasons are not collected any further.
MAX_QUARANTINED = 100_000
DEFAULT_MAX_BAD_FRACTION = 0.001
SHOWN_IN_ERROR = 5

BYTE_ORDER_MARK = "\ufeff"
_PARTICULARS = re.compile(r"""'[^']*'|"[^"]*"|\d+""")
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
    for number, _, line in read_placed_lines(path):
        yield number, line


def read_placed_lines(path: str | os.PathLike) -> Iterator[tuple[int, int, bytes | None]]:
    """As `read_lines`, with the byte at which a line begins in the second place (for a blank one, the next line's)."""
    with open(path, "rb") as file:
        number = blank = begin = end = 0  # of the lines just read, so many are blank
        while piece := file.readline(MAX_RECORD_BYTES + 2):
            number += 1
            begin, end = end, end + len(piece)
            line: bytes | None = piece.removesuffix(b"\n").removesuffix(b"\r")
            if len(line) > MAX_RECORD_BYTES:
                while piece and not piece.endswith(b"\n"):
                    piece = file.readline(MAX_RECORD_BYTES)
                    end += len(piece)
                line = None
            elif not line.strip():
                blank += 1
                continue
            yield from ((earlier, begin, b"") for earlier in range(number - blank, number))
            blank = 0
            yield number, begin, line


def read_line_at(path: str | os.PathLike, begin: int) -> bytes:
    """The line that begins at a byte as `read_placed_lines` gave it, without its end."""
    with open(path, "rb") as file:
        file.seek(begin)
        return file.readline(MAX_RECORD_BYTES + 2).removesuffix(b"\n").removesuffix(b"\r")


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


def check_text(text: str) -> None:
    """MalformedRecord for text that is blank, or that no tokenizer and no JSON file should be given."""
    if not text.strip():
        raise MalformedRecord("empty")
    if BYTE_ORDER_MARK in text:
        raise MalformedRecord("holds a byte order mark (save the file as UTF-8 without BOM)")
    if "\0" in text:
        raise MalformedRecord("holds a NUL character")


def check_request_text(text: Any, what: str) -> None:
    """DataError for a text handed to a model that is no text, or too much of it to be tokenized at all.

    Takes no time, however long the text is.
    """
    if not isinstance(text, str):
        raise DataError(f"{what} is {type(text).__name__}, not a string")
    if len(text) > MAX_RECORD_BYTES:
        raise DataError(f"{what} has {len(text)} characters, more than {MAX_RECORD_BYTES}; shorten it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half of a surrogate pair, which is not text: {text[:40]!r}") from error


@dataclasses.dataclass(frozen=True)
class _Ambiguous:
    """Stands for a JSON object that names a key twice: which value counts would be a guess."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Ambiguous:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        return _Ambiguous(next(name for name in names if names.count(name) > 1))
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_json(text: str) -> Any:
    """The JSON value of one line, for `check_storable`; MalformedRecord with the column where it breaks."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedRecord(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise MalformedRecord("JSON nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise MalformedRecord("JSON number out of range") from error


def check_storable(value: Any) -> None:
    """MalformedRecord for a parsed value that could not be written out again as bounded, strict UTF-8 JSON."""

    def refuse(item: _Ambiguous):
        raise MalformedRecord(f"names the key {item.key[:40]!r} twice")

    try:
        stored = json.dumps(value, ensure_ascii=False, allow_nan=False, default=refuse).encode("utf-8")
    except MalformedRecord:
        raise
    except UnicodeEncodeError as error:
        raise MalformedRecord("holds half of a surrogate pair, which is not text") from error
    except RecursionError as error:
        raise MalformedRecord("JSON nested too deeply") from error
    except ValueError as error:
        raise MalformedRecord("holds NaN or Infinity, which JSON does not have") from error
    if len(stored) > MAX_RECORD_BYTES:
        raise MalformedRecord(f"longer than {MAX_RECORD_BYTES} bytes")


class _Window:
    """A UTF-8 file of which only a part is held: `text`, from `position` on, is more than the longest record."""

    def __init__(self, file: BinaryIO):
        self._file, self._decode = file, codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.position, self.ended = "", 0, False
        self._counted, self._line, self._column = 0, 1, 1  # the line and column of the character at `_counted`

    def fill(self) -> None:
        """Read on until the longest record would fit; what lies before `position` is dropped."""
        if self.ended or len(self.text) - self.position > MAX_RECORD_BYTES:
            return
        self.place(self.position)
        parts = [self.text[self.position :]]
        self.text, self.position, self._counted = "", 0, 0
        while not self.ended and sum(map(len, parts)) <= MAX_RECORD_BYTES:
            piece = self._file.read(MAX_RECORD_BYTES)
            self.ended = not piece
            parts.append(self._decode(piece, final=self.ended))
        self.text = "".join(parts)

    def place(self, position: int) -> tuple[int, int]:
        """Line and column in the file, from 1; never asked for a place before the last one."""
        breaks = self.text.count("\n", self._counted, position)
        if breaks:
            self._line += breaks
            self._column = position - self.text.rfind("\n", self._counted, position)
        else:
            self._column += position - self._counted
        self._counted = position
        return self._line, self._column

    def next(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            self.fill()
            self.position = _JSON_SPACE.match(self.text, self.position).end()
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]


def iterate_json_list(path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    """Yield `(line on which it begins, element)` of a file that is one JSON list.

    Raises MalformedRecord, with line and column, for a file that is not one: what follows a syntax error cannot be
    told apart, so unlike a bad element it spoils the whole file. So does an element longer than `MAX_RECORD_BYTES`.
    """
    with open(path, "rb") as file:
        window = _Window(file)
        try:
            yield from _elements(window)
        except UnicodeDecodeError as error:
            raise MalformedRecord("not UTF-8") from error
        except json.JSONDecodeError as error:
            line, column = window.place(error.pos)
            raise MalformedRecord(f"not JSON: {error.msg} at line {line} column {column}") from error


def _elements(window: _Window) -> Iterator[tuple[int, Any]]:
    def expect(characters: str, problem: str) -> str:
        found = window.next()
        if not found or found not in characters:
            raise json.JSONDecodeError(problem, window.text, window.position)
        window.position += 1
        return found

    if window.next() == BYTE_ORDER_MARK:
        raise MalformedRecord("begins with a byte order mark (save the file as UTF-8 without BOM)")
    if window.next() != "[":
        raise MalformedRecord("not a JSON list of objects")
    window.position += 1
    if window.next() == "]":
        window.position += 1
    else:
        separator = ","
        while separator == ",":
            window.next()
            line, _ = window.place(window.position)
            try:
                element, window.position = _DECODER.raw_decode(window.text, window.position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(window.text) - len("-Infinity")
                if cut and not window.ended:
                    reason = f"the element that begins on line {line} does not end within {MAX_RECORD_BYTES} characters"
                    raise MalformedRecord(reason) from error
                raise
            except RecursionError as error:
                raise MalformedRecord(f"JSON nested too deeply after line {line}") from error
            except ValueError as error:  # an integer of thousands of digits
                raise MalformedRecord(f"JSON number out of range after line {line}") from error
            yield line, element
            separator = expect(",]", "Expecting ',' delimiter")
    if window.next():
        raise json.JSONDecodeError("Extra data", window.text, window.position)


def collect(
    file: str, items: Iterable[tuple[int, Any]], parse: Callable[[Any, int], Record]
) -> tuple[list[Record], list[QuarantinedRecord]]:
    """Parse every `(line, item)` with `parse(item, line)`; what raises MalformedRecord is quarantined.

    DataError when more than `MAX_QUARANTINED` are.
    """
    records, quarantined = [], []
    for line, item in items:
        try:
            records.append(parse(item, line))
        except MalformedRecord as error:
            quarantined.append(QuarantinedRecord(file, line, str(error)))
            if len(quarantined) > MAX_QUARANTINED:
                raise DataError(
                    f"{file}: more than {MAX_QUARANTINED} records cannot be used, the last of them on line {line}: "
                    f"{error}. Is this the right file?"
                ) from error
    return records, quarantined


def collect_json(source: str, parse: Callable[[Any, int], Record]) -> tuple[list[Record], list[QuarantinedRecord]]:
    """`collect` over the elements of a .json file (one list) or a .jsonl file (one object a line)."""
    if source.endswith(".jsonl"):
        return collect(source, read_lines(source), lambda raw, line: parse(parse_json(decode_text(raw)), line))
    return collect(source, json_elements(source), parse)


def json_elements(source: str) -> Iterator[tuple[int, Any]]:
    """`iterate_json_list` of a dataset's file: DataError, with the remedy, for one that is no list."""
    try:
        yield from iterate_json_list(source)
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
    kinds = by_kind(quarantined)
    shown = "; ".join(_example(file, kind) for kind in kinds[:SHOWN_IN_ERROR])
    more = sum(map(len, kinds[SHOWN_IN_ERROR:]))
    raise DataError(
        f"{file}: {len(quarantined)} of {total} records cannot be used, more than the {max_bad_fraction:.2%} that "
        f"max_bad_fraction allows: {shown}{f'; and {more} for other reasons' if more else ''}. "
        "Correct these lines, or raise max_bad_fraction to leave them out."
    )


def by_kind(quarantined: Iterable[QuarantinedRecord]) -> list[list[QuarantinedRecord]]:
    """The records of each kind of reason, the most frequent kind first; names and numbers in a reason do not count."""
    kinds: dict[str, list[QuarantinedRecord]] = {}
    for bad in quarantined:
        kinds.setdefault(_PARTICULARS.sub("_", bad.reason), []).append(bad)
    return sorted(kinds.values(), key=len, reverse=True)


def _example(file: str, kind: list[QuarantinedRecord]) -> str:
    """The first record of a kind and how many there are."""
    first = kind[0]
    place = f"line {first.line}" if first.file == file else f"{first.file}, line {first.line}"
    return f"{place}: {first.reason}{f' ({len(kind)} like this)' if len(kind) > 1 else ''}"


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
