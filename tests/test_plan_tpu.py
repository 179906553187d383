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


ANEW = """
import json
from benchmarks.tpu_plans import make
print(json.dumps(make("sd3", "v5e:4x4")))
"""


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_stored_plan_that_is_compiled_anew_needs_what_it_did():
    """Ten minutes of one core, and 6 GB of memory. The compiler has a part in temporaries and traffic, not in more."""
    found = answer(ANEW, 7000)
    (stored,) = (plan for plan in plan_tables.stored() if (plan["job"], plan["topology"]) == ("sd3", "v5e:4x4"))
    assert found["fits"] and found["resident"] == stored["resident"]
    assert [one["name"] for one in found["programs"]] == [one["name"] for one in stored["programs"]]
    for one, before in zip(found["programs"], stored["programs"], strict=True):
        assert all(one[key] == before[key] for key in ("flops", "calls", "kernels")), one["name"]
        assert one["arguments"] == pytest.approx(before["arguments"], rel=0.01), one["name"]
        assert one["in_use"] == pytest.approx(before["in_use"], rel=0.05), one["name"]
        assert sum(one["received"].values()) == pytest.approx(sum(before["received"].values()), rel=0.05), one["name"]
