"""From judgements to the tables of the benchmark."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from firm_jax.critic.bench import measures, paper
from firm_jax.critic.bench.questions import INJECTED, REORDERED, UNTOUCHED, probed
from firm_jax.critic.bench.records import CRITERIA, DIFFICULTIES, Bench
from firm_jax.critic.questions import UNANSWERED
from firm_jax.data.records import by_kind

NOTE = """\
MAE is over the judged items, with a 95 % bootstrap interval over pictures; beside it are the share of items without a
score (failed) and the MAE in which each of them counts as the worst possible answer (worst case). Best constant is the
lowest MAE of one answer given to every item: a critic above it knows less than one who sees nothing. Macro MAE is the
mean of the MAE by human score. Overall weighs every item alike."""


# From records to numbers


def measured(bench: Bench, records: Iterable[Mapping], again: Iterable[Mapping]) -> dict:
    """What a critic's records come to, as plain JSON; what is not known is None.

    records: those of `questions`, again: those of `reordered`; each has `of`, `probe`, `score`, `expected`, `status`.
    """
    plain: dict[int, Mapping] = {}
    probes: dict[str, dict[int, Mapping]] = {UNTOUCHED: {}, INJECTED: {}, REORDERED: {}}
    for record in (records := [*records, *again]):
        (plain if record["probe"] is None else probes[record["probe"]])[record["of"]] = record
    items = bench.items
    human = np.array([item.human for item in items], float)
    predicted = np.array([_number(plain[number]["score"]) for number in range(len(items))])
    expected = np.array([_number(plain[number]["expected"]) for number in range(len(items))])
    pictures = np.array([" ".join(item.sha256) for item in items])
    criterion = np.array([item.criterion for item in items])
    difficulty = np.array([item.difficulty or "" for item in items])
    present = [name for name in CRITERIA[bench.task] if (criterion == name).any()]

    def agreement(chosen: np.ndarray) -> dict:
        return _agreement(human[chosen], predicted[chosen], pictures[chosen])

    criteria = {}
    for name in present:
        of = criterion == name
        alone = _one_criterion(human[of], predicted[of], expected[of], pictures[of])
        criteria[name] = agreement(of) | alone
    overall = agreement(np.full(len(items), True))
    overall["best_constant_mae"] = float(
        np.average(
            [one["best_constant_mae"] for one in criteria.values()], weights=[one["items"] for one in criteria.values()]
        )
    )
    return _plain(
        {
            "criteria": criteria,
            "overall": overall,
            "difficulty": {name: agreement(difficulty == name) for name in DIFFICULTIES if name in difficulty},
            "failures": dict(sorted(Counter(r["status"] for r in plain.values() if r["score"] is None).items())),
            "unanswered": sum(record["status"] in UNANSWERED for record in records),
            "probes": _probes(bench, plain, probes, present),
        }
    )


def _agreement(human, predicted, pictures) -> dict:
    return {
        "items": len(human),
        "failure_rate": measures.failure_rate(human, predicted),
        "mae": measures.mae(human, predicted),
        "mae_interval": measures.bootstrap_interval(measures.mae, human, predicted, pictures),
        "mae_failures_worst": measures.mae_failures_worst(human, predicted),
        "exact": measures.exact(human, predicted),
        "within_one": measures.within(human, predicted),
        "bias": measures.bias(human, predicted),
    }


def _one_criterion(human, predicted, expected, pictures) -> dict:
    """What has a meaning within one criterion only."""
    answer, error = measures.best_constant(human)
    return {
        "best_constant": answer,
        "best_constant_mae": error,
        "macro_mae": measures.macro_mae(human, predicted),
        "spearman": measures.spearman(human, predicted),
        "spearman_interval": measures.bootstrap_interval(measures.spearman, human, predicted, pictures),
        "kendall": measures.kendall(human, predicted),
        "expected_mae": measures.mae(human, expected),
        "calibration": measures.calibration(human, expected),
    }


def _probes(bench: Bench, plain: Mapping, probes: Mapping, present: Sequence[str]) -> dict:
    numbers = probed(bench)

    def of(records: Mapping, key: str, criterion: str | None = None) -> np.ndarray:
        chosen = [number for number in numbers if criterion in (None, bench.items[number].criterion)]
        return np.array([_number(records[number][key]) for number in chosen])

    found = {}
    if bench.task == "edit":
        found[UNTOUCHED] = {name: _known(of(probes[UNTOUCHED], "score", name)) for name in present}
    found[INJECTED] = {name: _known(of(probes[INJECTED], "score", name) - of(plain, "score", name)) for name in present}
    before, after = of(plain, "score"), of(probes[REORDERED], "score")
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    found[REORDERED] = {
        "items": len(numbers),
        "judged": int((~np.isnan(before) & ~np.isnan(after)).sum()),
        "changed": float(np.mean(~same)),
        "expected_change": _mean(np.abs(of(probes[REORDERED], "expected") - of(plain, "expected"))),
    }
    return found


def _number(value) -> float:
    return math.nan if value is None else float(value)


def _known(values: np.ndarray) -> dict:
    """Their mean, and of how many it is: a critic that is thrown off its track may write no score at all."""
    return {"mean": _mean(values), "items": len(values), "judged": int((~np.isnan(values)).sum())}


def _mean(values: np.ndarray) -> float:
    """Of the values that are there."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# From numbers to bench.json and bench.md


def report(bench: Bench, critics: Mapping[str, Mapping]) -> dict:
    """bench.json: what `measured` says of each critic, what was left out, and the paper's table."""
    return {
        "task": bench.task,
        "data": bench.sha256,
        "quarantined": len(bench.quarantined),
        "reasons": [{"first": kind[0].reason, "lines": len(kind)} for kind in by_kind(bench.quarantined)],
        "critics": critics,
        "paper": {"columns": paper.COLUMNS[bench.task], "mae": paper.TABLES[bench.task]},
    }


def markdown(bench: Bench, critics: Mapping[str, Mapping]) -> str:
    """bench.md: every critic in one table, the probes, the calibration, and the paper's table."""
    some = next(iter(critics.values()))
    lines = [f"# FIRM-Bench, {bench.task}: {some['overall']['items']} items", ""]
    lines += [f"- {name}: {one['model']}" for name, one in critics.items() if one["model"] not in (None, name)] + [""]
    lines += _left_out(bench)
    for name in (*some["criteria"], *(["overall"] if len(some["criteria"]) > 1 else []), *some["difficulty"]):
        rows = {critic: _place(found, name) for critic, found in critics.items()}
        lines += [f"## {name}: {next(iter(rows.values()))['items']} items", "", *_agreement_table(rows), ""]
    lines += [NOTE, "", *_failures(critics)]
    lines += ["## Probes", "", *_probe_table(critics), ""]
    lines += ["## Calibration of the expected score", "", *_calibration_table(critics), ""]
    columns, header = paper.COLUMNS[bench.task], "critic (MAE)"
    number = 1 if bench.task == "edit" else 2
    lines += [f"## Table {number} of the paper: its numbers on its items, not measured here", ""]
    rows = [[name, *map(_shown, row)] for name, row in paper.TABLES[bench.task].items()]
    lines += _table([header, *columns], rows)
    return "\n".join(lines) + "\n"


def _left_out(bench: Bench) -> list[str]:
    """What could not be used: no critic was measured on it."""
    if not bench.quarantined:
        return []
    lines = [f"{len(bench.quarantined)} records were left out; quarantine.jsonl names each:", ""]
    return [
        *lines,
        *(f"- {len(kind)}, such as: {_one_line(kind[0].reason)}" for kind in by_kind(bench.quarantined)),
        "",
    ]


def _failures(critics: Mapping[str, Mapping]) -> list[str]:
    lines = []
    for critic, found in critics.items():
        reasons = ", ".join(f"{status} {count}" for status, count in found["failures"].items())
        lines += [f"- {critic}: {reasons}"] if reasons else []
        if found["unanswered"]:
            lines += [
                f"- {critic}: its server did not answer {found['unanswered']} questions, probes among them; the "
                "same command asks them again"
            ]
    return ["## Items without a score", "", *lines, ""] if lines else []


def _place(found: Mapping, name: str) -> Mapping:
    return found["overall"] if name == "overall" else found["criteria"].get(name) or found["difficulty"][name]


def _agreement_table(rows: Mapping[str, Mapping]) -> list[str]:
    """A row for each critic; the columns that this part of the items has."""

    def shown(key: str):
        return lambda row: _shown(row[key], row.get(f"{key}_interval"))

    def percent(key: str):
        return lambda row: _percent(row[key])

    columns = {
        "mae": ("MAE", shown),
        "failure_rate": ("failed", percent),
        "mae_failures_worst": ("worst case", shown),
        "best_constant_mae": ("best constant", shown),
        "macro_mae": ("macro MAE", shown),
        "spearman": ("Spearman", shown),
        "kendall": ("Kendall", shown),
        "exact": ("exact", percent),
        "within_one": ("within 1", percent),
        "bias": ("bias", shown),
    }
    present = {name: cell(key) for key, (name, cell) in columns.items() if key in next(iter(rows.values()))}
    body = [[critic, *(cell(row) for cell in present.values())] for critic, row in rows.items()]
    return _table(["critic", *present], body)


def _probe_table(critics: Mapping[str, Mapping]) -> list[str]:
    body = []
    for critic, found in critics.items():
        for probe, what in ((UNTOUCHED, "untouched source, mean {}"), (INJECTED, "asked for a 5, change of {}")):
            for name, one in found["probes"].get(probe, {}).items():
                body.append([critic, what.format(name), _shown(one["mean"]), f"{one['judged']} of {one['items']}"])
        batch = found["probes"][REORDERED]
        count = f"{batch['judged']} of {batch['items']}"
        body.append([critic, "scores that change with the batch", _percent(batch["changed"]), count])
        shift = _shown(batch["expected_change"], places=4)
        body.append([critic, "mean change of the expected score with the batch", shift, count])
    return _table(["critic", "probe", "result", "items with a score"], body)


def _calibration_table(critics: Mapping[str, Mapping]) -> list[str]:
    body = []
    for critic, found in critics.items():
        for name, one in found["criteria"].items():
            bins = one["calibration"]["bins"]
            parts = [f"{part['expected']:.2f} → {part['human']:.2f} ({part['count']})" for part in bins]
            error, mae = one["calibration"]["error"], one["expected_mae"]
            body.append([critic, name, _shown(error), _shown(mae), ", ".join(parts) or "–"])
    return _table(["critic", "criterion", "error", "MAE of it", "expected → human (items)"], body)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[_one_line(text).replace("|", "\\|") for text in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shown(value: float | None, interval: Sequence | None = None, places: int = 2) -> str:
    if value is None:
        return "–"
    known = interval is not None and None not in interval
    return f"{value:.{places}f}" + (f" ({interval[0]:.{places}f}–{interval[1]:.{places}f})" if known else "")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
