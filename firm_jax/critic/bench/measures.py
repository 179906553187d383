"""How far a critic's scores are from people's. Pure functions of numpy arrays.

Everywhere: `human` [N] are whole scores 1..5, `predicted` [N] the critic's, NaN where a judgement failed. A failed
judgement is missing: measures are over the judged items, and `failure_rate` belongs beside each of them.
`mae_failures_worst` is the one that a critic cannot improve by staying silent. Without a judged item a measure is NaN.

The benchmark's own measure is `mae` (arXiv 2603.12247, section 3.3), whose overall value is over all items of all
criteria. The paper says nothing of answers without a score; the two treatments here are ours.
"""

from collections.abc import Callable, Sequence

import numpy as np

from firm_jax.typing import Float

SCALE = np.arange(1, 6)
# Around the halves: a critic that is sure gives nearly whole numbers, which an edge there would part.
BIN_EDGES = np.arange(0.75, 5.5, 0.5)
RESAMPLES = 1000

Scores = Float[np.ndarray, "N"]


def _judged(human: Scores, predicted: Scores) -> tuple[Scores, Scores]:
    human, predicted = np.asarray(human, np.float64), np.asarray(predicted, np.float64)
    known = ~np.isnan(predicted)
    return human[known], predicted[known]


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def failure_rate(human: Scores, predicted: Scores) -> float:
    """The share of items without a score, 0..1."""
    return _mean(np.isnan(np.asarray(predicted, np.float64)))


def mae(human: Scores, predicted: Scores) -> float:
    """Mean absolute error over the judged items, 0..4. `predicted` may be fractions, such as expected scores."""
    human, predicted = _judged(human, predicted)
    return _mean(np.abs(predicted - human))


def mae_failures_worst(human: Scores, predicted: Scores) -> float:
    """Mean absolute error over all items, 0..4, a failure counting as the score furthest from the human one."""
    human, predicted = np.asarray(human, np.float64), np.asarray(predicted, np.float64)
    worst = np.maximum(human - SCALE[0], SCALE[-1] - human)
    return _mean(np.where(np.isnan(predicted), worst, np.abs(predicted - human)))


def best_constant(human: Scores) -> tuple[int, float]:
    """The answer 1..5 that, given to every item, has the lowest mean absolute error (the lowest such), and that error.

    A critic above this error knows less of the items than one who has seen none of them.
    """
    errors = [_mean(np.abs(np.asarray(human, np.float64) - answer)) for answer in SCALE]
    place = int(np.argmin(errors))
    return int(SCALE[place]), errors[place]


def macro_mae(human: Scores, predicted: Scores) -> float:
    """The mean, over the human scores that occur among judged items, of the error on items of that score, 0..4."""
    human, predicted = _judged(human, predicted)
    return _mean([_mean(np.abs(predicted - human)[human == score]) for score in np.unique(human)])


def exact(human: Scores, predicted: Scores) -> float:
    """The share of judged items whose score is the human one, 0..1."""
    return within(human, predicted, 0)


def within(human: Scores, predicted: Scores, most: float = 1) -> float:
    """The share of judged items whose score is at most so far from the human one, 0..1."""
    human, predicted = _judged(human, predicted)
    return _mean(np.abs(predicted - human) <= most)


def spearman(human: Scores, predicted: Scores) -> float:
    """Spearman's rank correlation over the judged items, -1..1, ties sharing their mean rank.

    NaN where either side never varies: the order of a constant is not known.
    """
    human, predicted = _judged(human, predicted)
    if len(human) < 2:
        return float("nan")
    first, second = _ranks(human), _ranks(predicted)
    first, second = first - first.mean(), second - second.mean()
    spread = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / spread) if spread > 0 else float("nan")


def _ranks(values: Scores) -> Scores:
    """Ranks from 1; equal values get the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def kendall(human: Scores, predicted: Scores) -> float:
    """Kendall's tau-b over the judged items, -1..1, which allows for ties (Kendall 1945). NaN as for `spearman`."""
    human, predicted = _judged(human, predicted)
    if len(human) < 2:
        return float("nan")
    (_, row), (_, column) = (np.unique(values, return_inverse=True) for values in (human, predicted))
    table = np.zeros((row.max() + 1, column.max() + 1))
    np.add.at(table, (row, column), 1)
    # Of a cell, the items with a higher human score: further right they agree in order with it, further left they do
    # not.
    higher = np.zeros_like(table)
    higher[:-1] = np.cumsum(table[:0:-1], axis=0)[::-1]
    right = np.cumsum(higher[:, ::-1], axis=1)[:, ::-1] - higher
    left = np.cumsum(higher, axis=1) - higher
    concordant, discordant = (table * right).sum(), (table * left).sum()
    pairs = _pairs(len(human))
    untied = [pairs - _pairs(table.sum(axis=axis)).sum() for axis in (1, 0)]
    spread = np.sqrt(untied[0] * untied[1])
    return float((concordant - discordant) / spread) if spread > 0 else float("nan")


def _pairs(count):
    return count * (count - 1) / 2


def bias(human: Scores, predicted: Scores) -> float:
    """The mean of predicted less human score over the judged items, -4..4: above 0, the critic is too kind."""
    human, predicted = _judged(human, predicted)
    return _mean(predicted - human)


def calibration(human: Scores, expected: Scores) -> dict:
    """How far the expected score is from what people give, on the average of items with about the same.

    expected: the critic's mean score under its own probabilities, 1..5, NaN where it is not known. Returns `bins`, for
    each of nine bins of half a point, around 1, 1.5 .. 5, that holds an item `low`, `high`, `count`, `expected` and
    `human` (means), and `error`, the expected calibration error 0..4: the mean over items of their bin's distance
    between the two means.
    """
    human, expected = _judged(human, expected)
    place = np.clip(np.searchsorted(BIN_EDGES, expected, side="right") - 1, 0, len(BIN_EDGES) - 2)
    bins = [
        {
            "low": float(BIN_EDGES[number]),
            "high": float(BIN_EDGES[number + 1]),
            "count": int(held.sum()),
            "expected": _mean(expected[held]),
            "human": _mean(human[held]),
        }
        for number in np.unique(place)
        for held in [place == number]
    ]
    total = sum(one["count"] * abs(one["expected"] - one["human"]) for one in bins)
    return {"bins": bins, "error": total / len(human) if len(human) else float("nan")}


def bootstrap_interval(
    measure: Callable[[Scores, Scores], float],
    human: Scores,
    predicted: Scores,
    clusters: Sequence | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a measure (Efron 1979): (low, high), the same for the same seed.

    clusters: what each item belongs to; those of one picture are drawn together, since they are not independent. None:
    each item is one of its own. Resamples in which the measure is not known are left out; (NaN, NaN) when it is in
    none, or there is nothing to draw from.
    """
    human, predicted = np.asarray(human, np.float64), np.asarray(predicted, np.float64)
    if not len(human):
        return float("nan"), float("nan")
    _, member = np.unique(np.arange(len(human)) if clusters is None else np.asarray(clusters), return_inverse=True)
    by_cluster, counts = np.argsort(member, kind="stable"), np.bincount(member)
    begins = np.cumsum(counts) - counts
    rng, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        chosen = rng.integers(len(counts), size=len(counts))
        sizes = counts[chosen]
        ends = np.cumsum(sizes)
        drawn = by_cluster[np.arange(ends[-1]) + np.repeat(begins[chosen] - (ends - sizes), sizes)]
        found.append(measure(human[drawn], predicted[drawn]))
    known = np.array(found)[~np.isnan(found)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
