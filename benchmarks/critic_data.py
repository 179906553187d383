"""Does a critic gain by data that its teacher made in several steps? The same model, trained on both, beside people's.

    python -m benchmarks.critic_data --task gen --out runs/critic_data
    python -m benchmarks.critic_data --task edit --out runs/critic_data

For each seed the same records are judged twice by the miniature's teacher: in the paper's way (plan-then-score for
generation, difference-first for editing) and in a single pass, by the critic's rubric alone. One model is fine-tuned on
each of the two, in as many steps of as many examples, and all critics are measured on the benchmark that ships with the
package, beside the best constant answer. For editing it is the miniature's describer, which sees and has learned no
judgement. For generation it is the miniature's critic, which the oracle has taught to judge: to find a verdict for each
requirement takes longer to learn than a comparison can wait for, so this shows what a critic takes over from a teacher,
and not what it gains. How much the teacher errs in either way is an assumption, set out in
`firm_jax/curation/oracle_teacher.py`; what of it a critic takes over is measured here.

Every part has a folder of its own below `--out`; the same command continues what was interrupted and repeats nothing
that is finished. Written there: `TASK.md`, `TASK.json`, and the benchmark's own table in `bench_TASK`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firm_jax.critic.bench.records import CRITERIA
from firm_jax.critic.rubric import RUBRICS
from firm_jax.embedded import embedded_path

ROOT = Path(__file__).parents[1]
SINGLE = "single_pass"
BATCH = 16
MODEL = Path("critic", "model")  # below the folder of a recipe and a seed


@dataclass(frozen=True)
class Task:
    """The recipe that is compared with the single pass, the records that are judged, most examples of one score; the
    model that is trained on them, at which rate, and for how many steps unless told."""

    recipe: str
    records: int
    per_score: int
    base: str
    learning_rate: float
    steps: int


TASKS = {
    "gen": Task("plan_then_score", 8_000, 1_200, "embedded:critic_gen", 3e-4, 160),
    "edit": Task("difference_first", 1_500, 250, "embedded:describer", 1e-3, 160),
}


def recipes(task: str) -> tuple[str, str]:
    """The paper's way and the other."""
    return TASKS[task].recipe, SINGLE


def folder_of(out: Path, task: str, recipe: str, seed: int) -> Path:
    """Where the data and the critic of one recipe and seed lie."""
    return out / f"{task}_{recipe}_seed{seed}"


def curation(task: str, recipe: str, seed: int, folder: Path) -> list[str]:
    """The command that makes the data."""
    return _main_py(
        f"configs/curate.py:tiny_{task}", folder / "data", f"--config.recipe={recipe}", f"--config.seed={seed}",
        f"--config.shapes.count={TASKS[task].records}", f"--config.selection.per_score={TASKS[task].per_score}",
        "--config.budget.money=100.0", "--config.output.formats=('jsonl',)",
    )  # fmt: skip


def training(task: str, seed: int, steps: int, folder: Path) -> list[str]:
    """The command that fine-tunes the base on the data: as many steps, whatever there is of it."""
    return _main_py(
        f"configs/critic_sft.py:tiny_{task}", folder / "critic", f"--config.seed={seed}",
        f"--config.critic.model={TASKS[task].base}", f"--config.train.learning_rate={TASKS[task].learning_rate}",
        f"--config.data.source={folder / 'data' / 'examples.jsonl'}",
        f"--config.data.held_out={folder / 'data' / 'held_out.jsonl'}", f"--config.train.batch_size={BATCH}",
        "--config.train.epochs=1", f"--config.train.steps_per_epoch={steps}", "--config.eval.answers=0",
    )  # fmt: skip


def measuring(task: str, critics: Sequence[str], out: Path) -> list[str]:
    """The command that puts all critics into one table."""
    named = [part for critic in critics for part in ("--critic", critic)]
    rubrics = embedded_path(f"embedded:critic_{task}/rubrics")  # those that the teacher was asked by, the base too
    return [
        sys.executable, "-m", "firm_jax", "bench", "--task", task, "--rubrics", str(rubrics),
        "--out", str(out / f"bench_{task}"), *named,
    ]  # fmt: skip


def _main_py(config: str, workdir: Path, *settings: str) -> list[str]:
    return [sys.executable, str(ROOT / "main.py"), "--config", config, "--workdir", str(workdir), *settings]


def teacher_errors(task: str, folder: Path) -> dict[str, float]:
    """By criterion, how far the teacher's scores are from the oracle's."""
    teacher = json.loads((folder / "data" / "report.json").read_text())["teacher"]
    return {name: teacher[RUBRICS[name]]["mae"] for name in CRITERIA[task]}


def compared(task: str, seeds: Sequence[int], out: Path) -> dict:
    """What the benchmark says of each recipe's critics, of the base and of the best constant, by criterion."""
    measured = json.loads((out / f"bench_{task}" / "bench.json").read_text())["critics"]

    def by_criterion(critic: str, key: str) -> dict[str, float]:
        return {name: measured[critic]["criteria"][name][key] for name in CRITERIA[task]}

    folders = {recipe: [folder_of(out, task, recipe, seed) for seed in seeds] for recipe in recipes(task)}
    return {
        "task": task,
        "seeds": list(seeds),
        "best_constant": by_criterion(TASKS[task].base, "best_constant_mae"),
        "base": by_criterion(TASKS[task].base, "mae"),
        "critics": {
            recipe: [by_criterion(str(folder / MODEL), "mae") for folder in those] for recipe, those in folders.items()
        },
        "teachers": {recipe: [teacher_errors(task, folder) for folder in those] for recipe, those in folders.items()},
    }


def table(found: Mapping) -> str:
    """Markdown: mean absolute errors by criterion, of each seed and their mean with its standard error."""
    recipe, single = (name.replace("_", " ") for name in found["critics"])
    (better, other), teachers = found["critics"].values(), found["teachers"].values()
    lines = {
        **{f"trained on {name}": rows for name, rows in zip((recipe, single), (better, other), strict=True)},
        f"{single} minus {recipe}": [
            {name: two[name] - one[name] for name in one} for one, two in zip(better, other, strict=True)
        ],
        "the base, before": [found["base"]],
        "best constant answer": [found["best_constant"]],
        **{f"the teacher by {name}": rows for name, rows in zip((recipe, single), teachers, strict=True)},
    }
    head = ["MAE", *found["base"]]
    rows = [[name, *(_several([one[part] for one in of]) for part in found["base"])] for name, of in lines.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _several(values: Sequence[float | None]) -> str:
    if None in values:
        return "no score"  # not one answer could be read
    if len(values) == 1:
        return f"{values[0]:.3f}"
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} ± {error:.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--out", type=Path, default=Path("runs/critic_data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    usual = ", ".join(f"{task.steps} for {name}" for name, task in TASKS.items())
    parser.add_argument("--steps", type=int, help=f"of training, {BATCH} examples each ({usual})")
    given = parser.parse_args(arguments)
    out, task, steps = given.out.resolve(), given.task, given.steps or TASKS[given.task].steps
    begun, critics = time.perf_counter(), [TASKS[task].base]
    for seed in given.seeds:
        for recipe in recipes(task):
            folder = folder_of(out, task, recipe, seed)
            critics.append(str(folder / MODEL))
            parts = {
                "data/examples.jsonl": curation(task, recipe, seed, folder),
                f"{MODEL}/config.json": training(task, seed, steps, folder),
            }
            for file, command in parts.items():
                if not (folder / file).is_file() and (code := _run(f"{task}, {recipe}, seed {seed}", command)):
                    return code
    if code := _run(f"{task}, benchmark", measuring(task, critics, out)):
        return code
    found = compared(task, given.seeds, out)
    text = f"{task}, {steps} steps of {BATCH} examples\n\n{table(found)}\n"
    (out / f"{task}.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / f"{task}.md").write_text(text)
    print(f"{text}\n{(time.perf_counter() - begun) / 60:.1f} minutes")
    return 0


def _run(what: str, command: list[str]) -> int:
    print(what, flush=True)
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        print(f"{what}: ended with {code}; start again to continue", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
