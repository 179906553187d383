"""How our parameter paths and Hugging Face's tensor names correspond: one table per model, used to load and to save.

A rule reads from our side to theirs, because ours is what is known first (the abstract parameter tree). The tensors
a file must hold follow from it: names, shapes and layouts, both ways, with nothing left over.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from firm_jax.sharding import KERNEL_SCALE, path_name


@dataclass(frozen=True)
class Rule:
    r"""`pattern` is matched against our whole path; `name` is the PyTorch name, with groups as \1 and {layer} for a
    stack's index, which counts from `first_layer`. `layout` names how the numbers are laid out there."""

    pattern: str
    name: str
    layout: str = "auto"
    first_layer: int = 0


@dataclass(frozen=True)
class Tensor:
    """One tensor of a PyTorch file and its place in our tree: `layer` is the index in a stacked leaf, or None."""

    path: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    layout: str


# Paths keep the PyTorch module names, so most models need no more than this after their own rules.
SAME_NAMES = (
    Rule(r"(.+)\.(?:kernel|scale|embedding)", r"\1.weight"),
    Rule(r"(.+)", r"\1"),
)

# layout -> (permutation of our axes that gives theirs)
_PERMUTATIONS = {"same": None, "linear": (1, 0), "conv": (3, 2, 0, 1), "conv3d": (4, 3, 0, 1, 2)}


def tensors(abstract_params, rules: tuple[Rule, ...]) -> Iterator[Tensor]:
    """Every tensor that a file of this model holds; the scale of a quantised kernel is none of them."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_params)[0]:
        if not (name := path_name(path)).endswith(KERNEL_SCALE):
            yield from _leaf_tensors(name, tuple(leaf.shape), rules)


def _leaf_tensors(path: str, shape: tuple[int, ...], rules: tuple[Rule, ...]) -> Iterator[Tensor]:
    for rule in rules:
        match = re.fullmatch(rule.pattern, path)
        if not match:
            continue
        name = match.expand(rule.name)
        stacked = "{layer}" in name
        own = shape[1:] if stacked else shape
        layout = rule.layout
        if layout == "auto":
            is_kernel = path.endswith(".kernel")
            layout = {2: "linear", 4: "conv", 5: "conv3d"}.get(len(own), "same") if is_kernel else "same"
        for layer in range(shape[0]) if stacked else (None,):
            full = name if layer is None else name.replace("{layer}", str(layer + rule.first_layer))
            yield Tensor(path, layer, full, torch_shape(own, layout), layout)
        return
    raise LookupError(f"no weight-name rule matches the parameter {path}")


def torch_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Our shape -> the shape of the same tensor in a PyTorch file."""
    if layout.startswith("patch:"):  # a convolution whose stride is its kernel, kept by us as one matmul [C*k.., O]
        return (shape[1], *map(int, layout.removeprefix("patch:").split("x")))
    permutation = _PERMUTATIONS[layout]
    return shape if permutation is None else tuple(shape[axis] for axis in permutation)


def to_torch(array: np.ndarray, layout: str) -> np.ndarray:
    """Our array -> the PyTorch layout."""
    if layout.startswith("patch:"):
        return array.T.reshape(torch_shape(array.shape, layout))
    permutation = _PERMUTATIONS[layout]
    return array if permutation is None else array.transpose(permutation)


def from_torch(array: np.ndarray, layout: str) -> np.ndarray:
    """The PyTorch layout -> ours, as a view; of some of the array's rows too."""
    if layout.startswith("patch:"):
        return array.reshape(array.shape[0], -1).T
    permutation = _PERMUTATIONS[layout]
    return array if permutation is None else array.transpose(np.argsort(permutation))
