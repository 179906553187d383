"""Source images of edits: sizes, crops, and what cannot be used."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from firm_jax.errors import DataError
from firm_jax.generation.sources import as_batch, cropped_size, resized, size_of_area, to_image

SIDES = st.integers(1, 5000)


@given(SIDES, SIDES, st.sampled_from([64 * 64, 384 * 384, 512 * 512, 1024 * 1024]))
def test_sizes_are_near_the_area_and_the_aspect_ratio(height, width, area):
    if max(height, width) > 8 * min(height, width):
        with pytest.raises(DataError, match=f"{width}x{height} pixels: its sides may differ 8 times"):
            size_of_area(area, height, width)
        return
    tall, wide = (area * height / width) ** 0.5, (area * width / height) ** 0.5
    if min(tall, wide) < 16:
        with pytest.raises(DataError, match="no room in an area of"):
            size_of_area(area, height, width)
        return
    found = size_of_area(area, height, width)
    assert found[0] % 32 == found[1] % 32 == 0 and min(found) >= 32
    assert abs(found[0] - tall) <= 16 + 1e-6 and abs(found[1] - wide) <= 16 + 1e-6


@given(SIDES, SIDES, st.tuples(SIDES, SIDES))
def test_a_crop_lies_inside_and_fills_one_side(height, width, target):
    tall, wide = cropped_size(height, width, target)
    assert 1 <= tall <= height and 1 <= wide <= width
    assert tall == height or wide == width


def test_the_crop_is_about_the_centre():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert np.asarray(to_image(pixels, crop_to=(64, 64))).tolist() == np.full((10, 10, 3), 200).tolist()
    assert to_image(pixels).size == (30, 10)
    assert to_image(Image.fromarray(pixels).convert("L"), (1, 3)).mode == "RGB"
    assert to_image(pixels / 255.0, (512, 512)).size == (10, 10)


def test_a_batch_holds_the_pixels_from_minus_one_to_one():
    image = to_image(np.stack([np.zeros((4, 6, 3), np.uint8), np.full((4, 6, 3), 255, np.uint8)])[1])
    batch = as_batch([resized(image, (8, 12))] * 2)
    assert batch.shape == (2, 8, 12, 3) and batch.dtype == np.float32 and (batch == 1).all()
    assert as_batch([Image.new("RGB", (2, 2))]).min() == -1
