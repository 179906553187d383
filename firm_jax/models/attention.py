"""One attention function for every network, with three implementations: `xla`, `cudnn` (GPU), `splash` (TPU).

Kernels always run inside `jax.shard_map`, batch and heads split, sequence and head width whole: a bare cuDNN call
under an Explicit mesh would silently lose its batch sharding. Masks are segment ids: a query sees the keys of its
own segment, and segment 0 is padding that nobody sees.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from firm_jax.errors import ConfigError

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
_BLOCK = 128  # splash: lengths are padded to a multiple of this


def default_implementation() -> str:
    """`cudnn` on a CUDA GPU, `splash` on a TPU, `xla` elsewhere."""
    return {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "xla")


def attention(
    q,
    k,
    v,
    *,
    segments=None,
    causal: bool = False,
    positions=None,
    bias=None,
    scale=None,
    implementation=None,
):
    """Softmax attention, softmax in float32.

    q [B, S, N, H]; k, v [B, T, K, H] with N a multiple of K (grouped heads). `segments`: None, or a pair of int
    arrays ([B, S], [B, T]); 0 marks padding. `causal`: a query sees keys whose index is not above its own;
    `positions` [B, S] gives the queries' indices when they are not 0..S-1 (decoding against a cache). `bias`
    [1 or B, N, S, T] is added to the scores. `scale` defaults to H ** -0.5. Returns [B, S, N, H].

    A query that sees no key at all returns zeros under every implementation. `bias`, `positions` and float32
    inputs are served by `xla` whatever is asked for: no kernel takes them.
    """
    implementation = implementation or default_implementation()
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"unknown attention implementation {implementation!r}; choose from {IMPLEMENTATIONS}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "xla" or bias is not None or positions is not None or q.dtype == jnp.float32:
        return _xla(q, k, v, segments, causal, positions, bias, scale)
    kernel = {"cudnn": _cudnn, "splash": _splash}[implementation]
    return _sharded(kernel, q, k, v, segments, causal, scale)


def _xla(q, k, v, segments, causal, positions, bias, scale):
    B, S, N, H = q.shape
    T, K = k.shape[1:3]
    grouped = q.reshape(B, S, K, N // K, H)
    scores = jnp.einsum("BSKGH,BTKH->BKGST", grouped, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], K, N // K, S, T).astype(jnp.float32)
    seen = visible(segments, causal, positions, S, T)
    if seen is not None:
        seen = seen[:, None, None]
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    out = jnp.einsum("BKGST,BTKH->BSKGH", weights.astype(v.dtype), v)
    return out.reshape(B, S, N, H)


def visible(segments, causal: bool, positions, S: int, T: int):
    """Which keys each query sees, bool [1 or B, S, T]; None when all."""
    seen = None
    if segments is not None:
        q_segments, kv_segments = segments
        seen = (q_segments[:, :, None] == kv_segments[:, None, :]) & (kv_segments != 0)[:, None, :]
    if causal:
        index = jnp.arange(S)[None] if positions is None else positions
        below = jnp.arange(T)[None, None, :] <= index[:, :, None]
        seen = below if seen is None else seen & below
    return seen


def _sharded(kernel, q, k, v, segments, causal, scale):
    mesh = jax.typeof(q).sharding.mesh
    if segments is None:
        segments = (jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32))

    def local(q, k, v, q_segments, kv_segments):
        return kernel(q, k, v, q_segments, kv_segments, causal, scale)

    if mesh.empty:
        return local(q, k, v, *segments)
    batch, _, heads, _ = (tuple(jax.typeof(q).sharding.spec) + (None,) * 4)[:4]
    wide = P(batch, None, heads, None)
    segments = tuple(jax.sharding.reshard(s, P(batch, None)) for s in segments)
    k, v = (jax.sharding.reshard(x, wide) for x in (k, v))
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(wide, wide, wide, P(batch, None), P(batch, None)),
        out_specs=wide,
        check_vma=False,
    )
    return run(q, k, v, *segments)


def _cudnn(q, k, v, q_segments, kv_segments, causal, scale):
    mask = visible((q_segments, kv_segments), False, None, q.shape[1], k.shape[1])[:, None]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, scale=scale, implementation="cudnn")
    return jnp.where((q_segments != 0)[:, :, None, None], out, 0)


def _splash(q, k, v, q_segments, kv_segments, causal, scale):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    S, T, N = q.shape[1], k.shape[1], q.shape[2]
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))

    def pad(x, length):
        return jnp.pad(x, [(0, 0), (0, -length % _BLOCK)] + [(0, 0)] * (x.ndim - 2))

    q, k, v = pad(q * jnp.asarray(scale, q.dtype), S), pad(k, T), pad(v, T)
    ids = splash.SegmentIds(q=pad(q_segments, S), kv=pad(kv_segments, T))
    shape = (q.shape[1], k.shape[1])
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    kernel = splash.make_splash_mha_single_device(masks.MultiHeadMask([mask] * N))
    heads_first = [x.swapaxes(1, 2) for x in (q, k, v)]
    out = jax.vmap(kernel)(*heads_first, segment_ids=ids).swapaxes(1, 2)[:, :S]
    return jnp.where((q_segments != 0)[:, :, None, None], out, 0)
