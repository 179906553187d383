"""What the SD3 transformer refuses, and its fixed properties; its numbers are compared in test_torch_sd3.py."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from firm_jax.errors import ConfigError
from firm_jax.models import abstract
from firm_jax.models.sd3 import SD3Config, SD3Transformer

TINY = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": 12,
    "num_layers": 3,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 6,
    "sample_size": 8,
}


def test_config_round_trip_keeps_every_field():
    raw = TINY | {"dual_attention_layers": [0, 1], "qk_norm": "rms_norm"}
    config = SD3Config.from_hf(raw)
    assert raw.items() <= config.to_hf().items()
    assert SD3Config.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "change, named",
    [
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        ({"dual_attention_layers": [1, 2]}, "dual_attention_layers=.1, 2."),
        ({"dual_attention_layers": [0, 1, 2, 3]}, "num_layers=3"),
        ({"caption_projection_dim": 20}, "caption_projection_dim=20"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size"),
        ({"force_zeros_for_pooled_projection": True}, "force_zeros_for_pooled_projection"),
    ],
)
def test_configs_that_cannot_be_built_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        SD3Config.from_hf(TINY | change)


@pytest.mark.parametrize("h, w", [(7, 8), (8, 7), (14, 8), (8, 14), (0, 8)])
def test_latents_beyond_the_table_or_between_patches_are_refused(h, w):
    config = SD3Config.from_hf(TINY)
    with pytest.raises(ConfigError, match=rf"{h} x {w}.*patch_size=2.*12"):
        nnx.eval_shape(
            lambda model: model(jnp.zeros((1, h, w, 4)), jnp.zeros(1), jnp.zeros((1, 5, 12)), jnp.zeros((1, 10))),
            abstract(SD3Transformer, config),
        )


def test_a_fresh_transformer_predicts_zero():
    @jax.jit
    def velocity():
        model = SD3Transformer(SD3Config.from_hf(TINY | {"num_layers": 1}), rngs=nnx.Rngs(0))
        return model(jnp.ones((2, 4, 8, 4)), jnp.ones(2), jnp.ones((2, 5, 12)), jnp.ones((2, 10)))

    assert velocity().shape == (2, 4, 8, 4)
    assert not velocity().any()


def test_the_tokens_before_the_last_block_depend_on_every_block_but_that():
    model = SD3Transformer(SD3Config.from_hf(TINY), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    inputs = jnp.ones((2, 4, 8, 4)), jnp.ones(2), jnp.ones((2, 5, 12)), jnp.ones((2, 10))

    @jax.jit
    @jax.grad
    def gradient(params):
        v, tokens = nnx.merge(graphdef, params)(*inputs, with_tokens=True)
        assert v.shape == (2, 4, 8, 4) and tokens.shape == (2, 8, 16)
        return jnp.square(tokens).sum()

    reached = {name: any(leaf.any() for leaf in jax.tree.leaves(grads)) for name, grads in gradient(params).items()}
    assert reached["blocks"] and reached["pos_embed"] and not reached["last_block"] and not reached["proj_out"]
