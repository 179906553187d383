"""Which examples a critic is trained on: no doubles, nothing of a benchmark, no contradictions, scores in balance.

Pure functions over examples, and over hashes and thumbnails of images; each tells by index what stays, in the order of
what came in.
"""

import collections
import hashlib
import re
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from PIL import Image

from firm_jax.errors import ConfigError

SIDE = 12
NEAR_LEVELS = 32  # of 255, up to which the thumbnails of a picture that is saved or scaled differently differ


def thumbnail(image: Image.Image) -> bytes:
    """What pictures are compared by: 12 x 12 pixels in RGB. Two are near when no value differs by more than `levels`.

    Of 2,000 pictures of the shapes world, all others in pixels, 8 of 2 million pairs were near at 32 levels though
    their scenes differ in words: a small circle and a small square, say. Of 400 of them, 64 pixels wide, all were found
    again at half and at one and a half times the size, at 0.9 of the brightness and as JPEG of the qualities 95 and 80,
    and 99.8 % at 50. A difference hash (64 bits of falling or rising grey, 3 may differ) had 2,683 such pairs, and
    missed 4, 22 and 29 % of the JPEGs: what has few edges leaves it few bits, and what is flat leaves them to noise.
    Cropping and turning are not seen through, nor are larger changes of brightness.
    """
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS).tobytes()


class NearThumbnails:
    """Finds thumbnails within `levels` of one another by comparing with all: 0.3 ms for a thousand.

    Raises ConfigError for levels that no value has.
    """

    def __init__(self, levels: int = NEAR_LEVELS):
        if not 0 <= levels < 255:
            raise ConfigError(f"thumbnails that differ by {levels} levels of 255; give a number from 0 to 254")
        self.levels = levels
        self._pixels, self._names = bytearray(), []

    def add(self, value: bytes, name: int) -> None:
        self._pixels += value
        self._names.append(name)

    def near(self, value: bytes) -> set[int]:
        """The names of all thumbnails that were added within `levels` of this one."""
        one = np.frombuffer(value, np.uint8)
        added = np.frombuffer(self._pixels, np.uint8).reshape(-1, len(one))
        differ = np.maximum(added, one) - np.minimum(added, one)  # without a sign, uint8 is enough
        return {self._names[place] for place in np.flatnonzero(differ.max(axis=1) <= self.levels)}


def normalised(text: str) -> str:
    """A prompt without case, punctuation and spacing, by which prompts are compared."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def without_duplicates(keys: Sequence[Hashable]) -> list[int]:
    """The first of each key: of the sha256 of images, with prompt and criterion, for exact doubles."""
    first: dict[Hashable, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    return list(first.values())


def without_near_duplicates(
    keys: Sequence[Hashable], thumbnails: Sequence[Sequence[bytes]], levels: int = NEAR_LEVELS
) -> list[int]:
    """Those that are not, in every image, near one of the same key that stays.

    keys: of what else must agree, prompt and criterion: the same picture with another instruction is another example.
    thumbnails: of each one's images. The time grows with the square of the number of examples that share a key.
    """
    kept, known = [], collections.defaultdict(lambda: NearThumbnails(levels))
    for index, (key, images) in enumerate(zip(keys, thumbnails, strict=True)):
        group = [known[key, len(images), place] for place in range(len(images))]
        near = [places.near(value) for places, value in zip(group, images, strict=True)]
        if near and set.intersection(*near):
            continue
        kept.append(index)
        for places, value in zip(group, images, strict=True):
            places.add(value, index)
    return kept


class Benchmark:
    """What must not be trained on. images: thumbnails of a benchmark's images; prompts: its prompts."""

    def __init__(self, images: Iterable[bytes], prompts: Iterable[str], levels: int = NEAR_LEVELS):
        self._images = NearThumbnails(levels)
        for number, value in enumerate(images):
            self._images.add(value, number)
        self._prompts = {normalised(prompt) for prompt in prompts}

    def leak(self, prompt: str, thumbnails: Sequence[bytes]) -> str | None:
        """ "image" or "prompt" where one of them is the benchmark's, None otherwise."""
        if any(self._images.near(value) for value in thumbnails):
            return "image"
        return "prompt" if normalised(prompt) in self._prompts else None


_FAULT = re.compile(
    r"\b(missing|absent|lacks?|lacking|incorrect(?:ly)?|wrong(?:ly)?|fails?|failed|unintended|not (?:present|met|shown|"
    r"visible|followed|carried out|preserved|applied))\b",
    re.I,
)
_NONE = re.compile(
    r"\b(no|not|nothing|none|never|without|neither|nor|any|isn't|doesn't|didn't)\b(?:[^\w.;!?]+\w+){0,4}[^\w.;!?]*$",
    re.I,
)
_PRAISE = re.compile(
    r"\b(?:all (?:of the )?(?:\w+ )?requirements are (?:fully )?met|perfectly|flawless(?:ly)?|exactly as (?:asked|"
    r"requested|instructed)|only the requested change|fully (?:met|preserved|carried out))\b",
    re.I,
)


def contradicts(score: int, reason: str) -> bool:
    """Whether a reason speaks against its score: a heuristic on English words, for the ends of the scale alone.

    A 5 whose reason names a fault ("missing", "wrong", "fails", "not present" and the like, unless a negation stands
    at most four words before it: "nothing is missing"), or a 1 whose reason only praises ("perfectly", "all
    requirements are met") and names no fault. It cannot tell what a fault is about, and sees no other contradiction.
    """
    faults = [found for found in _FAULT.finditer(reason) if not _NONE.search(reason[: found.start()])]
    if score == 5:
        return bool(faults)
    return score == 1 and not faults and bool(_PRAISE.search(reason))


def balance(ids: Sequence[str], labels: Sequence[Hashable], cap: int, seed: int) -> list[int]:
    """Up to `cap` of each label, (criterion, score) say, drawn by the seed.

    Which ones depends on ids and seed alone, so that data that grow or come in another order change few of them. Raises
    ConfigError for a cap below 1.
    """
    if cap < 1:
        raise ConfigError(f"at most {cap} examples of each criterion and score would be kept; give 1 or more")
    groups = collections.defaultdict(list)
    for index, (name, label) in enumerate(zip(ids, labels, strict=True)):
        groups[label].append((hashlib.sha256(f"{seed} {name}".encode()).digest(), index))
    return sorted(index for group in groups.values() for _, index in sorted(group)[:cap])
