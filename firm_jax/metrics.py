"""What a run measures: `metrics.jsonl` for programs, TensorBoard events for people, JSON lines for records."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from firm_jax import storage
from firm_jax.errors import WorkdirError

# What the one line an epoch on the terminal shows, in this order, of the metrics that the run has.
HEADLINES = (
    "reward/mean",
    "eval/oracle_fraction",
    "eval/oracle_accuracy",
    "eval/loss",
    "eval/mae",
    "eval/psnr",
    "loss/total",
    "loss/policy",
    "grad/norm",
    "critic/failure_rate",
    "throughput/images_per_s",
    "throughput/examples_per_s",
)


class JsonLines:
    """An append-only file of one JSON object a line, which a resumed run cuts back to what its checkpoint covers."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self._file = self.path.open("ab")
        except OSError as error:
            raise WorkdirError(
                f"cannot append to {self.path}: {error}. Make it writable, or change --workdir or --out."
            ) from error

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and hand it to the operating system. Values that are not finite become null."""
        line = json.dumps(_json_value(record), ensure_ascii=False, allow_nan=False) + "\n"
        with storage.writing(self.path):
            # A lone surrogate in a prompt becomes its JSON escape.
            self._file.write(line.encode(errors="backslashreplace"))
            self._file.flush()

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def last(self) -> dict[str, Any] | None:
        """The last whole record, if there is one. What a crash has left of later ones is passed over."""
        for line in reversed(self.path.read_bytes().split(b"\n")[:-1]):
            with contextlib.suppress(ValueError):
                return json.loads(line)
        return None

    def sync(self) -> None:
        """Force everything to the disk: a checkpoint must not count on a line that a crash can take."""
        with storage.writing(self.path):
            os.fsync(self._file.fileno())
            storage.sync(self.path.parent)

    def rewind(self, length: int) -> None:
        """Drop what lies beyond `length` bytes: records of a stretch that the resumed run does again."""
        with storage.writing(self.path):
            self._file.truncate(min(length, self.path.stat().st_size))
            self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        # Every record was handed over when it was written; the rest of one that failed fails again.
        with contextlib.suppress(OSError):
            self._file.close()


class EventFile:
    """TensorBoard's file of one start of a run, for people; what it holds is in `metrics.jsonl` and `images/` too.

    So a disk that does not take it is told once and ends nothing. Written where it is called from: the queue of
    tensorboardX's own writer stands still for ever, and the run with it, once its thread has met an error.

    Args:
        folder: Where TensorBoard looks.
        first_step: What earlier files hold from this step on is void.
    """

    def __init__(self, folder: Path, first_step: int | None):
        # Imported here: it costs most of a second, which no failing start should pay.
        from tensorboardX import event_file_writer, proto, summary

        self._summary, self._events, self._file = summary, proto.event_pb2, None
        with self._trying():
            folder.mkdir(exist_ok=True)
            self._file = event_file_writer.EventsWriter(str(folder / "events"), f".{os.getpid()}")
            if first_step is not None:
                start = self._events.SessionLog(status=self._events.SessionLog.START)
                self._write(first_step, session_log=start)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add numbers to their curves."""
        for name, value in values.items():
            self._write(step, summary=self._summary.scalar(name, value))
        self.flush()

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Add a picture, uint8 [H, W, 3]."""
        self._write(step, summary=self._summary.image(tag, image, dataformats="HWC"))

    def flush(self) -> None:
        """Force it to the disk."""
        with self._trying():
            if self._file:
                self._file.flush()

    def close(self) -> None:
        with self._trying():
            if self._file:
                self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        with self._trying():
            if self._file:
                self._file.write_event(self._events.Event(wall_time=time.time(), step=step, **content))

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._file = None
            logging.warning("TensorBoard's events end here, metrics.jsonl goes on: %s", error)


class MetricWriter:
    """Writes one run's metrics; on every process but the first it does nothing.

    A line of `metrics.jsonl` holds `step` (optimizer updates so far), `epoch` (epochs so far), `time` (seconds since
    1970) and the metrics. A metric that is not known is null. One that is NaN or infinite is null too, and its name
    stands in the line's list `non_finite`, so that the file stays JSON and nothing is hidden.
    """

    def __init__(self, workdir: Path, enabled: bool = True):
        self.enabled = enabled
        self._events_folder = Path(workdir) / "tensorboard"
        self._events: EventFile | None = None
        self._first_step = None
        self._lines = JsonLines(Path(workdir) / "metrics.jsonl") if enabled else None

    def write(self, step: int, epoch: float, metrics: dict[str, Any]) -> dict[str, float | int | str | None]:
        """Write one line. Values are numbers, scalar arrays, strings or None. Returns them as plain Python."""
        fetched = jax.device_get(metrics)
        if arrays := [name for name, value in fetched.items() if np.ndim(value)]:
            raise ValueError(f"a metric is one number, but these are arrays: {', '.join(arrays)}")
        values = {name: _json_value(fetched[name]) for name in metrics}
        non_finite = [name for name, value in values.items() if value is None and fetched[name] is not None]
        if not self.enabled:
            return values
        line = {"step": int(step), "epoch": _epoch(epoch), "time": round(time.time(), 3), **values}
        self._lines.append(line | ({"non_finite": non_finite} if non_finite else {}))
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._open_events().scalars(numbers, int(step))
        return values

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Show a picture, uint8 [H, W, 3], in TensorBoard."""
        if self.enabled:
            self._open_events().image(tag, image, int(step))

    @property
    def length(self) -> int:
        """Bytes in `metrics.jsonl` so far."""
        return self._lines.length if self.enabled else 0

    def sync(self) -> None:
        """Force the lines to the disk."""
        if self.enabled:
            self._lines.sync()

    def last(self) -> dict[str, Any] | None:
        """The last line of `metrics.jsonl`, if there is one."""
        return self._lines.last() if self.enabled else None

    def rewind(self, length: int, step: int) -> None:
        """Continue from a checkpoint that covers `length` bytes of `metrics.jsonl` and `step` updates."""
        if self.enabled:
            self._lines.rewind(length)
            self._first_step = step + 1

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            self._events.close()

    def _open_events(self) -> EventFile:
        if self._events is None:
            self._events = EventFile(self._events_folder, self._first_step)
        return self._events


def headline(metrics: dict[str, Any]) -> str:
    """The metrics that matter most, on one line: `reward/mean 0.512  loss/total 0.0312`."""
    shown = [(name, metrics.get(name)) for name in HEADLINES]
    return "  ".join(f"{name} {value:.4g}" for name, value in shown if isinstance(value, int | float))


def _epoch(epoch: float) -> int | float:
    return int(epoch) if epoch == int(epoch) else round(float(epoch), 4)


def _json_value(value: Any) -> Any:
    """A value as JSON knows it: scalar arrays become numbers, what is not finite becomes None."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    array = np.asarray(value)
    if array.ndim:
        return [_json_value(item) for item in array.tolist()]
    number = array.item() if array.dtype.kind in "iub" else float(array.astype(np.float64))
    return number if math.isfinite(number) else None
