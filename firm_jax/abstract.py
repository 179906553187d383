"""Shapes with shardings in the place of arrays: what programs are compiled over when nothing is there to run them."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from firm_jax.mesh import batch_sharding


def place(tree, shardings):
    """The tree's shapes with a tree of shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def whole(tree, mesh: Mesh):
    """As `mesh.replicate` places arrays."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P())), tree
    )


def batch(mesh: Mesh, shape: tuple[int, ...], dtype, axis: int = 0) -> jax.ShapeDtypeStruct:
    """As `mesh.shard_batch` places an array."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, axis))


def outputs(mesh: Mesh, function: Callable, *arguments):
    """What a jitted function gives for such arguments: under Explicit axes, shardings are part of its type."""
    with jax.set_mesh(mesh):
        found = jax.eval_shape(function, *arguments)

    def sharding(leaf):
        return NamedSharding(mesh, P() if leaf.sharding is None else leaf.sharding.spec)

    return place(found, jax.tree.map(sharding, found))
