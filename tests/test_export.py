"""`firm-jax export` without the programs that it exports for: names, numbers, cards, and what it refuses."""

import inspect
import json
import shutil

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file
from tiny_pipeline import tiny_generator
from tiny_run import LORA, card_example, lines, random_lora, write_run

from firm_jax import checkpoint
from firm_jax.commands import main
from firm_jax.commands.export import ADAPTERS
from firm_jax.errors import ConfigError, WeightsError
from firm_jax.interop import lora_formats
from firm_jax.interop.card_examples import pipeline_example
from firm_jax.interop.lora_formats import Adapter, adapter_of, find_file, merged, read_adapter, tree_of
from firm_jax.interop.model_card import model_card
from firm_jax.models.lora import LoraConfig

LORA_FILES = {
    "diffusers-lora": lora_formats.DIFFUSERS_FILE,
    "peft": lora_formats.PEFT_FILE,
    "comfyui-lora": lora_formats.COMFYUI_FILE,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pipeline, a run on it, and the adapters in the run's last checkpoint."""
    folder, workdir = (tmp_path_factory.mktemp(name) for name in ("model", "run"))
    generator = tiny_generator(t5=False)
    generator.save_pretrained(folder)
    return generator, workdir, write_run(workdir, folder, generator)


def export(workdir, out, format="diffusers-lora", *more) -> int:
    return main(["export", "--workdir", str(workdir), "--format", format, "--out", str(out), *more])


def refused(capsys, *given) -> str:
    """What is said about an export that is refused; nothing is left of it."""
    out = given[1]
    before = out.exists()
    assert export(*given) == 2
    assert out.exists() == before and not list(out.parent.glob(".*exporting"))
    return capsys.readouterr().err


def assert_same(ours, expected) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("format", LORA_FILES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_exported_is_imported_to_the_same_bits(world, format, adapter, tmp_path):
    generator, workdir, adapters = world
    assert export(workdir, tmp_path / "out", format, "--adapter", adapter) == 0
    found = read_adapter(tmp_path / "out")
    assert (found.rank, found.alpha) == (LORA.rank, LORA.alpha)
    assert_same(tree_of(found, generator.params, generator.weight_rules, "it"), adapters[ADAPTERS[adapter]])
    assert_same(find_file(tmp_path / "out").name, LORA_FILES[format])


def test_the_averaged_adapter_of_the_newest_checkpoint_is_the_default(world, tmp_path, capsys):
    generator, workdir, adapters = world
    assert export(workdir, tmp_path / "newest") == 0
    assert "the averaged LoRA of step 6, rank 3, alpha 7" in capsys.readouterr().out
    newest = tree_of(read_adapter(tmp_path / "newest"), generator.params, generator.weight_rules, "it")
    assert_same(newest, adapters["ema"])
    assert export(workdir, tmp_path / "older", "diffusers-lora", "--step", "4") == 0
    older = tree_of(read_adapter(tmp_path / "older"), generator.params, generator.weight_rules, "it")
    assert np.abs(jax.tree.leaves(older)[0] - jax.tree.leaves(newest)[0]).max() > 0.1


@pytest.mark.fault("damaged-checkpoint")
def test_a_damaged_checkpoint_is_passed_over_and_left_where_it_is(world, tmp_path, capsys):
    _, workdir, _ = world
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "checkpoints" / "6" / "data.json").write_text("{ }")
    assert export(copy, tmp_path / "out") == 0
    assert "of step 4" in capsys.readouterr().out
    assert (copy / "checkpoints" / "6").is_dir()
    assert "is whole; the last problem: data.json has" in refused(
        capsys, copy, tmp_path / "other", "peft", "--step", "6"
    )


def test_a_merge_is_rounded_once():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, 4)).astype(np.float16)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 4), (5, 2)))
    exact = weight.astype(np.float64) + 0.4 * (b.astype(np.float64) @ a)
    got = merged(weight, (a, b), 0.4)
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, exact.astype(np.float16))
    # Rounding the update first is another number, or this test could not fail.
    assert (got != weight + (0.4 * (b @ a)).astype(np.float16)).any()


def test_a_merged_pipeline_keeps_shards_and_dtype_of_its_base(world, tmp_path):
    generator, _, adapters = world
    adapter = adapter_of(adapters["ema"], generator.weight_rules, LORA)
    generator.save_pretrained(tmp_path / "base", dtype="bfloat16")
    transformer = tmp_path / "base" / "transformer"
    whole = load_file(transformer / "diffusion_pytorch_model.safetensors")
    names = sorted(whole)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: whole[name] for name in own}, transformer / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (transformer / "diffusion_pytorch_model.safetensors").unlink()
    lora_formats.write_merged(transformer, tmp_path / "out", adapter)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        file.name for file in transformer.iterdir()
    )
    for file, own in parts.items():
        found = load_file(tmp_path / "out" / file)
        assert sorted(found) == own and {array.dtype.name for array in found.values()} == {"bfloat16"}
        for name, array in found.items():
            pair = adapter.pairs.get(name.removesuffix(".weight"))
            expected = whole[name] if pair is None else merged(whole[name], pair, LORA.scale)
            np.testing.assert_array_equal(array, expected)
            assert pair is None or (array != whole[name]).any()


@pytest.mark.fault("other-model")
def test_a_merge_into_another_base_is_refused(world, tmp_path, capsys):
    _, workdir, _ = world
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    model = json.loads((copy / "config.json").read_text())["model"]
    other = tmp_path / "model"
    shutil.copytree(model, other)
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: array + np.float32(0.5) for name, array in load_file(file).items()}, file)
    meta = json.loads((copy / "checkpoints" / "6" / "meta.json").read_text())
    meta["config"]["model"] = str(other)
    (copy / "checkpoints" / "6" / "meta.json").write_text(json.dumps(meta))
    (copy / "checkpoints" / "6" / "manifest.json").write_bytes(checkpoint._manifest(copy / "checkpoints" / "6"))
    assert "the model has changed since" in refused(capsys, copy, tmp_path / "out", "diffusers")
    assert export(copy, tmp_path / "lora", "peft") == 0  # which has nothing of the base in it


def test_what_cannot_be_exported_says_why(world, tmp_path, capsys):
    _, workdir, _ = world
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("mine")
    assert f"--out {tmp_path / 'full'} is there already" in refused(capsys, workdir, tmp_path / "full")
    assert (tmp_path / "full" / "kept.txt").read_text() == "mine"
    out = tmp_path / "out"
    assert "it has no config.json" in refused(capsys, tmp_path / "nowhere", out)
    assert "there are 4, 6" in refused(capsys, workdir, out, "peft", "--step", "5")
    assert "formats for what it has trained are diffusers-lora, peft" in refused(capsys, workdir, out, "transformers")
    started = tmp_path / "started"
    started.mkdir()
    shutil.copy(workdir / "config.json", started)
    assert "the run has not saved one yet" in refused(capsys, started, out)
    for job, told in (("flow_matching", "leaves its model in"), ("critic_sft", "formats for what it has trained")):
        config = json.loads((workdir / "config.json").read_text()) | {"job": job}
        (started / "config.json").write_text(json.dumps(config))
        assert told in refused(capsys, started, out)
    assert "no trained critic yet" in refused(capsys, started, out, "transformers")
    assert "no trained critic yet" in refused(capsys, started, out, "peft")
    for format in ("transformers", "peft"):
        assert "one model, its last" in refused(capsys, started, out, format, "--adapter", "old")
    (started / "model").mkdir()
    (started / "model" / "config.json").write_text("{}")
    assert "with lora.rank 0 it trains the weights themselves" in refused(capsys, started, out, "peft")
    told = refused(capsys, started, out, "comfyui-lora")
    assert "for runs of 'rl'" in told and told.strip().endswith("are peft, transformers")


def test_layers_that_comfyui_does_not_know_are_refused(world, tmp_path):
    generator, _, _ = world
    config = LoraConfig(2, 2.0, ("attn.to_q", "attn2.to_q"))
    adapter = adapter_of(random_lora(generator, 0, config), generator.weight_rules, config)
    with pytest.raises(ConfigError, match=r"no names for the adapted layers transformer_blocks\.0\.attn2\.to_q, and"):
        lora_formats.write_comfyui(tmp_path, adapter, "SD3Transformer2DModel")


# What is read


def pairs(rank=2, layers=("x.to_q", "x.to_k")) -> dict:
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=(rank, 4)).astype(np.float32), rng.normal(size=(6, rank)).astype(np.float32))
        for name in layers
    }


def written(folder, tensors, metadata=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / lora_formats.DIFFUSERS_FILE, metadata)
    return folder


def named(sides=("lora_A", "lora_B"), prefix="transformer.", **given) -> dict:
    return {
        f"{prefix}{module}.{side}.weight": array
        for module, pair in pairs(**given).items()
        for side, array in zip(sides, pair, strict=True)
    }


def test_a_file_that_says_nothing_of_alpha_has_that_of_its_rank(tmp_path):
    for number, prefix in enumerate(lora_formats.PREFIXES):
        found = read_adapter(written(tmp_path / str(number), named(prefix=prefix)))
        assert (found.rank, found.alpha, sorted(found.pairs)) == (2, 2.0, ["x.to_k", "x.to_q"])


def test_half_precision_is_read(tmp_path):
    halves = {name: array.astype("bfloat16") for name, array in named().items()}
    found = read_adapter(written(tmp_path / "a", halves))
    np.testing.assert_array_equal(found.pairs["x.to_q"][0], halves["transformer.x.to_q.lora_A.weight"])
    assert found.pairs["x.to_q"][0].dtype == np.float32


@pytest.mark.fault("damaged-weights")
@pytest.mark.parametrize(
    "tensors, metadata, told",
    [
        (named() | {"text_encoder.y.lora_v": np.ones(2, np.float32)}, None, "not of a LoRA: text_encoder"),
        ({"transformer.x.to_q.lora_A.weight": np.ones((2, 4), np.float32)}, None, "x.to_q does not have two matrices"),
        (named() | named(rank=3, layers=["x.to_v"]), None, r"layers of ranks \[2, 3\]"),
        (named() | {"transformer.x.to_q.alpha": np.float32(1)}, None, "alphas .* for some"),
        (named() | {"transformer.x.to_q.lora_A.weight": np.full((2, 4), np.nan, np.float32)}, None, "NaN or infinity"),
        ({name: array.astype(np.int8) for name, array in named().items()}, None, "dtype I8"),
        (named(), {"transformer.r": 4}, "rank 2, and its settings say r = 4"),
        (named(), {"transformer.use_dora": True}, "describes use_dora"),
        (named(), {"transformer.peft_type": "LOHA"}, "describes LOHA"),
        (named(), {"transformer.bias": "all"}, "describes all"),
    ],
)
def test_files_that_are_no_plain_lora_are_refused(tmp_path, tensors, metadata, told):
    tensors = {name: np.asarray(array) for name, array in tensors.items()}
    metadata = metadata and {lora_formats.DIFFUSERS_METADATA: json.dumps(metadata)}
    with pytest.raises(WeightsError, match=told):
        read_adapter(written(tmp_path / "a", tensors, metadata))


@pytest.mark.fault("damaged-weights")
def test_a_lora_that_is_not_there_says_what_is(tmp_path):
    with pytest.raises(WeightsError, match=r"neither a folder nor a \.safetensors file"):
        read_adapter(tmp_path / "absent")
    with pytest.raises(WeightsError, match=r"holds no LoRA; expected adapter_model\.safetensors"):
        read_adapter(tmp_path)
    for name in ("one", "two"):
        save_file(named(), tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"several files: one\.safetensors, two\.safetensors"):
        read_adapter(tmp_path)
    assert read_adapter(tmp_path / "two.safetensors").rank == 2
    (tmp_path / "peft").mkdir()
    save_file(named(), tmp_path / "peft" / lora_formats.PEFT_FILE)
    with pytest.raises(WeightsError, match=r"no adapter_config\.json beside it"):
        read_adapter(tmp_path / "peft")
    (tmp_path / "two.safetensors").write_bytes(b"1234")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_adapter(tmp_path / "two.safetensors")


@pytest.mark.fault("damaged-weights")
def test_a_lora_of_another_model_is_refused(world):
    generator, _, adapters = world
    good = adapter_of(adapters["ema"], generator.weight_rules, LORA)
    module, (a, b) = next(iter(good.pairs.items()))
    for odd, told in (
        ({"transformer_blocks.9.attn.to_q": (a, b)}, r"layers that this network does not have: transformer_blocks\.9"),
        ({module: (a[:, :-1], b)}, rf"it: {module} has matrices \(3, .*\) and .*trained for another model"),
    ):
        with pytest.raises(WeightsError, match=told):
            tree_of(Adapter(odd, 3, 7.0), generator.params, generator.weight_rules, "it")
    some = tree_of(Adapter({module: (a, b)}, 3, 7.0), generator.params, generator.weight_rules, "it")
    (leaf,) = jax.tree.leaves(some, is_leaf=lambda node: "a" in node)
    assert leaf["a"].ndim == 2 or [bool(layer.any()) for layer in leaf["a"]].count(True) == 1


# The model card


def card_for(world, tmp_path, format="diffusers-lora") -> str:
    export(world[1], tmp_path / format, format)
    return (tmp_path / format / "README.md").read_text()


def test_the_card_tells_what_the_model_is(world, tmp_path):
    card = card_for(world, tmp_path)
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "text-to-image", None)
    assert {"lora", "firm"} <= set(data.tags) and data.base_model is None
    assert "The averaged LoRA of step 6 (3 epochs)" in card
    assert "| `eval/reward` | 0.25 (0) | 0.6 (3) |" in card and "| `reward/mean` | 0.5 (2) | 0.5 (3) |" in card
    assert "| `lora.alpha` | `7.0` |" in card and "| `train.learning_rate` | `0.003` |" in card
    assert "## Licence" in card


def test_metrics_beyond_the_adapter_s_step_are_left_out(world, tmp_path):
    export(world[1], tmp_path / "out", "peft", "--step", "4")
    assert "| `eval/reward` | 0.25 (0) | 0.4 (2) |" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_from_the_hub_is_named_for_the_hub(world):
    config = json.loads((world[1] / "config.json").read_text()) | {"model": "stabilityai/stable-diffusion-3.5-medium"}
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    card = model_card(
        title="It", base_model=config["model"], relation="adapter", library="peft", pipeline_tag="text-to-image",
        tags=["a: b"], what="It.", example=pipeline_example("peft", config, index), config=config,
        metrics=lines(world[1] / "metrics.jsonl"), step=6,
    )  # fmt: skip
    data = ModelCard(card).data
    assert data.base_model == config["model"] and data.to_dict()["base_model_relation"] == "adapter"
    assert data.tags == ["a: b"]
    assert f'from_pretrained("{config["model"]}", subfolder="transformer")' in card


def test_the_example_for_comfyui_s_file_draws_here(world, tmp_path, monkeypatch):
    example = card_example(card_for(world, tmp_path, "comfyui-lora"))
    monkeypatch.chdir(tmp_path / "comfyui-lora")
    exec(example, names := {})
    assert (tmp_path / "comfyui-lora" / "example.png").exists()
    leaves = jax.tree.leaves_with_path(names["generator"].lora)
    expected = dict(jax.tree.leaves_with_path(world[2]["ema"]))
    for path, leaf in leaves:
        strength = LORA.scale if path[-1].key == "b" else 1
        np.testing.assert_allclose(leaf, strength * expected[path], rtol=1e-6)


@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
@pytest.mark.parametrize("format", ["diffusers-lora", "peft", "diffusers", "comfyui-lora"])
def test_the_examples_for_editing_call_what_there_is(world, name, format):
    config = json.loads((world[1] / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["eval"]["guidance"] = 4.0
    index = {"_class_name": name, "transformer": ["diffusers", "QwenImageTransformer2DModel"]}
    example = pipeline_example(format, config, index)
    code = compile(example, "example", "exec")
    assert "source" in code.co_names or format == "comfyui-lora"
    if format == "comfyui-lora":
        return
    diffusers = pytest.importorskip("diffusers")
    called = inspect.signature(getattr(diffusers, name).__call__)
    given = example.split("image = pipe(")[1].split(").images")[0]
    eval(f"called.bind(None, {given})", {"called": called, "source": None})
    assert "true_cfg_scale=4.0" in given and "image=source" in given
