"""The entry point: what people type wrong gets one message that says what to type."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from firm_jax.config import all_keys, check_key, choose_variant, load_config
from firm_jax.errors import ConfigError

ROOT = Path(__file__).parent.parent
CONFIG = "tests/harness_job.py"


def run_main(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", CONFIG, "--workdir", "w", "--config.train.epoch=3"], "unknown config key 'train.epoch'"),
        (
            ["--config", CONFIG, "--workdir", "w", "--config.train.epochs=many"],
            "invalid literal for int() with base 10",
        ),
        (["--config", CONFIG, "--workdir", "w"], "config.job is 'fit_matrix'; the jobs are rl"),
        (["--config", CONFIG], "--workdir"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, message):
    ended = run_main(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and message in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("train.epoch", "'train.epochs'"),
        ("epochs", "'train.epochs'"),
        ("train.epochs.x", "'train.epochs'"),
        ("zzz", "harness"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, suggestion):
    with pytest.raises(ConfigError, match=rf"unknown config key '{key}'.*{suggestion}"):
        check_key(load_config(str(ROOT / CONFIG)), key, CONFIG)


def test_known_keys_and_whole_groups_are_accepted():
    config = load_config(str(ROOT / CONFIG))
    for key in [*all_keys(config), "train", "mesh"]:
        check_key(config, key, CONFIG)


def test_an_unknown_variant_names_those_that_exist():
    with pytest.raises(
        ConfigError, match=r"unknown variant ':slwo'. Did you mean 'slow'\? There are: \(none.*\), :slow"
    ):
        load_config(f"{ROOT / CONFIG}:slwo")
    with pytest.raises(ConfigError, match="no default"):
        choose_variant({"a": ConfigDict}, "")


def test_a_missing_config_file_names_its_neighbours(tmp_path):
    (tmp_path / "gen_qma.py").write_text("")
    with pytest.raises(ConfigError, match=r"no config file .*gen_qna\.py.* Did you mean '.*gen_qma\.py'"):
        load_config(str(tmp_path / "gen_qna.py"))
    with pytest.raises(ConfigError, match="no function get_config"):
        load_config(str(tmp_path / "gen_qma.py"))


def test_joining_processes_that_cannot_be_named_is_an_error():
    ended = run_main(
        "--config", CONFIG, "--workdir", "w", JAX_COORDINATOR_ADDRESS="localhost:1", JAX_NUM_PROCESSES="two"
    )
    assert ended.returncode == 2
