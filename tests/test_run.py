"""The harness: a run that is stopped, killed or contradicted loses nothing and says why."""

import json
import os
import signal
import socket
import threading
import time

import harness_job
import jax
import numpy as np
import pytest
from harness_process import assert_same_run, has_checkpoint, read_until, records, start, wait_for

from firm_jax.errors import CheckpointError, ConfigError, WorkdirError
from firm_jax.profiling import PhaseTimers, model_flops_utilisation, peak_flops
from firm_jax.run import Run, Stopped
from firm_jax.workdir import STALE_SECONDS, WorkdirLock, contradictions


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happened to: (workdir, final state)."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, harness_job.train(harness_job.get_config(), workdir)


def test_a_run_leaves_its_folder(straight):
    workdir, _ = straight
    assert {path.name for path in workdir.iterdir()} == {
        "checkpoints",
        "config.json",
        "images",
        "judgements.jsonl",
        "metrics.jsonl",
        "report.html",
        "tensorboard",
    }
    assert json.loads((workdir / "config.json").read_text())["train"]["sizes"] == [4, 8]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["12", "18"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(0 < line["time/update"] <= line["time/wall"] for line in lines)


def stop_at(epoch):
    """SIGTERM in the middle of an epoch."""
    return lambda run, number: os.kill(os.getpid(), signal.SIGTERM) if number == epoch else None


def raise_at(epoch):
    def at_epoch(run, number):
        if number == epoch:
            raise RuntimeError("power cut")

    return at_epoch


@pytest.mark.fault("preempted")
@pytest.mark.parametrize(("interruption", "error"), [(stop_at(2), Stopped), (raise_at(3), RuntimeError)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, straight, interruption, error):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        harness_job.train(harness_job.get_config(), tmp_path, at_epoch=interruption)
    assert signal.getsignal(signal.SIGTERM) == before
    assert_same_run(tmp_path, harness_job.train(harness_job.get_config(), tmp_path), *straight)


def test_a_save_within_an_epoch_does_not_count_its_records(tmp_path):
    state, config = {"w": jax.numpy.zeros(3)}, harness_job.get_config()
    with Run(config, tmp_path) as run, pytest.raises(RuntimeError):
        run.restore(state)
        run.log(0, 0, {"eval/loss": 1.0})
        for epoch in run.loop(0, 2):
            run.judgements([{"epoch": epoch}])
            if epoch == 1:
                run.save(state, step=1, epoch=1)
                raise RuntimeError("no usable judgement")
            run.log(1, 1, {})
            run.safe_point(state, step=1, epoch=1)
    with Run(config, tmp_path) as run:
        assert run.restore(state).epoch == 1
        assert [line["epoch"] for line in records(tmp_path)] == [0, 1]
        assert records(tmp_path, "judgements.jsonl") == [{"epoch": 0}]


def test_a_run_without_a_checkpoint_starts_its_files_again(tmp_path, straight):
    with pytest.raises(RuntimeError):
        harness_job.train(harness_job.get_config(), tmp_path, at_epoch=raise_at(1))
    assert_same_run(tmp_path, harness_job.train(harness_job.get_config(), tmp_path), *straight)


def test_a_finished_run_ends_at_once(tmp_path, straight):
    harness_job.train(harness_job.get_config(), tmp_path)
    assert_same_run(tmp_path, harness_job.train(harness_job.get_config(), tmp_path), *straight)


@pytest.mark.fault("killed")
@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment(tmp_path, kills):
    config = harness_job.get_config("slow")
    config.train.epochs = 4 * kills + 4
    straight, workdir = tmp_path / "straight", tmp_path / "killed"
    expected = harness_job.train(config, straight)
    rng = np.random.default_rng(0)
    for _ in range(kills):
        process = start(workdir, f"--config.train.epochs={config.train.epochs}", pause=0.05)
        next(line for line in process.stderr if line.startswith(("epoch", "continuing")))
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
    assert 0 < records(workdir)[-1]["epoch"] < config.train.epochs
    state = harness_job.train(config, workdir)
    assert_same_run(workdir, state, straight, expected)


@pytest.mark.fault("preempted")
def test_sigterm_saves_and_exits_with_its_own_code(tmp_path):
    process = start(tmp_path, pause=0.5)
    wait_for(has_checkpoint(tmp_path, 3), process)
    process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75
    assert "the same command continues" in errors and "Traceback" not in errors
    assert "Started save" not in errors  # what Orbax notes of every checkpoint
    saved = max(int(path.name) for path in tmp_path.glob("checkpoints/*"))
    assert records(tmp_path)[-1]["step"] == saved


@pytest.mark.fault("preempted")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once_whatever_it_waits_for(tmp_path, number):
    process = start(tmp_path, job="train_on_a_busy_device")
    read_until(process, "busy")
    time.sleep(0.5)
    process.send_signal(number)
    read_until(process, "stopping as soon as the run is saved; once more")
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == 128 + number


@pytest.mark.fault("other-model")
def test_a_config_that_contradicts_the_checkpoint_names_the_keys(tmp_path):
    config = harness_job.get_config()
    config.train.epochs = 2
    harness_job.train(config, tmp_path)
    changed = harness_job.get_config()
    changed.train.learning_rate, changed.seed = 0.2, 1
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1\n  train\.learning_rate: 0\.1 -> 0\.2\n"):
        harness_job.train(changed, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0
    longer = harness_job.get_config()
    longer.checkpoint.every, longer.train.epochs = 1, 3
    harness_job.train(longer, tmp_path)
    assert records(tmp_path)[-1]["epoch"] == 3


def test_contradictions_see_missing_keys_and_nested_values():
    saved, now = {"a": {"b": 1, "c": [1, 2]}, "mesh": {"data": 8}}, {"a": {"b": 1, "c": [1, 3]}, "d": None, "mesh": {}}
    assert contradictions(saved, now) == ["a.c: [1, 2] -> [1, 3]", "d: '(absent)' -> None"]


@pytest.mark.fault("other-model")
def test_other_base_weights_are_refused(tmp_path):
    config = harness_job.get_config()
    with Run(config, tmp_path, {"transformer": "sha256:1"}) as run:
        run.save({"w": jax.numpy.zeros(3)}, step=1, epoch=1)
    with (
        Run(config, tmp_path, {"transformer": "sha256:2"}) as run,
        pytest.raises(CheckpointError, match=r"sha256:1.*sha256:2"),
    ):
        run.restore({"w": jax.numpy.zeros(3)})


@pytest.mark.parametrize(("group", "key"), [("train", "epochs"), ("checkpoint", "every"), ("checkpoint", "keep")])
def test_values_that_cannot_be_used(tmp_path, group, key):
    config = harness_job.get_config()
    config[group][key] = -1
    with pytest.raises(ConfigError, match=rf"{group}\.{key} is -1"):
        Run(config, tmp_path)


def test_an_unwritable_workdir_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match=r"file/run cannot be written.*--workdir"):
        Run(harness_job.get_config(), tmp_path / "file" / "run")


@pytest.mark.fault("two-runs")
def test_a_second_run_in_the_folder_is_refused(tmp_path):
    with Run(harness_job.get_config(), tmp_path):
        with pytest.raises(WorkdirError, match=rf"in use by process {os.getpid()} on {socket.gethostname()}"):
            Run(harness_job.get_config(), tmp_path).__enter__()
        assert (tmp_path / "run.lock").exists()
    assert not (tmp_path / "run.lock").exists()
    with Run(harness_job.get_config(), tmp_path):
        pass


def lock_of(path, host, age):
    path.write_text(json.dumps({"pid": 1, "host": host, "started": "then", "heartbeat": time.time() - age}))


@pytest.mark.fault("two-runs")
def test_the_lock_of_a_dead_process_is_taken_over_with_a_notice(tmp_path, caplog):
    for host, age in ((socket.gethostname(), 0), ("elsewhere", STALE_SECONDS + 1)):
        lock_of(tmp_path / "run.lock", host, age)
        lock = WorkdirLock(tmp_path)
        lock.acquire()
        lock.release()
        assert "taking over" in caplog.text
        caplog.clear()


@pytest.mark.fault("two-runs")
def test_without_kernel_locks_the_heartbeat_decides(tmp_path, monkeypatch, caplog):
    def unsupported(*arguments):
        raise OSError("Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    lock_of(tmp_path / "run.lock", socket.gethostname(), 1)
    with pytest.raises(WorkdirError, match="in use by process 1"):
        WorkdirLock(tmp_path).acquire()
    assert "heartbeats decide" in caplog.text
    lock_of(tmp_path / "run.lock", socket.gethostname(), STALE_SECONDS + 1)
    lock = WorkdirLock(tmp_path)
    lock.acquire()
    lock.release()


@pytest.mark.fault("two-runs")
def test_a_lock_with_a_fresh_heartbeat_elsewhere_is_respected(tmp_path):
    lock_of(tmp_path / "run.lock", "elsewhere", 1)
    with pytest.raises(WorkdirError, match="in use by process 1 on elsewhere"):
        WorkdirLock(tmp_path).acquire()


def test_a_profile_names_iterations_and_phases(tmp_path):
    config = harness_job.get_config()
    config.profile.start, config.profile.steps = 1, 2
    harness_job.train(config, tmp_path)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    assert b"iteration" in content and b"update" in content


def test_work_beside_is_done_in_order_before_a_line_of_metrics_and_before_a_save(tmp_path):
    go_on = threading.Event()

    def slow(run, name):
        go_on.wait(10)
        time.sleep(0.05)
        run.judgements([{"name": name}])

    def names():
        return [one["name"] for one in records(tmp_path, "judgements.jsonl")]

    with Run(harness_job.get_config(), tmp_path) as run:
        run.beside(slow, run, "a")
        run.beside(slow, run, "b")
        assert names() == []  # the loop goes on meanwhile
        go_on.set()
        run.log(1, 1, {})
        assert names() == ["a", "b"]
        run.beside(slow, run, "c")
        run.save({"x": jax.numpy.zeros(2)}, step=1, epoch=1)
        assert names() == ["a", "b", "c"]
        run.beside(slow, run, "d")
    assert names() == ["a", "b", "c", "d"]
    meta = json.loads((tmp_path / "checkpoints" / "1" / "meta.json").read_text())
    covered = (tmp_path / "judgements.jsonl").read_bytes()[: meta["lengths"]["judgements"]]
    assert covered.count(b"\n") == 3 and covered.endswith(b"}\n")


def test_an_error_of_work_beside_is_raised_by_the_next_line_of_metrics_or_at_the_end(tmp_path):
    def fail():
        raise WorkdirError("no space left")

    with pytest.raises(WorkdirError, match="no space left"), Run(harness_job.get_config(), tmp_path) as run:
        run.beside(fail)
        run.log(1, 1, {})
    with pytest.raises(WorkdirError, match="no space left"), Run(harness_job.get_config(), tmp_path) as run:
        run.beside(fail)
    with pytest.raises(ValueError, match="the first"), Run(harness_job.get_config(), tmp_path) as run:
        run.beside(fail)
        raise ValueError("the first")


def test_progress_without_a_terminal_is_quiet_about_short_phases(tmp_path, capsys):
    with Run(harness_job.get_config(), tmp_path) as run:
        assert list(run.progress(range(3), "short")) == [0, 1, 2]
        with run.progress(description="by hand", total=5) as bar:
            bar.update(5)
        run.log(3, 1, {"reward/mean": 0.5})
    errors = capsys.readouterr().err
    assert "short" not in errors
    assert "epoch 1  step 3  reward/mean 0.5" in errors


def test_a_run_in_another_thread_works_without_signals(tmp_path):
    config = harness_job.get_config()
    config.train.epochs = 1
    thread = threading.Thread(target=harness_job.train, args=(config, tmp_path))
    thread.start()
    thread.join()
    assert records(tmp_path)[-1]["epoch"] == 1


def test_the_share_of_the_peak_is_unknown_where_the_peak_is():
    assert peak_flops("cpu") is None
    assert peak_flops("TPU v5p") == 459e12
    assert model_flops_utilisation(1e12, 1.0) is None


def test_goodput_counts_what_the_run_is_for_over_all_its_starts():
    timers = PhaseTimers()
    with timers.measure("update"):
        time.sleep(0.3)
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 0.2)
    with timers.measure("eval"):
        time.sleep(0.1)
    times = timers.report()
    assert times["time/compile"] == pytest.approx(0.2)
    assert 0.1 <= times["goodput/productive_s"] == pytest.approx(times["time/update"] - 0.2)
    assert times["time/update"] + times["time/eval"] < times["goodput/wall_s"]
    assert times["goodput/fraction"] == times["goodput/productive_s"] / times["goodput/wall_s"]

    resumed = PhaseTimers()
    lost = {"time": time.time() - 100, "goodput/wall_s": 50.0, "goodput/productive_s": 40.0}
    resumed.resume(lost, lost | {"goodput/productive_s": 30.0})
    times = resumed.report()
    assert times["goodput/productive_s"] == 30 and times["goodput/wall_s"] == pytest.approx(150, abs=5)


class Clock:
    """In the place of the module `time`: only the test lets time pass."""

    now = 1000.0

    def time(self) -> float:
        return self.now

    perf_counter = time


def test_goodput_goes_on_where_the_run_does_and_counts_an_epoch_once(tmp_path, monkeypatch):
    clock, interrupted = Clock(), []
    monkeypatch.setattr("firm_jax.profiling.time", clock)
    monkeypatch.setattr("firm_jax.metrics.time", clock)

    def lines():
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    def slow_epoch(run, epoch):
        with run.timer("rollout"):
            clock.now += 20
        clock.now += 5
        if epoch == 3 and len(lines()) == 3 and not interrupted:
            interrupted.append(epoch)
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        harness_job.train(harness_job.get_config(), tmp_path, at_epoch=slow_epoch)
    clock.now += 100
    harness_job.train(harness_job.get_config(), tmp_path, at_epoch=slow_epoch)
    assert interrupted
    # The third epoch was done and lost, as its checkpoint was not there yet, and of the fourth the first part.
    before = [(epoch, 25 * epoch) for epoch in (1, 2)]
    after = [(epoch, 4 * 25 + 100 + 25 * (epoch - 2)) for epoch in (3, 4, 5, 6)]
    for line, (epoch, wall) in zip(lines(), before + after, strict=True):
        assert line["epoch"] == epoch and line["goodput/productive_s"] == pytest.approx(20 * epoch)
        assert line["goodput/wall_s"] == pytest.approx(wall)
        assert line["goodput/fraction"] == pytest.approx(20 * epoch / wall)


@pytest.mark.fault("damaged-checkpoint")
@pytest.mark.parametrize(("good", "bad"), [(b'"seed": 0', b'"seed": 1'), (b'"config"', b'"confih"')])
def test_a_damaged_meta_that_is_still_json_fools_nobody(tmp_path, straight, good, bad):
    with pytest.raises(RuntimeError):
        harness_job.train(harness_job.get_config(), tmp_path, at_epoch=raise_at(5))
    meta = tmp_path / "checkpoints" / "12" / "meta.json"
    assert meta.read_bytes().count(good) == 1
    meta.write_bytes(meta.read_bytes().replace(good, bad))
    state = harness_job.train(harness_job.get_config(), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, straight[1])
    found = records(tmp_path)
    assert [line["checkpoint/damaged"] for line in found] == [0, 0, 1, 1, 1, 1]
    assert [line | {"checkpoint/damaged": 0} for line in found] == records(straight[0])
    assert "12.damaged" in (tmp_path / "report.html").read_text()
