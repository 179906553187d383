"""What a critic's decoder saves, one thing at a time: the same judging with it and without it.

    python -m benchmarks.critic_features --size small --dtype float32 --rounds 3

The work is a part of an editing epoch: groups of edits that share their source, each edit judged by two criteria. Both
variants are ours. Pictures, texts and weights are random, so no answer ends by itself. Where answers are to be of
different lengths, tokens that the critic happens to write are made the end of a turn; where an answer is to stop at its
score, the score is taken to stand at a fixed token. The case's config says which. `--torch` has no meaning here.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.critic_side import CLOSING, NO_ENDS, OPENING, Prompts
from benchmarks.harness import WITH, WITHOUT, Case, Options, Variant, main
from benchmarks.sizes import CRITIC, Critic, parameters
from firm_jax import models
from firm_jax.critic.decode import CHUNK, NOTHING, Decoder, Generation
from firm_jax.critic.prefixes import plan_batches
from firm_jax.critic.processing import Sequence

GROUPS = {"tiny": (2, 4), "small": (2, 4), "full": (4, 16)}  # of so many edits
CRITERIA = 2
SCORE_TOKENS = 12  # of an answer that begins with {"score": [4, 3, 5],
MOST_ENDS = 16


class Unshared(Decoder):
    """Reads every prompt whole."""

    def _planned(self, sequences):
        return plan_batches(sequences, self.multiple, self.max_batch // self.multiple, choices=((),))


class Undropped(Decoder):
    """Keeps rows that have ended until the last one has."""

    def _drop_ended(self, state, ended, served):
        return state, served


class Plain(Unshared, Undropped):
    """Neither."""


class Edits(Prompts):
    """Criterion by criterion, as the jobs ask: each group's source, one of its edits, and the criterion's text.

    sequences: these. lone: the same, with every picture under a name of its own, so that none is known to be equal to
    another.
    """

    def __init__(self, size: Critic, folder: Path, groups: int, edits: int):
        super().__init__(size, folder)
        rng = np.random.default_rng(0)
        opening, closing = self.text(rng, OPENING), self.text(rng, CLOSING)
        texts = [self.text(rng, size.text_tokens) + closing for _ in range(CRITERIA)]
        sources = [self.picture(rng) for _ in range(groups)]
        shown = [(source, self.picture(rng)) for source in sources for _ in range(edits)]
        self.sequences = [self.prompt(opening, pair, text) for text in texts for pair in shown]
        self.lone = [
            replace(
                one, images=tuple(replace(image, digest=f"{number} {place}") for place, image in enumerate(one.images))
            )
            for number, one in enumerate(self.sequences)
        ]


def read(side: str, dtype: str, how: str, decoder: Decoder, prompts: list[Sequence], tokens: int) -> Variant:
    """Reading the prompts; what would then be written is compared as well, and not timed."""

    def outputs(digits):
        return {"digits": digits} | written(decoder.generate(prompts, tokens), dtype)

    return Variant(side, dtype, how, lambda _: decoder.read_digits(prompts), outputs)


def judge(side: str, dtype: str, how: str, run: Callable[[], list[Generation]], compared: int | None = None) -> Variant:
    """Reading and writing; the answers' first `compared` tokens are compared, all of them unless given."""
    return Variant(side, dtype, how, lambda _: run(), lambda found: written(found, dtype, compared))


def written(answers: list[Generation], dtype: str, compared: int | None = None) -> dict[str, np.ndarray]:
    """What is compared of answers. Of those in bfloat16, where rounding decides between tokens that are nearly as
    likely, only the digits' logits at the first token."""
    first = {"first_digits": np.concatenate([one.digit_logits[:1] for one in answers])}
    if dtype != "float32":
        return first
    kept = [one.tokens[:compared] for one in answers]
    tokens = np.full((len(kept), max(map(len, kept))), NOTHING, np.int64)
    for row, own in zip(tokens, kept, strict=True):
        row[: len(own)] = own
    return first | {"tokens": tokens, "all_digits": np.concatenate([one.digit_logits[:compared] for one in answers])}


def spread_ends(tokens: np.ndarray) -> tuple[int, ...]:
    """Token ids that, as the end of a turn, end the rows of tokens [N, T] at lengths as evenly spread as can be found.

    They are added one by one while that brings the lengths closer to T / N, 2 T / N, ... T.
    """
    N, T = tokens.shape
    wanted = np.arange(1, N + 1) * T / N
    candidates = np.setdiff1d(tokens, tokens[:, 0])  # no answer is to be empty
    equal = tokens[None] == candidates[:, None, None]
    places = np.where(equal.any(-1), equal.argmax(-1), T)  # [candidates, N]
    lengths, ends = np.full(N, T), []
    off = np.abs(lengths - wanted).sum()
    while len(ends) < MOST_ENDS and len(candidates):
        tried = np.minimum(lengths, places)
        distances = np.abs(np.sort(tried) - wanted).sum(-1)
        best = distances.argmin()
        if distances[best] >= off:
            break
        lengths, off = tried[best], distances[best]
        ends.append(int(candidates[best]))
    return tuple(ends)


def cases(options: Options, folder: Path, size: Critic | None = None) -> Iterator[Case]:
    size = size or CRITIC[options.size]
    groups, edits = GROUPS[options.size]
    asked = Edits(size, folder, groups, edits)
    prompts, count, tokens = asked.sequences, len(asked.sequences), size.tokens
    mesh = options.mesh(count)
    networks = {dtype: models.from_pretrained(asked.folder, dtype=dtype, mesh=mesh) for dtype in options.dtypes}
    described = {name: value for name, value in size.described().items() if name not in ("batches", "remat")} | {
        "parameters": parameters(models.read_config(asked.folder)),
        "groups": groups,
        "edits_of_a_group": edits,
        "criteria": CRITERIA,
        "question_tokens": len(prompts[0]),
    }

    def decoder(kind: type[Decoder], dtype: str, ends: tuple[int, ...] = ()) -> Decoder:
        return kind(networks[dtype], replace(NO_ENDS, ends=ends), mesh=mesh, max_batch=count)

    def case(name: str, variants: Callable[[str], tuple[Variant, Variant]], **config) -> Case:
        both = [variant for dtype in options.dtypes for variant in variants(dtype)]
        return Case(f"critic, {name}", both, count, "questions", config=described | config)

    def vision(dtype):
        unshared = decoder(Unshared, dtype)
        return (
            read(WITH, dtype, "equal pictures encoded once", unshared, prompts, tokens),
            read(WITHOUT, dtype, "each picture encoded each time", unshared, asked.lone, tokens),
        )

    yield case("reading: features of equal pictures", vision, prefixes="none shared on either side")

    def prefixes(dtype):
        return (
            read(WITH, dtype, "shared prefixes read once", decoder(Decoder, dtype), prompts, tokens),
            read(WITHOUT, dtype, "each prompt read whole", decoder(Unshared, dtype), prompts, tokens),
        )

    yield case("reading: shared prefixes", prefixes, pictures="encoded once on both sides")

    whole = decoder(Decoder, options.dtypes[0]).generate(prompts, tokens)
    ends = spread_ends(np.stack([one.tokens for one in whole]))
    lengths = sorted(
        int(np.flatnonzero(np.isin(one.tokens, ends))[0]) if np.isin(one.tokens, ends).any() else tokens
        for one in whole
    )
    spread = {"ends": "tokens that the critic happens to write, chosen to spread the lengths", "lengths": lengths}

    def dropped(dtype):
        kinds = ((WITH, "ended rows dropped", Decoder), (WITHOUT, "ended rows kept", Undropped))
        for side, how, kind in kinds:
            made = decoder(kind, dtype, ends)
            yield judge(side, dtype, how, lambda made=made: made.generate(prompts, tokens))

    yield case("judging: rows that have ended", dropped, **spread)

    def until_score(dtype):
        made = decoder(Decoder, dtype)

        def enough(number, found):
            return SCORE_TOKENS if len(found) >= SCORE_TOKENS else None

        how = f"answers of {SCORE_TOKENS} tokens", f"answers of {tokens} tokens"
        return (
            judge(WITH, dtype, how[0], lambda: made.generate(prompts, tokens, enough=enough), SCORE_TOKENS),
            judge(WITHOUT, dtype, how[1], lambda: made.generate(prompts, tokens), SCORE_TOKENS),
        )

    stands = f"taken to stand after {SCORE_TOKENS} tokens; looked for every {CHUNK}"
    yield case("judging: stopping after the score", until_score, score=stands)

    def score_only(dtype):
        made = decoder(Decoder, dtype)

        def first(answers):
            return {"digits": np.stack([one.digit_logits[0] for one in answers])}

        return (
            Variant(
                WITH, dtype, "score read off", lambda _: made.read_digits(prompts), lambda found: {"digits": found}
            ),
            Variant(WITHOUT, dtype, "whole answer", lambda _: made.generate(prompts, tokens), first),
        )

    yield case("judging: the score alone", score_only, score="taken to be the first token of an answer")

    def expected(dtype):
        made = decoder(Decoder, dtype)

        def own():
            answers = made.generate(prompts, tokens)
            return answers, np.stack([one.digit_logits[-1] for one in answers])

        def again():
            answers = made.generate(prompts, tokens)
            before = [one.followed_by(answer.tokens[:-1]) for one, answer in zip(prompts, answers, strict=True)]
            return answers, made.read_digits(before)

        def outputs(found):
            last = {"last_digits": found[1]} if dtype == "float32" else {}
            return written(found[0], dtype) | last

        return (
            Variant(WITH, dtype, "logits of the decoding", lambda _: own(), outputs),
            Variant(WITHOUT, dtype, "one more reading", lambda _: again(), outputs),
        )

    yield case("judging: expected scores", expected, score="taken to be the last token of an answer")

    def together(dtype):
        ours, plain = decoder(Decoder, dtype, ends), decoder(Plain, dtype, ends)
        return (
            judge(WITH, dtype, "all of what changes no text", lambda: ours.generate(prompts, tokens)),
            judge(WITHOUT, dtype, "nothing shared or dropped", lambda: plain.generate(asked.lone, tokens)),
        )

    yield case("judging: all together", together, **spread)


if __name__ == "__main__":
    main("critic_features", __doc__, cases)
