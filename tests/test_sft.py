"""Training a critic: batches, the step, a whole run, and the same run stopped and continued."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from critic_miniature import MINIATURE, TEXTS, picture, write_miniature
from docs_pages import unexplained
from flax import nnx
from jax.sharding import PartitionSpec as P

from firm_jax import models
from firm_jax.config import load_config
from firm_jax.critic import Critic, sft, sft_data, sft_eval, tuning
from firm_jax.critic.packing import measure
from firm_jax.critic.processing import Processor
from firm_jax.data.conversations import Conversation, load_conversations
from firm_jax.embedded import embedded_path
from firm_jax.errors import ConfigError, DataError, NonFiniteError
from firm_jax.mesh import make_mesh
from firm_jax.models.layers import Linear
from firm_jax.run import Run, Stopped

ANSWERS = ("**Final Alignment Rating: 4**\n\\boxed{4}", '{"score": [1, 2, 3], "reasoning": "the colours are clean"}')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_miniature(tmp_path_factory.mktemp("critic"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Twelve conversations, with one or two images each."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = []
    for number in range(12):
        images = [f"{number}_{i}.png" for i in range(1 + number % 2)]
        for i, name in enumerate(images):
            picture(10 * number + i, 24, 16).save(path.parent / name)
        turns = [
            {"role": "user", "content": "<image>" * len(images) + TEXTS[0][: 10 + number]},
            {"role": "assistant", "content": ANSWERS[number % 2]},
        ]
        lines.append(json.dumps({"messages": turns, "images": images}))
    path.write_text("\n".join(lines))
    return path


def batches(file, folder, **changes) -> sft_data.Batches:
    options = {"batch_size": 4, "lengths": (96,), "shape": (1, 4), "seed": 0} | changes
    return sft_data.Batches(load_conversations(file), Processor(folder), **options)


def test_scores_are_found_in_both_kinds_of_answer():
    assert sft_data.read_scores(ANSWERS[0]).scores == (4,)
    assert sft_data.read_scores(ANSWERS[1]).scores == (1, 2, 3)
    assert sft_data.read_scores("no score at all").scores is None


def test_a_pass_shows_every_example_once_in_an_order_of_its_own(file, folder, monkeypatch):
    taken = []
    monkeypatch.setattr(sft_data.Batches, "take", lambda self, indices: taken.append([int(i) for i in indices]))
    monkeypatch.setattr(sft_data, "WINDOW", 2)  # a window of two batches and one of a single batch
    source = batches(file, folder)
    for step in range(6):
        source.at(step)
    assert sorted(np.concatenate(taken[:3])) == sorted(np.concatenate(taken[3:])) == list(range(12))
    assert taken[:3] != taken[3:]
    repeated = taken.copy()
    source.at(4)
    assert taken[-1] == repeated[4]
    shorter, longer = sorted([source.examples.text_length(i) for i in batch] for batch in taken[:2])
    assert max(shorter) <= min(longer)


def test_batches_hold_the_scores_tokens(file, folder):
    source = batches(file, folder)
    batch = source.take([0, 1, 2, 3])
    assert batch["ids"].shape == (1, 4, 96)
    digits = np.array(source.processor.digits)
    for row, scores in enumerate([(4,), (1, 2, 3)] * 2):
        ids, targets = batch["ids"][0, row], batch["targets"][0, row]
        np.testing.assert_array_equal(ids[targets == 2], digits[np.array(scores) - 1])


def test_verdicts_count_as_often_as_asked(step):
    graphdef, params, _, _, batch = step
    batch = {name: array[0] for name, array in batch.items()}
    marked = np.where((batch["targets"] == 1) & (batch["ids"] % 2 == 0), 3, batch["targets"])
    verdicts, others = np.where(marked == 3, 1, 0), np.where(marked == 3, 0, marked)
    loss = jax.jit(lambda targets: sft.sft_loss(graphdef, params, batch | {"targets": targets}, verdict_weight=3.0)[0])
    few, many = (verdicts[:, 1:] > 0).sum(), (others[:, 1:] > 0).sum()
    expected = (3 * few * float(loss(verdicts)) + many * float(loss(others))) / (3 * few + many)
    assert few > 5 and float(loss(marked)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("variant", "criteria", "images"),
    [("critic_gen", {"alignment", "quality"}, 1), ("critic_edit", {"edit_execution", "edit_consistency"}, 2)],
)
def test_the_miniatures_critics_are_trained_on_their_own_half_of_the_shapes_world(variant, criteria, images):
    config = load_config(f"configs/shapes.py:{variant}")
    rubrics = sft_data.rubrics_of(config)
    assert set(rubrics) == criteria
    for examples in sft_data.sources(config, rubrics):
        drawn = [examples[index] for index in range(12)]
        assert {example.criterion for example in drawn} == criteria
        assert {len(example.images) for example in drawn} == {images}
        assert all(sft_data.read_scores(example.answer).scores for example in drawn)


@pytest.mark.parametrize("variant", ["tiny_edit", "tiny_gen"])
def test_the_examples_of_the_miniature_jobs_have_room(variant):
    config = load_config(f"configs/critic_sft.py:{variant}")
    config.data.examples = config.eval.examples = 250
    processor = Processor(embedded_path(config.critic.model), config.data.max_pixels)
    lengths = np.concatenate(
        [measure(part, processor).tokens for part in sft_data.sources(config, sft_data.rubrics_of(config), processor)]
    )
    assert lengths.max() <= max(config.train.lengths) - 16  # of 8,000 the longest has 215, and 255


def test_an_example_that_is_too_long_is_an_error(file, folder):
    with pytest.raises(DataError, match=r"more than the 32 of the last of train\.lengths"):
        batches(file, folder, lengths=(32,)).at(0)


@pytest.mark.fault("too-long-example")
def test_examples_that_are_too_long_are_known_before_the_run_and_never_cut(file, folder):
    processor = Processor(folder)
    examples = load_conversations(file)
    lengths = [len(sft_data.encode(examples, processor, 96, index)) for index in range(12)]
    assert len(set(lengths)) > 2
    limit = sorted(lengths)[8]
    found = load_conversations(file, max_bad_fraction=0.5, check=sft_data.length_check(processor, limit))
    kept = [length for length in lengths if length <= limit]
    assert [len(sft_data.encode(found, processor, limit, index)) for index in range(len(found))] == kept
    over = [length for length in lengths if length > limit]
    assert [bad.reason for bad in found.quarantined] == [
        f"has {length} tokens, more than the {limit} that are trained on" for length in over
    ]
    config = make_config(file, folder, lengths=(16, limit))
    with pytest.raises(DataError, match=rf"{len(over)} of 12 records .*has {over[0]} tokens, more than the {limit}"):
        sft_data.sources(config, None, processor)


def make_config(file, folder, **train):
    config = load_config("configs/shapes.py:critic_gen")
    config.critic.model = str(folder)
    config.data.source = config.data.held_out = str(file)
    config.train.update({"epochs": 3, "steps_per_epoch": 2, "batch_size": 4, "lengths": (96,), "learning_rate": 3e-3})
    config.train.update(train)
    config.eval.update({"every": 3, "batch_size": 16, "max_new_tokens": 16})
    return config


@pytest.fixture
def one_device(monkeypatch):
    """Runs see the first of the simulated devices only."""
    monkeypatch.setattr(sft, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[:1]))


ALL, NOTHING = tuning.Tuning(tuple(tuning.PARTS)), nnx.State({})


@pytest.fixture(scope="module")
def step(file, folder):
    """Model, one batch, and the compiled step."""
    graphdef, params = nnx.split(models.from_pretrained(folder))
    config = make_config(file, folder)
    optimizer = tuning.make_optimizer(config.train, tuning.learning_rates(config), 6)
    update = sft.make_update(graphdef, ALL, optimizer, compute_dtype="float32", remat="none")
    return graphdef, params, optimizer, update, batches(file, folder).take(range(4))


def test_a_step_that_is_not_finite_changes_nothing(step):
    _, params, optimizer, update, batch = step
    kept = jax.device_get(params)
    unmarked = batch | {"targets": np.zeros_like(batch["targets"])}
    state, metrics = update(NOTHING, sft.init_state(optimizer, params), sft_data.on_mesh(unmarked, None))
    assert not np.isfinite(metrics["loss/total"]) and int(state["step"]) == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["params"]), kept)
    with pytest.raises(NonFiniteError, match="step 7: loss nan"):
        sft._averages(sft._fetched([metrics]), 8)


def test_eight_devices_take_the_same_step(step, folder):
    _, params, optimizer, update, batch = step
    _, expected = update(NOTHING, sft.init_state(optimizer, params), sft_data.on_mesh(batch, None))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        _, sharded = nnx.split(models.from_pretrained(folder, mesh=mesh))
        state = sft.init_state(optimizer, sharded)
        state, found = update(NOTHING, state, sft_data.on_mesh(batch, mesh))
    for name in ("loss/total", "loss/score", "grad/norm"):
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    moments = optimizer_leaf(state["optimizer"], ("layers", "mlp", "up_proj", "kernel"))
    assert moments and all(leaf.sharding.spec == P(None, None, ("tensor", "fsdp")) for leaf in moments)


def optimizer_leaf(state, names) -> list:
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        if all(name in keys for name in names):
            found.append(leaf)
    return found


def metrics_of(workdir) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert unexplained({name for line in lines for name in line}) == [], "tell of it in docs/metrics.md"
    return [{k: v for k, v in line.items() if not k.startswith(("time", "goodput", "throughput"))} for line in lines]


@pytest.mark.slow  # test_sft_run.py does it of a LoRA
def test_a_stopped_run_continues_bit_for_bit(file, folder, tmp_path, monkeypatch, one_device):
    config = make_config(file, folder)
    sft.train(config, str(tmp_path / "straight"))
    asked = iter([False, False, True])
    with monkeypatch.context() as patched:
        patched.setattr(Run, "should_stop", lambda self: next(asked))
        with pytest.raises(Stopped):
            sft.train(config, str(tmp_path / "stopped"))
    assert len(metrics_of(tmp_path / "stopped")) == 1
    sft.train(config, str(tmp_path / "stopped"))
    straight = metrics_of(tmp_path / "straight")
    assert metrics_of(tmp_path / "stopped") == straight
    assert straight[-1]["loss/total"] < straight[0]["loss/total"]
    for name in ("eval/loss", "eval/score_loss", "eval/parse_failure_rate"):
        assert straight[-1][name] is not None
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("straight", "stopped")]
    assert weights[0] == weights[1]
    critic = Critic.from_pretrained(tmp_path / "straight" / "model", dtype="float32")
    assert isinstance(critic.generate([{"images": [picture(0, 20, 20)], "text": "a"}], max_new_tokens=2)[0], str)
    assert {path.name for path in (tmp_path / "straight" / "model").iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "preprocessor_config.json",
        "rubrics",
    }


def test_configs_that_cannot_be_run(file, folder, tmp_path):
    config = make_config(file, folder)
    config.data.held_out = None
    with pytest.raises(ConfigError, match="held_out is not set"):
        sft.train(config, str(tmp_path / "a"))
    for key, value in (("batch_size", 0), ("param_dtype", "float8"), ("stored_dtype", "int8"), ("report_every", 0.0)):
        with pytest.raises(ConfigError, match=rf"train\.{key} is '?{value}"):
            sft.train(make_config(file, folder, **{key: value}), str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    config = make_config(file, folder)
    config.tune.update({"vision": False, "projector": False, "language": False})
    with pytest.raises(ConfigError, match=r"nothing is trained: all of tune.projector, tune.vision, tune.language"):
        sft.train(config, str(tmp_path / "b"))


def test_score_errors_leave_unreadable_answers_out():
    class Fixed:
        def generate(self, requests, *_):
            return ["\\boxed{2}", "\\boxed{5}", "nothing", '{"score": [1, 2, 5]}']

    def example(answer, criterion):
        return Conversation((), "rate", answer, criterion)

    examples = [example("\\boxed{4}", "alignment"), example("\\boxed{5}", "alignment")]
    examples += [example("\\boxed{1}", "alignment"), example('{"score": [1, 2, 3]}', "quality")]
    metrics = sft_eval.score_errors(Fixed(), examples, 16)
    assert metrics["eval/parse_failure_rate"] == 0.25
    assert metrics["eval/mae_alignment"] == 1.0 and metrics["eval/mae_constant_alignment"] == 0.5
    assert metrics["eval/mae_quality"] == pytest.approx(2 / 3) and metrics["eval/mae_constant_quality"] == 0
    assert metrics["eval/mae"] == pytest.approx(4 / 5)


def test_weight_decay_spares_norms_and_biases(file, folder):
    """With a gradient of zero, only kernels and embeddings move."""
    config = make_config(file, folder, weight_decay=0.5, warmup_ratio=0.0)
    optimizer = tuning.make_optimizer(config.train, tuning.learning_rates(config), 6)
    layer = {"proj": nnx.state(Linear(2, 3, rngs=nnx.Rngs(0)))}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, layer), optimizer.init(layer), layer)
    moved = {name: np.abs(update[...]).max() for name, update in updates["proj"].items()}
    assert moved["kernel"] > 0 and moved["bias"] == 0


def test_a_new_miniature_is_made_where_no_model_is_named(tmp_path, one_device):
    config = load_config("configs/shapes.py:critic_gen")
    config.miniature.update(MINIATURE | {"texts": 20, "min_pixels": 1024, "max_pixels": 1024})
    config.train.update({"epochs": 1, "steps_per_epoch": 1, "batch_size": 2, "lengths": (512,)})
    config.data.examples, config.eval.examples = 20, 2
    config.eval.update({"every": 1, "batch_size": 2, "max_new_tokens": 16})
    sft.train(config, str(tmp_path))
    critic = Critic.from_pretrained(tmp_path / "model", dtype="float32")
    assert critic.rubrics == sft_data.rubrics_of(config)
    assert metrics_of(tmp_path)[0]["eval/parse_failure_rate"] == 1.0


@pytest.mark.parametrize("shape", [(2, 2), (3, 2)])
def test_micro_batches_add_up_to_the_batch(step, file, folder, shape):
    """Also where examples differ in tokens and images, and where a micro-batch is padding only."""
    _, params, optimizer, update, batch = step
    whole, expected = update(NOTHING, sft.init_state(optimizer, params), sft_data.on_mesh(batch, None))
    parts = batches(file, folder, shape=shape).take((0, 2, 1, 3))  # answers of one length first
    assert parts["ids"].shape[:2] == shape and len(set((parts["targets"] > 0).sum((1, 2)))) > 1
    added, found = update(NOTHING, sft.init_state(optimizer, params), sft_data.on_mesh(parts, None))
    for name in ("loss/total", "loss/score", "grad/norm"):
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    for one, other in zip(jax.tree.leaves(added["optimizer"]), jax.tree.leaves(whole["optimizer"]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


def test_what_is_held_in_bfloat16_learns(step):
    graphdef, params, optimizer, _, batch = step
    held = tuning.cast(params, "bfloat16")
    update = sft.make_update(graphdef, ALL, optimizer, compute_dtype="bfloat16", remat="none")
    state = sft.init_state(optimizer, held, "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"bfloat16", "int32"}
    losses = []
    for _ in range(4):
        state, metrics = update(NOTHING, state, sft_data.on_mesh(batch, None))
        losses.append(float(metrics["loss/total"]))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"bfloat16", "int32"}
    assert losses[-1] < losses[0]
