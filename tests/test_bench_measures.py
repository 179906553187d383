"""The measures of the benchmark, against hand-computed values, the paper's composition, and scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from firm_jax.critic.bench import measures

NONE = float("nan")
# FIRM-Bench's composition: how many items have the human score 5, 4, 3, 2, 1 (the paper's table 6).
PAPER = {"execution": (105, 57, 108, 21, 10), "consistency": (73, 83, 82, 14, 4), "instruction": (67, 73, 50, 38, 22)}

scores = st.integers(1, 5)
few = settings(deadline=None, max_examples=40)
pairs = st.lists(st.tuples(scores, scores), min_size=2, max_size=40)


def composed(criterion: str) -> np.ndarray:
    return np.repeat([5, 4, 3, 2, 1], PAPER[criterion]).astype(float)


def test_errors_by_hand_and_a_failure_is_missing():
    human, predicted = [5, 4, 3, 3, 1], [5, 2, 4, NONE, 3]
    assert measures.mae(human, predicted) == pytest.approx((0 + 2 + 1 + 2) / 4)
    assert measures.failure_rate(human, predicted) == pytest.approx(1 / 5)
    assert measures.mae_failures_worst(human, predicted) == pytest.approx((0 + 2 + 1 + 2 + 2) / 5)
    assert measures.exact(human, predicted) == pytest.approx(1 / 4)
    assert measures.within(human, predicted) == pytest.approx(2 / 4)
    assert measures.bias(human, predicted) == pytest.approx((0 - 2 + 1 + 2) / 4)
    assert measures.macro_mae([5, 5, 5, 1], [5, 5, 4, 4]) == pytest.approx((1 / 3 + 3) / 2)


@pytest.mark.parametrize("human, worst", [(1, 4), (2, 3), (3, 2), (4, 3), (5, 4)])
def test_a_failure_costs_what_the_worst_answer_would(human, worst):
    assert measures.mae_failures_worst([human], [NONE]) == worst
    assert worst == max(measures.mae([human], [answer]) for answer in range(1, 6))


@pytest.mark.parametrize(
    "criterion, answer, error", [("execution", 4, 0.947), ("consistency", 4, 0.762), ("instruction", 4, 1.036)]
)
def test_the_best_constant_answer_to_the_papers_items(criterion, answer, error):
    found = measures.best_constant(composed(criterion))
    assert found[0] == answer and found[1] == pytest.approx(error, abs=5e-4)


@few
@given(st.lists(scores, min_size=1, max_size=30))
def test_no_constant_answer_is_better(human):
    answer, error = measures.best_constant(human)
    others = [measures.mae(human, np.full(len(human), other)) for other in range(1, 6)]
    assert error == min(others) == others[answer - 1]


@few
@given(pairs)
def test_rank_correlations_are_scipys(values):
    human, predicted = np.array(values, float).T
    for ours, theirs in ((measures.spearman, stats.spearmanr), (measures.kendall, stats.kendalltau)):
        if min(len(set(human)), len(set(predicted))) == 1:
            assert np.isnan(ours(human, predicted))
        else:
            assert ours(human, predicted) == pytest.approx(theirs(human, predicted).statistic, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_rank_correlations_take_fractions_and_pass_over_failures(seed):
    rng = np.random.default_rng(seed)
    human, expected = rng.integers(1, 6, 15).astype(float), rng.choice([1.2, 2.0, 2.7, 3.1, 4.4, 4.9], 15)
    with_failures = np.append(expected, [NONE, NONE])
    for measure in (measures.spearman, measures.kendall, measures.mae, measures.macro_mae, measures.exact):
        alone = measure(human, expected)
        assert measure(np.append(human, [1, 5]), with_failures) == pytest.approx(alone, nan_ok=True)
    assert measures.kendall(human, expected) == pytest.approx(stats.kendalltau(human, expected).statistic, abs=1e-12)
    assert measures.spearman(human, expected) == pytest.approx(stats.spearmanr(human, expected).statistic, abs=1e-12)


def test_nothing_judged_is_not_a_number():
    for measure in (measures.mae, measures.macro_mae, measures.spearman, measures.kendall, measures.exact):
        assert np.isnan(measure([3, 4], [NONE, NONE])) and np.isnan(measure([], []))
    assert measures.failure_rate([3, 4], [NONE, NONE]) == 1
    assert np.isnan(measures.bootstrap_interval(measures.mae, [3, 4], [NONE, NONE])).all()
    assert np.isnan(measures.bootstrap_interval(measures.mae, [], [])).all()


def test_calibration_by_hand():
    expected = [0.9999, 1.2, 3.0, 3.2, NONE, 5.0]  # about 1, about 3 and about 5
    human = [1, 2, 3, 5, 1, 4]
    found = measures.calibration(human, expected)
    assert [(one["low"], one["high"], one["count"]) for one in found["bins"]] == [
        (0.75, 1.25, 2),
        (2.75, 3.25, 2),
        (4.75, 5.25, 1),
    ]
    assert [one["human"] for one in found["bins"]] == [1.5, 4.0, 4.0]
    assert found["error"] == pytest.approx((2 * abs(1.1 - 1.5) + 2 * abs(3.1 - 4) + abs(5 - 4)) / 5, abs=1e-4)
    assert np.isnan(measures.calibration([1], [NONE])["error"])


def test_the_interval_is_seeded_and_covers_the_truth():
    rng, covered = np.random.default_rng(0), 0
    human = np.full(60, 3.0)
    for trial in range(60):  # errors of 0, 1 and 2, as often: their mean is 1
        predicted = human + rng.integers(0, 3, 60)
        low, high = measures.bootstrap_interval(measures.mae, human, predicted, resamples=150, seed=trial)
        covered += low <= 1 <= high
    assert covered >= 51  # of 57 to be expected
    asked = measures.mae, human, predicted
    assert measures.bootstrap_interval(*asked, seed=1) == measures.bootstrap_interval(*asked, seed=1)
    assert len({measures.bootstrap_interval(*asked, resamples=30, seed=seed) for seed in range(9)}) > 1


def test_items_of_one_picture_are_drawn_together():
    rng = np.random.default_rng(0)
    human, errors = np.full(80, 3.0), rng.integers(0, 3, 40)
    twice, pictures = human + np.tile(errors, 2), np.tile(np.arange(40), 2)

    def width(*clusters):
        low, high = measures.bootstrap_interval(measures.mae, human, twice, *clusters)
        return high - low

    # The same forty errors twice over are no more evidence than once.
    once = measures.bootstrap_interval(measures.mae, human[:40], human[:40] + errors)
    assert width(pictures) == pytest.approx(once[1] - once[0], rel=0.1)
    assert width() < 0.85 * width(pictures)
