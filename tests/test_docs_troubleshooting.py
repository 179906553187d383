"""The messages that docs/troubleshooting.md quotes are the ones that the code has."""

import ast
import functools
import re

import pytest
from docs_pages import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = [ROOT / "main.py", *sorted((ROOT / "firm_jax").rglob("*.py"))]


def quoted() -> list[str]:
    """The messages in the page's headings, but those of other programs, which are named in brackets."""
    return re.findall(r"^#### `(.+)`$", PAGE.read_text(), re.M)


@functools.cache
def messages() -> tuple[str, ...]:
    """Every string in the source; a NUL for what is filled in, and a blank for a line's end."""
    found = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(text.replace("\n", " ") for text in found)


def says(message: str, quote: str) -> bool:
    """Whether a message has the words of a quote in this order, with something of its own where the quote has dots."""
    place = 0
    for words in quote.split("..."):
        place = message.find(words, place)
        if place < 0:
            return False
        place += len(words)
    return True


@pytest.mark.parametrize("quote", quoted())
def test_a_quoted_message_is_in_the_source(quote):
    assert any(says(message, quote) for message in messages())


def test_headings_are_messages_of_ours_or_name_whose_they_are():
    headings = [line for line in PAGE.read_text().splitlines() if line.startswith("#### ")]
    others = [line for line in headings if not line.endswith("`")]
    assert len(quoted()) > 25 and len(quoted()) + len(others) == len(headings)
    assert all(re.fullmatch(r"#### `[^`]+` \((JAX|Linux)\)", line) for line in others)


def test_a_message_that_is_no_longer_there_is_told():
    assert not says("weights of \0 not found", "weights of ... are missing")
    assert says("weights of \0 not found: \0. Looked in: \0", "weights of ... not found: ... Looked in:")
