import atexit
import os
import shutil
import tempfile

# Eight simulated devices: the sharding tests use them, everything else runs on the first.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A program is compiled once for all tests, their workers and the processes that they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="firm_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config):
    """With `-n 2` a file is one worker's, because its tests share what takes long to make, and files come in the order
    of their names: those of the fewest tests, which would come last, are the longest."""
    if config.getoption("numprocesses", None):
        config.option.dist, config.option.loadscopereorder = "loadfile", False
