"""What is trained, at which rate, and in which numbers it is held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from firm_jax import models
from firm_jax.config import load_config
from firm_jax.critic import tuning
from firm_jax.critic.sft_data import micro_batches
from firm_jax.critic.tuning import PARTS, Tuning
from firm_jax.embedded import embedded_path
from firm_jax.errors import ConfigError
from firm_jax.sharding import path_name


@pytest.fixture(scope="module")
def params():
    """The shapes of the shipped critic's parameters."""
    network, config = models.read_network(embedded_path("embedded:critic_gen"))
    return nnx.split(models.abstract(network, config))[1]


def config_with(**changes):
    config = load_config("configs/critic_sft.py:edit")
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


def names(tree) -> set[str]:
    return {path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_parts_are_those_of_llama_factory(params):
    """Its `freeze_vision_tower` takes the DeepStack mergers along, its `freeze_multi_modal_projector` the merger."""
    by_part = {part: {name for name in names(params) if tuning.part_of(name) == part} for part in PARTS}
    assert {name.split(".")[1] for name in by_part["vision"]} == {
        "patch_embed", "pos_embed", "blocks", "deepstack_merger_list",
    }  # fmt: skip
    assert {".".join(name.split(".")[:2]) for name in by_part["projector"]} == {"visual.merger"}
    assert {name.split(".")[0] for name in by_part["language"]} == {"language_model"}
    assert tuning.part_of("lm_head.kernel") == "language"


@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_trained_or_frozen(params, part):
    one = Tuning.from_config(config_with(**{f"tune__{name}": name == part for name in PARTS}))
    trained, frozen = one.split(params)
    assert names(trained) == {name for name in names(params) if tuning.part_of(name) == part}
    assert names(trained) | names(frozen) == names(params) and not names(trained) & names(frozen)
    assert names(one.join(trained, frozen)[0]) == names(params)


def test_a_lora_is_in_the_layers_of_what_is_trained(params):
    def targets(**changes):
        return set(Tuning.from_config(config_with(lora__rank=4, **changes)).for_network(params).lora.targets)

    text, tower = "language_model.layers.", "visual.blocks."
    language = {f"{text}self_attn.{x}_proj" for x in "qkvo"} | {f"{text}mlp.{x}_proj" for x in ("gate", "up", "down")}
    assert targets() == language
    found = targets(tune__language=False, tune__vision=True)
    assert found == {f"{tower}attn.qkv", f"{tower}attn.proj"} | {
        f"visual.{stack}{side}" for stack in ("blocks.mlp.", "deepstack_merger_list.")
        for side in ("linear_fc1", "linear_fc2")
    }  # fmt: skip
    assert targets(tune__language=False, tune__projector=True) == {
        "visual.merger.linear_fc1",
        "visual.merger.linear_fc2",
    }
    for changes, told in (
        ({"lora__targets": ("q_proj", "w_proj")}, r"LoRA targets \['w_proj'\]: no linear layer"),
        ({"lora__targets": ("attn.qkv",)}, "has no layer in what is trained, language"),
        ({"lora__targets": ("patch_embed",), "tune__vision": True}, r"visual\.patch_embed cannot have a LoRA"),
    ):
        with pytest.raises(ConfigError, match=told):
            targets(**changes)


def test_the_schedule_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import get_cosine_schedule_with_warmup

    for steps, ratio in ((2291, 0.1), (7, 0.3), (1, 0.1), (10, 0.0)):
        train = config_with(train__warmup_ratio=ratio).train
        ours = tuning.schedule_of(train, 1e-5, steps)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-5)
        theirs = get_cosine_schedule_with_warmup(optimizer, tuning.warmup_steps(train, steps), steps)
        expected = []
        for _ in range(steps):
            expected.append(theirs.get_last_lr()[0])
            optimizer.step()
            theirs.step()
        np.testing.assert_allclose(ours(jnp.arange(steps)), expected, rtol=1e-5, atol=1e-11)
    assert tuning.warmup_steps(config_with().train, 2291) == 230  # ceil, as transformers' get_warmup_steps


def test_each_part_has_a_learning_rate_of_its_own():
    config = config_with(tune__vision_learning_rate=3e-6, train__warmup_ratio=0.0, train__max_grad_norm=1e9)
    rates = tuning.learning_rates(config)
    assert rates == {"projector": 1e-5, "vision": 3e-6, "language": 1e-5}
    optimizer = tuning.make_optimizer(config.train, rates, 100)
    layer = {"visual": {"blocks": {"kernel": jnp.ones(3)}}, "language_model": {"norm": {"scale": jnp.ones(3)}}}
    changes, _ = optimizer.update(layer, optimizer.init(layer), layer)
    np.testing.assert_allclose(changes["visual"]["blocks"]["kernel"], -3e-6, rtol=1e-4)
    np.testing.assert_allclose(changes["language_model"]["norm"]["scale"], -1e-5, rtol=1e-4)


def test_bfloat16_is_rounded_at_random_and_right_on_average():
    exact = jnp.array([1.0, -2.5, 0.0, jnp.inf, -jnp.inf, jnp.nan])
    like = jnp.zeros(6, jnp.bfloat16)
    key = jax.random.key(0)
    np.testing.assert_array_equal(tuning.cast_like(exact, like, key).astype(jnp.float32), exact)
    weight = jnp.full(20_000, 1 + 2**-10)  # an eighth of the way to the next bfloat16
    found = tuning.cast_like(weight, weight.astype(jnp.bfloat16), key).astype(jnp.float32)
    assert set(np.unique(found)) == {1.0, 1 + 2**-7}
    assert float(found.mean()) == pytest.approx(1 + 2**-10, abs=4 * 2**-7 * np.sqrt(7 / 64 / 20_000))
    assert tuning.cast_like(weight, weight, key) is not None and (tuning.cast_like(weight, weight, key) == weight).all()
    other = tuning.cast_like(weight, weight.astype(jnp.bfloat16), jax.random.key(1)).astype(jnp.float32)
    assert (found != other).any()


@pytest.mark.parametrize(
    ("batch", "per_device", "devices", "expected"),
    [(160, 10, 8, (2, 80)), (160, 10, 1, (16, 10)), (160, 10, 32, (1, 160)), (160, 10, 3, (6, 27)), (4, 8, 8, (1, 8))],
)
def test_a_batch_is_the_same_on_any_number_of_devices(batch, per_device, devices, expected):
    count, rows = micro_batches(batch, per_device, devices)
    assert (count, rows) == expected
    assert batch <= count * rows and rows <= per_device * devices and rows % devices == 0


def test_the_default_is_the_recipe_of_the_model_card():
    config = load_config("configs/critic_sft.py")
    train = config.train
    assert (config.critic.model, config.seed, train.epochs) == ("Qwen/Qwen3-VL-8B-Instruct", 42, 1)
    assert (train.learning_rate, train.warmup_ratio, config.data.held_out_share) == (1e-5, 0.1, 0.01)
    assert micro_batches(train.batch_size, train.examples_per_device, 8) == (2, 10 * 8)
    trained_on = 370_276 - round(0.01 * 370_276)
    assert trained_on // train.batch_size == 2291  # and a last step of what is left
    assert load_config("configs/critic_sft.py:gen").train.examples_per_device == 5
