"""What is planned for the prompts of Qwen-Image and its edits is what encoding them runs."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_qwen_image import tiny_qwen_image

from firm_jax.generation import Generator
from firm_jax.generation.programs import encoding
from firm_jax.mesh import make_mesh
from firm_jax.rl.programs import abstract_generator

PROMPTS = ["a red circle", "draw a blue square", "put it on the red background"]
SETTINGS = {
    "height": 16,
    "width": 24,
    "max_text_tokens": 40,
    "source_area": 96 * 96,
    "condition_area": 64 * 64,
    "crop_sources": False,
}


def kinds(tree) -> list[tuple]:
    return [(leaf.shape, np.dtype(leaf.dtype), leaf.sharding) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("pipeline", ["QwenImagePipeline", "QwenImageEditPlusPipeline"])
def test_what_is_planned_is_what_is_run(tmp_path, monkeypatch, pipeline, guidance):
    tiny_qwen_image(tmp_path, pipeline)
    mesh = make_mesh(data=2, fsdp=2, tensor=1, devices=jax.devices()[:4])
    settings = SimpleNamespace(**SETTINGS, guidance=guidance)
    generator = Generator.from_pretrained(tmp_path, dtype="float32", mesh=mesh)
    run: dict[str, list] = {}

    def recorded(name, function):
        def call(*arguments):
            run.setdefault(name, []).append(arguments)
            return function(*arguments)

        return call

    images = None
    if generator.edits:
        images = [np.random.default_rng(seed).integers(0, 256, (128, 128, 3), np.uint8) for seed in range(3)]
        wrapped = recorded("VAE encode", generator.encode_sources_jitted)
        monkeypatch.setattr(generator, "encode_sources_jitted", wrapped)
    text = generator.text_encoder
    monkeypatch.setattr(text, "encode_jitted", recorded("encode prompts", text.encode_jitted))
    with jax.set_mesh(mesh):
        conditioning, negative = generator.condition(PROMPTS, settings, images)
    planned = encoding(abstract_generator(str(tmp_path), "float32", mesh), mesh, len(PROMPTS), settings)

    assert kinds(planned.conditioning) == kinds(conditioning)
    assert kinds(planned.negative) == kinds(negative) and (negative is None) == (guidance == 1)
    programs = {program.name: program for program in planned.programs}
    assert set(programs) == set(run)
    for name, calls in run.items():
        # Without pictures the empty prompt is a smaller batch of its own.
        calls = calls if generator.edits else calls[:1]
        assert programs[name].calls == len(calls)
        for arguments in calls:
            assert kinds(programs[name].arguments) == kinds(arguments), name
        assert programs[name].flops > 0
