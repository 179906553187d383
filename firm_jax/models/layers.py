"""The layers that every network here is made of, and the only place where an output sharding is stated.

Kernels are stored [in, out] (PyTorch: [out, in]), convolutions [kh, kw, in, out] over images [B, H, W, C].
Norms compute their statistics in float32 and return the input's dtype.
"""

import math
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from firm_jax.models.quantize import dequantized

KERNEL_INIT = nnx.initializers.lecun_normal()
EMBEDDING_INIT = nnx.initializers.normal(0.02)


def _spec(x) -> tuple:
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (jnp.ndim(x) - len(spec))


def _names(entry) -> tuple[str, ...]:
    """The mesh axes of one dimension of a spec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _axes(entries) -> set[str]:
    return {name for entry in entries for name in _names(entry)}


def _without(entry, axes: set[str]):
    return tuple(name for name in _names(entry) if name not in axes) or None


def output_sharding(x, leading: int, *trailing):
    """x's sharding in its first `leading` dimensions, then `trailing` as far as those axes are still free.

    None outside a mesh, where there is nothing to state.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return None
    kept = _spec(x)[:leading]
    free = [_without(entry, _axes(kept)) for entry in trailing]
    return NamedSharding(mesh, P(*kept, *free))


def project(x, kernel, dtype=None):
    """x [..., I] times kernel [I, O] -> [..., O]: batch split as x, output width split as the kernel.

    `dtype`: of the result, where it is to keep more of the sum than x's own dtype does.
    """
    return _contract("...I,IO->...O", x, kernel, 0, dtype)


@partial(jax.checkpoint, prevent_cse=False)
def project_quantized(x, kernel, scale):
    """`project` with an int8 kernel [I, O] and its scale [1, O], see models/quantize.py.

    The dequantised kernel is not kept for the backward pass, where a scan would stack those of all layers, but made
    again. Where many rows stay and the kernel is gathered, it moves as int8: half of what it would be afterwards.
    """
    if not (jax.typeof(x).sharding.mesh.empty or _rows_move(x, kernel)):
        beside = _axes(_spec(x)[:-1])
        kernel, scale = (
            jax.sharding.reshard(part, P(*(_without(entry, beside) for entry in _spec(part))))
            for part in (kernel, scale)
        )
    return project(x, dequantized(kernel, scale, x.dtype))


def _contract(equation: str, x, weights, contracted: int, dtype):
    """x [..., I] times weights, whose dimension `contracted` is I, over a mesh that may split both.

    Where a mesh axis splits the batch and the weights, one of them has to move. Many rows stay and the weights are
    gathered, as fully sharded training wants it; a few rows (a decoding step, a timestep's embedding) go to where the
    weights lie and their results come back: reading a whole model from its neighbours for each token would be slower
    by orders of magnitude.
    """
    kept = _spec(weights)[1 - contracted]
    final = output_sharding(x, x.ndim - 1, kept)
    beside = final
    if _rows_move(x, weights):
        shared = _axes(_spec(weights))
        leading = [_without(entry, shared) for entry in _spec(x)[:-1]]
        for last in (_spec(x)[-1], _spec(weights)[contracted]):  # the partitioner finds no good way for both at once
            x = jax.sharding.reshard(x, P(*leading, last))
        beside = NamedSharding(jax.typeof(x).sharding.mesh, P(*leading, kept))
    elif final is not None and _splits(final.spec[-1], final.mesh) and _names(final.spec[-1]) != _names(kept):
        # Some of the axes that split the columns stay: the partitioner, left to itself, might gather them as well.
        entries = [final.spec[-1] if entry == kept else entry for entry in _spec(weights)]
        weights = jax.sharding.reshard(weights, P(*entries))
    if dtype is None and x.dtype == weights.dtype and platform(x) == "cpu":
        y = _product_on_cpu(equation, beside, x, weights)
    else:
        y = jnp.einsum(equation, x, weights, out_sharding=beside, preferred_element_type=dtype)
    return y if beside is final else jax.sharding.reshard(y, final)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product_on_cpu(equation: str, sharding, x, weights):
    """The einsum of operands of one dtype, and its gradients, each with float32 sums that are rounded at the end.

    That is what accelerators do by themselves. On a CPU it has to be asked for: a product that is bfloat16 from the
    start is made of operands converted to float32, without the instructions that multiply bfloat16, and takes several
    times as long. In float32 it is the order of a gradient's operands that has to be said.
    """
    return jnp.einsum(equation, x, weights, out_sharding=sharding, preferred_element_type=jnp.float32).astype(x.dtype)


def _product_forward(equation, sharding, x, weights):
    return _product_on_cpu(equation, sharding, x, weights), (x, weights)


def _product_backward(equation, sharding, operands, cotangent):
    x, weights = operands
    rows = "abcde"[: x.ndim - 1]
    x_names, weight_names, y_names = re.split(",|->", equation.replace("...", rows))
    x_split, weights_split = (None if jax.typeof(a).sharding.mesh.empty else jax.typeof(a).sharding for a in operands)
    d_x = _product_on_cpu(f"{y_names},{weight_names}->{x_names}", x_split, cotangent, weights)
    # XLA transposes what stands first: better x, which lies there, than the cotangent with all that it is made by.
    d_weights = _product_on_cpu(f"{x_names},{y_names}->{weight_names}", weights_split, x, cotangent)
    return d_x, d_weights


_product_on_cpu.defvjp(_product_forward, _product_backward)


def platform(x) -> str:
    """The platform of x's mesh, which a program may be compiled for without being there; outside a mesh, JAX's own."""
    device = jax.typeof(x).sharding.mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def _splits(entry, mesh) -> bool:
    """Whether one dimension's entry of a spec cuts it at all."""
    return any(mesh.shape[axis] > 1 for axis in _names(entry))


def _rows_move(x, weights) -> bool:
    """Whether an axis splits rows and weights alike, and moving the rows and their results moves less."""
    mesh = jax.typeof(x).sharding.mesh
    shared = _axes(_spec(x)[:-1]) & _axes(_spec(weights))
    if mesh.empty or not _splits(tuple(shared), mesh):
        return False
    return math.prod(x.shape[:-1]) * sum(weights.shape) < math.prod(weights.shape)


def take_rows(table, index):
    """Rows [..., *table.shape[1:]] of a table at integer `index` [...]: the result is split as the index is."""
    width = _spec(table)[1:]
    final = output_sharding(index, index.ndim, *width)
    if final is not None:
        # An axis that splits both the width and the index goes to the width first and to the index by an all-to-all
        # of the rows found: left to itself the partitioner would bring all rows to every device.
        index = jax.sharding.reshard(index, P(*(_without(entry, _axes(width)) for entry in _spec(index))))
    rows = table.at[index].get(out_sharding=output_sharding(index, index.ndim, *width), mode="clip")
    return rows if final is None else jax.sharding.reshard(rows, final)


def split_heads(x, heads: int, shared: int | None = None):
    """x [..., N * H] -> [..., N, H], heads split over `tensor` where it divides them.

    `shared`: the number of key heads, when N query heads must be split in step with them.
    """
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.empty:
        leading = _spec(x)[:-1]
        divides = (shared or heads) % mesh.shape["tensor"] == 0 and "tensor" not in _axes(leading)
        x = jax.sharding.reshard(x, P(*leading, "tensor" if divides else None))
    # Said, because dimensions of 1 are otherwise mistaken for each other, and a batch of one loses its axes.
    return jnp.reshape(x, (*x.shape[:-1], heads, x.shape[-1] // heads), out_sharding=output_sharding(x, x.ndim))


def rotate(x, cos, sin):
    """Rotary embedding of x [B, S, N, H]: its first half is turned with its second by angles [B, S, H / 2]."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def zeros_beside(x, shape, dtype, *spec):
    """Zeros on x's mesh, split by `spec`; an axis that does not divide its dimension is left out there."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return jnp.zeros(shape, dtype)

    def divides(entry, size):
        return size % math.prod(mesh.shape[axis] for axis in _axes([entry])) == 0

    fitting = [entry if divides(entry, size) else None for entry, size in zip(spec, shape, strict=True)]
    return jnp.zeros(shape, dtype, out_sharding=NamedSharding(mesh, P(*fitting)))


def split_as(x, of):
    """x [B, ...] with its batch split as `of`'s is: what is sliced from a batch of one may lose the axes."""
    if jax.typeof(of).sharding.mesh.empty:
        return x
    return jax.sharding.reshard(x, P(_spec(of)[0], *_spec(x)[1:]))


def group_heads(x, keys: int):
    """x [B, T, N, H] -> [B, T, K, N / K, H], each group where its key's head is; `join_heads` undoes it."""
    B, T, N, H = x.shape
    return jnp.reshape(x, (B, T, keys, N // keys, H), out_sharding=output_sharding(x, 3))


def join_heads(x):
    """x [B, T, K, G, H] -> [B, T, K * G, H], split as it was."""
    B, T, K, G, H = x.shape
    return jnp.reshape(x, (B, T, K * G, H), out_sharding=output_sharding(x, 3))


def reshape(x, *shape):
    """x [B, ...] in another shape [B, ...]: the batch stays split as it was, everything behind it is whole."""
    return jnp.reshape(x, shape, out_sharding=output_sharding(x, 1))


def repeat_batch(x, like):
    """x [1, ...] repeated to the batch of `like`, and split as that is."""
    sharding = output_sharding(like, 1)
    return jnp.broadcast_to(x, (like.shape[0], *x.shape[1:]), out_sharding=sharding)


class Linear(nnx.Module):
    """x [..., I] -> [..., O], with an optional LoRA branch `x a b` (its scale is folded into b, see models/lora.py).

    A frozen kernel may be held as int8, with a `kernel_scale` [1, O] (models/quantize.py).
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, rngs: nnx.Rngs, init=KERNEL_INIT):
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), jnp.float32))
        self.kernel_scale = None
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None

    def __call__(self, x, lora: dict | None = None):
        if self.kernel_scale is None:
            y = project(x, self.kernel[...])
        else:
            y = project_quantized(x, self.kernel[...], self.kernel_scale[...])
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
        return _made_of(take_rows(as_bits(table), ids), take_rows(table, ids))

    def attend(self, x, dtype=None):
        """Logits [..., V] of x [..., D] against every row: the tied output head; `dtype` as in `project`."""
        return _contract("...D,VD->...V", x, self.embedding[...], 1, dtype)


def activate(function: Callable, x):
    """An elementwise function of x, computed in float32 and rounded once, as PyTorch does.

    A backward pass keeps x alone and computes the function again: what it is made of would be twice as wide.
    """
    return jax.checkpoint(lambda x: function(x.astype(jnp.float32)).astype(x.dtype), prevent_cse=False)(x)


def gelu(x):
    """Without the approximation by tanh, which `jax.nn.gelu` is."""
    return jax.nn.gelu(x, approximate=False)


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
        # Over the image first, channel by channel: reducing the 5-D view at once is several times slower on a CPU.
        y = x.astype(jnp.float32)
        y = y - self._group_mean(y)
        y = y * jax.lax.rsqrt(self._group_mean(jnp.square(y)) + self.epsilon)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)

    def _group_mean(self, x):
        B, _, _, C = x.shape
        means = x.mean((1, 2)).reshape(B, self.groups, C // self.groups).mean(-1, keepdims=True)
        return jnp.broadcast_to(means, (B, self.groups, C // self.groups)).reshape(B, C)[:, None, None]


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


def scan_layers(
    stacked: nnx.Module, body: Callable, carry, inputs=None, *, remat: str | None = None, unroll: bool = False
):
    """Run `carry, output = body(layer, carry, input)` over a stack of layers; `inputs` have a leading L too.

    `remat` names one of REMAT_POLICIES: what the backward pass keeps of each layer instead of computing it again. None
    where there is no backward pass; one that comes nevertheless is right, but slow.
    unroll: whether the program has every layer on its own, which takes longer to compile. So it is without being asked
    where a CPU keeps everything for a backward pass: a tenth of an update there was copying to the stacks and back.
    Returns the last carry and the outputs stacked [L, ...].
    """
    graphdef, params = nnx.split(stacked)
    unroll |= remat == "none" and platform(jax.tree.leaves(params)[0]) == "cpu"
    # A backward pass would keep each layer's weights, made of their bits, where it reads slices of the stack otherwise.
    bits = jax.tree.map(as_bits, params) if remat is None else params

    def step(carry, scanned):
        *layer_params, layer_input = scanned
        return body(nnx.merge(graphdef, jax.tree.map(_made_of, *layer_params)), carry, layer_input)

    if remat not in (None, "none"):
        step = jax.checkpoint(step, prevent_cse=False, policy=REMAT_POLICIES[remat])
    return jax.lax.scan(step, carry, (bits, params, inputs), unroll=unroll)


def as_bits(x):
    """bfloat16 on a CPU as the uint16 of the same bits, which `of_bits` undoes; anything else as it is.

    To slice from a bfloat16 array, or to write into it, XLA converts all of it to float32 on a CPU; integers it moves.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 and platform(x) == "cpu" else x


def of_bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _made_of(bits, same):
    """What `bits` are of, which is `same`: these give the value, and that, never computed, takes the gradient."""
    return same if bits.dtype == same.dtype else _from_bits(bits, same)


@jax.custom_vjp
def _from_bits(bits, same):
    return of_bits(bits)


_from_bits.defvjp(lambda bits, same: (of_bits(bits), None), lambda _, cotangent: (None, cotangent))
