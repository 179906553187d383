"""`firm-jax` as a program: what its help lists, and that a mistake is one message and status 2."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from firm_jax.commands import COMMANDS, main

ROOT = Path(__file__).parent.parent


def test_the_entry_point_is_the_package_s_main():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"firm-jax": "firm_jax.commands:main"}


def test_the_help_lists_every_command_with_its_first_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in COMMANDS:
        words = sys.modules[f"firm_jax.commands.{name}"].__doc__.strip()
        assert f"{name} {words.splitlines()[0]}" in shown
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0 and words.splitlines()[-1].strip() in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["bake"], ["export", "--format", "gguf"]])
def test_a_wrong_use_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: firm-jax" in capsys.readouterr().err


def test_the_program_says_what_is_wrong_without_a_traceback(tmp_path):
    command = ["export", "--workdir", str(tmp_path), "--format", "peft", "--out", str(tmp_path / "out")]
    ended = subprocess.run(
        [sys.executable, "-m", "firm_jax", *command], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert ended.returncode == 2
    assert (
        ended.stderr
        == f"firm-jax export: {tmp_path} is not the folder of a run: it has no config.json. Pass its --workdir.\n"
    )
