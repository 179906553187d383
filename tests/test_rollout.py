"""Drawing and judging an epoch's images: each its own noise, one program, and no number for a failed judgement."""

import contextlib
import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import FlatGenerator, ScriptedCritic, judgement

from firm_jax.data.prompts import PromptRecord
from firm_jax.mesh import make_mesh
from firm_jax.rl.rollout import judge, judgement_metrics, make_sampler, scores, write_judgements

SETTINGS = {"steps": 2, "solver": "euler", "guidance": 1.0, "height": 2, "width": 2, "max_text_tokens": 4}
PROMPTS = ["a", "bb", "ccc"]
ROWS, NUMBERS = np.array([0, 2, 1, 0, 2], np.int32), np.array([7, 8, 9, 10, 11], np.uint32)
KEY = jax.random.key(2)
ZERO = {"shift": np.float32(0)}


def sampler(generator, **changed):
    return make_sampler(generator, SimpleNamespace(**SETTINGS | {"batch_size": 5} | changed), generator.mesh)


def draw(generator, rows=ROWS, numbers=NUMBERS, lora=ZERO, **changed):
    conditioned = generator.condition(PROMPTS, SimpleNamespace(**SETTINGS | changed))
    return sampler(generator, **changed)(lora, conditioned, rows, numbers, KEY)


@pytest.fixture(scope="module")
def drawn():
    return draw(FlatGenerator())


def test_latents_and_images_are_of_the_prompt_and_the_number(drawn):
    latents, images = drawn
    assert latents.shape == (5, 2, 2, 3) and images.shape == (5, 2, 2, 3) and images.dtype == np.float32
    noise = jax.vmap(lambda n: jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, 0), n), (2, 2, 3)))(NUMBERS)
    lengths = np.array([1, 3, 2, 1, 3], np.float32)[:, None, None, None]
    np.testing.assert_allclose(latents, noise + lengths, rtol=1e-5)
    np.testing.assert_allclose(images, np.clip(0.03 * latents, 0, 1), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_an_image_does_not_depend_on_its_batch(drawn, batch_size):
    jax.tree.map(np.testing.assert_array_equal, draw(FlatGenerator(), batch_size=batch_size), drawn)
    alone = draw(FlatGenerator(), ROWS[3:4], NUMBERS[3:4], batch_size=batch_size)
    np.testing.assert_array_equal(alone[1][0], drawn[1][3])


@pytest.mark.parametrize("batch_size", [2, 5])  # neither divides over the mesh's four parts of a batch
def test_eight_devices_draw_the_images_of_one(drawn, batch_size):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        spread = draw(FlatGenerator(mesh), batch_size=batch_size)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), spread, drawn)


def test_all_policies_are_one_program(drawn):
    generator = FlatGenerator()
    sample, conditioned = sampler(generator, batch_size=2), generator.condition(PROMPTS, SimpleNamespace(**SETTINGS))
    policies = [{"shift": np.float32(shift)} for shift in (0, 1, 2)]
    zero, one, _ = (sample(policy, conditioned, ROWS, NUMBERS, KEY)[0] for policy in policies)
    assert generator.programs == 1
    np.testing.assert_allclose(one, zero + 1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guidance, guided", [(1.0, False), (4.5, True)])
def test_only_guidance_above_one_needs_the_empty_prompt(guidance, guided):
    generator = FlatGenerator()
    draw(generator, guidance=guidance)
    assert generator.guided == guided


# Judging


RECORDS = [PromptRecord("a red circle", "only one"), PromptRecord("two squares")]


def test_the_critic_is_asked_once_for_every_criterion_of_every_image():
    class Listening(ScriptedCritic):
        def judge(self, requests, **given):
            self.requests, self.given = requests, given
            return super().judge(requests, **given)

    critic, images = Listening(), np.stack([np.full((2, 2, 3), 0.2), np.full((2, 2, 3), 0.9)])
    judged = judge(
        critic, images, RECORDS, [[], []], ["instruction", "quality"], SimpleNamespace(max_new_tokens=9), progress=list
    )
    assert critic.given == {"max_new_tokens": 9, "progress": list}
    seen = [
        (r["criterion"], r["prompt"], r["requirement"], np.asarray(r["images"][0])[0, 0, 0]) for r in critic.requests
    ]
    assert seen == [
        ("alignment", "a red circle", "only one", 51),
        ("alignment", "two squares", "", 230),
        ("quality", "a red circle", "only one", 51),
        ("quality", "two squares", "", 230),
    ]
    assert {name: [j.criterion for j in found] for name, found in judged.items()} == {
        "instruction": ["alignment"] * 2,
        "quality": ["quality"] * 2,
    }
    assert critic.requests[0]["images"][0] is critic.requests[2]["images"][0]


def test_scores_are_on_a_scale_of_one_and_the_lowest_sub_score_counts():
    found = [judgement("quality", (5, 3, 4), 2.0), judgement("alignment", 1, 1.5), judgement("alignment", None)]
    values, exist = scores(found, "parsed")
    np.testing.assert_allclose(values, [0.5, 0, np.nan])
    np.testing.assert_array_equal(exist, [True, True, False])
    np.testing.assert_allclose(scores(found, "expected")[0], [0.25, 0.125, np.nan])


@pytest.mark.fault("missing-reward")
def test_metrics_count_what_is_missing_and_average_the_rest():
    judged = {
        "instruction": [judgement("alignment", 5, 4.0, 0.2), judgement("alignment", None, status="no_score")],
        "quality": [judgement("quality", (3, 3, 3), None, 0.6), judgement("quality", (1, 5, 5), 2.0, None)],
    }
    parsed, expected = (judgement_metrics(judged, kind) for kind in ("parsed", "expected"))
    assert parsed == {
        "critic/failure_rate": 0.25,
        "critic/status/no_score": 1,
        "critic/entropy": pytest.approx(0.4),
        "reward/instruction": 1.0,
        "reward/quality": 0.25,
    }
    # A score whose digit's probabilities are unknown is no expected score.
    assert expected["critic/failure_rate"] == 0.5
    assert expected["critic/status/no_score"] == 1 and expected["critic/status/no_expected_score"] == 1
    assert expected["reward/instruction"] == 0.75 and expected["reward/quality"] == 0.25


@pytest.mark.fault("silent-critic")
def test_metrics_of_a_critic_that_never_answers_are_unknown():
    judged = {"instruction": [judgement("alignment", None, status="empty")] * 2}
    assert judgement_metrics(judged, "parsed") == {
        "critic/failure_rate": 1.0,
        "critic/status/empty": 2,
        "critic/entropy": None,
        "reward/instruction": None,
    }


@pytest.mark.fault("missing-reward")
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_an_expected_score_that_is_not_finite_is_none(value):
    judged = {"instruction": [judgement("alignment", 5, value), judgement("alignment", 4, 3.0)]}
    values, exist = scores(judged["instruction"], "expected")
    np.testing.assert_array_equal(values, [np.nan, 0.5])
    np.testing.assert_array_equal(exist, [False, True])
    metrics = judgement_metrics(judged, "expected")
    assert metrics["critic/failure_rate"] == 0.5 and metrics["reward/instruction"] == 0.5
    assert metrics["critic/status/no_expected_score"] == 1


class PartlyNaN(FlatGenerator):
    """Its network gives NaN for the prompts "bb", in the latents or, with `decoded`, only in the pixels."""

    def __init__(self, mesh=None, decoded=False):
        super().__init__(mesh)
        self.decoded = decoded

    def rollout(self, params, lora, noise, sigmas, conditioning, **given):
        latents = super().rollout(params, lora, noise, sigmas, conditioning, **given)
        bad = conditioning[:, None, None] == 2
        return jnp.where(bad, 1e9 if self.decoded else jnp.inf, latents)

    def decode(self, vae_params, latents):
        return jnp.where(latents == 1e9, jnp.nan, super().decode(vae_params, latents))


@pytest.mark.fault("not-finite")
@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("sizes", [None, (8, 1, 1), (2, 2, 2)])
def test_an_image_that_is_not_finite_is_alone_in_that_and_is_not_shown_to_the_critic(drawn, decoded, sizes):
    mesh = sizes and make_mesh(*sizes)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        _, images = draw(PartlyNaN(mesh, decoded), batch_size=8)
    bad = ROWS == 1
    assert np.isnan(images[bad]).all()
    np.testing.assert_allclose(images[~bad], drawn[1][~bad], rtol=1e-6)
    critic, records = ScriptedCritic(), [PromptRecord(PROMPTS[row]) for row in ROWS]
    none, settings = [[] for _ in ROWS], SimpleNamespace(max_new_tokens=9)
    judged = judge(critic, images, records, none, ["instruction", "quality"], settings, list)
    kept = [record for record, b in zip(records, bad, strict=True) if not b]
    alone = judge(critic, images[~bad], kept, none[: len(kept)], ["quality"], settings, list)
    assert len(critic.pictures) == 2 * 4 + 4
    for found in judged.values():
        assert [j.status for j in found] == ["image_not_finite" if b else "ok" for b in bad]
    assert [j for j, b in zip(judged["quality"], bad, strict=True) if not b] == alone["quality"]
    assert judgement_metrics(judged, "parsed")["critic/status/image_not_finite"] == 2


def test_every_judgement_becomes_a_record_of_json():
    written = []
    run = SimpleNamespace(judgements=written.extend)
    judged = {"instruction": [judgement("alignment", 4, 3.9), judgement("alignment", None, status="truncated")]}
    write_judgements(run, 6, RECORDS, judged, np.array([0.75, np.nan], np.float32))
    first, second = (json.loads(json.dumps(record, allow_nan=False)) for record in written)
    assert first == {
        "epoch": 6,
        "image": 0,
        "prompt": "a red circle",
        "criterion": "instruction",
        "score": 4,
        "expected": 3.9,
        "entropy": 0.5,
        "status": "ok",
        "reason": "why",
        "text": "I saw 4",
        "rubric": "a1b2",
        "reward": 0.75,
    }
    assert second["score"] is None and second["reward"] is None and second["status"] == "truncated"
