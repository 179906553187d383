"""The Stable Diffusion 3 pipeline: SD3-medium, SD3.5-medium, SD3.5-large."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from firm_jax import models
from firm_jax.errors import ConfigError
from firm_jax.generation.folder import check_parts, present_parts, read_scheduler, write_index, write_scheduler
from firm_jax.generation.generator import Generator, read_model_index
from firm_jax.generation.schedules import SCHEDULER_DEFAULTS, sigmas_from_config
from firm_jax.generation.text import (
    CLIP_ENCODERS,
    DEFAULT_TEXT_TOKENS,
    T5_ENCODER,
    Conditioning,
    TextEncoders,
    tokenizer_name,
)
from firm_jax.models.sd3 import SD3Config
from firm_jax.models.vae_kl import AutoencoderKLConfig

PIPELINE = "StableDiffusion3Pipeline"
REQUIRED = ("transformer", "vae", "scheduler", *CLIP_ENCODERS, *map(tokenizer_name, CLIP_ENCODERS))
T5_PARTS = (T5_ENCODER, tokenizer_name(T5_ENCODER))
UNSUPPORTED = ("image_encoder", "feature_extractor")  # of IP adapters


class SD3Generator(Generator):
    """Text to image with the SD3 transformer, two CLIP text encoders, optionally T5, and AutoencoderKL."""

    def __init__(
        self,
        transformer: nnx.Module,
        vae: nnx.Module,
        text_encoders: TextEncoders,
        scheduler: Mapping,
        mesh: Mesh | None = None,
        lora: dict | None = None,
    ):
        super().__init__(mesh, lora)
        self.config, self.vae_config = transformer.config, vae.config
        self.sharding_rules = transformer.sharding_rules
        self.graphdef, self.params = nnx.split(transformer)
        self.vae_graphdef, self.vae_params = nnx.split(vae)
        self.text_encoders, self.scheduler = text_encoders, dict(scheduler)
        self.timesteps = (SCHEDULER_DEFAULTS | self.scheduler)["num_train_timesteps"]
        self._check_parts()

    def _check_parts(self) -> None:
        """ConfigError unless the networks fit each other."""
        config, text = self.config, self.text_encoders.configs
        clip = [text[name] for name in CLIP_ENCODERS]
        latents, pooled, width = config.in_channels, config.pooled_projection_dim, config.joint_attention_dim
        sizes = [
            ("channels of the transformer's output", config.velocity_channels, latents),
            ("latent channels of the vae", self.vae_config.latent_channels, latents),
            ("pooled features of the CLIP encoders", sum(encoder.projection_dim for encoder in clip), pooled),
            ("width of the T5 encoder", text[T5_ENCODER].d_model if T5_ENCODER in text else width, width),
        ]
        for what, size, needed in sizes:
            if size != needed:
                raise ConfigError(f"the pipeline's parts do not fit: {what} {size}, by the transformer {needed}")
        if (together := sum(encoder.hidden_size for encoder in clip)) > width:
            raise ConfigError(
                f"the pipeline's parts do not fit: CLIP's states are {together} wide together, more than the "
                f"transformer's joint_attention_dim {width}"
            )

    @classmethod
    def from_folder(
        cls, folder: Path, index: Mapping, dtype, mesh: Mesh | None, lora: dict | None, quantize: str | None = None
    ) -> "SD3Generator":
        """The pipeline whose model_index.json is `index`; text_encoder_3 (T5) may be null there."""
        with_t5 = T5_ENCODER in present_parts(index)
        check_parts(folder, index, (*REQUIRED, *(T5_PARTS if with_t5 else ())))
        transformer = models.from_pretrained(folder / "transformer", dtype=dtype, mesh=mesh, quantize=quantize)
        vae = models.from_pretrained(folder / "vae", dtype="float32", mesh=mesh)
        encoders = (*CLIP_ENCODERS, T5_ENCODER) if with_t5 else CLIP_ENCODERS
        width = transformer.config.joint_attention_dim
        text_encoders = TextEncoders.from_folder(folder, encoders, width, dtype, mesh)
        return cls(transformer, vae, text_encoders, read_scheduler(folder), mesh, lora)

    @classmethod
    def from_configs(
        cls, configs: Mapping[str, Mapping], dtype, mesh: Mesh, quantize: str | None = None
    ) -> "SD3Generator":
        """The pipeline with shapes in the place of weights and without tokenizers: to be compiled, not run.

        configs: part of the pipeline -> the content of its JSON file, as `read_configs` gives them.
        """

        def network(part, dtype, quantize=None):
            return models.from_config(configs[part], dtype, mesh, f"the config.json of {part}", quantize)

        encoders = [part for part in (*CLIP_ENCODERS, T5_ENCODER) if part in configs]
        width = configs["transformer"]["joint_attention_dim"]
        text_encoders = TextEncoders({}, {part: network(part, dtype) for part in encoders}, width, mesh)
        transformer = network("transformer", dtype, quantize)
        return cls(transformer, network("vae", "float32"), text_encoders, configs["scheduler"], mesh)

    @staticmethod
    def read_configs(folder: Path) -> dict[str, dict]:
        """The JSON files of a pipeline folder by part; `text_encoder_3` only where the folder has it."""
        parts = ["transformer", "vae", *CLIP_ENCODERS]
        if (read_model_index(folder).get(T5_ENCODER) or [None])[0] is not None:
            parts.append(T5_ENCODER)
        return {part: models.read_config(folder / part) for part in parts} | {"scheduler": read_scheduler(folder)}

    def save_pretrained(self, folder, dtype=None) -> None:
        """Write the pipeline as a folder that diffusers opens; dtype None keeps that of each part's weights."""
        folder = Path(folder)
        parts = {
            "transformer": nnx.merge(self.graphdef, self.params),
            "vae": nnx.merge(self.vae_graphdef, self.vae_params),
            **self.text_encoders.networks(),
        }
        index: dict = {name: [None, None] for name in (*T5_PARTS, *UNSUPPORTED)}
        for name, network in parts.items():
            models.save_pretrained(network, folder / name, dtype=dtype)
            index[name] = ["transformers" if "text_encoder" in name else "diffusers", network.hf_class]
        for encoder, tokenizer in self.text_encoders.tokenizers.items():
            name = tokenizer_name(encoder)
            tokenizer.save_pretrained(folder / name)
            index[name] = ["transformers", type(tokenizer).__name__]
        write_scheduler(folder, self.scheduler)
        write_index(folder, PIPELINE, index)

    def condition(self, prompts: Sequence[str], settings, images=None, sizes=None):
        """See `Generator.condition`."""
        conditioning = self.encode_prompts(prompts, settings.max_text_tokens)
        negative = self.encode_prompts([""], settings.max_text_tokens) if settings.guidance > 1 else None
        return conditioning, negative

    def encode_prompts(self, prompts: Sequence[str], max_text_tokens: int | None = None) -> Conditioning:
        """Context [P, T, D] and pooled vectors [P, E]; T is CLIP's length plus `max_text_tokens` (None: 256)."""
        return self.text_encoders(prompts, DEFAULT_TEXT_TOKENS if max_text_tokens is None else max_text_tokens)

    def velocity(
        self,
        params,
        lora: dict | None,
        x: Float[Array, "B h w C"],
        t: Float[Array, "B"],
        conditioning: Conditioning,
        *,
        remat: str = "none",
    ) -> Float[Array, "B h w C"]:
        """The predicted `noise - image`, float32, at noise share t in [0, 1]; pure, for rollout and training alike."""
        transformer = nnx.merge(self.graphdef, params)
        timestep = t.astype(jnp.float32) * self.timesteps
        v = transformer(x, timestep, conditioning.context, conditioning.pooled, lora=lora, remat=remat)
        return v.astype(jnp.float32)

    def decode(self, vae_params, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """The images of final latents, float32 in [0, 1]; pure."""
        images = nnx.merge(self.vae_graphdef, vae_params).decode(self.vae_config.restore(latents))
        return jnp.clip(images / 2 + 0.5, 0, 1).astype(jnp.float32)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of an image's latents; ConfigError for a size that the networks do not take."""
        return latent_shape(self.config, self.vae_config, height, width)

    @staticmethod
    def check_size(folder: Path, height: int, width: int) -> None:
        """ConfigError for a size that the pipeline in a folder does not take; reads its configs only."""
        config = SD3Config.from_hf(models.read_config(folder / "transformer"))
        vae_config = AutoencoderKLConfig.from_hf(models.read_config(folder / "vae"))
        latent_shape(config, vae_config, height, width)

    def forward_flops(self, height: int, width: int, conditioning: Conditioning) -> int:
        """Floating-point operations of the transformer for one image at one noise level, by our count."""
        return self.config.forward_flops(self._image_tokens(height, width), conditioning.context.shape[1])

    def backward_flops(self, height: int, width: int, conditioning: Conditioning) -> int:
        """Those of the gradient of a LoRA's loss, its forward pass left out."""
        return self.config.backward_flops(self._image_tokens(height, width), conditioning.context.shape[1])

    def decode_flops(self, height: int, width: int) -> int:
        """Those of decoding one image."""
        h, w, _ = self.latent_shape(height, width)
        return self.vae_config.decode_flops(h, w)

    def _image_tokens(self, height: int, width: int) -> int:
        h, w, _ = self.latent_shape(height, width)
        return h * w // self.config.patch_size**2

    def image_size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width in pixels of latents h x w."""
        return h * self.vae_config.downscale, w * self.vae_config.downscale

    def sigmas(self, steps: int, height: int, width: int) -> Float[Array, "steps+1"]:
        """The schedule that the folder's scheduler config asks for."""
        return sigmas_from_config(self.scheduler, steps, self._image_tokens(height, width))


def latent_shape(config: SD3Config, vae_config: AutoencoderKLConfig, height: int, width: int) -> tuple[int, int, int]:
    """(h, w, C) of the latents of an image of `height` x `width` pixels; ConfigError for a size that does not fit."""
    scale = vae_config.downscale
    multiple = scale * config.patch_size
    if height % multiple or width % multiple:
        raise ConfigError(f"height and width must be multiples of {multiple}, not {height} x {width}")
    config.check_latent_size(height // scale, width // scale)
    return height // scale, width // scale, config.in_channels
