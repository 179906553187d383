"""A critic's fine-tuning as people start it: parts of a network, a LoRA, data and folders with faults."""

import json
import shutil

import jax
import numpy as np
import pytest
from critic_miniature import picture
from test_sft import file, folder, make_config, metrics_of, one_device  # noqa: F401

from firm_jax import models
from firm_jax.critic import Critic, sft, sft_data, sft_eval
from firm_jax.embedded import embedded_path
from firm_jax.errors import ConfigError, DataError, WeightsError
from firm_jax.interop.lora_formats import merged, read_adapter
from firm_jax.run import Run, Stopped


def leaves(where) -> dict:
    found = jax.tree_util.tree_flatten_with_path(models.from_pretrained(where))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def lora_config(file, folder):  # noqa: F811
    """Rank 2 in all parts, two micro-batches, and reports, evaluations and checkpoints within an epoch of 4 steps."""
    config = make_config(file, folder, epochs=1, batch_size=3, examples_per_device=2, report_every=0.5)
    config.train.steps_per_epoch = None
    config.lora = {"rank": 2, "alpha": 3.0, "targets": ("q_proj", "down_proj", "attn.qkv", "linear_fc1")}
    config.data.held_out, config.data.held_out_share = None, 0.1
    config.eval.update({"every": 1, "answers": 0})
    config.checkpoint = {"every": 0.5, "keep": 2}
    return config


def test_a_lora_stopped_within_an_epoch_continues_bit_for_bit(file, folder, tmp_path, monkeypatch, one_device):  # noqa: F811
    config = lora_config(file, folder)
    sft.train(config, str(tmp_path / "straight"))
    straight = metrics_of(tmp_path / "straight")
    assert [(line["step"], line["epoch"]) for line in straight] == [(2, 0.5), (4, 1)]
    assert straight[1]["eval/loss"] is not None and "eval/loss" not in straight[0]
    asked = iter([False, False, True])
    with monkeypatch.context() as patched:
        patched.setattr(Run, "should_stop", lambda self: next(asked))
        with pytest.raises(Stopped, match=r"after 0\.75 epochs"):
            sft.train(config, str(tmp_path / "stopped"))
    assert len(metrics_of(tmp_path / "stopped")) == 1
    sft.train(config, str(tmp_path / "stopped"))
    assert metrics_of(tmp_path / "stopped") == straight
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = ((tmp_path / run / name).read_bytes() for run in ("straight", "stopped"))
        assert one == other

    # The folder is the base with the adapter in it, and nothing else of it has changed.
    adapter = read_adapter(tmp_path / "straight" / "adapter")
    assert (adapter.rank, adapter.alpha) == (2, 3.0) and any(np.abs(b).max() > 0 for _, b in adapter.pairs.values())
    from safetensors.numpy import load_file

    base, left = load_file(folder / "model.safetensors"), load_file(tmp_path / "straight/model/model.safetensors")
    for name, weight in base.items():
        pair = adapter.pairs.get(name.removesuffix(".weight"))
        expected = weight if pair is None else merged(weight, pair, 1.5)
        np.testing.assert_allclose(left[name], expected.astype(np.float16), rtol=2e-3, atol=1e-6, err_msg=name)


def test_frozen_parts_leave_as_they_came(file, folder, tmp_path, monkeypatch, one_device):  # noqa: F811
    """In packed rows; and the critic in training is measured on the benchmark that the config names."""

    def measured(critic, bench, task, **options):
        assert isinstance(critic, Critic) and (bench, task) == ("embedded:bench_gen", "gen")
        assert set(options) == {"max_new_tokens", "batch_size", "progress"}
        return {"eval/bench_mae": 1.25}

    monkeypatch.setattr(sft_eval, "bench_metrics", measured)
    config = make_config(file, folder, epochs=1, stored_dtype="float32", packing=True, packed_images=4)
    config.tune.update({"vision": False, "projector": False})
    config.eval.update({"answers": 0, "bench": "embedded:bench_gen", "bench_task": "gen"})
    sft.train(config, str(tmp_path))
    before, after = leaves(folder), leaves(tmp_path / "model")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and all("language_model" in name for name in changed)
    last = metrics_of(tmp_path)[-1]
    assert last["eval/bench_mae"] == 1.25 and "eval/mae" not in last
    config.eval.bench = str(tmp_path)
    with pytest.raises(DataError, match=r"bench_v1\.jsonl"):
        sft.train(config, str(tmp_path / "other"))


@pytest.fixture(scope="module")
def half_broken(file):  # noqa: F811
    """Of twelve conversations, six with an image too many, an image that is missing, or no answer."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for number, line in enumerate(lines[::2]):
        if number % 3 == 0:
            line["images"].append(line["images"][0])
        elif number % 3 == 1:
            line["images"] = ["nowhere.png"]
        else:
            line["messages"].pop()
    path = file.parent / "half.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.fault("half-broken-dataset")
def test_a_dataset_with_half_of_its_rows_broken_is_refused_before_anything_is_trained(half_broken, folder, tmp_path):  # noqa: F811
    config = make_config(half_broken, folder)
    with pytest.raises(DataError, match="6 of 12 records"):
        sft.train(config, str(tmp_path))
    told = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [record["line"] for record in told] == [1, 3, 5, 7, 9, 11]
    assert not (tmp_path / "model").exists() and not (tmp_path / "metrics.jsonl").read_text()
    config.data.max_bad_fraction = 0.5
    processor = sft.Processor(folder)
    for examples in sft_data.sources(config, None, processor, tmp_path / "quarantine.jsonl"):
        assert len(examples) == 6
    assert (tmp_path / "quarantine_held_out.jsonl").exists()


@pytest.mark.fault("other-critic-folder")
def test_a_folder_that_is_no_critic_is_refused_before_the_data_is_read(folder, tmp_path):  # noqa: F811
    def started(base):
        config = make_config("never_read.jsonl", base)
        sft.train(config, str(tmp_path / "run"))

    with pytest.raises(ConfigError, match="holds a Qwen2_5_VLForConditionalGeneration; a critic must be a Qwen3VL"):
        started(embedded_path("embedded:qwen_image_edit/text_encoder"))
    with pytest.raises(WeightsError, match="no such model folder"):
        started(tmp_path / "nothing here")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ConfigError, match="'LlamaForCausalLM' are not supported"):
        started(other)
    raw["text_config"]["intermediate_size"] = 56
    (other / "config.json").write_text(json.dumps(raw))
    with pytest.raises(WeightsError, match=r"tensors of another shape: .*mlp"):
        started(other)
    (other / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"safetensors"):
        started(other)


def test_a_share_of_the_examples_is_held_out_by_the_seed(file):  # noqa: F811
    examples = sft_data.load_conversations(file)
    train, held_out = sft_data.draw_held_out(examples, 0.25, seed=3)
    assert sorted([*train.numbers, *held_out.numbers]) == list(range(12)) and len(held_out) == 3
    assert [train[i].prompt for i in range(9)] == [examples[int(n)].prompt for n in train.numbers]
    assert train.text_length(0) == examples.text_length(int(train.numbers[0]))
    again, other = (sft_data.draw_held_out(examples, 0.25, seed=seed)[1].numbers.tolist() for seed in (3, 4))
    assert again == held_out.numbers.tolist() != other


def test_images_are_limited_as_they_were_in_training(folder, tmp_path):  # noqa: F811
    processor = sft.Processor(folder, 512)
    assert len(processor.sequence([picture(0, 64, 64)], "a").images[0].patches) * 16 <= 512
    with pytest.raises(ConfigError, match="below the 256 pixels"):
        sft.Processor(folder, 100)
    shutil.copy(folder / "preprocessor_config.json", tmp_path)
    sft.limit_pixels(tmp_path, 512)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"]["longest_edge"] == 512
