"""LoRA files: our trees to and from the tensors that diffusers, PEFT and ComfyUI read.

All three hold two matrices for each adapted layer, A [R, I] and B [O, R], in float32 as they were trained, and differ
in names and in where alpha stands. M is diffusers' name of the layer, such as `transformer_blocks.3.attn.to_q`:

| format | the matrices of M | alpha |
|---|---|---|
| diffusers | `transformer.M.lora_A.weight`, `transformer.M.lora_B.weight` | in the file's metadata |
| PEFT | `base_model.model.M.lora_A.weight`, `base_model.model.M.lora_B.weight` | in `adapter_config.json` |
| ComfyUI | `transformer.M.lora_down.weight`, `transformer.M.lora_up.weight` | a tensor `transformer.M.alpha` |

ComfyUI's own SD3 network holds q, k and v of a stream in one matrix, `joint_blocks.N.x_block.attn.qkv`. Its loader
maps M under the prefix `transformer.` to the rows of that matrix, so the three are written as they were trained: fused,
they would need three times the rank. It has no such name for the second attention of SD3.5-medium. Its Qwen-Image has
diffusers' names, which the loader takes under the same prefix. `lora_down`, `lora_up` and `alpha` are kohya-ss' names;
what is applied is alpha / R times B A. ComfyUI reads `lora_A` and `lora_B` too, but no file's metadata: diffusers'
files would be applied at strength 1 there.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import safe_open

from firm_jax.errors import ConfigError, WeightsError
from firm_jax.interop.files import PYTORCH, READABLE, WeightFiles, read_json, some, write_tensors
from firm_jax.interop.mapping import SAME_NAMES, Rule, Tensor, tensors
from firm_jax.models.lora import LoraConfig, insert
from firm_jax.sharding import path_name

DIFFUSERS_FILE, PEFT_FILE, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
COMFYUI_FILE = "comfyui_lora.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "")
SIDES = {"lora_A": 0, "lora_down": 0, "lora_B": 1, "lora_up": 1}
# What PEFT's config may say that is not the plain sum of the layer and alpha / rank * B A.
VARIANTS = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "modules_to_save", "layer_replication")
# Layers of diffusers' SD3 that ComfyUI's loader finds in its own.
COMFYUI_SD3 = re.compile(
    r"transformer_blocks\.\d+\."
    r"(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
    r"|context_embedder|proj_out"
)

Pair = tuple[np.ndarray, np.ndarray]


class Adapter(NamedTuple):
    """A LoRA as PyTorch has it: M -> (A [R, I], B [O, R]) in float32; the update of a layer is alpha / rank * B A."""

    pairs: dict[str, Pair]
    rank: int
    alpha: float


# Our trees


def modules_of(tree, rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """M -> its kernel, of every layer that our tree (of arrays or shapes) adapts.

    rules: the network's `weight_rules`. Raises ConfigError for an adapted layer that is no linear one there.
    """
    found = {}
    for tensor in tensors(_kernel_shapes(tree), (*rules, *SAME_NAMES)):
        if tensor.layout != "linear":
            raise ConfigError(f"{tensor.path} is adapted and no linear layer; LoRA files have no place for it")
        found[_module(tensor)] = tensor
    return found


def adapter_of(tree, rules: tuple[Rule, ...], config: LoraConfig) -> Adapter:
    """Our tree, without its strength folded in, as PyTorch's layers; errors as those of `modules_of`."""
    pairs = {}
    for module, tensor in modules_of(tree, rules).items():
        leaf = _leaf(tree, tensor)
        a, b = (np.asarray(jax.device_get(leaf[side]), np.float32) for side in ("a", "b"))
        if tensor.layer is not None:
            a, b = a[tensor.layer], b[tensor.layer]
        pairs[module] = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    return Adapter(pairs, config.rank, config.alpha)


def tree_of(adapter: Adapter, abstract_params, rules: tuple[Rule, ...], where: str):
    """The adapter as our tree over a network's parameters, without its strength; layers of a stack that it leaves
    alone are zeros. WeightsError, naming `where` it is from, for layers that the network does not have."""
    kernels = tensors(_linears(abstract_params), (*rules, *SAME_NAMES))
    layers = {_module(tensor): tensor for tensor in kernels if tensor.layout == "linear"}
    if unknown := sorted(set(adapter.pairs) - set(layers)):
        raise WeightsError(f"{where} adapts layers that this network does not have: {some(unknown)}")
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_params)[0]}
    tree: dict = {}
    for module, (a, b) in adapter.pairs.items():
        tensor = layers[module]
        *stack, I, O = shapes[tensor.path]
        if (a.shape, b.shape) != ((adapter.rank, I), (O, adapter.rank)):
            raise WeightsError(
                f"{where}: {module} has matrices {a.shape} and {b.shape}; this network needs {(adapter.rank, I)} and "
                f"{(O, adapter.rank)}. It was trained for another model."
            )
        leaf = _leaf(tree, tensor)
        if leaf is None:
            leaf = {
                "a": np.zeros((*stack, I, adapter.rank), np.float32),
                "b": np.zeros((*stack, adapter.rank, O), np.float32),
            }
            insert(tree, tensor.path.removesuffix(".kernel"), leaf)
        place = () if tensor.layer is None else tensor.layer
        leaf["a"][place], leaf["b"][place] = a.T, b.T
    return tree


def _kernel_shapes(tree) -> dict:
    """The shapes of the kernels that a LoRA tree adapts, as a tree of the network's form."""
    if set(tree) == {"a", "b"}:
        *layers, I, _ = tree["a"].shape
        return {"kernel": jax.ShapeDtypeStruct((*layers, I, tree["b"].shape[-1]), np.float32)}
    return {name: _kernel_shapes(below) for name, below in tree.items()}


def _linears(abstract_params) -> dict:
    """The network's kernels of linear layers, and of stacks of them, as a tree of its form."""
    kernels: dict = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_params)[0]:
        if (name := path_name(path)).endswith(".kernel") and len(leaf.shape) in (2, 3):
            insert(kernels, name, jax.ShapeDtypeStruct(leaf.shape, np.float32))
    return kernels


def _leaf(tree, tensor: Tensor):
    for name in tensor.path.removesuffix(".kernel").split("."):
        tree = tree.get(name)
        if tree is None:
            return None
    return tree


def _module(tensor: Tensor) -> str:
    return tensor.name.removesuffix(".weight")


# Files


def write_diffusers(folder: Path, adapter: Adapter) -> None:
    """A folder for `pipe.load_lora_weights`. diffusers reads rank and alpha of the layers from the file's metadata."""
    named = {f"transformer.{name}": array for name, array in _named(adapter, "lora_A", "lora_B").items()}
    settings = {f"transformer.{name}": value for name, value in _peft_settings(adapter).items()}
    metadata = PYTORCH | {DIFFUSERS_METADATA: json.dumps(settings, indent=2, sort_keys=True)}
    write_tensors(named, folder / DIFFUSERS_FILE, metadata)


def write_peft(folder: Path, adapter: Adapter, base_model: str) -> None:
    """A folder for `PeftModel.from_pretrained(transformer, folder)`."""
    named = {f"base_model.model.{name}": array for name, array in _named(adapter, "lora_A", "lora_B").items()}
    write_tensors(named, folder / PEFT_FILE)
    settings = _peft_settings(adapter) | {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "bias": "none",
        "inference_mode": True,
        "lora_dropout": 0.0,
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def write_comfyui(folder: Path, adapter: Adapter, hf_class: str) -> None:
    """A file for ComfyUI's `models/loras`. hf_class: the network's name in diffusers.

    Raises ConfigError for a layer that ComfyUI's loader would pass over.
    """
    unread = [module for module in adapter.pairs if not COMFYUI_SD3.fullmatch(module)]
    if hf_class == "SD3Transformer2DModel" and unread:
        raise ConfigError(
            f"ComfyUI's loader has no names for the adapted layers {some(sorted(unread))}, and would leave them out "
            "without an error. Export the merged pipeline with --format diffusers, or train without these lora.targets."
        )
    named = {f"transformer.{name}": array for name, array in _named(adapter, "lora_down", "lora_up").items()}
    named |= {f"transformer.{module}.alpha": np.float32(adapter.alpha) for module in adapter.pairs}
    write_tensors({name: np.asarray(array) for name, array in named.items()}, folder / COMFYUI_FILE)


def _named(adapter: Adapter, *sides: str) -> dict[str, np.ndarray]:
    return {
        f"{module}.{side}.weight": array
        for module, pair in adapter.pairs.items()
        for side, array in zip(sides, pair, strict=True)
    }


def _peft_settings(adapter: Adapter) -> dict[str, Any]:
    # Every layer by its whole name: an ending like `attn.to_q` may take others in the network of another version.
    return {"r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": sorted(adapter.pairs)}


def read_adapter(path: str | Path) -> Adapter:
    """The LoRA in a file, or in a folder that diffusers, PEFT or this package wrote.

    As in diffusers, a file that says nothing of alpha has alpha = rank. Raises WeightsError for files that are missing
    or damaged, tensors that are none of a transformer's LoRA, layers of unequal rank or alpha, and variants of LoRA
    that are not the plain sum (DoRA, rank-stabilised scaling).
    """
    file = find_file(path)
    with WeightFiles(file.parent, (file.stem,)) as files:
        for stored in files.tensors.values():
            if stored.dtype not in READABLE:
                raise WeightsError(f"{stored} has dtype {stored.dtype}; readable are {sorted(READABLE)}")
        found = {name: files.whole(name).astype(np.float32) for name in files.tensors}
    if bad := sorted(name for name, array in found.items() if not np.isfinite(array).all()):
        raise WeightsError(f"{file} holds NaN or infinity in {some(bad)}; fetch the file again")
    sides, alphas = _sorted_out(found, file)
    pairs: dict[str, Pair] = {}
    for module, sided in sides.items():
        if set(sided) != {0, 1} or any(array.ndim != 2 for array in sided.values()):
            raise WeightsError(f"{file}: {module} does not have two matrices; only LoRA on linear layers is supported")
        pairs[module] = sided[0], sided[1]
    ranks = {a.shape[0] for a, _ in pairs.values()}
    if len(ranks) != 1:
        raise WeightsError(f"{file} has layers of ranks {sorted(ranks)}; a LoRA of one rank is needed")
    rank = ranks.pop()
    settings = _settings(file)
    if settings.get("r", rank) != rank:
        raise WeightsError(f"{file} has matrices of rank {rank}, and its settings say r = {settings['r']}")
    given = set(alphas.values()) or {float(settings.get("lora_alpha", rank))}
    if len(given) != 1 or (alphas and set(alphas) != set(pairs)):
        raise WeightsError(f"{file} has alphas {sorted(given)} for some of its layers; one for all is needed")
    return Adapter(pairs, rank, given.pop())


def find_file(path: str | Path) -> Path:
    """The file of a LoRA: the path itself, or the one in that folder. WeightsError when there is none, or several."""
    path = Path(path).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if not path.is_dir():
        raise WeightsError(f"{path.absolute()} is neither a folder nor a .safetensors file, so it holds no LoRA")
    for name in (PEFT_FILE, DIFFUSERS_FILE):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    raise WeightsError(
        f"{path.absolute()} holds {'several files: ' + some([file.name for file in files]) if files else 'no LoRA'}; "
        f"expected {PEFT_FILE}, {DIFFUSERS_FILE} or a single .safetensors file. Name the file itself where there are "
        "several; .bin files are not read."
    )


def _sorted_out(found: Mapping[str, np.ndarray], file: Path) -> tuple[dict[str, dict[int, np.ndarray]], dict]:
    """Module -> side -> matrix, and module -> alpha."""
    sides: dict[str, dict[int, np.ndarray]] = {}
    alphas: dict[str, float] = {}
    unknown = []
    for name, array in found.items():
        module = next(name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix))
        if match := re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight", module):
            sides.setdefault(match[1], {})[SIDES[match[2]]] = array
        elif module.endswith(".alpha") and array.size == 1:
            alphas[module.removesuffix(".alpha")] = float(array.item())
        else:
            unknown.append(name)
    if unknown or not sides:
        raise WeightsError(
            f"{file} holds {'tensors that are not of a LoRA: ' + some(sorted(unknown)) if unknown else 'no tensors'}. "
            "Readable are the matrices lora_A and lora_B, or lora_down and lora_up, of a transformer's linear layers."
        )
    return sides, alphas


def _settings(file: Path) -> dict[str, Any]:
    """Rank and alpha as they stand beside the tensors: in PEFT's config, or in diffusers' metadata."""
    where, settings = file, {}
    if file.name == PEFT_FILE:
        where = file.parent / PEFT_CONFIG
        try:
            settings = read_json(where)
        except FileNotFoundError:
            raise WeightsError(f"{file} has no {PEFT_CONFIG} beside it, which holds its alpha; fetch it too") from None
    else:
        with safe_open(file, framework="numpy") as opened:
            text = (opened.metadata() or {}).get(DIFFUSERS_METADATA)
        if text:
            try:
                settings = {name.removeprefix("transformer."): value for name, value in json.loads(text).items()}
            except (ValueError, AttributeError) as error:
                raise WeightsError(f"the metadata {DIFFUSERS_METADATA} of {file} cannot be read: {error}") from error
    kind = settings.get("peft_type", "LORA")
    odd = [name for name in VARIANTS if settings.get(name)]
    if odd or kind not in ("LORA", None) or settings.get("bias", "none") != "none":
        raise WeightsError(
            f"{where} describes {', '.join(odd) or settings.get('bias') if kind in ('LORA', None) else kind}, which is "
            "not supported: a plain LoRA of one rank and alpha, without biases, is needed"
        )
    return settings


# Merging


def merged(weight: np.ndarray, pair: Pair, scale: float) -> np.ndarray:
    """weight [O, I] + scale * B A, added in float32 and rounded once, to the weight's own dtype."""
    a, b = pair
    return (weight.astype(np.float32) + np.float32(scale) * (b @ a)).astype(weight.dtype)


def write_merged(source: Path, folder: Path, adapter: Adapter) -> None:
    """A network's folder with the adapter merged into its weights, shard for shard, in their dtypes.

    Never more than one file of it is in memory. Raises WeightsError for a layer that the network does not have or of
    another shape, and for sums beyond the range of the dtype.
    """
    scale = adapter.alpha / adapter.rank
    with WeightFiles(source) as files:
        shapes = {f"{module}.weight": (b.shape[0], a.shape[1]) for module, (a, b) in adapter.pairs.items()}
        unfit = [
            name for name, shape in shapes.items() if name not in files.tensors or files.tensors[name].shape != shape
        ]
        if unfit:
            raise WeightsError(f"{source} has no weights of the adapted layers' shape: {some(sorted(unfit))}")
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted({stored.file for stored in files.tensors.values()}):
            shard = {}
            for name in (stored.name for stored in files.tensors.values() if stored.file == file):
                weight = files.whole(name)
                if name in shapes:
                    weight = merged(weight, adapter.pairs[name.removesuffix(".weight")], scale)
                    if not np.isfinite(weight.astype(np.float32)).all():
                        raise WeightsError(f"{name} merged is beyond the range of {weight.dtype}")
                shard[name] = weight
            write_tensors(shard, folder / file.name)
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
