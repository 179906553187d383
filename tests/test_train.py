"""The RL job from its config to its folder, on a tiny random pipeline and a critic that scores by a formula."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import hostile
import jax
import numpy as np
import pytest
from docs_pages import unexplained
from orbax.checkpoint import v1 as ocp
from scripted import ScriptedCritic
from tiny_pipeline import tiny_generator

from firm_jax import gallery
from firm_jax.commands import main
from firm_jax.config import load_config
from firm_jax.errors import ConfigError, CriticError, DataError, NonFiniteError, WeightsError
from firm_jax.mesh import make_mesh
from firm_jax.rl import job, train
from firm_jax.rl.update import init_state
from firm_jax.run import Stopped

# Read back here without saying where the arrays should lie.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

CONFIG = Path(__file__).parents[1] / "configs" / "gen_qma.py"
PROMPTS = ["a red circle", "two blue squares", "a perfect star", "a green cross above a red square"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the models and the prompts."""
    folder = tmp_path_factory.mktemp("world")
    tiny_generator(t5=False, num_layers=2, dual_attention_layers=()).save_pretrained(folder / "model")
    (folder / "train.txt").write_text("\n".join(PROMPTS))
    (folder / "held_out.txt").write_text("a yellow ring\nthree white circles\n")
    return folder


def config_for(world, **changed):
    """The tiny job with 2 prompts x 3 images of 16 x 16 pixels and three epochs; keys with `__` for dots."""
    config = load_config(f"{CONFIG}:tiny")
    size = {"height": 16, "width": 16, "max_text_tokens": 3, "steps": 3, "batch_size": 6}
    config.rollout.update(size)
    config.eval.update(size | {"every": 2, "prompts": 2, "images_per_prompt": 1, "judged": 2, "oracle": False})
    flat = {
        "model": str(world / "model"),
        "prompts.train": str(world / "train.txt"),
        "prompts.held_out": str(world / "held_out.txt"),
        "group.prompts_per_epoch": 2,
        "group.images_per_prompt": 3,
        "lora.rank": 2,
        "train.epochs": 3,
        "train.updates_per_epoch": 2,
        "train.micro_batch": 2,
        "train.timesteps": 2,
        "checkpoint.every": 1,
        "mesh.data": -1,
    }
    config.update_from_flattened_dict(flat | {name.replace("__", "."): value for name, value in changed.items()})
    return config


def run(config, workdir, critic=None, devices=1):
    """`train` with a critic of ours, on the first of the simulated devices or on more of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.Critic, "from_pretrained", lambda *args, **given: critic or ScriptedCritic())
        patch.setattr(train, "make_mesh", partial(make_mesh, devices=jax.devices()[:devices]))
        train.train(config, str(workdir))


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def results(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without how long things took."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("time", "throughput", "goodput"))}
        for line in lines(workdir / "metrics.jsonl")
    ]


def last_state(workdir: Path) -> dict:
    """The arrays of the newest checkpoint, by name."""
    newest = max((path for path in (workdir / "checkpoints").iterdir()), key=lambda path: int(path.name))
    return {name: np.asarray(array) for name, array in ocp.load(newest / "state").items()}


def unreadable(request) -> bool:
    """About one answer in seven; it depends on the picture, so that a repeated epoch repeats it."""
    return int(np.asarray(request["images"][0], int).sum()) % 7 == 0


MAIN = {"critic__max_failure_rate": 0.9, "train__ban_solved_prompts": True}


def main_critic(kind=ScriptedCritic):
    return kind(fails=unreadable, perfect=lambda prompt: "perfect" in prompt)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """The folder of a run of three epochs."""
    workdir = tmp_path_factory.mktemp("runs") / "new" / "run"
    run(config_for(world, **MAIN), workdir, main_critic())
    return workdir


# What a run leaves


def test_the_folder_holds_what_the_run_promises(finished):
    assert json.loads((finished / "config.json").read_text())["train"]["epochs"] == 3
    assert sorted(path.name for path in (finished / "images").glob("*.png")) == [
        f"eval_{epoch:05d}.png" for epoch in (0, 2, 3)
    ]
    assert [path.name for path in (finished / "checkpoints").iterdir() if path.name == "6"]
    assert "reward" in (finished / "report.html").read_text()
    assert list((finished / "tensorboard").iterdir()) and not (finished / "run.lock").exists()


def test_metrics_carry_the_promised_names(finished):
    before, *epochs = lines(finished / "metrics.jsonl")
    assert (before["epoch"], before["step"]) == (0, 0) and "eval/reward" in before
    assert [(line["epoch"], line["step"]) for line in epochs] == [(1, 2), (2, 4), (3, 6)]
    promised = (
        "time reward/mean reward/std reward/instruction reward/quality reward/zero_std_ratio critic/failure_rate "
        "critic/entropy policy/old_deviation policy/kl loss/policy loss/total grad/norm time/rollout time/critic "
        "time/update throughput/images_per_s throughput/mfu"
    ).split()
    for line in epochs:
        assert set(promised) <= set(line), set(promised) - set(line)
        assert all(isinstance(line[name], float) for name in promised if name != "throughput/mfu")
        assert line["throughput/mfu"] is None  # the peak of this machine is not known
    assert ["eval/reward" in line for line in epochs] == [False, True, True]
    assert unexplained({name for line in (before, *epochs) for name in line}) == [], (
        "docs/metrics.md is to say what it is"
    )
    assert all(line["loss/total"] > 0 and line["grad/norm"] > 0 and line["update/skipped"] == 0 for line in epochs)


@pytest.mark.fault("missing-reward")
def test_every_judgement_is_written_and_the_unreadable_ones_are_missing(finished):
    records = lines(finished / "judgements.jsonl")
    assert len(records) == 3 * 2 * 3 * 2  # epochs, prompts, images, criteria
    assert {record["criterion"] for record in records} == {"instruction", "quality"}
    promised = "epoch prompt criterion score expected entropy status text reward rubric".split()
    assert all(set(promised) <= set(record) for record in records)
    failed = [record for record in records if record["status"] != "ok"]
    assert failed and all(record["score"] is None and record["reward"] is None for record in failed)
    for epoch, line in enumerate(lines(finished / "metrics.jsonl")[1:]):
        own = [record for record in records if record["epoch"] == epoch]
        assert line["critic/failure_rate"] == pytest.approx(np.mean([r["score"] is None for r in own]))
        rewards = [r["reward"] for r in own if r["criterion"] == "quality"]
        assert line["reward/missing"] == rewards.count(None)
        assert line["reward/mean"] == pytest.approx(np.mean([r for r in rewards if r is not None]), rel=1e-5)


def test_judgements_name_the_pictures_that_are_kept_of_them(finished):
    records = lines(finished / "judgements.jsonl")
    kept, broken = gallery.read(finished / "images" / gallery.FOLDER)
    assert not broken and {(r["set"], r["epoch"]) for _, r in kept} == {
        *(("eval", epoch) for epoch in (0, 2, 3)), *(("train", epoch) for epoch in (1, 2, 3)),
    }  # fmt: skip
    kept = {path: record for path, record in kept if record["set"] == "train"}
    assert sum("file" in record for record in records) == 2 * len(kept) >= 2 * 3 * 4
    for path, record in kept.items():
        named = [r for r in records if r.get("file") == str(path.relative_to(finished))]
        assert [r["criterion"] for r in named] == ["instruction", "quality"]
        for judgement, written in zip(record["judgements"], named, strict=True):
            assert (record["epoch"] - 1, record["image"]) == (written["epoch"], written["image"])
            assert (record["prompt"], record["reward"]) == (written["prompt"], written["reward"])
            assert all(judgement[name] == written[name] for name in ("score", "expected", "entropy", "status", "text"))


def test_a_solved_prompt_is_not_drawn_again(finished):
    """What is solved is read from the judgements: a picture that differs in a bit may be scored otherwise."""
    judged = lines(finished / "judgements.jsonl")
    banned, counts = set(), {line["epoch"]: line["prompts/banned"] for line in lines(finished / "metrics.jsonl")[1:]}
    assert {r["prompt"] for r in judged if r["epoch"] < 2} == set(PROMPTS)
    for epoch in range(3):
        rewards = {}
        for r in judged:
            if r["epoch"] == epoch:
                rewards.setdefault(r["prompt"], {})[r["image"]] = r["reward"]
        assert len(rewards) == 2 and not banned & rewards.keys()
        for prompt, by_image in rewards.items():
            known = [reward for reward in by_image.values() if reward is not None]
            banned |= {prompt} if len(known) > 1 and min(known) == 1 else set()
        assert counts[epoch + 1] == len(banned)
        assert epoch == 0 or "a perfect star" in banned


def test_the_policies_have_moved(finished):
    state = last_state(finished)
    moved = {name.split("/")[0] for name, array in state.items() if name.endswith("/b") and np.any(array)}
    assert {"lora", "old", "ema"} <= moved and state["step"] == 6
    assert all(np.isfinite(array).all() for array in state.values())


def test_a_run_goes_on_from_the_lora_of_another(world, finished, tmp_path, monkeypatch):
    lora, began = tmp_path / "lora", []
    assert main(["export", "--workdir", str(finished), "--format", "diffusers-lora", "--out", str(lora)]) == 0
    monkeypatch.setattr(job, "init_state", lambda tree, *given: began.append(init_state(tree, *given)) or began[-1])
    config = config_for(world, lora__init=str(lora), train__epochs=2, **MAIN)
    run(config, tmp_path / "straight", main_critic())
    trained = {name: array for name, array in last_state(finished).items() if name.startswith("ema/")}
    for path, leaf in jax.tree.leaves_with_path({name: began[0][name] for name in ("lora", "old", "ema")}):
        name = "/".join(["ema", *(key.key for key in path[1:])])
        np.testing.assert_array_equal(leaf, trained[name], err_msg=name)
    state = last_state(tmp_path / "straight")
    assert any((array != trained[name]).any() for name, array in state.items() if name.startswith("ema/"))
    # Stopped and continued, it ends on the same bits: the LoRA is where the run began, not where it goes on.
    with config.unlocked():
        config.train.epochs = 1
        run(config, tmp_path / "stopped", main_critic())
        config.train.epochs = 2
        run(config, tmp_path / "stopped", main_critic())
    continued = last_state(tmp_path / "stopped")
    assert continued.keys() == state.keys()
    for name, array in continued.items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


@pytest.mark.fault("wrong-config")
def test_a_lora_that_does_not_fit_is_told_before_anything_is_loaded(world, finished, tmp_path, nothing_is_loaded):
    assert main(["export", "--workdir", str(finished), "--format", "peft", "--out", str(tmp_path / "lora")]) == 0
    config = config_for(world, lora__init=str(tmp_path / "lora"), lora__rank=3)
    with pytest.raises(ConfigError, match=r"its rank is 2: set --config\.lora\.rank=2 \(it is 3\)"):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# Stopping and starting again


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


def assert_same_run(workdir, expected_workdir):
    assert results(workdir) == results(expected_workdir)
    assert (workdir / "judgements.jsonl").read_bytes() == (expected_workdir / "judgements.jsonl").read_bytes()
    kept, expected = (
        {path.name: path.read_bytes() for path in (folder / "images" / gallery.FOLDER).iterdir()}
        for folder in (workdir, expected_workdir)
    )
    assert kept == expected
    expected = last_state(expected_workdir)
    assert last_state(workdir).keys() == expected.keys()
    for name, array in last_state(workdir).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.fault("preempted")
def test_a_run_stopped_within_phases_stops_at_once_and_ends_as_if_it_had_not_been(
    world, finished, tmp_path, monkeypatch
):
    class Interrupting(ScriptedCritic):
        """Meets a signal when it is asked the n-th time: before training, in an epoch, in the evaluation after it."""

        def __init__(self, call, **given):
            super().__init__(**given)
            self.call, self.calls, self.answers = call, 0, 0

        def judge(self, requests, **given):
            self.calls += 1
            if self.calls == self.call:
                interrupt()
            return super().judge(requests, **given)

        def _judge(self, request):
            self.answers += self.calls >= self.call
            return super()._judge(request)

    def stopped(message, saved, call=99):
        critic = main_critic(partial(Interrupting, call))
        with pytest.raises(Stopped, match=message):
            run(config_for(world, **MAIN, checkpoint__every=0), tmp_path, critic)
        assert critic.answers == 0, "it went on"
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == saved

    with monkeypatch.context() as patched:
        patched.setattr(job.Generator, "from_pretrained", lambda *args, **given: interrupt())
        stopped("before training went on .*nothing to save", [])
    stopped("before training went on .*nothing to save", [], call=1)
    stopped("in epoch 1, saved in .* as it was before it", ["0"], call=2)
    with monkeypatch.context() as patched:
        patched.setattr(job, "optimizer_batches", interrupted_after_one(job.optimizer_batches))
        stopped("in epoch 1, saved in .* as it was before it", ["0"])
    stopped("in epoch 2, saved in .* as it was before it", ["0", "2"], call=3)
    run(config_for(world, **MAIN), tmp_path, main_critic())
    assert_same_run(tmp_path, finished)


def interrupted_after_one(batches):
    def interrupted(*args):
        for number, batch in enumerate(batches(*args)):
            if number:
                interrupt()
            yield batch

    return interrupted


@pytest.mark.fault("other-model")
def test_another_config_in_the_same_folder_is_refused_before_anything_is_loaded(world, finished, monkeypatch):
    monkeypatch.setattr(job.Generator, "from_pretrained", lambda *args, **given: pytest.fail("loaded"))
    config = config_for(world, **MAIN, train__learning_rate=0.5, lora__alpha=1.0)
    with pytest.raises(ConfigError, match=r"contradicts the checkpoint(.|\n)*lora.alpha(.|\n)*train.learning_rate"):
        run(config, finished)


# Judgements and numbers that fail


@pytest.mark.fault("silent-critic")
def test_a_critic_that_never_answers_stops_the_run_and_loses_nothing(world, tmp_path):
    config = config_for(world, train__epochs=1)
    with pytest.raises(CriticError, match=r"epoch 1: 100% .*no_score: 12.*max_failure_rate = 0.2.*saved in"):
        run(config, tmp_path, ScriptedCritic(fails=lambda request: True))
    assert [record["text"] for record in lines(tmp_path / "judgements.jsonl")] == ["I do not know"] * 12
    assert (tmp_path / "report.html").exists() and last_state(tmp_path)["step"] == 0
    run(config, tmp_path)
    assert [(line["epoch"], line["step"]) for line in lines(tmp_path / "metrics.jsonl")] == [(0, 0), (1, 2)]
    assert [record["status"] for record in lines(tmp_path / "judgements.jsonl")] == ["ok"] * 12


@pytest.mark.fault("missing-reward")
def test_a_reward_that_is_not_a_number_is_masked(world, tmp_path):
    config = config_for(world, train__epochs=1, reward__name="scripted:sometimes_nan")
    config.reward.weights = {}
    run(config, tmp_path)
    rewards = [r["reward"] for r in lines(tmp_path / "judgements.jsonl") if r["criterion"] == "quality"]
    [_, line] = lines(tmp_path / "metrics.jsonl")
    assert 0 < rewards.count(None) < 6 and line["reward/missing"] == rewards.count(None)
    assert line["critic/failure_rate"] == 0 and line["update/skipped"] == 0
    assert all(np.isfinite(array).all() for array in last_state(tmp_path).values())


@pytest.fixture
def poisoned(monkeypatch):
    """The first update of every epoch meets a NaN."""
    batches = job.optimizer_batches

    def poison(*args):
        for number, batch in enumerate(batches(*args)):
            yield batch | {"x0": batch["x0"] * np.nan} if number == 0 else batch

    monkeypatch.setattr(job, "optimizer_batches", poison)


@pytest.mark.fault("not-finite")
def test_an_update_with_a_nan_is_not_made_and_its_prompts_are_kept(world, tmp_path, poisoned):
    run(config_for(world, train__epochs=1, train__max_skipped_updates=1), tmp_path)
    [_, line] = lines(tmp_path / "metrics.jsonl")
    assert (line["step"], line["update/skipped"]) == (1, 1) and line["loss/total"] > 0
    [record] = lines(tmp_path / "skipped_updates.jsonl")
    assert record["epoch"] == 0 and record["reason"] == "loss or gradient not finite"
    drawn = {judgement["prompt"] for judgement in lines(tmp_path / "judgements.jsonl")}
    assert record["prompts"] and set(record["prompts"]) <= drawn
    assert all(np.isfinite(array).all() for array in last_state(tmp_path).values())


@pytest.mark.fault("not-finite")
def test_more_such_updates_than_allowed_stop_the_run_as_it_was(world, tmp_path, poisoned):
    config = config_for(world, train__epochs=3, train__max_skipped_updates=1)
    with pytest.raises(NonFiniteError, match=r"epoch 2: 2 updates .*max_skipped_updates = 1.*skipped_updates.jsonl"):
        run(config, tmp_path)
    assert [line["epoch"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1]
    assert last_state(tmp_path)["step"] == 1


# Prompts that nobody vouches for


@pytest.mark.fault("malformed-line", "hostile-text")
def test_a_run_sets_bad_prompts_aside_and_trains_on_the_others(world, tmp_path):
    bad = [hostile.LINES[name][0] for name in ("two values for one key", "too long", "half a surrogate pair")]
    too_long = json.dumps({"prompt": "0 " * 3000}).encode()  # short enough for a prompt, too long for this critic
    good = [json.dumps({"prompt": text}).encode() for text in hostile.TEXTS]
    (tmp_path / "p.jsonl").write_bytes(b"\n".join([*bad, too_long, *good]))
    changed = {"prompts__train": str(tmp_path / "p.jsonl"), "prompts__held_out": str(tmp_path / "p.jsonl")}
    config = config_for(world, **changed, prompts__max_bad_fraction=0.5, train__epochs=4)
    run(config, tmp_path / "run")
    found = lines(tmp_path / "run" / "quarantine.jsonl")
    assert [record["line"] for record in found] == [1, 2, 3, 4] * 2  # of both sources
    assert "tokens of the critic" in found[3]["reason"]
    judged = lines(tmp_path / "run" / "judgements.jsonl")
    assert {record["prompt"] for record in judged} == set(hostile.TEXTS)
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["epoch"] == 4
    assert "<script>alert" not in (tmp_path / "run" / "report.html").read_text()


def strict_lines(file: Path) -> list[dict]:
    """`lines`, of a file that other readers of JSON than Python's take too."""
    return [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in file.read_text().splitlines()]


@pytest.fixture
def spoiled(monkeypatch):
    """`spoiled(n)`: the first n images of an epoch are not finite, and the latents of all but the last of them."""

    def spoil(count):
        real = job.make_sampler

        def make(*args):
            sample = real(*args)

            def draw(*given):
                latents, images = sample(*given)
                images[:count], latents[: count - 1] = np.nan, np.inf
                return latents, images

            return draw

        monkeypatch.setattr(job, "make_sampler", make)

    return spoil


@pytest.mark.fault("not-finite")
def test_an_image_that_is_not_finite_is_missing_and_nothing_else_is(world, tmp_path, spoiled):
    spoiled(2)
    config = config_for(world, train__epochs=1, critic__max_failure_rate=0.4)
    run(config, tmp_path)
    [_, line] = strict_lines(tmp_path / "metrics.jsonl")
    assert line["reward/missing"] == 2 and line["critic/status/image_not_finite"] == 4 and line["update/skipped"] == 0
    judged = strict_lines(tmp_path / "judgements.jsonl")
    assert [r["image"] for r in judged if r["status"] == "image_not_finite" and r["reward"] is None] == [0, 1, 0, 1]
    assert line["step"] == 2 and all(np.isfinite(array).all() for array in last_state(tmp_path).values())


@pytest.mark.fault("not-finite")
def test_more_such_images_than_allowed_stop_the_run_as_it_was(world, tmp_path, spoiled, monkeypatch):
    config = config_for(world, train__epochs=1)
    with monkeypatch.context():
        spoiled(2)
        with pytest.raises(
            NonFiniteError, match=r"epoch 1: 2 of 6 images are not finite.*max_failure_rate = 0.2.*saved"
        ):
            run(config, tmp_path)
    assert last_state(tmp_path)["step"] == 0 and len(lines(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.fault("missing-reward")
def test_a_prompt_whose_judgements_all_fail_is_left_out(world, tmp_path):
    config = config_for(world, train__epochs=2, critic__max_failure_rate=0.5)
    run(config, tmp_path, ScriptedCritic(fails=lambda request: "star" in request["prompt"]))
    epochs = strict_lines(tmp_path / "metrics.jsonl")[1:]
    drawn = [
        any("star" in r["prompt"] for r in lines(tmp_path / "judgements.jsonl") if r["epoch"] == epoch)
        for epoch in range(2)
    ]
    assert sorted(drawn) == [False, True]  # the two epochs go once through the four prompts
    for line, hit in zip(epochs, drawn, strict=True):
        assert line["reward/missing"] == 3 * hit and line["reward/missing_groups"] == hit
        assert line["critic/failure_rate"] == 0.5 * hit and line.get("critic/status/no_score", 0) == 6 * hit
        assert line["reward/mean"] > 0 and line["loss/total"] > 0 and line["update/skipped"] == 0


@pytest.mark.fault("missing-reward", "silent-critic")
def test_an_epoch_without_a_reward_changes_nothing(world, tmp_path, monkeypatch):
    states, real = [], job.Job.end_epoch

    def noted(self, state, *args):
        states.append(jax.tree.map(np.asarray, state))
        return real(self, state, *args)

    monkeypatch.setattr(job.Job, "end_epoch", noted)
    settings = {"critic__max_failure_rate": 1.0, "train__max_skipped_updates": 2}
    run(config_for(world, train__epochs=1, **settings), tmp_path)
    run(config_for(world, train__epochs=2, **settings), tmp_path, ScriptedCritic(fails=lambda request: True))
    before, after = states
    # The old policy follows at a distance: mixed once more, it would move without a reward.
    pairs = zip(jax.tree.leaves(before["old"]), jax.tree.leaves(before["lora"]), strict=True)
    assert before["step"] == 2 and any((old != new).any() for old, new in pairs)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    *_, line = strict_lines(tmp_path / "metrics.jsonl")
    assert (line["epoch"], line["step"], line["update/skipped"], line["update/made"]) == (2, 2, 2, 0)
    assert line["reward/mean"] is line["reward/std"] is line["loss/total"] is line["eval/reward"] is None
    assert line["reward/missing_groups"] == 2 and line["critic/failure_rate"] == 1
    assert [r["reason"] for r in strict_lines(tmp_path / "skipped_updates.jsonl")] == ["no image has a reward"] * 2
    page = (tmp_path / "report.html").read_text()
    assert "updates skipped, for numbers that were not finite or for want of rewards: 2" in page and ">nan<" not in page


@pytest.mark.fault("equal-rewards")
def test_an_epoch_of_equal_rewards_is_an_update_without_a_direction(world, tmp_path):
    run(config_for(world, train__epochs=1), tmp_path, ScriptedCritic(perfect=lambda prompt: True))
    [_, line] = strict_lines(tmp_path / "metrics.jsonl")
    assert line["reward/zero_std_ratio"] == 1 and line["reward/std"] == 0 and line["update/skipped"] == 0
    assert line["step"] == 2 and all(np.isfinite(array).all() for array in last_state(tmp_path).values())


# What is refused at once


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    for thing in (job.Generator, job.Critic):
        monkeypatch.setattr(thing, "from_pretrained", lambda *args, **given: pytest.fail("loaded"))


@pytest.mark.fault("wrong-config")
@pytest.mark.parametrize(
    "change, named",
    [
        ({"group.images_per_prompt": 1}, r"group.images_per_prompt is 1: .*2 or more"),
        ({"reward.name": "beauty"}, "unknown reward 'beauty'"),
        ({"reward.name": "scripted:beauty", "reward.weights": {}}, "needs beauty, which no rubric.*consistency"),
        ({"reward.name": "cme"}, r"execution, consistency.*source.*text alone.*qma.*configs/edit_cme.py"),
        ({"rollout.solver": "heun"}, "rollout.solver is 'heun'.*euler, dpm2, sde"),
        ({"eval.solver": "heun"}, "eval.solver is 'heun'"),
        ({"train.adv_mode": "some"}, "train.adv_mode is 'some'.*positive_only"),
        ({"train.decay_type": 7}, "decay type 7"),
        ({"quantize": "int4"}, "quantize is 'int4'; it is one of: int8"),
        ({"train.remat": "half"}, "train.remat is 'half'"),
        ({"train.timesteps": 4}, "train.timesteps is 4; .*rollout.steps = 3"),
        ({"train.updates_per_epoch": 7}, "train.updates_per_epoch is 7"),
        ({"train.beta": 0.0}, "train.beta is 0.0"),
        ({"train.micro_batch": 0}, "train.micro_batch is 0"),
        ({"eval.every": 0}, "eval.every is 0"),
        ({"lora.init": "zero"}, "lora.init is 'zero'.*gaussian"),
        ({"critic.score": "mean"}, "critic.score is 'mean'.*parsed, expected"),
        ({"critic.answer": "short"}, "critic.answer is 'short'.*whole, until_score, score_only"),
        ({"critic.max_failure_rate": 20.0}, "critic.max_failure_rate is 20.0; it is a share"),
        ({"critic.max_new_tokens": 1000}, "critic.max_new_tokens = 1000 leaves no room"),
        ({"critic.backend": "http"}, "critic.backend is 'http'"),
        ({"rollout.height": 18}, "height and width must be positive multiples of 4, not 18 x 16"),
        ({"eval.width": 44}, "latents of 8 x 22"),
        ({"group.prompts_per_epoch": 5}, "only 4 distinct training prompts"),
    ],
)
def test_values_that_cannot_work_are_named_before_anything_is_loaded(world, tmp_path, nothing_is_loaded, change, named):
    config = config_for(world)
    config.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=named):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_missing_weights_are_told_together_and_leave_no_folder(tmp_path, nothing_is_loaded):
    with pytest.raises(WeightsError) as told:
        train.train(load_config(str(CONFIG)), str(tmp_path / "run"))
    for named in ("stabilityai/stable-diffusion-3.5-medium", "VisionXLab/FIRM-Gen-8B", "HF_TOKEN", ":tiny"):
        assert named in str(told.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("malformed-line")
@pytest.mark.parametrize("prompts, named", [("absent.txt", "absent.txt"), ("empty.txt", "empty.txt")])
def test_prompts_that_are_missing_or_empty_are_named(world, tmp_path, nothing_is_loaded, prompts, named):
    (tmp_path / "empty.txt").touch()
    config = config_for(world)
    config.prompts.train = str(tmp_path / prompts)
    with pytest.raises(DataError, match=named):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# A base on int8


def test_qwen_image_is_trained_from_text_alone(world, tmp_path):
    config = load_config(f"{CONFIG}:qwen_image_tiny")
    size = {"height": 32, "width": 16, "steps": 2, "batch_size": 8}
    config.rollout.update(size)
    config.eval.update(size | {"prompts": 2, "images_per_prompt": 1, "judged": 2, "oracle": False})
    config.prompts.update({"train": str(world / "train.txt"), "held_out": str(world / "held_out.txt")})
    config.group.update({"prompts_per_epoch": 2, "images_per_prompt": 4})
    config.train.update({"epochs": 1, "updates_per_epoch": 1, "micro_batch": 2, "timesteps": 1})
    run(config, tmp_path)
    before, after = lines(tmp_path / "metrics.jsonl")
    assert "eval/reward" in before and "eval/reward" in after
    assert after["update/made"] == 1 and after["grad/norm"] > 1e-4
    state = last_state(tmp_path)
    for module in ("attn/to_q", "attn/add_q_proj", "img_mlp/net/0/proj"):
        assert state[f"lora/blocks/{module}/b"].any()


def test_a_run_over_int8_kernels_learns_and_leaves_them_as_they_are(world, tmp_path, monkeypatch):
    bases = []

    class Recorded(job.Job):
        def _load(self):
            super()._load()
            bases.append((self.generator.params, jax.tree.map(np.array, self.generator.params)))

    monkeypatch.setattr(train, "Job", Recorded)
    changed = {"quantize": "int8", "train__epochs": 2, "train__remat": "full"}
    run(config_for(world, **changed), tmp_path / "run")
    [(params, before)] = bases
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32", "int8"}
    jax.tree.map(np.testing.assert_array_equal, params, before)
    _, *epochs = results(tmp_path / "run")
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert all(line["grad/norm"] > 0 and line["update/skipped"] == 0 for line in epochs)
    adapters = {name: array for name, array in last_state(tmp_path / "run").items() if name.startswith("lora/")}
    assert {array.dtype for array in adapters.values()} == {np.dtype(np.float32)}
    assert adapters["lora/blocks/attn/to_q/b"].any()  # all zeros at the beginning
    with pytest.raises(ConfigError, match="quantize: 'int8' -> None"):
        run(config_for(world, **changed | {"quantize": None}), tmp_path / "run")


# More devices


def test_eight_devices_train_as_one_and_continue(world, tmp_path):
    # The expected score is smooth in the pixels, so that rounding cannot flip a judgement.
    # AdamW's first step is the gradient over its size: `eps` keeps it smooth in gradients that are next to nothing.
    changed = {"train__epochs": 1, "critic__score": "expected", "rollout__solver": "sde", "train__eps": 1e-3}
    one, eight = ScriptedCritic(), ScriptedCritic()
    run(config_for(world, **changed), tmp_path / "one", one)
    spread = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "train__remat": "full"}
    run(config_for(world, **changed | spread), tmp_path / "eight", eight, devices=8)
    assert len(one.pictures) == len(eight.pictures)
    difference = np.stack(one.pictures).astype(int) - np.stack(eight.pictures)
    assert np.abs(difference).max() <= 1
    for ours, expected in zip(results(tmp_path / "eight"), results(tmp_path / "one"), strict=True):
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            assert ours[name] == (value if value is None else pytest.approx(value, rel=1e-2, abs=1e-5)), name
    expected = last_state(tmp_path / "one")
    for name, array in last_state(tmp_path / "eight").items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-2, atol=1e-3, err_msg=name)

    run(config_for(world, **changed | spread | {"train__epochs": 2}), tmp_path / "eight", devices=8)
    assert [line["epoch"] for line in lines(tmp_path / "eight" / "metrics.jsonl")][-1] == 2
    assert last_state(tmp_path / "eight")["step"] == 4
