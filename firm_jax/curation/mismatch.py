"""Low scores on purpose: images that are judged by an instruction which they were not made from.

Good generators and editors leave a critic almost no 1s and 2s to learn from. The teacher judges these records like any
other: that the score is low is expected, not assumed.
"""

import dataclasses
import json
import random
from collections.abc import Sequence

from firm_jax.curation.stage import Outcome, Record, Stage, Unreadable, template

REWRITE = "other_instruction"
REWRITE_CHARACTERS = 2000


def exchange_instructions(records: Sequence[Record], share: float, seed: int) -> list[Record]:
    """Copies of a share of the records, each with the instruction of another that is worded differently.

    Drawn by the seed; in the records' order. A record for which there is no other instruction is left out. An
    instruction takes its requirement along.
    """
    draw = random.Random(seed)
    chosen = sorted(draw.sample(range(len(records)), round(share * len(records))))
    prompts = sorted({record.prompt for record in records})
    places = {prompt: place for place, prompt in enumerate(prompts)}
    requirements = {record.prompt: record.requirement for record in reversed(records)}
    made = []
    for index in chosen if len(prompts) > 1 else ():
        record = records[index]
        place = draw.randrange(len(prompts) - 1)
        other = prompts[place + (place >= places[record.prompt])]  # any but its own
        made.append(_mismatched(record, other, requirements[other], "exchanged"))
    return made


def rewrite_stage(edits: bool) -> Stage:
    """Asks for an instruction that the record's pictures will mostly fail to follow."""
    return Stage(
        REWRITE,
        "planner",
        template("other_edit" if edits else "other_prompt"),
        lambda record, answers: {"prompt": record.prompt},
        _read,
        'One JSON object and nothing else: {"instruction": "<the new instruction>"}',
        shows=False,
    )


def rewritten(outcome: Outcome) -> Record | None:
    """The record with the instruction that REWRITE gave; None where it gave none.

    Its requirement stays: were it left out, a critic could tell a low score by its absence.
    """
    if REWRITE not in outcome.answers:
        return None
    return _mismatched(outcome.record, outcome.answers[REWRITE], outcome.record.requirement, "rewritten")


def _mismatched(record: Record, prompt: str, requirement: str, how: str) -> Record:
    return dataclasses.replace(
        record, id=f"{record.id}/{how}", prompt=prompt, made_from=record.prompt, requirement=requirement
    )


def _read(text: str, record: Record) -> str:
    start, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(text[start : end + 1]) if start >= 0 else None
    except (ValueError, RecursionError) as error:
        raise Unreadable("it is not JSON") from error
    instruction = found.get("instruction") if isinstance(found, dict) else None
    if not isinstance(instruction, str) or not instruction.strip():
        raise Unreadable("it has no field instruction with a text")
    instruction = " ".join(instruction.split())
    if len(instruction) > REWRITE_CHARACTERS:
        raise Unreadable(f"the instruction has more than {REWRITE_CHARACTERS} characters")
    if instruction.casefold() == " ".join(record.prompt.split()).casefold():
        raise Unreadable("the instruction is the original one")
    return instruction
