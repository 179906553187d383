"""The rewards' formulas, the mask that travels with them, and the loading of a user's own reward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from firm_jax.errors import ConfigError
from firm_jax.rl.rewards import (
    cme,
    execution_only,
    guarded_sum,
    instruction_only,
    normalise,
    qma,
    quality_from_subscores,
    resolve_reward,
    weighted_sum,
)


def test_normalise_maps_the_closed_range():
    np.testing.assert_array_equal(normalise(jnp.array([1, 2, 3, 4, 5])), [0, 0.25, 0.5, 0.75, 1])
    assert jnp.isnan(normalise(jnp.nan))


def test_quality_is_the_worst_of_three():
    np.testing.assert_array_equal(quality_from_subscores(jnp.array([[0.5, 0.25, 1], [1, 1, 1]])), [0.25, 1])
    assert jnp.isnan(quality_from_subscores(jnp.array([0.5, jnp.nan, 1])))


def test_qma_and_cme_are_the_paper_s_formulas():
    score, other = jnp.array([0.0, 0.5, 1.0, 1.0]), jnp.array([1.0, 0.5, 0.0, 1.0])
    np.testing.assert_allclose(qma(score, other), [0, 0.5 * 0.7, 0.4, 1], rtol=1e-6)
    np.testing.assert_allclose(cme(score, other), [0, 0.5 * 0.8, 0.6, 1], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(qma)(score, other, 0.2, 0.8), [0, 0.5 * 0.6, 0.2, 1], rtol=1e-6)


def test_returning_the_source_pays_in_the_linear_sum_only():
    untouched = {"execution": jnp.zeros(1), "consistency": jnp.ones(1)}
    assert weighted_sum(untouched, {"execution": 0.5, "consistency": 0.5}) == 0.5
    assert cme(**untouched) == guarded_sum(**untouched) == execution_only(untouched["execution"]) == 0


def test_the_guard_pays_for_consistency_only_where_the_edit_was_made():
    execution, consistency = jnp.array([0.0, 0.25, 0.5, 0.75, 1.0]), jnp.array([1.0, 1.0, 1.0, 0.5, 0.0])
    expected = [0, 0.125, 0.75, 0.625, 0.5]
    np.testing.assert_allclose(jax.jit(guarded_sum)(execution, consistency), expected, rtol=1e-6)
    by_weights = guarded_sum(execution, consistency, execution_weight=0.6, consistency_weight=0.4, least_execution=0.75)
    np.testing.assert_allclose(by_weights, [0, 0.15, 0.3, 0.65, 0.6], rtol=1e-6)
    unguarded = guarded_sum(execution, consistency, least_execution=0.0)
    linear = weighted_sum({"execution": execution, "consistency": consistency}, {"execution": 0.5, "consistency": 0.5})
    np.testing.assert_allclose(unguarded, linear, rtol=1e-6)
    assert jnp.isnan(guarded_sum(jnp.array([0.0]), jnp.array([jnp.nan]))).all()


EDIT_SCORES = {
    "execution": jnp.array([0.0, 1.0, 1.0, jnp.nan, 0.5]),
    "consistency": jnp.array([1.0, 1.0, 0.0, 1.0, jnp.nan]),
}


@pytest.mark.fault("missing-reward")
@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("cme", {"base": 0.6, "bonus": 0.4}, [0, 1, 0.6, np.nan, np.nan]),
        ("weighted_sum", {"execution": 0.5, "consistency": 0.5}, [0.5, 1, 0.5, np.nan, np.nan]),
        ("weighted_sum", {"execution": 0.6, "consistency": 0.4}, [0.4, 1, 0.6, np.nan, np.nan]),
        ("guarded_sum", {}, [0, 1, 0.5, np.nan, np.nan]),
        ("execution_only", {}, [0, 1, 1, np.nan, 0.5]),
    ],
)
def test_the_rewards_for_editing_by_name(name, weights, expected):
    valid = {criterion: jnp.isfinite(values) for criterion, values in EDIT_SCORES.items()}
    rewards, present = jax.jit(resolve_reward(name, weights))(EDIT_SCORES, valid)
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    np.testing.assert_array_equal(present, np.isfinite(expected))


def test_weighted_sum_takes_names_or_places():
    a, b = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.5])
    by_name = weighted_sum({"b": b, "a": a}, {"a": 0.6, "b": 0.4})
    np.testing.assert_allclose(by_name, [0.4, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(weighted_sum([a, b], [0.6, 0.4]), by_name)
    for scores, weights in [({"a": a}, {"b": 1.0}), ([a, b], [1.0]), ([], [])]:
        with pytest.raises(ConfigError, match="do not match"):
            weighted_sum(scores, weights)


SCORES = {
    "instruction": jnp.array([1.0, 0.5, 0.75, jnp.nan]),
    "quality": jnp.array([0.5, jnp.nan, 1.0, 1.0]),
}
VALID = {"instruction": jnp.array([True, True, True, False]), "quality": jnp.array([True, False, True, True])}


@pytest.mark.fault("missing-reward")
def test_a_missing_judgement_never_becomes_a_number():
    reward, valid = jax.jit(resolve_reward("qma"))(SCORES, VALID)
    np.testing.assert_array_equal(valid, [True, False, True, False])
    np.testing.assert_allclose(reward, [0.7, np.nan, 0.75, np.nan], rtol=1e-6)


@pytest.mark.fault("missing-reward")
def test_a_number_left_where_the_mask_says_missing_is_not_used():
    scores = {"instruction": jnp.array([1.0, 1.0]), "quality": jnp.array([0.0, 0.0])}
    mask = {"instruction": jnp.array([True, True]), "quality": jnp.array([True, False])}
    reward, valid = resolve_reward("qma")(scores, mask)
    np.testing.assert_array_equal(valid, [True, False])
    assert jnp.isnan(reward[1])


def test_only_the_needed_criteria_must_be_judged():
    reward, valid = resolve_reward("instruction_only")(SCORES, VALID)
    np.testing.assert_array_equal(valid, [True, True, True, False])
    np.testing.assert_array_equal(reward, instruction_only(SCORES["instruction"]))
    with pytest.raises(ConfigError, match="execution"):
        resolve_reward("cme")(SCORES, VALID)


def test_weights_from_the_configuration():
    reward, _ = resolve_reward("qma", {"base": 0.5, "bonus": 0.5})(SCORES, VALID)
    np.testing.assert_allclose(reward[0], 0.75)
    linear = resolve_reward("weighted_sum", {"instruction": 0.8, "quality": 0.2})
    assert linear.criteria == ("instruction", "quality")
    np.testing.assert_allclose(linear(SCORES, VALID)[0][0], 0.9, rtol=1e-6)


USER_MODULE = """
def harmonic(instruction, quality, floor=0.1):
    return 2 / (1 / (instruction + floor) + 1 / (quality + floor))

def constant(instruction):
    return 0.5

def divides(instruction):
    return 1 / (instruction - 1)

def anything(*scores):
    return scores[0]

answer = 42
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_under_test.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_rewards_under_test"


def test_a_user_s_function(user_module):
    reward = resolve_reward(f"{user_module}:harmonic", {"floor": 0.5})
    assert reward.criteria == ("instruction", "quality")
    values, valid = reward(SCORES, VALID)
    np.testing.assert_array_equal(valid, [True, False, True, False])
    np.testing.assert_allclose(values[0], 2 / (1 / 1.5 + 1 / 1.0), rtol=1e-6)


@pytest.mark.fault("missing-reward")
def test_a_user_s_infinite_reward_counts_as_missing(user_module):
    values, valid = resolve_reward(f"{user_module}:divides")(SCORES, VALID)
    np.testing.assert_array_equal(valid, [False, True, True, False])
    assert jnp.isnan(values[0])


@pytest.mark.parametrize(
    ("name", "weights", "named"),
    [
        ("qmaa", None, "qmaa.*module:function"),
        ("no_such_module_here:f", None, "no_such_module_here"),
        ("my_rewards_under_test:missing", None, "no function 'missing'"),
        ("my_rewards_under_test:answer", None, "no function 'answer'"),
        ("my_rewards_under_test:anything", None, "name the criteria"),
        ("qma", {"quality": 0.5}, "quality.*base"),
        ("qma", {"base": "much"}, "much"),
        ("weighted_sum", None, "needs weights"),
        ("instruction_only", {"base": 1.0}, "base"),
        ("guarded_sum", {"execution": 0.5}, "execution.*least_execution"),
    ],
)
def test_wrong_names_and_weights_are_named(user_module, name, weights, named):
    with pytest.raises(ConfigError, match=named):
        resolve_reward(name, weights)


def test_a_reward_of_the_wrong_shape_is_an_error(user_module):
    with pytest.raises(ConfigError, match="one number a sample"):
        resolve_reward(f"{user_module}:constant")(SCORES, VALID)
