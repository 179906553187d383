"""Advantages, their mapping to r, and group statistics against worked examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from firm_jax.errors import ConfigError
from firm_jax.rl.advantages import (
    advantage_to_r,
    advantages,
    group_statistics,
    instructive,
    mean_group_std,
    solved,
    zero_std_ratio,
)


def by_definition(rewards, groups, valid, global_std=True):
    """The definition, one group at a time, in float64."""
    rewards, result = np.asarray(rewards, np.float64), np.zeros(len(rewards))
    for group in set(groups[valid]):
        members = valid & (groups == group)
        std = rewards[valid if global_std else members].std()
        result[members] = (rewards[members] - rewards[members].mean()) / (std + 1e-4)
    return result


@pytest.mark.parametrize("global_std", [True, False])
def test_against_the_definition(global_std):
    rng = np.random.default_rng(0)
    rewards, groups = rng.uniform(size=60).astype(np.float32), rng.integers(-5, 5, 60) * 1000
    valid = rng.uniform(size=60) > 0.2
    rewards[~valid] = np.nan
    result = jax.jit(advantages, static_argnames="global_std")(rewards, groups, valid, global_std=global_std)
    np.testing.assert_allclose(result, by_definition(rewards, groups, valid, global_std), rtol=1e-4, atol=1e-6)


def test_worked_example():
    rewards = jnp.array([0.0, 1.0, 0.5, 0.5])
    std = np.sqrt(2 * 0.25 / 4)
    expected = [-0.5 / (std + 1e-4), 0.5 / (std + 1e-4), 0, 0]
    np.testing.assert_allclose(advantages(rewards, jnp.array([3, 3, 8, 8])), expected, rtol=1e-6)


@pytest.mark.fault("equal-rewards")
def test_equal_rewards_give_exactly_zero():
    # Twelve times 0.7 does not average to 0.7 in float32; the groups' own std of 0 must not enlarge that.
    rewards = jnp.concatenate([jnp.full(12, 0.7), jnp.full(7, 0.1), jnp.array([0.2, 0.9])])
    groups = jnp.array([0] * 12 + [1] * 7 + [2] * 2)
    for global_std in (True, False):
        result = advantages(rewards, groups, jnp.ones(21, bool), global_std=global_std)
        assert np.all(np.asarray(result[:19]) == 0)
        assert result[19] < 0 < result[20]


@pytest.mark.fault("missing-reward")
def test_invalid_samples_and_lone_survivors_are_zero_and_change_nothing():
    rewards, groups = jnp.array([0.1, 0.9, 0.4, 0.7]), jnp.array([0, 0, 1, 1])
    valid = jnp.array([True, True, True, False])
    result = advantages(rewards, groups, valid)
    np.testing.assert_array_equal(result[2:], [0, 0])
    np.testing.assert_array_equal(result, advantages(rewards.at[3].set(jnp.nan), groups, valid))
    np.testing.assert_array_equal(advantages(rewards, groups, jnp.zeros(4, bool)), np.zeros(4))


@pytest.mark.fault("missing-reward")
@pytest.mark.parametrize("global_std", [True, False])
def test_a_group_without_rewards_is_as_one_that_was_never_drawn(global_std):
    rng = np.random.default_rng(3)
    rewards, groups = rng.uniform(size=24).astype(np.float32), np.repeat(np.arange(6), 4)
    lost = groups == 2
    rewards[lost] = np.nan
    result = advantages(rewards, groups, ~lost, global_std=global_std)
    assert np.all(np.asarray(result[lost]) == 0)
    alone = advantages(rewards[~lost], groups[~lost], global_std=global_std)
    np.testing.assert_allclose(result[~lost], alone, rtol=1e-6)


@pytest.mark.fault("equal-rewards")
@pytest.mark.parametrize("mode", ["all", "positive_only", "negative_only", "binary"])
def test_rewards_that_are_equal_throughout_an_epoch_ask_for_nothing(mode):
    result = advantages(jnp.full(12, 0.7), jnp.repeat(jnp.arange(3), 4))
    np.testing.assert_array_equal(result, np.zeros(12))
    np.testing.assert_array_equal(advantage_to_r(result, mode=mode), np.full(12, 0.5))


def test_means_are_per_group_whatever_the_level():
    rewards, groups = jnp.array([0.0, 0.2, 0.8, 1.0]), jnp.array([0, 0, 1, 1])
    result = advantages(rewards, groups)
    np.testing.assert_allclose(result[:2], result[2:], rtol=1e-5)


def test_low_precision_rewards_are_averaged_in_float32():
    rewards = jnp.linspace(0, 1, 16).astype(jnp.bfloat16)
    result = advantages(rewards, jnp.zeros(16, int))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, by_definition(rewards, np.zeros(16), np.ones(16, bool)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [0.0, 0.0, 0.4, 0.5, 0.7, 1.0]),
        ("positive_only", [0.5, 0.5, 0.5, 0.5, 0.7, 1.0]),
        ("negative_only", [0.0, 0.0, 0.4, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.4, 0.5, 0.6, 0.6]),
    ],
)
def test_the_five_modes(mode, expected):
    values = jnp.array([-9.0, -5.0, -1.0, 0.0, 2.0, 6.0])
    result = jax.jit(advantage_to_r, static_argnames="mode")(values, mode=mode)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_the_clip_sets_the_scale():
    np.testing.assert_allclose(advantage_to_r(jnp.array([-1.0, 0.5, 3.0]), clip=2.0), [0.25, 0.625, 1.0])
    # A narrow clip leaves one_only above 1; r stays a probability.
    np.testing.assert_allclose(advantage_to_r(jnp.array([3.0]), clip=0.5, mode="one_only"), [1.0])


def test_an_unknown_mode_is_named():
    with pytest.raises(ConfigError, match="sometimes"):
        advantage_to_r(jnp.zeros(1), mode="sometimes")


def test_group_statistics_and_what_is_read_from_them():
    rewards = jnp.array([0.95, 1.0, 0.2, 0.8, 0.5, 0.5, 0.97, jnp.nan, jnp.nan])
    groups = jnp.array([40, 40, -2, -2, 7, 7, 9, 9, 11])
    valid = jnp.isfinite(rewards)
    statistics = jax.jit(group_statistics)(rewards, groups, valid)
    per_sample = [statistics.count, statistics.mean, statistics.std]
    count, mean, std = (np.asarray(values[statistics.slot]) for values in per_sample)
    np.testing.assert_array_equal(count, [2, 2, 2, 2, 2, 2, 1, 1, 0])
    np.testing.assert_allclose(mean[:8], [0.975, 0.975, 0.5, 0.5, 0.5, 0.5, 0.97, 0.97], rtol=1e-6)
    np.testing.assert_allclose(std, [0.025, 0.025, 0.3, 0.3, 0, 0, 0, 0, 0], rtol=1e-4)
    # Groups 7 and 9 teach nothing, of the four with a judgement.
    np.testing.assert_allclose(zero_std_ratio(statistics), 0.5)
    np.testing.assert_allclose(mean_group_std(statistics), (0.025 + 0.3) / 4, rtol=1e-4)
    np.testing.assert_array_equal(solved(statistics), [True, True] + [False] * 7)
    np.testing.assert_array_equal(instructive(statistics), [False, False, True, True] + [False] * 5)


@pytest.mark.fault("missing-reward")
def test_no_judgement_at_all():
    statistics = group_statistics(jnp.full(3, jnp.nan), jnp.zeros(3, int), jnp.zeros(3, bool))
    assert zero_std_ratio(statistics) == 0 and mean_group_std(statistics) == 0
    assert np.all(np.isfinite(np.concatenate([np.asarray(part) for part in statistics])))
