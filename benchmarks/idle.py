"""How much of an epoch the devices have nothing to do, while the RL job runs as a user starts it.

    python -m benchmarks.idle --size tiny

runs both miniatures in processes of their own and records a trace of their fourth and fifth epoch: without Python's
calls, whose recording takes time itself. Of the two, the fourth keeps judged pictures and saves a checkpoint. With
`--size full` it is the published configs, whose weights and prompts have to be at hand. `--config` chooses another
config; what is not known here goes to the job, such as `--config.prompts.train=mine.jsonl`. The evaluation before
training, which is not measured, is cut to a few prompts.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.jobs import run_job, store
from firm_jax.idle import idle, read_trace

CONFIGS = {
    "tiny": ("configs/gen_qma.py:tiny", "configs/edit_cme.py:tiny"),
    "full": ("configs/gen_qma.py", "configs/edit_cme.py"),
}
FIRST, EPOCHS = 3, 2  # that are recorded, counted from 0
SETTINGS = (
    f"--config.profile.start={FIRST}",
    f"--config.profile.steps={EPOCHS}",
    "--config.checkpoint.every=2",
    "--config.eval.prompts=16",
    "--config.eval.judged=16",
)


def measure(config: str, workdir: Path, more: Sequence[str] = ()) -> dict:
    """The idle shares of a config's recorded epochs, with the seconds that were compiled in them."""
    ran = run_job(("-m", "benchmarks.traced"), config, workdir, FIRST + EPOCHS, (*SETTINGS, *more))
    recorded = [ran.epoch(FIRST + number + 1) for number in range(EPOCHS)]
    return {
        "config": config,
        "epochs": [line["epoch"] for line in recorded],
        "compile_seconds": sum(line["time/compile"] for line in recorded),
        **idle(read_trace(workdir / "profile")),
    }


def table(result: dict) -> list[str]:
    """Markdown: a row for each phase of each config, then the longest gaps."""
    lines = ["| config | phase | seconds | idle |", "|---|---|---|---|"]
    for run in result["runs"]:
        epochs = f"epochs {' and '.join(map(str, run['epochs']))}, {run['devices']} devices"
        lines.append(f"| `{run['config']}` | {epochs} | {run['seconds']:.1f} | **{run['idle']:.1%}** |")
        lines += [f"| | {name} | {part['seconds']:.2f} | {part['idle']:.1%} |" for name, part in run["phases"].items()]
    for run in result["runs"]:
        lines += [
            "",
            f"`{run['config']}`: compiled for {run['compile_seconds']:.2f} s of these epochs. When no device ran a "
            "program, longest first:",
            "",
            "| milliseconds | phase | after | before | the loop's thread |",
            "|---|---|---|---|---|",
        ]
        for gap in run["gaps"]:
            host = " > ".join(gap["host"]).replace("|", " ")
            lines.append(f"| {1e3 * gap['seconds']:.0f} | {gap['phase']} | {gap['after']} | {gap['before']} | {host} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=CONFIGS, default="tiny")
    parser.add_argument("--config", nargs="+", help="instead of the size's own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    given, more = parser.parse_known_args(arguments)
    words = sys.argv[1:] if arguments is None else list(arguments)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        configs = given.config or CONFIGS[given.size]
        runs = [measure(config, Path(folder) / str(number), more) for number, config in enumerate(configs)]
    found = {"label": given.size, "runs": runs}
    file = store("idle", given.size, given.out, words, load, found)
    print("\n".join([*table(found), "", f"written to {file}"]))
    return found


if __name__ == "__main__":
    main()
