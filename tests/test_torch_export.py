"""What `firm-jax export` writes, opened by diffusers, PEFT and transformers as the model card says: the same images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

import jax  # noqa: E402
from tiny_pipeline import tiny_generator  # noqa: E402
from tiny_qwen_image import tiny_qwen_image  # noqa: E402
from tiny_run import LORA, SIZE, card_example, write_run  # noqa: E402
from torch_parity import load_folder  # noqa: E402

from firm_jax.commands import main  # noqa: E402
from firm_jax.embedded import embedded_path  # noqa: E402
from firm_jax.generation import Generator  # noqa: E402
from firm_jax.models.lora import LoraConfig, scaled  # noqa: E402

PROMPTS = ["a red circle", "two big blue squares"]
FEED_FORWARD = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
CHANNELS = {"sd3": 4, "qwen": 5}


@pytest.fixture(scope="module", params=["sd3", "qwen"])
def world(request, tmp_path_factory):
    """Which pipeline, its folder, a run on it, and the run's adapters."""
    folder, workdir = (tmp_path_factory.mktemp(name) for name in ("model", "run"))
    lora = LORA
    if request.param == "sd3":
        tiny_generator().save_pretrained(folder)
    else:
        tiny_qwen_image(folder, "QwenImagePipeline")
        lora = LoraConfig(LORA.rank, LORA.alpha, (*LORA.targets, *FEED_FORWARD))
    generator = Generator.from_pretrained(folder, dtype="float32")
    adapters = write_run(workdir, folder, generator, lora)
    return request.param, generator, workdir, adapters


def noise_for(kind: str) -> np.ndarray:
    shape = (len(PROMPTS), CHANNELS[kind], SIZE["height"] // 2, SIZE["width"] // 2)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def ours(world, adapter: str | None) -> np.ndarray:
    kind, generator, _, adapters = world
    generator.lora = None if adapter is None else scaled(jax.tree.map(jax.numpy.asarray, adapters[adapter]), LORA.scale)
    try:
        return generator.sample(PROMPTS, noise=noise_for(kind), guidance=1.0, **SIZE)
    finally:
        generator.lora = None


def theirs(kind: str, pipe) -> np.ndarray:
    noise = torch.from_numpy(noise_for(kind))
    given = {"guidance_scale": 1.0, "max_sequence_length": SIZE["max_text_tokens"]}
    if kind == "qwen":
        B, C, h, w = noise.shape
        noise = noise.reshape(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 4 * C)
        given = {"true_cfg_scale": 1.0}
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPTS, height=SIZE["height"], width=SIZE["width"], num_inference_steps=SIZE["steps"], latents=noise,
        output_type="np", **given,
    ).images  # fmt: skip


def loaded_as_the_card_says(folder, monkeypatch) -> dict:
    """The variables that the card's example leaves behind, run in the card's folder as it stands."""
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(card_example((folder / "README.md").read_text()), names)
    return names


@pytest.mark.parametrize("format", ["diffusers-lora", "peft", "diffusers"])
def test_pytorch_draws_the_images_that_we_draw(world, format, tmp_path, monkeypatch):
    kind, _, workdir, _ = world
    out = tmp_path / "export"
    assert main(["export", "--workdir", str(workdir), "--format", format, "--out", str(out)]) == 0
    pipe = loaded_as_the_card_says(out, monkeypatch)["pipe"]
    assert (out / "example.png").exists()
    expected = ours(world, "ema")
    assert np.abs(expected - ours(world, None)).max() > 0.05, "the adapter must be seen"
    np.testing.assert_allclose(theirs(kind, pipe), expected, atol=1e-4)


# ComfyUI. The convention of its loader, read anew: a map from the names that a LoRA's file may use to the places in
# its own networks, and for each name the matrices `lora_up` and `lora_down` and a scalar `alpha`.

SD3_PLACES = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def comfyui_network(kind: str, state: dict):
    """ComfyUI's weights of a diffusers transformer, and file name -> (its name for a weight, the rows of it)."""
    if kind == "qwen":
        weights = {name: weight.clone() for name, weight in state.items() if name.endswith(".weight")}
        return weights, {f"transformer.{name.removesuffix('.weight')}": (name, slice(None)) for name in weights}
    weights, names = {}, {}
    for layer in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))):
        theirs = f"transformer_blocks.{layer}"
        for fused, parts in FUSED.items():
            rows = [state[f"{theirs}.{part}.weight"] for part in parts]
            weights[f"joint_blocks.{layer}.{fused}.weight"] = torch.cat(rows)
            for number, part in enumerate(parts):
                place = slice(number * len(rows[0]), (number + 1) * len(rows[0]))
                names[f"transformer.{theirs}.{part}"] = (f"joint_blocks.{layer}.{fused}.weight", place)
        for part, place in SD3_PLACES.items():
            if (name := f"{theirs}.{part}.weight") in state:
                weights[f"joint_blocks.{layer}.{place}.weight"] = state[name].clone()
                names[f"transformer.{theirs}.{part}"] = (f"joint_blocks.{layer}.{place}.weight", slice(None))
    return weights, names


def comfyui_applies(file: dict, weights: dict, names: dict) -> set[str]:
    """Patch the weights as ComfyUI would at strength 1; returns the tensors that it would have passed over."""
    used = set()
    for name, (target, rows) in names.items():
        if f"{name}.lora_up.weight" not in file:
            continue
        up, down = file[f"{name}.lora_up.weight"], file[f"{name}.lora_down.weight"]
        alpha = file[f"{name}.alpha"].item() if f"{name}.alpha" in file else None
        weights[target][rows] += (1.0 if alpha is None else alpha / down.shape[0]) * up @ down
        used |= {f"{name}.lora_up.weight", f"{name}.lora_down.weight", f"{name}.alpha"}
    return set(file) - used


def test_comfyui_applies_what_we_merge(world, tmp_path):
    kind, _, workdir, _ = world
    for format in ("comfyui-lora", "diffusers"):
        assert main(["export", "--workdir", str(workdir), "--format", format, "--out", str(tmp_path / format)]) == 0
    base = load_folder(Path(json.loads((workdir / "config.json").read_text())["model"]) / "transformer")
    weights, names = comfyui_network(kind, base)
    before = {name: weight.clone() for name, weight in weights.items()}
    assert comfyui_applies(load_folder(tmp_path / "comfyui-lora"), weights, names) == set()
    expected, _ = comfyui_network(kind, load_folder(tmp_path / "diffusers" / "transformer"))
    moved = [name for name in weights if not torch.equal(weights[name], before[name])]
    assert len(moved) >= (4 * 3 - 1 if kind == "sd3" else 12 * 2)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-5)


# Critics


def test_transformers_opens_a_critic(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(embedded_path("embedded:critic_gen"), workdir / "model")
    config = {"job": "critic_sft", "critic": {"model": None}, "train": {"epochs": 2, "learning_rate": 1e-5}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "metrics.jsonl").write_text(json.dumps({"step": 40, "epoch": 2, "eval/loss": 0.125}) + "\n")
    out = tmp_path / "critic"
    assert main(["export", "--workdir", str(workdir), "--format", "transformers", "--out", str(out)]) == 0
    model = loaded_as_the_card_says(out, monkeypatch)["model"]
    for name, tensor in load_folder(workdir / "model").items():
        assert torch.equal(model.state_dict()[name], tensor.to(model.dtype)), name
    assert "| `eval/loss` | 0.125 (2) | 0.125 (2) |" in (out / "README.md").read_text()
