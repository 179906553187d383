"""Every tensor of the published Qwen-Image transformers, by name and shape: ours are exactly PyTorch's.

The configs are those of transformer/config.json in the Hugging Face repositories.
"""

import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from firm_jax.interop.mapping import SAME_NAMES, tensors  # noqa: E402
from firm_jax.models import abstract  # noqa: E402
from firm_jax.models.qwen_image import QwenImageConfig, QwenImageTransformer  # noqa: E402
from firm_jax.published import QWEN_IMAGE  # noqa: E402

PARAMETERS = 20_430_401_088  # of each; 40.86 GB in bfloat16, the size of the published files


@pytest.mark.parametrize("name", QWEN_IMAGE)
def test_every_tensor_has_its_place(name):
    raw = QWEN_IMAGE[name]["transformer"]
    with torch.device("meta"):
        reference = diffusers.QwenImageTransformer2DModel.from_config(raw)
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    config = QwenImageConfig.from_hf(raw)
    state = nnx.state(abstract(QwenImageTransformer, config))
    ours = list(tensors(state, (*QwenImageTransformer.weight_rules(config), *SAME_NAMES)))
    assert {tensor.name: tensor.shape for tensor in ours} == expected
    assert len(ours) == len(expected)
    assert sum(leaf.size for leaf in nnx.to_flat_state(state).leaves) == PARAMETERS
    assert reference.config.zero_cond_t == config.zero_cond_t == ("2511" in name)
