"""One attention function for every network, with three implementations: `xla`, `cudnn` (GPU), `splash` (TPU).

Kernels always run inside `jax.shard_map`, batch and heads split, sequence and head width whole: a bare cuDNN call
under an Explicit mesh would silently lose its batch sharding. Masks are segment ids: a query sees the keys of its
own segment, and segment 0 is padding that nobody sees.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from firm_jax.errors import ConfigError
from firm_jax.models.layers import group_heads, join_heads, platform

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
_BLOCK = 128  # splash: lengths are padded to a multiple of this
_UNSEEN = float(jnp.finfo(jnp.float32).min)  # the score of a key that is not seen; no other comes near it


def default_implementation(x) -> str:
    """`cudnn` on a CUDA GPU, `splash` on a TPU, `xla` elsewhere: on the platform of x (`layers.platform`)."""
    return {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform(x), "xla")


def attention(
    q,
    k,
    v,
    *,
    segments=None,
    causal: bool = False,
    offset: int = 0,
    positions=None,
    bias=None,
    scale=None,
    implementation=None,
):
    """Softmax attention, softmax in float32.

    q [B, S, N, H]; k, v [B, T, K, H] with N a multiple of K (grouped heads), or each a list of parts, which stand
    behind one another and are multiplied where they lie. `segments`: None, or a pair of int
    arrays ([B, S], [B, T]); 0 marks padding. `causal`: a query sees keys whose index is not above its own, which is
    `offset` for the first query (reading on behind a cache); `positions` [B, S] gives the queries' indices when they
    are not in a row, or not known to the program (decoding). `bias` [1 or B, N, S, T] is added to the scores. `scale`
    defaults to H ** -0.5. Returns [B, S, N, H].

    A query that sees no key at all returns zeros under every implementation. `bias`, `positions`, parts and float32
    inputs are served by `xla` whatever is asked for: no kernel takes them; cuDNN neither a head width H that is no
    multiple of 8.
    """
    implementation = implementation or default_implementation(q)
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"unknown attention implementation {implementation!r}; choose from {IMPLEMENTATIONS}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "cudnn" and q.shape[-1] % 8:
        implementation = "xla"
    parts = isinstance(k, list)
    if implementation == "xla" or bias is not None or positions is not None or parts or q.dtype == jnp.float32:
        positions = _places(q, offset) if positions is None else positions
        return _xla(q, k, v, segments, causal, positions, bias, scale)
    kernel = {"cudnn": _cudnn, "splash": _splash}[implementation]
    return _sharded(kernel, q, k, v, segments, causal, offset, scale)


def _xla(q, k, v, segments, causal, positions, bias, scale):
    k, v = (x if isinstance(x, list) else [x] for x in (k, v))
    S, N = q.shape[1:3]
    K, T = k[0].shape[2], sum(part.shape[1] for part in k)
    q = _scaled(q, scale)
    # Heads first, and said so: left to itself, XLA on a CPU multiplies by keys and values in the wrong order of memory,
    # which takes up to twice as long.
    q, k, v = jax.tree.map(lambda x: jnp.moveaxis(x, 1, -2), (group_heads(q, K), k, v))
    # Nor is a group of one a dimension in float32, where its copies cost a tenth. bfloat16 products need it: without,
    # they are made of operands converted to float32.
    alone = N == K and q.dtype == jnp.float32
    if alone:
        q = q[:, :, 0]
    seen = visible(segments, positions if causal else None, T)
    if seen is not None:
        seen = jnp.expand_dims(seen, (1,) if alone else (1, 2))
    if bias is None and len(k) == 1:
        out = _remade(q, *k, *v, seen)
    else:
        bias = bias if bias is None or alone else bias.reshape(bias.shape[0], K, N // K, S, T)
        out, _ = _attend(q, k, v, seen, bias)
    if alone:
        out = out[:, :, None]
    return join_heads(jnp.moveaxis(out, -2, 1))


def _scaled(q, scale):
    return (q.astype(jnp.float32) * scale).astype(q.dtype)


def _attend(q, k, v, seen, bias=None):
    """q [B, K, G, S, H] with the scale in it, parts of k and v [B, K, T, H], seen [1 or B, 1, 1, S, T] -> what is read,
    as q, and the logarithm of each query's sum of exponentials, float32 [B, K, G, S, 1], infinite if it sees nothing.

    Without G in q, there is none in the others. The sums divide what is read and not the weights, which are many more.
    """
    scores = _scores(q, k, seen, bias)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    ends = np.cumsum([part.shape[2] for part in v])
    read = sum(
        _mixed("BK...ST,BKTH->BK...SH", own, part, jnp.float32)
        for own, part in zip(jnp.split(weights.astype(q.dtype), ends[:-1], axis=-1), v, strict=True)
    )
    sees = largest > _UNSEEN
    return jnp.where(sees, read / total, 0.0).astype(q.dtype), jnp.where(sees, largest + jnp.log(total), jnp.inf)


def _scores(q, k, seen, bias=None):
    scores = jnp.concatenate([_mixed("BK...SH,BKTH->BK...ST", q, part, jnp.float32) for part in k], axis=-1)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    return scores if seen is None else jnp.where(seen, scores, _UNSEEN)


def _mixed(equation: str, a, b, dtype):
    """A product whose sums are float32, in `dtype`."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32).astype(dtype)


@jax.custom_vjp
def _remade(q, k, v, seen):
    """`_attend` whose backward pass makes the weights again from the sums, as the kernels do: kept, those of all layers
    would be most of what an update holds, and moving them costs more than another product."""
    return _attend(q, [k], [v], seen)[0]


def _remade_forward(q, k, v, seen):
    out, log_total = _attend(q, [k], [v], seen)
    return out, (q, k, v, seen, out, log_total)


def _remade_backward(kept, d_out):
    q, k, v, seen, out, log_total = kept
    weights = jnp.exp(_scores(q, [k], seen) - log_total)
    d_weights = _mixed("BK...SH,BKTH->BK...ST", d_out, v, jnp.float32)
    along = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_scores = (weights * (d_weights - along)).astype(q.dtype)
    d_q = _mixed("BK...ST,BKTH->BK...SH", d_scores, k, q.dtype)
    summed = "BKGST,BKGSH->BKTH" if q.ndim == 5 else "BKST,BKSH->BKTH"
    d_k = _mixed(summed, d_scores, q, k.dtype)
    d_v = _mixed(summed, weights.astype(v.dtype), d_out, v.dtype)
    return d_q, d_k, d_v, None


_remade.defvjp(_remade_forward, _remade_backward)


def visible(segments, positions, T: int):
    """Which of T keys each query sees, bool [1 or B, S, T]; None when all.

    positions [1 or B, S]: the last key that each may see; None where nothing is causal.
    """
    seen = None
    if segments is not None:
        q_segments, kv_segments = segments
        seen = (q_segments[:, :, None] == kv_segments[:, None, :]) & (kv_segments != 0)[:, None, :]
    if positions is not None:
        below = jnp.arange(T)[None, None, :] <= positions[:, :, None]
        seen = below if seen is None else seen & below
    return seen


def _sharded(kernel, q, k, v, segments, causal, offset, scale):
    """The kernel on each device's own batch and heads; zeros where a query sees nothing, whatever it makes of that."""
    mesh = jax.typeof(q).sharding.mesh

    def local(q, k, v, segments):
        out = kernel(q, k, v, segments, causal, offset, scale)
        if segments is None:
            return out
        sees = visible(segments, _places(q, offset) if causal else None, k.shape[1]).any(-1)
        return jnp.where(sees[:, :, None, None], out, 0)

    if mesh.empty:
        return local(q, k, v, segments)
    batch, _, heads, _ = (tuple(jax.typeof(q).sharding.spec) + (None,) * 4)[:4]
    wide, flat = P(batch, None, heads, None), P(batch, None)
    q, k, v = (jax.sharding.reshard(x, wide) for x in (q, k, v))
    segments = jax.tree.map(lambda ids: jax.sharding.reshard(ids, flat), segments)
    return jax.shard_map(local, mesh=mesh, in_specs=(wide, wide, wide, flat), out_specs=wide, check_vma=False)(
        q, k, v, segments
    )


def _places(q, offset: int):
    """The queries' indices [1, S], in a row from `offset` on."""
    return offset + jnp.arange(q.shape[1])[None]


def _pad(x, multiple: int):
    """x [B, S, ...] with zeros behind, S a multiple; in segment ids, zeros are padding."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


def _cudnn(q, k, v, segments, causal, offset, scale):
    B, S, T = *q.shape[:2], k.shape[1]
    q, k, v = (_pad(x, 2) for x in (q, k, v))  # its backward pass takes even lengths only
    shifted = causal and offset > 0  # its own causal mask begins with the first key
    if segments is not None or shifted:
        # A mask becomes a bias as large as the scores: only where there is something to mask.
        segments = segments and [_pad(ids, 2) for ids in segments]
        given = {"mask": visible(segments, _places(q, offset) if shifted else None, k.shape[1])[:, None]}
    elif S % 2 or T % 2:
        given = {"query_seq_lengths": jnp.full(B, S, jnp.int32), "key_value_seq_lengths": jnp.full(B, T, jnp.int32)}
    else:
        given = {}
    own = causal and not shifted
    out = jax.nn.dot_product_attention(q, k, v, is_causal=own, scale=scale, implementation="cudnn", **given)
    return out[:, :S]


def _splash(q, k, v, segments, causal, offset, scale):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    S, N = q.shape[1:3]
    if segments is None:
        segments = (jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32))
    q = _scaled(q, scale)
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    q, k, v, *segments = (_pad(x, _BLOCK) for x in (q, k, v, *segments))
    shape = (q.shape[1], k.shape[1])
    mask = masks.CausalMask(shape, offset) if causal else masks.FullMask(shape)
    kernel = splash.make_splash_mha_single_device(masks.MultiHeadMask([mask] * N))
    heads_first = [x.swapaxes(1, 2) for x in (q, k, v)]
    return jax.vmap(kernel)(*heads_first, segment_ids=splash.SegmentIds(*segments)).swapaxes(1, 2)[:, :S]
