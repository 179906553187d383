"""What multimodal diffusion transformers share: image and text tokens with their own weights, one joint attention."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from firm_jax.models.attention import attention
from firm_jax.models.layers import Linear, RMSNorm, activate, reshape, rotate, split_heads
from firm_jax.models.lora import child
from firm_jax.typing import Array, Float

TIME_FEATURES = 256
ZEROS = nnx.initializers.zeros


def patchify(x: Float[Array, "B h w C"], size: int) -> Float[Array, "B S F"]:
    """Patches of size x size latents, by rows; the numbers of one in the order (C, row, column)."""
    B, h, w, C = x.shape
    x = reshape(x, B, h // size, size, w // size, size, C).transpose(0, 1, 3, 5, 2, 4)
    return reshape(x, B, (h // size) * (w // size), C * size * size)


def timestep_features(timestep: Float[Array, "B"], scale: float = 1.0) -> Float[Array, "B F"]:
    """Cosines, then sines, of float32 timesteps times `scale` at geometric frequencies from 1 to 1/10000."""
    half = TIME_FEATURES // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = scale * (timestep.astype(jnp.float32)[:, None] * frequencies)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Embedder(nnx.Module):
    """Two layers with a SiLU between."""

    def __init__(self, in_features: int, width: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(in_features, width, rngs=rngs)
        self.linear_2 = Linear(width, width, rngs=rngs)

    def __call__(self, x, lora=None):
        x = self.linear_1(x, lora=child(lora, "linear_1"))
        return self.linear_2(jax.nn.silu(x), lora=child(lora, "linear_2"))


class Modulation(nnx.Module):
    """Shifts, scales and gates [B, 1, D], linear in the activated conditioning vector, zero at initialisation."""

    def __init__(self, width: int, count: int, *, rngs: nnx.Rngs):
        self.count = count
        self.linear = Linear(width, count * width, rngs=rngs, init=ZEROS)

    def __call__(self, emb, lora=None):
        return jnp.split(self.linear(emb, lora=child(lora, "linear"))[:, None], self.count, axis=-1)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class JointAttention(nnx.Module):
    """Attention over image tokens, `joint` with text tokens that have their own projections."""

    def __init__(
        self, heads: int, head_dim: int, *, qk_norm: bool, joint: bool = True, text_output: bool = True, rngs: nnx.Rngs
    ):
        self.heads = heads

        def linear():
            return Linear(heads * head_dim, heads * head_dim, rngs=rngs)

        def norm():
            return RMSNorm(head_dim) if qk_norm else None

        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.to_out = nnx.List([linear()])
        self.norm_q, self.norm_k = norm(), norm()
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
            self.norm_added_q, self.norm_added_k = norm(), norm()
        self.to_add_out = linear() if text_output else None

    def __call__(self, x, text=None, *, rotary=None, segments=None, lora=None, implementation=None):
        """x [B, S, D], text [B, T, D] or None -> the attended x, and text where it has an output (else None).

        rotary: cosines and sines [1, S + T, H / 2] of image and text tokens, or None. segments: int [B, S + T], 0
        where a token is padding that none sees, or None.
        """
        S = x.shape[1]

        def heads(name, inputs, norm=None):
            y = getattr(self, name)(inputs, lora=child(lora, name))
            y = split_heads(y, self.heads)
            return y if norm is None else norm(y)

        q, k, v = heads("to_q", x, self.norm_q), heads("to_k", x, self.norm_k), heads("to_v", x)
        if text is not None:
            q = jnp.concatenate([q, heads("add_q_proj", text, self.norm_added_q)], axis=1)
            k = jnp.concatenate([k, heads("add_k_proj", text, self.norm_added_k)], axis=1)
            v = jnp.concatenate([v, heads("add_v_proj", text)], axis=1)
        if rotary is not None:
            q, k = (rotate_pairs(y, *rotary) for y in (q, k))
        y = attention(
            q, k, v, segments=None if segments is None else (segments, segments), implementation=implementation
        )
        y = y.reshape(*y.shape[:2], -1)
        x = self.to_out[0](y[:, :S], lora=child(lora, "to_out", "0"))
        if self.to_add_out is None:
            return x, None
        return x, self.to_add_out(y[:, S:], lora=child(lora, "to_add_out"))


def rotate_pairs(x, cos, sin):
    """Rotary embedding of x [B, S, N, H] in float32, each even feature turned with the odd one behind it.

    The features come out with all even ones first. Queries and keys do so alike, which their products do not see.
    """
    halves = jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
    return rotate(halves.astype(jnp.float32), cos, sin).astype(x.dtype)


class FeedForward(nnx.Module):
    """Width D to 4 D and back, tanh-approximated GELU between."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        up = nnx.Dict(proj=Linear(width, 4 * width, rngs=rngs))
        self.net = nnx.Dict({"0": up, "2": Linear(4 * width, width, rngs=rngs)})  # the checkpoint's names

    def __call__(self, x, lora=None):
        x = self.net["0"].proj(x, lora=child(lora, "net", "0", "proj"))
        return self.net["2"](activate(jax.nn.gelu, x), lora=child(lora, "net", "2"))
