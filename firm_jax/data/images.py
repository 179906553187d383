"""The one way in which images come from files: bounded, decoded once, upright, RGB; and floats to pixels and back."""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import PureWindowsPath

import numpy as np
from PIL import Image, ImageOps

from firm_jax.errors import DataError
from firm_jax.typing import Float

MAX_PIXELS = 16_777_216
MAX_BYTES = 64 * 1024 * 1024
MAX_ASPECT = 200
# A progressive JPEG has some ten; each costs a pass over all coefficients, and can be written in a few bytes.
MAX_SCANS = 100
FORMATS = ("PNG", "JPEG", "WEBP")
# Modes of 8 bits a channel or less. PIL clips deeper ones on conversion instead of scaling them.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")

START_OF_SCAN = b"\xff\xda"

# PIL only warns between one and two times its own limit, and decodes.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def load_image(
    path: str,
    root: str | os.PathLike,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Image.Image:
    """Decode one image of a dataset.

    The size is checked after the header and before the pixels are decoded. EXIF orientation is applied; transparent
    pixels show white.

    Args:
      path: relative to `root`, as it stands in a record; not trusted.
      root: folder of the dataset. Symbolic links may be used inside it and must not lead out of it.
      max_pixels: largest height * width.
      max_bytes: largest file.

    Returns:
      An RGB image of its own memory (no open file).

    Raises:
      DataError: names the path and one of a fixed set of reasons; nothing of what lies outside `root` or of a
        decoder's message is in it.
    """
    return decode_image(read_image_file(path, root, max_bytes=max_bytes), path, max_pixels=max_pixels)


def check_image(path: str, root: str | os.PathLike) -> None:
    """What `load_image` can tell without decoding any pixels; raises DataError as it does."""
    with _opened(read_image_file(path, root), path, MAX_PIXELS):
        pass


def read_image_file(path: str, root: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of an image file, found as by `load_image` and not looked into; raises DataError as it does."""
    refuse = _refusal(path)
    return _read_regular_file(_resolve(path, root, refuse), max_bytes, refuse)


def decode_image(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`load_image` for the content of a file, wherever it comes from; errors call it `name`."""
    with _opened(content, name, max_pixels) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def _refusal(name: str) -> Callable[[str], DataError]:
    shown = repr(name)[:200]
    return lambda reason: DataError(f"image {shown} {reason}. Correct the record or leave it out.")


@contextlib.contextmanager
def _opened(content: bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose header has passed all checks; whatever goes wrong with it inside becomes a DataError."""
    refuse = _refusal(name)
    if len(content) > MAX_BYTES:
        raise refuse(f"is larger than {MAX_BYTES} bytes")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise refuse(f"has more than {max_pixels} pixels ({width} x {height})")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise refuse(f"is more than {MAX_ASPECT} times as long as wide ({width} x {height})")
            if getattr(image, "n_frames", 1) != 1:
                raise refuse("has several frames")
            if image.format == "JPEG" and content.count(START_OF_SCAN) > MAX_SCANS:
                raise refuse(f"has more than {MAX_SCANS} scans")
            if image.mode not in MODES:
                raise refuse("has more than 8 bits a channel")
            yield image
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise refuse("has too many pixels") from error
    except Image.UnidentifiedImageError as error:
        raise refuse(f"is not one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders meet broken bytes with whatever their parsing code happens to raise
        raise refuse("is damaged: it cannot be decoded") from error


def _resolve(path: str, root: str | os.PathLike, refuse: Callable[[str], DataError]) -> str:
    """The real path of an untrusted relative path under `root`."""
    if not isinstance(path, str) or not path.strip():
        raise refuse("is not a path")
    if "\0" in path:
        raise refuse("holds a NUL character")
    # A Windows path or URL is a legal, if odd, relative name here; it is always a record made for another place.
    scheme = path.partition(":")[0].lower()
    if "://" in path or scheme in ("file", "data", "http", "https"):
        raise refuse("is a URL, and images are read from files only")
    if os.path.isabs(path) or PureWindowsPath(path).anchor:
        raise refuse("is an absolute path, and must be relative to the dataset's folder")
    real_root = os.path.realpath(root)
    if not os.path.isdir(real_root):
        raise DataError(f"image folder {os.fspath(root)!r} does not exist. Give the folder of the dataset.")
    # First without touching the disk, so that a path that leaves is refused alike whether or not it leads anywhere.
    if not _is_inside(os.path.normpath(os.path.join(real_root, path)), real_root):
        raise refuse("leads out of the dataset's folder")
    try:
        real_path = os.path.realpath(os.path.join(real_root, path))
        inside = _is_inside(real_path, real_root)
    except (OSError, ValueError) as error:
        raise refuse("is not a path") from error
    if not inside:
        raise refuse("leads out of the dataset's folder")
    return real_path


def _is_inside(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root


def _read_regular_file(path: str, max_bytes: int, refuse: Callable[[str], DataError]) -> bytes:
    """All bytes of a regular file; never waits for a pipe or device, never follows a link that appeared since."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise refuse("is not a regular file")
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(max_bytes + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise refuse("does not exist") from error
    except OSError as error:
        raise refuse("cannot be read") from error
    if len(content) > max_bytes:
        raise refuse(f"is larger than {max_bytes} bytes")
    return content


def _to_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_array(image: Image.Image) -> Float[np.ndarray, "H W 3"]:
    """An RGB image as float32 in [0, 1]."""
    return np.asarray(image.convert("RGB"), np.float32) / 255


def from_array(array: Float[np.ndarray, "H W 3"]) -> Image.Image:
    """A float image in [0, 1] as RGB: round(255 x), values outside clipped. DataError for NaN or another shape."""
    try:
        array = np.asarray(array, np.float32)
    except (TypeError, ValueError) as error:
        raise DataError("an image is an array of numbers [H, W, 3]") from error
    if array.ndim != 3 or array.shape[-1] != 3:
        raise DataError(f"an image has the shape [H, W, 3], not {list(array.shape)}")
    if np.isnan(array).any():
        raise DataError("an image holds NaN: the network that made it has diverged")
    return Image.fromarray(np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8))
