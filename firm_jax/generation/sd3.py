"""The Stable Diffusion 3 pipeline: SD3-medium, SD3.5-medium, SD3.5-large."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from firm_jax import models
from firm_jax.errors import ConfigError
from firm_jax.generation.generator import Generator, read_model_index
from firm_jax.generation.text import (
    CLIP_ENCODERS,
    DEFAULT_TEXT_TOKENS,
    T5_ENCODER,
    Conditioning,
    TextEncoders,
    tokenizer_name,
)
from firm_jax.interop.pipeline_folder import check_parts, present_parts, read_scheduler, write_index, write_scheduler
from firm_jax.typing import Array, Float

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
        super().__init__(transformer, vae, scheduler, mesh, lora)
        self.text_encoders = text_encoders
        self._check_parts()

    def _check_parts(self) -> None:
        """ConfigError unless the networks fit each other."""
        config, text = self.config, self.text_encoders.configs
        clip = [text[name] for name in CLIP_ENCODERS]
        latents, pooled, width = config.latent_channels, config.pooled_projection_dim, config.joint_attention_dim
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
        remat: str | None = None,
    ) -> Float[Array, "B h w C"]:
        """See `Generator.velocity`."""
        transformer = nnx.merge(self.graphdef, params)
        timestep = t.astype(jnp.float32) * self.timesteps
        v = transformer(x, timestep, conditioning.context, conditioning.pooled, lora=lora, remat=remat)
        return v.astype(jnp.float32)
