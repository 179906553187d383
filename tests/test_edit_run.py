"""The RL job over edits with a whole tiny random Qwen-Image-Edit-Plus, and a critic that looks at both pictures."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from critic_miniature import write_miniature
from docs_pages import unexplained
from mesh_job import WritingCritic
from PIL import Image
from test_edit_job import CONFIGS
from test_train import assert_same_run, last_state, lines
from tiny_qwen_image import LORA_TARGETS, tiny_qwen_image

from firm_jax.config import load_config
from firm_jax.mesh import make_mesh
from firm_jax.rl import job, train

# Read back here without saying where the arrays should lie.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the models, three pictures of two sizes, and edits of one and of two of them."""
    folder = tmp_path_factory.mktemp("world")
    tiny_qwen_image(folder / "model")
    write_miniature(folder / "critic")
    (folder / "rubrics").mkdir()
    for criterion in ("edit_execution", "edit_consistency"):
        (folder / "rubrics" / f"{criterion}.txt").write_text(f"{criterion} {{prompt}} {{requirement}}")
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(32, 32), (32, 64), (32, 32)]):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [
        {"prompt": "make it red", "image": "0.png", "requirement": "a square"},
        {"prompt": "make it red", "image": "1.png"},
        {"prompt": "put the circle on the square", "image": ["1.png", "2.png"]},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text('{"prompt": "turn it blue", "image": "2.png"}\n')
    return folder


def config_for(world, epochs):
    """2 edits x 3 pictures of 16 x 20 pixels an epoch."""
    config = load_config(f"{CONFIGS['edit_cme']}:tiny")
    drawn = {"height": 16, "width": 20, "max_text_tokens": 24, "steps": 3, "batch_size": 6}
    config.rollout.update(drawn | {"source_area": 32 * 32, "condition_area": 32 * 32})
    config.eval.update(config.rollout.to_dict() | {"every": 1, "prompts": 1, "judged": 1, "oracle": False})
    flat = {
        "model": str(world / "model"),
        "critic.model": str(world / "critic"),
        "critic.rubrics": str(world / "rubrics"),
        "critic.max_new_tokens": 6,
        "prompts.train": str(world / "train.jsonl"),
        "prompts.held_out": str(world / "test.jsonl"),
        "group.prompts_per_epoch": 2,
        "group.images_per_prompt": 3,
        "lora.rank": 2,
        "lora.targets": LORA_TARGETS,
        "train.epochs": epochs,
        "train.updates_per_epoch": 1,
        "train.micro_batch": 6,
        "train.timesteps": 2,
        "checkpoint.every": 1,
    }
    config.update_from_flattened_dict(flat)
    return config


def run(config, workdir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "Critic", WritingCritic)
        patch.setattr(train, "make_mesh", partial(make_mesh, devices=jax.devices()[:2]))
        train.train(config, str(workdir))


def test_two_epochs_of_editing_move_the_policy_and_a_pause_between_them_changes_nothing(world, tmp_path):
    run(config_for(world, 2), tmp_path / "whole")
    before, *epochs = lines(tmp_path / "whole" / "metrics.jsonl")
    assert unexplained({name for line in (before, *epochs) for name in line}) == [], (
        "docs/metrics.md is to say what it is"
    )
    assert before["eval/reward"] is not None
    for line in epochs:
        assert line["reward/std"] > 0 and line["loss/total"] > 0 and line["grad/norm"] > 0
        assert {"reward/execution", "reward/consistency"} <= set(line)
    state = last_state(tmp_path / "whole")
    moved = {name.split("/")[0] for name, array in state.items() if name.endswith("/b") and np.any(array)}
    assert {"lora", "old", "ema"} <= moved and state["step"] == 2
    drawn = {(r["prompt"], *r["sources"]) for r in lines(tmp_path / "whole" / "judgements.jsonl")}
    assert len(drawn) == 3

    run(config_for(world, 1), tmp_path / "paused")
    run(config_for(world, 2), tmp_path / "paused")
    assert_same_run(tmp_path / "paused", tmp_path / "whole")
