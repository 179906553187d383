"""How costs grow, as a page of Markdown with plots.

    python -m benchmarks.growth_page

writes `docs/cost-growth.md` and its plots anew from what `benchmarks.cost_growth` has left in `benchmarks/results`.
Numbers come to the page in no other way.
"""

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.cost_growth import ALONE, LAYOUTS, PROGRAMS, QUESTION, ROLLOUT, UPDATE
from benchmarks.figures import Panel, figure
from benchmarks.harness import RESULTS, ROOT
from benchmarks.tables import origin

PAGE = ROOT / "docs" / "cost-growth.md"
PLOTS = "cost_growth_"  # what the names of the plots begin with
MIB = 2**20
HEAD = """# Speed: how costs grow

What SD3's drawing and learning cost when there is more of one thing: images of a run (groups x images of a group: to
the programs an image is one image, whichever group it is of), pixels, tokens of the prompt, rank of the LoRA, devices.
Ours alone, in float32, as [the comparisons](speed.md) time it. This page is made by `python -m benchmarks.growth_page`
from the files in `benchmarks/results`, which hold every single time; no number on it was written by hand.

- **One thing grows at a time**, from a base that is the same for all. Its points are run in turns; the tables have the
  medians of the rounds, and in brackets their quartiles.
- **Power**: that with which a cost has grown since the row above, `log(cost / cost above) / log(x / x above)`: 1 is
  linear, 2 is square. x is what the row begins with, but tokens, of an image with its prompt in the transformer, for
  the size of images and for the prompt. FLOPs are by our count; adapters, norms and the optimizer have no part in it.
- **Line**: offset and slope by least squares, and how far the point farthest from it is off.
- **Devices** on a CPU are simulated: they share its cores, and their seconds say little. What a program needs on one
  device is the compiler's account, and what a device receives is counted in the compiled program, loops as often as
  they run, data going around rings. Neither depends on the machine's load.
"""
NOTHING = """
Nothing is kept there yet: `python -m benchmarks.cost_growth --size small` measures.
"""
# Factor -> heading, the column of x, what the rows begin with
FACTORS = {
    "images": ("Images", "images", "images"),
    "side": ("Size of images", "tokens", "side in pixels"),
    "text_tokens": ("Length of the prompt", "tokens", "text tokens"),
    "rank": ("Rank of the LoRA", "rank", "rank"),
}


def power(before: Mapping, after: Mapping, x: str, cost: str) -> float:
    """With which power of x a cost has grown between two points."""
    return math.log(after[cost] / before[cost]) / math.log(after[x] / before[x])


def overall(rows: Sequence[Mapping], x: str, cost: str) -> float:
    """The power over all points: the slope of the line through the logarithms, by least squares."""
    return float(np.polyfit(*(np.log([row[name] for row in rows]) for name in (x, cost)), 1)[0])


def line(rows: Sequence[Mapping], x: str) -> tuple[float, float, float]:
    """(offset, slope, share by which the farthest point is off) of the line through the medians."""
    xs, seconds = (np.asarray([row[name] for row in rows], float) for name in (x, "median"))
    slope, offset = np.polyfit(xs, seconds, 1)
    return float(offset), float(slope), float(np.abs((offset + slope * xs) / seconds - 1).max())


def done(found: Mapping, work: str) -> list[dict]:
    """The rows of one kind of work."""
    return [row for row in found["points"] if row["work"] == work]


def of_factor(factor: str, found: Mapping) -> list[str]:
    """The section of one factor: a table for each kind of work, and what the growth was."""
    heading, x, value = FACTORS[factor]
    lines = [f"### {heading}", ""]
    for work in (ROLLOUT, UPDATE):
        rows = done(found, work)
        lines += [
            f"| {value} | tokens | {work}, seconds | images/s | GFLOP/s | power of seconds | power of FLOPs |",
            "|---|---|---|---|---|---|---|",
        ]
        for before, row in itertools.zip_longest([None, *rows[:-1]], rows):
            powers = [f"{power(before, row, x, cost):.2f}" if before else "" for cost in ("median", "flops")]
            cells = (
                row["value"],
                row["tokens"],
                _spread(row),
                f"{row['images_per_second']:.3g}",
                f"{row['flops'] / row['median'] / 1e9:.3g}",
                *powers,
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
        offset, slope, off = line(rows, x)
        each = {"images": "an image", "tokens": "a token", "rank": "a rank"}[x]
        lines += [
            "",
            f"Over all points seconds grow with the power **{overall(rows, x, 'median'):.2f}** of {x}, FLOPs with "
            f"{overall(rows, x, 'flops'):.2f}. "
            f"Line: {offset:.3g} s and {slope:.3g} s {each}, off by {off:.0%} at most.",
            "",
        ]
    return lines


def of_devices(found: Mapping) -> list[str]:
    """The section of devices."""
    gradient, programs = found["gradient_bytes"], found["programs"]
    lines = [
        "### Devices",
        "",
        "All devices on one axis of the mesh: `data` holds the weights whole on each, `fsdp` splits them.",
        "",
        "| axis | devices | rollout, seconds | images/s | update, seconds | images/s |",
        "|---|---|---|---|---|---|",
    ]
    for pair in zip(done(found, ROLLOUT), done(found, UPDATE), strict=True):
        cells = [f"{_spread(row)} | {row['images_per_second']:.3g}" for row in pair]
        lines.append(f"| {pair[0]['factor']} | {pair[0]['value']} | {' | '.join(cells)} |")
    lines += [
        "",
        "Of one device, in one run. XLA: the compiler's own count of operations, which takes the body of a loop once, "
        "as a share of what it counts for a single device. Peak: of arguments, temporaries and results. Gradients: "
        f"what is received over the {gradient / MIB:.3g} MiB of the LoRA's gradient; summed once around a ring of n "
        "devices, that is 2 (n - 1) / n.",
        "",
        "| axis | program | devices | GFLOP | XLA | arguments, MiB | temporary | peak | received | gradients |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    alone = {row["program"]: row["xla_flops"] for row in programs if row["layout"] == ALONE}
    for layout, name in itertools.product((ALONE, *LAYOUTS), PROGRAMS):
        for row in programs:
            if (row["layout"], row["program"]) == (layout, name):
                received = sum(row["received"].values())
                cells = (
                    layout,
                    name,
                    row["devices"],
                    f"{row['flops'] / 1e9:.3g}",
                    f"{row['xla_flops'] / alone[name]:.1%}",
                    *(f"{row[part] / MIB:.1f}" for part in ("arguments", "temporaries", "peak")),
                    _kinds(row["received"]),
                    f"{received / gradient:.3f}" if name == "update" else "",
                )
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _spread(row: Mapping) -> str:
    return f"{row['median']:.3g} ({row['lower']:.3g} to {row['upper']:.3g})"


def _kinds(received: Mapping[str, float]) -> str:
    """Bytes by kind of collective, as MiB."""
    told = (f"{kind} {size / MIB:.3g}" for kind, size in sorted(received.items()))
    return ", ".join(told) or "0"


def section(result: Mapping, name: str) -> list[str]:
    """One result; name: of its plots."""
    base, spread, factors = result["base"], result["spread"], result["factors"]
    lines = [
        f"## {result['options']['size']}, {result['date']}",
        "",
        origin(result),
        "",
        f"The base: {_described(base)}{_placed(factors)}. "
        f"A rollout has {base['steps']} dpm2 steps and the decoding of the latents; "
        f"an update learns from each image at {base['timesteps']} timestep{'s' * (base['timesteps'] > 1)}. "
        f"Over devices are split: {_described(spread)}.",
        "",
    ]
    plots = drawn(result)
    for kind, what in (
        ("factors", "Images a second against each factor"),
        ("devices", "Images a second and bytes against devices"),
    ):
        if kind in plots:
            lines += [f"![{what}, {result['options']['size']}]({PLOTS}{name}_{kind}.svg)", ""]
    for factor in FACTORS:
        if factor in factors:
            lines += of_factor(factor, factors[factor])
    if "devices" in factors:
        lines += of_devices(factors["devices"])
    return lines


def _described(size: Mapping) -> str:
    return (
        f"{size['images']} images of {size['height']} x {size['width']}, {size['text_tokens']} text tokens, "
        f"a LoRA of rank {size['rank']}"
    )


def _placed(factors: Mapping) -> str:
    """Over how many devices the images are split where it is not devices that grow."""
    numbers = {row["devices"] for name in FACTORS if name in factors for row in factors[name]["points"]}
    return f"; images are split over {numbers.pop()} devices" if len(numbers) == 1 else ""


def drawn(result: Mapping) -> dict[str, str]:
    """The plots of one result as SVG, by what they show."""
    factors, plots = result["factors"], {}
    panels = []
    for factor, (heading, _, value) in FACTORS.items():
        if factor in factors:
            series = {work: _rates(factors[factor], work, (factor,)) for work in (ROLLOUT, UPDATE)}
            panels.append(Panel(f"{heading}: images a second against {value}", series, from_zero=True))
    if panels:
        plots["factors"] = figure(panels, columns=min(2, len(panels)))
    if "devices" in factors:
        found, panels = factors["devices"], []
        for work, program in ((ROLLOUT, "draw"), (UPDATE, "update")):
            series = {layout: _rates(found, work, (ALONE, layout)) for layout in LAYOUTS}
            panels.append(Panel(f"{work}: images a second against devices", series, from_zero=True))
            for what, text in (("received", "MiB received by a device"), ("peak", "peak MiB of a device")):
                series = {layout: _bytes(found, program, what, (ALONE, layout)) for layout in LAYOUTS}
                panels.append(Panel(f"{program}: {text}", series, from_zero=True))
        plots["devices"] = figure(panels, columns=3)
    return plots


def _rates(found: Mapping, work: str, factors: Sequence[str]) -> list[tuple[float, float]]:
    """(value, images a second) of one kind of work."""
    return [(row["value"], row["images_per_second"]) for row in done(found, work) if row["factor"] in factors]


def _bytes(found: Mapping, program: str, what: str, layouts: Sequence[str]) -> list[tuple[float, float]]:
    """(devices, MiB) of one program."""

    def size(row: Mapping) -> float:
        return sum(row["received"].values()) if what == "received" else row[what]

    wanted = [row for row in found["programs"] if row["program"] == program and row["layout"] in layouts]
    return [(row["devices"], size(row) / MIB) for row in wanted]


def stored() -> dict[str, dict]:
    """The results that are kept, by the file's name without the question."""
    files = sorted(RESULTS.glob(f"{QUESTION}_*.json"))
    return {file.stem.removeprefix(f"{QUESTION}_"): json.loads(file.read_text()) for file in files}


def files(results: Mapping[str, Mapping]) -> dict[Path, str]:
    """What the page and its plots hold, by their paths."""
    lines, made = [HEAD], {}
    for name, result in results.items():
        lines += section(result, name)
        made |= {PAGE.parent / f"{PLOTS}{name}_{kind}.svg": svg + "\n" for kind, svg in drawn(result).items()}
    return {PAGE: "\n".join(lines) if results else HEAD + NOTHING} | made


def kept() -> dict[Path, str]:
    """The page and its plots as they are."""
    paths = [PAGE, *sorted(PAGE.parent.glob(f"{PLOTS}*.svg"))]
    return {path: path.read_text() for path in paths if path.exists()}


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    made = files(stored())
    for path in kept().keys() - made.keys():  # plots of results that are no longer kept
        path.unlink()
    for path, text in made.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
