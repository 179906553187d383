"""The multimodal diffusion transformer of Stable Diffusion 3 (arXiv 2403.03206) and 3.5.

Image tokens and text tokens have their own weights and meet in joint attention. SD3.5-medium gives its first blocks
a second attention over the image alone ("dual attention"); the last block of every variant drops its text stream
after attention. So there are three kinds of blocks: a stack of dual ones, a stack of plain ones, and the last.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from firm_jax.errors import ConfigError
from firm_jax.interop.mapping import Rule
from firm_jax.models.config import check_fields
from firm_jax.models.layers import LayerNorm, Linear, reshape, scan_layers, stack
from firm_jax.models.lora import child
from firm_jax.models.mmdit import (
    TIME_FEATURES,
    ZEROS,
    Embedder,
    FeedForward,
    JointAttention,
    Modulation,
    modulate,
    patchify,
    timestep_features,
)
from firm_jax.typing import Array, Float

NAME = "SD3Transformer2DModel"


@dataclass(frozen=True)
class SD3Config:
    """Fields and defaults of diffusers' SD3Transformer2DModel; lengths in latents unless stated."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96  # in patches
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @classmethod
    def from_hf(cls, raw: Mapping) -> "SD3Config":
        fields = cls.__dataclass_fields__
        check_fields(raw, NAME, used=fields, fixed={"qk_norm": (None, "rms_norm")})
        given = {name: value for name, value in raw.items() if name in fields}
        given["dual_attention_layers"] = tuple(given.get("dual_attention_layers") or ())
        config = cls(**given)
        if config.dual_attention_layers != tuple(range(config.dual_layers)):
            raise ConfigError(
                f"{NAME}: dual_attention_layers={list(config.dual_attention_layers)} is not supported; "
                "dual attention must be in the first blocks, [0, 1, ...] without a gap"
            )
        if config.dual_layers > config.num_layers:
            raise ConfigError(f"{NAME}: {config.dual_layers} dual_attention_layers, but num_layers={config.num_layers}")
        if config.caption_projection_dim != config.width:
            raise ConfigError(
                f"{NAME}: caption_projection_dim={config.caption_projection_dim} must equal num_attention_heads * "
                f"attention_head_dim = {config.width}: text and image share the attention"
            )
        if not config.pos_embed_max_size:
            raise ConfigError(
                f"{NAME}: pos_embed_max_size={config.pos_embed_max_size} is not supported; a size is needed"
            )
        return config

    def to_hf(self) -> dict:
        return {"_class_name": NAME, **asdict(self), "dual_attention_layers": list(self.dual_attention_layers)}

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def dual_layers(self) -> int:
        return len(self.dual_attention_layers)

    @property
    def latent_channels(self) -> int:
        return self.in_channels

    @property
    def velocity_channels(self) -> int:
        return self.in_channels if self.out_channels is None else self.out_channels

    def forward_flops(self, image_tokens: int, text_tokens: int) -> int:
        """Floating-point operations of one sample's forward pass: the blocks' matmuls and attention, by our count."""
        matmuls, scores = self._operations(image_tokens, text_tokens)
        return matmuls + scores

    def backward_flops(self, image_tokens: int, text_tokens: int) -> int:
        """Operations of the gradient of a LoRA's loss, its forward pass left out.

        The weights are frozen: a matmul costs the gradient of its input alone, one of attention those of two.
        """
        matmuls, scores = self._operations(image_tokens, text_tokens)
        return matmuls + 2 * scores

    def _operations(self, image_tokens: int, text_tokens: int) -> tuple[int, int]:
        """Operations of the forward pass with weights, and of attention's two matmuls without."""
        D, S, T, L = self.width, image_tokens, text_tokens, self.num_layers
        # A stream's matmuls have 4 D^2 weights in attention and 8 D^2 in the feed-forward; two operations each.
        streams = 2 * 12 * D * D * (S * L + T * (L - 1)) + 2 * 3 * D * D * T
        dual = self.dual_layers
        return streams + dual * 2 * 4 * D * D * S, 4 * (S + T) ** 2 * D * L + dual * 4 * S * S * D

    def check_latent_size(self, h: int, w: int) -> None:
        """ConfigError unless latents of h x w can be cut into patches and have positions in the table."""
        longest = self.pos_embed_max_size * self.patch_size
        if h % self.patch_size or w % self.patch_size or not 0 < min(h, w) <= max(h, w) <= longest:
            raise ConfigError(
                f"{NAME}: latents of {h} x {w} do not fit: height and width must be multiples of "
                f"patch_size={self.patch_size} and at most {longest} (the table of pos_embed_max_size)"
            )


class SD3Transformer(nnx.Module):
    """Predicts the velocity `noise - image` of noisy latents."""

    config_class = SD3Config
    hf_class = NAME
    # Modulation vectors, embeddings and the output are cut along their input only: what they feed is whole.
    sharding_rules = (
        (r"(to_q|to_k|to_v|add_[qkv]_proj|net\.0\.proj)\.kernel$", P("fsdp", "tensor")),
        (r"(to_out\.0|to_add_out|net\.2)\.kernel$", P("tensor", "fsdp")),
        (r"\.kernel$", P("fsdp", None)),
    )
    quantizable = r"^(dual_blocks|blocks|last_block)\."

    def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
        self.config = config
        dual, last = config.dual_layers, config.num_layers - 1
        D = config.width
        self.pos_embed = PatchEmbed(config, rngs=rngs)
        self.time_text_embed = TimeTextEmbed(config, rngs=rngs)
        self.context_embedder = Linear(config.joint_attention_dim, D, rngs=rngs)
        self.dual_blocks = _blocks(config, min(dual, last), rngs, dual=True)
        self.blocks = _blocks(config, max(last - dual, 0), rngs, dual=False)
        self.last_block = Block(config, dual=dual > last, last=True, rngs=rngs)
        self.norm_out = Modulation(D, 2, rngs=rngs)
        self.norm = LayerNorm(D, affine=False)
        self.proj_out = Linear(D, config.patch_size**2 * config.velocity_channels, rngs=rngs, init=ZEROS)

    @staticmethod
    def weight_rules(config: SD3Config) -> tuple[Rule, ...]:
        patch = f"patch:{config.in_channels}x{config.patch_size}x{config.patch_size}"
        last = f"transformer_blocks.{config.num_layers - 1}"
        dual = config.dual_layers
        return (
            Rule(r"pos_embed\.proj\.kernel", "pos_embed.proj.weight", layout=patch),
            Rule(r"dual_blocks\.(.+)\.(?:kernel|scale)", r"transformer_blocks.{layer}.\1.weight"),
            Rule(r"dual_blocks\.(.+)", r"transformer_blocks.{layer}.\1"),
            Rule(r"blocks\.(.+)\.(?:kernel|scale)", r"transformer_blocks.{layer}.\1.weight", first_layer=dual),
            Rule(r"blocks\.(.+)", r"transformer_blocks.{layer}.\1", first_layer=dual),
            Rule(r"last_block\.(.+)\.(?:kernel|scale)", rf"{last}.\1.weight"),
            Rule(r"last_block\.(.+)", rf"{last}.\1"),
        )

    def __call__(
        self,
        x: Float[Array, "B h w C"],
        timestep: Float[Array, "B"],
        context: Float[Array, "B T D"],
        pooled: Float[Array, "B P"],
        *,
        lora: dict | None = None,
        remat: str | None = None,
        attention_implementation: str | None = None,
        with_tokens: bool = False,
    ) -> Float[Array, "B h w C"] | tuple[Float[Array, "B h w C"], Float[Array, "B S D"]]:
        """The velocity at noisy latents x, in the dtype of the weights.

        timestep: 0 (image) to 1000 (noise), any float. context: text tokens; pooled: one vector a prompt. lora: a
        tree of adapters over the model's own paths, scale folded in (models/lora.py). remat: one of
        layers.REMAT_POLICIES. with_tokens: also give the image tokens as they enter the last block. Raises ConfigError
        when h or w is not a multiple of the patch size or exceeds the table of positions.
        """
        config = self.config
        B, h, w, _ = x.shape
        config.check_latent_size(h, w)
        dtype = self.proj_out.kernel.dtype
        x = self.pos_embed(x.astype(dtype))
        emb = jax.nn.silu(self.time_text_embed(timestep, pooled.astype(dtype), lora=child(lora, "time_text_embed")))
        text = self.context_embedder(context.astype(dtype), lora=child(lora, "context_embedder"))

        def body(block, carry, block_lora):
            return block(*carry, emb, lora=block_lora, implementation=attention_implementation), None

        for name in ("dual_blocks", "blocks"):
            blocks = getattr(self, name)
            if blocks is not None:
                with jax.named_scope(name):
                    (x, text), _ = scan_layers(blocks, body, (x, text), child(lora, name), remat=remat)
        tokens = x
        with jax.named_scope("last_block"):
            x, _ = self.last_block(
                x, text, emb, lora=child(lora, "last_block"), implementation=attention_implementation
            )
        scale, shift = self.norm_out(emb, lora=child(lora, "norm_out"))
        x = self.proj_out(modulate(self.norm(x), shift, scale), lora=child(lora, "proj_out"))
        p = config.patch_size
        x = reshape(x, B, h // p, w // p, p, p, config.velocity_channels)
        v = reshape(x.transpose(0, 1, 3, 2, 4, 5), B, h, w, config.velocity_channels)
        return (v, tokens) if with_tokens else v


def _blocks(config: SD3Config, count: int, rngs: nnx.Rngs, *, dual: bool) -> "Block | None":
    return stack(lambda keys: Block(config, dual=dual, last=False, rngs=keys), count, rngs) if count else None


class PatchEmbed(nnx.Module):
    """Latents [B, h, w, C] -> tokens [B, S, D] with the fixed position of each patch added, cropped at the centre."""

    def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
        self.patch_size, self.table_size = config.patch_size, config.pos_embed_max_size
        self.proj = Linear(config.patch_size**2 * config.in_channels, config.width, rngs=rngs)
        base = config.sample_size // config.patch_size
        self.pos_embed = nnx.Param(position_table(config.pos_embed_max_size, base, config.width)[None])

    def __call__(self, x):
        M = self.table_size
        h, w = x.shape[1] // self.patch_size, x.shape[2] // self.patch_size
        top, left = (M - h) // 2, (M - w) // 2
        # A buffer in the checkpoint: read and written with the weights, never trained.
        table = jax.lax.stop_gradient(self.pos_embed[...]).reshape(1, M, M, -1)
        return self.proj(patchify(x, self.patch_size)) + table[:, top : top + h, left : left + w].reshape(1, h * w, -1)


def position_table(size: int, base: int, width: int) -> Float[Array, "size*size width"]:
    """Sines and cosines of column (first half) and row (second half), in units in which `base` patches span a side."""
    positions = jnp.arange(size, dtype=jnp.float32) * (base / size)
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))
    angles = positions[:, None] * frequencies
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    columns = jnp.broadcast_to(waves[None, :], (size, *waves.shape))
    rows = jnp.broadcast_to(waves[:, None], (size, *waves.shape))
    return jnp.concatenate([columns, rows], axis=-1).reshape(size * size, width)


class TimeTextEmbed(nnx.Module):
    """The conditioning vector [B, D]: an embedding of the timestep plus one of the pooled text."""

    def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
        self.timestep_embedder = Embedder(TIME_FEATURES, config.width, rngs=rngs)
        self.text_embedder = Embedder(config.pooled_projection_dim, config.width, rngs=rngs)

    def __call__(self, timestep, pooled, lora=None):
        features = timestep_features(timestep).astype(pooled.dtype)
        time = self.timestep_embedder(features, lora=child(lora, "timestep_embedder"))
        return time + self.text_embedder(pooled, lora=child(lora, "text_embedder"))


class Block(nnx.Module):
    """One transformer block. `dual`: a second attention over the image; `last`: the text stream ends here."""

    def __init__(self, config: SD3Config, *, dual: bool, last: bool, rngs: nnx.Rngs):
        D = config.width
        attention = partial(
            JointAttention,
            config.num_attention_heads,
            config.attention_head_dim,
            qk_norm=config.qk_norm is not None,
            rngs=rngs,
        )
        self.norm = LayerNorm(D, affine=False)
        self.norm1 = Modulation(D, 9 if dual else 6, rngs=rngs)
        self.norm1_context = Modulation(D, 2 if last else 6, rngs=rngs)
        self.attn = attention(joint=True, text_output=not last)
        self.attn2 = attention(joint=False, text_output=False) if dual else None
        self.ff = FeedForward(D, rngs=rngs)
        self.ff_context = None if last else FeedForward(D, rngs=rngs)

    def __call__(self, x, text, emb, *, lora=None, implementation=None):
        """Image tokens x [B, S, D], text tokens [B, T, D], activated conditioning emb [B, D] -> x, text (or None)."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = self.norm1(emb, lora=child(lora, "norm1"))
        normed = self.norm(x)
        modulation = self.norm1_context(emb, lora=child(lora, "norm1_context"))
        # A modulation of two is stored as (scale, shift), one of six as (shift, scale, ...).
        text_shift, text_scale = modulation[:2] if self.ff_context else modulation[::-1]
        attended, text_attended = self.attn(
            modulate(normed, shift, scale),
            modulate(self.norm(text), text_shift, text_scale),
            lora=child(lora, "attn"),
            implementation=implementation,
        )
        x = x + gate * attended
        if self.attn2 is not None:
            shift, scale, gate = second
            inputs = modulate(normed, shift, scale)
            x = x + gate * self.attn2(inputs, lora=child(lora, "attn2"), implementation=implementation)[0]
        x = x + ff_gate * self.ff(modulate(self.norm(x), ff_shift, ff_scale), lora=child(lora, "ff"))
        if self.ff_context is None:
            return x, None
        gate, ff_shift, ff_scale, ff_gate = modulation[2:]
        text = text + gate * text_attended
        normed = modulate(self.norm(text), ff_shift, ff_scale)
        return x, text + ff_gate * self.ff_context(normed, lora=child(lora, "ff_context"))
