"""The comparison of teachers' recipes: the jobs take every command that it runs, and its table is what they leave."""

import json
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from benchmarks import critic_data
from benchmarks.critic_data import MODEL, SINGLE, TASKS, curation, folder_of, main, measuring, recipes, training
from firm_jax.commands import main as firm_jax
from firm_jax.config import parse_flags
from firm_jax.critic.bench.records import CRITERIA
from firm_jax.critic.rubric import RUBRICS
from firm_jax.critic.sft import check_settings


def config_of(command, monkeypatch):
    monkeypatch.chdir(critic_data.ROOT)
    _, _, *arguments = command
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])  # where config_flags looks for values
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    assert parse_flags(["main.py", *arguments], values) == ["main.py"]
    return values["config"].value


@pytest.mark.parametrize("task", TASKS)
def test_the_jobs_take_every_command(task, tmp_path, monkeypatch):
    for recipe in recipes(task):
        config = config_of(curation(task, recipe, 3, tmp_path), monkeypatch)
        assert (config.job, config.recipe, config.seed, config.task) == ("curation", recipe, 3, task)
        assert config.shapes.count == TASKS[task].records and config.output.formats == ("jsonl",)
    config = config_of(training(task, 3, 7, tmp_path), monkeypatch)
    check_settings(config)
    assert config.data.source == str(tmp_path / "data" / "examples.jsonl")
    assert (config.seed, config.train.steps_per_epoch, config.eval.bench_task) == (3, 7, task)


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Stands in for the jobs: each command leaves what its job would."""
    asked = []

    def run(command, cwd):
        asked.append(command)
        if "--workdir" not in command:
            critics = [command[i + 1] for i, word in enumerate(command) if word == "--critic"]
            task = command[command.index("--task") + 1]
            rows = {}
            for place, critic in enumerate(critics):
                one = {"mae": 0.5 + place / 4, "best_constant_mae": 1.25}
                rows[critic] = {"criteria": {name: one for name in CRITERIA[task]}}
            write(tmp_path / "out" / f"bench_{task}" / "bench.json", {"critics": rows})
            return subprocess.CompletedProcess(command, 0)
        workdir = tmp_path / "out" / command[command.index("--workdir") + 1]
        if workdir.name == "data":
            task = workdir.parent.name.split("_")[0]
            teacher = {RUBRICS[name]: {"mae": 0.375} for name in CRITERIA[task]}
            write(workdir / "report.json", {"teacher": teacher})
            write(workdir / "examples.jsonl", {})
        else:
            write(workdir.parent / MODEL / "config.json", {})
        return subprocess.CompletedProcess(command, 0)

    def write(file, content):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))

    monkeypatch.setattr(critic_data.subprocess, "run", run)
    return asked


@pytest.mark.parametrize("task", TASKS)
def test_the_table_is_what_the_parts_left(task, tmp_path, finished, capsys):
    arguments = ["--task", task, "--out", str(tmp_path / "out"), "--seeds", "4", "5", "--steps", "7"]
    assert main(arguments) == 0
    assert len(finished) == 2 * 2 * 2 + 1
    text = (tmp_path / "out" / f"{task}.md").read_text()
    assert text in capsys.readouterr().out
    several = len(CRITERIA[task])
    recipe = TASKS[task].recipe.replace("_", " ")
    # The base is asked first, then of each seed the paper's way and the single pass.
    assert f"| the base, before |{' 0.500 |' * several}\n" in text
    assert f"| trained on {recipe} |{' 1.000 ± 0.250 (0.750, 1.250) |' * several}\n" in text
    assert f"| trained on single pass |{' 1.250 ± 0.250 (1.000, 1.500) |' * several}\n" in text
    assert f"| single pass minus {recipe} |{' 0.250 ± 0.000 (0.250, 0.250) |' * several}\n" in text
    assert f"| best constant answer |{' 1.250 |' * several}\n" in text
    assert f"| the teacher by single pass |{' 0.375 ± 0.000 (0.375, 0.375) |' * several}" in text
    finished.clear()
    assert main(arguments) == 0
    assert [command[1:4] for command in finished] == [["-m", "firm_jax", "bench"]]  # it knows itself what is measured
    (folder_of(tmp_path / "out", task, SINGLE, 5) / MODEL / "config.json").unlink()
    finished.clear()
    assert main(arguments) == 0
    assert [command[3].split(":")[0] for command in finished] == ["configs/critic_sft.py", "bench"]


def test_a_part_that_fails_ends_it_with_its_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(critic_data.subprocess, "run", lambda command, cwd: subprocess.CompletedProcess(command, 75))
    assert main(["--task", "gen", "--out", str(tmp_path)]) == 75
    assert "gen, plan_then_score, seed 0: ended with 75; start again to continue" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_the_benchmark_takes_its_command(task, tmp_path, monkeypatch):
    _, _, _, *arguments = measuring(task, ["embedded:critic_gen", "other"], tmp_path)
    found = {}
    monkeypatch.setattr("firm_jax.commands.bench.run", lambda given: found.update(vars(given)) or 0)
    assert firm_jax(arguments) == 0
    assert found["critic"] == ["embedded:critic_gen", "other"] and found["task"] == task
