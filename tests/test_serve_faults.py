"""`firm-jax serve` under what clients, networks and devices do to a service; the device alone is a stand-in."""

import json
import socket
import threading

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from service_harness import b64, png, scripted, serving

from firm_jax import Critic
from firm_jax.commands import main
from firm_jax.errors import ConfigError, CriticError, WeightsError
from firm_jax.service import engine as engine_module
from firm_jax.service import service as service_module
from firm_jax.service.server import listen

ITEM = {"axis": "alignment", "instruction": "a red circle", "images": [b64(png(0))]}
JSON = {"Content-Type": "application/json"}
CHAT = {"model": "critic", "messages": [{"role": "user", "content": "a"}]}
POSTED = ("/v1/score", "/v1/chat/completions")
# What is refused by content, as an image that cannot be decoded is, fits the schema.
EXCLUDED = [positive_data_acceptance]


@pytest.fixture(scope="module")
def critic():
    return Critic.from_pretrained("embedded:critic_gen", dtype="float32")


def ask(served, into: list, *items, **more) -> threading.Thread:
    thread = threading.Thread(target=lambda: into.append(served.score(*items, **more)))
    thread.start()
    return thread


def statuses(response: httpx.Response) -> list[str]:
    return [one["status"] for one in response.json()["items"]]


def other(number: int) -> dict:
    """A question that no other one is equal to."""
    return ITEM | {"instruction": f"{number} circles"}


@pytest.mark.fault("service-overload")
def test_a_full_queue_is_429_with_the_time_to_come_back(critic):
    with scripted(critic, opened=False, queue=4, rows=2) as (served, script):
        found = []
        threads = [ask(served, found, other(n), other(n + 1)) for n in (0, 10)]
        served.wait_until(lambda: sum(map(len, script.batches[1:])) + served.service.engine.waiting == 4)
        for refused in (served.score(other(20)), served.client.post("/v1/chat/completions", json=CHAT)):
            assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
            assert refused.json()["error"]["code"] == "overloaded"
        script.gate.set()
        for thread in threads:
            thread.join()
        assert [statuses(one) for one in found] == [["ok", "ok"]] * 2
        assert served.score(other(20)).status_code == 200


@pytest.mark.fault("service-overload")
def test_images_that_find_no_room_are_overloaded(critic):
    with scripted(critic, opened=False, queue_bytes=250_000) as (served, script):
        found = []
        thread = ask(served, found, other(0), other(1), other(2))
        served.wait_until(lambda: script.batches[1:] and served.service.engine.waiting == 0)
        script.gate.set()
        thread.join()
        assert sorted(statuses(found[0])) == ["ok", "ok", "overloaded"]
        assert statuses(served.score(other(3), other(4))) == ["ok", "ok"]


@pytest.mark.fault("service-deadline")
def test_a_deadline_is_kept_and_what_was_answered_is_remembered(critic):
    with scripted(critic, opened=False, rows=2) as (served, script):
        late = served.score(other(0), other(1), other(2), deadline_ms=300)
        assert late.status_code == 504 and late.json()["error"]["code"] == "deadline"
        script.gate.set()
        served.wait_until(lambda: served.service.engine.waiting == 0)
        asked = sum(len(batch) for batch in script.batches[1:])
        assert asked == 2  # the third was never asked: its deadline had passed while it waited
        script.gate.clear()
        found = []
        assert statuses(served.score(ITEM | {"axis": "beauty"}, deadline_ms=100)) == ["invalid_input"]
        script.gate.set()
        assert statuses(served.score(other(0), other(1))) == ["ok", "ok"]
        before = len(script.batches)
        script.gate.clear()
        thread = ask(served, found, other(0), other(5), other(1), deadline_ms=500)
        thread.join()
        assert statuses(found[0]) == ["ok", "overloaded", "ok"]
        assert len(script.batches) == before + 1 and found[0].json()["items"][1]["score"] is None


@pytest.mark.fault("service-deadline")
def test_what_nobody_waits_for_is_not_asked(critic):
    with scripted(critic, opened=False, rows=1) as (served, script):
        running = ask(served, found := [], other(0))
        served.wait_until(lambda: len(script.batches) == 2)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/score", json={"items": [{"id": "1", **other(1)}]}, timeout=0.5)
        served.wait_until(lambda: served.server.guard.active == 1)
        script.gate.set()
        running.join()
        assert statuses(served.score(other(2))) == ["ok"] and found[0].status_code == 200
        assert len(script.batches) == 3


@pytest.mark.fault("service-device")
def test_a_batch_that_fails_is_asked_one_by_one(critic, caplog):
    with scripted(critic, rows=4) as (served, script):
        poison = critic.prompt(
            {"images": [], "prompt": "poison", "criterion": "alignment"}, 10
        )  # only its text is looked for
        word = critic.processor.encode(" poison")[-1]
        assert word in poison.ids
        script.fails = lambda prompts: any("poison" in critic.processor.decode(prompt.ids) for prompt in prompts)
        found = served.score(other(0), ITEM | {"instruction": "poison"}, other(1))
        assert statuses(found) == ["ok", "internal", "ok"]
        assert "says no" not in found.text and found.json()["items"][1]["score"] is None
        chat = served.client.post(
            "/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": "poison"}]}
        )
        assert chat.status_code == 500 and "says no" not in chat.text
        assert served.client.get("/readyz").status_code == 200


@pytest.mark.fault("service-canary")
def test_a_critic_that_answers_otherwise_is_not_ready(critic, monkeypatch):
    with scripted(critic) as (served, script):
        assert served.client.get("/readyz").json()["canary"]["score"] == 4
        monkeypatch.setattr(service_module, "CANARY_SECONDS", 0)
        assert served.client.get("/readyz").status_code == 200
        script.text = script.text.replace("4", "5")
        found = served.client.get("/readyz")
        assert found.status_code == 503 and "otherwise than at the start" in found.json()["detail"]
        script.text = script.text.replace("5", "4")
        assert served.client.get("/readyz").status_code == 200
        monkeypatch.setattr(service_module, "CANARY_PATIENCE_SECONDS", 0.05)
        script.gate.clear()
        assert served.client.get("/readyz").status_code == 200  # busy
        monkeypatch.setattr(service_module, "STALL_SECONDS", 0)
        found = served.client.get("/readyz")
        assert found.status_code == 503 and "no answer for" in found.json()["detail"]


@pytest.mark.fault("service-canary")
def test_a_service_that_cannot_answer_never_opens(critic):
    gate = threading.Event()

    def load():
        gate.wait(60)
        raise WeightsError("no weights")

    with serving(critic, load=load, ready=False) as served:
        assert served.client.get("/healthz").json() == {"status": "loading"}
        for refused in (served.client.get("/readyz"), served.score(ITEM)):
            assert refused.status_code == 503
        gate.set()
        served.thread.join(60)
        assert isinstance(served.service.error, WeightsError)


@pytest.mark.fault("service-canary")
def test_a_critic_without_a_score_for_the_canary_is_refused(critic):
    with scripted(critic, text="I do not know", ready=False) as (served, _):
        served.thread.join(60)
        assert isinstance(served.service.error, CriticError) and "no_score" in str(served.service.error)


@pytest.mark.fault("service-drain")
def test_draining_answers_what_was_accepted_and_refuses_the_rest(critic):
    with scripted(critic, opened=False) as (served, script):
        threads = [ask(served, found := [], other(0))]
        served.wait_until(lambda: len(script.batches) == 2)
        served.server.handle_exit(15, None)
        refused = served.score(other(1))
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        assert refused.json()["error"]["code"] == "draining"
        assert served.client.get("/readyz").json()["status"] == "draining"
        assert served.client.get("/healthz").status_code == served.client.get("/metrics").status_code == 200
        script.gate.set()
        threads[0].join()
        assert statuses(found[0]) == ["ok"]
        served.thread.join(60)
        assert not served.thread.is_alive()


@pytest.mark.fault("service-token")
def test_without_the_token_nothing_is_told(critic):
    with scripted(critic, token="the token") as (served, script):
        before = len(script.batches)
        for given in (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": "the token"},
            {"Authorization": "Bearer the"},
        ):
            with httpx.Client(base_url=served.url, headers=given) as client:
                for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                    assert client.get(path).status_code == 401, path
                for path in ("/v1/score", "/v1/chat/completions"):
                    assert client.post(path, content=b"\0" * 1_000_000).status_code == 401
                assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        assert len(script.batches) == before
        assert served.score(ITEM).status_code == 200 and served.client.get("/v1/models").status_code == 200


@pytest.mark.fault("service-token")
def test_only_with_a_token_is_it_reached_from_elsewhere(monkeypatch, capsys):
    monkeypatch.delenv("FIRM_JAX_TOKEN", raising=False)
    assert main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "FIRM_JAX_TOKEN" in capsys.readouterr().err
    listen("0.0.0.0", 0, "token").close()
    with listen("127.0.0.1", 0, None) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen"):
            listen("127.0.0.1", taken.getsockname()[1], None)


@pytest.mark.fault("service-caps")
def test_every_cap_is_kept(critic):
    caps = {"body_bytes": 200_000, "pixels": 5000, "request_pixels": 9000, "prompt_tokens": 120, "new_tokens": 32}
    with scripted(critic, **caps) as (served, _):
        post = served.client.post

        def detail(item: dict) -> str:
            [one] = served.score(item).json()["items"]
            assert (one["status"], one["score"], one["expected"]) == ("invalid_input", None, None)
            return one["detail"]

        assert post("/v1/score", content=b" " * 200_001, headers=JSON).status_code == 413
        assert post("/v1/score", content=iter([b" " * 150_000] * 2), headers=JSON).status_code == 413
        assert "more than 5000 pixels" in detail(ITEM | {"images": [b64(png(0, (80, 80)))]})
        assert "9000 pixels together" in detail(ITEM | {"images": [b64(png(n)) for n in range(3)]})
        assert "more than the 120 that a question may have" in detail(ITEM | {"instruction": "red " * 200})
        assert post("/v1/chat/completions", json=CHAT | {"max_tokens": 33}).status_code == 400
        assert served.score(*[ITEM | {"images": [{"sha256": "0" * 64}]}] * 65).status_code == 422
        assert served.score(ITEM | {"images": [{"sha256": "0" * 64}] * 9}).status_code == 422
        assert served.score(ITEM | {"instruction": "a" * 65_537}).status_code == 422
        assert statuses(served.score(ITEM)) == ["ok"]


@pytest.mark.fault("service-caps")
def test_what_is_no_request_is_refused_and_never_repeated(critic):
    with scripted(critic) as (served, script):
        before, post = len(script.batches), served.client.post

        def status(content: bytes, **headers) -> int:
            return post(
                "/v1/score", content=content, headers={"Content-Type": "application/json"} | headers
            ).status_code

        good = json.dumps({"items": [{"id": "1", **ITEM}]}).encode()
        assert status(good, **{"Content-Type": "text/plain"}) == 415
        assert status(good, **{"Content-Encoding": "gzip"}) == 415
        assert status(b"{") == status(b"\xff\xfe") == status(b"[" * 100_000) == 400 and status(b"") == 422
        assert status(b'{"items": [' + b"7" * 9000 + b"]}") == 400
        broken = [
            [],
            None,
            {"items": []},
            {"items": [{"id": "1", **ITEM}] * 2},
            {"items": [{"id": "1", **ITEM, "score": 5}]},
            {"items": [{"id": "1", "axis": "alignment", "images": []}]},
            {"items": [{"id": 1, **ITEM}]},
            {"items": [{"id": "1", **ITEM, "instruction": "\ud800"}]},
            {"items": [{"id": "1", **ITEM}], "mode": "fast"},
            {"items": [{"id": "1", **ITEM}], "deadline_ms": 0},
        ]
        for body in broken:
            refused = post("/v1/score", content=json.dumps(body), headers=JSON)
            assert refused.status_code == 422 and refused.json()["error"]["message"], body
        assert post("/v1/score", json={"secret": "x" * 1000}).text.count("x") < 100
        assert served.client.get("/v1/score").status_code == 405
        assert served.client.get("/docs").status_code == 404
        assert len(script.batches) == before


def raw(served, content: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=20)
    connection.sendall(content)
    return connection


@pytest.mark.fault("service-network")
def test_broken_and_hanging_connections_leave_the_others_alone(critic):
    head = b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with scripted(critic, body_seconds=0.5, body_bytes=100_000, bodies_bytes=150_000) as (served, _):
        hanging = [raw(served, b"POST /v1/sco") for _ in range(100)]
        slow = raw(served, head + b"Content-Length: 50\r\n\r\n{")
        endless = raw(served, head + b"Transfer-Encoding: chunked\r\n\r\n" + b"4000\r\n" + b" " * 0x4000 + b"\r\n")
        large = [raw(served, head + b"Content-Length: 90000\r\n\r\n" + b" " * 80_000) for _ in range(2)]
        garbage = [
            raw(served, b"\x16\x03\x01" + bytes(range(256)) * 40),
            raw(served, head + b"Content-Length: -1\r\n\r\n"),
        ]
        assert statuses(served.score(ITEM)) == ["ok"]
        assert slow.recv(100).startswith(b"HTTP/1.1 408") and endless.recv(100).startswith(b"HTTP/1.1 408")
        assert sorted(one.recv(100)[9:12] for one in large) == [b"408", b"429"]
        assert [one.recv(100)[9:12] for one in garbage] == [b"400", b"400"]
        for connection in (*hanging, slow, endless, *large, *garbage):
            connection.close()
        served.wait_until(lambda: served.server.guard.active == 0 and not served.server.guard._bytes)
        assert served.client.get("/readyz").status_code == 200


@pytest.mark.fault("service-network")
def test_schemathesis_finds_no_request_that_breaks_an_endpoint(critic):
    tried = set()
    with scripted(critic) as (served, _):
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        for operation in (found.ok() for found in schema.get_all_operations()):
            modes = list(schemathesis.GenerationMode) if operation.body else [schemathesis.GenerationMode.POSITIVE]
            for mode in modes:

                @given(case=operation.as_strategy(generation_mode=mode))
                @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
                def fuzz(case):
                    tried.add((case.method, case.path))
                    case.call_and_validate(excluded_checks=EXCLUDED, timeout=30)

                fuzz()
        assert statuses(served.score(ITEM)) == ["ok"]
    assert {path for _, path in tried} == {"/healthz", "/readyz", "/metrics", "/v1/models", *POSTED}


def test_waiting_questions_are_answered_first_come_first_served(critic, monkeypatch):
    monkeypatch.setattr(engine_module, "GATHER_SECONDS", 0)
    with scripted(critic, opened=False, rows=2) as (served, script):
        threads = [ask(served, [], other(0))]
        served.wait_until(lambda: len(script.batches) == 2)
        long = ITEM | {"instruction": "a red circle above " * 8}
        for count, item in enumerate((other(1), long, other(2), other(3)), 1):
            threads.append(ask(served, [], item))
            served.wait_until(lambda count=count: served.service.engine.waiting == count)
        script.gate.set()
        for thread in threads:
            thread.join()
        texts = [[critic.processor.decode(prompt.ids) for prompt in batch] for batch in script.batches[2:]]
        assert [len(batch) for batch in texts] == [2, 1, 1]
        assert "1 circles" in texts[0][0] and "2 circles" in texts[0][1] and "above" in texts[1][0]


def test_others_are_answered_while_images_are_decoded(critic, monkeypatch):
    with scripted(critic) as (served, _):
        decoding, gate, real = threading.Event(), threading.Event(), served.service._prompts
        slow = lambda items: (decoding.set(), gate.wait(20), real(items))[-1]  # noqa: E731
        monkeypatch.setattr(served.service, "_prompts", slow)
        thread = ask(served, found := [], ITEM)
        assert decoding.wait(20) and served.client.get("/healthz", timeout=10).status_code == 200
        gate.set()
        thread.join()
        assert statuses(found[0]) == ["ok"]
