"""GPUs by name, as `h100` in `h100:8`: their memory, and what the CUDA compiler is told of one that is not there."""

import os
from dataclasses import dataclass

from firm_jax.errors import ConfigError

GIB = 2**30

# JAX's pool takes a share of a GPU's memory, 0.75 unless the environment names another; jobs take this one. What is
# left is for what lies outside of the pool: CUDA's context, loaded kernels, cuBLAS, NCCL's buffers.
POOL_SHARE = 0.9
SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older name


@dataclass(frozen=True)
class GPU:
    """One kind of GPU: the name that CUDA gives it, its memory in bytes, and the bytes a second that this moves.

    memory: as CUDA counts it, somewhat less than the data sheet's 80 and 141 GB; it differs by 0.2 GiB between drivers.
    """

    device_kind: str
    memory: int
    bandwidth: int
    unit: str = "GPU"

    @property
    def hbm(self) -> int:
        """Bytes that programs may use: what JAX's pool takes of the memory."""
        return int(self.memory * pool_share())

    def target(self) -> str:
        """The compiler's description of the device, as a text protocol buffer.

        Its numbers are those that CUDA's programming guide gives for compute capability 9.0, and the data sheet's.
        """
        return TARGET.format(name=self.device_kind, memory=self.memory, bandwidth=self.bandwidth)


GPUS = {
    "h100": GPU("NVIDIA H100 80GB HBM3", memory=int(79.1 * GIB), bandwidth=3_350_000_000_000),
    "h200": GPU("NVIDIA H200", memory=int(139.8 * GIB), bandwidth=4_800_000_000_000),
}
COUNTS = (1, 2, 4, 8)  # GPUs of one node

TARGET = """
platform_name: "CUDA"
device_description_str: "{name}"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 12 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""


def pool_share() -> float:
    """The share of a GPU's memory that JAX's pool takes in a job; ConfigError where the environment names none."""
    for name in SHARE_VARIABLES:
        if value := os.environ.get(name):
            try:
                return float(value)
            except ValueError:
                raise ConfigError(f"{name} is {value!r}, not a share of a GPU's memory such as {POOL_SHARE}") from None
    return POOL_SHARE


def claim_memory() -> None:
    """Have JAX's pool take `pool_share` of every GPU; before the first array is made."""
    if not any(os.environ.get(name) for name in SHARE_VARIABLES):
        os.environ[SHARE_VARIABLES[0]] = str(POOL_SHARE)
