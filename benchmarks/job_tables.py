"""Every result of `benchmarks.idle` and `benchmarks.start` in `benchmarks/results` as one page of Markdown.

    python -m benchmarks.job_tables

writes `docs/job-results.md` anew from the JSON files there. Numbers come to the page in no other way.
"""

import argparse
import json
from collections.abc import Sequence

from benchmarks import idle, start
from benchmarks.harness import RESULTS, ROOT
from benchmarks.tables import origin

PAGE = ROOT / "docs" / "job-results.md"
HEAD = """# Whole jobs: results

Made by `python -m benchmarks.job_tables` from the files in `benchmarks/results`.
[What is measured, and how](profiling.md#how-long-the-devices-wait).
"""


def page(results: Sequence[dict]) -> str:
    """Markdown of results as `store` leaves them: a section each."""
    return "\n".join([HEAD, *(map(section, results) if results else ["Nothing has been measured yet.\n"])])


def section(result: dict) -> str:
    """One result: where, when and how it was measured, and its table."""
    lines = [f"## `{result['question']}`, {result['label']}, {result['date']}", "", origin(result), ""]
    return "\n".join([*lines, *{"idle": idle.table, "start": start.table}[result["question"]](result), ""])


def stored() -> list[dict]:
    """The results that are kept."""
    every = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    return [result for result in every if result["question"] in ("idle", "start")]


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    PAGE.write_text(page(stored()))


if __name__ == "__main__":
    main()
