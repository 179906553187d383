import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from firm_jax.data.images import from_array, load_image, to_array
from firm_jax.errors import DataError

COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [255, 255, 255], [9, 99, 199]]], np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(COLOURS).save(folder / "sub" / "a.png")
    (tmp_path / "outside.png").write_bytes((folder / "sub" / "a.png").read_bytes())
    return folder


def flat_png(width: int, height: int) -> bytes:
    """A grey PNG that costs a few bytes on disk whatever its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_reads_the_pixels(root):
    image = load_image("sub/a.png", root)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), COLOURS)
    np.testing.assert_array_equal(np.asarray(load_image("sub/../sub/./a.png", root)), COLOURS)


def test_a_link_inside_the_folder_is_followed(root):
    (root / "link.png").symlink_to(root / "sub" / "a.png")
    np.testing.assert_array_equal(np.asarray(load_image("link.png", root)), COLOURS)


def test_exif_orientation_is_applied(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    Image.fromarray(COLOURS).save(root / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image("turned.png", root)), np.rot90(COLOURS, -1))


def test_transparent_pixels_show_white(root):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(root / "clear.png")
    expected = np.full((2, 2, 3), 255, np.uint8)
    expected[0, 0] = (10, 20, 30)
    np.testing.assert_array_equal(np.asarray(load_image("clear.png", root)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_become_rgb(root, mode):
    name = "other.jpg" if mode == "CMYK" else "other.png"
    Image.fromarray(COLOURS).convert(mode).save(root / name)
    assert load_image(name, root).mode == "RGB"


@pytest.mark.fault("escaping-path")
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../outside.png", "leads out"),
        ("sub/../../outside.png", "leads out"),
        ("../../etc/passwd", "leads out"),
        ("../nothing.png", "leads out"),
        ("/etc/passwd", "absolute"),
        ("C:\\images\\a.png", "absolute"),
        ("\\\\host\\share\\a.png", "absolute"),
        ("//host/share/a.png", "absolute"),
        ("http://example.com/a.png", "URL"),
        ("file:sub/a.png", "URL"),
        ("data:image/png;base64,AAAA", "URL"),
        ("a\0b.png", "NUL"),
        ("", "not a path"),
        (None, "not a path"),
        ("\ud800.png", "not a path"),
        ("sub", "not a regular file"),
        ("missing.png", "does not exist"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_paths_stay_inside_the_folder(root, path, reason):
    with pytest.raises(DataError, match=reason) as error:
        load_image(path, root)
    assert len(str(error.value)) < 500


@pytest.mark.fault("escaping-path")
def test_links_that_leave_or_loop_are_refused(root, tmp_path):
    (root / "out.png").symlink_to(tmp_path / "outside.png")
    (root / "elsewhere").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    for path, reason in (
        ("out.png", "leads out"),
        ("elsewhere/outside.png", "leads out"),
        ("loop.png", "cannot be read"),
    ):
        with pytest.raises(DataError, match=reason):
            load_image(path, root)


def test_a_neighbour_folder_with_the_same_beginning_is_outside(root, tmp_path):
    (tmp_path / "dataset2").mkdir()
    Image.fromarray(COLOURS).save(tmp_path / "dataset2" / "a.png")
    with pytest.raises(DataError, match="leads out"):
        load_image("../dataset2/a.png", root)


@pytest.mark.fault("escaping-path")
def test_a_pipe_does_not_block(root):
    os.mkfifo(root / "pipe.png")
    with pytest.raises(DataError, match="not a regular file"):
        load_image("pipe.png", root)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"image folder .*nowhere"):
        load_image("a.png", tmp_path / "nowhere")


@pytest.mark.fault("hostile-image")
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")  # pytest undoes the filter of the module
@pytest.mark.parametrize("size", [4097, 9000, 13000, 20000])
def test_a_decompression_bomb_is_refused_before_decoding(root, size, monkeypatch):
    # 9000 pixels a side are below PIL's limit, 13000 make it warn, 20000 make it raise.
    content = flat_png(size, size)
    (root / "bomb.png").write_bytes(content)
    assert len(content) < 100_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("the pixels were decoded"))
    with pytest.raises(DataError, match=r"more than 16777216 pixels|too many pixels"):
        load_image("bomb.png", root)


def test_limits_are_inclusive(root):
    (root / "flat.png").write_bytes(flat_png(200, 100))
    assert load_image("flat.png", root, max_pixels=20_000).size == (200, 100)
    with pytest.raises(DataError, match="more than 19999 pixels"):
        load_image("flat.png", root, max_pixels=19_999)
    size = (root / "flat.png").stat().st_size
    assert load_image("flat.png", root, max_bytes=size).size == (200, 100)
    with pytest.raises(DataError, match="larger than"):
        load_image("flat.png", root, max_bytes=size - 1)
    (root / "long.png").write_bytes(flat_png(201, 1))
    with pytest.raises(DataError, match="200 times"):
        load_image("long.png", root)


def test_what_is_not_one_8_bit_image_is_refused(root):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(root / "moving.webp", save_all=True, append_images=frames[1:])
    frames[0].save(root / "moving.png", save_all=True, append_images=frames[1:])
    frames[0].save(root / "graphic.gif")
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(root / "deep.png")
    (root / "page.png").write_text("<html>not found</html>")
    (root / "empty.png").write_bytes(b"")
    for name, reason in {
        "moving.webp": "several frames",
        "moving.png": "several frames",
        "graphic.gif": "not one of the formats",
        "deep.png": "8 bits",
        "page.png": "not one of the formats",
        "empty.png": "not one of the formats",
    }.items():
        with pytest.raises(DataError, match=reason):
            load_image(name, root)


@pytest.mark.fault("hostile-image")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file_is_refused(root, format):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, format)
    (root / "cut").write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
    with pytest.raises(DataError) as error:
        load_image("cut", root)
    assert "0x" not in str(error.value)


@pytest.mark.fault("hostile-image")
@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), format=st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_broken_bytes_give_an_image_or_a_data_error(tmp_path_factory, position, byte, format):
    content = io.BytesIO()
    Image.fromarray(COLOURS).save(content, format)
    broken = bytearray(content.getvalue())
    broken[position % len(broken)] = byte
    folder = tmp_path_factory.getbasetemp() / "broken"
    folder.mkdir(exist_ok=True)
    (folder / "image").write_bytes(broken)
    try:
        assert load_image("image", folder).mode == "RGB"
    except DataError as error:
        assert str(error).startswith("image 'image' ")


def test_floats_and_pixels():
    np.testing.assert_array_equal(np.asarray(from_array(to_array(Image.fromarray(COLOURS)))), COLOURS)
    assert to_array(Image.fromarray(COLOURS)).dtype == np.float32
    row = np.array([[-1.0, 0.0, 0.4 / 255], [0.6 / 255, 1.0, 7.0]], np.float32)[None]
    np.testing.assert_array_equal(np.asarray(from_array(row)), [[[0, 0, 0], [1, 255, 255]]])
    with pytest.raises(DataError, match="NaN"):
        from_array(np.full((2, 2, 3), np.nan))
    with pytest.raises(DataError, match="shape"):
        from_array(np.zeros((2, 2, 1)))
