"""The attention function against plain loops, and its kernels as far as a machine without their devices can tell."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from firm_jax.errors import ConfigError
from firm_jax.mesh import make_mesh
from firm_jax.models import attention as module
from firm_jax.models.attention import attention
from firm_jax.models.layers import split_heads

B, S, T, N, K, H = 2, 5, 7, 4, 2, 6


def by_hand(q, k, v, *, segments=None, causal=False, offset=0, positions=None, bias=None, scale=None):
    """One query at a time, in float64."""
    out = np.zeros(q.shape)
    for b, s, n in np.ndindex(q.shape[:3]):
        keys, values = (x[b, :, n * x.shape[2] // q.shape[2]].astype(np.float64) for x in (k, v))
        score = keys @ q[b, s, n] * (q.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            score = score + bias[b % len(bias), n, s]
        seen = np.ones(len(keys), bool)
        if segments is not None:
            seen &= (segments[1][b] == segments[0][b, s]) & (segments[1][b] != 0)
        if causal:
            seen &= np.arange(len(keys)) <= (offset + s if positions is None else positions[b, s])
        if seen.any():
            weights = np.where(seen, np.exp(score - score[seen].max()), 0)
            out[b, s, n] = weights @ values / weights.sum()
    return out


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


@pytest.fixture
def qkv():
    return normal(B, S, N, H), normal(B, T, K, H, seed=1), normal(B, T, K, H, seed=2)


# A query of segment 3 that no key shares, and padding on both sides.
SEGMENTS = (np.array([[1, 1, 2, 3, 0], [2, 2, 2, 0, 0]]), np.array([[1, 2, 2, 1, 0, 0, 1], [2, 2, 0, 0, 0, 0, 0]]))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"scale": 0.7},
        {"causal": True},
        {"segments": SEGMENTS},
        {"segments": SEGMENTS, "causal": True},
        {"segments": SEGMENTS, "causal": True, "offset": 2},
        {"causal": True, "positions": np.array([[6, 0, 3, 3, 5], [1, 2, 3, 4, 5]])},
        {"bias": normal(1, N, S, T, seed=3)},
        {"bias": normal(B, N, S, T, seed=3), "segments": SEGMENTS},
    ],
    ids=lambda given: "+".join(given) or "plain",
)
def test_attention_by_hand(qkv, given):
    np.testing.assert_allclose(attention(*qkv, **given), by_hand(*qkv, **given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "given",
    [{}, {"segments": SEGMENTS, "causal": True, "positions": np.array([[6, 0, 3, 3, 5], [1, 2, 3, 4, 5]])}],
    ids=lambda given: "+".join(given) or "plain",
)
@pytest.mark.parametrize("ends", [[3], [1, 4]])
def test_keys_in_parts_are_one_row_of_keys(qkv, given, ends):
    q, k, v = qkv
    parts = (np.split(x, ends, axis=1) for x in (k, v))
    np.testing.assert_allclose(attention(q, *parts, **given), by_hand(*qkv, **given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "given",
    [{}, {"scale": 0.7}, {"segments": SEGMENTS, "causal": True, "offset": 2}, {"bias": normal(1, N, S, T, seed=3)}],
    ids=lambda given: "+".join(given) or "plain",
)
def test_gradients_by_hand(qkv, given):
    """Along random directions, against differences in float64."""
    toward = normal(B, S, N, H, seed=4)
    gradients = jax.grad(lambda q, k, v: (attention(q, k, v, **given) * toward).sum(), (0, 1, 2))(*qkv)
    for which, gradient in enumerate(gradients):
        direction = normal(*gradient.shape, seed=5 + which)
        ends = []
        for step in (1e-4, -1e-4):
            moved = [x.astype(np.float64) + (step * direction if which == i else 0) for i, x in enumerate(qkv)]
            ends.append((by_hand(*moved, **given) * toward).sum())
        np.testing.assert_allclose((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-4, rtol=1e-3, atol=1e-3)


def test_no_weights_are_kept_for_the_backward_pass(qkv):
    _, pull = jax.vjp(attention, *qkv)
    assert not [leaf for leaf in jax.tree.leaves(pull) if leaf.shape[-2:] == (S, T)]


def test_a_query_that_sees_nothing_is_zero_and_gives_no_gradient(qkv):
    q, k, v = qkv
    out, pull = jax.vjp(lambda q: attention(q, k, v, segments=SEGMENTS), q)
    assert (np.asarray(out)[0, 3:] == 0).all() and (np.asarray(out)[1, 3:] == 0).all()
    [gradient] = pull(jnp.ones_like(out))
    assert np.isfinite(gradient).all() and (np.asarray(gradient)[0, 3:] == 0).all()


def test_bfloat16_keeps_its_softmax_in_float32(qkv):
    half = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    out = attention(*half, scale=20.0, implementation="xla")
    assert out.dtype == jnp.bfloat16
    expected = by_hand(*(np.asarray(x, np.float32) for x in half), scale=20.0)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.02)


def test_an_unknown_implementation_is_named(qkv):
    with pytest.raises(ConfigError, match=r"'flash'.*xla.*cudnn.*splash"):
        attention(*qkv, implementation="flash")


# The kernels. splash runs here in Pallas' interpreter; cuDNN can be lowered but not run.


@pytest.fixture
def interpreted(monkeypatch):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    make = splash.make_splash_mha_single_device
    monkeypatch.setattr(splash, "make_splash_mha_single_device", partial(make, interpret=True))


@pytest.fixture
def with_cudnn(monkeypatch):
    """JAX asks the machine for cuDNN before it lowers a call to it."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)


@pytest.mark.parametrize(
    "given",
    [{}, {"segments": SEGMENTS, "causal": True}, {"segments": SEGMENTS, "causal": True, "offset": 2}],
    ids=["plain", "segments", "behind a cache"],
)
def test_splash_pads_and_masks_like_xla(interpreted, qkv, given):
    half = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    got = attention(*half, implementation="splash", **given)
    expected = attention(*half, implementation="xla", **given)
    assert got.shape == expected.shape and got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=0.03)


def lowered(implementation: str, platform: str, length: int, masked: bool, offset: int = 0) -> tuple[str, list]:
    """The program of attention and its gradient on a mesh of eight, and the types of its outputs.

    offset: there are as many keys more than queries, and attention is causal behind them.
    """
    mesh, types = make_mesh(data=2, fsdp=2, tensor=2), []

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, P(("data", "fsdp"), *spec)))

    def loss(q, k, v, *segments):
        given = {"segments": segments if masked else None, "causal": offset > 0, "offset": offset}
        out = attention(q, k, v, implementation=implementation, **given)
        types.append(jax.typeof(out))
        return out.astype(jnp.float32).sum()

    lengths = (length, length + offset)
    q, k = (array((8, S, N, 64), jnp.bfloat16, None, "tensor") for S, N in zip(lengths, (4, 2), strict=True))
    segments = [array((8, S), jnp.int32) for S in lengths]
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, *segments)
        return traced.lower(lowering_platforms=(platform,)).as_text(), types


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [36, 37])  # an odd length is what SD3's 1024 + 77 + 256 tokens give
def test_cudnn_lowers_for_a_gpu_and_keeps_the_sharding(with_cudnn, length, masked):
    program, types = lowered("cudnn", "cuda", length, masked)
    assert "__cudnn$fmha" in program and "Backward" in program
    [out] = types
    assert out.shape == (8, length, 4, 64) and out.sharding.spec == P(("data", "fsdp"), None, "tensor", None)
    assert ("fmhaScaleBias" in program) == masked  # a mask becomes a bias as large as the scores


@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_masks_behind_a_cache_by_itself_only_from_the_first_key_on(with_cudnn, masked):
    program, _ = lowered("cudnn", "cuda", 37, masked, offset=27)
    assert "fmhaScaleBias" in program and "CAUSAL" not in program


@pytest.mark.parametrize("offset", [0, 27])
@pytest.mark.parametrize("masked", [False, True])
def test_splash_lowers_for_a_tpu_and_keeps_the_sharding(masked, offset):
    program, types = lowered("splash", "tpu", 37, masked, offset)
    assert program.count("tpu_custom_call") >= 2
    [out] = types
    assert out.shape == (8, 37, 4, 64) and out.sharding.spec == P(("data", "fsdp"), None, "tensor", None)


def test_xla_keeps_the_sharding():
    _, [out] = lowered("xla", "cpu", 6, True)
    assert out.sharding.spec == P(("data", "fsdp"), None, "tensor", None)


@pytest.mark.parametrize("keys", [1, 2])
def test_a_batch_of_one_keeps_the_sharding(keys):
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    spec = P(("data", "fsdp"), None, None, None)
    with jax.set_mesh(mesh):
        q, k = (jax.device_put(normal(1, S, heads * 4), jax.NamedSharding(mesh, P(*spec[:3]))) for heads in (2, keys))
        types = []

        def loss(q):
            split = split_heads(q, 2, shared=keys), split_heads(k, keys)
            types.extend(jax.typeof(x) for x in (*split, attention(split[0], split[1], split[1])))
            return attention(split[0], split[1], split[1]).sum()

        gradient = jax.jit(jax.grad(loss))(q)
    assert [kind.sharding.spec[0] for kind in types] == [spec[0]] * 3 and gradient.sharding.spec[0] == spec[0]


@pytest.mark.parametrize(
    "given", [{"bias": normal(1, N, S, T)}, {"causal": True, "positions": np.zeros((B, S), int)}, {}]
)
def test_what_no_kernel_takes_goes_to_xla(qkv, monkeypatch, given):
    monkeypatch.setattr(module, "_sharded", lambda *_: pytest.fail("a kernel was called"))
    dtype = jnp.bfloat16 if given else jnp.float32
    arrays = [jnp.asarray(x, dtype) for x in qkv]
    assert attention(*arrays, implementation="cudnn", **given).shape == (B, S, N, H)
    in_parts = (jnp.split(x.astype(jnp.bfloat16), [2], axis=1) for x in arrays[1:])
    assert attention(arrays[0].astype(jnp.bfloat16), *in_parts, implementation="cudnn").shape == (B, S, N, H)
