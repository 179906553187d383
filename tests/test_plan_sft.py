"""`--plan` of a critic's fine-tuning: what is planned is what the job runs."""

import json
import math

import jax
import pytest
from critic_miniature import TEXTS, picture, write_miniature
from ml_collections import ConfigDict

from firm_jax.config import load_config
from firm_jax.critic import sft
from firm_jax.critic.sft_programs import SFTPrograms
from firm_jax.errors import ConfigError
from firm_jax.mesh import make_mesh
from firm_jax.plan import measure

SIDE, EXAMPLES = 32, 12


class Begun(Exception):
    """The first step was about to be taken."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A critic, and conversations of two images each that are as large as the config allows."""
    folder = tmp_path_factory.mktemp("world")
    write_miniature(folder / "critic")
    lines = []
    for number in range(EXAMPLES):
        names = [f"{number}_{place}.png" for place in range(2)]
        for place, name in enumerate(names):
            picture(10 * number + place, SIDE, SIDE).save(folder / name)
        answer = {"role": "assistant", "content": '{"reasoning": "as asked", "score": [4]}'}
        question = {"role": "user", "content": "<image><image>" + TEXTS[0][:20]}
        lines.append(json.dumps({"messages": [question, answer], "images": names}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


def config_for(world, **changed) -> ConfigDict:
    config = load_config("configs/critic_sft.py:tiny_edit")
    given = {
        "critic.model": str(world / "critic"), "data.source": str(world / "train.jsonl"), "data.held_out_share": 0.1,
        "data.max_pixels": SIDE * SIDE, "train.batch_size": 8, "train.examples_per_device": 2, "train.lengths": (96,),
        "train.packed_images": 4, "eval.bench": None, "eval.batch_size": 4, "eval.max_new_tokens": 8,
        "mesh.data": 1, "mesh.fsdp": 2,
    }  # fmt: skip
    config.update_from_flattened_dict(given | changed)
    return config


def laid_out(tree) -> list:
    """Shape, dtype and place of every array of a tree, with its path."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        spec = tuple(leaf.sharding.spec) if len(leaf.sharding.device_set) > 1 else ()
        while spec and spec[-1] is None:
            spec = spec[:-1]
        found.append((jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), spec))
    return found


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"train.moment_dtype": "bfloat16", "train.param_dtype": "bfloat16", "tune.vision": False},
        {"lora.rank": 2, "train.compute_dtype": "bfloat16"},
        {"train.packing": True, "train.batch_size": 4, "train.lengths": (192,)},
    ],
    ids=["whole", "bfloat16", "lora", "packed"],
)
def test_the_first_step_is_given_what_was_planned(world, tmp_path, monkeypatch, changed):
    config, given = config_for(world, **changed), []
    mesh = make_mesh(**config.mesh, devices=jax.devices()[:2])

    def update(*arguments):
        given.append([laid_out(argument) for argument in arguments])
        raise Begun

    with monkeypatch.context() as patch:
        patch.setattr(sft, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[:2]))
        patch.setattr(sft, "make_update", lambda *_, **__: update)
        with pytest.raises(Begun):
            sft.train(config, str(tmp_path / "run"))
    first = next(SFTPrograms(config, mesh).programs())
    planned = [laid_out(argument) for argument in first.arguments]
    for ours, theirs in zip(planned, given[0], strict=True):
        assert sorted(ours) == sorted(theirs)


def test_every_program_is_compiled_and_counted(world):
    config = config_for(world)
    mesh = make_mesh(**config.mesh, devices=jax.devices()[:2])
    job = SFTPrograms(config, mesh)
    programs = {program.name: program for program in job.programs()}
    assert list(programs)[:3] == ["update", "held-out loss", "weights as served"]
    assert {"critic: prefill", "critic: decode"} <= programs.keys()
    assert {program.limit for program in programs.values()} <= {"train.examples_per_device", "eval.batch_size", None}
    needs = measure(programs["weights as served"], mesh)
    params = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(job.critic.params))
    assert needs.output >= params / 2
    # Whole: the gradients of kernels double the backward pass. Through a LoRA there are none.
    lora = next(SFTPrograms(config_for(world, **{"lora.rank": 2}), mesh).programs())
    forward, learning = programs["held-out loss"].flops, programs["update"].flops
    assert learning == 3 * forward and forward < lora.flops == 2 * forward


def test_what_cannot_be_planned_is_said(world):
    config = config_for(world)
    config.critic.model = None
    with pytest.raises(ConfigError, match=r"critic\.model"):
        SFTPrograms(config, make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def test_what_no_evaluation_asks_is_not_compiled(world):
    names = [
        {
            program.name
            for program in SFTPrograms(config, make_mesh(**config.mesh, devices=jax.devices()[:2])).programs()
        }
        for config in (config_for(world), config_for(world, **{"eval.answers": 0}))
    ]
    assert names[1] == {"update", "held-out loss"} < names[0]
