"""Qwen3-VL without PyTorch: configs, rotary layout, cache, sharding."""

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from firm_jax.errors import ConfigError
from firm_jax.mesh import make_mesh, shard_batch
from firm_jax.models import abstract
from firm_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig
from firm_jax.models.qwen3_vl_vision import axial_angles, interpolation_taps, patch_coordinates
from firm_jax.sharding import shardings

# As in a released config.json of transformers 4: rotary fields apart, no rotary fields in the vision tower.
RAW = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 60,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 61,
        "dtype": "bfloat16",
        "eos_token_id": 62,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
        "rope_theta": 5000000,
        "use_cache": True,
        "vocab_size": 64,
    },
    "tie_word_embeddings": False,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 59,
    "vision_config": {
        "deepstack_visual_indexes": [0, 2],
        "depth": 4,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 16,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "model_type": "qwen3_vl",
        "num_heads": 2,
        "num_position_embeddings": 25,
        "out_hidden_size": 32,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 58,
    "vision_start_token_id": 57,
}
BATCH, LENGTH, BUCKET = 4, 12, 16


def changed(section, **fields):
    raw = copy.deepcopy(RAW)
    (raw[section] if section else raw).update(fields)
    return raw


@pytest.fixture(scope="module")
def model():
    graphdef, shapes = nnx.split(abstract(Qwen3VL, Qwen3VLConfig.from_hf(RAW)))
    rng = np.random.default_rng(0)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), shapes))


@pytest.fixture(scope="module")
def inputs():
    """Four sequences, each with one image of its own in the middle of its text; the last one is shorter."""
    rng = np.random.default_rng(1)
    grids = np.array([(4, 4), (2, 4), (2, 6), (4, 2)], np.int32)
    index = np.full((BATCH, LENGTH), -1, np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (3, BATCH, 1))
    for row, (height, width) in enumerate(grids // 2):
        count = height * width
        index[row, 3 : 3 + count] = row * BUCKET // 4 + np.arange(count)
        places = np.stack([np.zeros(count), np.arange(count) // width, np.arange(count) % width])
        positions[:, row, 3 : 3 + count] = 3 + places
        positions[:, row, 3 + count :] += max(height, width) - count
    segments = np.ones((BATCH, LENGTH), np.int32)
    segments[-1, 9:] = 0
    return {
        "patches": rng.normal(size=(BATCH, BUCKET, 24)).astype(np.float32),
        "grids": grids,
        "ids": rng.integers(0, 57, size=(BATCH, LENGTH)),
        "index": index,
        "positions": positions,
        "segments": segments,
    }


@jax.jit
def embedded(model, inputs):
    features = model.encode_images(inputs["patches"], inputs["grids"])
    return model.splice(inputs["ids"], *features, inputs["index"])


@jax.jit
def whole(model, inputs):
    """Logits without a cache."""
    embeddings, deepstack = embedded(model, inputs)
    hidden, _ = model(embeddings, inputs["positions"], inputs["segments"], deepstack=deepstack)
    return model.logits(hidden)


@partial(jax.jit, static_argnames=("chunks", "recent"))
def through_cache(model, inputs, chunks, recent=False):
    """Logits, computed in chunks of these lengths through a cache with slots to spare.

    recent: all chunks but the first are written into a second cache.
    """
    embeddings, deepstack = embedded(model, inputs)
    cache = model.init_cache(BATCH, LENGTH + 5, jnp.float32)
    kv_segments = jnp.pad(inputs["segments"], ((0, 0), (0, 5)))
    if recent:
        kv_segments = jnp.where(jnp.arange(LENGTH + 5) < chunks[0], kv_segments, 0)
    logits, start, second = [], 0, None
    for length in chunks:
        part = slice(start, start + length)
        tokens = embeddings[:, part], inputs["positions"][:, :, part], inputs["segments"][:, part]
        rest = {"deepstack": deepstack[:, :, part], "cache": cache, "kv_segments": kv_segments}
        if recent and start:
            second = second or model.init_cache(BATCH, LENGTH, jnp.float32)
            index = jnp.int32(start - chunks[0])
            hidden, second = model(*tokens, **rest, cache_index=index, recent=second)
        else:
            hidden, cache = model(*tokens, **rest, cache_index=start if start == 0 else jnp.int32(start))
        logits.append(model.logits(hidden))
        start += length
    return jnp.concatenate(logits, axis=1)


def real(array, inputs):
    """The entries of [B, T, ...] that are no padding."""
    return np.asarray(array)[inputs["segments"] == 1]


@pytest.mark.parametrize("chunks", [(LENGTH,), (5, 6, 1)], ids=["at once", "in chunks that cut the images"])
def test_a_cache_changes_nothing(model, inputs, chunks):
    cached = through_cache(model, inputs, chunks)
    np.testing.assert_allclose(real(cached, inputs), real(whole(model, inputs), inputs), rtol=1e-4, atol=1e-5)


def test_a_second_cache_behind_the_first_changes_nothing(model, inputs):
    chunks = (LENGTH - 3, 1, 1, 1)
    cached = through_cache(model, inputs, chunks, recent=True)
    np.testing.assert_allclose(real(cached, inputs), real(whole(model, inputs), inputs), rtol=1e-4, atol=1e-5)


def test_unwritten_slots_are_not_seen(model, inputs):
    """What lies in cache slots beyond the newest token has no influence, whatever kv_segments says of them."""
    embeddings, _ = embedded(model, inputs)
    kv_segments = jnp.ones((BATCH, 9), jnp.int32)

    @jax.jit
    def prefill(cache):
        part = (embeddings[:, :6], inputs["positions"][:, :, :6], inputs["segments"][:, :6])
        return model(*part, cache=cache, cache_index=jnp.int32(0), kv_segments=kv_segments)[0]

    empty = model.init_cache(BATCH, 9, jnp.float32)
    dirty = jax.tree.map(lambda x: x.at[:, :, :, 6:].set(7.0), empty)
    np.testing.assert_array_equal(prefill(empty), prefill(dirty))


def test_packed_sequences_do_not_see_each_other(model, inputs):
    """Two sequences in one row, by segments 1 and 2, give the logits of each alone."""
    embeddings, deepstack = embedded(model, inputs)
    positions, rows = inputs["positions"], slice(0, 2)

    def packed(x, axis):
        first, second = jnp.split(x, 2, axis=axis)
        return jnp.concatenate([first, second], axis=axis + 1)

    segments = jnp.concatenate([jnp.full((1, LENGTH), 1), jnp.full((1, LENGTH), 2)], axis=1)
    hidden, _ = model(
        packed(embeddings[rows], 0), packed(positions[:, rows], 1), segments, deepstack=packed(deepstack[:, rows], 1)
    )
    together = model.logits(hidden).reshape(2, LENGTH, -1)
    np.testing.assert_allclose(together, whole(model, inputs)[rows], rtol=1e-4, atol=1e-5)


def test_images_enter_by_both_ways(model, inputs):
    """Image features replace embeddings, and DeepStack adds to the hidden states at images only."""
    embeddings, deepstack = embedded(model, inputs)
    image = inputs["index"] >= 0
    text = model.language_model.embed_tokens(inputs["ids"])
    np.testing.assert_array_equal(embeddings[~image], text[~image])
    assert np.abs(embeddings[image] - text[image]).min(-1).max() > 0
    assert not np.asarray(deepstack)[:, ~image].any()
    assert np.asarray(deepstack)[:, image].any(-1).all()
    without, _ = model(embeddings, inputs["positions"], inputs["segments"])
    assert np.abs(model.logits(without) - whole(model, inputs)).max() > 1e-2


def test_gradient_through_rematerialised_layers(model, inputs):
    """Every parameter has a gradient, and the loss falls along it as fast as it says."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def gradient(params):
        def loss(params):
            model = nnx.merge(graphdef, params)
            features = model.encode_images(inputs["patches"], inputs["grids"], remat="full")
            embeddings, deepstack = model.splice(inputs["ids"], *features, inputs["index"])
            hidden, _ = model(embeddings, inputs["positions"], inputs["segments"], deepstack=deepstack, remat="full")
            return jnp.square(model.logits(hidden)).mean()

        return jax.grad(loss)(params)

    slope = gradient(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slope))
    length = np.sqrt(sum(float(jnp.square(leaf).sum()) for leaf in jax.tree.leaves(slope)))

    def loss_at(distance):
        moved = jax.tree.map(lambda p, s: p + distance / length * s, params, slope)
        return float(jnp.square(whole(nnx.merge(graphdef, moved), inputs)).mean())

    np.testing.assert_allclose((loss_at(1e-2) - loss_at(-1e-2)) / 2e-2, length, rtol=1e-2)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)], ids=["key heads divide", "key heads do not divide"])
def test_sharded_equals_unsharded(model, inputs, sizes):
    mesh = make_mesh(*sizes)
    graphdef, params = nnx.split(model)
    params = jax.device_put(params, shardings(params, Qwen3VL.sharding_rules, mesh))
    kernel = params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"][...]
    assert kernel.addressable_shards[0].data.size == kernel.size // (sizes[1] * sizes[2])
    on_mesh = {name: shard_batch(value, mesh, axis=int(name == "positions")) for name, value in inputs.items()}
    with jax.set_mesh(mesh):
        logits = through_cache(nnx.merge(graphdef, params), on_mesh, (5, 6, 1))
    np.testing.assert_allclose(real(logits, inputs), real(whole(model, inputs), inputs), rtol=1e-4, atol=1e-5)


def test_rotary_axes_interleave():
    """24 + 20 + 20 frequencies: T H W repeated for as long as H and W last, T alone after that."""
    text = changed("text_config", head_dim=128, rope_scaling={"mrope_section": [24, 20, 20]})
    axes = Qwen3VLConfig.from_hf(text).text.rotary_axes
    assert "".join("THW"[axis] for axis in axes) == "THW" * 20 + "TTTT"


def test_patches_are_in_merge_block_order():
    row, column, real = patch_coordinates(jnp.array([[2, 4], [4, 2], [0, 0]]), 12, merge=2)
    assert [*zip(row[0, :8].tolist(), column[0, :8].tolist(), strict=True)] == [
        *[(0, 0), (0, 1), (1, 0), (1, 1)],
        *[(0, 2), (0, 3), (1, 2), (1, 3)],
    ]
    assert [*zip(row[1, 4:8].tolist(), column[1, 4:8].tolist(), strict=True)] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert real.sum(-1).tolist() == [8, 8, 0]


def test_position_table_is_stretched_to_its_corners():
    taps, weights = interpolation_taps(jnp.arange(4), 4, side=7)
    places = (taps * weights).sum(-1)
    np.testing.assert_allclose(places, [0, 2, 4, 6])
    taps, weights = interpolation_taps(jnp.arange(5), 5, side=3)
    np.testing.assert_allclose((taps * weights).sum(-1), [0, 0.5, 1, 1.5, 2])
    taps, weights = interpolation_taps(jnp.zeros(1), 1, side=3)
    assert (taps * weights).sum() == 0


def test_axial_angles_turn_with_row_then_column():
    angles = axial_angles(jnp.array([[3]]), jnp.array([[5]]), head_dim=8, theta=100.0)
    np.testing.assert_allclose(angles[0, 0], [3, 0.3, 5, 0.5], rtol=1e-6)


def test_config_survives_a_round_trip():
    config = Qwen3VLConfig.from_hf(RAW)
    assert Qwen3VLConfig.from_hf(config.to_hf()) == config
    assert (config.text.rope_theta, config.image_token_id, config.text.mrope_section) == (5e6, 60, (4, 2, 2))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed("text_config", sliding_window=4), "sliding_window"),
        (changed("text_config", hidden_act="gelu"), "hidden_act"),
        (changed("text_config", attention_bias=True), "attention_bias"),
        (changed("text_config", rope_theta=None), "rope_theta"),
        (changed("text_config", rope_scaling={"mrope_section": [2, 3, 3]}), "mrope_section"),
        (changed("text_config", rope_scaling={"mrope_section": [4, 2, 2], "rope_type": "yarn"}), "rope_type"),
        (changed("text_config", rope_scaling={"mrope_section": [4, 2, 2], "mrope_interleaved": False}), "interleaved"),
        (changed("text_config", num_key_value_heads=3), "num_key_value_heads"),
        (changed("vision_config", hidden_act="gelu"), "hidden_act"),
        (changed("vision_config", deepstack_visual_indexes=[2, 0]), "deepstack_visual_indexes"),
        (changed("vision_config", deepstack_visual_indexes=[1, 4]), "deepstack_visual_indexes"),
        (changed("vision_config", num_position_embeddings=24), "num_position_embeddings"),
        (changed("vision_config", out_hidden_size=40), "out_hidden_size"),
        (changed("vision_config", depth=None), "depth"),
        (changed(None, quantization_config={"bits": 4}), "quantization_config"),
    ],
)
def test_unsupported_configs_are_named(raw, message):
    with pytest.raises(ConfigError, match=message):
        Qwen3VLConfig.from_hf(raw)
