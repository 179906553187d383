"""How a policy games its reward: the miniature trained with several rewards, and what became of it by the oracle.

    python -m benchmarks.reward_ablation --out runs/ablation

FIRM's Table 5 in miniature. Editing is trained with linear sums of execution and consistency, with execution alone and
with CME, the paper's and the miniature's; generation with instruction following alone and with QMA. All runs of a task
have the same seed, so they begin with the same pictures. The numbers come from the oracle, which reads pixels and which
no reward can flatter; where a column is the critic's opinion, its name says so.

Each run has a folder of its own below `--out`; the same command continues what was interrupted and repeats nothing that
is finished. Written there: `ablation.md`, `ablation.json` and a plot for each task, `editing.svg` and `generation.svg`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Panel, figure

ROOT = Path(__file__).parents[1]
EVALUATIONS = 3  # after the one before training


@dataclass(frozen=True)
class Task:
    """What is trained, with which rewards (in words -> name and weights), and what is told (metric -> heading)."""

    config: str
    rewards: Mapping[str, tuple[str, Mapping[str, float]]]
    metrics: Mapping[str, str]


TASKS = {
    "editing": Task(
        "configs/edit_cme.py:tiny",
        {
            # The paper's sums, and one in which the untouched source is far ahead of what the editor does at first.
            "0.2 execution + 0.8 consistency": ("weighted_sum", {"execution": 0.2, "consistency": 0.8}),
            "0.5 execution + 0.5 consistency": ("weighted_sum", {"execution": 0.5, "consistency": 0.5}),
            "0.6 execution + 0.4 consistency": ("weighted_sum", {"execution": 0.6, "consistency": 0.4}),
            "execution alone": ("execution_only", {}),
            "CME, 0.6 + 0.4": ("cme", {"base": 0.6, "bonus": 0.4}),
            "CME, 0.4 + 0.6": ("cme", {"base": 0.4, "bonus": 0.6}),
        },
        {
            "eval/oracle_execution": "execution",
            "eval/oracle_preservation": "preservation",
            "eval/oracle_edit": "execution x preservation",
        },
    ),
    "generation": Task(
        "configs/gen_qma.py:tiny",
        {
            # Not `instruction_only`: so quality is judged as well, and it can be seen what becomes of it.
            "instruction alone": ("weighted_sum", {"instruction": 1.0, "quality": 0.0}),
            "QMA": ("qma", {"base": 0.4, "bonus": 0.6}),
        },
        {
            "eval/oracle_fraction": "requirements that hold",
            "eval/oracle_accuracy": "prompts met in full",
            "eval/quality": "quality, by the critic",
        },
    ),
}


def folder_of(out: Path, task: str, reward: str, seed: int) -> Path:
    """Where a run lies: the reward's words without what paths do not like."""
    words = "".join(c if c.isalnum() or c == "." else "_" for c in reward)
    return out / f"{task}_{words}_seed{seed}"


def command(task: Task, reward: str, workdir: Path, epochs: int, seed: int) -> list[str]:
    """The command line of one run."""
    name, weights = task.rewards[reward]
    return [
        sys.executable, str(ROOT / "main.py"), "--config", task.config, "--workdir", str(workdir),
        f"--config.reward.name={name}", f"--config.reward.weights={dict(weights)}", f"--config.seed={seed}",
        f"--config.train.epochs={epochs}", f"--config.eval.every={-(-epochs // EVALUATIONS)}",
        "--config.eval.images_per_prompt=1",
    ]  # fmt: skip


def read_metrics(workdir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, none where it has not begun; without a last one that was cut."""
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.is_file() else []


def finished(workdir: Path, epochs: int) -> bool:
    rows = read_metrics(workdir)
    return bool(rows) and rows[-1]["epoch"] >= epochs


def curves(rows: Sequence[Mapping], metric: str) -> list[tuple[int, float, float | None]]:
    """(epoch, value, standard error where there is one) wherever a metric was measured."""
    return [(row["epoch"], row[metric], row.get(f"{metric}_se")) for row in rows if row.get(metric) is not None]


def table(task: Task, runs: Mapping[str, Sequence[Mapping]]) -> str:
    """Markdown: a row a reward, what each metric was before training and after it, with its standard error."""
    lines = [["reward", *task.metrics.values()], ["---"] * (1 + len(task.metrics))]
    for reward, rows in runs.items():
        lines.append([reward, *(_change(curves(rows, metric)) for metric in task.metrics)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _change(points: Sequence[tuple[int, float, float | None]]) -> str:
    (_, before, _), (_, after, error) = points[0], points[-1]
    return f"{before:.3f} -> {after:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def drawn(task: Task, runs: Mapping[str, Sequence[Mapping]]) -> str:
    """A panel for each metric over the epochs, a line a reward, as one SVG."""
    panels = []
    for metric, heading in task.metrics.items():
        points = {reward: curves(rows, metric) for reward, rows in runs.items()}
        errors = {reward: [(x, e) for x, _, e in line if e is not None] for reward, line in points.items()}
        panels.append(Panel(heading, {reward: [(x, y) for x, y, _ in line] for reward, line in points.items()}, errors))
    return figure(panels, columns=len(panels))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--editing-epochs", type=int, default=30)
    parser.add_argument("--generation-epochs", type=int, default=30)
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    epochs = {"editing": given.editing_epochs, "generation": given.generation_epochs}
    begun, results, texts = time.perf_counter(), {}, []
    for name, task in TASKS.items():
        runs = {}
        for reward in task.rewards:
            workdir = folder_of(out, name, reward, given.seed)
            if not finished(workdir, epochs[name]):
                print(f"{name}, {reward}: {epochs[name]} epochs in {workdir}", flush=True)
                code = subprocess.run(command(task, reward, workdir, epochs[name], given.seed), cwd=ROOT).returncode
                if code:
                    print(f"{name}, {reward}: main.py ended with {code}; start again to continue", file=sys.stderr)
                    return code
            runs[reward] = read_metrics(workdir)
            if missing := [metric for metric in task.metrics if not curves(runs[reward], metric)]:
                print(f"{workdir} holds another kind of run: it has no {', '.join(missing)}", file=sys.stderr)
                return 1
        results[name] = {
            reward: {metric: curves(rows, metric) for metric in task.metrics} for reward, rows in runs.items()
        }
        texts.append(f"{name}, {epochs[name]} epochs, seed {given.seed}\n\n{table(task, runs)}\n")
        (out / f"{name}.svg").write_text(drawn(task, runs))
    (out / "ablation.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "ablation.md").write_text("\n".join(texts))
    print("\n".join(texts) + f"\n{(time.perf_counter() - begun) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
