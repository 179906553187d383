"""What differs between two pictures that the oracle has read, place by place: the four quarters and the background."""

import dataclasses
import re
from collections.abc import Collection

import numpy as np

from firm_jax.shapes.edit_oracle import SHIFT, name
from firm_jax.shapes.oracle import Component, Reading, reading_order
from firm_jax.shapes.scene import QUARTERS, quarter

BACKGROUND = "background"
PLACES = (*QUARTERS, BACKGROUND)
_NAMED = re.compile(rf"^(?:\d+\. )?({'|'.join(PLACES)}): ", re.M)


@dataclasses.dataclass(frozen=True)
class Difference:
    """minor: whether it takes a careful look, being of size or a slight shift alone. text: what both pictures show."""

    place: str
    minor: bool
    text: str


def between(before: Reading, after: Reading) -> list[Difference]:
    """The differences that there are, in the order of PLACES."""
    found = []
    for place in QUARTERS:
        first, second = _there(before, place), _there(after, place)
        names = [_named(things) for things in (first, second)]
        shifted = names[0] == names[1] and any(
            np.hypot(one.x - two.x, one.y - two.y) > SHIFT for one, two in zip(first, second, strict=True)
        )
        if names[0] == names[1] and not shifted:
            continue
        looks = [[(one.is_shape, one.kind, one.color) for one in things] for things in (first, second)]
        text = f"{place}: {names[0]} in the first image, {names[1]}{' shifted' * shifted} in the second."
        found.append(Difference(place, shifted or looks[0] == looks[1], text))
    if before.background != after.background:
        text = f"{before.background or 'unclear'} in the first image, {after.background or 'unclear'} in the second."
        found.append(Difference(BACKGROUND, False, f"{BACKGROUND}: {text}"))
    return found


def places_in(notes: str) -> set[str]:
    """The places that notes made of `between` speak of."""
    return set(_NAMED.findall(notes))


def without(before: Reading, after: Reading, places: Collection[str]) -> Reading:
    """The second picture as it is seen by who takes these places for what they were in the first."""
    things = [thing for thing in after.components if _place(thing) not in places]
    things += [thing for thing in before.components if _place(thing) in places]
    return dataclasses.replace(
        after,
        background=before.background if BACKGROUND in places else after.background,
        components=tuple(sorted(things, key=reading_order)),
    )


def _place(thing: Component) -> str:
    return quarter(thing.x, thing.y)


def _there(reading: Reading, place: str) -> list[Component]:
    return [thing for thing in reading.components if _place(thing) == place]


def _named(things: list[Component]) -> str:
    return " and ".join(name(thing) for thing in things) or "nothing"
