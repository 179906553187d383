"""The benchmarks of whole jobs, with a job that costs nothing."""

import json

import pytest

from benchmarks import idle, job_tables, jobs, start, tables

JOB = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
with (folder / "metrics.jsonl").open("w") as out:
    for epoch in range(40):
        if stopped or "--fail" in sys.argv:
            print("the last words of", sys.argv[2])
            sys.exit(3 if "--fail" in sys.argv else 75)
        print(json.dumps({"epoch": epoch, "time": time.time(), "time/compile": 1.5}), file=out, flush=True)
        time.sleep(0.25)
"""


@pytest.fixture
def job(tmp_path):
    file = tmp_path / "job.py"
    file.write_text(JOB)
    return (str(file),)


def test_a_job_runs_until_its_epoch_is_done_and_is_then_stopped(job, tmp_path):
    ran = jobs.run_job(job, "a.py:tiny", tmp_path / "run", 2)
    assert [line["epoch"] for line in ran.lines][:3] == [0, 1, 2] and len(ran.lines) < 20
    assert ran.epoch(1)["epoch"] == 1 and 0 < ran.cpu_seconds < 10
    found = start.measured(ran)
    assert 0 < found["evaluated"] < found["evaluated"] + 0.2 < found["seconds"] < 20
    assert found["compile_seconds"] == 3.0  # of the evaluation before the first epoch, and of that


def test_a_job_that_ends_too_early_is_told_with_its_last_words(job, tmp_path):
    with pytest.raises(SystemExit, match=r"ended with 3:\nthe last words of a.py"):
        jobs.run_job(job, "a.py", tmp_path / "run", 2, ["--fail"])


def test_results_are_stored_with_how_they_were_made_and_shown(tmp_path):
    part = {"seconds": 4.0, "idle": 0.125}
    gap = {"seconds": 0.25, "at": 1.0, "phase": "rest", "after": "jit_draw", "before": None, "host": ["a", "b|c"]}
    run = {"config": "a.py:tiny", "epochs": [4, 5], "compile_seconds": 0.5, "devices": 2, **part}
    shares = {"label": "tiny", "runs": [run | {"phases": {"rollout": part}, "gaps": [gap]}]}
    row = {"evaluated": 5.0, "seconds": 9.0, "compile_seconds": 3.0, "cpu_seconds": 11.0}
    starts = {"label": "a-tiny", "config": "a.py:tiny", "starts": {name: row for name in start.STARTS}}
    files = [
        jobs.store("idle", "tiny", tmp_path, ["--size", "tiny"], 0.25, shares),
        jobs.store("start", "a-tiny", tmp_path, [], 0.5, starts),
    ]
    assert files[0].name.startswith("idle_tiny_cpu_")
    results = [json.loads(file.read_text()) for file in files]
    assert results[0]["machine"]["load_before"] == 0.25 and results[0]["versions"]["jax"]
    told = job_tables.page(results)
    assert "`python -m benchmarks.idle --size tiny` on" in told
    assert "| `a.py:tiny` | epochs 4 and 5, 2 devices | 4.0 | **12.5%** |\n| | rollout | 4.00 | 12.5% |" in told
    assert "| 250 | rest | jit_draw | None | a > b c |" in told
    assert "| with the cache | 9.0 | 3.0 | 5.0 | 11.0 |" in told


def test_the_page_in_the_documentation_is_that_of_the_results():
    assert job_tables.PAGE.read_text() == job_tables.page(job_tables.stored()), "run python -m benchmarks.job_tables"
    assert all("cases" in result for result in tables.stored())


def test_idle_shares_are_read_from_what_a_job_leaves(monkeypatch, tmp_path):
    asked = []

    def run_job(module, config, workdir, epochs, more):
        asked.append((module, config, epochs, more))
        return jobs.Ran([{"epoch": number, "time/compile": 0.25 * number} for number in range(7)], 0.0, 0.0)

    monkeypatch.setattr(idle, "run_job", run_job)
    monkeypatch.setattr(idle, "read_trace", lambda folder: str(folder))
    monkeypatch.setattr(idle, "idle", lambda timeline: {"from": timeline})
    found = idle.measure("a.py", tmp_path, ["--config.seed=3"])
    assert found == {
        "config": "a.py",
        "epochs": [4, 5],
        "compile_seconds": 0.25 * (4 + 5),
        "from": str(tmp_path / "profile"),
    }
    ((module, config, epochs, more),) = asked
    assert (module, config, epochs) == (("-m", "benchmarks.traced"), "a.py", 5)
    assert more[-1] == "--config.seed=3"
    assert "--config.profile.start=3" in more and "--config.profile.steps=2" in more
