"""Whole Qwen-Image pipelines against diffusers': same folder, same noise, same source images, same new images."""

import json

import numpy as np
import PIL.Image
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus  # noqa: E402
from tiny_qwen_image import tiny_qwen_image  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

from firm_jax.generation import Generator  # noqa: E402
from firm_jax.generation.sources import size_of_area  # noqa: E402

PROMPTS = ["a red circle", "draw a blue square on the red background and make it turn into words", "Zebra"]
HEIGHT, WIDTH = 24, 40
SIZE = (64, 96)  # of a source of 61 x 90 pixels in an area of 80 x 80


class Processor(transformers.Qwen2VLProcessor):
    """Without a video processor, which needs torchvision."""

    def __init__(self, image_processor, tokenizer):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        self.chat_template = None


def reference(name: str, folder):
    """diffusers' pipeline on a folder, whose text encoder is told where the images stand."""
    text_encoder = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder / "text_encoder", dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    forward, image_id = text_encoder.forward, text_encoder.config.image_token_id

    def aware(**given):
        return forward(**given, mm_token_type_ids=(given["input_ids"] == image_id).int())

    if name != "QwenImagePipeline":
        text_encoder.forward = aware
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        "vae": diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae"),
        "transformer": diffusers.QwenImageTransformer2DModel.from_pretrained(folder / "transformer"),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
    }
    if name != "QwenImagePipeline":
        parts["processor"] = Processor(Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"), tokenizer)
    pipeline = getattr(diffusers, name)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pipeline class -> diffusers' pipeline, and our generator on the same folder."""
    made = {}

    def of(name, **changes):
        key = (name, *changes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            tiny_qwen_image(folder, name, **changes)
            made[key] = reference(name, folder), Generator.from_pretrained(folder, dtype="float32")
        return made[key]

    return of


def noise_of(count: int, height=HEIGHT, width=WIDTH):
    return np.random.default_rng(0).normal(size=(count, 5, height // 2, width // 2)).astype(np.float32)


def packed(noise):
    B, C, h, w = noise.shape
    return torch.from_numpy(noise.reshape(B, C, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, 4 * C))


def picture(height: int, width: int, seed: int) -> PIL.Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    return PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BILINEAR)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_text_to_image_equals_diffusers(pairs, guidance):
    pipeline, generator = pairs("QwenImagePipeline")
    noise = noise_of(3)
    expected = pipeline(
        PROMPTS,
        negative_prompt=[" "] * 3 if guidance > 1 else None,
        true_cfg_scale=guidance,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=4,
        latents=packed(noise),
        output_type="np",
    ).images
    got = generator.sample(PROMPTS, height=HEIGHT, width=WIDTH, steps=4, guidance=guidance, noise=noise)
    assert got.dtype == np.float32 and got.shape == (3, HEIGHT, WIDTH, 3)
    assert expected.std() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4)
    again = generator.sample(
        PROMPTS, height=HEIGHT, width=WIDTH, steps=4, guidance=guidance, noise=noise, max_text_tokens=90
    )
    np.testing.assert_allclose(again, expected, atol=1e-4)


def edited(pipeline, prompt, sources, noise, guidance):
    """One image by diffusers."""
    return pipeline(
        image=sources,
        prompt=prompt,
        negative_prompt=" " if guidance > 1 else None,
        true_cfg_scale=guidance,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=4,
        latents=packed(noise),
        output_type="np",
    ).images[0]


@pytest.mark.parametrize(
    "changes, guidance", [({}, 1.0), ({}, 3.5), ({"zero_cond_t": True}, 1.0)], ids=["plain", "true_cfg", "edit_2511"]
)
def test_edits_with_one_and_two_sources_equal_diffusers(pairs, monkeypatch, changes, guidance):
    """In one batch of ours, which diffusers draws one by one: sources of unlike number, size and aspect ratio."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 96 * 96)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 64 * 64)
    pipeline, generator = pairs("QwenImageEditPlusPipeline", **changes)
    sources = [[picture(50, 90, 1)], [picture(200, 70, 2), picture(64, 64, 3)], [picture(33, 129, 4)]]
    noise = noise_of(3)
    with torch.no_grad():
        expected = np.stack(
            [edited(pipeline, *given, guidance) for given in zip(PROMPTS, sources, np.split(noise, 3), strict=True)]
        )
    areas = {"source_area": 96 * 96, "condition_area": 64 * 64}
    size = {"height": HEIGHT, "width": WIDTH, "steps": 4, "guidance": guidance}
    got = generator.sample(PROMPTS, sources, noise=noise, **size, **areas)
    assert expected.std() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4)
    other = [sources[1], sources[1][::-1], sources[0]]
    swapped = generator.sample(PROMPTS, other, noise=noise, **size, **areas)
    assert (np.abs(swapped - got).max((1, 2, 3)) > 3e-3).all(), "number and order of the sources must matter"
    arrays = [[np.asarray(image) for image in own] for own in sources]
    padded = generator.sample(PROMPTS, arrays, noise=noise, max_text_tokens=60, **size, **areas)
    np.testing.assert_allclose(padded, expected, atol=1e-4)


def test_the_first_edit_pipeline_equals_diffusers(pairs, monkeypatch):
    """One source, which text encoder and transformer see at one size."""
    pipeline, generator = pairs("QwenImageEditPipeline")
    monkeypatch.setattr(
        pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (*SIZE[::-1], None) if ratio > 1 else 0
    )
    source, noise = picture(61, 90, 1), noise_of(1)
    with torch.no_grad():
        expected = edited(pipeline, PROMPTS[1], source, noise, 2.0)
    got = generator.sample(
        PROMPTS[1:2], [source], noise=noise, height=HEIGHT, width=WIDTH, steps=4, guidance=2.0,
        source_area=80 * 80, condition_area=80 * 80,
    )  # fmt: skip
    np.testing.assert_allclose(got[0], expected, atol=1e-4)


def test_positions_that_know_of_images_matter(pairs):
    """The reference is only one because its text encoder is told where the images stand."""
    pipeline, _ = pairs("QwenImageEditPlusPipeline")
    sources = [picture(64, 64, 1)]
    aware = pipeline.encode_prompt(PROMPTS[0], sources)[0]
    forward = pipeline.text_encoder.forward
    pipeline.text_encoder.forward = lambda **given: type(pipeline.text_encoder).forward(pipeline.text_encoder, **given)
    try:
        plain = pipeline.encode_prompt(PROMPTS[0], sources)[0]
    finally:
        pipeline.text_encoder.forward = forward
    assert (aware - plain).norm() > 0.05 * aware.norm()


def test_sizes_of_sources_equal_diffusers():
    for height, width in ((50, 90), (800, 120), (64, 64), (1000, 333), (777, 778), (120, 960)):
        for area in (384 * 384, 512 * 512, 1024 * 1024):
            expected = pipeline_qwenimage_edit_plus.calculate_dimensions(area, width / height)
            assert size_of_area(area, height, width) == expected[::-1]


def test_a_long_text_is_cut_as_diffusers_cuts_it(pairs, caplog):
    pipeline, generator = pairs("QwenImagePipeline")
    noise, prompt = noise_of(1), "a red circle and " * 20
    expected = pipeline(
        prompt, height=HEIGHT, width=WIDTH, num_inference_steps=2, latents=packed(noise), max_sequence_length=9,
        output_type="np",
    ).images  # fmt: skip
    got = generator.sample([prompt], height=HEIGHT, width=WIDTH, steps=2, guidance=1, noise=noise, max_text_tokens=9)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert "1 of 1 prompts are longer than max_text_tokens = 9" in caplog.text


def test_diffusers_opens_what_we_save(pairs, tmp_path):
    _, generator = pairs("QwenImageEditPlusPipeline")
    generator.save_pretrained(tmp_path)
    again = reference("QwenImageEditPlusPipeline", tmp_path)
    assert again.processor.image_token_id == generator.text_encoder.config.image_token_id
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["processor"] == ["transformers", "Qwen2VLProcessor"]
    assert (tmp_path / "processor" / "preprocessor_config.json").exists()
