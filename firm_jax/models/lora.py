"""LoRA as plain trees: `{module path: {"a": [L, I, R], "b": [L, R, O]}}`, nested like the model, in float32.

The tree is an argument of the forward pass, so the current policy, the old one and the reference (a tree of zeros)
are three calls of one executable. Layers know only `a` and `b`: the strength alpha / rank is folded into b by
`scaled`, once, before the forward pass.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from firm_jax.errors import ConfigError
from firm_jax.sharding import Rules, partition_spec, path_name


@dataclass(frozen=True)
class LoraConfig:
    """Which layers are adapted, and how.

    targets: endings of module paths, matched at a dot as PEFT does: "attn.to_q" takes `blocks.attn.to_q`, not
    `blocks.attn2.to_q`. The update is alpha / rank * (x a) b.
    """

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


# Convolutions in the checkpoint, linear only here: PEFT would adapt them with convolutions.
CONVOLUTIONS = ("pos_embed.proj",)


def target_kernels(abstract_params, targets: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """The kernels [..., I, O] whose module path ends with one of `targets`; ConfigError for a target without any."""
    found, used = {}, set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_params)[0]:
        name = path_name(path)
        module = name.removesuffix(".kernel")
        if not name.endswith(".kernel") or module in CONVOLUTIONS:
            continue
        hits = [target for target in targets if f".{module}".endswith(f".{target}")]
        if hits:
            found[module] = leaf
            used.update(hits)
    missing = [target for target in targets if target not in used]
    if missing or not found:
        raise ConfigError(f"LoRA targets {missing or 'empty'}: no linear layer's path ends so; see lora.targets")
    return found


def init_lora(key, abstract_params, config: LoraConfig):
    """A ~ N(0, 1 / R^2) and B = 0 (PEFT's "gaussian"): the adapted network starts equal to the base."""
    tree: dict = {}
    for index, (module, kernel) in enumerate(sorted(target_kernels(abstract_params, config.targets).items())):
        *layers, I, O = kernel.shape
        a = jax.random.normal(jax.random.fold_in(key, index), (*layers, I, config.rank)) / config.rank
        insert(tree, module, {"a": a, "b": jnp.zeros((*layers, config.rank, O))})
    return tree


def insert(tree: dict, module: str, leaf) -> None:
    """Put a leaf at a module path of a nested dict."""
    *parents, last = module.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf


def zeros_like(tree):
    """The reference policy: the same tree, all zeros (not None: another structure would compile again)."""
    return jax.tree.map(jnp.zeros_like, tree)


def scaled(tree, scale: float):
    """The tree with alpha / rank folded into every b: what the forward pass takes."""

    def one(path, leaf):
        return leaf * scale if path[-1].key == "b" else leaf

    return jax.tree_util.tree_map_with_path(one, tree)


def child(tree: dict | None, *names: str):
    """The subtree below a module path, None where there is none."""
    for name in names:
        if not tree:
            return None
        tree = tree.get(name)
    return tree


def lora_shardings(tree, rules: Rules, mesh: Mesh):
    """a takes its kernel's input sharding, b its output sharding; the rank stays whole."""

    def one(path, leaf):
        module, side = path_name(path).rsplit(".", 1)
        if side == "a":
            spec = partition_spec(f"{module}.kernel", (*leaf.shape[:-1], math.prod(mesh.shape.values())), rules, mesh)
            return NamedSharding(mesh, P(*spec[:-1], None))
        shape = (*leaf.shape[:-2], math.prod(mesh.shape.values()), leaf.shape[-1])
        spec = partition_spec(f"{module}.kernel", shape, rules, mesh)
        return NamedSharding(mesh, P(*spec[:-2], None, spec[-1]))

    return jax.tree_util.tree_map_with_path(one, tree)
