"""Networks of any size with random weights, written as the folders that both sides load."""

import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from firm_jax import models
from firm_jax.sharding import path_name


def write_network(raw: Mapping, folder: Path, dtype: str) -> None:
    """Write the network of a config.json's content with random weights as the folder of a Hugging Face checkpoint.

    Kernels keep the size of what they multiply (deviation 1 / sqrt(fan in)), scales scatter around 1 and all else
    around 0: no norm, bias or zero initialisation makes a part of the network do nothing. T5 does not scale its
    scores, so its queries' kernels do, as those of trained ones: scores eight times as wide would make of attention a
    choice that turns on a rounding.
    """
    network = models.network_class(class_name(raw))
    graphdef, shapes = nnx.split(models.abstract(network, network.config_class.from_hf(raw)))

    def one(path, leaf):
        name, mean, deviation = path_name(path), 0.0, 0.1
        if name.endswith("kernel"):
            convolution = leaf.ndim > 3  # three dimensions are those of a stack of linear layers
            deviation = float(np.prod(leaf.shape[:-1] if convolution else leaf.shape[-2]) ** -0.5)
            if name.endswith(".q.kernel"):  # T5's alone are called so
                deviation *= raw["d_kv"] ** -0.5
        elif name.endswith("scale"):
            mean = 1.0
        return draw(jax.random.key(zlib.crc32(name.encode())), leaf.shape, dtype, mean, deviation)

    params = jax.tree_util.tree_map_with_path(one, shapes)
    models.save_pretrained(nnx.merge(graphdef, params), folder)


@partial(jax.jit, static_argnames=("shape", "dtype"))  # one program, so that nothing larger than its result is held
def draw(key, shape: tuple[int, ...], dtype: str, mean: float, deviation: float):
    return (mean + deviation * jax.random.normal(key, shape)).astype(dtype)


def class_name(raw: Mapping) -> str:
    """PyTorch's class of a config.json's content."""
    return raw["_class_name"] if "_class_name" in raw else raw["architectures"][0]
