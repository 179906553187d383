"""Where conversations lie: JSON lists, JSON lines, parquet, ArrayRecord and prepared datasets, each read once in order
and then row by row, at random, without holding it."""

import contextlib
import functools
import glob
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from firm_jax.data import tfds
from firm_jax.data.array_records import columns_of, features_of, is_array_record, open_array_records
from firm_jax.data.records import (
    MalformedRecord,
    check_storable,
    decode_text,
    json_elements,
    parse_json,
    read_line_at,
    read_placed_lines,
)
from firm_jax.errors import ConfigError, DataError

TRAIN_FILES = ("train.json", "train.jsonl")
# Rows that are decoded together. A row of two pictures is some hundred kilobytes.
ROWS_AT_ONCE = 16
# What a row group may say that it unpacks to. Hugging Face's of 100 rows are some tens of megabytes.
MAX_GROUP_BYTES = 4 << 30
# Parquet files that are open at a time.
MAX_OPEN = 64

Items = Iterable[tuple[int, tuple[int, Any]]]  # (line from 1, (key, item))


class Rows(Protocol):
    """One source. An item is a row as it is stored, a key the number by which it is found again.

    names: the columns of each part of a conversation. folder: what the paths of images are relative to.
    """

    names: Mapping[str, tuple[str, ...]]
    folder: str

    def files(self) -> Iterator[tuple[str, Items]]:
        """The files of the source with their items, all in order."""

    def item(self, key: int) -> Any:
        """The item with this key; DataError when its file has changed since `files`."""

    def fields(self, item: Any) -> Any:
        """The columns of an item; MalformedRecord when it cannot be read."""

    def file_of(self, key: int) -> str:
        """The file that holds an item."""


def open_rows(source: str, names: Mapping[str, tuple[str, ...]], declared: Mapping[str, str]) -> Rows:
    """The rows of a source by its form; `declared` are those of `names` that somebody has chosen.

    Raises DataError for one that is not there or not known, ConfigError when a library is missing.
    """
    if source.startswith(tfds.PREFIX):
        if declared:
            raise ConfigError(f"{source}: a tfds: name says itself which column is what, as in ?messages=COLUMN")
        return _DatasetRows(source, names)
    if any(character in source for character in "*?[") and not os.path.exists(source):
        paths, folder = glob.glob(source), os.path.dirname(source) or "."
        if paths and all(is_array_record(path) and os.path.isfile(path) for path in paths):
            return _ArrayRecordRows(sorted(paths), folder, names)
        return _ParquetRows(_sorted(paths, source), folder, names, declared)
    if os.path.isdir(source):
        return _folder_rows(source, names, declared)
    folder = os.path.dirname(source) or "."
    if os.path.isfile(source) and is_array_record(source):
        return _ArrayRecordRows([source], folder, names)
    if not os.path.isfile(source) or not source.endswith((".json", ".jsonl", ".parquet")):
        raise DataError(
            f"{source or repr(source)} is not an existing .json, .jsonl, .parquet or .array_record file. Give one, a "
            f"folder with {', '.join(TRAIN_FILES)} or parquet files, or tfds:NAME."
        )
    if source.endswith(".parquet"):
        return _ParquetRows([source], folder, names, declared)
    return (_JsonLines if source.endswith(".jsonl") else _JsonList)(source, folder, names)


def _folder_rows(folder: str, names, declared) -> Rows:
    found = [name for name in TRAIN_FILES if os.path.isfile(os.path.join(folder, name))]
    shards = [path for part in ("", "data") for path in glob.glob(os.path.join(glob.escape(folder), part, "*.parquet"))]
    if len(found) + bool(shards) > 1:
        both = " and ".join([*found, *shards[:1]])
        raise DataError(f"{folder} holds {both}, and each could be meant. Name the file instead of the folder.")
    if found:
        return open_rows(os.path.join(folder, found[0]), names, declared)
    if not shards and (records := sorted(filter(is_array_record, os.listdir(folder)))):
        raise DataError(
            f"folder {folder} holds ArrayRecord files, {records[0]} among them. If TensorFlow Datasets has written it "
            "(features.json lies beside them), give tfds:NAME?data_dir=FOLDER, the folder above NAME; if not, a "
            f"pattern: '{folder}/*.array_record*'."
        )
    if not shards:
        raise DataError(
            f"folder {folder} holds no conversations: looked for {', '.join(TRAIN_FILES)} and parquet files, here and "
            f"in data. Name a file."
        )
    # Hugging Face's names: SPLIT-00000-of-00002.parquet.
    splits = sorted({name.partition("-")[0] for name in map(os.path.basename, shards) if "-of-" in name})
    if len(splits) > 1:
        parent = os.path.dirname(shards[0])
        raise DataError(f"{folder} holds the splits {', '.join(splits)}. Give one: '{parent}/{splits[0]}-*.parquet'.")
    return _ParquetRows(_sorted(shards, folder), folder, names, declared)


def _sorted(paths: list[str], source: str) -> list[str]:
    """Parquet files in the order of their names, whatever the order in which the disk lists them."""
    if not paths or not all(path.endswith(".parquet") and os.path.isfile(path) for path in paths):
        raise DataError(
            f"{source} stands for {len(paths)} files, which must be one or more, and all .parquet or all .array_record"
        )
    return sorted(paths)


def _signature(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or 'it is damaged'}. Check the file.") from error


def _changed(path: str) -> DataError:
    return DataError(f"{path} has changed since it was read. Restore it, or start again with it.")


class _JsonList:
    """A JSON list, whose elements are held: they cannot be found again without reading all before them."""

    def __init__(self, source: str, folder: str, names):
        self.source, self.folder, self.names = source, folder, names
        self._elements: list[Any] = []

    def files(self) -> Iterator[tuple[str, Items]]:
        yield self.source, self._items()

    def _items(self) -> Items:
        with _reading(self.source):
            for line, element in json_elements(self.source):
                self._elements.append(element)
                yield line, (len(self._elements) - 1, element)

    def item(self, key: int) -> Any:
        return self._elements[key]

    def fields(self, item: Any) -> Any:
        check_storable(item)
        return item

    def file_of(self, key: int) -> str:
        return self.source


class _JsonLines:
    """One object a line. Key: the byte at which the line begins."""

    def __init__(self, source: str, folder: str, names):
        self.source, self.folder, self.names = source, folder, names
        with _reading(source):
            self._was = _signature(source)

    def files(self) -> Iterator[tuple[str, Items]]:
        yield self.source, self._items()

    def _items(self) -> Items:
        with _reading(self.source):
            for line, begin, raw in read_placed_lines(self.source):
                yield line, (begin, raw)

    def item(self, key: int) -> bytes:
        with _reading(self.source):
            if _signature(self.source) != self._was:
                raise _changed(self.source)
            return read_line_at(self.source, key)

    def fields(self, item: bytes | None) -> Any:
        fields = parse_json(decode_text(item))
        check_storable(fields)
        return fields

    def file_of(self, key: int) -> str:
        return self.source


class _ParquetRows:
    """Parquet files as one table. Key: the number of the row in all of them.

    A row is found through its row group, of which the rows up to it are decoded, ROWS_AT_ONCE at a time.
    """

    def __init__(self, shards: list[str], folder: str, names, declared: Mapping[str, str]):
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ConfigError(
                f"{shards[0]} needs pyarrow, which cannot be imported ({error}). "
                "Install it with `pip install 'firm-jax[data]'`, or give a .jsonl file."
            ) from error
        self._pyarrow, self._parquet = pyarrow, parquet
        self.shards, self.folder, self.names = shards, folder, names
        self._open = functools.lru_cache(MAX_OPEN)(self._open_shard)
        self._lock = threading.Lock()
        self._batch: tuple[int, Any] = (0, ())  # the rows read last, and the key of the first of them
        self._was = {}
        self._columns: dict[str, list[str]] = {}
        counts = []
        for shard in shards:
            with self._reading(shard):
                self._was[shard] = _signature(shard)
                file = self._open(shard)
            there = file.schema_arrow.names
            found = {part: next((key for key in keys if key in there), None) for part, keys in names.items()}
            missing = [part for part, key in found.items() if key is None and (part in declared or part == "messages")]
            if missing:
                part = missing[0]
                raise DataError(
                    f"{shard} has no column {' or '.join(names[part])} for the {part}. Its columns are "
                    f"{', '.join(there)}; say which is meant with columns={{'{part}': 'NAME'}}."
                )
            self._columns[shard] = [key for key in found.values() if key is not None]
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            if any(group.total_byte_size > MAX_GROUP_BYTES for group in groups):
                raise DataError(
                    f"{shard} has a row group of more than {MAX_GROUP_BYTES >> 30} GiB, which cannot be read row by "
                    "row. Write it again with row groups of some hundred rows."
                )
            counts.append([group.num_rows for group in groups])
        self._groups = [np.cumsum([0, *rows]) for rows in counts]
        self._starts = np.cumsum([0, *(sum(rows) for rows in counts)])

    @contextlib.contextmanager
    def _reading(self, shard: str) -> Iterator[None]:
        try:
            with _reading(shard):
                yield
        except self._pyarrow.ArrowException as error:
            raise DataError(f"{shard} is damaged or no parquet file. Get it again.") from error

    def _open_shard(self, shard: str):
        if _signature(shard) != self._was[shard]:
            raise _changed(shard)
        return self._parquet.ParquetFile(shard)

    def files(self) -> Iterator[tuple[str, Items]]:
        for number, shard in enumerate(self.shards):
            yield shard, self._items(number)

    def _items(self, number: int) -> Items:
        line = 0
        for batch in self._batches(number):
            for place in range(batch.num_rows):
                yield line + 1, (int(self._starts[number]) + line, batch.slice(place, 1))
                line += 1

    def _batches(self, number: int, **options) -> Iterator[Any]:
        shard = self.shards[number]
        with self._reading(shard):
            yield from self._open(shard).iter_batches(ROWS_AT_ONCE, columns=self._columns[shard], **options)

    def item(self, key: int) -> Any:
        with self._lock:
            begin, batch = self._batch
            if not begin <= key < begin + len(batch):
                number = int(np.searchsorted(self._starts, key, side="right")) - 1
                groups = self._groups[number]
                group = int(np.searchsorted(groups, key - self._starts[number], side="right")) - 1
                begin = int(self._starts[number] + groups[group])
                for batch in self._batches(number, row_groups=[group]):
                    if key < begin + len(batch):
                        break
                    begin += len(batch)
                self._batch = begin, batch
            return batch.slice(key - begin, 1)

    def fields(self, item: Any) -> dict[str, Any]:
        try:
            return item.to_pylist()[0]
        except UnicodeDecodeError as error:
            raise MalformedRecord("not UTF-8") from error

    def file_of(self, key: int) -> str:
        return self.shards[int(np.searchsorted(self._starts, key, side="right")) - 1]


class _ArrayRecordRows:
    """ArrayRecord files of `tf.train.Example`s as one table. Key: the number of the record in all of them."""

    def __init__(self, shards: list[str], folder: str, names: Mapping[str, tuple[str, ...]]):
        self.shards, self.folder, self.names = shards, folder, names
        self._lock = threading.Lock()
        self._was = {shard: _signature(shard) for shard in shards}
        self._sources = []
        for shard in shards:
            with self._reading(shard):
                self._sources.append(open_array_records([shard]))
        self._starts = np.cumsum([0, *map(len, self._sources)])

    @contextlib.contextmanager
    def _reading(self, shard: str) -> Iterator[None]:
        try:
            with _reading(shard):
                yield
        except (ValueError, RuntimeError, IndexError) as error:
            problem = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise DataError(f"{shard} is damaged or no ArrayRecord file ({problem}). Get it again.") from error

    def files(self) -> Iterator[tuple[str, Items]]:
        for number, shard in enumerate(self.shards):
            begin = int(self._starts[number])
            keys = range(begin, int(self._starts[number + 1]))
            yield shard, ((key - begin + 1, (key, self.item(key))) for key in keys)

    def item(self, key: int) -> bytes:
        number = int(np.searchsorted(self._starts, key, side="right")) - 1
        shard = self.shards[number]
        with self._lock, self._reading(shard):
            if _signature(shard) != self._was[shard]:
                raise _changed(shard)
            return self._sources[number][key - int(self._starts[number])]

    def fields(self, item: bytes) -> dict[str, Any]:
        return columns_of(features_of(item), self.names["images"])

    def file_of(self, key: int) -> str:
        return self.shards[int(np.searchsorted(self._starts, key, side="right")) - 1]


class _DatasetRows:
    """A prepared dataset (`data.tfds`). Key: the number of the row."""

    folder = "."

    def __init__(self, source: str, names: Mapping[str, tuple[str, ...]]):
        self.source, self._dataset = source, tfds.Dataset(source, names)
        dataset, optional = self._dataset, {"criterion": "text or number", "id": "text or number"}
        turns = [key for key, kind in dataset.features.items() if hasattr(getattr(kind, "feature", None), "keys")]
        self.messages = dataset.column("messages", names["messages"], turns, "list of turns")
        self.names = dict(names) | {"messages": (self.messages,), "images": (), "criterion": (), "id": ()}
        if "images" in dataset.options or any(key in dataset.features for key in names["images"]):
            self.names["images"] = (dataset.column("images", names["images"], dataset.image_columns, "image"),)
        plain = [key for key in dataset.features if key not in (*turns, *dataset.encoded_columns)]
        for part, what in optional.items():
            if part in dataset.options or any(key in plain for key in names[part]):
                self.names[part] = (dataset.column(part, names[part], plain, what),)

    def files(self) -> Iterator[tuple[str, Items]]:
        yield self.source, ((line, (line - 1, row)) for line, row in self._dataset.rows())

    def item(self, key: int) -> dict[str, Any]:
        return self._dataset.row(key)

    def fields(self, item: dict[str, Any]) -> dict[str, Any]:
        fields = self._dataset.scalars(item)
        turns = item[self.messages]
        texts = [[tfds.plain(value) for value in turns[key]] for key in turns]
        fields[self.messages] = [dict(zip(turns, values, strict=True)) for values in zip(*texts, strict=True)]
        for column in self.names["images"]:
            fields[column] = tfds.images_of(item, column)
        return fields

    def file_of(self, key: int) -> str:
        return self.source
