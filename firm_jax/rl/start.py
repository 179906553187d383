"""The LoRA that an RL run starts from, when `lora.init` names one that was trained before."""

from functools import partial
from pathlib import Path

import jax
from flax import nnx

from firm_jax import models
from firm_jax.errors import ConfigError
from firm_jax.interop.files import some
from firm_jax.interop.lora_formats import modules_of, read_adapter, tree_of
from firm_jax.models.lora import LoraConfig, init_lora

GAUSSIAN = "gaussian"


def check_init(init: str) -> None:
    """ConfigError unless `lora.init` is "gaussian" or a path that exists."""
    if init != GAUSSIAN and not Path(init).expanduser().exists():
        raise ConfigError(
            f"lora.init is {init!r}; it is {GAUSSIAN}, or the folder or file of a LoRA, and nothing lies at "
            f"{Path(init).expanduser().absolute()}"
        )


def read_start(init: str, config: LoraConfig, network_folder: Path):
    """The tree, on the host, that current, old and averaged policy start from; None where `init` is "gaussian".

    The reference of the KL term stays the base without any LoRA. Raises ConfigError when rank, alpha or layers are not
    those of the config, with the settings that fit, and WeightsError for what is no LoRA of this network.
    """
    if init == GAUSSIAN:
        return None
    adapter = read_adapter(init)
    network, network_config = models.read_network(network_folder)
    params, rules = nnx.state(models.abstract(network, network_config)), network.weight_rules(network_config)
    tree = tree_of(adapter, params, rules, init)
    wanted = set(modules_of(jax.eval_shape(partial(init_lora, config=config), jax.random.key(0), params), rules))
    problems = [
        f"its {name} is {found:g}: set --config.lora.{name}={found:g} (it is {given:g})"
        for name, found, given in (("rank", adapter.rank, config.rank), ("alpha", adapter.alpha, config.alpha))
        if found != given
    ]
    if wanted != set(adapter.pairs):
        lacking, beyond = sorted(wanted - set(adapter.pairs)), sorted(set(adapter.pairs) - wanted)
        told = [f"{words} {some(names, 3)}" for words, names in (("lacks", lacking), ("also adapts", beyond)) if names]
        endings = sorted({module.split(".", 2)[-1] for module in adapter.pairs})
        problems.append(f'it {" and ".join(told)}: set --config.lora.targets="{tuple(endings)}"')
    if problems:
        raise ConfigError(f"the LoRA of lora.init, {init}, does not fit the config: {'; '.join(problems)}")
    return tree
