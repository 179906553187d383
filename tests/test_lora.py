"""LoRA trees: which layers they adapt, how they begin, where their strength goes, how they lie on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from firm_jax.errors import ConfigError
from firm_jax.mesh import make_mesh
from firm_jax.models.layers import Linear
from firm_jax.models.lora import LoraConfig, child, init_lora, lora_shardings, scaled, target_kernels, zeros_like


def kernel(*shape):
    return {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16), "bias": jax.ShapeDtypeStruct(shape[:1], jnp.bfloat16)}


PARAMS = {
    "blocks": {
        "attn": {"to_q": kernel(3, 8, 12), "to_out": {"0": kernel(3, 12, 8)}},
        "attn2": {"to_q": kernel(3, 8, 12)},
        "ff": {"not_to_q": kernel(3, 8, 8)},
    },
    "last_block": {"attn": {"to_q": kernel(8, 12)}},
}
RULES = ((r"to_q\.kernel$", P("fsdp", "tensor")), (r"to_out\.0\.kernel$", P("tensor", "fsdp")))


def test_a_target_is_the_end_of_a_module_path():
    def adapted(*targets):
        return sorted(target_kernels(PARAMS, targets))

    assert adapted("attn.to_q") == ["blocks.attn.to_q", "last_block.attn.to_q"]
    assert adapted("to_q") == ["blocks.attn.to_q", "blocks.attn2.to_q", "last_block.attn.to_q"]
    assert adapted("attn.to_out.0") == ["blocks.attn.to_out.0"]


def test_the_convolution_of_the_patches_is_no_linear_layer():
    params = PARAMS | {"pos_embed": {"proj": kernel(4, 8)}, "ff": {"proj": kernel(8, 8)}}
    assert sorted(target_kernels(params, ("proj",))) == ["ff.proj"]
    with pytest.raises(ConfigError, match=r"\['pos_embed.proj'\].*lora.targets"):
        target_kernels(params, ("ff.proj", "pos_embed.proj"))


@pytest.mark.parametrize("targets, named", [(("attn.to_q", "attn.to_k"), r"\['attn.to_k'\]"), ((), "empty")])
def test_a_target_without_a_layer_is_refused(targets, named):
    with pytest.raises(ConfigError, match=f"{named}.*lora.targets"):
        target_kernels(PARAMS, targets)


def test_a_lora_begins_as_peft_s_gaussian():
    config = LoraConfig(rank=4, targets=("attn.to_q", "attn.to_out.0"))
    tree = init_lora(
        jax.random.key(0), {"blocks": {"attn": {"to_q": kernel(3, 400, 12)}}}, LoraConfig(4, 8.0, ("to_q",))
    )
    a = tree["blocks"]["attn"]["to_q"]["a"]
    assert a.shape == (3, 400, 4) and a.dtype == jnp.float32
    np.testing.assert_allclose(a.std(), 1 / 4, rtol=0.03)
    assert np.abs(a[0] - a[1]).max() > 0.1
    tree = init_lora(jax.random.key(0), PARAMS, config)
    assert tree["blocks"]["attn"]["to_out"]["0"]["b"].shape == (3, 4, 8)
    assert tree["last_block"]["attn"]["to_q"]["a"].shape == (8, 4)
    assert not any(
        np.any(np.asarray(leaf["b"])) for leaf in (tree["blocks"]["attn"]["to_q"], tree["last_block"]["attn"]["to_q"])
    )


def test_the_strength_is_folded_into_b_alone():
    config = LoraConfig(rank=4, alpha=6.0)
    tree = {"layer": {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 3))}}
    folded = scaled(tree, config.scale)
    np.testing.assert_array_equal(folded["layer"]["a"], 1.0)
    np.testing.assert_array_equal(folded["layer"]["b"], 1.5)


def test_an_adapted_layer_adds_x_a_b():
    layer = Linear(5, 3, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 4, 5), (5, 2), (2, 3)))
    lora = scaled({"layer": {"a": a, "b": b}}, 1.5)["layer"]
    np.testing.assert_allclose(layer(x, lora=lora), layer(x) + 1.5 * (x @ a @ b), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layer(x, lora=zeros_like(lora)), layer(x))


def test_a_child_that_is_not_there_is_none():
    tree = {"attn": {"to_q": {"a": 1}}}
    assert child(tree, "attn", "to_q") == {"a": 1}
    assert child(tree, "attn", "to_k") is None and child(tree, "ff", "net") is None and child(None, "attn") is None


def test_a_lies_as_the_kernel_s_input_and_b_as_its_output():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    tree = init_lora(jax.random.key(0), PARAMS, LoraConfig(rank=3, targets=("attn.to_q", "attn.to_out.0")))
    found = jax.tree.map(lambda sharding: sharding.spec, lora_shardings(tree, RULES, mesh))
    assert found["blocks"]["attn"]["to_q"] == {"a": P(None, "fsdp", None), "b": P(None, None, "tensor")}
    assert found["blocks"]["attn"]["to_out"]["0"] == {"a": P(None, "tensor", None), "b": P(None, None, "fsdp")}
    assert found["last_block"]["attn"]["to_q"] == {"a": P("fsdp", None), "b": P(None, "tensor")}
    jax.device_put(tree, lora_shardings(tree, RULES, mesh))
