"""Our counts of operations against XLA's, on networks whose layers run once, so that its count is whole.

XLA also counts norms, activations and embeddings, which the wide layers here keep below the tolerance.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from firm_jax import profiling
from firm_jax.critic.sft import Throughput, sft_sums
from firm_jax.critic.sft_flops import step_flops
from firm_jax.critic.tuning import PARTS, Tuning
from firm_jax.models import abstract
from firm_jax.models.clip import CLIPTextConfig, CLIPTextModel
from firm_jax.models.lora import LoraConfig, init_lora
from firm_jax.models.qwen2_5_vl import Qwen2_5VL, Qwen2_5VLConfig
from firm_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig
from firm_jax.models.qwen_image import QwenImageConfig, QwenImageTransformer, Sources
from firm_jax.models.sd3 import SD3Config, SD3Transformer
from firm_jax.models.t5 import T5Config, T5Encoder
from firm_jax.models.vae_kl import AutoencoderKL, AutoencoderKLConfig
from firm_jax.models.vae_qwen_image import AutoencoderKLQwenImage, AutoencoderKLQwenImageConfig
from firm_jax.published import PIPELINES, QWEN3_VL

SD3 = SD3Config(
    num_layers=3,
    attention_head_dim=64,
    num_attention_heads=4,
    joint_attention_dim=96,
    caption_projection_dim=256,
    pooled_projection_dim=32,
    pos_embed_max_size=32,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)


QWEN_IMAGE = QwenImageConfig(
    in_channels=16,
    out_channels=4,
    num_layers=1,
    attention_head_dim=64,
    num_attention_heads=4,
    joint_attention_dim=96,
    axes_dims_rope=(8, 28, 28),
    zero_cond_t=True,
)


def shapes(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def xla_flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def parts(network, config):
    """`call(method)(params, ...)` and the parameters' shapes."""
    graphdef, params = nnx.split(abstract(network, config))

    def call(method):
        return lambda params, *given: getattr(nnx.merge(graphdef, params), method)(*given)

    return call, params


def sd3_arguments(side: int, tokens: int):
    return shapes(1, 2 * side, 2 * side, 16), shapes(1), shapes(1, tokens, 96), shapes(1, 32)


def test_sd3_forward():
    call, params = parts(SD3Transformer, SD3)
    counted = xla_flops(call("__call__"), params, *sd3_arguments(24, 40))
    assert SD3.forward_flops(24 * 24, 40) == pytest.approx(counted, rel=0.08)


def test_sd3_gradient_of_a_lora_goes_through_frozen_weights():
    graphdef, params = nnx.split(abstract(SD3Transformer, SD3))
    names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    lora = jax.eval_shape(
        lambda: init_lora(jax.random.key(0), params, LoraConfig(2, targets=tuple(f"attn.{name}" for name in names)))
    )

    def loss(lora, params, *given):
        return jnp.square(nnx.merge(graphdef, params)(*given, lora=lora)).sum()

    given = sd3_arguments(24, 40)
    both = xla_flops(jax.grad(loss), lora, params, *given)
    sizes = (24 * 24, 40)
    assert SD3.forward_flops(*sizes) + SD3.backward_flops(*sizes) == pytest.approx(both, rel=0.12)


def qwen_image_call():
    """The transformer on a target of 18 x 24 patches, a source of 14 x 10 and a text of 40, and its parameters."""
    graphdef, params = nnx.split(abstract(QwenImageTransformer, QWEN_IMAGE))

    def velocity(params, lora, x, source, timestep, context):
        places, seen, start = jnp.zeros((1, 140, 3), jnp.int32), jnp.ones((1, 140), jnp.int32), jnp.zeros(1, jnp.int32)
        sources = Sources(source, places, seen, start)
        return nnx.merge(graphdef, params)(x, timestep, context, sources=sources, lora=lora)

    given = shapes(1, 36, 48, 4), shapes(1, 14 * 10, 16), shapes(1), shapes(1, 40, 96)
    return velocity, params, given, (18 * 24 + 14 * 10, 40)


def test_qwen_image_forward():
    velocity, params, given, sizes = qwen_image_call()
    counted = xla_flops(velocity, params, None, *given)
    assert QWEN_IMAGE.forward_flops(*sizes) == pytest.approx(counted, rel=0.08)


def test_qwen_image_gradient_of_a_lora_goes_through_frozen_weights():
    velocity, params, given, sizes = qwen_image_call()
    lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), params, LoraConfig(2, targets=("img_in", "txt_in"))))

    def loss(lora, params, *given):
        return jnp.square(velocity(params, lora, *given)).sum()

    both = xla_flops(jax.grad(loss), lora, params, *given)
    assert QWEN_IMAGE.forward_flops(*sizes) + QWEN_IMAGE.backward_flops(*sizes) == pytest.approx(both, rel=0.12)


def test_clip():
    config = CLIPTextConfig(256, 512, 1, 4, 128, vocab_size=100, eos_token_id=99, max_position_embeddings=64)
    call, params = parts(CLIPTextModel, config)
    counted = xla_flops(call("__call__"), params, shapes(1, 64, dtype=jnp.int32))
    assert config.forward_flops(64) == pytest.approx(counted, rel=0.06)


def test_t5():
    config = T5Config(100, 256, 32, 512, 1, 6)
    call, params = parts(T5Encoder, config)
    counted = xla_flops(call("__call__"), params, shapes(1, 96, dtype=jnp.int32))
    assert config.forward_flops(96) == pytest.approx(counted, rel=0.06)


@pytest.mark.parametrize("attends", [True, False])
def test_vae_decoder(attends):
    config = AutoencoderKLConfig(
        block_out_channels=(32, 64, 96),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=attends,
        use_post_quant_conv=attends,
    )
    call, params = parts(AutoencoderKL, config)
    h, w = 24, 16
    counted = xla_flops(call("decode"), params, shapes(1, h, w, 16))
    # XLA leaves out what convolutions multiply with the zeros around an image.
    assert config.decode_flops(h, w) == pytest.approx(counted, rel=0.08)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_qwen_image_vae(method):
    config = AutoencoderKLQwenImageConfig(
        base_dim=24,
        z_dim=16,
        dim_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        temperal_downsample=(False, True, True),
        latents_mean=(0.0,) * 16,
        latents_std=(1.0,) * 16,
    )
    call, params = parts(AutoencoderKLQwenImage, config)
    h, w = 24, 16
    given = shapes(1, h, w, 16) if method == "decode" else shapes(1, 8 * h, 8 * w, 3)
    counted = xla_flops(call(method), params, given)
    assert getattr(config, f"{method}_flops")(h, w) == pytest.approx(counted, rel=0.08)


def qwen3_vl(width: int = 256) -> Qwen3VLConfig:
    raw = QWEN3_VL["8B"]
    text = raw["text_config"] | {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    }
    vision = raw["vision_config"] | {
        "depth": 1,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_heads": 4,
        "num_position_embeddings": 64,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLConfig.from_hf({**raw, "text_config": text, "vision_config": vision})


def test_qwen3_vl_vision():
    config = qwen3_vl()
    call, params = parts(Qwen3VL, config)
    patches = shapes(1, 256, config.vision.patch_features)
    counted = xla_flops(call("encode_images"), params, patches, shapes(1, 2, dtype=jnp.int32))
    assert config.vision.forward_flops(256) == pytest.approx(counted, rel=0.06)


def qwen2_5_vl() -> Qwen2_5VLConfig:
    raw = PIPELINES["Qwen/Qwen-Image-Edit"]["text_encoder"]
    text = raw["text_config"] | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "layer_types": None,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 1000,
    }
    vision = raw["vision_config"] | {
        "depth": 1,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_heads": 4,
        "out_hidden_size": 256,
        "fullatt_block_indexes": [],
    }
    return Qwen2_5VLConfig.from_hf({**raw, "text_config": text, "vision_config": vision})


def test_qwen2_5_vl_vision():
    config = qwen2_5_vl()
    call, params = parts(Qwen2_5VL, config)
    patches = shapes(1, 256, config.vision.patch_features)
    counted = xla_flops(call("encode_images"), params, patches, shapes(1, 2, dtype=jnp.int32))
    assert config.vision.forward_flops(256) == pytest.approx(counted, rel=0.06)


def test_qwen2_5_vl_text():
    config, tokens = qwen2_5_vl(), 192
    call, params = parts(Qwen2_5VL, config)
    given = shapes(1, tokens, 256), shapes(3, 1, tokens, dtype=jnp.int32), shapes(1, tokens, dtype=jnp.int32)
    assert config.text.forward_flops(tokens) == pytest.approx(xla_flops(call("__call__"), params, *given), rel=0.06)


@pytest.mark.parametrize("tokens", [192, 1], ids=["prefill", "decode"])
def test_qwen3_vl_text(tokens):
    config, slots = qwen3_vl(), 192
    graphdef, params = nnx.split(abstract(Qwen3VL, config))

    def read(params, embeddings, positions, segments, kv_segments, index):
        model = nnx.merge(graphdef, params)
        cache = model.init_cache(1, slots, jnp.float32)
        hidden, cache = model(embeddings, positions, segments, cache=cache, cache_index=index, kv_segments=kv_segments)
        return model.logits(hidden[:, -1]), cache

    arguments = shapes(1, tokens, 256), shapes(3, 1, tokens, dtype=jnp.int32), shapes(1, tokens, dtype=jnp.int32)
    index = shapes(dtype=jnp.int32)
    counted = xla_flops(read, params, *arguments, shapes(1, slots, dtype=jnp.int32), index)
    assert config.text.forward_flops(tokens, slots, 1) == pytest.approx(counted, rel=0.06)


@pytest.mark.parametrize(
    ("parts", "rank"),
    [(tuple(PARTS), 0), (("language",), 0), (("projector",), 0), (tuple(PARTS), 2), (("language",), 2)],
    ids=["full", "language", "projector", "lora", "language_lora"],
)
def test_a_step_of_a_critic_s_training(parts, rank):
    config, tokens = qwen3_vl(768), 256
    graphdef, params = nnx.split(abstract(Qwen3VL, config))
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj", "attn.qkv", "attn.proj")
    tuning = Tuning(parts, LoraConfig(rank, targets=targets) if rank else None).for_network(params)
    trained, frozen = tuning.split(params)
    if rank:
        trained = jax.eval_shape(lambda: init_lora(jax.random.key(0), params, tuning.lora))
    row = shapes(1, tokens, dtype=jnp.int32)
    batch = dict.fromkeys(("ids", "segments", "image_index", "targets"), row)
    batch |= {"positions": shapes(3, 1, tokens, dtype=jnp.int32), "grids": shapes(1, 2, dtype=jnp.int32)}
    batch["patches"] = shapes(1, 256, config.vision.patch_features)

    def loss(trained, frozen, batch):
        whole, lora = tuning.join(trained, frozen)
        return sft_sums(graphdef, whole, batch, lora=lora)["loss"]

    counted = xla_flops(jax.grad(loss), trained, frozen, batch)
    step = {"segments": np.ones((1, 1, tokens), int), "grids": np.array([[[16, 16]]])}
    assert step_flops(config, tuning, step) == pytest.approx(counted, rel=0.04)


def test_padding_is_worth_nothing_and_packed_examples_attend_to_themselves():
    config, tuning = qwen3_vl(), Tuning(tuple(PARTS))
    segments = np.array([[[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]], [[0] * 6, [1] * 6]])
    grids = np.array([[[2, 4], [0, 0]], [[4, 4], [0, 0]]])
    expected = sum(3 * config.text.forward_flops(n, n, n) for n in (3, 2, 2, 6))
    assert step_flops(config, tuning, {"segments": segments}) == expected
    expected += sum(3 * config.vision.forward_flops(n) for n in (8, 16))
    assert step_flops(config, tuning, {"segments": segments, "grids": grids}) == expected


def test_a_critic_s_training_tells_its_share_of_the_peak(monkeypatch):
    batch = {"segments": np.ones((1, 2, 4), int)}
    clock = Throughput(lambda batch: int(batch["segments"].sum()) * 10**9)
    for _ in range(2):
        clock.count(batch)
    assert clock.report()["throughput/mfu"] is None  # of a CPU no peak is known
    clock.since = time.perf_counter() - 4.0
    monkeypatch.setattr(profiling, "peak_flops", lambda: 1e11)
    assert clock.report()["throughput/mfu"] == pytest.approx(16e9 / 4 / (1e11 * jax.device_count()), rel=0.05)
