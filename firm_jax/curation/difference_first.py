"""Judging an edit: what differs between the two images is described before anything is judged (FIRM, section 3.1).

An observer that does not know the instruction notes the obvious differences, then the detailed ones; with these notes
execution and consistency are judged. The critic learns to give those answers without the notes. As the notes depend on
the images alone, another instruction for the same pair costs no new ones.
"""

import json
import re

from firm_jax.critic.parse import parse_edit
from firm_jax.critic.rubric import Rubric
from firm_jax.curation.stage import (
    Record,
    Stage,
    Unreadable,
    Verdict,
    check_unprivileged,
    template,
)

OBVIOUS, DETAILED = "obvious_differences", "detailed_differences"
CRITERIA = ("edit_execution", "edit_consistency")
NOTES_CHARACTERS = 8000
REASON_CHARACTERS = 20  # fewer are no reason

_NOTES_FORM = "Plain text: lines that each say how one thing looks in the first image and in the second."
SCORE_FORM = 'One JSON object and nothing else: {"reasoning": "<two or three sentences>", "score": [n]}, n from 1 to 5'


def stages(rubrics: dict[str, Rubric]) -> tuple[Stage, ...]:
    """The notes, and a judgement by each of CRITERIA. rubrics: those by which the critic will be asked."""
    describe = [
        Stage(name, "describer", template(name), lambda record, answers: {}, read_notes, _NOTES_FORM)
        for name in (OBVIOUS, DETAILED)
    ]
    return (*describe, *(_judge(rubrics[name]) for name in CRITERIA))


def _judge(rubric: Rubric) -> Stage:
    def fields(record: Record, answers) -> dict[str, str]:
        notes = {"obvious": answers[OBVIOUS], "detailed": answers[DETAILED]}
        return notes | {"rubric": rubric.fill(record.prompt, record.requirement)}

    text = template("score_with_differences")
    return Stage(rubric.name, "judge", text, fields, read_score, SCORE_FORM, needs=(OBVIOUS, DETAILED))


def read_notes(text: str, record: Record) -> str:
    """The notes as they are. Raises Unreadable for what is too long to be notes."""
    notes = text.strip()
    if len(notes) > NOTES_CHARACTERS:
        raise Unreadable(f"it has {len(notes)} characters, more than {NOTES_CHARACTERS}")
    return notes


def read_score(text: str, record: Record) -> Verdict:
    """The judgement, written anew as the rubric asks for it: one JSON object, reasons first. Raises Unreadable."""
    parsed = parse_edit(text)
    if parsed.scores is None:
        raise Unreadable(f"its score cannot be read ({parsed.status})")
    reason, [score] = re.sub(r"\s+", " ", parsed.reason).strip(), parsed.scores
    if len(reason) < REASON_CHARACTERS:
        raise Unreadable("the field reasoning is missing or says nothing")
    check_unprivileged(reason, record)
    answer = json.dumps({"reasoning": reason, "score": [score]}, ensure_ascii=False)
    return Verdict(score, reason, answer)
