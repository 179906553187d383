"""Qwen3-VL: a vision tower whose features enter a Qwen3 language model, at its input and after its first layers.

It runs as three programs, so that a new image size compiles only the small first one: `encode_images`, `splice`,
and the language model itself (`__call__`, `logits`). Positions on three axes come from outside, computed from the
grids before sequences are padded or packed.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from firm_jax.errors import ConfigError
from firm_jax.interop.mapping import Rule
from firm_jax.mesh import BATCH_AXES
from firm_jax.models.attention import attention
from firm_jax.models.config import check_fields, require
from firm_jax.models.layers import Linear, as_bits, of_bits, project, scan_layers, split_as, zeros_beside
from firm_jax.models.lora import child
from firm_jax.models.qwen3_vl_vision import Qwen3VLVision, Qwen3VLVisionConfig
from firm_jax.models.qwen_text import SHARDING_RULES, TextModel, image_rows, rotary_tables


@dataclass(frozen=True)
class Qwen3VLTextConfig:
    """`text_config` of a Qwen3-VL config.json, under its own names; the rotary fields are lifted out of their dict."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    mrope_section: tuple[int, int, int]

    qk_norm, qkv_bias = True, False

    @classmethod
    def from_hf(cls, raw: dict) -> "Qwen3VLTextConfig":
        """Raises ConfigError for a field that is unknown, missing, or of a value that is not supported.

        The rotary fields are read from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (4).
        """
        what = "Qwen3-VL text_config"
        fields = [name for name in cls.__dataclass_fields__ if name not in ("rope_theta", "mrope_section")]
        check_fields(
            raw,
            what,
            used=(*fields, "rope_parameters", "rope_scaling", "rope_theta"),
            fixed={"hidden_act": ("silu",), "attention_bias": (False,), "attention_dropout": (0, 0.0)},
            ignored=("initializer_range", "tie_word_embeddings"),  # only the outer config decides about tying
        )
        rope = {"rope_theta": raw.get("rope_theta")}
        rope |= raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        check_fields(
            rope,
            f"{what}, rotary fields",
            used=("rope_theta", "mrope_section"),
            fixed={"rope_type": ("default",), "type": ("default",), "mrope_interleaved": (True,)},
        )
        values = {field: require(raw, field, what) for field in fields}
        section = tuple(require(rope, "mrope_section", what))
        config = cls(**values, rope_theta=float(require(rope, "rope_theta", what)), mrope_section=section)
        config._check(what)
        return config

    def _check(self, what: str) -> None:
        if len(self.mrope_section) != 3 or tuple(np.bincount(self.rotary_axes, minlength=3)) != self.mrope_section:
            raise ConfigError(
                f"{what}: mrope_section={list(self.mrope_section)} does not share out the {self.head_dim // 2} "
                f"frequencies of head_dim={self.head_dim} in the order T H W T H W ..."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{what}: num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )

    def forward_flops(self, tokens: int, slots: int, logits: int) -> int:
        """Floating-point operations of one sequence, by our count: matmuls, attention and the output head.

        `tokens` that attend to `slots` each, all of them counted though the later ones are masked; `logits`: for how
        many tokens the head is computed.
        """
        D, F, H = self.hidden_size, self.intermediate_size, self.head_dim
        queries, keys = self.num_attention_heads * H, self.num_key_value_heads * H
        layer = 2 * tokens * (2 * D * queries + 2 * D * keys + 3 * D * F) + 4 * tokens * slots * queries
        return self.num_hidden_layers * layer + 2 * logits * D * self.vocab_size

    def to_hf(self) -> dict:
        raw = {name: getattr(self, name) for name in self.__dataclass_fields__}
        raw["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": raw.pop("rope_theta"),
            "mrope_section": list(raw.pop("mrope_section")),
            "mrope_interleaved": True,
        }
        return {"model_type": "qwen3_vl_text", "hidden_act": "silu", "attention_bias": False, **raw}

    @property
    def rotary_axes(self) -> np.ndarray:
        """Which axis (0 time, 1 row, 2 column) turns each of the head_dim / 2 frequencies: T H W T H W ... T T."""
        index = np.arange(self.head_dim // 2)
        return np.where(index < 3 * np.asarray(self.mrope_section)[index % 3], index % 3, 0)


@dataclass(frozen=True)
class Qwen3VLConfig:
    """A Qwen3-VL config.json, of any released size."""

    text: Qwen3VLTextConfig
    vision: Qwen3VLVisionConfig
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    @classmethod
    def from_hf(cls, raw: dict) -> "Qwen3VLConfig":
        """Raises ConfigError for a field that is unknown, missing, or of a value that is not supported."""
        what = "Qwen3-VL"
        own = [name for name in cls.__dataclass_fields__ if name not in ("text", "vision")]
        check_fields(raw, what, used=(*own, "text_config", "vision_config"))
        text = Qwen3VLTextConfig.from_hf(require(raw, "text_config", what))
        vision = Qwen3VLVisionConfig.from_hf(require(raw, "vision_config", what))
        if vision.out_hidden_size != text.hidden_size:
            raise ConfigError(
                f"{what}: vision_config.out_hidden_size={vision.out_hidden_size} differs from "
                f"text_config.hidden_size={text.hidden_size}"
            )
        if len(vision.deepstack_visual_indexes) > text.num_hidden_layers:
            raise ConfigError(f"{what}: more deepstack_visual_indexes than the {text.num_hidden_layers} text layers")
        return cls(text, vision, **{name: raw[name] for name in own if raw.get(name) is not None})

    def to_hf(self) -> dict:
        raw = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("text", "vision")}
        return {
            "architectures": [Qwen3VL.hf_class],
            "model_type": "qwen3_vl",
            "text_config": self.text.to_hf(),
            "vision_config": self.vision.to_hf(),
            **raw,
        }


class Qwen3VL(nnx.Module):
    """Qwen3-VL for conditional generation (Qwen3-VL technical report, arXiv 2511.21631)."""

    config_class = Qwen3VLConfig
    hf_class = "Qwen3VLForConditionalGeneration"
    sharding_rules = (
        *((rf"visual\..*{pattern}", spec) for pattern, spec in Qwen3VLVision.sharding_rules),
        *SHARDING_RULES,
    )

    @staticmethod
    def weight_rules(config: Qwen3VLConfig) -> tuple[Rule, ...]:
        vision = config.vision
        patch = f"{vision.in_channels}x{vision.temporal_patch_size}x{vision.patch_size}x{vision.patch_size}"
        stacked = r"(visual\.blocks|visual\.deepstack_merger_list|language_model\.layers)\.(.+)"
        return (
            Rule(r"visual\.patch_embed\.kernel", "model.visual.patch_embed.proj.weight", f"patch:{patch}"),
            Rule(r"visual\.patch_embed\.bias", "model.visual.patch_embed.proj.bias"),
            Rule(rf"{stacked}\.(?:kernel|scale)", r"model.\1.{layer}.\2.weight"),
            Rule(stacked, r"model.\1.{layer}.\2"),
            Rule(r"((?:visual|language_model)\..+)\.(?:kernel|scale|embedding)", r"model.\1.weight"),
            Rule(r"((?:visual|language_model)\..+)", r"model.\1"),
        )

    @staticmethod
    def tied(config: Qwen3VLConfig) -> dict[str, str]:
        """Files of a tied model may repeat the embedding under the output head's name."""
        return {"lm_head.weight": "model.language_model.embed_tokens.weight"} if config.tie_word_embeddings else {}

    def __init__(self, config: Qwen3VLConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.visual = Qwen3VLVision(config.vision, rngs=rngs)
        self.language_model = TextModel(config.text, rngs=rngs)
        own_head = not config.tie_word_embeddings
        D, V = config.text.hidden_size, config.text.vocab_size
        self.lm_head = Linear(D, V, bias=False, rngs=rngs) if own_head else None

    def encode_images(self, patches, grids, *, lora: dict | None = None, remat: str | None = None):
        """Images as the language model takes them, each in a row of its own.

        patches [M, P, C*T*ph*pw] in merge-block order, padded to P; grids [M, 2] int32 (rows, columns in patches),
        rows * columns <= P. Returns features [M, P / merge^2, D] and DeepStack features [K, M, P / merge^2, D]; what
        stands beyond an image's own rows * columns / merge^2 features is meaningless. lora: as in `__call__`.
        """
        with jax.named_scope("encode_images"):
            return self.visual(patches, grids, lora=child(lora, "visual"), remat=remat)

    def splice(self, ids, features, deepstack, image_index):
        """Token embeddings with image features put in their places.

        ids [B, T]; image_index [B, T] int32 points into the features flattened to [M * P / merge^2], -1 for text.
        Returns embeddings [B, T, D] and DeepStack features [K, B, T, D], zero where there is text.
        """
        with jax.named_scope("splice"):
            embeddings = image_rows(features, image_index, self.language_model.embed_tokens(ids))
            return embeddings, jnp.stack([image_rows(level, image_index, 0) for level in deepstack])

    def __call__(
        self,
        embeddings,
        positions,
        segments,
        *,
        deepstack=None,
        cache=None,
        cache_index=None,
        kv_segments=None,
        recent=None,
        lora: dict | None = None,
        remat: str | None = None,
    ):
        """Hidden states [B, T, D] after the final norm, and the cache.

        embeddings [B, T, D]; positions [3, B, T] (time, row, column); segments [B, T] int32, 0 for padding: a token
        sees the tokens of its own segment up to itself, by slot. deepstack [K, B, T, D] is added after the first K
        layers.

        cache {"k", "v": [L, B, K, S, H]} (see `init_cache`): new keys are written at slots cache_index ..
        cache_index + T, and the tokens see the slots whose kv_segments [B, S] equals their segment. cache_index is
        one scalar for the batch; a Python int tells the program how many slots there are to see, which lets the fast
        attention kernels serve a prefill. recent: a second cache, of a few slots behind those of the first. New keys
        are written there, at its own cache_index, and it is what is returned; the first is only read, all of it that
        kv_segments shows. Who writes token after token moves little then. Tokens of such a call are of one segment.

        lora: a tree of adapters over the model's own paths, scale folded in (models/lora.py). `remat`: see
        `layers.scan_layers`.
        """
        cos, sin = rotary_tables(positions, self.config.text, embeddings.dtype)
        B, T = segments.shape
        written = cache if recent is None else recent

        def attend(q, k, v, written, layer):
            if written is None:
                return attention(q, k, v, segments=(segments, segments), causal=True), None
            at = (layer, 0, 0, cache_index, 0)
            written = {
                name: jax.lax.dynamic_update_slice(written[name], as_bits(new).swapaxes(1, 2)[None], at)
                for name, new in (("k", k), ("v", v))
            }
            if recent is None and isinstance(cache_index, int):
                end = cache_index + T
                if cache_index > 0:
                    k, v = (of_layer(written[name], layer)[:, :end] for name in ("k", "v"))
                seen = (segments, split_as(kv_segments[:, :end], segments))
                return attention(q, k, v, segments=seen, causal=True, offset=cache_index), written
            first, seen, places = 0, kv_segments, (written,)
            if recent is not None:
                room = recent["k"].shape[3]
                first, own = kv_segments.shape[1], split_as(jnp.broadcast_to(segments[:, :1], (B, room)), segments)
                seen, places = jnp.concatenate([kv_segments, own], axis=1), (cache, written)
            k, v = ([of_layer(place[name], layer) for place in places] for name in ("k", "v"))
            slots = jnp.broadcast_to(first + cache_index + jnp.arange(T), (B, T))
            return attention(q, k, v, segments=(segments, seen), causal=True, positions=slots), written

        def of_layer(stack, layer):
            """A layer's keys or values, [B, slots, K, H]."""
            return of_bits(jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)).swapaxes(1, 2)

        def body(block, carry, scanned):
            x, written = carry
            layer, block_lora = scanned
            x, written = block(x, cos, sin, lambda q, k, v: attend(q, k, v, written, layer), block_lora)
            if deepstack is not None:
                # every layer reads one level, so that one block is compiled and the weights stay in one piece
                level = jax.lax.dynamic_index_in_dim(deepstack, layer, keepdims=False)  # past the last: the last
                x = x + jnp.where(layer < len(deepstack), level, 0).astype(x.dtype)
            return (x, written), None

        layers = jnp.arange(self.config.text.num_hidden_layers)
        with jax.named_scope("language_model"):
            carry = (embeddings, written)
            scanned = (layers, child(lora, "language_model", "layers"))
            # Token after token, what a layer's slices are copied for is not much more than the copies: with the layers
            # on their own, XLA makes them once. (In float32, on a CPU, reading them from afar again costs more.)
            unroll = recent is not None and recent["k"].dtype == jnp.uint16
            blocks = self.language_model.layers
            (x, written), _ = scan_layers(blocks, body, carry, scanned, remat=remat, unroll=unroll)
            return self.language_model.norm(x), written

    def logits(self, hidden):
        """hidden [..., D] -> float32 [..., V]."""
        if self.lm_head is None:
            return self.language_model.embed_tokens.attend(hidden, jnp.float32)
        return project(hidden, self.lm_head.kernel[...], jnp.float32)

    def init_cache(self, batch: int, length: int, dtype) -> dict[str, jax.Array]:
        """An empty cache of `length` slots for `batch` sequences; in bits, where `layers.as_bits` has them."""
        text = self.config.text
        shape = (text.num_hidden_layers, batch, text.num_key_value_heads, length, text.head_dim)
        beside = self.language_model.embed_tokens.embedding[...]
        return {
            name: as_bits(zeros_beside(beside, shape, dtype, None, BATCH_AXES, "tensor", None, None))
            for name in ("k", "v")
        }
