"""How much of an epoch the devices had nothing to do, from the trace that a profile leaves (`profile.steps`).

A device is busy while an operation of a compiled program runs on it. Which events of a trace tell so:

- TPU: the row "XLA Modules" of the device's plane, one event for each run of a program.
- GPU: the rows "Stream #..." of the device's plane, without copies from and to the host. The moments between two
  kernels of one program count as idle here.
- CPU: events of any host thread that name an HLO operation and their device (`hlo_op`, `device_ordinal`). A simulated
  device that ran nothing leaves no event and is not counted.

The epoch is the event "iteration" that `ProfileWindow` marks, and its phases are those of `Run.timer`, on that thread.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from firm_jax.errors import DataError
from firm_jax.profiling import PRODUCTIVE

PHASES = (*PRODUCTIVE, "eval", "checkpoint")
REST = "rest"  # of an epoch, outside these
_DEVICE = re.compile(r"/device:(TPU|GPU):\d+$")
_COPIES = ("MemcpyH2D", "MemcpyD2H")

Intervals = list[tuple[float, float]]


class Span(NamedTuple):
    """Something that took from `start` to `end`, in nanoseconds of the trace's clock."""

    start: float
    end: float
    name: str


@dataclass
class Timeline:
    """What a trace tells. busy: of each device, the operations or programs that ran, named after their program.
    thread: all that the thread of the training loop did, its iterations and phases among it."""

    busy: dict[str, list[Span]] = field(default_factory=lambda: defaultdict(list))
    thread: list[Span] = field(default_factory=list)


def read_trace(folder: Path | str) -> Timeline:
    """The timeline of the last trace below `folder`. Raises DataError where there is none, or none of an iteration."""
    from jax.profiler import ProfileData

    files = sorted(Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise DataError(f"there is no trace (*.xplane.pb) in {folder}; set --config.profile.steps=1 and run again")
    timeline = timeline_of(ProfileData.from_file(str(files[-1])).planes)
    if not any(span.name == "iteration" for span in timeline.thread):
        raise DataError(f"{files[-1]} holds no iteration: the run ended before profile.start")
    return timeline


def timeline_of(planes: Iterable[Any]) -> Timeline:
    """The timeline of the planes of a `jax.profiler.ProfileData`."""
    timeline = Timeline()
    for plane in planes:
        if _DEVICE.match(plane.name):
            timeline.busy[plane.name] += _of_device(plane)
        elif plane.name.startswith("/host:"):
            for line in plane.lines:
                _read_thread(list(line.events), timeline)
    return timeline


def _of_device(plane: Any) -> list[Span]:
    lines = {line.name: line for line in plane.lines}
    if "XLA Modules" in lines and "TPU" in plane.name:
        return [_span(event) for event in lines["XLA Modules"].events]
    streams = [line for name, line in lines.items() if name.startswith("Stream #")]
    return [
        _span(event, dict(event.stats).get("hlo_module"))
        for line in streams
        for event in line.events
        if not event.name.startswith(_COPIES)
    ]


def _read_thread(events: list[Any], timeline: Timeline) -> None:
    spans, loop = [], False
    for event in events:
        if not event.name.startswith("$"):  # else a call of Python, of which there are very many
            loop |= event.name == "iteration"
            stats = dict(event.stats)
            if "hlo_op" in stats and "device_ordinal" in stats:
                timeline.busy[f"cpu {stats['device_ordinal']}"].append(_span(event, stats.get("hlo_module")))
                continue
        spans.append(_span(event))
    if loop:
        timeline.thread += spans


def _span(event: Any, name: str | None = None) -> Span:
    return Span(event.start_ns, event.end_ns, name or event.name)


def idle(timeline: Timeline, largest: int = 10) -> dict[str, Any]:
    """Shares in which the devices of a timeline ran nothing, within its iterations.

    Returns:
        seconds: Of all the iterations. devices: How many. idle: The share of the seconds, the mean over devices.
        phases: Of every phase, and of the REST of the iterations, its `seconds` and `idle` share.
        gaps: The `largest` stretches in which no device ran anything, longest first: their `seconds` and start (`at`,
            seconds into the first iteration), the `phase`, the programs `after` and `before` which they lie (None at
            an end of the trace), and what the loop's thread did (`host`, from the outside in).
    """
    iterations = merged((span.start, span.end) for span in timeline.thread if span.name == "iteration")
    phases = {name: [(s.start, s.end) for s in timeline.thread if s.name == name] for name in PHASES}
    parts = {name: common(iterations, merged(spans)) for name, spans in phases.items() if spans}
    parts[REST] = without(iterations, merged(interval for part in parts.values() for interval in part))
    devices = [merged((span.start, span.end) for span in spans) for spans in timeline.busy.values()]

    def share(part: Intervals) -> float:
        if not devices or not length(part):
            return 1.0 if length(part) else 0.0
        return sum(length(without(part, busy)) for busy in devices) / len(devices) / length(part)

    ran = sorted((span for spans in timeline.busy.values() for span in spans), key=lambda span: span.start)
    gaps = without(iterations, merged((span.start, span.end) for span in ran))
    gaps = sorted(gaps, key=lambda gap: gap[0] - gap[1])[:largest]
    return {
        "seconds": length(iterations) / 1e9,
        "devices": len(devices),
        "idle": share(iterations),
        "phases": {name: {"seconds": length(part) / 1e9, "idle": share(part)} for name, part in parts.items()},
        "gaps": [_described(gap, iterations[0][0], parts, ran, timeline.thread) for gap in gaps],
    }


def _described(gap: tuple[float, float], first: float, parts: dict, ran: Sequence[Span], thread: list[Span]) -> dict:
    before = max((span for span in ran if span.end <= gap[0]), key=lambda span: span.end, default=None)
    after = next((span for span in ran if span.start >= gap[1]), None)
    return {
        "seconds": (gap[1] - gap[0]) / 1e9,
        "at": (gap[0] - first) / 1e9,
        "phase": max(parts, key=lambda name: length(common([gap], parts[name]))),
        "after": before and before.name,
        "before": after and after.name,
        "host": _calls(gap, thread),
    }


def _calls(gap: tuple[float, float], thread: list[Span]) -> list[str]:
    """What covers most of a gap, from the outside in, without the iteration and its phases."""
    half = (gap[1] - gap[0]) / 2
    covering = [span for span in thread if min(span.end, gap[1]) - max(span.start, gap[0]) > half]
    calls = sorted(covering, key=lambda span: span.start - span.end)
    return [span.name for span in calls if span.name not in ("iteration", *PHASES)]


# Sets of moments, as intervals that are in order and apart


def merged(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """Their union."""
    found: Intervals = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif end > start:
            found.append((start, end))
    return found


def without(these: Intervals, others: Intervals) -> Intervals:
    """The moments of `these` that are not of `others`; both merged."""
    found, place = [], 0
    for start, end in these:
        while place < len(others) and others[place][1] <= start:
            place += 1
        at = place
        while at < len(others) and others[at][0] < end:
            if others[at][0] > start:
                found.append((start, others[at][0]))
            start = max(start, others[at][1])
            at += 1
        if start < end:
            found.append((start, end))
    return found


def common(these: Intervals, others: Intervals) -> Intervals:
    """The moments of both."""
    return without(these, without(these, others))


def length(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)
