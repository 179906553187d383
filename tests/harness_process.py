"""Starts the harness's job as people do, through main.py in a process of its own, and compares what runs leave."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np


def records(workdir, name="metrics.jsonl"):
    """The lines of a file without what is allowed to differ between runs: times."""
    lines = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("time", "goodput"))} for line in lines]


def assert_same_run(workdir, state, straight_workdir, straight_state):
    jax.tree.map(np.testing.assert_array_equal, state, straight_state)
    for name in ("metrics.jsonl", "judgements.jsonl"):
        assert records(workdir, name) == records(straight_workdir, name)
    pictures = [sorted(path.name for path in (folder / "images").iterdir()) for folder in (workdir, straight_workdir)]
    assert pictures[0] == pictures[1]


def start(workdir, *overrides, pause=0, job="train", before=""):
    """The slow variant in a process of its own, through main.py; `before` is Python that it runs first."""
    program = f"{before}\nimport main; main.JOBS['fit_matrix'] = 'harness_job:{job}'; main.command_line()"
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}", "PAUSE": str(pause), "JAX_PLATFORMS": "cpu"}
    arguments = ["--config", f"{tests / 'harness_job.py'}:slow", "--workdir", str(workdir), *overrides]
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.01)


def has_checkpoint(workdir, step):
    return lambda: any(path.name.isdigit() and int(path.name) >= step for path in workdir.glob("checkpoints/*"))


def read_until(process, awaited):
    """The line of its messages that begins so; fails with all of them if there is none."""
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith(awaited):
            return line
    raise AssertionError("".join(seen))
