"""A critic on a server is asked as ours is, and stays the one that it was at the start."""

import builtins
import threading
from types import SimpleNamespace

import pytest
from fake_critic import AXES, IDENTITY, Play, closed_port, critic, expected, fake, red, requests, statuses
from hypothesis import given, settings
from hypothesis import strategies as st

from firm_jax.critic.questions import calls_of, questions_of
from firm_jax.critic.remote import KEY_VARIABLE, base_url
from firm_jax.errors import ConfigError, CriticError, DataError
from firm_jax.rl import judging

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
        shown = [[part["type"] for part in one["messages"][0]["content"]] for one in chats]
        assert shown == [["image_url", "text"]] * 10  # images first
        texts = [one["messages"][0]["content"][-1]["text"] for one in chats]
        assert sum("a red circle" in text for text in texts) == 5  # quality is judged without it


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


def test_the_protocols_say_alike_what_was_judged():
    """Both fill the same fields, so that a run's records do not depend on who answers."""
    with fake() as server:
        firm, openai = (critic(server, protocol=name).judge(requests(1)) for name in ("firm", "openai"))
        for ours, theirs in zip(firm, openai, strict=True):
            assert (ours.criterion, ours.score, ours.status) == (theirs.criterion, theirs.score, theirs.status)
            assert ours.expected == pytest.approx(theirs.expected)


# Who answers


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
    real = builtins.__import__

    def absent(name, *given):
        if name.startswith("firm_jax.critic.endpoints"):
            raise ImportError("a remote critic needs httpx: pip install -e '.[remote]'", name="httpx")
        return real(name, *given)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"needs httpx: pip install -e '\.\[remote\]'"):
        judging.connect(SimpleNamespace(backend="firm"), [])
