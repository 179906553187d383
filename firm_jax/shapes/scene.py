"""The grammar of the shapes world: scenes, prompts, and the requirements a prompt makes of a picture.

A scene is a flat background with one to four shapes on a loose 2x2 grid. A prompt is a caption together with
what it asks for, in the fields of a GenEval record, so that each of its requirements can be checked one by one.
Coordinates are fractions of the image side: x grows to the right, y grows downwards.
"""

import dataclasses
import json
import zlib
from collections.abc import Mapping

import numpy as np

from firm_jax.errors import DataError

KINDS = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (0.85, 0.05, 0.10),
    "green": (0.05, 0.65, 0.20),
    "blue": (0.10, 0.30, 0.95),
    "yellow": (1.00, 0.92, 0.15),
    "purple": (0.60, 0.10, 0.75),
    "orange": (1.00, 0.52, 0.00),
}
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "gray": (0.5, 0.5, 0.5)}
SIZES = {"small": 7 / 64, "large": 12 / 64}  # half extent
JITTER = {"small": 4 / 64, "large": 1.5 / 64}  # how far a shape may lie from the middle of its quarter
# The quarters of a picture in reading order, and their middles.
QUARTERS = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
RELATIONS = ("left of", "right of", "above", "below")
TAGS = {
    "easy": ("single_object", "colors"),
    "medium": ("counting", "two_object"),
    "hard": ("position", "color_attr"),
}
MAX_SHAPES = 4

_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
_NUMBERS = ("zero", "one", "two", "three", "four")
_RELATION_MARGIN = 0.2  # how far apart two centres must be for one to be left of, or above, the other

VOCABULARY = tuple(
    sorted(
        {"a", "an", "of", "there", "is", "are", "picture", "and", "with", "on", "background", "to", "the"}
        | {word for relation in RELATIONS for word in relation.split()}
        | {*KINDS, *_PLURALS.values(), *COLORS, *BACKGROUNDS, *SIZES, *_NUMBERS[1:]}
    )
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape; (x, y) is the middle of its bounding circle, as a fraction of the image side."""

    kind: str
    color: str
    size: str
    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background and the shapes on it. The oracle gives background None when it is no known colour."""

    background: str | None
    shapes: tuple[Shape, ...]


@dataclasses.dataclass(frozen=True)
class Selector:
    """A description that some shapes fit; None stands for any value."""

    kind: str | None = None
    color: str | None = None
    size: str | None = None

    def select(self, shapes: tuple[Shape, ...]) -> list[Shape]:
        """The shapes that fit the description."""
        return [
            shape
            for shape in shapes
            if self.kind in (None, shape.kind) and self.color in (None, shape.color) and self.size in (None, shape.size)
        ]

    def phrase(self, count: int = 1) -> str:
        """The description in English without a number: "large red circles"."""
        noun = self.kind or "shape"
        if count != 1:
            noun = _PLURALS.get(noun, "shapes")
        return " ".join(word for word in (self.size, self.color, noun) if word)


@dataclasses.dataclass(frozen=True)
class Include:
    """`count` shapes of one description, optionally in a relation to the include at another index (GenEval)."""

    selector: Selector
    count: int = 1
    position: tuple[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One checkable statement about a picture, `text` in plain English.

    check: "exactly" (`count` shapes fit `subject`; with an empty subject no malformed shape may be left over),
    "every" (something fits `subject`, and all of that fits `value` too), "relation" (all that fits `subject` lies
    `relation` of all that fits `value`), "background".
    """

    check: str
    text: str
    subject: Selector = Selector()
    value: Selector = Selector()
    count: int = 0
    relation: str | None = None
    background: str | None = None

    def holds(self, scene: Scene, strays: int = 0) -> bool:
        """Whether the statement is true of a scene that also holds `strays` malformed shapes."""
        found = self.subject.select(scene.shapes)
        match self.check:
            case "exactly":
                return len(found) == self.count and (self.subject != Selector() or strays == 0)
            case "every":
                return bool(found) and len(self.value.select(tuple(found))) == len(found)
            case "relation":
                others = self.value.select(scene.shapes)
                return bool(found and others) and all(
                    in_relation(shape, self.relation, other) for shape in found for other in others
                )
            case "background":
                return bool(scene.shapes) and scene.background == self.background
        raise DataError(f"requirement {self.text!r}: unknown check {self.check!r}")


def quarter(x: float, y: float) -> str:
    """The quarter of a picture in which a point lies."""
    return f"{'bottom' if y > 0.5 else 'top'} {'right' if x > 0.5 else 'left'}"


def in_relation(shape: Shape, relation: str, other: Shape) -> bool:
    """Whether `shape` lies "left of", "right of", "above" or "below" `other`, by a clear margin."""
    offset = {
        "left of": other.x - shape.x,
        "right of": shape.x - other.x,
        "above": other.y - shape.y,
        "below": shape.y - other.y,
    }[relation]
    return offset > _RELATION_MARGIN


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A caption and what it asks for: GenEval's fields, and the background."""

    text: str
    tag: str
    difficulty: str
    include: tuple[Include, ...]
    background: str | None = None

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        """Two to six statements. None of them holds for an empty picture, and each count is exact."""
        total = sum(item.count for item in self.include)
        statements = _count_statements(self) if self.tag == "counting" else _object_statements(self)
        if self.background is not None:
            text = f"background is {self.background}"
            statements.append(Requirement("background", text, background=self.background))
        text = f"{_NUMBERS[total]} {Selector().phrase(total)} in all"
        statements.append(Requirement("exactly", text, count=total))
        return tuple(dict.fromkeys(statements))

    def to_json(self) -> dict:
        """A GenEval record (`tag`, `include`, `prompt`) with our `size`, `difficulty` and `background`."""
        include = []
        for item in self.include:
            record = {"class": item.selector.kind, "count": item.count}
            record |= {"color": item.selector.color} if item.selector.color else {}
            record |= {"size": item.selector.size} if item.selector.size else {}
            record |= {"position": list(item.position)} if item.position else {}
            include.append(record)
        record = {"tag": self.tag, "include": include, "prompt": self.text, "difficulty": self.difficulty}
        return record | ({"background": self.background} if self.background else {})

    @classmethod
    def from_json(cls, record: Mapping) -> "Prompt":
        """The inverse of `to_json`; raises DataError naming the field that the shapes world does not know."""
        for key in ("tag", "include", "prompt"):
            if key not in record:
                raise DataError(f"shapes prompt without the field {key!r}: {json.dumps(dict(record))}")
        difficulty = next((name for name, tags in TAGS.items() if record["tag"] in tags), None)
        if difficulty is None:
            every = ", ".join(tag for tags in TAGS.values() for tag in tags)
            raise DataError(f"shapes prompt: tag {record['tag']!r} is none of {every}")
        include = tuple(_include_from_json(item, record["include"]) for item in record["include"])
        if not 1 <= sum(item.count for item in include) <= MAX_SHAPES:
            raise DataError(f"shapes prompt {record['prompt']!r}: must ask for 1 to {MAX_SHAPES} shapes in all")
        background = known("background", record.get("background"), BACKGROUNDS)
        return cls(record["prompt"], record["tag"], difficulty, include, background)


def known(field: str, value, choices, optional: bool = True):
    """The value of a record's field if it is one of `choices` (or None, where optional); DataError otherwise."""
    if (value is None and optional) or (isinstance(value, str) and value in choices):
        return value
    raise DataError(f"shapes record: {field} {value!r} is none of {', '.join(choices)}")


def _include_from_json(item: Mapping, siblings: list) -> Include:
    selector = Selector(
        known("class", item.get("class"), KINDS, optional=False),
        known("color", item.get("color"), COLORS),
        known("size", item.get("size"), SIZES),
    )
    count = item.get("count", 1)
    if not isinstance(count, int) or not 1 <= count <= MAX_SHAPES:
        raise DataError(f"shapes prompt: count {count!r} is not an integer from 1 to {MAX_SHAPES}")
    if item.get("position") is None:
        return Include(selector, count)
    try:
        relation, index = item["position"]
        siblings[index]
    except (TypeError, ValueError, IndexError) as error:
        message = f"shapes prompt: position {item['position']!r} is not [relation, index of an include]"
        raise DataError(message) from error
    return Include(selector, count, (known("relation", relation, RELATIONS, optional=False), index))


def _count_statements(prompt: Prompt) -> list[Requirement]:
    (item,) = prompt.include
    kind, color = Selector(kind=item.selector.kind), Selector(color=item.selector.color)
    return [
        Requirement("every", f"all shapes are {kind.phrase(2)}", value=kind),
        Requirement("every", f"all shapes are {item.selector.color}", value=color),
        _exactly(item.selector, item.count),
    ]


def _object_statements(prompt: Prompt) -> list[Requirement]:
    """Shape and colour are two statements, but one where size or position needs room for its own."""
    statements = []
    merged = prompt.tag in ("position", "color_attr")
    for item in prompt.include:
        kind, color, size = item.selector.kind, item.selector.color, item.selector.size
        colored = Selector(kind, color)
        if not merged:
            same_kind = sum(other.count for other in prompt.include if other.selector.kind == kind)
            statements.append(_exactly(Selector(kind), same_kind))
        statements.append(_exactly(colored, item.count))
        if size is not None:
            text = f"{colored.phrase(item.count)} {'is' if item.count == 1 else 'are'} {size}"
            statements.append(Requirement("every", text, subject=colored, value=Selector(size=size)))
        if item.position is not None:
            relation, index = item.position
            anchor = prompt.include[index]
            reference = Selector(anchor.selector.kind, anchor.selector.color)
            text = f"{colored.phrase(item.count)} {relation} {reference.phrase(anchor.count)}"
            statements.append(Requirement("relation", text, subject=colored, value=reference, relation=relation))
    return statements


def _exactly(selector: Selector, count: int) -> Requirement:
    return Requirement("exactly", f"{_NUMBERS[count]} {selector.phrase(count)}", subject=selector, count=count)


def sample_prompt(rng: np.random.Generator, difficulty: str) -> Prompt:
    """Draw a prompt of one difficulty: "easy", "medium" or "hard"."""
    if difficulty not in TAGS:
        raise DataError(f"difficulty {difficulty!r} is none of {', '.join(TAGS)}")
    tag = TAGS[difficulty][int(rng.random() < 0.75 if difficulty == "easy" else rng.random() < 0.5)]
    background = None
    if rng.random() < {"single_object": 0.6, "colors": 0.3, "color_attr": 0.5}.get(tag, 0.0):
        background = choice(rng, BACKGROUNDS)
    if tag == "single_object":
        size = choice(rng, SIZES) if rng.random() < 0.6 else None
        include = (Include(Selector(choice(rng, KINDS), size=size)),)
    elif tag == "colors":
        size = choice(rng, SIZES) if rng.random() < 0.4 else None
        include = (Include(Selector(choice(rng, KINDS), choice(rng, COLORS), size)),)
    elif tag == "counting":
        selector = Selector(choice(rng, KINDS), choice(rng, COLORS))
        include = (Include(selector, int(rng.integers(2, MAX_SHAPES + 1))),)
    else:
        kinds = rng.permutation(KINDS)[:2].tolist()
        colors = rng.permutation(list(COLORS))[:2].tolist()
        sizes = [choice(rng, SIZES) if tag == "color_attr" else None for _ in kinds]
        include = tuple(Include(Selector(*item)) for item in zip(kinds, colors, sizes, strict=True))
        if tag == "position":
            position = (choice(rng, RELATIONS), 0)
            include = (include[0], dataclasses.replace(include[1], position=position))
    return _captioned(rng, tag, difficulty, include, background)


def corrupt_prompt(rng: np.random.Generator, prompt: Prompt, rate: float) -> Prompt:
    """Replace each attribute that the prompt names (shape, colour, count, position, size, background) by a
    uniformly drawn value with probability `rate`; the drawn value may be the old one."""

    def redraw(value, choices):
        return choice(rng, choices) if value is not None and rng.random() < rate else value

    counts = (2, 3, 4) if prompt.tag == "counting" else (1, 2, 3) if len(prompt.include) == 1 else (1, 2)
    include = []
    for item in prompt.include:
        selector = Selector(
            redraw(item.selector.kind, KINDS),
            redraw(item.selector.color, COLORS),
            redraw(item.selector.size, SIZES),
        )
        # Two groups that fit one description would contradict the exact count of each.
        while any((selector.kind, selector.color) == (other.selector.kind, other.selector.color) for other in include):
            selector = dataclasses.replace(selector, color=choice(rng, COLORS))
        position = item.position and (redraw(item.position[0], RELATIONS), item.position[1])
        include.append(Include(selector, redraw(item.count, counts), position))
    background = redraw(prompt.background, BACKGROUNDS)
    return _captioned(rng, prompt.tag, prompt.difficulty, tuple(include), background)


def sample_scene(rng: np.random.Generator, prompt: Prompt) -> Scene:
    """Draw a scene in which every requirement of the prompt holds; what the prompt leaves open is random."""
    cells = _sample_cells(rng, prompt)
    shapes = []
    for item in prompt.include:
        for _ in range(item.count):
            color = item.selector.color or choice(rng, COLORS)
            size = item.selector.size or choice(rng, SIZES)
            x, y = cells.pop(0) + rng.uniform(-JITTER[size], JITTER[size], 2)
            shapes.append(Shape(item.selector.kind, color, size, float(x), float(y)))
    return Scene(prompt.background or choice(rng, BACKGROUNDS), tuple(shapes))


def _sample_cells(rng: np.random.Generator, prompt: Prompt) -> list[np.ndarray]:
    """Grid cells in the order of the prompt's shapes, on the two sides that a relation asks for."""
    cells = rng.permutation(np.array(list(QUARTERS.values())))
    related = next((item for item in prompt.include if item.position), None)
    if related is None:
        return list(cells)
    axis = 0 if related.position[0] in ("left of", "right of") else 1
    first = related.position[0] in ("left of", "above")
    here = [cell for cell in cells if (cell[axis] < 0.5) == first]
    there = [cell for cell in cells if (cell[axis] < 0.5) != first]
    return [
        cell
        for item in prompt.include
        for cell in [(here if item is related else there).pop() for _ in range(item.count)]
    ]


def _captioned(
    rng: np.random.Generator,
    tag: str,
    difficulty: str,
    include: tuple[Include, ...],
    background: str | None,
) -> Prompt:
    """A prompt with one of the phrasings of its tag."""
    nouns = [_noun(item) for item in include]
    if tag == "position":
        relation = include[1].position[0]
        if relation in ("left of", "right of") and rng.random() < 0.3:
            relation = f"to the {relation}"
        text = f"{nouns[1]} {relation} {nouns[0]}"
    else:
        text = " and ".join(nouns)
    opening = rng.random()
    if opening < 0.25:
        text = f"a picture of {text}"
    elif opening < 0.4 and tag != "position":
        text = f"there {'is' if include[0].count == 1 else 'are'} {text}"
    if background is not None:
        text = f"{text} on a {background} background"
    return Prompt(text, tag, difficulty, include, background)


def _noun(item: Include) -> str:
    phrase = item.selector.phrase(item.count)
    if item.count > 1:
        return f"{_NUMBERS[item.count]} {phrase}"
    return f"an {phrase}" if phrase.startswith("orange") else f"a {phrase}"


def choice(rng: np.random.Generator, options):
    """One of the options, drawn evenly."""
    options = tuple(options)
    return options[int(rng.integers(len(options)))]


def prompts(split: str, count: int, seed: int = 0) -> list[Prompt]:
    """`count` prompts with distinct texts, the three difficulties in equal shares.

    What a prompt asks for, whatever its wording, belongs to "train" (four fifths) or to "test" (one fifth) for
    every seed, so no test combination is ever met in training. Raises DataError for an unknown split, and when
    the grammar has no `count` distinct texts.
    """
    if split not in ("train", "test"):
        raise DataError(f"split {split!r} is neither 'train' nor 'test'")
    rng = np.random.default_rng([seed, split == "test"])
    found: dict[str, Prompt] = {}
    misses = dict.fromkeys(TAGS, 0)
    while len(found) < count:
        # A difficulty that gives nothing new for long has run dry, and the others take its share.
        flowing = [difficulty for difficulty in TAGS if misses[difficulty] < 500]
        if not flowing:
            raise DataError(f"split {split!r} has only {len(found)} distinct prompts, not {count}: ask for fewer")
        difficulty = flowing[len(found) % len(flowing)]
        prompt = sample_prompt(rng, difficulty)
        if _in_test(prompt) == (split == "test") and prompt.text not in found:
            found[prompt.text] = prompt
            misses[difficulty] = 0
        else:
            misses[difficulty] += 1
    return list(found.values())


def _in_test(prompt: Prompt) -> bool:
    """Whether the combination of attributes is held out; order and wording of the caption do not matter."""
    records = [[item.selector.kind, item.selector.color, item.selector.size, item.count] for item in prompt.include]
    relation = next((item.position[0] for item in prompt.include if item.position), None)
    if relation in ("left of", "above"):
        records = records[::-1]
        relation = {"left of": "right of", "above": "below"}[relation]
    elif relation is None:
        records.sort(key=str)
    return zlib.crc32(json.dumps([records, relation, prompt.background]).encode()) % 5 == 0
