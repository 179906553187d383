"""The held-out numbers of an editing run: what the oracle finds against the source, and pictures beside sources."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scripted import FlatGenerator, ScriptedCritic
from test_evaluate import LORA, Notes, config

from firm_jax.data.edits import read_edits
from firm_jax.data.images import from_array, to_array
from firm_jax.errors import DataError
from firm_jax.rl.evaluate import Evaluator, edit_oracle
from firm_jax.rl.rewards import resolve_reward
from firm_jax.rl.rollout import shown_size, shown_sources
from firm_jax.shapes.edits import sample_edit, sample_source, sample_target
from firm_jax.shapes.render import render

AREAS = {"source_area": 64 * 64, "condition_area": 64 * 64, "crop_sources": False}


def read(folder, rows, max_images=2):
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, quarantined = read_edits(folder / "edits.jsonl", max_images=max_images)
    assert not quarantined
    return records


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    """Four edits, the first two of one source; the sources and what should come of them, [4, 64, 64, 3]."""
    folder, rng = tmp_path_factory.mktemp("edits"), np.random.default_rng(5)
    rows, before, after = [], [], []
    scenes = [sample_source(rng) for _ in range(3)]
    for number, difficulty in ((0, "easy"), (0, "medium"), (1, "hard"), (2, "easy")):
        edit = sample_edit(rng, scenes[number], difficulty)
        from_array(render(scenes[number])).save(folder / f"{number}.png")
        rows.append(edit.to_json() | {"image": f"{number}.png"})
        before.append(render(scenes[number]))
        after.append(render(sample_target(rng, scenes[number], edit)))
    return read(folder, rows), np.stack(before), np.stack(after)


def painter(pictures):
    """A generator that paints picture n for the n-th of the edits."""

    class Painter(FlatGenerator):
        def condition(self, prompts, settings, images=None, sizes=None):
            return np.arange(len(prompts), dtype=np.float32)[:, None], None

        def rollout(self, params, lora, noise, sigmas, conditioning, **_):
            return conditioning[:, None, None] + jnp.zeros_like(noise)

        def decode(self, vae_params, latents):
            return jnp.asarray(pictures)[latents[:, 0, 0, 0].astype(int)]

    return Painter()


def evaluate(records, pictures, notes=None, critic=None, **changed):
    settings = {"prompts": 4, "images_per_prompt": 2, "judged": 0, "oracle": True} | AREAS | changed
    given = critic or ScriptedCritic(), resolve_reward("cme"), records, config(**settings), jax.random.key(4)
    return Evaluator(notes or Notes(), painter(pictures), *given)(LORA, step=0, epoch=0)


def test_the_oracle_asks_what_was_carried_out_and_what_was_kept(edits):
    records, before, after = edits
    right, untouched = evaluate(records, after), evaluate(records, before)
    names = ("execution", "preservation", "edit", "accuracy")
    assert set(right) == {f"eval/oracle_{name}{error}" for name in names for error in ("", "_se")}
    assert all(right[f"eval/oracle_{name}"] == 1 and right[f"eval/oracle_{name}_se"] == 0 for name in names)
    assert [untouched[f"eval/oracle_{name}"] for name in names] == [0, 1, 0, 0]
    # Two of four edits done; two pictures of each make it no more certain.
    half = evaluate(records, np.concatenate([after[:2], before[2:]]))
    assert half["eval/oracle_edit"] == 0.5 and half["eval/oracle_edit_se"] == pytest.approx(0.5 / np.sqrt(3))
    found = edit_oracle(records)(np.concatenate([after, before[::-1]]), np.tile(np.arange(4), 2))
    np.testing.assert_array_equal(found["edit"], found["execution"] * found["preservation"])
    assert (found["preservation"][4:] < 1).all() and (found["edit"] < found["execution"]).any()


@pytest.mark.fault("not-finite")
def test_an_edit_that_is_not_finite_keeps_nothing(edits):
    records, _, after = edits
    lost = evaluate(records, np.full_like(after, np.nan))
    assert lost["eval/oracle_accuracy"] == 0 and lost["eval/oracle_edit"] < 0.5


def test_edits_that_are_not_of_the_shapes_world_have_no_oracle(edits, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="shapes edit without"):
        edit_oracle(read(tmp_path, [{"prompt": "make it red", "image": "a.png"}]))


def test_the_grid_shows_every_edit_beside_its_source_with_instruction_and_scores(edits):
    records, before, after = edits
    notes, critic, grids = Notes(), ScriptedCritic(), []
    notes.images = lambda tag, images, captions, **at: grids.append((tag, np.asarray(images), captions))
    metrics = evaluate(records, after, notes, critic, judged=3)
    assert {"eval/reward", "eval/execution", "eval/consistency"} <= set(metrics)
    [(tag, images, captions)] = grids
    assert tag == "eval" and images.shape == (8, 64, 64 + 4 + 64, 3)
    order = np.tile(np.arange(4), 2)
    np.testing.assert_allclose(images[:, :, :64], before[order], atol=0.01)
    np.testing.assert_allclose(images[:, :, -64:], after[order], atol=0.01)
    assert [caption.split(" | ")[0] for caption in captions] == [records[row].text for row in order]
    assert all(name in captions[2] for name in ("reward", "execution", "consistency")) and captions[3].endswith(" | ")
    for (source,), record in zip(critic.sources[:3], records, strict=False):
        np.testing.assert_array_equal(source, np.asarray(record.images[0].open()))


def test_several_sources_share_a_tile_whole(tmp_path):
    Image.new("RGB", (64, 32), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 64), (0, 0, 255)).save(tmp_path / "b.png")
    notes, grids = Notes(), []
    notes.images = lambda tag, images, captions, **at: grids.append(np.asarray(images))
    records = read(tmp_path, [{"prompt": "both", "image": ["a.png", "b.png"]}])
    evaluate(records, np.zeros((1, 64, 64, 3), np.float32), notes, prompts=1, oracle=False, images_per_prompt=1)
    [[shown]] = grids
    colours = np.rint(shown[[32, 32, 4, 60, 32, 32], [16, 48, 16, 48, 66, 90]])
    np.testing.assert_array_equal(colours, [[1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize(
    "size, changed, expected",
    [
        ((64, 64), {}, (64, 64)),
        ((32, 20), {}, (32, 20)),  # never enlarged
        ((1024, 1024), {}, (64, 64)),
        ((1000, 250), {}, (128, 32)),
        ((1000, 250), {"crop_sources": True}, (64, 64)),
        ((100, 40), {"crop_sources": True}, (40, 40)),
        ((90, 300), {"crop_sources": True, "height": 2, "width": 4, "source_area": 10**6}, (90, 180)),
    ],
)
def test_sources_are_shown_as_large_as_the_generator_sees_them(size, changed, expected, tmp_path):
    settings = config(**AREAS | {"height": 64, "width": 64} | changed).eval
    assert shown_size(*size, settings) == expected
    ramp = np.broadcast_to(np.linspace(0, 1, size[1])[None, :, None], (*size, 3))
    from_array(ramp).save(tmp_path / "a.png")
    [[shown]] = shown_sources(read(tmp_path, [{"prompt": "x", "image": "a.png"}]), settings)
    assert shown.shape == (*expected, 3) and shown.dtype == np.uint8
    cut = (1 - min(1, expected[1] / expected[0] * size[0] / size[1])) / 2  # at either side, as a share of the width
    assert abs(to_array(Image.fromarray(shown))[0, 0, 0] - cut) < 0.03
