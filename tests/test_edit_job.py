"""The RL job over edits: sources beside the pictures from the files to the report, on a tiny random pipeline."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from scripted import ScriptedCritic
from test_train import last_state, lines
from test_train import run as train_with
from tiny_pipeline import tiny_generator

from firm_jax import gallery
from firm_jax.config import all_keys, load_config
from firm_jax.errors import ConfigError, DataError
from firm_jax.generation import generator as generators
from firm_jax.generation.sd3 import SD3Generator
from firm_jax.mesh import make_mesh
from firm_jax.rl import checks, job, train
from firm_jax.rl.programs import RLPrograms

ROOT = Path(__file__).parents[1]
CONFIGS = {name: ROOT / "configs" / f"{name}.py" for name in ("gen_qma", "edit_cme")}

# Read back here without saying where the arrays should lie.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


class EditingSD3(SD3Generator):
    """A pipeline that takes source images, and draws as if there were none."""

    edits, max_images = True, 2

    def condition(self, prompts, settings, images=None, sizes=None):
        assert [len(sources) for sources in images] and len(images) == len(prompts)
        return super().condition(prompts, settings)


@pytest.fixture
def editing(monkeypatch):
    for module in (generators, job):
        monkeypatch.setattr(module, "pipeline_class", lambda index: EditingSD3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, four pictures and edits of them: two of one picture, two of one text."""
    folder = tmp_path_factory.mktemp("world")
    tiny_generator(t5=False, num_layers=2, dual_attention_layers=()).save_pretrained(folder / "model")
    (folder / "images").mkdir()
    for number in range(4):
        pixels = np.full((16 + 8 * number, 24, 3), 60 * number, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    rows = [
        {"prompt": "make it red", "image": "images/0.png", "requirement": "keep the sky"},
        {"prompt": "make it red", "image": "images/1.png"},
        {"prompt": "add a star", "image": ["images/0.png", "images/2.png"]},
        {"prompt": "add a dog", "image": ["images/0.png", "images/1.png", "images/2.png"]},
        {"prompt": "no picture"},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(
        '{"prompt": "remove it", "image": "images/3.png"}\n{"prompt": "flip", "image": "images/2.png"}\n'
    )
    return folder


def config_for(world, source="edit_cme", **changed):
    """The tiny job with 3 edits x 2 images of 16 x 16 pixels and two epochs; keys with `__` for dots."""
    config = load_config(f"{CONFIGS[source]}:tiny")
    drawn = {"height": 16, "width": 16, "max_text_tokens": 3, "steps": 3, "batch_size": 6}
    config.rollout.update(drawn)
    config.eval.update(drawn | {"every": 2, "prompts": 2, "images_per_prompt": 1, "judged": 2, "oracle": False})
    if source == "edit_cme":
        config.rollout.source_area = config.eval.source_area = 16 * 24
    flat = {
        "model": str(world / "model"),
        "critic.model": "embedded:critic_gen",  # its tokenizer counts; the judgements are scripted
        "critic.rubrics": str(ROOT / "firm_jax" / "shapes" / "edit_rubrics"),
        "prompts.train": str(world / "train.jsonl"),
        "prompts.held_out": str(world / "test.jsonl"),
        "prompts.max_bad_fraction": 0.5,
        "group.prompts_per_epoch": 3,
        "group.images_per_prompt": 2,
        "lora.rank": 2,
        "lora.targets": ("attn.to_q",),
        "train.epochs": 2,
        "train.updates_per_epoch": 1,
        "train.micro_batch": 6,
        "train.timesteps": 2,
        "checkpoint.every": 1,
    }
    config.update_from_flattened_dict(flat | {name.replace("__", "."): value for name, value in changed.items()})
    return config


class Comparing(ScriptedCritic):
    """Keeps what it is asked, batch by batch."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def judge(self, requests, **given):
        self.batches.append(requests)
        return super().judge(requests, **given)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """The folder of a run of two epochs, and the critic that judged it."""
    workdir, critic = tmp_path_factory.mktemp("runs") / "run", Comparing()
    with pytest.MonkeyPatch.context() as patch:
        for module in (generators, job):
            patch.setattr(module, "pipeline_class", lambda index: EditingSD3)
        train_with(config_for(world), workdir, critic)
    return workdir, critic


def test_the_critic_sees_the_sources_first_and_all_criteria_at_once(finished):
    _, critic = finished
    before, first, second, after = critic.batches
    assert len(first) == len(second) == 3 * 2 * 2 and len(before) == len(after) == 2 * 2
    assert [r["criterion"] for r in first] == ["edit_execution"] * 6 + ["edit_consistency"] * 6
    for request in first:
        *sources, edited = (np.asarray(image) for image in request["images"])
        numbers = {"make it red": [0] if request["requirement"] else [1], "add a star": [0, 2]}[request["prompt"]]
        assert request["requirement"] in ("keep the sky", "")
        assert [int(source[0, 0, 0]) // 60 for source in sources] == numbers
        assert edited.shape == (16, 16, 3)
        # In their own proportions, and, to rounding, no larger than the generator sees them: 384 pixels.
        assert [source.shape[:2] for source in sources] == [{0: (16, 24), 1: (20, 20), 2: (23, 17)}[n] for n in numbers]
    distinct = {id(image) for request in first for image in request["images"][:-1]}
    assert len(distinct) == 3, "an image is one object for its whole group, and for every edit of it"


def test_judgements_name_their_sources_and_groups_are_of_text_and_source(finished):
    workdir, _ = finished
    records = lines(workdir / "judgements.jsonl")
    groups = [(r["epoch"], r["criterion"], r["prompt"], *r["sources"]) for r in records]
    expected = [("make it red", "images/0.png"), ("make it red", "images/1.png")]
    expected.append(("add a star", "images/0.png", "images/2.png"))
    for epoch in range(2):
        for criterion in ("execution", "consistency"):
            assert sorted(g[2:] for g in groups if g[:2] == (epoch, criterion)) == sorted(2 * expected)
    assert len(records) == 2 * 2 * 6


def test_metrics_and_pictures_are_those_of_edits(finished):
    workdir, _ = finished
    before, *epochs = lines(workdir / "metrics.jsonl")
    assert {"eval/execution", "eval/consistency", "eval/reward"} <= set(before)
    for line in epochs:
        assert {"reward/execution", "reward/consistency", "reward/mean"} <= set(line) and line["loss/total"] > 0
    reasons = [record["reason"] for record in lines(workdir / "quarantine.jsonl")]
    assert len(reasons) == 2 and "3 source images, more than the 2" in reasons[0] and "without an image" in reasons[1]
    assert [path.name for path in sorted((workdir / "images").glob("*.png"))] == ["eval_00000.png", "eval_00002.png"]
    assert re.search(r"<code>images/[012]\.png", (workdir / "report.html").read_text())


def test_edits_are_kept_with_the_sources_that_the_critic_was_shown(finished):
    workdir, critic = finished
    kept, broken = gallery.read(workdir / "images" / gallery.FOLDER)
    kept = [(path, record) for path, record in kept if (record["set"], record["epoch"]) == ("train", 1)]
    assert len(kept) == 6 and not broken
    for path, record in kept:
        request = critic.batches[1][record["image"]]
        assert record["requirement"] == request["requirement"] and len(record["sources"]) == len(request["images"]) - 1
        for file, shown in zip([*gallery.sources_of(path), path], request["images"], strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(shown))


@pytest.mark.fault("hostile-image")
def test_a_source_that_changes_under_the_run_stops_it_saved(world, tmp_path, editing):
    file = world / "images" / "1.png"
    content = file.read_bytes()

    class Careless(ScriptedCritic):
        def judge(self, requests, **given):
            if len(requests) == 3 * 2 * 2:
                file.write_bytes(b"another picture")
            return super().judge(requests, **given)

    try:
        with pytest.raises(DataError, match=r"epoch 2: image 'images/1.png' has changed.*saved in"):
            train_with(config_for(world, checkpoint__every=0), tmp_path, Careless())
    finally:
        file.write_bytes(content)
    assert last_state(tmp_path)["step"] == 1
    train_with(config_for(world, checkpoint__every=0), tmp_path)
    assert [line["epoch"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    for thing in (job.Generator, job.Critic):
        monkeypatch.setattr(thing, "from_pretrained", lambda *args, **given: pytest.fail("loaded"))


@pytest.mark.fault("wrong-config")
@pytest.mark.parametrize(
    "source, change, named",
    [
        ("gen_qma", {}, r"'qma' asks for instruction, quality.*text alone.*edits source images.*cme.*edit_cme.py"),
        ("gen_qma", {"reward.name": "cme"}, "no prompts.image_folder, rollout.source_area.*configs/edit_cme.py"),
        ("edit_cme", {"rollout.source_area": 0}, "rollout.source_area is 0; it is a number of pixels"),
        ("edit_cme", {"reward.name": "execution_only"}, r"does not take.*base.*reward.weights=\"{}\""),
    ],
)
def test_what_does_not_go_with_an_editing_pipeline_is_told_first(
    world, tmp_path, editing, nothing_is_loaded, source, change, named
):
    config = config_for(world, source)
    config.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=named):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("wrong-config")
def test_a_plan_tells_it_too():
    config = load_config(str(CONFIGS["gen_qma"]))
    config.model = "Qwen/Qwen-Image-Edit-2509"
    with pytest.raises(ConfigError, match=r"'qma' asks for instruction, quality.*edits source images"):
        RLPrograms(config, make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]))


@pytest.mark.parametrize("variant", ["", ":code", ":tiny"])
def test_the_recipes_differ_in_nothing_but_what_only_editing_has(variant):
    edit, drawn = (load_config(f"{source}{variant}") for source in (CONFIGS["edit_cme"], CONFIGS["gen_qma"]))
    assert set(all_keys(edit)) - set(all_keys(drawn)) == set(checks.EDITING)
    assert not set(all_keys(drawn)) - set(all_keys(edit))
    checks.check_config(edit)
