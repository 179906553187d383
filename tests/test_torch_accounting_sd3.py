"""Every tensor of the published SD3 transformers, by name and shape: ours are exactly PyTorch's."""

import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from firm_jax.interop.mapping import SAME_NAMES, tensors  # noqa: E402
from firm_jax.models import abstract  # noqa: E402
from firm_jax.models.sd3 import SD3Config, SD3Transformer  # noqa: E402
from firm_jax.published import PIPELINES  # noqa: E402

PUBLISHED = {
    "sd3_medium": PIPELINES["stabilityai/stable-diffusion-3-medium-diffusers"]["transformer"],
    "sd35_medium": PIPELINES["stabilityai/stable-diffusion-3.5-medium"]["transformer"],
    "sd35_large": PIPELINES["stabilityai/stable-diffusion-3.5-large"]["transformer"],
}


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
