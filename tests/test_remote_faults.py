"""What servers and networks do to a remote critic: a status for each failure, and no score where none was given."""

import json
import math
import threading
import time

import numpy as np
import pytest
from fake_critic import AXES, IDENTITY, Play, closed_port, critic, expected, fake, patient, red, requests, statuses
from hypothesis import given, settings
from hypothesis import strategies as st

from firm_jax.critic.endpoints import Failed, _retry_after
from firm_jax.critic.firm_protocol import FirmProtocol, _pinned
from firm_jax.critic.questions import FAILURES, questions_of
from firm_jax.service.protocol import Identity

# Failures: a status for each, never a score


def garbage(**changed):
    """A reply of which one field of every item, or of the whole, is something else."""

    def change(reply):
        for item in reply["items"]:
            item.update(changed)
        return reply

    return Play(change=change)


def whole(**changed):
    return Play(change=lambda reply: reply | changed)


BROKEN = {
    "html": (Play(body=b"<html>oops</html>"), "malformed_reply"),
    "empty": (Play(body=b""), "malformed_reply"),
    "truncated": (Play(cut=True), "malformed_reply"),
    "half of the JSON": (Play(body=b'{"server": {'), "malformed_reply"),
    "two objects": (Play(change=None, body=b"{} {}"), "malformed_reply"),
    "not UTF-8": (Play(body=b"\xff\xfe"), "malformed_reply"),
    "nested without end": (Play(body=b"[" * 100_000), "malformed_reply"),
    "packed": (Play(headers={"Content-Encoding": "gzip"}), "malformed_reply"),
    "huge": (Play(body=b" " * (33 << 20)), "malformed_reply"),
    "no content": (Play(206), "malformed_reply"),
    "one missing": (Play(change=lambda reply: reply | {"items": reply["items"][1:]}), "malformed_reply"),
    "none": (whole(items=[]), "malformed_reply"),
    "duplicated": (Play(change=lambda reply: reply | {"items": reply["items"][:1] * 4}), "malformed_reply"),
    "of another request": (whole(request_id="b"), "malformed_reply"),
    "score 7": (garbage(score=7), "malformed_reply"),
    "score 0": (garbage(score=0), "malformed_reply"),
    "score 4.5": (garbage(score=4.5), "malformed_reply"),
    "score 4/5": (garbage(score="4/5"), "malformed_reply"),
    "score '4'": (garbage(score="4"), "malformed_reply"),
    "score NaN": (garbage(score=math.nan), "malformed_reply"),
    "no score": (garbage(score=None), "malformed_reply"),
    "two scores": (garbage(score=[4, 4]), "malformed_reply"),
    "expected NaN": (garbage(expected=math.nan), "malformed_reply"),
    "expected 9": (garbage(expected=9.0), "malformed_reply"),
    "probabilities": (garbage(probs=[1.0, 1.0, 0.0, 0.0, 0.0]), "malformed_reply"),
    "entropy": (garbage(entropy=math.inf), "malformed_reply"),
    "another rubric": (garbage(rubric_sha256="c3"), "malformed_reply"),
    "unread": (garbage(status="unparseable", detail="out_of_range"), "out_of_range"),
    "refused item": (garbage(status="invalid_input", detail="too large"), "rejected"),
    "failed item": (garbage(status="internal"), "server_error"),
    "400": (Play(400), "rejected"),
    "404": (Play(404), "rejected"),
    "413": (Play(413), "rejected"),
    "422": (Play(422), "rejected"),
    "redirect": (Play(302, {"Location": "http://127.0.0.1:1/"}), "rejected"),
    "500": (Play(500), "server_error"),
    "501": (Play(501), "server_error"),
}


@pytest.mark.fault("remote-garbage")
@pytest.mark.parametrize("name", BROKEN)
def test_a_reply_that_is_no_answer_is_a_missing_judgement_and_is_not_asked_again(name):
    play, status = BROKEN[name]
    with fake(lambda number, request: play) as server:
        found = critic(server).judge(requests(2))
        assert statuses(found) == {status} and len(server.requests) == 1
        assert all(one.probabilities is None and one.entropy is None for one in found)
        if status in FAILURES and name not in ("failed item",):
            assert all(one.reason for one in found)


@pytest.mark.fault("remote-garbage")
@pytest.mark.parametrize("order", [lambda items: items[::-1], lambda items: sorted(items, key=lambda one: one["id"])])
def test_answers_in_another_order_go_to_their_questions(order):
    with fake(lambda *_: Play(change=lambda reply: reply | {"items": order(reply["items"])})) as server:
        assert critic(server).judge(requests(4)) == expected(requests(4))


CHATS = {
    "no choices": {"choices": []},
    "two choices": {"choices": [{"message": {"content": "\\boxed{4}"}}] * 2},
    "no message": {"choices": [{"text": "\\boxed{4}"}]},
    "no text": {"choices": [{"message": {"content": None}}]},
    "a list": {"choices": [{"message": {"content": ["\\boxed{4}"]}}]},
}


@pytest.mark.fault("remote-garbage")
@pytest.mark.parametrize("name", CHATS)
def test_a_chat_that_is_no_answer_is_a_missing_judgement(name):
    with fake(lambda number, request: whole(**CHATS[name]) if number else Play()) as server:
        assert statuses(critic(server, protocol="openai").judge(requests(1))) == {"malformed_reply"}


@pytest.mark.fault("unusable-answers")
@pytest.mark.parametrize(
    ("text", "ended", "status"),
    [
        ("\\boxed{7}", "stop", "out_of_range"),
        ("\\boxed{4/5}", "stop", "not_integer"),
        ("", "stop", "empty"),
        ("I was about to", "length", "truncated"),
        ("I will not", "stop", "no_score"),
    ],
)
def test_a_chat_without_a_score_has_the_status_of_the_parser(text, ended, status):
    choice = {"message": {"content": text}, "finish_reason": ended, "logprobs": None}
    with fake(lambda number, request: whole(choices=[choice]) if number else Play()) as server:
        found = critic(server, protocol="openai").judge(requests(1)[:1])
        assert statuses(found) == {status} and found[0].text == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.fault("remote-garbage")
@given(st.data())
@settings(max_examples=80, deadline=None)
def test_whatever_a_field_becomes_a_score_is_the_servers_own_or_missing(data):
    """One field, anywhere in the reply, is replaced, lost or renamed."""
    protocol, identity = FirmProtocol(None, None, 1), _pinned(Identity(**IDENTITY))
    questions = questions_of(PAIR, 9)
    items = [server_item(one.id, criterion) for one, criterion in zip(questions, AXES, strict=True)]
    reply = {"request_id": "a", "server": dict(IDENTITY), "items": items}
    place = data.draw(st.sampled_from([reply, *items]))
    name = data.draw(st.sampled_from([one for one in ("score", "expected", "entropy", *sorted(place)) if one in place]))
    value = place.pop(name)
    if data.draw(st.booleans()):
        place[name] = data.draw(st.integers(-9, 9) | st.floats() | json_values)
    try:
        who, found = protocol.read(json.dumps(reply).encode(), questions, "a", identity)
    except Failed as failed:
        assert failed.status == "malformed_reply"
        return
    if who != identity:
        assert name == "server" and found == {}
        return
    for question, criterion in zip(questions, AXES, strict=True):
        judgement = found[question.id]
        assert judgement.status == "ok" or judgement.score is None is judgement.expected
        if judgement.status == "ok" and name != "score":
            assert judgement.score == (4 if criterion == "alignment" else (5, 4, 5))
        if judgement.score is not None:
            assert np.all(np.isin(judgement.score, range(1, 6))), value


PAIR = [{"images": [red(3, 2)], "criterion": axis} for axis in AXES]


def server_item(name: str, axis: str) -> dict:
    score = 4 if axis == "alignment" else [5, 4, 5]
    item = {"id": name, "status": "ok", "score": score, "expected": 3.9, "probs": [0, 0, 0.1, 0.9, 0], "entropy": 0.3}
    return item | {"detail": None, "rubric_sha256": IDENTITY["rubrics"][axis], "text": "", "reasoning": ""}


# Waiting and trying again


@pytest.mark.fault("remote-overload")
@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_that_says_later_is_asked_later(status):
    with fake(lambda number, request: Play(status) if number < 2 else Play()) as server:
        assert critic(server).judge(requests(2)) == expected(requests(2))
        assert len(server.requests) == 3 and server.judged == 4


@pytest.mark.fault("remote-overload")
@pytest.mark.parametrize(
    ("status", "told"), [(429, "overloaded"), (503, "overloaded"), (502, "unreachable"), (504, "timeout")]
)
def test_a_server_that_always_says_later_is_asked_as_often_as_told(status, told):
    with fake(lambda number, request: Play(status)) as server:
        asking = critic(server, attempts=3)
        found = asking.judge(requests(2))
        assert statuses(found) == {told} and len(server.requests) == 3
        assert f"{server.url} answers {status}" in found[0].reason
        assert (asking.endpoints.sent, asking.endpoints.retries) == (4, 2)  # with the greeting


@pytest.mark.fault("remote-overload")
def test_retry_after_is_kept_and_others_wait_too():
    def play(number, request):
        return Play(429, {"Retry-After": "1"}) if number == 0 else Play()

    with fake(play) as server:
        asking = critic(server, concurrency=1, protocol="firm")
        assert asking.judge(requests(10)) == expected(requests(10))
        assert len(server.requests) == 4 and 1 <= server.times[1] - server.times[0] < 5


def test_retry_after_is_seconds_or_a_date():
    assert _retry_after("7") == 7 and _retry_after(None) == _retry_after("soon") == _retry_after("-3") == 0
    assert _retry_after("Sun, 06 Nov 1994 08:49:37 GMT") == 0
    assert _retry_after("Fri, 31 Dec 2299 23:59:59 GMT") > 1e6 and _retry_after("9" * 400) > 1e6


@pytest.mark.fault("remote-overload")
def test_items_for_which_there_was_no_room_are_asked_again_alone():
    def play(number, request):
        def change(reply):
            reply["items"][1].update(status="overloaded", score=None, expected=None, detail="no room")
            return reply

        return Play(change=change) if number == 0 else Play()

    with fake(play) as server:
        assert critic(server).judge(requests(2)) == expected(requests(2))
        assert [len(request["items"]) for request in server.requests] == [4, 1]


@pytest.mark.fault("remote-hangs")
def test_a_server_that_hangs_is_not_asked_again_and_does_not_hold_up_the_others():
    with fake(lambda number, request: Play(after=2.0)) as server:
        asking = patient(critic(server, concurrency=2), try_timeout=0.2, timeout=0.5)
        begun = time.monotonic()
        found = asking.judge(requests(40))  # ten requests, two at a time
        assert statuses(found) <= {"timeout", "unreachable"} and "timeout" in statuses(found)
        assert time.monotonic() - begun < 10 and len(server.requests) < 10
        assert server.url in found[0].reason


@pytest.mark.fault("remote-hangs")
def test_a_deadline_within_a_try_counts_as_a_failure_of_the_server():
    with fake(lambda number, request: Play(after=2.0)) as server:
        asking = patient(critic(server, concurrency=1), try_timeout=5, timeout=0.2)
        assert statuses(asking.judge(requests(1))) == {"timeout"}
        assert asking.endpoints.all[0].failures == 1


@pytest.mark.fault("remote-hangs")
def test_a_client_that_is_closed_goes_away():
    with fake(lambda number, request: Play(after=0.3)) as server:
        asking = critic(server)
        asked = asking.ask(requests(2))
        while not server.requests:
            time.sleep(0.01)
        asking.close()
        assert asked.wait(1)
        assert not asking._loop.is_running()


@pytest.mark.fault("remote-down")
def test_a_connection_that_breaks_before_the_reply_is_made_again():
    with fake(lambda number, request: Play(drop=number < 2)) as server:
        assert critic(server).judge(requests(2)) == expected(requests(2))
        assert len(server.requests) == 3


@pytest.mark.fault("remote-down")
def test_a_server_that_dies_is_left_alone_and_taken_up_again_when_it_is_back():
    with fake() as server:
        asking = patient(critic(server), timeout=0.4, attempts=2)
        server.stop()
        found = asking.judge(requests(200))  # fifty requests
        assert "unreachable" in statuses(found) <= {"timeout", "unreachable"} and server.url in found[0].reason
        assert asking.endpoints.sent < 50
        server.start()
        patient(asking, timeout=20, attempts=5)
        assert statuses(asking.judge(requests(2))) == {"ok"}
        server.stop()


@pytest.mark.fault("remote-down")
def test_a_restart_within_the_deadline_costs_nothing():
    with fake() as server:
        asking = critic(server, timeout=60, attempts=5, rest=0.1)
        server.stop()
        threading.Timer(0.5, server.start).start()
        assert asking.judge(requests(40)) == expected(requests(40))


@pytest.mark.fault("remote-down")
def test_with_two_servers_one_answers_for_the_other():
    with fake() as first, fake() as second:
        asking = critic(first, second, protocol="openai")
        first.stop()
        assert [one.status for one in asking.judge(requests(30))] == ["ok"] * 60
        assert second.judged == 60 + 1 and asking.endpoints.all[0].failures >= 3  # with the canary
        assert asking.endpoints.retries < 15


@pytest.mark.fault("remote-down")
def test_a_server_that_cannot_be_reached_at_the_start_is_left_out_for_now(caplog):
    with fake() as server:
        found = critic(f"http://127.0.0.1:{closed_port()}", server).judge(requests(2))
        assert found == expected(requests(2))
    assert "is left out for now" in caplog.text
