"""Conversations written as files that `load_conversations`, LLaMA-Factory and Hugging Face's datasets read.

Each file is written beside its place and renamed, so it is whole or not there. A conversation that could not be read
back as it is, is refused.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import PIL.Image

from firm_jax import storage
from firm_jax.data.conversations import IMAGE_MARK, Conversation, parse_conversation
from firm_jax.data.images import decode_image
from firm_jax.data.patches import to_pixels
from firm_jax.data.records import MalformedRecord
from firm_jax.errors import ConfigError, DataError

# A row group ends with whichever comes first. To read one row, those before it in its group are unpacked.
GROUP_ROWS = 64
GROUP_BYTES = 32 << 20


def write_sharegpt(path: str | os.PathLike, conversations: Iterable[Conversation]) -> int:
    """Write a `.json` list or `.jsonl` lines, and the images into the folder `NAME_images` beside it.

    An image that several conversations show is one file, named by its content. Bytes are stored as they are, other
    images as PNG.

    Returns:
      How many conversations were written.

    Raises:
      DataError: there is none, or one that could not be read back; the file that was there is as it was.
      WorkdirError: the disk does not take them.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"{path}: conversations are written to .json or .jsonl, or with write_parquet")
    folder = path.with_name(f"{path.stem}_images")
    first, between, last = ("", "\n", "\n") if path.suffix == ".jsonl" else ("[\n", ",\n", "\n]\n")
    count = 0
    with storage.writing(path):
        storage.make_folder(path.parent)
        with storage.whole(path) as staging, open(staging, "w", encoding="utf-8") as out:
            for record, images in _records(path, conversations):
                record["images"] = [f"{folder.name}/{store_image(content, folder)}" for content in images]
                text = json.dumps({key: value for key, value in record.items() if value != ""}, ensure_ascii=False)
                out.write((between if count else first) + text)
                count += 1
            out.write(last)
    return count


def parquet_modules():
    """pyarrow and its parquet; ConfigError where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"parquet needs pyarrow, which cannot be imported ({error}). Install it with "
            "`pip install 'firm-jax[data]'`, or write .jsonl."
        ) from error
    return pyarrow, pyarrow.parquet


def write_parquet(path: str | os.PathLike, conversations: Iterable[Conversation]) -> int:
    """Write one parquet file: `messages`, `images` as Hugging Face's {bytes, path}, `criterion` and `id`.

    As `write_sharegpt`; ConfigError also without pyarrow.
    """
    pyarrow, parquet = parquet_modules()
    path = Path(path)
    if path.suffix != ".parquet":
        raise ConfigError(f"{path}: a parquet file is named .parquet, or it is not found again")
    text = pyarrow.string()
    schema = pyarrow.schema(
        {
            "messages": pyarrow.list_(pyarrow.struct({"role": text, "content": text})),
            "images": pyarrow.list_(pyarrow.struct({"bytes": pyarrow.binary(), "path": text})),
            "criterion": text,
            "id": text,
        }
    )
    count = 0
    with storage.writing(path):
        storage.make_folder(path.parent)
        with (
            storage.whole(path) as staging,
            parquet.ParquetWriter(staging, schema, use_dictionary=["criterion"]) as writer,
        ):
            for group in _groups(_records(path, conversations)):
                writer.write_table(pyarrow.Table.from_pylist(group, schema))
                count += len(group)
    return count


def _groups(records: Iterable[tuple[dict, list[bytes]]]) -> Iterator[list[dict]]:
    """The rows of one row group at a time."""
    group, size = [], 0
    for record, images in records:
        group.append(record | {"images": [{"bytes": content, "path": None} for content in images]})
        size += sum(map(len, images))
        if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _records(path: Path, conversations: Iterable[Conversation]) -> Iterator[tuple[dict, list[bytes]]]:
    """Each conversation's fields and image files, after a check that the reader will take them."""
    number = -1
    for number, conversation in enumerate(conversations):
        try:
            images = [_encoded(image) for image in conversation.images]
            user = IMAGE_MARK * len(images) + conversation.prompt
            record = {
                "messages": [
                    {"role": "user", "content": user},
                    {"role": "assistant", "content": conversation.answer},
                ],
                "criterion": conversation.criterion,
                "id": conversation.id,
            }
            parse_conversation(record | {"images": images})
        except (MalformedRecord, DataError) as error:
            raise DataError(f"{path}: conversation {number} cannot be written: {error}") from error
        yield record, images
    if number < 0:
        raise DataError(f"{path}: there is no conversation to write")


def _encoded(image) -> bytes:
    """An image as a file: bytes as they are when they can be decoded, all else as PNG."""
    if isinstance(image, bytes):
        decode_image(image, "given as bytes")
        return image
    out = io.BytesIO()
    PIL.Image.fromarray(to_pixels(image)).save(out, "PNG")
    decode_image(out.getvalue(), "given as pixels")
    return out.getvalue()


def store_image(content: bytes, folder: Path) -> str:
    """The name of the file in `folder` that has this content, which is written when it is not there."""
    with PIL.Image.open(io.BytesIO(content)) as image:
        ending = image.format.lower()
    file = folder / f"{hashlib.sha256(content).hexdigest()[:24]}.{ending}"
    if not file.exists():
        storage.make_folder(folder)
        with storage.whole(file) as staging:
            staging.write_bytes(content)
    return file.name
