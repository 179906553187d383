"""The RL job in miniature on any mesh: random networks, the critic's among them, and a record of how arrays lay."""

import json
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from critic_miniature import MINIATURE, write_miniature
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp
from scripted import judgement
from tiny_pipeline import tiny_generator

from firm_jax.config import load_config
from firm_jax.critic import Critic, decode
from firm_jax.mesh import make_mesh
from firm_jax.rl import job, train

CONFIG = Path(__file__).parents[1] / "configs" / "gen_qma.py"
PROMPTS = ["a red circle", "two blue squares", "a white star", "a green cross above a red square"]

# Widths that eight devices divide, the generator's heads as many as they are, and no kernel of the shape of an
# activation: programs are searched for shapes.
TRANSFORMER = {
    "num_layers": 6,
    "dual_attention_layers": (),
    "attention_head_dim": 6,
    "num_attention_heads": 8,
    "caption_projection_dim": 48,
    "joint_attention_dim": 56,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 24,  # three a key head: where FSDP is two, a part of q's kernel else has the shape of k's
    "num_key_value_heads": 8,
    "head_dim": 20,
    "rope_parameters": MINIATURE["text"]["rope_parameters"] | {"mrope_section": [4, 3, 3]},
}
VISION = {"hidden_size": 40, "intermediate_size": 56}
RUBRIC = "{prompt}: " + "words that make the question longer than a power of two and a half of it: "


def write_world(folder: Path) -> Path:
    """The models and the prompts that the job reads."""
    tiny_generator(t5=False, **TRANSFORMER).save_pretrained(folder / "model")
    parts = {"text": MINIATURE["text"] | TEXT, "vision": MINIATURE["vision"] | VISION}
    write_miniature(folder / "critic", MINIATURE | {"vocab_size": 304} | parts)
    (folder / "rubrics").mkdir()
    for criterion in ("alignment", "quality"):
        (folder / "rubrics" / f"{criterion}.txt").write_text(f"{criterion} {RUBRIC}")
    (folder / "train.txt").write_text("\n".join(PROMPTS))
    (folder / "held_out.txt").write_text("a yellow ring\nthree white circles\n")
    return folder


def config_for(world: Path, mesh: tuple[int, int, int]) -> ConfigDict:
    """Two epochs of two updates over 2 prompts x 4 images of 16 x 20 pixels, judged by 12 tokens of writing."""
    config = load_config(f"{CONFIG}:tiny")
    size = {"height": 16, "width": 20, "max_text_tokens": 2, "steps": 3, "batch_size": 8}
    config.rollout.update(size | {"solver": "euler"})
    config.eval.update(
        size | {"solver": "euler", "every": 2, "prompts": 2, "images_per_prompt": 4, "judged": 8, "oracle": False}
    )
    config.update_from_flattened_dict(
        {
            "model": str(world / "model"),
            "critic.model": str(world / "critic"),
            "critic.rubrics": str(world / "rubrics"),
            "critic.batch_size": 16,
            "critic.max_new_tokens": 12,
            "prompts.train": str(world / "train.txt"),
            "prompts.held_out": str(world / "held_out.txt"),
            "group.prompts_per_epoch": 2,
            "group.images_per_prompt": 4,
            "lora.rank": 3,
            "train.epochs": 2,
            "train.updates_per_epoch": 2,
            "train.micro_batch": 2,
            "train.timesteps": 2,
            "checkpoint.every": 2,
        }
    )
    config.mesh = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    return config


class WritingCritic(Critic):
    """Random weights write no readable answer: here the score is the sum of the tokens, whatever they say."""

    def judgement(self, criterion, generation):
        score = 1 + int(generation.tokens.sum()) % 5
        probabilities = jax.nn.softmax(generation.digit_logits, axis=-1)
        expected = float(np.mean(probabilities @ np.arange(1.0, 6.0)))
        return judgement(criterion, (5, score, 5) if criterion == "quality" else score, expected)


@dataclass
class Record:
    """What a run left behind and how its arrays lay."""

    workdir: Path
    mesh: jax.sharding.Mesh
    job: "job.Job | None" = None
    images: list = field(default_factory=list)
    gradients: dict | None = None
    state: dict | None = None
    caches: list = field(default_factory=list)
    programs: list[tuple[str, set]] = field(default_factory=list)  # name of each, and the `arrays` in it

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.workdir / name).read_text().splitlines()]

    def last_state(self) -> dict[str, np.ndarray]:
        """The arrays of the last checkpoint, by name."""
        return {name: np.asarray(array) for name, array in ocp.load(self.workdir / "checkpoints/4/state").items()}


def run(world: Path, workdir: Path, sizes: tuple[int, int, int]) -> Record:
    """The production job on the first of the simulated devices."""
    devices = jax.devices()[: int(np.prod(sizes))]
    record = Record(workdir, make_mesh(*sizes, devices=devices))

    class Recorded(job.Job):
        def __init__(self, *args):
            super().__init__(*args)
            record.job = self

        def sample(self, *args):
            latents, images = super().sample(*args)
            record.images.append(images)
            return latents, images

        def end_epoch(self, state, *args):
            record.state = state
            super().end_epoch(state, *args)

    def make_optimizer(settings):
        optimizer = optimizer_of_the_job(settings)

        def update(gradients, *args):
            record.gradients = jax.tree.map(lambda gradient: jax.typeof(gradient).sharding, gradients)
            return optimizer.update(gradients, *args)

        return optax.GradientTransformation(optimizer.init, update)

    def decode_chunk(*args, **given):
        state, *written = decode_chunk_of_the_job(*args, **given)
        record.caches.append(state["cache"])
        return state, *written

    client = devices[0].client
    before = client.live_executables()
    optimizer_of_the_job, decode_chunk_of_the_job = job.make_optimizer, decode.decode_chunk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Job", Recorded)
        patch.setattr(train, "make_mesh", partial(make_mesh, devices=devices))
        patch.setattr(job, "Critic", WritingCritic)
        patch.setattr(job, "make_optimizer", make_optimizer)
        patch.setattr(decode, "decode_chunk", decode_chunk)
        train.train(config_for(world, sizes), str(workdir))
    modules = [program.hlo_modules()[0] for program in client.live_executables() if program not in before]
    record.programs = [(module.name.removeprefix("jit_"), arrays(module.to_string())) for module in modules]
    return record


def arrays(text: str) -> set[tuple[int, ...]]:
    """The shapes, without dimensions of 1, of all float32 arrays that a program's instructions make."""
    made = re.findall(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) [a-z][\w\-]*\(", text, re.MULTILINE)
    shapes = {shape for instruction in made for shape in re.findall(r"f32\[([\d,]+)\]", instruction)}
    return {tuple(int(size) for size in shape.split(",") if size != "1") for shape in shapes}
