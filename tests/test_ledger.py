"""The ledger of teachers' answers: paid once, counted once, kept through kills, held by one process."""

import collections
import dataclasses
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import ledger_job
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firm_jax.curation.ledger import Budget, Cost, Ledger, call_key
from firm_jax.errors import BudgetError, ConfigError, WorkdirError

MOST = Cost(100, 100, 1000)
ROOT = Path(__file__).parent.parent
PROCESS = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
ASKED = {
    "stage": "plan", "version": 1, "template": "Plan {prompt}", "model": "m",
    "parameters": {"temperature": 0, "max_tokens": 5}, "images": ["a", "b"],
    "fields": {"prompt": "a cat", "plan": "1."},
}  # fmt: skip


def begin(ledger, key="k", most=MOST):
    ledger.begin(key, stage="plan", model="m", most=most)


def table(ledger) -> list[tuple]:
    """What must not depend on when the process was killed."""
    names = ("key", "stage", "model", "status", "outcome", "answer", "reason", "tokens_in", "tokens_out", "price")
    return [tuple(row[name] for name in names) for row in ledger.rows()]


@pytest.mark.parametrize(
    "changed",
    [
        {"stage": "score"}, {"version": 2}, {"template": "Plan: {prompt}"}, {"model": "n"},
        {"parameters": {"temperature": 1, "max_tokens": 5}}, {"images": ["b", "a"]}, {"images": ["a"]},
        {"fields": {"prompt": "a cat", "plan": "2."}}, {"fields": {"prompt": "1.", "plan": "a cat"}},
    ],
)  # fmt: skip
def test_a_call_is_named_by_all_that_decides_its_answer(changed):
    assert call_key(**ASKED | changed) != call_key(**ASKED)


def test_the_order_of_names_does_not_name_another_call():
    turned = {name: dict(reversed(ASKED[name].items())) for name in ("parameters", "fields")}
    assert call_key(**ASKED | turned) == call_key(**ASKED)


def test_an_answer_is_kept_and_its_cost_counted(tmp_path):
    ledger = Ledger(tmp_path / "calls.sqlite")
    begin(ledger)
    assert ledger.answered("k") is None and ledger.totals().done == 0
    ledger.settle("k", Cost(7, 3, 41), outcome="ok", done=True, answer="four\n", latency=0.5)
    ledger.close()
    ledger = Ledger(tmp_path / "calls.sqlite")
    assert ledger.answered("k").answer == "four\n" and ledger.answered("k").outcome == "ok"
    [row] = ledger.rows()
    assert row["latency"] == 0.5 and row["attempts"] == 1 and row["in_flight"] == 0
    totals = ledger.totals()
    assert (totals.tokens_in, totals.tokens_out, totals.price, totals.lost) == (7, 3, 41, 0)
    assert totals.money == 41e-9 and totals.tokens == 10


@pytest.mark.fault("teacher-killed")
def test_what_is_done_or_on_its_way_is_not_asked(tmp_path):
    ledger = Ledger(tmp_path / "calls.sqlite")
    begin(ledger)
    with pytest.raises(ValueError, match="on its way"):
        begin(ledger)
    ledger.settle("k", Cost(1, 1, 1), outcome="refused", done=True, answer="no")
    with pytest.raises(ValueError, match="done"):
        begin(ledger)
    with pytest.raises(ValueError, match="not on its way"):
        ledger.settle("k", Cost(1, 1, 1), outcome="ok", done=True)
    assert ledger.totals().price == 1 and ledger.answered("k").outcome == "refused"


def test_tries_that_fail_are_counted_with_what_they_cost(tmp_path):
    ledger = Ledger(tmp_path / "calls.sqlite")
    for cost in (Cost(5, 0, 10), Cost(), None):  # billed, not billed, not known
        begin(ledger)
        ledger.settle("k", cost, outcome="malformed_reply", done=False, reason="HTML")
        assert ledger.answered("k") is None
    begin(ledger)
    ledger.settle("k", Cost(5, 2, 20), outcome="ok", done=True, answer="4")
    totals = ledger.totals()
    assert (totals.calls, totals.attempts, totals.tokens_in, totals.tokens_out, totals.price) == (1, 4, 10, 2, 30)
    assert (totals.lost, totals.lost_tokens, totals.lost_price) == (1, 200, 1000)


@pytest.mark.fault("teacher-budget")
@pytest.mark.parametrize(("budget", "name"), [({"money": 2.5e-6}, "money"), ({"tokens": 500}, "tokens")])
def test_a_call_that_could_exceed_the_budget_is_not_begun(tmp_path, budget, name):
    path = tmp_path / "calls.sqlite"
    ledger = Ledger(path, Budget(**budget))
    begin(ledger, "a")
    begin(ledger, "b")
    with pytest.raises(BudgetError, match=rf"budget\.{name} = .*raise the budget"):
        begin(ledger, "c")  # two on their way may cost all of it
    assert ledger.totals().calls == 2
    ledger.settle("a", Cost(100, 100, 1000), outcome="ok", done=True)
    ledger.settle("b", Cost(50, 0, 400), outcome="ok", done=True)
    begin(ledger, "c")
    ledger.settle("c", None, outcome="timeout", done=False)  # may have cost the most
    ledger.close()
    ledger = Ledger(path, Budget(**budget))
    with pytest.raises(BudgetError, match=name):
        begin(ledger, "d")
    ledger.close()
    begin(Ledger(path), "d")  # without a budget


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_budget_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match=r"budget\.money"):
        Budget(money=value)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["ok", "paid", "free", "lost", "kill"]))))
def test_sums_are_those_of_what_happened(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("ledger")
    path = folder / "calls.sqlite"
    ledger, done, paid, lost = Ledger(path), set(), 0, 0
    for number, (key, what) in enumerate(steps):
        if key in done:
            assert ledger.answered(key)
            continue
        begin(ledger, key)
        if what == "kill":
            ledger.close()
            ledger = Ledger(path)
        else:
            cost = {"free": Cost(), "lost": None}.get(what, Cost(number, 1, 3 * number))
            ledger.settle(key, cost, outcome=what, done=what == "ok")
            paid += cost.price if cost else 0
        lost += what in ("lost", "kill")
        done |= {key} if what == "ok" else set()
    totals = ledger.totals()
    assert (totals.price, totals.lost, totals.lost_price, totals.done) == (paid, lost, lost * MOST.price, len(done))
    assert ledger._price == totals.price + totals.lost_price and ledger._tokens == totals.tokens
    ledger.close()
    shutil.rmtree(folder)


@pytest.mark.fault("teacher-killed")
def test_killed_at_any_moment_nothing_done_is_paid_again(tmp_path):
    calls, bills = 60, tmp_path / "bills"
    command = [sys.executable, ledger_job.__file__, str(tmp_path / "calls.sqlite"), str(bills), str(calls)]
    random.seed(0)
    kills = 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, **PROCESS)
        assert process.stdout.readline() == b"ready\n"  # a ledger that was killed opens
        time.sleep(random.uniform(0, 0.06))
        if kills < 6:
            process.kill()
        process.communicate()
        kills += process.returncode == -9
        if process.returncode == 0:
            break
        assert process.returncode == -9
    assert kills >= 3
    billed = collections.Counter(map(int, bills.read_text().split()))
    ledger = Ledger(tmp_path / "calls.sqlite")
    rows = {row["key"]: row for row in ledger.rows()}
    for number in range(calls):
        row, cost = rows[ledger_job.key_of(number)], ledger_job.cost_of(number)
        assert (row["tokens_in"], row["tokens_out"], row["price"]) == dataclasses.astuple(cost)
        assert row["attempts"] == 1 + row["lost"]
        assert 1 <= billed[number] <= 1 + row["lost"]
    totals = ledger.totals()
    assert totals.lost <= kills
    assert sum(ledger_job.cost_of(number).price * times for number, times in billed.items()) <= totals.money * 1e9
    ledger_job.main(str(tmp_path / "straight.sqlite"), str(tmp_path / "other bills"), calls)
    assert table(ledger) == table(Ledger(tmp_path / "straight.sqlite"))


@pytest.mark.fault("teacher-killed")
def test_a_power_failure_takes_no_answer(tmp_path):
    ledger = Ledger(tmp_path / "calls.sqlite")
    begin(ledger, "a")
    ledger.settle("a", Cost(7, 3, 41), outcome="ok", done=True, answer="4")
    [forced] = ledger._database.execute("PRAGMA synchronous").fetchone()
    assert forced == 2  # as FULL is told: all up to here is on the disk
    kept = (tmp_path / "calls.sqlite-wal").stat().st_size
    begin(ledger, "b")
    for name, lost_bytes, lost in (("killed", 0, 1), ("torn", 100, 0), ("unwritten", None, 0)):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("calls.sqlite", "calls.sqlite-wal"):
            shutil.copy(tmp_path / file, folder / file)
        log = folder / "calls.sqlite-wal"
        os.truncate(log, kept if lost_bytes is None else log.stat().st_size - lost_bytes)
        left = Ledger(folder / "calls.sqlite")
        assert left.answered("a").answer == "4" and left.answered("b") is None
        assert (left.totals().price, left.totals().lost) == (41, lost)
        left.close()


@pytest.mark.fault("teacher-two-processes")
def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    path = tmp_path / "calls.sqlite"
    ledger = Ledger(path)
    begin(ledger)
    code = f"from firm_jax.curation.ledger import Ledger; Ledger({str(path)!r}).close()"
    command = [sys.executable, "-c", code]
    refused = subprocess.run(command, capture_output=True, text=True, **PROCESS)
    assert refused.returncode == 1 and "in use by another process" in refused.stderr
    ledger.settle("k", Cost(), outcome="ok", done=True)
    ledger.close()
    assert subprocess.run(command, **PROCESS).returncode == 0


@pytest.mark.fault("teacher-two-processes")
def test_what_is_no_ledger_is_refused_and_left_alone(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database, " * 100)
    with pytest.raises(WorkdirError, match=r"notes\.txt cannot be used"):
        Ledger(text)
    assert text.read_text() == "not a database, " * 100
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE photos (name)")
    other.commit()
    other.close()
    with pytest.raises(WorkdirError, match=r"no ledger of version 1.*photos"):
        Ledger(tmp_path / "other.sqlite")
    with pytest.raises(WorkdirError, match="cannot be used"):
        Ledger(tmp_path / "no folder" / "calls.sqlite")


@pytest.mark.fault("teacher-killed")
def test_a_disk_that_takes_no_more_keeps_what_was_answered(tmp_path):
    ledger = Ledger(tmp_path / "calls.sqlite")
    begin(ledger, "a")
    ledger.settle("a", Cost(1, 1, 1), outcome="ok", done=True, answer="4")
    begin(ledger, "b")
    [pages] = ledger._database.execute("PRAGMA page_count").fetchone()
    ledger._database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(WorkdirError, match="free space"):
        ledger.settle("b", Cost(1, 1, 1), outcome="ok", done=True, answer="x" * 100_000)
    ledger.close()
    ledger = Ledger(tmp_path / "calls.sqlite")
    assert ledger.answered("a").answer == "4" and ledger.answered("b") is None
    assert ledger.totals().lost_price == MOST.price
