"""AutoencoderKLQwenImage: images <-> latents at an eighth of the size, standardised channel by channel.

The autoencoder of a video model (Wan 2.1, arXiv 2503.20314), as Qwen-Image uses it: on single frames. Its convolutions
are causal in time, so the one frame of an image meets zeros in the place of a past, and the layers that change the
number of frames pass it through. What remains is a network over images [B, H, W, C]; the weights that only a second
frame would meet are kept, so that files are read and written whole.
"""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from firm_jax.errors import ConfigError
from firm_jax.interop.mapping import Rule
from firm_jax.models.attention import attention
from firm_jax.models.config import check_fields, require
from firm_jax.models.layers import KERNEL_INIT, Conv, reshape
from firm_jax.models.vae_kl import LOGVAR_RANGE, double_size

NAME = "AutoencoderKLQwenImage"


@dataclass(frozen=True)
class AutoencoderKLQwenImageConfig:
    """The architecture, and the statistics of the latents [z_dim] that a generator's latents are standardised by.

    temperal_downsample (so spelled in the files): at which levels a video would lose half its frames.
    """

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @classmethod
    def from_hf(cls, raw: Mapping) -> "AutoencoderKLQwenImageConfig":
        """From a diffusers config.json; a field left out has diffusers' default.

        The latents' statistics have none: a generator fed with wrongly scaled latents fails without a sign. Raises
        ConfigError for a field that is unknown, missing, or of a value that is not supported.
        """
        defaults = {
            "base_dim": 96,
            "z_dim": 16,
            "dim_mult": (1, 2, 4, 4),
            "num_res_blocks": 2,
            "temperal_downsample": (False, True, True),
        }
        required = ("latents_mean", "latents_std")
        fixed = {"attn_scales": ([],), "input_channels": (3,), "dropout": (0, 0.0)}
        check_fields(raw, NAME, used=(*defaults, *required), fixed=fixed)
        given = {field: raw.get(field, default) for field, default in defaults.items()}
        given |= {field: require(raw, field, NAME) for field in required}
        config = cls(**{field: tuple(value) if isinstance(value, list) else value for field, value in given.items()})
        config._check()
        return config

    def _check(self) -> None:
        for field, count in (
            ("temperal_downsample", len(self.dim_mult) - 1),
            ("latents_mean", self.z_dim),
            ("latents_std", self.z_dim),
        ):
            if len(getattr(self, field)) != count:
                raise ConfigError(f"{NAME}: {field} has {len(getattr(self, field))} entries, not {count}")
        if min(self.latents_std) <= 0:
            raise ConfigError(f"{NAME}: latents_std={list(self.latents_std)} must be positive")
        if any(width % 2 for width in self.widths[1:]):
            raise ConfigError(f"{NAME}: base_dim={self.base_dim} times dim_mult={list(self.dim_mult)} must be even")

    def to_hf(self) -> dict:
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"_class_name": NAME, "attn_scales": [], "dropout": 0.0, "input_channels": 3, **fields}

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each level, the image's size first."""
        return tuple(self.base_dim * multiple for multiple in self.dim_mult)

    def encode_flops(self, h: int, w: int) -> int:
        """Floating-point operations of encoding one image to h x w latents: convolutions and attention, our count."""
        places, widths = h * w * self.downscale**2, self.widths
        total = _conv_flops(places, 3, self.base_dim)
        for before, width in itertools.pairwise((self.base_dim, *widths)):
            total += _resnets_flops(places, before, width, self.num_res_blocks)
            if places > h * w:
                places //= 4
                total += _conv_flops(places, width, width)
        latents = 2 * self.z_dim
        total += _mid_flops(places, widths[-1]) + _conv_flops(places, widths[-1], latents)
        return total + _conv_flops(places, latents, latents, kernel=1)

    def decode_flops(self, h: int, w: int) -> int:
        """Floating-point operations of decoding one image's latents: convolutions and attention, by our count."""
        places, widths, latents = h * w, self.widths[::-1], self.z_dim
        total = _conv_flops(places, latents, latents, kernel=1) + _conv_flops(places, latents, widths[0])
        total += _mid_flops(places, widths[0])
        before = widths[0]
        for level, width in enumerate(widths):
            total += _resnets_flops(places, before, width, self.num_res_blocks + 1)
            if level < len(widths) - 1:
                places, before = 4 * places, width // 2
                total += _conv_flops(places, width, before)
        return total + _conv_flops(places, widths[-1], 3)

    def standardise(self, latents):
        """The autoencoder's latents [..., z_dim] -> a generator's, about of mean 0 and deviation 1 in each channel."""
        return (latents - jnp.asarray(self.latents_mean)) / jnp.asarray(self.latents_std)

    def restore(self, latents):
        """A generator's latents [..., z_dim] -> the autoencoder's."""
        return latents * jnp.asarray(self.latents_std) + jnp.asarray(self.latents_mean)

    def fitted_to(self, latents) -> "AutoencoderKLQwenImageConfig":
        """The config by which latents like these [..., z_dim] have mean 0 and deviation 1 in each channel."""
        flat = latents.reshape(-1, self.z_dim)
        return replace(self, latents_mean=tuple(flat.mean(0).tolist()), latents_std=tuple(flat.std(0).tolist()))


def _conv_flops(places: int, inputs: int, outputs: int, kernel: int = 3) -> int:
    return 2 * places * kernel**2 * inputs * outputs


def _resnets_flops(places: int, inputs: int, outputs: int, count: int) -> int:
    shortcut = _conv_flops(places, inputs, outputs, kernel=1) if inputs != outputs else 0
    convolutions = _conv_flops(places, inputs, outputs) + (2 * count - 1) * _conv_flops(places, outputs, outputs)
    return shortcut + convolutions


def _mid_flops(places: int, width: int) -> int:
    attends = _conv_flops(places, width, 4 * width, kernel=1) + 4 * places**2 * width
    return 2 * _resnets_flops(places, width, width, 1) + attends


class FrameConv(nnx.Module):
    """A convolution over time, rows and columns, causal in time, as one frame sees it: [B, H, W, I] -> [B, H, W, O].

    Zeros stand before the first frame, so that of the kernel [T, kh, kw, I, O] only the last slice in time counts.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, rngs: nnx.Rngs):
        seen = KERNEL_INIT(rngs.params(), (kernel, kernel, in_channels, out_channels), jnp.float32)
        self.kernel = nnx.Param(jnp.zeros((kernel, *seen.shape)).at[-1].set(seen))
        # Not zeros: a pixel whose channels are all zero, as of a grey picture, has no direction for the norms, and
        # gradients through it grow without bound.
        bound = (kernel**2 * in_channels) ** -0.5
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (out_channels,), minval=-bound, maxval=bound))

    def __call__(self, x):
        y = jax.lax.conv_general_dilated(
            x, self.kernel[-1], window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + self.bias[...]


class TimeConv(nnx.Module):
    """The weights of a convolution over three frames that a single one passes by: kept for the file alone."""

    def __init__(self, in_channels: int, out_channels: int):
        self.kernel = nnx.Param(jnp.zeros((3, 1, 1, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels))


class ChannelNorm(nnx.Module):
    """Each pixel's channels scaled to a mean square of 1, then by gamma, which has the file's shape [C, 1, ...]."""

    def __init__(self, channels: int, ndim: int = 4):
        self.gamma = nnx.Param(jnp.ones((channels,) + (1,) * (ndim - 1)))

    def __call__(self, x):
        y = x.astype(jnp.float32)
        # Bounded before the root, whose gradient at the zeros of a black picture would be infinite.
        norm = jnp.sqrt(jnp.maximum(jnp.square(y).sum(-1, keepdims=True), 1e-24))
        y = (y / norm).astype(x.dtype)
        return y * x.shape[-1] ** 0.5 * self.gamma.reshape(-1)


class ResidualBlock(nnx.Module):
    """Two normalised convolutions beside a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(in_channels)
        self.conv1 = FrameConv(in_channels, out_channels, 3, rngs=rngs)
        self.norm2 = ChannelNorm(out_channels)
        self.conv2 = FrameConv(out_channels, out_channels, 3, rngs=rngs)
        self.conv_shortcut = FrameConv(in_channels, out_channels, 1, rngs=rngs) if in_channels != out_channels else None

    def __call__(self, x):
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nnx.Module):
    """Single-head self-attention over all pixels, with a residual."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm(channels, ndim=3)
        self.to_qkv = Conv(channels, 3 * channels, 1, rngs=rngs)
        self.proj = Conv(channels, channels, 1, rngs=rngs)

    def __call__(self, x):
        B, H, W, C = x.shape
        q, k, v = (reshape(part, B, H * W, 1, C) for part in jnp.split(self.to_qkv(self.norm(x)), 3, axis=-1))
        # One head as wide as the block (384 at full size): wider than the fused kernels take.
        y = attention(q, k, v, implementation="xla")
        return x + self.proj(reshape(y, B, H, W, C))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResidualBlock(channels, channels, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(channels, rngs=rngs)])

    def __call__(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nnx.Module):
    """Half the size by a strided convolution padded on the right and below only."""

    def __init__(self, channels: int, in_time: bool, *, rngs: nnx.Rngs):
        padding = ((0, 1), (0, 1))
        self.resample = nnx.Dict({"1": Conv(channels, channels, 3, stride=2, padding=padding, rngs=rngs)})
        self.time_conv = TimeConv(channels, channels) if in_time else None

    def __call__(self, x):
        return self.resample["1"](x)


class Upsample(nnx.Module):
    """Twice the size by nearest neighbours, and a convolution to half the channels."""

    def __init__(self, channels: int, in_time: bool, *, rngs: nnx.Rngs):
        self.resample = nnx.Dict({"1": Conv(channels, channels // 2, 3, padding=1, rngs=rngs)})
        self.time_conv = TimeConv(channels, 2 * channels) if in_time else None

    def __call__(self, x):
        return self.resample["1"](double_size(x))


class UpBlock(nnx.Module):
    """Residual blocks, then, where asked for, twice the size."""

    def __init__(self, in_channels: int, out_channels: int, count: int, upsampler: Upsample | None, *, rngs: nnx.Rngs):
        self.resnets = nnx.List(_resnets(in_channels, out_channels, count, rngs))
        self.upsamplers = nnx.List([] if upsampler is None else [upsampler])

    def __call__(self, x):
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


def _resnets(in_channels: int, out_channels: int, count: int, rngs: nnx.Rngs) -> list[ResidualBlock]:
    widths = [in_channels] + [out_channels] * count
    return [ResidualBlock(*pair, rngs=rngs) for pair in itertools.pairwise(widths)]


class Encoder(nnx.Module):
    """Images [B, H, W, 3] -> mean and log-variance, side by side [B, h, w, 2C]."""

    def __init__(self, config: AutoencoderKLQwenImageConfig, *, rngs: nnx.Rngs):
        widths = config.widths
        self.conv_in = FrameConv(3, config.base_dim, 3, rngs=rngs)
        layers: list[nnx.Module] = []
        for level, width in enumerate(widths):
            before = widths[level - 1] if level else config.base_dim
            layers += _resnets(before, width, config.num_res_blocks, rngs)
            if level < len(widths) - 1:
                layers.append(Downsample(width, config.temperal_downsample[level], rngs=rngs))
        self.down_blocks = nnx.List(layers)
        self.mid_block = MidBlock(widths[-1], rngs=rngs)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = FrameConv(widths[-1], 2 * config.z_dim, 3, rngs=rngs)

    def __call__(self, x):
        x = self.conv_in(x)
        for layer in self.down_blocks:
            x = layer(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents [B, h, w, C] -> images [B, H, W, 3]."""

    def __init__(self, config: AutoencoderKLQwenImageConfig, *, rngs: nnx.Rngs):
        widths, in_time = config.widths[::-1], config.temperal_downsample[::-1]
        self.conv_in = FrameConv(config.z_dim, widths[0], 3, rngs=rngs)
        self.mid_block = MidBlock(widths[0], rngs=rngs)
        blocks = []
        for level, width in enumerate(widths):
            before = widths[level - 1] // 2 if level else width
            upsampler = Upsample(width, in_time[level], rngs=rngs) if level < len(widths) - 1 else None
            blocks.append(UpBlock(before, width, config.num_res_blocks + 1, upsampler, rngs=rngs))
        self.up_blocks = nnx.List(blocks)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = FrameConv(widths[-1], 3, 3, rngs=rngs)

    def __call__(self, x):
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class AutoencoderKLQwenImage(nnx.Module):
    """The autoencoder. It computes in the dtype of its parameters."""

    config_class = AutoencoderKLQwenImageConfig
    hf_class = NAME
    sharding_rules = ()  # small: replicated, the batch is split

    def __init__(self, config: AutoencoderKLQwenImageConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.z_dim
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = FrameConv(2 * channels, 2 * channels, 1, rngs=rngs)
        self.post_quant_conv = FrameConv(channels, channels, 1, rngs=rngs)

    def encode(self, images):
        """The latents' distribution: images [B, H, W, 3] in [-1, 1] -> (mean, logvar), each [B, h, w, C]."""
        with jax.named_scope("vae_encode"):
            moments = self.quant_conv(self.encoder(images.astype(self.quant_conv.kernel.dtype)))
            mean, logvar = jnp.split(moments, 2, axis=-1)
            return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents):
        """Latents [B, h, w, C], not standardised, -> images [B, H, W, 3], clipped to [-1, 1]."""
        with jax.named_scope("vae_decode"):
            images = self.decoder(self.post_quant_conv(latents.astype(self.post_quant_conv.kernel.dtype)))
            return jnp.clip(images, -1, 1)

    @staticmethod
    def weight_rules(config: AutoencoderKLQwenImageConfig) -> tuple[Rule, ...]:
        return ()  # our paths are PyTorch's
