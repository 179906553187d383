"""The stages on Ray Data: the embedded engine's outcomes, one ledger for all workers, each call paid once."""

import asyncio
import collections
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import curation_world as world
import pytest

ray = pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]'")

import ray_world  # noqa: E402
from ray_world import EDIT, GEN, collect, engine, records  # noqa: E402
from test_curation_job import bytes_of, endpoints, tiny  # noqa: E402

from firm_jax.curation import job, ray_engine  # noqa: E402
from firm_jax.curation.engine import StopAsked  # noqa: E402
from firm_jax.curation.ledger import Answered, Budget, Cost, Ledger  # noqa: E402
from firm_jax.curation.ray_engine import Books, RayEngine  # noqa: E402
from firm_jax.curation.stage import Record  # noqa: E402
from firm_jax.curation.teacher import TeacherSettings  # noqa: E402
from firm_jax.errors import BudgetError, ConfigError, DataError, WorkdirError  # noqa: E402
from firm_jax.run import Stopped  # noqa: E402

MOST = Cost(100, 100, 1000)
MOST_TOKENS = 5_000
ANNE, BERT = ("anne", "her first life"), ("bert", "his first life")
ROOT = Path(__file__).parent.parent


def embedded(folder, ledger: str, stages, asked) -> tuple[list, int]:
    """What the embedded engine finds over that ledger, and how often it asks."""
    book = Ledger(folder / ledger)
    try:
        running, script = world.engine(stages, book, folder)
        return asyncio.run(world.collect(running, asked)), len(script.asked)
    finally:
        book.close()


def told(found) -> list:
    return [(one.record, one.answers, one.missing) for one in found]


def table(path) -> list[tuple]:
    names = ("key", "stage", "status", "outcome", "answer", "tokens_in", "tokens_out", "price")
    ledger = Ledger(path)
    try:
        return [tuple(row[name] for name in names) for row in ledger.rows()]
    finally:
        ledger.close()


def totals(path):
    ledger = Ledger(path)
    try:
        return ledger.totals()
    finally:
        ledger.close()


def billed(path: Path) -> collections.Counter:
    return collections.Counter(path.read_text().splitlines())


# The books, without a cluster


def with_books(path, play, budget: Budget | None = None):
    """What `play(books)` returns, of books that Anne and Bert have entered."""

    async def run():
        books = Books()
        await books.open(str(path), budget)
        try:
            await books.enter(*ANNE)
            await books.enter(*BERT)
            return await play(books)
        finally:
            await books.close()

    return asyncio.run(run())


async def answer(books, worker, key, text="four"):
    await books.begin(*worker, key, "plan", "m", MOST)
    await books.settle(*worker, key, Cost(1, 1, 7), {"outcome": "ok", "done": True, "answer": text})


@pytest.mark.fault("teacher-workers")
@pytest.mark.parametrize("done", [True, False])
def test_of_two_workers_one_asks_and_both_have_the_reply(tmp_path, done):
    async def play(books):
        assert await books.claim(*ANNE, "k") is None
        waiting = asyncio.create_task(books.claim(*BERT, "k"))
        await asyncio.sleep(0)
        assert await books.claim(*BERT, "another") is None and not waiting.done()
        if done:
            await answer(books, ANNE, "k")
        reply = Answered("ok" if done else "server_error", "four" if done else "", "")
        await books.release(*ANNE, "k", reply)
        assert await waiting == reply
        assert await books.claim(*ANNE, "k") == (reply if done else None)  # what failed may be asked again

    with_books(tmp_path / "calls.sqlite", play)


@pytest.mark.fault("teacher-workers")
def test_what_a_dead_worker_had_begun_is_lost_and_free_for_others(tmp_path):
    async def play(books):
        for key in ("done", "on its way"):
            assert await books.claim(*ANNE, key) is None
        await answer(books, ANNE, "done")
        await books.begin(*ANNE, "on its way", "plan", "m", MOST)
        waiting = [asyncio.create_task(books.claim(*BERT, key)) for key in ("done", "on its way")]
        await asyncio.sleep(0)
        await books.enter("anne", "her second life")
        assert [one and one.answer for one in await asyncio.gather(*waiting)] == ["four", None]
        for late in (  # from the machine that was cut off
            books.settle(*ANNE, "on its way", Cost(1, 1, 7), {"outcome": "ok", "done": True, "answer": "five"}),
            books.begin(*ANNE, "x", "plan", "m", MOST),
            books.claim(*ANNE, "x"),
            books.release(*ANNE, "on its way", None),
        ):
            with pytest.raises(WorkdirError, match="anne has been replaced"):
                await late
        await answer(books, BERT, "on its way", "six")
        await books.release(*BERT, "on its way", Answered("ok", "six", ""))
        assert (await books.claim("anne", "her second life", "on its way")).answer == "six"

    with_books(tmp_path / "calls.sqlite", play)
    sums = totals(tmp_path / "calls.sqlite")
    assert (sums.done, sums.attempts, sums.price, sums.lost, sums.lost_price) == (2, 3, 14, 1, MOST.price)


@pytest.mark.fault("teacher-budget")
def test_the_budget_is_that_of_all_workers_and_what_ends_one_ends_all(tmp_path):
    async def play(books):
        await answer(books, ANNE, "known")
        await books.begin(*ANNE, "a", "plan", "m", MOST)
        with pytest.raises(BudgetError) as caught:
            await books.begin(*BERT, "b", "plan", "m", MOST)
        assert await books.claim(*BERT, "c") is None
        waiting = asyncio.create_task(books.claim(*ANNE, "c"))
        await asyncio.sleep(0)
        await books.stop(caught.value)
        await books.stop(DataError("a later one"))
        assert (await books.claim(*ANNE, "known")).answer == "four"
        with pytest.raises(BudgetError, match=r"budget\.tokens = 300"):
            await books.claim(*ANNE, "d")
        await books.release(*BERT, "c", None)
        with pytest.raises(BudgetError):
            await waiting

    with_books(tmp_path / "calls.sqlite", play, Budget(tokens=300))


@pytest.mark.fault("curation-stopped")
def test_when_a_stop_is_asked_for_nothing_is_claimed_and_what_is_on_its_way_is_kept(tmp_path):
    async def play(books):
        await answer(books, ANNE, "known")
        assert await books.claim(*ANNE, "on its way") is None
        await books.begin(*ANNE, "on its way", "plan", "m", MOST)
        await books.stop(StopAsked())
        for key in ("known", "new"):  # what is known is of no interest any more
            with pytest.raises(StopAsked):
                await books.claim(*BERT, key)
        await books.settle(*ANNE, "on its way", Cost(1, 1, 7), {"outcome": "ok", "done": True, "answer": "four"})
        await books.release(*ANNE, "on its way", Answered("ok", "four", ""))
        assert (await books.totals()).done == 2

    with_books(tmp_path / "calls.sqlite", play)


def test_ray_leaves_the_handlers_of_signals_as_they_were(monkeypatch):
    former = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    try:
        ray_engine._connect()
        assert signal.getsignal(signal.SIGTERM) is former
    finally:
        signal.signal(signal.SIGTERM, former)


def test_limits_of_requests_hold_for_all_workers(tmp_path):
    limited = TeacherSettings("m", ("http://one",), 0, 0, requests_per_minute=2, tokens_per_minute=100)

    async def play(books):
        first = await books.take(limited, 90)
        waiting = asyncio.create_task(books.take(limited, 30))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await books.correct(limited, first, 20)
        await asyncio.wait_for(waiting, 5)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(books.take(limited, 1), 0.5)  # a third request
        await books.take(TeacherSettings("other", ("http://one",), 0, 0, requests_per_minute=1), 1)

    with_books(tmp_path / "calls.sqlite", play)


def test_stages_and_numbers_that_cannot_work_are_refused_before_ray_starts(tmp_path):
    with pytest.raises(ConfigError, match="asks a planner"):
        RayEngine(GEN, {"judge": ray_world.make}, tmp_path / "calls.sqlite", tmp_path)
    for wrong in ({"workers": 0}, {"concurrency": 0}):
        with pytest.raises(ConfigError, match="give 1 or more"):
            RayEngine(GEN, dict.fromkeys(world.ROLES), tmp_path / "calls.sqlite", tmp_path, **wrong)


# On a local Ray


@pytest.fixture(scope="module")
def short():
    """A folder with a short name."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture(scope="module")
def cluster(short):
    before = dict(os.environ)
    ray_world.start(short)
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
@pytest.mark.fault("teacher-workers")
def test_the_outcomes_are_the_embedded_engine_s_and_either_continues_the_other(tmp_path, cluster):
    asked = [*records(tmp_path), Record("gone", "a cat", ("gone.png", "gone.png"))]
    running, bills = engine(EDIT, tmp_path / "calls.sqlite", tmp_path, str(tmp_path / "bills")), tmp_path / "bills"
    found = asyncio.run(collect(running, asked))
    straight, sent = embedded(tmp_path, "straight.sqlite", EDIT, asked)
    assert told(found) == told(straight) and table(tmp_path / "calls.sqlite") == table(tmp_path / "straight.sqlite")
    assert sum(billed(bills).values()) == len(billed(bills)) == sent == totals(tmp_path / "calls.sqlite").attempts
    assert running.answered == {stage.name: len(asked) - 1 for stage in EDIT}
    assert running.missing == {(stage.name, "bad_record"): 1 for stage in EDIT}
    assert told(asyncio.run(collect(running, asked))) == told(straight) and sum(billed(bills).values()) == sent
    assert embedded(tmp_path, "calls.sqlite", EDIT, asked)[1] == 0
    assert asyncio.run(collect(running, [])) == []


@pytest.mark.slow
@pytest.mark.fault("teacher-workers")
def test_a_worker_that_dies_changes_no_outcome_and_nothing_done_is_paid_again(tmp_path, cluster):
    asked, fatal, bills = records(tmp_path), tmp_path / "fatal", tmp_path / "bills"
    fatal.touch()
    found = asyncio.run(collect(engine(EDIT, tmp_path / "calls.sqlite", tmp_path, str(bills), str(fatal)), asked))
    assert not fatal.exists()  # a worker has died
    straight, sent = embedded(tmp_path, "straight.sqlite", EDIT, asked)
    assert told(found) == told(straight) and table(tmp_path / "calls.sqlite") == table(tmp_path / "straight.sqlite")
    sums = totals(tmp_path / "calls.sqlite")
    assert sums.calls == sums.done == sent and 1 <= sums.lost <= 4 and sums.attempts == sums.done + sums.lost
    assert sent <= sum(billed(bills).values()) <= sums.attempts


@pytest.mark.slow
@pytest.mark.fault("teacher-budget")
def test_the_budget_stops_all_workers_saved_and_more_of_it_goes_on(tmp_path, cluster):
    asked, book, bills = records(tmp_path), tmp_path / "calls.sqlite", tmp_path / "bills"
    # More than one call may cost, and less than all of them do with one more.
    with pytest.raises(BudgetError, match=r"budget\.tokens"):
        asyncio.run(collect(engine(EDIT, book, tmp_path, str(bills), budget=Budget(tokens=MOST_TOKENS)), asked))
    before = totals(book)
    assert before.tokens <= MOST_TOKENS and before.lost == 0 and 0 < before.done == before.attempts < 48
    found = asyncio.run(collect(engine(EDIT, book, tmp_path, str(bills)), asked))
    assert told(found) == told(embedded(tmp_path, "straight.sqlite", EDIT, asked)[0])
    assert sum(billed(bills).values()) == totals(book).attempts == totals(book).done


@pytest.mark.slow
@pytest.mark.fault("teacher-workers")
def test_a_run_that_is_left_asks_no_more_and_a_folder_that_is_not_there_is_told(tmp_path, cluster):
    asked, book, bills = records(tmp_path), tmp_path / "calls.sqlite", tmp_path / "bills"

    async def leave():
        run = engine(EDIT, book, tmp_path, str(bills), None, 0.2, concurrency=2).run(asked)
        await anext(run)
        await run.aclose()

    asyncio.run(leave())
    seen = sum(billed(bills).values())
    assert seen < 48
    time.sleep(1)
    assert sum(billed(bills).values()) == seen and 0 < totals(book).done <= seen
    with pytest.raises(DataError, match="storage that all machines"):
        asyncio.run(collect(engine(EDIT, book, tmp_path / "nowhere", str(bills)), asked))
    ledger = Ledger(book)
    with pytest.raises(WorkdirError, match="in use by another process"):
        asyncio.run(collect(engine(EDIT, book, tmp_path, str(bills)), asked))
    ledger.close()


@pytest.mark.slow
@pytest.mark.fault("teacher-workers")
def test_a_driver_that_is_killed_leaves_what_the_next_one_continues(tmp_path, short):
    asked, book, bills = records(tmp_path), tmp_path / "calls.sqlite", tmp_path / "bills"
    command = [sys.executable, ray_world.__file__, str(tmp_path), str(book), str(bills), f"{short}/2"]
    options = {"env": os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, "stderr": subprocess.DEVNULL}
    driver = subprocess.Popen(command, **options)
    while not bills.exists() or len(billed(bills)) < 12:
        assert driver.poll() is None
        time.sleep(0.02)
    driver.kill()
    assert driver.wait() == -9
    until = time.monotonic() + 120
    while True:  # Ray takes a while to notice
        try:
            before = totals(book)
            break
        except WorkdirError:
            assert time.monotonic() < until
            time.sleep(0.5)
    assert 0 < before.done < 48
    assert subprocess.run(command, **options).returncode == 0
    straight, sent = embedded(tmp_path, "straight.sqlite", EDIT, asked)
    assert (tmp_path / "found.json").read_text() == ray_world.written(straight)
    assert table(book) == table(tmp_path / "straight.sqlite")
    sums = totals(book)
    assert sums.done == sent and sums.lost >= before.lost
    assert sent <= sum(billed(bills).values()) <= sums.done + sums.lost


# The job on a local Ray


@pytest.mark.slow
@pytest.mark.parametrize("task", ["gen", "edit"])
def test_a_job_leaves_the_same_bytes_by_both_engines_and_either_continues_the_other(tmp_path, cluster, task):
    config = tiny(task, engine="ray", ray__workers=3)  # on two CPUs: as many work as there is room for
    job.curate(config, tmp_path / "ray")
    job.curate(tiny(task), tmp_path / "embedded")
    found = bytes_of(tmp_path / "embedded")
    assert bytes_of(tmp_path / "ray") == found
    assert table(tmp_path / "ray" / job.LEDGER) == table(tmp_path / "embedded" / job.LEDGER)
    before = totals(tmp_path / "ray" / job.LEDGER)
    job.curate(tiny(task), tmp_path / "ray")
    job.curate(config, tmp_path / "embedded")
    for folder in ("ray", "embedded"):
        assert bytes_of(tmp_path / folder) == found and totals(tmp_path / folder / job.LEDGER) == before


@pytest.mark.slow
@pytest.mark.fault("teacher-budget")
def test_a_job_out_of_budget_on_ray_leaves_what_there_is_and_goes_on_with_more(tmp_path, cluster):
    with pytest.raises(BudgetError, match="raise the budget"):
        job.curate(tiny("gen", engine="ray", ray__workers=2, budget__tokens=MOST_TOKENS), tmp_path / "ray")
    told = json.loads((tmp_path / "ray" / "report.json").read_text())
    assert not told["whole"] and 0 < told["cost"]["tokens"] <= MOST_TOKENS
    job.curate(tiny("gen", engine="ray", ray__workers=2), tmp_path / "ray")
    job.curate(tiny("gen"), tmp_path / "embedded")
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "embedded")


@pytest.mark.slow
@pytest.mark.fault("curation-stopped")
def test_a_job_on_ray_that_is_stopped_goes_on_to_the_same_bytes_and_pays_nothing_twice(tmp_path, cluster, monkeypatch):
    bills = tmp_path / "bills"
    config = endpoints(tmp_path, monkeypatch, world.wise, engine="ray", ray__workers=2, requests__concurrency=1)
    monkeypatch.setattr(job, "Teacher", functools.partial(ray_world.for_job, str(bills), 0.3))

    def stop():
        while not bills.exists() or sum(billed(bills).values()) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(Stopped, match="the same command goes on"):
        job.curate(config, tmp_path / "run")
    thread.join()
    sums = totals(tmp_path / "run" / job.LEDGER)
    assert 3 <= sums.done == sums.attempts == sum(billed(bills).values()) < 12 and sums.lost == 0
    assert not (tmp_path / "run" / "examples.jsonl").exists()
    job.curate(config, tmp_path / "run")
    assert sum(billed(bills).values()) == len(billed(bills)) == 12
    job.curate(endpoints(tmp_path, monkeypatch, world.wise), tmp_path / "straight")
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "straight")
