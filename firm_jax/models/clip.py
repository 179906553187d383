"""CLIP's text encoder with its projection (Radford et al. 2021, arXiv 2103.00020): CLIP-L and OpenCLIP bigG."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from firm_jax.errors import ConfigError
from firm_jax.interop.mapping import Rule
from firm_jax.models.attention import attention
from firm_jax.models.config import check_fields, require
from firm_jax.models.layers import Embedding, LayerNorm, Linear, activate, gelu, scan_layers, stack

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": gelu,
}
# Before eos_token_id was put right in the published configs it read 2, which is not the id that ends a text.
_LEGACY_EOS = 2


@dataclass(frozen=True)
class CLIPTextConfig:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    projection_dim: int
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"CLIPTextModel: hidden_act={self.hidden_act!r} is not supported; supported: {sorted(ACTIVATIONS)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"CLIPTextModel: hidden_size {self.hidden_size} does not divide by "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if not isinstance(self.eos_token_id, int):
            raise ConfigError(f"CLIPTextModel: eos_token_id must be one integer, not {self.eos_token_id!r}")

    @classmethod
    def from_hf(cls, raw: dict) -> "CLIPTextConfig":
        """From a transformers config.json; a field left out has transformers' default, the sizes must be there."""
        what = "CLIPTextModel"
        required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim")
        optional = ("vocab_size", "max_position_embeddings", "hidden_act", "layer_norm_eps", "eos_token_id")
        no_effect = ("attention_dropout", "dropout", "initializer_factor", "initializer_range")
        check_fields(raw, what, used=(*required, *optional), ignored=no_effect)
        return cls(
            **{field: require(raw, field, what) for field in required},
            **{field: raw[field] for field in optional if field in raw},
        )

    def forward_flops(self, tokens: int) -> int:
        """Floating-point operations for one text: the layers' matmuls and attention, by our count."""
        D, F = self.hidden_size, self.intermediate_size
        layer = 2 * tokens * (4 * D * D + 2 * D * F) + 4 * tokens * tokens * D
        return self.num_hidden_layers * layer + 2 * D * self.projection_dim

    def to_hf(self) -> dict:
        return {
            "architectures": [CLIPTextModel.hf_class],
            "model_type": "clip_text_model",
            "eos_token_id": self.eos_token_id,
            "hidden_act": self.hidden_act,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "layer_norm_eps": self.layer_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "projection_dim": self.projection_dim,
            "vocab_size": self.vocab_size,
        }


class CLIPTextOutput(NamedTuple):
    """last [B, T, D]: after the final norm. penultimate [B, T, D]: what enters the last layer, not normalised, which
    is what Stable Diffusion 3 conditions on. pooled [B, P]: the end-of-text position, projected."""

    last: jax.Array
    penultimate: jax.Array
    pooled: jax.Array


class CLIPTextLayer(nnx.Module):
    """Causal self-attention and a two-layer perceptron, each after a norm and with a residual."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, F = config.hidden_size, config.intermediate_size
        self.layer_norm1 = LayerNorm(D, epsilon=config.layer_norm_eps)
        self.q_proj = Linear(D, D, rngs=rngs)
        self.k_proj = Linear(D, D, rngs=rngs)
        self.v_proj = Linear(D, D, rngs=rngs)
        self.out_proj = Linear(D, D, rngs=rngs)
        self.layer_norm2 = LayerNorm(D, epsilon=config.layer_norm_eps)
        self.fc1 = Linear(D, F, rngs=rngs)
        self.fc2 = Linear(F, D, rngs=rngs)

    def __call__(self, x):
        B, T, D = x.shape
        heads = self.config.num_attention_heads
        with jax.named_scope("attention"):
            y = self.layer_norm1(x)
            q, k, v = (project(y).reshape(B, T, heads, -1) for project in (self.q_proj, self.k_proj, self.v_proj))
            x = x + self.out_proj(attention(q, k, v, causal=True).reshape(B, T, D))
        with jax.named_scope("mlp"):
            return x + self.fc2(activate(ACTIVATIONS[self.config.hidden_act], self.fc1(self.layer_norm2(x))))


class CLIPTextModel(nnx.Module):
    """Token ids [B, T] -> CLIPTextOutput."""

    config_class = CLIPTextConfig
    hf_class = "CLIPTextModelWithProjection"
    sharding_rules = ()  # small: replicated, the batch is split

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        D = config.hidden_size
        self.token_embedding = Embedding(config.vocab_size, D, rngs=rngs)
        self.position_embedding = Embedding(config.max_position_embeddings, D, rngs=rngs)
        self.blocks = stack(lambda rngs: CLIPTextLayer(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.final_layer_norm = LayerNorm(D, epsilon=config.layer_norm_eps)
        self.text_projection = Linear(D, config.projection_dim, bias=False, rngs=rngs)

    def __call__(self, ids) -> CLIPTextOutput:
        """ids int [B, T], each row holding its end-of-text token, padded to T <= max_position_embeddings.

        Padding is attended to like any token, as the generators that use this encoder were trained.
        """
        T, longest = ids.shape[1], self.config.max_position_embeddings
        if longest < T:
            raise ConfigError(f"CLIPTextModel: {T} tokens, but it has {longest} positions")
        with jax.named_scope("clip_text"):
            x = self.token_embedding(ids) + self.position_embedding.embedding[:T]
            (x, penultimate), _ = scan_layers(
                self.blocks, lambda layer, carry, _: ((layer(carry[0]), carry[0]), None), (x, x)
            )
            last = self.final_layer_norm(x)
            # A masked sum, not a gather: it needs no sharding annotation, and adding zeros is exact.
            at_end = jnp.arange(T) == self._end_of_text(ids)[:, None]
            pooled = jnp.where(at_end[:, :, None], last, 0).sum(1)
            return CLIPTextOutput(last, penultimate, self.text_projection(pooled))

    def _end_of_text(self, ids):
        """The position [B] of each row's first end-of-text token."""
        if self.config.eos_token_id == _LEGACY_EOS:
            return jnp.argmax(ids, axis=1)  # CLIP's end-of-text is the highest id of its vocabulary
        return jnp.argmax(ids == self.config.eos_token_id, axis=1)

    @staticmethod
    def weight_rules(config: CLIPTextConfig) -> tuple[Rule, ...]:
        layer = "text_model.encoder.layers.{layer}"
        return (
            Rule(r"(token_embedding|position_embedding)\.embedding", r"text_model.embeddings.\1.weight"),
            Rule(r"blocks\.(layer_norm[12])\.scale", rf"{layer}.\1.weight"),
            Rule(r"blocks\.(layer_norm[12])\.bias", rf"{layer}.\1.bias"),
            Rule(r"blocks\.(fc[12])\.kernel", rf"{layer}.mlp.\1.weight"),
            Rule(r"blocks\.(fc[12])\.bias", rf"{layer}.mlp.\1.bias"),
            Rule(r"blocks\.(.+_proj)\.kernel", rf"{layer}.self_attn.\1.weight"),
            Rule(r"blocks\.(.+_proj)\.bias", rf"{layer}.self_attn.\1.bias"),
            Rule(r"final_layer_norm\.scale", "text_model.final_layer_norm.weight"),
            Rule(r"final_layer_norm\.bias", "text_model.final_layer_norm.bias"),
        )

    @staticmethod
    def ignored(config: CLIPTextConfig) -> tuple[str, ...]:
        return ("text_model.embeddings.position_ids",)  # a buffer 0, 1, 2, ... that old files carry
