"""Rewards of FIRM ("Trust Your Critic", arXiv 2603.12247, section 3.4): from a critic's scores to one number.

All scores are on [0, 1]. A missing score is NaN, and so is every reward made from it: a failed judgement
never turns into a number. `resolve_reward` finds a reward by name and keeps the mask beside the numbers.
"""

import dataclasses
import importlib
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp

from firm_jax.errors import ConfigError
from firm_jax.typing import Array, Bool, Float


def normalise(score: Float[Array, "..."]) -> Float[Array, "..."]:
    """A critic's score in 1..5 on the scale [0, 1]: `(score - 1) / 4`. NaN stays NaN."""
    return (jnp.asarray(score, jnp.float32) - 1) / 4


def quality_from_subscores(subscores: Float[Array, "... 3"]) -> Float[Array, "..."]:
    """The worst of aesthetics, technical quality, and structure and texture; NaN if one is missing."""
    return jnp.min(jnp.asarray(subscores, jnp.float32), axis=-1)


def qma(
    instruction: Float[Array, "M"], quality: Float[Array, "M"], base: float = 0.4, bonus: float = 0.6
) -> Float[Array, "M"]:
    """Quality-Modulated Alignment, the reward for generation: `I (0.4 + 0.6 Q)`.

    Following the instruction earns the base; quality can only add to what was earned. An image that ignores
    the instruction gets nothing for being beautiful.
    """
    return instruction * (base + bonus * quality)


def cme(
    execution: Float[Array, "M"], consistency: Float[Array, "M"], base: float = 0.6, bonus: float = 0.4
) -> Float[Array, "M"]:
    """Consistency-Modulated Execution, the reward for editing: `E (0.6 + 0.4 C)`.

    A linear sum can be maximised by returning the source untouched; here consistency without execution
    is worth nothing.
    """
    return execution * (base + bonus * consistency)


def weighted_sum(
    scores: Mapping[str, Array] | Sequence[Array], weights: Mapping[str, float] | Sequence[float]
) -> Float[Array, "M"]:
    """`sum_k weights[k] * scores[k]`, the linear reward that the paper's Table 5 shows to collapse in editing.

    Args:
        scores: criterion -> `[M]`, or a sequence of `[M]`.
        weights: the same keys, or the same number of weights. They are used as given, not normalised.

    Raises:
        ConfigError: if scores and weights do not match.
    """
    if not isinstance(weights, Mapping):
        scores, weights = dict(enumerate(scores)), dict(enumerate(weights))
    if set(scores) != set(weights) or not weights:
        raise ConfigError(f"weighted_sum: scores {sorted(scores)} and weights {sorted(weights)} do not match.")
    return sum(weight * jnp.asarray(scores[name]) for name, weight in weights.items())


def guarded_sum(
    execution: Float[Array, "M"],
    consistency: Float[Array, "M"],
    execution_weight: float = 0.5,
    consistency_weight: float = 0.5,
    least_execution: float = 0.5,
) -> Float[Array, "M"]:
    """The linear sum for editing, in which consistency counts only where execution is at least `least_execution`.

    The optional guard of FIRM's published code: below 0.5, a score of 3, an edit gets `execution_weight * execution`
    alone, so that an untouched source is worth nothing. There it is written for "less than", compares with "at most",
    and is switched off together with CME; here it is a reward of its own and means what it says.
    """
    kept = jnp.where(execution >= least_execution, consistency_weight * consistency, 0.0)
    # Times zero rather than left out, so that a missing consistency stays missing under the guard.
    return execution_weight * execution + kept + 0.0 * consistency


def execution_only(execution: Float[Array, "M"]) -> Float[Array, "M"]:
    """Execution of the edit alone: nothing then keeps the rest of the picture as it was."""
    return execution


def instruction_only(instruction: Float[Array, "M"]) -> Float[Array, "M"]:
    """Instruction following alone, the reward that FIRM shows to be hacked by silhouettes."""
    return instruction


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward function, the criteria it needs and the options it was given.

    Calling it with `scores` and `valid` (criterion -> `[M]`; criteria beyond the needed ones are ignored)
    gives the rewards and their mask, `[M]` each. A sample is valid if every needed score is, and if its
    reward is finite. Rewards of invalid samples are NaN.
    """

    name: str
    criteria: tuple[str, ...]
    function: Callable[..., Array]

    def __call__(
        self, scores: Mapping[str, Float[Array, "M"]], valid: Mapping[str, Bool[Array, "M"]]
    ) -> tuple[Float[Array, "M"], Bool[Array, "M"]]:
        missing = [name for name in self.criteria if name not in scores or name not in valid]
        if missing:
            raise ConfigError(
                f"reward {self.name!r} needs the criteria {list(self.criteria)}, but {missing} are not judged; "
                f"judged are {sorted(scores)}."
            )
        present = jnp.stack([jnp.asarray(valid[name], bool) for name in self.criteria]).all(axis=0)
        # A sample is judged as a whole: one missing score hides the others, so that no function can use them.
        known = {name: jnp.where(present, jnp.asarray(scores[name], jnp.float32), jnp.nan) for name in self.criteria}
        reward = jnp.asarray(self.function(**known), jnp.float32)
        if reward.shape != present.shape:
            raise ConfigError(
                f"reward {self.name!r} returned shape {list(reward.shape)} for {present.shape[0]} samples; "
                f"it must return one number a sample."
            )
        present &= jnp.isfinite(reward)
        return jnp.where(present, reward, jnp.nan), present


BUILT_IN = {
    "qma": qma,
    "cme": cme,
    "guarded_sum": guarded_sum,
    "instruction_only": instruction_only,
    "execution_only": execution_only,
}


def resolve_reward(name: str, weights: Mapping[str, float] | None = None) -> Reward:
    """The reward of that name, ready to be called on a batch of scores.

    Args:
        name: `qma`, `cme`, `weighted_sum`, `guarded_sum`, `instruction_only`, `execution_only`, or a function of the
            user's as `module:function`. A function's parameters without default name the criteria it needs
            (`instruction`, `quality`, `execution`, `consistency`), each an array `[M]` on [0, 1] with NaN for
            samples without a judgement; its parameters with a default are options. It returns `[M]`.
        weights: values for the options (`base` and `bonus` for `qma` and `cme`, for example); for
            `weighted_sum`, criterion -> weight.

    Raises:
        ConfigError: for an unknown name, a function that cannot be loaded, or weights it does not take.
    """
    weights = dict(weights or {})
    for option, value in weights.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ConfigError(f"reward {name!r}: weight {option!r} must be a number, not {value!r}.")
    if name == "weighted_sum":
        if not weights:
            raise ConfigError("reward 'weighted_sum' needs weights, for example {'instruction': 0.5, 'quality': 0.5}.")
        return Reward(name, tuple(weights), lambda **scores: weighted_sum(scores, weights))
    function = BUILT_IN.get(name) or _load_function(name)
    criteria, options = _signature(name, function)
    unknown = sorted(set(weights) - set(options))
    if unknown:
        raise ConfigError(
            f"reward {name!r} does not take the weights {unknown}; it takes {list(options) or 'none'}. Another reward "
            'comes with weights of its own: --config.reward.weights="{}" leaves them at their defaults.'
        )
    return Reward(name, criteria, lambda **scores: function(**scores, **weights))


def _load_function(name: str) -> Callable[..., Array]:
    """The function that `module:function` names."""
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise ConfigError(
            f"unknown reward {name!r}; use one of {', '.join([*BUILT_IN, 'weighted_sum'])}, "
            f"or your own function as 'module:function'."
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"reward {name!r}: module {module_name!r} cannot be imported ({error}); "
            f"install it or put its folder on PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"reward {name!r}: module {module_name!r} has no function {function_name!r}.")
    return function


def _signature(name: str, function: Callable[..., Array]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The criteria (parameters without default) and options (with default) of a reward function."""
    parameters = inspect.signature(function).parameters.values()
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    criteria = tuple(p.name for p in parameters if p.default is p.empty and p.kind in by_keyword)
    options = tuple(p.name for p in parameters if p.default is not p.empty)
    if not criteria or any(p.kind not in by_keyword for p in parameters):
        raise ConfigError(
            f"reward {name!r}: its parameters must name the criteria it needs, "
            f"for example `def reward(instruction, quality)`; found {inspect.signature(function)}."
        )
    return criteria, options
