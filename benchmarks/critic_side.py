"""A critic on both sides, of the same weights, asked the same: what its benchmarks have in common."""

from pathlib import Path

import numpy as np

from benchmarks.sizes import Critic
from benchmarks.torch_side import device, tensor
from firm_jax import models
from firm_jax.critic.decode import Decoder, TokenRules
from firm_jax.critic.prefixes import plan_batches
from firm_jax.critic.processing import Sequence, lay_out
from firm_jax.data.patches import ImageConfig, PatchedImage, patch_image
from firm_jax.published import QWEN3_VL_IMAGES

OPENING, CLOSING = 3, 5  # tokens of the chat, around images and text
NO_ENDS = TokenRules((), (), tuple(range(16, 21)))


class Prompts:
    """Prompts of random pictures and tokens for a critic: the opening, the pictures, a text, the closing."""

    def __init__(self, size: Critic, folder: Path):
        self.size, self.folder = size, size.folder(folder)
        self.config = models.read_network(self.folder)[1]
        special = self.config.image_token_id, self.config.vision_start_token_id, self.config.vision_end_token_id
        self.plain = min(special) - 16  # below it no id means anything but text
        vision = self.config.vision
        raw = QWEN3_VL_IMAGES | {"patch_size": vision.patch_size, "size": {"shortest_edge": 1, "longest_edge": 2**24}}
        self.images = ImageConfig.from_json(raw, "the benchmark's image settings")

    def text(self, rng: np.random.Generator, length: int) -> list[int]:
        return rng.integers(0, self.plain, length).tolist()

    def picture(self, rng: np.random.Generator) -> PatchedImage:
        side = self.size.side
        return patch_image(rng.integers(0, 256, (side, side, 3), dtype=np.uint8), self.images)

    def prompt(self, opening: list[int], pictures: list[PatchedImage], text: list[int]) -> Sequence:
        start, end = [self.config.vision_start_token_id], [self.config.vision_end_token_id]
        shown = [part for picture in pictures for part in (start, picture, end)]
        return lay_out([opening, *shown, text], self.config.image_token_id, self.config.vision.spatial_merge_size)


class Questions(Prompts):
    """Prompts about a picture each, no two of which have anything in common."""

    def __init__(self, size: Critic, folder: Path, count: int):
        super().__init__(size, folder)
        rng = np.random.default_rng(0)

        def question() -> Sequence:
            picture = self.picture(rng)
            opening, text, closing = (self.text(rng, length) for length in (OPENING, size.text_tokens, CLOSING))
            return self.prompt(opening, [picture], text + closing)

        self.sequences = [question() for _ in range(count)]

    def decoder(self, dtype: str, mesh) -> Decoder:
        """Ours; no token ends an answer, so that all have one length."""
        model = models.from_pretrained(self.folder, dtype=dtype, mesh=mesh)
        return Decoder(model, NO_ENDS, mesh=mesh, max_batch=len(self.sequences))

    def planned(self, decoder: Decoder, count: int):
        """The first `count` questions as the one batch that the decoder makes of them."""
        (batch,) = plan_batches(self.sequences[:count], decoder.multiple, decoder.max_batch // decoder.multiple)
        return batch

    def inputs(self, count: int, dtype: str) -> dict:
        """The first `count` questions as transformers' model takes them; they are equally long."""
        import torch

        asked = self.sequences[:count]
        shown = [image for sequence in asked for image in sequence.images]
        ids = np.stack([sequence.ids for sequence in asked])
        return {
            "input_ids": tensor(ids),
            "attention_mask": tensor(np.ones_like(ids)),
            "mm_token_type_ids": tensor((ids == self.config.image_token_id).astype(np.int32)),
            "pixel_values": tensor(np.concatenate([image.patches for image in shown])).to(getattr(torch, dtype)),
            "image_grid_thw": tensor(np.array([[1, *image.grid] for image in shown])),
        }


def torch_critic(folder: Path, dtype: str):
    """transformers' model with its default attention, which ends an answer at no token."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device()).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
