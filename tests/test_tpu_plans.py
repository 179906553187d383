"""The stored plans of the large jobs: still what the code computes, still fitting, and all that their page says."""

import json
from dataclasses import replace

import jax
import pytest

from benchmarks import plan_tables, tpu_plans
from benchmarks.plan_tables import JOBS, TOPOLOGIES
from firm_jax.config import load_config
from firm_jax.mesh import make_mesh
from firm_jax.plan import GIB, Needs, Plan, Program, pallas_kernels, shard_bytes
from firm_jax.rl.programs import RLPrograms
from firm_jax.topology import parse

STORED = {f"{plan['job']} {plan['topology']}": plan for plan in plan_tables.stored()}


def test_the_page_is_made_of_the_stored_plans():
    assert plan_tables.PAGE.read_text() == plan_tables.page(plan_tables.stored()), (
        "run python -m benchmarks.tpu_plans --page"
    )


@pytest.mark.parametrize("plan", STORED.values(), ids=STORED)
def test_a_stored_plan_fits_and_agrees_with_itself(plan):
    assert plan["memory"] == parse(plan["topology"]).generation.hbm
    assert plan["kept"] == sum(plan["resident"].values())
    needed = {program["name"]: program["in_use"] for program in plan["programs"]}
    assert plan["in_use"] == needed[plan["decided_by"]] == max(needed.values())
    assert plan["fits"] == (plan["in_use"] <= plan["memory"] and not any(p["refused"] for p in plan["programs"]))
    assert plan["fits"] or plan["verdict"].splitlines()[0] in plan_tables.PAGE.read_text()
    flops = sum(plan_tables.flops_of(plan, phase) for phase in plan_tables.PHASES)
    assert flops == plan["epoch"]["flops"] > 0, "a program belongs to no phase"
    received = sum(plan_tables.received_in(plan, phase) for phase in plan_tables.PHASES)
    assert received == pytest.approx(sum(plan["epoch"]["received"].values()))
    for name in ("rollout", "critic: prefill", "NFT update"):
        assert plan_tables.has_splash(next(program for program in plan["programs"] if program["name"] == name)), name


def today(job: str, devices: list) -> tuple[dict, dict]:
    """Bytes that are kept on each of the devices, and each program's (operations, runs an epoch)."""
    config = load_config(str(plan_tables.ROOT / JOBS[job]))
    programs = RLPrograms(config, make_mesh(**config.mesh, devices=devices))
    kept = {what: shard_bytes(tree) for what, tree in programs.resident().items()}
    return kept, {program.name: [program.flops, program.calls] for program in programs.programs()}


@pytest.mark.parametrize("job", sorted({plan["job"] for plan in STORED.values()}))
def test_what_is_counted_today_is_what_is_stored(job):
    """On eight devices to the byte and the operation. On other numbers of them batches are rounded up otherwise."""
    kept, programs = today(job, jax.devices())
    flops = sum(flops * calls for flops, calls in programs.values())
    for plan in STORED.values():
        if plan["job"] != job:
            continue
        assert plan["epoch"]["flops"] == pytest.approx(flops, rel=0.01)
        if plan["chips"] == jax.device_count():
            assert plan["resident"] == kept
            assert {one["name"]: [one["flops"], one["calls"]] for one in plan["programs"]} == programs


def program(name: str, **given) -> Program:
    return Program(name, jax.jit(lambda x: x), (), (), **{"flops": 3 * 10**12, "calls": 2} | given)


@pytest.fixture
def made() -> dict:
    """A plan of three programs and an evaluation, as a file would hold it."""
    draw = Needs(program("rollout"), 3 * GIB, 9 * GIB, 2 * GIB, GIB, 0, {"all-gather": 1.5 * GIB}, 2.0, None, 1.0)
    judge = Needs(program("critic: decode", flops=10**12, calls=8), GIB, 0, GIB)
    update = Needs(program("NFT update", calls=1), 9 * GIB, 0, GIB, 8 * GIB, 0, {"all-reduce": GIB, "all-gather": GIB})
    update = replace(update, kernels=("splash_mha_fwd",))
    asked = Needs(program("eval", calls=0), 4 * GIB, 0, GIB, 3 * GIB, 0, {"all-gather": 99 * GIB}, 5.0, None, 4.0)
    mesh = make_mesh(data=1, fsdp=8, devices=jax.devices())
    told = tpu_plans.told(
        Plan(parse("v6e:2x4"), mesh, {"generator": 4 * GIB, "critic": GIB}, [draw, judge, update, asked])
    )
    where = {"job": "sd3", "topology": "v6e:2x4", "model": "someone/model", "images": 4, "command": "python -m it"}
    making = {"date": "2026-01-01", "revision": "abc-dirty", "versions": {"jax": "1", "libtpu": "2"}}
    return json.loads(json.dumps(where | making | {"machine": {"cpu": "x", "cores": 2, "load_before": 1}} | told))


def test_a_plan_is_told_with_the_sums_of_an_epoch(made):
    assert (made["kept"], made["in_use"], made["decided_by"]) == (5 * GIB, 15 * GIB, "rollout")
    assert made["fits"] and made["memory"] == parse("v6e:2x4").generation.hbm
    assert made["epoch"] == {"flops": 17 * 10**12, "received": {"all-gather": 4 * GIB, "all-reduce": GIB}}
    assert (made["seconds"], made["cpu_seconds"]) == (7, 5)
    assert [one["in_use"] / GIB for one in made["programs"]] == [15, 5, 13, 8]


def test_the_page_says_what_a_plan_holds_moves_and_lacks(made):
    page = plan_tables.page([made])
    assert "| model | `v6e:2x4` | 8 | 5.00 GiB | 15.00 GiB | 31.25 GiB | yes | rollout |" in page
    assert "| model | `v6e:2x4` | 0.00 | 1.50 | 0.00 | 2.00 | 0.75 | 4.25 | 5 | 5 | 7 |" in page
    assert "| model | `v6e:2x4` | 0.0 | 3.0 | 0.0 | 0.0 | 2.0 |" in page
    assert "| model | `v6e:2x4` | 4.0 | 1.0 |" in page
    assert "| model | `v6e:2x4` | NFT update | rollout, critic: decode, eval |" in page
    assert "Not compiled yet: `configs/gen_qma.py` for `v5e:4x4`, `v5p:2x2x1`, `v6e:4x4`, `v5e:8x8`." in page
    assert "| abc-dirty, with changes |" in page
    made.update({"fits": False, "verdict": "v6e:2x4 does not fit: too much\nTake more chips."})
    page = plan_tables.page([made])
    assert "| **no** |" in page and "- model: v6e:2x4 does not fit: too much. Take more chips." in page


def test_a_kernel_is_found_by_the_instruction_that_calls_it():
    text = """
  %splash_mha_fwd.1 = (f32[8,8]{1,0}, bf16[4,4]{1,0:T(8)}) custom-call(%a, %b), custom_call_target="tpu_custom_call"
  %splash_mha_fwd.12 = f32[8,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", metadata={op_name="x"}
  %other = f32[8]{0} custom-call(%a), custom_call_target="ConcatBitcast"
"""
    assert pallas_kernels(text) == ("splash_mha_fwd",)


def test_what_is_there_is_not_compiled_again_unless_it_is_asked_for(monkeypatch, tmp_path):
    asked, given = [], {"processes": []}

    class Pool:
        def __init__(self, *_, **__):
            given["processes"].append(len(asked))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, job, topology):
            asked.append((job, topology))
            self.result = lambda: {"job": job, "topology": topology}
            return self

    monkeypatch.setattr(tpu_plans, "ProcessPoolExecutor", Pool)
    for module in (tpu_plans, plan_tables):
        monkeypatch.setattr(module, "PLANS", tmp_path / "plans")
    monkeypatch.setattr(plan_tables, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(plan_tables, "page", lambda plans: f"{len(plans)} plans")
    tpu_plans.main(["--page"])
    assert asked == [] and plan_tables.PAGE.read_text() == "0 plans"
    for _ in range(2):
        tpu_plans.main(["--job", "sd3", "--topology", "v5e:4x4"])
    assert asked == [("sd3", "v5e:4x4")] * 2
    tpu_plans.main([])
    everything = [(job, topology) for topology in TOPOLOGIES for job in JOBS]
    assert asked[2:] == everything[1:] and given["processes"] == list(range(len(asked)))
    assert plan_tables.PAGE.read_text() == f"{len(everything)} plans"
