"""Every tensor of the autoencoder and text encoders of the published SD3 pipelines: ours are exactly PyTorch's."""

import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from firm_jax.interop.mapping import SAME_NAMES, tensors  # noqa: E402
from firm_jax.models import abstract, network_class  # noqa: E402
from firm_jax.published import PIPELINES  # noqa: E402

PARTS = PIPELINES["stabilityai/stable-diffusion-3.5-medium"]


def clip(raw: dict):
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**raw))


PUBLISHED = {  # name -> (config.json, how PyTorch builds it, parameters)
    "vae": (PARTS["vae"], diffusers.AutoencoderKL.from_config, 83_819_683),
    "clip_l": (PARTS["text_encoder"], clip, 123_650_304),
    "clip_bigg": (PARTS["text_encoder_2"], clip, 694_659_840),
    "t5_xxl": (
        PARTS["text_encoder_3"],
        lambda raw: transformers.T5EncoderModel(transformers.T5Config(**raw)),
        4_762_310_656,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_has_its_place(name):
    raw, build, parameters = PUBLISHED[name]
    with torch.device("meta"):
        reference = build(raw)
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    network = network_class(raw.get("_class_name") or raw["architectures"][0])
    config = network.config_class.from_hf(raw)
    for alias, name in (network.tied(config) if hasattr(network, "tied") else {}).items():
        assert expected.pop(alias) == expected[name]
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
