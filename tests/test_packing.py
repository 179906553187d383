"""Several examples in a row: every example once, nothing over capacity, and the loss of the examples unpacked."""

from dataclasses import replace
from unittest import mock

import jax
import numpy as np
import pytest
from critic_miniature import TEXTS, picture, write_miniature
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from firm_jax import models
from firm_jax.critic import packing
from firm_jax.critic.packing import PackedBatches, Sizes, collate_packed, measure
from firm_jax.critic.processing import Processor, collate, image_table
from firm_jax.critic.sft import sft_loss
from firm_jax.critic.sft_data import on_mesh, read_scores
from firm_jax.data.conversations import Conversation
from firm_jax.errors import DataError

ANSWERS = ('{"score": [4], "reasoning": "the colours are clean"}', "**Final Alignment Rating: 2**\n\\boxed{2}")
# Two images, one, none, and one of the first again; odd sizes, all unequal.
IMAGES = (
    (picture(0, 37, 22), picture(1, 24, 40)),
    (picture(2, 50, 17),),
    (),
    (picture(1, 24, 40), np.asarray(picture(3, 19, 33))),
    (picture(4, 30, 30),),
)
EXAMPLES = [
    Conversation(images, TEXTS[0][: 8 + 5 * number], ANSWERS[number % 2]) for number, images in enumerate(IMAGES)
]


def packed_batches(sizes: Sizes, encode=None, **changes) -> PackedBatches:
    options = {"batch_size": 2, "length": 20, "max_images": 6, "merge_size": 2, "multiple": 1, "seed": 0} | changes
    return PackedBatches(encode, sizes, **options)


def sizes_of(tokens, images) -> Sizes:
    return Sizes(np.array(tokens), np.array(images), np.zeros(len(tokens), int))


examples = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=60)


@given(examples, st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_an_epoch_shows_every_example_once_in_rows_that_hold_them(drawn, batch_size, window, seed):
    sizes = sizes_of(*zip(*drawn, strict=True))
    with mock.patch.object(packing, "WINDOW", window):
        source = packed_batches(sizes, batch_size=batch_size, seed=seed)
        steps = [source.examples_at(step) for step in range(2 * len(source))]
        # Asked for out of order, of a source that has seen nothing else: the step says everything.
        for step in reversed(range(len(steps))):
            assert packed_batches(sizes, batch_size=batch_size, seed=seed).examples_at(step) == steps[step]
    for epoch in (steps[: len(source)], steps[len(source) :]):
        assert {len(rows) for rows in epoch} == {batch_size}
        rows = [row for step in epoch for row in step]
        assert sorted(example for row in rows for example in row) == list(range(len(drawn)))
        assert all(sizes.tokens[row].sum() <= 20 and sizes.images[row].sum() <= 6 for row in rows if row)
        assert sum(map(bool, epoch[-1])) >= 1
        filled = sum(sizes.tokens) / sum(20 for _ in rows)
        assert source.efficiency == pytest.approx(filled)
        unpacked = sum(sizes.tokens) / (20 * batch_size * -(-len(drawn) // batch_size))  # as many rows as examples
        assert filled >= unpacked - 1e-12


@given(examples)
@settings(deadline=None, max_examples=40)
def test_no_two_rows_would_fit_into_one(drawn):
    sizes = sizes_of(*zip(*drawn, strict=True))
    rows = packing.pack(sizes.tokens, sizes.images, length=20, max_images=6)
    room = [(sizes.tokens[row].sum(), sizes.images[row].sum()) for row in rows]
    for i, (tokens, images) in enumerate(room):
        assert all(tokens + more > 20 or images + shown > 6 for more, shown in room[:i])


def test_packing_halves_the_padding_of_critic_examples():
    """2,000 examples of 96 to 224 tokens, two images each: rows of 1,024 tokens are nearly full."""
    rng = np.random.default_rng(0)
    sizes = sizes_of(rng.integers(96, 225, 2000), np.full(2000, 2))
    assert packed_batches(sizes, length=1024, max_images=16, batch_size=4).efficiency > 0.95
    assert packed_batches(sizes, length=1024, max_images=8, batch_size=4).efficiency < 0.65  # images are what is full
    assert packed_batches(sizes, length=224, max_images=2, batch_size=4).efficiency < 0.75  # one example a row


def test_epochs_and_seeds_have_orders_of_their_own():
    sizes = sizes_of([5] * 40, [0] * 40)
    source = packed_batches(sizes)
    first, second = ([source.examples_at(step) for step in range(start, start + 5)] for start in (0, 5))
    assert len(source) == 5 and first != second
    assert [packed_batches(sizes, seed=1).examples_at(step) for step in range(5)] != first


@pytest.mark.fault("too-long-example")
def test_an_example_that_no_row_holds_is_refused_before_anything_is_read():
    with pytest.raises(DataError, match=r"2 of 4 examples do not fit .*; example 1 has 21 tokens, more than its 20"):
        packed_batches(sizes_of([20, 21, 3, 30], [0] * 4))
    with pytest.raises(DataError, match=r"1 of 2 examples do not fit .*; example 0 has 7 images, more than its 6"):
        packed_batches(sizes_of([5, 5], [7, 0]))
    with pytest.raises(DataError, match="no examples"):
        packed_batches(sizes_of([], []))


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    """Model and processor of a tiny random critic, and the examples as sequences."""
    folder = write_miniature(tmp_path_factory.mktemp("critic"))
    processor = Processor(folder)
    return nnx.split(models.from_pretrained(folder, dtype="float32")), processor, [
        processor.sequence(e.images, e.prompt, e.answer, scores=read_scores(e.answer).spans) for e in EXAMPLES
    ]  # fmt: skip


def test_sizes_are_those_of_the_sequences(critic):
    _, processor, sequences = critic
    sizes = measure(EXAMPLES, processor)
    assert sizes.tokens.tolist() == [len(sequence) for sequence in sequences]
    assert sizes.images.tolist() == [2, 1, 0, 2, 1]
    largest = [max((len(image.patches) for image in sequence.images), default=0) for sequence in sequences]
    assert sizes.patches.tolist() == largest
    assert len(set(sizes.tokens)) == 5


def test_every_batch_has_one_shape_and_holds_its_examples_tokens(critic):
    _, processor, sequences = critic
    sizes = measure(EXAMPLES, processor)
    longest = int(sizes.tokens.max())
    source = packed_batches(sizes, sequences.__getitem__, length=longest + 9, max_images=2)
    batches = [source.at(step) for step in range(len(source))]
    assert len(source.packs) % 2, "the last batch should have a row of padding here"
    assert len({tuple((name, array.shape) for name, array in batch.items()) for batch in batches}) == 1
    assert sum((batch["segments"] > 0).sum() for batch in batches) == sizes.tokens.sum()
    assert np.mean([batch["segments"] > 0 for batch in batches]) == pytest.approx(source.efficiency)
    longer = packed_batches(replace(sizes, tokens=sizes.tokens + 1), sequences.__getitem__, length=longest + 9)
    with pytest.raises(DataError, match=r"example \d has \d+ tokens and was measured with \d+"):
        longer.at(0)


def test_a_packed_row_holds_each_sequence_as_it_stands_alone(critic):
    _, _, sequences = critic
    packs = [[0, 3, 1], [2, 4], []]
    table, rows = image_table(sequences)
    assert len(rows) == 5  # the image that two examples show is there once
    merged = table["patches"].shape[1] // 4
    length = sum(len(sequences[number]) for number in packs[0]) + 7
    batch = collate_packed([[sequences[number] for number in pack] for pack in packs], rows, merged, length=length)
    for row, pack in enumerate(packs):
        start = 0
        for segment, number in enumerate(pack, 1):
            sequence = sequences[number]
            place = slice(start, start + len(sequence))
            np.testing.assert_array_equal(batch["ids"][row, place], sequence.ids)
            np.testing.assert_array_equal(batch["positions"][:, row, place], sequence.positions)
            np.testing.assert_array_equal(batch["targets"][row, place], sequence.targets)
            assert (batch["segments"][row, place] == segment).all()
            index = batch["image_index"][row, place]
            for image, shown in enumerate(sequence.images):
                found = index[sequence.image == image]
                assert (found // merged == rows[shown.digest]).all()
                np.testing.assert_array_equal(found % merged, np.arange(len(shown.patches) // 4))
            assert (index[sequence.image < 0] == -1).all()
            start = place.stop
        assert (batch["segments"][row, start:] == 0).all() and (batch["image_index"][row, start:] == -1).all()
        assert (batch["targets"][row, start:] == 0).all()


def test_packed_loss_and_gradients_are_the_unpacked_ones_weighted_by_tokens(critic):
    """The fourth example is trained on its question too: its first token must not be predicted from the one before."""
    (graphdef, params), _, sequences = critic
    whole = replace(sequences[3], targets=np.maximum(sequences[3].targets, 1))
    sequences = [*sequences[:3], whole, sequences[4]]
    table, rows = image_table(sequences)
    merged = table["patches"].shape[1] // 4
    step = jax.jit(jax.value_and_grad(lambda params, batch: sft_loss(graphdef, params, batch), has_aux=True))

    longest = max(map(len, sequences))
    single = [collate([s], rows, merged, batch=1, length=longest, side="right") for s in sequences]
    tokens = [int((batch["targets"][:, 1:] > 0).sum()) for batch in single]
    assert len(set(tokens)) > 2  # else a plain mean would do
    results = [step(params, on_mesh(batch | table, None)) for batch in single]
    weighted = [(share / sum(tokens), result) for share, result in zip(tokens, results, strict=True)]
    expected = sum(share * float(loss) for share, ((loss, _), _) in weighted)
    gradients = jax.tree.map(
        lambda *leaves: sum(share * np.asarray(leaf) for (share, _), leaf in zip(weighted, leaves, strict=True)),
        *(found for _, found in results),
    )

    packs = [[sequences[0], sequences[3], sequences[1]], [sequences[2], sequences[4]]]
    packed = collate_packed(packs, rows, merged, length=max(sum(map(len, pack)) for pack in packs) + 3)
    assert (packed["targets"][:, 1:] > 0).sum() == sum(tokens)
    (loss, metrics), found = step(params, on_mesh(packed | table, None))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    scores = [(np.count_nonzero(batch["targets"] == 2), float(m["loss/score"])) for batch, ((_, m), _) in zip(
        single, results, strict=True)]  # fmt: skip
    mean = sum(count * value for count, value in scores) / sum(count for count, _ in scores)
    assert float(metrics["loss/score"]) == pytest.approx(mean, rel=1e-5)

    overall = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradients)))
    for (path, leaf), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(gradients), strict=True):
        error = np.linalg.norm(np.asarray(leaf) - theirs)
        assert error <= 1e-5 * np.linalg.norm(theirs) + 1e-8 * overall, jax.tree_util.keystr(path)
