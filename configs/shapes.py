"""The jobs that train the miniature: `:autoencoder`, then `:generator` over it; `:critic_gen` on its own.

Each is at most an hour on two CPU cores and can be interrupted and continued.
"""

from ml_collections import ConfigDict, config_dict

from firm_jax.config import choose_variant

CLIP_LENGTH, T5_LENGTH = 18, 17  # the longest caption is 16 words, and each tokenizer adds its marks


def _job(name: str) -> ConfigDict:
    """What every job of this file has in common."""
    return ConfigDict(
        {
            "job": name,
            "seed": 0,
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "train": {"warmup_steps": 100, "max_grad_norm": 1.0, "ema": 0.999, "weight_decay": 1e-4},
            "eval": {"every": 1},
            "checkpoint": {"every": 1, "keep": 2},
            "profile": {"start": 0, "steps": 0},
        }
    )


def autoencoder() -> ConfigDict:
    """AutoencoderKL, 64x64 pixels to 8x8 latents of 16 channels."""
    config = _job("autoencoder")
    config.train.update({"epochs": 15, "steps_per_epoch": 300, "batch_size": 8, "learning_rate": 1.5e-3})
    config.eval.images = 256
    config.kl_weight = 1e-4
    config.vae = {
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "sample_size": 64,
    }
    return config


def generator() -> ConfigDict:
    """An SD3 pipeline with dual attention, trained on captions of which a part is wrong (see `train.wrong`)."""
    config = _job("flow_matching")
    config.train.update({"epochs": 20, "steps_per_epoch": 150, "batch_size": 64, "learning_rate": 1.5e-3})
    config.train.wrong = 0.35
    config.train.unconditional = 0.1
    config.eval.update({"every": 5, "prompts": 48, "images_per_prompt": 2, "steps": 20})
    config.vae = config_dict.placeholder(str)  # the folder that the autoencoder job left
    config.shift = 3.0
    config.text = {"clip_length": CLIP_LENGTH, "t5_length": T5_LENGTH}
    config.clip_widths = (32, 48)
    config.t5_width = 96
    config.transformer = {"layers": 5, "heads": 4, "head_width": 24, "dual_attention_layers": (0, 1)}
    return config


VARIANTS = {"autoencoder": autoencoder, "generator": generator}


def get_config(variant: str = "") -> ConfigDict:
    """The config of one of the jobs; there is no default, the variant says which part is trained."""
    return choose_variant(VARIANTS, variant)
