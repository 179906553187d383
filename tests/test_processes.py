"""What a process makes of the others' signs of life."""

import json
import subprocess
import sys
import textwrap

import pytest

from firm_jax import processes
from firm_jax.processes import LOST_EXIT_CODE, ProcessWatch


@pytest.fixture
def clock(monkeypatch):
    """Time that a test sets: clock[0] seconds."""
    now = [0.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def watch(tmp_path, clock):
    watch = ProcessWatch(tmp_path, index=0, count=2, run=7)
    watch.start()
    yield watch
    watch.stop()


def sign(folder, content, run=7):
    (folder / "1.json").write_text(json.dumps({"run": run, "pid": 42, "host": "there"} | content))


@pytest.mark.fault("lost-process")
def test_a_process_that_falls_silent_is_lost_and_one_that_beats_is_not(watch, tmp_path, clock):
    for beat in range(5):
        clock[0] += 50
        sign(tmp_path, {"beat": beat})
        assert watch.lost() is None
    clock[0] += 59
    assert watch.lost() is None
    clock[0] += 2
    assert watch.lost() == "process 1 (pid 42 on there) has given no sign of life for 60 s"


@pytest.mark.fault("lost-process")
def test_an_error_of_another_process_is_told_after_a_while(watch, tmp_path, clock):
    sign(tmp_path, {"failed": "DataError: no such file"})
    assert watch.lost() is None
    clock[0] += 9
    assert watch.lost() is None
    clock[0] += 2
    assert watch.lost() == "process 1 (pid 42 on there) has ended with an error: DataError: no such file"


def test_a_process_that_ends_in_peace_is_not_missed(watch, tmp_path, clock):
    sign(tmp_path, {"beat": 1})
    assert watch.lost() is None
    (tmp_path / "1.json").unlink()
    clock[0] += 1000
    assert watch.lost() is None


def test_what_an_earlier_start_has_left_is_no_sign_of_life(watch, tmp_path, clock):
    sign(tmp_path, {"failed": "killed"}, run=6)
    assert watch.lost() is None
    clock[0] += 11
    assert watch.lost() is None
    clock[0] += 50
    assert "which never started" in watch.lost()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_sign_that_cannot_be_read_changes_nothing(watch, tmp_path, clock, content):
    sign(tmp_path, {"beat": 1})
    assert watch.lost() is None
    (tmp_path / "1.json").write_text(content)
    clock[0] += 50
    assert watch.lost() is None
    clock[0] += 11
    assert "no sign of life" in watch.lost()


def test_an_error_is_left_for_the_others_and_peace_leaves_nothing(tmp_path):
    one, two = (ProcessWatch(tmp_path, index, 2, run=7) for index in (0, 1))
    one.start()
    two.start()
    one.stop(ValueError("no"))
    one.stop()
    two.stop()
    assert json.loads((tmp_path / "0.json").read_text())["failed"] == "ValueError: no"
    assert not (tmp_path / "1.json").exists()


@pytest.mark.fault("lost-process")
def test_the_process_ends_though_its_main_thread_waits_forever(tmp_path):
    script = """
        import sys, threading
        from firm_jax import processes
        processes.BEAT_SECONDS, processes.LOST_SECONDS = 0.1, 0.5
        processes.ProcessWatch(sys.argv[1], 0, 2, run=7).start()
        threading.Event().wait()
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == LOST_EXIT_CODE
    assert "process 1" in ended.stderr and "start the same command on every host again" in ended.stderr
