"""Draw scenes as pixels, and spoil pictures in controlled ways."""

import numpy as np
from PIL import Image

from firm_jax.errors import DataError
from firm_jax.shapes.scene import BACKGROUNDS, COLORS, SIZES, Scene

DEGRADATIONS = ("blur", "noise", "bleed", "distort", "contrast", "fade")

# In units of the half extent: a square is inset, so that it looks as large as the other shapes.
_SQUARE = 0.88  # half side of a square
_ARM = 0.36  # half width of a cross's arms
_SLOPE = np.array([1.8, 1.0]) / np.hypot(1.8, 1.0)  # unit normal of a triangle's right side


def signed_distance(kind: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline, negative inside, in the unit of its arguments; dx, dy broadcast from the middle."""
    ax = np.abs(dx)
    match kind:
        case "circle":
            return np.hypot(dx, dy) - radius
        case "square":
            return np.maximum(ax, np.abs(dy)) - _SQUARE * radius
        case "triangle":  # apex (0, -0.9), base from (-1, 0.9) to (1, 0.9)
            return np.maximum(_SLOPE[0] * ax - _SLOPE[1] * (dy + 0.9 * radius), dy - 0.9 * radius)
        case "cross":
            ay = np.abs(dy)
            return np.maximum(np.maximum(ax, ay) - radius, np.minimum(ax, ay) - _ARM * radius)
    raise DataError(f"unknown kind of shape {kind!r}")


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """The scene as float32 [size, size, 3] in [0, 1], with edges antialiased over one pixel."""
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for shape in scene.shapes:
        radius = SIZES[shape.size] * size
        x, y = shape.x * size, shape.y * size
        top, bottom = max(int(y - radius) - 1, 0), min(int(y + radius) + 3, size)
        left, right = max(int(x - radius) - 1, 0), min(int(x + radius) + 3, size)
        dx = np.arange(left, right, dtype=np.float32) + 0.5 - x
        dy = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - y
        coverage = np.clip(0.5 - signed_distance(shape.kind, dx, dy, radius), 0, 1)[..., None]
        window = image[top:bottom, left:right]
        window += coverage * (np.array(COLORS[shape.color], np.float32) - window)
    return image


def degrade(
    rng: np.random.Generator, image: np.ndarray, name: str | None = None, severity: float | None = None
) -> np.ndarray:
    """Spoil an image [H, W, 3] in [0, 1] in one way of DEGRADATIONS (drawn if None), severity in (0, 1]."""
    name = DEGRADATIONS[int(rng.integers(len(DEGRADATIONS)))] if name is None else name
    severity = float(rng.uniform(0.1, 1.0)) if severity is None else severity
    scale = image.shape[0] / 64
    match name:
        case "blur":
            spoiled = blur(image, 3.5 * severity * scale)
        case "noise":
            spoiled = image + rng.normal(0, 0.25 * severity, image.shape)
        case "bleed":  # colour spreads over the outlines while brightness stays
            brightness = image.mean(-1, keepdims=True)
            spread = blur(image - brightness + 0.5, 6 * severity * scale) - 0.5
            spoiled = brightness + (1 - severity) * (image - brightness) + severity * spread
        case "distort":
            spoiled = _warp(rng, image, 7 * severity * scale)
        case "contrast":
            spoiled = image + 0.85 * severity * (image.mean((0, 1)) - image)
        case "fade":  # part of the picture dissolves into its background
            mask = _smooth_noise(rng, image.shape[:2], 10 * scale)
            mask = np.clip(0.5 + 2 * mask, 0, 1)[..., None]
            spoiled = image + severity * mask * (np.median(image, (0, 1)) - image)
        case _:
            raise DataError(f"degradation {name!r} is none of {', '.join(DEGRADATIONS)}")
    return np.clip(spoiled, 0, 1).astype(np.float32)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of [H, W] or [H, W, C], edges repeated; sigma in pixels."""
    if sigma < 0.1:
        return image
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        length = image.shape[axis]
        index = np.clip(np.arange(length)[:, None] + np.arange(-reach, reach + 1), 0, length - 1)
        matrix = np.zeros((length, length), np.float32)
        np.add.at(matrix, (np.arange(length)[:, None], index), kernel)
        image = np.moveaxis(np.tensordot(matrix, image, (1, axis)), 0, axis)
    return image


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """A smooth random field [H, W] of zero mean and unit deviation."""
    field = blur(rng.normal(size=shape).astype(np.float32), sigma)
    return (field - field.mean()) / field.std()


def _warp(rng: np.random.Generator, image: np.ndarray, pixels: float) -> np.ndarray:
    """Move every pixel by a smooth random field with a deviation of `pixels` / 2: shapes melt into blobs."""
    height, width = image.shape[:2]
    sigma = 5 * height / 64
    rows = np.arange(height)[:, None] + pixels / 2 * _smooth_noise(rng, (height, width), sigma)
    columns = np.arange(width) + pixels / 2 * _smooth_noise(rng, (height, width), sigma)
    rows, columns = np.clip(rows, 0, height - 1.001), np.clip(columns, 0, width - 1.001)
    row, column = rows.astype(int), columns.astype(int)
    down, right = (rows - row)[..., None], (columns - column)[..., None]
    upper = image[row, column] * (1 - right) + image[row, column + 1] * right
    lower = image[row + 1, column] * (1 - right) + image[row + 1, column + 1] * right
    return upper * (1 - down) + lower * down


def to_pil(image: np.ndarray) -> Image.Image:
    """A float image in [0, 1] as an 8-bit PIL image."""
    return Image.fromarray(np.round(np.clip(image, 0, 1) * 255).astype(np.uint8))
