"""Source images of edits on the host: their sizes, and how they are resized.

Pillow is imported where an image is handled: who draws without sources needs none.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from firm_jax.data.patches import to_pixels
from firm_jax.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

MULTIPLE = 32  # pixels; of both sides of a source image
MAX_ASPECT = 8  # one side at most so many times the other


def size_of_area(area: int, height: int, width: int) -> tuple[int, int]:
    """The (height, width), multiples of 32, at which an image of these sides has about `area` pixels.

    These are a few fixed sizes for an area, and close to the image's own aspect ratio: nothing is cut off. Raises
    DataError for an image with one side more than eight times the other, and for an area without room for it.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise DataError(f"a source image of {width}x{height} pixels: its sides may differ {MAX_ASPECT} times at most")
    ratio = width / height
    wide = math.sqrt(area * ratio)
    size = round(wide / ratio / MULTIPLE) * MULTIPLE, round(wide / MULTIPLE) * MULTIPLE
    if not min(size):
        raise DataError(
            f"a source image of {width}x{height} pixels has no room in an area of {area} pixels with sides that are "
            f"multiples of {MULTIPLE}; raise source_area and condition_area"
        )
    return size


def cropped_size(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) inside an image that has the aspect ratio of `target`, (height, width)."""
    scale = min(height / target[0], width / target[1])
    return max(1, round(target[0] * scale)), max(1, round(target[1] * scale))


def to_image(source, crop_to: tuple[int, int] | None = None) -> "Image.Image":
    """A Pillow image or array [H, W, 3] as an RGB image, cut about its centre to the aspect ratio `crop_to`."""
    from PIL import Image

    image = Image.fromarray(to_pixels(source))
    if crop_to is None:
        return image
    height, width = cropped_size(image.height, image.width, crop_to)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def resized(image: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    """The image at (height, width), by Lanczos's filter as in the published pipelines."""
    from PIL import Image

    return image.resize(size[::-1], Image.Resampling.LANCZOS)


def as_batch(images: "Sequence[Image.Image]") -> np.ndarray:
    """Images of one size as float32 [B, H, W, 3] in [-1, 1]."""
    return np.stack([np.asarray(image, np.float32) for image in images]) / 127.5 - 1
