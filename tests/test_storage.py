"""Disks that lose power, are full, or do not answer: what was saved stays, and the run ends with words."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import harness_job
import jax.numpy as jnp
import pytest
from harness_process import has_checkpoint, read_until, records, start, wait_for

from firm_jax.checkpoint import find_damage
from firm_jax.errors import WorkdirError
from firm_jax.metrics import JsonLines, MetricWriter
from firm_jax.run import Run


@pytest.fixture
def disk_calls(monkeypatch):
    """What is forced to the disk and what is renamed, in order: ("sync", path) and ("rename", path, new path)."""
    calls = []

    def recorded(kind, call, paths):
        def record(*args, **given):
            result = call(*args, **given)
            calls.append((kind, *(str(path) for path in paths(*args))))
            return result

        return record

    monkeypatch.setattr(os, "fsync", recorded("sync", os.fsync, lambda fd: [os.readlink(f"/proc/self/fd/{fd}")]))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, recorded("rename", getattr(os, name), lambda *paths: paths[:2]))
    return calls


@pytest.mark.fault("power-loss")
def test_everything_is_forced_to_the_disk_before_the_rename_that_makes_it_a_checkpoint(tmp_path, disk_calls):
    workdir = tmp_path / "new" / "run"
    checkpoints, config = workdir / "checkpoints", harness_job.get_config()
    config.checkpoint.keep = 1
    with Run(config, workdir) as run:
        for step in (1, 2):
            run.log(step, step, {"loss": 0.5})
            run.judgements([{"epoch": step}])
            run.save({"w": jnp.ones(8)}, step=step, epoch=step)
            run._checkpointer.wait()
    for folder in (workdir, workdir.parent, tmp_path):
        assert ("sync", str(folder)) in disk_calls, "the names of new folders are on the disk"

    commit = disk_calls.index(("rename", f"{checkpoints}/.saving-2", f"{checkpoints}/2"))
    earlier = disk_calls.index(("rename", f"{checkpoints}/.saving-1", f"{checkpoints}/1"))
    before = {call[1] for call in disk_calls[earlier:commit] if call[0] == "sync"}
    contents = [path.relative_to(checkpoints / "2") for path in (checkpoints / "2").rglob("*")]
    assert len(contents) > 12 and any("ocdbt" in str(path) for path in contents)
    assert {str(checkpoints / ".saving-2" / path) for path in (".", *contents)} <= before
    assert {str(workdir / name) for name in ("metrics.jsonl", "judgements.jsonl", ".")} <= before
    moved = [call[1:] for call in disk_calls[earlier:commit] if call[0] == "rename"]
    synced_last = max(index for index, call in enumerate(disk_calls[:commit]) if ".saving-2/" in call[1])
    assert disk_calls[synced_last][0] == "sync", f"nothing is renamed after it was forced to the disk: {moved}"

    assert disk_calls[commit + 1] == ("sync", str(checkpoints))
    assert disk_calls[commit + 2] == ("rename", f"{checkpoints}/1", f"{checkpoints}/.deleting-1")


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 1 MB, mounted where only a process of ours and those that go through it see it."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    script = f"mount -t tmpfs -o size=1m tmpfs {mounted} && echo mounted && exec sleep 600"
    unshare = shutil.which("unshare") or pytest.skip("no unshare on this system")
    holder = subprocess.Popen(
        [unshare, "--map-root-user", "--mount", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if holder.stdout.readline() != b"mounted\n":
        pytest.skip(f"no file system can be mounted here: {holder.communicate()[1].decode()}")
    yield Path(f"/proc/{holder.pid}/root") / mounted.relative_to("/")
    holder.kill()
    holder.communicate()


def fill(folder, leave_kb):
    file = (folder / "filler").open("wb", buffering=0)
    with file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    os.truncate(folder / "filler", (folder / "filler").stat().st_size - 1024 * leave_kb)


@pytest.mark.fault("disk-full")
def test_a_full_disk_ends_the_run_with_words_and_with_room_it_goes_on(tmp_path, small_disk):
    straight, workdir = tmp_path / "straight", small_disk / "run"
    harness_job.train(harness_job.get_config("slow"), straight)
    # The less room is left the earlier it fails: at a line, at a picture, within Orbax, at the manifest.
    for leave_kb in (60, 28, 12, 0):
        process = start(workdir, pause=0.3)
        read_until(process, "epoch")
        wait_for(has_checkpoint(workdir, 3), process)
        newest = max(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())
        fill(small_disk, leave_kb)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 2, errors
        _, _, message = f"\n{errors}".partition("\nerror: ")  # before it, Orbax may have told of its threads
        assert "No space left on device" in message and "Traceback" not in message
        assert "start the same command again" in message
        left = sorted(path.name for path in workdir.glob("checkpoints/*"))
        assert has_checkpoint(workdir, newest)() and all(name.isdigit() for name in left), left
        assert all(find_damage(workdir / "checkpoints" / name) is None for name in left)
        (small_disk / "filler").unlink()
    process = start(workdir)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for name in ("metrics.jsonl", "judgements.jsonl"):
        assert records(workdir, name) == records(straight, name)


@pytest.mark.fault("disk-full")
def test_a_file_of_results_that_takes_no_more_is_an_error_that_names_it(tmp_path):
    (tmp_path / "judgements.jsonl").symlink_to("/dev/full")
    lines = JsonLines(tmp_path / "judgements.jsonl")
    with pytest.raises(WorkdirError, match=r"judgements\.jsonl: .*No space left.*Free some space"):
        lines.append({"score": 1})
    lines.close()


@pytest.mark.fault("disk-full")
def test_tensorboard_without_room_ends_nothing(tmp_path, monkeypatch, caplog):
    full = Path("/dev/full").open("wb")  # noqa: SIM115
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: full)
    writer = MetricWriter(tmp_path)
    for step in range(30):
        writer.write(step, step, {"a": step, "b": 1.0})
        writer.sync()
    writer.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 30
    assert [record.getMessage()[:30] for record in caplog.records] == ["TensorBoard's events end here,"]


@pytest.mark.fault("disk-full")
def test_a_picture_that_finds_no_room_leaves_no_half_of_itself(tmp_path, monkeypatch):
    def cut_short(images, captions, columns, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("firm_jax.run.image_grid", cut_short)
    with (
        Run(harness_job.get_config(), tmp_path) as run,
        pytest.raises(WorkdirError, match=r"eval_00001\.png: .*No space left"),
    ):
        run.images("eval", jnp.zeros((1, 4, 4, 3)), ["x"], step=1, epoch=1)
    assert list((tmp_path / "images").iterdir()) == []


HANGS = """
import os, time
from firm_jax import storage
storage.TIMEOUT_SECONDS, storage.EXIT_SECONDS = 15, 1
{name} = os.{name}
def hang(path, *more, **given):
    if {when}:
        time.sleep(600)
    return {name}(path, *more, **given)
os.{name} = hang
"""


@pytest.mark.fault("hanging-storage")
def test_storage_that_hangs_within_orbax_ends_the_process(tmp_path):
    """Orbax's threads are waited for when Python ends; one that hangs must not keep the process."""
    hangs = HANGS.format(name="rename", when="'.saving-6/' in str(path)")
    process = start(tmp_path, before=hangs)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    assert "is not written after 15 s: the storage hangs. Earlier checkpoints are intact" in errors
    assert "threads that do not end are left behind" in errors and "hang" in errors
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["3"]
    process = start(tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "continuing from checkpoint 3 " in errors


@pytest.mark.fault("hanging-storage")
def test_storage_that_hangs_under_the_main_thread_ends_the_process_and_shows_where(tmp_path):
    hangs = HANGS.format(name="fsync", when="'metrics.jsonl' in os.readlink(f'/proc/self/fd/{path}')")
    process = start(tmp_path, before=hangs)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    assert f"error: saving in {tmp_path} takes more than 15 s: the storage hangs" in errors
    assert "in hang" in errors and "in sync" in errors, "the stack of the thread that hangs"


@pytest.mark.fault("two-runs")
def test_a_second_process_is_refused_and_a_killed_one_is_taken_over(tmp_path):
    first = start(tmp_path, pause=60)
    lock = tmp_path / "run.lock"
    wait_for(lambda: lock.exists() and lock.stat().st_size > 0, first)
    holder = json.loads(lock.read_text())
    second = start(tmp_path)
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 2
    told = f"is in use by process {first.pid} on {holder['host']} (started {holder['started']})"
    assert told in errors and "Traceback" not in errors
    assert first.poll() is None and json.loads(lock.read_text())["pid"] == first.pid
    first.kill()
    first.communicate()
    third = start(tmp_path)
    assert str(first.pid) in read_until(third, "W").split("taking over", 1)[1]
    third.communicate(timeout=300)
    assert third.returncode == 0 and not lock.exists()
