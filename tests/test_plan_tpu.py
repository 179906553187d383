"""What the real TPU compiler says, each in a process of its own: libtpu is not loaded where the other tests run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import plan_tables

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[tpu]'"
)

ROOT = Path(__file__).parent.parent


def started(*command: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    paths = f"{ROOT}:{ROOT / 'tests'}"
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(code: str, timeout: float = 300):
    """What a program prints as JSON in its last line."""
    process = started("-c", code)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


TOPOLOGIES = """
import json
from firm_jax.topology import devices, parse
names = "v5e:1x1 v5e:4x4 v5e:16x16 v5p:1x1x1 v5p:2x2x1 v5p:4x4x8 v6e:1x1 v6e:2x4 v6e:8x8".split()
print(json.dumps({name: [len(devices(parse(name))), parse(name).size] for name in names}))
"""


def test_topologies_of_every_generation_one_chip_one_host_and_many():
    assert all(present == named for present, named in answer(TOPOLOGIES).values())


SMALL = """
import json
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from firm_jax.collectives import collective_bytes
from firm_jax.mesh import make_mesh
from firm_jax.models.attention import attention
from firm_jax.plan import Program, measure
from firm_jax.topology import devices, parse

def shape(mesh, dtype, spec, *dimensions):
    return jax.ShapeDtypeStruct(dimensions, dtype, sharding=NamedSharding(mesh, spec))

def layers(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

mesh = make_mesh(data=1, fsdp=16, devices=devices(parse("v5e:4x4")))
found = {}
with jax.set_mesh(mesh):
    x = shape(mesh, jnp.bfloat16, P(("data", "fsdp")), 4096, 1024)
    compiled = jax.jit(layers).lower(x, shape(mesh, jnp.bfloat16, P(None, "fsdp"), 6, 1024, 1024)).compile()
    found["received"] = sum(collective_bytes(compiled.as_text()).values())
q = shape(mesh, jnp.bfloat16, P(("data", "fsdp")), 16, 256, 4, 64)
found["kernels"] = measure(Program("attention", jax.jit(attention), (q, q, q), (), 0, 1), mesh).kernels
need = measure(Program("product", jax.jit(lambda x: x @ x), (shape(mesh, jnp.float32, P(), 64, 64),), (), 0, 1), mesh)
found["others"] = need.kernels
big = shape(mesh, jnp.float32, P("fsdp"), 16, 2**32)  # 16 GiB a chip
need = measure(Program("big", jax.jit(lambda x: x * 2), (big,), (), 0, 1), mesh)
found["refused"], found["peak"] = need.refused, need.peak / 2**30
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def small():
    return answer(SMALL)


def test_the_compiled_program_gathers_each_layer_once(small):
    """Its loops, in which it spreads gathers over steps, are all counted right: no other factor gives this size."""
    gathered = 6 * 1024 * 1024 * 2
    assert gathered * 15 / 16 <= small["received"] <= gathered * 1.05


def test_the_mesh_decides_about_attention_not_the_machine(small):
    assert small["kernels"] == ["splash_mha_fwd_segmented_no_residuals"] and small["others"] == []


def test_a_program_beyond_the_memory_is_reported_with_its_size(small):
    assert "emory" in small["refused"]
    assert small["peak"] >= 16


def test_two_plans_at_once_do_not_mind_each_other():
    plans = [started("-c", TOPOLOGIES) for _ in range(2)]
    for process in plans:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]


COUNTED = """
import json
from benchmarks.plan_tables import stored
from firm_jax.topology import devices, parse
from test_tpu_plans import today
print(json.dumps([today(plan["job"], devices(parse(plan["topology"]))) for plan in stored()]))
"""


@pytest.mark.slow
def test_what_is_kept_and_counted_on_every_slice_is_what_is_stored():
    """Three seconds a plan: nothing is compiled."""
    for plan, (kept, programs) in zip(plan_tables.stored(), answer(COUNTED, 900), strict=True):
        assert plan["resident"] == kept
        assert {one["name"]: [one["flops"], one["calls"]] for one in plan["programs"]} == programs


# For v5e:4x4 with the default config, in GiB a chip. What is kept for the whole run is the sharding rules' work alone.
KEPT = {
    "generator": 0.69,
    "text encoders": 2.08,
    "autoencoder": 0.31,
    "critic": 1.03,
    "LoRA, averages, optimizer": 0.19,
    "encoded prompts": 0.45,
    "in all": 4.74,
}
# So are a program's arguments; in what is in use while it runs the compiler has a part.
PROGRAMS = {
    "encode prompts": (2.08, 4.83),
    "rollout": (0.85, 5.14),
    "VAE decode": (0.19, 9.91),
    "critic: picture vision": (0.10, 4.93),
    "critic: picture splice": (0.10, 5.18),
    "critic: picture prefill": (0.85, 5.09),
    "critic: splice": (0.07, 5.05),
    "critic: copies": (0.18, 7.51),
    "critic: prefill": (2.95, 7.51),
    "critic: decode": (3.00, 8.82),
    "critic: drop ended": (2.04, 9.16),
    "NFT update": (1.02, 5.47),
    "eval": (1.05, 5.38),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_full_size_job_fits_sixteen_small_chips():
    """Ten minutes of one core, and 6 GB of memory."""
    process = started("main.py", "--config", "configs/gen_qma.py", "--plan", "v5e:4x4")
    out, err = process.communicate(timeout=5400)
    assert process.returncode == 0, out + err[-3000:]
    lines = out[out.index("kept on each chip") :].splitlines()
    kept, programs = lines[1 : 1 + len(KEPT)], lines[len(KEPT) + 4 : len(KEPT) + 4 + len(PROGRAMS)]
    assert {line[:28].strip(): float(line[28:]) for line in kept} == pytest.approx(KEPT, abs=0.011)
    cells = {line[:24].strip(): line[24:].split() for line in programs}
    arguments, in_use = ({name: float(row[column]) for name, row in cells.items()} for column in (0, 4))
    assert arguments == pytest.approx({name: sizes[0] for name, sizes in PROGRAMS.items()}, abs=0.011)
    assert in_use == pytest.approx({name: sizes[1] for name, sizes in PROGRAMS.items()}, rel=0.1)
    assert lines[-1].startswith("v5e:4x4 fits: ")
