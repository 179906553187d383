"""Every command of README and docs: run as it stands, or marked as needing hardware that a test machine lacks.

A page is a script. `test_the_commands_of_a_page_run` has bash run all unmarked `sh` blocks of a page in their order, in
one folder, where a program in the place of `python` makes trainings small by further `--config` values. Marked blocks
begin with a line `# needs a TPU`, or GPU, TPU pod or cluster. In all of them files, flags, keys and values are checked,
which costs little and is done in every run of the suite.
"""

import argparse
import ast
import functools
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from absl import flags
from docs_pages import MARK, PAGES, ROOT, Block, blocks
from ml_collections import config_flags

from firm_jax.commands import COMMANDS
from firm_jax.config import load_config, parse_flags

# Its examples are those of the service's own tests, which start it and ask it.
ELSEWHERE = {"serving.md": "test_serve.py"}
LANGUAGES = {"sh", "text", "json", "python"}
OF_CLUSTERS = ("gcloud", "xpk", "sbatch")
# What needs no check of arguments: a shell's own, and tools whose use the page's run shows.
PLAIN = ("printf", "cp", "mkdir", "export", "ruff", "xprof", "mkdocs", "curl", "pytest")


def everything() -> list[Block]:
    return [block for page in PAGES if page.name not in ELSEWHERE for block in blocks(page)]


def shell(page: Path) -> list[Block]:
    """The blocks of commands; in pages of ELSEWHERE, whose blocks name no language, those that begin like one."""
    found = blocks(page)
    if page.name in ELSEWHERE:
        return [block for block in found if block.text.startswith(("pip ", "firm-jax ", "python "))]
    return [block for block in found if block.language == "sh"]


def named(block: Block) -> str:
    return f"{block.page.name}:{block.line}"


def split(command: str) -> list[list[str]]:
    """The simple commands of a line, as lists of words; those in quotes after --command or --wrap too."""
    words = shlex.split(command, comments=True)
    simple: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "|", ";"):
            simple.append([])
        else:
            simple[-1].append(word)
    inner = [text for one in simple for text in inside(one)]
    return [one for one in simple if one] + [one for text in inner for one in split(text)]


def inside(words: list[str]) -> list[str]:
    """The command lines that a cluster's tool is given as one argument."""
    if words[0] not in OF_CLUSTERS:
        return []
    given = [word.partition("=")[2] for word in words if word.startswith("--command=")]
    given += [after for word, after in itertools.pairwise(words) if word in ("--wrap", "--command")]
    return [text.removeprefix("srun ") for text in given]


# What each kind of command is checked for


def check(words: list[str]) -> None:
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *arguments = words
    if program in ("python", "python3"):
        check_python(arguments)
    elif program == "firm-jax":
        check_firm_jax(arguments)
    elif program == "pip":
        check_pip(arguments)
    else:
        assert program in (*OF_CLUSTERS, *PLAIN, "cd"), f"nobody says what {program!r} is"


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "main.py":
        overridden(arguments)
    elif arguments[0] == "-m":
        assert "__main__" in Path(importlib.util.find_spec(arguments[1]).origin).read_text()
    elif arguments[0] == "-c":
        ast.parse(arguments[1])
    else:
        assert (ROOT / arguments[0]).is_file(), arguments


def overridden(arguments: list[str]):
    """The config of a `main.py` line, its keys, values and flags as main.py takes them."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    for name in ("workdir", "plan"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    argv = [word.replace("configs/", f"{ROOT}/configs/", 1) if "configs/" in word else word for word in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
        assert parse_flags(argv, values) == ["main.py"]
    assert values["workdir"].value or values["plan"].value
    return values["config"].value


def check_firm_jax(arguments: list[str]) -> None:
    command, *rest = arguments
    assert command in COMMANDS
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"firm_jax.commands.{command}").add_arguments(parser)
    try:
        parser.parse_args(rest)
    except SystemExit as ended:
        raise AssertionError(f"firm-jax does not take {shlex.join(arguments)}") from ended


@functools.cache
def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    if arguments[1] == "-e":
        wanted = re.fullmatch(r"\.(?:\[([\w,]+)\])?", arguments[2])
        assert wanted and set((wanted[1] or "").split(",")) - {""} <= extras()
    else:
        assert arguments[1:] == ["xprof"]


# In every run of the suite


@pytest.mark.parametrize("block", everything(), ids=named)
def test_a_block_says_what_it_is(block):
    assert block.language in LANGUAGES
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "sh" and block.text.startswith("# needs"):
        assert block.needs, f"{block.text.splitlines()[0]} is not one of {MARK.pattern}"


@pytest.mark.parametrize("block", [block for page in PAGES for block in shell(page)], ids=named)
def test_a_command_can_be_given_as_it_stands(block):
    assert block.commands
    for command in block.commands:
        for words in split(command):
            check(words)


def test_a_command_that_cannot_be_given_is_told():
    for command in (
        "python main.py --config configs/gen_qma.py:tiny --workdir w --config.train.epoch=3",
        "python main.py --config configs/gen_qma.py:tiny --workdir w --config.train.epochs=many",
        "python main.py --config configs/gen_qma.py:tiny",
        "firm-jax sample --prompt x --out y --colour red",
        "pip install -e '.[cuda]'",
        "make everything",
        'sbatch --wrap "srun python main.py --config configs/gen_qma.py --workdir w --config.mesh.fdsp=8"',
    ):
        with pytest.raises(Exception):  # noqa: B017
            for words in split(command):
                check(words)


def test_commands_in_text_are_in_no_block_of_another_language():
    """A command cannot hide from the tests above behind another language."""
    for block in everything():
        if block.language != "sh":
            assert not re.search(r"^(\$ )?(pip|python|firm-jax|pytest|mkdocs) ", block.text, re.M), named(block)


# As they stand, small

RL = {
    "train.epochs": 1,
    "train.updates_per_epoch": 1,
    "train.micro_batch": 4,
    "group.prompts_per_epoch": 2,
    "group.images_per_prompt": 2,
    "rollout.batch_size": 4,
    "critic.batch_size": 8,
    "eval.prompts": 4,
    "eval.images_per_prompt": 1,
    "eval.judged": 4,
    "eval.batch_size": 4,
    "profile.start": 0,
}
PLANNED = RL | {
    "model": "embedded:sd3",
    "critic.model": "embedded:critic_gen",
    "critic.max_new_tokens": 64,
    **{f"{section}.{side}": 64 for section in ("rollout", "eval") for side in ("height", "width")},
    **{f"{section}.max_text_tokens": 17 for section in ("rollout", "eval")},
    "group.prompts_per_epoch": 4,
    "group.images_per_prompt": 16,
    "train.micro_batch": 16,
    "rollout.batch_size": 16,
    "critic.batch_size": 16,
    "eval.batch_size": 16,
}
STEPS = {"train.epochs": 1, "train.steps_per_epoch": 1, "train.batch_size": 4, "train.warmup_steps": 0}
JOBS = {
    "rl": RL,
    "bench": {},
    "autoencoder": STEPS | {"eval.images": 8},
    "flow_matching": STEPS | {"train.pictures": 256, "train.wrong_epochs": 0, "eval.prompts": 4, "samples": 256},
    "qwen_matching": STEPS | {"train.tasks": 256, "train.wrong_epochs": 0, "eval.tasks": 4, "samples": 256},
    "curation": {"shapes.count": 12, "log_every": 4},
    "critic_vision": STEPS | {"eval.examples": 8, "data.examples": 1000},
    "critic_sft": {
        "train.epochs": 1,
        "train.steps_per_epoch": 1,
        "train.batch_size": 4,
        "train.warmup_ratio": 0.0,
        "eval.examples": 8,
        "eval.batch_size": 8,
        "eval.max_new_tokens": 16,
        "data.examples": 1000,
    },
}


def smaller(arguments: list[str]) -> list[str]:
    """The arguments of `python` with the values that make a training or a plan small, after the page's own."""
    if arguments[:2] in (["-m", "benchmarks.idle"], ["-m", "benchmarks.start"]):  # they pass on what is the job's
        own = RL.keys() - {"train.epochs", "profile.start"}
        return [*arguments, *(f"--config.{key}={RL[key]}" for key in sorted(own))]
    if arguments[0] != "main.py":
        return arguments
    source = next(after for word, after in itertools.pairwise(arguments) if word == "--config")
    values = PLANNED if "--plan" in arguments else JOBS[load_config(source).job]
    asked = {word.partition("=")[0] for word in arguments} - {"--config.train.epochs", "--config.profile.start"}
    return [*arguments, *(f"--config.{key}={value}" for key, value in values.items() if f"--config.{key}" not in asked)]


def stand_in() -> None:
    """What runs in the place of a program of the page: `python this_file NAME ARGUMENTS`."""
    name, *arguments = sys.argv[1:]
    if name in ("pip", "pytest", "ruff", "mkdocs"):  # what continuous integration does itself
        return
    if name == "xprof":
        assert list(Path(arguments[arguments.index("--logdir") + 1]).rglob("*.xplane.pb")), "no trace"
        return
    if name == "firm-jax" and arguments[0] == "serve":  # started and asked by test_serve.py
        return
    program = ["-m", "firm_jax", *arguments] if name == "firm-jax" else smaller(arguments)
    os.execv(sys.executable, [sys.executable, *program])


PROGRAMS = ("python", "pip", "firm-jax", "pytest", "ruff", "mkdocs", "xprof")
SCRIPTS = [page for page in PAGES if page.name not in ELSEWHERE and any(not block.needs for block in shell(page))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def folder(tmp_path):
    """A checkout to run in, with the files that pages take for granted."""
    for name in ("main.py", "configs", "firm_jax", "benchmarks", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__)} {name} "$@"\n')
        (programs / name).chmod(0o755)
    edits = ROOT / "firm_jax" / "shapes" / "checkpoints" / "edits"
    records = [json.loads(line) for line in (edits / "test_metadata.jsonl").read_text().splitlines()[:2]]
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "conversations").mkdir()
    from critic_miniature import picture

    for name in ("train", "held_out"):
        lines = []
        for number in range(8):
            picture(number, 64, 64).save(tmp_path / "conversations" / f"{number}.png")
            asked = {"role": "user", "content": "<image>Rate the picture from 1 to 5."}
            told = {"role": "assistant", "content": f"\\boxed{{{1 + number % 5}}}"}
            lines.append(json.dumps({"messages": [asked, told], "images": [f"{number}.png"]}))
        (tmp_path / "conversations" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", SCRIPTS, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, folder, cache):
    for block in blocks(page):
        if block.language == "python" and (name := re.match(r"# (\w+\.py)\n", block.text)):
            (folder / name[1]).write_text(block.text)
    own = [block.text for block in shell(page) if not block.needs]
    examples = [block.text for block in blocks(page) if block.language == "python" and "embedded:" in block.text]
    for number, text in enumerate(examples):
        (folder / f"example_{number}.py").write_text(text)
    own += [f"python example_{number}.py" for number in range(len(examples))]
    before = [] if page.stem in ("quickstart", "README") else [TRAINED] * ("runs/tiny" in "".join(own))
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join([*before, *own])],
        cwd=folder,
        env=os.environ
        | {
            "PATH": f"{folder / 'programs'}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
        },
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-6000:]}"


TRAINED = "python main.py --config configs/gen_qma.py:tiny --workdir runs/tiny"

if __name__ == "__main__":
    stand_in()
