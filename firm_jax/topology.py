"""TPU slices and GPUs by name, `v5e:4x4` or `h100:8`: devices to compile for that are not there, and their memory."""

import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from firm_jax.errors import ConfigError
from firm_jax.gpus import COUNTS, GIB, GPU, GPUS

# To compile, libtpu needs nothing of this machine: it is kept from looking for a metadata server and a list of hosts,
# and from taking the lock by which it keeps two programs from the chips.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Generation:
    """One generation of TPUs: how many axes its topologies have, their largest extents, and the memory of a chip.

    hbm: bytes that a program may use, as the TPU compiler reports them when one does not fit; the data sheets' 16, 95
    and 32 GB less what the system keeps. host: the chips of one host, along each axis.
    """

    axes: int
    largest: int
    hbm: int
    host: tuple[int, int, int] = (2, 2, 1)
    unit: str = "chip"


GENERATIONS = {
    "v5e": Generation(axes=2, largest=16, hbm=int(15.75 * GIB)),
    "v5p": Generation(axes=3, largest=28, hbm=int(95.74 * GIB)),
    "v6e": Generation(axes=2, largest=16, hbm=int(31.25 * GIB)),
}
EXAMPLES = "v5e:4x4, v5p:2x2x4, h100:1 or h200:8"


@dataclass(frozen=True)
class Topology:
    """A slice of TPUs or the GPUs of a node: `name` as given, what they are, and their extent along each axis."""

    name: str
    generation: Generation | GPU
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def parse(name: str) -> Topology:
    """The topology that a name like `v5e:4x4` means; ConfigError, listing what is known, for any other name."""
    match = re.fullmatch(r"([^:]+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in GENERATIONS | GPUS:
        raise ConfigError(
            f"--plan {name}: not a topology. It is a generation of TPUs and a shape, or a GPU and a number, such as "
            f"{EXAMPLES}; known are {', '.join(GENERATIONS | GPUS)}"
        )
    if match[1] in GPUS:
        if match[2] not in map(str, COUNTS):
            raise ConfigError(
                f"--plan {name}: no such node. After {match[1]}: comes the number of GPUs, one of "
                f"{', '.join(map(str, COUNTS))}"
            )
        return Topology(name, GPUS[match[1]], (int(match[2]),))
    generation, shape = GENERATIONS[match[1]], tuple(map(int, match[2].split("x")))
    if len(shape) != generation.axes:
        raise ConfigError(
            f"--plan {name}: {match[1]} topologies have {generation.axes} axes, not {len(shape)}; for example "
            f"{match[1]}:{'x'.join('4' * generation.axes)}"
        )
    legal = all(1 <= extent <= generation.largest for extent in shape)
    whole_hosts = all(extent % chips == 0 for extent, chips in zip(shape, generation.host, strict=False))
    if not legal or not (whole_hosts or math.prod(shape) == 1):
        chips = "x".join(map(str, generation.host[: generation.axes]))
        raise ConfigError(
            f"--plan {name}: no such slice. {match[1]} slices are one chip or whole hosts of {chips} chips, and at "
            f"most {generation.largest} chips along an axis"
        )
    return Topology(name, generation, shape)


def devices(topology: Topology) -> list[jax.Device]:
    """The topology's devices, to compile for. ConfigError when the compiler is missing or knows no such topology, and
    when another process holds libtpu where the environment forbids to share it."""
    return _gpus(topology) if isinstance(topology.generation, GPU) else _tpus(topology)


def _gpus(topology: Topology) -> list[jax.Device]:
    shape = f"1x1x{topology.size}"  # slices, hosts of each, GPUs of each
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=topology.generation.target(), topology=shape
        )
    except (RuntimeError, ValueError) as error:
        if "not implemented for cuda" in str(error):
            raise ConfigError(
                "--plan needs JAX's CUDA compiler, which is not installed: pip install -e '.[cuda13]' (it compiles "
                "without a GPU and without a driver)"
            ) from None
        raise ConfigError(f"--plan {topology.name}: JAX's CUDA compiler refuses this topology: {error}") from error
    return list(described.devices)


def _tpus(topology: Topology) -> list[jax.Device]:
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--plan needs the TPU compiler, which is not installed: pip install -e '.[tpu]' (libtpu, about 140 MB)"
        ) from None
    one = {"chips_per_host_bounds": (1, 1, 1)} if topology.size == 1 else {}
    try:
        return list(topologies.get_topology_desc(topology.name, platform="tpu", **one).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if "lockfile" in str(error):
            raise ConfigError(
                f"--plan {topology.name}: another process holds libtpu, and ALLOW_MULTIPLE_LIBTPU_LOAD="
                f"{os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD']} forbids a second one; unset it, or wait for that process"
            ) from error
        raise ConfigError(f"--plan {topology.name}: libtpu refuses this topology: {error}") from error
