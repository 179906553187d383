"""Ground truth of an edit from the pixels of both pictures: what was carried out of it, and what else changed.

The oracle reads source and edited picture as `oracle` does, finds for every shape of the source what has become of
it, by place and then by looks, and asks two questions. Execution: which of the requested changes can be seen.
Preservation: whether every other shape is still there with its kind, colour, size and place, the shapes that were
changed with the attributes that nobody spoke of, the same background, and nothing new.
"""

import dataclasses

import numpy as np

from firm_jax.shapes.edits import Change, Edit
from firm_jax.shapes.oracle import Component, Reading, inspect, share_to_score
from firm_jax.shapes.scene import QUARTERS, Shape, quarter

# As fractions of the image side.
_REACH = 10 / 64  # how far what has become of a shape may lie from it; the middles of quarters are 32 / 64 apart
SHIFT = 4 / 64  # a shape that moved less has stayed where it was

# Slips of the consistency rubric: (significant, minor) at which the score falls to 4, 3 and 2.
_SLIPS = ((1, 1), (2, 3), (4, 5))
_NEARLY_ALL_DIFFERENT = 0.3  # preservation below which it falls to 1


@dataclasses.dataclass(frozen=True)
class Aspect:
    """One statement that makes up a requested change: its `text`, what is `seen` of it, and whether it `holds`."""

    text: str
    seen: str
    holds: bool


@dataclasses.dataclass(frozen=True)
class Slip:
    """A change that nobody asked for: in which quarter (or "background"), what, and whether it takes a careful look."""

    place: str
    what: str
    minor: bool = False


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the oracle finds.

    aspects: of each requested change. kept: whether each of the other statements holds: for every shape that had to
    stay its kind, colour, size and place (all false for one that is gone), the background, and "nothing new". slips:
    the same as a person would count it, so that a shape that is gone is one.
    """

    aspects: tuple[tuple[Aspect, ...], ...]
    kept: tuple[bool, ...]
    slips: tuple[Slip, ...]

    @property
    def execution(self) -> float:
        """Share of the requested changes that hold, each the share of its aspects, in [0, 1]."""
        return float(np.mean([np.mean([aspect.holds for aspect in change]) for change in self.aspects]))

    @property
    def preservation(self) -> float:
        """Share of everything else that is as it was, in [0, 1]."""
        return float(np.mean(self.kept))

    @property
    def score(self) -> float:
        """Both together: execution times preservation, 0 for the source itself and for a picture of something else."""
        return self.execution * self.preservation

    @property
    def accurate(self) -> bool:
        """Whether all that was asked for was done, and nothing else."""
        return all(aspect.holds for change in self.aspects for aspect in change) and all(self.kept)

    @property
    def execution_score(self) -> int:
        """1 to 5, as the rubric of execution counts: 5 for all changes, 1 for next to none."""
        return share_to_score(self.execution)

    @property
    def consistency_score(self) -> int:
        """1 to 5, as the rubric of consistency counts slips: 5 for none, 1 when nearly everything is different."""
        if self.preservation < _NEARLY_ALL_DIFFERENT:
            return 1
        minor = sum(slip.minor for slip in self.slips)
        significant = len(self.slips) - minor
        return 5 - sum(significant >= worst or minor >= many for worst, many in _SLIPS)


def compare(source: np.ndarray, edited: np.ndarray, edit: Edit) -> Comparison:
    """Compare two pictures, float [H, W, 3] in [0, 1], with H = W >= 48.

    Raises DataError for anything else, and when the source does not show the one shape that a change is about.
    """
    return compare_readings(inspect(source), inspect(edited), edit)


def compare_readings(source: Reading, edited: Reading, edit: Edit) -> Comparison:
    """`compare` for pictures that have been read already."""
    shapes = source.scene.shapes
    changes = {change.find(shapes): change for change in edit.changes}
    fates = _fates(shapes, edited.components, changes)
    added = {change: fates.claim_added(change) for change in edit.changes if change.operation == "add"}

    kept, slips = [], []
    for index, shape in enumerate(shapes):
        statements, found = _preserved(shape, fates.found[index], changes.get(index))
        kept += statements
        slips += found
    if not any(change.operation == "background" for change in edit.changes):
        kept.append(edited.background == source.background)
        slips += [Slip("background", f"now {edited.background or 'unclear'}")] * (not kept[-1])
    kept.append(not fates.new)
    slips += [Slip(_place(thing), f"new {name(thing)}") for thing in fates.new]

    aspects = []
    for change in edit.changes:
        index = change.find(shapes)
        if change.operation == "background":
            aspects.append((_is(f"background {change.background}", edited.background, change.background),))
        elif change.operation == "add":
            aspects.append(_addition(change, added[change]))
        else:
            aspects.append(_carried_out(change, shapes[index], fates.found[index], fates.left[index]))
    return Comparison(tuple(aspects), tuple(kept), tuple(slips))


def name(thing: Component | None) -> str:
    """A component in words: "large red circle", "blob" for what is no shape, "nothing" for None."""
    if thing is None:
        return "nothing"
    return f"{thing.size} {thing.color} {thing.kind}" if thing.is_shape else "blob"


def _place(thing) -> str:
    return quarter(thing.x, thing.y)


def _distance(shape, other) -> float:
    return float(np.hypot(shape.x - other.x, shape.y - other.y))


@dataclasses.dataclass
class _Fates:
    """What became of the source's shapes: by index what each is now (None if gone), whether its place is free of it;
    and the components that are none of them."""

    found: list[Component | None]
    left: list[bool]
    new: list[Component]

    def claim(self, fits, anchor) -> Component | None:
        """Take the nearest to `anchor` of the new components that fit."""
        return self._take(min(filter(fits, self.new), key=lambda thing: _distance(thing, anchor), default=None))

    def claim_added(self, change: Change) -> Component | None:
        """Take the new component that is most of what was to be added; the first of equal ones."""
        return self._take(max(self.new, key=lambda thing: sum(a.holds for a in _addition(change, thing)), default=None))

    def _take(self, taken: Component | None) -> Component | None:
        self.new = [thing for thing in self.new if thing is not taken]
        return taken


def _fates(shapes: tuple[Shape, ...], components: tuple[Component, ...], changes: dict[int | None, Change]) -> _Fates:
    """Follow every shape: to what is at its place, then to what looks as it should wherever that is."""
    fates = _Fates([None] * len(shapes), [True] * len(shapes), list(components))
    pairs = [(_distance(shape, thing), index, thing) for index, shape in enumerate(shapes) for thing in components]
    for distance, index, thing in sorted(pairs, key=lambda pair: pair[0]):
        if distance > _REACH or fates.found[index] is not None or not any(thing is one for one in fates.new):
            continue
        operation = changes[index].operation if index in changes else None
        shape = shapes[index]
        if (
            operation in ("remove", "move")
            and thing.is_shape
            and thing.kind != shape.kind
            and thing.color != shape.color
        ):
            continue  # something else has come in the place of what had to go
        fates.found[index], fates.left[index] = thing, False
        fates.new = [one for one in fates.new if one is not thing]

    for index, shape in enumerate(shapes):
        change = changes.get(index)
        moves = change is not None and change.operation == "move"
        if fates.found[index] is not None and not moves:
            continue
        wanted = (
            change.value.kind if change and change.operation == "replace" else shape.kind,
            change.value.color if change and change.operation in ("replace", "recolor") else shape.color,
        )
        anchor = Shape(*wanted, shape.size, *QUARTERS[change.place]) if moves else shape
        elsewhere = fates.claim(lambda thing, w=wanted: thing.is_shape and (thing.kind, thing.color) == w, anchor)
        if elsewhere is None:
            continue
        here, fates.found[index] = fates.found[index], elsewhere
        if here is not None and (here.kind, here.color) != wanted:  # another thing in the old place, and no copy
            fates.left[index], fates.new = True, [*fates.new, here]
    for index, change in changes.items():
        if index is not None and change.operation == "move" and fates.found[index] is None:
            shape = shapes[index]
            fates.found[index] = fates.claim(
                lambda thing, c=change, s=shape: (
                    thing.is_shape and _place(thing) == c.place and (thing.kind == s.kind or thing.color == s.color)
                ),
                shape,
            )
    return fates


def _is(text: str, seen: str | None, wanted: str) -> Aspect:
    return Aspect(text, seen or "unclear", seen == wanted)


def _addition(change: Change, thing: Component | None) -> tuple[Aspect, ...]:
    wanted = [(change.value.kind, "kind"), (change.value.color, "color"), (change.value.size, "size")]
    aspects = [
        _is(value, "nothing" if thing is None else _look(thing, attribute), value)
        for value, attribute in wanted
        if value is not None
    ]
    if change.place is not None:
        aspects.append(_is(change.place, "nothing" if thing is None else _place(thing), change.place))
    return tuple(aspects)


def _look(thing: Component, attribute: str) -> str:
    return "blob" if attribute == "kind" and not thing.is_shape else getattr(thing, attribute)


def _carried_out(change: Change, shape: Shape, thing: Component | None, left: bool) -> tuple[Aspect, ...]:
    """The aspects of a change of one shape, by what became of it and whether its old place is free of it."""
    subject = change.subject.phrase()
    match change.operation:
        case "recolor":
            return (_is(f"{subject} {change.value.color}", thing.color if thing else "nothing", change.value.color),)
        case "remove":
            return (Aspect(f"no {subject}", name(thing), thing is None),)
        case "replace":
            kind = _is(change.value.kind, _look(thing, "kind") if thing else "nothing", change.value.kind)
            color = _is(change.value.color, thing.color if thing else "nothing", change.value.color)
            return kind, color
    seen = _place(thing) if thing else "nothing"
    arrived = _is(change.place, seen, change.place)
    old = "nothing" if left else name(thing)
    return arrived, Aspect(f"nothing {_place(shape)}", old, left and thing is not None)


def _preserved(shape: Shape, thing: Component | None, change: Change | None) -> tuple[list[bool], list[Slip]]:
    """The statements about one shape of the source that had to stay true, and its slips."""
    free = {"remove": ("kind", "color", "size", "place"), "replace": ("kind", "color", "size")}
    free |= {"recolor": ("color",), "move": ("place",)}
    asked = free.get(change.operation, ()) if change else ()
    watched = [attribute for attribute in ("kind", "color", "size", "place") if attribute not in asked]
    if not watched or (thing is None and change and change.operation == "replace"):
        return [], []
    if thing is None:
        return [False] * len(watched), [Slip(_place(shape), f"{shape.color} {shape.kind} gone")]
    shift = _distance(shape, thing)
    same = {attribute: _look(thing, attribute) == getattr(shape, attribute) for attribute in ("kind", "color", "size")}
    same["place"] = shift <= SHIFT
    slips = [
        Slip(_place(shape), attribute, attribute == "size" or (attribute == "place" and shift <= _REACH))
        for attribute in watched
        if not same[attribute]
    ]
    return [same[attribute] for attribute in watched], slips
