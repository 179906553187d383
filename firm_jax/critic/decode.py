"""Greedy generation in batches: vision encode, embed and splice, prefill, and decoding in chunks of steps.

Every shape comes from a few buckets, so few programs are compiled. Prompts are padded on the left; all rows write
the same cache slot. Between chunks, rows that have ended are dropped from the batch, so they stop costing.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from firm_jax.critic.processing import Sequence, collate, image_table
from firm_jax.data.patches import padded, power_of_two
from firm_jax.mesh import BATCH_AXES, batch_size, shard_batch, to_host
from firm_jax.models.layers import zeros_beside

CHUNK = 16  # decoding steps between two looks at which rows have ended
NOTHING = -1  # stands where a row wrote no token


@dataclass(frozen=True)
class Generation:
    """What the model wrote after one prompt.

    tokens: int32 [T], the end token left out. digit_logits: float32 [T, 5], the logits of the digits 1..5 at each
    token's place. finish_reason: "stop" (an end token came) or "length".
    """

    tokens: np.ndarray
    digit_logits: np.ndarray
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class TokenRules:
    """Token ids that generation treats apart: `ends` end a row, `banned` are never written, `digits` are 1..5."""

    ends: tuple[int, ...]
    banned: tuple[int, ...]
    digits: tuple[int, ...]


@partial(jax.jit, static_argnames="graphdef")
def encode_images(graphdef, params, table):
    """An image table (see `processing.image_table`) -> features [M, P, D] and DeepStack features [K, M, P, D]."""
    return nnx.merge(graphdef, params).encode_images(table["patches"], table["grids"])


@partial(jax.jit, static_argnames="graphdef")
def embed(graphdef, params, ids, image_index, vision):
    """Embeddings [B, T, D] with the images' features spliced in; `vision` None when the batch has no image."""
    model = nnx.merge(graphdef, params)
    if vision is None:
        return model.language_model.embed_tokens(ids), None
    return model.splice(ids, *vision, image_index)


@partial(jax.jit, static_argnames=("graphdef", "new_slots"))
def prefill(graphdef, params, embeddings, deepstack, positions, segments, next_position, *, new_slots: int):
    """Read the prompts; returns the decoding state, with room for `new_slots` tokens in the cache."""
    model = nnx.merge(graphdef, params)
    B, T = segments.shape
    written = segments.max(1, keepdims=True)  # 1 where the row is a prompt, 0 where it is padding of the batch
    kv_segments = jnp.concatenate([segments, jnp.broadcast_to(written, (B, new_slots))], axis=1)
    hidden, cache = model(
        embeddings,
        positions,
        segments,
        deepstack=deepstack,
        cache=model.init_cache(B, T + new_slots, embeddings.dtype),
        cache_index=0,
        kv_segments=kv_segments,
    )
    return {
        "cache": cache,
        "kv_segments": kv_segments,
        "logits": _whole_rows(model.logits(hidden[:, -1])),
        "position": next_position,
        "ended": written[:, 0] == 0,
        "slot": jnp.int32(T),
    }


def _whole_rows(logits):
    """Logits [B, V] with the vocabulary whole on each device."""
    if jax.typeof(logits).sharding.mesh.empty:
        return logits
    return jax.sharding.reshard(logits, P(BATCH_AXES, None))


@partial(jax.jit, static_argnames=("graphdef", "rules", "steps"), donate_argnames="state")
def decode_chunk(graphdef, params, state, *, rules: TokenRules, steps: int):
    """Write up to `steps` tokens a row, fewer when all rows end.

    Returns the state, tokens [B, steps] (NOTHING after a row's end) and the digits' logits [B, steps, 5].
    """
    model = nnx.merge(graphdef, params)
    B, V = state["logits"].shape
    allowed = ~np.isin(np.arange(V), rules.banned)

    def unfinished(carry):
        step, state, _, _ = carry
        return (step < steps) & ~state["ended"].all()

    def write(carry):
        step, state, tokens, digits = carry
        logits = state["logits"]
        token = jnp.where(allowed, logits, -jnp.inf).argmax(-1).astype(jnp.int32)
        written = jnp.where(state["ended"], NOTHING, token)
        tokens = jax.lax.dynamic_update_slice(tokens, written[:, None], (0, step))
        of_digits = jnp.stack([logits[:, digit] for digit in rules.digits], axis=-1)
        digits = jax.lax.dynamic_update_slice(digits, of_digits[:, None], (0, step, 0))
        ended = state["ended"]
        for end in rules.ends:
            ended |= token == end
        hidden, cache = model(
            model.language_model.embed_tokens(token[:, None]),
            jnp.broadcast_to(state["position"][None, :, None], (3, B, 1)),
            state["kv_segments"][:, -1:],
            cache=state["cache"],
            cache_index=state["slot"],
            kv_segments=state["kv_segments"],
        )
        state = state | {
            "cache": cache,
            "logits": _whole_rows(model.logits(hidden[:, 0])),
            "position": state["position"] + 1,
            "ended": ended,
            "slot": state["slot"] + 1,
        }
        return step + 1, state, tokens, digits

    tokens = zeros_beside(state["logits"], (B, steps), jnp.int32, BATCH_AXES, None) + NOTHING
    digits = zeros_beside(state["logits"], (B, steps, len(rules.digits)), jnp.float32, BATCH_AXES, None, None)
    _, state, tokens, digits = jax.lax.while_loop(unfinished, write, (jnp.int32(0), state, tokens, digits))
    return state, tokens, digits


@jax.jit
def keep_rows(state, rows):
    """The decoding state of some of its rows.

    rows int32, split as the batch is: which rows each device keeps, counted in its own part of the batch. No device
    gets a row of another, whose keys and values would outweigh the model.
    """
    batched = {name: state[name] for name in ("kv_segments", "logits", "position", "ended")}
    mesh = jax.typeof(rows).sharding.mesh

    def take(batched, cache, rows):
        return {name: x[rows] for name, x in batched.items()}, {name: x[:, rows] for name, x in cache.items()}

    if not mesh.empty:
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (batched, state["cache"], rows))
        take = jax.shard_map(take, mesh=mesh, in_specs=specs, out_specs=specs[:2], check_vma=False)
    batched, cache = take(batched, state["cache"], rows)
    return batched | {"cache": cache, "slot": state["slot"]}


class Decoder:
    """Greedy generation with one model, on its mesh."""

    def __init__(self, model: nnx.Module, rules: TokenRules, *, mesh: Mesh | None = None, max_batch: int = 64):
        self.graphdef, self.params = nnx.split(model)
        self.merge = model.config.vision.spatial_merge_size
        self.rules, self.mesh = rules, mesh
        self.multiple = batch_size(mesh)
        self.max_batch = power_of_two(max(max_batch, 1), self.multiple)

    def generate(self, sequences: list[Sequence], max_new_tokens: int, progress=iter) -> list[Generation]:
        """The model's greedy continuation of each prompt, in the order given.

        Prompts that show the same images go to the same batch, where each distinct image is encoded once.
        `progress` wraps the iterable of batches (a bar, say).
        """
        first: dict[tuple[str, ...], int] = {}
        shown = [tuple(image.digest for image in sequence.images) for sequence in sequences]
        for index, digests in enumerate(shown):
            first.setdefault(digests, index)
        order = sorted(range(len(sequences)), key=lambda index: first[shown[index]])
        results: list[Generation | None] = [None] * len(sequences)
        batches = [order[start : start + self.max_batch] for start in range(0, len(order), self.max_batch)]
        for batch in progress(batches):
            written = self._generate_batch([sequences[index] for index in batch], max_new_tokens)
            for index, generation in zip(batch, written, strict=True):
                results[index] = generation
        return results

    def _generate_batch(self, sequences: list[Sequence], max_new_tokens: int) -> list[Generation]:
        chunks = -(-max_new_tokens // CHUNK)
        with jax.set_mesh(self.mesh) if self.mesh is not None else nullcontext():
            state = self._prefill(sequences, chunks * CHUNK)
            served = np.full(len(state["ended"]), NOTHING)  # which sequence stands in each of the state's rows
            served[: len(sequences)] = np.arange(len(sequences))
            tokens = np.full((len(sequences), chunks * CHUNK), NOTHING, np.int32)
            digits = np.zeros((len(sequences), chunks * CHUNK, len(self.rules.digits)), np.float32)
            for chunk in range(chunks):
                state, new_tokens, new_digits = decode_chunk(
                    self.graphdef, self.params, state, rules=self.rules, steps=CHUNK
                )
                place = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
                new_tokens, new_digits, ended = to_host((new_tokens, new_digits, state["ended"]))
                live = served != NOTHING
                tokens[served[live], place] = new_tokens[live]
                digits[served[live], place] = new_digits[live]
                if ended.all():
                    break
                state, served = self._drop_ended(state, ended, served)
        return [self._trim(*row, max_new_tokens) for row in zip(tokens, digits, strict=True)]

    def _prefill(self, sequences: list[Sequence], new_slots: int):
        table, rows = image_table(sequences, multiple=self.multiple)
        vision, merged = None, 0
        if rows:
            merged = table["patches"].shape[1] // self.merge**2
            vision = encode_images(self.graphdef, self.params, shard_batch(table, self.mesh))
        batch, length = padded(len(sequences), max(map(len, sequences)), self.multiple)
        host = collate(sequences, rows, merged, batch=batch, length=length, side="left")
        following = np.zeros(batch, np.int32)
        following[: len(sequences)] = [sequence.next_position for sequence in sequences]
        arrays = shard_batch(
            {"following": following, **{name: host[name] for name in ("ids", "segments", "image_index")}}, self.mesh
        )
        embeddings, deepstack = embed(self.graphdef, self.params, arrays["ids"], arrays["image_index"], vision)
        return prefill(
            self.graphdef,
            self.params,
            embeddings,
            deepstack,
            shard_positions(host["positions"], self.mesh),
            arrays["segments"],
            arrays["following"],
            new_slots=new_slots,
        )

    def _drop_ended(self, state, ended: np.ndarray, served: np.ndarray):
        """The state and `served` without rows that have `ended`, once every device can halve its part of the batch."""
        ended = ended.reshape(self.multiple, -1)
        size = power_of_two((~ended).sum(1).max())
        if size == ended.shape[1]:
            return state, served
        rows = np.argsort(ended, axis=1, kind="stable")[:, :size]  # ended rows fill the batch
        served = np.take_along_axis(np.where(ended, NOTHING, served.reshape(ended.shape)), rows, axis=1).reshape(-1)
        return keep_rows(state, shard_batch(rows.reshape(-1).astype(np.int32), self.mesh)), served

    def _trim(self, tokens: np.ndarray, digits: np.ndarray, max_new_tokens: int) -> Generation:
        tokens = tokens[:max_new_tokens]
        ends = np.flatnonzero(np.isin(tokens, self.rules.ends))
        length = ends[0] if len(ends) else len(tokens)
        return Generation(tokens[:length], digits[:length], "stop" if len(ends) else "length")


def shard_positions(positions: np.ndarray, mesh: Mesh | None):
    """Positions [3, B, T] on the mesh, B split as a batch is."""
    if mesh is None:
        return jnp.asarray(positions)
    return shard_batch(positions, mesh, axis=1)
