"""Teachers for workers on Ray, where each is another process: the bill is a file, and a worker can be made to die.

    python ray_world.py FOLDER LEDGER BILLS RAY

curates the folder's records on a local Ray, whose files are in RAY, and writes what was found to FOLDER/found.json; to
be killed at any moment.
"""

import asyncio
import functools
import json
import os
import sys
from pathlib import Path

import curation_world as world
import ray
from scripted_teacher import QUICK, SETTINGS, ScriptedTeacher

from firm_jax.curation import difference_first, plan_then_score
from firm_jax.curation.ledger import Budget
from firm_jax.curation.ray_engine import RayEngine
from firm_jax.curation.stage import Record
from firm_jax.curation.teacher import Teacher

GEN = plan_then_score.stages(world.RUBRICS["alignment"])
EDIT = difference_first.stages(world.RUBRICS)
HERE = Path(__file__).parent


def start(folder: str) -> None:
    """A local Ray of two CPUs. The folder's name must be short: sockets have short names."""
    os.environ.update(PYTHONPATH=f"{HERE.parent}:{HERE}", JAX_PLATFORMS="cpu", RAY_USAGE_STATS_ENABLED="0")
    ray.init(
        num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False,
        _temp_dir=folder,
    )  # fmt: skip


def play(bills: str, fatal: str | None, number: int, text: str, pictures) -> str:
    """The wise teacher, who writes a line for each answer. Whoever asks first after the file `fatal` is there dies."""
    with open(bills, "a") as sheet:
        sheet.write(f"{json.dumps([text, [int(one.sum()) for one in pictures]])}\n")
    if fatal and number > 2:
        try:
            os.remove(fatal)  # one process alone can
        except FileNotFoundError:
            pass
        else:
            os._exit(1)
    return world.wise(number, text, pictures)


def make(bills: str, fatal: str | None = None, after: float = 0.01) -> Teacher:
    return Teacher(SETTINGS, QUICK, transport=ScriptedTeacher(functools.partial(play, bills, fatal), after))


def for_job(bills: str, after: float, settings, policy) -> Teacher:
    """In the place of the job's own teachers."""
    return Teacher(settings, policy, transport=ScriptedTeacher(functools.partial(play, bills, None), after))


def engine(stages, ledger, folder, *made, workers=2, concurrency=4, budget: Budget | None = None) -> RayEngine:
    teachers = dict.fromkeys(world.ROLES, functools.partial(make, *made))
    return RayEngine(stages, teachers, ledger, folder, workers=workers, concurrency=concurrency, budget=budget)


async def collect(running: RayEngine, records) -> list:
    return [outcome async for outcome in running.run(records)]


def records(folder: Path) -> list[Record]:
    """Edits of which every second one is asked twice, and whose pictures have two instructions: they share calls."""
    asked = world.records(folder, 8, images=2)
    other = [Record(f"{one.id}/other", f"not {one.prompt}", one.images) for one in asked]
    twice = [Record(f"{one.id}/again", one.prompt, one.images) for one in asked[::2]]
    return [*asked, *other, *twice]


def written(found) -> str:
    return json.dumps([(one.record.id, sorted(map(str, one.answers.items()))) for one in found])


if __name__ == "__main__":
    place, book, sheet, short = sys.argv[1:]
    start(short)
    asked = records(Path(place))
    Path(place, "found.json").write_text(
        written(asyncio.run(collect(engine(EDIT, book, place, sheet, None, 0.05), asked)))
    )
