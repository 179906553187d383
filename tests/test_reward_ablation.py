"""The ablation of rewards: the job takes every command that it runs, and its table is what the runs say."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from absl import flags
from ml_collections import config_flags

from benchmarks import reward_ablation
from benchmarks.reward_ablation import TASKS, command, folder_of, main
from firm_jax.charts import COLOURS
from firm_jax.config import parse_flags
from firm_jax.rl.checks import check_config
from firm_jax.rl.rewards import resolve_reward

CME = "CME, 0.4 + 0.6"
EVERY_RUN = [(name, reward) for name, task in TASKS.items() for reward in task.rewards]


@pytest.mark.parametrize("name, reward", EVERY_RUN)
def test_the_job_takes_every_command(name, reward, tmp_path, monkeypatch):
    monkeypatch.chdir(reward_ablation.ROOT)
    _, _, *arguments = command(TASKS[name], reward, tmp_path, epochs=7, seed=3)
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])  # where config_flags looks for values
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    assert parse_flags(["main.py", *arguments], values) == ["main.py"]
    config = values["config"].value
    check_config(config)
    assert (config.train.epochs, config.eval.every, config.seed, config.eval.oracle) == (7, 3, 3, True)
    assert config.eval.images_per_prompt == 1
    judged = {f"eval/{criterion}" for criterion in resolve_reward(config.reward.name, config.reward.weights).criteria}
    assert {metric for metric in TASKS[name].metrics if "oracle" not in metric} <= judged


def write_run(workdir, task, last_epoch, after=0.75):
    workdir.mkdir(parents=True, exist_ok=True)
    rows = [{"epoch": 0} | dict.fromkeys(task.metrics, 0.5), {"epoch": 1, "reward/mean": 0.1}]
    rows.append({"epoch": last_epoch} | dict.fromkeys(task.metrics, after))
    rows[-1] |= {f"{metric}_se": 0.0125 for metric in task.metrics if "oracle" in metric}
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"epoch": 99, "ev')


@pytest.fixture
def arguments(tmp_path):
    return ["--out", str(tmp_path / "out"), "--editing-epochs", "4", "--generation-epochs", "2", "--seed", "5"]


def folder(tmp_path, name, reward):
    return folder_of(tmp_path / "out", name, reward, seed=5)


def test_what_is_finished_is_told_and_what_is_not_is_run(tmp_path, arguments, monkeypatch, capsys):
    epochs, asked = {"editing": 4, "generation": 2}, []
    for name, reward in EVERY_RUN:
        write_run(folder(tmp_path, name, reward), TASKS[name], epochs[name])
    write_run(folder(tmp_path, "editing", CME), TASKS["editing"], 3)

    def run(line, cwd):
        asked.append(line)
        write_run(folder(tmp_path, "editing", CME), TASKS["editing"], 4, after=0.875)
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(reward_ablation.subprocess, "run", run)
    assert main(arguments) == 0
    [line] = asked
    assert line[line.index("--workdir") + 1] == str(folder(tmp_path, "editing", CME))
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert text in capsys.readouterr().out
    assert "| reward | execution | preservation | execution x preservation |\n| --- | --- | --- | --- |" in text
    assert f"| {CME} |{' 0.500 -> 0.875 ± 0.013 |' * 3}\n" in text
    assert "| QMA | 0.500 -> 0.750 ± 0.013 | 0.500 -> 0.750 ± 0.013 | 0.500 -> 0.750 |" in text
    results = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert results["editing"][CME]["eval/oracle_edit"] == [[0, 0.5, None], [4, 0.875, 0.0125]]
    for name, task in TASKS.items():
        svg = ElementTree.parse(tmp_path / "out" / f"{name}.svg")
        words = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert set(task.metrics.values()) | set(task.rewards) <= set(words)
        dots = [dot.get("fill") for dot in svg.iter("{http://www.w3.org/2000/svg}circle") if dot.get("r") == "5"]
        assert dots == list(COLOURS[: len(task.rewards)])


def test_a_run_that_fails_ends_the_ablation_with_its_code(arguments, monkeypatch, capsys):
    monkeypatch.setattr(reward_ablation.subprocess, "run", lambda line, cwd: subprocess.CompletedProcess(line, 75))
    assert main(arguments) == 75
    assert f"{EVERY_RUN[0][1]}: main.py ended with 75; start again" in capsys.readouterr().err


def test_a_folder_of_another_kind_of_run_is_named(tmp_path, arguments, capsys):
    write_run(folder(tmp_path, "editing", EVERY_RUN[0][1]), TASKS["generation"], 4)
    assert main(arguments) == 1
    assert "has no eval/oracle_execution" in capsys.readouterr().err
