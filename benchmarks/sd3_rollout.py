"""Drawing with SD3: ten dpm2 steps of the old policy without guidance, and the decoding of the latents.

    python -m benchmarks.sd3_rollout --size small

Ours is the RL job's sampler. PyTorch's is the loop of the published training: diffusers' transformer with PEFT's
adapters, a solver on the host, diffusers' autoencoder in float32. Both begin with the same noise and end with pictures
on the host; prompts have been encoded before.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.diffusion import OLD, TorchPolicy, Work, torch_dpm2, torch_vae
from benchmarks.harness import OURS, PYTORCH, Case, Options, Variant, main
from benchmarks.sizes import SD3, Diffusion
from benchmarks.torch_side import absent, channels_first, channels_last, compiled, host, modes, tensor, variants
from firm_jax.generation import initial_noise
from firm_jax.mesh import on_mesh
from firm_jax.models.lora import scaled
from firm_jax.rl.rollout import drawing_flops, make_sampler


def ours(work: Work, dtype: str) -> Variant:
    generator = work.generator(dtype)
    sample = make_sampler(generator, work.settings, work.mesh)
    policy = scaled(generator.place_lora(work.adapters[OLD]), work.lora.scale)
    conditioned = work.placed_conditioning(dtype), None
    prompt = np.arange(work.size.images, dtype=np.int32)

    def run(_):
        with on_mesh(work.mesh):
            return sample(policy, conditioned, prompt, work.numbers, work.key)

    def outputs(result):
        return {"latents": result[0], "images": result[1]}

    return Variant(OURS, dtype, "jit", run, outputs)


def pytorch(work: Work, options: Options) -> Iterator[Variant]:
    import torch

    sigmas = work.sigmas()
    noise = initial_noise(jax.random.fold_in(work.key, 0), work.numbers, work.latent_shape())
    noise, vae = tensor(channels_first(noise)), torch_vae(work)
    policies = {dtype: TorchPolicy(work, dtype) for dtype in options.dtypes}

    def variant(mode: str, how: str, dtype: str) -> Variant:
        policy = policies[dtype]
        velocity, decode = policy.velocity(mode), compiled(vae.decode, mode)

        @torch.no_grad()
        def run(_):
            policy.adapted.set_adapter(OLD)
            latents = torch_dpm2(velocity, noise, sigmas)
            images = work.family.decode(vae, decode, latents)
            return host(latents), host((images / 2 + 0.5).clamp(0, 1))

        def outputs(result):
            return {"latents": channels_last(result[0]), "images": channels_last(result[1])}

        return Variant(PYTORCH, dtype, how, run, outputs)

    for given in variants(options):
        yield variant(*given)


def flops(work: Work) -> float:
    size, shapes = work.size, work.shapes
    decoding = shapes.decode_flops(size.height, size.width)
    return size.images * (drawing_flops(shapes, work.settings, work.conditioning) + decoding)


def drawing(question: str, size: Diffusion, options: Options, folder: Path) -> Case:
    """The rollout of one size, of any family."""
    work = Work(size, folder, options.mesh(size.images))
    made, skipped = [ours(work, dtype) for dtype in options.dtypes], {}
    if why := absent("diffusers", "peft"):
        skipped["PyTorch"] = why
    else:
        skipped = modes(options)[1]
        made += pytorch(work, options)
    name = f"{question}, {size.steps} dpm2 steps at {size.height} x {size.width}, and decoding"
    return Case(name, made, size.images, "images", flops(work), work.described(), skipped)


def cases(options: Options, folder: Path, size: Diffusion | None = None) -> Iterator[Case]:
    yield drawing("SD3 rollout", size or SD3[options.size], options, folder)


if __name__ == "__main__":
    main("sd3_rollout", __doc__, cases)
