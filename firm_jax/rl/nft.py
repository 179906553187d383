"""DiffusionNFT (arXiv 2509.16117): policy optimisation on the forward process of a rectified flow.

Three policies share one network: the trained one, the slowly following old one that makes the rollouts, and
the reference. A rollout is noised again, and the velocity is pulled towards it (positive branch) or away
from it (negative branch) in proportion to its reward. No likelihood and no sampling chain is needed.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

from firm_jax.errors import ConfigError
from firm_jax.typing import Array, Bool, Float

Tree = TypeVar("Tree")

SMALLEST_ERROR = 1e-5  # floor of the self-normalising denominator, in latent units


def nft_loss(
    v: Float[Array, "B ..."],
    v_old: Float[Array, "B ..."],
    v_ref: Float[Array, "B ..."],
    x_t: Float[Array, "B ..."],
    x0: Float[Array, "B ..."],
    t: Float[Array, "B"],
    r: Float[Array, "B"],
    *,
    beta: float,
    scale: float,
    kl_weight: float,
    valid: Bool[Array, "B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The DiffusionNFT loss in its self-normalised image-space form.

    The implicit policies `v+ = beta v + (1 - beta) v_old` and `v- = (1 + beta) v_old - beta v` predict the
    images `x_t - t v+-`, whose squared errors, each divided by that sample's mean absolute error, are
    weighted by r and 1 - r:

        policy = scale * mean[(r L+ + (1 - r) L-) / beta]
        loss   = policy + kl_weight * mean |v - v_ref|^2

    Only `v` receives a gradient. At `v = v_old` the gradient of the policy term is `2 r - 1` times that of
    the positive branch alone, and it vanishes at `r = 1/2`.

    Everything is computed in float32, whatever the dtype of the arguments. (The authors take the
    normaliser in float64; it is a mean of magnitudes, which float32 holds to about 1e-7 relative.)

    Args:
        v: velocity of the trained policy at `x_t`, `[B, ...]`.
        v_old: velocity of the policy that made the rollout.
        v_ref: velocity of the reference policy.
        x_t: noised rollouts.
        x0: the rollouts.
        t: noise share of `x_t`, in (0, 1].
        r: optimality of every sample, in [0, 1], from `advantage_to_r`.
        beta: strength of the guidance, above 0.
        scale: factor of the policy term; the advantage clip (5) in the published recipes.
        kl_weight: factor of the distance to the reference.
        valid: which samples count; all if None. Means are sums over these divided by their number, and 0
            if there are none. `r` of the others may be anything, NaN included.

    Returns:
        The loss, and its parts under the names they have in metrics: `loss/total`, `loss/policy`,
        `loss/policy_unscaled` (before `scale`), `policy/kl` (mean squared distance to the reference, before
        `kl_weight`), `policy/old_deviation` (the same to the old policy), `rollout/x0_norm` (mean square).
    """
    v, x_t, x0, t, r = (jnp.asarray(array, jnp.float32) for array in (v, x_t, x0, t, r))
    v_old, v_ref = (jax.lax.stop_gradient(jnp.asarray(array, jnp.float32)) for array in (v_old, v_ref))
    valid = jnp.ones(r.shape, bool) if valid is None else valid
    r = jnp.where(valid, r, 0.5)

    noise_share = _per_sample(t, v.ndim)
    v_positive = beta * v + (1 - beta) * v_old
    v_negative = (1 + beta) * v_old - beta * v
    positive = self_normalised_error(x_t - noise_share * v_positive, x0)
    negative = self_normalised_error(x_t - noise_share * v_negative, x0)

    policy_unscaled = _masked_mean((r * positive + (1 - r) * negative) / beta, valid)
    policy = scale * policy_unscaled
    kl = _masked_mean(_sample_mean(jnp.square(v - v_ref)), valid)
    loss = policy + kl_weight * kl
    return loss, {
        "loss/total": loss,
        "loss/policy": policy,
        "loss/policy_unscaled": policy_unscaled,
        "policy/kl": kl,
        "policy/old_deviation": _masked_mean(_sample_mean(jnp.square(v - v_old)), valid),
        "rollout/x0_norm": _masked_mean(_sample_mean(jnp.square(x0)), valid),
    }


def self_normalised_error(prediction: Float[Array, "B ..."], x0: Float[Array, "B ..."]) -> Float[Array, "B"]:
    """Mean squared error of each sample over its mean absolute error, the latter without gradient."""
    error = prediction - x0
    magnitude = jnp.maximum(_sample_mean(jnp.abs(error)), SMALLEST_ERROR)
    return _sample_mean(jnp.square(error)) / jax.lax.stop_gradient(magnitude)


def old_policy_decay(step: Array | int, decay_type: int) -> Float[Array, ""]:
    """How much of the old policy is kept after `step` optimizer steps.

    Type 0: nothing, the old policy is the trained one. Type 1: `min(0.001 step, 0.5)`. Type 2: nothing for
    75 steps, then `min(0.0075 (step - 75), 0.999)`.

    Raises:
        ConfigError: for another type.
    """
    step = jnp.asarray(step, jnp.float32)
    if decay_type == 0:
        return jnp.zeros_like(step)
    if decay_type == 1:
        return jnp.minimum(0.001 * step, 0.5)
    if decay_type == 2:
        return jnp.clip(0.0075 * (step - 75), 0.0, 0.999)
    raise ConfigError(f"unknown decay type {decay_type!r} of the old policy; use 0, 1 or 2.")


def ema_decay(step: Array | int, cap: float) -> Float[Array, ""]:
    """How much of the averaged weights is kept at `step`, from 1: `min((1 + step) / (10 + step), cap)`."""
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum((1 + step) / (10 + step), cap)


def mix(kept: Tree, new: Tree, decay: Array | float) -> Tree:
    """`decay * kept + (1 - decay) * new`, leaf by leaf: the step of the old policy and of the average."""
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, kept, new)


def _per_sample(values: Float[Array, "B"], ndim: int) -> Float[Array, "B ..."]:
    return jnp.reshape(values, (-1,) + (1,) * (ndim - 1))


def _sample_mean(array: Float[Array, "B ..."]) -> Float[Array, "B"]:
    return jnp.mean(array, axis=tuple(range(1, array.ndim)))


def _masked_mean(values: Float[Array, "B"], valid: Bool[Array, "B"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
