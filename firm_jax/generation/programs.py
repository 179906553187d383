"""What encoding an epoch's prompts compiles, and what it leaves on the devices, over shapes in the place of arrays."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from firm_jax.abstract import batch, outputs, whole
from firm_jax.data.patches import padded, smart_resize
from firm_jax.generation.generator import Generator, decoded_together
from firm_jax.generation.qwen_image import QwenConditioning, QwenImageEditGenerator, QwenImageGenerator
from firm_jax.generation.sd3 import SD3Generator
from firm_jax.generation.sources import size_of_area
from firm_jax.generation.text import T5_ENCODER, encoded_together
from firm_jax.mesh import batch_size
from firm_jax.models.qwen_image import Sources
from firm_jax.plan import Program

SOURCE_SIDE = 1024  # pixels that the sides of a source image are taken to have


@dataclass(frozen=True)
class Encoding:
    """The prompts of one section of the config.

    conditioning, negative: as `generator.condition` returns them. programs: those that make them, in order.
    """

    conditioning: object
    negative: object
    programs: tuple[Program, ...]


def text_parameters(generator: Generator):
    """The parameters of the generator's text encoders."""
    return generator.text_encoders.params if isinstance(generator, SD3Generator) else generator.text_encoder.params


def encoding(generator: Generator, mesh: Mesh, prompts: int, settings) -> Encoding:
    """The encoding of `prompts` prompts by `settings`; edits have one square source image each."""
    if isinstance(generator, SD3Generator):
        return _of_sd3(generator, mesh, prompts, settings)
    return _of_qwen_image(generator, mesh, prompts, settings)


def _of_sd3(generator: SD3Generator, mesh: Mesh, prompts: int, settings) -> Encoding:
    text, tokens = generator.text_encoders, settings.max_text_tokens
    lengths = {part: tokens if part == T5_ENCODER else text.clip_tokens for part in text.params}
    size = encoded_together(prompts, batch_size(mesh))
    ids = {part: batch(mesh, (size, length), jnp.int32) for part, length in lengths.items()}
    found = outputs(mesh, partial(text.encode, max_text_tokens=tokens), text.params, ids)

    def rows(count):
        return whole(jax.tree.map(lambda leaf: _shape((count, *leaf.shape[1:]), leaf.dtype), found), mesh)

    flops = sum(config.forward_flops(lengths[part]) for part, config in text.configs.items())
    arguments = (text.params, ids, tokens)
    program = Program(
        "encode prompts", text.encode_jitted, arguments, fed=ids, flops=size * flops, calls=-(-prompts // size)
    )
    return Encoding(rows(prompts), rows(1) if settings.guidance > 1 else None, (program,))


def _of_qwen_image(generator: QwenImageGenerator, mesh: Mesh, prompts: int, settings) -> Encoding:
    devices, edits = batch_size(mesh), isinstance(generator, QwenImageEditGenerator)
    size = encoded_together(prompts, devices)
    programs, images, sources = [], {}, None
    pictures = 0  # tokens of a source image in its prompt
    if edits:
        images, pictures = _condition_images(generator, mesh, size, settings)
        sources, program = _sources(generator, mesh, prompts, settings)
        programs.append(program)
    text, tokens = generator.text_encoder, settings.max_text_tokens + pictures
    width = text.template.dropped + tokens
    given = {name: batch(mesh, (size, width), jnp.int32) for name in ("ids", "segments", "image_index")}
    given |= {"positions": batch(mesh, (size, 3, width), jnp.int32), **images}
    states = outputs(mesh, text.encode, text.params, given)
    flops = size * text.config.text.forward_flops(width)
    if edits:
        flops += images["patches"].shape[0] * text.config.vision.forward_flops(images["patches"].shape[1])
    calls = -(-prompts // size) * (2 if settings.guidance > 1 and edits else 1)
    arguments = (text.params, given)
    programs.append(Program("encode prompts", text.encode_jitted, arguments, fed=given, flops=flops, calls=calls))

    def rows(count):
        context, mask = _shape((count, tokens, states.shape[-1]), states.dtype), _shape((count, tokens), jnp.int32)
        return whole(QwenConditioning(context, mask, sources), mesh)

    negative = rows(prompts if edits else 1) if settings.guidance > 1 else None
    return Encoding(rows(prompts), negative, tuple(programs))


def _condition_images(generator: QwenImageEditGenerator, mesh: Mesh, count: int, settings):
    """The table of `count` source images as the text encoder takes it, and the tokens of one in its prompt."""
    config, network = generator.text_encoder.images, generator.text_encoder.config.vision
    area = generator.condition_area if settings.condition_area is None else settings.condition_area
    factor = config.patch_size * config.merge_size
    limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    height, width = smart_resize(*size_of_area(area, SOURCE_SIDE, SOURCE_SIDE), factor=factor, **limits)
    patches = height * width // config.patch_size**2
    rows, length = padded(count, patches, batch_size(mesh))
    features = network.in_channels * config.temporal_patch_size * config.patch_size**2
    table = {
        "patches": batch(mesh, (rows, length, features), jnp.float32),
        "grids": batch(mesh, (rows, 2), jnp.int32),
    }
    return table, patches // config.merge_size**2


def _sources(generator: QwenImageEditGenerator, mesh: Mesh, prompts: int, settings) -> tuple[Sources, Program]:
    """The latents of the prompts' source images, and the program that encodes them."""
    area = generator.source_area if settings.source_area is None else settings.source_area
    height, width = size_of_area(area, SOURCE_SIDE, SOURCE_SIDE)
    devices = batch_size(mesh)
    chunk = decoded_together(prompts + -prompts % devices, (height, width), devices)
    images = batch(mesh, (chunk, height, width, 3), jnp.float32)
    tokens = outputs(mesh, generator.encode_sources, generator.vae_params, images)
    S, downscale = tokens.shape[1], generator.vae_config.downscale
    sources = Sources(
        _shape((prompts, *tokens.shape[1:]), tokens.dtype),
        _shape((prompts, S, 3), jnp.int32),
        _shape((prompts, S), jnp.int32),
        _shape((prompts,), jnp.int32),
    )
    flops = chunk * generator.vae_config.encode_flops(height // downscale, width // downscale)
    program = Program(
        "VAE encode", generator.encode_sources_jitted, (generator.vae_params, images), fed=images, flops=flops,
        calls=-(-prompts // chunk),
    )  # fmt: skip
    return sources, program


def _shape(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
