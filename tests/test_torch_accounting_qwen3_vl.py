"""Every released size of Qwen3-VL: our names and shapes against those of PyTorch's model, nothing allocated."""

import jax
import pytest
import transformers
from flax import nnx

from firm_jax.interop.load import account
from firm_jax.interop.mapping import SAME_NAMES, tensors
from firm_jax.models import abstract
from firm_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig

torch = pytest.importorskip("torch")

SMALL_VISION = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE_VISION = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}

# hidden, MLP, layers, query heads, tied, vision tower, parameters in millions as counted in PyTorch
SIZES = {
    "2B": (2048, 6144, 28, 16, True, SMALL_VISION, 2128),
    "4B": (2560, 9728, 36, 32, True, SMALL_VISION, 4438),
    "8B": (4096, 12288, 36, 32, False, LARGE_VISION, 8767),
    "32B": (5120, 25600, 64, 64, False, LARGE_VISION, 33357),
}


def released_config(size: str) -> dict:
    """config.json of a released size, in the form of those files (transformers 4)."""
    hidden, mlp, layers, heads, tied, vision, _ = SIZES[size]
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": mlp,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


def torch_shapes(raw: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes as PyTorch saves them: a tied head is not saved."""
    config = transformers.Qwen3VLConfig.from_dict(raw)
    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration._from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes(size):
    raw = released_config(size)
    config = Qwen3VLConfig.from_hf(raw)
    params = nnx.state(abstract(Qwen3VL, config), nnx.Param)
    needed = {t.name: t.shape for t in tensors(params, (*Qwen3VL.weight_rules(config), *SAME_NAMES))}
    present = torch_shapes(raw)
    account(needed, present, f"Qwen3-VL {size}")
    assert len(needed) == len(present)
    millions = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    assert round(millions) == SIZES[size][-1]
    assert transformers.Qwen3VLConfig.from_dict(config.to_hf()).text_config.rope_parameters["rope_theta"] == 5e6
