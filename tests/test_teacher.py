"""A teacher behind chat endpoints: an outcome for whatever it replies, every try on the books, limits kept."""

import asyncio
import dataclasses
import time

import httpx
import numpy as np
import pytest
from scripted_teacher import QUICK, SETTINGS, ScriptedTeacher, chat, teacher

from firm_jax.critic.questions import Picture
from firm_jax.curation import teacher as teachers
from firm_jax.curation.ledger import Budget, Ledger
from firm_jax.curation.teacher import Pace, Teacher, TeacherSettings
from firm_jax.errors import BudgetError, ConfigError

PICTURE = Picture(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3), "p")
PAID = round(1000 * (30 * 0.15 + 10 * 0.6))  # of `chat`
LOST = round(1000 * ((5 + 100 + 64) * 0.15 + 50 * 0.6))  # the most that `ask` may cost


def ask(ledger, asked, keys=("k",)):
    """The answers to one question for each key, asked at once."""
    patron, _ = asked

    async def run():
        calls = (patron.ask(ledger, key, "score", "Score", [PICTURE], 50) for key in keys)
        try:
            return await asyncio.gather(*calls)
        finally:
            await patron.close()

    return asyncio.run(run())


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "calls.sqlite")
    yield ledger
    ledger.close()


def test_what_is_sent_and_what_comes_back(ledger, monkeypatch):
    monkeypatch.setenv("FIRM_JAX_TEACHER_KEY", "secret")
    seen = []
    asked = teacher(lambda number, text, pictures: seen.append((text, pictures)) or "It is a 4.")
    [answer] = ask(ledger, asked)
    assert (answer.outcome, answer.answer) == ("ok", "It is a 4.") and ledger.answered("k") == answer
    [(text, [pixels])], [body] = seen, asked[1].asked
    assert text == "Score" and np.array_equal(pixels, PICTURE.pixels)
    assert body["messages"][0]["content"][-1]["type"] == "text"  # after the images
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("wise", 0.0, 50)
    assert asked[1].headers[0]["authorization"] == "Bearer secret"
    assert asked[1].urls[0] in ("http://one/v1/chat/completions", "http://two/v1/chat/completions")
    totals = ledger.totals()
    assert (totals.tokens_in, totals.tokens_out, totals.price, totals.attempts, totals.lost) == (30, 10, PAID, 1, 0)
    [row] = ledger.rows()
    assert (row["stage"], row["model"]) == ("score", "wise")


UNUSABLE = {
    "refusal": (chat(None, refusal="I will not."), "refused"),
    "filtered": (chat("I", ended="content_filter"), "refused"),
    "empty": (chat(""), "empty"),
    "blank": (chat(" \n"), "empty"),
    "no text": (chat(None), "empty"),
    "cut": (chat('{"score": [', ended="length"), "cut"),
}


@pytest.mark.fault("teacher-answers")
@pytest.mark.parametrize("name", UNUSABLE)
def test_an_answer_that_is_none_has_an_outcome_is_paid_and_final(ledger, name):
    reply, outcome = UNUSABLE[name]
    asked = teacher(lambda *_: reply)
    [answer] = ask(ledger, asked)
    assert answer.outcome == outcome and answer.reason
    assert ledger.answered("k") == answer and ledger.totals().price == PAID and len(asked[1].asked) == 1


BROKEN = {
    "html": (b"<html>oops</html>", "malformed_reply", LOST),
    "nothing": (b"", "malformed_reply", LOST),
    "truncated": (b'{"choices": [{"mess', "malformed_reply", LOST),
    "a list": (b"[]", "malformed_reply", LOST),
    "no choices, but a bill": (chat("4") | {"choices": []}, "malformed_reply", PAID),
    "no message": ({"choices": [{"text": "4"}]}, "malformed_reply", LOST),
    "a text that is a number": (chat(4), "malformed_reply", PAID),
    "400": (400, "rejected", 0),
    "401": (401, "rejected", 0),
    "500": (500, "server_error", 0),
}


@pytest.mark.fault("teacher-answers")
@pytest.mark.parametrize("name", BROKEN)
def test_a_reply_that_is_no_answer_is_counted_and_may_be_asked_again(ledger, name):
    reply, status, money = BROKEN[name]
    asked = teacher(lambda *_: reply)
    [answer] = ask(ledger, asked)
    assert answer.outcome == status and answer.answer == "" and "http://" in answer.reason
    assert ledger.answered("k") is None and len(asked[1].asked) == 1
    assert ledger.totals().money == pytest.approx(money * 1e-9)
    assert ask(ledger, teacher(lambda *_: "4"))[0].outcome == "ok"
    totals = ledger.totals()
    assert totals.attempts == 2 and totals.money == pytest.approx((money + PAID) * 1e-9)


@pytest.mark.fault("teacher-answers")
@pytest.mark.parametrize("again", [429, (503, {"Retry-After": "0"}), httpx.ConnectError("refused")])
def test_a_server_that_is_busy_or_gone_is_asked_again_for_nothing(ledger, again):
    asked = teacher(lambda number, *_: "4" if number == 2 else again)
    [answer] = ask(ledger, asked)
    assert answer.outcome == "ok" and len(asked[1].asked) == 3
    totals = ledger.totals()
    assert (totals.attempts, totals.price, totals.lost) == (3, PAID, 0)


@pytest.mark.fault("teacher-answers")
def test_one_that_never_answers_may_have_been_billed(ledger):
    slow = dataclasses.replace(QUICK, try_timeout=0.05)
    [answer] = ask(ledger, teacher(lambda *_: "4", policy=slow, after=1))
    assert answer.outcome == "timeout" and ledger.answered("k") is None
    assert (ledger.totals().lost, ledger.totals().lost_price) == (1, LOST)
    late = dataclasses.replace(QUICK, timeout=0.05)  # of all tries
    [answer] = ask(ledger, teacher(lambda *_: "4", policy=late, after=1), ["l"])
    assert answer.outcome == "timeout" and ledger.totals().lost == 2


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": "1", "completion_tokens": 1}, [1, 1]])
def test_a_bill_that_is_not_told_counts_as_the_most(ledger, usage):
    [answer] = ask(ledger, teacher(lambda *_: chat("4") | {"usage": usage}))
    assert answer.outcome == "ok" and ledger.answered("k").answer == "4"
    assert (ledger.totals().lost_price, ledger.totals().price) == (LOST, 0)


@pytest.mark.fault("teacher-budget")
def test_the_budget_stops_before_it_is_exceeded(tmp_path):
    ledger = Ledger(tmp_path / "calls.sqlite", Budget(money=3 * LOST * 1e-9))
    asked = teacher(lambda *_: "4")
    with pytest.raises(BudgetError, match=r"budget\.money"):
        for number in range(100):
            ask(ledger, (Teacher(SETTINGS, QUICK, transport=asked[1]), asked[1]), [str(number)])
    assert len(asked[1].asked) == ledger.totals().done > 3
    assert ledger.totals().money <= 3 * LOST * 1e-9


def test_no_more_requests_at_once_than_allowed(ledger):
    asked = teacher(lambda *_: "4", after=0.01)
    answers = ask(ledger, asked, [str(number) for number in range(12)])
    assert {answer.outcome for answer in answers} == {"ok"} and asked[1].most == QUICK.concurrency


def _times(pace, sizes, corrected=None):
    async def run():
        times = []
        for size in sizes:
            number = await pace.take(size)
            times.append(time.monotonic())
            if corrected is not None:
                pace.correct(number, corrected)
        return times

    return asyncio.run(run())


def test_no_window_of_a_minute_holds_more_requests_than_allowed(monkeypatch):
    monkeypatch.setattr(teachers, "MINUTE", 0.2)
    times = _times(Pace(3, None), [1] * 8)
    assert all(later - earlier >= 0.199 for earlier, later in zip(times, times[3:], strict=False))
    assert times[2] - times[0] < 0.1  # none waits without need


def test_no_window_of_a_minute_holds_more_tokens_than_allowed(monkeypatch):
    monkeypatch.setattr(teachers, "MINUTE", 0.2)
    times = _times(Pace(None, 100), [60, 40, 30, 500, 10])
    assert times[1] - times[0] < 0.1 and times[2] - times[0] >= 0.199
    assert times[3] - times[2] >= 0.199 and times[4] - times[3] >= 0.199  # one larger than the limit goes alone


def test_tokens_that_were_not_needed_are_given_back(monkeypatch):
    monkeypatch.setattr(teachers, "MINUTE", 5.0)
    times = _times(Pace(None, 100), [50] * 5, corrected=10)
    assert times[-1] - times[0] < 1


def test_a_wait_for_the_limits_is_no_delay_of_the_server(ledger, monkeypatch):
    monkeypatch.setattr(teachers, "MINUTE", 0.4)
    settings = dataclasses.replace(SETTINGS, requests_per_minute=1)
    hasty = dataclasses.replace(QUICK, timeout=0.3)
    answers = ask(ledger, teacher(lambda *_: "4", policy=hasty, settings=settings), ["a", "b", "c"])
    assert [answer.outcome for answer in answers] == ["ok"] * 3


@pytest.mark.parametrize(
    "changed",
    [{"endpoints": ()}, {"endpoints": "http://one"}, {"model": ""}, {"price_in": float("nan")}, {"price_out": -1.0},
     {"requests_per_minute": 0}, {"tokens_per_minute": -5}],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(changed):
    with pytest.raises(ConfigError, match="teacher"):
        dataclasses.replace(SETTINGS, **changed)


def test_an_endpoint_that_is_no_url_is_named():
    with pytest.raises(ConfigError, match="teacher's endpoints"):
        Teacher(TeacherSettings("m", ("wise:8000",), 0, 0), transport=ScriptedTeacher(None))
