"""Another instruction for the same pictures, as a planner writes it that sees the instruction alone."""

import json
import zlib
from collections.abc import Iterable

import numpy as np

from firm_jax.shapes.edits import Change, Edit
from firm_jax.shapes.scene import BACKGROUNDS, COLORS, KINDS, Prompt, Selector, choice, corrupt_prompt

_CHANGED = 0.8  # of each attribute that a prompt names


def other_instruction(asked: Prompt | Edit) -> Prompt | Edit:
    """The same one for the same instruction, and never that instruction.

    Of an edit the subjects stay, so that the source shows what is spoken of: what is asked of them is another thing.
    """
    rng = np.random.default_rng(zlib.crc32(asked.text.encode()))
    if isinstance(asked, Edit):
        changes = tuple(_other_change(rng, change) for change in asked.changes)
        return Edit(" and ".join(change.phrase(rng) for change in changes), changes)
    while True:
        other = corrupt_prompt(rng, asked, _CHANGED)
        # One of a thing stays one: "two red circles" is a prompt about counting, and asks for other things.
        counted = [one.count > 1 for one in other.include] == [one.count > 1 for one in asked.include]
        if counted and other.requirements != asked.requirements:
            return other


def by_text(asked: Iterable[Prompt | Edit]) -> dict[str, Prompt | Edit]:
    """What instructions mean, by their texts, with the other one of each."""
    asked = list(asked)
    others = [other_instruction(one) for one in asked]
    return {one.text: one for one in (*others, *asked)}


def to_answer(asked: Prompt | Edit) -> str:
    """In the form in which a planner is to answer."""
    return json.dumps({"instruction": asked.text})


def _other_change(rng: np.random.Generator, change: Change) -> Change:
    def but(values, *taken):
        return choice(rng, [value for value in values if value not in taken])

    subject, value = change.subject, change.value
    match change.operation:
        case "recolor" | "remove":
            return Change("recolor", subject, Selector(color=but(COLORS, subject.color, value.color)))
        case "replace":
            kind, color = but(KINDS, subject.kind, value.kind), but(COLORS, subject.color, value.color)
            return Change("replace", subject, Selector(kind, color))
        case "move":
            return Change("remove", subject)
        case "add":
            other = Selector(but(KINDS, value.kind), but(COLORS, value.color), value.size)
            return Change("add", value=other, place=change.place)
    return Change("background", background=but(BACKGROUNDS, change.background))
