"""From judgements to the tables of the benchmark."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from firm_jax.critic.bench import measures, paper
from firm_jax.critic.bench.questions import INJECTED, REORDERED, UNTOUCHED, probed
from firm_jax.critic.bench.records import CRITERIA, DIFFICULTIES, Bench

NOTE = """\
MAE is over the judged items, with a 95 % bootstrap interval over pictures; beside it are the share of items without a
score (failed) and the MAE in which each of them counts as the worst possible answer (worst case). Best constant is the
lowest MAE of one answer given to every item: a critic above it knows less than one who sees nothing. Macro MAE is the
mean of the MAE by human score. Overall weighs every item alike."""


def measured(bench: Bench, records: Iterable[Mapping], again: Iterable[Mapping]) -> dict:
    """What a critic's records come to, as plain JSON; what is not known is None.

    records: those of `questions`, again: those of `reordered`; each has `of`, `probe`, `score`, `expected`, `status`.
    """
    plain: dict[int, Mapping] = {}
    probes: dict[str, dict[int, Mapping]] = {UNTOUCHED: {}, INJECTED: {}, REORDERED: {}}
    for record in (*records, *again):
        (plain if record["probe"] is None else probes[record["probe"]])[record["of"]] = record
    items = bench.items
    human = np.array([item.human for item in items], float)
    predicted = np.array([_number(plain[number]["score"]) for number in range(len(items))])
    expected = np.array([_number(plain[number]["expected"]) for number in range(len(items))])
    pictures = np.array([" ".join(item.sha256) for item in items])
    criterion = np.array([item.criterion for item in items])
    present = [name for name in CRITERIA[bench.task] if (criterion == name).any()]

    def of(chosen) -> dict:
        return _agreement(human[chosen], predicted[chosen], pictures[chosen])

    found = {
        "criteria": {
            name: of(criterion == name)
            | _one_criterion(human[criterion == name], predicted[criterion == name], expected[criterion == name])
            for name in present
        }
    }
    found["overall"] = of(np.full(len(items), True))
    found["overall"]["best_constant_mae"] = float(
        np.average(
            [found["criteria"][name]["best_constant_mae"] for name in present],
            weights=[found["criteria"][name]["items"] for name in present],
        )
    )
    split = np.array([item.difficulty or "" for item in items])
    found["difficulty"] = {name: of(split == name) for name in DIFFICULTIES if (split == name).any()}
    found["failures"] = dict(sorted(Counter(r["status"] for r in plain.values() if r["score"] is None).items()))
    found["probes"] = _probes(bench, plain, probes, present)
    return _plain(found)


def _agreement(human, predicted, pictures) -> dict:
    low, high = measures.bootstrap_interval(measures.mae, human, predicted, pictures)
    return {
        "items": len(human),
        "failure_rate": measures.failure_rate(human, predicted),
        "mae": measures.mae(human, predicted),
        "mae_interval": [low, high],
        "mae_failures_worst": measures.mae_failures_worst(human, predicted),
        "exact": measures.exact(human, predicted),
        "within_one": measures.within(human, predicted),
        "bias": measures.bias(human, predicted),
    }


def _one_criterion(human, predicted, expected) -> dict:
    """What has a meaning within one criterion only."""
    answer, error = measures.best_constant(human)
    return {
        "best_constant": answer,
        "best_constant_mae": error,
        "macro_mae": measures.macro_mae(human, predicted),
        "spearman": measures.spearman(human, predicted),
        "spearman_interval": list(measures.bootstrap_interval(measures.spearman, human, predicted)),
        "kendall": measures.kendall(human, predicted),
        "expected_mae": measures.mae(human, expected),
        "calibration": measures.calibration(human, expected),
    }


def _probes(bench: Bench, plain: Mapping, probes: Mapping, present: Sequence[str]) -> dict:
    numbers = probed(bench)

    def scores(records: Mapping, name: str | None = None) -> np.ndarray:
        chosen = [number for number in numbers if name in (None, bench.items[number].criterion)]
        return np.array([_number(records[number]["score"]) for number in chosen])

    def expected(records: Mapping) -> np.ndarray:
        return np.array([_number(records[number]["expected"]) for number in numbers])

    found = {}
    if bench.task == "edit":
        found[UNTOUCHED] = {name: _known(scores(probes[UNTOUCHED], name)) for name in present}
    change = {name: scores(probes[INJECTED], name) - scores(plain, name) for name in present}
    found[INJECTED] = {name: _known(values) for name, values in change.items()}
    before, after = scores(plain), scores(probes[REORDERED])
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    found[REORDERED] = {
        "items": len(numbers),
        "judged": int((~np.isnan(before) & ~np.isnan(after)).sum()),
        "changed": float(np.mean(~same)),
        "expected_change": _mean(np.abs(expected(probes[REORDERED]) - expected(plain))),
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
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(task: str, critics: Mapping[str, Mapping], quarantined: int) -> str:
    """The page: every critic in one table, the probes, the calibration, and the paper's table."""
    some = next(iter(critics.values()))
    lines = [f"# FIRM-Bench, {task}: {some['overall']['items']} items", ""]
    lines += [f"{quarantined} records were set aside: see quarantine.jsonl.", ""] if quarantined else []
    for name in (*some["criteria"], *([] if len(some["criteria"]) == 1 else ["overall"]), *some["difficulty"]):
        rows = {critic: _place(found, name) for critic, found in critics.items()}
        lines += [f"## {name}: {next(iter(rows.values()))['items']} items", "", *_agreement_table(rows), ""]
    lines += [NOTE, "", "## Probes", "", *_probe_table(critics), ""]
    lines += ["## Calibration of the expected score", "", *_calibration_table(critics), ""]
    columns, header = paper.COLUMNS[task], "critic (MAE)"
    lines += [f"## Table {1 if task == 'edit' else 2} of the paper: its numbers on its items, not measured here", ""]
    lines += _table([header, *columns], [[name, *map(_shown, row)] for name, row in paper.TABLES[task].items()])
    return "\n".join(lines) + "\n"


def _place(found: Mapping, name: str) -> Mapping:
    return found["overall"] if name == "overall" else found["criteria"].get(name) or found["difficulty"][name]


def _agreement_table(rows: Mapping[str, Mapping]) -> list[str]:
    columns = {
        "failed": lambda row: _percent(row["failure_rate"]),
        "worst case": lambda row: _shown(row["mae_failures_worst"]),
        "best constant": lambda row: _shown(row["best_constant_mae"]),
        "macro MAE": lambda row: _shown(row["macro_mae"]),
        "Spearman": lambda row: _shown(row["spearman"], row["spearman_interval"]),
        "Kendall": lambda row: _shown(row["kendall"]),
        "exact": lambda row: _percent(row["exact"]),
        "within 1": lambda row: _percent(row["within_one"]),
        "bias": lambda row: _shown(row["bias"]),
    }
    needs = {
        "best constant": "best_constant_mae",
        "macro MAE": "macro_mae",
        "Spearman": "kendall",
        "Kendall": "kendall",
    }
    first = next(iter(rows.values()))
    columns = {name: cell for name, cell in columns.items() if needs.get(name, "mae") in first}
    body = [
        [critic, _shown(row["mae"], row["mae_interval"]), *(cell(row) for cell in columns.values())]
        for critic, row in rows.items()
    ]
    return _table(["critic", "MAE", *columns], body)


def _probe_table(critics: Mapping[str, Mapping]) -> list[str]:
    body = []
    for critic, found in critics.items():
        for probe, what in ((UNTOUCHED, "untouched source, mean {}"), (INJECTED, "asked for a 5, change of {}")):
            values = found["probes"].get(probe, {})
            body += [
                [critic, what.format(name), _shown(one["mean"]), f"{one['judged']} of {one['items']}"]
                for name, one in values.items()
            ]
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
            shown = [
                f"{part['expected']:.2f} → {part['human']:.2f} ({part['count']})" for part in one["calibration"]["bins"]
            ]
            error, mae = one["calibration"]["error"], one["expected_mae"]
            body.append([critic, name, _shown(error), _shown(mae), ", ".join(shown) or "–"])
    return _table(["critic", "criterion", "error", "MAE of it", "expected → human (items)"], body)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def _shown(value: float | None, interval: Sequence | None = None, places: int = 2) -> str:
    if value is None:
        return "–"
    known = interval is not None and None not in interval
    return f"{value:.{places}f}" + (f" ({interval[0]:.{places}f}–{interval[1]:.{places}f})" if known else "")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
