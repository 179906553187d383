"""Seeing where the time goes: XProf traces of chosen iterations, phase timers, and the share of the peak in use."""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

# Dense bf16 FLOP/s of one device as `jax.devices()[0].device_kind` names it, from the vendors' data sheets.
# A TPU v2 or v3 device is one core of two; from v4 on it is a chip.
_PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def peak_flops(device_kind: str | None = None) -> float | None:
    """Dense bf16 FLOP/s of one device, or None where it is not known (a CPU, a device newer than the table)."""
    return _PEAK_FLOPS.get(device_kind or jax.devices()[0].device_kind)


def model_flops_utilisation(flops: float, seconds: float, devices: int | None = None) -> float | None:
    """The share of the peak that `flops` useful operations in `seconds` on all devices come to; None if unknown."""
    peak = peak_flops()
    if peak is None or seconds <= 0:
        return None
    return flops / seconds / (peak * (devices or jax.device_count()))


# The phases that the run is there for. Not evaluation, waiting for a checkpoint, or anything before the first epoch.
PRODUCTIVE = ("rollout", "critic", "update")


class PhaseTimers:
    """Where a run's time goes: seconds in named phases since the last report, and its goodput since it first started.

    Goodput is productive time over wall time. Productive is what the phases PRODUCTIVE took, less the compiling in
    them, of the epochs that are part of the result: an epoch that a restart does again counts once. Wall time is all
    that the clock says since the run first started: loading, compiling, evaluation, checkpoints, epochs that were lost,
    and the time between a stop and the next start. (A stretch that ended before its first line of metrics is unknown.)
    """

    def __init__(self):
        self._seconds = defaultdict(float)
        self._compiling = _compiling().seconds
        self._since = time.perf_counter()
        self._started, self._productive = time.time(), 0.0

    def resume(self, lost: dict[str, Any] | None, kept: dict[str, Any] | None) -> None:
        """Go on from a run's lines of metrics: the last one that it wrote, and the last one that still counts."""
        if lost:
            self._started = lost["time"] - lost.get("goodput/wall_s", 0.0)
        self._productive = kept.get("goodput/productive_s", 0.0) if kept else 0.0

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Time a block. What it computes must be waited for inside it, or the time lands in the next phase."""
        start, compiling = time.perf_counter(), _compiling().seconds
        try:
            with jax.profiler.TraceAnnotation(phase):
                yield
        finally:
            seconds = time.perf_counter() - start
            self._seconds[phase] += seconds
            if phase in PRODUCTIVE:
                self._productive += max(0.0, seconds - (_compiling().seconds - compiling))

    def report(self) -> dict[str, float]:
        """Times in seconds; those of the phases start over.

        `time/<phase>` for every phase, `time/compile` wherever it was and `time/wall` in all, since the last report;
        `goodput/productive_s` and `goodput/wall_s` since the run first started, `goodput/fraction` their ratio.
        """
        now, compiling = time.perf_counter(), _compiling().seconds
        times = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        times |= {"time/compile": compiling - self._compiling, "time/wall": now - self._since}
        self._seconds.clear()
        self._since, self._compiling = now, compiling
        # A clock that was set back must not make it more than 1.
        wall = max(time.time() - self._started, self._productive, 1e-3)
        goodput = {"productive_s": self._productive, "wall_s": wall, "fraction": self._productive / wall}
        return times | {f"goodput/{name}": value for name, value in goodput.items()}


class _CompileClock:
    """Seconds that JAX spent on tracing, lowering and compiling, or on reading a program from its cache."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration: float, **details: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration


@functools.cache
def _compiling() -> _CompileClock:
    return _CompileClock()


class ProfileWindow:
    """Records iterations [start, start + steps) into `folder`; with steps = 0, nothing.

    Open the result with `xprof --logdir <workdir>/profile`, or with TensorBoard's profile plugin.
    """

    def __init__(self, start: int, steps: int, folder: Path):
        self._first, self._end, self._folder = start, start + steps, Path(folder)
        self._recording = False

    @contextlib.contextmanager
    def iteration(self, number: int) -> Iterator[None]:
        """One iteration of a trainer's loop: it is the step that the profile's step views count."""
        if not self._recording and self._first <= number < self._end:
            jax.profiler.start_trace(self._folder)
            self._recording = True
        with jax.profiler.StepTraceAnnotation("iteration", step_num=number):
            yield
        if self._recording and number + 1 >= self._end:
            self.close()

    def close(self) -> None:
        """Write what was recorded, if anything is being recorded."""
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
