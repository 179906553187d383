"""Prompts to images with any supported diffusers pipeline folder."""

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from firm_jax import models
from firm_jax.errors import ConfigError
from firm_jax.generation.schedules import SCHEDULER_DEFAULTS, sigmas_from_config
from firm_jax.generation.solvers import integrate
from firm_jax.interop.files import read_json
from firm_jax.interop.hub import resolve
from firm_jax.interop.lora_formats import read_adapter, tree_of
from firm_jax.mesh import batch_size, on_mesh, place_as, shard_batch, to_host
from firm_jax.models.layers import repeat_batch, reshape, take_rows
from firm_jax.models.lora import lora_shardings, scaled
from firm_jax.typing import Array, Float, Int, PRNGKeyArray

# Pipeline class in model_index.json -> module of this package, class
PIPELINES = {
    "StableDiffusion3Pipeline": ("sd3", "SD3Generator"),
    "QwenImagePipeline": ("qwen_image", "QwenImageGenerator"),
    "QwenImageEditPipeline": ("qwen_image", "QwenImageEditGenerator"),
    "QwenImageEditPlusPipeline": ("qwen_image", "QwenImageEditPlusGenerator"),
}

# That one device decodes at a time: four images of 512 x 512, whose activations take 5 GiB on a TPU.
DECODED_PIXELS = 2**20


class Generator:
    """A pipeline's networks on a mesh, and the pure functions over them that sampling and training share.

    `params` and `vae_params` are the weights as pytrees: they, and everything that changes, are arguments of the pure
    functions, so that a caller can jit them into a program of its own. Latents are [B, h, w, C] there, in the
    transformer's units; `lora` is a tree of adapters with its strength folded in (models/lora.py), or None. A
    subclass for each family of pipelines gives `condition` and `velocity`.

    edits: whether it takes source images, `max_images` of them for each prompt. even_sigmas: whether the schedule
    starts from evenly spaced noise shares, whatever the scheduler's own table holds.
    """

    edits: bool = False
    max_images: int = 0
    even_sigmas: bool = False

    def __init__(
        self, transformer: nnx.Module, vae: nnx.Module, scheduler: Mapping, mesh: Mesh | None, lora: dict | None
    ):
        self.mesh, self.lora = mesh, lora
        self.config, self.vae_config = transformer.config, vae.config
        self.sharding_rules = transformer.sharding_rules
        self.weight_rules = transformer.weight_rules(transformer.config)
        self.graphdef, self.params = nnx.split(transformer)
        self.vae_graphdef, self.vae_params = nnx.split(vae)
        self.scheduler = dict(scheduler)
        self.timesteps = (SCHEDULER_DEFAULTS | self.scheduler)["num_train_timesteps"]
        self._draw = jax.jit(self._draw_rows, static_argnames=("shape", "solver"))
        self.decode_jitted = jax.jit(self.decode)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id,
        dtype="bfloat16",
        mesh: Mesh | None = None,
        lora: dict | str | os.PathLike | None = None,
        quantize: str | None = None,
    ):
        """A generator from a diffusers pipeline folder or Hugging Face id.

        dtype: of the transformer and the text encoders; the autoencoder is kept in float32. lora: a tree of adapters
        with its strength folded in, or the folder or file of a LoRA that diffusers, PEFT or `firm-jax export` wrote,
        which is applied at the strength it was trained with. quantize: "int8" to hold the kernels of the
        transformer's blocks so, with a float32 scale for each output channel (models/quantize.py). Raises ConfigError
        for a folder that is not a supported pipeline, WeightsError for weights that are missing or do not fit.
        """
        folder = resolve(path_or_id)
        index = read_model_index(folder)
        if lora is None or isinstance(lora, dict):
            return pipeline_class(index).from_folder(folder, index, dtype, mesh, lora, quantize)
        adapter = read_adapter(lora)  # before the weights: a wrong path is told at once
        generator = pipeline_class(index).from_folder(folder, index, dtype, mesh, None, quantize)
        generator.lora = generator.place_lora(tree_of(adapter, generator.params, generator.weight_rules, str(lora)))
        generator.lora = scaled(generator.lora, adapter.alpha / adapter.rank)
        return generator

    def place_lora(self, tree):
        """A LoRA's host arrays on the mesh, each split as the kernel that it adapts."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return place_as(tree, lora_shardings(tree, self.sharding_rules, self.mesh))

    def sample(
        self,
        prompts: Sequence[str],
        images=None,
        steps: int = 28,
        guidance: float = 4.5,
        solver: str = "euler",
        seed: int = 0,
        noise: Float[np.ndarray, "B C h w"] | None = None,
        height: int = 512,
        width: int = 512,
        max_text_tokens: int | None = None,
        source_area: int | None = None,
        condition_area: int | None = None,
        crop_sources: bool = False,
    ) -> Float[np.ndarray, "B H W 3"]:
        """One image a prompt, float32 in [0, 1].

        Args:
            prompts: B texts; B times the same one gives B different images.
            images: of editing pipelines, for each prompt its source image or the list of them (Pillow images, or
                arrays [H, W, 3], uint8 or float in [0, 1]); of a single prompt also just its images.
            steps: network evaluations (two forward passes each with guidance).
            guidance: strength of classifier-free guidance against the empty prompt; at 1 and below there is none.
                Qwen-Image's keeps the velocity's norm ("true CFG").
            solver: "euler", "dpm2" or "sde".
            seed: of the initial noise and of the "sde" solver; image i depends on (seed, i) alone.
            noise: the initial latents, as diffusers lays them out, in the place of the seed's.
            height, width: of the images, in pixels.
            max_text_tokens: where the text is cut for T5 (by default 256) or Qwen2.5-VL (by default 512, for edits
                1024, source images not counted).
            source_area, condition_area: pixels that source images have, about, when they are shown to the transformer
                and to the text encoder; by default those of the published pipeline.
            crop_sources: cut source images about their centres to the aspect ratio of the new image.

        Raises:
            ConfigError: for an unsupported size, no prompts, source images where the pipeline takes none, noise of
                another shape, an unknown solver, or steps below 1.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ConfigError("sample needs at least one prompt")
        latents = self._latents(
            prompts, images, steps=steps, guidance=guidance, solver=solver, seed=seed, noise=noise, height=height,
            width=width, max_text_tokens=max_text_tokens, source_area=source_area, condition_area=condition_area,
            crop_sources=crop_sources,
        )  # fmt: skip
        with on_mesh(self.mesh):
            return self.decode_on_host(to_host(latents))[: len(prompts)]

    def sample_each(
        self, prompts: Sequence[str], images=None, *, first: int = 0, sizes=None, **settings
    ) -> Float[np.ndarray, "B H W 3"]:
        """As `sample`, but that every device draws one image at a time.

        All images come from programs of one shape, so that the bits of an image do not depend on how many are asked
        for: a larger batch is another program, which adds up in another order.

        Args:
            prompts, images: as for `sample`, with a list of source images for each prompt.
            first: the number of the first image; image i depends on (seed, first + i) alone.
            sizes: for editing, the sizes (height, width) of the source images of all prompts to come, so that they
                need no program of their own either; by default those of these images.
            settings: those of `sample`, all that have no default None, but for `noise`.
        """
        devices, images_of = batch_size(self.mesh), (lambda rows: None) if images is None else images.__getitem__
        begun = []
        for start in range(0, len(prompts), devices):
            rows = slice(start, start + devices)
            latents = self._latents(prompts[rows], images_of(rows), first=first + start, sizes=sizes, **settings)
            with on_mesh(self.mesh):
                begun.append(self.decode_jitted(self.vae_params, latents))
        return np.concatenate([to_host(image) for image in begun])[: len(prompts)]

    def _latents(
        self, prompts, images, *, steps, guidance, solver, seed, height, width, noise=None, first=0, sizes=None,
        max_text_tokens=None, source_area=None, condition_area=None, crop_sources=False,
    ):  # fmt: skip
        """The final latents of `sample`, on the devices, filled up for them with copies of the last; not waited for."""
        given = {"images": images, "source_area": source_area, "condition_area": condition_area}
        for name, value in given.items():
            if value is not None and not self.edits:
                raise ConfigError(f"{name} is for editing; {type(self).__name__} draws images from text alone")
        if images is None and self.edits:
            raise ConfigError(f"{type(self).__name__} edits images: pass `images`, for each prompt its source")
        settings = SimpleNamespace(
            guidance=guidance, height=height, width=width, max_text_tokens=max_text_tokens, source_area=source_area,
            condition_area=condition_area, crop_sources=crop_sources,
        )  # fmt: skip
        B, shape = len(prompts), self.latent_shape(height, width)
        sigmas = self.sigmas(steps, height, width)
        # The mesh's devices share the batch evenly: it is filled up with copies of the last image.
        rows = np.minimum(np.arange(B + -B % batch_size(self.mesh)), B - 1)
        if noise is not None:
            noise = shard_batch(_channels_last(noise, B, shape)[rows], self.mesh)
        key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        with on_mesh(self.mesh):
            conditioning, negative = self.condition(prompts, settings, images, sizes)
            return self._draw(
                self.params, self.lora, conditioning, negative, *shard_batch((rows, rows + first), self.mesh), noise,
                key, np.asarray(sigmas), np.float32(guidance), shape=shape, solver=solver,
            )  # fmt: skip

    def condition(self, prompts: Sequence[str], settings, images=None, sizes=None):
        """P prompts as the transformer takes them, and what guidance leads away from.

        Args:
            prompts: P texts.
            settings: `guidance`, `max_text_tokens` (None: the pipeline's own, and no longer than these texts need);
                of editing pipelines `source_area`, `condition_area` (None: the pipeline's own), `crop_sources`, and
                for that `height` and `width`.
            images: of editing pipelines, for each prompt its source image or the list of them.
            sizes: of editing pipelines, the sizes (height, width) of the source images of all prompts to come, so that
                what is returned has one shape whatever the prompts; by default those of these images.

        Returns:
            (conditioning, negative), whole on every device of the mesh: trees of arrays [P, ...]; the negative is that
            of the empty prompt with the same images, of one row where there are none, and None without guidance.

        Raises:
            DataError: for a text or an image that cannot be used.
        """
        raise NotImplementedError

    def rollout(
        self,
        params,
        lora,
        noise: Float[Array, "B h w C"],
        sigmas: Float[Array, "steps+1"],
        conditioning,
        *,
        guidance=1.0,
        negative=None,
        solver: str = "dpm2",
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B h w C"]:
        """From noise to the final latents: a scan over the schedule. Pure.

        conditioning: B rows. negative: what guidance leads away from, one row or B; without it there is one forward
        pass a step and `guidance` has no part. key: for the "sde" solver, one key or B.
        """

        def velocity(x, sigma):
            t = repeat_batch(sigma[None], x)
            if negative is None:
                return self.velocity(params, lora, x, t, conditioning)
            v = self.velocity(params, lora, _pairs(x, x), _pairs(t, t), paired)
            v = reshape(v, x.shape[0], 2, *x.shape[1:])
            return self.guide(v[:, 0], v[:, 1], guidance)

        def beside(rows, others):
            return _pairs(repeat_batch(rows, others) if len(rows) == 1 else rows, others)

        if negative is not None:
            paired = jax.tree.map(beside, negative, conditioning)
        return integrate(velocity, noise, sigmas, solver=solver, key=key)

    def velocity(
        self, params, lora, x: Float[Array, "B h w C"], t: Float[Array, "B"], conditioning, *, remat: str | None = None
    ) -> Float[Array, "B h w C"]:
        """The predicted `noise - image`, float32, at noise share t in [0, 1]; pure, for rollout and training alike."""
        raise NotImplementedError

    @staticmethod
    def take(conditioning, negative, rows: Int[Array, "B"]):
        """The rows of B samples in what `condition` returned; a negative of one row stays as it is."""

        def taken(tables):
            return jax.tree.map(lambda table: take_rows(table, rows), tables)

        one = negative is None or len(jax.tree.leaves(negative)[0]) == 1
        return taken(conditioning), negative if one else taken(negative)

    def guide(self, negative, positive, guidance):
        """Classifier-free guidance: away from the velocity [B, h, w, C] of the empty prompt."""
        return negative + guidance * (positive - negative)

    def _draw_rows(
        self, params, lora, conditioning, negative, rows, numbers, noise, key, sigmas, guidance, *, shape, solver
    ):
        """The final latents of the prompts `rows`, from the noise given or, without, from that of the key and the
        samples' numbers."""
        noise_key, solver_key = jax.random.split(jax.random.wrap_key_data(key))
        if noise is None:
            noise = initial_noise(noise_key, numbers, shape)
        keys = jax.vmap(lambda number: jax.random.fold_in(solver_key, number))(numbers)
        conditioning, negative = self.take(conditioning, negative, rows)
        return self.rollout(
            params, lora, noise, sigmas, conditioning, guidance=guidance, negative=negative, solver=solver, key=keys
        )

    def decode(self, vae_params, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """The images of final latents, float32 in [0, 1]; pure."""
        images = nnx.merge(self.vae_graphdef, vae_params).decode(self.vae_config.restore(latents))
        return jnp.clip(images / 2 + 0.5, 0, 1).astype(jnp.float32)

    def decode_on_host(self, latents: np.ndarray) -> np.ndarray:
        """Images of host latents, a few at a time: a decoder's activations outweigh its images a hundredfold.

        Their number must divide by `batch_size(mesh)`.
        """
        chunk = decoded_together(len(latents), self.image_size(*latents.shape[1:3]), batch_size(self.mesh))
        images = []
        for start in range(0, len(latents), chunk):
            rows = np.minimum(np.arange(start, start + chunk), len(latents) - 1)
            images.append(to_host(self.decode_jitted(self.vae_params, shard_batch(latents[rows], self.mesh))))
        return np.concatenate(images)[: len(latents)]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of an image's latents; ConfigError for a size that the networks do not take."""
        return latent_shape(self.config, self.vae_config, height, width)

    def image_size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width in pixels of latents h x w."""
        return h * self.vae_config.downscale, w * self.vae_config.downscale

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of an image in the transformer."""
        h, w, _ = self.latent_shape(height, width)
        return h * w // self.config.patch_size**2

    def sample_tokens(self, height: int, width: int, conditioning) -> tuple[int, int]:
        """Image tokens and text tokens of one sample in the transformer."""
        return self.image_tokens(height, width), conditioning.context.shape[1]

    def sigmas(self, steps: int, height: int, width: int) -> Float[Array, "steps+1"]:
        """The schedule that the folder's scheduler config asks for."""
        tokens = self.image_tokens(height, width)
        return sigmas_from_config(self.scheduler, steps, tokens, linear_base=self.even_sigmas)

    def forward_flops(self, height: int, width: int, conditioning) -> int:
        """Floating-point operations of the transformer for one image at one noise level, by our count."""
        return self.config.forward_flops(*self.sample_tokens(height, width, conditioning))

    def backward_flops(self, height: int, width: int, conditioning) -> int:
        """Those of the gradient of a LoRA's loss, its forward pass left out."""
        return self.config.backward_flops(*self.sample_tokens(height, width, conditioning))

    def decode_flops(self, height: int, width: int) -> int:
        """Those of decoding one image."""
        h, w, _ = self.latent_shape(height, width)
        return self.vae_config.decode_flops(h, w)


def latent_shape(config, vae_config, height: int, width: int) -> tuple[int, int, int]:
    """(h, w, C) of the latents of an image of `height` x `width` pixels; ConfigError for a size that does not fit.

    config, vae_config: of the transformer and of the autoencoder.
    """
    scale = vae_config.downscale
    multiple = scale * config.patch_size
    if height % multiple or width % multiple or min(height, width) <= 0:
        raise ConfigError(f"height and width must be positive multiples of {multiple}, not {height} x {width}")
    config.check_latent_size(height // scale, width // scale)
    return height // scale, width // scale, config.latent_channels


def decoded_together(count: int, size: tuple[int, int], devices: int) -> int:
    """How many of `count` images of `size` (height, width) one call decodes."""
    return min(max(1, DECODED_PIXELS // (size[0] * size[1])) * devices, count)


def initial_noise(key: PRNGKeyArray, indices: Int[Array, "B"], latent_shape: Sequence[int]) -> Float[Array, "B h w C"]:
    """Standard normal latents; sample `indices[i]` of a run has its own, whichever batch or device draws it."""

    def one(index):
        return jax.random.normal(jax.random.fold_in(key, index), latent_shape)

    return jax.vmap(one)(jnp.asarray(indices))


def pipeline_class(index: Mapping) -> type[Generator]:
    """The class for a pipeline folder's model_index.json."""
    module, name = PIPELINES[index["_class_name"]]
    return getattr(importlib.import_module(f"firm_jax.generation.{module}"), name)


def check_size(folder: Path, height: int, width: int) -> None:
    """ConfigError for images that the pipeline in a folder cannot draw; told before any weights are read."""
    read_model_index(folder)
    config, vae_config = (models.read_network(folder / part)[1] for part in ("transformer", "vae"))
    latent_shape(config, vae_config, height, width)


def read_model_index(folder: Path) -> dict:
    """The model_index.json of a pipeline folder; ConfigError when it is not a supported pipeline, WeightsError when it
    is damaged."""
    file = folder / "model_index.json"
    supported = f"supported pipelines: {', '.join(sorted(PIPELINES))}"
    try:
        index = read_json(file)
    except FileNotFoundError:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        raise ConfigError(
            f"{folder} is not a diffusers pipeline: no model_index.json, but {found}; {supported}"
        ) from None
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ConfigError(f"{file}: the pipeline class is {name!r}; {supported}")
    return index


def _pairs(first, second):
    """Two batches as one of twice the size, row beside row: every device keeps the rows it has."""
    return reshape(jnp.stack([first, second], axis=1), 2 * first.shape[0], *first.shape[1:])


def _channels_last(noise, batch: int, latent_shape: tuple[int, int, int]) -> np.ndarray:
    h, w, channels = latent_shape
    noise = np.asarray(noise, np.float32)
    if noise.shape != (batch, channels, h, w):
        raise ConfigError(f"noise must have shape [B, C, h, w] = {[batch, channels, h, w]}, not {list(noise.shape)}")
    return np.moveaxis(noise, 1, -1)
