"""Which examples a critic is trained on: no doubles, nothing of a benchmark, no contradictions, scores in balance.

Pure functions over examples and hashes of images; each tells by index what stays, in the order of what came in.
"""

import collections
import hashlib
import itertools
import re
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from PIL import Image

from firm_jax.errors import ConfigError

HASH_BITS = 64
NEAR_BITS = 3  # differing bits up to which two images are taken for the same, saved or scaled differently


def dhash(image: Image.Image) -> int:
    """A perceptual hash of 64 bits: of a grey 9 x 8 thumbnail, whether each pixel is darker than its right neighbour.

    Images that only differ in size, compression or brightness differ in few bits. Pictures without horizontal change
    all hash to 0, which says nothing about them.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), np.int16)
    bits = (grey[:, :-1] < grey[:, 1:]).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def distance(a: int, b: int) -> int:
    """Differing bits of two hashes."""
    return (a ^ b).bit_count()


class NearHashes:
    """Finds hashes within `bits` of one another without comparing all: such two agree in one of bits + 1 bands."""

    def __init__(self, bits: int = NEAR_BITS):
        if not 0 <= bits < HASH_BITS:
            raise ConfigError(f"{bits} differing bits of {HASH_BITS}; give a number from 0 to {HASH_BITS - 1}")
        self.bits = bits
        edges = [HASH_BITS * band // (bits + 1) for band in range(bits + 2)]
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
        self._found: list[dict[int, list[tuple[int, int]]]] = [collections.defaultdict(list) for _ in self._bands]

    def add(self, value: int, name: int) -> None:
        for (low, mask), band in zip(self._bands, self._found, strict=True):
            band[value >> low & mask].append((value, name))

    def near(self, value: int) -> set[int]:
        """The names of all hashes that were added within `bits` of this one."""
        return {
            name
            for (low, mask), band in zip(self._bands, self._found, strict=True)
            for other, name in band.get(value >> low & mask, ())
            if distance(value, other) <= self.bits
        }


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
    keys: Sequence[Hashable], hashes: Sequence[Sequence[int]], bits: int = NEAR_BITS
) -> list[int]:
    """Those that are not, in every image, near one of the same key that stays.

    keys: of what else must agree, prompt and criterion: the same picture with another instruction is another example.
    hashes: the perceptual hashes of each one's images.
    """
    kept, known = [], collections.defaultdict(lambda: NearHashes(bits))
    for index, (key, images) in enumerate(zip(keys, hashes, strict=True)):
        group = [known[key, len(images), place] for place in range(len(images))]
        near = [places.near(value) for places, value in zip(group, images, strict=True)]
        if near and set.intersection(*near):
            continue
        kept.append(index)
        for places, value in zip(group, images, strict=True):
            places.add(value, index)
    return kept


class Benchmark:
    """What must not be trained on. images: perceptual hashes of a benchmark's images; prompts: its prompts."""

    def __init__(self, images: Iterable[int], prompts: Iterable[str], bits: int = NEAR_BITS):
        self._images = NearHashes(bits)
        for number, value in enumerate(images):
            self._images.add(value, number)
        self._prompts = {normalised(prompt) for prompt in prompts}

    def leak(self, prompt: str, hashes: Sequence[int]) -> str | None:
        """ "image" or "prompt" where one of them is the benchmark's, None otherwise."""
        if any(self._images.near(value) for value in hashes):
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
    """Whether a reason speaks against its score: a heuristic on words, for the ends of the scale alone.

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
