"""How long a job takes from its start to the end of its first epoch: with nothing compiled before, and once more.

    python -m benchmarks.start --config configs/gen_qma.py:tiny

starts the job twice in fresh processes, in folders of their own, with one cache for compiled programs that is empty at
first. What is not known here goes to the job, such as `--config.eval.prompts=16`: before its first epoch a job
evaluates the policy that it starts from.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.jobs import Ran, run_job, store

STARTS = ("with nothing compiled", "with the cache")


def measured(ran: Ran) -> dict[str, float]:
    """Seconds from the process's start: to the end of the evaluation before training, and of the first epoch; and how
    many of them went to tracing, lowering and compiling, or reading compiled programs; and seconds of CPU."""
    first = ran.epoch(1)
    return {
        "evaluated": ran.epoch(0)["time"] - ran.started,
        "seconds": first["time"] - ran.started,
        "compile_seconds": sum(line["time/compile"] for line in ran.lines if line["epoch"] <= 1),
        "cpu_seconds": ran.cpu_seconds,
    }


def table(result: dict) -> list[str]:
    """Markdown: a row for each start."""
    lines = [
        f"| `{result['config']}` | seconds to the end of the first epoch | of them compiling | "
        "evaluation before it over after | seconds of CPU |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["starts"].items():
        lines.append(
            f"| {name} | {row['seconds']:.1f} | {row['compile_seconds']:.1f} | {row['evaluated']:.1f} | "
            f"{row['cpu_seconds']:.1f} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default="configs/gen_qma.py:tiny")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    given, more = parser.parse_known_args(arguments)
    words = sys.argv[1:] if arguments is None else list(arguments)
    load, starts = os.getloadavg()[0], {}
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache")}
        for name in STARTS:
            ran = run_job(("main.py",), given.config, Path(folder) / name, 1, more, cache)
            starts[name] = measured(ran)
    label = given.config.split("/")[-1].replace(".py", "").replace(":", "-")
    found = {"label": label, "config": given.config, "starts": starts}
    file = store("start", label, given.out, words, load, found)
    print("\n".join([*table(found), "", f"written to {file}"]))
    return found


if __name__ == "__main__":
    main()
