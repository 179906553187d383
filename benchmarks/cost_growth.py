"""What drawing and learning cost as the work grows: more images, larger ones, longer prompts, a LoRA of higher rank,
more devices.

    python -m benchmarks.cost_growth --size small

Ours alone, in float32: SD3's rollout and update as `sd3_rollout` and `sd3_update` time them. One thing grows at a
time, from a base that is the same for all, and the points of one thing are run in turns. Devices are simulated on a
CPU: these share its cores, so that their seconds say little, and what the compiler says of the programs of one device
is told beside them: its bytes, its operations, and the bytes that it receives from the others.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from benchmarks import harness, sd3_rollout, sd3_update
from benchmarks.diffusion import Work
from benchmarks.harness import Variant, distances, quartiles, timed
from benchmarks.sizes import SD3, Diffusion
from firm_jax.collectives import collective_bytes
from firm_jax.devices import say_nothing_of_absent_devices
from firm_jax.mesh import make_mesh
from firm_jax.rl.update import learning_flops

QUESTION, DTYPE = "cost_growth", "float32"
ROLLOUT, UPDATE = "rollout", "update"
DEVICES = (1, 2, 4, 8)
ALONE, LAYOUTS = "alone", ("data", "fsdp")  # the mesh axis that all devices are on, where there are several


@dataclass(frozen=True)
class Growth:
    """base: what grows. factors: field of the work -> its values, the base's among them; `side` stands for height and
    width. spread: the work that is split over devices; the largest number of them divides its images."""

    base: Diffusion
    factors: Mapping[str, Sequence[int]]
    spread: Diffusion

    def sizes(self, factor: str) -> dict[int, Diffusion]:
        """The work by the factor's value."""
        fields = ("height", "width") if factor == "side" else (factor,)
        return {value: replace(self.base, **dict.fromkeys(fields, value)) for value in self.factors[factor]}


def _base(size: str, side: int, **changed) -> Diffusion:
    return replace(SD3[size], height=side, width=side, timesteps=1, **changed)


GROWTH = {
    "tiny": Growth(
        _base("tiny", 64, images=8, steps=4),
        {"images": (4, 8, 32), "side": (32, 64, 128), "text_tokens": (18, 35, 140), "rank": (4, 16, 64)},
        _base("tiny", 64, images=8, steps=4),
    ),
    "small": Growth(
        _base("small", 256, images=2, steps=3),
        {"images": (2, 4, 8), "side": (128, 256, 512), "text_tokens": (77, 141, 333, 589), "rank": (8, 32, 128)},
        _base("small", 128, images=8, steps=3),
    ),
}


@dataclass(frozen=True)
class Point:
    """One piece of work. factor, value: what has grown, and to what. work, variant: of ROLLOUT and UPDATE."""

    factor: str
    value: int
    work: Work
    variants: Mapping[str, Variant]

    def described(self) -> dict:
        """What it is, for the result's file. tokens: of one image with its prompt in the transformer."""
        work, size = self.work, self.work.size
        adapters = jax.tree.leaves(work.adapters[sd3_update.CURRENT])
        return {
            "factor": self.factor,
            "value": self.value,
            "images": size.images,
            "side": size.height,
            "text_tokens": size.text_tokens,
            "tokens": sum(work.shapes.sample_tokens(size.height, size.width, work.conditioning)),
            "rank": size.rank,
            "adapter_parameters": sum(leaf.size for leaf in adapters),
            "devices": int(work.mesh.size),
        }

    def flops(self) -> dict[str, int]:
        """Of a run over all devices, by our count, in which adapters and the optimizer have no part."""
        size = self.work.size
        learned = learning_flops(self.work.shapes, size, (size.height, size.width), self.work.conditioning)
        return {ROLLOUT: sd3_rollout.flops(self.work), UPDATE: size.images * learned}


def point(factor: str, value: int, size: Diffusion, mesh, folder: Path) -> Point:
    work = Work(size, folder, mesh)
    variants = {
        ROLLOUT: sd3_rollout.ours(work, DTYPE),
        UPDATE: sd3_update.ours(work, sd3_update.Samples(work), DTYPE),
    }
    return Point(factor, value, work, variants)


def measure(
    points: Sequence[Point], rounds: int, same: bool = False, look: Callable = lambda point, executables: None
) -> list[dict]:
    """The times of all points' rollouts and updates, in turns, after each was warmed up and its outputs were looked at.

    Every round begins with another one. same: the points do the same work, and their outputs are to be equal too.
    look: is given each point and the programs that were compiled for it. Raises OutputsDiffer for outputs that are not
    equal, or not finite.
    """
    rows, runs, reference = [], [], {}
    for each in points:
        before = compiled()
        for name, variant in each.variants.items():
            result = timed(variant)[-1]
            outputs = variant.outputs(result)
            known = reference.setdefault(name, outputs) if same else outputs
            tolerance = harness.TOLERANCES[variant.dtype]
            found = distances(outputs, known, tolerance, f"{name}, {each.factor} {each.value}")
            row = each.described() | {"work": name, "flops": each.flops()[name], "distance": found}
            rows.append(row | {"seconds": [], "cpu_seconds": []})
            runs.append(variant)
            del result, outputs
            for _ in range(harness.WARM_UP - 1):
                timed(variant)
        look(each, [executable for executable in compiled() if executable not in before])
    for number in range(rounds):
        for place in range(len(runs)):
            turn = (number + place) % len(runs)
            seconds, cpu, _ = timed(runs[turn])
            rows[turn]["seconds"].append(seconds)
            rows[turn]["cpu_seconds"].append(cpu)
    for row in rows:
        row["lower"], row["median"], row["upper"] = quartiles(row["seconds"])
        row["images_per_second"] = row["images"] / row["median"]
    return rows


# What the compiled programs need

PROGRAMS = ("draw", "decode", "update")


def compiled() -> list:
    """The programs of this process that are in memory."""
    return jax.devices()[0].client.live_executables()


def account(point: Point, executables: Sequence) -> list[dict]:
    """What one device needs for each program of a rollout and an update: memory, operations, and bytes received.

    executables: what the point's runs have compiled. flops: our count of all devices' over their number. xla_flops: the
    compiler's count of what one device has to do; it counts the body of a loop once, so it only compares devices.
    peak: of arguments, temporaries and results. received: in one run, by kind of collective.
    """
    whole, size, devices = point.flops(), point.work.size, int(point.work.mesh.size)
    decoding = size.images * point.work.shapes.decode_flops(size.height, size.width)
    parts = (whole[ROLLOUT] - decoding, decoding, whole[UPDATE])
    modules = {executable.hlo_modules()[0].name: executable for executable in executables}
    rows = []
    for name, flops in zip(PROGRAMS, parts, strict=True):
        executable = modules[f"jit_{name}"]
        memory = executable.get_compiled_memory_stats()
        arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        rows.append(
            {
                "layout": point.factor,
                "devices": devices,
                "program": name,
                "flops": flops / devices,
                "xla_flops": executable.cost_analysis()["flops"],
                "arguments": arguments,
                "temporaries": temporaries,
                "peak": arguments + temporaries + results,
                "received": collective_bytes(executable.hlo_modules()[0].to_string()),
            }
        )
    return rows


# The command line


def grow(growth: Growth, factor: str, rounds: int, folder: Path, base: Callable[[], Point]) -> dict:
    """What one factor costs: the rows of its points. base: makes the point of `growth.base`, once."""
    made = []
    for value, size in growth.sizes(factor).items():
        if size == growth.base:
            made.append(replace(base(), factor=factor, value=value))
        else:
            made.append(point(factor, value, size, base().work.mesh, folder))
    return {"points": measure(made, rounds)}


def divide(growth: Growth, rounds: int, folder: Path) -> dict:
    """What the same work costs on more devices: the rows of the points, and those of the programs on one device.

    A single device is of no layout: to both it is the same.
    """
    made = []
    for layout, number in itertools.product((ALONE, *LAYOUTS), DEVICES):
        if (number == 1) == (layout == ALONE) and number <= jax.device_count():
            sizes = {"data": 1, "fsdp": 1} | ({} if layout == ALONE else {layout: number})
            mesh = make_mesh(**sizes, devices=jax.devices()[:number])
            made.append(point(layout, number, growth.spread, mesh, folder))
    programs = []
    rows = measure(made, rounds, True, lambda point, executables: programs.extend(account(point, executables)))
    return {"points": rows, "programs": programs, "gradient_bytes": 4 * rows[0]["adapter_parameters"]}  # float32


def table(factor: str, found: dict) -> str:
    """One factor's numbers as text."""
    lines = [f"{factor}", f"  {'':24}{'median s':>10}{'quartiles':>20}{'CPU s':>9}{'images/s':>10}"]
    for row in found["points"]:
        spread, name = f"{row['lower']:.4g} to {row['upper']:.4g}", f"{row['value']} {row['work']}"
        lines.append(
            f"  {name:24}{row['median']:10.4g}{spread:>20}{np.median(row['cpu_seconds']):9.3g}"
            f"{row['images_per_second']:10.4g}"
        )
    for row in found.get("programs", ()):
        name, received = f"{row['layout']} {row['devices']}, {row['program']}", sum(row["received"].values())
        lines.append(
            f"  {name:24}{row['peak'] / 2**20:10.1f} MiB at the peak, {received / 2**20:.3g} MiB received, "
            f"{row['flops'] / 1e9:.4g} GFLOP"
        )
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> dict:
    """Measure the factors asked for, print them, and write the file after each of them."""
    say_nothing_of_absent_devices()
    with contextlib.suppress(RuntimeError):  # once JAX has begun, its devices are what they are
        jax.config.update("jax_num_cpu_devices", max(harness.cores(), *DEVICES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    factors = [*GROWTH["tiny"].factors, "devices"]
    parser.add_argument("--size", choices=GROWTH, default="tiny")
    parser.add_argument("--factors", choices=factors, nargs="+", default=factors)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON file")
    asked = parser.parse_args(given)
    growth = GROWTH[asked.size]
    options = {"size": asked.size, "dtype": DTYPE, "factors": asked.factors, "rounds": asked.rounds}
    found = harness.header(QUESTION, sys.argv[1:] if given is None else list(given), options)
    for name in ("base", "spread"):
        found[name] = {key: value for key, value in vars(getattr(growth, name)).items() if key != "model"}
    found["factors"] = {}
    file = harness.result_file(found, asked.out)
    devices = math.gcd(harness.cores() if jax.default_backend() == "cpu" else jax.device_count(), growth.base.images)
    with tempfile.TemporaryDirectory() as folder:

        @functools.cache
        def base() -> Point:
            return point("base", 0, growth.base, make_mesh(devices=jax.devices()[:devices]), Path(folder))

        for factor in asked.factors:
            own = (asked.rounds, Path(folder))
            found["factors"][factor] = (
                grow(growth, factor, *own, base) if factor in growth.factors else divide(growth, *own)
            )
            print(table(factor, found["factors"][factor]), flush=True)
            file.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
