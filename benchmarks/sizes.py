"""The three sizes in which every question is asked.

`tiny` is the embedded shapes world. `small` has about 50 million parameters, for CPUs. `full` has the shapes of the
published networks with random weights, for accelerators. Nothing is downloaded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
from flax import nnx

from benchmarks.weights import class_name, write_network
from firm_jax import models
from firm_jax.embedded import embedded_path
from firm_jax.generation.generator import pipeline_class, read_model_index
from firm_jax.published import PIPELINES, QWEN3_VL

ATTENTION = tuple(
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)


@dataclass(frozen=True)
class Diffusion:
    """A pipeline with a LoRA, and how much of its work one run is.

    model: an `embedded:` name, or by part the content of each JSON file. stored: dtype of the weights' files. images:
    that one run draws, or learns from. text_tokens: of a prompt in the transformer. steps: of the rollout. timesteps:
    at which an image is learned from. remat: how much of the forward pass the update computes again, on both sides.
    """

    model: str | Mapping[str, Mapping]
    stored: str
    height: int
    width: int
    text_tokens: int
    images: int
    steps: int
    timesteps: int
    rank: int
    remat: str = "none"

    def pipeline(
        self, folder: Path, parts: tuple[str, ...] = ("transformer", "vae")
    ) -> tuple[Mapping[str, Mapping], Path]:
        """The pipeline's JSON files by part, and a folder with `parts` of it, written below `folder`."""
        if isinstance(self.model, str):
            embedded = embedded_path(self.model)
            index = read_model_index(embedded)
            return pipeline_class(index).read_configs(embedded) | {"model_index": index}, embedded
        for part in parts:
            if not (folder / part).exists():
                write_network(self.model[part], folder / part, "float32" if part == "vae" else self.stored)
        return self.model, folder


@dataclass(frozen=True)
class Critic:
    """A critic, and what it is asked: a picture of side x side pixels, then `text_tokens` of text.

    model: an `embedded:` name, or the content of config.json. tokens: of an answer. batches: of so many questions.
    remat: as above, of a step of its training.
    """

    model: str | Mapping
    stored: str
    side: int
    text_tokens: int
    tokens: int
    batches: tuple[int, ...] = (1, 8, 32)
    remat: str = "none"

    def described(self) -> dict:
        """Its numbers, for the result's file."""
        return {name: value for name, value in vars(self).items() if name != "model"}

    def folder(self, folder: Path) -> Path:
        """A folder with its weights, written below `folder`."""
        if isinstance(self.model, str):
            return embedded_path(self.model)
        if not (folder / "critic").exists():
            write_network(self.model, folder / "critic", self.stored)
        return folder / "critic"


_SD35 = PIPELINES["stabilityai/stable-diffusion-3.5-medium"]
_SMALL_SD3 = dict(_SD35) | {
    "transformer": dict(_SD35["transformer"])
    | {
        "caption_projection_dim": 384,
        "dual_attention_layers": [0, 1, 2, 3],
        "joint_attention_dim": 512,
        "num_attention_heads": 6,
        "num_layers": 8,
        "pooled_projection_dim": 256,
        "pos_embed_max_size": 64,
        "sample_size": 32,
    },
    "vae": dict(_SD35["vae"]) | {"block_out_channels": [32, 64, 128, 128], "force_upcast": False},
    "text_encoder": dict(_SD35["text_encoder"])
    | {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "projection_dim": 128},
    "text_encoder_2": dict(_SD35["text_encoder_2"])
    | {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "projection_dim": 128},
    "text_encoder_3": dict(_SD35["text_encoder_3"]) | {"d_model": 512, "d_ff": 1024, "num_heads": 8},
}

SD3 = {
    "tiny": Diffusion("embedded:sd3", "float32", 64, 64, 35, images=36, steps=10, timesteps=3, rank=16),
    "small": Diffusion(_SMALL_SD3, "float32", 256, 256, 141, images=4, steps=10, timesteps=2, rank=32),
    "full": Diffusion(_SD35, "bfloat16", 512, 512, 333, images=8, steps=10, timesteps=2, rank=32),
}

_EDIT = PIPELINES["Qwen/Qwen-Image-Edit-2509"]
_SMALL_EDIT = dict(_EDIT) | {
    "transformer": dict(_EDIT["transformer"])
    | {
        "attention_head_dim": 64,
        "axes_dims_rope": [8, 28, 28],
        "joint_attention_dim": 512,
        "num_attention_heads": 6,
        "num_layers": 9,
    },
    "vae": dict(_EDIT["vae"]) | {"base_dim": 32},
    "text_encoder": dict(_EDIT["text_encoder"])
    | {
        "text_config": dict(_EDIT["text_encoder"]["text_config"])
        | {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4},
        "vision_config": dict(_EDIT["text_encoder"]["vision_config"]) | {"out_hidden_size": 512},
    },
}

QWEN_EDIT = {
    "tiny": Diffusion("embedded:qwen_image_edit", "float32", 64, 64, 48, images=36, steps=6, timesteps=3, rank=16),
    "small": Diffusion(_SMALL_EDIT, "float32", 256, 256, 128, images=4, steps=6, timesteps=2, rank=32),
    "full": Diffusion(_EDIT, "bfloat16", 512, 512, 452, images=4, steps=6, timesteps=2, rank=32, remat="full"),
}

_SMALL_CRITIC = {
    **QWEN3_VL["2B"],
    "image_token_id": 16376,
    "video_token_id": 16377,
    "vision_start_token_id": 16378,
    "vision_end_token_id": 16379,
    "text_config": dict(QWEN3_VL["2B"]["text_config"])
    | {
        "head_dim": 64,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "num_attention_heads": 8,
        "num_hidden_layers": 10,
        "num_key_value_heads": 4,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"},
        "vocab_size": 16384,
    },
    "vision_config": dict(QWEN3_VL["2B"]["vision_config"])
    | {
        "deepstack_visual_indexes": [1, 3, 5],
        "depth": 6,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_heads": 6,
        "num_position_embeddings": 256,
        "out_hidden_size": 512,
    },
}

CRITIC = {
    "tiny": Critic("embedded:critic_gen", "float32", side=64, text_tokens=100, tokens=32),
    "small": Critic(_SMALL_CRITIC, "float32", side=256, text_tokens=128, tokens=64),
    "full": Critic(QWEN3_VL["8B"], "bfloat16", side=512, text_tokens=450, tokens=200),
}

SFT = {
    "tiny": Critic("embedded:critic_gen", "float32", side=64, text_tokens=120, tokens=60, batches=(16,)),
    "small": Critic(_SMALL_CRITIC, "float32", side=256, text_tokens=180, tokens=90, batches=(4,)),
    "full": Critic(QWEN3_VL["2B"], "float32", side=512, text_tokens=650, tokens=200, batches=(8,), remat="full"),
}


def parameters(raw: Mapping) -> int:
    """How many parameters the network of a config.json's content has."""
    network = models.network_class(class_name(raw))
    shapes = nnx.state(models.abstract(network, network.config_class.from_hf(raw)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
