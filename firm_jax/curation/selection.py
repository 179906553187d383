"""The selection in its order: exact doubles, near doubles, what is a benchmark's, contradictions, then the balance.

What costs nothing to keep comes last: the balance is drawn from what has passed all the rest.
"""

import collections
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from firm_jax.critic.bench.records import fields_from, read_bench
from firm_jax.curation import select
from firm_jax.curation.select import Benchmark
from firm_jax.curation.stage import Example
from firm_jax.data.images import decode_image, read_image_file

DUPLICATE, NEAR_DUPLICATE, LEAKAGE, CONTRADICTION, BALANCE = REASONS = (
    "duplicate",
    "near_duplicate",
    "leakage",
    "contradiction",
    "balance",
)


@dataclass(frozen=True)
class Look:
    """An image of an example: the sha256 of its file, and the thumbnail that it is compared by."""

    sha256: str
    thumbnail: bytes


@dataclass(frozen=True)
class Rules:
    """near_levels: of 255, by which thumbnails may differ of images that are taken for the same. benchmark: what must
    not be trained on; None checks nothing. contradictions: whether reasons are held against their scores. per_score:
    most examples of each criterion and score; None keeps all. seed: of the balance."""

    near_levels: int = select.NEAR_LEVELS
    benchmark: Benchmark | None = None
    contradictions: bool = True
    per_score: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Rejected:
    """reason: one of REASONS. detail: what is known besides."""

    example: Example
    reason: str
    detail: str = ""


def look_at(examples: Sequence[Example], folder: str | os.PathLike) -> dict[str, Look]:
    """Every image of the examples by its path below the folder. DataError for one that can no longer be read."""

    def look(path: str) -> Look:
        content = read_image_file(path, folder)
        return Look(hashlib.sha256(content).hexdigest(), select.thumbnail(decode_image(content, path)))

    paths = list(dict.fromkeys(path for one in examples for path in one.images))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(look, paths), strict=True))


def benchmark_of(folders: Sequence[str], task: str, fields: Sequence[str], levels: int) -> Benchmark | None:
    """What the benchmarks in these folders hold; an `embedded:` name is one that ships. None for no folder.

    fields: as `firm-jax bench --fields`. Raises DataError for a folder that is no benchmark of the task.
    """
    images, prompts = [], []
    for name in folders:
        bench = read_bench(name, task, fields_from(fields))
        images += [picture for item in bench.items for picture in item.pictures]
        prompts += [item.prompt for item in bench.items]
    thumbnails = [select.thumbnail(picture.open()[0]) for picture in dict.fromkeys(images)]
    return Benchmark(thumbnails, prompts, levels) if folders else None


def selected(
    examples: Sequence[Example], looks: Mapping[str, Look], rules: Rules
) -> tuple[list[Example], list[Rejected]]:
    """What stays, in the order of what came in, and what does not, each with the first reason that there is.

    looks: of every image, by its path.
    """
    rejected: list[Rejected] = []

    def keep(reason: str, places: Sequence[int]) -> None:
        nonlocal examples
        kept = set(places)
        rejected.extend(Rejected(one, reason) for place, one in enumerate(examples) if place not in kept)
        examples = [examples[place] for place in places]

    keep(DUPLICATE, select.without_duplicates([(*_question(one), *_hashes(one, looks)) for one in examples]))
    keys, shown = [_question(one) for one in examples], [_thumbnails(one, looks) for one in examples]
    keep(NEAR_DUPLICATE, select.without_near_duplicates(keys, shown, rules.near_levels))
    if rules.benchmark is not None:
        examples = _without(examples, LEAKAGE, lambda one: _leak(one, looks, rules.benchmark), rejected)
    if rules.contradictions:
        examples = _without(examples, CONTRADICTION, _contradiction, rejected)
    if rules.per_score is not None:
        labels = [(one.criterion, one.score) for one in examples]
        keep(BALANCE, select.balance([one.id for one in examples], labels, rules.per_score, rules.seed))
    return list(examples), rejected


def held_out(examples: Sequence[Example], looks: Mapping[str, Look], share: float, seed: int) -> list[bool]:
    """Which examples are held out: about this share of the first pictures, each with all that is asked about it.

    Of an edit the first picture is the source, so that no source is in both parts. With any share above 0 and two
    pictures or more, at least one of them is held out and one is not.
    """
    groups = {looks[one.images[0]].sha256 for one in examples}
    drawn = sorted(groups, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    count = min(max(round(share * len(drawn)), share > 0), len(drawn) - 1)
    chosen = set(drawn[: max(count, 0)])
    return [looks[one.images[0]].sha256 in chosen for one in examples]


def counted(rejected: Sequence[Rejected]) -> dict[str, int]:
    """How many were rejected for which reason, in the order of REASONS."""
    counts = collections.Counter(one.reason for one in rejected)
    return {reason: counts[reason] for reason in REASONS if counts[reason]}


def _without(
    examples: Sequence[Example], reason: str, fault: Callable[[Example], str | None], rejected: list[Rejected]
) -> list[Example]:
    """The examples that have no fault; the others go to `rejected`."""
    kept = []
    for one in examples:
        if (detail := fault(one)) is None:
            kept.append(one)
        else:
            rejected.append(Rejected(one, reason, detail))
    return kept


def _question(one: Example) -> tuple[str, str, str]:
    return one.criterion, one.prompt, one.requirement


def _hashes(one: Example, looks: Mapping[str, Look]) -> list[str]:
    return [looks[path].sha256 for path in one.images]


def _thumbnails(one: Example, looks: Mapping[str, Look]) -> list[bytes]:
    return [looks[path].thumbnail for path in one.images]


def _leak(one: Example, looks: Mapping[str, Look], benchmark: Benchmark) -> str | None:
    found = benchmark.leak(one.prompt, _thumbnails(one, looks))
    return found and f"its {found} is the benchmark's"


def _contradiction(one: Example) -> str | None:
    return f"a {one.score}: {one.reason}" if select.contradicts(one.score, one.reason) else None
