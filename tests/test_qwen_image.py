"""What the Qwen-Image transformer refuses, and its fixed properties; its numbers are in test_torch_qwen_image.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qwen_image_sources import packed

from firm_jax.errors import ConfigError
from firm_jax.models import abstract
from firm_jax.models.qwen_image import QwenImageConfig, QwenImageTransformer

TINY = {
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "axes_dims_rope": [2, 4, 6],
    "in_channels": 16,
    "out_channels": 4,
    "joint_attention_dim": 10,
    "num_layers": 2,
}


def test_config_round_trip_keeps_every_field():
    raw = TINY | {"zero_cond_t": True, "guidance_embeds": False, "use_layer3d_rope": False}
    config = QwenImageConfig.from_hf(raw | {"pooled_projection_dim": 768})
    assert raw.items() <= config.to_hf().items()
    assert QwenImageConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "change, named",
    [
        ({"guidance_embeds": True}, "guidance_embeds=True"),
        ({"use_layer3d_rope": True}, "use_layer3d_rope=True"),
        ({"use_additional_t_cond": True}, "use_additional_t_cond=True"),
        ({"causal_condition": True}, "causal_condition"),
        ({"out_channels": 3}, "in_channels=16.*12"),
        ({"out_channels": None}, "in_channels=16.*64"),
        ({"axes_dims_rope": [2, 4, 4]}, "axes_dims_rope=.2, 4, 4..*attention_head_dim=12"),
        ({"axes_dims_rope": [3, 3, 6]}, "axes_dims_rope=.3, 3, 6."),
        ({"axes_dims_rope": [6, 6]}, "axes_dims_rope=.6, 6."),
    ],
)
def test_configs_that_cannot_be_built_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        QwenImageConfig.from_hf(TINY | change)


@pytest.mark.parametrize("h, w", [(7, 8), (8, 0)])
def test_latents_between_patches_are_refused(h, w):
    config = QwenImageConfig.from_hf(TINY)
    with pytest.raises(ConfigError, match=rf"{h} x {w}.*patch_size=2"):
        nnx.eval_shape(
            lambda model: model(jnp.zeros((1, h, w, 4)), jnp.zeros(1), jnp.zeros((1, 5, 10))),
            abstract(QwenImageTransformer, config),
        )


def test_a_fresh_transformer_predicts_zero():
    @jax.jit
    def velocity():
        model = QwenImageTransformer(QwenImageConfig.from_hf(TINY), rngs=nnx.Rngs(0))
        return model(jnp.ones((2, 4, 8, 4)), jnp.ones(2), jnp.ones((2, 5, 10)), sources=sources)

    sources = packed([np.ones((2, 6, 2, 4), np.float32)])

    assert velocity().shape == (2, 4, 8, 4)
    assert not velocity().any()
