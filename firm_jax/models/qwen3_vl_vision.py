"""The vision tower of Qwen3-VL: patches of images of any grid -> features for the language model, and DeepStack's.

Every image lies in a row of P patches of its own, the rest of the row being padding, so that images never attend to
each other and one compiled program serves all grids up to that size.
"""

import math
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from firm_jax.errors import ConfigError
from firm_jax.models.attention import attention
from firm_jax.models.config import check_fields, require
from firm_jax.models.layers import (
    Embedding,
    LayerNorm,
    Linear,
    activate,
    gelu,
    reshape,
    rotate,
    scan_layers,
    split_heads,
    stack,
    take_rows,
)
from firm_jax.models.lora import child

NORM_EPSILON = 1e-6  # not in config.json: the same in every release


@dataclass(frozen=True)
class Qwen3VLVisionConfig:
    """`vision_config` of a Qwen3-VL config.json, under its own names."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    rope_theta: float = 10000.0

    @classmethod
    def from_hf(cls, raw: dict) -> "Qwen3VLVisionConfig":
        """Raises ConfigError for a field that is unknown, missing, or of a value that is not supported."""
        what = "Qwen3-VL vision_config"
        fields = [field for field in cls.__dataclass_fields__ if field != "rope_theta"]
        fixed = {"hidden_act": ("gelu_pytorch_tanh",)}
        check_fields(raw, what, used=(*fields, "rope_parameters"), fixed=fixed, ignored=("initializer_range",))
        rope = raw.get("rope_parameters") or {}
        check_fields(rope, f"{what}.rope_parameters", used=("rope_theta",), fixed={"rope_type": ("axial",)})
        values = {field: require(raw, field, what) for field in fields}
        values["deepstack_visual_indexes"] = tuple(values["deepstack_visual_indexes"])
        config = cls(**values, rope_theta=rope.get("rope_theta", cls.rope_theta))
        config._check(what)
        return config

    def _check(self, what: str) -> None:
        taps = self.deepstack_visual_indexes
        if not taps or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < self.depth:
            raise ConfigError(
                f"{what}: deepstack_visual_indexes={list(taps)} must be ascending layer numbers below {self.depth}"
            )
        if self.position_side**2 != self.num_position_embeddings:
            raise ConfigError(f"{what}: num_position_embeddings={self.num_position_embeddings} is not a square")
        if self.hidden_size % (4 * self.num_heads):
            raise ConfigError(
                f"{what}: hidden_size={self.hidden_size} must divide by 4 * num_heads, num_heads={self.num_heads}"
            )

    def forward_flops(self, patches: int) -> int:
        """Floating-point operations for a row of patches: matmuls and attention of tower and mergers, by our count."""
        D, F = self.hidden_size, self.intermediate_size
        block = 2 * patches * (4 * D * D + 2 * D * F) + 4 * patches * patches * D
        return self.depth * block + self.merger_flops(patches) + 2 * patches * self.patch_features * D

    def merger_flops(self, patches: int) -> int:
        """Those of the mergers among them."""
        joined, merged = self.hidden_size * self.spatial_merge_size**2, patches // self.spatial_merge_size**2
        merger = 2 * merged * joined * (joined + self.out_hidden_size)
        return (1 + len(self.deepstack_visual_indexes)) * merger

    def to_hf(self) -> dict:
        raw = asdict(self)
        raw["deepstack_visual_indexes"] = list(self.deepstack_visual_indexes)
        raw["rope_parameters"] = {"rope_type": "axial", "rope_theta": raw.pop("rope_theta")}
        return {"model_type": "qwen3_vl_vision", "hidden_act": "gelu_pytorch_tanh", **raw}

    @property
    def position_side(self) -> int:
        """The learned position table covers a square grid of this side."""
        return math.isqrt(self.num_position_embeddings)

    @property
    def patch_features(self) -> int:
        """Numbers in one patch, in the order (C, T, H, W)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


def patch_coordinates(grids, length: int, merge: int):
    """Row and column of each patch, int32 [M, P] each, and which patches are real, bool [M, P].

    grids [M, 2] (rows, columns). Patches come in merge-block order: blocks of merge x merge by rows, inside a block
    by rows too.
    """
    rows, columns = grids[:, :1], grids[:, 1:]
    index = jnp.arange(length)[None]
    block, within = index // merge**2, index % merge**2
    blocks_across = jnp.maximum(columns // merge, 1)  # a row without any image has an empty grid
    row = block // blocks_across * merge + within // merge
    column = block % blocks_across * merge + within % merge
    return row, column, index < rows * columns


def interpolation_taps(index, size, side: int):
    """Two neighbours [..., 2] in a table of `side` entries, and their float32 weights, for places `index` of `size`.

    Bilinear with aligned corners: place 0 is entry 0 and place size - 1 is entry side - 1.
    """
    source = index.astype(jnp.float32) * (side - 1) / jnp.maximum(size - 1, 1)
    low = jnp.floor(source)
    upper_weight = source - low
    low = low.astype(jnp.int32)
    taps = jnp.stack([low, low + 1], axis=-1).clip(0, side - 1)
    return taps, jnp.stack([1 - upper_weight, upper_weight], axis=-1)


def interpolated_positions(table, row, column, grids, side: int):
    """The learned table [side * side, D] read at each patch's place: float32 [M, P, D]."""
    row_taps, row_weights = interpolation_taps(row, grids[:, :1], side)
    column_taps, column_weights = interpolation_taps(column, grids[:, 1:], side)
    total = 0.0
    for i in range(2):
        for j in range(2):  # one tap at a time: four gathered tables at once would outweigh the activations
            weight = (row_weights[..., i] * column_weights[..., j])[..., None]
            total += weight * take_rows(table, row_taps[..., i] * side + column_taps[..., j]).astype(jnp.float32)
    return total


def axial_angles(row, column, head_dim: int, theta: float):
    """Rotary angles [M, P, head_dim / 2], float32: the first half turns with the row, the second with the column."""
    quarter = head_dim // 4
    frequencies = np.float32(1) / np.float32(theta) ** (np.arange(quarter, dtype=np.float32) / quarter)
    return jnp.concatenate([place[..., None].astype(jnp.float32) * frequencies for place in (row, column)], axis=-1)


class VisionAttention(nnx.Module):
    """Attention among the patches of one segment of a row: an image, or a window of it."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.num_heads = heads
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.proj = Linear(width, width, rngs=rngs)

    def __call__(self, x, cos, sin, segments, lora=None):
        joined = self.qkv(x, lora=child(lora, "qkv"))
        q, k, v = (split_heads(part, self.num_heads) for part in jnp.split(joined, 3, axis=-1))
        q, k = (rotate(part.astype(jnp.float32), cos, sin).astype(x.dtype) for part in (q, k))
        out = attention(q, k, v, segments=(segments, segments)).reshape(x.shape)
        return self.proj(out, lora=child(lora, "proj"))


class VisionMLP(nnx.Module):
    def __init__(self, config: Qwen3VLVisionConfig, *, rngs: nnx.Rngs):
        self.linear_fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x, lora=None):
        hidden = activate(jax.nn.gelu, self.linear_fc1(x, lora=child(lora, "linear_fc1")))
        return self.linear_fc2(hidden, lora=child(lora, "linear_fc2"))


class VisionBlock(nnx.Module):
    def __init__(self, config: Qwen3VLVisionConfig, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.hidden_size, epsilon=NORM_EPSILON)
        self.norm2 = LayerNorm(config.hidden_size, epsilon=NORM_EPSILON)
        self.attn = VisionAttention(config.hidden_size, config.num_heads, rngs=rngs)
        self.mlp = VisionMLP(config, rngs=rngs)

    @jax.named_scope("vision_block")
    def __call__(self, x, cos, sin, segments, lora=None):
        x = x + self.attn(self.norm1(x), cos, sin, segments, child(lora, "attn"))
        return x + self.mlp(self.norm2(x), child(lora, "mlp"))


class PatchMerger(nnx.Module):
    """merge x merge patches -> one token of the language model's width: [M, P, D] -> [M, P / merge^2, O].

    The norm acts on single patches, or on the joined ones when `joined_norm`. The GELU is the exact one, unlike the
    blocks'.
    """

    def __init__(self, config: Qwen3VLVisionConfig, *, joined_norm: bool, rngs: nnx.Rngs):
        self.joined = config.hidden_size * config.spatial_merge_size**2
        self.joined_norm = joined_norm
        self.norm = LayerNorm(self.joined if joined_norm else config.hidden_size, epsilon=NORM_EPSILON)
        self.linear_fc1 = Linear(self.joined, self.joined, rngs=rngs)
        self.linear_fc2 = Linear(self.joined, config.out_hidden_size, rngs=rngs)

    @jax.named_scope("patch_merger")
    def __call__(self, x, lora=None):
        joined = (x.shape[0], -1, self.joined)
        x = self.norm(reshape(x, *joined)) if self.joined_norm else reshape(self.norm(x), *joined)
        hidden = activate(gelu, self.linear_fc1(x, lora=child(lora, "linear_fc1")))
        return self.linear_fc2(hidden, lora=child(lora, "linear_fc2"))


class Qwen3VLVision(nnx.Module):
    """Patches -> merged features and DeepStack features (DeepStack: arXiv 2406.04334)."""

    sharding_rules = (
        # q, k and v stand side by side in one kernel, so its output cannot be cut by heads; the heads are, after it
        (r"attn\.qkv\.kernel", P("fsdp", None)),
        (r"(attn\.proj|linear_fc2)\.kernel", P("tensor", "fsdp")),
        (r"linear_fc1\.kernel", P("fsdp", "tensor")),
        (r"linear_fc1\.bias", P("tensor")),
        (r"patch_embed\.kernel", P("fsdp", None)),
    )

    def __init__(self, config: Qwen3VLVisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = Linear(config.patch_features, config.hidden_size, rngs=rngs)
        self.pos_embed = Embedding(config.num_position_embeddings, config.hidden_size, rngs=rngs)
        self.blocks = stack(lambda rngs: VisionBlock(config, rngs=rngs), config.depth, rngs)
        self.merger = PatchMerger(config, joined_norm=False, rngs=rngs)
        self.deepstack_merger_list = stack(
            lambda rngs: PatchMerger(config, joined_norm=True, rngs=rngs), len(config.deepstack_visual_indexes), rngs
        )

    def __call__(self, patches, grids, *, lora: dict | None = None, remat: str | None = None):
        """patches [M, P, C*T*ph*pw] in merge-block order, grids [M, 2] (rows, columns) with rows * columns <= P.
        lora: adapters over this tower's own paths.

        Returns features [M, P / merge^2, O] and DeepStack features [K, M, P / merge^2, O]. What stands beyond an
        image's own patches is meaningless.
        """
        config = self.config
        with jax.named_scope("patch_embed"):
            x = self.patch_embed(patches.astype(self.patch_embed.kernel.dtype))
            row, column, real = patch_coordinates(grids, patches.shape[1], config.spatial_merge_size)
            table = self.pos_embed.embedding[...]
            x = x + interpolated_positions(table, row, column, grids, config.position_side).astype(x.dtype)
        angles = axial_angles(row, column, config.hidden_size // config.num_heads, config.rope_theta)
        cos, sin, segments = jnp.cos(angles), jnp.sin(angles), real.astype(jnp.int32)

        # Each layer writes its output into the slot of the next tap (into a spare one after the last), so that a
        # slot ends up holding exactly its tap: one scan, without keeping every layer's output or cutting the weights.
        taps = config.deepstack_visual_indexes
        slots = jnp.asarray(np.searchsorted(taps, np.arange(config.depth)))

        def body(block, carry, scanned):
            x, tapped = carry
            slot, block_lora = scanned
            x = block(x, cos, sin, segments, block_lora)
            return (x, jax.lax.dynamic_update_index_in_dim(tapped, x, slot, 0)), None

        tapped = jnp.broadcast_to(jnp.zeros_like(x), (len(taps) + 1, *x.shape))
        (x, tapped), _ = scan_layers(self.blocks, body, (x, tapped), (slots, child(lora, "blocks")), remat=remat)

        def merge(merger, _, scanned):
            return None, merger(*scanned)

        scanned = (tapped[:-1], child(lora, "deepstack_merger_list"))
        _, deepstack = scan_layers(self.deepstack_merger_list, merge, None, scanned)
        return self.merger(x, child(lora, "merger")), deepstack
