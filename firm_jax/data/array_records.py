"""ArrayRecord files without a dataset's metadata: records that are serialized `tf.train.Example`s, read at random.

TensorFlow is not needed: the message is three nested lists, described here for protobuf. What TensorFlow Datasets puts
into such files has the same form: of a sequence of dictionaries, a feature `NAME/KEY` for each key.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from firm_jax.data.records import MalformedRecord
from firm_jax.errors import ConfigError

ENDING = re.compile(r"\.array_?record(-\d+-of-\d+)?\Z")


def is_array_record(path: str) -> bool:
    """By its name: `x.array_record`, `x.arrayrecord`, or a shard, `x.array_record-00000-of-00002`."""
    return ENDING.search(path) is not None


def open_array_records(paths: Sequence[str]) -> Any:
    """The records of files as one sequence of bytes. ConfigError without the library; raises as it does for files."""
    try:
        from grain.sources import ArrayRecordDataSource
    except ImportError as error:
        raise ConfigError(
            f"{paths[0]} needs grain's ArrayRecordDataSource, which cannot be imported ({error}). Install it with "
            "`pip install array_record`, or give a .parquet or .jsonl file."
        ) from error
    return ArrayRecordDataSource(list(paths))


def features_of(record: bytes) -> dict[str, list]:
    """The values of each feature of a serialized `tf.train.Example`: bytes, floats or whole numbers.

    MalformedRecord for a record that is none.
    """
    from google.protobuf.message import DecodeError

    example = _message()()
    try:
        example.ParseFromString(record)
    except DecodeError as error:
        raise MalformedRecord("the record is no serialized tf.train.Example") from error
    found = {}
    for entry in example.features.feature:
        kinds = (entry.value.bytes_list, entry.value.float_list, entry.value.int64_list)
        found[entry.key] = next((list(kind.value) for kind in kinds if kind.value), [])
    if not found:
        raise MalformedRecord("the record is no serialized tf.train.Example, or has no feature")
    return found


def columns_of(features: Mapping[str, list], images: Sequence[str]) -> dict[str, Any]:
    """Features as columns: texts, numbers and lists of them; features `NAME/KEY` as a list of dictionaries `NAME`.

    images: the features that hold image files, which stay lists of bytes. MalformedRecord for texts that are none.
    """
    columns: dict[str, Any] = {}
    rows: dict[str, dict[str, list]] = {}
    for name, values in features.items():
        if name in images:
            columns[name] = values
            continue
        try:
            values = [value.decode("utf-8") if isinstance(value, bytes) else value for value in values]
        except UnicodeDecodeError as error:
            raise MalformedRecord(f"the feature {name[:80]!r} is not UTF-8") from error
        if "/" in name:
            parent, key = name.rsplit("/", 1)
            rows.setdefault(parent, {})[key] = values
        else:
            columns[name] = values[0] if len(values) == 1 else values
    for parent, keys in rows.items():
        if len({len(values) for values in keys.values()}) > 1:
            raise MalformedRecord(
                f"the features {parent[:80]}/{{{', '.join(sorted(keys))}}} have not as many values each"
            )
        columns[parent] = [dict(zip(keys, values, strict=True)) for values in zip(*keys.values(), strict=True)]
    return columns


@functools.cache
def _message() -> type:
    """The class of `tf.train.Example`, by its published layout, under a name of our own."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="firm_jax/example.proto", package="firm_jax", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int | str, bool]) -> None:
        described = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            one = described.field.add(name=field, number=number)
            one.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if isinstance(kind, str):
                one.type, one.type_name = kinds.TYPE_MESSAGE, f".firm_jax.{kind}"
            else:
                one.type = kind

    message("BytesList", ("value", 1, kinds.TYPE_BYTES, True))
    message("FloatList", ("value", 1, kinds.TYPE_FLOAT, True))
    message("Int64List", ("value", 1, kinds.TYPE_INT64, True))
    lists = (("bytes_list", 1, "BytesList", False), ("float_list", 2, "FloatList", False))
    message("Feature", *lists, ("int64_list", 3, "Int64List", False))
    message("Entry", ("key", 1, kinds.TYPE_STRING, False), ("value", 2, "Feature", False))  # of a map, as it is sent
    message("Features", ("feature", 1, "Entry", True))
    message("Example", ("features", 1, "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("firm_jax.Example"))
