"""The multimodal diffusion transformer of Qwen-Image (arXiv 2508.02324) and Qwen-Image-Edit.

Image tokens and text tokens have their own weights and meet in joint attention, in which rotary positions tell them
apart: rows and columns count from the image's centre, text runs on along the diagonal from where the images end, and
each image has a frame of its own. Samples of a batch may have source images of different number and size: they are
padded to one number of tokens. All blocks are alike: one stack.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from firm_jax.errors import ConfigError
from firm_jax.interop.mapping import Rule
from firm_jax.models.config import check_fields
from firm_jax.models.layers import LayerNorm, Linear, RMSNorm, repeat_batch, reshape, scan_layers, stack
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
from firm_jax.typing import Array, Float, Int

NAME = "QwenImageTransformer2DModel"
ROPE_THETA = 10_000
# Switches of other models that share the class: guidance distillation, Qwen-Image-Layered. The first release's file
# also gives the width of pooled text, which the network does not take.
FIXED = {"guidance_embeds": (False,), "use_additional_t_cond": (False,), "use_layer3d_rope": (False,)}
NO_EFFECT = ("pooled_projection_dim",)


class Sources(NamedTuple):
    """The source images of B samples: patches of latents, of all images of a sample one after another.

    tokens: standardised latents in patches, as `patchify` cuts them. places: frame, row and column of each, see
    `image_places`. seen: 1, or 0 for padding. text_start: the first position of the text, so that it lies outside
    every image.
    """

    tokens: Float[Array, "B S F"]
    places: Int[Array, "B S 3"]
    seen: Int[Array, "B S"]
    text_start: Int[Array, "B"]


def pack_sources(images: Sequence[Sequence[tuple[np.ndarray, tuple[int, int]]]], length: int) -> Sources:
    """The source images of each sample, in the order in which its text names them, padded to `length` tokens.

    images: for each sample, for each image its tokens float [rows * columns, F] and its grid (rows, columns). The
    images of different samples may be of different number and size.
    """
    features = images[0][0][0].shape[-1]
    tokens = np.zeros((len(images), length, features), np.float32)
    places = np.zeros((len(images), length, 3), np.int32)
    seen = np.zeros((len(images), length), np.int32)
    for sample, parts in enumerate(images):
        own = np.concatenate([part for part, _ in parts])
        tokens[sample, : len(own)], seen[sample, : len(own)] = own, 1
        places[sample, : len(own)] = np.concatenate(
            [image_places(frame, *grid) for frame, (_, grid) in enumerate(parts, start=1)]
        )
    starts = [max(text_start(grid) for _, grid in parts) for parts in images]
    return Sources(tokens, places, seen, np.array(starts, np.int32))


def image_places(frame: int, rows: int, columns: int) -> Int[np.ndarray, "S 3"]:
    """Frame, row and column of an image's tokens, row by row.

    Row and column count from the centre, the larger half before it. The target is frame 0, sources are 1, 2, ...
    """
    grid = np.indices((rows, columns)) - np.array([rows - rows // 2, columns - columns // 2])[:, None, None]
    return np.concatenate([np.full((1, rows, columns), frame), grid]).reshape(3, -1).T.astype(np.int32)


def text_start(grid: tuple[int, int]) -> int:
    """The first position outside an image of (rows, columns) tokens: half of its longer side."""
    return max(grid) // 2


@dataclass(frozen=True)
class QwenImageConfig:
    """Fields and defaults of diffusers' QwenImageTransformer2DModel.

    in_channels: numbers in one patch; out_channels: channels of a latent. axes_dims_rope: how many features of a
    head turn with frame, row and column. zero_cond_t: source images are modulated as at timestep 0 (Edit-2511).
    """

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int | None = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    zero_cond_t: bool = False

    @classmethod
    def from_hf(cls, raw: Mapping) -> "QwenImageConfig":
        """Raises ConfigError for a field that is unknown or of a value that is not supported."""
        fields = cls.__dataclass_fields__
        check_fields(raw, NAME, used=fields, fixed=FIXED, ignored=NO_EFFECT)
        given = {name: value for name, value in raw.items() if name in fields}
        given["axes_dims_rope"] = tuple(given.get("axes_dims_rope", cls.axes_dims_rope))
        config = cls(**given)
        if config.in_channels != config.patch_size**2 * config.latent_channels:
            raise ConfigError(
                f"{NAME}: in_channels={config.in_channels} must be patch_size^2 * out_channels = "
                f"{config.patch_size**2 * config.latent_channels}: latents go in and out in the same form"
            )
        axes = config.axes_dims_rope
        if len(axes) != 3 or any(size % 2 for size in axes) or sum(axes) != config.attention_head_dim:
            raise ConfigError(
                f"{NAME}: axes_dims_rope={list(axes)} must be three even numbers that add up to "
                f"attention_head_dim={config.attention_head_dim}"
            )
        return config

    def to_hf(self) -> dict:
        switches = {name: supported[0] for name, supported in FIXED.items()}
        return {"_class_name": NAME, **switches, **asdict(self), "axes_dims_rope": list(self.axes_dims_rope)}

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        return self.in_channels if self.out_channels is None else self.out_channels

    def forward_flops(self, image_tokens: int, text_tokens: int) -> int:
        """Floating-point operations of one sample's forward pass: the blocks' matmuls and attention, by our count.

        image_tokens: those of source images included.
        """
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
        D, tokens = self.width, image_tokens + text_tokens
        # 4 D^2 weights in attention and 8 D^2 in the feed-forward meet each token; two operations each.
        return self.num_layers * 2 * 12 * D * D * tokens, self.num_layers * 4 * tokens**2 * D

    def check_latent_size(self, h: int, w: int) -> None:
        """ConfigError unless latents of h x w can be cut into patches."""
        if h % self.patch_size or w % self.patch_size or min(h, w) <= 0:
            raise ConfigError(
                f"{NAME}: latents of {h} x {w} do not fit: height and width must be positive multiples of "
                f"patch_size={self.patch_size}"
            )


class QwenImageTransformer(nnx.Module):
    """Predicts the velocity `noise - image` of noisy latents, beside which source images may stand."""

    config_class = QwenImageConfig
    hf_class = NAME
    # Modulation vectors, embeddings and the output are cut along their input only: what they feed is whole.
    sharding_rules = (
        (r"(to_q|to_k|to_v|add_[qkv]_proj|net\.0\.proj)\.kernel$", P("fsdp", "tensor")),
        (r"(to_out\.0|to_add_out|net\.2)\.kernel$", P("tensor", "fsdp")),
        (r"\.kernel$", P("fsdp", None)),
    )
    quantizable = r"^blocks\."

    def __init__(self, config: QwenImageConfig, *, rngs: nnx.Rngs):
        self.config = config
        D = config.width
        self.time_text_embed = nnx.Dict(timestep_embedder=Embedder(TIME_FEATURES, D, rngs=rngs))
        self.txt_norm = RMSNorm(config.joint_attention_dim)
        self.img_in = Linear(config.in_channels, D, rngs=rngs)
        self.txt_in = Linear(config.joint_attention_dim, D, rngs=rngs)
        self.blocks = stack(lambda keys: Block(config, rngs=keys), config.num_layers, rngs)
        self.norm_out = Modulation(D, 2, rngs=rngs)
        self.norm = LayerNorm(D, affine=False)
        self.proj_out = Linear(D, config.in_channels, rngs=rngs, init=ZEROS)

    @staticmethod
    def weight_rules(config: QwenImageConfig) -> tuple[Rule, ...]:
        return (
            Rule(r"blocks\.(.+)\.(?:kernel|scale)", r"transformer_blocks.{layer}.\1.weight"),
            Rule(r"blocks\.(.+)", r"transformer_blocks.{layer}.\1"),
        )

    def __call__(
        self,
        x: Float[Array, "B h w C"],
        timestep: Float[Array, "B"],
        context: Float[Array, "B T D"],
        mask: Int[Array, "B T"] | None = None,
        *,
        sources: Sources | None = None,
        lora: dict | None = None,
        remat: str | None = None,
        attention_implementation: str | None = None,
        with_tokens: bool = False,
    ) -> Float[Array, "B h w C"] | tuple[Float[Array, "B h w C"], Float[Array, "B S D"]]:
        """The velocity at noisy latents x, in the dtype of the weights.

        timestep: 0 (image) to 1000 (noise), any float; kept in float32. context: text tokens; mask: 0 where one is
        padding that no token sees, None for no padding. sources: the source images, see `pack_sources`. lora: a tree
        of adapters over the model's own paths, scale folded in (models/lora.py). remat: one of layers.REMAT_POLICIES.
        with_tokens: also give the target's tokens as they leave the last block. Raises ConfigError when a height or
        width is not a multiple of the patch size.
        """
        config, p = self.config, self.config.patch_size
        B, h, w, _ = x.shape
        config.check_latent_size(h, w)
        grid = h // p, w // p
        dtype = self.proj_out.kernel.dtype
        tokens = patchify(x.astype(dtype), p)
        S, T = tokens.shape[1], context.shape[1]
        if sources is not None:
            tokens = jnp.concatenate([tokens, sources.tokens.astype(dtype)], axis=1)
        tokens = self.img_in(tokens, lora=child(lora, "img_in"))
        text = self.txt_in(self.txt_norm(context.astype(dtype)), lora=child(lora, "txt_in"))
        emb = self._condition(timestep, lora)
        still = self._condition(jnp.zeros(1), lora) if sources is not None and config.zero_cond_t else None
        angles = rotary_angles(token_places(grid, sources, T), config.axes_dims_rope)
        rotary = jnp.cos(angles), jnp.sin(angles)
        segments = None
        if mask is not None or sources is not None:
            ones = [repeat_batch(jnp.ones((1, count), jnp.int32), x) for count in (S, T)]
            seen = [ones[0]] if sources is None else [ones[0], sources.seen]
            segments = jnp.concatenate([*seen, ones[1] if mask is None else (mask != 0).astype(jnp.int32)], axis=1)

        def body(block, carry, block_lora):
            conditions = {"emb": emb, "still": still, "target_tokens": S}
            return block(
                *carry,
                **conditions,
                rotary=rotary,
                segments=segments,
                lora=block_lora,
                implementation=attention_implementation,
            ), None

        with jax.named_scope("blocks"):
            (tokens, text), _ = scan_layers(self.blocks, body, (tokens, text), child(lora, "blocks"), remat=remat)
        scale, shift = self.norm_out(emb, lora=child(lora, "norm_out"))
        out = self.proj_out(modulate(self.norm(tokens[:, :S]), shift, scale), lora=child(lora, "proj_out"))
        out = reshape(out, B, *grid, config.latent_channels, p, p)
        v = reshape(out.transpose(0, 1, 4, 2, 5, 3), B, h, w, config.latent_channels)
        return (v, tokens[:, :S]) if with_tokens else v

    def _condition(self, timestep, lora):
        """The activated conditioning vector [B, D]."""
        # In diffusers' order, which multiplies a timestep of 0 to 1 by the frequencies first: the angles of up to
        # 1000 radians would otherwise differ by their rounding.
        features = timestep_features(timestep / 1000, scale=1000).astype(self.proj_out.kernel.dtype)
        lora = child(lora, "time_text_embed", "timestep_embedder")
        return jax.nn.silu(self.time_text_embed.timestep_embedder(features, lora=lora))


def token_places(grid: tuple[int, int], sources: Sources | None, text_tokens: int) -> Int[Array, "B N 3"]:
    """Where all tokens stand: the target's (rows, columns), the sources', and the text's, the same on all three axes.

    Without sources they are the same in every sample, and B is 1.
    """
    target, start = jnp.asarray(image_places(0, *grid))[None], text_start(grid)
    if sources is None:
        parts, starts = [target], jnp.full(1, start)
    else:
        parts = [repeat_batch(target, sources.places), sources.places]
        starts = jnp.maximum(sources.text_start, start)
    text = starts[:, None] + jnp.arange(text_tokens)
    return jnp.concatenate([*parts, jnp.stack([text] * 3, axis=-1)], axis=1)


def rotary_angles(places: Int[Array, "B N 3"], axes: Sequence[int]) -> Float[Array, "B N H/2"]:
    """Rotary angles of tokens at frame, row and column, float32: `axes` of a head's H features turn with each."""
    angles = []
    for axis, size in enumerate(axes):
        frequencies = np.float32(1) / np.float32(ROPE_THETA) ** (np.arange(0, size, 2, dtype=np.float32) / size)
        angles.append(places[:, :, axis, None].astype(jnp.float32) * frequencies)
    return jnp.concatenate(angles, axis=-1)


class Block(nnx.Module):
    """One transformer block: joint attention, then a feed-forward in each stream, all modulated and gated."""

    def __init__(self, config: QwenImageConfig, *, rngs: nnx.Rngs):
        D = config.width
        self.norm = LayerNorm(D, affine=False)
        self.img_mod = nnx.Dict({"1": Linear(D, 6 * D, rngs=rngs, init=ZEROS)})  # the checkpoint's names
        self.txt_mod = nnx.Dict({"1": Linear(D, 6 * D, rngs=rngs, init=ZEROS)})
        self.attn = JointAttention(config.num_attention_heads, config.attention_head_dim, qk_norm=True, rngs=rngs)
        self.img_mlp = FeedForward(D, rngs=rngs)
        self.txt_mlp = FeedForward(D, rngs=rngs)

    def __call__(
        self, x, text, *, emb, still, target_tokens: int, rotary, segments=None, lora=None, implementation=None
    ):
        """Image tokens x [B, S, D], text tokens [B, T, D] -> the same.

        emb [B, D]: the activated conditioning vector; still [1, D]: the one for the image tokens after the first
        `target_tokens`, None where all take emb. rotary, segments: as JointAttention takes them.
        """

        def modulation(name, vector):
            weights = getattr(self, name)["1"]
            return jnp.split(weights(vector, lora=child(lora, name, "1"))[:, None], 6, axis=-1)

        parts = modulation("img_mod", emb)
        if still is not None:
            is_target = (jnp.arange(x.shape[1]) < target_tokens)[None, :, None]
            pairs = zip(parts, modulation("img_mod", still), strict=True)
            parts = [jnp.where(is_target, moving, resting) for moving, resting in pairs]
        shift, scale, gate, ff_shift, ff_scale, ff_gate = parts
        text_shift, text_scale, text_gate, text_ff_shift, text_ff_scale, text_ff_gate = modulation("txt_mod", emb)
        attended, text_attended = self.attn(
            modulate(self.norm(x), shift, scale),
            modulate(self.norm(text), text_shift, text_scale),
            rotary=rotary,
            segments=segments,
            lora=child(lora, "attn"),
            implementation=implementation,
        )
        x, text = x + gate * attended, text + text_gate * text_attended
        x = x + ff_gate * self.img_mlp(modulate(self.norm(x), ff_shift, ff_scale), lora=child(lora, "img_mlp"))
        normed = modulate(self.norm(text), text_ff_shift, text_ff_scale)
        return x, text + text_ff_gate * self.txt_mlp(normed, lora=child(lora, "txt_mlp"))
