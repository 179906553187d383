"""Our code beside PyTorch's at the same work: in one process, in turns, and only after their outputs were found equal.

A script names its question and gives `main` a function that makes its cases, each with several variants of one piece
of work. What comes out is a table, and a JSON file with everything that is needed to repeat the measurement.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share the device's memory

import jax
import numpy as np

from firm_jax.devices import say_nothing_of_absent_devices
from firm_jax.mesh import make_mesh

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
MADE = ("benchmarks/results", "benchmarks/plans", "docs")
OURS, PYTORCH = "ours", "PyTorch"
WITH, WITHOUT = "with", "without"  # two ways of ours: something that saves work, and what it costs to do without
SIZES = ("tiny", "small", "full")
DTYPES = ("float32", "bfloat16")
MODES = ("eager", "compile")
# Relative L2. Rounding grows over blocks and steps; an output that has nothing to do with it is about 1.4 away.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}
WARM_UP = 2  # runs before the first timed one, the one whose outputs are compared among them
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "diffusers", "peft", "numpy", "libtpu")


@dataclass(frozen=True)
class Variant:
    """One way to do a piece of work.

    side: OURS or PYTORCH, in another case WITH or WITHOUT. dtype: of the arithmetic. how: what else the table says of
    it. run: the timed work, over when it returns; it is given what `prepare`, which is not timed, has made just before.
    outputs: named host arrays of what `run` returned, compared with those of the case's first variant: floats may be
    TOLERANCES[dtype] away, integers must be equal. An output that only one of the two has is not compared.
    """

    side: str
    dtype: str
    how: str
    run: Callable[[Any], Any]
    outputs: Callable[[Any], dict[str, np.ndarray]]
    prepare: Callable[[], Any] = lambda: None

    @property
    def name(self) -> str:
        return f"{self.side}, {self.how}, {self.dtype}"


@dataclass(frozen=True)
class Case:
    """One piece of work, done by all variants.

    count, unit: how much of what one run makes ("images", say). flops: by our own count, 0 where nobody has counted.
    config: what the work is. skipped: for variants that cannot run here, the reason.
    """

    name: str
    variants: Sequence[Variant]
    count: float
    unit: str
    flops: float = 0
    config: dict = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line; see `arguments`."""

    size: str
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    rounds: int
    devices: int
    out: Path

    def mesh(self, batch: int):
        """Of as many of the first `devices` devices as divide the batch, which is split over them."""
        return make_mesh(devices=jax.devices()[: math.gcd(self.devices, batch)])


class OutputsDiffer(Exception):
    """Two variants of a case do not do the same work, so their times say nothing."""


def distances(outputs: dict, reference: dict, tolerance: float, name: str) -> dict[str, float]:
    """How far each output is from the reference's, relative L2; 0 for integers, which are equal.

    Raises OutputsDiffer for one that is further than `tolerance`, that is not finite, or has another shape, and when
    there is nothing to compare.
    """
    found = {}
    for what in sorted(outputs.keys() & reference.keys()):
        got, expected = np.asarray(outputs[what]), np.asarray(reference[what])
        if got.shape != expected.shape:
            raise OutputsDiffer(f"{name}: {what} has the shape {got.shape}, not {expected.shape}")
        if np.issubdtype(expected.dtype, np.integer):
            if not np.array_equal(got, expected):
                raise OutputsDiffer(f"{name}: {what} differs in {(got != expected).sum()} of {got.size} places")
            found[what] = 0.0
            continue
        got, expected = got.astype(np.float64), expected.astype(np.float64)
        found[what] = float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30))
        if not found[what] <= tolerance:  # NaN is not
            raise OutputsDiffer(f"{name}: {what} is {found[what]:.3g} away (relative L2), more than {tolerance:g}")
    if not found:
        raise OutputsDiffer(f"{name} has no output that can be compared: {sorted(outputs)}, {sorted(reference)}")
    return found


def timed(variant: Variant) -> tuple[float, float, Any]:
    """Seconds on the wall, seconds of this process's CPU, and what the run returned."""
    given = variant.prepare()
    start, start_cpu = time.perf_counter(), time.process_time()
    result = variant.run(given)
    return time.perf_counter() - start, time.process_time() - start_cpu, result


def measure(case: Case, rounds: int) -> dict:
    """The case's times: outputs compared and programs warmed up first, then `rounds` rounds of all variants in turn.

    Every round begins with another variant, so that none always follows the same one. Raises OutputsDiffer before
    anything is timed.
    """
    rows, reference = [], None
    for variant in case.variants:
        first, _, result = timed(variant)
        outputs = variant.outputs(result)
        reference = outputs if reference is None else reference
        distance = distances(outputs, reference, TOLERANCES[variant.dtype], f"{case.name}: {variant.name}")
        rows.append(
            {
                "side": variant.side,
                "how": variant.how,
                "dtype": variant.dtype,
                "tolerance": TOLERANCES[variant.dtype],
                "distance": distance,
                "first_seconds": first,
                "seconds": [],
                "cpu_seconds": [],
            }
        )
        del result, outputs
        for _ in range(WARM_UP - 1):
            timed(variant)
    for number in range(rounds):
        for place in range(len(rows)):
            turn = (number + place) % len(rows)
            seconds, cpu, _ = timed(case.variants[turn])
            rows[turn]["seconds"].append(seconds)
            rows[turn]["cpu_seconds"].append(cpu)
    for row in rows:
        row["lower"], row["median"], row["upper"] = quartiles(row["seconds"])
        row["per_second"] = case.count / row["median"]
        if case.flops:
            row["flops_per_second"] = case.flops / row["median"]
    return {
        "name": case.name,
        "config": case.config,
        "count": case.count,
        "unit": case.unit,
        "flops": case.flops,
        "rows": rows,
        "skipped": case.skipped,
        "speedup": speedups(rows),
    }


def quartiles(values: Sequence[float]) -> list[float]:
    return np.quantile(np.asarray(values), (0.25, 0.5, 0.75)).tolist()


def speedups(rows: list[dict]) -> dict[str, dict]:
    """How many times as fast as the better variant of PyTorch's the better one of ours is: for each dtype, and "any".
    In a case of WITH and WITHOUT, how many times as fast it is with it, for each dtype.

    ratio: of the medians. by_round: quartiles of the ratios within a round, which a load on the machine that comes
    and goes moves less. cpu_ratio: of the medians of what the process computed, which it moves least; it says nothing
    of an accelerator.
    """
    found = {}
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    for ours, theirs, names in ((OURS, PYTORCH, (*dtypes, "any")), (WITH, WITHOUT, dtypes)):
        for name in names:
            best = {}
            for side in (ours, theirs):
                own = [row for row in rows if row["side"] == side and name in (row["dtype"], "any")]
                if own:
                    best[side] = min(own, key=lambda row: row["median"])
            if len(best) == 2:
                ratios = np.divide(best[theirs]["seconds"], best[ours]["seconds"])
                found[name] = {
                    "ratio": best[theirs]["median"] / best[ours]["median"],
                    "by_round": quartiles(ratios),
                    "cpu_ratio": float(np.divide(*(np.median(best[side]["cpu_seconds"]) for side in (theirs, ours)))),
                    **{side: f"{row['how']}, {row['dtype']}" for side, row in best.items()},
                }
    return found


def table(measured: dict) -> str:
    """A case's times as text."""
    lines = [f"{measured['name']}: {measured['count']:g} {measured['unit']} a run"]
    lines.append(
        f"  {'':36}{'median s':>10}{'quartiles':>20}{'CPU s':>9}{measured['unit'] + '/s':>13}{'first s':>9}"
        f"{'distance':>10}"
    )
    for row in measured["rows"]:
        spread = f"{row['lower']:.4g} to {row['upper']:.4g}"
        farthest = max(row["distance"].values())
        lines.append(
            f"  {row['side'] + ', ' + row['how'] + ', ' + row['dtype']:36}{row['median']:10.4g}{spread:>20}"
            f"{np.median(row['cpu_seconds']):9.3g}{row['per_second']:13.4g}{row['first_seconds']:9.3g}{farthest:10.1e}"
        )
    lines += [f"  skipped: {what}: {why}" for what, why in measured["skipped"].items()]
    for name, found in measured["speedup"].items():
        lower, _, upper = found["by_round"]
        told = verdict(found, format(found["ratio"], ".2f"))
        lines.append(f"  {name}: {told}; rounds {lower:.2f} to {upper:.2f}; in CPU seconds {found['cpu_ratio']:.2f}")
    return "\n".join(lines)


def verdict(found: dict, ratio: str) -> str:
    """One of `speedups` in words."""
    if WITH in found:
        return f"gain: with it {ratio} times as fast as without"
    return f"ours ({found[OURS]}) is {ratio} times as fast as the better PyTorch variant ({found[PYTORCH]})"


# What a result says of its making


def machine() -> dict:
    """What the measurement ran on. Neither host name nor user: results are published."""
    names = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    accelerators = [device.device_kind for device in jax.devices() if device.platform != "cpu"]
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": accelerators,
        "load_before": round(os.getloadavg()[0], 2),  # above 0: others were computing too
    }


def cores() -> int:
    """Of the CPU, those that this process may use."""
    return len(os.sched_getaffinity(0))


def _read(file: str) -> str:
    return Path(file).read_text() if Path(file).exists() else ""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def revision() -> str:
    """The commit that was measured, with "-dirty" where tracked files differ from it; "unknown" outside a clone.

    Results and pages, which measurements make and change, are not looked at.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *(f":!{folder}" for folder in MADE))
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_memory() -> dict[str, int]:
    """Bytes of the first accelerator that each framework held at its peak, weights included; none on a CPU."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return {}
    peak = {OURS: (device.memory_stats() or {}).get("peak_bytes_in_use", 0)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak[PYTORCH] = torch.cuda.max_memory_allocated()
    return peak


# The command line


def arguments(doc: str, given: Sequence[str] | None = None) -> Options:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES) if on_cpu else ["bfloat16"])
    parser.add_argument("--torch", choices=MODES, nargs="*", default=list(MODES), help="PyTorch's variants")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--devices", type=int, default=jax.device_count(), help="of ours, the batch split over them")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    asked = parser.parse_args(given)
    return Options(asked.size, tuple(asked.dtype), tuple(asked.torch), asked.rounds, asked.devices, asked.out)


def without_path(words: list[str]) -> list[str]:
    """A command line's words without --out, which names somebody's folder."""
    kept = [word for word in words if not word.startswith("--out=")]
    at = kept.index("--out") if "--out" in kept else len(kept)
    return kept[:at] + kept[at + 2 :]


def header(question: str, words: list[str], options: dict) -> dict:
    """What a result says of its making. words: of the command line, behind the question's."""
    return {
        "question": question,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "-m", f"benchmarks.{question}", *without_path(words)]),
        "revision": revision(),
        "machine": machine(),
        "versions": versions(),
        "options": options,
    }


def result_file(found: dict, out: Path) -> Path:
    """`<question>_<size>_<device>_<date>.json` in the folder `out`, which is made.

    A CPU's device is "cpu_" and its name, so that what two machines needed stands side by side.
    """
    names = found["machine"]["accelerators"]
    where = "-".join(names[0].lower().split()) if names else f"cpu_{cpu_name(found['machine']['cpu'])}"
    out.mkdir(parents=True, exist_ok=True)
    return out / f"{found['question']}_{found['options']['size']}_{where}_{found['date']}.json"


def cpu_name(model: str) -> str:
    """A CPU's model as part of a file's name: "Intel(R) Xeon(R) Gold 6430 CPU @ 2.10GHz" is "intel-xeon-gold-6430"."""
    words = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|@.*", " ", model.lower())
    return "-".join(re.findall(r"[a-z0-9.]+", words)) or "unknown"


def main(question: str, doc: str, cases: Callable[[Options, Path], Iterator[Case]], given=None) -> dict:
    """Measure the cases, print their tables, and write `<question>_<size>_<device>_<date>.json` after each of them.

    cases: from the options, and a folder for weights that is removed at the end.
    """
    say_nothing_of_absent_devices()
    with contextlib.suppress(RuntimeError):  # once JAX has begun, its devices are what they are
        jax.config.update("jax_num_cpu_devices", cores())  # as our configs for CPUs have it
    options = arguments(doc, given)
    settings = {name: value for name, value in asdict(options).items() if name != "out"}
    found = header(question, sys.argv[1:] if given is None else list(given), settings) | {"cases": []}
    file = result_file(found, options.out)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(options, Path(folder)):
            measured = measure(case, options.rounds)
            print(table(measured), flush=True)
            found["cases"].append(measured)
            found["peak_bytes"] = peak_memory()
            file.write_text(json.dumps(found, indent=1) + "\n")
    return found
