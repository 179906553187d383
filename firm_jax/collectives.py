"""What a compiled program sends between devices, read from its text."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

# Bytes that each of n devices receives for a result of one byte, when the data go around a ring.
RECEIVED = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?[\]})]) ([a-z][a-z\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[\w]*\[([\d,]*)\]")
_LAYOUT = re.compile(r"\{[^}]*\}")
_OPERANDS = re.compile(r"\((\([^)]*\)|[^\]]*\]), ")  # the first element of a tuple, without layouts
_FIRST = re.compile(r"\([^)]*\)|[^\]]*\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|[^,\s]+)")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")  # {{0,1},{2,3}}
_COUNTED_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")  # [2,2]<=[4]
# mesh['x'=2,'y'=2] {'y'}, or mesh['x'=2,'y'=2], device_ids=(...) {'y'}
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}")


@dataclass
class _Computation:
    """received: channel -> (kind, bytes). The rest is what tells how often a loop runs: its condition compares the
    state's element `counter` with `limit`; its body's result has the elements `results`, some of them made by adding
    a constant, `steps`."""

    received: dict[str, tuple[str, float]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    loops: list[tuple[str, str, int | None]] = field(default_factory=list)  # condition, body, trips where stated
    constants: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    results: list[str] = field(default_factory=list)
    counter: int | None = None
    limit: int | None = None


def collective_bytes(text: str, unknown_trips: int = 1) -> dict[str, float]:
    """Bytes that one device receives in a run of a compiled program, by the kind of collective.

    text: `compiled.as_text()`. Data are taken to go around rings: of n devices, each receives the (n - 1) / n of an
    all-gathered array that it lacks, and twice that share of an all-reduced one. What stands in a loop counts as often
    as the loop runs; `unknown_trips` is taken for a loop whose end depends on its data.
    """
    computations, entry = _parse(text)
    totals: dict[str, dict[str, tuple[str, float]]] = {}

    def total(name: str) -> dict[str, tuple[str, float]]:
        if name not in totals:
            here = computations[name]
            parts = [(callee, 1) for callee in here.calls]
            for condition, body, trips in here.loops:
                trips = trips or _counted_trips(computations[condition], computations[body]) or unknown_trips
                parts += [(body, trips), (condition, trips)]
            found = dict(here.received)
            for callee, times in parts:
                for channel, (kind, received) in total(callee).items():
                    # The TPU compiler spreads one collective over several fusions: same channel, counted once.
                    found[channel] = max(found.get(channel, (kind, 0.0)), (kind, times * received))
            totals[name] = found
        return totals[name]

    summed: dict[str, float] = defaultdict(float)
    for kind, received in total(entry).values():
        summed[kind] += received
    return dict(summed)


def _counted_trips(condition: _Computation, body: _Computation) -> int | None:
    """How often a loop runs that counts from zero to a constant, as those of JAX and of XLA's partitioner do."""
    if condition.limit is None or condition.counter is None:
        return None
    step = body.steps.get(body.results[condition.counter], 1) if body.results else 1
    return -(-condition.limit // step)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations by name, and the name of the one that the program starts with."""
    partitions = re.search(r"\bnum_partitions=(\d+)", text)
    devices = int(partitions[1]) if partitions else 1
    computations: dict[str, _Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if opening := _COMPUTATION.match(line):
            name = opening[2]
            computations[name] = _Computation()
            entry = name if opening[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            root, own, result, opcode, rest = instruction.groups()
            here = computations[name]
            if opcode.removesuffix("-start") in RECEIVED:
                channel = _CHANNEL.search(rest)
                here.received[channel[1] if channel else own] = _received(name, result, opcode, rest, devices)
            elif opcode == "while":
                condition, body = _LOOP.search(rest).groups()
                trips = _TRIPS.search(rest)
                here.loops.append((condition, body, int(trips[1]) if trips else None))
            elif opcode in ("fusion", "call", "conditional", "async-start"):
                for called in _CALLED.findall(rest):
                    here.calls += [callee.strip(" %") for callee in called.strip("{}").split(",")]
            else:
                _note_counting(here, bool(root), own, opcode, rest)
    return computations, entry


def _received(computation: str, result: str, opcode: str, rest: str, devices: int) -> tuple[str, float]:
    """Kind and bytes of one collective."""
    kind, n = opcode.removesuffix("-start"), _group_size(rest, devices)
    # What an asynchronous start gives is its operands and then its results, but for all-reduce: results alone.
    size = _size(_results(result) if opcode.endswith("-start") and kind != "all-reduce" else result)
    if computation.startswith("all-reduce-scatter"):  # a fusion with the slice that each device keeps
        kind, size = "reduce-scatter", size / n
    return kind, size * RECEIVED[kind](n)


def _note_counting(here: _Computation, root: bool, own: str, opcode: str, rest: str) -> None:
    """Keep what may tell how often a loop runs."""
    operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
    if opcode == "constant" and (number := rest.partition(")")[0]).isdigit():
        here.constants[own] = int(number)
    elif opcode == "get-tuple-element":
        here.elements[own] = int(re.search(r"index=(\d+)", rest)[1])
    elif opcode == "add" and operands[-1] in here.constants:
        here.steps[own] = here.constants[operands[-1]]
    elif opcode == "tuple" and root:
        here.results = operands
    elif opcode == "compare" and root and "direction=LT" in rest:
        here.counter, here.limit = here.elements.get(operands[0]), here.constants.get(operands[-1])


def _results(started: str) -> str:
    """The results in the type of an asynchronous start: (operand, result, ...) or ((operands), (results), ...)."""
    shapes = _LAYOUT.sub("", started)
    behind = shapes[_OPERANDS.match(shapes).end() :]
    return _FIRST.match(behind)[0]


def _size(result: str) -> int:
    """Bytes of an array, or of all in a tuple."""
    total = 0
    for kind, bits, dimensions in _ARRAY.findall(result):
        each = 1 if kind == "pred" else int(bits) / 8 if bits else 0
        total += int(each * math.prod(int(size) for size in dimensions.split(",") if size))
    return total


def _group_size(attributes: str, devices: int) -> int:
    """How many devices take part in one group of a collective."""
    if groups := _LISTED_GROUPS.search(attributes):
        return groups[1].count(",") + 1
    if groups := _COUNTED_GROUPS.search(attributes):
        return int(groups[1])
    if groups := _MESH_GROUPS.search(attributes):
        sizes = dict(pair.split("=") for pair in groups[1].split(","))
        return math.prod(int(sizes[axis.strip()]) for axis in groups[2].split(","))
    return devices
