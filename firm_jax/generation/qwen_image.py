"""The Qwen-Image pipelines: text to image (Qwen-Image, -2512), and editing (Edit; Edit-2509 and -2511 as Edit-Plus)."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from firm_jax import models
from firm_jax.data.patches import ImageConfig, bucket, image_digest, image_processor_json, smart_resize
from firm_jax.errors import ConfigError, DataError
from firm_jax.generation.generator import Generator, decoded_together
from firm_jax.generation.qwen_text import EDIT, EDIT_PLUS, TEXT_TO_IMAGE, QwenTextEncoder, Template
from firm_jax.generation.sources import as_batch, cropped_size, resized, size_of_area, to_image
from firm_jax.generation.text import load_tokenizer
from firm_jax.interop.pipeline_folder import check_parts, read_scheduler, write_index, write_scheduler
from firm_jax.mesh import batch_size, on_mesh, replicate, shard_batch, to_host
from firm_jax.models.mmdit import patchify
from firm_jax.models.qwen_image import Sources, pack_sources
from firm_jax.typing import Array, Float, Int

LIBRARIES = {"transformer": "diffusers", "vae": "diffusers", "text_encoder": "transformers"}


class QwenConditioning(NamedTuple):
    """P prompts as the transformer takes them: text tokens, 0 in the mask for padding, and source images or None."""

    context: Float[Array, "P T D"]
    mask: Int[Array, "P T"]
    sources: Sources | None


class QwenImageGenerator(Generator):
    """Text to image with the Qwen-Image transformer, Qwen2.5-VL as text encoder, and AutoencoderKLQwenImage."""

    pipeline = "QwenImagePipeline"
    template: Template = TEXT_TO_IMAGE
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    empty_prompt = " "
    even_sigmas = True
    default_text_tokens = 512

    def __init__(
        self,
        transformer: nnx.Module,
        vae: nnx.Module,
        text_encoder: QwenTextEncoder,
        scheduler: Mapping,
        mesh: Mesh | None = None,
        lora: dict | None = None,
        processor_folder: Path | None = None,
    ):
        super().__init__(transformer, vae, scheduler, mesh, lora)
        self.text_encoder, self.processor_folder = text_encoder, processor_folder
        self.encode_sources_jitted = jax.jit(self.encode_sources)
        for what, size, needed in (
            ("latent channels of the vae", vae.config.z_dim, transformer.config.latent_channels),
            ("width of the text encoder", text_encoder.config.text.hidden_size, transformer.config.joint_attention_dim),
        ):
            if size != needed:
                raise ConfigError(f"the pipeline's parts do not fit: {what} {size}, by the transformer {needed}")

    @classmethod
    def from_folder(
        cls, folder: Path, index: Mapping, dtype, mesh: Mesh | None, lora: dict | None, quantize: str | None = None
    ):
        """The pipeline whose model_index.json is `index`."""
        check_parts(folder, index, cls.parts)
        processor = folder / "processor" if cls.edits else None
        text_encoder = QwenTextEncoder(
            load_tokenizer(folder / "tokenizer"),
            models.from_pretrained(folder / "text_encoder", dtype=dtype, mesh=mesh),
            ImageConfig.from_folder(processor) if processor else None,
            cls.template,
            mesh,
        )
        transformer = models.from_pretrained(folder / "transformer", dtype=dtype, mesh=mesh, quantize=quantize)
        vae = models.from_pretrained(folder / "vae", dtype="float32", mesh=mesh)
        return cls(transformer, vae, text_encoder, read_scheduler(folder), mesh, lora, processor)

    @classmethod
    def from_configs(cls, configs: Mapping[str, Mapping], dtype, mesh: Mesh, quantize: str | None = None):
        """The pipeline with shapes in the place of weights and without a tokenizer: to be compiled, not run.

        configs: part of the pipeline -> the content of its JSON file, as `read_configs` gives them.
        """

        def network(part, dtype, quantize=None):
            return models.from_config(configs[part], dtype, mesh, f"the config.json of {part}", quantize)

        images = ImageConfig.from_json(configs["processor"], "the processor's file") if cls.edits else None
        text_encoder = QwenTextEncoder(None, network("text_encoder", dtype), images, cls.template, mesh)
        transformer = network("transformer", dtype, quantize)
        return cls(transformer, network("vae", "float32"), text_encoder, configs["scheduler"], mesh)

    @classmethod
    def read_configs(cls, folder: Path) -> dict[str, dict]:
        """The JSON files of a pipeline folder by part."""
        configs = {part: models.read_config(folder / part) for part in LIBRARIES}
        if cls.edits:
            configs["processor"] = image_processor_json(folder / "processor")[0]
        return configs | {"scheduler": read_scheduler(folder)}

    def save_pretrained(self, folder, dtype=None) -> None:
        """Write the pipeline as a folder that diffusers opens; dtype None keeps that of each part's weights."""
        folder = Path(folder)
        networks = {
            "transformer": nnx.merge(self.graphdef, self.params),
            "vae": nnx.merge(self.vae_graphdef, self.vae_params),
            "text_encoder": self.text_encoder.network(),
        }
        for name, network in networks.items():
            models.save_pretrained(network, folder / name, dtype=dtype)
        index = {name: [LIBRARIES[name], network.hf_class] for name, network in networks.items()}
        self.text_encoder.tokenizer.save_pretrained(folder / "tokenizer")
        index["tokenizer"] = ["transformers", "Qwen2Tokenizer"]
        if self.processor_folder is not None:
            if not (folder / "processor").exists() or not self.processor_folder.samefile(folder / "processor"):
                shutil.copytree(self.processor_folder, folder / "processor", dirs_exist_ok=True)
            index["processor"] = ["transformers", "Qwen2VLProcessor"]
        write_scheduler(folder, self.scheduler)
        write_index(folder, self.pipeline, index)

    def condition(self, prompts: Sequence[str], settings, images=None, sizes=None):
        """See `Generator.condition`. Each distinct prompt (with its images) is encoded once."""
        pictures = self._pictures(prompts, images, settings) if self.edits else [()] * len(prompts)
        keys = [
            (prompt, *(image_digest(np.asarray(image)) for image in own))
            for prompt, own in zip(prompts, pictures, strict=True)
        ]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        kept = sorted(first.values())
        index = np.array([kept.index(first[key]) for key in keys])
        prompts, pictures = [prompts[row] for row in kept], [pictures[row] for row in kept]
        if sizes is None:
            sizes = [[(image.height, image.width) for image in own] for own in pictures]
        elif self.edits:
            sizes = [self._seen(own, settings) for own in sizes]
        seen = [self._condition_images(own, settings) for own in pictures]
        sequences = self.text_encoder.sequences(prompts, seen, self._limit(settings))
        length = self._text_length(sequences, sizes, settings)
        sources = self._sources(pictures, sizes, settings) if self.edits else None
        conditioning = QwenConditioning(*self.text_encoder(sequences, length), sources)
        conditioning = jax.tree.map(lambda table: table[index], conditioning)
        negative = None
        if settings.guidance > 1:
            # Without pictures one row serves all.
            rows = range(len(prompts)) if self.edits else range(1)
            empty = self.text_encoder.sequences([self.empty_prompt] * len(rows), [seen[row] for row in rows], None)
            context, mask = self.text_encoder(empty, length)
            if self.edits:
                context, mask = context[index], mask[index]
            negative = QwenConditioning(context, mask, conditioning.sources)
        return replicate((conditioning, negative), self.mesh)

    def _limit(self, settings) -> int:
        given = settings.max_text_tokens
        if given is not None and given < 1:
            raise ConfigError(f"max_text_tokens must be at least 1, not {given}")
        return self.default_text_tokens if given is None else given

    def _text_length(self, sequences, sizes, settings) -> int:
        """Tokens of the context: of texts of `max_text_tokens` with their pictures, without that of these texts."""
        if settings.max_text_tokens is not None:
            return settings.max_text_tokens + max(self._image_tokens_in_text(own, settings) for own in sizes)
        return bucket(max(len(sequence.ids) for sequence in sequences) - self.template.dropped, smallest=16)

    def _image_tokens_in_text(self, sizes, settings) -> int:
        return 0

    def _condition_images(self, images, settings) -> list:
        return []

    def velocity(
        self,
        params,
        lora: dict | None,
        x: Float[Array, "B h w C"],
        t: Float[Array, "B"],
        conditioning: QwenConditioning,
        *,
        remat: str | None = None,
    ) -> Float[Array, "B h w C"]:
        """See `Generator.velocity`."""
        transformer = nnx.merge(self.graphdef, params)
        timestep = t.astype(jnp.float32) * self.timesteps
        context, mask, sources = conditioning
        v = transformer(x, timestep, context, mask, sources=sources, lora=lora, remat=remat)
        return v.astype(jnp.float32)

    def guide(self, negative, positive, guidance):
        """Classifier-free guidance, after which every patch has the norm that it has without (true CFG)."""
        guided = super().guide(negative, positive, guidance)

        def norms(v):
            return jnp.sqrt(jnp.square(patchify(v, self.config.patch_size)).sum(-1))

        B, h, w, _ = positive.shape
        p = self.config.patch_size
        # A patch of zeros stays one.
        scale = (norms(positive) / jnp.maximum(norms(guided), 1e-12)).reshape(B, h // p, w // p, 1)
        return guided * scale.repeat(p, 1).repeat(p, 2)

    def encode_sources(self, vae_params, images: Float[Array, "B H W 3"]) -> Float[Array, "B S F"]:
        """Images in [-1, 1] as the transformer's tokens; pure."""
        mean, _ = nnx.merge(self.vae_graphdef, vae_params).encode(images)
        return patchify(self.vae_config.standardise(mean.astype(jnp.float32)), self.config.patch_size)

    def sample_tokens(self, height: int, width: int, conditioning) -> tuple[int, int]:
        """Image tokens, source images' among them, and text tokens of one sample in the transformer."""
        image, text = super().sample_tokens(height, width, conditioning)
        return image + (0 if conditioning.sources is None else conditioning.sources.tokens.shape[1]), text


class QwenImageEditGenerator(QwenImageGenerator):
    """Image editing with one source image, which the text encoder and the transformer see at the same size."""

    pipeline = "QwenImageEditPipeline"
    template = EDIT
    parts = (*QwenImageGenerator.parts, "processor")
    default_text_tokens = 1024
    edits, max_images = True, 1
    source_area, condition_area = 1024 * 1024, 1024 * 1024

    def _area(self, settings, which: str) -> int:
        given = getattr(settings, which)
        return getattr(self, which) if given is None else given

    def _pictures(self, prompts, images, settings) -> list[list]:
        """The source images of each prompt, cropped where that is asked for."""
        images = list(images) if isinstance(images, list | tuple) else [images]
        if len(prompts) == 1 and not any(isinstance(own, list | tuple) for own in images):
            images = [images]  # several of the one prompt
        if len(images) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts need the source images of as many, not of {len(images)}")
        crop_to = (settings.height, settings.width) if settings.crop_sources else None
        pictures = [[to_image(image, crop_to) for image in own] for own in map(listed, images)]
        for number, own in enumerate(pictures):
            if not 1 <= len(own) <= self.max_images:
                raise DataError(
                    f"prompt {number} has {len(own)} source images; {self.pipeline} takes 1 to {self.max_images}"
                )
        return pictures

    def _condition_images(self, images, settings) -> list:
        area = self._area(settings, "condition_area")
        return [resized(image, size_of_area(area, image.height, image.width)) for image in images]

    def _image_tokens_in_text(self, sizes, settings) -> int:
        config, area = self.text_encoder.images, self._area(settings, "condition_area")
        factor = config.patch_size * config.merge_size
        limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
        sides = [smart_resize(*size_of_area(area, *size), factor=factor, **limits) for size in sizes]
        return sum(height * width // factor**2 for height, width in sides)

    def _seen(self, sizes, settings):
        """The sizes (height, width) of a prompt's images after cropping."""
        target = settings.height, settings.width
        return [cropped_size(*size, target) for size in sizes] if settings.crop_sources else sizes

    def _sources(self, pictures, sizes, settings) -> Sources:
        """The pictures' latents as tokens, on the host; each distinct picture is encoded once."""
        area, side = self._area(settings, "source_area"), self.vae_config.downscale * self.config.patch_size

        def grid(size):
            height, width = size_of_area(area, *size)
            if height % side or width % side:
                raise ConfigError(f"source images have sides that are multiples of 32 pixels; this model needs {side}")
            return height // side, width // side

        distinct = {image_digest(np.asarray(image)): image for own in pictures for image in own}
        by_size: dict[tuple[int, int], dict] = {}
        for digest, image in distinct.items():
            size = size_of_area(area, image.height, image.width)
            by_size.setdefault(size, {})[digest] = resized(image, size)
        tokens = {}
        for size, group in by_size.items():
            tokens |= dict(zip(group, self._encode_on_host(as_batch(list(group.values())), size), strict=True))
        samples = [
            [(tokens[image_digest(np.asarray(image))], grid((image.height, image.width))) for image in own]
            for own in pictures
        ]
        length = max(sum(rows * columns for rows, columns in map(grid, own)) for own in sizes)
        return pack_sources(samples, length)

    def _encode_on_host(self, images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Tokens [B, S, F] of images of one size, a few at a time."""
        devices = batch_size(self.mesh)
        chunk = decoded_together(len(images) + -len(images) % devices, size, devices)
        parts = []
        for start in range(0, len(images), chunk):
            rows = np.minimum(np.arange(start, start + chunk), len(images) - 1)
            with on_mesh(self.mesh):
                parts.append(to_host(self.encode_sources_jitted(self.vae_params, shard_batch(images[rows], self.mesh))))
        return np.concatenate(parts)[: len(images)]


class QwenImageEditPlusGenerator(QwenImageEditGenerator):
    """Image editing with up to three numbered source images, small ones for the text encoder (Edit-2509, -2511)."""

    pipeline = "QwenImageEditPlusPipeline"
    template = EDIT_PLUS
    max_images = 3
    source_area, condition_area = 1024 * 1024, 384 * 384


def listed(images) -> list:
    """The source images of one prompt: a sequence of them, or a single one."""
    return list(images) if isinstance(images, list | tuple) else [images]
