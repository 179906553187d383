"""The benchmark as a job: local critics and critics on servers in one table, stopped, failing, started again."""

import json
import os
import resource
import signal
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from bench_reader import Reader
from fake_critic import QUICK, Play, fake
from scripted import ScriptedCritic

from firm_jax.config import load_config
from firm_jax.critic.bench import job
from firm_jax.critic.bench.miniature import write_bench
from firm_jax.critic.bench.records import read_bench
from firm_jax.errors import ConfigError, CriticError
from firm_jax.run import Stopped

ROOT = Path(__file__).parents[1]
ITEMS = 20


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A small benchmark's folder, and its items."""
    folder = tmp_path_factory.mktemp("bench")
    write_bench(folder, "gen", ITEMS)
    return folder, read_bench(folder, "gen")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("firm_jax.critic.remote.Policy", lambda: QUICK)


@pytest.fixture
def local(monkeypatch, bench):
    """Local critics are readers of the benchmark; their names."""
    loaded = []

    def load(name, **_):
        loaded.append(name)
        return Reader(bench[1])

    monkeypatch.setattr(job.Critic, "from_pretrained", load)
    return loaded


def config_for(bench, critics: dict):
    config = load_config(f"{ROOT}/configs/bench.py:tiny_gen")
    given = {"model": "embedded:critic_gen", "backend": "local", "endpoints": (), "rubrics": None}
    config.critics = {name: given | settings for name, settings in critics.items()}
    config.data, config.batch_size, config.mesh.data = str(bench[0]), 8, 1
    config.mesh.fsdp = -1
    return config


def on_server(server, backend="firm"):
    return {"model": "critic", "backend": backend, "endpoints": (server.url,)}


def run(config, workdir) -> dict:
    job.bench(config, str(workdir))
    return json.loads((workdir / "bench.json").read_text())


def answers(workdir, critic, part="judgements"):
    lines = (workdir / "critics" / critic / f"{part}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def formula(item) -> int:
    """The score of the scripted server, which sees a picture's red."""
    picture = item.pictures[0].open()[0]
    return ScriptedCritic()._judge({"criterion": "alignment", "prompt": "", "images": [picture]}).score


def test_local_and_served_critics_stand_in_one_table(bench, local, tmp_path, capsys):
    human = np.array([item.human for item in bench[1].items])
    wrong = np.abs(human - [formula(item) for item in bench[1].items])
    with fake() as first, fake() as second:
        critics = {"reader": {}, "firm": on_server(first), "chat": on_server(second, "openai")}
        found = run(config_for(bench, critics), tmp_path)["critics"]
        assert second.judged > ITEMS
    assert {name: one["overall"]["mae"] for name, one in found.items()} == {
        "reader": 0,
        "firm": pytest.approx(wrong.mean()),
        "chat": pytest.approx(wrong.mean()),
    }
    assert all(one["overall"]["failure_rate"] == one["unanswered"] == 0 for one in found.values())
    page = (tmp_path / "bench.md").read_text()
    assert page == capsys.readouterr().out and "- chat: critic" in page and "without a score" not in page
    assert [page.count(f"\n| {name} |") for name in critics] == [page.count("\n| reader |")] * 3
    assert local == ["embedded:critic_gen"]
    # Both servers are gone, and nobody is asked again.
    again = run(config_for(bench, critics), tmp_path)
    assert again["critics"] == found and local == ["embedded:critic_gen"]
    with pytest.raises(CriticError, match="no critic can be asked"):
        run(config_for(bench, critics | {"late": on_server(first)}), tmp_path)


def prompt_of(request) -> str:
    return json.dumps(request["messages"][0]["content"][-1])


FAULTS = {
    0: Play(),
    1: Play(body=b"<html>Bad gateway</html>"),
    2: Play(status=500),
    3: Play(status=400),
    4: Play(body=b""),
    5: Play(change=lambda reply: reply | {"choices": [reply["choices"][0] | {"message": {"content": "I cannot."}}]}),
}
STATUS = {1: "malformed_reply", 2: "server_error", 3: "rejected", 4: "malformed_reply", 5: "no_score"}


@pytest.mark.fault("remote-garbage", "remote-bench")
def test_a_server_that_fails_partway_leaves_gaps_and_no_scores(bench, local, tmp_path):
    def fate(request) -> int:
        return zlib.crc32(prompt_of(request).encode()) % 6

    asked = []

    def play(number, request):
        asked.append(request)
        return FAULTS[fate(request)] if number else Play()  # the first is the greeting

    with fake(play) as server:
        config = config_for(bench, {"chat": on_server(server, "openai")})
        found = run(config, tmp_path)["critics"]["chat"]
        records = [one for one in answers(tmp_path, "chat") if one["probe"] is None]
        counts = Counter(one["status"] for one in records)
        assert counts["ok"] and counts["no_score"] and counts["malformed_reply"] and counts["server_error"]
        assert all((one["score"] is None) == (one["status"] != "ok") for one in records)
        assert found["failures"] == {name: count for name, count in sorted(counts.items()) if name != "ok"}
        judged = [one for one in records if one["status"] == "ok"]
        human = [item.human for item in bench[1].items]
        assert found["overall"]["failure_rate"] == pytest.approx(1 - len(judged) / ITEMS)
        assert found["overall"]["mae"] == pytest.approx(
            np.mean([abs(one["score"] - human[one["of"]]) for one in judged])
        )
        page = (tmp_path / "bench.md").read_text()
        every = answers(tmp_path, "chat") + answers(tmp_path, "chat", "reordered")
        unanswered = [one for one in every if one["status"] in ("malformed_reply", "server_error")]
        assert found["unanswered"] == len(unanswered) and f"did not answer {len(unanswered)} questions" in page
        assert f"malformed_reply {counts['malformed_reply']}" in page
        # Well again: what was not heard is asked once more, and nothing else.
        server.play, before = lambda number, request: asked.append(request) or Play(), len(asked)
        found = run(config, tmp_path)["critics"]["chat"]
        assert len(asked) - before == 1 + len(unanswered)
        assert found["failures"] == {name: counts[name] for name in ("no_score", "rejected") if counts[name]}
        assert found["unanswered"] == 0 and len(answers(tmp_path, "chat")) > len(records)
        human = np.array(human)[[one["of"] for one in records if one["status"] not in ("no_score", "rejected")]]
        assert found["overall"]["failure_rate"] == pytest.approx(1 - len(human) / ITEMS)


@pytest.mark.fault("scoring-killed")
def test_a_stopped_job_goes_on_where_it_was(bench, local, monkeypatch, tmp_path):
    class Preempted(Reader):
        def judge(self, *given):
            if len(self.calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().judge(*given)

    straight = run(config_for(bench, {"reader": {}}), tmp_path / "straight")
    monkeypatch.setattr(job.Critic, "from_pretrained", lambda *_, **__: Preempted(bench[1]))
    with pytest.raises(Stopped, match="the same command goes on"):
        run(config_for(bench, {"reader": {}}), tmp_path / "stopped")
    assert len(answers(tmp_path / "stopped", "reader")) == 16 and not (tmp_path / "stopped" / "run.lock").exists()
    critic = Reader(bench[1])
    monkeypatch.setattr(job.Critic, "from_pretrained", lambda *_, **__: critic)
    assert run(config_for(bench, {"reader": {}}), tmp_path / "stopped") == straight
    assert sum(critic.calls) == 3 * ITEMS - 16  # two probes of every item, besides the item
    assert json.loads((tmp_path / "stopped" / "config.json").read_text())["task"] == "gen"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"backend": "grpc"}, "one: the backend 'grpc' is none of local, firm, openai"),
        ({"backend": "firm"}, "one: endpoints go with the backend firm or openai"),
        ({"endpoints": ("http://127.0.0.1:1",)}, "one: endpoints go with the backend firm or openai"),
        ({"model": ""}, "one: no model is named"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(bench, local, tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        run(config_for(bench, {"one": settings}), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not local


def test_a_job_without_anything_to_do_is_refused(bench, local, tmp_path):
    for key, value, words in (
        ("critics", {}, "there has to be a critic"),
        ("batch_size", 0, "1 or more"),
        ("task", "gne", "the task is 'gne'; give one of gen, edit"),
    ):
        config = config_for(bench, {"one": {}})
        config[key] = value
        with pytest.raises(ConfigError, match=words):
            run(config, tmp_path)
    assert not local


def test_declared_fields_are_read(bench, local, tmp_path):
    folder = tmp_path / "renamed"
    write_bench(folder, "gen", 4)
    for file in folder.rglob("*.jsonl"):
        file.write_text(file.read_text().replace('"id"', '"uid"').replace('"score"', '"mos"'))
    config = config_for((folder, None), {"reader": {}})
    config.fields.id, config.fields.score = "uid", "mos"
    assert run(config, tmp_path / "run")["critics"]["reader"]["overall"]["items"] == 4


# What was measured: the MAE of the miniature's critic, and that of the best constant answer.
MEASURED = {"gen": {"instruction": (0.12, 1.27)}, "edit": {"execution": (0.35, 1.35), "consistency": (0.47, 1.25)}}
SECONDS = 180


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("task", ["gen", "edit"])
def test_the_miniatures_critics_on_the_miniatures_benchmarks(task, tmp_path):
    """The job on one, the command on the other: as measured, and in less than three minutes of one core."""
    as_job = ["main.py", "--config", "configs/bench.py:tiny_gen", "--workdir", str(tmp_path)]
    as_command = ["-m", "firm_jax", "bench", "--task", "edit", "--out", str(tmp_path)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, *(as_job if task == "gen" else as_command)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    [found] = json.loads((tmp_path / "bench.json").read_text())["critics"].values()
    print(task, {name: one["mae"] for name, one in found["criteria"].items()}, found["probes"], f"{seconds:.0f} s")
    for name, (mae, constant) in MEASURED[task].items():
        one = found["criteria"][name]
        assert one["mae"] == pytest.approx(mae, abs=0.04), name
        assert one["best_constant_mae"] == pytest.approx(constant, abs=0.005), name
        assert one["failure_rate"] == 0 and one["spearman"] > 0.8
    assert found["probes"]["batch"]["changed"] <= 0.02
    if task == "edit":
        untouched = found["probes"]["untouched"]
        assert untouched["execution"]["mean"] < 1.5 and untouched["consistency"]["mean"] > 4.5
    assert seconds < SECONDS
