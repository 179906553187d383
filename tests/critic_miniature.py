"""A Qwen3-VL folder small enough for tests: shared by the tests of processing, generation and training."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from PIL import Image

from firm_jax import models
from firm_jax.shapes.critic_folder import write_critic_folder

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
        "max_position_embeddings": 4096,
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


def write_miniature(folder: Path, sizes: dict = MINIATURE) -> Path:
    """The folder with every parameter drawn at random, large enough that the answers differ from prompt to prompt."""
    write_critic_folder(folder, TEXTS, sizes, seed=0)
    graphdef, params = nnx.split(models.from_pretrained(folder))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), params)
    models.save_pretrained(nnx.merge(graphdef, params), folder)
    return folder


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A picture of noise: no two pixels alike, so that a misplaced patch shows."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# One and two images of different sizes, an image shown twice, no image, no text, a special token spelled out.
REQUESTS = (
    {"images": [picture(0, 37, 22)], "text": "a red circle, rate it"},
    {"images": [picture(1, 24, 40), picture(2, 50, 17)], "text": "two images <|image_pad|> in text: é 字\n"},
    {"images": [picture(0, 37, 22)], "text": "another question on the first image 12"},
    {"images": [], "text": "\n no image at all"},
    {"images": [picture(3, 90, 90)], "text": ""},
)
