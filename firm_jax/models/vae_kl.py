"""AutoencoderKL: images <-> latents at an eighth of the size, in the 16-channel form of Stable Diffusion 3.

A convolutional variational autoencoder (Rombach et al. 2022, arXiv 2112.10752). Images and latents are [B, H, W, C].
The latents here are the autoencoder's own; a generator works on `(latents - shift_factor) * scaling_factor`.
"""

import itertools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from firm_jax.errors import ConfigError
from firm_jax.interop.mapping import Rule
from firm_jax.models.attention import attention
from firm_jax.models.config import check_fields, require
from firm_jax.models.layers import Conv, GroupNorm, Linear

LOGVAR_RANGE = (-30.0, 20.0)  # as diffusers clips it, so that exp(logvar) stays finite


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The architecture, and the affine map between the autoencoder's latents and a generator's.

    force_upcast: activations overflow in float16, so decode in float32 or bfloat16 (SD3's own config says so).
    sample_size: the image size it was trained at; no arithmetic depends on it.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    mid_block_add_attention: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    force_upcast: bool = True
    sample_size: int = 1024

    def __post_init__(self):
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ConfigError(
                f"AutoencoderKL: block_out_channels {self.block_out_channels} must be multiples of "
                f"norm_num_groups {self.norm_num_groups}"
            )

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_hf(cls, raw: dict) -> "AutoencoderKLConfig":
        """From a diffusers config.json; a field left out has diffusers' default.

        The latents' scale and shift have none: a generator fed with wrongly scaled latents fails without a sign.
        """
        what = "AutoencoderKL"
        depth = len(require(raw, "block_out_channels", what))
        defaults = {
            "layers_per_block": 1,
            "norm_num_groups": 32,
            "mid_block_add_attention": True,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "force_upcast": True,
            "sample_size": 32,
        }
        required = ("latent_channels", "scaling_factor", "shift_factor")
        check_fields(
            raw,
            what,
            used=("block_out_channels", *required, *defaults),
            fixed={
                "act_fn": ("silu",),
                "in_channels": (3,),
                "out_channels": (3,),
                "latents_mean": (None,),
                "latents_std": (None,),
                "down_block_types": (["DownEncoderBlock2D"] * depth,),
                "up_block_types": (["UpDecoderBlock2D"] * depth,),
            },
        )
        return cls(
            block_out_channels=tuple(raw["block_out_channels"]),
            **{field: require(raw, field, what) for field in required},
            **{field: raw.get(field, default) for field, default in defaults.items()},
        )

    def standardise(self, latents):
        """The autoencoder's latents [..., latent_channels] -> a generator's."""
        return (latents - self.shift_factor) * self.scaling_factor

    def restore(self, latents):
        """A generator's latents [..., latent_channels] -> the autoencoder's."""
        return latents / self.scaling_factor + self.shift_factor

    def fitted_to(self, latents) -> "AutoencoderKLConfig":
        """The config by which latents like these [..., latent_channels] have mean 0 and deviation 1."""
        return replace(self, scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))

    def decode_flops(self, h: int, w: int) -> int:
        """Floating-point operations of decoding one image's latents: convolutions and attention, by our count."""
        widths, places = self.block_out_channels[::-1], h * w

        def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
            return 2 * places * kernel * kernel * inputs * outputs

        def resnet(inputs: int, outputs: int) -> int:
            shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
            return conv(inputs, outputs) + conv(outputs, outputs) + shortcut

        latents, top = self.latent_channels, widths[0]
        total = conv(latents, top) + 2 * resnet(top, top) + self.use_post_quant_conv * conv(latents, latents, 1)
        total += self.mid_block_add_attention * (4 * conv(top, top, 1) + 4 * places * places * top)
        for level, (before, width) in enumerate(zip((top, *widths), widths, strict=False)):
            if level > 0:
                places *= 4
                total += conv(before, before)
            total += resnet(before, width) + self.layers_per_block * resnet(width, width)
        return total + conv(widths[-1], 3)

    def to_hf(self) -> dict:
        depth = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * depth,
            "force_upcast": self.force_upcast,
            "in_channels": 3,
            "latent_channels": self.latent_channels,
            "latents_mean": None,
            "latents_std": None,
            "layers_per_block": self.layers_per_block,
            "mid_block_add_attention": self.mid_block_add_attention,
            "norm_num_groups": self.norm_num_groups,
            "out_channels": 3,
            "sample_size": self.sample_size,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "up_block_types": ["UpDecoderBlock2D"] * depth,
            "use_post_quant_conv": self.use_post_quant_conv,
            "use_quant_conv": self.use_quant_conv,
        }


class ResnetBlock(nnx.Module):
    """Two normalised convolutions beside a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(groups, in_channels)
        self.conv1 = Conv(in_channels, out_channels, 3, padding=1, rngs=rngs)
        self.norm2 = GroupNorm(groups, out_channels)
        self.conv2 = Conv(out_channels, out_channels, 3, padding=1, rngs=rngs)
        self.conv_shortcut = Conv(in_channels, out_channels, 1, rngs=rngs) if in_channels != out_channels else None

    def __call__(self, x):
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nnx.Module):
    """Single-head self-attention over all pixels, with a residual."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(groups, channels)
        self.to_q = Linear(channels, channels, rngs=rngs)
        self.to_k = Linear(channels, channels, rngs=rngs)
        self.to_v = Linear(channels, channels, rngs=rngs)
        self.to_out = Linear(channels, channels, rngs=rngs)

    def __call__(self, x):
        B, H, W, C = x.shape
        y = self.group_norm(x).reshape(B, H * W, C)
        q, k, v = (project(y)[:, :, None] for project in (self.to_q, self.to_k, self.to_v))
        # One head as wide as the block (512 at full size): wider than the fused kernels take.
        y = attention(q, k, v, implementation="xla")[:, :, 0]
        return x + self.to_out(y).reshape(B, H, W, C)


class MidBlock(nnx.Module):
    """Residual block, attention if asked for, residual block."""

    def __init__(self, channels: int, groups: int, add_attention: bool, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(channels, groups, rngs=rngs)] if add_attention else [])

    def __call__(self, x):
        x = self.resnets[0](x)
        for attend in self.attentions:
            x = attend(x)
        return self.resnets[1](x)


def _resnets(in_channels: int, out_channels: int, count: int, groups: int, rngs: nnx.Rngs) -> nnx.List:
    widths = [in_channels] + [out_channels] * count
    return nnx.List([ResnetBlock(*pair, groups, rngs=rngs) for pair in itertools.pairwise(widths)])


class DownBlock(nnx.Module):
    """Residual blocks, then half the size by a strided convolution padded on the right and below only."""

    def __init__(self, in_channels, out_channels, count, groups, downsample: bool, *, rngs: nnx.Rngs):
        self.resnets = _resnets(in_channels, out_channels, count, groups, rngs)
        padding = ((0, 1), (0, 1))
        self.downsample = (
            Conv(out_channels, out_channels, 3, stride=2, padding=padding, rngs=rngs) if downsample else None
        )

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsample is None else self.downsample(x)


class UpBlock(nnx.Module):
    """Residual blocks, then twice the size by nearest neighbours and a convolution."""

    def __init__(self, in_channels, out_channels, count, groups, upsample: bool, *, rngs: nnx.Rngs):
        self.resnets = _resnets(in_channels, out_channels, count, groups, rngs)
        self.upsample = Conv(out_channels, out_channels, 3, padding=1, rngs=rngs) if upsample else None

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsample is None else self.upsample(double_size(x))


def double_size(x):
    """Nearest-neighbour up-sampling: [B, H, W, C] -> [B, 2H, 2W, C]."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


class Encoder(nnx.Module):
    """Images [B, H, W, 3] -> mean and log-variance, side by side [B, h, w, 2C]."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = Conv(3, widths[0], 3, padding=1, rngs=rngs)
        self.down_blocks = nnx.List(
            DownBlock(widths[max(i - 1, 0)], width, config.layers_per_block, groups, i < last, rngs=rngs)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention, rngs=rngs)
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, padding=1, rngs=rngs)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latents [B, h, w, C] -> images [B, H, W, 3]."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = Conv(config.latent_channels, widths[0], 3, padding=1, rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention, rngs=rngs)
        self.up_blocks = nnx.List(
            UpBlock(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, i < last, rngs=rngs)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = Conv(widths[-1], 3, 3, padding=1, rngs=rngs)

    def __call__(self, x):
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The autoencoder. It computes in the dtype of its parameters."""

    config_class = AutoencoderKLConfig
    hf_class = "AutoencoderKL"
    sharding_rules = ()  # small: replicated, the batch is split

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = Conv(2 * channels, 2 * channels, 1, rngs=rngs) if config.use_quant_conv else None
        self.post_quant_conv = Conv(channels, channels, 1, rngs=rngs) if config.use_post_quant_conv else None

    def encode(self, images):
        """The latents' distribution: images [B, H, W, 3] in [-1, 1] -> (mean, logvar), each [B, h, w, C]."""
        with jax.named_scope("vae_encode"):
            moments = self.encoder(images.astype(self.encoder.conv_in.kernel.dtype))
            if self.quant_conv is not None:
                moments = self.quant_conv(moments)
            mean, logvar = jnp.split(moments, 2, axis=-1)
            return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents):
        """Latents [B, h, w, C], unscaled, -> images [B, H, W, 3], about in [-1, 1] and not clipped."""
        with jax.named_scope("vae_decode"):
            latents = latents.astype(self.decoder.conv_in.kernel.dtype)
            if self.post_quant_conv is not None:
                latents = self.post_quant_conv(latents)
            return self.decoder(latents)

    @staticmethod
    def weight_rules(config: AutoencoderKLConfig) -> tuple[Rule, ...]:
        return (
            Rule(r"(.+)\.(down|up)sample\.kernel", r"\1.\2samplers.0.conv.weight"),
            Rule(r"(.+)\.(down|up)sample\.bias", r"\1.\2samplers.0.conv.bias"),
            Rule(r"(.+)\.to_out\.kernel", r"\1.to_out.0.weight"),
            Rule(r"(.+)\.to_out\.bias", r"\1.to_out.0.bias"),
        )
