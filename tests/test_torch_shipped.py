"""The miniature that ships with the package, opened by PyTorch's own classes: the same pictures, the same words."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from test_torch_critic import torch_inputs  # noqa: E402
from transformers import Qwen3VLForConditionalGeneration  # noqa: E402

from firm_jax import Critic, Generator  # noqa: E402
from firm_jax.embedded import embedded_path  # noqa: E402
from firm_jax.shapes.render import to_pil  # noqa: E402
from firm_jax.shapes.teach import critic_example  # noqa: E402

PROMPTS = ["a red circle", "two large green squares on a black background", "a blue cross above a yellow triangle"]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_diffusers_draws_the_same_pictures(guidance):
    folder = embedded_path("embedded:sd3")
    noise = np.random.default_rng(0).normal(size=(len(PROMPTS), 16, 8, 8)).astype(np.float32)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=PROMPTS,
        num_inference_steps=6,
        guidance_scale=guidance,
        height=64,
        width=64,
        max_sequence_length=17,
        latents=torch.from_numpy(noise),
        output_type="np",
    ).images
    generator = Generator.from_pretrained(folder, dtype="float32")
    ours = generator.sample(
        PROMPTS, steps=6, guidance=guidance, solver="euler", noise=noise, height=64, width=64, max_text_tokens=17
    )
    assert theirs.std() > 0.1
    assert np.abs(ours - theirs).max() <= 1e-3


def test_transformers_writes_the_same_words():
    folder = embedded_path("embedded:critic_gen")
    critic = Critic.from_pretrained(folder, dtype="float32")
    assert {"alignment", "quality"} <= set(critic.rubrics)
    rng = np.random.default_rng(1)
    examples = [critic_example(rng) for _ in range(6)]
    requests = [
        {"images": [to_pil(image)], "text": critic.rubrics[task].fill(prompt)} for image, task, prompt, _ in examples
    ]
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    inputs, tokenizer = torch_inputs(folder, requests)
    written = model.generate(**inputs, max_new_tokens=96, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    ours = critic.generate(requests, max_new_tokens=96)
    assert ours == tokenizer.batch_decode(written, skip_special_tokens=True)
