"""Judging in a single pass: the judge is asked by the critic's own rubric, with no plan and no description before it.

What plan-then-score and difference-first are to be compared with: the same records, rubrics, readers and books, and
what the teacher sees is what the critic will see.
"""

from firm_jax.critic.rubric import Rubric
from firm_jax.curation import difference_first, plan_then_score
from firm_jax.curation.stage import Stage

_TEMPLATE = "{rubric}"


def stages(rubrics: dict[str, Rubric], criteria: tuple[str, ...]) -> tuple[Stage, ...]:
    """A judgement by each of the criteria. rubrics: those by which the critic will be asked."""
    return tuple(_judge(rubrics[name]) for name in criteria)


def _judge(rubric: Rubric) -> Stage:
    of = plan_then_score if rubric.name == plan_then_score.SCORE else difference_first
    return Stage(
        rubric.name,
        "judge",
        _TEMPLATE,
        lambda record, answers: {"rubric": rubric.fill(record.prompt, record.requirement)},
        of.read_score,
        of.SCORE_FORM,
    )
