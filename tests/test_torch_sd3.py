"""SD3Transformer against diffusers and PEFT, through files that PyTorch writes and reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from torch_parity import assert_same_files, randomise, relative_error  # noqa: E402

from firm_jax.mesh import make_mesh, shard_batch  # noqa: E402
from firm_jax.models import from_pretrained, lora, save_pretrained  # noqa: E402
from firm_jax.models.sd3 import position_table  # noqa: E402
from firm_jax.sharding import shardings  # noqa: E402

SD3_MEDIUM = dict(
    sample_size=14,
    in_channels=5,
    out_channels=3,
    num_layers=3,
    attention_head_dim=12,
    num_attention_heads=2,
    joint_attention_dim=22,
    caption_projection_dim=24,
    pooled_projection_dim=18,
    pos_embed_max_size=9,
)
VARIANTS = {
    "sd3_medium": SD3_MEDIUM,
    "sd35_medium": SD3_MEDIUM | dict(num_layers=4, dual_attention_layers=(0, 1), qk_norm="rms_norm", out_channels=None),
    "sd35_large": SD3_MEDIUM | dict(num_layers=4, qk_norm="rms_norm", patch_size=1, pos_embed_max_size=11),
    "dual_everywhere": SD3_MEDIUM | dict(num_layers=2, dual_attention_layers=(0, 1)),
    "one_layer": SD3_MEDIUM | dict(num_layers=1),
}
# What SD3.5's recipe adapts (all but the last block has to_add_out).
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS = tuple(f"attn.{name}" for name in TARGETS)
EVERY_LINEAR = (*TARGETS, "net.0.proj", "net.2", "linear", "linear_1", "linear_2", "context_embedder", "proj_out")


def build(fields: dict, folder):
    reference = diffusers.SD3Transformer2DModel(**fields)
    randomise(reference)
    reference.save_pretrained(folder)
    return reference.eval()


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return build(VARIANTS[request.param], folder), folder


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    folder = tmp_path_factory.mktemp("medium")
    return build(VARIANTS["sd35_medium"], folder), folder


@nnx.jit
def forward(model, *given):
    return model(*given)


def inputs(config, batch: int = 3, h: int = 10, w: int = 6, tokens: int = 7):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return (
        normal(batch, h, w, config.in_channels),
        rng.uniform(0, 1000, batch).astype(np.float32),
        normal(batch, tokens, config.joint_attention_dim),
        normal(batch, config.pooled_projection_dim),
    )


def torch_forward(reference, x, timestep, context, pooled):
    x, timestep, context, pooled = (
        torch.from_numpy(a) for a in (np.moveaxis(x, -1, 1).copy(), timestep, context, pooled)
    )
    out = reference(
        hidden_states=x, timestep=timestep, encoder_hidden_states=context, pooled_projections=pooled, return_dict=False
    )[0]
    return out.movedim(1, -1)


def test_velocity_equals_diffusers(pair):
    reference, folder = pair
    model = from_pretrained(folder)
    given = inputs(model.config)
    with torch.no_grad():
        expected = torch_forward(reference, *given)
    assert relative_error(forward(model, *given), expected) < 1e-5


def test_saving_returns_the_same_files(pair, tmp_path):
    reference, folder = pair
    save_pretrained(from_pretrained(folder), tmp_path)
    assert_same_files(folder, tmp_path)
    reopened = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path)
    fields = {name: value for name, value in reference.config.items() if not name.startswith("_")}
    assert {name: reopened.config[name] for name in fields} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }


def test_the_position_table_is_that_of_the_checkpoints():
    reference = diffusers.SD3Transformer2DModel(**SD3_MEDIUM)
    table = position_table(9, 7, 24)
    assert relative_error(table[None], reference.pos_embed.pos_embed) < 1e-6


def lora_pair(reference, folder, targets, rank: int = 3, alpha: float = 7.0):
    """The reference with a random PEFT adapter, our model, and our tree of the same adapter (scale folded in)."""
    adapted = peft.get_peft_model(reference, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    model = from_pretrained(folder)
    config = lora.LoraConfig(rank=rank, alpha=alpha, targets=targets)
    tree = lora.init_lora(jax.random.key(0), nnx.state(model), config)
    state = dict(adapted.named_parameters())
    dual = model.config.dual_layers

    def matrix(module: str, layer: int, side: str):
        name = f"base_model.model.transformer_blocks.{layer}.{module}.lora_{side.upper()}.default.weight"
        return state[name]

    def read(path, leaf, get):
        stack, *module, side = [key.key for key in path]
        if "block" not in stack:
            name = ".".join([stack, *module])
            return get(state[f"base_model.model.{name}.lora_{side.upper()}.default.weight"])
        first = {"dual_blocks": 0, "blocks": dual, "last_block": model.config.num_layers - 1}[stack]
        if stack == "last_block":
            return get(matrix(".".join(module), first, side))
        return np.stack([get(matrix(".".join(module), first + layer, side)) for layer in range(leaf.shape[0])])

    def tree_of(get):
        return jax.tree_util.tree_map_with_path(lambda path, leaf: read(path, leaf, get), tree)

    return adapted, model, tree_of, config


def test_lora_and_its_gradient_equal_peft(medium):
    adapted, model, tree_of, config = lora_pair(*medium, EVERY_LINEAR)
    tree = tree_of(lambda parameter: parameter.detach().numpy().T.copy())
    given = inputs(model.config)
    expected = torch_forward(adapted, *given)
    target = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    (expected - torch.from_numpy(target)).square().mean().backward()
    graphdef, params = nnx.split(model)

    def loss(tree):
        # Recomputing every layer in the backward pass must not change a number either.
        velocity = nnx.merge(graphdef, params)(*given, lora=lora.scaled(tree, config.scale), remat="full")
        return jnp.square(velocity - target).mean(), velocity

    grads, velocity = jax.jit(jax.grad(loss, has_aux=True))(tree)
    assert relative_error(velocity, expected) < 1e-5
    for got, reference in zip(
        jax.tree.leaves(grads), jax.tree.leaves(tree_of(lambda parameter: parameter.grad.numpy().T)), strict=True
    ):
        # Not a quotient: the last block's text queries feed nothing, and their gradients are zero on both sides.
        assert np.linalg.norm(got - reference) <= 1e-4 * np.linalg.norm(reference)
    assert np.linalg.norm(velocity - forward(model, *given)) > 0.1 * np.linalg.norm(velocity)


def test_eight_devices_equal_one(medium):
    _, folder = medium
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
        got = jax.jit(lambda params, args, tree: nnx.merge(graphdef, params)(*args, lora=tree))(
            params, shard_batch(given, mesh), tree
        )
        assert got.sharding.spec[0] == ("data", "fsdp")
    assert relative_error(got, expected) < 1e-5


def test_bfloat16_weights_follow_float32(medium):
    _, folder = medium
    model = from_pretrained(folder)
    given = inputs(model.config)
    got = forward(from_pretrained(folder, dtype="bfloat16"), *given)
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, forward(model, *given)) < 0.05
