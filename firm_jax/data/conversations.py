"""What a critic is trained on: pictures, a question and the right answer.

Files are ShareGPT-style, as LLaMA-Factory reads them: `.json` (a list) or `.jsonl`, one object a conversation with
`messages` (or `conversations`) of one user and one assistant turn, and `images`, paths below the file's folder. The
user's text begins with one `<image>` for each image.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firm_jax.data.images import check_image, load_image
from firm_jax.data.records import (
    DEFAULT_MAX_BAD_FRACTION,
    MalformedRecord,
    check_budget,
    check_storable,
    check_text,
    collect_json,
    write_quarantine,
)
from firm_jax.errors import DataError

IMAGE_MARK = "<image>"
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """One example: images (Pillow, or arrays as `critic.processing.to_pixels` takes them), question and answer.

    criterion: what the answer judges, where the source says so.
    """

    images: tuple
    prompt: str
    answer: str
    criterion: str = ""


class ConversationFile:
    """The conversations of a file, read once; their images are decoded when an example is asked for.

    A record is unusable also when one of its images is missing or its header is refused, so that this is known before
    anything is trained. max_bad_fraction: the share of records that may be unusable; quarantine_file: JSONL that
    receives those. Raises DataError for a file that cannot be read, is empty, or has more unusable records than that.
    """

    def __init__(self, path, *, max_bad_fraction: float = DEFAULT_MAX_BAD_FRACTION, quarantine_file=None):
        self.path = Path(path)
        if self.path.suffix not in (".json", ".jsonl") or not os.path.isfile(path):
            raise DataError(f"conversation file {path} is not an existing .json or .jsonl file")
        try:
            self._records, bad = collect_json(os.fspath(self.path), self._parse)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}. Check its permissions.") from error
        if quarantine_file is not None:
            write_quarantine(quarantine_file, bad)
        check_budget(os.fspath(path), len(self._records), bad, max_bad_fraction)

    def _parse(self, fields: Any, line: int) -> tuple[int, tuple[str, ...], str, str]:
        record = _parse(fields, line)
        for image in record[1]:
            try:
                check_image(image, self.path.parent)
            except DataError as error:
                raise MalformedRecord(str(error)) from error
        return record

    def __len__(self) -> int:
        return len(self._records)

    def text_length(self, index: int) -> int:
        """Characters of question and answer."""
        return len(self._records[index][2]) + len(self._records[index][3])

    def __getitem__(self, index: int) -> Conversation:
        """One conversation with its images decoded; DataError names file, line and image."""
        line, images, prompt, answer = self._records[index]
        try:
            opened = tuple(load_image(image, self.path.parent) for image in images)
        except DataError as error:
            raise DataError(f"{self.path}, line {line}: {error}") from error
        return Conversation(opened, prompt, answer)


def _parse(fields: Any, line: int) -> tuple[int, tuple[str, ...], str, str]:
    """(line, image paths, question, answer) of one record; MalformedRecord with the reason."""
    check_storable(fields)
    if not isinstance(fields, dict):
        raise MalformedRecord("not an object")
    turns = fields.get("messages", fields.get("conversations"))
    images = fields.get("images", [])
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
        raise MalformedRecord("messages must be one user turn and one assistant turn")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise MalformedRecord("images must be a list of paths")
    roles = [_ROLES.get(str(turn.get("role", turn.get("from")))) for turn in turns]
    texts = [turn.get("content", turn.get("value")) for turn in turns]
    if roles != ["user", "assistant"] or not all(isinstance(text, str) for text in texts):
        raise MalformedRecord("messages must be one user turn and one assistant turn, with text")
    prompt, answer = texts
    if prompt.count(IMAGE_MARK) != len(images) or not prompt.startswith(IMAGE_MARK * len(images)):
        raise MalformedRecord(f"the question must begin with one {IMAGE_MARK} for each of the {len(images)} images")
    prompt = prompt.removeprefix(IMAGE_MARK * len(images))
    check_text(prompt)
    check_text(answer)
    return line, tuple(images), prompt, answer
