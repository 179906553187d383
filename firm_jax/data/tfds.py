"""TensorFlow Datasets as a source of records: `tfds:NAME?split=SPLIT&data_dir=FOLDER&...`.

Read through the random-access reader, which needs no TensorFlow. A source declares which of its columns is what.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from firm_jax.data.records import MalformedRecord, QuarantinedRecord, Record, collect
from firm_jax.errors import ConfigError, DataError

PREFIX = "tfds:"


class Dataset:
    """One split of a prepared dataset, its images left as they are stored.

    Args:
      source: the name with its options.
      columns: the options that name columns, beside `split` and `data_dir`.

    Raises:
      ConfigError: an unknown option, or tensorflow-datasets is not installed.
      DataError: there is no such dataset.
    """

    def __init__(self, source: str, columns: Iterable[str]):
        self.source = source
        self.name, _, query = source.removeprefix(PREFIX).partition("?")
        self.options = dict(parse_qsl(query, keep_blank_values=True))
        known = ["split", *columns, "data_dir"]
        if unknown := self.options.keys() - set(known):
            form = "&".join(f"{key}={'FOLDER' if key == 'data_dir' else key.upper()}" for key in known)
            raise ConfigError(
                f"{source}: unknown option {', '.join(sorted(unknown))}. "
                f"The form is tfds:NAME?{form}; all after the name is optional."
            )
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ConfigError(
                f"{source} needs tensorflow-datasets, which cannot be imported ({error}). "
                "Install it with `pip install 'firm-jax[tfds]'`, or give a file."
            ) from error
        try:
            self._builder = tfds.builder(self.name, data_dir=self.options.get("data_dir"))
        except ValueError as error:  # its further lines list every dataset that there is
            raise DataError(f"{source}: {str(error).splitlines()[0]} Check the name and data_dir.") from error
        except ImportError as error:  # of what the dataset's own code imports
            raise DataError(f"{source}: the dataset's code needs {error.name}. Install it, or give a file.") from error
        self.features = self._builder.info.features
        self.text_columns = [key for key, kind in self.features.items() if isinstance(kind, tfds.features.Text)]
        self.image_columns = [key for key, kind in self.features.items() if _holds(kind, tfds.features.Image)]
        encoded = (tfds.features.Image, tfds.features.Video, tfds.features.Audio)
        self.encoded_columns = [key for key, kind in self.features.items() if _holds(kind, encoded)]

        class AsStored(tfds.decode.SkipDecoding):
            """SkipDecoding that also takes sequences."""

            def decode_batch_example_np(self, examples):
                return examples

        self._decoders = {key: AsStored() for key in self.encoded_columns}
        self._rows = None

    def column(self, option: str, names: Iterable[str], among: list[str], what: str) -> str:
        """The column that the option names, or else the first of `names` that there is; it must be one of `among`."""
        column = self.options.get(option) or next((key for key in names if key in self.features), None)
        if column not in among:
            problem = f"no {what} column is named as usual" if column is None else f"{column!r} is no {what} column"
            raise DataError(
                f"{self.source}: {problem}. Add {option}=COLUMN with one of its {what} columns: {', '.join(among)}."
            )
        return column

    def read(self, parse: Callable[[dict, int], Record]) -> tuple[list[Record], list[QuarantinedRecord]]:
        """`records.collect` over `rows`."""
        return collect(self.source, self.rows(), parse)

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """All rows, numbered from 1; DataError for a split that cannot be read."""
        try:
            split = self.options.get("split", "train")
            self._rows = self._builder.as_data_source(split, decoders=self._decoders)
            for index in range(len(self._rows)):
                yield index + 1, self.row(index)
        except (ValueError, NotImplementedError, OSError) as error:
            raise DataError(
                f"{self.source}: {str(error).splitlines()[0]} Check the split, and that the dataset is prepared for "
                f"random access: `tfds build {self.name} --file_format=array_record`."
            ) from error

    def row(self, index: int) -> dict[str, Any]:
        """A row's columns, images as the bytes of their files."""
        return self._rows[index]

    def scalars(self, row: dict[str, Any]) -> dict[str, str | int | float | bool]:
        """The text, number and label columns of a row; images and nested columns are left out."""
        columns = {key: plain(row[key]) for key in self.features if key not in self.encoded_columns}
        return {key: value for key, value in columns.items() if value is not None}


def images_of(row: dict[str, Any], column: str) -> list[bytes]:
    """The files in an image column, of one image or of several."""
    value = row[column]
    return [value] if isinstance(value, bytes) else [bytes(each) for each in value]


def _holds(feature, kinds) -> bool:
    """Whether a feature is of these kinds, or a sequence of such."""
    return isinstance(getattr(feature, "feature", feature), kinds)


def plain(value: Any) -> str | int | float | bool | None:
    """A dataset column as a JSON scalar; None where it is not one."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise MalformedRecord("not UTF-8") from error
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, str | int | float | bool) else None
