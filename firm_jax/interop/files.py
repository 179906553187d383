"""The files of a model folder: JSON, and safetensors, of which tensor lies where and plain reads of some of its rows.

Headers are checked by the safetensors library. The numbers are read, not mapped into memory: a disk or network that
fails in the middle is then an error with a name, where a mapped page would end the process without a word.
"""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from firm_jax.errors import WeightsError

STEMS = ("diffusion_pytorch_model", "model")
READABLE = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
COMPARED_BYTES = 4 << 20
PYTORCH = {"format": "pt"}  # the metadata without which transformers refuses a file
_AGAIN = "fetch the file again"


def write_tensors(named: dict[str, np.ndarray], file: Path, metadata: dict[str, str] = PYTORCH) -> None:
    """Write a safetensors file that is as readable as its folder; the library leaves it to its owner alone."""
    save_file(named, file, metadata)
    file.chmod(file.parent.stat().st_mode & 0o666)


class Stored(NamedTuple):
    """One tensor in its file: `dtype` by the format's name, `offset` of its first byte from the file's."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:])) * READABLE[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.file}, tensor {self.name}"


class WeightFiles:
    """The tensors of one folder, single-file or sharded by an index: `tensors`, by name.

    stems: what the file may be called before `.safetensors`. Raises WeightsError for files that are missing, damaged,
    cut short, or that contradict their index.
    """

    def __init__(self, folder: Path, stems: tuple[str, ...] = STEMS):
        self.folder, self.stems = Path(folder), stems
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()
        try:
            self.tensors = self._locate()
        except OSError as error:
            raise WeightsError(
                f"{error.filename or self.folder} cannot be read ({error.strerror}); check its permissions and storage"
            ) from error

    def _locate(self) -> dict[str, Stored]:
        candidates = [f"{stem}.safetensors{suffix}" for stem in self.stems for suffix in (".index.json", "")]
        there = os.listdir(self.folder)
        found = [file for file in candidates if file in there]
        if not found:
            raise WeightsError(f"no weights in {self.folder}: expected one of {', '.join(candidates)}")
        if len(found) > 1:
            raise WeightsError(f"{self.folder} holds several sets of weights: {', '.join(found)}; remove the stale one")
        if found[0].endswith(".json"):
            return self._read_index(self.folder / found[0])
        return {stored.name: stored for stored in _read_header(self.folder / found[0])}

    def _read_index(self, index: Path) -> dict[str, Stored]:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise WeightsError(f"{index} is not a safetensors index: it has no weight_map of names; {_AGAIN}")
        outside = sorted(file for file in set(files.values()) if Path(file).name != file)
        if outside:
            raise WeightsError(f"{index} names files outside of its folder: {some(outside)}")
        seen: dict[str, Stored] = {}
        for file in sorted(set(files.values())):
            expected = [name for name, where in files.items() if where == file]
            if not (self.folder / file).exists():
                raise WeightsError(
                    f"{index} names the file {file} (for {some(expected, 1)}), which is not in the folder; fetch it"
                )
            for stored in _read_header(self.folder / file, expected):
                if stored.name in seen:
                    raise WeightsError(
                        f"{self.folder}: tensor {stored.name} stands in both {seen[stored.name].file.name} and {file}; "
                        "these shards are not of one checkpoint: fetch them again"
                    )
                seen[stored.name] = stored
        absent = sorted(set(files) - set(seen))
        if absent:
            raise WeightsError(f"{index} lists tensors that its files do not hold: {some(absent)}; fetch them again")
        return seen

    def chunks(self, name: str, first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
        """Rows first ... last - 1 of a tensor as [start, stop) of about `size` bytes each."""
        step = max(1, size // self.tensors[name].row_bytes)
        for start in range(first, last, step):
            yield start, min(start + step, last)

    def whole(self, name: str) -> np.ndarray:
        """One tensor, in its dtype and the PyTorch layout."""
        shape = self.tensors[name].shape
        return self.read(name, 0, shape[0]) if shape else self.read(name, 0, 1)[0]

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same numbers."""
        shape = self.tensors[first].shape
        return shape == self.tensors[second].shape and all(
            np.array_equal(self.read(first, *rows), self.read(second, *rows))
            for rows in self.chunks(first, 0, shape[0], COMPARED_BYTES)
        )

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start ... stop - 1 of one tensor, in its dtype and the PyTorch layout. May be called by many threads."""
        stored = self.tensors[name]
        rows = np.empty((stop - start, *stored.shape[1:]), READABLE[stored.dtype])
        left = memoryview(rows.reshape(-1).view(np.uint8))
        offset = stored.offset + start * stored.row_bytes
        try:
            while left:
                count = os.preadv(self._descriptor(stored.file), [left], offset)
                if count == 0:
                    raise WeightsError(f"{stored} ends early: the file was cut while it was read; {_AGAIN}")
                left, offset = left[count:], offset + count
        except OSError as error:
            raise WeightsError(
                f"{stored} cannot be read ({error.strerror}); check the storage that it lies on, then {_AGAIN}"
            ) from error
        return rows

    def _descriptor(self, file: Path) -> int:
        with self._opening:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, *error) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def _read_header(file: Path, expected: list[str] | None = None) -> list[Stored]:
    """The tensors of one file. `expected`: those that it should hold by the index, to be named when it is damaged."""
    try:
        with safe_open(file, framework="numpy"), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        lost = f", which should hold {some(expected, 3)}," if expected else ""
        raise WeightsError(f"{file}{lost} cannot be read ({error}); {_reason(file, error)}") from error
    header.pop("__metadata__", None)
    return [
        Stored(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    ]


def _reason(file: Path, error: Exception) -> str:
    """What to do about a file that cannot be opened; for one that is cut, which tensors are beyond its end."""
    if isinstance(error, OSError):
        return "check its permissions and storage"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, size)))
        lost = [name for name, entry in header.items() if 8 + length + entry.get("data_offsets", [0, 0])[1] > size]
        return f"the file is cut short and lacks {some(lost, 3)}: {_AGAIN}" if lost else _AGAIN
    except (OSError, ValueError, AttributeError, TypeError, IndexError):
        return f"its header is damaged or cut short: {_AGAIN}"


def read_json(file: Path) -> dict:
    """The object in a model folder's JSON file. WeightsError when it cannot be read or is none; FileNotFoundError."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error.strerror}); check its permissions and storage") from error
    except ValueError as error:  # of the decoder of UTF-8 or of JSON
        raise WeightsError(f"{file} is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} holds no JSON object but {type(content).__name__}; {_AGAIN}")
    return content


def some(items: list[str], limit: int = 8) -> str:
    """The first of a long list, and how many more there are."""
    return ", ".join(items[:limit]) + (f", and {len(items) - limit} more" if len(items) > limit else "")
