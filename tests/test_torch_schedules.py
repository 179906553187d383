"""The sigma schedules against diffusers' own scheduler, driven as its pipelines drive it."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from firm_jax.generation.schedules import qwen_image_sigmas, sd3_sigmas, sigmas_from_config  # noqa: E402

QWEN = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}


def mu_of(config: dict, tokens: int) -> float:
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    return calculate_shift(
        tokens,
        config["base_image_seq_len"],
        config["max_image_seq_len"],
        config["base_shift"],
        config["max_shift"],
    )


@pytest.mark.parametrize("steps", [1, 10, 28, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
def test_static_shift(steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(sd3_sigmas(steps, shift), scheduler.sigmas.numpy(), rtol=2e-7)
    np.testing.assert_allclose(sigmas_from_config(dict(scheduler.config), steps), scheduler.sigmas, rtol=2e-7)


@pytest.mark.parametrize(("steps", "tokens"), [(6, 1024), (15, 1024), (50, 4000), (28, 100)])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [0.02, None])
def test_dynamic_shift_over_the_pipeline_s_sigmas(steps, tokens, kind, terminal):
    config = QWEN | {"time_shift_type": kind, "shift_terminal": terminal}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu_of(config, tokens))
    ours = sigmas_from_config(dict(scheduler.config), steps, tokens, linear_base=True)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=1e-6)  # theirs passes through float32
    if kind == "exponential":
        named = qwen_image_sigmas(steps, tokens, terminal=terminal)
        np.testing.assert_array_equal(named, ours)


def test_dynamic_shift_over_the_scheduler_s_own_range():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**QWEN)
    scheduler.set_timesteps(12, mu=mu_of(QWEN, 600))
    np.testing.assert_allclose(sigmas_from_config(dict(scheduler.config), 12, 600), scheduler.sigmas, rtol=1e-6)
