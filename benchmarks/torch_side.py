"""What every comparison needs of PyTorch: whether it is there, its device, precision, compilation, and its clock."""

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator

import jax
import numpy as np

from benchmarks.harness import Options


def absent(*packages: str) -> str | None:
    """Why PyTorch's side cannot be run: the packages of it that are not installed; None when all are there."""
    missing = [name for name in ("torch", *packages) if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def modes(options: Options) -> tuple[list[str], dict[str, str]]:
    """Of the modes asked for those that this machine can run, and why it cannot run the others."""
    if "compile" in options.modes and device().type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return [mode for mode in options.modes if mode != "compile"], {
            "torch.compile": "no C++ compiler (g++, clang++)"
        }
    return list(options.modes), {}


def device():
    """The accelerator where JAX has one too, else the CPU: both sides on the same."""
    import torch

    return torch.device("cpu" if jax.default_backend() == "cpu" else "cuda")


def variants(options: Options) -> Iterator[tuple[str, str, str]]:
    """(mode, what the table says of it, dtype) of each of PyTorch's variants."""
    for dtype in options.dtypes:
        for mode in modes(options)[0]:
            said = "torch.compile" if mode == "compile" else mode
            yield mode, said if dtype == "float32" else f"{said}, autocast", dtype


def autocast(dtype: str):
    """Mixed precision as it is used in training: matmuls in `dtype`, norms and softmax in float32."""
    import torch

    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device().type, getattr(torch, dtype))


def done() -> None:
    """Wait for the accelerator."""
    import torch

    if device().type == "cuda":
        torch.cuda.synchronize()


def tensor(array):
    """A host or JAX array as a tensor on the device; batches of unsigned numbers as int64."""
    import torch

    array = np.array(array)
    return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array).to(device())


def host(value) -> np.ndarray:
    return value.detach().float().cpu().numpy()


def compiled(function: Callable, mode: str, **options) -> Callable:
    import torch

    return torch.compile(function, **options) if mode == "compile" else function


def channels_first(array) -> np.ndarray:
    return np.moveaxis(np.asarray(array), -1, -3)


def channels_last(array) -> np.ndarray:
    return np.moveaxis(np.asarray(array), -3, -1)
