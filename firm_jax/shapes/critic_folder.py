"""The miniature critic before its training: a complete Qwen3-VL folder with random weights.

Its tokenizer is Qwen's byte-level byte-pair scheme, learned on the shapes world's own texts; the folder is what
`AutoTokenizer`, `AutoProcessor` and `Qwen3VLForConditionalGeneration` open.
"""

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from firm_jax.interop.files import write_tensors
from firm_jax.models import abstract, save_pretrained
from firm_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig
from firm_jax.sharding import path_name

# The special tokens of Qwen3-VL that a critic meets.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

EMBEDDING = "model.language_model.embed_tokens.weight"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """A Qwen tokenizer with at most `vocab_size` entries learned on `texts`, and the special tokens after them."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_critic_folder(
    folder: Path, texts: Iterable[str], miniature: dict, *, seed: int, base: Path | None = None
) -> None:
    """Write the folder of a miniature not yet trained.

    `miniature` holds `vocab_size` (of the learned part), `text` and `vision` (fields of Qwen3-VL's `text_config` and
    `vision_config`; the vocabulary and `out_hidden_size` follow from the rest), and `min_pixels` and `max_pixels`.
    Its weights are random, or those of the miniature in the folder `base`, which must be of the same sizes.
    """
    folder = Path(folder)
    tokenizer = learn_tokenizer(texts, miniature["vocab_size"])
    tokenizer.save_pretrained(folder)
    vision, text = dict(miniature["vision"]), dict(miniature["text"])
    text["vocab_size"] = len(tokenizer)
    vision["out_hidden_size"] = text["hidden_size"]
    image_id, video_id, start_id, end_id = tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    config = Qwen3VLConfig.from_hf(
        {
            "text_config": text,
            "vision_config": vision,
            "tie_word_embeddings": True,
            "image_token_id": image_id,
            "video_token_id": video_id,
            "vision_start_token_id": start_id,
            "vision_end_token_id": end_id,
        }
    )
    if base:
        _write_with_vocabulary(folder, base, config, tokenizer)
    else:
        graphdef, _ = nnx.split(abstract(Qwen3VL, config))
        save_pretrained(nnx.merge(graphdef, jax.jit(lambda: _initial_params(config, seed))()), folder)
    write_image_processor(folder, "Qwen3VL", vision, miniature["min_pixels"], miniature["max_pixels"])
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
    }
    _write(folder / "generation_config.json", ends)


def write_image_processor(folder: Path, family: str, vision: dict, min_pixels: int, max_pixels: int) -> None:
    """Write how images are cut for a vision tower: what `family` ("Qwen3VL", "Qwen2VL") has processors for."""
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": f"{family}Processor",
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    _write(folder / "preprocessor_config.json", images)
    video = images | {"video_processor_type": f"{family}VideoProcessor"}
    del video["image_processor_type"]
    _write(folder / "video_preprocessor_config.json", video)


def _write_with_vocabulary(folder: Path, base: Path, config: Qwen3VLConfig, tokenizer: Qwen2Tokenizer) -> None:
    """The weights in `base` for another tokenizer: a token that is new to them has the mean of its pieces' rows."""
    tensors, theirs = load_file(base / "model.safetensors"), AutoTokenizer.from_pretrained(base, local_files_only=True)
    rows, known = tensors[EMBEDDING], theirs.get_vocab()

    def row(token: str) -> np.ndarray:
        pieces = [known[token]] if token in known else theirs(tokenizer.convert_tokens_to_string([token])).input_ids
        return rows[pieces].mean(axis=0)

    tensors[EMBEDDING] = np.stack([row(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    write_tensors(tensors, folder / "model.safetensors")
    _write(folder / "config.json", config.to_hf() | {"dtype": str(rows.dtype)})


def _initial_params(config: Qwen3VLConfig, seed: int):
    """Random parameters, the language model's small as Qwen's own were: it then learns to look sooner."""

    def small(path, leaf):
        name = path_name(path)
        if not (name.startswith("language_model.layers") and name.endswith(".kernel")):
            return leaf
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return 0.02 * jax.random.normal(key, leaf.shape)

    return jax.tree_util.tree_map_with_path(small, nnx.state(Qwen3VL(config, rngs=nnx.Rngs(seed))))


def _write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
