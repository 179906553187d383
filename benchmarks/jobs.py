"""Whole jobs, each in a process of its own as a user starts it, and the files of what was measured of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ROOT, header, result_file

STOPPED = 75  # main.py's exit code after SIGTERM
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Ran:
    """What a job did: its lines of metrics.jsonl, when it was started (seconds since 1970), and the seconds of CPU that
    it took until it was stopped."""

    lines: list[dict]
    started: float
    cpu_seconds: float

    def epoch(self, number: int) -> dict:
        """The line that was written when so many epochs were done."""
        return next(line for line in self.lines if line["epoch"] == number)


def run_job(module: Sequence[str], config: str, workdir: Path, epochs: int, more=(), env: Mapping | None = None) -> Ran:
    """Run a job in a fresh process until `epochs` epochs are done, then stop it.

    module: what Python is to run, such as `main.py`. more: further words of the command line. env: variables beside
    this process's own. SystemExit, with the end of what the job said, when it ends earlier.
    """
    command = [sys.executable, *module, "--config", config, "--workdir", str(workdir), *more]
    workdir.mkdir(parents=True)
    log, before = workdir / "job.log", os.times()
    with log.open("wb") as out:
        started = time.time()
        job = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env={**os.environ, **(env or {})})
        try:
            while job.poll() is None and not any(line["epoch"] >= epochs for line in read_lines(workdir)):
                time.sleep(LOOK_SECONDS)
            if job.poll() is None:
                job.send_signal(signal.SIGTERM)
            code = job.wait()
        finally:
            job.kill()
    lines, after = read_lines(workdir), os.times()
    if code not in (0, STOPPED) or not any(line["epoch"] == epochs for line in lines):
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-3000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Ran(lines, started, cpu)


def read_lines(workdir: Path) -> list[dict]:
    """The whole lines of a run's metrics.jsonl; none where it has not begun."""
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.is_file() else []


def store(question: str, label: str, out: Path, words: Sequence[str], load: float, found: dict) -> Path:
    """Write `<question>_<label>_<device>_<date>.json`: what was found, and how it was made.

    words: of the command line. load: of the machine before the first job. To be called when all jobs
    have ended: this process then takes hold of the devices, to name them.
    """
    head = header(question, list(words), {"size": label})
    head["machine"]["load_before"] = round(load, 2)
    file = result_file(head, out)
    file.write_text(json.dumps(head | found, indent=1) + "\n")
    return file
