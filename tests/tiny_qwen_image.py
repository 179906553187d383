"""Tiny random Qwen-Image pipelines with a real tokenizer, for the tests of everything that draws or edits images."""

import json
from pathlib import Path

from tiny_pipeline import random_network

from firm_jax.data.patches import ImageConfig
from firm_jax.generation import qwen_image
from firm_jax.generation.qwen_text import EDIT, TEXT_TO_IMAGE, QwenTextEncoder
from firm_jax.models.qwen2_5_vl import Qwen2_5VL, Qwen2_5VLConfig
from firm_jax.models.qwen_image import QwenImageConfig, QwenImageTransformer
from firm_jax.models.vae_qwen_image import AutoencoderKLQwenImage, AutoencoderKLQwenImageConfig
from firm_jax.shapes.critic_folder import learn_tokenizer

LORA_TARGETS = tuple(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "to_add_out"))
CLASSES = {
    "QwenImagePipeline": qwen_image.QwenImageGenerator,
    "QwenImageEditPipeline": qwen_image.QwenImageEditGenerator,
    "QwenImageEditPlusPipeline": qwen_image.QwenImageEditPlusGenerator,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 4,
    "max_image_seq_len": 64,
    "shift_terminal": 0.02,
}
IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 64, "longest_edge": 64 * 64},
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}


def tiny_qwen_image(folder: Path, pipeline: str = "QwenImageEditPlusPipeline", *, seed: int = 0, **transformer):
    """Write a pipeline of five latent channels, 2 pixels a latent and 2 latents a patch; returns its generator.

    Sizes are multiples of 4 pixels. The folder holds what the generator's does, and its processor's files.
    """
    folder, kind = Path(folder), CLASSES[pipeline]
    words = "draw put turn the a red blue circle square and on background into make it".split()
    templates = [f"system\n{template.system} user\nPicture 1: assistant" for template in (TEXT_TO_IMAGE, EDIT)]
    tokenizer = learn_tokenizer([*templates * 8, *words], 700)
    image, video, start, end = tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "out_hidden_size": 24,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5VLConfig.from_hf(
        {
            "text_config": text,
            "vision_config": vision,
            "image_token_id": image,
            "video_token_id": video,
            "vision_start_token_id": start,
            "vision_end_token_id": end,
        }
    )
    vae = AutoencoderKLQwenImageConfig(
        base_dim=8,
        z_dim=5,
        dim_mult=(1, 1),
        num_res_blocks=1,
        temperal_downsample=(False,),
        latents_mean=(0.1, -0.2, 0.0, 0.3, -0.1),
        latents_std=(1.5, 0.8, 1.0, 1.2, 0.9),
    )
    fields = {
        "in_channels": 20,
        "out_channels": 5,
        "num_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (2, 4, 6),
    }
    processor = None
    if kind.edits:
        processor = folder / "processor"
        tokenizer.save_pretrained(processor)
        (processor / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    network = random_network(Qwen2_5VL, config, seed + 1)
    images = ImageConfig.from_json(IMAGES, "tests") if kind.edits else None
    generator = kind(
        random_network(QwenImageTransformer, QwenImageConfig(**fields | transformer), seed + 2),
        random_network(AutoencoderKLQwenImage, vae, seed + 3),
        QwenTextEncoder(tokenizer, network, images, kind.template),
        SCHEDULER,
        processor_folder=processor,
    )
    generator.save_pretrained(folder)
    return generator
