"""The expected score from the logarithms of probabilities that a chat completion tells of its tokens."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firm_jax.critic.openai_protocol import digit_probabilities


def tokens_of(pieces, likely):
    found = []
    for piece in pieces:
        one = {
            "token": piece,
            "logprob": -0.1,
            "bytes": list(piece.encode()),
            "top_logprobs": [{"token": piece, "logprob": -0.1}],
        }
        if piece.strip() in likely:
            before = piece[:-1]
            one["top_logprobs"] = [
                {"token": before + digit, "logprob": math.log(share)} for digit, share in likely.items() if share > 0
            ] + [{"token": "the", "logprob": -9.0}]
            one["logprob"] = math.log(likely[piece.strip()])
        found.append(one)
    return found


@given(
    st.lists(st.floats(0.01, 1), min_size=5, max_size=5),
    st.integers(1, 5),
    st.text(st.characters(codec="utf-8", exclude_characters="12345"), max_size=12),
    st.sampled_from(["", " "]),
    st.lists(st.integers(0, 200), max_size=6),
)
@settings(max_examples=100, deadline=None)
def test_probabilities_are_those_at_the_digit_wherever_the_tokens_are_cut(weights, digit, before, space, cuts):
    total = sum(weights) * 1.25  # a fifth goes to other tokens
    likely = {str(n + 1): weight / total for n, weight in enumerate(weights)}
    content = before.encode()
    edges = sorted({0, len(content), *(cut % (len(content) + 1) for cut in cuts)})
    tokens = [
        {"token": "?", "logprob": -1.0, "bytes": list(content[a:b]), "top_logprobs": []}
        for a, b in itertools.pairwise(edges)
    ]
    tokens += tokens_of([f"{space}{digit}", "}"], likely)
    text = f"{before}{space}{digit}}}"
    found = digit_probabilities(text, [len(text) - 2], tokens)
    np.testing.assert_allclose(found, [np.array(weights) / sum(weights)], rtol=1e-9)
    # An end that is told as a token, and is not in the text.
    np.testing.assert_allclose(digit_probabilities(text, [len(text) - 2], [*tokens, {"token": "<|im_end|>"}]), found)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokens: None,
        lambda tokens: [],
        lambda tokens: tokens[1:],
        lambda tokens: [tokens[0] | {"token": "x4"}, *tokens[1:]],
        lambda tokens: [tokens[0] | {"top_logprobs": []}, *tokens[1:]],
        lambda tokens: [tokens[0] | {"top_logprobs": None}, *tokens[1:]],
        lambda tokens: [tokens[0] | {"top_logprobs": [{"token": "3", "logprob": math.nan}]}, *tokens[1:]],
        lambda tokens: [tokens[0] | {"top_logprobs": [{"token": "3", "logprob": 4.0}]}, *tokens[1:]],
        lambda tokens: [tokens[0] | {"top_logprobs": [{"token": "3"}]}, *tokens[1:]],
        lambda tokens: [tokens[0] | {"top_logprobs": ["3"]}, *tokens[1:]],
        lambda tokens: ["4", "}"],
    ],
)
def test_probabilities_that_cannot_be_told_are_none(change):
    tokens = tokens_of(["4", "}"], {"4": 0.8, "3": 0.2})
    np.testing.assert_allclose(digit_probabilities("4}", [0], tokens), [[0, 0, 0.2, 0.8, 0]])
    assert digit_probabilities("4}", [0], change(tokens)) is None
