"""Drawing and judging the images of an epoch.

What opens pictures is imported where records are read: drawing by itself needs no Pillow.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import jax
import numpy as np

from firm_jax.critic import Critic, Judgement
from firm_jax.critic.rubric import RUBRICS
from firm_jax.generation import Generator, initial_noise
from firm_jax.generation.sources import cropped_size, resized, to_image
from firm_jax.mesh import batch_size, shard_batch, to_host
from firm_jax.rl.rewards import normalise

if TYPE_CHECKING:
    from PIL import Image

    from firm_jax.data.prompts import PromptRecord
    from firm_jax.run import Run

# The criteria that compare a picture with the one it was made from.
OF_EDITS = ("execution", "consistency")


def conditioner(generator: Generator, settings, every: "Sequence[PromptRecord]") -> Callable:
    """`condition(records)`: what `generator.condition` makes of them.

    Its arrays have one shape whichever records of `every` are chosen, so the programs they go to are compiled once.
    """
    sizes = None
    if generator.edits:  # many records are of few sizes
        sizes = sorted({tuple((image.height, image.width) for image in record.images) for record in every})

    def condition(records: "Sequence[PromptRecord]"):
        return generator.condition([record.text for record in records], settings, sources_of(records), sizes)

    return condition


def make_sampler(generator: Generator, settings, mesh, progress: Callable = iter) -> Callable:
    """`sample(lora, conditioned, prompt [M], number [M], key, drawn) -> (latents [M, h, w, C], images [M, H, W, 3])`.

    settings: steps, solver, guidance, height, width, batch_size (images that one call of the program draws).
    `conditioned` is what `generator.condition` returns for the prompts, and `prompt` each image's row in it; `number`,
    its number in the run, alone decides its noise. `lora` has its strength folded in. Host arrays: final latents as
    the update wants them, images float32 in [0, 1], all NaN where latents or pixels are not finite. `drawn` is called
    with the images of each batch as soon as they are there, in order.
    """
    draw = make_draw(generator, settings)

    def sample(lora, conditioned, prompt, number, key, drawn=lambda images: None):
        parts, (conditioning, negative) = [], conditioned
        size = drawn_together(len(number), settings.batch_size, batch_size(mesh))
        for chunk in progress(list(_chunks(len(number), size))):
            part = shard_batch((prompt[chunk], number[chunk]), mesh)
            latents = to_host(draw(generator.params, lora, conditioning, negative, *part, key))
            images = generator.decode_on_host(latents)
            images[~(_finite(latents) & _finite(images))] = np.nan
            parts.append((latents, images))
            drawn(images[: len(number) - chunk[0]])
        return tuple(np.concatenate(arrays)[: len(number)] for arrays in zip(*parts, strict=True))

    return sample


def make_draw(generator: Generator, settings) -> Callable:
    """The jitted program of the sampler: `draw(params, lora, conditioning, negative, prompt, number, key)`.

    conditioning, negative: as `generator.condition` returns them. Returns the final latents of the B samples.
    """
    sigmas = generator.sigmas(settings.steps, settings.height, settings.width)
    shape = generator.latent_shape(settings.height, settings.width)

    @jax.jit
    def draw(params, lora, conditioning, negative, prompt, number, key):
        rows, negative_rows = generator.take(conditioning, negative, prompt)
        noise = initial_noise(jax.random.fold_in(key, 0), number, shape)
        steps_key = jax.random.fold_in(key, 1)
        keys = jax.vmap(lambda n: jax.random.fold_in(steps_key, n))(number)
        with jax.named_scope("rollout"):
            return generator.rollout(
                params, lora, noise, sigmas, rows,
                guidance=settings.guidance, negative=negative_rows, solver=settings.solver, key=keys,
            )  # fmt: skip

    return draw


def drawing_flops(generator: Generator, settings, conditioning) -> int:
    """The transformer's operations for one image, by our count: two passes a step with guidance."""
    passes = settings.steps * (2 if settings.guidance > 1 else 1)
    return passes * generator.forward_flops(settings.height, settings.width, conditioning)


def drawn_together(count: int, size: int, multiple: int) -> int:
    """How many of `count` images one call draws: at most `size`, filled up to a multiple of `multiple`."""
    size = min(size, count)
    return size + -size % multiple


def _chunks(count: int, size: int) -> Iterator[np.ndarray]:
    """Index arrays of length `size` that cover 0..count-1; the last is filled up with repeats."""
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1)


def _finite(arrays: np.ndarray) -> np.ndarray:
    """Which of M arrays are finite throughout, [M]."""
    return np.isfinite(arrays.reshape(len(arrays), -1)).all(axis=1)


def sources_of(records: "Sequence[PromptRecord]") -> "list[list[Image.Image]] | None":
    """The source images of edits, opened, a list for each record; None for prompts, which have none.

    Equal images are one object. Raises DataError for one that is gone or has changed since the run began.
    """
    from firm_jax.data.edits import EditRecord

    if not isinstance(records[0], EditRecord):
        return None
    distinct = {image.sha256: image for record in records for image in record.images}
    opened = {digest: image.open() for digest, image in distinct.items()}
    return [[opened[image.sha256] for image in record.images] for record in records]


def shown_sources(records: "Sequence[PromptRecord]", settings) -> list[list[np.ndarray]]:
    """The source images of each record as the critic is shown them, uint8 [H, W, 3]; none for prompts.

    Cropped where the generator crops them, and no larger than it sees them: the critic is not to miss what the
    generator was never given. settings: as for `shown_size`. Equal images are one object, of which the critic makes
    features once. Raises DataError as `sources_of`.
    """
    opened = sources_of(records)
    if opened is None:
        return [[] for _ in records]
    distinct = {id(image): image for images in opened for image in images}
    shown = {key: _shown(image, settings) for key, image in distinct.items()}
    return [[shown[id(image)] for image in images] for images in opened]


def _shown(image: "Image.Image", settings) -> np.ndarray:
    kept = to_image(image, (settings.height, settings.width) if settings.crop_sources else None)
    return np.asarray(resized(kept, shown_size(image.height, image.width, settings)))


def shown_size(height: int, width: int, settings) -> tuple[int, int]:
    """The (height, width) at which the critic is shown a source image of `height` and `width`.

    settings: source_area (pixels), crop_sources, and the height and width of the edited picture, whose proportions a
    cropped source has.
    """
    if settings.crop_sources:
        height, width = cropped_size(height, width, (settings.height, settings.width))
    scale = min(1, math.sqrt(settings.source_area / (height * width)))
    return max(1, round(height * scale)), max(1, round(width * scale))


def judge(
    critic: Critic,
    images: np.ndarray,
    prompts: "Sequence[PromptRecord]",
    sources: Sequence[Sequence[np.ndarray]],
    criteria: Sequence[str],
    settings,
    progress: Callable = iter,
) -> dict[str, list[Judgement]]:
    """The critic's judgements of M images: criterion of the reward -> [M].

    All are asked for at once, so that the critic encodes every image once, and of several images the sources come
    first, so that the questions about a group begin alike. sources: [M] the source images of each (`shown_sources`).
    An image that is not finite is not shown to the critic: its judgement is missing, with the status
    "image_not_finite".
    """
    shown, requests = questions(images, prompts, sources, criteria)
    return merged(
        shown, criteria, iter(critic.judge(requests, max_new_tokens=settings.max_new_tokens, progress=progress))
    )


def questions(
    images: np.ndarray,
    prompts: "Sequence[PromptRecord]",
    sources: Sequence[Sequence[np.ndarray]],
    criteria: Sequence[str],
) -> tuple[np.ndarray, list[dict]]:
    """Which of M images are shown to the critic [M], and what it is asked about them, as `judge` says."""
    from firm_jax.data.images import from_array

    shown = _finite(images)
    pictures = [
        ([*before, from_array(image)], p)
        for image, p, before, ok in zip(images, prompts, sources, shown, strict=True)
        if ok
    ]
    requests = [
        {"images": pair, "prompt": p.text, "requirement": p.requirement, "criterion": RUBRICS[criterion]}
        for criterion in criteria
        for pair, p in pictures
    ]
    return shown, requests


def merged(shown: np.ndarray, criteria: Sequence[str], judgements: Iterator[Judgement]) -> dict[str, list[Judgement]]:
    """The answers to `questions`, taken from `judgements`, and the missing ones between them: criterion -> [M]."""
    return {
        criterion: [next(judgements) if ok else _no_image(RUBRICS[criterion]) for ok in shown] for criterion in criteria
    }


def _no_image(rubric: str) -> Judgement:
    return Judgement(rubric, None, None, None, "", "image_not_finite", "", "")


def scores(judgements: Sequence[Judgement], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """One criterion's scores on [0, 1] and which of them exist, [M] each; a missing one is NaN.

    kind: "parsed", the whole number that the critic wrote, or "expected", the mean of its probabilities over 1..5.
    Of several sub-scores the lowest counts.
    """

    def one(judgement: Judgement) -> float:
        value = judgement.score if kind == "parsed" else judgement.expected
        return np.nan if value is None else float(np.min(value))

    values = np.asarray(normalise(np.array([one(judgement) for judgement in judgements], np.float32)))
    exist = np.isfinite(values)
    return np.where(exist, values, np.float32(np.nan)), exist


def failures(judged: dict[str, list[Judgement]], kind: str) -> Counter[str]:
    """Why judgements have no score, and how often: their status, or "no_expected_score" where only that is missing."""
    return Counter(
        "no_expected_score" if judgement.status == "ok" else judgement.status
        for judgements in judged.values()
        for judgement, exists in zip(judgements, scores(judgements, kind)[1], strict=True)
        if not exists
    )


def judgement_metrics(judged: dict[str, list[Judgement]], kind: str) -> dict[str, float | None]:
    """Share of judgements without a score, their number by reason (`critic/status/<status>`), mean entropy at the
    score, and the mean score of every criterion."""
    everything = [judgement for judgements in judged.values() for judgement in judgements]
    entropies = [judgement.entropy for judgement in everything if judgement.entropy is not None]
    values = {name: scores(judgements, kind)[0] for name, judgements in judged.items()}
    failed = failures(judged, kind)
    return {
        "critic/failure_rate": failed.total() / len(everything),
        **{f"critic/status/{status}": count for status, count in sorted(failed.items())},
        "critic/entropy": float(np.mean(entropies)) if entropies else None,
        **{f"reward/{name}": mean_or_none(found) for name, found in values.items()},
    }


def mean_or_none(values: np.ndarray) -> float | None:
    """The mean of the values that are not NaN, None when there are none."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def write_judgements(
    run: "Run",
    epoch: int,
    prompts: "Sequence[PromptRecord]",
    judged: dict[str, list[Judgement]],
    rewards: np.ndarray,
    files: Mapping[int, str] = MappingProxyType({}),
) -> None:
    """One record for each judged image and criterion into judgements.jsonl; an edit's names its source images.

    files: image -> the file in the run's folder, of those that are kept; their records name it.
    """

    from firm_jax.data.edits import EditRecord

    def asked(record: "PromptRecord") -> dict:
        sources = {"sources": [image.name for image in record.images]} if isinstance(record, EditRecord) else {}
        return {"prompt": record.text} | sources

    run.judgements(
        {
            "epoch": epoch,
            "image": index,
            **asked(prompts[index]),
            **recorded(criterion, judgement, rewards[index]),
            **({"file": files[index]} if index in files else {}),
        }
        for criterion, judgements in judged.items()
        for index, judgement in enumerate(judgements)
    )


def recorded(criterion: str, judgement: Judgement, reward: float) -> dict:
    """The judgement of one image by a criterion of the reward as a record of JSON, with the image's reward."""
    return {
        "criterion": criterion,
        **judgement.record(),
        "reward": float(reward) if np.isfinite(reward) else None,
    }
