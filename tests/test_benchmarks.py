"""The benchmarks: the harness with work that costs nothing, and each script once, as small as it can be."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import (
    critic_decode,
    critic_features,
    critic_sft,
    harness,
    qwen_edit_rollout,
    qwen_edit_update,
    sd3_rollout,
    sd3_update,
    tables,
    text_encoding,
)
from benchmarks.harness import OURS, PYTORCH, WITH, WITHOUT, Case, Options, OutputsDiffer, Variant, distances, measure
from benchmarks.sizes import CRITIC, QWEN_EDIT, SD3, SFT, parameters
from benchmarks.weights import write_network
from firm_jax.generation.generator import pipeline_class
from firm_jax.mesh import make_mesh
from firm_jax.published import PIPELINES, QWEN3_VL


def stub(log: list, name: str, seconds=0.0, outputs=None, **given) -> Variant:
    """A variant that writes down what is called."""

    def note(what, result=None):
        log.append((what, name))
        return result

    def run(prepared):
        time.sleep(seconds)
        return note("run", prepared)

    found = {"x": np.ones(3)} if outputs is None else outputs
    side, dtype = (PYTORCH if name.startswith("torch") else OURS), given.pop("dtype", "float32")
    return Variant(
        side, dtype, name, run, lambda result: note("outputs", found), lambda: note("prepare", name), **given
    )


def runs(log) -> list[str]:
    return [name for what, name in log if what == "run"]


def test_variants_run_in_turns_after_warm_up():
    log = []
    measured = measure(Case("work", [stub(log, name) for name in ("a", "b", "torch")], 2, "images"), rounds=4)
    assert runs(log)[: 3 * harness.WARM_UP] == sorted(["a", "b", "torch"] * harness.WARM_UP)
    timed = np.reshape(runs(log)[3 * harness.WARM_UP :], (4, 3)).tolist()
    assert timed == [["a", "b", "torch"], ["b", "torch", "a"], ["torch", "a", "b"], ["a", "b", "torch"]]
    assert all(len(row["seconds"]) == len(row["cpu_seconds"]) == 4 for row in measured["rows"])
    # Each run is given what was prepared for it just before.
    assert all(log[place - 1] == ("prepare", name) for place, (what, name) in enumerate(log) if what == "run")


def test_preparing_and_comparing_are_not_timed():
    def slow(value=None):
        time.sleep(0.05)
        return {"x": np.ones(3)}

    variant = dataclasses.replace(stub([], "a"), prepare=slow, outputs=slow)
    (row,) = measure(Case("work", [variant], 1, "images"), rounds=3)["rows"]
    assert row["upper"] < 0.04


ONES = {"x": np.ones(4), "tokens": np.arange(4)}


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"x": 1.01 * np.ones(4)}, r"x is 0.01 away"),
        ({"x": np.array([1, 1, 1, np.nan])}, "x is nan away"),
        ({"x": np.ones((2, 2))}, r"the shape \(2, 2\), not \(4,\)"),
        ({"x": np.ones(4), "tokens": np.array([0, 1, 2, 4])}, "tokens differs in 1 of 4 places"),
        ({"y": np.ones(4)}, "no output that can be compared"),
    ],
)
def test_other_outputs_stop_the_measurement_before_anything_is_timed(wrong, told):
    log = []
    case = Case("work", [stub(log, "a", outputs=ONES), stub(log, "torch", outputs=wrong)], 1, "images")
    with pytest.raises(OutputsDiffer, match=f"work: PyTorch, torch, float32.*{told}"):
        measure(case, rounds=5)
    assert len(runs(log)) <= 1 + harness.WARM_UP


def test_distances_are_told():
    near = {"x": np.array([1, 1, 1, 1 + 2e-4]), "tokens": np.arange(4), "other": np.zeros(1)}
    assert distances(near, ONES, 1e-3, "name") == {"tokens": 0.0, "x": pytest.approx(1e-4)}


def test_how_many_times_as_fast_is_told_for_each_dtype_and_for_the_best():
    def row(side, how, dtype, seconds):
        times = {"seconds": seconds, "median": float(np.median(seconds)), "cpu_seconds": [0.5 * s for s in seconds]}
        return {"side": side, "how": how, "dtype": dtype} | times

    rows = [
        row(OURS, "jit", "float32", [1.0, 2.0, 1.0]),
        row(OURS, "jit", "bfloat16", [4.0, 4.0, 4.0]),
        row(PYTORCH, "eager", "float32", [3.0, 3.0, 3.0]),
        row(PYTORCH, "torch.compile", "float32", [2.0, 6.0, 2.0]),
        row(PYTORCH, "eager", "bfloat16", [1.5, 1.5, 1.5]),
    ]
    found = harness.speedups(rows)
    assert {name: one["ratio"] for name, one in found.items()} == {"float32": 2.0, "bfloat16": 0.375, "any": 1.5}
    assert found["float32"]["by_round"] == [2.0, 2.0, 2.5] and found["float32"][PYTORCH] == "torch.compile, float32"
    assert found["any"]["cpu_ratio"] == 1.5
    assert harness.speedups(rows[:2]) == {}


def test_the_gain_of_a_feature_is_told_for_each_dtype():
    def row(side, dtype, seconds):
        times = {"seconds": seconds, "median": float(np.median(seconds)), "cpu_seconds": seconds}
        return {"side": side, "how": "how", "dtype": dtype} | times

    rows = [row(WITH, "float32", [1.0, 2.0, 1.0]), row(WITHOUT, "float32", [3.0, 3.0, 3.0])]
    found = harness.speedups([*rows, row(WITH, "bfloat16", [9.0])])
    assert found.keys() == {"float32"}
    assert found["float32"]["ratio"] == 3.0 and found["float32"]["by_round"] == [2.25, 3.0, 3.0]


ABSENT = (
    "PIL",
    "diffusers",
    "fastapi",
    "grain",
    "jaxtyping",
    "ml_collections",
    "peft",
    "pydantic",
    "tenacity",
    "tensorboardX",
)


def test_the_frameworks_alone_are_enough():
    """A machine with a GPU may have no more: all but fine-tuning, whose data are opened with Pillow."""
    names = (
        "sd3_rollout sd3_update text_encoding qwen_edit_rollout qwen_edit_update critic_decode critic_features loading"
    )
    imported = ", ".join(f"benchmarks.{name}" for name in names.split())
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); import {imported}"
    subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT, check=True, timeout=300)


def test_random_t5_has_scores_as_wide_as_a_trained_one(tmp_path):
    raw = dict(SD3["small"].model["text_encoder_3"]) | {"num_layers": 1, "vocab_size": 32}
    write_network(raw, tmp_path, "float32")
    weights = load_file(tmp_path / "model.safetensors")
    deviation = {
        name: weights[f"encoder.block.0.layer.0.SelfAttention.{name}.weight"].std() * raw["d_model"] ** 0.5
        for name in ("q", "k")
    }
    assert deviation == {"q": pytest.approx(raw["d_kv"] ** -0.5, rel=0.02), "k": pytest.approx(1, rel=0.02)}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("AMD EPYC", "amd-epyc"),
        ("Intel(R) Xeon(R) Processor", "intel-xeon"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c"),
        ("", "unknown"),
    ],
)
def test_results_of_two_cpus_stand_side_by_side(model, name, tmp_path):
    found = {"question": "q", "options": {"size": "small"}, "date": "2026-01-02"}
    made_on = found | {"machine": {"accelerators": [], "cpu": model}}
    assert harness.result_file(made_on, tmp_path).name == f"q_small_cpu_{name}_2026-01-02.json"
    gpu = found | {"machine": {"accelerators": ["NVIDIA H200"], "cpu": model}}
    assert harness.result_file(gpu, tmp_path).name == "q_small_nvidia-h200_2026-01-02.json"


def test_a_result_says_how_it_was_made_and_names_nobody(tmp_path, capsys):
    def cases(options, folder):
        assert folder.is_dir() and options.rounds == 3 and options.dtypes == ("float32",)
        yield Case("first", [stub([], "a"), stub([], "torch", 0.01)], 2, "images", 1e9, {"steps": 4})
        assert len(json.loads(next(tmp_path.glob("*.json")).read_text())["cases"]) == 1  # kept, whatever comes
        yield Case("second", [stub([], "a")], 1, "images", skipped={"PyTorch": "not installed: diffusers"})

    given = ["--size", "small", "--rounds", "3", "--dtype", "float32", "--out", str(tmp_path)]
    harness.main("stubs", "About stubs.", cases, given)
    (file,) = tmp_path.iterdir()
    assert re.fullmatch(r"stubs_small_cpu_[a-z0-9.-]+_\d{4}-\d\d-\d\d\.json", file.name)
    found = json.loads(file.read_text())
    assert found["command"] == "python -m benchmarks.stubs --size small --rounds 3 --dtype float32"
    assert str(tmp_path) not in file.read_text() and str(Path.home()) not in file.read_text()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", found["revision"])
    assert found["machine"]["cores"] > 0 and {"python", "jax", "numpy"} <= found["versions"].keys()
    first, second = found["cases"]
    assert first["config"] == {"steps": 4} and first["speedup"]["any"]["ratio"] > 1
    row = first["rows"][1]
    assert row["lower"] <= row["median"] <= row["upper"] and row["per_second"] == pytest.approx(2 / row["median"])
    assert row["flops_per_second"] == pytest.approx(1e9 / row["median"])
    assert second["skipped"] == {"PyTorch": "not installed: diffusers"} and second["speedup"] == {}
    printed = capsys.readouterr().out
    assert "skipped: PyTorch: not installed: diffusers" in printed and "times as fast" in printed
    told = tables.page([found])
    assert told.startswith("# Speed: results") and found["command"] in told and found["date"] in told
    assert (
        f"| {row['side']}, {row['how']}, float32 | {row['median']:.3g} (" in told
        and f"| {row['per_second']:.3g} |" in told
    )
    assert f"**{first['speedup']['any']['ratio']:.2f}**" in told and "not run: PyTorch: not installed" in told


def test_the_page_of_results_is_made_of_the_kept_ones():
    assert tables.PAGE.read_text() == tables.page(tables.stored()), "run python -m benchmarks.tables"


def test_what_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "diffusers" else name)
    assert sd3_rollout.absent("diffusers", "peft") == "not installed: diffusers"
    assert sd3_rollout.absent("peft") is None


# Each script once


def agree(case: Case, sides=(OURS, PYTORCH)) -> dict:
    """The case measured once, on both sides: outputs that differ raise."""
    measured = measure(case, rounds=1)
    assert [row["side"] for row in measured["rows"]] == list(sides) and measured["skipped"] == {}
    assert case.flops > 0 and measured["speedup"]["float32"]["ratio"] > 0
    assert json.dumps(measured)
    return {row["side"]: row["distance"] for row in measured["rows"]}


@pytest.fixture
def options(tmp_path, monkeypatch) -> Options:
    monkeypatch.setattr(harness, "WARM_UP", 1)
    return Options("tiny", ("float32",), ("eager",), rounds=1, devices=1, out=tmp_path)


FAMILIES = [(sd3_rollout, sd3_update, SD3), (qwen_edit_rollout, qwen_edit_update, QWEN_EDIT)]
TINY = {"height": 32, "width": 16, "text_tokens": 7, "images": 2, "steps": 5, "timesteps": 2, "rank": 4}


@pytest.mark.slow
@pytest.mark.parametrize("rollout, update, sizes", FAMILIES)
def test_generators(rollout, update, sizes, options, tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    for script, compared in ((rollout, {"latents", "images"}), (update, {"loss", "gradient", "adapters", "average"})):
        (folder := tmp_path / script.__name__).mkdir()
        (case,) = script.cases(options, folder, dataclasses.replace(sizes["tiny"], **TINY))
        assert compared <= agree(case)[PYTORCH].keys()


def test_critic_decode(options, tmp_path):
    pytest.importorskip("torch")
    size = dataclasses.replace(CRITIC["tiny"], side=32, text_tokens=9, tokens=5, batches=(2,))
    prefill, decode = critic_decode.cases(options, tmp_path, size)
    assert agree(prefill)[PYTORCH].keys() == {"logits"}
    assert agree(decode)[PYTORCH].keys() == {"logits", "tokens"}


@pytest.fixture
def judging(options, tmp_path, monkeypatch) -> Iterator[Case]:
    """What the critic saves, with as little to save as can be."""
    monkeypatch.setitem(critic_features.GROUPS, "tiny", (2, 2))
    monkeypatch.setattr(critic_features, "SCORE_TOKENS", 5)
    size = dataclasses.replace(CRITIC["tiny"], side=32, text_tokens=40, tokens=32)
    return critic_features.cases(options, tmp_path, size)


def gain(case: Case) -> dict[str, float]:
    measured = measure(case, rounds=1)
    assert [row["side"] for row in measured["rows"]] == [WITH, WITHOUT] and case.count == 8
    assert measured["speedup"].keys() == {"float32"} and json.dumps(measured)
    assert "gain: with it **" in "\n".join(tables.table(measured)) and "gain: with it" in harness.table(measured)
    return measured["rows"][1]["distance"]


def test_critic_features(judging):
    assert gain(next(judging)).keys() == {"digits", "first_digits", "all_digits", "tokens"}


@pytest.mark.slow
def test_all_critic_features(judging):
    distances = {case.name: gain(case).keys() for case in judging}
    assert len(distances) == 7 and sum("tokens" in found for found in distances.values()) == 6


def test_ends_are_spread():
    tokens = np.random.default_rng(0).integers(0, 500, (8, 32))
    ends = critic_features.spread_ends(tokens)
    lengths = [next((place for place, token in enumerate(row) if token in ends), 32) for row in tokens]
    np.testing.assert_allclose(sorted(lengths), np.arange(4, 36, 4), atol=4)
    assert critic_features.spread_ends(np.full((4, 8), 7)) == ()


def test_critic_sft(options, tmp_path):
    pytest.importorskip("torch")
    size = dataclasses.replace(SFT["tiny"], side=32, text_tokens=9, tokens=5, batches=(2,))
    (case,) = critic_sft.cases(options, tmp_path, size)
    assert agree(case)[PYTORCH].keys() == {"loss", "gradient"}


def test_text_encoding(options, tmp_path):
    pytest.importorskip("torch")
    (case,) = text_encoding.cases(options, tmp_path, dataclasses.replace(SD3["tiny"], images=2))
    assert agree(case)[PYTORCH].keys() == {"context", "pooled"}


def test_the_sizes_are_what_they_say():
    """`small` has about 50 million parameters a network that is trained or asked; `full` is what is published."""
    for raw in (SD3["small"].model["transformer"], QWEN_EDIT["small"].model["transformer"], CRITIC["small"].model):
        assert 40e6 < parameters(raw) < 65e6
    for family in (SD3, QWEN_EDIT):
        model = family["small"].model
        pipeline_class(model["model_index"]).from_configs(model, "float32", make_mesh(devices=jax.devices()[:1]))
    assert SD3["full"].model == PIPELINES["stabilityai/stable-diffusion-3.5-medium"]
    assert CRITIC["full"].model == QWEN3_VL["8B"]
