"""A small world for curation: records with pictures, and a wise teacher that answers each stage by what it is shown."""

import json
import re

import numpy as np
from PIL import Image
from scripted_teacher import QUICK, SETTINGS, ScriptedTeacher

from firm_jax.critic.rubric import rubrics_from
from firm_jax.curation.engine import Engine
from firm_jax.curation.stage import Record
from firm_jax.curation.teacher import Teacher

RUBRICS = rubrics_from()
ROLES = ("planner", "describer", "judge")


def picture(folder, name: str, value: int) -> str:
    """The name of a file with a picture that is like no other value's."""
    pixels = np.random.default_rng(value).integers(0, 256, (8, 8, 3), np.uint8)
    pixels[0, 0] = value % 256
    Image.fromarray(pixels).save(folder / name)
    return name


def records(folder, count: int, images: int = 1) -> list[Record]:
    """Each with its own instruction and pictures."""
    return [
        Record(
            f"r{number}",
            f"a cat number {number}",
            tuple(picture(folder, f"{number}-{place}.png", 10 * number + place) for place in range(images)),
        )
        for number in range(count)
    ]


def score_of(text: str, pictures) -> int:
    """1 to 5, of the instruction that stands last and the pictures."""
    instruction = re.findall(r"INSTRUCTION\n(.*?)\n", text)[-1]
    return (len(instruction) * 7 + sum(map(ord, instruction)) + sum(int(one[0, 0, 0]) for one in pictures)) % 5 + 1


def wise(number: int, text: str, pictures) -> str:
    """What a good teacher answers in every stage."""
    if text.startswith("An image will be generated"):
        return "1. **a cat**\n- Is there a cat?"
    if "Write another instruction" in text or "Write another edit instruction" in text:
        return json.dumps({"instruction": "a green dog"})
    if text.startswith("You are shown two images"):
        detail = "1. " if "Write a numbered list" in text else ""
        return f"{detail}The corner: {pictures[0][0, 0].tolist()} first, {pictures[1][0, 0].tolist()} second."
    score = score_of(text, pictures)
    if "ANALYSIS PLAN" in text:
        return (
            "Checking the image against the instruction:\n1. **a cat**\n- It is there, so this is met.\n"
            f"**Final Analysis**: The picture is worth a {score}.\n**Final Alignment Rating: {score}**\n"
            f"\\boxed{{{score}}}"
        )
    assert "DIFFERENCE NOTES" in text
    return json.dumps({"reasoning": f"The corner has another colour, which is worth {score}.", "score": [score]})


def engine(stages, ledger, root, play=wise, *, policy=QUICK, after=0.0, **options):
    """The engine and the script that all its teachers share."""
    script = ScriptedTeacher(play, after)
    teachers = {role: Teacher(SETTINGS, policy, transport=script) for role in ROLES}
    return Engine(stages, teachers, ledger, root, **options), script


async def collect(engine, records) -> list:
    try:
        return [outcome async for outcome in engine.run(records)]
    finally:
        for teacher in engine.teachers.values():
            await teacher.close()
