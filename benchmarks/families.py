"""What SD3 and Qwen-Image do differently on PyTorch's side, and what their transformers are conditioned on."""

import numpy as np

from benchmarks.torch_side import tensor
from firm_jax.generation.qwen_image import QwenConditioning
from firm_jax.generation.text import Conditioning
from firm_jax.models.qwen_image import pack_sources


class SD3:
    """Text tokens and a pooled vector; latents as they are."""

    @staticmethod
    def conditioning(work) -> Conditioning:
        size, transformer = work.size, work.configs["transformer"]
        return Conditioning(
            work.normal(size.images, size.text_tokens, transformer["joint_attention_dim"]),
            work.normal(size.images, transformer["pooled_projection_dim"]),
        )

    @staticmethod
    def torch_inputs(work, dtype) -> dict:
        context, pooled = (tensor(array).to(dtype) for array in work.conditioning)
        return {"encoder_hidden_states": context, "pooled_projections": pooled}

    @staticmethod
    def velocity(network, given: dict, x, t):
        return network(hidden_states=x, timestep=1000 * t, return_dict=False, **given)[0]

    @staticmethod
    def decode(vae, decode, latents):
        return decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]


class QwenEdit:
    """Text tokens with a mask, and the latents of one source image, as large as the edited one, beside the noisy ones.

    Latents go into the transformer in patches of four.
    """

    @staticmethod
    def conditioning(work) -> QwenConditioning:
        size, transformer = work.size, work.configs["transformer"]
        context = work.normal(size.images, size.text_tokens, transformer["joint_attention_dim"])
        h, w, _ = work.latent_shape()
        grid = h // 2, w // 2
        tokens = work.normal(size.images, grid[0] * grid[1], transformer["in_channels"])
        sources = pack_sources([[(own, grid)] for own in tokens], tokens.shape[1])
        return QwenConditioning(context, np.ones(context.shape[:2], np.int32), sources)

    @staticmethod
    def torch_inputs(work, dtype) -> dict:
        context, mask, sources = work.conditioning
        h, w, _ = work.latent_shape()
        return {
            "encoder_hidden_states": tensor(context).to(dtype),
            "encoder_hidden_states_mask": tensor(mask),
            "sources": tensor(sources.tokens).to(dtype),
            "img_shapes": [[(1, h // 2, w // 2)] * 2] * work.size.images,
        }

    @staticmethod
    def velocity(network, given: dict, x, t):
        import torch

        B, C, h, w = x.shape
        tokens = x.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w // 4, 4 * C)
        beside = {name: value for name, value in given.items() if name != "sources"}
        tokens = torch.cat([tokens, given["sources"]], dim=1)
        v = network(hidden_states=tokens, timestep=t, return_dict=False, **beside)[0][:, : h * w // 4]
        return v.view(B, h // 2, w // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, h, w)

    @staticmethod
    def decode(vae, decode, latents):
        import torch

        mean, std = (
            torch.tensor(values, device=latents.device)[:, None, None, None]
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return decode(latents[:, :, None] * std + mean, return_dict=False)[0][:, :, 0]


FAMILIES = {"StableDiffusion3Pipeline": SD3, "QwenImageEditPlusPipeline": QwenEdit}
