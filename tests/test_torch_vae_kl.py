"""AutoencoderKL against diffusers, through files that PyTorch writes and reads."""

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
from firm_jax.models.vae_kl import AutoencoderKLConfig  # noqa: E402

SD3_LIKE = dict(
    block_out_channels=(8, 16, 24),
    layers_per_block=2,
    norm_num_groups=4,
    latent_channels=5,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
VARIANTS = {
    "sd3": SD3_LIKE,
    "quant_convs_no_attention": SD3_LIKE
    | dict(
        block_out_channels=(12, 6),
        norm_num_groups=3,
        layers_per_block=1,
        use_quant_conv=True,
        use_post_quant_conv=True,
        mid_block_add_attention=False,
    ),
}


def build(fields: dict, folder):
    depth = len(fields["block_out_channels"])
    reference = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth, **fields
    )
    randomise(reference)
    reference.save_pretrained(folder)
    return reference.eval()


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return build(VARIANTS[request.param], folder), folder


def channels_first(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def channels_last(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def test_encode_and_decode_equal_diffusers(pair):
    reference, folder = pair
    vae = from_pretrained(folder)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, 20, 28, 3)).astype(np.float32)
    mean, logvar = jax.jit(vae.encode)(images)
    latents = rng.normal(size=(2, 3, 5, vae.config.latent_channels)).astype(np.float32)
    decoded = jax.jit(vae.decode)(latents)
    with torch.no_grad():
        posterior = reference.encode(channels_first(images)).latent_dist
        expected = reference.decode(channels_first(latents)).sample
    assert relative_error(mean, channels_last(posterior.mean)) < 1e-5
    assert relative_error(logvar, channels_last(posterior.logvar)) < 1e-5
    assert relative_error(decoded, channels_last(expected)) < 1e-5
    assert decoded.shape == (2, 3 * vae.config.downscale, 5 * vae.config.downscale, 3)


def test_gradients_equal_diffusers(pair):
    reference, folder = pair
    vae = from_pretrained(folder)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 12, 8, 3)).astype(np.float32)
    loss, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.square(vae.decode(vae.encode(x)[0])).mean()))(images)
    source = channels_first(images).requires_grad_()
    expected = reference.decode(reference.encode(source).latent_dist.mean).sample.square().mean()
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    assert relative_error(gradient, channels_last(source.grad)) < 1e-4


def test_saving_gives_back_the_same_files(pair, tmp_path):
    _, folder = pair
    save_pretrained(from_pretrained(folder), tmp_path)
    assert_same_files(folder, tmp_path)
    reopened = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    original = diffusers.AutoencoderKL.from_pretrained(folder)
    public = {k: v for k, v in original.config.items() if not k.startswith("_")}
    assert {k: v for k, v in reopened.config.items() if not k.startswith("_")} == public


def test_sharded_equals_unsharded(pair):
    _, folder = pair
    images = np.random.default_rng(2).uniform(-1, 1, (8, 8, 12, 3)).astype(np.float32)

    def roundtrip(graphdef, params, images):
        vae = nnx.merge(graphdef, params)
        mean, logvar = vae.encode(images)
        return mean, logvar, vae.decode(mean)

    run = jax.jit(roundtrip, static_argnums=0)
    expected = run(*nnx.split(from_pretrained(folder)), images)
    mesh = make_mesh(data=4, fsdp=2)
    with jax.set_mesh(mesh):
        got = run(*nnx.split(from_pretrained(folder, mesh=mesh)), shard_batch(images, mesh))
    for ours, alone in zip(got, expected, strict=True):
        assert ours.sharding.spec[0] == ("data", "fsdp")
        assert relative_error(ours, alone) < 1e-6


def test_bfloat16_computes_in_bfloat16(pair):
    _, folder = pair
    vae = from_pretrained(folder, dtype="bfloat16")
    mean, _ = jax.eval_shape(vae.encode, jnp.zeros((1, 8, 8, 3)))
    assert mean.dtype == jnp.bfloat16
    assert jax.eval_shape(vae.decode, mean).dtype == jnp.bfloat16


HF = AutoencoderKLConfig(**SD3_LIKE).to_hf()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": None}, "lacks scaling_factor"),
        ({"shift_factor": None}, "lacks shift_factor"),
        ({"act_fn": "relu"}, "act_fn='relu' is not supported"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types"),
        ({"norm_num_groups": 5}, "multiples of norm_num_groups 5"),
        ({"flux_capacitor": 1}, "flux_capacitor"),
    ],
)
def test_a_config_we_cannot_honour_is_an_error(change, message):
    with pytest.raises(ConfigError, match=message):
        AutoencoderKLConfig.from_hf(HF | change)


def test_config_survives_a_round_trip():
    config = AutoencoderKLConfig(**SD3_LIKE)
    assert AutoencoderKLConfig.from_hf(config.to_hf()) == config
