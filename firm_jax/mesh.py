"""The device mesh: three axes, always Explicit, always all three present.

`data` splits the batch; `fsdp` splits the batch and, in the weights, each kernel's input dimension; `tensor`
splits heads and feed-forward width. An axis of size 1 costs nothing, so one code path serves one chip and a pod.
"""

import contextlib

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from firm_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """The mesh of a run. One of the sizes may be -1: it takes the devices that the others leave.

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise ConfigError(f"mesh sizes must be positive, at most one of them -1: got {sizes}")
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if free:
        if devices.size % known:
            raise ConfigError(
                f"mesh {sizes}: {devices.size} devices cannot be divided by {known}; "
                f"change mesh.data, mesh.fsdp or mesh.tensor"
            )
        sizes[free[0]] = devices.size // known
    elif known != devices.size:
        raise ConfigError(
            f"mesh {sizes} needs {known} devices but {devices.size} are present; "
            f"set one of mesh.data, mesh.fsdp, mesh.tensor to -1 to take them all"
        )
    shape = tuple(sizes[axis] for axis in AXES)
    return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def on_mesh(mesh: Mesh | None):
    """The context in which programs over arrays on the mesh are traced; no change without a mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def batch_size(mesh: Mesh | None) -> int:
    """Into how many parts a batch is split: the product of the batch axes' sizes."""
    return 1 if mesh is None or mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Dimension `axis`, the batch, split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(*(None,) * axis, BATCH_AXES))


def shard_batch(tree, mesh: Mesh | None, axis: int = 0):
    """Put arrays on the mesh, split by `batch_sharding`; dimension `axis` must divide by `batch_size(mesh)`."""
    if mesh is None or mesh.empty:
        return jax.tree.map(jax.numpy.asarray, tree)
    return _place(tree, batch_sharding(mesh, axis))


def to_host(tree):
    """Global arrays as host arrays, whole, on every process."""

    def one(array):
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)

    return jax.tree.map(one, tree)


def replicate(tree, mesh: Mesh | None):
    """Put arrays on every device of the mesh, whole."""
    if mesh is None or mesh.empty:
        return jax.tree.map(jax.numpy.asarray, tree)
    return _place(tree, NamedSharding(mesh, P()))


def place_as(tree, placement):
    """Put host arrays, on every process the same, where a tree of shardings of the same form says."""
    return jax.tree.map(_place, tree, placement)


def _place(tree, sharding: NamedSharding):
    """Host arrays, on every process the same, as arrays on the mesh.

    `jax.device_put` would first compare the processes' values, by a collective operation for every array.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(one, tree)
