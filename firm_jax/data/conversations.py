"""What a critic is trained on: pictures, a question and the right answer; one reader for every format they come in.

Formats: `.jsonl` and `.json` as LLaMA-Factory and ms-swift read them (ShareGPT-style: `messages` of one user and one
assistant turn, and `images`), `.parquet` and folders of it, as on Hugging Face, `.array_record` with records
`tf.train.Example`, and
`tfds:NAME?split=SPLIT&messages=COLUMN&images=COLUMN&criterion=COLUMN&id=COLUMN&data_dir=FOLDER`. An image is a path
below the dataset's folder, the bytes of an image file, or Hugging Face's `{bytes, path}`. The user's text begins with
one `<image>` for each image; every other text, such as `<|im_end|>`, is text and never becomes a special token.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from firm_jax.data.conversation_rows import Rows, open_rows
from firm_jax.data.images import MAX_BYTES, decode_image, read_image_file
from firm_jax.data.records import (
    DEFAULT_MAX_BAD_FRACTION,
    MalformedRecord,
    QuarantinedRecord,
    check_budget,
    check_storable,
    check_text,
    collect,
    write_quarantine,
)
from firm_jax.errors import ConfigError, DataError

IMAGE_MARK = "<image>"
# What a column is called where `columns` does not say.
COLUMNS = {
    "messages": ("messages", "conversations"),
    "images": ("images", "image"),
    "criterion": ("criterion",),
    "id": ("id",),
}
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """One example: images, question and answer.

    Attributes:
      images: Pillow images, or arrays as `data.patches.to_pixels` takes them; bytes are those of an image file.
      prompt: the user's text without its leading `<image>`s.
      answer: the assistant's text.
      criterion: what the answer judges, where the source says so.
      id: the record's own, where it has one.
    """

    images: tuple
    prompt: str
    answer: str
    criterion: str = ""
    id: str = ""


class Conversations:
    """The usable conversations of a source, in its order; what is not held in memory is read when it is asked for.

    Of JSON lines, parquet and datasets a few numbers are held for each conversation, of a JSON list the texts. Made by
    `load_conversations`. Attribute quarantined: the records that are left out.
    """

    def __init__(self, rows: Rows, index: np.ndarray, names: Mapping, folder: Path, quarantined):
        self._rows, self._index, self._names, self._folder = rows, index, names, folder
        self.quarantined: tuple[QuarantinedRecord, ...] = tuple(quarantined)

    def __len__(self) -> int:
        return len(self._index)

    def text_length(self, index: int) -> int:
        """Characters of question and answer."""
        return int(self._index[index][2])

    def __getitem__(self, index: int) -> Conversation:
        """One conversation, its images upright, RGB. DataError, with file, line and image, when it is not as it was."""
        return self._read(index, decode=True)

    def encoded(self, index: int) -> Conversation:
        """One conversation with each image as the bytes of its file, for a writer that keeps them as they are."""
        return self._read(index, decode=False)

    def _read(self, index: int, decode: bool) -> Conversation:
        key, line, _ = (int(number) for number in self._index[index])
        try:
            draft = parse_conversation(self._rows.fields(self._rows.item(key)), self._names)
            return _with_images(draft, self._folder, decode)
        except MalformedRecord as error:
            raise DataError(f"{self._rows.file_of(key)}, line {line}: {error}") from error


def load_conversations(
    source: str | os.PathLike,
    *,
    image_folder: str | os.PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    max_bad_fraction: float = DEFAULT_MAX_BAD_FRACTION,
    quarantine_file: str | os.PathLike | None = None,
    check: Callable[[Conversation], None] = lambda conversation: None,
) -> Conversations:
    """Read every conversation of a source once, decode all its images, and keep where the usable ones are.

    Several conversations are looked at at a time, and none is held. Order follows the source alone.

    Args:
      source: a `.json`, `.jsonl`, `.parquet` or `.array_record` file; a folder that holds `train.json`, `train.jsonl`
        or parquet files (itself or in `data`), which are read in the order of their names; a pattern such as
        `data/train-*.parquet`; or a `tfds:` name.
      image_folder: what the paths of images are relative to; by default the folder of the source.
      columns: which column is what, for those that are not named as usual: keys of COLUMNS to names. A `tfds:` name
        says it itself.
      max_bad_fraction: the share of records that may be unusable.
      quarantine_file: JSONL file that receives the unusable records, also when the budget is exceeded.
      check: raises MalformedRecord for a conversation that cannot be used, one that is too long, say. Called from
        several threads.

    Raises:
      DataError: the source is missing, empty or damaged, lacks a column, or has more unusable records than the budget.
      ConfigError: an option that cannot be meant, or the library for this format is not installed.
    """
    source = os.fspath(source)
    names = _names(columns)
    rows = open_rows(source, names, columns or {})
    folder = Path(image_folder if image_folder is not None else rows.folder)

    def look(line: int, key: int, item: Any) -> tuple[int, int, int]:
        conversation = _with_images(parse_conversation(rows.fields(item), rows.names), folder)
        check(conversation)
        return key, line, len(conversation.prompt) + len(conversation.answer)

    usable: list[tuple[int, int, int]] = []
    quarantined: list[QuarantinedRecord] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, items in rows.files():
            ahead = _ahead(pool, look, items)
            found, bad = collect(file, ahead, lambda future, line: future.result())
            usable += found
            quarantined += bad
    if quarantine_file is not None:
        write_quarantine(quarantine_file, quarantined)
    check_budget(source, len(usable), quarantined, max_bad_fraction)
    index = np.array(usable, np.int64).reshape(-1, 3)
    return Conversations(rows, index, rows.names, folder, quarantined)


def _names(columns: Mapping[str, str] | None) -> dict[str, tuple[str, ...]]:
    if unknown := set(columns or {}) - set(COLUMNS):
        raise ConfigError(
            f"columns names {', '.join(sorted(unknown))}; what a conversation has is {', '.join(COLUMNS)}"
        )
    return COLUMNS | {part: (name,) for part, name in (columns or {}).items()}


def _ahead(pool: ThreadPoolExecutor, look: Callable, items) -> Iterator[tuple[int, Future]]:
    """(line, future of `look(line, key, item)`) in order, only so far ahead that all threads have something to do."""
    pending: deque[tuple[int, Future]] = deque()
    for line, (key, item) in items:
        pending.append((line, pool.submit(look, line, key, item)))
        if len(pending) > 2 * (os.cpu_count() or 1):
            yield pending.popleft()
    yield from pending


def parse_conversation(fields: Any, names: Mapping[str, tuple[str, ...]] = COLUMNS) -> Conversation:
    """One record, its images still as they stand there (paths, bytes); MalformedRecord with the reason.

    names: for each part of a conversation the columns that may hold it, the first that is there counts.
    """
    if not isinstance(fields, dict):
        raise MalformedRecord("not an object")
    given = {part: next((fields[k] for k in keys if fields.get(k) is not None), None) for part, keys in names.items()}
    if given["messages"] is None:
        found = ", ".join(map(str, fields))[:200]
        raise MalformedRecord(f"no {' or '.join(names['messages'])} (there are: {found})")
    prompt, answer = _texts(given["messages"])
    listed = given["images"] if given["images"] is not None else []
    images = tuple(_image(image) for image in (listed if isinstance(listed, list | tuple) else [listed]))
    marks = IMAGE_MARK * len(images)
    if prompt.count(IMAGE_MARK) != len(images) or not prompt.startswith(marks):
        raise MalformedRecord(
            f"the question must begin with one {IMAGE_MARK} for each of the {len(images)} images, and holds "
            f"{prompt.count(IMAGE_MARK)}"
        )
    prompt = prompt.removeprefix(marks)
    criterion, name = (_label(given[part], part) for part in ("criterion", "id"))
    check_storable([prompt, answer, criterion, name, *(image for image in images if isinstance(image, str))])
    check_text(prompt)
    check_text(answer)
    return Conversation(images, prompt, answer, criterion, name)


def _texts(turns: Any) -> tuple[str, str]:
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
        raise MalformedRecord("messages must be one user turn and one assistant turn")
    roles = [_ROLES.get(str(turn.get("role", turn.get("from")))) for turn in turns]
    texts = [turn.get("content", turn.get("value")) for turn in turns]
    if roles != ["user", "assistant"] or not all(isinstance(text, str) for text in texts):
        raise MalformedRecord("messages must be one user turn and one assistant turn, with text")
    return texts[0], texts[1]


def _image(image: Any) -> str | bytes:
    if isinstance(image, dict):  # Hugging Face's: the file itself, or where it lies
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if not isinstance(image, str | bytes):
        raise MalformedRecord("images must be a list of paths, of image files' bytes, or of {bytes, path}")
    return image


def _label(value: Any, part: str) -> str:
    """A criterion or id as text; a whole number is one too."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise MalformedRecord(f"{part} is neither text nor a whole number")
    return str(value)


def _with_images(draft: Conversation, folder: Path, decode: bool = True) -> Conversation:
    """The conversation with its images decoded, or as the bytes of their files; MalformedRecord for a bad one."""

    def read(place: int, image: str | bytes):
        name = image if isinstance(image, str) else f"number {place + 1}"
        content = read_image_file(image, folder) if isinstance(image, str) else image
        if decode:
            return decode_image(content, name)
        if len(content) > MAX_BYTES:
            raise DataError(f"image {name!r} is larger than {MAX_BYTES} bytes")
        return content

    try:
        return replace(draft, images=tuple(read(*pair) for pair in enumerate(draft.images)))
    except DataError as error:
        raise MalformedRecord(str(error)) from error
