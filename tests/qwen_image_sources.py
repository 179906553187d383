"""Source images for the Qwen-Image transformer's tests."""

from collections.abc import Sequence

import numpy as np

from firm_jax.models.mmdit import patchify
from firm_jax.models.qwen_image import Sources, pack_sources


def packed(latents: Sequence[np.ndarray], patch_size: int = 2, padding: int = 0) -> Sources | None:
    """Source latents, each [B, h, w, C], as the transformer takes them, with so many tokens of padding behind them."""
    if not latents:
        return None
    tokens = [np.asarray(patchify(image, patch_size)) for image in latents]
    grids = [(image.shape[1] // patch_size, image.shape[2] // patch_size) for image in latents]
    samples = [[(part[row], grid) for part, grid in zip(tokens, grids, strict=True)] for row in range(len(tokens[0]))]
    return pack_sources(samples, sum(part.shape[1] for part in tokens) + padding)
