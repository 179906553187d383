"""The recipes by name: which stages are run over a record, and which of their answers a critic learns from."""

from dataclasses import dataclass

from firm_jax.critic.rubric import Rubric
from firm_jax.curation import difference_first, plan_then_score, single_pass
from firm_jax.curation.stage import Example, Outcome, Stage, example
from firm_jax.errors import ConfigError

SINGLE_PASS = "single_pass"
RECIPES = {"gen": ("plan_then_score", SINGLE_PASS), "edit": ("difference_first", SINGLE_PASS)}
CRITERIA = {"gen": (plan_then_score.SCORE,), "edit": difference_first.CRITERIA}


@dataclass(frozen=True)
class Recipe:
    """Stages, and those of them that judge. Each judging stage has the name of its rubric."""

    stages: tuple[Stage, ...]
    rubrics: tuple[Rubric, ...]

    @property
    def criteria(self) -> tuple[str, ...]:
        return tuple(rubric.name for rubric in self.rubrics)

    @property
    def privileged(self) -> tuple[str, ...]:
        """The stages whose answers only the teacher was shown."""
        return tuple(stage.name for stage in self.stages if stage.name not in self.criteria)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The roles that are asked, each once."""
        return tuple(dict.fromkeys(stage.teacher for stage in self.stages))

    def examples(self, outcome: Outcome) -> list[Example]:
        """What the critic is trained on, up to one example a criterion: asked by the rubric alone."""
        return [found for rubric in self.rubrics if (found := example(outcome, rubric.name, rubric))]


def recipe_of(task: str, name: str, rubrics: dict[str, Rubric]) -> Recipe:
    """The recipe of that name for the task "gen" or "edit". ConfigError for one that the task does not have, and for
    rubrics that lack one of its criteria."""
    if task not in RECIPES:
        raise ConfigError(f"task is {task!r}; it is one of {', '.join(RECIPES)}")
    if name not in RECIPES[task]:
        raise ConfigError(f"recipe is {name!r}; for the task {task} it is one of {', '.join(RECIPES[task])}")
    criteria = CRITERIA[task]
    if lacking := [one for one in criteria if one not in rubrics]:
        raise ConfigError(f"the folder of rubrics has no {', '.join(f'{one}.txt' for one in lacking)}")
    if name == SINGLE_PASS:
        stages = single_pass.stages(rubrics, criteria)
    elif task == "gen":
        stages = plan_then_score.stages(rubrics[plan_then_score.SCORE])
    else:
        stages = difference_first.stages(rubrics)
    return Recipe(stages, tuple(rubrics[one] for one in criteria))
