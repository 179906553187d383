"""Who judges a run: settings that are refused, images that are judged while others are drawn, several processes."""

import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fake_critic import IDENTITY, Play, closed_port, critic, expected, fake, requests
from ml_collections import ConfigDict
from scripted import FlatGenerator, ScriptedCritic
from test_rollout import KEY, NUMBERS, PROMPTS, ROWS, SETTINGS, ZERO

from firm_jax.config import load_config
from firm_jax.data.prompts import PromptRecord
from firm_jax.errors import ConfigError, CriticError
from firm_jax.rl import judging
from firm_jax.rl.judging import RemoteJudge, check_critic, check_of_prompts, judging_of, too_many_failures
from firm_jax.rl.rollout import judge, make_sampler
from firm_jax.workdir import contradictions, plain_config

CRITERIA = ("instruction", "quality")
PROMPT = SimpleNamespace(max_new_tokens=9)


# Settings


@pytest.fixture
def settings():
    found = load_config("configs/gen_qma.py:tiny").critic
    found.update({"backend": "firm", "endpoints": ("http://host:8000",)})
    return found


@pytest.mark.fault("wrong-config")
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"endpoints": ()}, "critic.endpoints names no server.*--config.critic.endpoints="),
        ({"backend": "local"}, "critic.endpoints is set, and critic.backend is 'local'"),
        ({"answer": "until_score"}, "critic.answer is 'until_score'.*'firm'.*only a local critic"),
        ({"concurrency": 0}, "critic.concurrency is 0; it is above 0"),
        ({"attempts": 0}, "critic.attempts is 0"),
        ({"connect_timeout": -1.0}, "critic.connect_timeout is -1.0"),
        ({"try_timeout": 700.0}, "critic.try_timeout is 700.0, longer than critic.timeout = 600.0"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, changed, told):
    check_critic(settings)
    settings.update(changed)
    with pytest.raises(ConfigError, match=told):
        check_critic(settings)


@pytest.mark.fault("wrong-config")
def test_a_config_from_before_there_were_servers_still_judges_itself(settings):
    old = {name: value for name, value in settings.to_dict().items() if name not in ("endpoints", *judging.POLICY)}
    check_critic(ConfigDict(old | {"backend": "local"}))
    with pytest.raises(ConfigError, match=r"the config has no critic\.endpoints"):
        check_critic(ConfigDict(old))


def test_a_run_from_before_there_were_servers_goes_on_and_servers_may_move(settings):
    config = load_config("configs/edit_cme.py:tiny")
    now, before = plain_config(config), plain_config(config)
    for name in ("endpoints", *judging.POLICY):
        del before["critic"][name]
    assert contradictions(before, now) == []
    now["critic"] |= {"endpoints": ["http://elsewhere"], "concurrency": 3, "timeout": 1.0}
    assert contradictions(before, now) == []
    assert contradictions(before, now | {"critic": now["critic"] | {"backend": "firm"}})


def test_a_prompt_whose_requirement_a_rubric_would_drop_is_told_before_the_run(tmp_path):
    config = load_config("configs/gen_qma.py:tiny")
    config.critic.update({"backend": "openai", "rubrics": str(tmp_path)})
    (tmp_path / "alignment.txt").write_text("Rate {prompt}")
    check = check_of_prompts(config, ["instruction"], None, edits=False)
    check(PromptRecord("a red circle"))
    with pytest.raises(ConfigError, match=r"no field \{requirement\}"):
        check(PromptRecord("a red circle", "only one"))
    with pytest.raises(ConfigError, match="no rubric for the criterion 'quality'"):
        check_of_prompts(config, ["quality"], None, edits=False)


# Images that are judged while others are drawn


def test_images_are_judged_while_later_ones_are_drawn():
    records = [PromptRecord(PROMPTS[row]) for row in ROWS]
    with fake() as server:
        remote = RemoteJudge(lambda: critic(server))
        given = records, [[] for _ in records], CRITERIA, PROMPT
        streamed = judging_of(remote, *given)

        class Patient(FlatGenerator):
            """Draws a batch only when all the images before it are judged."""

            batches = 0

            def decode_on_host(self, latents):
                deadline = time.monotonic() + 30
                while server.judged < 2 * len(CRITERIA) * self.batches:
                    assert time.monotonic() < deadline, "nothing is judged before all is drawn"
                    time.sleep(0.01)
                self.batches += 1
                return super().decode_on_host(latents)

        generator = Patient()
        sample = make_sampler(generator, SimpleNamespace(**SETTINGS | {"batch_size": 2}), None)
        conditioned = generator.condition(PROMPTS, SimpleNamespace(**SETTINGS))
        _, images = sample(ZERO, conditioned, ROWS, NUMBERS, KEY, streamed.drawn)
        found = streamed.judgements(images, list)
        assert generator.batches == 3 and server.judged == len(ROWS) * len(CRITERIA)
        # As if all had been judged at once, behind the last one.
        assert found == judging_of(ScriptedCritic(), *given).judgements(images, list)
        assert found == judge(remote, images, *given, list)
        seconds = streamed.metrics
        assert 0 <= seconds["time/judge_wait"] < seconds["time/judge"]
        assert seconds["critic/requests"] == 3 and seconds["critic/retries"] == 0


def test_an_image_that_is_not_finite_is_not_sent():
    images = np.stack([np.full((4, 4, 3), value) for value in (0.1, np.nan, 0.9)])
    records = [PromptRecord("a")] * 3
    with fake() as server:
        streamed = judging_of(RemoteJudge(lambda: critic(server)), records, [[], [], []], CRITERIA, PROMPT)
        streamed.drawn(images[:2])
        streamed.drawn(images[2:])
        found = streamed.judgements(images, list)
    for name in CRITERIA:
        assert [one.status for one in found[name]] == ["ok", "image_not_finite", "ok"]
    assert server.judged == 4


# What is told


@pytest.mark.fault("remote-down")
def test_too_many_failures_are_told_with_place_cause_and_remedy():
    settings = SimpleNamespace(score="parsed", max_failure_rate=0.2)
    with fake() as server:
        remote = RemoteJudge(lambda: critic(server, attempts=2))
        server.stop()
        found = dict(zip(CRITERIA, (remote.judge(requests(2)[at : at + 2], 9) for at in (0, 2)), strict=True))
    told = too_many_failures(found, settings)
    assert told.startswith(
        "100% of the critic's judgements have no parsed score (unreachable: 4), more than critic.max"
    )
    assert server.url in told and "cannot be reached (ConnectError" in told and "set critic.endpoints" in told
    settings.max_failure_rate = 1.0
    assert too_many_failures(found, settings) is None


# Several processes


@pytest.fixture
def two_processes(monkeypatch):
    """`run(function)`: what it returns, or raises, in two threads that take themselves for processes."""
    own, barrier, slot = threading.local(), threading.Barrier(2, timeout=20), [None]

    def broadcast(value):
        if own.index == 0:
            slot[0] = np.array(value)
        barrier.wait()
        found = slot[0]
        assert own.index == 0 or np.shape(found) == np.shape(value), "processes have to bring arrays of one shape"
        barrier.wait()
        return found

    monkeypatch.setattr(judging.multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: getattr(own, "index", 0))

    def run(function):
        found = [None, None]

        def process(index):
            own.index = index
            try:
                found[index] = function(index)
            except Exception as error:
                found[index] = error

        threads = [threading.Thread(target=process, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found

    return run


def test_one_process_asks_and_all_get_the_same_answers(two_processes):
    asked = requests(3)
    with fake(lambda number, request: Play(after=0.05)) as server:

        def judged(index):
            remote = RemoteJudge(lambda: critic(server))
            rounds = []
            found = remote.judge(asked, 9, lambda items: rounds.append(list(items)) or [])
            return found, remote.identity, len(rounds[0])

        ours, theirs = two_processes(judged)
        assert ours == theirs and ours[0] == expected(asked)
        assert len(server.requests) == 1


@pytest.mark.fault("remote-identity", "remote-down")
def test_what_stops_one_process_stops_all(two_processes):
    url = f"http://127.0.0.1:{closed_port()}"
    ours, theirs = two_processes(lambda index: RemoteJudge(lambda: critic(url)))
    assert isinstance(ours, CriticError) and isinstance(theirs, CriticError) and str(ours) == str(theirs)
    with fake() as server:

        def judged(index):
            remote = RemoteJudge(lambda: critic(server))
            server.identity = IDENTITY | {"weights_sha256": "another"}
            return remote.judge(requests(2), 9)

        ours, theirs = two_processes(judged)
        assert "no longer the one" in str(ours) and str(ours) == str(theirs) and isinstance(theirs, CriticError)
