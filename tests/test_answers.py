"""Answers that stop at the score, or are nothing else, beside whole ones; written by the critic of the shapes world."""

import numpy as np
import pytest
from critic_miniature import picture

from firm_jax import Critic
from firm_jax.critic import decode
from firm_jax.critic.parse import parse_alignment, parse_edit, parse_quality, settled
from firm_jax.critic.score import ALONE, PARSERS
from firm_jax.errors import ConfigError
from firm_jax.shapes.render import render
from firm_jax.shapes.scene import prompts, sample_scene

TOKENS = 112

QUALITY = '{"score": [4, 3, 5], "reasoning": "clean, [5], \\"score\\": 1"}'
EDIT = '{"reasoning": "it says {5} and \\"score\\": [1], 2", "score": [4]}'
ALIGNMENT = "1. **{circle}** 5/5\n**Final Alignment Rating: 4**\nso \\boxed{n} is\n\\boxed{4}\nThe end."


@pytest.mark.parametrize(
    ("parse", "answer", "stands"),
    [
        (parse_quality, QUALITY, '{"score": [4, 3, 5],'),
        (parse_quality, "```json\n" + QUALITY, '```json\n{"score": [4, 3, 5],'),
        (parse_edit, EDIT, EDIT),
        (parse_edit, '{"score": 4, "reasoning": ""}', '{"score": 4,'),
        (parse_alignment, ALIGNMENT, ALIGNMENT.removesuffix("\nThe end.")),
        (parse_alignment, "**Final Alignment Rating: 4**\n", None),
        (parse_alignment, '{"score": 4}', None),  # a stronger form may follow
        (parse_edit, '"score": 4\n', None),
        (parse_quality, '{"score": [4, 3, 7], "reasoning": "too high"}', None),
        (parse_quality, '{"score": [4, 3], "reasoning": "too few"}', None),
        (parse_edit, "no idea", None),
    ],
)
def test_a_score_stands_as_soon_as_nothing_but_another_one_could_change_it(parse, answer, stands):
    beginnings = [answer[:length] for length in range(len(answer) + 1)]
    assert next((one for one in beginnings if settled(parse, one)), None) == stands
    if stands:
        assert parse(stands).scores == parse(answer).scores and parse(stands).spans == parse(answer).spans


@pytest.fixture(scope="module")
def critic():
    return Critic.from_pretrained("embedded:critic_gen", dtype="float32", max_batch=8)


@pytest.fixture(scope="module")
def requests():
    """Three pictures, two of the shapes world and a larger one of noise, each judged by both criteria."""
    rng, shown = np.random.default_rng(0), []
    for prompt in prompts("test", 2, seed=5):
        shown.append((np.rint(render(sample_scene(rng, prompt)) * 255).astype(np.uint8), prompt.text))
    shown.append((picture(1, 96, 80), "a red circle"))
    return [
        {"images": [image], "prompt": text, "criterion": criterion}
        for criterion in ("alignment", "quality")
        for image, text in shown
    ]


@pytest.fixture(scope="module")
def whole(critic, requests):
    return critic.judge(requests, max_new_tokens=TOKENS)


def test_an_answer_up_to_its_score_has_the_scores_of_the_whole_one(critic, requests, whole, monkeypatch):
    rows, real = [], decode.decode_chunk

    def counted(graphdef, params, state, **options):
        rows.append(len(state["ended"]))
        return real(graphdef, params, state, **options)

    monkeypatch.setattr(decode, "decode_chunk", counted)
    monkeypatch.setattr(critic, "answer", "until_score")
    found = critic.judge(requests, max_new_tokens=TOKENS)
    for short, long in zip(found, whole, strict=True):
        assert (short.score, short.status, short.criterion) == (long.score, long.status, long.criterion)
        assert long.text.startswith(short.text)
        assert short.expected == pytest.approx(long.expected, abs=1e-4)
    qualities = [(short, long) for short, long in zip(found, whole, strict=True) if short.criterion == "quality"]
    assert all(len(short.text) < len(long.text) / 2 for short, long in qualities if long.status == "ok")
    assert not any("reasoning" in short.text for short, long in qualities if long.status == "ok")
    assert sum(long.status == "ok" for _, long in qualities) >= 2
    assert rows[0] == 8 and rows[1] == 4  # the three of quality are gone after a chunk


def test_a_score_alone_is_read_off_behind_its_opening(critic, requests, whole, monkeypatch):
    """Those of quality come first in the whole answer too, so they are the same; a single one is what the decoder
    would write next, and is not written."""
    calls, real = [], critic.decoder.generate
    monkeypatch.setattr(critic.decoder, "generate", lambda given, *more: calls.append(len(given)) or real(given, *more))
    monkeypatch.setattr(critic, "answer", "score_only")
    found = critic.judge(requests, max_new_tokens=TOKENS)
    assert calls == [3]
    for short, long in zip(found[3:], whole[3:], strict=True):
        assert (short.score, short.status) == (long.score, long.status) and long.text.startswith(short.text)
        assert short.expected == pytest.approx(long.expected, abs=1e-4)
    opening = critic.processor.encode(ALONE["alignment"][0])
    opened = [critic.prompt(request, TOKENS).followed_by(opening) for request in requests[:3]]
    for judgement, next_ in zip(found[:3], real(opened, 1), strict=True):
        weights = np.exp(next_.digit_logits[0] - next_.digit_logits[0].max())
        np.testing.assert_allclose(judgement.probabilities, weights / weights.sum(), atol=1e-4)
        assert judgement.score == 1 + int(weights.argmax()) and judgement.status == "ok"
        assert judgement.text == f"\\boxed{{{judgement.score}}}"


@pytest.mark.fault("unusable-answers")
def test_digits_that_are_not_finite_are_no_score(critic, requests, monkeypatch):
    monkeypatch.setattr(critic.decoder, "read_digits", lambda given, *_: np.full((len(given), 5), np.nan, np.float32))
    monkeypatch.setattr(critic, "answer", "score_only")
    [judgement] = critic.judge(requests[:1])
    assert (judgement.score, judgement.expected, judgement.status) == (None, None, "no_score")


def test_the_expected_score_needs_no_reading_of_its_own(critic, requests):
    """The digits' logits that come with the answer are those of one more reading, of the answer up to its score."""
    asked = [critic.prompt(request, TOKENS) for request in requests[:3]]
    written = critic.decoder.generate(asked, TOKENS)
    places = [np.flatnonzero(np.isin(one.tokens, critic.processor.digits))[-1] for one in written]
    again = [prompt.followed_by(one.tokens[:at]) for prompt, one, at in zip(asked, written, places, strict=True)]
    found = critic.decoder.read_digits(again)
    expected = [one.digit_logits[at] for one, at in zip(written, places, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_every_criterion_can_be_asked_for_its_score_alone():
    assert ALONE.keys() == PARSERS.keys()
    for criterion, (opening, closing) in ALONE.items():
        answer = opening + ("4" + closing if closing else "4, 3, 5],")
        assert settled(PARSERS[criterion], answer), criterion


def test_there_is_no_other_answer():
    with pytest.raises(ConfigError, match="answer is 'short'; it is one of: whole, until_score, score_only"):
        Critic(None, None, ends=(), rubrics={}, answer="short")
