"""`firm-jax serve` with the critic that ships: what is answered, and that nothing else matters to an answer."""

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import hostile
import httpx
import jax
import jinja2
import numpy as np
import openai
import pytest
from critic_miniature import REQUESTS, write_miniature
from service_harness import NAME, TOKENS, b64, png, serving
from tokenizers import Tokenizer

from firm_jax import Critic, RemoteCritic
from firm_jax.critic import decode
from firm_jax.critic.prefixes import plan_batches
from firm_jax.data.images import decode_image
from firm_jax.data.patches import patch_image
from firm_jax.interop.hub import resolve
from firm_jax.mesh import make_mesh
from firm_jax.service.fixed import FixedDecoder, Shape
from firm_jax.shapes.render import render, to_pil
from firm_jax.shapes.scene import prompts, sample_scene

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def critic():
    """The one that is served, and asked beside the service; alone it reads every question whole, to compile less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "plan_batches", partial(plan_batches, choices=((),)))
        yield Critic.from_pretrained("embedded:critic_gen", dtype="float32", max_batch=16)


@pytest.fixture(scope="module")
def served(critic):
    """Nothing is remembered, so that every answer is the critic's."""
    with serving(critic, remembered=0, pixels=500_000) as served:
        yield served


@pytest.fixture(scope="module")
def asked():
    """Pictures of scenes as PNG, with their texts."""
    rng = np.random.default_rng(0)
    scenes = [(prompt.text, sample_scene(rng, prompt)) for prompt in prompts("test", 5, seed=5)]
    return [(text, hostile.encoded(to_pil(render(scene)), "PNG")) for text, scene in scenes]


def items(asked, axes=("alignment", "quality")) -> list[dict]:
    return [{"axis": axis, "instruction": text, "images": [b64(image)]} for text, image in asked for axis in axes]


@pytest.fixture(scope="module")
def answers(served, asked):
    return served.score(*items(asked)).json()["items"]


@pytest.mark.parametrize("protocol", ["firm", "openai"])
def test_a_remote_critic_judges_as_the_one_in_this_process(served, critic, asked, protocol):
    requests = [
        {"images": [decode_image(image, "")], "prompt": text, "criterion": axis}
        for text, image in asked
        for axis in ("alignment", "quality")
    ]
    rubrics = resolve("embedded:critic_gen") / "rubrics"
    remote = RemoteCritic([served.url], protocol=protocol, model=NAME, rubrics=rubrics, expected=True)
    found = remote.judge(requests, max_new_tokens=TOKENS)
    for ours, theirs in zip(found, critic.judge(requests, max_new_tokens=TOKENS), strict=True):
        for name in ("criterion", "score", "text", "status", "reason", "rubric"):
            assert getattr(ours, name) == getattr(theirs, name), name
        for name in ("expected", "entropy", "probabilities"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-4), name
    remote.close()


def test_an_answer_is_the_critics_own_judgement(critic, asked, answers):
    requests = [
        {"images": [decode_image(image, "")], "prompt": text, "criterion": axis}
        for text, image in asked
        for axis in ("alignment", "quality")
    ]
    for found, judgement in zip(answers, critic.judge(requests, max_new_tokens=TOKENS), strict=True):
        assert (found["status"], found["text"], found["reasoning"]) == ("ok", judgement.text, judgement.reason)
        assert found["score"] == (list(judgement.score) if judgement.criterion == "quality" else judgement.score)
        assert found["expected"] == pytest.approx(judgement.expected, abs=1e-4)
        assert found["entropy"] == pytest.approx(judgement.entropy, abs=1e-4)
        assert found["probs"] == pytest.approx(judgement.probabilities, abs=1e-4)
        assert found["expected"] == pytest.approx(np.dot(found["probs"], range(1, 6)))
        assert found["rubric_sha256"] == judgement.rubric and found["finish_reason"] == "stop"
        assert found["tokens"] > 10 and found["prompt_tokens"] > 50 and found["ms"] > 0


def without_time(found: list[dict]) -> dict[str, dict]:
    return {one["id"]: {name: value for name, value in one.items() if name != "ms"} for one in found}


@pytest.mark.fault("batch-company")
def test_the_company_in_a_batch_changes_no_bit_of_an_answer(served, asked, answers):
    expected = without_time(answers)
    everything = [{"id": str(number), **item} for number, item in enumerate(items(asked))]
    alone = [served.client.post("/v1/score", json={"items": [item]}).json()["items"][0] for item in everything[:4]]
    assert without_time(alone) == {key: value for key, value in expected.items() if int(key) < 4}
    order = np.random.default_rng(1).permutation(len(everything))
    shuffled = served.client.post("/v1/score", json={"items": [everything[number] for number in order]}).json()
    assert [one["id"] for one in shuffled["items"]] == [str(number) for number in order]
    assert without_time(shuffled["items"]) == expected


def test_nothing_is_compiled_for_another_mixture_of_questions(served, asked, answers):
    programs = (decode.encode_images, decode.embed, decode.prefill, decode.decode_chunk)
    before = [program._cache_size() for program in programs]
    for count in (1, 2, 3, 5):
        found = served.score(*items(asked[:count], ["alignment"]), *items(asked[::-1][:count], ["quality"])).json()
        assert {one["status"] for one in found["items"]} == {"ok"}
    assert [program._cache_size() for program in programs] == before


@pytest.mark.fault("service-image")
def test_one_bad_image_never_spoils_its_batch(served, asked, answers):
    bad = {name: case for name, case in hostile.images().items() if case[1] and name != "large.png"}
    sent = [{"id": name, "axis": "alignment", "images": [b64(content)]} for name, (content, _) in bad.items()]
    everything = [{"id": str(number), **item} for number, item in enumerate(items(asked))]
    request = {"items": [*everything[:3], *sent, *everything[3:]]}
    found = {one["id"]: one for one in served.client.post("/v1/score", json=request).json()["items"]}
    for name, (_, reason) in bad.items():
        assert found[name]["status"] == "invalid_input" and found[name]["score"] is None
        assert reason in found[name]["detail"] or "pixels" in found[name]["detail"], name
    assert without_time([one for one in found.values() if one["id"].isdecimal()]) == without_time(answers)


def test_images_may_be_named_by_their_hash(served, asked, answers):
    (text, image), (_, other) = asked[:2]
    digest = hashlib.sha256(image).hexdigest()
    item = {"axis": "alignment", "instruction": text}
    found = served.score(
        {**item, "images": [{"sha256": digest}]},
        {**item, "images": [{"sha256": digest, **b64(image)}]},
        {**item, "images": [{"sha256": digest, **b64(other)}]},
        {**item, "images": [{"sha256": "0" * 64}]},
        {**item, "images": [{}]},
        {**item, "images": [{"b64": "no base64!"}]},
        {**item, "axis": "beauty", "images": [{"sha256": digest}]},
    ).json()["items"]
    assert [one["status"] for one in found] == ["ok"] * 2 + ["invalid_input"] * 5
    assert found[0]["text"] == found[1]["text"] == answers[0]["text"]
    reasons = ("do not have the sha256", "not in this request", "neither b64 nor", "not valid base64", "no rubric for")
    for one, reason in zip(found[2:], reasons, strict=True):
        assert reason in one["detail"]


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


def content(*parts) -> list[dict]:
    """Texts and images as the parts of a message."""
    url = "data:image/png;base64,"
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": url + b64(part)["b64"]}}
        for part in parts
    ]


def test_openais_client_gets_the_critics_own_text(client, critic, asked):
    (text, image), (_, other) = asked[:2]
    filled = critic.rubrics["alignment"].fill(text)
    cases = [([image], filled), ([image, other], "what is this?")]
    requests = [{"images": [decode_image(each, "") for each in shown], "text": question} for shown, question in cases]
    tokens = 20
    expected = critic.generate(requests, max_new_tokens=tokens)
    for (images, question), request, text in zip(cases, requests, expected, strict=True):
        message = {"role": "user", "content": content(*images, question)}
        found = client.chat.completions.create(model=NAME, messages=[message], max_tokens=tokens, temperature=0)
        assert found.choices[0].message.content == text
        length = len(critic.processor.sequence(request["images"], question))
        assert found.usage.prompt_tokens == length
        assert found.usage.total_tokens == length + found.usage.completion_tokens
        assert found.usage.completion_tokens == tokens or found.choices[0].finish_reason == "stop"
        assert found.model == NAME and found.system_fingerprint.startswith("fp_")
    assert [model.id for model in client.models.list()] == [NAME]


def test_log_probabilities_are_those_of_the_scored_digit(client, critic, asked, answers):
    text, image = asked[0]
    message = {"role": "user", "content": content(image, critic.rubrics["alignment"].fill(text))}
    found = client.chat.completions.create(model=NAME, messages=[message], logprobs=True, top_logprobs=20)
    tokens = found.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == found.choices[0].message.content == answers[0]["text"]
    at = next(place for place in reversed(range(len(tokens))) if tokens[place].token in set("12345"))
    told = {one.token: one.logprob for one in tokens[at].top_logprobs}
    digits = np.array([told.get(digit, -np.inf) for digit in "12345"])
    probabilities = np.exp(digits) / np.exp(digits).sum()
    assert probabilities == pytest.approx(answers[0]["probs"], abs=1e-5)
    for token in tokens:
        best = [one.logprob for one in token.top_logprobs]
        assert best == sorted(best, reverse=True) and token.logprob == best[0] and sum(np.exp(best)) <= 1 + 1e-5


def test_openais_client_understands_what_is_refused(client, asked):
    message = {"role": "user", "content": "a"}

    def ask(error, **more) -> str:
        with pytest.raises(error) as caught:
            client.chat.completions.create(**{"model": NAME, "messages": [message]} | more)
        return caught.value.body["message"]

    assert NAME in ask(openai.NotFoundError, model="gpt-4o")
    assert "at most 128 tokens" in ask(openai.BadRequestError, max_tokens=129)
    assert "temperature" in ask(openai.UnprocessableEntityError, temperature=0.7)
    assert "stream" in ask(openai.UnprocessableEntityError, stream=True)
    assert "n:" in ask(openai.UnprocessableEntityError, n=2)
    assert "top_logprobs goes together" in ask(openai.BadRequestError, top_logprobs=3)
    assert "is to be the user's" in ask(openai.BadRequestError, messages=[{"role": "assistant", "content": "a"}])
    assert "tools" in ask(openai.UnprocessableEntityError, tools=[])
    for url in ("http://example.com/a.png", "file:///etc/passwd", "data:text/html;base64,AAAA"):
        part = {"type": "image_url", "image_url": {"url": url}}
        assert "url" in ask(openai.UnprocessableEntityError, messages=[{"role": "user", "content": [part]}])
    cut = [{"role": "user", "content": content(asked[0][1][:-80])}]
    assert "is damaged" in ask(openai.BadRequestError, messages=cut)
    assert "tokens" in ask(openai.BadRequestError, messages=[{"role": "user", "content": "1 2 3 " * 1000}])


@pytest.mark.fault("hostile-text")
def test_a_conversation_is_laid_out_as_the_chat_template_does(critic, asked):
    processor = critic.processor
    image = patch_image(decode_image(asked[0][1], ""), processor.images)
    turns = [
        ("system", ["You judge.\n"]),
        ("user", ["first ", image, " then ", image, "what?"]),
        ("assistant", ["a circle"]),
        ("user", [image, "and now?"]),
    ]
    messages = [
        {
            "role": role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts
            ],
        }
        for role, parts in turns
    ]
    template = jinja2.Template(
        (processor.folder / "chat_template.jinja").read_text(), trim_blocks=True, lstrip_blocks=True
    )
    tokenizer = Tokenizer.from_file(str(processor.folder / "tokenizer.json"))
    pads = "<|image_pad|>" * (len(image.patches) // processor.images.merge_size**2)
    rendered = template.render(messages=messages, add_generation_prompt=True).replace("<|image_pad|>", pads)
    assert processor.conversation(turns).ids.tolist() == tokenizer.encode(rendered, add_special_tokens=False).ids
    plain = processor.sequence([decode_image(asked[0][1], "")], "a <|image_pad|> b")
    same = processor.conversation([("user", [image, "a <|image_pad|> b"])])
    np.testing.assert_array_equal(same.ids, plain.ids)
    np.testing.assert_array_equal(same.positions, plain.positions)


def test_the_service_says_who_it_is(served, critic):
    models = served.client.get("/v1/models").json()["data"]
    server = served.score({"axis": "alignment", "images": [b64(png(0))]}).json()["server"]
    ready = served.client.get("/readyz").json()
    assert models[0]["server"] == server == ready["server"]
    assert server["model"] == NAME and server["dtype"] == "float32" and server["mode"] == "parity+E"
    assert server["rubrics"] == {name: rubric.sha256 for name, rubric in critic.rubrics.items()}
    assert all(len(server[name]) == 64 for name in ("weights_sha256", "template_sha256", "preprocess_sha256"))
    assert ready["status"] == "ok" and ready["canary"]["score"] == 5
    assert served.client.get("/healthz").json() == {"status": "ok"}


def test_what_prometheus_is_told(served, answers):
    def value(name: str) -> float:
        lines = served.client.get("/metrics").text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(name + " ")))

    counted = 'firm_items_total{axis="quality",status="ok"}'
    before = value(counted), value("firm_generated_tokens_total"), value("firm_shapes")
    found = served.score({"axis": "quality", "images": [b64(png(1))]}).json()["items"][0]
    assert value(counted) == before[0] + 1
    assert value("firm_generated_tokens_total") == before[1] + found["tokens"]
    assert value("firm_shapes") == before[2] and value("firm_ready") == 1
    assert value('firm_score_count{axis="quality"}') >= 1


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(served, requests: int) -> float:
    """Megabytes that the process has grown by while so many requests were answered, eight at a time."""
    unanswered, statuses, before = iter(range(requests)), [], []
    lock = threading.Lock()

    def client() -> None:
        with httpx.Client(base_url=served.url, timeout=300) as own:
            while True:
                with lock:
                    number = next(unanswered, None)
                    if number == requests // 3:  # every buffer has been as large as it gets
                        before.append(resident())
                if number is None:
                    return
                images = [b64(png(number)), b64(png(number)[:-80])]
                sent = [{"id": str(n), "axis": "quality", "images": [image]} for n, image in enumerate(images)]
                found = own.post("/v1/score", json={"items": sent}).json()["items"]
                statuses.append([one["status"] for one in found])

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == requests and {status[1] for status in statuses} == {"invalid_input"}
    assert {status[0] for status in statuses} <= {"ok", "unparseable"}
    assert served.client.get("/readyz").status_code == 200 and served.service.engine.waiting == 0
    return (resident() - before[0]) / 1e6


@pytest.mark.fault("service-memory")
def test_memory_does_not_grow(served, answers):
    assert soak(served, 60) < 30


@pytest.mark.slow
@pytest.mark.fault("service-memory")
def test_memory_does_not_grow_for_long(served, answers):
    assert soak(served, 1000) < 30


@pytest.mark.fault("service-drain")
def test_sigterm_answers_what_was_accepted_and_ends_with_0(tmp_path, asked):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "FIRM_JAX_TOKEN": "a token",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "firm_jax", "serve", "--port", "0", "--batch-size", "2", "--max-new-tokens", "64"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        url = process.stdout.readline().split()[2].rstrip(",")
        found = []
        with httpx.Client(base_url=url, timeout=300, headers={"Authorization": "Bearer a token"}) as client:
            assert client.get("/healthz").json()["status"] in ("loading", "ok")
            deadline = time.monotonic() + 300
            while client.get("/readyz").status_code != 200:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            assert httpx.get(f"{url}/v1/models").status_code == 401
            # Different questions, so that none is answered from memory, and enough of them to be refused meanwhile.
            many = itertools.islice(itertools.cycle(items(asked)), 48)
            request = {"items": [item | {"id": str(n), "instruction": f"{n} circles"} for n, item in enumerate(many)]}
            accepted = threading.Thread(
                target=lambda: found.append(
                    httpx.post(f"{url}/v1/score", json=request, timeout=300, headers=client.headers)
                )
            )
            accepted.start()
            while (
                "firm_queue 0.0" in (metrics := client.get("/metrics").text) and "firm_batch_rows_count 1.0" in metrics
            ):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            statuses = set()
            while process.poll() is None and 503 not in statuses and accepted.is_alive():
                statuses.add(httpx.post(f"{url}/v1/score", json=request, headers=client.headers).status_code)
            accepted.join(300)
        assert 503 in statuses
        assert found[0].status_code == 200 and {one["status"] for one in found[0].json()["items"]} <= {
            "ok",
            "unparseable",
        }
        assert process.wait(60) == 0, process.stderr.read()
    finally:
        process.kill()
    assert "Traceback" not in process.stderr.read()


def test_the_plain_install_does_not_import_what_only_the_service_needs(tmp_path):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['fastapi', 'uvicorn', 'prometheus_client'])); "
        "import firm_jax.commands.score, main; from firm_jax.commands import main; sys.exit(main(['serve']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "pip install -e '.[serve]'" in ended.stderr, ended.stderr


@pytest.mark.slow
def test_a_mesh_of_devices_writes_the_same(tmp_path):
    folder = write_miniature(tmp_path / "critic")
    written = []
    for mesh in (None, make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])):
        critic = Critic.from_pretrained(folder, dtype="float32", mesh=mesh, max_batch=8)
        fixed = FixedDecoder(critic.decoder, 3, 16)
        prompts = [critic.processor.sequence(request["images"], request["text"]) for request in REQUESTS[:3]]
        shape = Shape(192, 2, 256, 3)
        [[tokens, digits, own, ids, best]] = fixed.write(shape, prompts)
        written.append((tokens, digits, own, best))
        assert fixed.rows == 4 and ids.shape == (3, 16, 3)
    for found, expected in zip(*written, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
