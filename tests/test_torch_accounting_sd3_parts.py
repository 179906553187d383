"""Every tensor of the autoencoder and text encoders of the published SD3 pipelines: ours are exactly PyTorch's."""

import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from firm_jax.interop.mapping import SAME_NAMES, tensors  # noqa: E402
from firm_jax.models import abstract, network_class  # noqa: E402

# The config.json of each component folder, the same in SD3 and SD3.5
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.29.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
CLIP_L = {
    "architectures": ["CLIPTextModelWithProjection"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "vocab_size": 49408,
}
CLIP_BIGG = CLIP_L | {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": 32128,
}


def clip(raw: dict):
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**raw))


PUBLISHED = {  # name -> (config.json, how PyTorch builds it, parameters)
    "vae": (VAE, diffusers.AutoencoderKL.from_config, 83_819_683),
    "clip_l": (CLIP_L, clip, 123_650_304),
    "clip_bigg": (CLIP_BIGG, clip, 694_659_840),
    "t5_xxl": (T5_XXL, lambda raw: transformers.T5EncoderModel(transformers.T5Config(**raw)), 4_762_310_656),
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
