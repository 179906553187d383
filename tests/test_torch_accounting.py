"""Every tensor of the published networks, by name and shape: ours are exactly PyTorch's, and nothing is allocated.

The configs are those of the component folders in the Hugging Face repositories. The numbers of parameters, positions
that are stored among them, hold the configs to the sizes that the networks are known by.
"""

import copy

import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from firm_jax.interop.mapping import SAME_NAMES, tensors  # noqa: E402
from firm_jax.models import abstract, network_class  # noqa: E402
from firm_jax.published import PIPELINES, QWEN3_VL  # noqa: E402

SD35 = PIPELINES["stabilityai/stable-diffusion-3.5-medium"]
EDIT = PIPELINES["Qwen/Qwen-Image-Edit-2509"]

PUBLISHED = {  # name -> (config.json, parameters)
    "sd3_medium": (PIPELINES["stabilityai/stable-diffusion-3-medium-diffusers"]["transformer"], 2_084_951_104),
    "sd35_medium": (SD35["transformer"], 2_469_663_936),
    "sd35_large": (PIPELINES["stabilityai/stable-diffusion-3.5-large"]["transformer"], 8_146_280_768),
    "sd3_vae": (SD35["vae"], 83_819_683),
    "clip_l": (SD35["text_encoder"], 123_650_304),
    "clip_bigg": (SD35["text_encoder_2"], 694_659_840),
    "t5_xxl": (SD35["text_encoder_3"], 4_762_310_656),
    **{
        name.split("/")[1]: (parts["transformer"], 20_430_401_088)
        for name, parts in PIPELINES.items()
        if name.startswith("Qwen/")
    },
    "qwen_image_vae": (EDIT["vae"], 126_892_531),
    "qwen2_5_vl_7b": (EDIT["text_encoder"], 8_292_166_656),
    "qwen3_vl_2b": (QWEN3_VL["2B"], 2_127_532_032),
    "qwen3_vl_4b": (QWEN3_VL["4B"], 4_437_815_808),
    "qwen3_vl_8b": (QWEN3_VL["8B"], 8_767_123_696),
    "qwen3_vl_32b": (QWEN3_VL["32B"], 33_357_390_064),
}


def in_pytorch(raw):
    with torch.device("meta"):
        if "_class_name" in raw:
            return getattr(diffusers, raw["_class_name"]).from_config(raw)
        kind = getattr(transformers, raw["architectures"][0])
        return kind._from_config(kind.config_class.from_dict(copy.deepcopy(dict(raw))))


def shapes(model) -> dict[str, tuple[int, ...]]:
    """As PyTorch's files have them: those of Qwen2.5-VL keep the names from before its towers stood side by side."""
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if isinstance(model, transformers.Qwen2_5_VLForConditionalGeneration):
        earlier = {"model.language_model.": "model.", "model.visual.": "visual."}
        for now, before in earlier.items():
            found = {name.replace(now, before): shape for name, shape in found.items()}
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_has_its_place(name):
    raw, parameters = PUBLISHED[name]
    expected = shapes(in_pytorch(raw))
    network = network_class(raw.get("_class_name") or raw["architectures"][0])
    config = network.config_class.from_hf(raw)
    for alias, own in (network.tied(config) if hasattr(network, "tied") else {}).items():
        assert expected.pop(alias) == expected[own]
    state = nnx.state(abstract(network, config))
    ours = list(tensors(state, (*network.weight_rules(config), *SAME_NAMES)))
    assert {tensor.name: tensor.shape for tensor in ours} == expected
    assert len(ours) == len(expected)
    assert sum(leaf.size for leaf in nnx.to_flat_state(state).leaves) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_config_builds_the_same_network_in_pytorch(name):
    raw, _ = PUBLISHED[name]
    network = network_class(raw.get("_class_name") or raw["architectures"][0])
    config = network.config_class.from_hf(raw)
    assert network.config_class.from_hf(config.to_hf()) == config
    theirs, again = in_pytorch(raw), in_pytorch(config.to_hf())
    assert shapes(theirs) == shapes(again)
    # What changes no tensor.
    if "2511" in name:
        assert again.config.zero_cond_t and config.zero_cond_t
    if "qwen3" in name:
        assert again.config.text_config.rope_parameters["rope_theta"] == raw["text_config"]["rope_theta"]
