"""Every comparison in `benchmarks/results` as one page of Markdown: what the documentation says about speed.

    python -m benchmarks.tables

writes `docs/speed-results.md` anew from the JSON files there. Numbers come to the page in no other way.
"""

import argparse
import json
from collections.abc import Iterable, Sequence

from benchmarks.harness import RESULTS, ROOT, verdict

PAGE = ROOT / "docs" / "speed-results.md"
HEAD = """# Speed: results

Medians of the rounds, and in brackets their quartiles. [How it is measured](speed.md). This page is made by
`python -m benchmarks.tables` from the files in `benchmarks/results`, which hold every single time.
"""


def page(results: Iterable[dict]) -> str:
    """Markdown of results as `harness.main` leaves them: a section each, in the order of question, device and date."""

    def place(one):
        return one["question"], one["options"]["size"], device(one["machine"]), one["date"]

    ordered = sorted(results, key=place)
    return "\n".join([HEAD, *map(section, ordered)])


def section(result: dict) -> str:
    """One result: where, when and how it was measured, and a table of each case."""
    lines = [f"## {title(result)}", "", origin(result), ""]
    return "\n".join([*lines, *(part for case in result["cases"] for part in table(case))])


def title(result: dict) -> str:
    machine = result["machine"]
    return f"`{result['question']}`, {result['options']['size']}, {device(machine)}, {result['date']}"


def device(machine: dict) -> str:
    """What the measurement ran on, in a few words."""
    return ", ".join(machine["accelerators"]) or f"{machine['cores']} cores of {machine['cpu']}"


def origin(result: dict) -> str:
    """The line on where and how a result was measured."""
    machine, versions = result["machine"], result["versions"]
    others = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch") if name in versions)
    return (
        f"`{result['command']}` on {device(machine)}; {others}; commit {result['revision'][:12]}"
        f"{', with changes' * result['revision'].endswith('-dirty')}; load before it {machine['load_before']}."
    )


def table(case: dict) -> list[str]:
    """The lines of one case: a row for each variant, then how ours compares, and what could not be run."""
    unit = case["unit"]
    lines = [
        f"{case['name'].replace('|', ' ')}: {case['count']:g} {unit} a run",
        "",
        f"| | seconds | {unit}/s | TFLOP/s | seconds of CPU | first run |",
        "|---|---|---|---|---|---|",
    ]
    for row in case["rows"]:
        rate = f"{row['flops_per_second'] / 1e12:.3g}" if "flops_per_second" in row else ""
        cpu = sorted(row["cpu_seconds"])[len(row["cpu_seconds"]) // 2]
        lines.append(
            f"| {row['side']}, {row['how']}, {row['dtype']} | {row['median']:.3g} ({row['lower']:.3g} to "
            f"{row['upper']:.3g}) | {row['per_second']:.3g} | {rate} | {cpu:.3g} | {row['first_seconds']:.3g} |"
        )
    lines.append("")
    for dtype, found in case["speedup"].items():
        lower, _, upper = found["by_round"]
        told = verdict(found, f"**{found['ratio']:.2f}**")
        name = "in any format" if dtype == "any" else dtype
        lines.append(f"- {name}: {told}; rounds {lower:.2f} to {upper:.2f}")
    lines += [f"- not run: {what}: {why}" for what, why in case["skipped"].items()]
    return [*lines, ""]


def stored() -> list[dict]:
    """The kept results that compare variants; others have pages of their own."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    return [result for result in found if "cases" in result]


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    PAGE.write_text(page(stored()))


if __name__ == "__main__":
    main()
