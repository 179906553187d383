"""Patches, token ids and positions against transformers' own processor (Pillow backend)."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from critic_miniature import picture, write_miniature  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize  # noqa: E402

from firm_jax.critic.processing import Processor  # noqa: E402
from firm_jax.data import patches  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_miniature(tmp_path_factory.mktemp("critic"))


def test_resize_table():
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(3, 8.5, (2000, 2))).astype(int).tolist():
        if max(height, width) <= 200 * min(height, width):
            limits = {"factor": 32, "min_pixels": 65536, "max_pixels": 2_000_000}
            assert patches.smart_resize(height, width, **limits) == smart_resize(height, width, **limits)


@pytest.mark.parametrize("size", [(37, 22), (16, 16), (90, 41), (200, 3), (64, 64)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_patches(folder, size, mode):
    image = picture(sum(size), *size).convert(mode)
    expected = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image])
    found = patches.patch_image(image, Processor(folder).images)
    np.testing.assert_array_equal(found.patches, expected["pixel_values"])
    assert [1, *found.grid] == expected["image_grid_thw"][0].tolist()


def test_positions(folder):
    from transformers import Qwen3VLForConditionalGeneration

    processor = Processor(folder)
    sequence = processor.sequence([picture(0, 24, 40), picture(1, 50, 17)], "a red circle", "an answer")
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    ids = torch.tensor(sequence.ids)[None]
    positions, delta = model.model.get_rope_index(
        input_ids=ids,
        image_grid_thw=torch.tensor([[1, *image.grid] for image in sequence.images]),
        mm_token_type_ids=torch.tensor(sequence.image >= 0)[None].int(),
    )
    np.testing.assert_array_equal(positions[:, 0].numpy(), sequence.positions)
    assert sequence.next_position == len(sequence) + delta.item()
