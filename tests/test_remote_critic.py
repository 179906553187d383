"""A critic on a server: asked as ours is, and no score where none was given, whatever servers and networks do."""

import builtins
import dataclasses
import itertools
import json
import math
import socket
import threading
import time

import numpy as np
import pytest
from fake_critic import IDENTITY, Play, fake, red
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedCritic

from firm_jax.critic.endpoints import Failed, Policy, _retry_after
from firm_jax.critic.firm_protocol import FirmProtocol, _pinned
from firm_jax.critic.openai_protocol import digit_probabilities
from firm_jax.critic.questions import FAILURES, calls_of, questions_of
from firm_jax.critic.remote import KEY_VARIABLE, RemoteCritic, base_url
from firm_jax.errors import ConfigError, CriticError, DataError
from firm_jax.service.protocol import Identity

QUICK = Policy(concurrency=4, connect_timeout=2, try_timeout=5, timeout=10, attempts=3, backoff=0.01, rest=0.02)
AXES = ("alignment", "quality")


def requests(count: int = 4, first: int = 0) -> list[dict]:
    """Two criteria of `count` pictures, no two alike."""
    return [
        {"images": [red(first + 10 * number)], "prompt": "a red circle", "criterion": axis}
        for axis in AXES
        for number in range(count)
    ]


def expected(asked: list[dict]):
    return [ScriptedCritic()._judge(one) for one in asked]


def critic(*servers, **changed) -> RemoteCritic:
    policy = dataclasses.replace(QUICK, **{name: changed.pop(name) for name in list(changed) if hasattr(QUICK, name)})
    return RemoteCritic([getattr(one, "url", one) for one in servers], policy=policy, **changed)


def patient(asking: RemoteCritic, **changed) -> RemoteCritic:
    """The same critic with other patience: it has greeted the server with that of QUICK."""
    asking.endpoints.policy = dataclasses.replace(asking.policy, **changed)
    return asking


def statuses(judgements) -> set[str]:
    for one in judgements:
        assert (one.status == "ok") == (one.score is not None) == (one.expected is not None)
    return {one.status for one in judgements}


# What is asked and answered


def test_a_server_of_ours_judges_in_order_and_is_sent_every_picture_once():
    asked = [*requests(6), requests(6)[2]]  # one of them twice
    with fake() as server:
        found = critic(server).judge(asked, progress=list)
        assert found == expected(asked)
        items = [item for request in server.requests for item in request["items"]]
        assert len(items) == server.judged == 12 and len({item["id"] for item in items}) == 12
        assert sum("b64" in image for item in items for image in item["images"]) == 6
        assert all(len(request["items"]) <= 8 for request in server.requests)


def test_an_openai_server_gets_the_rubric_and_its_answers_are_read_here():
    asked = requests(5)
    with fake() as server:
        found = critic(server, protocol="openai").judge(asked, max_new_tokens=77)
        for ours, theirs in zip(found, expected(asked), strict=True):
            assert (ours.score, ours.criterion, ours.status) == (theirs.score, theirs.criterion, "ok")
            assert ours.expected == pytest.approx(theirs.expected) and ours.entropy >= 0
            assert sum(ours.probabilities) == pytest.approx(1)
        _canary, *chats = server.requests
        assert {(one["temperature"], one["max_tokens"], one["top_logprobs"]) for one in chats} == {(0, 77, 20)}
        *images, text = chats[0]["messages"][0]["content"]
        assert [part["type"] for part in images] == ["image_url"] and "a red circle" in text["text"]


def test_without_logprobs_there_is_a_score_and_no_expected_one():
    with fake() as server:
        server.logprobs = False
        for one in critic(server, protocol="openai").judge(requests(1)):
            assert one.score is not None and one.expected is one.entropy is one.probabilities is None
        with pytest.raises(CriticError, match=r"without logprobs.*critic.score = 'parsed'.*--max-logprobs"):
            critic(server, protocol="openai", expected=True)


def test_a_server_that_refuses_logprobs_is_asked_without():
    def play(number, request):
        return Play(400) if "logprobs" in request else Play()

    with fake(play) as server:
        assert statuses_without_expected(critic(server, protocol="openai").judge(requests(1))) == {"ok"}
        assert sum("logprobs" in request for request in server.requests) == 1


def statuses_without_expected(judgements) -> set[str]:
    assert all(one.expected is None for one in judgements)
    return {one.status for one in judgements}


def test_no_more_requests_are_in_flight_than_told():
    with fake(lambda number, request: Play(after=0.02)) as server:
        critic(server, concurrency=3, protocol="openai").judge(requests(10))
        assert server.most == 3


def test_asking_does_not_wait_and_rounds_end_with_the_last_answer():
    gate = threading.Event()

    def play(number, request):
        gate.wait(10)
        return Play()

    with fake(play) as server:
        asked = critic(server).ask(requests(2))
        assert not asked.wait(0.01) and asked.ended is None
        rounds = asked.rounds()
        next(rounds)
        gate.set()
        assert list(rounds) == [] or asked.wait(0)
        assert asked.ended > asked.begun and asked.judgements() == expected(requests(2))


@pytest.mark.parametrize("axis", ["beauty", None])
def test_a_criterion_without_a_rubric_is_told(axis):
    with fake() as server:
        for protocol in ("firm", "openai"):
            with pytest.raises(ConfigError, match="no rubric"):
                critic(server, protocol=protocol).judge([{"images": [red(0)], "criterion": axis}])


def test_what_cannot_be_asked_is_told_before_it_is_sent():
    with fake() as server:
        asking = critic(server)
        for request, told in (
            ({"images": []}, "0 images"),
            ({"images": [red(0)] * 9}, "9 images"),
            ({"images": [red(0)], "prompt": "a" * 70_000}, "70000 characters"),
            ({"images": ["a.png"]}, "array"),
        ):
            with pytest.raises(DataError, match=told):
                asking.judge([{"criterion": "alignment", **request}])
        assert server.requests == []


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(AXES)), max_size=40), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_calls_hold_every_distinct_question_once_and_those_of_a_picture_together(asked, most):
    pictures = [red(10 * number, 2) for number in range(4)]
    questions = questions_of([{"images": [pictures[n]], "criterion": axis} for n, axis in asked], 9)
    calls = list(calls_of(questions, most))
    flat = [question for call in calls for question in call]
    assert sorted({one.id for one in questions}) == sorted(one.id for one in flat)
    assert all(1 <= len(call) <= most for call in calls)
    shown = [one.pictures[0].digest for one in flat]
    assert len([1 for i, one in enumerate(shown) if i == 0 or shown[i - 1] != one]) == len(set(shown))


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
    name = data.draw(st.sampled_from(sorted(place)))
    value = place.pop(name)
    if data.draw(st.booleans()):
        place[name] = data.draw(json_values)
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


# Who answers


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.fault("remote-down")
def test_without_any_server_there_is_an_error_with_place_cause_and_remedy():
    port = closed_port()
    with pytest.raises(CriticError, match=rf"127.0.0.1:{port} cannot be reached.*Start the server.*critic.endpoints"):
        critic(f"http://127.0.0.1:{port}")


def test_a_server_that_still_loads_is_waited_for():
    with fake() as server:
        server.play = lambda number, request: Play(503) if number < 7 else Play()
        assert critic(server, protocol="openai", attempts=2).identity["answers_as"] == "critic"
        assert len(server.requests) == 8


@pytest.mark.fault("remote-identity")
@pytest.mark.parametrize("name", ["weights_sha256", "template_sha256", "preprocess_sha256", "dtype", "rubrics"])
def test_another_critic_behind_the_same_address_ends_the_run(name):
    with fake() as server:
        asking = critic(server)
        assert asking.identity == {key: value for key, value in IDENTITY.items() if key != "engine"}
        server.identity = IDENTITY | {name: IDENTITY["rubrics"] | {"quality": "x"} if name == "rubrics" else "another"}
        with pytest.raises(CriticError, match=rf"{server.url} is no longer the one.*{name} .*another run"):
            asking.judge(requests(2))
        server.identity = IDENTITY
        with pytest.raises(CriticError, match="no longer"):
            asking.judge(requests(2))


@pytest.mark.fault("remote-identity")
def test_another_version_of_the_server_is_the_same_critic():
    with fake() as server:
        asking = critic(server)
        server.identity = IDENTITY | {"engine": "the next version"}
        assert statuses(asking.judge(requests(2))) == {"ok"}


@pytest.mark.fault("remote-identity")
@pytest.mark.parametrize("changed", ["fp_2", None])
def test_another_fingerprint_of_an_openai_server_ends_the_run(changed):
    with fake() as server:
        asking = critic(server, protocol="openai", model="critic")
        assert (asking.identity["model"], asking.identity["system_fingerprint"]) == ("critic", "fp_1")
        server.fingerprint = changed
        with pytest.raises(CriticError, match=f"system_fingerprint 'fp_1' -> {changed!r}"):
            asking.judge(requests(2))


@pytest.mark.fault("remote-identity")
def test_two_servers_are_to_be_one_critic():
    with fake() as first, fake() as second:
        second.identity = IDENTITY | {"weights_sha256": "v" * 64}
        with pytest.raises(
            CriticError, match=rf"{second.url} is not the critic of the endpoints before: weights_sha256"
        ):
            critic(first, second)


@pytest.mark.fault("remote-identity")
def test_a_server_of_another_model_is_refused_with_the_name_of_its_own():
    with fake() as server:
        for protocol in ("firm", "openai"):
            with pytest.raises(ConfigError, match=rf"{server.url}.*critic.*critic.model"):
                critic(server, protocol=protocol, model="VisionXLab/FIRM-Gen-8B")


def test_a_server_of_another_kind_is_refused_with_the_backend_that_fits():
    with fake() as server:
        server._models = lambda: {"object": "list", "data": [{"id": "critic", "object": "model"}]}
        with pytest.raises(ConfigError, match=r"critic\.backend = 'openai'"):
            critic(server)
        server._models = lambda: {"hello": 1}
        with pytest.raises(ConfigError, match="OpenAI-compatible"):
            critic(server, protocol="openai")


def test_rubrics_that_the_server_does_not_have_are_refused(tmp_path):
    (tmp_path / "alignment.txt").write_text("Rate {prompt}")
    with fake() as server, pytest.raises(ConfigError, match=r"alignment by the rubric of critic.rubrics.*--rubrics"):
        critic(server, rubrics=tmp_path)


def test_a_key_goes_along_and_is_never_shown(monkeypatch):
    with fake(key="secret-4711") as server:
        with pytest.raises(CriticError, match=f"401.*{KEY_VARIABLE}"):
            critic(server)
        monkeypatch.setenv(KEY_VARIABLE, "secret-4711")
        asking = critic(server)
        assert statuses(asking.judge(requests(1))) == {"ok"} and "secret" not in str(asking.identity)
        monkeypatch.setenv(KEY_VARIABLE, "secret-4711\u00e9")
        with pytest.raises(ConfigError) as told:
            critic(server)
        assert KEY_VARIABLE in str(told.value) and "secret" not in str(told.value)


def test_base_urls_lose_their_end_and_anything_else_is_refused():
    for url in ("http://host:8000", "http://host:8000/", "http://host:8000/v1", "http://host:8000/v1/"):
        assert base_url(url) == "http://host:8000"
    assert base_url("https://host/judge/v1") == "https://host/judge"
    for url in ("host:8000", "ftp://host", "http://", "", "http://host?key=1", "http://ho st"):
        with pytest.raises(ConfigError, match=r"base URL"):
            base_url(url)
    with pytest.raises(ConfigError) as told:
        base_url("http://me:secret@host")
    assert "secret" not in str(told.value)


def test_without_the_extra_the_error_names_it(monkeypatch):
    from types import SimpleNamespace

    from firm_jax.rl import judging

    real = builtins.__import__

    def absent(name, *given):
        if name.startswith("firm_jax.critic.endpoints"):
            raise ImportError("a remote critic needs httpx: pip install -e '.[remote]'", name="httpx")
        return real(name, *given)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"needs httpx: pip install -e '\.\[remote\]'"):
        judging.connect(SimpleNamespace(backend="firm"), [])


# The expected score from tokens


def tokens_of(pieces, likely):
    found = []
    for piece in pieces:
        one = {
            "token": piece,
            "logprob": -0.1,
            "bytes": list(piece.encode()),
            "top_logprobs": [{"token": piece, "logprob": -0.1}],
        }
        if piece.strip() in likely:
            before = piece[:-1]
            one["top_logprobs"] = [
                {"token": before + digit, "logprob": math.log(share)} for digit, share in likely.items() if share > 0
            ] + [{"token": "the", "logprob": -9.0}]
            one["logprob"] = math.log(likely[piece.strip()])
        found.append(one)
    return found


@given(
    st.lists(st.floats(0.01, 1), min_size=5, max_size=5),
    st.integers(1, 5),
    st.text(st.characters(codec="utf-8", exclude_characters="12345"), max_size=12),
    st.sampled_from(["", " "]),
    st.lists(st.integers(0, 200), max_size=6),
)
@settings(max_examples=100, deadline=None)
def test_probabilities_are_those_at_the_digit_wherever_the_tokens_are_cut(weights, digit, before, space, cuts):
    total = sum(weights) * 1.25  # a fifth goes to other tokens
    likely = {str(n + 1): weight / total for n, weight in enumerate(weights)}
    content = before.encode()
    edges = sorted({0, len(content), *(cut % (len(content) + 1) for cut in cuts)})
    tokens = [
        {"token": "?", "logprob": -1.0, "bytes": list(content[a:b]), "top_logprobs": []}
        for a, b in itertools.pairwise(edges)
    ]
    tokens += tokens_of([f"{space}{digit}", "}"], likely)
    text = f"{before}{space}{digit}}}"
    found = digit_probabilities(text, [len(text) - 2], tokens)
    np.testing.assert_allclose(found, [np.array(weights) / sum(weights)], rtol=1e-9)
    # An end that is told as a token, and is not in the text.
    np.testing.assert_allclose(digit_probabilities(text, [len(text) - 2], [*tokens, {"token": "<|im_end|>"}]), found)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokens: None,
        lambda tokens: [],
        lambda tokens: tokens[1:],
        lambda tokens: [tokens[0] | {"token": "x4"}, *tokens[1:]],
        lambda tokens: [tokens[0] | {"top_logprobs": []}, *tokens[1:]],
        lambda tokens: [tokens[0] | {"top_logprobs": None}, *tokens[1:]],
        lambda tokens: [tokens[0] | {"top_logprobs": [{"token": "3", "logprob": math.nan}]}, *tokens[1:]],
        lambda tokens: [tokens[0] | {"top_logprobs": [{"token": "3", "logprob": 4.0}]}, *tokens[1:]],
        lambda tokens: [tokens[0] | {"top_logprobs": [{"token": "3"}]}, *tokens[1:]],
        lambda tokens: [tokens[0] | {"top_logprobs": ["3"]}, *tokens[1:]],
        lambda tokens: ["4", "}"],
    ],
)
def test_probabilities_that_cannot_be_told_are_none(change):
    tokens = tokens_of(["4", "}"], {"4": 0.8, "3": 0.2})
    np.testing.assert_allclose(digit_probabilities("4}", [0], tokens), [[0, 0, 0.2, 0.8, 0]])
    assert digit_probabilities("4}", [0], change(tokens)) is None


def test_the_protocols_say_alike_what_was_judged():
    """Both fill the same fields, so that a run's records do not depend on who answers."""
    with fake() as server:
        firm, openai = (critic(server, protocol=name).judge(requests(1)) for name in ("firm", "openai"))
        for ours, theirs in zip(firm, openai, strict=True):
            assert (ours.criterion, ours.score, ours.status) == (theirs.criterion, theirs.score, theirs.status)
            assert ours.expected == pytest.approx(theirs.expected)
