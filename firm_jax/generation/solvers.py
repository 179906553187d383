"""Solvers of the sampling equation of rectified flows: from noise at the first sigma to an image at sigma 0.

A network predicts the velocity `v = noise - image`; at noise share `s` its view of the finished image is
`x - s * v`. All solvers are one `lax.scan` over the schedule. The sigmas are an array argument: other
values reuse the compiled program, another number of steps makes a new one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from firm_jax.errors import ConfigError
from firm_jax.typing import Array, Float, PRNGKeyArray

VelocityFn = Callable[[Array, Array], Array]

SOLVERS = ("euler", "dpm2", "sde")


def integrate(
    velocity_fn: VelocityFn,
    noise: Float[Array, "B ..."],
    sigmas: Float[Array, "steps+1"],
    *,
    solver: str = "dpm2",
    key: PRNGKeyArray | None = None,
    noise_level: float = 0.7,
) -> Float[Array, "B ..."]:
    """Follows the flow from `noise` at `sigmas[0]` to sigma 0.

    Args:
        velocity_fn: `(x, sigma) -> velocity`, with x float32 of the shape of `noise` and sigma a float32
            scalar. The network's own dtype is the function's business.
        noise: what to start from, `[B, ...]`.
        sigmas: descending, `steps + 1` of them, the last 0.
        solver: `euler` (first order), `dpm2` (DPM-Solver++ 2M, second order, the rollout solver of
            DiffusionNFT) or `sde` (Flow-GRPO's stochastic Euler).
        key: for `sde` only. One key, from which sample i takes `fold_in(key, i)`; or one key a sample, `[B]`,
            so that a sample does not depend on which others share its batch.
        noise_level: for `sde` only, the scale of its noise; 0 gives `euler`.

    Returns:
        Float32 samples at sigma 0, of the shape of `noise`. State and updates are float32 throughout.

    Raises:
        ConfigError: for an unknown solver, `sde` without a key, or fewer than two sigmas.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver {solver!r}; use one of {', '.join(SOLVERS)}.")
    x, sigmas = jnp.asarray(noise, jnp.float32), jnp.asarray(sigmas, jnp.float32)
    if sigmas.ndim != 1 or sigmas.shape[0] < 2:
        raise ConfigError(f"sigmas must have shape [steps + 1] with at least one step, not {list(sigmas.shape)}.")
    if solver == "dpm2":
        return _integrate_dpm2(velocity_fn, x, sigmas)
    if solver == "euler":
        return _integrate_euler(velocity_fn, x, sigmas)
    if key is None:
        raise ConfigError("solver 'sde' draws noise at every step and needs a random key; pass key=.")
    return _integrate_sde(velocity_fn, x, sigmas, _per_sample_keys(key, x.shape[0]), noise_level)


def euler_step(x: Array, velocity: Array, sigma: Array, sigma_next: Array) -> Array:
    """`x + (sigma_next - sigma) * v`: exact along a straight path."""
    return x + (sigma_next - sigma) * velocity


def dpm2_step(
    x: Array, image: Array, image_before: Array, sigma: Array, sigma_next: Array, second_order: Array
) -> Array:
    """One DPM-Solver++ 2M step on image predictions (arXiv 2211.01095, algorithm 2, closed form).

    `x' = (t / s) x + (1 - t / s) [m0 + c (m0 - m1)]` with m0, m1 the image predicted at this and at the
    previous sigma and `c = second_order` from `dpm2_coefficients`; `c = 0` is an Euler step.
    """
    ratio = sigma_next / sigma
    return ratio * x + (1 - ratio) * (image + second_order * (image - image_before))


def dpm2_coefficients(sigmas: Float[Array, "steps+1"]) -> Float[Array, "steps"]:
    """The weight of the second-order correction at every step: `h / (2 h0)`.

    h and h0 are this and the previous step's lengths in the half log signal-to-noise ratio,
    `lambda = ln((1 - sigma) / sigma)`. The first step has no previous prediction; the step after sigma 1
    has an infinite previous length; the step to sigma 0 is infinitely long and returns the prediction
    itself. These three are stated as zeros, not left to the arithmetic of infinities.
    """
    interior = (sigmas > 0) & (sigmas < 1)
    inside = jnp.where(interior, sigmas, 0.5)
    log_snr = jnp.log1p(-inside) - jnp.log(inside)
    lengths = jnp.diff(log_snr)
    previous = jnp.where(lengths[:-1] == 0, 1.0, lengths[:-1])
    usable = interior[:-2] & interior[1:-1] & interior[2:]
    return jnp.concatenate([jnp.zeros(1), jnp.where(usable, lengths[1:] / (2 * previous), 0.0)])


def sde_noise_scale(sigmas: Float[Array, "steps+1"], noise_level: float) -> Float[Array, "steps"]:
    """Flow-GRPO's diffusion coefficient (arXiv 2505.05470): `noise_level * sqrt(s / (1 - s))`.

    At sigma 1, where that is infinite, the denominator is taken at the second sigma.
    """
    sigma = sigmas[:-1]
    denominator = 1 - jnp.where(sigma == 1, sigmas[1], sigma)
    return noise_level * jnp.sqrt(sigma / denominator)


def sde_step(x: Array, velocity: Array, noise: Array, sigma: Array, sigma_next: Array, scale: Array) -> Array:
    """One step of the stochastic process with the marginals of the flow (Flow-GRPO)."""
    step = sigma_next - sigma
    drift = scale**2 / (2 * sigma) * (x + (1 - sigma) * velocity)
    return x + (velocity + drift) * step + scale * jnp.sqrt(-step) * noise


def _integrate_euler(velocity_fn: VelocityFn, x: Array, sigmas: Array) -> Array:
    def step(x, inputs):
        sigma, sigma_next = inputs
        return euler_step(x, velocity_fn(x, sigma).astype(jnp.float32), sigma, sigma_next), None

    return jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))[0]


def _integrate_dpm2(velocity_fn: VelocityFn, x: Array, sigmas: Array) -> Array:
    def step(carry, inputs):
        x, image_before = carry
        sigma, sigma_next, second_order = inputs
        image = x - sigma * velocity_fn(x, sigma).astype(jnp.float32)
        return (dpm2_step(x, image, image_before, sigma, sigma_next, second_order), image), None

    # The first step's weight is zero, so any finite array may stand for the missing earlier prediction.
    inputs = (sigmas[:-1], sigmas[1:], dpm2_coefficients(sigmas))
    return jax.lax.scan(step, (x, x), inputs)[0][0]


def _integrate_sde(velocity_fn: VelocityFn, x: Array, sigmas: Array, keys: Array, noise_level: float) -> Array:
    def step(x, inputs):
        index, sigma, sigma_next, scale = inputs
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), x.shape[1:]))(keys)
        return sde_step(x, velocity_fn(x, sigma).astype(jnp.float32), noise, sigma, sigma_next, scale), None

    steps = jnp.arange(sigmas.shape[0] - 1)
    return jax.lax.scan(step, x, (steps, sigmas[:-1], sigmas[1:], sde_noise_scale(sigmas, noise_level)))[0]


def _per_sample_keys(key: PRNGKeyArray, batch: int) -> PRNGKeyArray:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ConfigError(f"solver 'sde' needs one key or one a sample: {batch} samples, keys {list(key.shape)}.")
    return key
