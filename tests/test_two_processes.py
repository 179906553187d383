"""The tiny job in two processes on one machine: the run of one process, also when one of the two is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from fake_critic import fake
from safetensors.numpy import load_file

from firm_jax.processes import BEAT_SECONDS, LOST_EXIT_CODE, LOST_SECONDS

ROOT = Path(__file__).parents[1]
EPOCHS = 3

SMALL = {
    "train.epochs": EPOCHS, "train.updates_per_epoch": 2, "train.micro_batch": 8, "train.timesteps": 2,
    "group.prompts_per_epoch": 4, "group.images_per_prompt": 4, "rollout.steps": 4, "rollout.batch_size": 16,
    "critic.batch_size": 32, "critic.max_new_tokens": 64, "critic.max_failure_rate": 0.9, "eval.every": EPOCHS,
    "eval.steps": 4, "eval.prompts": 8, "eval.images_per_prompt": 1, "eval.judged": 8, "eval.batch_size": 8,
    "checkpoint.every": 1,
}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@dataclass
class Process:
    """One process of a run, and what it has said so far."""

    process: subprocess.Popen
    log: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_until(self, condition) -> None:
        while not condition():
            assert self.process.poll() is None, self.said[-3000:]
            assert time.monotonic() < self.started + 900, "too slow"
            time.sleep(0.02)

    def ended(self, seconds=900) -> int:
        return self.process.wait(seconds)


def start(
    workdir: Path, sizes: tuple[int, int, int], processes: int = 1, config="configs/gen_qma.py:tiny", small=SMALL,
    **changed,
) -> list[Process]:  # fmt: skip
    """The job on a mesh whose devices the processes share evenly; compiled programs are kept beside the workdir.

    changed: values of the config's section `critic`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = small | dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), sizes, strict=True))
    given |= {f"critic.{name}": value for name, value in changed.items()}
    command = [sys.executable, "main.py", "--config", config, "--workdir", str(workdir)]
    command += [f"--config.{name}={value}" for name, value in given.items()]
    devices = int(np.prod(sizes)) // processes
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
    }
    started = []
    for index in range(processes):
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        log = workdir.parent / f"{workdir.name}.{time.time_ns()}.{index}.log"
        with log.open("w") as out:
            started.append(Process(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out), log))
    return started


def finish(started: list[Process]) -> None:
    for process in started:
        assert process.ended() == 0, process.said[-3000:]


def lines(workdir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def together(folder):
    """The folder of a run in two processes that nothing happened to."""
    finish(start(folder / "together", (2, 2, 2), processes=2))
    return folder / "together"


def assert_same_run(workdir: Path, expected: Path) -> None:
    """To rounding, in float32: the same pictures in the critic's eyes, and losses within a hundred-thousandth."""
    ours, theirs = lines(workdir, "judgements.jsonl"), lines(expected, "judgements.jsonl")
    assert len(ours) == EPOCHS * 4 * 4 * 2
    for name in ("epoch", "prompt", "criterion", "text", "score", "reward"):
        assert [record[name] for record in ours] == [record[name] for record in theirs], name
    ours, theirs = lines(workdir, "metrics.jsonl"), lines(expected, "metrics.jsonl")
    assert [line["epoch"] for line in ours] == [line["epoch"] for line in theirs] == list(range(EPOCHS + 1))
    for line, wanted in zip(ours[1:], theirs[1:], strict=True):
        assert line["loss/total"] == pytest.approx(wanted["loss/total"], rel=1e-5)
        assert line["grad/norm"] == pytest.approx(wanted["grad/norm"], rel=1e-4)
        for name in ("step", "reward/mean", "reward/std", "critic/failure_rate", "update/skipped"):
            assert line[name] == wanted[name], name
        print(f"loss {line['loss/total'] / wanted['loss/total'] - 1:.1e}", end=" ")
        print(f"grad {line['grad/norm'] / wanted['grad/norm'] - 1:.1e}")


@pytest.mark.fault("other-mesh")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_two_processes_train_as_one_with_one_device_or_eight(folder, together, sizes):
    workdir = folder / "alone_on_{}x{}x{}".format(*sizes)
    finish(start(workdir, sizes))
    assert_same_run(workdir, together)


def test_two_processes_train_a_critic_as_one(folder):
    small = {
        "data.examples": 64, "train.batch_size": 8, "train.examples_per_device": 2, "lora.rank": 4, "eval.examples": 8,
        "eval.answers": 4, "train.report_every": 0.25,
    }  # fmt: skip
    runs = {"critic_together": 2, "critic_alone": 1}
    for name, processes in runs.items():
        finish(start(folder / name, (2, 2, 1), processes, "configs/critic_sft.py:tiny_edit", small))
    ours, theirs = (lines(folder / name, "metrics.jsonl") for name in runs)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [2, 4, 6, 8]
    for line, wanted in zip(ours, theirs, strict=True):
        assert line["loss/total"] == pytest.approx(wanted["loss/total"], rel=1e-5)
        assert line["grad/norm"] == pytest.approx(wanted["grad/norm"], rel=1e-4)
    assert ours[-1]["eval/loss"] == pytest.approx(theirs[-1]["eval/loss"], rel=1e-5)
    assert ours[-1]["eval/bench_failure_rate"] == theirs[-1]["eval/bench_failure_rate"]
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        found, wanted = (load_file(folder / name / file) for name in runs)
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            np.testing.assert_allclose(tensor.astype(np.float32), wanted[name].astype(np.float32), atol=2e-3)


def interrupt(workdir: Path, together: Path, index: int, number: int) -> tuple[int, Process]:
    """Send a signal to process `index` at a random moment of the second epoch; the other's exit code, and that one."""
    first, *_, last = lines(together, "metrics.jsonl")[1:]
    epoch_seconds = (last["time"] - first["time"]) / (EPOCHS - 1)
    started = start(workdir, (2, 2, 2), processes=2)
    try:
        started[0].wait_until((workdir / "checkpoints" / "2").is_dir)
        time.sleep(np.random.default_rng().uniform(0, epoch_seconds))
        started[index].process.send_signal(number)
        sent, other = time.monotonic(), started[1 - index]
        code = other.ended(LOST_SECONDS + 4 * BEAT_SECONDS)
        print(f"{time.monotonic() - sent:.1f} s, exit code {code}:\n{other.said[-600:]}")
        return code, other
    finally:
        for process in started:
            process.process.kill()


@pytest.mark.fault("lost-process", "other-mesh")
@pytest.mark.parametrize(("killed", "sizes_after"), [(1, (1, 4, 2)), (0, (2, 2, 2))])
def test_a_killed_process_ends_the_other_and_both_continue(folder, together, killed, sizes_after):
    workdir = folder / f"killed_{killed}"
    code, other = interrupt(workdir, together, killed, signal.SIGKILL)
    # JAX's own service runs in process 0: whoever of us notices its end first.
    assert code == LOST_EXIT_CODE or (killed == 0 and code == -signal.SIGABRT)
    if code == LOST_EXIT_CODE:
        assert "start the same command on every host again to continue" in other.said and "Traceback" not in other.said

    started = start(workdir, sizes_after, processes=2)
    finish(started)
    # The kill came in the second epoch or, where a checkpoint shows late, hardly after it.
    assert re.search(r"continuing from checkpoint (2 \(1|4 \(2) epochs done", started[0].said)
    assert_same_run(workdir, together)


@pytest.mark.fault("lost-process")
def test_a_process_that_hangs_ends_the_other(folder, together):
    code, other = interrupt(folder / "hanging", together, 1, signal.SIGSTOP)
    assert code == LOST_EXIT_CODE and f"no sign of life for {LOST_SECONDS:.0f} s" in other.said


REMOTE = {"backend": "firm", "model": "critic", "try_timeout": 10.0, "timeout": 20.0, "attempts": 2}


@pytest.mark.fault("other-mesh")
def test_a_server_is_asked_by_one_of_two_processes_and_both_train_on_its_answers(folder):
    asked = []
    for name, sizes, processes in (("server_alone", (1, 1, 1), 1), ("server_together", (2, 2, 2), 2)):
        with fake() as server:
            finish(start(folder / name, sizes, processes, endpoints=(server.url,), **REMOTE))
            asked.append((len(server.requests), server.judged))
    assert asked[0] == asked[1] and asked[0][1] > EPOCHS * 4 * 4 * 2
    alone, together = (lines(folder / name, "judgements.jsonl") for name in ("server_alone", "server_together"))
    assert len(alone) == len(together) == EPOCHS * 4 * 4 * 2
    # The fake reads its score from the mean of all pixels: a rounded one moves it by less than this.
    assert [one["expected"] for one in together] == pytest.approx([one["expected"] for one in alone], abs=1e-3)
    losses = [[line["loss/total"] for line in lines(folder / name, "metrics.jsonl")[1:]] for name in
              ("server_alone", "server_together")]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and len(set(losses[0])) == EPOCHS


@pytest.mark.fault("remote-down")
def test_a_server_that_dies_stops_both_processes_with_everything_saved(folder):
    workdir = folder / "server_dies"
    with fake() as server:
        started = start(workdir, (2, 2, 2), 2, endpoints=(server.url,), **REMOTE)
        started[0].wait_until((workdir / "checkpoints" / "2").is_dir)
        server.stop()
        codes = [process.ended() for process in started]
    assert codes == [2, 2], [process.said[-2000:] for process in started]
    assert "Traceback" not in started[0].said and "saved" in started[0].said
    with fake(port=int(server.url.rsplit(":", 1)[1])):
        finish(start(workdir, (2, 2, 2), 2, endpoints=(server.url,), **REMOTE))
    assert [line["epoch"] for line in lines(workdir, "metrics.jsonl")] == list(range(EPOCHS + 1))
