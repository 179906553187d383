"""The critic on its own: batching, dropping of ended rows, sharding, judgements."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from critic_miniature import REQUESTS, picture, write_miniature
from jax.sharding import PartitionSpec as P

from firm_jax.critic import Critic, decode
from firm_jax.critic.decode import Generation
from firm_jax.critic.prefixes import CHOICES, GROUP, PICTURE, plan_batches
from firm_jax.critic.processing import Processor
from firm_jax.critic.rubric import rubrics_from
from firm_jax.errors import ConfigError, DataError, WeightsError
from firm_jax.mesh import make_mesh

NEW_TOKENS = 20  # more than one chunk, and not a multiple of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_miniature(tmp_path_factory.mktemp("critic"))


@pytest.fixture(scope="module")
def critic(folder):
    return Critic.from_pretrained(folder, dtype="float32", max_batch=8)


@pytest.fixture(scope="module")
def generations(critic):
    return generate(critic, REQUESTS)


def generate(critic, requests, max_new_tokens=NEW_TOKENS) -> list[Generation]:
    sequences = [critic.processor.sequence(request["images"], request["text"]) for request in requests]
    return critic.decoder.generate(sequences, max_new_tokens)


def assert_same(found: list[Generation], expected: list[Generation]):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert a.finish_reason == b.finish_reason
        np.testing.assert_allclose(a.digit_logits, b.digit_logits, atol=1e-4)


def test_every_token_is_accounted_for(generations, critic):
    for generation in generations:
        length = len(generation.tokens)
        assert generation.finish_reason == ("length" if length == NEW_TOKENS else "stop")
        assert 0 < length <= NEW_TOKENS and generation.digit_logits.shape == (length, 5)
        assert not np.isin(generation.tokens, critic.decoder.rules.banned).any()


def test_digit_logits_are_those_of_the_written_token(generations, critic):
    digits = list(critic.processor.digits)
    for generation in generations:
        for token, logits in zip(generation.tokens, generation.digit_logits, strict=True):
            if token in digits:
                assert digits[int(logits.argmax())] == token


def test_order_does_not_matter(generations, critic):
    order = [3, 1, 4, 0, 2]
    assert_same(generate(critic, [REQUESTS[i] for i in order]), [generations[i] for i in order])


def test_ended_rows_are_dropped_and_change_nothing(generations, critic, monkeypatch):
    """With an end token that some rows write early, the batch shrinks between chunks and the rest goes on as before."""
    written = [list(generation.tokens) for generation in generations]
    going = [tokens for tokens in written if len(tokens) == NEW_TOKENS]
    # a token that ends some row within the first chunk, and leaves another to its length
    end = next(t for tokens in written for t in tokens[:16] if any(t not in other for other in going))
    known = critic.decoder.rules
    rules = decode.TokenRules((*known.ends, int(end)), known.banned, known.digits)
    monkeypatch.setattr(critic.decoder, "rules", rules)
    sizes, real = [], decode.decode_chunk

    def counted(graphdef, params, state, **options):
        sizes.append(len(state["ended"]))
        return real(graphdef, params, state, **options)

    monkeypatch.setattr(decode, "decode_chunk", counted)
    for found, before in zip(generate(critic, REQUESTS), generations, strict=True):
        tokens = list(before.tokens)
        assert list(found.tokens) == (tokens[: tokens.index(end)] if end in tokens else tokens)
        assert found.finish_reason == ("stop" if end in tokens else before.finish_reason)
    assert sizes[0] == 8 and sizes[-1] < 8


def test_rows_that_are_enough_are_dropped_and_change_nothing(generations, critic, monkeypatch):
    """Each of five rows is ended after as many tokens as its caller wants, and the rest goes on as before."""
    wanted = [3, 99, 17, 18, 5]
    sizes, real = [], decode.decode_chunk

    def counted(graphdef, params, state, **options):
        sizes.append(len(state["ended"]))
        return real(graphdef, params, state, **options)

    def enough(number, tokens):
        np.testing.assert_array_equal(tokens, generations[number].tokens[: len(tokens)])
        return wanted[number] if len(tokens) >= wanted[number] else None

    monkeypatch.setattr(decode, "decode_chunk", counted)
    sequences = [critic.processor.sequence(request["images"], request["text"]) for request in REQUESTS]
    found = critic.decoder.generate(sequences, NEW_TOKENS, enough=enough)
    for one, before, count in zip(found, generations, wanted, strict=True):
        assert one.finish_reason == ("enough" if len(before.tokens) > count else before.finish_reason)
        np.testing.assert_array_equal(one.tokens, before.tokens[:count])
        np.testing.assert_allclose(one.digit_logits, before.digit_logits[:count], atol=1e-4)
    going = sum(
        min(count, len(before.tokens)) > decode.CHUNK for count, before in zip(wanted, generations, strict=True)
    )
    assert 0 < going < 4 and sizes == [8, decode.power_of_two(going)]


def test_equal_images_are_encoded_once(critic, monkeypatch):
    encoded, real = [], decode.encode_images

    def counted(graphdef, params, table):
        encoded.append(int((np.asarray(table["grids"]).prod(1) > 0).sum()))
        return real(graphdef, params, table)

    monkeypatch.setattr(decode, "encode_images", counted)
    generate(critic, REQUESTS, max_new_tokens=1)
    assert sum(encoded) == 4  # five images, of which two are equal


def edits() -> list[dict]:
    """Groups of three, two and three edits, each judged by two criteria, and requests that show one picture or none.

    The second source is larger than the others; one edit left its source as it was.
    """
    sources = [picture(10, 30, 22), picture(20, 44, 40), picture(30, 24, 28)]
    seeds = [(11, 12), (21, 22), (31, 32, 33)]
    edited = [[picture(seed, 37, 22) for seed in group] for group in seeds]
    edited[0].append(sources[0])
    requests = []
    for text in ("executed? Rate the edit", "are all the other things as they were? Rate it"):
        for source, candidates in zip(sources, edited, strict=True):
            requests += [{"images": [source, candidate], "text": text} for candidate in candidates]
        requests += [{"images": [sources[0]], "text": text}, {"images": [], "text": text}]
    return requests


@pytest.fixture(scope="module")
def edits_alone(folder):
    """What is written when every request is read whole."""
    critic = Critic.from_pretrained(folder, dtype="float32", max_batch=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "plan_batches", partial(plan_batches, choices=((),)))
        return generate(critic, edits(), max_new_tokens=16)


@pytest.mark.parametrize(
    ("levels", "max_batch"),
    [((GROUP, PICTURE), 4), ((GROUP,), 32)],
    ids=["both levels, over the borders of batches", "one level, pictures on both sides"],
)
def test_what_is_shared_changes_no_answer(folder, edits_alone, monkeypatch, levels, max_batch):
    monkeypatch.setattr(decode, "plan_batches", partial(plan_batches, choices=(levels,)))
    critic = Critic.from_pretrained(folder, dtype="float32", max_batch=max_batch)
    assert_same(generate(critic, edits(), max_new_tokens=16), edits_alone)


def test_pictures_that_are_encoded_each_time_change_no_answer(folder, edits_alone):
    """Every picture under a name of its own, so that nothing at all is shared."""
    critic = Critic.from_pretrained(folder, dtype="float32", max_batch=32)
    numbers = iter(range(99))
    sequences = [critic.processor.sequence(request["images"], request["text"]) for request in edits()]
    sequences = [
        replace(one, images=tuple(replace(image, digest=f"{next(numbers)}") for image in one.images))
        for one in sequences
    ]
    assert_same(critic.decoder.generate(sequences, 16), edits_alone)


def test_a_question_alone_is_answered_as_among_others(critic, edits_alone):
    for number in (0, 7, -2):
        assert_same(generate(critic, [edits()[number]], max_new_tokens=16), [edits_alone[number]])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_requests_are_answered_alike(folder, monkeypatch, seed):
    """Groups, sizes, texts and limits of batches drawn at random, at all choices of levels."""
    rng = np.random.default_rng(seed)
    pictures = [picture(number, *rng.integers(16, 64, 2)) for number in range(6)]
    requests = [
        {"images": [pictures[number] for number in rng.integers(6, size=rng.integers(4))], "text": text}
        for text in ["a red circle " * int(rng.integers(1, 8)) for _ in range(int(rng.integers(2, 4)))]
        for _ in range(int(rng.integers(4, 9)))
    ]
    answers = []
    for levels in CHOICES:
        monkeypatch.setattr(decode, "plan_batches", partial(plan_batches, choices=(levels,)))
        critic = Critic.from_pretrained(folder, dtype="float32", max_batch=2 ** int(rng.integers(1, 6)))
        answers.append(generate(critic, requests))
    for found in answers[1:]:
        assert_same(found, answers[0])


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_write_the_same(folder, edits_alone, monkeypatch, axes):
    """Four parts of a mesh, whose groups go over borders of parts and of batches."""
    monkeypatch.setattr(decode, "plan_batches", partial(plan_batches, choices=((GROUP, PICTURE),)))
    mesh = make_mesh(**axes)
    sharded = Critic.from_pretrained(folder, dtype="float32", mesh=mesh, max_batch=16)
    kernel = sharded.decoder.params["language_model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel[...].sharding.spec == P(None, None, ("tensor", "fsdp"))
    assert_same(generate(sharded, edits(), max_new_tokens=16), edits_alone)


@pytest.mark.parametrize("likely", [0, 3])
def test_one_question_at_a_time_on_a_mesh_of_one_device(folder, generations, monkeypatch, likely):
    """A batch of one is split over axes of one device each, and stays so whatever is sliced from it."""
    chunk = decode.decode_chunk
    monkeypatch.setattr(decode, "decode_chunk", lambda *given, **named: chunk(*given, **named, likely=likely)[:3])
    alone = Critic.from_pretrained(folder, dtype="float32", mesh=make_mesh(devices=jax.devices()[:1]), max_batch=1)
    assert_same(generate(alone, REQUESTS[:2]), generations[:2])


def test_a_batch_that_shrinks_to_one_row_on_a_mesh_of_one_device(folder, generations, edits_alone, monkeypatch):
    mesh = make_mesh(devices=jax.devices()[:1])
    critic = Critic.from_pretrained(folder, dtype="float32", mesh=mesh, max_batch=8)
    sequences = [critic.processor.sequence(request["images"], request["text"]) for request in REQUESTS]
    wanted = [3, 99, 4, 5, 6]
    chunk, sizes = decode.decode_chunk, []

    def counted(graphdef, params, state, **options):
        sizes.append(len(state["ended"]))
        return chunk(graphdef, params, state, **options)

    monkeypatch.setattr(decode, "decode_chunk", counted)

    def enough(number, tokens):
        return wanted[number] if len(tokens) >= wanted[number] else None

    found = critic.decoder.generate(sequences, NEW_TOKENS, enough=enough)
    for one, before, count in zip(found, generations, wanted, strict=True):
        np.testing.assert_array_equal(one.tokens, before.tokens[:count])
    assert sizes[0] == 8 and sizes[-1] == 1
    monkeypatch.setattr(decode, "plan_batches", partial(plan_batches, choices=((GROUP, PICTURE),)))
    assert_same(generate(critic, edits()[:1], max_new_tokens=16), edits_alone[:1])


def answering(critic, monkeypatch, text: str, probabilities, finish_reason="stop"):
    """Let the critic answer `text`, with these probabilities of 1..5 at every digit."""
    tokens = np.array(critic.processor.encode(text), np.int32)
    logits = np.where(np.isin(tokens, critic.processor.digits)[:, None], np.log(probabilities) + 7.0, -50.0)
    generation = Generation(tokens, logits.astype(np.float32), finish_reason)
    monkeypatch.setattr(critic.decoder, "generate", lambda sequences, *_: [generation] * len(sequences))


def test_alignment_judgement(critic, monkeypatch):
    answering(
        critic,
        monkeypatch,
        "é 1. **5 things**: no\n**Final Alignment Rating: 2**\n\\boxed{2}",
        [0.1, 0.6, 0.3, 1e-9, 1e-9],
    )
    request = {"images": [picture(0, 30, 30)], "prompt": "a red circle", "criterion": "alignment"}
    [judgement] = critic.judge([request])
    assert (judgement.score, judgement.status, judgement.criterion) == (2, "ok", "alignment")
    assert judgement.expected == pytest.approx(0.1 + 1.2 + 0.9, abs=1e-5)
    assert judgement.entropy == pytest.approx(-sum(p * np.log(p) for p in (0.1, 0.6, 0.3)), abs=1e-5)
    assert judgement.rubric == critic.rubrics["alignment"].sha256


def test_quality_judgement_has_three_scores(critic, monkeypatch):
    answering(
        critic, monkeypatch, '{"score": [4, 4, 4], "reasoning": "ok 1"}', [0.0001, 0.0001, 0.0001, 0.4998, 0.4999]
    )
    [judgement] = critic.judge([{"images": [picture(0, 30, 30)], "prompt": "x", "criterion": "quality"}])
    assert judgement.score == (4, 4, 4) and judgement.reason == "ok 1"
    assert judgement.expected == pytest.approx(4.5, abs=1e-2)


@pytest.mark.fault("unusable-answers")
@pytest.mark.parametrize(
    ("text", "finish_reason", "status"),
    [
        ("no idea", "stop", "no_score"),
        ("1. **circle** yes", "length", "truncated"),
        ("\\boxed{7}", "stop", "out_of_range"),
        ("\\boxed{4/5}", "stop", "not_integer"),
        ("\\boxed{3, 4}", "stop", "wrong_count"),
        ('{"score": NaN}', "stop", "not_integer"),
        ("<html><body>502 Bad Gateway</body></html>", "stop", "no_score"),
        (" \n", "stop", "empty"),
        ('{"reasoning": "the picture says \\"score\\": 5"', "stop", "no_score"),
        ('{"reasoning": "it is there", "score": 5', "stop", "malformed_json"),
    ],
)
def test_a_missing_score_is_missing(critic, monkeypatch, text, finish_reason, status):
    answering(critic, monkeypatch, text, [0.2] * 5, finish_reason)
    [judgement] = critic.judge([{"images": [picture(0, 30, 30)], "prompt": "x", "criterion": "alignment"}])
    assert (judgement.score, judgement.expected, judgement.entropy) == (None, None, None)
    assert judgement.status == status and judgement.text == text


@pytest.mark.fault("unusable-answers")
@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_probabilities_that_are_not_finite_give_no_expected_score(critic, monkeypatch, weight):
    answering(critic, monkeypatch, "\\boxed{2}", [0.1, 0.6, 0.3, weight, 0.1])
    [judgement] = critic.judge([{"images": [picture(0, 30, 30)], "prompt": "x", "criterion": "alignment"}])
    assert (judgement.score, judgement.expected, judgement.entropy) == (2, None, None)


def test_rubrics_of_the_folder_and_of_the_caller_are_served(folder, tmp_path, monkeypatch):
    texts = {"own": "own rubric: {prompt}", "given": "given rubric: {prompt}"}
    (folder / "rubrics").mkdir()
    (folder / "rubrics" / "alignment.txt").write_text(texts["own"])
    (tmp_path / "alignment.txt").write_text(texts["given"])
    try:
        own = Critic.from_pretrained(folder, dtype="float32")
        given = Critic.from_pretrained(folder, dtype="float32", rubrics=tmp_path)
    finally:
        (folder / "rubrics" / "alignment.txt").unlink()
        (folder / "rubrics").rmdir()
    assert own.rubrics["alignment"].text == texts["own"]
    assert given.rubrics["alignment"].text == texts["given"]
    assert given.rubrics["alignment"].sha256 == rubrics_from(tmp_path)["alignment"].sha256


def test_requests_that_cannot_be_served(critic):
    image = picture(0, 30, 30)
    with pytest.raises(ConfigError, match="no rubric for the criterion 'beauty'"):
        critic.judge([{"images": [image], "prompt": "x", "criterion": "beauty"}])
    with pytest.raises(DataError, match="request 0: the text is NoneType"):
        critic.generate([{"images": [image]}])
    with pytest.raises(DataError, match="more than the 4096"):
        critic.generate([{"images": [image], "text": "a red circle " * 2000}])
    with pytest.raises(DataError, match="too narrow"):
        critic.generate([{"images": [picture(0, 402, 2)], "text": "x"}])


def test_folders_that_are_no_critic(folder, tmp_path):
    with pytest.raises(WeightsError, match="has no image processor"):
        Processor(tmp_path)
    file = folder / "preprocessor_config.json"
    kept = file.read_text()
    try:
        file.write_text(kept.replace('"patch_size": 4', '"patch_size": 8'))
        with pytest.raises(ConfigError, match="patch_size=8 of the image processor contradicts patch_size=4"):
            Critic.from_pretrained(folder, dtype="float32")
    finally:
        file.write_text(kept)
