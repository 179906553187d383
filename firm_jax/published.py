"""The configs of published checkpoints: what `--plan` compiles, and the tests account for, without any weights."""

from collections.abc import Mapping

from firm_jax.errors import WeightsError

_SD3_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
_SD35_MEDIUM = _SD3_MEDIUM | {
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
_SD35_LARGE = _SD3_MEDIUM | {
    "caption_projection_dim": 2432,
    "dual_attention_layers": [],
    "num_attention_heads": 38,
    "num_layers": 38,
    "qk_norm": "rms_norm",
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.29.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
_CLIP_L = {
    "architectures": ["CLIPTextModelWithProjection"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "vocab_size": 49408,
}
_CLIP_BIGG = _CLIP_L | {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
_T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": 32128,
}
_SD3_INDEX = {"_class_name": "StableDiffusion3Pipeline"}
# What the three pipelines share, as they share the files.
_SD3_PARTS = {
    "model_index": _SD3_INDEX,
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    "vae": _VAE,
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP_BIGG,
    "text_encoder_3": _T5_XXL,
}

_QWEN_IMAGE = {
    "_class_name": "QwenImageTransformer2DModel",
    "_diffusers_version": "0.34.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}
_QWEN_IMAGE_VAE = {
    "_class_name": "AutoencoderKLQwenImage",
    "_diffusers_version": "0.34.0.dev0",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916),
    ],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
_QWEN2_5_VL_TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000.0,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_QWEN2_5_VL_7B = {
    **_QWEN2_5_VL_TEXT,
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen2_5_vl",
    "sliding_window": 32768,
    "text_config": {
        **_QWEN2_5_VL_TEXT,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "image_token_id": None,
        "layer_types": ["full_attention"] * 28,
        "model_type": "qwen2_5_vl_text",
        "sliding_window": None,
        "torch_dtype": "float32",
        "video_token_id": None,
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
        "vision_token_id": 151654,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.54.0",
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_channels": 3,
        "in_chans": 3,
        "initializer_range": 0.02,
        "intermediate_size": 3420,
        "model_type": "qwen2_5_vl",
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "torch_dtype": "float32",
        "window_size": 112,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
}
# What the pipelines share, as they share the files.
_QWEN_IMAGE_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
_QWEN2_5_VL_IMAGES = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_QWEN_IMAGE_PARTS = {
    "model_index": {"_class_name": "QwenImagePipeline"},
    "scheduler": _QWEN_IMAGE_SCHEDULER,
    "vae": _QWEN_IMAGE_VAE,
    "text_encoder": _QWEN2_5_VL_7B,
    "transformer": _QWEN_IMAGE,
}
_QWEN_EDIT_PARTS = _QWEN_IMAGE_PARTS | {
    "model_index": {"_class_name": "QwenImageEditPlusPipeline"},
    "processor": _QWEN2_5_VL_IMAGES,
}

# Hugging Face id -> the content of each part's JSON file, by the part's folder.
PIPELINES: Mapping[str, Mapping[str, Mapping]] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _SD3_PARTS | {"transformer": _SD3_MEDIUM},
    "stabilityai/stable-diffusion-3.5-medium": _SD3_PARTS | {"transformer": _SD35_MEDIUM},
    "stabilityai/stable-diffusion-3.5-large": _SD3_PARTS | {"transformer": _SD35_LARGE},
    "Qwen/Qwen-Image": _QWEN_IMAGE_PARTS | {"transformer": _QWEN_IMAGE | {"pooled_projection_dim": 768}},
    "Qwen/Qwen-Image-2512": _QWEN_IMAGE_PARTS,
    "Qwen/Qwen-Image-Edit": _QWEN_EDIT_PARTS | {"model_index": {"_class_name": "QwenImageEditPipeline"}},
    "Qwen/Qwen-Image-Edit-2509": _QWEN_EDIT_PARTS,
    "Qwen/Qwen-Image-Edit-2511": _QWEN_EDIT_PARTS | {"transformer": _QWEN_IMAGE | {"zero_cond_t": True}},
}

_SMALL_VISION = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE_VISION = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}


def _qwen3_vl(hidden: int, mlp: int, layers: int, heads: int, tied: bool, vision: Mapping) -> dict:
    """config.json of a released Qwen3-VL, in the form of those files (transformers 4)."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": mlp,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


QWEN3_VL: Mapping[str, Mapping] = {
    "2B": _qwen3_vl(2048, 6144, 28, 16, True, _SMALL_VISION),
    "4B": _qwen3_vl(2560, 9728, 36, 32, True, _SMALL_VISION),
    "8B": _qwen3_vl(4096, 12288, 36, 32, False, _LARGE_VISION),
    "32B": _qwen3_vl(5120, 25600, 64, 64, False, _LARGE_VISION),
}
# The released sizes share one tokenizer and one image processor.
QWEN3_VL_IMAGES = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
QWEN3_VL_ENDS = (151643, 151645)  # <|endoftext|>, <|im_end|>
QWEN3_VL_DIGITS = (16, 17, 18, 19, 20)  # 1 to 5

CRITICS: Mapping[str, Mapping] = {
    "VisionXLab/FIRM-Gen-8B": QWEN3_VL["8B"],
    "VisionXLab/FIRM-Edit-8B": QWEN3_VL["8B"],
    **{f"Qwen/Qwen3-VL-{size}-Instruct": raw for size, raw in QWEN3_VL.items()},
}


def published(table: Mapping[str, Mapping], name: str, key: str) -> Mapping:
    """The entry of a Hugging Face id in PIPELINES or CRITICS; WeightsError for one whose config is not known here."""
    if name not in table:
        raise WeightsError(
            f"{key} is {name!r}: neither a folder, nor in the Hugging Face cache, nor one of the ids whose configs the "
            f"package knows: {', '.join(sorted(table))}. Give one of these, or a folder that holds the config.json "
            "files (the weights are not needed)."
        )
    return table[name]
