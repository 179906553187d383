"""Images as the vision towers of Qwen2.5-VL and Qwen3-VL take them: resizing, patches, tables of padded rows.

Host work in numpy, and in Pillow where an image has to be resized. Numbers equal those of transformers' image
processor (Pillow backend).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firm_jax.errors import ConfigError, DataError, WeightsError
from firm_jax.interop.files import read_json

MAX_ASPECT = 200
BICUBIC = 3  # Pillow's number


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) an image is resized to: multiples of `factor`, near the aspect, within the pixel limits.

    Rounds halves to even, as Qwen's reference does. Raises DataError for a side more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise DataError(f"an image of {width}x{height} pixels is too narrow: the sides may differ {MAX_ASPECT} times")
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif tall * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        tall = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return tall, wide


@dataclass(frozen=True)
class ImageConfig:
    """What an image processor's JSON says: patch geometry, pixel limits and normalisation."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float = 1 / 255
    resample: int = BICUBIC

    @classmethod
    def from_folder(cls, folder: Path) -> "ImageConfig":
        """Read processor_config.json or preprocessor_config.json, with old (`min_pixels`) or new (`size`) limits.

        Raises WeightsError when neither file is there or readable, ConfigError for a setting that is not supported.
        """
        return cls.from_json(*image_processor_json(Path(folder)))

    @classmethod
    def from_json(cls, raw: Mapping, where: str | Path) -> "ImageConfig":
        """The settings in such a file; `where` stands in the errors."""
        for switch in ("do_resize", "do_rescale", "do_normalize"):
            if raw.get(switch, True) is not True:
                raise ConfigError(f"{where}: {switch}={raw[switch]!r} is not supported; it must be true")
        size = raw.get("size") or {}

        def need(value, name: str):
            if value is None:
                raise ConfigError(f"{where} lacks {name}")
            return value

        return cls(
            patch_size=need(raw.get("patch_size"), "patch_size"),
            temporal_patch_size=need(raw.get("temporal_patch_size"), "temporal_patch_size"),
            merge_size=need(raw.get("merge_size"), "merge_size"),
            min_pixels=need(raw.get("min_pixels") or size.get("shortest_edge"), "min_pixels (or size.shortest_edge)"),
            max_pixels=need(raw.get("max_pixels") or size.get("longest_edge"), "max_pixels (or size.longest_edge)"),
            mean=tuple(need(raw.get("image_mean"), "image_mean")),
            std=tuple(need(raw.get("image_std"), "image_std")),
            rescale=raw.get("rescale_factor", 1 / 255),
            resample=raw.get("resample", BICUBIC),
        )


def image_processor_json(folder: Path) -> tuple[dict, Path]:
    """The image processor's settings in a folder, and their file; WeightsError when there is none."""
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        file = folder / name
        if not file.exists():
            continue
        raw = read_json(file)
        raw = raw.get(key) if key else raw
        if raw:
            return raw, file
    raise WeightsError(
        f"{folder} has no image processor: expected preprocessor_config.json, or processor_config.json with a section "
        f"image_processor. Copy it from the model that the folder was made from."
    )


def limit_pixels(folder: Path, max_pixels: int) -> None:
    """Write this limit into an image processor's folder, in whichever of its files and forms it says one."""
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        file = folder / name
        content = read_json(file) if file.exists() else {}
        raw = content.get(key) if key else content
        for holder, field in ((raw, "max_pixels"), ((raw or {}).get("size"), "longest_edge")):
            if holder and holder.get(field) not in (None, max_pixels):
                holder[field] = max_pixels
                file.write_text(json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class PatchedImage:
    """One image as the vision tower takes it.

    patches: float32 [rows * columns, channels * frames * patch * patch], in blocks of merge x merge patches.
    grid: (rows, columns) in patches. digest: sha256 of the pixels before resizing, which names equal images.
    """

    patches: np.ndarray
    grid: tuple[int, int]
    digest: str


def to_pixels(image) -> np.ndarray:
    """A Pillow image, or an array [H, W, 3] (uint8, or float in [0, 1]), as uint8 [H, W, 3].

    DataError for any other array.
    """
    if hasattr(image, "convert"):  # Pillow's
        return np.asarray(image.convert("RGB"))
    try:
        pixels = np.asarray(image)
    except ValueError as error:
        raise DataError("an image is neither a Pillow image nor an array [H, W, 3]") from error
    if pixels.dtype == np.uint8 and pixels.shape[2:] == (3,):
        return pixels
    from firm_jax.data.images import from_array

    return np.asarray(from_array(pixels))


def image_digest(pixels: np.ndarray) -> str:
    """sha256 over the shape and the bytes of uint8 pixels [H, W, 3]."""
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def patch_image(image, config: ImageConfig) -> PatchedImage:
    """Resize, normalise and cut one image (as `to_pixels` takes it) into patches.

    The patch vector runs over (channel, frame, row, column); a still image repeats over the frames.
    """
    pixels = to_pixels(image)
    patch, merge = config.patch_size, config.merge_size
    height, width = smart_resize(
        *pixels.shape[:2], factor=patch * merge, min_pixels=config.min_pixels, max_pixels=config.max_pixels
    )
    digest = image_digest(pixels)
    if pixels.shape[:2] != (height, width):
        import PIL.Image

        image = PIL.Image.fromarray(pixels)
        pixels = np.asarray(image.resize((width, height), resample=PIL.Image.Resampling(config.resample)))
    patches = cut_patches(pixels[None], config)[0]
    return PatchedImage(patches, (height // patch, width // patch), digest)


def cut_patches(images: np.ndarray, config: ImageConfig) -> np.ndarray:
    """uint8 images [B, H, W, 3] of a size that fits -> normalised patches float32 [B, rows * columns, F]."""
    patch, merge = config.patch_size, config.merge_size
    B, height, width, _ = images.shape
    values = (images.astype(np.float64) * config.rescale).astype(np.float32)
    values = (values - np.float32(config.mean)) / np.float32(config.std)
    rows, columns = height // patch, width // patch
    blocks = values.reshape(B, rows // merge, merge, patch, columns // merge, merge, patch, 3)
    blocks = blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # block row, block column, row, column, channel, y, x
    still = np.repeat(blocks[:, :, :, :, :, :, None], config.temporal_patch_size, axis=6)
    return still.reshape(B, rows * columns, -1)


def bucket(size: int, smallest: int = 1) -> int:
    """The fixed length that `size` is padded to: 4, 5, 6 or 7 times a power of two, never below `smallest`.

    Few sizes, so few programs to compile, and never more than a quarter of the work on padding.
    """
    size = max(size, smallest)
    if size <= 4:
        return size
    step = 2 ** (math.floor(math.log2(size)) - 2)
    return math.ceil(size / step) * step


def patch_table(
    images: Sequence[PatchedImage], *, multiple: int = 1, least: tuple[int, int] = (0, 0)
) -> tuple[dict, dict[str, int]]:
    """The distinct ones of `images`, padded to one bucket, and the row of each by its digest.

    least: (images, patches an image) that the table has room for in any case.

    Returns ({"patches": float32 [M, P, C], "grids": int32 [M, 2]}, digest -> row). M is a power of two times
    `multiple`; empty rows have a grid of no patches. Without any image, M is 0.
    """
    distinct = {image.digest: image for image in images}
    if not distinct:
        return {"patches": np.zeros((0, 0, 0), np.float32), "grids": np.zeros((0, 2), np.int32)}, {}
    longest = max(len(image.patches) for image in distinct.values())
    count, length = padded(max(len(distinct), least[0]), max(longest, least[1]), multiple)
    patches = np.zeros((count, length, next(iter(distinct.values())).patches.shape[1]), np.float32)
    grids = np.zeros((count, 2), np.int32)
    for row, image in enumerate(distinct.values()):
        patches[row, : len(image.patches)] = image.patches
        grids[row] = image.grid
    return {"patches": patches, "grids": grids}, {digest: row for row, digest in enumerate(distinct)}


def padded(rows: int, length: int, multiple: int) -> tuple[int, int]:
    """The shape that `rows` images of up to `length` patches are padded to."""
    return power_of_two(rows, multiple), bucket(length, smallest=64)


def power_of_two(count: int, multiple: int = 1) -> int:
    """The smallest power of two times `multiple` that is not below `count`."""
    size = multiple
    while size < count:
        size *= 2
    return size
