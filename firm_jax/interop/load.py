"""Safetensors straight to their shards, a block at a time: never a whole model in the host's memory.

A block is one tensor of a file, or as many layers of a stack as fit `BLOCK_BYTES`. What this process's devices hold of
it is read in chunks of rows, and is on the devices before the next block is read. A stack of more than one block grows
there.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from firm_jax.errors import WeightsError
from firm_jax.interop.files import READABLE, WeightFiles, some
from firm_jax.interop.mapping import SAME_NAMES, Rule, Tensor, from_torch, tensors
from firm_jax.models.quantize import quantized
from firm_jax.sharding import KERNEL_SCALE, Rules, path_name, shardings

BLOCK_BYTES = 32 << 20
CHUNK_BYTES = 4 << 20  # of one read; each thread holds one at a time
STRIPE = 16  # rows transposed at a time: a cache line of numbers. A whole kernel in one go is 6 times slower.
THREADS = min(8, os.cpu_count() or 1)

# A part of an array: [start, stop) in every dimension.
Part = tuple[tuple[int, int], ...]


def account(
    needed: Mapping[str, tuple[int, ...]],
    present: Mapping[str, tuple[int, ...]],
    where: str,
    ignored=(),
    tied=(),
) -> None:
    """WeightsError unless `present` holds exactly the needed names and shapes.

    `ignored`: names of buffers that hold no parameter; `tied`: names that repeat another tensor.
    """
    missing = sorted(set(needed) - set(present))
    extra = sorted(set(present) - set(needed) - set(ignored) - set(tied))
    wrong = [
        f"{name}: {present[name]} in the file, {needed[name]} by the config"
        for name in sorted(set(needed) & set(present))
        if present[name] != needed[name]
    ]
    problems = []
    if missing:
        problems.append(f"missing tensors: {some(missing)}")
    if extra:
        problems.append(f"tensors that this architecture does not have: {some(extra)}")
    if wrong:
        problems.append(f"tensors of another shape: {some(wrong)}")
    if problems:
        raise WeightsError(
            f"the weights in {where} do not fit their config.json; " + "; ".join(problems) + ". "
            "Check that weights and config come from the same revision of the same model."
        )


def load_params(
    abstract_params,
    rules: tuple[Rule, ...],
    folder: Path,
    *,
    dtype,
    sharding_rules: Rules = (),
    mesh: Mesh | None = None,
    ignored: tuple[str, ...] = (),
    tied: Mapping[str, str] | None = None,
):
    """The parameter tree of `abstract_params`' structure, read from the safetensors in `folder`.

    Every leaf arrives in `dtype` on its shards by `sharding_rules` (on the default device without a mesh); kernels that
    are int8 there are quantised on the devices, block by block, from the file's own numbers. A tensor is read once,
    however many devices hold it; of several processes each reads the rows that its devices need. Raises WeightsError
    for a missing, extra, duplicate or misshapen tensor, an unreadable file, a dtype other than float32, float16 and
    bfloat16, and a number that is not finite in `dtype`.
    """
    tied, dtype = dict(tied or {}), jnp.dtype(dtype)
    wanted = list(tensors(abstract_params, (*rules, *SAME_NAMES)))
    sources = {path: list(group) for path, group in itertools.groupby(wanted, key=lambda tensor: tensor.path)}
    if mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        placement = jax.tree.map(lambda _: device, abstract_params)
    else:
        placement = shardings(abstract_params, sharding_rules, mesh)
    with WeightFiles(folder) as files, ThreadPoolExecutor(THREADS) as pool:
        _check(files, wanted, ignored, tied)
        reader, exact = _Reader(files, dtype, pool), _Reader(files, np.dtype(np.float32), pool)
        leaves, structure = jax.tree_util.tree_flatten_with_path(abstract_params)
        found: dict[str, jax.Array] = {}
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(placement), strict=True):
            name = path_name(path)
            if leaf.dtype == jnp.int8:
                found[name], found[f"{name}_scale"] = exact.leaf(leaf.shape, sources[name], sharding, quantized)
            elif not name.endswith(KERNEL_SCALE):
                found[name] = reader.leaf(leaf.shape, sources[name], sharding)
        return jax.tree.unflatten(structure, [found[path_name(path)] for path, _ in leaves])


def check_params(abstract_params, rules: tuple[Rule, ...], folder: Path, *, ignored=(), tied=None) -> None:
    """WeightsError unless the safetensors in `folder` hold, by their headers, what `load_params` would read."""
    with WeightFiles(folder) as files:
        _check(files, list(tensors(abstract_params, (*rules, *SAME_NAMES))), ignored, dict(tied or {}))


def _check(files: WeightFiles, wanted: list[Tensor], ignored, tied: Mapping[str, str]) -> None:
    """WeightsError unless the files hold what is wanted; a tensor known by its other name only gets the wanted one."""
    stored = files.tensors
    for alias, name in tied.items():
        if alias in stored and name not in stored:
            stored[name] = stored.pop(alias)
    account(
        {tensor.name: tensor.shape for tensor in wanted},
        {name: found.shape for name, found in stored.items()},
        str(files.folder),
        ignored,
        tied,
    )
    twice = {alias: name for alias, name in tied.items() if alias in stored}
    for name in (*(tensor.name for tensor in wanted), *twice):
        if stored[name].dtype not in READABLE:
            raise WeightsError(
                f"{stored[name]} has dtype {stored[name].dtype}; readable are {sorted(READABLE)}. Take the checkpoint "
                "that is not quantised, or convert this one."
            )
    for alias, name in twice.items():
        if not files.equal(alias, name):
            raise WeightsError(f"{files.folder}: tensors {alias} and {name} differ, but this architecture ties them")


class _Reader:
    """Reads the leaves of a parameter tree."""

    def __init__(self, files: WeightFiles, dtype: np.dtype, pool: ThreadPoolExecutor):
        self.files, self.dtype, self.pool = files, dtype, pool
        self.bits = np.dtype(f"u{dtype.itemsize}")  # numpy moves whole numbers faster than bfloat16
        self.exponent = np.array(np.inf, dtype).view(self.bits)  # all its bits are set in what is not finite

    def leaf(self, shape: tuple[int, ...], sources: list[Tensor], sharding: Sharding, kept: Callable = lambda x: x):
        """One leaf on its devices; `sources` are its tensors, those of a stack in order.

        kept: what to keep of a block, an array or a tuple of them.
        """
        if sources[0].layer is None:
            return kept(self._block(shape, sources, sharding))
        count, layer_bytes = len(sources), int(np.prod(shape[1:])) * self.dtype.itemsize
        most = max(1, BLOCK_BYTES // layer_bytes)
        layers = max(n for n in range(1, min(most, count) + 1) if count % n == 0)  # so that all blocks are one program
        stack = None
        for start in range(0, count, layers):
            block = kept(self._block((layers, *shape[1:]), sources[start : start + layers], sharding))
            if layers == count:
                return block
            if stack is None:
                stack = jax.tree.map(partial(_empty_stack, count), block)
            stack = jax.block_until_ready(_insert(stack, block, np.int32(start)))
        return stack

    def _block(self, shape: tuple[int, ...], sources: list[Tensor], sharding: Sharding) -> jax.Array:
        """One tensor, or `shape[0]` layers of a stack, on the devices."""
        holders: dict[Part, list] = {}  # devices that hold the same part are given the same copy
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            part = tuple(entry.indices(size)[:2] for entry, size in zip(index, shape, strict=True))
            holders.setdefault(part, []).append(device)
        ends = np.array(list(holders))
        box = tuple(zip(ends[..., 0].min(0).tolist(), ends[..., 1].max(0).tolist(), strict=True))  # around all parts
        buffer = np.empty([stop - start for start, stop in box], self.bits)
        if sources[0].layer is None:
            reads = list(self._reads(sources[0], box, buffer))
        else:
            rows = zip(sources[slice(*box[0])], buffer, strict=True)
            reads = [read for source, row in rows for read in self._reads(source, box[1:], row)]
        for _ in self.pool.map(lambda read: read(), reads):
            pass
        arrays = []
        for part, devices in holders.items():
            inside = tuple(slice(*np.subtract(ends, start)) for ends, (start, _) in zip(part, box, strict=True))
            numbers = np.ascontiguousarray(buffer[inside]).view(self.dtype)
            # Waited for: what is on its way to a device is still in the host's memory.
            arrays += jax.block_until_ready([jax.device_put(numbers, device) for device in devices])
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def _reads(self, tensor: Tensor, box: Part, buffer: np.ndarray) -> Iterator[Callable[[], None]]:
        """The reads that together fill `buffer` with the part `box` of a tensor."""
        first, last = box[_row_axis(tensor.layout)]
        for start, stop in self.files.chunks(tensor.name, first, last, CHUNK_BYTES):
            yield partial(self._read, tensor, start, stop, box, buffer)

    def _read(self, tensor: Tensor, start: int, stop: int, box: Part, buffer: np.ndarray) -> None:
        """Rows start ... stop - 1 of a tensor's file into their place in `buffer`."""
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below
            rows = self.files.read(tensor.name, start, stop).astype(self.dtype, copy=False).view(self.bits)
        if ((rows & self.exponent) == self.exponent).any():
            raise WeightsError(
                f"{self.files.tensors[tensor.name]} holds NaN, infinity or numbers beyond {self.dtype}; fetch the file "
                "again, or load in bfloat16 or float32"
            )
        axis, numbers = _row_axis(tensor.layout), from_torch(rows, tensor.layout)
        taken = [slice(*ends) for ends in box]
        taken[axis] = slice(None)
        numbers = numbers[tuple(taken)]
        place = start - box[axis][0]
        if axis == 0:
            buffer[place : place + len(rows)] = numbers
            return
        for begin in range(0, len(rows), STRIPE):
            stripe = numbers[..., begin : begin + STRIPE]
            buffer[..., place + begin : place + begin + stripe.shape[-1]] = stripe


@partial(jax.jit, donate_argnames="stack")
def _insert(stack, block, start):
    """The stack [L, ...] with `block` in the place of its layers from `start` on."""
    return jax.tree.map(lambda s, b: jax.lax.dynamic_update_slice_in_dim(s, b, start, axis=0), stack, block)


def _empty_stack(count: int, block: jax.Array) -> jax.Array:
    return jnp.zeros((count, *block.shape[1:]), block.dtype, device=block.sharding)


def _row_axis(layout: str) -> int:
    """Which dimension of ours is the first in the PyTorch layout."""
    return 0 if layout == "same" else -1
