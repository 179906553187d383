"""Every tensor of the autoencoder and text encoder of the published Qwen-Image pipelines: ours are exactly PyTorch's.

The configs are those of the component folders in the Hugging Face repositories, the same in all of the pipelines.
"""

import copy

import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from firm_jax.interop.mapping import SAME_NAMES, tensors  # noqa: E402
from firm_jax.models import abstract, network_class  # noqa: E402
from firm_jax.published import QWEN_IMAGE  # noqa: E402

PARTS = QWEN_IMAGE["Qwen/Qwen-Image-Edit-2509"]


def qwen2_5_vl(raw: dict):
    config = transformers.Qwen2_5_VLConfig.from_dict(copy.deepcopy(dict(raw)))
    return transformers.Qwen2_5_VLForConditionalGeneration._from_config(config)


PUBLISHED = {  # name -> (config.json, how PyTorch builds it, parameters)
    "vae": (PARTS["vae"], diffusers.AutoencoderKLQwenImage.from_config, 126_892_531),
    "text_encoder": (PARTS["text_encoder"], qwen2_5_vl, 8_292_166_656),
}


def stored_name(name: str) -> str:
    """As transformers writes it: its files keep the names from before the two towers stood side by side."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_has_its_place(name):
    raw, build, parameters = PUBLISHED[name]
    with torch.device("meta"):
        reference = build(raw)
    expected = {stored_name(name): tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    network = network_class(raw.get("_class_name") or raw["architectures"][0])
    config = network.config_class.from_hf(raw)
    state = nnx.state(abstract(network, config))
    ours = list(tensors(state, (*network.weight_rules(config), *SAME_NAMES)))
    assert {tensor.name: tensor.shape for tensor in ours} == expected
    assert len(ours) == len(expected)
    assert sum(leaf.size for leaf in nnx.to_flat_state(state).leaves) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_config_builds_the_same_network_in_pytorch(name):
    raw, build, _ = PUBLISHED[name]
    network = network_class(raw.get("_class_name") or raw["architectures"][0])
    config = network.config_class.from_hf(raw)
    assert network.config_class.from_hf(config.to_hf()) == config
    with torch.device("meta"):
        theirs, again = build(raw), build(config.to_hf())
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (theirs, again)]
    assert shapes[0] == shapes[1]
