"""Writes docs/configuration.md: every key of every config, what it means, and its value in each variant.

The values come from `configs/`, the meanings from docs/config_keys.toml. Run it as `python tests/config_reference.py`;
tests/test_config_reference.py fails when the page, the configs and the meanings part ways.
"""

import ast
import functools
import tomllib
from operator import getitem
from pathlib import Path

from ml_collections import ConfigDict

from firm_jax.config import all_keys, load_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"), key=lambda file: (file.stem == "shapes", file.stem != "gen_qma"))
PAGE, MEANINGS = ROOT / "docs" / "configuration.md", ROOT / "docs" / "config_keys.toml"
COMMON = "every job"

OPENING = """\
# Every key of every config

A config is a Python file with variants. `--config configs/gen_qma.py:tiny` names one, `--config.train.epochs=3` sets a
value in it. A key that does not exist, or a value of another type, ends the command before anything is loaded, with the
nearest keys in the message. What a run was started with stands in its folder's `config.json`.

This page is made from the configs by `python tests/config_reference.py`; the meanings are kept in
`docs/config_keys.toml`.
"""


@functools.cache
def meanings() -> dict[str, dict[str, str]]:
    """Job -> key, or `section.*`, -> what it means."""
    return tomllib.loads(MEANINGS.read_text())


def meaning(job: str, key: str) -> tuple[str, str, str] | None:
    """(section, entry, text) of the meaning of a job's key; None where nobody has written one."""
    known = meanings()
    starred = [f"{key[:end]}.*" for end in range(len(key) - 1, 0, -1) if key[end] == "."]
    for section, entry in [(job, key), (COMMON, key), *((job, entry) for entry in starred)]:
        if entry in known.get(section, {}):
            return section, entry, known[section][entry]
    return None


def variants(file: Path) -> dict[str, tuple[str, ConfigDict]]:
    """Variant -> the first sentence of its docstring, and its config."""
    tree = ast.parse(file.read_text())
    documented = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    (table,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VARIANTS"
    )
    names = {key.value: function.id for key, function in zip(table.keys, table.values, strict=True)}
    return {
        variant: (documented[name].splitlines()[0], load_config(f"{file}:{variant}")) for variant, name in names.items()
    }


def page() -> str:
    """docs/configuration.md as it should be."""
    parts = [OPENING]
    for file in CONFIGS:
        parts.append(_of_file(file))
    return "\n".join(parts)


def _of_file(file: Path) -> str:
    known, name = variants(file), file.relative_to(ROOT).as_posix()
    title = ast.get_docstring(ast.parse(file.read_text())).split("\n\n")[0].replace("\n", " ")
    lines = [f"## {name}", "", title, ""]
    lines += [f"- `{name}{':' * bool(variant)}{variant}`: {told}" for variant, (told, _) in known.items()]
    for job in dict.fromkeys(config.job for _, config in known.values()):
        configs = {variant: config for variant, (_, config) in known.items() if config.job == job}
        lines += ["", f"### Keys of the job `{job}` in {name}", "", *_table(job, configs)]
    return "\n".join([*lines, ""])


def _table(job: str, configs: dict[str, ConfigDict]) -> list[str]:
    first, *others = configs
    keys = list(dict.fromkeys(key for config in configs.values() for key in all_keys(config)))
    lines = [f"| key | {_named(first)} | where it is another | what it means |", "|---|---|---|---|"]
    for key in sorted(keys, key=lambda key: ("." in key, key.split(".")[0])):
        values = {variant: _value(config, key) for variant, config in configs.items()}
        differing: dict[str, list[str]] = {}
        for variant in others:
            if values[variant] != values[first]:
                differing.setdefault(values[variant], []).append(_named(variant))
        told = "<br>".join(f"{', '.join(names)}: {value}" for value, names in differing.items())
        _, _, text = meaning(job, key) or ("", "", "")
        lines.append(f"| `{key}` | {values[first]} | {told} | {text} |")
    return lines


def _named(variant: str) -> str:
    return f"`:{variant}`" if variant else "default"


def _value(config: ConfigDict, key: str) -> str:
    if key not in all_keys(config):
        return "none"
    value = functools.reduce(getitem, key.split("."), config)
    if value is None:
        return "unset"
    text = repr(value) if not isinstance(value, str) or not value else value
    return f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(page())
