"""The measures of the benchmark, against hand-computed values, the paper's composition, and scipy."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from firm_jax.critic.bench import measures

NONE = float("nan")
# FIRM-Bench's composition: how many items have the human score 5, 4, 3, 2, 1 (the paper's table 6).
PAPER = {"execution": (105, 57, 108, 21, 10), "consistency": (73, 83, 82, 14, 4), "instruction": (67, 73, 50, 38, 22)}

scores = st.integers(1, 5)
few = settings(deadline=None, max_examples=60)
# Few values, so that there are ties, on both sides of bins' edges, and items without a score.
given_scores = st.sampled_from([1.0, 1.2, 1.3, 2.0, 2.25, 2.5, 3.0, 4.0, 4.74, 5.0, NONE])
answered = st.lists(st.tuples(scores, given_scores), min_size=1, max_size=40)


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
@given(answered)
@example([(3, 2.5), (3, 4.0)])  # people's scores do not vary
@example([(1, 3.0), (5, 3.0), (2, NONE)])  # the critic's do not
@example([(1, NONE), (5, NONE)])
def test_every_measure_is_what_numpy_and_scipy_make_of_the_judged_items(values):
    human, predicted = np.array(values, float).T
    known = ~np.isnan(predicted)
    right, judged = human[known], predicted[known]
    errors = np.abs(judged - right)
    assert measures.failure_rate(human, predicted) == pytest.approx(np.isnan(predicted).mean())
    worst = np.where(known, np.abs(predicted - human), np.abs(human[:, None] - [1, 5]).max(axis=1))
    assert measures.mae_failures_worst(human, predicted) == pytest.approx(worst.mean())
    if not known.any():
        return
    by_score = stats.binned_statistic(right, errors, "mean", bins=np.arange(0.5, 6)).statistic
    expected = {
        measures.mae: errors.mean(),
        measures.macro_mae: np.nanmean(by_score),
        measures.exact: (errors == 0).mean(),
        measures.within: (errors <= 1).mean(),
        measures.bias: judged.mean() - right.mean(),
        measures.spearman: NONE,
        measures.kendall: NONE,
    }
    if np.ptp(right) and np.ptp(judged):
        expected[measures.spearman] = stats.spearmanr(right, judged).statistic
        expected[measures.kendall] = stats.kendalltau(right, judged).statistic
    for measure, value in expected.items():
        assert measure(human, predicted) == pytest.approx(value, abs=1e-12, nan_ok=True), measure.__name__


@few
@given(answered)
def test_the_calibration_error_is_numpys(values):
    human, expected = np.array(values, float).T
    human, expected = human[~np.isnan(expected)], expected[~np.isnan(expected)]
    if not len(human):
        return
    number = np.digitize(expected, np.arange(1.25, 5, 0.5))
    distances = [abs(human[number == one].mean() - expected[number == one].mean()) for one in number]
    found = measures.calibration(*np.array(values, float).T)
    assert found["error"] == pytest.approx(np.mean(distances))
    assert sum(one["count"] for one in found["bins"]) == len(human)


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


def test_the_interval_is_the_percentile_interval_of_scipy():
    rng = np.random.default_rng(0)
    human, errors = np.full(80, 3.0), rng.integers(0, 3, 80)
    ours = measures.bootstrap_interval(measures.mae, human, human + errors, resamples=4000)
    theirs = stats.bootstrap((errors,), np.mean, n_resamples=4000, method="percentile", random_state=1)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)
    low, high = measures.bootstrap_interval(measures.mae, human, human + errors, level=0.5, resamples=4000)
    assert high - low == pytest.approx((ours[1] - ours[0]) * 0.6745 / 1.96, rel=0.1)


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
