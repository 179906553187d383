"""From rewards to the optimality r of DiffusionNFT: group-relative advantages and their mapping to [0, 1].

A group is the K samples of one prompt (of one prompt and source image, for editing). Group ids may be any
integers. A sample whose judgement is missing is invalid: it enters no statistic and its advantage is 0.

One number a sample: these arrays are small, come from the host, and are not to be sharded (groups are sorted).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from firm_jax.errors import ConfigError
from firm_jax.typing import Array, Bool, Float, Int

STD_EPSILON = 1e-4

ADVANTAGE_MODES = ("all", "positive_only", "negative_only", "one_only", "binary")


class GroupStatistics(NamedTuple):
    """Statistics of the valid rewards of every group, one group a slot.

    As many slots as samples, so that shapes are static; those beyond the last group are empty.
    """

    slot: Int[Array, "M"]  # the slot of every sample's group: statistics.mean[statistics.slot] is per sample
    count: Int[Array, "M"]  # valid samples; 0 for an empty slot and for a group without a judgement
    mean: Float[Array, "M"]
    std: Float[Array, "M"]  # population; exactly 0 when all rewards are equal


@jax.jit  # one program instead of dozens: the devices would wait for each
def group_statistics(rewards: Float[Array, "M"], groups: Int[Array, "M"], valid: Bool[Array, "M"]) -> GroupStatistics:
    """Count, mean and population standard deviation of the valid rewards of each group."""
    rewards, samples = _clean(rewards, valid), rewards.shape[0]
    _, slot = jnp.unique(groups, size=samples, return_inverse=True)
    slot = slot.reshape(samples)

    def total(values: Array) -> Array:
        return jax.ops.segment_sum(values, slot, num_segments=samples)

    count = total(valid.astype(jnp.int32))
    mean = total(rewards) / jnp.maximum(count, 1)
    variance = total(jnp.where(valid, jnp.square(rewards - mean[slot]), 0.0)) / jnp.maximum(count, 1)
    lowest = jax.ops.segment_min(jnp.where(valid, rewards, jnp.inf), slot, num_segments=samples)
    highest = jax.ops.segment_max(jnp.where(valid, rewards, -jnp.inf), slot, num_segments=samples)
    # Rounding of the mean must not turn equal rewards into a tiny spread, and that into a large advantage.
    equal = highest <= lowest
    return GroupStatistics(
        slot, count, jnp.where(equal & (count > 0), lowest, mean), jnp.where(equal, 0.0, jnp.sqrt(variance))
    )


def advantages(
    rewards: Float[Array, "M"],
    groups: Int[Array, "M"],
    valid: Bool[Array, "M"] | None = None,
    *,
    global_std: bool = True,
) -> Float[Array, "M"]:
    """How much better each sample is than its group: `(R - mean_group) / (std + 1e-4)`.

    Args:
        rewards: all rewards of the epoch; those of invalid samples may be NaN.
        groups: the group of every sample, any integers.
        valid: which rewards exist; all if None.
        global_std: divide by the population standard deviation of all valid rewards of the epoch (FIRM,
            DiffusionNFT); otherwise by that of the sample's group (GRPO).

    Returns:
        Float32 advantages. Exactly 0 for invalid samples, and in groups whose valid rewards are all equal or
        fewer than two: such a group says nothing about what is better.
    """
    rewards = jnp.asarray(rewards)
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid, bool)
    return _advantages(rewards, jnp.asarray(groups), valid, global_std=global_std)


@partial(jax.jit, static_argnames="global_std")
def _advantages(rewards, groups, valid, *, global_std: bool):
    statistics = group_statistics(rewards, groups, valid)
    rewards = _clean(rewards, valid)
    group_std = statistics.std[statistics.slot]
    std = _masked_std(rewards, valid) if global_std else group_std
    relative = (rewards - statistics.mean[statistics.slot]) / (std + STD_EPSILON)
    return jnp.where(valid & (group_std > 0), relative, 0.0)


def advantage_to_r(advantages: Float[Array, "M"], *, clip: float = 5.0, mode: str = "all") -> Float[Array, "M"]:
    """The optimality r in [0, 1] of the NFT loss: `clip(A, -c, c) / (2 c) + 1/2` after the mode's transform.

    Args:
        advantages: of any shape.
        clip: c, above 0; an advantage of c gives r = 1.
        mode: `all` keeps the clipped advantage; `positive_only` and `negative_only` set the other sign to 0;
            `one_only` replaces it by 1 if positive, else 0; `binary` by its sign.

    Raises:
        ConfigError: for an unknown mode.
    """
    clipped = jnp.clip(advantages, -clip, clip)
    if mode == "positive_only":
        clipped = jnp.maximum(clipped, 0.0)
    elif mode == "negative_only":
        clipped = jnp.minimum(clipped, 0.0)
    elif mode == "one_only":
        clipped = jnp.where(clipped > 0, 1.0, 0.0)
    elif mode == "binary":
        clipped = jnp.sign(clipped)
    elif mode != "all":
        raise ConfigError(f"unknown advantage mode {mode!r}; use one of {', '.join(ADVANTAGE_MODES)}.")
    return jnp.clip(clipped / (2 * clip) + 0.5, 0.0, 1.0)


def zero_std_ratio(statistics: GroupStatistics) -> Float[Array, ""]:
    """Share of the groups with a judgement whose rewards are all equal, and which therefore teach nothing."""
    judged = statistics.count > 0
    return jnp.sum(judged & (statistics.std == 0)) / jnp.maximum(jnp.sum(judged), 1)


def mean_group_std(statistics: GroupStatistics) -> Float[Array, ""]:
    """The groups' standard deviations, averaged over the groups with a judgement."""
    return jnp.sum(statistics.std) / jnp.maximum(jnp.sum(statistics.count > 0), 1)


def solved(statistics: GroupStatistics, *, std_below: float = 0.05, mean_above: float = 0.9) -> Bool[Array, "M"]:
    """Which samples belong to a prompt that the policy has solved: all of its images good, and alike.

    Edit-R1 bans such prompts from later epochs. A single judged image is no evidence.
    """
    by_slot = (statistics.count > 1) & (statistics.std < std_below) & (statistics.mean > mean_above)
    return by_slot[statistics.slot]


def instructive(statistics: GroupStatistics, *, std_above: float = 0.05, mean_below: float = 0.9) -> Bool[Array, "M"]:
    """Which samples belong to a group worth a step when banning is on: spread out, and not yet good."""
    by_slot = (statistics.std > std_above) & (statistics.mean < mean_below)
    return by_slot[statistics.slot]


def _clean(rewards: Float[Array, "M"], valid: Bool[Array, "M"]) -> Float[Array, "M"]:
    rewards = jnp.asarray(rewards)
    rewards = rewards.astype(jnp.promote_types(rewards.dtype, jnp.float32))
    return jnp.where(valid, rewards, 0.0)


def _masked_std(values: Float[Array, "M"], valid: Bool[Array, "M"]) -> Float[Array, ""]:
    count = jnp.maximum(jnp.sum(valid), 1)
    mean = jnp.sum(values) / count  # invalid entries are already 0
    return jnp.sqrt(jnp.sum(jnp.where(valid, jnp.square(values - mean), 0.0)) / count)
