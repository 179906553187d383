"""Whole pipelines against diffusers' StableDiffusion3Pipeline: same folder, same noise, same images."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tiny_pipeline import tiny_generator  # noqa: E402

from firm_jax.generation import Generator  # noqa: E402

# Unequal lengths; the second is too long for CLIP's nine tokens, the third has a word that falls apart into letters.
PROMPTS = ["a red circle", "two big blue squares and a small green triangle on a yellow background", "Zebra, a star"]
HEIGHT, WIDTH = 24, 16


@pytest.fixture(scope="module", params=["with_t5", "without_t5"])
def pair(request, tmp_path_factory):
    """diffusers' pipeline on a folder that we wrote, and our generator on the folder that it wrote again."""
    ours, theirs = (tmp_path_factory.mktemp(name) for name in ("ours", "theirs"))
    with_t5 = request.param == "with_t5"
    tiny_generator(t5=with_t5).save_pretrained(ours)
    without = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}  # diffusers wants this said
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(ours, **without)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(theirs)
    return pipeline, Generator.from_pretrained(theirs, dtype="float32")


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_images_equal_diffusers(pair, guidance):
    pipeline, generator = pair
    noise = np.random.default_rng(0).normal(size=(3, 4, HEIGHT // 2, WIDTH // 2)).astype(np.float32)
    expected = pipeline(
        PROMPTS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=torch.from_numpy(noise),
        max_sequence_length=21,
        output_type="np",
    ).images
    got = generator.sample(
        PROMPTS, height=HEIGHT, width=WIDTH, steps=4, guidance=guidance, noise=noise, max_text_tokens=21
    )
    assert got.dtype == np.float32
    assert got.shape == (3, HEIGHT, WIDTH, 3)
    assert expected.std() > 0.1  # random weights must still draw something that depends on every part
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_the_default_text_length_is_that_of_diffusers(pair):
    pipeline, generator = pair
    expected = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    got = generator.encode_prompts(PROMPTS)
    np.testing.assert_allclose(got.context, expected[0].detach(), atol=1e-4)
    np.testing.assert_allclose(got.pooled, expected[2].detach(), atol=1e-4)


def test_dynamic_shifting_follows_the_scheduler_config(tmp_path):
    generator = tiny_generator(t5=False)
    config = {"num_train_timesteps": 1000, "use_dynamic_shifting": True, "base_image_seq_len": 4, "max_shift": 1.2}
    generator.scheduler = config
    generator.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert saved == {"_class_name": "FlowMatchEulerDiscreteScheduler", **config}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    fields = scheduler.config
    slope = (fields.max_shift - fields.base_shift) / (fields.max_image_seq_len - fields.base_image_seq_len)
    mu = fields.base_shift + slope * (24 - fields.base_image_seq_len)  # 24 x 16 pixels: 6 x 4 tokens
    scheduler.set_timesteps(5, mu=mu)
    np.testing.assert_allclose(generator.sigmas(5, HEIGHT, WIDTH), scheduler.sigmas, atol=1e-6)
