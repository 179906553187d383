"""What a run measures: `metrics.jsonl` for programs, TensorBoard events for people, JSON lines for records."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from firm_jax.errors import WorkdirError

# What the one line an epoch on the terminal shows, in this order, of the metrics that the run has.
HEADLINES = (
    "reward/mean",
    "eval/oracle_fraction",
    "eval/oracle_accuracy",
    "eval/loss",
    "eval/psnr",
    "loss/total",
    "loss/policy",
    "grad/norm",
    "critic/failure_rate",
    "throughput/images_per_s",
)


class JsonLines:
    """An append-only file of one JSON object a line, which a resumed run cuts back to what its checkpoint covers."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self._file = self.path.open("ab")
        except OSError as error:
            raise WorkdirError(
                f"cannot append to {self.path}: {error}. Make it writable, or change --workdir."
            ) from error

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and hand it to the operating system. Values that are not finite become null."""
        line = json.dumps(_json_value(record), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            # A lone surrogate in a prompt becomes its JSON escape.
            self._file.write(line.encode(errors="backslashreplace"))
            self._file.flush()
        except OSError as error:
            raise WorkdirError(
                f"cannot write to {self.path}: {error}. Free some space and start the same command again: "
                f"the run continues from its last checkpoint."
            ) from error

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def sync(self) -> None:
        """Force everything to the disk: a checkpoint must not count on a line that a crash can take."""
        os.fsync(self._file.fileno())

    def rewind(self, length: int) -> None:
        """Drop what lies beyond `length` bytes: records of a stretch that the resumed run does again."""
        self._file.truncate(min(length, self.path.stat().st_size))
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()


class MetricWriter:
    """Writes one run's metrics; on every process but the first it does nothing.

    A line of `metrics.jsonl` holds `step` (optimizer updates so far), `epoch` (epochs so far), `time` (seconds since
    1970) and the metrics. A metric that is not known is null. One that is NaN or infinite is null too, and its name
    stands in the line's list `non_finite`, so that the file stays JSON and nothing is hidden.
    """

    def __init__(self, workdir: Path, enabled: bool = True):
        self.enabled = enabled
        self._events_folder = Path(workdir) / "tensorboard"
        self._events = None
        self._purge_step = None
        self._lines = JsonLines(Path(workdir) / "metrics.jsonl") if enabled else None

    def write(self, step: int, epoch: int, metrics: dict[str, Any]) -> dict[str, float | int | str | None]:
        """Write one line. Values are numbers, scalar arrays, strings or None. Returns them as plain Python."""
        fetched = jax.device_get(metrics)
        if arrays := [name for name, value in fetched.items() if np.ndim(value)]:
            raise ValueError(f"a metric is one number, but these are arrays: {', '.join(arrays)}")
        values = {name: _json_value(fetched[name]) for name in metrics}
        non_finite = [name for name, value in values.items() if value is None and fetched[name] is not None]
        if not self.enabled:
            return values
        line = {"step": int(step), "epoch": int(epoch), "time": round(time.time(), 3), **values}
        self._lines.append(line | ({"non_finite": non_finite} if non_finite else {}))
        for name, value in values.items():
            if isinstance(value, int | float):
                self._open_events().add_scalar(name, value, step)
        return values

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Show a picture, uint8 [H, W, 3], in TensorBoard."""
        if self.enabled:
            self._open_events().add_image(tag, image, step, dataformats="HWC")

    @property
    def length(self) -> int:
        """Bytes in `metrics.jsonl` so far."""
        return self._lines.length if self.enabled else 0

    def sync(self) -> None:
        """Force everything to the disk."""
        if self._events is not None:
            self._events.flush()
        if self.enabled:
            self._lines.sync()

    def rewind(self, length: int, step: int) -> None:
        """Continue from a checkpoint that covers `length` bytes of `metrics.jsonl` and `step` updates."""
        if self.enabled:
            self._lines.rewind(length)
            self._purge_step = step + 1

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            self._events.close()

    def _open_events(self):
        if self._events is None:
            # Imported here: it costs most of a second, which no failing start should pay.
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self._events_folder), purge_step=self._purge_step, flush_secs=10)
        return self._events


def headline(metrics: dict[str, Any]) -> str:
    """The metrics that matter most, on one line: `reward/mean 0.512  loss/total 0.0312`."""
    shown = [(name, metrics.get(name)) for name in HEADLINES]
    return "  ".join(f"{name} {value:.4g}" for name, value in shown if isinstance(value, int | float))


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
