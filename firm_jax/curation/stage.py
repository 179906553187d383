"""Records, and what is asked of them: a stage is a prompt, what it is filled with, and how its answer is read."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firm_jax.critic.rubric import FIELD, Rubric

FOLDER = Path(__file__).parent / "prompts"


class Unreadable(Exception):
    """An answer that is not in the form that was asked for. The message says what is wrong with it."""


@dataclass(frozen=True)
class Record:
    """An instruction and pictures: one made from it, or a source and the picture it was edited to.

    id: unlike all others'. images: paths below the data's folder. made_from: where the instruction was exchanged for
    one that the pictures do not follow, the one that they were made from; "" otherwise. requirement: what the critic is
    asked to check beside the instruction; "" where there is none.
    """

    id: str
    prompt: str
    images: tuple[str, ...]
    made_from: str = ""
    requirement: str = ""

    @property
    def asked(self) -> str:
        """The instruction and, on lines of its own, the requirement, as the package's rubrics show them."""
        return f"{self.prompt}\n{self.requirement}" if self.requirement else self.prompt


@dataclass(frozen=True)
class Stage:
    """One question to a teacher about a record. All of it but its teacher and reader names the calls in the ledger.

    teacher: who is asked, by role ("planner", "describer", "judge"). template: the prompt, whose fields `fields(record,
    answers)` fills; answers: those of the stages in `needs`, as read. shows: whether the record's pictures are shown.
    read(text, record): what the answer says; raises Unreadable. form: what the answer should look like, told when it
    is asked to be written again. version: to be raised when the question changes in what the template does not show.
    """

    name: str
    teacher: str
    template: str
    fields: Callable[[Record, Mapping[str, Any]], dict[str, str]]
    read: Callable[[str, Record], Any]
    form: str
    needs: tuple[str, ...] = ()
    shows: bool = True
    max_tokens: int = 2048
    version: int = 1


@dataclass(frozen=True)
class Missing:
    """Why a stage has no answer. status: a short name to count by; reason: what happened."""

    status: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """A record, with what its stages have answered, as read, and why others have not; each stage is in one of them."""

    record: Record
    answers: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, Missing] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """A teacher's judgement: a whole number in 1..5, the reason, and both in the form in which a critic writes them."""

    score: int
    reason: str
    text: str


@dataclass(frozen=True)
class Example:
    """What a critic is trained on: asked without what the teacher was shown besides, answering as the teacher did.

    question: the critic's rubric, filled in with prompt and requirement. answer: in the rubric's form, as
    `critic.parse` reads it. score, reason: in it. mismatched: whether the instruction is another than the pictures were
    made from.
    """

    id: str
    criterion: str
    prompt: str
    images: tuple[str, ...]
    question: str
    answer: str
    reason: str
    score: int
    mismatched: bool = False
    requirement: str = ""

    def to_json(self) -> dict:
        """The record that `data.conversations` reads."""
        return {
            "messages": [
                {"role": "user", "content": "<image>" * len(self.images) + self.question},
                {"role": "assistant", "content": self.answer},
            ],
            "images": list(self.images),
        }


def example(outcome: Outcome, stage: str, rubric: Rubric) -> Example | None:
    """What a critic learns from a stage that judged by a rubric; None where the stage has no answer."""
    verdict, record = outcome.answers.get(stage), outcome.record
    if verdict is None:
        return None
    return Example(
        f"{record.id}/{rubric.name}",
        rubric.name,
        record.prompt,
        record.images,
        rubric.fill(record.prompt, record.requirement),
        verdict.text,
        verdict.reason,
        verdict.score,
        bool(record.made_from),
        record.requirement,
    )


def template(name: str) -> str:
    """The package's prompt of that name."""
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


def fill(text: str, fields: Mapping[str, str]) -> str:
    """A template with its fields filled in one pass: what they are filled with is not filled again.

    Raises ValueError where the fields are not exactly the template's.
    """
    if open_ := set(FIELD.findall(text)) ^ fields.keys():
        raise ValueError(f"the template's fields and those given differ: {', '.join(sorted(open_))}")
    return FIELD.sub(lambda found: fields[found[1]], text)


# What the teacher alone was shown goes by these names in its prompts. A critic that never sees it must not speak of it.
_PRIVILEGED = re.compile(
    r"\b(?:(?:analysis|evaluation) plan|(?:the|this|given) plan|difference (?:notes|description))\b", re.I
)


def check_unprivileged(text: str, record: Record) -> None:
    """Raises Unreadable for an answer that speaks of what only the teacher was shown, unless the instruction does."""
    for found in _PRIVILEGED.finditer(text):
        if found[0].lower() not in record.asked.lower():
            raise Unreadable(f"it mentions {found[0]!r}; it must speak of the instruction and the pictures only")
