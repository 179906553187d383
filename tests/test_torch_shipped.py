"""The miniature that ships with the package, opened by PyTorch's own classes: the same pictures, the same words."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus  # noqa: E402
from test_torch_critic import torch_inputs  # noqa: E402
from test_torch_qwen_image_generator import packed, reference  # noqa: E402
from transformers import Qwen3VLForConditionalGeneration  # noqa: E402

from firm_jax import Critic, Generator  # noqa: E402
from firm_jax.embedded import embedded_path  # noqa: E402
from firm_jax.shapes import edit_teach, teach  # noqa: E402
from firm_jax.shapes.edits import edits  # noqa: E402
from firm_jax.shapes.render import render, to_pil  # noqa: E402

PROMPTS = ["a red circle", "two large green squares on a black background", "a blue cross above a yellow triangle"]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name, text_tokens", [("sd3", 17), ("qwen_image", 32)])
def test_diffusers_draws_the_same_pictures(name, text_tokens, guidance):
    folder = embedded_path(f"embedded:{name}")
    noise = np.random.default_rng(0).normal(size=(len(PROMPTS), 16, 8, 8)).astype(np.float32)
    if name == "sd3":
        given = {"guidance_scale": guidance, "max_sequence_length": text_tokens, "latents": torch.from_numpy(noise)}
    else:
        negative = [" "] * len(PROMPTS) if guidance > 1 else None
        given = {"true_cfg_scale": guidance, "negative_prompt": negative, "latents": packed(noise)}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPTS, num_inference_steps=6, height=64, width=64, output_type="np", **given).images
    ours = Generator.from_pretrained(folder, dtype="float32").sample(
        PROMPTS, steps=6, guidance=guidance, solver="euler", noise=noise, height=64, width=64,
        max_text_tokens=text_tokens,
    )  # fmt: skip
    assert theirs.std() > 0.1
    assert np.abs(ours - theirs).max() <= 1e-3


def test_diffusers_makes_the_same_edits(monkeypatch):
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 64 * 64)
    folder = embedded_path("embedded:qwen_image_edit")
    scenes, asked = zip(*edits("test", 2, seed=2)[::2], strict=True)
    sources, texts = [to_pil(render(scene)) for scene in scenes], [edit.text for edit in asked]
    noise = np.random.default_rng(0).normal(size=(len(texts), 16, 8, 8)).astype(np.float32)
    pipeline = reference("QwenImageEditPlusPipeline", folder)
    with torch.no_grad():
        theirs = [
            pipeline(
                image=[source], prompt=text, true_cfg_scale=1.0, height=64, width=64, num_inference_steps=6,
                latents=packed(row), output_type="np",
            ).images[0]
            for source, text, row in zip(sources, texts, np.split(noise, len(texts)), strict=True)
        ]  # fmt: skip
    generator = Generator.from_pretrained(folder, dtype="float32")
    areas = {"source_area": 64 * 64, "condition_area": 64 * 64}
    ours = generator.sample(texts, sources, steps=6, guidance=1.0, noise=noise, height=64, width=64, **areas)
    assert np.std(theirs) > 0.1
    assert np.abs(ours - np.stack(theirs)).max() <= 1e-3


@pytest.mark.parametrize(
    "critic, example",
    [("critic_gen", teach.critic_example), ("critic_edit", edit_teach.critic_example)],
    ids=["pictures", "edits"],
)
def test_transformers_writes_the_same_words(critic, example):
    folder = embedded_path(f"embedded:{critic}")
    critic = Critic.from_pretrained(folder, dtype="float32")
    rng = np.random.default_rng(1)
    requests = []
    for images, task, text, _ in (example(rng) for _ in range(6)):
        images = images if isinstance(images, tuple) else (images,)
        requests.append({"images": [to_pil(image) for image in images], "text": critic.rubrics[task].fill(text)})
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    inputs, tokenizer = torch_inputs(folder, requests)
    written = model.generate(**inputs, max_new_tokens=96, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    ours = critic.generate(requests, max_new_tokens=96)
    assert ours == tokenizer.batch_decode(written, skip_special_tokens=True)
