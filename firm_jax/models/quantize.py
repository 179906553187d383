"""Frozen kernels as int8 with one scale for each output channel, in half the memory of bfloat16.

Weights only: a layer's kernel becomes numbers of the activations' dtype where it is used (`layers.project_quantized`).
Activations, adapters and gradients stay as they are.
"""

import re

import jax
import jax.numpy as jnp
from flax import nnx

from firm_jax.errors import ConfigError
from firm_jax.typing import Array, Float, Int8

SCHEMES = ("int8",)
LARGEST = 127  # -128 is left out: the rounding is the same for both signs


def check_scheme(quantize: str | None) -> None:
    """ConfigError unless it is None or one of SCHEMES."""
    if quantize is not None and quantize not in SCHEMES:
        raise ConfigError(f"quantize is {quantize!r}; it is one of: {', '.join(SCHEMES)}, or None for weights in dtype")


@jax.jit
def quantized(kernel: Float[Array, "... I O"]) -> tuple[Int8[Array, "... I O"], Float[Array, "... 1 O"]]:
    """Round to nearest in steps of max|kernel| / 127 of each output channel; the steps are the scale, in float32."""
    kernel = kernel.astype(jnp.float32)
    scale = jnp.abs(kernel).max(axis=-2, keepdims=True) / LARGEST
    steps = kernel / jnp.where(scale == 0, 1, scale)  # a channel of zeros stays one
    return jnp.round(steps).astype(jnp.int8), scale


def dequantized(kernel: Int8[Array, "... I O"], scale: Float[Array, "... 1 O"], dtype) -> Float[Array, "... I O"]:
    """The numbers that a quantised kernel stands for, rounded once, to `dtype`."""
    return (kernel.astype(jnp.float32) * scale).astype(dtype)


def quantize_linears(network: nnx.Module, modules: str) -> None:
    """Make the linear layers of an abstract network quantised ones, where their path matches the regex `modules`."""
    for path, module in nnx.iter_modules(network):
        if hasattr(module, "kernel_scale") and re.search(modules, ".".join(map(str, path))):
            *layers, _, O = shape = module.kernel.shape
            module.kernel = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.int8))
            scale = nnx.Param(jax.ShapeDtypeStruct((*layers, 1, O), jnp.float32))
            module.kernel_scale = nnx.data(scale)  # was None, which nnx takes for static
