"""Our parameters back to the files PyTorch reads: sharded safetensors with an index, or one file."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from firm_jax.interop.files import write_tensors
from firm_jax.interop.mapping import SAME_NAMES, Rule, tensors, to_torch
from firm_jax.sharding import path_name


def save_params(
    params,
    rules: tuple[Rule, ...],
    folder: Path,
    stem: str,
    *,
    dtype=None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a parameter tree under `folder` as `{stem}.safetensors`, or as shards with an index when it is larger.

    `dtype`: the stored dtype; None keeps each leaf's own. Names and layouts are the inverse of loading.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    wanted = list(tensors(params, (*rules, *SAME_NAMES)))

    def stored(tensor) -> np.ndarray:
        leaf = leaves[tensor.path]
        leaf = np.asarray(jax.device_get(leaf if tensor.layer is None else leaf[tensor.layer]))
        return np.ascontiguousarray(to_torch(leaf, tensor.layout).astype(jnp.dtype(dtype) if dtype else leaf.dtype))

    def size(tensor) -> int:
        itemsize = jnp.dtype(dtype or leaves[tensor.path].dtype).itemsize
        return int(np.prod(tensor.shape)) * itemsize

    shards, room = [[]], max_shard_bytes
    for tensor in wanted:
        if shards[-1] and size(tensor) > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size(tensor)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    index = folder / f"{stem}.safetensors.index.json"
    for stale in (index, folder / f"{stem}.safetensors", *folder.glob(f"{stem}-?????-of-?????.safetensors")):
        stale.unlink(missing_ok=True)  # an earlier save's: a reader could not tell which set is meant
    for name, shard in zip(names, shards, strict=True):
        write_tensors({tensor.name: stored(tensor) for tensor in shard}, folder / name)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        content = {"metadata": {"total_size": sum(map(size, wanted))}, "weight_map": weight_map}
        index.write_text(json.dumps(content, indent=2, sort_keys=True))
