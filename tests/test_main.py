"""The entry point: what people type wrong gets one message that says what to type."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

from firm_jax.config import all_keys, check_key, choose_variant, load_config, parse_flags
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
        timeout=300,
    )


@pytest.mark.parametrize(("xla_flags", "devices"), [("", 2), ("--xla_force_host_platform_device_count=3", 3)])
def test_the_miniature_uses_the_cpu_as_several_devices(xla_flags, devices):
    program = "import main, jax; from configs.gen_qma import tiny; main.split_cpu(tiny()); print(jax.device_count())"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.stdout.split() == [str(devices)], ended.stderr


@pytest.mark.fault("wrong-config")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", CONFIG, "--workdir", "w", "--config.train.epoch=3"], "unknown config key 'train.epoch'"),
        (
            ["--config", CONFIG, "--workdir", "w", "--config.train.epochs=many"],
            "invalid literal for int() with base 10",
        ),
        (["--config", CONFIG, "--workdir", "w", "--config.mesh.fsdp="], "--config.mesh.fsdp="),
        (["--config", CONFIG, "--workdir", "w", "--config.train.learning_rate=nan"], "train.learning_rate is nan"),
        (["--config", CONFIG, "--workdir", "w"], "config.job is 'fit_matrix'; the jobs are rl"),
        (["--config", "configs/gen_qma.py:tiny"], "--workdir is missing"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, message):
    ended = run_main(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and message in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.fault("wrong-config")
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


@pytest.mark.fault("wrong-config")
def test_a_config_file_that_is_not_python_is_named(tmp_path):
    for content in (b"def get_config(:", b"\xff\xfe", b"a\0b"):
        (tmp_path / "broken.py").write_bytes(content)
        with pytest.raises(ConfigError, match=r"broken\.py is not Python"):
            load_config(str(tmp_path / "broken.py"))


KEYS = [
    "train",
    "train.epochs",
    "train.learning_rate",
    "train.sizes",
    "distributed",
    "mesh.fsdp",
    "job",
    "profile.start",
]
VALUES = ["", "3", "-1", "1.5", "nan", "inf", "1e999", "True", "None", "(1, 2)", "(1.0, nan)", "{}", "[", "9" * 5000]


def overridden(key: str, value: str) -> ConfigDict:
    """The harness job's config with one override, as the command line gives it."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    argv = ["main.py", f"--config={ROOT / CONFIG}", f"--config.{key}={value}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
        parse_flags(argv, values)
    return values["config"].value


@pytest.mark.fault("wrong-config")
@settings(max_examples=150, deadline=None)
@given(
    key=st.sampled_from(KEYS) | st.text(st.characters(exclude_characters="=\0"), max_size=12),
    value=st.sampled_from(VALUES) | st.text(max_size=12),
)
@example("train.epochs", "abc")
@example("train.sizes", "(1, 'a')")
@example("train.learning_rate", "-inf")
@example("train.learning_rate", "nan")
@example("train.epochs", "9" * 5000)
@example("", "1")
def test_any_override_has_the_right_type_or_is_an_error_that_names_the_key(key, value):
    try:
        config = overridden(key, value)
    except ConfigError as error:
        assert key in str(error)
        return
    before = load_config(str(ROOT / CONFIG))
    for name in all_keys(config):
        section, _, last = name.rpartition(".")
        new, old = (tree[section][last] if section else tree[last] for tree in (config, before))
        assert type(new) is type(old), name
        assert not isinstance(new, float) or math.isfinite(new), name
        assert new == old or name == key


def test_joining_processes_that_cannot_be_named_is_an_error():
    ended = run_main(
        "--config", CONFIG, "--workdir", "w", JAX_COORDINATOR_ADDRESS="localhost:1", JAX_NUM_PROCESSES="two"
    )
    assert ended.returncode == 2
