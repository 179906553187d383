"""Sharding rules: an ordered table of (regex on the parameter's path, PartitionSpec) for each model.

The specs speak of a layer's own dimensions; leading dimensions that a stack of layers adds stay whole. The first
rule that matches decides, and a parameter that none matches is replicated.
"""

import re

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Rules = tuple[tuple[str, P], ...]
KERNEL_SCALE = "kernel_scale"  # of a quantised kernel [..., 1, O]: split as the kernel's output is


def path_name(path) -> str:
    """`blocks.attn.to_q.kernel` from a JAX key path."""
    names = []
    for key in path:
        name = getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))
        names.append(str(name))
    return ".".join(names).removesuffix(".value")  # nnx keeps a variable's array under this name


def partition_spec(path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> P:
    """The spec of one parameter. A mesh axis that does not divide its dimension is left out there; of several axes of
    one dimension, which stand from the outermost to the innermost, those stay that divide it together."""
    for pattern, spec in rules:
        if re.search(pattern, path):
            full = (None,) * (len(shape) - len(spec)) + tuple(spec)
            return P(*(_dividing(entry, size, mesh) for entry, size in zip(full, shape, strict=True)))
    return P(*(None,) * len(shape))


def _dividing(entry, size: int, mesh: Mesh):
    """What of a spec's entry divides a dimension: None, an axis, or several."""
    kept = []
    for axis in entry if isinstance(entry, tuple) else (entry,):
        if axis is not None and size % mesh.shape[axis] == 0:
            kept.append(axis)
            size //= mesh.shape[axis]
    return tuple(kept) if len(kept) > 1 else kept[0] if kept else None


def shardings(abstract, rules: Rules, mesh: Mesh):
    """The NamedSharding of every leaf of an abstract (or real) parameter tree."""

    def one(path, leaf):
        name = path_name(path)
        if name.endswith(KERNEL_SCALE):
            spec = partition_spec(name.removesuffix("_scale"), leaf.shape, rules, mesh)
            return NamedSharding(mesh, P(*spec[:-2], None, spec[-1]))
        return NamedSharding(mesh, partition_spec(name, leaf.shape, rules, mesh))

    return jax.tree_util.tree_map_with_path(one, abstract)
