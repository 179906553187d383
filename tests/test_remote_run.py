"""RL runs that a server judges: the run of a local critic, or an end with everything saved, never a made-up score."""

import threading
from functools import partial

import jax
import numpy as np
import pytest
from fake_critic import IDENTITY, Play, fake
from service_harness import NAME, serving
from test_train import config_for, last_state, lines, results, run, world

from firm_jax.critic import Critic
from firm_jax.errors import CheckpointError, CriticError
from firm_jax.mesh import make_mesh
from firm_jax.rl import job, train
from firm_jax.rl.programs import RLPrograms

# Read back here without saying where the arrays should lie.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
__all__ = ["world"]

BATCHES = {"rollout__batch_size": 2, "train__epochs": 2}  # three batches an epoch
PATIENCE = {"try_timeout": 30.0, "timeout": 60.0, "attempts": 2}
ASKED_EACH_EPOCH = 3  # requests: one for each batch


def judged_by(world, server, backend="firm", **changed):
    given = {"backend": backend, "endpoints": (server.url,), "model": "critic"} | PATIENCE
    return config_for(world, **BATCHES | {f"critic__{name}": value for name, value in given.items()} | changed)


def train_with(config, workdir):
    """`train` without any critic in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.Critic, "from_pretrained", lambda *args, **given: pytest.fail("a local critic is loaded"))
        patch.setattr(train, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        train.train(config, str(workdir))


@pytest.fixture(scope="module")
def local(world, tmp_path_factory):
    """The folder of the run that the same critic judges in its own process."""
    workdir = tmp_path_factory.mktemp("local")
    run(config_for(world, **BATCHES), workdir)
    return workdir


def assert_same_as(workdir, local):
    """But for the counts of requests, which a local critic does not have."""
    ours = [
        {name: value for name, value in line.items() if name not in ("critic/requests", "critic/retries")}
        for line in results(workdir)
    ]
    assert ours == results(local)
    assert (workdir / "judgements.jsonl").read_bytes() == (local / "judgements.jsonl").read_bytes()
    expected = last_state(local)
    for name, array in last_state(workdir).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_a_run_judged_by_a_server_is_that_of_a_local_critic(world, local, tmp_path):
    with fake() as server:
        train_with(judged_by(world, server), tmp_path / "run")
        assert_same_as(tmp_path / "run", local)
        for line in lines(tmp_path / "run" / "metrics.jsonl")[1:]:
            assert line["critic/requests"] == ASKED_EACH_EPOCH and line["critic/retries"] == 0
            assert 0 <= line["time/judge_wait"] <= line["time/critic"] + 0.01


def dies(server, at):
    """The server dies when it is asked for the n-th time."""

    def play(number, request):
        if number == at:
            threading.Thread(target=server.stop).start()
            return Play(after=0.5, drop=True)
        return Play()

    return play


@pytest.mark.fault("remote-down", "silent-critic")
def test_a_server_that_dies_in_an_epoch_ends_the_run_saved_and_the_same_command_goes_on(world, local, tmp_path):
    with fake() as server:
        server.play = dies(server, at=1 + ASKED_EACH_EPOCH + 1)  # in the second epoch, after its first batch
        with pytest.raises(
            CriticError, match=rf"epoch 2: .*unreachable: .*{server.url}.*critic.endpoints.*The run is saved in"
        ):
            train_with(judged_by(world, server), tmp_path / "run")
        assert last_state(tmp_path / "run")["step"] == 2
        missing = [record for record in lines(tmp_path / "run" / "judgements.jsonl") if record["status"] != "ok"]
        assert missing and all(one["score"] is one["expected"] is one["reward"] is None for one in missing)
        server.play = lambda number, request: Play()
        server.start()
        train_with(judged_by(world, server), tmp_path / "run")
        assert_same_as(tmp_path / "run", local)


@pytest.mark.fault("remote-garbage", "missing-reward")
def test_failures_within_the_budget_are_masked_and_counted(world, tmp_path):
    """Of an openai server, by the expected score."""
    first = 1 + 4  # the canary, and the evaluation's questions

    def play(number, request):
        if number == first:
            return Play(500)
        return Play(body=b"<html>") if number == first + 1 else Play()

    with fake(play) as server:
        changed = {"critic__score": "expected", "critic__max_failure_rate": 0.8, "train__epochs": 1}
        train_with(judged_by(world, server, "openai", **changed), tmp_path / "run")
    [_, line] = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["critic/status/server_error"] == line["critic/status/malformed_reply"] == 1
    assert line["critic/failure_rate"] == pytest.approx(2 / 12) and line["critic/requests"] == 12
    assert line["reward/std"] > 0 and line["critic/entropy"] > 0
    records = lines(tmp_path / "run" / "judgements.jsonl")
    missing = {record["image"] for record in records if record["status"] != "ok"}
    assert line["reward/missing"] == len(missing) and 1 <= len(missing) <= 2  # whichever were asked about first
    for record in records:
        assert (record["reward"] is None) == (record["image"] in missing)
        if record["status"] == "ok":
            assert abs(record["expected"] - np.min(record["score"])) <= 0.5 + 1e-6 and record["text"]
        else:
            assert record["score"] is record["expected"] is None
            assert server.url in record["reason"]
    assert all(np.isfinite(array).all() for array in last_state(tmp_path / "run").values())


@pytest.mark.fault("remote-identity", "other-model")
def test_another_critic_ends_the_run_and_cannot_take_it_over(world, local, tmp_path):
    other = IDENTITY | {"weights_sha256": "another"}
    with fake() as server:

        def play(number, request):
            if number == 1 + ASKED_EACH_EPOCH:
                server.identity = other
            return Play()

        server.play = play
        with pytest.raises(CriticError, match=r"epoch 2: .*no longer the one.*weights_sha256.*The run is saved in"):
            train_with(judged_by(world, server), tmp_path / "run")
        assert last_state(tmp_path / "run")["step"] == 2
        server.play = lambda number, request: Play()
        with pytest.raises(CheckpointError, match=r"base weights(.|\n)*another"):
            train_with(judged_by(world, server), tmp_path / "run")
        server.identity = IDENTITY
        train_with(judged_by(world, server), tmp_path / "run")
        assert_same_as(tmp_path / "run", local)


@pytest.mark.fault("remote-down")
def test_a_server_that_is_not_there_is_told_before_anything_is_loaded_and_leaves_no_folder(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr(job.Generator, "from_pretrained", lambda *args, **given: pytest.fail("loaded"))
    with fake() as server:
        server.stop()
        with pytest.raises(CriticError, match=rf"{server.url} cannot be reached.*Start the server"):
            train_with(judged_by(world, server), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_plan_leaves_the_critic_to_its_server(world):
    with fake() as server:
        config = judged_by(world, server)
    planned = RLPrograms(config, make_mesh(**config.mesh, devices=jax.devices()[:1]))
    assert planned.resident()["critic (on a server)"] == () and "critic" not in planned.resident()
    assert not [program.name for program in planned.programs() if program.name.startswith("critic")]


@pytest.mark.slow
def test_our_own_service_judges_a_run_as_the_local_critic(world, tmp_path):
    """The critic that ships, in this process and behind `firm-jax serve`'s application."""
    changed = {"train__epochs": 1, "critic__max_new_tokens": 128, "critic__max_failure_rate": 0.9}
    config = config_for(world, **changed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        train.train(config, str(tmp_path / "local"))
    with serving(Critic.from_pretrained("embedded:critic_gen", dtype="float32")) as served:
        given = {"critic__backend": "firm", "critic__endpoints": (served.url,), "critic__model": NAME}
        train_with(config_for(world, **changed | given), tmp_path / "served")
    ours, theirs = (lines(tmp_path / name / "judgements.jsonl") for name in ("served", "local"))
    assert len(ours) == 12
    for one, other in zip(ours, theirs, strict=True):
        for name in ("prompt", "image", "criterion", "text", "score", "status", "rubric"):
            assert one[name] == other[name], name
        assert one["expected"] == pytest.approx(other["expected"], abs=1e-4)
        assert one["reward"] == other["reward"]
