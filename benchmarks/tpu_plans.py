"""The large jobs, each compiled for TPU slices that are not there: what a chip holds, computes and moves.

    python -m benchmarks.tpu_plans --job sd3 --topology v5e:4x4

compiles every program of that job for that slice, writes `benchmarks/plans/<job>_<topology>.json`, and makes
`docs/tpu-plans.md` anew from the files there. Without --job and --topology, all that are not there yet. It needs no
TPU and no weights, but `pip install -e '.[tpu]'`. With --page it compiles nothing.
"""

import argparse
import itertools
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax

from benchmarks import plan_tables
from benchmarks.harness import ROOT, machine, revision, versions
from benchmarks.plan_tables import JOBS, PLANS, TOPOLOGIES
from firm_jax.config import load_config
from firm_jax.devices import say_nothing_of_absent_devices
from firm_jax.plan import Needs, Plan, compile_job, judge
from firm_jax.rl.programs import RLPrograms


def file_of(job: str, topology: str) -> Path:
    return PLANS / f"{job}_{topology.replace(':', '_')}.json"


def make(job: str, topology: str) -> dict:
    """Compile one job for one topology: what its file holds. Raises ConfigError as `--plan` does."""
    jax.config.update("jax_platforms", "cpu")  # whatever chips this machine has are left alone
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled here cannot run here
    say_nothing_of_absent_devices()
    config = load_config(str(ROOT / JOBS[job]))
    found = {
        "job": job,
        "topology": topology,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m benchmarks.tpu_plans --job {job} --topology {topology}",
        "config": JOBS[job],
        "model": config.model,
        "critic": config.critic.model,
        "images": config.group.prompts_per_epoch * config.group.images_per_prompt,
        "revision": revision(),
        "machine": machine(),
        "versions": versions(),
    }
    return found | told(compile_job(config, topology, RLPrograms))


def told(plan: Plan) -> dict:
    """A plan as JSON: bytes on each chip, operations over all chips, seconds. An epoch's totals leave out evaluation,
    whose programs run in some epochs only; those of compiling are of all programs."""
    generation, kept = plan.topology.generation, plan.kept
    most = max(plan.needs, key=lambda need: need.beside(kept))
    fits, verdict = judge(plan.topology, plan.mesh, kept, plan.needs)
    received: Counter[str] = Counter()
    for need in plan.needs:
        received.update({kind: need.program.calls * size for kind, size in need.received.items()})
    return {
        "chips": plan.topology.size,
        "mesh": dict(plan.mesh.shape),
        "memory": generation.hbm,
        "fits": fits,
        "verdict": verdict,
        "kept": kept,
        "in_use": most.beside(kept),
        "decided_by": most.program.name,
        "epoch": {
            "flops": sum(need.program.calls * need.program.flops for need in plan.needs),
            "received": dict(received),
        },
        "seconds": sum(need.seconds for need in plan.needs),
        "cpu_seconds": sum(need.cpu_seconds for need in plan.needs),
        "resident": dict(plan.resident),
        "programs": [told_of(need, kept) for need in plan.needs],
    }


def told_of(need: Needs, kept: int) -> dict:
    """One program of a plan."""
    return {
        "name": need.program.name,
        "calls": need.program.calls,
        "flops": need.program.flops,
        "arguments": need.arguments,
        "temporaries": need.temporaries,
        "output": need.output,
        "peak": need.peak,
        "in_use": need.beside(kept),
        "received": dict(need.received),
        "kernels": list(need.kernels),
        "refused": need.refused,
        "seconds": need.seconds,
        "cpu_seconds": need.cpu_seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs="*", choices=JOBS)
    parser.add_argument("--topology", nargs="*")
    parser.add_argument("--page", action="store_true", help="only make the page anew")
    asked = parser.parse_args(arguments)
    wanted = [] if asked.page else itertools.product(asked.topology or TOPOLOGIES, asked.job or JOBS)
    for topology, job in wanted:
        if not (asked.job or asked.topology) and file_of(job, topology).exists():
            continue
        print(f"{job} on {topology}", flush=True)
        # Each in a process of its own: nothing is left of one when the next begins.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            made = pool.submit(make, job, topology).result()
        PLANS.mkdir(exist_ok=True)
        file_of(job, topology).write_text(json.dumps(made, indent=1) + "\n")
    plan_tables.PAGE.write_text(plan_tables.page(plan_tables.stored()))


if __name__ == "__main__":
    main()
