"""The solvers on flows whose solution is known, and against their equations written out step by step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from firm_jax.errors import ConfigError
from firm_jax.generation.schedules import qwen_image_sigmas, sd3_sigmas
from firm_jax.generation.solvers import integrate

NOISE = jax.random.normal(jax.random.key(1), (3, 5, 2))
DATA_STD, DATA_MEAN = 0.5, 2.0


def gaussian_velocity(x, sigma):
    """The exact velocity E[noise - image | x] when images are normal with DATA_MEAN and DATA_STD."""
    variance = (1 - sigma) ** 2 * DATA_STD**2 + sigma**2
    centred = x - (1 - sigma) * DATA_MEAN
    image = DATA_MEAN + (1 - sigma) * DATA_STD**2 / variance * centred
    noise = sigma / variance * centred
    return noise - image


EXACT = DATA_MEAN + DATA_STD * NOISE  # the end of the flow's path from NOISE


def dpm2_by_the_paper(velocity_fn, x, sigmas):
    """DPM-Solver++ 2M in its published form, in float64, with IEEE infinities at the ends."""
    x, sigmas = np.asarray(x, np.float64), np.asarray(sigmas, np.float64)
    with np.errstate(divide="ignore"):
        log_snr = np.log((1 - sigmas) / sigmas)
    before = None
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        image = x - s * velocity_fn(x, s)
        if t == 0:
            return image
        h = log_snr[i + 1] - log_snr[i]
        change = np.expm1(-h) if np.isfinite(h) else -1.0
        correction = 0.0
        if before is not None:
            r0 = (log_snr[i] - log_snr[i - 1]) / h
            correction = (image - before) / (2 * r0)
        x = (t / s) * x - (1 - t) * change * (image + correction)
        before = image
    raise AssertionError("the schedule must end in 0")


@pytest.mark.parametrize("sigmas", [sd3_sigmas(10), qwen_image_sigmas(6, 1024), sd3_sigmas(3)[1:], sd3_sigmas(1)])
def test_dpm2_is_the_published_algorithm(sigmas):
    expected = dpm2_by_the_paper(gaussian_velocity, NOISE, sigmas)
    np.testing.assert_allclose(integrate(gaussian_velocity, NOISE, sigmas), expected, rtol=1e-5, atol=1e-5)


def test_dpm2_leaves_euler_only_after_the_second_step():
    """Step 0 has no earlier prediction, step 1 an infinitely long earlier step, the last an infinitely long one."""
    assert jnp.allclose(
        integrate(gaussian_velocity, NOISE, sd3_sigmas(3), solver="dpm2"),
        integrate(gaussian_velocity, NOISE, sd3_sigmas(3), solver="euler"),
        atol=1e-5,
    )
    four = [integrate(gaussian_velocity, NOISE, sd3_sigmas(4), solver=solver) for solver in ("dpm2", "euler")]
    assert not jnp.allclose(*four, atol=1e-3)


def test_euler_is_the_sum_of_its_steps():
    sigmas = np.asarray(sd3_sigmas(7))
    x = np.asarray(NOISE)
    for s, t in itertools.pairwise(sigmas):
        x = x + (t - s) * gaussian_velocity(x, s)
    np.testing.assert_allclose(integrate(gaussian_velocity, NOISE, sigmas, solver="euler"), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "dpm2"])
def test_a_straight_flow_is_followed_exactly(solver):
    image = jnp.full_like(NOISE, 0.25)
    result = integrate(lambda x, sigma: NOISE - image, NOISE, sd3_sigmas(4), solver=solver)
    np.testing.assert_allclose(result, image, atol=1e-5)


def test_orders_of_convergence():
    """Twice the steps halve Euler's error and quarter that of dpm2, on a path strictly inside (0, 1)."""
    first, last = 0.7, 0.1

    def on_the_path(sigma):
        return (1 - sigma) * DATA_MEAN + jnp.sqrt((1 - sigma) ** 2 * DATA_STD**2 + sigma**2) * NOISE

    def error(solver, steps):
        sigmas = jnp.append(jnp.linspace(first, last, steps + 1), 0.0)
        result = integrate(gaussian_velocity, on_the_path(first), sigmas, solver=solver)
        # The final step to 0 returns the image seen from the last sigma, whatever the solver.
        return jnp.abs(result - (on_the_path(last) - last * gaussian_velocity(on_the_path(last), last))).max()

    assert 1.7 < error("euler", 16) / error("euler", 32) < 2.4
    assert 3.4 < error("dpm2", 16) / error("dpm2", 32) < 4.4
    assert error("dpm2", 32) < 0.1 * error("euler", 32)


def test_sde_is_flow_grpo_s_formula():
    sigmas, level, key = np.asarray(sd3_sigmas(4), np.float64), 0.7, jax.random.key(5)
    keys = [jax.random.fold_in(key, sample) for sample in range(NOISE.shape[0])]
    x = np.asarray(NOISE, np.float64)
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        drawn = np.stack([jax.random.normal(jax.random.fold_in(k, i), NOISE.shape[1:]) for k in keys])
        std, dt, v = level * np.sqrt(s / (1 - (sigmas[1] if s == 1 else s))), t - s, gaussian_velocity(x, s)
        mean = x * (1 + std**2 * dt / (2 * s)) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
        x = mean + std * np.sqrt(-dt) * drawn
    result = integrate(gaussian_velocity, NOISE, jnp.asarray(sigmas), solver="sde", key=key, noise_level=level)
    np.testing.assert_allclose(result, x, rtol=1e-4, atol=1e-5)


def test_sde_without_noise_is_euler():
    arguments = (gaussian_velocity, NOISE, sd3_sigmas(5))
    quiet = integrate(*arguments, solver="sde", key=jax.random.key(0), noise_level=0.0)
    np.testing.assert_allclose(quiet, integrate(*arguments, solver="euler"), atol=1e-6)


def test_sde_keeps_the_distribution_of_the_data():
    noise = jax.random.normal(jax.random.key(2), (4000, 1))
    samples = integrate(gaussian_velocity, noise, sd3_sigmas(60), solver="sde", key=jax.random.key(3))
    assert abs(samples.mean() - DATA_MEAN) < 0.03
    assert abs(samples.std() - DATA_STD) < 0.05


def test_a_stochastic_sample_does_not_depend_on_its_batch():
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(9), jnp.arange(3))
    whole = integrate(gaussian_velocity, NOISE, sd3_sigmas(4), solver="sde", key=keys)
    alone = integrate(gaussian_velocity, NOISE[2:], sd3_sigmas(4), solver="sde", key=keys[2:])
    np.testing.assert_allclose(whole[2:], alone, atol=1e-6)
    assert not jnp.allclose(whole[0] - EXACT[0], whole[1] - EXACT[1], atol=1e-2)
    raw = integrate(gaussian_velocity, NOISE, sd3_sigmas(4), solver="sde", key=jax.random.key_data(keys))
    np.testing.assert_array_equal(whole, raw)


def test_sigma_values_do_not_recompile():
    traces = []

    @jax.jit
    def sample(noise, sigmas):
        traces.append(sigmas.shape)
        return integrate(gaussian_velocity, noise, sigmas)

    sample(NOISE, sd3_sigmas(4)), sample(NOISE, sd3_sigmas(4, shift=2.0)), sample(NOISE, sd3_sigmas(5))
    assert traces == [(5,), (6,)]


def test_low_precision_networks_and_noise_are_integrated_in_float32():
    seen = []

    def velocity(x, sigma):
        seen.append((x.dtype, sigma.dtype, sigma.shape))
        return gaussian_velocity(x, sigma).astype(jnp.bfloat16)

    for solver in ("euler", "dpm2", "sde"):
        result = integrate(velocity, NOISE.astype(jnp.bfloat16), sd3_sigmas(3), solver=solver, key=jax.random.key(0))
        assert result.dtype == jnp.float32
    assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"), ())}


def test_wrong_use_is_named():
    with pytest.raises(ConfigError, match="dpm3"):
        integrate(gaussian_velocity, NOISE, sd3_sigmas(3), solver="dpm3")
    with pytest.raises(ConfigError, match="key"):
        integrate(gaussian_velocity, NOISE, sd3_sigmas(3), solver="sde")
    with pytest.raises(ConfigError, match="3 samples"):
        integrate(gaussian_velocity, NOISE, sd3_sigmas(3), solver="sde", key=jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ConfigError, match="at least one step"):
        integrate(gaussian_velocity, NOISE, jnp.zeros(1))
