"""The language model inside the Qwen vision-language models, of both generations: what is the same arithmetic in both.

Every token has a position on three axes (time, row, column), and each rotary frequency turns with one of them; which
one is the generations' difference, as are norms of queries and keys (3) and biases of their projections (2.5).
"""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from firm_jax.models.layers import Embedding, Linear, RMSNorm, activate, reshape, rotate, split_heads, stack, take_rows
from firm_jax.models.lora import child


class TextConfig(Protocol):
    """What the layers read of a generation's config. rotary_axes [head_dim / 2]: 0 time, 1 row, 2 column."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rotary_axes: np.ndarray
    qk_norm: bool
    qkv_bias: bool


# The wide projections are cut along their output: each device makes its columns for the few rows of a decoding step,
# where cut along the input, partial sums of all columns would go around.
SHARDING_RULES = (
    (r"\.(q|k|v|gate|up)_proj\.kernel", P(None, ("tensor", "fsdp"))),
    (r"\.(o|down)_proj\.kernel", P("tensor", "fsdp")),
    (r"embed_tokens\.embedding", P("tensor", "fsdp")),
    (r"lm_head\.kernel", P(None, ("tensor", "fsdp"))),
)


class TextAttention(nnx.Module):
    """Grouped-query attention."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.key_heads = N, K
        self.q_proj = Linear(D, N * H, bias=config.qkv_bias, rngs=rngs)
        self.k_proj = Linear(D, K * H, bias=config.qkv_bias, rngs=rngs)
        self.v_proj = Linear(D, K * H, bias=config.qkv_bias, rngs=rngs)
        self.o_proj = Linear(N * H, D, bias=False, rngs=rngs)
        self.q_norm = RMSNorm(H, epsilon=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(H, epsilon=config.rms_norm_eps) if config.qk_norm else None

    def __call__(self, x, cos, sin, attend, lora=None):
        """`attend` takes q [B, T, N, H], k and v [B, T, K, H] and returns the output and the cache that it keeps."""
        q, k, v = (getattr(self, name)(x, lora=child(lora, name)) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = split_heads(q, self.heads, self.key_heads), *(split_heads(part, self.key_heads) for part in (k, v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out, cache = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.reshape(*x.shape[:-1], -1), lora=child(lora, "o_proj")), cache


class GatedMLP(nnx.Module):
    """Width D to F, gated by a SiLU, and back."""

    def __init__(self, width: int, hidden: int, *, bias: bool, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, hidden, bias=bias, rngs=rngs)
        self.up_proj = Linear(width, hidden, bias=bias, rngs=rngs)
        self.down_proj = Linear(hidden, width, bias=bias, rngs=rngs)

    def __call__(self, x, lora=None):
        gate, up = (getattr(self, name)(x, lora=child(lora, name)) for name in ("gate_proj", "up_proj"))
        return self.down_proj(activate(jax.nn.silu, gate) * up, lora=child(lora, "down_proj"))


class TextBlock(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.self_attn = TextAttention(config, rngs=rngs)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)

    @jax.named_scope("text_block")
    def __call__(self, x, cos, sin, attend, lora=None):
        out, cache = self.self_attn(self.input_layernorm(x), cos, sin, attend, child(lora, "self_attn"))
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x), child(lora, "mlp")), cache


class TextModel(nnx.Module):
    """The language model's parameters."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = stack(lambda rngs: TextBlock(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)


def rotary_tables(positions, config: TextConfig, dtype):
    """cos and sin [B, T, H / 2] of positions [3, B, T]: angles in float32, tables in the activations' dtype."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents
    time, row, column = (axis[..., None].astype(jnp.float32) for axis in positions)
    axes = config.rotary_axes
    angles = jnp.where(axes == 1, row, jnp.where(axes == 2, column, time)) * frequencies
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def image_rows(features, image_index, text):
    """Rows [B, T, D] of image features where there is an image, elsewhere `text`: rows too, or one number.

    features [M, P, D]; image_index [B, T] int32 points into them flattened to [M * P], -1 for text.
    """
    rows = take_rows(reshape(features, -1, features.shape[-1]), image_index)
    return jnp.where((image_index >= 0)[..., None], rows, text)


def rope_positions(lengths: Sequence[int | tuple[int, int]]) -> tuple[np.ndarray, int]:
    """Positions [3, T] of a sequence of runs, and the next free position.

    A run is a number of text tokens, which advance all three axes together, or the (rows, columns) of an image in
    merged patches: time stays, row and column count, and the sequence moves on by the longer side.
    """
    parts, start = [], 0
    for run in lengths:
        if isinstance(run, tuple):
            rows, columns = run
            grid = np.stack(np.meshgrid(np.arange(1), np.arange(rows), np.arange(columns), indexing="ij"))
            parts.append(start + grid.reshape(3, -1))
            start += max(run)
        else:
            parts.append(start + np.tile(np.arange(run), (3, 1)))
            start += run
    return np.concatenate(parts, axis=1).astype(np.int32), start
