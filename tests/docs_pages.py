"""What the tests read of README and docs: names in tables, fenced blocks."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
MARK = re.compile(r"# needs a (?:TPU pod|TPU or a GPU|TPU|GPU|cluster)\n")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line of its fence, the language after it, and what is in it."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def needs(self) -> bool:
        """Whether it says that it needs hardware which a test machine does not have."""
        return bool(MARK.match(self.text))

    @property
    def commands(self) -> list[str]:
        """Its command lines, continued ones joined, without comments."""
        joined = self.text.replace("\\\n", " ")
        return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2]) for found in FENCE.finditer(text)]


def explained() -> set[str]:
    """The names in the first columns of the tables of docs/metrics.md; `<status>` and the like for what varies."""
    rows = [line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0]) if "/" in name}


def unexplained(names) -> list[str]:
    """Of the names in a run's lines of metrics those that docs/metrics.md does not explain."""
    known = [re.compile(re.sub(r"<\w+>", "[a-z0-9_]+", name)) for name in explained()]
    return sorted(name for name in set(names) if "/" in name and not any(one.fullmatch(name) for one in known))
