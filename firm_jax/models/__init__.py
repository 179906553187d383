"""The networks: arithmetic only. `from_pretrained` and `save_pretrained` move one component from and to a folder.

A network class has: `config` (a frozen dataclass with `from_hf` and `to_hf`), `hf_class` (the name in config.json),
`weight_rules(config)` (our path -> PyTorch name), `sharding_rules` (our path -> PartitionSpec), and, where PyTorch's
files hold more than the parameters, `ignored(config)` (names of buffers) and `tied(config)` (repeated tensors). One
whose frozen kernels may be held as int8 says which: `quantizable`, a regex on the paths of linear layers.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from firm_jax.abstract import place
from firm_jax.errors import ConfigError, WeightsError
from firm_jax.interop.files import read_json
from firm_jax.models.quantize import check_scheme, quantize_linears
from firm_jax.sharding import shardings

# PyTorch class name -> module of this package, class
CLASSES = {
    "SD3Transformer2DModel": ("sd3", "SD3Transformer"),
    "QwenImageTransformer2DModel": ("qwen_image", "QwenImageTransformer"),
    "AutoencoderKL": ("vae_kl", "AutoencoderKL"),
    "AutoencoderKLQwenImage": ("vae_qwen_image", "AutoencoderKLQwenImage"),
    "CLIPTextModelWithProjection": ("clip", "CLIPTextModel"),
    "T5EncoderModel": ("t5", "T5Encoder"),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl", "Qwen3VL"),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", "Qwen2_5VL"),
}

DTYPES = ("float32", "bfloat16", "float16")


def network_class(hf_class: str) -> type[nnx.Module]:
    """Our class for a PyTorch class name; ConfigError for one that is not supported."""
    if hf_class not in CLASSES:
        raise ConfigError(f"networks of class {hf_class!r} are not supported; supported are {sorted(CLASSES)}")
    module, name = CLASSES[hf_class]
    return getattr(importlib.import_module(f"firm_jax.models.{module}"), name)


def abstract(network: type[nnx.Module], config) -> nnx.Module:
    """The network with shapes in the place of arrays."""
    return nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0)))


def from_config(raw: Mapping, dtype, mesh: Mesh, where: str = "config.json", quantize: str | None = None) -> nnx.Module:
    """The network of a config.json on the mesh by its sharding rules, with shapes in the place of weights.

    Such a network can be compiled, not run. `where` stands in the errors, which are those of `from_pretrained`.
    """
    network, config = _of_config(raw, where)
    graphdef, params = nnx.split(_held(network, config, dtype, quantize))
    return nnx.merge(graphdef, place(params, shardings(params, network.sharding_rules, mesh)))


def _held(network: type[nnx.Module], config, dtype, quantize: str | None) -> nnx.Module:
    """`abstract` in the dtypes that the parameters are held in."""
    graphdef, params = nnx.split(abstract(network, config))
    typed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), params)
    held = nnx.merge(graphdef, typed)
    check_scheme(quantize)
    if quantize is not None:
        if not hasattr(network, "quantizable"):
            raise ConfigError(f"quantize={quantize!r}: {network.__name__} has no kernels that may be quantised")
        quantize_linears(held, network.quantizable)
    return held


def _of_config(raw: Mapping, where) -> tuple[type[nnx.Module], object]:
    """Class and config of a config.json's content."""
    names = [raw["_class_name"]] if "_class_name" in raw else list(raw.get("architectures") or [])
    if not names:
        raise ConfigError(f"{where} names no class (neither _class_name nor architectures)")
    network = network_class(names[0])
    return network, network.config_class.from_hf(raw)


def read_config(folder: Path) -> dict:
    """The folder's config.json; WeightsError when it is missing or not JSON."""
    file = Path(folder) / "config.json"
    try:
        return read_json(file)
    except FileNotFoundError:
        raise WeightsError(f"{folder} is not a model folder: it has no config.json") from None


def read_network(folder: Path) -> tuple[type[nnx.Module], object]:
    """Class and config of the network in a folder, without its weights; errors as those of `from_pretrained`."""
    return _of_config(read_config(folder), Path(folder) / "config.json")


def from_pretrained(folder, dtype="float32", mesh=None, quantize: str | None = None) -> nnx.Module:
    """One component from its Hugging Face folder (config.json and safetensors), on the mesh by its sharding rules.

    dtype: "float32", "bfloat16" or "float16". quantize: "int8" to hold the kernels of a transformer's blocks so
    (models/quantize.py), frozen and not to be saved. Raises ConfigError for an architecture or a config field that is
    not supported, WeightsError when the weights do not fit the config.
    """
    from firm_jax.interop.hub import resolve
    from firm_jax.interop.load import load_params

    if (name := dtype if isinstance(dtype, str) else jnp.dtype(dtype).name) not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not one that weights are held in: {', '.join(DTYPES)}")
    folder = resolve(folder)
    network, config = read_network(folder)
    graphdef, params = nnx.split(_held(network, config, dtype, quantize))
    params = load_params(
        params,
        network.weight_rules(config),
        folder,
        dtype=jnp.dtype(dtype),
        sharding_rules=network.sharding_rules,
        mesh=mesh,
        **_extra(network, config),
    )
    return nnx.merge(graphdef, params)


def check_pretrained(folder: Path) -> None:
    """Raise what `from_pretrained` would for a folder's architecture, and for weights that are missing or misshapen.

    Reads the files' headers only: a moment where loading takes minutes.
    """
    from firm_jax.interop.load import check_params

    network, config = read_network(folder)
    check_params(
        nnx.split(abstract(network, config))[1], network.weight_rules(config), folder, **_extra(network, config)
    )


def _extra(network: type[nnx.Module], config) -> dict:
    """What PyTorch's files hold beside the parameters."""
    return {
        "ignored": network.ignored(config) if hasattr(network, "ignored") else (),
        "tied": network.tied(config) if hasattr(network, "tied") else {},
    }


def save_pretrained(network: nnx.Module, folder, dtype=None) -> None:
    """Write config.json and safetensors that PyTorch's own `from_pretrained` reads; dtype None keeps the params'.

    Raises ConfigError for a network with quantised kernels: its files would look like the base model's, and are not.
    """
    from firm_jax.interop.save import save_params

    folder = Path(folder)
    config = network.config.to_hf()
    params = nnx.state(network, nnx.Param)
    if any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(params)):
        raise ConfigError(
            f"{network.hf_class} has int8 kernels, from which the weights in its folder cannot be had back. Load it "
            "without quantize to save it; what is trained is the LoRA, which has its own file."
        )
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    if "_class_name" not in config:
        first = jax.tree.leaves(params)[0].dtype
        config["dtype"] = str(jnp.dtype(dtype) if dtype else first)
    save_params(params, network.weight_rules(network.config), folder, stem, dtype=dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
