"""`lora.init`: a run that goes on from a LoRA that was trained before, here or elsewhere."""

import numpy as np
import pytest
from tiny_pipeline import tiny_generator
from tiny_run import LORA, random_lora

from firm_jax.errors import ConfigError, WeightsError
from firm_jax.interop.lora_formats import adapter_of, write_diffusers, write_peft
from firm_jax.models.lora import LoraConfig
from firm_jax.rl.start import check_init, read_start


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pipeline's folder, a LoRA of its transformer, and our tree of it."""
    folder, lora = (tmp_path_factory.mktemp(name) for name in ("model", "lora"))
    generator = tiny_generator(t5=False)
    generator.save_pretrained(folder)
    tree = random_lora(generator, 0)
    write_peft(lora, adapter_of(tree, generator.weight_rules, LORA), "a/b")
    return folder / "transformer", lora, tree, generator


def test_a_random_start_reads_nothing(tmp_path):
    check_init("gaussian")
    assert read_start("gaussian", LORA, tmp_path / "absent") is None


@pytest.mark.fault("wrong-config")
def test_a_path_without_anything_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"nothing lies at {tmp_path / 'absent'}"):
        check_init(str(tmp_path / "absent"))


@pytest.mark.fault("wrong-config")
@pytest.mark.parametrize(
    "changed, told",
    [
        ({"rank": 4}, r"its rank is 3: set --config\.lora\.rank=3 \(it is 4\)$"),
        ({"alpha": 8.0}, r"its alpha is 7: set --config\.lora\.alpha=7 \(it is 8\)$"),
        ({"targets": (*LORA.targets, "ff.net.2")}, r"it lacks transformer_blocks\.0\.ff\.net\.2, .*: set --config"),
        ({"targets": LORA.targets[1:]}, r"it also adapts transformer_blocks\.0\.attn\.to_q, transformer_blocks\.1"),
        (
            {"rank": 5, "targets": ("attn.to_q", "ff.net.2")},
            r"its rank is 3.*; it lacks .* and also adapts .*and 17 more",
        ),
    ],
)
def test_a_lora_of_another_shape_is_refused_with_what_to_set(world, changed, told):
    transformer, lora, _, _ = world
    given = LoraConfig(**{"rank": LORA.rank, "alpha": LORA.alpha, "targets": LORA.targets} | changed)
    with pytest.raises(ConfigError, match=told) as error:
        read_start(str(lora), given, transformer)
    if "targets" in changed:
        # What the message says to set is what fits.
        targets = eval(str(error.value).split('--config.lora.targets="')[1].removesuffix('"'))
        assert read_start(str(lora), LoraConfig(LORA.rank, LORA.alpha, targets), transformer) is not None


def test_a_lora_of_another_network_is_refused(world, tmp_path):
    transformer, _, _, _ = world
    other = tiny_generator(t5=False, num_layers=4)
    write_diffusers(tmp_path, adapter_of(random_lora(other, 0), other.weight_rules, LORA))
    with pytest.raises(
        WeightsError, match=r"layers that this network does not have: transformer_blocks\.2\.attn\.to_add_out, "
    ):
        read_start(str(tmp_path), LORA, transformer)


def test_loras_that_peft_and_diffusers_wrote_are_read(world, tmp_path):
    """Made and saved by their own programs, from the network itself."""
    torch, diffusers, peft = (pytest.importorskip(name) for name in ("torch", "diffusers", "peft"))
    transformer, _, _, generator = world
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=list(LORA.targets))
    network = diffusers.SD3Transformer2DModel.from_pretrained(transformer)
    adapted = peft.get_peft_model(network, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    state = peft.get_peft_model_state_dict(adapted)
    adapted.save_pretrained(tmp_path / "peft")
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "diffusers",
        transformer_lora_layers={name.removeprefix("base_model.model."): value for name, value in state.items()},
        transformer_lora_adapter_metadata=adapted.peft_config["default"].to_dict(),
    )
    network = diffusers.SD3Transformer2DModel.from_pretrained(transformer)
    network.add_adapter(config)
    peft.set_peft_model_state_dict(network, {name.removeprefix("base_model.model."): v for name, v in state.items()})
    network.save_lora_adapter(tmp_path / "network")
    for folder in ("peft", "diffusers", "network"):
        tree = read_start(str(tmp_path / folder), LORA, transformer)
        found = adapter_of(tree, generator.weight_rules, LORA)
        assert len(found.pairs) * 2 == len(state)
        for module, pair in found.pairs.items():
            for side, array in zip("AB", pair, strict=True):
                np.testing.assert_array_equal(array, state[f"base_model.model.{module}.lora_{side}.weight"])
