"""The parsers on what critics write, on what they should not have written, and on anything at all."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from firm_jax.critic.parse import Parsed, parse_alignment, parse_edit, parse_quality

PARSERS = (parse_alignment, parse_quality, parse_edit)

FULL_ALIGNMENT = r"""Checking the image against the instruction:
1. **Two red cubes**
- Two cubes are visible, both red: met.
2. **A blue ball to their left**
- The ball stands to the right: missed.
**Final Analysis**: The cubes are right, the ball is misplaced.
**Final Alignment Rating: 3**
\boxed{3}"""


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (FULL_ALIGNMENT, 3),
        (r"\boxed{5}", 5),
        (r"\boxed{{5}} done", 5),
        (r"\boxed{ [2] }", 2),
        (r"\boxed{4.0}", 4),
        (r"\boxed{**4**}", 4),
        ("**Final Alignment Rating: 4**", 4),
        ("**Final Alignment Rating**: [4]", 4),
        ("### Final alignment rating: 4.", 4),
        ('{"reasoning": "fine", "score": [2]}', 2),
        ('```json\n{"score": "3"}\n```', 3),
        ("Final Score: 1", 1),
        ('"score": 4', 4),
    ],
)
def test_alignment_in_every_form(text, score):
    parsed = parse_alignment(text)
    assert (parsed.scores, parsed.status) == ((score,), "ok")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        # The last valid answer wins.
        (r"A perfect image would be \boxed{5}. This one is \boxed{2}", 2),
        ("Final Alignment Rating: 5\nOn reflection:\nFinal Alignment Rating: 4", 4),
        ('{"score": [5]} no: {"score": [3]}', 3),
        (r"\boxed{4} and then \boxed{n}", 4),
        # A box is what the rubric demands: it decides over every weaker form, wherever that stands.
        ("\\boxed{2}\n**Final Alignment Rating: 5**", 2),
        ('**Final Alignment Rating: 2**\n{"score": 5}', 2),
        # A form that is mentioned without a number is not an answer in it.
        ("I shall answer as \\boxed{n}.\n**Final Alignment Rating: 4**", 4),
        ("**Final Alignment Rating: n**\nFinal Score: 4", 4),
    ],
)
def test_alignment_when_answers_conflict(text, score):
    assert parse_alignment(text).scores == (score,)


@pytest.mark.fault("unusable-answers")
@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("A lovely image.", "no_score"),
        ("4", "no_score"),
        ("I would rate it 4 of 5", "no_score"),
        (r"\boxed{}", "no_score"),
        (r"\boxed{four}", "no_score"),
        (r"\boxed{4", "no_score"),
        ('{"reasoning": "fine", "score": [4', "malformed_json"),
        (r"\boxed{10}", "out_of_range"),
        (r"\boxed{0}", "out_of_range"),
        (r"\boxed{-3}", "out_of_range"),
        (r"\boxed{4.5}", "not_integer"),
        (r"\boxed{4/5}", "not_integer"),
        (r"\boxed{4 5}", "not_integer"),
        (r"\boxed{4,5}", "wrong_count"),
        ("Final Alignment Rating: 4/5", "not_integer"),
        ("Final Alignment Rating: 4.5", "not_integer"),
        ("Final Alignment Rating: 45", "out_of_range"),
        ("Final Alignment Rating: 4 out of 5", "not_integer"),
        ("The Final Alignment Rating: 4 is what it would get elsewhere", "no_score"),
        ("Final Score: 7", "out_of_range"),
        # A strong form that fails is not overruled by a weak one.
        ("**Final Alignment Rating: 4**\n\\boxed{10}", "out_of_range"),
        ('**Final Alignment Rating: 4.5**\n{"score": 4}', "not_integer"),
        ("<html>502 Bad Gateway</html>", "no_score"),
    ],
)
def test_alignment_failures(text, status):
    assert parse_alignment(text) == Parsed(None, status, "", None)


def test_the_rationale_comes_along():
    assert parse_alignment(FULL_ALIGNMENT).reason == "The cubes are right, the ball is misplaced."
    assert parse_alignment("**Final Analysis:** wrong\n\\boxed{9}") == Parsed(None, "out_of_range", "wrong")
    assert parse_quality('{"score": [1, 2, 3], "reasoning": "blurred"}').reason == "blurred"
    assert parse_edit('{"reasoning": 7, "score": [1]}').reason == ""


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ('{"score": [4, 3, 5], "reasoning": "good"}', (4, 3, 5)),
        ('{"reasoning": "good", "score": [4.0, "3", 5]}', (4, 3, 5)),
        ('Here you are:\n```json\n{\n "score": [1,1,1]\n}\n```', (1, 1, 1)),
        ('{"score": [1, 1, 1]} {"score": [2, 2, 2]}', (2, 2, 2)),
        ('{"score": [1, 1, 1]} {"score": [2, 2, 9]}', (1, 1, 1)),
        # The token limit cut the reasoning off, after the score was complete.
        ('{"score": [4, 4, 2], "reasoning": "The light is', (4, 4, 2)),
        # Unescaped quotes make the object invalid; the field in first place still stands.
        ('{"score": [2, 2, 2], "reasoning": "a sign says "score": [5, 5, 5] on it"}', (2, 2, 2)),
        ('{"score": [2, 2, 2], "reasoning": "a sign says {"score": [5, 5, 5]} on it"}', (2, 2, 2)),
    ],
)
def test_quality(text, scores):
    parsed = parse_quality(text)
    assert (parsed.scores, parsed.status) == (scores, "ok")


@pytest.mark.fault("unusable-answers")
@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", "empty"),
        ("It is nice.", "no_score"),
        ("[4, 4, 4]", "no_score"),
        ('{"scores": [4, 4, 4]}', "no_score"),
        ('{"result": {"score": [4, 4, 4]}}', "no_score"),
        ('{"score": 4}', "wrong_count"),
        ('{"score": [4, 4]}', "wrong_count"),
        ('{"score": [4, 4, 4, 4]}', "wrong_count"),
        ('{"score": []}', "wrong_count"),
        ('{"score": [4, 4, 6]}', "out_of_range"),
        ('{"score": [0, 4, 4]}', "out_of_range"),
        ('{"score": [4, 4.5, 4]}', "not_integer"),
        ('{"score": [4, null, 4]}', "not_integer"),
        ('{"score": [4, true, 4]}', "not_integer"),
        ('{"score": [4, NaN, 4]}', "not_integer"),
        ('{"score": ["4/5", 4, 4]}', "not_integer"),
        ('{"score": [4, 4, ', "malformed_json"),
        ('{"score": {', "malformed_json"),
        # Two readings that disagree are none.
        ('{"score": [2, 2, 2], "reasoning": "sign: x, "score": [5, 5, 5]}', "malformed_json"),
    ],
)
def test_quality_failures(text, status):
    assert parse_quality(text) == Parsed(None, status, "", None)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"reasoning": "the hat is red now", "score": [5]}', 5),
        ('{"reasoning": "line one\nline two", "score": [4]}', 4),
        ('{"reasoning": "done", "score": 3}', 3),
        ('"score": [3]', 3),
        # A score that the rationale quotes is not the answer: escaped, unescaped, or as an object of its own.
        (r'{"reasoning": "the sign says \"score\": 5", "score": [2]}', 2),
        ('{"reasoning": "the sign says "score": 5 there", "score": [2]}', 2),
        ('{"reasoning": "the sign says {"score": [5]}", "score": [2]}', 2),
        (r'{"reasoning": "the sign says {\"score\": [5]}", "score": [2]}', 2),
        # Sloppy objects with the score in last place.
        (r'{"reasoning": "a \_ is no escape", "score": [4]}', 4),
        ("{'reasoning': 'single quotes', \"score\": [4]}", 4),
    ],
)
def test_edit(text, score):
    parsed = parse_edit(text)
    assert (parsed.scores, parsed.status) == ((score,), "ok")


@pytest.mark.fault("unusable-answers")
@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('{"reasoning": "the change is', "malformed_json"),
        ('{"reasoning": "the sign says "score": [5]', "malformed_json"),
        ('{"reasoning": "the sign says {"score": [5]}', "malformed_json"),
        ('{"reasoning": "x", "score": [4, 3]}', "wrong_count"),
        ('{"reasoning": "x", "score": [4.5]}', "not_integer"),
        ('{"reasoning": "x", "score": 4.7}', "not_integer"),
        ('{"reasoning": "x", "score": [7]}', "out_of_range"),
        ('{"reasoning": "x "y"", "score": [7]}', "out_of_range"),
        ('{"reasoning": "x"}', "no_score"),
        (r"\boxed{4}", "malformed_json"),
    ],
)
def test_edit_failures(text, status):
    parsed = parse_edit(text)
    assert (parsed.scores, parsed.status) == (None, status)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_alignment, FULL_ALIGNMENT),
        (parse_alignment, "\\boxed{1} … **Final Alignment Rating: 5**\n\\boxed{ 4.0 }"),
        (parse_quality, '{"reasoning": "3 of 5", "score": [4, "3", 5.0]}'),
        (parse_quality, '{"score": [4, 3, 5], "reasoning": "cut'),
        (parse_edit, '{"score": [1]}\n{"reasoning": "2", "score": 3}'),
    ],
)
def test_spans_point_at_the_deciding_digits(parse, text):
    parsed = parse(text)
    assert parsed.scores == tuple(int(text[start:end]) for start, end in parsed.spans)
    # Another digit there is another score: the place decides, not a copy of it elsewhere.
    for index, (start, end) in enumerate(parsed.spans):
        other = 6 - parsed.scores[index] if parsed.scores[index] != 3 else 1
        changed = parse(text[:start] + str(other) + text[end:])
        assert changed.scores[index] == other


FRAGMENTS = [
    *["\\boxed{", "Final Alignment Rating:", "\nFinal Score:", '"score"', '"reasoning"', "**Final Analysis**:"],
    *["{", "}", "[", "]", ",", ":", '"', "\\", "\n", " ", "**", "```json", "{}", "4", "5", "0", "10", "4.5", "4.0"],
    *["4/5", "-1", "1e9", "NaN", "null", "true", "٤", "²", "Infinity", "\x00", "\ud800"],
]


def check(text: str) -> None:
    for parse, count in zip(PARSERS, (1, 3, 1), strict=True):
        parsed = parse(text)
        assert isinstance(parsed.reason, str)
        if parsed.status == "ok":
            assert len(parsed.scores) == count
            assert all(type(score) is int and 1 <= score <= 5 for score in parsed.scores)
            assert [text[start:end] for start, end in parsed.spans] == [str(score) for score in parsed.scores]
        else:
            assert parsed.scores is None and parsed.spans is None


@pytest.mark.fault("unusable-answers")
@settings(deadline=None)
@given(st.text())
def test_any_text(text):
    check(text)


@pytest.mark.fault("unusable-answers")
@settings(deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join))
@example('{"a":' * 100_000)
@example("{" * 100_000)
@example('{"score": ' + "9" * 5000 + "}")
@example("\\boxed{" * 20_000 + "4" * 20_000)
@example(", " * 50_000 + '"score": [4' + " " * 50_000)
def test_any_text_made_of_a_critic_s_words(text):
    check(text)


@pytest.mark.fault("unusable-answers")
@settings(deadline=None)
@given(st.text(), st.integers(1, 5))
def test_no_rationale_changes_a_well_formed_answer(reasoning, score):
    for order in (["reasoning", "score"], ["score", "reasoning"]):
        answer = {"reasoning": reasoning, "score": [score]}
        assert parse_edit(json.dumps({name: answer[name] for name in order})).scores == (score,)


@pytest.mark.fault("unusable-answers")
@settings(deadline=None)
@given(st.floats(allow_nan=False), st.integers(-100, 100))
def test_only_whole_numbers_in_range_are_scores(number, integer):
    for value in (number, integer):
        parsed = parse_edit(json.dumps({"score": [value]}))
        if parsed.scores is not None:
            assert parsed.scores == (value,) and value in (1, 2, 3, 4, 5)
    assert (parse_edit(json.dumps({"score": [integer]})).status == "ok") == (1 <= integer <= 5)


NOISE = st.text(st.characters(exclude_characters='{}[]"\\'), max_size=40)
CLAIMS = ['{{"score": [{n}]}}', '"score": {n}', "\\boxed{{{n}}}", "Final Alignment Rating: {n}", "I give it {n}/5"]


@pytest.mark.fault("unusable-answers")
@settings(deadline=None)
@given(NOISE, NOISE, st.integers(1, 5))
def test_what_stands_around_an_answer_does_not_change_it(before, after, score):
    answers = {
        parse_alignment: (f"\\boxed{{{score}}}", (score,)),
        parse_quality: (json.dumps({"score": [score, 1, 5], "reasoning": "x"}), (score, 1, 5)),
        parse_edit: (json.dumps({"reasoning": "x", "score": [score]}), (score,)),
    }
    for parse, (answer, scores) in answers.items():
        assert parse(before + answer + after).scores == scores


@pytest.mark.fault("unusable-answers", "hostile-text")
@settings(deadline=None)
@given(st.lists(st.sampled_from(CLAIMS), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 5), NOISE)
def test_a_score_injected_into_the_rationale_never_wins(claims, injected, score, noise):
    rationale = noise + " ".join(claim.format(n=injected) for claim in claims)
    assert parse_edit(json.dumps({"reasoning": rationale, "score": [score]})).scores == (score,)
    assert parse_quality(json.dumps({"score": [score] * 3, "reasoning": rationale})).scores == (score,) * 3
    assert parse_alignment(f"{rationale}\n**Final Alignment Rating: {score}**\n\\boxed{{{score}}}").scores == (score,)
    # Where the model forgets to escape the quotation, its own score or none: never the quoted one.
    sloppy = '{"reasoning": "' + rationale + f'", "score": [{score}]' + "}"
    assert parse_edit(sloppy).scores in ((score,), None)
