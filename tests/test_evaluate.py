"""The held-out numbers: the same images every time, the oracle's verdict from pixels, and an honest standard error."""

import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scripted import FlatGenerator, ScriptedCritic

from firm_jax import gallery
from firm_jax.data.prompts import PromptRecord
from firm_jax.rl.evaluate import SHOWN, Evaluator, clustered_error
from firm_jax.rl.rewards import resolve_reward
from firm_jax.shapes.render import render
from firm_jax.shapes.scene import Prompt, sample_scene


class Notes:
    """What an evaluation asks of its run. Pictures are kept where there is a folder."""

    def __init__(self, folder=None):
        self.grids, self.lines = [], []
        self.is_main, self.images_folder = folder is not None, folder

    def say(self, line):
        self.lines.append(line)

    def timer(self, phase):
        return contextlib.nullcontext()

    def progress(self, items, description):
        return items

    def images(self, tag, images, captions, *, step, epoch, columns):
        self.grids.append((tag, len(images), captions, step, epoch))


def config(**changed):
    settings = {
        "prompts": 2, "images_per_prompt": 3, "judged": 4, "oracle": False, "steps": 2, "solver": "euler",
        "guidance": 1.0, "height": 2, "width": 2, "max_text_tokens": 4, "batch_size": 4, "every": 2,
    }  # fmt: skip
    critic = SimpleNamespace(score="parsed", max_new_tokens=9)
    train = SimpleNamespace(epochs=9)
    return SimpleNamespace(eval=SimpleNamespace(**settings | changed), critic=critic, train=train)


PROMPTS = [PromptRecord("a red circle"), PromptRecord("a blue square"), PromptRecord("never asked for")]
LORA = {"shift": np.float32(1)}


def evaluator(critic, notes, generator=None, held_out=PROMPTS, **changed):
    given = critic, resolve_reward("qma"), held_out, config(**changed), jax.random.key(4)
    return Evaluator(notes, generator or FlatGenerator(), *given)


def test_metrics_carry_the_eval_name_and_pictures_their_prompt():
    notes, critic = Notes(), ScriptedCritic()
    metrics = evaluator(critic, notes)(LORA, step=5, epoch=2)
    assert set(metrics) == {
        f"eval/{name}" for name in ("reward", "instruction", "quality", "critic_failure_rate", "critic_entropy")
    }
    assert len(critic.pictures) == 2 * 4  # two criteria of the four images that are judged
    [(tag, shown, captions, step, epoch)] = notes.grids
    assert (tag, shown, step, epoch) == ("eval", 6, 5, 2) and shown <= SHOWN
    assert [caption.split(" | ")[0] for caption in captions] == ["a red circle", "a blue square"] * 3
    assert all("reward" in caption for caption in captions[:4]) and not any("reward" in c for c in captions[4:])


def test_too_few_held_out_prompts_are_said():
    notes = Notes()
    evaluator(ScriptedCritic(), notes)
    assert not notes.lines
    evaluator(ScriptedCritic(), notes, prompts=16)
    assert notes.lines == ["eval.prompts is 16, but there are only 3 held-out prompts: all are used"]


def test_every_evaluation_draws_the_same_images():
    critic = ScriptedCritic()
    evaluate = evaluator(critic, Notes())
    assert evaluate(LORA, step=0, epoch=0) == evaluate(LORA, step=9, epoch=3)
    first, second = critic.pictures[:8], critic.pictures[8:16]
    np.testing.assert_array_equal(first, second)
    evaluate({"shift": np.float32(4)}, step=9, epoch=3)
    assert (np.stack(critic.pictures[16:]) != np.stack(first)).any()


def test_some_judged_pictures_are_kept_as_the_critic_saw_them(tmp_path):
    critic, notes = ScriptedCritic(fails=lambda request: request["prompt"] == "a blue square"), Notes(tmp_path)
    evaluate = evaluator(critic, notes)
    for epoch in (0, 2, 5, 9, 10):  # 5 is no evaluation of this config, 10 is one beyond those that are due
        metrics = evaluate(LORA, step=5 * epoch, epoch=epoch)
    found, broken = gallery.read(tmp_path / "judged")
    assert not broken and {record["epoch"] for _, record in found} == {0, 2, 9}
    last = [(path, record) for path, record in found if record["epoch"] == 9]
    assert [record["image"] for _, record in last] == [0, 1, 2, 3], "all four that are judged"
    assert np.mean([r["reward"] for _, r in last if r["reward"] is not None]) == pytest.approx(metrics["eval/reward"])
    for path, record in last:
        np.testing.assert_array_equal(np.asarray(Image.open(path)), critic.pictures[-8:-4][record["image"]])
        assert record["set"] == "eval" and record["prompt"] == PROMPTS[record["image"] % 2].text
        instruction, quality = record["judgements"]
        assert (instruction["criterion"], quality["criterion"]) == ("instruction", "quality")
        if record["image"] % 2:
            assert instruction["status"] == "no_score" and instruction["value"] is None and record["reward"] is None
        else:
            assert instruction["value"] == (instruction["score"] - 1) / 4 and quality["score"][0] == 5
        assert instruction["oracle"] is None


@pytest.mark.fault("silent-critic")
def test_a_critic_that_fails_leaves_the_numbers_open():
    notes = Notes()
    metrics = evaluator(ScriptedCritic(fails=lambda request: True), notes)(LORA, step=0, epoch=0)
    assert metrics["eval/reward"] is None and metrics["eval/critic_failure_rate"] == 1.0
    assert notes.grids[0][2][0] == "a red circle | not judged"


@pytest.mark.fault("not-finite")
def test_images_that_are_not_finite_are_not_judged_and_hold_nothing():
    class PartlyNaN(FlatGenerator):
        def decode(self, vae_params, latents):
            images = super().decode(vae_params, latents)
            return images.at[0].set(jnp.nan)

    notes, critic = Notes(), ScriptedCritic()
    metrics = evaluator(critic, notes, PartlyNaN(), batch_size=6)(LORA, step=0, epoch=0)
    assert len(critic.pictures) == 2 * 3 and metrics["eval/critic_failure_rate"] == 0.25
    assert metrics["eval/critic_status_image_not_finite"] == 2 and np.isfinite(metrics["eval/reward"])
    assert notes.grids[0][2][0].endswith("| not judged")


def test_nothing_is_judged_when_none_is_asked_for():
    critic = ScriptedCritic()
    assert evaluator(critic, Notes(), judged=0)(LORA, step=0, epoch=0) == {}
    assert len(critic.pictures) == 0


@pytest.mark.fault("not-finite")
def test_the_oracle_reads_the_pixels(monkeypatch, tmp_path):
    records = [
        {"tag": "colors", "include": [{"class": kind, "count": 1, "color": color}], "prompt": f"a {color} {kind}"}
        for color, kind in (("red", "square"), ("blue", "circle"))
    ]
    rng = np.random.default_rng(0)
    pictures = np.stack([render(sample_scene(rng, Prompt.from_json(record))) for record in records])
    prompts = [PromptRecord(record.pop("prompt"), metadata=record) for record in records]

    class Painter(FlatGenerator):
        """Paints the scene that belongs to the prompt's place in the list."""

        def condition(self, prompts, settings, images=None, sizes=None):
            return np.arange(len(prompts), dtype=np.float32)[:, None], None

        def rollout(self, params, lora, noise, sigmas, conditioning, **_):
            return conditioning[:, None, None] + jnp.zeros_like(noise)

        def decode(self, vae_params, latents):
            return jnp.asarray(pictures)[latents[:, 0, 0, 0].astype(int)]

    def ask(prompts):
        return evaluator(ScriptedCritic(), Notes(), Painter(), prompts, oracle=True, judged=0)(LORA, step=0, epoch=0)

    def decode_nothing(self, vae_params, latents):
        return jnp.full((len(latents), *pictures.shape[1:]), jnp.nan)

    notes = Notes(tmp_path)
    evaluator(ScriptedCritic(), notes, Painter(), prompts[::-1], oracle=True)(LORA, step=0, epoch=0)
    truth = [[j["oracle"] for j in record["judgements"]] for _, record in gallery.read(tmp_path / "judged")[0]]
    assert len(truth) == 4 and all(0 <= instruction < 1 and quality is None for instruction, quality in truth)

    right, wrong, half = ask(prompts), ask(prompts[::-1]), ask([prompts[0], prompts[0]])
    assert right["eval/oracle_accuracy"] == right["eval/oracle_fraction"] == 1
    assert right["eval/oracle_accuracy_se"] == right["eval/oracle_fraction_se"] == 0
    assert wrong["eval/oracle_accuracy"] == 0 and wrong["eval/oracle_fraction"] < 1
    monkeypatch.setattr(Painter, "decode", decode_nothing)
    assert ask(prompts)["eval/oracle_accuracy"] == 0
    # Two prompts, one always right and one always wrong: three images of each make it no more certain than one.
    assert half["eval/oracle_accuracy"] == 0.5 and half["eval/oracle_accuracy_se"] == pytest.approx(0.5)


def test_the_standard_error_of_independent_values_is_the_usual_one():
    values = np.random.default_rng(0).normal(size=40)
    np.testing.assert_allclose(clustered_error(values, np.arange(40)), values.std(ddof=1) / np.sqrt(40))


def test_repeating_a_prompt_does_not_make_it_more_certain():
    values = np.random.default_rng(0).normal(size=40)
    once = clustered_error(values, np.arange(40))
    np.testing.assert_allclose(clustered_error(np.tile(values, 3), np.tile(np.arange(40), 3)), once)


@pytest.mark.parametrize("clusters", [np.zeros(4, int), np.arange(4)])
def test_equal_values_have_no_error(clusters):
    assert clustered_error(np.ones(4), clusters) == 0
