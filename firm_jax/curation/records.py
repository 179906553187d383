"""The records of a curation, from a list that names pictures and what they were made from.

`.jsonl`, `.json` and `.parquet`: `prompt` (or `caption`, `input_prompt`, `text`), `image`, for edits `source` besides,
and where there are such `id` and `requirement`, what is to be checked beside the prompt. Images are paths below the
list's folder; in parquet they may also be the bytes of an image file, or Hugging Face's `{bytes, path}`.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from firm_jax import storage
from firm_jax.curation.stage import Record
from firm_jax.data.candidates import Candidate, listed, read_candidates
from firm_jax.data.conversation_files import store_image
from firm_jax.data.images import decode_image, read_image_file
from firm_jax.data.records import MalformedRecord, QuarantinedRecord, check_budget
from firm_jax.errors import ConfigError, DataError

ROWS_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Source:
    """Usable records in the list's order, the folder below which their images are, and what was set aside."""

    records: tuple[Record, ...]
    folder: Path
    quarantined: tuple[QuarantinedRecord, ...]


def read_records(source: str | os.PathLike, task: str, max_bad_fraction: float, unpacked: Path) -> Source:
    """Every usable record of a list. Of images nothing but their names is looked at.

    unpacked: the folder for images that stand in a parquet file, which are written there by their content.

    Raises DataError for a list that cannot be read, or has more unusable records than `max_bad_fraction`; ConfigError
    for parquet without pyarrow.
    """
    source = Path(source)
    if source.suffix == ".parquet":
        found, folder = _read_parquet(source, task, unpacked), unpacked
    else:
        found, folder = read_candidates(source, None, edits=task == "edit")[0], source.parent
    records: dict[str, Record] = {}
    refused = []
    for one in found:
        try:
            record = one if isinstance(one, QuarantinedRecord) else _record(one, task, records)
        except MalformedRecord as error:
            record = QuarantinedRecord(str(source), one.asked.line, str(error))
        if isinstance(record, QuarantinedRecord):
            refused.append(record)
        else:
            records[record.id] = record
    check_budget(str(source), len(records), refused, max_bad_fraction)
    return Source(tuple(records.values()), folder, tuple(refused))


def _record(one: Candidate, task: str, before: dict[str, Record]) -> Record:
    name = one.asked.metadata.get("id", one.asked.line)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise MalformedRecord("id is neither a text nor a whole number")
    if str(name) in before:
        raise MalformedRecord(f"the id {str(name)[:80]!r} comes again")
    images = tuple(picture.path for picture in one.pictures)
    if len(images) != (count := {"gen": 1, "edit": 2}[task]):
        raise MalformedRecord(f"{len(images)} images; the task {task} shows {count}")
    return Record(str(name), one.asked.text, images, requirement=one.asked.requirement)


def _read_parquet(source: Path, task: str, unpacked: Path) -> list[Candidate | QuarantinedRecord]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(
            f"{source} needs pyarrow, which cannot be imported ({error}). Install it with "
            "`pip install 'firm-jax[data]'`, or give .jsonl."
        ) from error
    found: list[Candidate | QuarantinedRecord] = []
    try:
        with parquet.ParquetFile(source) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    line = len(found) + 1
                    try:
                        fields = {name: value for name, value in row.items() if value is not None}
                        for name in ("image", "source"):
                            if name in fields:
                                fields[name] = _named(fields[name], source.parent, unpacked)
                        found.append(listed(fields, line, unpacked / source.name, task == "edit"))
                    except (MalformedRecord, DataError) as error:
                        found.append(QuarantinedRecord(str(source), line, str(error)))
    except (OSError, ArrowException) as error:
        raise DataError(f"{source} cannot be read as parquet: {error}. Give a whole .parquet file.") from error
    return found


def _named(image: Any, folder: Path, unpacked: Path) -> Any:
    """The path below `unpacked` of an image of a row, which is written there."""
    if isinstance(image, list):
        return [_named(one, folder, unpacked) for one in image]
    if isinstance(image, dict):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, str):
        image = read_image_file(image, folder)
    if not isinstance(image, bytes):
        raise MalformedRecord("an image is neither a path nor the bytes of an image file")
    decode_image(image, "in the row")
    with storage.writing(unpacked):
        return store_image(image, unpacked)
