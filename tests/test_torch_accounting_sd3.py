"""Every tensor of the published SD3 transformers, by name and shape: ours are exactly PyTorch's."""

import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from firm_jax.interop.mapping import SAME_NAMES, tensors  # noqa: E402
from firm_jax.models import abstract  # noqa: E402
from firm_jax.models.sd3 import SD3Config, SD3Transformer  # noqa: E402

# transformer/config.json of the published pipelines
SD3_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
SD35_MEDIUM = SD3_MEDIUM | {
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
SD35_LARGE = SD3_MEDIUM | {
    "caption_projection_dim": 2432,
    "dual_attention_layers": [],
    "num_attention_heads": 38,
    "num_layers": 38,
    "qk_norm": "rms_norm",
}
PUBLISHED = {"sd3_medium": SD3_MEDIUM, "sd35_medium": SD35_MEDIUM, "sd35_large": SD35_LARGE}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_has_its_place(name):
    raw = PUBLISHED[name]
    with torch.device("meta"):
        reference = diffusers.SD3Transformer2DModel.from_config(raw)
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    config = SD3Config.from_hf(raw)
    state = nnx.state(abstract(SD3Transformer, config))
    ours = list(tensors(state, (*SD3Transformer.weight_rules(config), *SAME_NAMES)))
    assert {tensor.name: tensor.shape for tensor in ours} == expected
    assert len(ours) == len(expected)
