"""The layers that every network here is made of, and the only place where an output sharding is stated.

Kernels are stored [in, out] (PyTorch: [out, in]), convolutions [kh, kw, in, out] over images [B, H, W, C].
Norms compute their statistics in float32 and return the input's dtype.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

KERNEL_INIT = nnx.initializers.lecun_normal()
EMBEDDING_INIT = nnx.initializers.normal(0.02)


def _spec(x) -> tuple:
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (jnp.ndim(x) - len(spec))


def _axes(entries) -> set[str]:
    names = set()
    for entry in entries:
        names.update(entry if isinstance(entry, tuple) else () if entry is None else (entry,))
    return names


def output_sharding(x, leading: int, *trailing):
    """x's sharding in its first `leading` dimensions, then `trailing` where those axes are still free.

    None outside a mesh, where there is nothing to state.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return None
    kept = _spec(x)[:leading]
    free = [entry if not _axes([entry]) & _axes(kept) else None for entry in trailing]
    return NamedSharding(mesh, P(*kept, *free))


def project(x, kernel):
    """x [..., I] times kernel [I, O] -> [..., O]: batch split as x, output width split as the kernel."""
    sharding = output_sharding(x, x.ndim - 1, _spec(kernel)[-1])
    return jnp.einsum("...I,IO->...O", x, kernel, out_sharding=sharding)


class Linear(nnx.Module):
    """x [..., I] -> [..., O], with an optional LoRA branch `x a b` (its scale is folded into b, see models/lora.py)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, rngs: nnx.Rngs, init=KERNEL_INIT):
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None

    def __call__(self, x, lora: dict | None = None):
        y = project(x, self.kernel[...])
        if self.bias is not None:
            y = y + self.bias[...]
        if lora is not None:
            y = y + project(project(x, lora["a"].astype(x.dtype)), lora["b"].astype(x.dtype))
        return y


class Embedding(nnx.Module):
    """Integer ids [...] -> rows [..., D]."""

    def __init__(self, rows: int, features: int, *, rngs: nnx.Rngs, init=EMBEDDING_INIT):
        self.embedding = nnx.Param(init(rngs.params(), (rows, features), jnp.float32))

    def __call__(self, ids):
        table = self.embedding[...]
        return table.at[ids].get(out_sharding=output_sharding(ids, ids.ndim, _spec(table)[-1]), mode="clip")

    def attend(self, x):
        """Logits [..., V] of x [..., D] against every row: the tied output head."""
        table = self.embedding[...]
        sharding = output_sharding(x, x.ndim - 1, _spec(table)[0])
        return jnp.einsum("...D,VD->...V", x, table, out_sharding=sharding)


class LayerNorm(nnx.Module):
    """Mean and variance over the last dimension; scale and shift only when `affine`."""

    def __init__(self, features: int, *, epsilon: float = 1e-6, affine: bool = True):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features)) if affine else None
        self.bias = nnx.Param(jnp.zeros(features)) if affine else None

    def __call__(self, x):
        y = x.astype(jnp.float32)
        mean = y.mean(-1, keepdims=True)
        y = (y - mean) * jax.lax.rsqrt(jnp.square(y - mean).mean(-1, keepdims=True) + self.epsilon)
        if self.scale is not None:
            y = y * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm: normalised in float32, cast back, then scaled, in the order PyTorch rounds."""

    def __init__(self, features: int, *, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features))

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


class GroupNorm(nnx.Module):
    """Statistics over H, W and the channels of a group, for images [B, H, W, C]."""

    def __init__(self, groups: int, channels: int, *, epsilon: float = 1e-6):
        self.groups, self.epsilon = groups, epsilon
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x):
        B, H, W, C = x.shape
        y = x.astype(jnp.float32).reshape(B, H, W, self.groups, C // self.groups)
        mean = y.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(y - mean).mean((1, 2, 4), keepdims=True)
        y = ((y - mean) * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class Conv(nnx.Module):
    """2-D convolution over images [B, H, W, I] -> [B, H', W', O]; `padding` as in lax or one int for all sides."""

    def __init__(
        self, in_channels, out_channels, kernel: int, *, stride: int = 1, padding=None, rngs, init=KERNEL_INIT
    ):
        self.stride = stride
        self.padding = padding if isinstance(padding, tuple) else ((padding or 0,) * 2,) * 2
        self.kernel = nnx.Param(init(rngs.params(), (kernel, kernel, in_channels, out_channels), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_channels))

    def __call__(self, x):
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...]


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules of one kind as one module whose parameters have a leading layer dimension [L, ...]."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    params = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(jax.random.split(rngs.params(), count))
    return nnx.merge(graphdef, params)


REMAT_POLICIES = {
    "none": None,  # keep every activation
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scan_layers(stacked: nnx.Module, body: Callable, carry, inputs=None, *, remat: str = "none"):
    """Run `carry, output = body(layer, carry, input)` over a stack of layers; `inputs` have a leading L too.

    `remat` names one of REMAT_POLICIES: what the backward pass keeps of each layer instead of computing it again.
    Returns the last carry and the outputs stacked [L, ...].
    """
    graphdef, params = nnx.split(stacked)

    def step(carry, scanned):
        layer_params, layer_input = scanned
        return body(nnx.merge(graphdef, layer_params), carry, layer_input)

    if remat != "none":
        step = jax.checkpoint(step, prevent_cse=False, policy=REMAT_POLICIES[remat])
    return jax.lax.scan(step, carry, (params, inputs))
