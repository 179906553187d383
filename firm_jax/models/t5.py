"""T5 v1.1's encoder (Raffel et al. 2020, arXiv 1910.10683; gated GELU by Shazeer 2020, arXiv 2002.05202).

What sets it apart: one table of relative position biases, shared by all layers, in the place of positions; attention
scores that are not scaled; norms without mean and without bias.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from firm_jax.errors import ConfigError
from firm_jax.interop.mapping import Rule
from firm_jax.models.attention import attention
from firm_jax.models.config import check_fields, require
from firm_jax.models.layers import Embedding, Linear, RMSNorm, activate, scan_layers, split_heads, stack


@dataclass(frozen=True)
class T5Config:
    """d_kv: the width of one head; num_heads * d_kv need not be d_model."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 2 or distance <= buckets // 4:
            raise ConfigError(
                f"T5Encoder: relative_attention_num_buckets {buckets} must be even and at least 4, and "
                f"relative_attention_max_distance {distance} above a quarter of it"
            )

    @classmethod
    def from_hf(cls, raw: dict) -> "T5Config":
        """From a transformers config.json. T5 v1.0 (ReLU feed-forward) is an error."""
        what = "T5Encoder"
        required = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj")
        optional = ("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon")
        # The decoder's, the training's, and two that transformers derives from feed_forward_proj.
        no_effect = """num_decoder_layers tie_word_embeddings scale_decoder_outputs output_past n_positions
            dropout_rate classifier_dropout initializer_factor is_encoder_decoder is_gated_act dense_act_fn""".split()
        check_fields(
            raw,
            what,
            used=(*required, *optional),
            fixed={"feed_forward_proj": ("gated-gelu",), "is_decoder": (False,)},
            ignored=no_effect,
        )
        fields = {field: require(raw, field, what) for field in required}
        del fields["feed_forward_proj"]
        return cls(**fields, **{field: raw[field] for field in optional if field in raw})

    def forward_flops(self, tokens: int) -> int:
        """Floating-point operations for one text: the layers' matmuls and attention, by our count."""
        D, F, inner = self.d_model, self.d_ff, self.num_heads * self.d_kv
        layer = 2 * tokens * (4 * D * inner + 3 * D * F) + 4 * tokens * tokens * inner
        return self.num_layers * layer

    def to_hf(self) -> dict:
        return {
            "architectures": [T5Encoder.hf_class],
            "model_type": "t5",
            "d_ff": self.d_ff,
            "d_kv": self.d_kv,
            "d_model": self.d_model,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "num_heads": self.num_heads,
            "num_layers": self.num_layers,
            "relative_attention_max_distance": self.relative_attention_max_distance,
            "relative_attention_num_buckets": self.relative_attention_num_buckets,
            "tie_word_embeddings": False,
            "vocab_size": self.vocab_size,
        }


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every (query, key) pair, int32 [T, T].

    Half of the buckets are for keys after the query. In each half, the first half holds one distance each, the rest
    grow with the logarithm of the distance up to `max_distance`, beyond which all share the last. In float32 as in
    the training code, since a distance at a bucket's edge falls to one side or the other by rounding.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, distance = buckets // 2, np.abs(offset)
    exact = half // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    coarse = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, coarse) + half * (offset > 0)).astype(np.int32)


class T5Block(nnx.Module):
    """Self-attention and a gated feed-forward, each after a norm and with a residual; no biases anywhere."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        D, F, inner = config.d_model, config.d_ff, config.num_heads * config.d_kv
        self.attention_norm = RMSNorm(D, epsilon=config.layer_norm_epsilon)
        self.q = Linear(D, inner, bias=False, rngs=rngs)
        self.k = Linear(D, inner, bias=False, rngs=rngs)
        self.v = Linear(D, inner, bias=False, rngs=rngs)
        self.o = Linear(inner, D, bias=False, rngs=rngs)
        self.mlp_norm = RMSNorm(D, epsilon=config.layer_norm_epsilon)
        self.wi_0 = Linear(D, F, bias=False, rngs=rngs)
        self.wi_1 = Linear(D, F, bias=False, rngs=rngs)
        self.wo = Linear(F, D, bias=False, rngs=rngs)

    def __call__(self, x, position_bias, segments):
        B, T, _ = x.shape
        with jax.named_scope("attention"):
            y = self.attention_norm(x)
            q, k, v = (split_heads(project(y), self.config.num_heads) for project in (self.q, self.k, self.v))
            y = attention(q, k, v, bias=position_bias, segments=segments, scale=1.0)
            x = x + self.o(y.reshape(B, T, -1))
        with jax.named_scope("mlp"):
            y = self.mlp_norm(x)
            return x + self.wo(activate(jax.nn.gelu, self.wi_0(y)) * self.wi_1(y))


class T5Encoder(nnx.Module):
    """Token ids [B, T] -> hidden states [B, T, D]. Its activations overflow in float16; bfloat16 is safe."""

    config_class = T5Config
    hf_class = "T5EncoderModel"
    sharding_rules = (
        (r"\.(q|k|v|wi_0|wi_1)\.kernel", P("fsdp", "tensor")),
        (r"\.(o|wo)\.kernel", P("tensor", "fsdp")),
        (r"shared\.embedding", P("tensor", "fsdp")),
    )

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model, rngs=rngs)
        self.relative_attention_bias = Embedding(config.relative_attention_num_buckets, config.num_heads, rngs=rngs)
        self.blocks = stack(lambda rngs: T5Block(config, rngs=rngs), config.num_layers, rngs)
        self.final_layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon)

    def __call__(self, ids, mask=None):
        """ids int [B, T]; mask [B, T], 0 where a key is padding that no token attends to. -> [B, T, D].

        Without a mask padding is attended to like any token: so Stable Diffusion 3 was trained.
        """
        T = ids.shape[1]
        segments = None if mask is None else (jnp.ones_like(ids), jnp.asarray(mask).astype(jnp.int32))
        with jax.named_scope("t5"):
            config = self.config
            buckets = relative_buckets(T, config.relative_attention_num_buckets, config.relative_attention_max_distance)
            position_bias = self.relative_attention_bias(jnp.asarray(buckets)).transpose(2, 0, 1)[None]
            x, _ = scan_layers(
                self.blocks, lambda block, x, _: (block(x, position_bias, segments), None), self.shared(ids)
            )
            return self.final_layer_norm(x)

    @staticmethod
    def weight_rules(config: T5Config) -> tuple[Rule, ...]:
        block = "encoder.block.{layer}"
        return (
            Rule(
                r"relative_attention_bias\.embedding",
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            ),
            Rule(r"blocks\.(q|k|v|o)\.kernel", rf"{block}.layer.0.SelfAttention.\1.weight"),
            Rule(r"blocks\.attention_norm\.scale", f"{block}.layer.0.layer_norm.weight"),
            Rule(r"blocks\.(wi_0|wi_1|wo)\.kernel", rf"{block}.layer.1.DenseReluDense.\1.weight"),
            Rule(r"blocks\.mlp_norm\.scale", f"{block}.layer.1.layer_norm.weight"),
            Rule(r"final_layer_norm\.scale", "encoder.final_layer_norm.weight"),
        )

    @staticmethod
    def tied(config: T5Config) -> dict[str, str]:
        return {"encoder.embed_tokens.weight": "shared.weight"}
