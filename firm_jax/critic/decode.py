"""Greedy generation in batches: vision encode, embed and splice, prefill, and decoding in chunks of steps.

What several prompts begin with is read once, in a row of its own, whose keys and values are copied before theirs are
read (see `prefixes`). Every shape comes from a few buckets, so few programs are compiled. What a row reads is padded on
the left; all rows write the same cache slot. Between chunks, rows that have ended are dropped from the batch, so they
stop costing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from firm_jax.critic.prefixes import GROUP, Batch, Stage, plan_batches
from firm_jax.critic.processing import Sequence, collate, image_table
from firm_jax.data.patches import power_of_two
from firm_jax.mesh import BATCH_AXES, batch_size, on_mesh, shard_batch, to_host
from firm_jax.models.layers import split_as, zeros_beside

CHUNK = 16  # decoding steps between two looks at which rows have ended
NOTHING = -1  # stands where a row wrote no token

# From a prompt's number and the tokens written so far, how many of them are all that is wanted, None for more; asked
# between chunks.
Enough = Callable[[int, np.ndarray], int | None]


@dataclass(frozen=True)
class Generation:
    """What the model wrote after one prompt.

    tokens: int32 [T], the end token left out. digit_logits: float32 [T, 5], the logits of the digits 1..5 at each
    token's place. finish_reason: "stop" (an end token came), "length", or "enough" (the caller had what it wanted).
    """

    tokens: np.ndarray
    digit_logits: np.ndarray
    finish_reason: Literal["stop", "length", "enough"]


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


@partial(jax.jit, static_argnames=("slots", "room"))
def copy_prefixes(tables, rows, *, slots: int, room: int):
    """The prefixes that the rows of a batch go on from: {"cache", "kv_segments"}, with `room` free slots in the cache.

    tables: one or more of the same. rows int32, split as the batch is: which row each takes, counted on its own device
    through all the tables; -1 for none. slots: of the prefixes, whose tokens are in the last ones of a table. No device
    gets a row of another.
    """

    def last(x, axis):
        x = jax.lax.slice_in_dim(x, max(x.shape[axis] - slots, 0), x.shape[axis], axis=axis)
        return _with_zeros(x, axis, (slots - x.shape[axis], 0))

    def copy(tables, rows):
        there, rows = rows >= 0, jnp.maximum(rows, 0)
        segments = jnp.concatenate([last(table["kv_segments"], 1) for table in tables])[rows]
        cache = {}
        for name in ("k", "v"):
            every = jnp.concatenate([last(table["cache"][name], 3) for table in tables], axis=1)
            copied = jnp.where(there[:, None, None, None], every[:, rows], 0)
            cache[name] = _with_zeros(copied, 3, (0, room))
        return {"cache": cache, "kv_segments": jnp.where(there[:, None], segments, 0)}

    return _on_each_device(copy, tables[0], tables, rows)


def _with_zeros(x, axis: int, around: tuple[int, int]):
    """x with so many zeros before and behind it along an axis."""
    return jnp.pad(x, [around if dimension == axis else (0, 0) for dimension in range(x.ndim)])


def _on_each_device(function, like, *arguments):
    """`function` of every device's own part of the arguments; the results are split as `like` is."""
    mesh = jax.typeof(jax.tree.leaves(like)[0]).sharding.mesh
    if mesh.empty:
        return function(*arguments)
    given, results = (jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree) for tree in (arguments, like))
    return jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=results, check_vma=False)(*arguments)


@partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def read_prefixes(graphdef, params, embeddings, deepstack, positions, segments, cache, prefix_segments):
    """Read what several prompts begin with, as `prefill` does; returns {"cache", "kv_segments"}."""
    model = nnx.merge(graphdef, params)
    return _read(model, embeddings, deepstack, positions, segments, cache, prefix_segments, 0)[1]


@partial(jax.jit, static_argnames=("graphdef", "new_slots"), donate_argnames="cache")
def prefill(
    graphdef, params, embeddings, deepstack, positions, segments, cache, prefix_segments, following, *, new_slots: int
):
    """Read the prompts behind their prefixes; returns the decoding state, with room for `new_slots` tokens.

    cache, prefix_segments: of `copy_prefixes`, whose room is for the prompts and the new tokens; None where nothing is
    shared. following [B]: the position of the first new token.
    """
    model = nnx.merge(graphdef, params)
    hidden, state = _read(model, embeddings, deepstack, positions, segments, cache, prefix_segments, new_slots)
    return state | {
        "logits": _whole_rows(model.logits(hidden[:, -1])),
        "position": following,
        "ended": segments.max(1) == 0,  # padding of the batch
        "slot": jnp.int32(state["kv_segments"].shape[1] - new_slots),
    }


def _read(model, embeddings, deepstack, positions, segments, cache, prefix_segments, room: int):
    B, T = segments.shape
    written = segments.max(1, keepdims=True)  # 1 where the row is a prompt, 0 where it is padding of the batch
    kv_segments = jnp.concatenate([segments, jnp.broadcast_to(written, (B, room))], axis=1)
    if cache is None:
        cache = model.init_cache(B, T + room, embeddings.dtype)
    else:
        kv_segments = jnp.concatenate([prefix_segments, kv_segments], axis=1)
    start = kv_segments.shape[1] - room - T
    hidden, cache = model(
        embeddings,
        positions,
        segments,
        deepstack=deepstack,
        cache=cache,
        cache_index=start,
        kv_segments=kv_segments,
    )
    return hidden, {"cache": cache, "kv_segments": kv_segments}


def _whole_rows(logits):
    """Logits [B, V] with the vocabulary whole on each device."""
    if jax.typeof(logits).sharding.mesh.empty:
        return logits
    return jax.sharding.reshard(logits, P(BATCH_AXES, None))


@partial(jax.jit, static_argnames=("graphdef", "rules", "steps", "likely"), donate_argnames="state")
def decode_chunk(graphdef, params, state, *, rules: TokenRules, steps: int, likely: int = 0):
    """Write up to `steps` tokens a row, fewer when all rows end.

    Returns the state, tokens [B, steps] (NOTHING after a row's end) and the digits' logits [B, steps, 5]; with
    `likely` also the logarithm of each written token's probability [B, steps], and the ids and logarithms of the
    `likely` most probable tokens at its place, [B, steps, likely] each.
    """
    model = nnx.merge(graphdef, params)
    B, V = state["logits"].shape
    allowed = ~np.isin(np.arange(V), rules.banned)
    cache, start = state["cache"], state["slot"]
    before = jnp.where(jnp.arange(state["kv_segments"].shape[1]) < start, state["kv_segments"], 0)

    def unfinished(carry):
        step, state, *_ = carry
        return (step < steps) & ~state["ended"].all()

    def write(carry):
        step, state, tokens, digits, *logs = carry
        logits = state["logits"]
        token = jnp.where(allowed, logits, -jnp.inf).argmax(-1).astype(jnp.int32)
        written = jnp.where(state["ended"], NOTHING, token)
        tokens = jax.lax.dynamic_update_slice(tokens, written[:, None], (0, step))
        of_digits = split_as(jnp.stack([logits[:, digit] for digit in rules.digits], axis=-1), logits)
        digits = jax.lax.dynamic_update_slice(digits, of_digits[:, None], (0, step, 0))
        if likely:
            every = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
            own = jnp.where(jnp.arange(V) == token[:, None], every, 0).sum(-1, keepdims=True)
            best, ids = jax.lax.top_k(every, likely)
            logs = [
                jax.lax.dynamic_update_slice(log, new, (0, step, 0)[: log.ndim])
                for log, new in zip(logs, (own, ids[:, None], best[:, None]), strict=True)
            ]
        ended = state["ended"]
        for end in rules.ends:
            ended |= token == end
        hidden, recent = model(
            model.language_model.embed_tokens(token[:, None]),
            jnp.broadcast_to(state["position"][None, :, None], (3, B, 1)),
            split_as(state["kv_segments"][:, -1:], token),
            cache=cache,
            cache_index=step,
            kv_segments=before,
            recent=state["recent"],
        )
        state = state | {
            "recent": recent,
            "logits": _whole_rows(model.logits(hidden[:, 0])),
            "position": state["position"] + 1,
            "ended": ended,
        }
        return step + 1, state, tokens, digits, *logs

    tokens = zeros_beside(state["logits"], (B, steps), jnp.int32, BATCH_AXES, None) + NOTHING
    digits = zeros_beside(state["logits"], (B, steps, len(rules.digits)), jnp.float32, BATCH_AXES, None, None)
    logs = []
    if likely:
        logs = [zeros_beside(state["logits"], (B, steps), jnp.float32, BATCH_AXES, None)]
        logs += [
            zeros_beside(state["logits"], (B, steps, likely), dtype, BATCH_AXES, None, None)
            for dtype in (jnp.int32, jnp.float32)
        ]
    written = state | {"recent": model.init_cache(B, steps, model.language_model.embed_tokens.embedding.dtype)}
    del written["cache"]  # only read, since it is large: what is written comes to it at the end
    step, state, *results = jax.lax.while_loop(unfinished, write, (jnp.int32(0), written, tokens, digits, *logs))
    recent = state.pop("recent")
    cache = {
        name: jax.lax.dynamic_update_slice(whole, recent[name], (0, 0, 0, start, 0)) for name, whole in cache.items()
    }
    return state | {"cache": cache, "slot": start + step}, *results


@partial(jax.jit, static_argnames="rules")
def digits_next(logits, *, rules: TokenRules):
    """The digits' logits [B, 5] among those of all tokens [B, V]."""
    return jnp.stack([logits[:, digit] for digit in rules.digits], axis=-1)


@jax.jit
def keep_rows(state, rows):
    """The decoding state of some of its rows.

    rows int32, split as the batch is: which rows each device keeps, counted in its own part of the batch. No device
    gets a row of another, whose keys and values would outweigh the model.
    """
    batched = {name: state[name] for name in ("kv_segments", "logits", "position", "ended")}

    def take(batched, cache, rows):
        return {name: x[rows] for name, x in batched.items()}, {name: x[:, rows] for name, x in cache.items()}

    batched, cache = _on_each_device(take, (batched, state["cache"]), batched, state["cache"], rows)
    return batched | {"cache": cache, "slot": state["slot"]}


class Decoder:
    """Greedy generation with one model, on its mesh."""

    def __init__(self, model: nnx.Module, rules: TokenRules, *, mesh: Mesh | None = None, max_batch: int = 64):
        self.graphdef, self.params = nnx.split(model)
        self.merge = model.config.vision.spatial_merge_size
        self.rules, self.mesh = rules, mesh
        self.multiple = batch_size(mesh)
        self.max_batch = power_of_two(max(max_batch, 1), self.multiple)

    def generate(
        self, sequences: list[Sequence], max_new_tokens: int, progress=iter, enough: Enough | None = None
    ) -> list[Generation]:
        """The model's greedy continuation of each prompt, in the order given.

        Prompts that begin with the same images go to the same batch, or to neighbours, and what they share is read
        once. `progress` wraps the iterable of batches (a bar, say). `enough` ends rows before the model does.
        """
        results: list[Generation | None] = [None] * len(sequences)
        handed: tuple = ()
        with on_mesh(self.mesh):
            for batch in progress(self._planned(sequences)):
                served = _served(batch)
                state, handed = self._prefill(batch, handed, -(-max_new_tokens // CHUNK) * CHUNK)
                asked = enough and (lambda row, tokens, served=served: enough(served[row], tokens))
                written = self._decode(state, batch.own, max_new_tokens, asked)
                for index, generation in zip(served, written, strict=True):
                    results[index] = generation
        return results

    def read_digits(self, sequences: list[Sequence], progress=iter) -> np.ndarray:
        """The logits of the digits 1..5 behind each prompt, float32 [N, 5]; nothing is written."""
        found = np.zeros((len(sequences), len(self.rules.digits)), np.float32)
        handed: tuple = ()
        with on_mesh(self.mesh):
            for batch in progress(self._planned(sequences)):
                state, handed = self._prefill(batch, handed, 0)
                logits = to_host(digits_next(state["logits"], rules=self.rules))
                del state  # its cache is not to be held while the next batch is read
                found[_served(batch)] = logits[[row is not None for row in batch.own.rows]]
        return found

    def _planned(self, sequences: list[Sequence]) -> list[Batch]:
        return plan_batches(sequences, self.multiple, self.max_batch // self.multiple)

    def _decode(self, state, stage: Stage, max_new_tokens: int, enough: Enough | None = None) -> list[Generation]:
        """What the rows of a stage write that are no padding, in their order."""
        chunks = -(-max_new_tokens // CHUNK)
        there = np.array([row is not None for row in stage.rows])
        served = np.where(there, there.cumsum() - 1, NOTHING)  # which result each of the state's rows writes
        tokens = np.full((there.sum(), chunks * CHUNK), NOTHING, np.int32)
        digits = np.zeros((there.sum(), chunks * CHUNK, len(self.rules.digits)), np.float32)
        suffice: dict[int, int] = {}  # results that were ended by `enough`, and their tokens
        for chunk in range(chunks):
            state, new_tokens, new_digits = decode_chunk(
                self.graphdef, self.params, state, rules=self.rules, steps=CHUNK
            )
            place = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            new_tokens, new_digits, ended = to_host((new_tokens, new_digits, state["ended"]))
            live = served != NOTHING
            tokens[served[live], place] = new_tokens[live]
            digits[served[live], place] = new_digits[live]
            for row in served[live & ~ended] if enough else ():
                if (count := enough(int(row), tokens[row, : min(place.stop, max_new_tokens)])) is not None:
                    suffice[int(row)] = count
            # A row that was ended here goes on writing in the state, for nobody, until it is dropped.
            served = np.where(np.isin(served, list(suffice)), NOTHING, served)
            ended = ended | (served == NOTHING)
            if ended.all():
                break
            state, served = self._drop_ended(state, ended, served)
        return [
            self._trim(*written, suffice.get(row), max_new_tokens)
            for row, written in enumerate(zip(tokens, digits, strict=True))
        ]

    def _prefill(self, batch: Batch, handed: tuple, new_slots: int) -> tuple[dict, tuple]:
        """The decoding state of a batch, and those of its tables of prefixes that are for the next one.

        handed: what the batch before returned as the latter.
        """
        tables = before = kept = ()
        slots = 0
        for level, stage in batch.prefixes.items():
            before, tables = tables, handed if level == GROUP else ()
            if stage.parents.size:
                given = self._given(stage, before, slots, room=0)
                tables += (read_prefixes(self.graphdef, self.params, *given),)
            slots += stage.length
            if level == GROUP and batch.kept.size:
                kept = (copy_prefixes(tables, self._rows(batch.kept), slots=slots, room=0),)
        given = self._given(batch.own, tables, slots, room=new_slots)
        tables = before = ()  # all copied, and not to be held while the prompts are read
        following = np.array([0 if row is None else row.next_position for row in batch.own.rows], np.int32)
        following = shard_batch(following, self.mesh)
        return prefill(self.graphdef, self.params, *given, following, new_slots=new_slots), kept

    def _given(self, stage: Stage, tables: tuple, slots: int, *, room: int) -> tuple:
        """What reading a stage takes: embeddings, DeepStack features, positions, segments, and the prefixes' copies."""
        rows = stage.rows
        table, place = image_table(rows, multiple=self.multiple)
        vision, merged = None, 0
        if place:
            merged = table["patches"].shape[1] // self.merge**2
            vision = encode_images(self.graphdef, self.params, shard_batch(table, self.mesh))
        host = collate(rows, place, merged, batch=len(rows), length=stage.length, side="left")
        arrays = shard_batch({name: host[name] for name in ("ids", "segments", "image_index")}, self.mesh)
        read = embed(self.graphdef, self.params, arrays["ids"], arrays["image_index"], vision)
        prefixes = {"cache": None, "kv_segments": None}
        if (stage.parents >= 0).any():
            prefixes = copy_prefixes(tables, self._rows(stage.parents), slots=slots, room=stage.length + room)
        positions = shard_positions(host["positions"], self.mesh)
        return *read, positions, arrays["segments"], prefixes["cache"], prefixes["kv_segments"]

    def _rows(self, numbers: np.ndarray):
        """Numbers [parts of the mesh, rows] on the mesh, each part's on its own devices."""
        return shard_batch(numbers.reshape(-1), self.mesh)

    def _drop_ended(self, state, ended: np.ndarray, served: np.ndarray):
        """The state and `served` without rows that have `ended`, once every device can halve its part of the batch."""
        ended = ended.reshape(self.multiple, -1)
        size = power_of_two((~ended).sum(1).max())
        if size == ended.shape[1]:
            return state, served
        rows = np.argsort(ended, axis=1, kind="stable")[:, :size]  # ended rows fill the batch
        served = np.take_along_axis(np.where(ended, NOTHING, served.reshape(ended.shape)), rows, axis=1).reshape(-1)
        return keep_rows(state, self._rows(rows.astype(np.int32))), served

    def _trim(self, tokens: np.ndarray, digits: np.ndarray, suffice: int | None, max_new_tokens: int) -> Generation:
        if suffice is not None:
            return Generation(tokens[:suffice], digits[:suffice], "enough")
        tokens = tokens[:max_new_tokens]
        ends = np.flatnonzero(np.isin(tokens, self.rules.ends))
        length = ends[0] if len(ends) else len(tokens)
        return Generation(tokens[:length], digits[:length], "stop" if len(ends) else "length")


def _served(batch: Batch) -> list[int]:
    """The numbers of a batch's requests, in the order of its rows."""
    return [index for own in batch.requests for index in own]


def shard_positions(positions: np.ndarray, mesh: Mesh | None):
    """Positions [3, B, T] on the mesh, B split as a batch is."""
    if mesh is None:
        return jnp.asarray(positions)
    return shard_batch(positions, mesh, axis=1)
