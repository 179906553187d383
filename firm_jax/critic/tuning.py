"""What of a critic is trained, in which numbers it is held, and how its optimizer steps.

The network has three parts, as LLaMA-Factory counts them: `vision`, the tower with its DeepStack mergers; `projector`,
the merger between it and the language model; and `language`, all the rest. Each is trained or frozen, whole or through
a LoRA.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from firm_jax.errors import ConfigError
from firm_jax.models.lora import LoraConfig, child, init_lora, lora_shardings, scaled, target_kernels
from firm_jax.sharding import path_name

# The first that matches a parameter's path is its part.
PARTS = {"projector": r"visual\.merger\.", "vision": r"visual\.", "language": r""}
# Where a LoRA can be. Outside are the patch embedding, a convolution to PyTorch, and the output head.
ADAPTABLE = re.compile(r"language_model\.layers\.|visual\.(blocks|merger|deepstack_merger_list)\.")


def part_of(path: str) -> str:
    """The part of the network that a parameter or an adapter belongs to, by its path."""
    return next(part for part, pattern in PARTS.items() if re.match(pattern, path))


@dataclass(frozen=True)
class Tuning:
    """Which parts are trained; through a LoRA where there is one, else whole."""

    parts: tuple[str, ...]
    lora: LoraConfig | None = None

    @classmethod
    def from_config(cls, config) -> "Tuning":
        """By `config.tune` and `config.lora`; ConfigError when nothing is left to train."""
        parts = tuple(part for part in PARTS if config.tune[part])
        if not parts:
            keys = ", ".join(f"tune.{part}" for part in PARTS)
            raise ConfigError(f"nothing is trained: all of {keys} are False. Set one of them to True.")
        if config.lora.rank < 0:
            raise ConfigError(f"lora.rank is {config.lora.rank}: it has to be 0, for a full fine-tune, or more")
        if not config.lora.rank:
            return cls(parts)
        return cls(parts, LoraConfig(config.lora.rank, config.lora.alpha, tuple(config.lora.targets)))

    def for_network(self, params) -> "Tuning":
        """With the LoRA's targets as whole paths of this network's layers; ConfigError for one that has no layer.

        A target of a part that is frozen is left out. params: the network's parameters, or their shapes.
        """
        if self.lora is None:
            return self
        modules = sorted(target_kernels(params, self.lora.targets))
        if unfit := [module for module in modules if not ADAPTABLE.match(module)]:
            raise ConfigError(f"{unfit[0]} cannot have a LoRA; see lora.targets")
        inside = tuple(module for module in modules if part_of(module) in self.parts)
        if not inside:
            raise ConfigError(
                f"lora.targets = {list(self.lora.targets)} has no layer in what is trained, {', '.join(self.parts)}; "
                "add targets, or set tune.* of another part"
            )
        return replace(self, lora=replace(self.lora, targets=inside))

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """The parameters that an optimizer step changes, and the frozen ones. A LoRA leaves all of them frozen."""
        if self.lora is not None:
            return nnx.State({}), params
        return nnx.split_state(params, lambda path, _: part_of(".".join(map(str, path))) in self.parts, ...)

    def first(self, params: nnx.State, key, rules, mesh) -> tuple[object, nnx.State]:
        """What training starts from, `trained`, and the frozen parameters. rules: the network's sharding rules."""
        trained, frozen = self.split(params)
        if self.lora is None:
            return trained, frozen

        def draw(key):
            return init_lora(key, params, self.lora)

        placed = None if mesh is None or mesh.empty else lora_shardings(jax.eval_shape(draw, key), rules, mesh)
        return jax.jit(draw, out_shardings=placed)(key), frozen

    def join(self, trained, frozen) -> tuple[nnx.State, dict | None]:
        """The whole network's parameters, and the LoRA beside them with its strength folded in, or None."""
        if self.lora is None:
            return nnx.merge_state(trained, frozen), None
        return frozen, scaled(trained, self.lora.scale)

    def merged(self, trained, frozen) -> nnx.State:
        """The network's parameters with the LoRA added to its kernels, summed in float32, in the kernels' dtypes."""
        params, lora = self.join(trained, frozen)
        if lora is None:
            return params

        def one(path, kernel):
            module, _, kind = path_name(path).rpartition(".")
            pair = child(lora, *module.split(".")) if kind == "kernel" else None
            if pair is None:
                return kernel
            change = jnp.einsum(
                "...IR,...RO->...IO", pair["a"], pair["b"], out_sharding=_sharding(kernel), precision="highest"
            )
            return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)

        return jax.tree_util.tree_map_with_path(one, params)


def _sharding(x):
    """Where x lies on the mesh; None outside of one."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else sharding


# Optimizer


def warmup_steps(train, steps: int) -> int:
    """Steps over which the learning rate rises, counted as transformers counts them."""
    return math.ceil(train.warmup_ratio * steps)


def schedule_of(train, peak: float, steps: int) -> optax.Schedule:
    """Steps done -> learning rate: from 0 in a line to `peak`, then along half a cosine to 0 after `steps`."""
    warmup = warmup_steps(train, steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def learning_rates(config) -> dict[str, float]:
    """The highest learning rate of each part: its own where it has one, else `train.learning_rate`."""
    own = {part: config.tune[f"{part}_learning_rate"] for part in PARTS}
    return {part: config.train.learning_rate if rate is None else rate for part, rate in own.items()}


def make_optimizer(train, rates: Mapping[str, float], steps: int) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping, on a cosine with linear warm-up over `steps`, from the keys of `config.train`.

    rates: the highest learning rate of each part. Weight decay spares norms and biases.
    """

    def decayed(params):
        kinds = (".kernel", ".embedding", ".a", ".b")
        return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).endswith(kinds), params)

    return optax.chain(
        optax.clip_by_global_norm(train.max_grad_norm),
        optax.scale_by_adam(train.b1, train.b2),
        optax.add_decayed_weights(train.weight_decay, decayed),
        _scale_by_part({part: schedule_of(train, rate, steps) for part, rate in rates.items()}),
    )


def _scale_by_part(schedules: Mapping[str, optax.Schedule]) -> optax.GradientTransformation:
    """Minus the learning rate of its part times each update."""

    def update(updates, state, params=None):
        rates = {part: schedule(state.count) for part, schedule in schedules.items()}
        scaled_ = jax.tree_util.tree_map_with_path(
            lambda path, change: -rates[part_of(path_name(path))].astype(change.dtype) * change, updates
        )
        return scaled_, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.int32(0)), update)


# In which numbers


def cast(tree, dtype):
    """Floating-point leaves in `dtype`, others as they are."""
    dtype = jnp.dtype(dtype)
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def cast_like(tree, like, key):
    """Each leaf in the dtype of that of `like`; to bfloat16 rounded up or down at random, in proportion.

    Rounded to the nearest, a weight in bfloat16 stays where it is under any step below 0.2 % of it, and a second moment
    never falls again. At random, both are right on average.
    """

    def one(number, x, target):
        if x.dtype == target.dtype or target.dtype != jnp.bfloat16:
            return x.astype(target.dtype)
        return _round_at_random(x, jax.random.fold_in(key, number))

    leaves, structure = jax.tree.flatten(tree)
    rounded = [one(number, *pair) for number, pair in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))]
    return jax.tree.unflatten(structure, rounded)


def _round_at_random(x, key):
    """float32 -> bfloat16: its upper half, after a random number has been added to the lower."""
    noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=_sharding(x)).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), up, x).astype(jnp.bfloat16)
