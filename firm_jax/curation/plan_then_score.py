"""Judging how an image follows its instruction: a plan of what to check comes first (FIRM, section 3.2).

A language model that sees only the instruction writes a checklist; a vision-language model then judges the image by it.
The critic learns to give that answer without the checklist.
"""

import re

from firm_jax.critic.parse import parse_alignment
from firm_jax.critic.rubric import Rubric
from firm_jax.curation.stage import (
    Record,
    Stage,
    Unreadable,
    Verdict,
    check_unprivileged,
    template,
)

PLAN, SCORE = "plan", "alignment"
PLAN_CHARACTERS = 8000
_ITEM = re.compile(r"^\s{0,3}(?:#{1,4} |\*\*)?\d{1,2}[.)]", re.M)
_QUESTION = re.compile(r"\?[*_ ]*$", re.M)
_BOXED = re.compile(r"\\boxed\{([1-5])\}")
_RATING = re.compile(r"\*\*Final Alignment Rating: ([1-5])\*\*")

_PLAN_FORM = "A numbered list in Markdown. Each item names a requirement, with one or two yes-or-no questions below it."
SCORE_FORM = r"""Checking the image against the instruction:
1. **<requirement>**
- <what the image shows, and the verdict>
(and so on for each requirement)
**Final Analysis**: <one or two sentences>
**Final Alignment Rating: n**
\boxed{n}
where n is one whole number from 1 to 5, the same in both places"""


def stages(rubric: Rubric) -> tuple[Stage, ...]:
    """The plan and the judgement by it. rubric: the one for alignment by which the critic will be asked."""
    return (
        Stage(
            PLAN,
            "planner",
            template("plan"),
            lambda record, answers: {"prompt": record.asked},
            read_plan,
            _PLAN_FORM,
            shows=False,
        ),
        Stage(
            SCORE,
            "judge",
            template("score_with_plan"),
            lambda record, answers: {"plan": answers[PLAN], "rubric": rubric.fill(record.prompt, record.requirement)},
            read_score,
            SCORE_FORM,
            needs=(PLAN,),
        ),
    )


def read_plan(text: str, record: Record) -> str:
    """The plan as it is, without the fence that may be around it. Raises Unreadable."""
    plan = re.sub(r"\A\s*```\w*\n|\n```\s*\Z", "", text).strip()
    if len(plan) > PLAN_CHARACTERS:
        raise Unreadable(f"it has {len(plan)} characters, more than {PLAN_CHARACTERS}")
    if not _ITEM.search(plan) or not _QUESTION.search(plan):
        raise Unreadable("it is no numbered list with questions")
    return plan


def read_score(text: str, record: Record) -> Verdict:
    """The judgement. Both places of the score must be there and agree. Raises Unreadable."""
    text = re.sub(r"\A\s*```\w*\n|\n```\s*\Z", "", text).strip()
    parsed = parse_alignment(text)
    if parsed.scores is None:
        raise Unreadable(f"its score cannot be read ({parsed.status})")
    ratings, boxed = _RATING.findall(text), _BOXED.findall(text)
    [score] = parsed.scores
    if not ratings or not boxed or {*ratings, *boxed} != {str(score)}:
        raise Unreadable("the lines 'Final Alignment Rating' and \\boxed are not both there once with the same score")
    if not text.endswith(f"\\boxed{{{score}}}"):
        raise Unreadable("something follows the boxed score")
    if not parsed.reason or not _ITEM.search(text):
        raise Unreadable("the numbered requirements or the final analysis are missing")
    check_unprivileged(text, record)
    return Verdict(score, parsed.reason, text)
