"""A Qwen3-VL folder small enough for tests: shared by the tests of processing, generation and training."""

TEXTS = (
    "a red circle left of two blue squares on a white background",
    '{"score": [1, 2, 3], "reasoning": "the colours are clean"}',
    "user\nassistant\n **Final Alignment Rating: 4** \\boxed{4} 0123456789",
)

MINIATURE = {
    "vocab_size": 300,
    "min_pixels": 256,
    "max_pixels": 2048,
    "text": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    },
    "vision": {
        "depth": 3,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_heads": 2,
        "num_position_embeddings": 49,
        "deepstack_visual_indexes": [0, 2],
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
    },
}
