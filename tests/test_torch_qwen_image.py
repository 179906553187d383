"""QwenImageTransformer against diffusers and PEFT, through files that PyTorch writes and reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from qwen_image_sources import packed  # noqa: E402
from torch_parity import assert_same_files, randomise, relative_error  # noqa: E402

from firm_jax.mesh import make_mesh, shard_batch  # noqa: E402
from firm_jax.models import from_pretrained, lora, save_pretrained  # noqa: E402
from firm_jax.models.qwen_image import rotary_angles, token_places  # noqa: E402
from firm_jax.sharding import shardings  # noqa: E402

TINY = dict(
    in_channels=12,
    out_channels=3,
    num_layers=3,
    attention_head_dim=12,
    num_attention_heads=2,
    joint_attention_dim=22,
    axes_dims_rope=(2, 4, 6),
)
VARIANTS = {
    "edit_2509": TINY,
    "edit_2511": TINY | dict(zero_cond_t=True),
    "small_patches": TINY | dict(patch_size=1, in_channels=5, out_channels=None, num_layers=1),
}
TARGET, SOURCES = (10, 6), ((6, 14), (4, 2))  # latents: grids of odd sides, neither square nor alike
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS = tuple(f"attn.{name}" for name in TARGETS) + tuple(
    f"{stream}.{name}" for stream in ("img_mlp", "txt_mlp") for name in ("net.0.proj", "net.2")
)
EVERY_LINEAR = (*TARGETS, "img_mod.1", "txt_mod.1", "linear", "linear_1", "linear_2", "img_in", "txt_in", "proj_out")


def build(fields: dict, folder):
    reference = diffusers.QwenImageTransformer2DModel(**fields)
    randomise(reference)
    reference.save_pretrained(folder)
    return reference.eval()


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return build(VARIANTS[request.param], folder), folder


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    return build(VARIANTS["edit_2511"], folder), folder


def forward(model, x, timestep, context, mask, sources, padding=0):
    sources = packed(sources, model.config.patch_size, padding)
    return nnx.jit(lambda model, *given: model(*given[:-1], sources=given[-1]))(
        model, x, timestep, context, mask, sources
    )


def inputs(config, sources: int = 2, batch: int = 3, tokens: int = 7):
    """x, timestep, context, mask (lengths from 2 to all) and source images, as our model takes them."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    channels = config.latent_channels
    mask = (np.arange(tokens) < np.linspace(2, tokens, batch).astype(int)[:, None]).astype(np.int32)
    return (
        normal(batch, *TARGET, channels),
        rng.uniform(0, 1000, batch).astype(np.float32),
        normal(batch, tokens, config.joint_attention_dim),
        mask,
        tuple(normal(batch, *size, channels) for size in SOURCES[:sources]),
    )


def pack(latents, p: int):
    """As diffusers' pipelines do it: [B, C, h, w] -> [B, S, C * p * p]."""
    B, C, h, w = latents.shape
    return latents.view(B, C, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, h // p * (w // p), -1)


def torch_forward(reference, x, timestep, context, mask, sources):
    p = reference.config.patch_size
    images = [torch.from_numpy(np.moveaxis(image, -1, 1).copy()) for image in (x, *sources)]
    B, _, h, w = images[0].shape
    out = reference(
        hidden_states=torch.cat([pack(image, p) for image in images], dim=1),
        timestep=torch.from_numpy(timestep) / 1000,
        encoder_hidden_states=torch.from_numpy(context),
        encoder_hidden_states_mask=None if mask is None else torch.from_numpy(mask),
        img_shapes=[[(1, image.shape[2] // p, image.shape[3] // p) for image in images]] * B,
        return_dict=False,
    )[0][:, : h // p * (w // p)]
    return out.view(B, h // p, w // p, -1, p, p).permute(0, 1, 4, 2, 5, 3).reshape(B, h, w, -1)


@pytest.mark.parametrize("sources", [0, 1, 2])
def test_velocity_equals_diffusers(pair, sources):
    reference, folder = pair
    model = from_pretrained(folder)
    given = inputs(model.config, sources)
    with torch.no_grad():
        expected = torch_forward(reference, *given)
    assert relative_error(forward(model, *given), expected) < 1e-5


def test_texts_of_full_length_need_no_mask(edit):
    reference, folder = edit
    model = from_pretrained(folder)
    x, timestep, context, mask, sources = inputs(model.config, 1)
    with torch.no_grad():
        expected = torch_forward(reference, x, timestep, context, None, sources)
    assert relative_error(forward(model, x, timestep, context, None, sources), expected) < 1e-5
    assert relative_error(forward(model, x, timestep, context, mask, sources), expected) > 1e-2, "the mask must matter"


def test_what_stands_behind_a_text_changes_nothing(edit):
    _, folder = edit
    model = from_pretrained(folder)
    x, timestep, context, mask, sources = inputs(model.config)
    noisy = np.where(mask[..., None] == 1, context, 17.0).astype(np.float32)
    expected = forward(model, x, timestep, context, mask, sources)
    np.testing.assert_array_equal(forward(model, x, timestep, noisy, mask, sources), expected)
    shorter = forward(model, x[:1], timestep[:1], context[:1, :2], None, tuple(s[:1] for s in sources))
    assert relative_error(shorter, expected[:1]) < 1e-5


def test_samples_with_unlike_sources_share_a_batch(edit):
    """Each as it is drawn alone: one with two sources, one with another single one, padded to one length."""
    _, folder = edit
    model = from_pretrained(folder)
    x, timestep, context, mask, (first, second) = inputs(model.config, batch=2)
    pair, single = packed((first, second), padding=3), packed((second[:, :2],), padding=25)
    both = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), pair, single)
    velocity = nnx.jit(lambda model, *given: model(*given[:-1], sources=given[-1]))
    got = velocity(model, x, timestep, context, mask, both)
    for row, alone in ((0, (first, second)), (1, (second[:, :2],))):
        given = (x, timestep, context, mask, alone)
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], given)
        assert relative_error(got[row : row + 1], forward(model, *one)) < 1e-5


@pytest.mark.parametrize("grids", [[(5, 3)], [(4, 4), (3, 7), (9, 2)]])
def test_rotary_angles_equal_diffusers(grids):
    rope = diffusers.models.transformers.transformer_qwenimage.QwenEmbedRope(10_000, [4, 6, 8], scale_rope=True)
    image, text = rope([[(1, *grid) for grid in grids]], max_txt_seq_len=11)
    expected = torch.cat([image, text])
    latents = [np.zeros((1, *grid, 4), np.float32) for grid in grids[1:]]
    angles = rotary_angles(token_places(grids[0], packed(latents, 1), 11), (4, 6, 8))[0]
    np.testing.assert_allclose(np.cos(angles), expected.real, atol=1e-6)
    np.testing.assert_allclose(np.sin(angles), expected.imag, atol=1e-6)


def test_source_images_take_the_modulation_of_timestep_zero(edit, tmp_path):
    """Only where the config says so; without source images the switch changes nothing."""
    _, folder = edit
    save_pretrained(from_pretrained(folder), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"zero_cond_t": true', '"zero_cond_t": false'))
    with_it, without = from_pretrained(folder), from_pretrained(tmp_path)
    for sources, differs in ((1, True), (0, False)):
        given = inputs(with_it.config, sources)
        assert (relative_error(forward(without, *given), forward(with_it, *given)) > 1e-2) == differs


def test_saving_returns_the_same_files(pair, tmp_path):
    reference, folder = pair
    save_pretrained(from_pretrained(folder), tmp_path)
    assert_same_files(folder, tmp_path)
    reopened = diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path)
    fields = {name: value for name, value in reference.config.items() if not name.startswith("_")}
    assert {name: reopened.config[name] for name in fields} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }


def lora_pair(reference, folder, targets, rank: int = 3, alpha: float = 7.0):
    """The reference with a random PEFT adapter, our model, and our tree of the same adapter (scale folded in)."""
    adapted = peft.get_peft_model(reference, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model = from_pretrained(folder)
    config = lora.LoraConfig(rank=rank, alpha=alpha, targets=targets)
    tree = lora.init_lora(jax.random.key(0), nnx.state(model), config)
    state = dict(adapted.named_parameters())

    def read(path, leaf, get):
        *module, side = [key.key for key in path]
        suffix = f"lora_{side.upper()}.default.weight"
        if module[0] != "blocks":
            return get(state[f"base_model.model.{'.'.join(module)}.{suffix}"])
        stem = "base_model.model.transformer_blocks"
        layers = [f"{stem}.{layer}.{'.'.join(module[1:])}.{suffix}" for layer in range(leaf.shape[0])]
        return np.stack([get(state[layer]) for layer in layers])

    def tree_of(get):
        return jax.tree_util.tree_map_with_path(lambda path, leaf: read(path, leaf, get), tree)

    return adapted, model, tree_of, config


def test_lora_and_its_gradient_equal_peft(tmp_path):
    reference = build(VARIANTS["edit_2511"], tmp_path)
    adapted, model, tree_of, config = lora_pair(reference, tmp_path, EVERY_LINEAR)
    tree = tree_of(lambda parameter: parameter.detach().numpy().T.copy())
    given = inputs(model.config)
    expected = torch_forward(adapted, *given)
    target = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    (expected - torch.from_numpy(target)).square().mean().backward()
    graphdef, params = nnx.split(model)

    def loss(tree):
        # Recomputing every layer in the backward pass must not change a number either.
        adapters = lora.scaled(tree, config.scale)
        velocity = nnx.merge(graphdef, params)(*given[:-1], sources=packed(given[-1]), lora=adapters, remat="full")
        return jnp.square(velocity - target).mean(), velocity

    grads, velocity = jax.jit(jax.grad(loss, has_aux=True))(tree)
    assert relative_error(velocity, expected) < 1e-5
    # The last block's text feeds nothing: no gradient there, and zeros here.
    gradients = tree_of(
        lambda parameter: (0 * parameter if parameter.grad is None else parameter.grad).detach().numpy().T
    )
    for got, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(got - reference) <= 1e-4 * np.linalg.norm(reference)
    assert np.linalg.norm(velocity - forward(model, *given)) > 0.1 * np.linalg.norm(velocity)


def test_eight_devices_equal_one(edit):
    _, folder = edit
    model = from_pretrained(folder)
    given = inputs(model.config, batch=4)
    expected = forward(model, *given)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        graphdef, params = nnx.split(from_pretrained(folder, mesh=mesh))
        placed = shardings(params, model.sharding_rules, mesh)
        assert jax.tree.map(lambda leaf: leaf.sharding, params) == placed
        assert "tensor" in str(params["blocks"]["attn"]["to_q"]["kernel"].get_value().sharding.spec)
        tree = lora.init_lora(jax.random.key(0), params, lora.LoraConfig(rank=2, targets=TARGETS))
        tree = jax.device_put(tree, lora.lora_shardings(tree, model.sharding_rules, mesh))
        got = jax.jit(
            lambda params, given, tree: nnx.merge(graphdef, params)(*given[:-1], sources=given[-1], lora=tree)
        )(params, shard_batch((*given[:-1], packed(given[-1])), mesh), tree)
        assert got.sharding.spec[0] == ("data", "fsdp")
    assert relative_error(got, expected) < 1e-5


def test_bfloat16_weights_follow_float32(edit):
    _, folder = edit
    model = from_pretrained(folder)
    given = inputs(model.config)
    got = forward(from_pretrained(folder, dtype="bfloat16"), *given)
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, forward(model, *given)) < 0.05
