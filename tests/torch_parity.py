"""What the comparisons with PyTorch share. Imported by tests/test_torch_*.py only."""

import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import load_file


def randomise(module: torch.nn.Module, seed: int = 0, spread: float = 0.3) -> None:
    """Give every parameter a random value, so that no norm scale, bias or zero initialisation hides a mistake.

    Matrices keep the size of their products (deviation 1 / sqrt(fan in)), scales scatter around 1, biases around 0.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_((1.0 if name.endswith("weight") else 0.0) + spread * noise)


def relative_error(ours, reference) -> float:
    """||ours - reference|| / ||reference||, in float64."""
    if isinstance(reference, torch.Tensor):
        reference = reference.detach().float().numpy()
    ours, reference = (np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in (ours, reference))
    assert ours.shape == reference.shape, f"{ours.shape} is not {reference.shape}"
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def load_folder(folder) -> dict[str, torch.Tensor]:
    """Every tensor in a folder's safetensors."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    assert found, f"no safetensors in {folder}"
    return found


def assert_same_files(theirs, ours, leave_out=()) -> None:
    """The two folders hold the same tensors, bit for bit; `leave_out` names those that only PyTorch writes."""
    expected, got = load_folder(theirs), load_folder(ours)
    assert sorted(set(expected) - set(leave_out)) == sorted(got)
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
