"""Every plan in `benchmarks/plans` as one page of Markdown, `docs/tpu-plans.md`. Made by `benchmarks.tpu_plans`."""

import json
from collections.abc import Callable, Iterator, Sequence

from benchmarks.harness import ROOT
from firm_jax.topology import GIB

PLANS = ROOT / "benchmarks" / "plans"
PAGE = ROOT / "docs" / "tpu-plans.md"
# The jobs, by the config that they are: each with the 8B critic on the same chips.
JOBS = {
    "sd3": "configs/gen_qma.py",
    "qwen_image": "configs/gen_qma.py:qwen_image",
    "qwen_image_edit": "configs/edit_cme.py",
}
# Google's names for them: v5e-16, v6e-8, v5p-8 (four chips of two cores each), v6e-16, v5e-64.
TOPOLOGIES = ("v5e:4x4", "v6e:2x4", "v5p:2x2x1", "v6e:4x4", "v5e:8x8")
PHASES = ("encoding", "rollout", "VAE decode", "critic", "NFT update")
HEAD = """# TPU plans

The large jobs at full size, each compiled for TPU slices by the TPU's own compiler, without a TPU: what a chip holds,
computes and moves. [How such a plan is read](fit.md). Nothing here says how fast it runs. This page is made by
`python -m benchmarks.tpu_plans` from the files in `benchmarks/plans`, and a test holds the two equal. That command
compiles those that are missing first, and `python -m benchmarks.tpu_plans --job sd3 --topology v5e:4x4` one anew. No
TPU and no weights are needed for it, but `pip install -e '.[tpu]'`.

`v5e:4x4` is what Google calls v5e-16, `v5e:8x8` v5e-64, `v6e:2x4` v6e-8, `v6e:4x4` v6e-16, and `v5p:2x2x1` v5p-8: four
chips, named after their eight cores. The critic, 8B, is on the same chips in every job.
"""
WORK = """## Work and traffic

TFLOP an image by our own count, of an epoch's work over all chips: of matmuls, convolutions and attention. Questions to
the critic are taken to be answered at full length (1,024 tokens), so its share is the most that there can be. Where
there are more chips than a batch has rows, rows are added and counted. GiB moved is what each chip receives from
others in an epoch, evaluation left out. Seconds to compile are of all programs, evaluation's too: of the process's CPU,
and by the clock of a machine on which other work ran.

Files of commit 2b0ebc8 (the last table has each file's) were made when the critic's wide projections were cut along
their input, and SD3's micro-batches had 16 images, not 64. What they say is moved is too much by now: on `v5e:4x4` the
critic's decoding moved 3.7 times as much as today, and SD3's update 3.9 times. For that slice most in use stayed as it
was; the others were not compiled anew.
"""
SPLASH = """## Splash attention

Programs in whose compiled form Pallas's splash kernel is found. Some attention goes without it everywhere: T5's, which
adds a bias; the VAE's, in float32; and the critic's decoding, whose single query stands at a place of its own in each
row. Splicing, copying and dropping rows have none.
"""
PROGRAMS = """## In use, by program

GiB on each chip while a program runs, with all that the job keeps there.
"""


def stored() -> list[dict]:
    """The plans that are kept, by job and topology in the order of the page."""
    found = [json.loads(file.read_text()) for file in PLANS.glob("*.json")]
    return sorted(found, key=lambda plan: (list(JOBS).index(plan["job"]), TOPOLOGIES.index(plan["topology"])))


def page(plans: Sequence[dict]) -> str:
    """Markdown of plans as `stored` gives them."""
    if not plans:
        return "\n".join([HEAD, *missing(plans)])
    parts = [HEAD, *sizes(plans), *missing(plans), WORK, *work(plans), SPLASH, *splash(plans), PROGRAMS]
    for job in JOBS:
        if own := [plan for plan in plans if plan["job"] == job]:
            parts += programs(own)
    return "\n".join([*parts, *making(plans)])


def sizes(plans: Sequence[dict]) -> Iterator[str]:
    yield "## What a chip holds\n"
    yield "| job | topology | chips | kept for the whole run | most in use | of | fits | decided by |"
    yield "|---|---|---|---|---|---|---|---|"
    for plan in plans:
        fits = "yes" if plan["fits"] else "**no**"
        yield (
            f"| {name_of(plan)} | `{plan['topology']}` | {plan['chips']} | {gib(plan['kept'])} GiB | "
            f"{gib(plan['in_use'])} GiB | {gib(plan['memory'])} GiB | {fits} | {plan['decided_by']} |"
        )
    yield ""
    for plan in plans:
        if not plan["fits"]:
            yield f"- {name_of(plan)}: {'. '.join(plan['verdict'].splitlines())}\n"


def missing(plans: Sequence[dict]) -> Iterator[str]:
    """Which of the plans that the page is for have not been compiled."""
    there = {(plan["job"], plan["topology"]) for plan in plans}
    for job, config in JOBS.items():
        if lacking := [f"`{topology}`" for topology in TOPOLOGIES if (job, topology) not in there]:
            yield f"Not compiled yet: `{config}` for {', '.join(lacking)}.\n"


def work(plans: Sequence[dict]) -> Iterator[str]:
    columns = (*PHASES, "TFLOP an image", "GiB moved", "CPU seconds to compile", "by the clock")
    yield f"| job | topology | {' | '.join(columns)} |"
    yield "|---|---" + "|---" * len(columns) + "|"
    for plan in plans:
        flops = [flops_of(plan, phase) / plan["images"] / 1e12 for phase in PHASES]
        cells = [f"{number:,.2f}" for number in (*flops, sum(flops))]
        cells.append(f"{sum(plan['epoch']['received'].values()) / GIB:,.0f}")
        cells += [f"{plan['cpu_seconds']:,.0f}", f"{plan['seconds']:,.0f}"]
        yield f"| {name_of(plan)} | `{plan['topology']}` | {' | '.join(cells)} |"
    yield "\nGiB that each chip receives in an epoch, by phase:\n"
    yield from traffic(plans, PHASES, received_in)
    yield "\nAnd by kind of collective:\n"
    kinds = sorted({kind for plan in plans for kind in plan["epoch"]["received"]})
    yield from traffic(plans, kinds, lambda plan, kind: plan["epoch"]["received"].get(kind, 0))
    yield ""


def traffic(plans: Sequence[dict], columns: Sequence[str], received: Callable[[dict, str], float]) -> Iterator[str]:
    """A table of the bytes that `received` gives for a plan and a column, in GiB."""
    yield f"| job | topology | {' | '.join(columns)} |"
    yield "|---|---" + "|---" * len(columns) + "|"
    for plan in plans:
        cells = [f"{received(plan, column) / GIB:,.1f}" for column in columns]
        yield f"| {name_of(plan)} | `{plan['topology']}` | {' | '.join(cells)} |"


def splash(plans: Sequence[dict]) -> Iterator[str]:
    yield "| job | topologies | with splash | without |"
    yield "|---|---|---|---|"
    alike: dict[tuple, list[str]] = {}
    for plan in plans:
        with_it, without = [], []
        for program in plan["programs"]:
            (with_it if has_splash(program) else without).append(program["name"])
        key = (name_of(plan), ", ".join(with_it), ", ".join(without))
        alike.setdefault(key, []).append(f"`{plan['topology']}`")
    for (job, with_it, without), topologies in alike.items():
        yield f"| {job} | {', '.join(topologies)} | {with_it} | {without} |"
    yield ""


def programs(plans: Sequence[dict]) -> Iterator[str]:
    """A job's programs in the order in which they run, beside each other for its topologies."""
    yield f"| {name_of(plans[0])} | {' | '.join('`' + plan['topology'] + '`' for plan in plans)} |"
    yield "|---" * (len(plans) + 1) + "|"
    names = dict.fromkeys(program["name"] for plan in plans for program in plan["programs"])
    for name in names:
        found = [{program["name"]: program for program in plan["programs"]}.get(name) for plan in plans]
        cells = ["" if program is None else gib(program["in_use"]) for program in found]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def making(plans: Sequence[dict]) -> Iterator[str]:
    yield "## How these were made\n"
    yield "| command | date | commit | jax | libtpu | cores |"
    yield "|---|---|---|---|---|---|"
    for plan in plans:
        changed = ", with changes" * plan["revision"].endswith("-dirty")
        versions, machine = plan["versions"], plan["machine"]
        yield (
            f"| `{plan['command']}` | {plan['date']} | {plan['revision'][:12]}{changed} | {versions['jax']} | "
            f"{versions['libtpu']} | {machine['cores']} of {machine['cpu']}, load {machine['load_before']} before |"
        )
    yield ""


def phase_of(program: str) -> str | None:
    """The phase of an epoch that a program belongs to; None for evaluation."""
    if program.startswith("critic: "):
        return "critic"
    return {"VAE encode": "encoding", "encode prompts": "encoding"}.get(program, program if program in PHASES else None)


def flops_of(plan: dict, phase: str) -> int:
    """Of an epoch, over all chips."""
    own = [program for program in plan["programs"] if phase_of(program["name"]) == phase]
    return sum(program["calls"] * program["flops"] for program in own)


def received_in(plan: dict, phase: str) -> float:
    """Bytes that each chip receives in an epoch."""
    own = [program for program in plan["programs"] if phase_of(program["name"]) == phase]
    return sum(program["calls"] * sum(program["received"].values()) for program in own)


def has_splash(program: dict) -> bool:
    return any(kernel.startswith("splash_") for kernel in program["kernels"])


def name_of(plan: dict) -> str:
    return plan["model"].rpartition("/")[2]


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"
