"""The report of a curation: `report.json` for programs, `report.html` for people, which needs nothing beside it."""

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from firm_jax import storage
from firm_jax.cards import thumbnails
from firm_jax.critic.bench import measures
from firm_jax.curation.ledger import BILLION, Ledger
from firm_jax.curation.outputs import lot
from firm_jax.curation.selection import REASONS, Rejected, counted
from firm_jax.curation.stage import Example
from firm_jax.report import environment, flat
from firm_jax.workdir import plain_config

SCALE = range(1, 6)
TEXT_CHARACTERS = 4000  # of one text on the page
REJECTED_SHOWN = 3  # of each reason


def write_report(
    workdir: Path, config, source, collected, kept, rejected, written, ledger: Ledger, truth, recipe, out_of_budget
) -> dict[str, Any]:
    """Write both files; returns what `report.json` holds.

    truth: scores an example by the oracle, None where there is none. out_of_budget: the error that ended the asking,
    or None.
    """
    mismatched = sum(one.mismatched for one in kept)
    report = {
        "task": config.task,
        "recipe": config.recipe,
        "whole": out_of_budget is None,
        "stopped": str(out_of_budget or ""),
        "records": {"usable": len(source.records), "set_aside": len(source.quarantined), "asked": collected.records},
        "examples": {"made": len(collected.examples), "kept": len(kept), "mismatched": mismatched}
        | {name: len(examples) for name, examples in written.items()},
        "scores": {"made": _by_score(collected.examples), "kept": _by_score(kept)},
        "rejected": counted(rejected),
        "missing": _nested(collected.counts),
        "answered": dict(sorted(collected.answered.items())),
        "cost": _costs(ledger),
    }
    if truth is not None:
        report["teacher"] = _against(collected.examples, truth)
    report["metrics"] = _metrics(report)
    page = environment().get_template("report_curation.html").render(
        name=workdir.resolve().name,
        report=report,
        scale=SCALE,
        reasons=REASONS,
        benchmarks=list(config.selection.benchmarks),
        samples=_samples(sorted(kept, key=lambda one: lot(one, config.seed)), collected.shown, source.folder, config),
        refused=_refused(rejected),
        flat_config=flat(plain_config(config)),
    )  # fmt: skip
    for name, text in (("report.json", json.dumps(report, indent=2) + "\n"), ("report.html", page)):
        with storage.writing(workdir / name):
            storage.replace(workdir / name, text.encode(errors="replace").decode())
    return report


def _by_score(examples: Iterable[Example]) -> dict[str, dict[str, int]]:
    """How many of each criterion and score."""
    counts = collections.Counter((one.criterion, one.score) for one in examples)
    criteria = sorted({criterion for criterion, _ in counts})
    return {name: {str(score): counts[name, score] for score in SCALE} for name in criteria}


def _nested(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (stage, status), count in sorted(counts.items()):
        found.setdefault(stage, {})[status] = count
    return found


def _costs(ledger: Ledger) -> dict[str, Any]:
    """What all calls of the ledger cost, earlier starts included: in all, and by stage and model."""
    parts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    for row in ledger.rows():
        part = parts[row["stage"], row["model"]]
        part.update({name: row[name] for name in ("attempts", "tokens_in", "tokens_out", "price", "lost")})
        part.update({"calls": 1, "lost_price": row["lost_price"], "lost_tokens": row["lost_tokens"]})
    table = [
        {
            "stage": stage,
            "model": model,
            **{name: part[name] for name in ("calls", "attempts", "tokens_in", "tokens_out", "lost", "lost_tokens")},
            "money": (part["price"] + part["lost_price"]) / BILLION,
        }
        for (stage, model), part in sorted(parts.items())
    ]
    totals = ledger.totals()
    return {"money": totals.money, "tokens": totals.tokens, "calls": totals.done, "lost": totals.lost, "parts": table}


def _against(examples: Sequence[Example], truth) -> dict[str, dict[str, float]]:
    """How far the teacher is from the oracle, before the selection: as `critic.bench` measures a critic."""
    found = {}
    for criterion in sorted({one.criterion for one in examples}):
        of = [one for one in examples if one.criterion == criterion]
        right, given = np.array([truth.score(one) for one in of], float), np.array([one.score for one in of], float)
        found[criterion] = {
            "examples": len(of),
            "mae": measures.mae(right, given),
            "bias": measures.bias(right, given),
            "exact": measures.exact(right, given),
            "best_constant_mae": measures.best_constant(right)[1],
        }
    return found


def _metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """What the last line of metrics says."""
    values = {"curation/kept": report["examples"]["kept"], "cost/money": report["cost"]["money"]}
    values |= {f"curation/rejected/{name}": count for name, count in report["rejected"].items()}
    return values | {f"teacher/mae_{name}": one["mae"] for name, one in report.get("teacher", {}).items()}


def _samples(
    drawn: Sequence[Example], shown: Mapping[str, Mapping[str, str]], folder: Path, config
) -> list[dict[str, Any]]:
    """The first few of each criterion and score, of those of which it is known what the teacher was shown."""
    chosen, taken = [], collections.Counter()
    for one in drawn:
        if one.id in shown and taken[one.criterion, one.score] < config.output.samples:
            taken[one.criterion, one.score] += 1
            chosen.append(one)
    chosen.sort(key=lambda one: (one.criterion, one.score))
    pictures = thumbnails([[folder / path for path in one.images] for one in chosen])
    return [
        {
            "id": one.id,
            "criterion": one.criterion,
            "score": one.score,
            "prompt": one.prompt,
            "requirement": one.requirement,
            "mismatched": one.mismatched,
            "answer": _cut(one.answer),
            "privileged": {name: _cut(text) for name, text in shown[one.id].items()},
            "pictures": found,
        }
        for one, found in zip(chosen, pictures, strict=True)
    ]


def _refused(rejected: Sequence[Rejected]) -> list[dict[str, Any]]:
    """The first few of each reason."""
    taken: collections.Counter[str] = collections.Counter()
    found = []
    for one in rejected:
        if taken[one.reason] < REJECTED_SHOWN:
            taken[one.reason] += 1
            found.append({"reason": one.reason, "detail": _cut(one.detail), "example": one.example})
    return sorted(found, key=lambda one: REASONS.index(one["reason"]))


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]} … ({len(text)} characters)"
