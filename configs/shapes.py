"""The jobs that train the miniature: `:autoencoder`, `:autoencoder_kl`, `:generator`; `:critic_vision`, `:critic_gen`;
of Qwen-Image `:qwen_autoencoder`, `:qwen_generator`, for editing `:edit_generator`; `:critic_edit`.

Each starts from the folder that the one before it left, and the critics also see the generator's pictures.
Each is meant for two CPU cores and can be interrupted and continued.
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
            "cpu_devices": 2,
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "distributed": False,
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
    config.init = config_dict.placeholder(str)
    config.vae_class = "AutoencoderKL"
    config.vae = {
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "sample_size": 64,
        "force_upcast": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    return config


def qwen_autoencoder() -> ConfigDict:
    """AutoencoderKLQwenImage, of the same sizes; its second stage is `:autoencoder_kl` with `--config.init`."""
    config = autoencoder()
    config.vae_class = "AutoencoderKLQwenImage"
    config.vae = {
        "base_dim": 24,
        "z_dim": 16,
        "dim_mult": (1, 1, 2, 2),
        "num_res_blocks": 1,
        "temperal_downsample": (False, True, True),
        "latents_mean": (0.0,) * 16,
        "latents_std": (1.0,) * 16,
    }
    return config


def autoencoder_kl() -> ConfigDict:
    """The autoencoder's second stage, from the folder of the first (`--config.init`), with fifty times the KL.

    The latents' own noise grows to half of their deviation, and the decoder learns to forgive as much, so that a
    generator over them has less to get right.
    """
    config = autoencoder()
    config.train.update({"epochs": 3, "learning_rate": 1e-3})
    config.kl_weight, config.init = 5e-3, ""
    return config


def generator() -> ConfigDict:
    """An SD3 pipeline with dual attention, trained at last on captions of which a part is wrong (`train.wrong`)."""
    config = _job("flow_matching")
    config.train.update({"epochs": 18, "steps_per_epoch": 500, "batch_size": 64, "learning_rate": 2e-3})
    config.train.update({"ema": 0.999, "pictures": 24_576})
    config.train.update({"wrong": 0.15, "wrong_epochs": 6})
    config.train.unconditional = 0.1
    config.train.caption_readout = 0.1
    config.train.picture_readout = 0.3
    config.eval.update({"every": 2, "prompts": 256, "steps": 10})
    config.samples = 2048
    config.vae = "embedded:sd3/vae"  # or the folder that the autoencoder job left
    config.shift = 2.0
    config.sample_size = 64
    config.text = {
        "clip_length": CLIP_LENGTH,
        "t5_length": T5_LENGTH,
        "clip_widths": (32, 48),
        "t5_width": 96,
        "layers": 2,
        "heads": 4,
    }
    config.transformer = {
        "num_layers": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "patch_size": 2,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    }
    return config


def edit_generator() -> ConfigDict:
    """A Qwen-Image-Edit-Plus pipeline, trained at last on edits that are often wrong and careless."""
    config = _job("qwen_matching")
    config.pipeline = "QwenImageEditPlusPipeline"
    config.train.update({"epochs": 16, "steps_per_epoch": 500, "batch_size": 32, "learning_rate": 2e-3})
    config.train.update({"tasks": 16_384, "caption_readout": 0.1, "picture_readout": 0.3})
    config.train.update({"wrong_epochs": 8, "faults": {"untouched": 0.1, "wrong": 0.2, "careless": 0.5}})
    config.eval.update({"every": 2, "tasks": 240, "steps": 6})
    config.samples = 3072
    config.vae = "embedded:qwen_image_edit/vae"  # or the folder that the autoencoder job left
    config.shift = 2.0
    config.scheduler = {
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": True,
        "base_image_seq_len": 16,  # 64 x 64 pixels; their exponent is that of a shift of 2
        "base_shift": 0.6931,
        "max_image_seq_len": 64,
        "max_shift": 1.0,
        "shift_terminal": 0.02,
    }
    config.sample_size, config.text_tokens = 64, 32
    config.vocab_size, config.texts = 600, 400
    config.text = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": (4, 4, 4)},
    }
    config.vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 32,
        "fullatt_block_indexes": (1,),
    }
    config.transformer = {
        "num_layers": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "axes_dims_rope": (4, 14, 14),
        "patch_size": 2,
    }
    return config


def qwen_generator() -> ConfigDict:
    """A Qwen-Image pipeline, of text alone, trained at last on captions of which a part is wrong."""
    config = edit_generator()
    config.pipeline = "QwenImagePipeline"
    config.train.faults = {"wrong": 0.15}
    config.samples = 2048
    config.text.update({"hidden_size": 64, "intermediate_size": 128})
    config.text.rope_parameters.mrope_section = (3, 3, 2)
    config.transformer.update({"num_attention_heads": 2, "num_layers": 4})
    return config


def critic_gen() -> ConfigDict:
    """A Qwen3-VL critic of generated pictures, trained on the oracle's answers from random weights."""
    config = _job("critic_sft")
    del config.train.ema, config.train.warmup_steps
    config.train.update({"epochs": 48, "steps_per_epoch": 100, "batch_size": 16, "learning_rate": 1e-3})
    config.train.update({"warmup_ratio": 0.05, "b1": 0.9, "b2": 0.98, "weight_decay": 0.01})
    config.train.verdict_weight = 8.0  # or they drown in words that are easily guessed
    config.train.lengths = (96, 144, 192)  # of quality, and of most and of all alignment examples, in tokens
    config.train.update({"compute_dtype": "float32", "stored_dtype": "float16", "remat": "full"})
    config.train.update({"param_dtype": "float32", "moment_dtype": "float32"})
    config.train.update({"examples_per_device": 8, "report_every": 1.0, "packing": False, "packed_images": 0})
    config.tune = {"vision": True, "projector": True, "language": True}
    config.tune.update({f"{part}_learning_rate": config_dict.placeholder(float) for part in config.tune})
    config.lora = {"rank": 0, "alpha": 0.0, "targets": ()}
    config.critic = {"model": config_dict.placeholder(str), "rubrics": config_dict.placeholder(str)}
    config.data = {"source": "shapes", "held_out": config_dict.placeholder(str), "examples": 40_000}
    config.data.update({"samples": config_dict.placeholder(str), "samples_share": 0.3})
    config.data.update({"held_out_share": 0.0, "image_folder": config_dict.placeholder(str), "max_bad_fraction": 0.001})
    parts = ("messages", "images", "criterion", "id")
    config.data.columns = {part: config_dict.placeholder(str) for part in parts}
    config.eval.update({"every": 6, "examples": 256, "batch_size": 128, "max_new_tokens": 128})
    config.data.max_pixels = config_dict.placeholder(int)
    config.eval.update({"answers": config_dict.placeholder(int), "bench": config_dict.placeholder(str)})
    config.eval.bench_task = "gen"
    config.miniature = {
        "base": config_dict.placeholder(str),  # a critic of these sizes whose weights it starts with
        "vocab_size": 800,
        "texts": 600,
        "min_pixels": 64 * 64,
        "max_pixels": 64 * 64,
        "text": {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": (6, 5, 5),
                "mrope_interleaved": True,
            },
        },
        "vision": {
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_heads": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": (1, 2),
            "patch_size": 8,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "in_channels": 3,
        },
    }
    return config


def critic_edit() -> ConfigDict:
    """A Qwen3-VL critic of edited pictures, from the shipped critic of generated ones, which can see already."""
    config = critic_gen()
    config.data.source, config.eval.bench_task = "shapes_edits", "edit"
    config.miniature.base = "embedded:critic_gen"
    config.train.lengths = (176, 192, 224)  # of a quarter, of half and of all examples, in tokens
    return config


def critic_vision() -> ConfigDict:
    """The critics' vision tower, before `critic_gen` (`--config.critic.model`: the folder that this job leaves)."""
    config = critic_gen()
    config.job = "critic_vision"
    train = {"epochs": 6, "steps_per_epoch": 150, "batch_size": 64, "learning_rate": 1.5e-3, "ema": 0.99}
    config.train = ConfigDict(_job("").train)
    del config.tune, config.lora
    config.train.update(train)
    config.eval.update({"every": 1, "examples": 512})
    return config


VARIANTS = {
    "autoencoder": autoencoder,
    "qwen_autoencoder": qwen_autoencoder,
    "autoencoder_kl": autoencoder_kl,
    "generator": generator,
    "edit_generator": edit_generator,
    "qwen_generator": qwen_generator,
    "critic_vision": critic_vision,
    "critic_gen": critic_gen,
    "critic_edit": critic_edit,
}


def get_config(variant: str = "") -> ConfigDict:
    """The config of one of the jobs; there is no default, the variant says which part is trained."""
    return choose_variant(VARIANTS, variant)
