"""How many operations a step of fine-tuning a critic is worth, by our count.

Forward, backward through all that lies above what is trained, and the gradients of the kernels that are. A LoRA's own
operations and what is computed again to save memory are not counted.
"""

from collections.abc import Mapping

import numpy as np

from firm_jax.critic.tuning import Tuning
from firm_jax.models.qwen3_vl import Qwen3VLConfig


def text_flops(config: Qwen3VLConfig, tuning: Tuning, tokens: int) -> int:
    """Of an example of so many tokens in the language model, each of which attends to all of them."""
    kernels = tuning.lora is None and "language" in tuning.parts
    return (2 + kernels) * config.text.forward_flops(tokens, tokens, tokens)


def image_flops(config: Qwen3VLConfig, tuning: Tuning, patches: int) -> int:
    """Of an image of so many patches in the vision tower and the projector."""
    whole, mergers = config.vision.forward_flops(patches), config.vision.merger_flops(patches)
    kernels = {part: tuning.lora is None and part in tuning.parts for part in ("vision", "projector")}
    tower = (1 + ("vision" in tuning.parts) + kernels["vision"]) * (whole - mergers)
    back = 0
    if "vision" in tuning.parts:
        back = mergers
    elif "projector" in tuning.parts:  # to the first of a merger's two kernels, and not through it
        out, joined = config.vision.out_hidden_size, config.vision.hidden_size * config.vision.spatial_merge_size**2
        back = mergers * out // (joined + out)
    return tower + (1 + kernels["projector"]) * mergers + back


def step_flops(config: Qwen3VLConfig, tuning: Tuning, batch: Mapping[str, np.ndarray]) -> int:
    """Of a step on a batch of micro-batches, as `sft_data.Batches` makes them; padding is worth nothing.

    batch: `segments` int [A, b, T], 0 for padding and a number of its own for each example of a packed row; and, where
    there are images, `grids` int [A, M, 2], their patches along height and width. A token attends to its own example
    alone; the half of that which is masked is counted.
    """
    segments = batch["segments"]
    rows = np.arange(segments.shape[0] * segments.shape[1]).reshape(*segments.shape[:2], 1)
    owners = (rows * (int(segments.max(initial=0)) + 1) + segments)[segments > 0]
    tokens = np.unique(owners, return_counts=True)[1]
    patches = batch["grids"].prod(-1).reshape(-1) if "grids" in batch else np.zeros(0, int)
    texts = sum(text_flops(config, tuning, size) for size in tokens.tolist())
    return texts + sum(image_flops(config, tuning, size) for size in patches.tolist() if size)
