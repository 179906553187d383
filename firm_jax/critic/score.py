"""The critic as the rest of the package sees it: requests in, texts or judgements out."""

import functools
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Requests
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from firm_jax import models
from firm_jax.critic.decode import CHUNK, Decoder, Generation, TokenRules
from firm_jax.critic.parse import Parsed, parse_alignment, parse_edit, parse_quality, settled
from firm_jax.critic.processing import Processor, Sequence
from firm_jax.critic.rubric import FOLDER, Rubric, rubrics_from
from firm_jax.data.prompts import PromptRecord
from firm_jax.data.records import MalformedRecord, check_request_text
from firm_jax.errors import ConfigError, DataError
from firm_jax.interop.files import read_json
from firm_jax.interop.hub import resolve
from firm_jax.models.qwen3_vl import Qwen3VLConfig

# How much of its answer a critic writes: all; up to the score; or nothing but the score.
ANSWERS = ("whole", "until_score", "score_only")

# What stands before and behind the score of an answer that is nothing else. Of several scores each depends on those
# before it, so they are written, and what stands behind them too.
ALONE: dict[str, tuple[str, str | None]] = {
    "alignment": ("\\boxed{", "}"),
    "quality": ('{"score": [', None),
    "edit_execution": ('{"score": [', "]}"),
    "edit_consistency": ('{"score": [', "]}"),
}

PARSERS: dict[str, Callable[[str], Parsed]] = {
    "alignment": parse_alignment,
    "quality": parse_quality,
    "edit_execution": parse_edit,
    "edit_consistency": parse_edit,
}


@dataclass(frozen=True)
class Judgement:
    """One criterion of one image, as the critic sees it.

    criterion: the rubric's name. score: a whole number in 1..5, or the tuple of sub-scores of `quality`; None when
    the answer could not be read. expected: the mean score under the critic's probabilities of the digits 1..5 at the
    score's place, for sub-scores the lowest of their means. entropy: of those probabilities, in nats, averaged over
    sub-scores. text: what the critic wrote. status: "ok", "truncated" (no score within the token limit), or the
    parser's word for what is wrong. reason: the critic's own summary. rubric: sha256 of the rubric's text.
    probabilities: of the digits 1..5, those whose mean is `expected`.
    """

    criterion: str
    score: int | tuple[int, ...] | None
    expected: float | None
    entropy: float | None
    text: str
    status: str
    reason: str
    rubric: str
    probabilities: tuple[float, ...] | None = None

    def record(self) -> dict:
        """What files of judgements keep of it beside what was asked, for JSON."""
        kept = ("score", "expected", "entropy", "status", "reason", "text", "rubric")
        return {name: getattr(self, name) for name in kept}


class Critic:
    """A Qwen3-VL model that writes judgements.

    Make one with `from_pretrained`, or from a network in memory and the `Processor` of its folder. `ends`: the ids
    of the tokens that end an answer. `rubrics`: criterion -> Rubric. `max_batch`: most requests served at once.
    `answer`: how much `judge` has it write, one of ANSWERS. "until_score" has the scores of "whole", as long as no
    answer states two of them; what comes behind is saved, and missing in text and reason. "score_only" puts the words
    in the critic's mouth that stand before a score: after a rubric that has the reasons come first that is another
    judgement, made without them.
    """

    def __init__(
        self,
        model,
        processor: Processor,
        *,
        ends,
        rubrics: dict[str, Rubric],
        mesh=None,
        max_batch=64,
        answer: str = "whole",
    ):
        if answer not in ANSWERS:
            raise ConfigError(f"answer is {answer!r}; it is one of: {', '.join(ANSWERS)}")
        vision = model.config.vision
        for ours, theirs in (("patch_size",) * 2, ("temporal_patch_size",) * 2, ("merge_size", "spatial_merge_size")):
            if getattr(processor.images, ours) != getattr(vision, theirs):
                raise ConfigError(
                    f"{processor.folder}: {ours}={getattr(processor.images, ours)} of the image processor contradicts "
                    f"{theirs}={getattr(vision, theirs)} of config.json"
                )
        self.processor, self.rubrics, self.answer = processor, rubrics, answer
        self.max_length = model.config.text.max_position_embeddings
        rules = TokenRules(tuple(ends), banned_tokens(model.config, processor), processor.digits)
        self.decoder = Decoder(model, rules, mesh=mesh, max_batch=max_batch)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id,
        dtype: str = "bfloat16",
        mesh: Mesh | None = None,
        rubrics=None,
        max_batch: int = 64,
        answer: str = "whole",
    ) -> "Critic":
        """Load a transformers folder of Qwen3-VL, or its Hugging Face id.

        dtype: "bfloat16", "float32" or "float16" for weights and cache. rubrics: a folder of rubric files to serve;
        by default the `rubrics` folder inside the model's own, where there is one, else the package's. Raises
        WeightsError and ConfigError naming what is missing or does not fit.
        """
        folder = resolve(path_or_id)
        processor = Processor(folder)
        model = models.from_pretrained(folder, dtype=dtype, mesh=mesh)
        if model.config.to_hf().get("model_type") != "qwen3_vl":
            raise ConfigError(f"{folder} holds a {type(model).__name__}; a critic must be a Qwen3-VL model")
        return cls(
            model,
            processor,
            ends=end_tokens(folder, processor),
            rubrics=served_rubrics(folder, rubrics),
            mesh=mesh,
            max_batch=max_batch,
            answer=answer,
        )

    def generate(self, requests: Requests[Mapping], max_new_tokens: int = 256, progress=iter) -> list[str]:
        """The critic's greedy answer to each request {"images": [...], "text": "..."}: images first, text last.

        An image is a Pillow image or an array [H, W, 3], uint8 or float in [0, 1]. `progress` wraps the iterable of
        batches. Raises DataError for a request that cannot be served.
        """
        patched: dict = {}
        sequences = [
            self._sequence(f"request {number}", r.get("images") or (), r.get("text"), patched, max_new_tokens)
            for number, r in enumerate(requests)
        ]
        generations = self.decoder.generate(sequences, max_new_tokens, progress)
        return [self.processor.decode(generation.tokens) for generation in generations]

    def judge(self, requests: Requests[Mapping], max_new_tokens: int = 512, progress=iter) -> list[Judgement]:
        """A judgement for each request, in order.

        A request has `images`, `criterion` (the name of one of `self.rubrics`), `prompt` and, where the prompt has
        one, `requirement`. An answer without a readable score is a judgement whose score is None: missing, never a
        number. Raises ConfigError for a criterion without a rubric, DataError for a request that cannot be served.
        """
        patched: dict = {}
        prompts = [
            self.prompt(request, max_new_tokens, name=f"request {number}", patched=patched)
            for number, request in enumerate(requests)
        ]
        criteria = [request["criterion"] for request in requests]
        if self.answer == "score_only":
            generations = self._scores_alone(criteria, prompts, progress)
        else:
            stops = self.answer == "until_score"
            enough = (lambda number, tokens: self._enough(criteria[number], tokens)) if stops else None
            generations = self.decoder.generate(prompts, max_new_tokens, progress, enough)
        return [self.judgement(*pair) for pair in zip(criteria, generations, strict=True)]

    def _enough(self, criterion: str, tokens: np.ndarray) -> int | None:
        """How many of an answer's tokens settle its score, None when they do not; for `Decoder.generate`."""
        parse, decode = PARSERS[criterion], self.processor.decode
        if not settled(parse, decode(tokens)):
            return None
        first = max(len(tokens) - CHUNK, 0)  # a chunk ago it was not settled
        return next(count for count in range(first, len(tokens) + 1) if settled(parse, decode(tokens[:count])))

    def _scores_alone(self, criteria: list[str], prompts: list[Sequence], progress) -> list[Generation]:
        """Answers that are nothing but a score: read off behind its opening where it is one, else written.

        `progress` wraps the batches of the ones and of the others apart.
        """
        openings = [np.array(self.processor.encode(ALONE[criterion][0]), np.int32) for criterion in criteria]
        opened = [prompt.followed_by(opening) for prompt, opening in zip(prompts, openings, strict=True)]
        answers: list[tuple] = [()] * len(prompts)  # tokens behind the opening, their digits' logits, finish reason
        single = [number for number, criterion in enumerate(criteria) if ALONE[criterion][1]]
        several = [number for number, criterion in enumerate(criteria) if not ALONE[criterion][1]]
        if single:
            read = self.decoder.read_digits([opened[number] for number in single], progress)
            for number, logits in zip(single, read, strict=True):
                if not np.isfinite(logits).all():
                    answers[number] = np.zeros(0, np.int32), np.zeros((0, len(logits)), np.float32), "stop"
                    continue
                closing = self.processor.encode(ALONE[criteria[number]][1])
                tokens = np.array([self.processor.digits[logits.argmax()], *closing], np.int32)
                answers[number] = tokens, np.pad(logits[None], ((0, len(closing)), (0, 0))), "enough"
        if several:

            def enough(row: int, tokens: np.ndarray) -> int | None:
                opening = openings[several[row]]
                count = self._enough(criteria[several[row]], np.concatenate([opening, tokens]))
                return None if count is None else count - len(opening)

            written = self.decoder.generate([opened[number] for number in several], CHUNK, progress, enough)
            for number, one in zip(several, written, strict=True):
                answers[number] = one.tokens, one.digit_logits, one.finish_reason
        return [
            Generation(np.concatenate([opening, tokens]), np.pad(digits, ((len(opening), 0), (0, 0))), finish_reason)
            for opening, (tokens, digits, finish_reason) in zip(openings, answers, strict=True)
        ]

    def prompt(
        self, request: Mapping, max_new_tokens: int, *, name: str = "the request", patched: dict | None = None
    ) -> Sequence:
        """What the model is shown for one request to `judge`, whose errors it raises; they call the request `name`.

        `patched`: as in `Processor.sequence`.
        """
        rubric = rubric_of(self.rubrics, request.get("criterion"))
        if "images" not in request:
            raise DataError(f"{name} has no images; there is nothing to judge")
        prompt, requirement = request.get("prompt") or "", request.get("requirement") or ""
        check_request_text(prompt, f"{name}: the prompt")
        check_request_text(requirement, f"{name}: the requirement")
        return self._sequence(name, request["images"], rubric.fill(prompt, requirement), patched, max_new_tokens)

    def _sequence(self, name: str, images, text, patched: dict | None, max_new_tokens: int) -> Sequence:
        check_request_text(text, f"{name}: the text")
        sequence = self.processor.sequence(images, text, patched=patched)
        if len(sequence) + max_new_tokens > self.max_length:
            raise DataError(
                f"{name} has {len(sequence)} tokens, with {max_new_tokens} to come that is more than the "
                f"{self.max_length} that the model was made for; shorten the text or use smaller images"
            )
        return sequence

    def judgement(self, criterion: str, generation: Generation) -> Judgement:
        """What the model wrote after a `prompt` for this criterion, read as a judgement."""
        return read_judgement(
            criterion,
            self.rubrics[criterion],
            self.processor.decode(generation.tokens),
            cut=generation.finish_reason == "length",
            probabilities=lambda places: self._digit_probabilities(generation, places),
        )

    def _digit_probabilities(self, generation: Generation, starts: list[int]) -> np.ndarray | None:
        """float64 [scores, 5] at the tokens that hold the characters `starts`.

        None if one is not a digit's token, or the logits there are not finite.
        """
        at = [self._token_at(generation.tokens, start) for start in starts]
        if not np.isin(generation.tokens[at], self.processor.digits).all():
            return None
        logits = generation.digit_logits[at].astype(np.float64)
        if not np.isfinite(logits).all():
            return None
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    def _token_at(self, tokens: np.ndarray, character: int) -> int:
        """The index of the token that writes the text's character, by bisection over decoded prefixes."""
        low, high = 0, len(tokens) - 1
        while low < high:
            middle = (low + high) // 2
            if len(self.processor.decode(tokens[: middle + 1])) > character:
                high = middle
            else:
                low = middle + 1
        return low


def read_judgement(
    criterion: str,
    rubric: Rubric,
    text: str,
    *,
    cut: bool,
    probabilities: Callable[[list[int]], np.ndarray | None],
) -> Judgement:
    """What a critic wrote for a criterion, read as a judgement.

    cut: whether the token limit ended the text. probabilities: of the digits 1..5 [scores, 5] where the text's
    characters in the given places are, or None where they are not known.
    """
    parsed = PARSERS[criterion](text)
    if parsed.scores is None:
        status = "truncated" if cut else parsed.status
        return Judgement(criterion, None, None, None, text, status, parsed.reason, rubric.sha256)
    found = probabilities([start for start, _ in parsed.spans])
    expected = entropy = lowest = None
    if found is not None:
        means = found @ np.arange(1, 6)
        expected, lowest = float(means.min()), tuple(found[means.argmin()].tolist())
        entropy = float(-(found * np.log(np.maximum(found, 1e-30))).sum(-1).mean())
    score = parsed.scores if len(parsed.scores) > 1 else parsed.scores[0]
    return Judgement(criterion, score, expected, entropy, text, "ok", parsed.reason, rubric.sha256, lowest)


def prompt_check(
    folder: Path,
    rubrics,
    criteria: Requests[str],
    sizes: Requests[tuple[int, int]],
    max_new_tokens: int,
    sources: Callable[[PromptRecord], Iterable[tuple[int, int]]] = lambda record: (),
) -> Callable[[PromptRecord], None]:
    """A check for `load_prompts`: MalformedRecord for a prompt about which this critic could not be asked.

    It needs the folder's tokenizer and config, not the weights, so a run knows before it starts what would otherwise
    stop it when the prompt is drawn. rubrics: as in `Critic.from_pretrained`; criteria: those to be asked for; sizes:
    the (height, width) of the images that it is to see, one at a time; sources: those of the source images that it
    sees before each of them. Raises ConfigError for a criterion without a rubric and for a context that the rubric
    alone would fill; the check, for a requirement that a rubric would drop.
    """
    processor = Processor(folder)
    limit = Qwen3VLConfig.from_hf(models.read_config(folder)).text.max_position_embeddings
    served = served_rubrics(folder, rubrics)
    asked = [rubric_of(served, criterion) for criterion in criteria]

    @functools.cache
    def frame(before: tuple[tuple[int, int], ...]) -> int:
        """The tokens around a text: those of the images `before`, of the largest picture, and of the turns."""
        return max(processor.length([*before, size], "") for size in sizes)

    def length(prompt: str, requirement: str, before: tuple[tuple[int, int], ...] = ()) -> int:
        texts = [rubric.fill(prompt, requirement) for rubric in asked]
        # A token is a byte of the text or more, and normalisation makes at most three bytes of one.
        if frame(before) + 3 * max(len(text.encode()) for text in texts) + max_new_tokens <= limit:
            return 0
        return max(processor.length([*before, size], text) for text in texts for size in sizes)

    def check(record: PromptRecord) -> None:
        tokens = length(record.text, record.requirement, tuple(sources(record)))
        if tokens + max_new_tokens > limit:
            raise MalformedRecord(
                f"needs {tokens} tokens of the critic with rubric and images, and {limit - max_new_tokens} are there "
                f"({limit} less critic.max_new_tokens)"
            )

    if (shortest := length("", "")) + max_new_tokens > limit:
        raise ConfigError(
            f"critic.max_new_tokens = {max_new_tokens} leaves no room for a prompt: rubric and image take {shortest} "
            f"of the {limit} tokens that the critic in {folder} was made for; lower it, or draw smaller images"
        )
    return check


def served_rubrics(folder: Path, rubrics=None) -> dict[str, Rubric]:
    """The rubrics in the folder `rubrics`; for None those that the critic's folder brings along, else the package's."""
    if rubrics is None:
        own = Path(folder) / "rubrics"
        rubrics = own if own.is_dir() else FOLDER
    return rubrics_from(rubrics)


def rubric_of(rubrics: Mapping[str, Rubric], criterion) -> Rubric:
    """The rubric of a criterion; ConfigError, with those that there are, where there is none."""
    if criterion not in rubrics:
        raise ConfigError(
            f"there is no rubric for the criterion {criterion!r}; this critic has {sorted(rubrics)}. "
            f"Add {criterion}.txt to the rubric folder (critic.rubrics)."
        )
    return rubrics[criterion]


def end_tokens(folder: Path, processor: Processor) -> tuple[int, ...]:
    """The ids that end an answer: those of generation_config.json, and the end of a turn in any case."""
    file = Path(folder) / "generation_config.json"
    ends = None
    if file.exists():
        ends = read_json(file).get("eos_token_id")
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    return tuple(sorted({*ends, processor.turn_end}))


def banned_tokens(config, processor: Processor | None = None) -> tuple[int, ...]:
    """The vision tokens: written as text, they would be read as images when the answer is replayed."""
    ids = {config.vision_start_token_id, config.vision_end_token_id, config.image_token_id, config.video_token_id}
    pad = processor.tokenizer.token_to_id("<|vision_pad|>") if processor else None
    return tuple(sorted(ids if pad is None else {*ids, pad}))
