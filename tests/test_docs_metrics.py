"""docs/metrics.md explains every metric that the code logs, and no other."""

import ast
import functools
import re

import pytest
from docs_pages import ROOT, explained, unexplained

FAMILIES = "reward critic policy loss grad update rollout prompts eval time goodput throughput checkpoint train".split()
FAMILIES += "curation cost teacher".split()
NAME = re.compile(rf"(?:{'|'.join(FAMILIES)})/[a-z0-9_/<>\0]+")
# Evaluation gives these the names of other metrics, with `_` for `/`.
RENAMED = {f"eval/critic_{name}" for name in ("failure_rate", "entropy", "status_<status>")}


@functools.cache
def literals() -> set[str]:
    """Every string of the package; what an f-string fills in is a NUL."""
    found = set()
    for file in (ROOT / "firm_jax").rglob("*.py"):
        tree = ast.parse(file.read_text())
        formatted = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
        inside = {id(part) for node in formatted for part in node.values}
        for node in formatted:
            found.add("".join(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                found.add(node.value)
    return found


def logged() -> set[str]:
    return {text for text in literals() if NAME.fullmatch(text)}


def may_be(explained_name: str, source: str) -> bool:
    """Whether a name of the page is what a string of the source is, or becomes.

    What an f-string fills in has to be a placeholder on the page, or a string of the source too.
    """
    filled = re.fullmatch(re.escape(source).replace("\0", "(.*)"), explained_name)
    return bool(filled) and all(re.fullmatch(r"_?<\w+>|", part) or part in literals() for part in filled.groups())


def test_every_name_in_the_source_is_explained():
    names = explained()
    fixed = {name for name in logged() if "\0" not in name and not name.endswith("/")}
    assert unexplained(fixed) == []
    varying = {name for name in logged() if "\0" in name}
    assert sorted(one for one in varying if not any(may_be(name, one) for name in names)) == []


def test_every_explained_name_is_in_the_source():
    assert explained() >= RENAMED
    assert sorted(name for name in explained() - RENAMED if not any(may_be(name, one) for one in logged())) == []


@pytest.mark.parametrize("name", ["reward/instruction", "critic/status/no_score", "eval/critic_status_truncated"])
def test_a_placeholder_stands_for_a_name(name):
    assert unexplained([name, "epoch"]) == []


def test_a_name_that_is_nowhere_is_told():
    assert unexplained(["policy/drift", "reward/mean"]) == ["policy/drift"]
    assert not any(may_be(name, one) for name in ("eval/drift", "policy/drift") for one in logged())
