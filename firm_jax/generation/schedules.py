"""Noise schedules of rectified-flow samplers: the sigmas a rollout steps through, from 1 (noise) to 0 (image).

A sigma is the share of noise in `x = (1 - sigma) * image + sigma * noise`; the timestep a network is given
is `num_train_timesteps * sigma`. Schedules are computed once, outside jit, in float64 and handed over as
float32 arrays, which makes them equal to diffusers' `FlowMatchEulerDiscreteScheduler` to the last bits.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from firm_jax.errors import ConfigError
from firm_jax.typing import Array, Float

# The fields of a FlowMatchEulerDiscreteScheduler configuration, with the values diffusers assumes for absent ones.
SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}
UNSUPPORTED_WHEN_TRUE = (
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


def static_shift(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Moves sigmas towards noise by a fixed factor: `shift * s / (1 + (shift - 1) * s)` (SD3 paper, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_shift(sigmas: np.ndarray, mu: float, kind: str = "exponential") -> np.ndarray:
    """Moves sigmas in (0, 1] towards noise by a factor that grows with the image: `e^mu`, or `mu` if `linear`."""
    factor = np.exp(mu) if kind == "exponential" else mu
    return factor / (factor + (1 / sigmas - 1))


def resolution_mu(image_tokens: int, base_shift: float, max_shift: float, base_tokens: int, max_tokens: int) -> float:
    """The shift exponent of an image of that many tokens, on the line through the two given points."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (image_tokens - base_tokens)


def stretch_to_terminal(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """Stretches a descending schedule that starts at 1 so that its last sigma is `terminal`."""
    if sigmas[-1] == 1:  # a single step: the first sigma is also the last, and stays at pure noise
        return sigmas
    return 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])


def sd3_sigmas(steps: int, shift: float = 3.0, num_train_timesteps: int = 1000) -> Float[Array, "steps+1"]:
    """The schedule of Stable Diffusion 3 and 3.5.

    The shift acts twice: once on the training schedule, whose smallest sigma ends the evenly spaced
    sequence, and once on that sequence.

    Args:
        steps: number of network evaluations, at least 1.
        shift: static shift; 3 in every published SD3 checkpoint.
        num_train_timesteps: length of the training schedule; 1 / this is its smallest unshifted sigma.

    Returns:
        `steps + 1` float32 sigmas, descending from 1 to exactly 0.

    Raises:
        ConfigError: if `steps` is below 1.
    """
    _check_steps(steps)
    smallest = static_shift(np.float64(1 / num_train_timesteps), shift)
    return _finished(static_shift(np.linspace(1.0, smallest, steps), shift))


def qwen_image_sigmas(
    steps: int,
    image_tokens: int,
    *,
    base_shift: float = 0.5,
    max_shift: float = 0.9,
    base_tokens: int = 256,
    max_tokens: int = 8192,
    terminal: float | None = 0.02,
) -> Float[Array, "steps+1"]:
    """The schedule of Qwen-Image and Qwen-Image-Edit: evenly spaced, shifted by resolution, stretched.

    Args:
        steps: number of network evaluations, at least 1.
        image_tokens: tokens of the generated image, `(H / 16) * (W / 16)`; 1024 at 512 x 512.
        base_shift: shift exponent at `base_tokens`.
        max_shift: shift exponent at `max_tokens`.
        base_tokens: see `base_shift`.
        max_tokens: see `max_shift`.
        terminal: the last sigma before 0, or None to leave the shifted schedule as it is.

    Returns:
        `steps + 1` float32 sigmas, descending from 1 to exactly 0.

    Raises:
        ConfigError: if `steps` is below 1.
    """
    _check_steps(steps)
    mu = resolution_mu(image_tokens, base_shift, max_shift, base_tokens, max_tokens)
    sigmas = dynamic_shift(np.linspace(1.0, 1 / steps, steps), mu)
    return _finished(sigmas if terminal is None else stretch_to_terminal(sigmas, terminal))


def sigmas_from_config(
    config: Mapping[str, Any], steps: int, image_tokens: int | None = None, *, linear_base: bool = False
) -> Float[Array, "steps+1"]:
    """The schedule that a diffusers pipeline folder asks for in `scheduler/scheduler_config.json`.

    Args:
        config: that file's content. Absent fields have diffusers' defaults.
        steps: number of network evaluations, at least 1.
        image_tokens: tokens of the generated image; needed when the configuration shifts by resolution.
        linear_base: whether the pipeline spaces `1 ... 1 / steps` evenly itself, as Qwen-Image and FLUX do.
            Otherwise the scheduler spaces its own training range, as in the SD3 pipelines.

    Returns:
        `steps + 1` float32 sigmas, descending from 1 to exactly 0.

    Raises:
        ConfigError: for another scheduler class, a field we do not know, a field that would change the
            schedule in a way we do not implement, or a missing `image_tokens`.
    """
    fields = _scheduler_fields(config)
    _check_steps(steps)
    dynamic, shift = fields["use_dynamic_shifting"], fields["shift"]
    if linear_base:
        base = np.linspace(1.0, 1 / steps, steps)
    else:
        smallest = np.float64(1 / fields["num_train_timesteps"])
        base = np.linspace(1.0, smallest if dynamic else static_shift(smallest, shift), steps)
    if dynamic:
        if image_tokens is None:
            raise ConfigError(
                "scheduler_config.json: use_dynamic_shifting is true, so the schedule depends on the size of "
                "the image; pass image_tokens."
            )
        mu = resolution_mu(
            image_tokens,
            fields["base_shift"],
            fields["max_shift"],
            fields["base_image_seq_len"],
            fields["max_image_seq_len"],
        )
        sigmas = dynamic_shift(base, mu, fields["time_shift_type"])
    else:
        sigmas = static_shift(base, shift)
    if fields["shift_terminal"]:
        sigmas = stretch_to_terminal(sigmas, fields["shift_terminal"])
    return _finished(sigmas)


def _scheduler_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with defaults filled in, checked against what this module implements."""
    scheduler = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if scheduler != "FlowMatchEulerDiscreteScheduler":
        raise ConfigError(
            f"scheduler_config.json: _class_name is {scheduler!r}; only FlowMatchEulerDiscreteScheduler is supported."
        )
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(set(given) - set(SCHEDULER_DEFAULTS))
    if unknown:
        raise ConfigError(
            f"scheduler_config.json: unknown fields {unknown}; they may change the schedule. "
            f"Known fields: {sorted(SCHEDULER_DEFAULTS)}."
        )
    fields = SCHEDULER_DEFAULTS | given
    for name in UNSUPPORTED_WHEN_TRUE:
        if fields[name]:
            raise ConfigError(f"scheduler_config.json: {name}={fields[name]!r} is not supported; set it to false.")
    if fields["time_shift_type"] not in ("exponential", "linear"):
        raise ConfigError(
            f"scheduler_config.json: time_shift_type is {fields['time_shift_type']!r}; use 'exponential' or 'linear'."
        )
    return fields


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ConfigError(f"a schedule needs at least 1 step, not {steps}.")


def _finished(sigmas: np.ndarray) -> Float[Array, "steps+1"]:
    return jnp.asarray(np.append(sigmas, 0.0), jnp.float32)


def noised(x0: Float[Array, "B ..."], noise: Float[Array, "B ..."], t: Float[Array, "B"]) -> Float[Array, "B ..."]:
    """The forward process of rectified flows: `x_t = (1 - t) x0 + t noise`, t in [0, 1] per sample."""
    t = jnp.reshape(t, (-1,) + (1,) * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise
