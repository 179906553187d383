"""Will a job fit? Its programs, compiled ahead of time for TPUs or GPUs that are not there, and what each must hold."""

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import jax
from jax.sharding import Mesh

from firm_jax.collectives import collective_bytes
from firm_jax.mesh import make_mesh
from firm_jax.topology import GIB, Topology, devices, parse

# An instruction is named after its kernel, with a number behind it.
_KERNEL = re.compile(r"%(\w+)[.\d]* = .* custom-call\(.*custom_call_target=\"tpu_custom_call\"")


@dataclass(frozen=True)
class Program:
    """One jitted function of a job, and what it is given: shapes with shardings in the place of arrays.

    arguments, keywords: of the function's `lower`. fed: those of them, and what else is alive beside them, that come
    on top of what the job keeps on its devices all the time. flops: of one run over all devices, by our own count.
    calls: runs an epoch at most. limit: config key of the batch size by which its memory grows, where there is one.
    trips: of a loop whose end depends on data, at most.
    """

    name: str
    function: Callable
    arguments: tuple
    fed: object
    flops: int
    calls: int
    keywords: Mapping = field(default_factory=dict)
    limit: str | None = None
    trips: int = 1


class Programs(Protocol):
    """What a job gives to be planned: what it keeps on the devices for the whole run, and its programs in order."""

    def resident(self) -> Mapping[str, object]: ...

    def programs(self) -> Iterable[Program]: ...


@dataclass(frozen=True)
class Needs:
    """What one program needs, in bytes a device unless said.

    peak: of arguments, temporaries and outputs together, by the compiler's account. fed: as in Program. received: by
    collectives in one run, by kind. seconds, cpu_seconds: of compiling, by the clock and of this process's CPU, which
    other work on the machine changes less. refused: what the compiler says of a program that it cannot place; of its
    memory no more may be known then than the arguments and one number. kernels: of Pallas, that are in the program.
    """

    program: Program
    peak: int
    fed: int
    arguments: int = 0
    temporaries: int = 0
    output: int = 0
    received: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    refused: str | None = None
    cpu_seconds: float = 0.0
    kernels: tuple[str, ...] = ()

    def beside(self, resident: int) -> int:
        """Bytes in use while the program runs, with all that the job keeps."""
        return resident + self.fed + self.peak - self.arguments


@dataclass(frozen=True)
class Plan:
    """A job that has been compiled for a topology. resident: bytes on each device for the whole run, by what it is."""

    topology: Topology
    mesh: Mesh
    resident: Mapping[str, int]
    needs: Sequence[Needs]

    @property
    def kept(self) -> int:
        """Bytes on each device for the whole run."""
        return sum(self.resident.values())


def plan(config, name: str, programs_of: Callable[[object, Mesh], Programs], say: Callable = print) -> bool:
    """Compile a config's job for a topology and print what it needs; returns whether it fits. See `compile_job`."""
    made = compile_job(config, name, programs_of, say)
    fits, verdict = judge(made.topology, made.mesh, made.kept, made.needs)
    say("\n".join(["", *report(made.topology, made.mesh, made.resident, made.needs), "", verdict]))
    return fits


def compile_job(config, name: str, programs_of: Callable[[object, Mesh], Programs], say: Callable = print) -> Plan:
    """Every program of a config's job, compiled for a topology, and a line said of each.

    programs_of: the job's programs from its config and a mesh. Nothing is read but the models' configs, and nothing is
    written. Raises ConfigError for a topology, a mesh or a config that is none, and without the compiler for it.
    """
    topology = parse(name)
    mesh = make_mesh(**config.mesh, devices=devices(topology))
    job = programs_of(config, mesh)
    resident = {what: shard_bytes(tree) for what, tree in job.resident().items()}
    needs = []
    for program in job.programs():
        needs.append(measure(program, mesh))
        say(f"compiled {program.name} in {needs[-1].seconds:.0f} s", flush=True)
    return Plan(topology, mesh, resident, needs)


def shard_bytes(tree) -> int:
    """Bytes that one device holds of a tree of shapes; other leaves are constants of their programs."""
    shapes = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in shapes)


def measure(program: Program, mesh: Mesh) -> Needs:
    """Compile one program for the mesh's devices and account for it."""
    fed, start, start_cpu = shard_bytes(program.fed), time.perf_counter(), time.process_time()
    try:
        with jax.set_mesh(mesh):
            compiled = program.function.lower(*program.arguments, **program.keywords).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        return replace(exhausted(program, fed, str(error)), seconds=seconds, cpu_seconds=cpu_seconds)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    memory, text = compiled.memory_analysis(), compiled.as_text()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Needs(
        program,
        max(memory.peak_memory_in_bytes, arguments + temporaries + output),
        fed,
        arguments,
        temporaries,
        output,
        collective_bytes(text, program.trips),
        seconds,
        cpu_seconds=cpu_seconds,
        kernels=pallas_kernels(text),
    )


def pallas_kernels(text: str) -> tuple[str, ...]:
    """Names of the Pallas kernels in the text of a program that is compiled for TPUs."""
    return tuple(sorted(set(_KERNEL.findall(text))))


def exhausted(program: Program, fed: int, message: str) -> Needs:
    """What is known of a program that the compiler refuses for its memory."""
    refused = message.strip().splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    arguments = shard_bytes(program.arguments)
    if temporaries := re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message):
        size = _bytes(*temporaries.groups())
        return Needs(program, arguments + size, fed, arguments, size, refused=refused)
    used = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    peak = max(arguments, _bytes(*used.groups()) if used else 0)
    return Needs(program, peak, fed, arguments, peak - arguments, refused=refused)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** (1 + "KMGT".index(unit)))


def judge(topology: Topology, mesh: Mesh, resident: int, needs: Sequence[Needs]) -> tuple[bool, str]:
    """Whether everything fits, and the line that says so, with a remedy where it does not."""
    most = max(needs, key=lambda need: need.beside(resident))
    hbm, used = topology.generation.hbm, most.beside(resident)
    fits = used <= hbm and not any(need.refused for need in needs)
    sizes = f"{_gib(used)} of {_gib(hbm)} GiB a {topology.generation.unit}"
    if fits:
        return True, f"{topology.name} fits: {sizes} at most ({most.program.name}), a margin of {_gib(hbm - used)} GiB"
    line = f"{topology.name} does not fit: {sizes} ({most.program.name}), a margin of {_gib(hbm - used)} GiB"
    return False, f"{line}\n{_remedy(topology, mesh, resident, most)}"


def _remedy(topology: Topology, mesh: Mesh, resident: int, most: Needs) -> str:
    unit = topology.generation.unit
    if mesh.shape["data"] > 1:
        fsdp = mesh.shape["data"] * mesh.shape["fsdp"]
        return (
            f"Every device holds 1/{mesh.shape['fsdp'] * mesh.shape['tensor']} of the large weights. To split them "
            f"further: --config.mesh.data=1 --config.mesh.fsdp={fsdp}"
        )
    if resident < topology.generation.hbm and most.program.limit:
        return f"The weights fit, this program does not: lower {most.program.limit}, or take more {unit}s."
    return f"The weights are split over all devices already: take more {unit}s, or {unit}s with more memory."


def report(topology: Topology, mesh: Mesh, resident: Mapping[str, int], needs: Sequence[Needs]) -> list[str]:
    """The lines of the table."""
    total, unit = sum(resident.values()), topology.generation.unit
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [
        f"{topology.name}: {topology.size} {unit}{'s' * (topology.size > 1)} with {_gib(topology.generation.hbm)} GiB "
        f"that programs may use, mesh {sizes}",
        "",
        f"kept on each {unit} for the whole run, GiB",
        *(f"  {what:<28}{_gib(size):>8}" for what, size in resident.items()),
        f"  {'in all':<28}{_gib(total):>8}",
        "",
        f"{'':<24}{f'GiB a {unit}':^50}{'one run':^22}{'runs an':>8}{'seconds to':>11}",
        f"{'program':<24}{'arguments':>10}{'temporary':>10}{'output':>10}{'peak':>10}{'in use':>10}"
        f"{'TFLOP':>10}{'GiB moved':>12}{'epoch':>8}{'compile':>11}",
    ]
    for need in needs:
        memory = (need.arguments, need.temporaries, need.output, need.peak, need.beside(total))
        cells = ["-" if need.refused and size == 0 else _gib(size) for size in memory]
        moved = "-" if need.refused else _gib(sum(need.received.values()))
        lines.append(
            f"{need.program.name:<24}"
            + "".join(f"{cell:>10}" for cell in cells)
            + f"{need.program.flops / 1e12:>10.2f}{moved:>12}{need.program.calls:>8}{need.seconds:>11.0f}"
        )
    most = max(need.beside(total) for need in needs)
    flops = sum(need.program.calls * need.program.flops for need in needs) / 1e12
    moved = sum(need.program.calls * sum(need.received.values()) for need in needs)
    lines.append(
        f"{'most, or sum of an epoch':<54}{_gib(max(need.peak for need in needs)):>10}{_gib(most):>10}"
        f"{flops:>10.0f}{_gib(moved):>12}{'':>8}{sum(need.seconds for need in needs):>11.0f}"
    )
    lines += [f"{need.program.name}: {need.refused}" for need in needs if need.refused]
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
