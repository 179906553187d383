"""A tiny random SD3 pipeline with real tokenizers, for the tests of everything that draws images."""

import jax
import numpy as np
from flax import nnx

from firm_jax.generation.sd3 import SD3Generator
from firm_jax.generation.text import TextEncoders
from firm_jax.models import abstract
from firm_jax.models.clip import CLIPTextConfig, CLIPTextModel
from firm_jax.models.sd3 import SD3Config, SD3Transformer
from firm_jax.models.t5 import T5Config, T5Encoder
from firm_jax.models.vae_kl import AutoencoderKL, AutoencoderKLConfig
from firm_jax.shapes.tokenizers import clip_tokenizer, t5_tokenizer
from firm_jax.sharding import path_name

CLIP_TOKENS = 9
LORA_TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.to_add_out")


def random_network(network: type[nnx.Module], config, seed: int) -> nnx.Module:
    """The network with random weights that leave no norm, bias or zero initialisation trivial."""
    graphdef, state = nnx.split(abstract(network, config))
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = path_name(path)
        if name.endswith(".kernel"):
            return jax.numpy.asarray(noise / np.sqrt(np.prod(leaf.shape[-4:-1] if leaf.ndim == 4 else leaf.shape[-2])))
        return jax.numpy.asarray(0.3 * noise + name.endswith(".scale"))

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(one, state))


def tiny_generator(*, t5: bool = True, seed: int = 0, **transformer) -> SD3Generator:
    """A pipeline of four latent channels, 2 pixels a latent and 2 latents a patch: sizes are multiples of 4 pixels."""
    tokenizers = {name: clip_tokenizer(CLIP_TOKENS) for name in ("text_encoder", "text_encoder_2")}
    tokens = tokenizers["text_encoder"]
    common = {"vocab_size": len(tokens), "eos_token_id": tokens.eos_token_id, "max_position_embeddings": CLIP_TOKENS}
    encoders = {
        "text_encoder": CLIPTextConfig(12, 20, 2, 2, 10, **common),
        "text_encoder_2": CLIPTextConfig(15, 18, 3, 3, 8, hidden_act="gelu", **common),
    }
    networks = {name: random_network(CLIPTextModel, config, seed + 1) for name, config in encoders.items()}
    if t5:
        tokenizers["text_encoder_3"] = t5_tokenizer(512)
        config = T5Config(len(tokenizers["text_encoder_3"]), 32, 6, 40, 2, 3)
        networks["text_encoder_3"] = random_network(T5Encoder, config, seed + 2)
    fields = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 24,
        "pooled_projection_dim": 18,
        "pos_embed_max_size": 10,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    vae = AutoencoderKLConfig(
        block_out_channels=(8, 12),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.5,
        shift_factor=0.06,
    )
    return SD3Generator(
        random_network(SD3Transformer, SD3Config(**fields | transformer), seed + 3),
        random_network(AutoencoderKL, vae, seed + 4),
        TextEncoders(tokenizers, networks, width=32),
        {"num_train_timesteps": 1000, "shift": 3.0},
    )
