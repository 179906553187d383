"""The jobs that train the miniature: each runs, resumes to the same bits, and leaves a folder that opens."""

import json

import jax
import numpy as np
import pytest
from critic_miniature import MINIATURE
from docs_pages import unexplained
from transformers import AutoTokenizer

from firm_jax import models
from firm_jax.config import load_config
from firm_jax.critic import Critic, vision
from firm_jax.critic.rubric import Rubric
from firm_jax.errors import ConfigError
from firm_jax.generation import Generator, autoencoder, pretrain, pretrain_qwen
from firm_jax.mesh import make_mesh
from firm_jax.run import Run, Stopped
from firm_jax.shapes.conversations import ShapesConversations, ShapesEditConversations
from firm_jax.shapes.critic_folder import write_critic_folder

RUBRICS = {name: Rubric(name, "{prompt}", "") for name in ("alignment", "quality")}
FEW = {"epochs": 2, "steps_per_epoch": 2, "batch_size": 2, "warmup_steps": 1}


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patched:
        for module in (autoencoder, pretrain, pretrain_qwen, vision):
            patched.setattr(module, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[:1]))
        yield


def stop_and_continue(job, config, folder):
    """The job, stopped after its first epoch and started again."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Run, "should_stop", lambda self: True)
        with pytest.raises(Stopped):
            job(config, str(folder))
    job(config, str(folder))


def last_metrics(folder) -> dict:
    metrics = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert unexplained(metrics) == [], "tell of it in docs/metrics.md"
    return metrics


def weights(folder) -> dict[str, bytes]:
    files = sorted(folder.rglob("*.safetensors"))
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def trained_autoencoder(tmp_path_factory, one_device):
    config = load_config("configs/shapes.py:autoencoder")
    config.train.update(FEW)
    config.eval.images = 8
    config.vae.update({"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4})
    folder = tmp_path_factory.mktemp("autoencoder")
    autoencoder.train_autoencoder(config, str(folder))
    return folder


def test_the_autoencoder_job_measures_and_scales_its_latents(trained_autoencoder):
    metrics = last_metrics(trained_autoencoder)
    assert np.isfinite(metrics["loss/total"]) and 0 < metrics["eval/psnr"] < 40
    assert 0 <= metrics["eval/oracle_agreement"] <= 1
    vae = models.from_pretrained(trained_autoencoder / "model")
    assert vae.config.scaling_factor not in (0, 1) and vae.config.shift_factor != 0


def test_the_autoencoder_job_starts_from_a_folder(trained_autoencoder, tmp_path, one_device):
    config = load_config("configs/shapes.py:autoencoder_kl")
    config.train.update(FEW | {"epochs": 1, "steps_per_epoch": 1, "learning_rate": 0.0, "weight_decay": 0.0})
    config.train.warmup_steps, config.eval.images, config.init = 0, 8, str(trained_autoencoder / "model")
    autoencoder.train_autoencoder(config, str(tmp_path / "second"))
    assert weights(tmp_path / "second" / "model") == weights(trained_autoencoder / "model")
    config.init = load_config("configs/shapes.py:autoencoder_kl").init
    with pytest.raises(ConfigError, match=r"set --config\.init to a folder"):
        autoencoder.train_autoencoder(config, str(tmp_path / "other"))


@pytest.mark.slow
def test_the_generator_job_continues_and_leaves_a_pipeline(trained_autoencoder, tmp_path, one_device):
    config = load_config("configs/shapes.py:generator")
    config.train.update(FEW | {"pictures": 4, "wrong_epochs": 1})
    config.eval.update({"every": 2, "prompts": 2, "steps": 1})
    config.samples = 8
    config.vae = str(trained_autoencoder / "model")
    config.text.update({"clip_widths": (8, 16), "t5_width": 24, "layers": 1, "heads": 2})
    config.transformer.update({"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8})
    config.transformer.dual_attention_layers = (0,)
    pretrain.train_flow_matching(config, str(tmp_path / "straight"))
    stop_and_continue(pretrain.train_flow_matching, config, tmp_path / "stopped")
    assert weights(tmp_path / "straight" / "model") == weights(tmp_path / "stopped" / "model")
    metrics = last_metrics(tmp_path / "straight")
    assert set(metrics) >= {"eval/oracle_fraction", "eval/oracle_accuracy", "loss/caption", "loss/picture"}
    samples = ShapesConversations(9, RUBRICS, seed=0, stream=0, samples=tmp_path / "stopped" / "samples.npz", share=1.0)
    assert {example.criterion for example in samples} == {"alignment_samples", "quality_samples"}
    assert samples.images.shape == (8, 1, 64, 64, 3) and samples[0].images[0].shape == (64, 64, 3)
    generator = Generator.from_pretrained(tmp_path / "straight" / "model", dtype="float32")
    images = generator.sample(["a red square"], steps=1, guidance=2.0, height=64, width=64, max_text_tokens=17)
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()
    assert generator.scheduler["shift"] == config.shift


def test_a_quarters_labels_belong_to_the_tokens_of_that_quarter():
    quarters = np.arange(8).reshape(1, 4, 2)
    grid = np.asarray(pretrain.of_tokens(quarters, 16)).reshape(4, 4, 2)
    assert (grid[:2, :2] == [0, 1]).all() and (grid[:2, 2:] == [2, 3]).all()
    assert (grid[2:, :2] == [4, 5]).all() and (grid[2:, 2:] == [6, 7]).all()


def test_the_vision_job_leaves_a_critic_with_only_its_tower_trained(tmp_path, one_device):
    config = load_config("configs/shapes.py:critic_vision")
    config.miniature.update(MINIATURE | {"texts": 20, "min_pixels": 1024, "max_pixels": 1024})
    config.train.update(FEW)
    config.data.examples, config.eval.examples = 20, 2
    vision.train_vision(config, str(tmp_path))
    assert 0 <= last_metrics(tmp_path)["eval/quality_right"] <= 1
    before, after = (models.from_pretrained(tmp_path / name) for name in ("untrained", "model"))
    token_embedding = [np.asarray(model.language_model.embed_tokens.embedding[...]) for model in (before, after)]
    np.testing.assert_array_equal(*token_embedding)
    patch = [np.asarray(model.visual.patch_embed.kernel[...]) for model in (before, after)]
    assert (patch[0] != patch[1]).any()
    assert Critic.from_pretrained(tmp_path / "model", dtype="float32").rubrics


def test_a_warm_up_longer_than_the_training_is_an_error(tmp_path, one_device):
    config = load_config("configs/shapes.py:autoencoder")
    config.train.update(FEW | {"warmup_steps": 4})
    with pytest.raises(ConfigError, match=r"train\.warmup_steps is 4, .* 4 steps"):
        autoencoder.train_autoencoder(config, str(tmp_path))


@pytest.fixture(scope="module")
def trained_edit_autoencoder(tmp_path_factory, one_device):
    config = load_config("configs/shapes.py:qwen_autoencoder")
    config.train.update(FEW)
    config.eval.images = 8
    config.vae.update({"base_dim": 8, "dim_mult": (1, 1, 1, 1)})
    folder = tmp_path_factory.mktemp("edit_autoencoder")
    autoencoder.train_autoencoder(config, str(folder))
    return folder


@pytest.mark.slow
def test_the_edit_autoencoder_job_measures_its_latents_channel_by_channel(trained_edit_autoencoder):
    config = models.from_pretrained(trained_edit_autoencoder / "model").config
    assert len(set(config.latents_mean)) == len(set(config.latents_std)) == 16
    assert np.isfinite(last_metrics(trained_edit_autoencoder)["grad/norm"])


@pytest.mark.slow
def test_the_edit_generator_job_continues_and_leaves_a_pipeline(trained_edit_autoencoder, tmp_path, one_device):
    config = load_config("configs/shapes.py:edit_generator")
    config.train.update(FEW | {"tasks": 20, "batch_size": 4, "wrong_epochs": 1})
    config.transformer.num_layers, config.text.num_hidden_layers, config.vision.depth = 1, 1, 1
    config.vision.fullatt_block_indexes = (0,)
    config.eval.update({"tasks": 3, "steps": 2})
    config.samples, config.vae = 9, str(trained_edit_autoencoder / "model")
    pretrain_qwen.train_qwen_matching(config, str(tmp_path / "straight"))
    stop_and_continue(pretrain_qwen.train_qwen_matching, config, tmp_path / "stopped")
    assert weights(tmp_path / "straight") == weights(tmp_path / "stopped")
    metrics = last_metrics(tmp_path / "straight")
    assert np.isfinite(metrics["loss/flow"]) and 0 <= metrics["eval/oracle_preservation"] <= 1
    with np.load(tmp_path / "straight" / "samples.npz") as samples:
        assert samples["images"].shape == samples["sources"].shape == (9, 64, 64, 3)
    generator = Generator.from_pretrained(tmp_path / "straight" / "model", dtype="float32")
    areas = {"source_area": 64 * 64, "condition_area": 64 * 64}
    source = np.zeros((64, 64, 3), np.uint8)
    edited = generator.sample(["make it red"], [source], steps=1, guidance=1, height=64, width=64, **areas)
    assert edited.shape == (1, 64, 64, 3)
    rubrics = {name: Rubric(name, "{prompt}", "") for name in ("edit_execution", "edit_consistency")}
    samples_file = tmp_path / "straight" / "samples.npz"
    examples = ShapesEditConversations(8, rubrics, seed=0, stream=0, samples=samples_file, share=1.0)
    assert {examples[i].criterion for i in range(8)} == {f"{name}_samples" for name in rubrics}


def test_a_critic_may_start_from_the_weights_of_another_vocabulary(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_critic_folder(first, ["a red circle on the left"] * 9, MINIATURE, seed=0)
    write_critic_folder(second, ["turn the red circle blue"] * 9, MINIATURE, seed=1, base=first)
    old, new = (models.from_pretrained(folder) for folder in (first, second))
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (first, second))
    rows, made = (np.asarray(network.language_model.embed_tokens.embedding[...]) for network in (old, new))
    assert len(made) == len(ours) and set(ours.get_vocab()) - set(theirs.get_vocab())
    for token, row in ours.get_vocab().items():
        if token in theirs.get_vocab():
            np.testing.assert_array_equal(made[row], rows[theirs.get_vocab()[token]])
    pieces = theirs("turn").input_ids
    assert len(pieces) > 1
    np.testing.assert_allclose(made[ours.get_vocab()["turn"]], rows[pieces].mean(0), rtol=1e-6)
    kernels = [np.asarray(network.language_model.layers.mlp.up_proj.kernel[...]) for network in (old, new)]
    np.testing.assert_array_equal(*kernels)


@pytest.mark.slow
def test_the_qwen_generator_job_draws_from_text_alone(trained_edit_autoencoder, tmp_path, one_device):
    config = load_config("configs/shapes.py:qwen_generator")
    config.train.update(FEW | {"tasks": 20, "batch_size": 4, "wrong_epochs": 1})
    config.transformer.num_layers, config.text.num_hidden_layers, config.vision.depth = 1, 1, 1
    config.vision.fullatt_block_indexes = (0,)
    config.eval.update({"tasks": 3, "steps": 2})
    config.samples, config.vae = 8, str(trained_edit_autoencoder / "model")
    pretrain_qwen.train_qwen_matching(config, str(tmp_path))
    metrics = last_metrics(tmp_path)
    assert np.isfinite(metrics["loss/flow"]) and 0 <= metrics["eval/oracle_fraction"] <= 1
    assert len(ShapesConversations(4, RUBRICS, seed=0, stream=0, samples=tmp_path / "samples.npz", share=1.0)) == 4
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "QwenImagePipeline" and "processor" not in index
    generator = Generator.from_pretrained(tmp_path / "model", dtype="float32")
    assert generator.sample(["a red circle"], steps=1, guidance=1, height=64, width=64).shape == (1, 64, 64, 3)
    config.pipeline = "QwenImageEditPipeline"
    with pytest.raises(ConfigError, match="trained here are QwenImagePipeline, QwenImageEditPlusPipeline"):
        pretrain_qwen.train_qwen_matching(config, str(tmp_path))
