"""The instructions of an editing run, each with its source images: one reader for every format in which they come.

Formats: `.jsonl` (objects with `prompt`, `image` and, where there is one, `requirement`), `.json` (one list of such
objects, or of ShareGPT-4o-Image's with `input_prompt` and `input_image`), and
`tfds:NAME?split=SPLIT&text=COLUMN&image=COLUMN&requirement=COLUMN&data_dir=FOLDER`. `image` is a path below the
dataset's folder, or a list of paths where an edit has several sources.

`python -m firm_jax.data.edits LIST.json METADATA.jsonl` turns such a list into lines.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from firm_jax.data import tfds
from firm_jax.data.images import decode_image, read_image_file
from firm_jax.data.prompts import TEXT_KEYS, PromptRecord, PromptSplits, load_splits, parse_prompt
from firm_jax.data.records import DEFAULT_MAX_BAD_FRACTION, MalformedRecord, QuarantinedRecord, check_text, collect_json
from firm_jax.errors import DataError

IMAGE_KEYS = ("image", "input_image", "images")
# One latent token of the editing models: 8 pixels a latent, 2 latents a token.
MIN_SIDE = 16
# Beyond this no size that the models were trained at is near.
MAX_ASPECT = 8
TRAIN_FILES = ("train_metadata.jsonl", "text_and_image_to_image.json")
TEST_FILES = ("test_metadata.jsonl",)


@dataclasses.dataclass(frozen=True)
class SourceImage:
    """A source image that was found usable, and is read again when it is needed.

    Attributes:
      name: as it stands in its record, for messages.
      sha256: of the file's content, in hexadecimal: two paths to one content are one image.
      width, height: in pixels, upright.
    """

    name: str
    sha256: str
    width: int
    height: int
    read: Callable[[], bytes] = dataclasses.field(compare=False, repr=False)

    def open(self) -> Image.Image:
        """The image, upright, RGB. DataError when it is no longer there, or no longer the same."""
        content = self.read()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(
                f"image {self.name!r} has changed since the run began. Restore it, or start another run with it."
            )
        return decode_image(content, self.name)


@dataclasses.dataclass(frozen=True)
class EditRecord(PromptRecord):
    """An instruction with its source images, one or several, in the order in which the instruction counts them."""

    images: tuple[SourceImage, ...] = ()

    @property
    def group_key(self) -> tuple[str, ...]:
        """The full text, the requirement and the images: one instruction for two images is two groups."""
        return (*super().group_key, *(image.sha256 for image in self.images))


def load_edits(
    source: str | os.PathLike,
    *,
    max_images: int,
    held_out_source: str | os.PathLike | None = None,
    image_folder: str | os.PathLike | None = None,
    max_bad_fraction: float = DEFAULT_MAX_BAD_FRACTION,
    quarantine_file: str | os.PathLike | None = None,
    check: Callable[[EditRecord], None] = lambda record: None,
) -> PromptSplits:
    """Read the edits of a run, look at every image, and split them into training and held-out ones.

    Args:
      source: a file, a folder (`train_metadata.jsonl` or `text_and_image_to_image.json`, with `test_metadata.jsonl`
        where there is one), or a `tfds:` name.
      max_images: how many source images the generator takes; an edit with more cannot be used.
      held_out_source: as in `load_prompts`, as are `max_bad_fraction`, `quarantine_file` and `check`.
      image_folder: what the paths of images are relative to; by default the folder of the file that names them.

    Returns:
      PromptSplits of EditRecords.

    Raises:
      DataError, ConfigError: as `load_prompts`.
    """
    return load_splits(
        source,
        lambda name: read_edits(name, max_images=max_images, image_folder=image_folder),
        TRAIN_FILES,
        TEST_FILES,
        held_out_source=held_out_source,
        max_bad_fraction=max_bad_fraction,
        quarantine_file=quarantine_file,
        check=check,
    )


def read_edits(
    source: str | os.PathLike, *, max_images: int, image_folder: str | os.PathLike | None = None
) -> tuple[list[EditRecord], list[QuarantinedRecord]]:
    """Every usable record of one file or `tfds:` name, in order, duplicates included; and those that are not usable.

    All images are read and decoded once, several at a time. Raises DataError for a source that cannot be read at all.
    """
    source = os.fspath(source)
    if source.startswith(tfds.PREFIX):
        drafts, quarantined = _read_tfds(source)
    else:
        drafts, quarantined = _read_json(source, Path(image_folder or Path(source).parent))
    wanted = {(name, read) for draft in drafts if len(draft.images) <= max_images for name, read in draft.images}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looked_at = dict(zip(wanted, pool.map(lambda pair: _look_at(*pair), wanted), strict=True))
    records = []
    for draft in drafts:
        if len(draft.images) > max_images:
            reason = f"{len(draft.images)} source images, more than the {max_images} that the model takes"
            quarantined.append(QuarantinedRecord(source, draft.line, reason))
            continue
        images = tuple(looked_at[pair] for pair in draft.images)
        if refused := [image for image in images if isinstance(image, str)]:
            quarantined.append(QuarantinedRecord(source, draft.line, refused[0]))
        else:
            records.append(dataclasses.replace(draft, images=images))
    return records, sorted(quarantined, key=lambda bad: bad.line)


def parse_edit(
    fields: Any, source_file: str, line: int, text_keys: Sequence[str] = TEXT_KEYS
) -> tuple[PromptRecord, tuple[str, ...]]:
    """The instruction in one JSON object, and the paths of its source images; MalformedRecord with the reason."""
    if not isinstance(fields, dict):
        parse_prompt(fields, source_file, line)
    key = next((key for key in IMAGE_KEYS if fields.get(key) is not None), None)
    if key is not None and all(fields.get(name) is None for name in text_keys):
        raise MalformedRecord(f"an image without an instruction: none of the keys {', '.join(text_keys)}")
    record = parse_prompt({name: value for name, value in fields.items() if name != key}, source_file, line, text_keys)
    paths = fields.get(key) or []
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise MalformedRecord(f"{key} is neither a path nor a list of paths")
    if not paths:
        raise MalformedRecord(f"an instruction without an image: none of the keys {', '.join(IMAGE_KEYS)}")
    for path in paths:
        check_text(path)
    return record, tuple(paths)


def source_image(path: str | os.PathLike) -> SourceImage:
    """An image file that somebody names, wherever it lies. DataError when it cannot be edited."""
    path = Path(path).expanduser()
    found = _look_at(str(path), _ImageFile(path.name, path.parent))
    if isinstance(found, str):
        raise DataError(found)
    return found


def _look_at(name: str, read: Callable[[], bytes]) -> SourceImage | str:
    """The image if it is one that can be edited, else the reason why not."""
    try:
        content = read()
        width, height = decode_image(content, name).size
        if min(width, height) < MIN_SIDE:
            raise DataError(f"image {name!r} is {width} x {height} pixels, and one latent token takes {MIN_SIDE}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise DataError(f"image {name!r} is more than {MAX_ASPECT} times as long as wide ({width} x {height})")
    except DataError as error:
        return str(error)
    return SourceImage(name, hashlib.sha256(content).hexdigest(), width, height, read)


@dataclasses.dataclass(frozen=True)
class _ImageFile:
    path: str
    folder: Path

    def __call__(self) -> bytes:
        return read_image_file(self.path, self.folder)


@dataclasses.dataclass(frozen=True)
class _ImageColumn:
    dataset: tfds.Dataset
    row: int
    column: str
    place: int

    def __call__(self) -> bytes:
        return tfds.images_of(self.dataset.row(self.row), self.column)[self.place]


def _read_json(source: str, folder: Path) -> tuple[list[EditRecord], list[QuarantinedRecord]]:
    """Records whose `images` are still (name, how to read it)."""
    if not source.endswith((".json", ".jsonl")) or not os.path.isfile(source):
        raise DataError(
            f"{source or repr(source)} is not an existing .json or .jsonl file. Give one, a folder with "
            f"{' or '.join(TRAIN_FILES)}, or tfds:NAME."
        )

    def parse(fields: Any, line: int) -> EditRecord:
        record, paths = parse_edit(fields, source, line)
        return EditRecord(**vars(record), images=tuple((path, _ImageFile(path, folder)) for path in paths))

    try:
        return collect_json(source, parse)
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror}. Check its permissions.") from error


def _read_tfds(source: str) -> tuple[list[EditRecord], list[QuarantinedRecord]]:
    """As `_read_json`, of a dataset's rows; other texts, numbers and labels become metadata."""
    dataset = tfds.Dataset(source, ["text", "image", "requirement"])
    text = dataset.column("text", TEXT_KEYS, dataset.text_columns, "text")
    image = dataset.column("image", IMAGE_KEYS, dataset.image_columns, "image")
    requirement = "requirement"
    if "requirement" in dataset.options:
        requirement = dataset.column("requirement", (), dataset.text_columns, "text")

    def parse(row: dict, line: int) -> EditRecord:
        fields = dataset.scalars(row)
        fields["requirement"] = fields.pop(requirement, None) or None
        record = parse_prompt(fields, source, line, [text])
        count = len(tfds.images_of(row, image))
        if count == 0:
            raise MalformedRecord(f"an instruction without an image: {image} is empty")
        images = [
            (f"{image} {place + 1} of row {line}", _ImageColumn(dataset, line - 1, image, place))
            for place in range(count)
        ]
        return EditRecord(**vars(record), images=tuple(images))

    return dataset.read(parse)


def convert_edits(source: str | os.PathLike, target: str | os.PathLike) -> tuple[int, list[QuarantinedRecord]]:
    """Write the records of a JSON list as lines with `prompt`, `image` and `requirement`, the other fields after them.

    Paths stay as they are, so the lines belong into the same folder; images are looked at when the lines are read.

    Returns:
      How many were written, and the records that were left out with the reason.
    """
    source = os.fspath(source)
    parsed, quarantined = collect_json(source, lambda fields, line: parse_edit(fields, source, line))
    with open(target, "w", encoding="utf-8") as out:
        for record, paths in parsed:
            image = paths[0] if len(paths) == 1 else list(paths)
            fields = {"prompt": record.text, "image": image, "requirement": record.requirement} | record.metadata
            out.write(json.dumps(fields, ensure_ascii=False) + "\n")
    return len(parsed), quarantined


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    written, left_out = convert_edits(*sys.argv[1:])
    for bad in left_out:
        print(f"{bad.file}, line {bad.line}: {bad.reason}", file=sys.stderr)
    print(f"{written} edits written to {sys.argv[2]}, {len(left_out)} left out")
