"""What a command computes with where nobody has said otherwise: all devices, number format, compilation cache."""

import logging
import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from firm_jax.mesh import make_mesh


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder; JAX_COMPILATION_CACHE_DIR names another one."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "firm_jax" / "compiled"))


def say_nothing_of_absent_devices() -> None:
    """That a machine has no TPU is not news."""
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)


def default_dtype() -> str:
    """ "float32" on a CPU, which computes with nothing shorter; "bfloat16" elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def default_mesh() -> Mesh | None:
    """All devices, with the large weights split over them; None for a single one."""
    return make_mesh(data=1, fsdp=-1) if jax.device_count() > 1 else None
