"""From prompts to what the SD3 transformer is conditioned on: two CLIP text encoders and, where there is one, T5."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from firm_jax import models
from firm_jax.data.records import check_request_text
from firm_jax.errors import ConfigError, WeightsError
from firm_jax.mesh import batch_size, on_mesh, replicate, shard_batch, to_host
from firm_jax.typing import Array, Float, Int

CLIP_ENCODERS = ("text_encoder", "text_encoder_2")
T5_ENCODER = "text_encoder_3"
DEFAULT_TEXT_TOKENS = 256
LARGEST_BATCH = 32
SHOWN_CHARACTERS = 200


class Conditioning(NamedTuple):
    """P prompts as the transformer takes them: text tokens, and one vector a prompt."""

    context: Float[Array, "P T D"]
    pooled: Float[Array, "P E"]


class TextEncoders:
    """The tokenizers and text encoders of a pipeline, by their names in its folder.

    Without T5, zeros stand for its tokens, as the model was trained to expect. `width` is the transformer's
    `joint_attention_dim`, to which CLIP's states are padded with zeros. Without tokenizers, `encode` can be compiled
    for the networks' full lengths.
    """

    def __init__(self, tokenizers: Mapping, networks: Mapping[str, nnx.Module], width: int, mesh: Mesh | None = None):
        self.tokenizers, self.width, self.mesh = dict(tokenizers), width, mesh
        self.configs = {name: network.config for name, network in networks.items()}
        split = {name: nnx.split(network) for name, network in networks.items()}
        self.graphdefs = {name: graphdef for name, (graphdef, _) in split.items()}
        self.params = {name: params for name, (_, params) in split.items()}
        lengths = [self.configs[name].max_position_embeddings for name in CLIP_ENCODERS]
        if tokenizers:
            lengths.append(tokenizers["text_encoder"].model_max_length)
        self.clip_tokens = min(lengths)
        self.encode_jitted = jax.jit(self.encode, static_argnums=2)

    @classmethod
    def from_folder(cls, folder: Path, names: Sequence[str], width: int, dtype, mesh: Mesh | None) -> "TextEncoders":
        """The encoders `names` (text_encoder, ...) of a pipeline folder, each with its tokenizer."""
        networks = {name: models.from_pretrained(folder / name, dtype=dtype, mesh=mesh) for name in names}
        tokenizers = {name: load_tokenizer(folder / tokenizer_name(name)) for name in names}
        return cls(tokenizers, networks, width, mesh)

    def tokenize(self, prompts: Sequence[str], max_text_tokens: int) -> dict[str, Int[np.ndarray, "P T"]]:
        """Token ids for each encoder, cut or padded to its length; a warning says when prompts are cut.

        A special token that a prompt spells is text (`spell_out`). Raises DataError for a prompt that is no text or
        longer than MAX_RECORD_BYTES.
        """
        if max_text_tokens < 1:
            raise ConfigError(f"max_text_tokens must be at least 1, not {max_text_tokens}")
        prompts = list(prompts)
        for number, prompt in enumerate(prompts):
            check_request_text(prompt, f"prompt {number}")
        ids = {}
        for name, tokenizer in self.tokenizers.items():
            length = max_text_tokens if name == T5_ENCODER else self.clip_tokens
            texts = spell_out(prompts, tokenizer)
            cut = [len(whole) > length for whole in tokenizer(texts, verbose=False)["input_ids"]]
            if any(cut):
                logging.warning(
                    "%d of %d prompts are longer than the %d tokens that %s reads, and are cut for it; the first: %r",
                    *(sum(cut), len(cut), length, name, prompts[cut.index(True)][:SHOWN_CHARACTERS]),
                )
            tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
            ids[name] = tokens["input_ids"].astype(np.int32)
        return ids

    def encode(self, params: Mapping, ids: Mapping[str, Array], max_text_tokens: int) -> Conditioning:
        """The conditioning of tokenized prompts: CLIP's tokens, then T5's. Pure; `params` as in `self.params`."""
        states, pooled = [], []
        for name in CLIP_ENCODERS:
            with jax.named_scope(name):
                out = nnx.merge(self.graphdefs[name], params[name])(ids[name])
            states.append(out.penultimate)
            pooled.append(out.pooled)
        context = jnp.concatenate(states, axis=-1)
        zero_tokens = 0 if T5_ENCODER in ids else max_text_tokens
        context = jnp.pad(context, ((0, 0), (0, zero_tokens), (0, self.width - context.shape[-1])))
        if T5_ENCODER in ids:
            with jax.named_scope(T5_ENCODER):
                # No mask: SD3 was trained with T5's padding tokens in view.
                tokens = nnx.merge(self.graphdefs[T5_ENCODER], params[T5_ENCODER])(ids[T5_ENCODER])
            context = jnp.concatenate([context, tokens], axis=1)
        return Conditioning(context, jnp.concatenate(pooled, axis=-1))

    def __call__(self, prompts: Sequence[str], max_text_tokens: int = DEFAULT_TEXT_TOKENS) -> Conditioning:
        """The conditioning of P prompts, each distinct one encoded once; whole on every device of the mesh."""
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        ids = self.tokenize(list(rows), max_text_tokens)
        parts = []
        for batch in text_batches(len(rows), batch_size(self.mesh)):
            part = shard_batch({name: tokens[batch] for name, tokens in ids.items()}, self.mesh)
            with on_mesh(self.mesh):
                parts.append(to_host(self.encode_jitted(self.params, part, max_text_tokens)))
        index = [rows[prompt] for prompt in prompts]
        return replicate(jax.tree.map(lambda *arrays: np.concatenate(arrays)[index], *parts), self.mesh)

    def networks(self) -> dict[str, nnx.Module]:
        """The encoders themselves."""
        return {name: nnx.merge(graphdef, self.params[name]) for name, graphdef in self.graphdefs.items()}


def encoded_together(count: int, divisor: int) -> int:
    """How many of `count` prompts one call encodes: a power of two, so that few programs are compiled, filled up to a
    multiple of `divisor`."""
    size = min(LARGEST_BATCH, 1 << (count - 1).bit_length())
    return size + -size % divisor


def text_batches(count: int, divisor: int) -> Iterator[np.ndarray]:
    """Rows 0..count-1 in batches of one size, the last one filled up."""
    size = encoded_together(count, divisor)
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1)


def spell_out(prompts: Sequence[str], tokenizer) -> list[str]:
    """The prompts with a blank inside every special token that they spell, so that it is read as text.

    Otherwise `<|endoftext|>` ends a prompt for CLIP, whose pooled vector is taken at the first end. Leaving it to the
    tokenizer's `split_special_tokens` would not do: T5 has its special tokens among its word pieces too. One that is
    a single character stays: the second tokenizer of the SD3 folders pads with "!", and people write that.
    """
    names = {name for name in (*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens) if len(name) > 1}
    special = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")
    return [special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", prompt) for prompt in prompts]


def tokenizer_name(encoder: str) -> str:
    """The folder of an encoder's tokenizer: tokenizer_2 for text_encoder_2."""
    return encoder.replace("text_encoder", "tokenizer")


def load_tokenizer(folder: Path):
    """The transformers tokenizer in a folder; WeightsError when it is missing or damaged."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise WeightsError(f"the pipeline has no tokenizer folder {folder}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{folder} does not hold a tokenizer that transformers can open: {error}") from error
