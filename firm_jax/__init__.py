"""FIRM in JAX: vision-language critics and DiffusionNFT training of image generators (arXiv 2603.12247).

from firm_jax import Critic, Generator, RemoteCritic, models
"""

import importlib

__all__ = ["Critic", "Generator", "RemoteCritic", "models"]

_HOMES = {
    "Critic": "firm_jax.critic",
    "Generator": "firm_jax.generation",
    "RemoteCritic": "firm_jax.critic.remote",
}


def __getattr__(name: str):
    """Load on first use: a command that only reads a config should not wait for the networks."""
    if name == "models":
        return importlib.import_module("firm_jax.models")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'firm_jax' has no attribute {name!r}")
