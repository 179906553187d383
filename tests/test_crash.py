"""The miniature's own job through main.py, ended at random moments: nothing is lost and nothing differs.

FIRM_JAX_KILLS sets how often it is killed; `FIRM_JAX_KILLS=30 pytest -m slow tests/test_crash.py` takes a while.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from events import scalars
from orbax.checkpoint import v1 as ocp

from firm_jax.checkpoint import find_damage

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("FIRM_JAX_KILLS", "3"))
EPOCHS = 4 * KILLS + 4

SMALL = {
    "train.epochs": EPOCHS, "train.updates_per_epoch": 2, "train.micro_batch": 4, "train.timesteps": 2,
    "group.prompts_per_epoch": 2, "group.images_per_prompt": 4, "rollout.steps": 3, "rollout.batch_size": 4,
    "critic.batch_size": 8, "eval.every": 5, "eval.steps": 2, "eval.prompts": 4, "eval.images_per_prompt": 1,
    "eval.judged": 4, "eval.batch_size": 4, "checkpoint.every": 1, "checkpoint.keep": 1,
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600 * KILLS),
    # Read back here without saying where the arrays should lie.
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
]


@dataclass
class Job:
    """One start of the job in a process of its own, and what it has said so far."""

    workdir: Path
    cache: Path
    process: subprocess.Popen = field(init=False)

    def __post_init__(self):
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, "main.py", "--config", "configs/gen_qma.py:tiny", "--workdir", str(self.workdir)]
        command += [f"--config.{name}={value}" for name, value in SMALL.items()]
        self.log = self.cache.parent / f"{self.workdir.name}.{time.time_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    @property
    def said(self) -> list[str]:
        return self.log.read_text().splitlines()

    @property
    def epochs(self) -> int:
        """Epochs done since this start."""
        return sum(line.startswith("epoch ") for line in self.said)

    def wait_until(self, condition, pause=0.002) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            assert self.process.poll() is None, "\n".join(self.said[-30:])
            assert time.monotonic() < deadline, "too slow"
            time.sleep(pause)

    def ended(self) -> int:
        return self.process.wait(600)


def hidden(workdir, kind):
    """Whether there is a folder that a checkpoint is written to (`saving`) or deleted from (`deleting`)."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(name.startswith(f".{kind}-") for name in os.listdir(folder))


def complete(workdir) -> list[int]:
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def results(workdir) -> list[dict]:
    """metrics.jsonl without how long things took."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("time", "throughput", "goodput"))}
        for line in lines(workdir)
    ]


def state(workdir) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(array) for name, array in ocp.load(workdir / "checkpoints" / str(2 * EPOCHS) / "state").items()
    }


def wait_for(moment: str, job: Job, rng, epoch_seconds: float) -> None:
    """Let a start of the job live until a random moment of the kind asked for."""
    if moment == "starting":
        time.sleep(rng.uniform(0, 12))
        return
    job.wait_until(lambda: job.epochs > 0, pause=0.01)
    if moment == "epoch":
        time.sleep(rng.uniform(0, 2 * epoch_seconds))
    elif moment == "logged":
        length = (job.workdir / "metrics.jsonl").stat().st_size
        job.wait_until(lambda: (job.workdir / "metrics.jsonl").stat().st_size > length, pause=0)
    else:
        job.wait_until(lambda: hidden(job.workdir, moment), pause=0)
        time.sleep(rng.uniform(0, 0.4) if moment == "saving" else 0)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happened to: its folder, the compiled programs, and how long an epoch takes."""
    folder = tmp_path_factory.mktemp("crash")
    job = Job(folder / "straight", folder / "compiled")
    assert job.ended() == 0, "\n".join(job.said[-30:])
    first, *_, last = lines(job.workdir)[1:]
    return job.workdir, job.cache, (last["time"] - first["time"]) / (EPOCHS - 1)


def assert_same_run(workdir, expected):
    assert results(workdir) == results(expected)
    files, expected_files = (
        {str(path.relative_to(folder)): path for path in (folder / "images").rglob("*.png")}
        for folder in (workdir, expected)
    )
    assert files.keys() == expected_files.keys()
    for name in ("judgements.jsonl", *files):
        assert (workdir / name).read_bytes() == (expected / name).read_bytes(), name
    arrays, expected_arrays = state(workdir), state(expected)
    assert arrays.keys() == expected_arrays.keys()
    for name, array in arrays.items():
        assert array.tobytes() == expected_arrays[name].tobytes(), name
    shown = scalars(workdir / "tensorboard", "reward/mean")
    assert shown == pytest.approx({line["step"]: line["reward/mean"] for line in lines(workdir)[1:]}, rel=1e-6)


@pytest.mark.fault("killed")
def test_kill_9_at_any_moment_of_the_real_job(straight):
    expected, cache, epoch_seconds = straight
    workdir = expected.parent / "killed"
    rng, had, found = np.random.default_rng(1), None, []
    moments = ["saving", "logged", "deleting", "epoch", "starting"]
    for number in range(KILLS):
        moment = moments[number] if number < len(moments) else rng.choice(moments)
        job = Job(workdir, cache)
        wait_for(moment, job, rng, epoch_seconds)
        assert job.process.poll() is None, "it ended before it was killed"
        job.process.kill()
        assert job.ended() == -signal.SIGKILL
        leftovers = [path.name for path in workdir.glob("checkpoints/.*")]
        found.append(f"{moment}: {job.epochs} epochs in this start, {complete(workdir)}, {leftovers}")
        print(found[-1], flush=True)
        had = assert_nothing_lost(job, workdir, had)
    job = Job(workdir, cache)
    assert job.ended() == 0, "\n".join(job.said[-30:])
    assert_nothing_lost(job, workdir, had)
    assert_same_run(workdir, expected)
    assert not list(workdir.glob("checkpoints/.*")) and not (workdir / "run.lock").exists()
    walls = [line["goodput/wall_s"] for line in lines(workdir)]
    assert walls == sorted(walls) and 0 < lines(workdir)[-1]["goodput/fraction"] < 1


def assert_nothing_lost(job, workdir, had: int | None) -> int | None:
    """A start continued from the newest checkpoint that was there before it, and left a newest one that is whole."""
    assert not any("DAMAGED" in line or "Traceback" in line for line in job.said), "\n".join(job.said)
    if job.epochs:
        continued = [line for line in job.said if line.startswith("continuing")]
        assert [f"checkpoint {had} " in line for line in continued] == ([] if had is None else [True])
    left = complete(workdir)
    assert had is None or left[-1] >= had
    if left:
        assert find_damage(workdir / "checkpoints" / str(left[-1])) is None
        return left[-1]
    return None


@pytest.mark.fault("preempted")
def test_sigterm_at_any_moment_of_the_real_job(straight):
    expected, cache, epoch_seconds = straight
    workdir, rng, waits = expected.parent / "preempted", np.random.default_rng(2), []
    for _ in range(-(-KILLS // 3)):
        job = Job(workdir, cache)
        job.wait_until(lambda job=job: job.epochs > 0, pause=0.01)
        time.sleep(rng.uniform(0, 2 * epoch_seconds))
        asked = time.monotonic()
        job.process.terminate()
        assert job.ended() == 75, "\n".join(job.said[-30:])
        waits.append(time.monotonic() - asked)
        assert job.said[-1].startswith("stopped on request"), job.said[-1]
        print(f"{waits[-1]:.1f} s: {job.said[-1]}", flush=True)
        assert find_damage(workdir / "checkpoints" / str(complete(workdir)[-1])) is None
    assert Job(workdir, cache).ended() == 0
    assert_same_run(workdir, expected)
