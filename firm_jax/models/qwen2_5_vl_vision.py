"""The vision tower of Qwen2.5-VL: patches of images of any grid -> features for the language model.

Most layers attend within square windows of the image, a few over the whole of it. Every image lies in a row of P
patches of its own, the rest of the row being padding, so that one compiled program serves all grids up to that size.
"""

from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from firm_jax.errors import ConfigError
from firm_jax.models.config import check_fields, require
from firm_jax.models.layers import Linear, RMSNorm, activate, gelu, reshape, scan_layers, stack
from firm_jax.models.qwen3_vl_vision import NORM_EPSILON, VisionAttention, axial_angles, patch_coordinates
from firm_jax.models.qwen_text import GatedMLP


@dataclass(frozen=True)
class Qwen2_5VLVisionConfig:
    """`vision_config` of a Qwen2.5-VL config.json, under its own names.

    window_size: side of a window in pixels. fullatt_block_indexes: the layers that attend over the whole image.
    tokens_per_second: of videos; no image's arithmetic depends on it.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    window_size: int
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    tokens_per_second: int = 4
    rope_theta: float = 10000.0

    @classmethod
    def from_hf(cls, raw: dict) -> "Qwen2_5VLVisionConfig":
        """Raises ConfigError for a field that is unknown, missing, or of a value that is not supported."""
        what = "Qwen2.5-VL vision_config"
        fields = [field for field in cls.__dataclass_fields__ if field != "rope_theta"]
        defaults = {field: getattr(cls, field) for field in fields if hasattr(cls, field)}
        fixed = {  # two fields stand in older files under other names too
            "hidden_act": ("silu",),
            "in_chans": (raw.get("in_channels", cls.in_channels),),
            "spatial_patch_size": (raw.get("patch_size", cls.patch_size),),
        }
        check_fields(raw, what, used=(*fields, "rope_parameters"), fixed=fixed, ignored=("initializer_range",))
        rope = raw.get("rope_parameters") or {}
        check_fields(rope, f"{what}.rope_parameters", used=("rope_theta",), fixed={"rope_type": ("axial",)})
        values = {field: require(defaults | raw, field, what) for field in fields}
        values["fullatt_block_indexes"] = tuple(values["fullatt_block_indexes"])
        config = cls(**values, rope_theta=rope.get("rope_theta", cls.rope_theta))
        config._check(what)
        return config

    def _check(self, what: str) -> None:
        if self.hidden_size % (4 * self.num_heads):
            raise ConfigError(
                f"{what}: hidden_size={self.hidden_size} must divide by 4 * num_heads, num_heads={self.num_heads}"
            )
        if not all(0 <= layer < self.depth for layer in self.fullatt_block_indexes):
            raise ConfigError(
                f"{what}: fullatt_block_indexes={list(self.fullatt_block_indexes)} must be layer numbers below "
                f"{self.depth}"
            )
        if self.window_patches < self.spatial_merge_size:
            raise ConfigError(f"{what}: window_size={self.window_size} is smaller than one merged patch")

    def forward_flops(self, patches: int) -> int:
        """Floating-point operations for a row of patches: matmuls and attention of tower and merger, by our count.

        Attention over the whole row in every layer, as it is computed; windows are a mask.
        """
        D, F, joined = self.hidden_size, self.intermediate_size, self.hidden_size * self.spatial_merge_size**2
        block = 2 * patches * (4 * D * D + 3 * D * F) + 4 * patches * patches * D
        merger = 2 * (patches // self.spatial_merge_size**2) * joined * (joined + self.out_hidden_size)
        return self.depth * block + merger + 2 * patches * self.patch_features * D

    def to_hf(self) -> dict:
        raw = asdict(self)
        raw["fullatt_block_indexes"] = list(self.fullatt_block_indexes)
        raw["rope_parameters"] = {"rope_type": "axial", "rope_theta": raw.pop("rope_theta")}
        return {"model_type": "qwen2_5_vl_vision", "hidden_act": "silu", **raw}

    @property
    def patch_features(self) -> int:
        """Numbers in one patch, in the order (C, T, H, W)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_patches(self) -> int:
        """Side of a window in patches: as many whole merged patches as fit in it."""
        return self.window_size // self.patch_size // self.spatial_merge_size * self.spatial_merge_size


class VisionBlock(nnx.Module):
    def __init__(self, config: Qwen2_5VLVisionConfig, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.hidden_size, epsilon=NORM_EPSILON)
        self.norm2 = RMSNorm(config.hidden_size, epsilon=NORM_EPSILON)
        self.attn = VisionAttention(config.hidden_size, config.num_heads, rngs=rngs)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)

    @jax.named_scope("vision_block")
    def __call__(self, x, cos, sin, segments):
        x = x + self.attn(self.norm1(x), cos, sin, segments)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """merge x merge patches -> one token of the language model's width: [M, P, D] -> [M, P / merge^2, O]."""

    def __init__(self, config: Qwen2_5VLVisionConfig, *, rngs: nnx.Rngs):
        self.joined = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, epsilon=NORM_EPSILON)
        up, down = Linear(self.joined, self.joined, rngs=rngs), Linear(self.joined, config.out_hidden_size, rngs=rngs)
        self.mlp = nnx.Dict({"0": up, "2": down})  # the checkpoint's names

    @jax.named_scope("patch_merger")
    def __call__(self, x):
        x = reshape(self.ln_q(x), x.shape[0], -1, self.joined)
        return self.mlp["2"](activate(gelu, self.mlp["0"](x)))


class Qwen2_5VLVision(nnx.Module):
    """Patches -> merged features."""

    sharding_rules = (
        # q, k and v stand side by side in one kernel, so its output cannot be cut by heads; the heads are, after it
        (r"attn\.qkv\.kernel", P("fsdp", None)),
        (r"(attn\.proj|down_proj|mlp\.2)\.kernel", P("tensor", "fsdp")),
        (r"(gate_proj|up_proj|mlp\.0)\.kernel", P("fsdp", "tensor")),
        (r"(gate_proj|up_proj|mlp\.0)\.bias", P("tensor")),
        (r"patch_embed\.kernel", P("fsdp", None)),
    )

    def __init__(self, config: Qwen2_5VLVisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = Linear(config.patch_features, config.hidden_size, bias=False, rngs=rngs)
        self.blocks = stack(lambda rngs: VisionBlock(config, rngs=rngs), config.depth, rngs)
        self.merger = PatchMerger(config, rngs=rngs)

    def __call__(self, patches, grids, *, remat: str | None = None):
        """patches [M, P, C*T*ph*pw] in merge-block order, grids [M, 2] (rows, columns) with rows * columns <= P.

        Returns features [M, P / merge^2, O]. What stands beyond an image's own patches is meaningless.
        """
        config = self.config
        with jax.named_scope("patch_embed"):
            x = self.patch_embed(patches.astype(self.patch_embed.kernel.dtype))
        row, column, real = patch_coordinates(grids, patches.shape[1], config.spatial_merge_size)
        angles = axial_angles(row, column, config.hidden_size // config.num_heads, config.rope_theta)
        cos, sin, image = jnp.cos(angles), jnp.sin(angles), real.astype(jnp.int32)
        # Windows are segments, so the patches need not be brought into their order and back.
        side = config.window_patches
        window = jnp.where(real, 1 + row // side * patches.shape[1] + column // side, 0)
        whole = jnp.asarray(np.isin(np.arange(config.depth), config.fullatt_block_indexes))

        def body(block, x, attends_to_all):
            return block(x, cos, sin, jnp.where(attends_to_all, image, window)), None

        x, _ = scan_layers(self.blocks, body, x, whole, remat=remat)
        return self.merger(x)
