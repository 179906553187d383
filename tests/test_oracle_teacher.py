"""The miniature's teacher: right with good eyes, and wrong as often, and in the way, that is said of tired ones."""

import asyncio
import json
import re

import numpy as np
import pytest

from firm_jax.critic.parse import parse_alignment, parse_edit
from firm_jax.critic.questions import Picture
from firm_jax.critic.rubric import rubrics_from
from firm_jax.curation import difference_first, mismatch, plan_then_score, single_pass
from firm_jax.curation.ledger import Budget, Ledger
from firm_jax.curation.oracle_teacher import Eye, OracleTeacher
from firm_jax.curation.stage import Record, fill
from firm_jax.curation.teacher import REFUSED, TeacherSettings
from firm_jax.data.patches import image_digest
from firm_jax.embedded import embedded_path
from firm_jax.errors import BudgetError, ConfigError
from firm_jax.shapes import differences, edit_teach, oracle, teach
from firm_jax.shapes.edit_oracle import compare, compare_readings
from firm_jax.shapes.edits import sample_target
from firm_jax.shapes.other_instructions import other_instruction
from firm_jax.shapes.render import render
from firm_jax.shapes.scene import TAGS, choice, corrupt_prompt, sample_prompt, sample_scene

SETTINGS = TeacherSettings("oracle", ("http://oracle",), price_in=1.0, price_out=2.0, image_tokens=10)
PACKAGE = rubrics_from()
MINIATURE = {
    **rubrics_from(embedded_path("embedded:critic_gen/rubrics")),
    **rubrics_from(embedded_path("embedded:critic_edit/rubrics")),
}


def shown(pixels) -> Picture:
    rounded = np.round(pixels * 255).astype(np.uint8)
    return Picture(rounded, image_digest(rounded))


def floats(picture: Picture) -> np.ndarray:
    return picture.pixels.astype(np.float32) / 255


@pytest.fixture(scope="module")
def pictures():
    """(prompt, picture), some of another instruction than the picture was made from."""
    made = []
    for number in range(24):
        rng = np.random.default_rng([1, number])
        prompt = sample_prompt(rng, choice(rng, TAGS))
        picture = shown(teach.aged(rng, render(sample_scene(rng, corrupt_prompt(rng, prompt, 0.35)))))
        made.append((other_instruction(prompt) if number % 4 == 0 else prompt, picture))
    return made


@pytest.fixture(scope="module")
def pairs():
    """(edit, source, edited picture)."""
    made = []
    for number in range(24):
        rng = np.random.default_rng([2, number])
        source, edit = edit_teach.sample_task(rng)
        target = sample_target(rng, source, edit, untouched=0.1, wrong=0.3, careless=0.4)
        asked = other_instruction(edit) if number % 4 == 0 else edit
        made.append((asked, shown(render(source)), shown(teach.aged(rng, render(target)))))
    return made


def answers(teacher: OracleTeacher, stages, prompt: str, images) -> dict:
    """What the stages' readers make of the teacher's answers."""
    record, found = Record("r", prompt, ("x",) * len(images)), {}
    for stage in stages:
        text = fill(stage.template, stage.fields(record, {name: found[name] for name in stage.needs}))
        found[stage.name] = stage.read(teacher.answer(stage.name, text, images if stage.shows else []), record)
    return found


def alignment(teacher, prompt, picture, recipe, rubrics=PACKAGE) -> int:
    stages = {
        "plan": plan_then_score.stages(rubrics["alignment"]),
        "single": single_pass.stages(rubrics, ("alignment",)),
    }
    return answers(teacher, stages[recipe], prompt.text, [picture])["alignment"].score


def of_edit(teacher, edit, images, recipe, rubrics=PACKAGE) -> dict[str, int]:
    stages = {
        "differences": difference_first.stages(rubrics),
        "single": single_pass.stages(rubrics, difference_first.CRITERIA),
    }
    found = answers(teacher, stages[recipe], edit.text, images)
    return {name: found[name].score for name in difference_first.CRITERIA}


@pytest.mark.parametrize("rubrics", [PACKAGE, MINIATURE], ids=["package", "miniature"])
@pytest.mark.parametrize("recipe", ["plan", "single"])
def test_good_eyes_give_the_oracle_s_alignment(pictures, recipe, rubrics):
    teacher = OracleTeacher(SETTINGS, [prompt for prompt, _ in pictures], Eye(0, 0))
    for prompt, picture in pictures:
        right = oracle.alignment_score(floats(picture), prompt)
        assert alignment(teacher, prompt, picture, recipe, rubrics) == right


@pytest.mark.parametrize("rubrics", [PACKAGE, MINIATURE], ids=["package", "miniature"])
@pytest.mark.parametrize("recipe", ["differences", "single"])
def test_good_eyes_give_the_oracle_s_scores_of_an_edit(pairs, recipe, rubrics):
    teacher = OracleTeacher(SETTINGS, [edit for edit, *_ in pairs], Eye(0, 0))
    for edit, source, edited in pairs:
        comparison = compare(floats(source), floats(edited), edit)
        right = {name: edit_teach.score_of(name, comparison) for name in edit_teach.CRITERIA}
        assert of_edit(teacher, edit, [source, edited], recipe, rubrics) == right


def test_what_it_writes_is_what_the_critic_reads(pictures, pairs):
    teacher = OracleTeacher(SETTINGS, [pictures[1][0], pairs[1][0]], Eye(0.5, 0.5))
    text = teacher.answer("alignment", PACKAGE["alignment"].fill(pictures[1][0].text), [pictures[1][1]])
    assert parse_alignment(text).status == "ok" and "\n1. " in text
    assert parse_alignment(text).reason.endswith(" hold")
    text = teacher.answer("edit_execution", PACKAGE["edit_execution"].fill(pairs[1][0].text), list(pairs[1][1:]))
    assert parse_edit(text).status == "ok"


def errors(found) -> float:
    return float(np.mean(np.abs(np.diff(np.array(found, float)))))


def test_several_steps_err_less_with_the_same_eyes(pictures, pairs):
    asked, known = [one[0] for one in (*pictures, *pairs)], {}
    found = {}
    for seed in range(6):
        teacher = OracleTeacher(SETTINGS, asked, Eye(0.1, 0.4, seed))
        teacher._readings = known  # read once
        for prompt, picture in pictures:
            right = oracle.share_to_score(float(np.mean(oracle.check_reading(teacher._read(picture), prompt))))
            for recipe in ("plan", "single"):
                rows = found.setdefault(("alignment", recipe), [])
                rows.append((alignment(teacher, prompt, picture, recipe), right))
        for edit, *images in pairs[seed::6]:
            comparison = compare_readings(*map(teacher._read, images), edit)
            for recipe in ("differences", "single"):
                for name, score in of_edit(teacher, edit, images, recipe).items():
                    found.setdefault((name, recipe), []).append((score, edit_teach.score_of(name, comparison)))
    mae = {key: errors(rows) for key, rows in found.items()}
    assert 0.1 < mae["alignment", "plan"] < 0.8 * mae["alignment", "single"]
    for name in edit_teach.CRITERIA:
        assert 2 * mae[name, "differences"] < mae[name, "single"]


def test_a_difference_is_overlooked_as_often_as_is_said(pairs):
    rate, looks = 0.3, {"seen": 0, "there": 0, "both missed": 0}
    good = OracleTeacher(SETTINGS, [], Eye(0, 0))
    for seed in range(40):
        tired = OracleTeacher(SETTINGS, [], Eye(rate, 0, seed))
        tired._readings = good._readings  # read once
        for _, *images in pairs[:20]:
            notes = [
                {
                    stage: differences.places_in(one.answer(stage, f"{stage}?", images))
                    for stage in (difference_first.OBVIOUS, difference_first.DETAILED)
                }
                for one in (good, tired)
            ]
            plain = notes[0][difference_first.OBVIOUS]
            looks["there"] += len(plain)
            looks["seen"] += len(plain & notes[1][difference_first.OBVIOUS])
            looks["both missed"] += len(
                plain - notes[1][difference_first.OBVIOUS] - notes[1][difference_first.DETAILED]
            )
            assert all(one <= two for one, two in zip(notes[1].values(), notes[0].values(), strict=True))
    assert looks["there"] > 400
    error = 3 / np.sqrt(looks["there"])
    assert abs(looks["seen"] / looks["there"] - (1 - rate)) < error
    assert abs(looks["both missed"] / looks["there"] - rate**2) < error


def test_requirements_are_passed_over_as_often_as_is_said(pictures):
    asked = [prompt for prompt, _ in pictures]
    good = OracleTeacher(SETTINGS, asked, Eye(0, 0))
    named = possible = 0
    for seed in range(10):
        hasty = OracleTeacher(SETTINGS, asked, Eye(0, 0.4, seed))
        hasty._readings = good._readings
        for prompt, picture in pictures:
            text = hasty.answer("alignment", PACKAGE["alignment"].fill(prompt.text), [picture])
            named += len(re.findall(r"^\d+\. ", text, re.M)) - 1  # without the first, which is never passed over
            possible += len(prompt.requirements) - 1
    assert abs(named / possible - 0.6) < 3 * 0.5 / np.sqrt(possible)


def test_the_same_question_has_the_same_answer_and_another_seed_another(pictures):
    teachers = [OracleTeacher(SETTINGS, [one[0] for one in pictures], Eye(0.3, 0.3, seed)) for seed in (0, 0, 1)]
    texts = [
        [
            teacher.answer("alignment", PACKAGE["alignment"].fill(prompt.text), [picture])
            for prompt, picture in pictures[:8]
        ]
        for teacher in teachers
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_other_instruction_is_another_and_can_be_judged(pictures, pairs):
    for edits, made in ((False, pictures), (True, pairs)):
        stage = mismatch.rewrite_stage(edits)
        teacher = OracleTeacher(SETTINGS, [one[0] for one in made], Eye(0.1, 0.1))
        for asked, *images in made:
            other = answers(teacher, [stage], asked.text, [])[mismatch.REWRITE]
            assert other != asked.text
            if edits:
                assert of_edit(teacher, other_instruction(asked), images, "single").keys() == set(edit_teach.CRITERIA)


def ask(teacher, ledger, key, stage, text, images):
    return asyncio.run(teacher.ask(ledger, key, stage, text, images, 100))


def test_it_is_asked_on_the_books(tmp_path, pictures):
    prompt, picture = pictures[1]
    teacher = OracleTeacher(SETTINGS, [prompt], Eye(0, 0))
    ledger = Ledger(tmp_path / "calls.sqlite", Budget(money=0.01))
    text = PACKAGE["alignment"].fill(prompt.text)
    said = ask(teacher, ledger, "1", "alignment", text, [picture])
    assert said.outcome == "ok" and ledger.answered("1") == said
    totals = ledger.totals()
    assert (totals.done, totals.lost) == (1, 0)
    assert totals.price == 1000 * (totals.tokens_in + 2 * totals.tokens_out) and totals.tokens_in > 10
    for unknown in (text.replace(prompt.text, "a horse"), "Hello"):
        refused = ask(teacher, ledger, unknown, "alignment", unknown, [picture])
        assert refused.outcome == REFUSED and "does not know the instruction" in refused.reason
    with pytest.raises(BudgetError):
        for number in range(40):
            ask(teacher, ledger, f"more {number}", "alignment", text, [picture])
    ledger.close()


def test_an_edit_of_what_the_source_does_not_show_is_refused(tmp_path, pairs):
    (first, *_), (_, *images) = next(
        (one, two) for one in pairs for two in pairs if one[0].tag == "remove" and _lacks(two[1], one[0])
    )
    teacher = OracleTeacher(SETTINGS, [first], Eye(0, 0))
    ledger = Ledger(tmp_path / "calls.sqlite")
    said = ask(teacher, ledger, "1", "edit_execution", PACKAGE["edit_execution"].fill(first.text), images)
    assert said.outcome == REFUSED and "exactly one" in said.reason and ledger.totals().done == 1
    ledger.close()


def _lacks(picture: Picture, edit) -> bool:
    return len(edit.changes[0].subject.select(oracle.read(floats(picture)).shapes)) != 1


@pytest.mark.parametrize("miss", [-0.1, 1.5, float("nan")])
def test_an_eye_has_probabilities(miss):
    with pytest.raises(ConfigError, match=r"shapes\.miss"):
        Eye(miss, 0)


def test_the_plan_names_every_requirement(pictures):
    for prompt, _ in pictures[:10]:
        teacher = OracleTeacher(SETTINGS, [prompt], Eye(1, 1))
        plan = answers(teacher, plan_then_score.stages(PACKAGE["alignment"])[:1], prompt.text, [])["plan"]
        assert plan.count("**") == 2 * len(prompt.requirements) and all(one.text in plan for one in prompt.requirements)
        assert json.dumps(plan)


def test_the_judge_of_an_edit_goes_by_the_notes(pairs):
    blind = OracleTeacher(SETTINGS, [edit for edit, *_ in pairs], Eye(1, 0))
    for edit, *images in pairs:
        before = blind._read(images[0])
        untouched = compare_readings(before, before, edit)
        right = {name: edit_teach.score_of(name, untouched) for name in edit_teach.CRITERIA}
        assert of_edit(blind, edit, images, "differences") == right and right["edit_consistency"] == 5


@pytest.mark.parametrize("recipe", ["differences", "single"])
def test_a_hasty_pass_sees_no_change_that_nobody_asked_for(pairs, recipe):
    hasty = OracleTeacher(SETTINGS, [edit for edit, *_ in pairs], Eye(0, 1))
    for edit, *images in pairs[:12]:
        comparison = compare_readings(*map(hasty._read, images), edit)
        right = {name: edit_teach.score_of(name, comparison) for name in edit_teach.CRITERIA}
        if recipe == "single":
            right["edit_consistency"] = 5
        assert of_edit(hasty, edit, images, recipe) == right
