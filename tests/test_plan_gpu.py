"""Plans for GPUs: what JAX's pool takes of their memory, and what the real CUDA compiler says without one.

It speaks in processes of its own: JAX's CUDA plugin looks for a GPU where the other tests run.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax._src import xla_bridge
from jaxlib.xla_client import generate_pjrt_gpu_plugin_options

from firm_jax import gpus, topology
from firm_jax.errors import ConfigError

ROOT = Path(__file__).parent.parent
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")

needs_the_compiler = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, PLUGINS)), reason="needs JAX's CUDA compiler: pip install -e '.[cuda13]'"
)


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables that name the pool's share, and no others of them."""

    def set_only(**values):
        for name in gpus.SHARE_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    set_only()
    return set_only


@pytest.mark.fault("wrong-config")
def test_without_the_cuda_compiler_the_message_says_what_to_install(monkeypatch):
    jax.devices()  # plugins are looked for once
    monkeypatch.setattr(xla_bridge, "_topology_factories", {})
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[cuda13\]'"):
        topology.devices(topology.parse("h100:1"))


@pytest.mark.parametrize(
    ("named", "share"),
    [({}, 0.9), ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, 0.5), ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}, 0.6)],
)
def test_a_plan_counts_on_the_memory_that_jax_is_told_to_take_in_a_job(environment, named, share):
    environment(**named)
    assert topology.parse("h200:1").generation.hbm == int(139.8 * share * 2**30)
    gpus.claim_memory()
    assert generate_pjrt_gpu_plugin_options()["memory_fraction"] == share


@pytest.mark.fault("wrong-config")
def test_a_share_of_memory_that_is_no_number_is_named(environment):
    environment(XLA_CLIENT_MEM_FRACTION="most")
    with pytest.raises(ConfigError, match="XLA_CLIENT_MEM_FRACTION is 'most'"):
        topology.parse("h100:1").generation.hbm  # noqa: B018


def started(*command: str) -> subprocess.Popen:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", *gpus.SHARE_VARIABLES)
    }
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SMALL = """
import json
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from firm_jax.collectives import collective_bytes
from firm_jax.config import load_config
from firm_jax.mesh import make_mesh
from firm_jax.models.attention import attention
from firm_jax.plan import measure
from firm_jax.rl.programs import RLPrograms
from firm_jax.topology import devices, parse

jax.config.update("jax_num_cpu_devices", 2)
found = {"devices": {name: len(devices(parse(name))) for name in ("h100:1", "h100:8", "h200:2", "h200:4")}}

def shape(mesh, spec, *dimensions):
    return jax.ShapeDtypeStruct(dimensions, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

def loss(kernels, x):
    def layer(x, kernels):
        return jnp.tanh(jnp.tanh(x @ kernels[0]) @ kernels[1]), None
    return jax.lax.scan(jax.checkpoint(layer), x, kernels)[0].astype(jnp.float32).sum()

mesh = make_mesh(data=1, fsdp=8, devices=devices(parse("h100:8")))
with jax.set_mesh(mesh):
    kernels = [shape(mesh, P(None, "fsdp"), 6, 1024, 1024)] * 2
    compiled = jax.jit(jax.grad(loss)).lower(kernels, shape(mesh, P(("data", "fsdp")), 4096, 1024)).compile()
    found["received"] = collective_bytes(compiled.as_text())
    for width in (64, 12):
        q = shape(mesh, P(("data", "fsdp")), 16, 256, 4, width)
        found[f"cudnn {width}"] = "cudnn" in jax.jit(attention).lower(q, q, q).as_text()

config = load_config("configs/gen_qma.py")
for kind, present in (("cpu", jax.devices()), ("gpu", devices(parse("h200:2")))):
    mesh = make_mesh(data=1, fsdp=2, devices=present)
    programs = {program.name: program for program in RLPrograms(config, mesh).programs()}
    needs = [measure(programs[name], mesh) for name in ("critic: picture prefill", "critic: decode")]
    found[kind] = {need.program.name: need.arguments for need in needs}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def small():
    process = started("-c", SMALL)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@needs_the_compiler
def test_nodes_of_one_gpu_and_of_several(small):
    assert small["devices"] == {"h100:1": 1, "h100:8": 8, "h200:2": 2, "h200:4": 4}


@needs_the_compiler
def test_the_compiled_step_gathers_each_layer_twice_and_scatters_its_gradient(small):
    """Forwards and, with remat, backwards; kernels of a layer are gathered together, and every one is counted."""
    kernels = 2 * 6 * 1024 * 1024 * 2
    assert small["received"] == {
        "all-gather": pytest.approx(2 * kernels * 7 / 8),
        "reduce-scatter": pytest.approx(kernels * 7 / 8),
    }


@needs_the_compiler
def test_a_program_for_gpus_has_their_attention_where_that_takes_the_width_of_a_head(small):
    assert small["cudnn 64"] and not small["cudnn 12"]


@needs_the_compiler
def test_what_programs_are_given_is_as_large_as_on_a_cpu(small):
    """To the byte, although other compilers count it; of the job at full size."""
    assert small["gpu"] == small["cpu"]
    assert min(small["gpu"].values()) > 2**30
