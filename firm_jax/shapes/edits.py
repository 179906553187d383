"""The editing half of the shapes world: what is asked of a source picture, and the scene that would show it.

An edit is an instruction together with the changes that it asks for, one or two, so that each can be checked by
itself. The shapes of a source differ in kind or colour, so that an instruction can always say which one it means.
"""

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from firm_jax.errors import DataError
from firm_jax.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    JITTER,
    KINDS,
    MAX_SHAPES,
    QUARTERS,
    SIZES,
    Include,
    Prompt,
    Scene,
    Selector,
    Shape,
    choice,
    known,
    quarter,
    sample_scene,
)

# Of an edit that asks for two changes the tag is "double".
DIFFICULTIES = {
    "easy": ("recolor", "remove", "background"),
    "medium": ("add", "move", "replace"),
    "hard": ("double",),
}
OPERATIONS = (*DIFFICULTIES["easy"], *DIFFICULTIES["medium"])
ON_A_SHAPE = ("recolor", "remove", "move", "replace")
ON_A_PLACE = ("add", "move")

_NOTHING = Selector()
_SHAPE_COUNTS = {1: 0.15, 2: 0.35, 3: 0.35, 4: 0.15}  # of a source, and how often
_PHRASES = {
    "recolor": ("make the {subject} {color}", "change the {subject} to {color}", "paint the {subject} {color}"),
    "remove": ("remove the {subject}", "delete the {subject}", "take away the {subject}"),
    "background": ("make the background {background}", "change the background to {background}"),
    "add": ("add {value}{where}", "draw {value}{where}"),
    "move": ("move the {subject} to the {place}", "put the {subject} in the {place}"),
    "replace": ("replace the {subject} with {value}", "turn the {subject} into {value}"),
}


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing that an instruction asks for.

    operation: of OPERATIONS. subject: fits the one shape of the source that is meant; empty for "add" and
    "background". value: what is added or put in the subject's place, or the colour that it gets. place: the quarter
    for what is added or moved; None leaves it open. background: the new one.
    """

    operation: str
    subject: Selector = _NOTHING
    value: Selector = _NOTHING
    place: str | None = None
    background: str | None = None

    def find(self, shapes: Sequence[Shape]) -> int | None:
        """The index of the subject among the source's shapes, None where the change has none.

        Raises DataError when not exactly one shape fits.
        """
        if self.operation not in ON_A_SHAPE:
            return None
        found = self.subject.select(tuple(shapes))
        if len(found) != 1:
            raise DataError(
                f"the source of an edit must show exactly one {self.subject.phrase()} to {self.operation}; "
                f"{len(found)} of its {len(shapes)} shapes are one"
            )
        return shapes.index(found[0])

    def phrase(self, rng: np.random.Generator) -> str:
        """The change in plain English, in one of several wordings."""
        where = f" {choice(rng, ('in', 'at'))} the {self.place}" if self.place else ""
        return choice(rng, _PHRASES[self.operation]).format(
            subject=self.subject.phrase(),
            value=_with_article(self.value.phrase()),
            color=self.value.color,
            place=self.place,
            where=where,
            background=self.background,
        )


@dataclasses.dataclass(frozen=True)
class Edit:
    """An instruction and what it asks for."""

    text: str
    changes: tuple[Change, ...]

    @property
    def tag(self) -> str:
        """The operation, or "double"."""
        return self.changes[0].operation if len(self.changes) == 1 else "double"

    @property
    def difficulty(self) -> str:
        """ "easy", "medium" or "hard"."""
        return next(name for name, tags in DIFFICULTIES.items() if self.tag in tags)

    def to_json(self) -> dict:
        """A metadata record (`prompt`, `tag`, `difficulty`, `changes`), without the source picture."""
        changes = []
        for change in self.changes:
            record = {"operation": change.operation}
            for name in ("subject", "value"):
                selector = getattr(change, name)
                fields = {"class": selector.kind, "color": selector.color, "size": selector.size}
                if said := {key: value for key, value in fields.items() if value}:
                    record[name] = said
            record |= {key: value for key in ("place", "background") if (value := getattr(change, key))}
            changes.append(record)
        return {"prompt": self.text, "tag": self.tag, "difficulty": self.difficulty, "changes": changes}

    @classmethod
    def from_json(cls, record: Mapping) -> "Edit":
        """The inverse of `to_json`; raises DataError naming the field that the shapes world does not know."""
        changes = record.get("changes")
        if not isinstance(record.get("prompt"), str) or not isinstance(changes, list) or not 1 <= len(changes) <= 2:
            raise DataError(f"shapes edit without a prompt and one or two changes: {json.dumps(dict(record))}")
        return cls(record["prompt"], tuple(_change_from_json(item) for item in changes))


def _change_from_json(item) -> Change:
    if not isinstance(item, Mapping):
        raise DataError(f"shapes edit: a change is {item!r}, not an object")
    operation = known("operation", item.get("operation"), OPERATIONS, optional=False)
    change = Change(
        operation,
        _selector_from_json(item.get("subject", {})),
        _selector_from_json(item.get("value", {})),
        known("place", item.get("place"), QUARTERS),
        known("background", item.get("background"), BACKGROUNDS),
    )
    needed = {
        "subject": (change.subject.kind, ON_A_SHAPE),
        "value class": (change.value.kind, ("add", "replace")),
        "value color": (change.value.color, ("add", "replace", "recolor")),
        "place": (change.place, ("move",)),
        "background": (change.background, ("background",)),
    }
    for name, (value, operations) in needed.items():
        if value is None and operation in operations:
            raise DataError(f"shapes edit: a change to {operation} without a {name}: {json.dumps(dict(item))}")
    return change


def _selector_from_json(item) -> Selector:
    if not isinstance(item, Mapping):
        raise DataError(f"shapes edit: a description is {item!r}, not an object")
    return Selector(
        known("class", item.get("class"), KINDS),
        known("color", item.get("color"), COLORS),
        known("size", item.get("size"), SIZES),
    )


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase.startswith("orange") else f"a {phrase}"


def sample_source(rng: np.random.Generator) -> Scene:
    """A scene of one to four shapes, no two of one kind and colour."""
    count = int(rng.choice(list(_SHAPE_COUNTS), p=list(_SHAPE_COUNTS.values())))
    pairs = [(kind, color) for kind in KINDS for color in COLORS]
    drawn = rng.permutation(len(pairs))[:count]
    include = tuple(Include(Selector(*pairs[index])) for index in drawn)
    return sample_scene(rng, Prompt("", "two_object", "medium", include))


def sample_edit(rng: np.random.Generator, source: Scene, difficulty: str) -> Edit:
    """Draw an edit of the source: "easy" and "medium" ask for one change, "hard" for two of different operations."""
    if difficulty not in DIFFICULTIES:
        raise DataError(f"difficulty {difficulty!r} is none of {', '.join(DIFFICULTIES)}")
    count = len(source.shapes)
    possible = [
        operation
        for operation in (OPERATIONS if difficulty == "hard" else DIFFICULTIES[difficulty])
        if (operation not in ON_A_PLACE or count < MAX_SHAPES) and (operation != "remove" or count > 1)
    ]
    while True:
        operations = rng.permutation(possible)[: 2 if difficulty == "hard" else 1].tolist()
        on_shapes = sum(operation in ON_A_SHAPE for operation in operations)
        on_places = sum(operation in ON_A_PLACE for operation in operations)
        if on_shapes <= count and on_places <= MAX_SHAPES - count:
            break
    subjects, free = list(rng.permutation(count)), list(rng.permutation(_free_quarters(source.shapes)))
    changes = tuple(_sample_change(rng, source, operation, subjects, free) for operation in operations)
    return Edit(" and ".join(change.phrase(rng) for change in changes), changes)


def _free_quarters(shapes) -> list[str]:
    taken = {quarter(shape.x, shape.y) for shape in shapes}
    return [place for place in QUARTERS if place not in taken]


def _sample_change(rng: np.random.Generator, source: Scene, operation: str, subjects: list, free: list) -> Change:
    """A change of a shape and to a place that are not yet taken: those are removed from the lists."""
    if operation == "background":
        return Change(operation, background=choice(rng, [name for name in BACKGROUNDS if name != source.background]))
    place = str(free.pop()) if operation in ON_A_PLACE else None
    taken = [(shape.kind, shape.color) for shape in source.shapes]
    if operation == "add":
        kind, color = choice(rng, [(k, c) for k in KINDS for c in COLORS if (k, c) not in taken])
        size = choice(rng, SIZES) if rng.random() < 0.3 else None
        return Change(operation, value=Selector(kind, color, size), place=place if rng.random() < 0.7 else None)
    shape = source.shapes[subjects.pop()]
    alone = sum(kind == shape.kind for kind, _ in taken) == 1
    subject = Selector(shape.kind, None if alone and rng.random() < 0.5 else shape.color)
    others = [color for color in COLORS if color != shape.color]
    if operation == "recolor":
        return Change(operation, subject, Selector(color=choice(rng, others)))
    if operation == "replace":
        new = [(k, c) for k in KINDS for c in others if k != shape.kind and (k, c) not in taken]
        return Change(operation, subject, Selector(*choice(rng, new)))
    return Change(operation, subject, place=place)


def sample_target(
    rng: np.random.Generator,
    source: Scene,
    edit: Edit,
    *,
    untouched: float = 0.0,
    wrong: float = 0.0,
    careless: float = 0.0,
) -> Scene:
    """The scene that an editor leaves behind; what the instruction leaves open is random.

    Args:
      untouched: probability that the source comes back as it was.
      wrong: probability, for each change, that it is left out or done otherwise than asked (to another shape, to
        another colour, kind, place or background).
      careless: probability, for each shape, for an empty quarter and for the background, that something happens to it
        that nobody asked for.

    Without any of these everything holds that is asked for, and the rest is as in the source.
    """
    if rng.random() < untouched:
        return source
    changes = [_botch(rng, source, change) if rng.random() < wrong else change for change in edit.changes]
    shapes: list[Shape | None] = list(source.shapes)
    background, subjects = source.background, set()
    # Those that name a place come first, so that no other takes it.
    for change in sorted(filter(None, changes), key=lambda change: change.place is None):
        index = change.find(source.shapes)
        background = change.background or background
        if change.operation == "add":
            shapes.append(_placed(rng, change.value, change.place, [*source.shapes, *shapes]))
        elif index is not None and shapes[index] is not None:
            subjects.add(index)
            shapes[index] = _changed(rng, shapes[index], change, [*source.shapes, *shapes])
    for index in range(len(source.shapes)):
        if shapes[index] is not None and rng.random() < careless:
            shapes[index] = _spoiled(rng, shapes[index], index in subjects)
    if rng.random() < careless:
        shapes.append(_placed(rng, _NOTHING, None, shapes))
    if background == source.background and rng.random() < careless:
        background = choice(rng, BACKGROUNDS)
    return Scene(background, tuple(shape for shape in shapes if shape is not None))


def _changed(rng: np.random.Generator, shape: Shape, change: Change, shapes: Sequence[Shape | None]) -> Shape | None:
    match change.operation:
        case "recolor":
            return dataclasses.replace(shape, color=change.value.color)
        case "replace":
            return dataclasses.replace(shape, kind=change.value.kind, color=change.value.color)
        case "move":
            return _placed(rng, Selector(shape.kind, shape.color, shape.size), change.place, shapes)
    return None  # removed


def _placed(rng: np.random.Generator, selector: Selector, place: str | None, shapes) -> Shape | None:
    """A shape in that quarter, or in any empty one where it is open or taken; None when there is none."""
    free = _free_quarters([shape for shape in shapes if shape is not None])
    if not free:
        return None
    size = selector.size or choice(rng, SIZES)
    x, y = np.array(QUARTERS[place if place in free else choice(rng, free)]) + rng.uniform(-1, 1, 2) * JITTER[size]
    kind, color = selector.kind or choice(rng, KINDS), selector.color or choice(rng, COLORS)
    return Shape(kind, color, size, float(x), float(y))


def _botch(rng: np.random.Generator, source: Scene, change: Change) -> Change | None:
    """The change done otherwise than asked, or not at all."""
    others = [shape for shape in source.shapes if not change.subject.select((shape,))]
    ways = ["nothing"] * 3
    ways += ["subject"] * (change.operation in ON_A_SHAPE and bool(others))
    ways += ["kind"] * (change.value.kind is not None) + ["color"] * (change.value.color is not None)
    ways += ["place"] * (change.place is not None) + ["background"] * (change.background is not None)
    match choice(rng, ways):
        case "subject":
            other = choice(rng, others)
            return dataclasses.replace(change, subject=Selector(other.kind, other.color))
        case "kind":
            return dataclasses.replace(change, value=dataclasses.replace(change.value, kind=choice(rng, KINDS)))
        case "color":
            return dataclasses.replace(change, value=dataclasses.replace(change.value, color=choice(rng, COLORS)))
        case "place":
            return dataclasses.replace(change, place=choice(rng, QUARTERS))
        case "background":
            return dataclasses.replace(change, background=choice(rng, BACKGROUNDS))
    return None


def _spoiled(rng: np.random.Generator, shape: Shape, touched: bool) -> Shape | None:
    """The shape after an accident: gone, another kind, colour or size, or shifted; one just edited keeps its looks."""
    match choice(rng, ("size", "shift") if touched else ("gone", "kind", "color", "size", "shift")):
        case "gone":
            return None
        case "kind":
            return dataclasses.replace(shape, kind=choice(rng, [kind for kind in KINDS if kind != shape.kind]))
        case "color":
            return dataclasses.replace(shape, color=choice(rng, [color for color in COLORS if color != shape.color]))
        case "size":
            other = "small" if shape.size == "large" else "large"
            middle = np.array(QUARTERS[quarter(shape.x, shape.y)])
            reach = min(JITTER[other] / JITTER[shape.size], 1.0)  # a larger shape has less room around its middle
            x, y = middle + reach * (np.array([shape.x, shape.y]) - middle)
            return dataclasses.replace(shape, size=other, x=float(x), y=float(y))
    x, y = np.array(QUARTERS[quarter(shape.x, shape.y)]) + rng.uniform(-1, 1, 2) * JITTER[shape.size]
    return dataclasses.replace(shape, x=float(x), y=float(y))


def edits(split: str, sources: int, seed: int = 0) -> list[tuple[Scene, Edit]]:
    """Three edits, one of each difficulty, of each of `sources` scenes.

    What an edit asks of which shapes, whatever its wording, belongs to "train" (four fifths) or to "test" (one fifth)
    for every seed, so no test combination is ever trained on. Raises DataError for an unknown split.
    """
    if split not in ("train", "test"):
        raise DataError(f"split {split!r} is neither 'train' nor 'test'")
    rng = np.random.default_rng([seed, split == "test"])
    found = []
    while len(found) < 3 * sources:
        source = sample_source(rng)
        drawn = []
        for difficulty in DIFFICULTIES:
            tries = (sample_edit(rng, source, difficulty) for _ in range(30))
            drawn.append(next((edit for edit in tries if _in_test(source, edit) == (split == "test")), None))
        if None not in drawn:
            found += [(source, edit) for edit in drawn]
    return found


def _in_test(source: Scene, edit: Edit) -> bool:
    """Whether the combination of changes is held out; their order and wording do not matter."""
    records = []
    for change in edit.changes:
        index = change.find(source.shapes)
        about = source.shapes if index is None else source.shapes[index : index + 1]
        # Of an addition all is in what is added. A background alone would leave three combinations for both splits.
        about = [] if change.operation == "add" else sorted([shape.kind, shape.color] for shape in about)
        records.append([change.operation, about, dataclasses.astuple(change.value), change.place, change.background])
    return zlib.crc32(json.dumps(sorted(records, key=str)).encode()) % 5 == 0
