"""The Qwen-Image generators: sources, sizes, seeds, guidance, meshes, and what they refuse."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_qwen_image import tiny_qwen_image

from firm_jax.errors import ConfigError, DataError
from firm_jax.generation import Generator
from firm_jax.mesh import make_mesh

PROMPTS = ["a red circle", "draw a blue square"]
SIZE = {"height": 16, "width": 24, "steps": 2, "guidance": 2.0, "source_area": 64 * 64, "condition_area": 64 * 64}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit_plus")
    tiny_qwen_image(folder)
    return folder


@pytest.fixture(scope="module")
def generator(folder):
    return Generator.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def edited(generator):
    return generator.sample(PROMPTS, [picture(64, 64), [picture(40, 80, 1), picture(64, 64)]], **SIZE)


def test_an_image_does_not_depend_on_what_is_drawn_beside_it(generator, edited):
    assert edited.shape == (2, 16, 24, 3) and edited.dtype == np.float32
    alone = generator.sample(PROMPTS[:1], picture(64, 64), **SIZE)
    np.testing.assert_allclose(alone[0], edited[0], atol=1e-5)
    again = generator.sample(PROMPTS[0], [picture(64, 64)], **SIZE)
    np.testing.assert_array_equal(again, alone)


def test_one_prompt_takes_a_plain_list_of_its_images(generator):
    images = [picture(40, 80, 1), picture(64, 64)]
    nested = generator.sample(PROMPTS[1:], [images], **SIZE)
    np.testing.assert_array_equal(generator.sample(PROMPTS[1:], images, **SIZE), nested)


def test_eight_devices_edit_as_one(folder, edited):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spread = Generator.from_pretrained(folder, dtype="float32", mesh=mesh)
    got = spread.sample(PROMPTS, [picture(64, 64), [picture(40, 80, 1), picture(64, 64)]], **SIZE)
    np.testing.assert_allclose(got, edited, atol=1e-5)


def test_sources_are_cropped_only_when_that_is_asked_for(generator):
    wide = picture(64, 192, 2)
    middle = wide.crop((48, 0, 144, 64))  # 3 : 2, as the new image
    cut = generator.sample(PROMPTS[:1], [wide], crop_sources=True, **SIZE)
    np.testing.assert_array_equal(cut, generator.sample(PROMPTS[:1], [middle], **SIZE))
    assert np.abs(cut - generator.sample(PROMPTS[:1], [wide], **SIZE)).max() > 1e-3


def test_shapes_follow_from_all_sizes_to_come(generator):
    """So that a program is compiled once, whichever records an epoch draws."""

    class Settings:
        guidance, max_text_tokens, crop_sources = 1.0, 20, False
        height, width, source_area, condition_area = 16, 24, 64 * 64, 64 * 64

    sizes = [[(64, 64)], [(40, 80), (64, 64)], [(90, 30)]]
    drawn = [
        generator.condition(PROMPTS[:1], Settings, [own], sizes)[0]
        for own in ([picture(64, 64)], [picture(40, 80), picture(64, 64)])
    ]
    shapes = [jax.tree.map(np.shape, conditioning) for conditioning in drawn]
    assert shapes[0] == shapes[1]
    assert drawn[0].sources.seen.sum() < drawn[1].sources.seen.sum() == drawn[1].sources.seen.size


def test_guidance_keeps_the_norm_of_every_patch(generator):
    rng = np.random.default_rng(0)
    negative, positive = (rng.normal(size=(2, 4, 6, 5)).astype(np.float32) for _ in range(2))
    guided = np.asarray(generator.guide(negative, positive, 3.0))

    def norms(v):
        return np.sqrt(np.square(v.reshape(2, 2, 2, 3, 2, 5)).sum((2, 4, 5)))

    np.testing.assert_allclose(norms(guided), norms(positive), rtol=1e-5)
    plain = negative + 3.0 * (positive - negative)
    np.testing.assert_allclose(
        guided.reshape(2, 2, 2, 3, 2, 5) / norms(guided)[:, :, None, :, None, None],
        plain.reshape(2, 2, 2, 3, 2, 5) / norms(plain)[:, :, None, :, None, None],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    zeros = np.zeros_like(positive)
    assert not np.asarray(generator.guide(zeros, zeros, 3.0)).any()


@pytest.mark.parametrize(
    ("images", "change", "error", "said"),
    [
        (None, {}, ConfigError, "edits images: pass `images`"),
        ([picture(64, 64)], {}, ConfigError, "2 prompts need the source images of as many, not of 1"),
        ([[], [picture(64, 64)]], {}, DataError, "prompt 0 has 0 source images; .* takes 1 to 3"),
        ([[picture(64, 64)] * 4, picture(64, 64)], {}, DataError, "prompt 0 has 4 source images"),
        ([picture(64, 64), picture(20, 161)], {}, DataError, "161x20 pixels: its sides may differ 8 times"),
        ([picture(64, 64)] * 2, {"source_area": 10 * 10}, DataError, "has no room in an area of 100 pixels"),
        ([picture(64, 64)] * 2, {"height": 18}, ConfigError, "positive multiples of 4, not 18 x 24"),
        ([picture(64, 64)] * 2, {"max_text_tokens": 0}, ConfigError, "max_text_tokens must be at least 1"),
        ([np.zeros((8, 8)), picture(64, 64)], {}, DataError, r"\[H, W, 3\]"),
    ],
)
def test_what_cannot_be_edited_is_named(generator, images, change, error, said):
    with pytest.raises(error, match=said):
        generator.sample(PROMPTS, images, **SIZE | change)


def test_text_to_image_takes_no_sources(tmp_path):
    generator = tiny_qwen_image(tmp_path, "QwenImagePipeline")
    with pytest.raises(ConfigError, match="images is for editing"):
        generator.sample(PROMPTS, [picture(8, 8)] * 2, height=16, width=24)
    assert not (tmp_path / "processor").exists()


def test_a_folder_without_its_processor_is_refused(folder, tmp_path):
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler", "processor"):
        (tmp_path / name).symlink_to(folder / name)
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"processor": [None, None]}))
    with pytest.raises(ConfigError, match="lacks processor"):
        Generator.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"controlnet": ["diffusers", "X"]}))
    with pytest.raises(ConfigError, match=r"not supported: \['controlnet'\]"):
        Generator.from_pretrained(tmp_path)
