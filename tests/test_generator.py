"""The generator's contract: determinism, independence of batch and devices, adapters, and what it refuses."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipeline import CLIP_TOKENS, LORA_TARGETS, tiny_generator

from firm_jax.errors import ConfigError, WeightsError
from firm_jax.generation import Generator, check_size, initial_noise
from firm_jax.mesh import make_mesh
from firm_jax.models import lora

PROMPTS = ["a red circle", "two big blue squares", "a red circle"]
SIZE = {"height": 24, "width": 16, "steps": 2, "max_text_tokens": 12}


@pytest.fixture(scope="module")
def generator():
    return tiny_generator()


@pytest.fixture(scope="module")
def folder(generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    generator.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(generator):
    return generator.sample(PROMPTS, solver="sde", seed=7, **SIZE)


def test_images_are_float32_in_range(images):
    assert images.shape == (3, 24, 16, 3)
    assert images.dtype == np.float32
    assert images.min() >= 0 and images.max() <= 1
    assert images.std() > 0.1


def test_a_prompt_repeated_gives_another_image(images):
    assert np.abs(images[0] - images[2]).max() > 0.1


def test_the_seed_decides(generator, images):
    again = generator.sample(PROMPTS, solver="sde", seed=7, **SIZE)
    np.testing.assert_array_equal(again, images)
    other = generator.sample(PROMPTS, solver="sde", seed=8, **SIZE)
    assert np.abs(other - images).max(axis=(1, 2, 3)).min() > 0.1


def test_an_image_does_not_depend_on_its_batch(generator, images):
    alone = generator.sample(PROMPTS[:1], solver="sde", seed=7, **SIZE)
    np.testing.assert_allclose(alone[0], images[0], atol=1e-5)


def test_eight_devices_draw_the_images_of_one(folder, images):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharded = Generator.from_pretrained(folder, dtype="float32", mesh=mesh)
    kernel = sharded.params["blocks"]["attn"]["to_q"]["kernel"].get_value()
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert sharded.encode_prompts(PROMPTS, 12).context.sharding.is_fully_replicated
    got = sharded.sample(PROMPTS, solver="sde", seed=7, **SIZE)
    assert isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, images, atol=1e-5)


def test_bfloat16_is_the_default_and_stays_close(folder, images):
    half = Generator.from_pretrained(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(half.vae_params)} == {jnp.dtype("float32")}
    got = half.sample(PROMPTS, solver="sde", seed=7, **SIZE)
    assert got.dtype == np.float32
    assert 0 < np.abs(got - images).mean() < 0.02


def test_decoding_in_chunks_changes_nothing(generator, monkeypatch):
    latents = np.asarray(initial_noise(jax.random.key(0), np.arange(3), (12, 8, 4)))
    whole = generator.decode_on_host(latents)
    monkeypatch.setattr("firm_jax.generation.generator.DECODED_PIXELS", 2 * 24 * 16)
    np.testing.assert_allclose(generator.decode_on_host(latents), whole, atol=1e-6)


def test_noise_belongs_to_the_sample():
    key = jax.random.key(3)
    whole = initial_noise(key, jnp.arange(5), (2, 3, 4))
    assert whole.shape == (5, 2, 3, 4)
    np.testing.assert_array_equal(initial_noise(key, jnp.array([4, 1]), (2, 3, 4)), whole[jnp.array([4, 1])])


def test_an_adapter_changes_the_image_and_a_zero_one_does_not(generator, images):
    config = lora.LoraConfig(rank=2, alpha=4.0, targets=LORA_TARGETS)
    tree = lora.init_lora(jax.random.key(0), generator.params, config)
    try:
        generator.lora = tree
        same = generator.sample(PROMPTS, solver="sde", seed=7, **SIZE)
        generator.lora = jax.tree.map(lambda leaf: leaf + 0.3, tree)
        changed = generator.sample(PROMPTS, solver="sde", seed=7, **SIZE)
    finally:
        generator.lora = None
    np.testing.assert_allclose(same, images, atol=1e-5)
    assert np.abs(changed - images).max() > 0.05


def test_each_distinct_prompt_is_encoded_once(generator, monkeypatch):
    encoded = []
    text, encode = generator.text_encoders, generator.text_encoders.encode_jitted
    monkeypatch.setattr(text, "encode_jitted", lambda *given: encoded.append(given[1]) or encode(*given))
    prompts = [*PROMPTS, "a star", *PROMPTS]
    conditioning = generator.encode_prompts(prompts, 12)
    assert [len(ids["text_encoder"]) for ids in encoded] == [4]  # three distinct ones, filled up to a power of two
    assert conditioning.context.shape == (7, CLIP_TOKENS + 12, 32)
    assert conditioning.pooled.shape == (7, 18)
    np.testing.assert_array_equal(conditioning.context[0], conditioning.context[6])
    assert np.abs(conditioning.context[0] - conditioning.context[1]).max() > 0.1


def test_a_long_prompt_is_cut_with_a_warning(generator, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        ids = generator.text_encoders.tokenize(["a star", "one " * 30], 12)
    assert ids["text_encoder"].shape == (2, CLIP_TOKENS)
    assert ids["text_encoder_3"].shape == (2, 12)
    assert "1 of 2 prompts are longer than the 9 tokens that text_encoder reads" in caplog.text
    assert "12 tokens that text_encoder_3 reads" in caplog.text


@pytest.mark.parametrize(
    "change, named",
    [
        ({"height": 22}, "multiples of 4, not 22 x 16"),
        ({"width": 18}, "multiples of 4, not 24 x 18"),
        ({"width": 44}, "latents of 12 x 22"),
        ({"prompts": []}, "at least one prompt"),
        ({"images": [np.zeros((8, 8, 3))]}, "images is for editing"),
        ({"source_area": 1024}, "source_area is for editing"),
        ({"condition_area": 1024}, "condition_area is for editing"),
        ({"noise": np.zeros((3, 12, 8, 4))}, r"noise must have shape .* \[3, 4, 12, 8\], not \[3, 12, 8, 4\]"),
        ({"steps": 0}, "at least 1 step"),
        ({"solver": "heun"}, "unknown solver 'heun'"),
        ({"max_text_tokens": 0}, "max_text_tokens must be at least 1"),
    ],
)
def test_what_sample_refuses(generator, change, named):
    with pytest.raises(ConfigError, match=named):
        generator.sample(**({"prompts": PROMPTS} | SIZE | change))


def test_sizes_are_checked_before_weights_are_read(folder, tmp_path):
    for part in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text((folder / part).read_text())
    check_size(tmp_path, 24, 16)
    with pytest.raises(ConfigError, match="multiples of 4, not 22 x 16"):
        check_size(tmp_path, 22, 16)
    with pytest.raises(ConfigError, match="latents of 12 x 22"):
        check_size(tmp_path, 24, 44)


def edit_index(folder, tmp_path, **change):
    """A folder with that pipeline's model_index.json, changed; its parts are not copied."""
    index = json.loads((folder / "model_index.json").read_text()) | change
    (tmp_path / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if v is not None}))
    return tmp_path


@pytest.mark.parametrize(
    "change, named",
    [
        ({"_class_name": "FluxPipeline"}, "'FluxPipeline'; supported pipelines: .*StableDiffusion3Pipeline"),
        ({"vae": None}, "lacks vae"),
        ({"tokenizer_3": None}, "lacks tokenizer_3"),
        ({"text_encoder_2": [None, None]}, "lacks text_encoder_2"),
        ({"image_encoder": ["transformers", "SiglipVisionModel"]}, "not supported: .'image_encoder'."),
    ],
)
def test_pipelines_that_are_not_supported_are_named(folder, tmp_path, change, named):
    with pytest.raises(ConfigError, match=named):
        Generator.from_pretrained(edit_index(folder, tmp_path, **change))


def test_a_folder_that_is_no_pipeline_says_what_it_holds(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no model_index.json, but config.json, .*supported pipelines"):
        Generator.from_pretrained(folder / "transformer")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(WeightsError, match="not valid JSON"):
        Generator.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="no such model folder"):
        Generator.from_pretrained(tmp_path / "absent")


def test_parts_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ConfigError, match="pooled features of the CLIP encoders 18, by the transformer 20"):
        tiny_generator(pooled_projection_dim=20)
    with pytest.raises(ConfigError, match="width of the T5 encoder 32, by the transformer 36"):
        tiny_generator(joint_attention_dim=36)
    with pytest.raises(ConfigError, match="27 wide together"):
        tiny_generator(t5=False, joint_attention_dim=26)
