"""Qwen2.5-VL as the text encoder of Qwen-Image: it reads an instruction, and for editing the source images with it.

Three programs, as for Qwen3-VL: `encode_images`, `splice`, and the language model itself (`__call__`). Positions on
three axes come from outside (`qwen_text.rope_positions`), and for a text with images they must be those: a sequence
numbered as if it were text alone is read quite differently, though nothing fails.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from firm_jax.errors import ConfigError
from firm_jax.interop.mapping import Rule
from firm_jax.models.attention import attention
from firm_jax.models.config import check_fields, require
from firm_jax.models.layers import Linear, scan_layers
from firm_jax.models.qwen2_5_vl_vision import Qwen2_5VLVision, Qwen2_5VLVisionConfig
from firm_jax.models.qwen_text import SHARDING_RULES, TextModel, image_rows, rotary_tables
from firm_jax.typing import Array, Float, Int

_ROTARY = ("rope_parameters", "rope_scaling", "rope_theta")
_TEXT_FIXED = {"hidden_act": ("silu",), "attention_dropout": (0, 0.0), "use_sliding_window": (False, None)}
# In the released files these stand beside what the layers read, without effect on a model without sliding windows.
_TEXT_NO_EFFECT = (
    *("initializer_range", "max_window_layers", "sliding_window", "tie_word_embeddings"),
    *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id"),
)


@dataclass(frozen=True)
class Qwen2_5VLTextConfig:
    """The language model's fields, under their own names; the rotary ones are lifted out of their dict."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    mrope_section: tuple[int, int, int]

    qk_norm, qkv_bias = False, True

    @classmethod
    def _own(cls) -> list[str]:
        return [name for name in cls.__dataclass_fields__ if name not in ("rope_theta", "mrope_section")]

    @classmethod
    def known(cls) -> set[str]:
        """The names of all fields that `from_hf` takes."""
        return {*cls._own(), *_ROTARY, *_TEXT_FIXED, "layer_types", *_TEXT_NO_EFFECT}

    @classmethod
    def from_hf(cls, raw: Mapping) -> "Qwen2_5VLTextConfig":
        """Raises ConfigError for a field that is unknown, missing, or of a value that is not supported.

        The rotary fields are read from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (4).
        """
        what = "Qwen2.5-VL text_config"
        full_attention = ["full_attention"] * raw.get("num_hidden_layers", 0)
        fixed = _TEXT_FIXED | {"layer_types": (None, full_attention)}
        check_fields(raw, what, used=(*cls._own(), *_ROTARY), fixed=fixed, ignored=_TEXT_NO_EFFECT)
        rope = {"rope_theta": raw.get("rope_theta")}
        rope |= raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        check_fields(
            rope,
            f"{what}, rotary fields",
            used=("rope_theta", "mrope_section"),
            fixed={"rope_type": ("default", "mrope"), "type": ("default", "mrope")},
        )
        values = {field: require(raw, field, what) for field in cls._own()}
        section = tuple(require(rope, "mrope_section", what))
        config = cls(**values, rope_theta=float(require(rope, "rope_theta", what)), mrope_section=section)
        config._check(what)
        return config

    def _check(self, what: str) -> None:
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{what}: hidden_size={self.hidden_size} must be a multiple of num_attention_heads="
                f"{self.num_attention_heads}, and that of num_key_value_heads={self.num_key_value_heads}"
            )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise ConfigError(
                f"{what}: mrope_section={list(self.mrope_section)} must be three numbers that add up to the "
                f"{self.head_dim // 2} frequencies of a head"
            )

    def to_hf(self) -> dict:
        raw = {name: getattr(self, name) for name in self.__dataclass_fields__}
        raw["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": raw.pop("rope_theta"),
            "mrope_section": list(raw.pop("mrope_section")),
        }
        return {"model_type": "qwen2_5_vl_text", "hidden_act": "silu", "use_sliding_window": False, **raw}

    def forward_flops(self, tokens: int) -> int:
        """Floating-point operations of one sequence without the output head, by our count: matmuls and attention."""
        D, F, keys = self.hidden_size, self.intermediate_size, self.num_key_value_heads * self.head_dim
        layer = 2 * tokens * (2 * D * D + 2 * D * keys + 3 * D * F) + 4 * tokens * tokens * D
        return self.num_hidden_layers * layer

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_axes(self) -> np.ndarray:
        """Which axis (0 time, 1 row, 2 column) turns each of the head_dim / 2 frequencies: T T ... H H ... W W."""
        return np.repeat(np.arange(3), self.mrope_section)


@dataclass(frozen=True)
class Qwen2_5VLConfig:
    """A Qwen2.5-VL config.json."""

    text: Qwen2_5VLTextConfig
    vision: Qwen2_5VLVisionConfig
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    @classmethod
    def from_hf(cls, raw: Mapping) -> "Qwen2_5VLConfig":
        """Raises ConfigError for a field that is unknown, missing, or of a value that is not supported.

        The language model's fields stand in `text_config` or, in the first files, beside `vision_config`. Where they
        stand in both places the former count, as in transformers.
        """
        what = "Qwen2.5-VL"
        own = [name for name in cls.__dataclass_fields__ if name not in ("text", "vision")]
        check_fields(raw, what, used=(*own, "text_config", "vision_config"), ignored=Qwen2_5VLTextConfig.known())
        nested = raw.get("text_config")
        flat = {name: value for name, value in raw.items() if name in Qwen2_5VLTextConfig.known()}
        text = Qwen2_5VLTextConfig.from_hf(flat if nested is None else nested)
        vision = Qwen2_5VLVisionConfig.from_hf(require(raw, "vision_config", what))
        if vision.out_hidden_size != text.hidden_size:
            raise ConfigError(
                f"{what}: vision_config.out_hidden_size={vision.out_hidden_size} differs from the language model's "
                f"hidden_size={text.hidden_size}"
            )
        given = {name: raw[name] for name in own if raw.get(name) is not None}
        # Earlier versions of transformers wrote into the inner config that the embeddings are tied.
        given["tie_word_embeddings"] = any(part.get("tie_word_embeddings") for part in (raw, nested or {}))
        return cls(text, vision, **given)

    def to_hf(self) -> dict:
        raw = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("text", "vision")}
        return {
            "architectures": [Qwen2_5VL.hf_class],
            "model_type": "qwen2_5_vl",
            "text_config": self.text.to_hf(),
            "vision_config": self.vision.to_hf(),
            **raw,
        }


class Qwen2_5VL(nnx.Module):
    """Qwen2.5-VL (technical report, arXiv 2502.13923), read for its last hidden states."""

    config_class = Qwen2_5VLConfig
    hf_class = "Qwen2_5_VLForConditionalGeneration"
    sharding_rules = (
        *((rf"visual\..*{pattern}", spec) for pattern, spec in Qwen2_5VLVision.sharding_rules),
        *SHARDING_RULES,
    )

    @staticmethod
    def weight_rules(config: Qwen2_5VLConfig) -> tuple[Rule, ...]:
        vision = config.vision
        patch = f"{vision.in_channels}x{vision.temporal_patch_size}x{vision.patch_size}x{vision.patch_size}"
        return (
            Rule(r"visual\.patch_embed\.kernel", "visual.patch_embed.proj.weight", f"patch:{patch}"),
            Rule(r"visual\.blocks\.(.+)\.(?:kernel|scale)", r"visual.blocks.{layer}.\1.weight"),
            Rule(r"visual\.blocks\.(.+)", r"visual.blocks.{layer}.\1"),
            Rule(r"language_model\.layers\.(.+)\.(?:kernel|scale)", r"model.layers.{layer}.\1.weight"),
            Rule(r"language_model\.layers\.(.+)", r"model.layers.{layer}.\1"),
            Rule(r"language_model\.(.+)\.(?:scale|embedding)", r"model.\1.weight"),
        )

    @staticmethod
    def tied(config: Qwen2_5VLConfig) -> dict[str, str]:
        """Files of a tied model may repeat the embedding under the output head's name."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}

    def __init__(self, config: Qwen2_5VLConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.visual = Qwen2_5VLVision(config.vision, rngs=rngs)
        self.language_model = TextModel(config.text, rngs=rngs)
        own_head = not config.tie_word_embeddings
        # No text is generated here: the head is kept for the file.
        self.lm_head = (
            Linear(config.text.hidden_size, config.text.vocab_size, bias=False, rngs=rngs) if own_head else None
        )

    def encode_images(self, patches, grids, *, remat: str | None = None):
        """Images as the language model takes them, each in a row of its own.

        patches [M, P, C*T*ph*pw] in merge-block order, padded to P; grids [M, 2] int32 (rows, columns in patches),
        rows * columns <= P. Returns features [M, P / merge^2, D]; what stands beyond an image's own rows * columns /
        merge^2 features is meaningless.
        """
        with jax.named_scope("encode_images"):
            return self.visual(patches, grids, remat=remat)

    def splice(self, ids: Int[Array, "B T"], features, image_index) -> Float[Array, "B T D"]:
        """Token embeddings with image features put in their places.

        image_index [B, T] int32 points into the features flattened to [M * P / merge^2], -1 for text. Without any
        image features are None.
        """
        with jax.named_scope("splice"):
            embeddings = self.language_model.embed_tokens(ids)
            return embeddings if features is None else image_rows(features, image_index, embeddings)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Int[Array, "3 B T"],
        segments: Int[Array, "B T"],
        *,
        remat: str | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm: transformers' `hidden_states[-1]`.

        positions: time, row and column; segments: 0 for padding, a token sees the tokens of its own segment up to
        itself. `remat`: see `layers.scan_layers`.
        """
        cos, sin = rotary_tables(positions, self.config.text, embeddings.dtype)

        def attend(q, k, v):
            return attention(q, k, v, segments=(segments, segments), causal=True), None

        with jax.named_scope("language_model"):
            x, _ = scan_layers(
                self.language_model.layers,
                lambda block, x, _: (block(x, cos, sin, attend)[0], None),
                embeddings,
                remat=remat,
            )
            return self.language_model.norm(x)
