"""AutoencoderKLQwenImage on single frames against diffusers, through files that PyTorch writes and reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from torch_parity import assert_same_files, randomise, relative_error  # noqa: E402

from firm_jax.errors import ConfigError  # noqa: E402
from firm_jax.mesh import make_mesh, shard_batch  # noqa: E402
from firm_jax.models import from_pretrained, save_pretrained  # noqa: E402
from firm_jax.models.vae_qwen_image import AutoencoderKLQwenImageConfig  # noqa: E402

LIKE_PUBLISHED = dict(
    base_dim=6,
    z_dim=5,
    dim_mult=[1, 2, 4, 4],
    num_res_blocks=2,
    temperal_downsample=[False, True, True],
    latents_mean=[-0.5, 0.25, 0.0, 1.5, -1.0],
    latents_std=[2.0, 0.5, 1.25, 3.0, 1.0],
)
VARIANTS = {
    "like_published": LIKE_PUBLISHED,
    "two_levels": LIKE_PUBLISHED | dict(dim_mult=[3, 1], base_dim=4, num_res_blocks=1, temperal_downsample=[True]),
}


def build(fields: dict, folder):
    reference = diffusers.AutoencoderKLQwenImage(**fields)
    randomise(reference)
    with torch.no_grad():
        # The norms' scales have several dimensions, so `randomise` takes them for matrices; and some of the output is
        # to be clipped, but not most of it.
        for name, parameter in reference.named_parameters():
            if name.endswith("gamma"):
                parameter.add_(1.0)
        reference.decoder.conv_out.weight.mul_(2.0)
    reference.save_pretrained(folder)
    return reference.eval()


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return build(VARIANTS[request.param], folder), folder


def one_frame(x):
    """[B, H, W, C] -> PyTorch's [B, C, 1, H, W]."""
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1)[:, :, None].copy())


def channels_last(x):
    return np.moveaxis(x.detach().numpy()[:, :, 0], 1, -1)


def test_encode_and_decode_equal_diffusers(pair):
    reference, folder = pair
    vae = from_pretrained(folder)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, 24, 40, 3)).astype(np.float32)
    mean, logvar = jax.jit(vae.encode)(images)
    latents = rng.normal(size=(2, 3, 5, vae.config.z_dim)).astype(np.float32)
    decoded = jax.jit(vae.decode)(latents)
    with torch.no_grad():
        posterior = reference.encode(one_frame(images)).latent_dist
        expected = reference.decode(one_frame(latents)).sample
    assert relative_error(mean, channels_last(posterior.mean)) < 1e-5
    assert relative_error(logvar, channels_last(posterior.logvar)) < 1e-5
    assert relative_error(decoded, channels_last(expected)) < 1e-5
    assert decoded.shape == (2, 3 * vae.config.downscale, 5 * vae.config.downscale, 3)
    clipped = (np.abs(np.asarray(decoded)) == 1).mean()
    assert 0 < clipped < 0.5, f"{clipped:.0%} of the numbers are clipped"


def test_latents_are_standardised_as_by_the_pipelines(pair):
    """(z - mean) / std in each channel, and back."""
    _, folder = pair
    config = from_pretrained(folder).config
    latents = np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32)
    mean, std = (torch.tensor(getattr(config, f"latents_{name}")).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    expected = channels_last((one_frame(latents) - mean) / std)
    assert relative_error(config.standardise(latents), expected) < 1e-6
    assert relative_error(config.restore(expected), latents) < 1e-6


def test_gradients_equal_diffusers(pair):
    reference, folder = pair
    vae = from_pretrained(folder)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 8, 3)).astype(np.float32)
    loss, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.square(vae.decode(vae.encode(x)[0])).mean()))(images)
    source = one_frame(images).requires_grad_()
    expected = reference.decode(reference.encode(source).latent_dist.mean).sample.square().mean()
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    assert relative_error(gradient, channels_last(source.grad)) < 1e-4


def test_saving_gives_back_the_same_files(pair, tmp_path):
    """The slices and convolutions in time that no image meets are in the files too."""
    reference, folder = pair
    save_pretrained(from_pretrained(folder), tmp_path)
    assert_same_files(folder, tmp_path)
    assert any("time_conv" in name for name, _ in reference.named_parameters())
    reopened = diffusers.AutoencoderKLQwenImage.from_pretrained(tmp_path)
    public = {name: value for name, value in reference.config.items() if not name.startswith("_")}
    assert {name: value for name, value in reopened.config.items() if not name.startswith("_")} == public


def test_sharded_equals_unsharded(pair):
    _, folder = pair
    images = np.random.default_rng(2).uniform(-1, 1, (8, 8, 16, 3)).astype(np.float32)

    def roundtrip(graphdef, params, images):
        vae = nnx.merge(graphdef, params)
        mean, logvar = vae.encode(images)
        return mean, logvar, vae.decode(vae.config.restore(vae.config.standardise(mean)))

    run = jax.jit(roundtrip, static_argnums=0)
    expected = run(*nnx.split(from_pretrained(folder)), images)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        got = run(*nnx.split(from_pretrained(folder, mesh=mesh)), shard_batch(images, mesh))
    for ours, alone in zip(got, expected, strict=True):
        assert ours.sharding.spec[0] == ("data", "fsdp")
        assert relative_error(ours, alone) < 1e-6


def test_bfloat16_rounds_as_pytorch_does(pair):
    """In bfloat16 both sides leave the float32 images by about as much."""
    reference, folder = pair
    vae = from_pretrained(folder, dtype="bfloat16")
    latents = np.random.default_rng(3).normal(size=(2, 3, 5, vae.config.z_dim)).astype(np.float32)
    ours = jax.jit(vae.decode)(latents)
    assert ours.dtype == jnp.bfloat16
    rounded = diffusers.AutoencoderKLQwenImage.from_pretrained(folder, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        exact = channels_last(reference.decode(one_frame(latents)).sample)
        theirs = channels_last(rounded.decode(one_frame(latents).bfloat16()).sample.float())
    assert relative_error(ours, exact) < 1.5 * relative_error(theirs, exact)


HF = AutoencoderKLQwenImageConfig.from_hf(LIKE_PUBLISHED).to_hf()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents_mean": None}, "lacks latents_mean"),
        ({"latents_std": [1.0] * 4}, "latents_std has 4 entries, not 5"),
        ({"latents_std": [1.0, 1.0, 0.0, 1.0, 1.0]}, "latents_std=.* must be positive"),
        ({"temperal_downsample": [True]}, "temperal_downsample has 1 entries, not 3"),
        ({"attn_scales": [0.5]}, "attn_scales=.0.5. is not supported"),
        ({"input_channels": 4}, "input_channels=4 is not supported"),
        ({"base_dim": 5, "dim_mult": [1, 2, 3, 4]}, "base_dim=5"),
        ({"is_residual": True}, "is_residual"),
    ],
)
def test_a_config_we_cannot_honour_is_an_error(change, message):
    with pytest.raises(ConfigError, match=message):
        AutoencoderKLQwenImageConfig.from_hf(HF | change)


def test_config_survives_a_round_trip():
    assert AutoencoderKLQwenImageConfig.from_hf(HF).to_hf() == HF
