"""The sigma schedules against the published tables, and the reader of scheduler configurations."""

import numpy as np
import pytest

from firm_jax.errors import ConfigError
from firm_jax.generation.schedules import qwen_image_sigmas, sd3_sigmas, sigmas_from_config

SD3_TEN = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0]
QWEN_SIX = [1, 0.862482, 0.702794, 0.515106, 0.291343, 0.02, 0]
KONTEXT_SIX = [1, 0.903736, 0.789705, 0.652489, 0.484218, 0.273003, 0]

SD3_CONFIG = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.29.0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
QWEN_CONFIG = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}


def test_sd3_table():
    np.testing.assert_allclose(sd3_sigmas(10), SD3_TEN, atol=1e-6)
    forty = np.asarray(sd3_sigmas(40))
    assert forty.shape == (41,)
    np.testing.assert_allclose(forty[[0, 1, 38, 39, 40]], [1, 0.991331, 0.081046, 0.008929, 0], atol=1e-6)


def test_qwen_image_tables():
    np.testing.assert_allclose(qwen_image_sigmas(6, 1024), QWEN_SIX, atol=1e-6)
    fifteen = np.asarray(qwen_image_sigmas(15, 1024))
    np.testing.assert_allclose(fifteen[[0, 1, 2]], [1, 0.955989, 0.909391], atol=1e-6)
    np.testing.assert_allclose(fifteen[-4:], [0.229958, 0.12954, 0.02, 0], atol=1e-6)


def test_kontext_table_from_its_configuration():
    config = {"use_dynamic_shifting": True, "max_shift": 1.15, "max_image_seq_len": 4096}
    np.testing.assert_allclose(sigmas_from_config(config, 6, 1024, linear_base=True), KONTEXT_SIX, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 28])
def test_every_schedule_descends_from_one_to_zero(steps):
    for sigmas in (sd3_sigmas(steps), qwen_image_sigmas(steps, 777), sigmas_from_config(SD3_CONFIG, steps)):
        assert sigmas.shape == (steps + 1,)
        assert sigmas[0] == 1 and sigmas[-1] == 0
        assert np.all(np.diff(sigmas) < 0)


def test_configurations_give_the_named_schedules():
    np.testing.assert_array_equal(sigmas_from_config(SD3_CONFIG, 10), sd3_sigmas(10))
    np.testing.assert_array_equal(
        sigmas_from_config(QWEN_CONFIG, 6, 1024, linear_base=True), qwen_image_sigmas(6, 1024)
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"time_shift_type": "cubic"}, "cubic"),
        ({"rho": 7}, "rho"),
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({"use_dynamic_shifting": True}, "image_tokens"),
    ],
)
def test_what_would_change_the_schedule_unseen_is_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        sigmas_from_config(SD3_CONFIG | change, 10)


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_is_an_error(steps):
    with pytest.raises(ConfigError, match="at least 1 step"):
        sd3_sigmas(steps)
    with pytest.raises(ConfigError, match="at least 1 step"):
        qwen_image_sigmas(steps, 1024)
