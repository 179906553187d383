"""Curation: stages over records, in order, each call once; and what a critic is trained on in the end."""

import asyncio
import collections
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import curation_job
import pytest
from curation_world import RUBRICS, collect, engine, picture, records, score_of, wise
from scripted_teacher import chat

from firm_jax.critic.parse import parse_alignment, parse_edit
from firm_jax.curation import difference_first, mismatch, plan_then_score
from firm_jax.curation import engine as engines
from firm_jax.curation.ledger import Budget, Ledger
from firm_jax.curation.recipes import recipe_of
from firm_jax.curation.stage import FOLDER, Outcome, Record, Stage, Unreadable, fill, template
from firm_jax.data.conversations import load_conversations
from firm_jax.errors import BudgetError, ConfigError, CriticError

GEN_RECIPE = recipe_of("gen", "plan_then_score", RUBRICS)
EDIT_RECIPE = recipe_of("edit", "difference_first", RUBRICS)
GEN, EDIT = GEN_RECIPE.stages, EDIT_RECIPE.stages
ROOT = Path(__file__).parent.parent


def curate(folder, stages, asked, play=wise, *, budget=None, **options):
    """(outcomes, engine, requests, totals) of one run over the folder's ledger."""
    ledger = Ledger(folder / "calls.sqlite", budget)
    try:
        running, script = engine(stages, ledger, folder, play, **options)
        return asyncio.run(collect(running, asked)), running, script.asked, ledger.totals()
    finally:
        ledger.close()


# A requirement


@pytest.mark.parametrize(
    ("task", "recipe"), [("gen", "plan_then_score"), ("edit", "difference_first"), ("edit", "single_pass")]
)
def test_a_requirement_is_asked_of_teachers_and_critic_as_in_training(tmp_path, task, recipe):
    images = tuple(picture(tmp_path, f"{place}.png", place) for place in range(1 + (task == "edit")))
    record = Record("r", "a cat", images, requirement="its ears are red")
    of = recipe_of(task, recipe, RUBRICS)
    play = (
        wise
        if recipe != "single_pass"
        else lambda number, text, pictures: wise(number, f"DIFFERENCE NOTES {text}", pictures)
    )
    [outcome], _, asked, _ = curate(tmp_path, of.stages, [record], play)
    texts = [request["messages"][0]["content"][-1]["text"] for request in asked]
    for example, rubric in zip(of.examples(outcome), of.rubrics, strict=True):
        assert example.question == rubric.fill("a cat", "its ears are red")  # as Critic.judge asks
        assert sum(text.endswith(example.question) for text in texts) == 1
        assert "its ears are red" in example.question and example.requirement == "its ears are red"
    if task == "gen":
        assert "INSTRUCTION\na cat\nits ears are red\nEND" in texts[0]
    else:  # who describes the differences knows of no instruction
        assert sum("its ears are red" in text for text in texts) == 2


def test_a_requirement_goes_with_its_instruction_and_stays_beside_a_rewritten_one(tmp_path):
    asked = [Record(str(n), f"a cat {n}", (), requirement=f"of {n}" if n < 3 else "") for n in range(6)]
    for one in mismatch.exchange_instructions(asked, 1.0, 0):
        assert one.prompt != one.made_from and one.requirement == asked[int(one.prompt[-1])].requirement
    outcome = Outcome(asked[1], {mismatch.REWRITE: "a green dog"})
    assert (one := mismatch.rewritten(outcome)).requirement == "of 1" and one.prompt == "a green dog"


# Stages and templates


def test_a_template_is_filled_once_and_with_all_its_fields():
    assert fill('{"a": {b}} \\boxed{n} {c}', {"b": "{c}", "c": "1"}) == '{"a": {c}} \\boxed{n} 1'
    for fields in ({"b": "1"}, {"b": "1", "c": "2", "d": "3"}):
        with pytest.raises(ValueError, match=r"differ: [cd]"):
            fill("{b} {c}", fields)


def test_every_prompt_of_the_package_is_used():
    stages = [*GEN, *EDIT, mismatch.rewrite_stage(True), mismatch.rewrite_stage(False)]
    used = {stage.template for stage in stages} | {template("repair")}
    assert used == {template(file.stem) for file in FOLDER.glob("*.txt")}


def test_stages_without_a_teacher_or_out_of_order_are_refused(tmp_path):
    ledger = Ledger(tmp_path / "calls.sqlite")
    with pytest.raises(ConfigError, match="before one of"):
        engine(GEN[::-1], ledger, tmp_path)
    with pytest.raises(ConfigError, match="twice"):
        engine([GEN[0], GEN[0]], ledger, tmp_path)
    with pytest.raises(ConfigError, match="asks a poet"):
        engine([Stage("s", "poet", "t", dict, str, "")], ledger, tmp_path)


# The engine


def test_plan_then_score(tmp_path):
    asked = records(tmp_path, 5)
    outcomes, running, sent, totals = curate(tmp_path, GEN, asked)
    assert [outcome.record for outcome in outcomes] == asked and totals.done == len(sent) == 10
    assert running.answered == {"plan": 5, "alignment": 5} and not running.missing
    plans = [one for one in sent if len(one["messages"][0]["content"]) == 1]
    assert len(plans) == 5  # without the picture
    for body in sent:
        *shown, text = body["messages"][0]["content"]
        assert bool(shown) == ("1. **a cat**\n- Is there a cat?" in text["text"])
    assert curate(tmp_path, GEN, asked)[2] == []  # all is known


def test_difference_first(tmp_path):
    outcomes, _, sent, _ = curate(tmp_path, EDIT, records(tmp_path, 3, images=2))
    assert [set(outcome.answers) for outcome in outcomes] == [{stage.name for stage in EDIT}] * 3
    for body in sent:
        *shown, text = body["messages"][0]["content"]
        assert len(shown) == 2
        notes, judged = text["text"].startswith("You are shown two images"), "EDIT INSTRUCTION" in text["text"]
        assert notes != judged and notes != ("a cat" in text["text"])  # who describes does not know the instruction
        assert not judged or ("The corner:" in text["text"] and "1. The corner:" in text["text"])


@pytest.mark.parametrize("slow", [0, 2])
def test_outcomes_come_in_order_whoever_answers_first(tmp_path, slow):
    asked = records(tmp_path, 20)
    outcomes, _, sent, _ = curate(tmp_path, GEN, asked, concurrency=2, after=0.001 * slow)
    assert [outcome.record.id for outcome in outcomes] == [record.id for record in asked] and len(sent) == 40


@pytest.mark.fault("teacher-killed")
def test_the_same_question_is_asked_once(tmp_path):
    one = records(tmp_path, 1)[0]
    asked = [Record(f"copy {number}", one.prompt, one.images) for number in range(6)]
    outcomes, _, sent, totals = curate(tmp_path, GEN, asked, after=0.005)
    assert len(sent) == totals.attempts == 2 and len({outcome.answers["alignment"] for outcome in outcomes}) == 1


def test_a_changed_picture_or_rubric_is_another_question(tmp_path):
    asked = records(tmp_path, 1)
    curate(tmp_path, GEN, asked)
    picture(tmp_path, asked[0].images[0], 77)
    assert len(curate(tmp_path, GEN, asked)[2]) == 1  # the plan needs no picture
    quality = plan_then_score.stages(RUBRICS["edit_execution"])
    assert len(curate(tmp_path, quality, asked)[2]) >= 1


def broken(answer: str, repaired: str | None):
    """A teacher that judges in no form, and writes it again as told."""

    def play(number, text, pictures):
        if text.startswith("The answer below"):
            assert answer in text and "boxed" in text
            return repaired
        return answer if "ANALYSIS PLAN" in text else wise(number, text, pictures)

    return play


RIGHT = "Checking:\n1. **a cat**\n- There.\n**Final Analysis**: It is there.\n**Final Alignment Rating: 4**\n\\boxed{4}"


@pytest.mark.fault("teacher-unreadable")
def test_an_answer_in_another_form_is_written_again_once(tmp_path):
    asked = records(tmp_path, 1)
    [outcome], _, sent, _ = curate(tmp_path, GEN, asked, broken("I give it a four.", RIGHT))
    assert outcome.answers["alignment"].score == 4 and len(sent) == 3
    assert [one["type"] for one in sent[-1]["messages"][0]["content"]] == ["text"]
    assert curate(tmp_path, GEN, asked)[2] == []


@pytest.mark.fault("teacher-unreadable")
@pytest.mark.parametrize(
    ("answer", "repaired", "status", "sent"),
    [
        ("I like it.", "no score", "unreadable", 3),
        ("\\boxed{7}", "\\boxed{7}", "unreadable", 3),
        ("I like it.", chat(""), "empty", 3),
        ("I'm sorry, but I can't help with that.", None, "refused", 2),
        (chat(None, refusal="No."), None, "refused", 2),
        (chat("1. **a", ended="length"), None, "cut", 2),
        (b"<html>", None, "malformed_reply", 2),
        (400, None, "rejected", 2),
    ],
)
def test_what_cannot_be_read_is_set_aside_with_its_reason(tmp_path, answer, repaired, status, sent):
    play = broken(answer, repaired) if isinstance(answer, str) else (
        lambda number, text, pictures: answer if "ANALYSIS PLAN" in text else wise(number, text, pictures)
    )  # fmt: skip
    [outcome], running, asked, _ = curate(tmp_path, GEN, records(tmp_path, 1), play)
    assert outcome.missing["alignment"].status == status and outcome.missing["alignment"].reason
    assert set(outcome.answers) == {"plan"} and running.missing == {("alignment", status): 1}
    assert len(asked) == sent and GEN_RECIPE.examples(outcome) == []


@pytest.mark.fault("teacher-unreadable")
def test_without_the_first_answer_the_second_is_not_asked(tmp_path):
    outcomes, running, sent, _ = curate(tmp_path, GEN, records(tmp_path, 2), lambda *_: chat(None, refusal="No."))
    assert len(sent) == 2 and running.missing == {("plan", "refused"): 2, ("alignment", "upstream"): 2}
    assert not outcomes[0].answers


@pytest.mark.fault("teacher-unreadable")
def test_a_record_that_cannot_be_shown_is_set_aside_and_costs_nothing(tmp_path):
    good = records(tmp_path, 1)[0]
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes((tmp_path / good.images[0]).read_bytes()[:-40])
    bad = [
        Record("gone", "a cat", ("gone.png",)), Record("outside", "a cat", ("../secret.png",)),
        Record("empty", " ", good.images), Record("nul", "a\0b", good.images),
        Record("mark", "an <image> of a cat", good.images), Record("long", "x" * 10_000_000, good.images),
    ]  # fmt: skip
    outcomes, running, sent, _ = curate(tmp_path, GEN, [*bad, good])
    assert running.missing == {(name, "bad_record"): len(bad) for name in ("plan", "alignment")}
    assert len(sent) == 2 and set(outcomes[-1].answers) == {"plan", "alignment"}
    damaged = [Record("text", "a dog", ("text.png",)), Record("half", "a dog", ("half.png",))]
    _, running, sent, _ = curate(tmp_path, GEN, damaged)  # known when it is decoded, after the plan
    assert running.missing == {("alignment", "bad_record"): 2} and len(sent) == 1


@pytest.mark.fault("teacher-budget")
def test_the_budget_stops_the_run_saved_and_more_of_it_goes_on(tmp_path):
    asked = records(tmp_path, 30)
    with pytest.raises(BudgetError, match=r"budget\.tokens"):
        curate(tmp_path, GEN, asked, budget=Budget(tokens=20_000), after=0.002)
    ledger = Ledger(tmp_path / "calls.sqlite")
    before = ledger.totals()
    ledger.close()
    assert before.tokens <= 20_000 and before.lost == 0 and 0 < before.done == before.attempts < 60
    outcomes, _, sent, totals = curate(tmp_path, GEN, asked, budget=Budget(tokens=20_000_000))
    assert len(sent) == 60 - before.done and totals.attempts == totals.done == 60
    assert all("alignment" in outcome.answers for outcome in outcomes)


@pytest.mark.fault("teacher-answers")
def test_a_teacher_that_no_longer_answers_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "SILENT", 5)
    with pytest.raises(CriticError, match=r"the last 5 calls had no answer.*answers 401"):
        curate(tmp_path, GEN, records(tmp_path, 40), lambda *_: 401, concurrency=2)
    outcomes, _, _, totals = curate(tmp_path, GEN, records(tmp_path, 40))
    assert totals.done == 80 and all("alignment" in outcome.answers for outcome in outcomes)


@pytest.mark.slow
@pytest.mark.fault("teacher-killed")
def test_killed_twenty_times_the_curation_ends_the_same_and_pays_for_nothing_twice(tmp_path):
    folder, kills = tmp_path, 20
    command = [sys.executable, curation_job.__file__, str(folder), str(kills), "0"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONHASHSEED": "0"}
    said = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert said.split() == [str(kills), "0"]
    assert json.loads((folder / "killed.json").read_text()) == json.loads((folder / "straight.json").read_text())
    tables, spent = [], []
    names = ("key", "stage", "status", "outcome", "answer", "tokens_in", "tokens_out", "price")
    for file, bills in (("calls.sqlite", "bills"), ("straight.sqlite", "other bills")):
        ledger = Ledger(folder / file)
        tables.append([tuple(row[name] for name in names) for row in ledger.rows()])
        billed = len((folder / bills).read_text().split())
        totals = ledger.totals()
        assert (
            totals.calls == totals.done <= billed <= totals.done + totals.lost
        )  # only what was on its way is paid again
        spent.append(totals)
    assert tables[0] == tables[1] and spent[1].lost == 0 and spent[0].price == spent[1].price
    assert any(stage.endswith("/repair") for _, stage, *_ in tables[0])


# Reading answers

NOBODY = Record("r", "a cat", ())


@pytest.mark.parametrize(
    "text",
    [
        RIGHT.replace("\\boxed{4}", ""), RIGHT.replace("\\boxed{4}", "\\boxed{5}"), RIGHT + "\nThanks!",
        RIGHT.replace("**Final Alignment Rating: 4**\n", ""), RIGHT.replace("1. **a cat**", "a cat"),
        RIGHT.replace("**Final Analysis**: It is there.\n", ""), RIGHT.replace("There.", "As the plan asks."), "", "4",
        RIGHT.replace("4", "4.5"), RIGHT.replace("4", "6"),
    ],
)  # fmt: skip
def test_a_judgement_of_alignment_is_whole_or_unreadable(text):
    with pytest.raises(Unreadable):
        plan_then_score.read_score(text, NOBODY)


def test_a_judgement_of_alignment_is_kept_as_it_was_written():
    verdict = plan_then_score.read_score(f"```\n{RIGHT}\n```", NOBODY)
    assert (verdict.score, verdict.reason, verdict.text) == (4, "It is there.", RIGHT)
    said = RIGHT.replace("There.", "It follows the plan.")
    assert plan_then_score.read_score(said, Record("r", "the plan of a house", ())).score == 4  # its own words


@pytest.mark.parametrize("text", ["", "no list", "1. a cat", "a cat?", "1. x?\n" * 2000])
def test_a_plan_is_a_list_of_questions(text):
    with pytest.raises(Unreadable):
        plan_then_score.read_plan(text, NOBODY)


REASON = "The sky is red now, as the instruction asks."


@pytest.mark.parametrize(
    "text",
    [
        "", "4", '{"score": [4]}', '{"reasoning": "", "score": [4]}', json.dumps({"reasoning": REASON, "score": [6]}),
        json.dumps({"reasoning": REASON, "score": [4, 4]}), json.dumps({"reasoning": REASON}),
        json.dumps({"reasoning": "By the difference notes " + REASON, "score": [4]}),
        '{"reasoning": "' + REASON + '", "sco',
    ],
)  # fmt: skip
def test_a_judgement_of_an_edit_is_whole_or_unreadable(text):
    with pytest.raises(Unreadable):
        difference_first.read_score(text, NOBODY)


@pytest.mark.parametrize("form", ["{}", "```json\n{}\n```", "Here it is:\n{}"])
def test_a_judgement_of_an_edit_is_written_anew_in_the_rubric_s_form(form):
    said = form.replace("{}", '{"score": 4, "reasoning": "The sky is \\n red now, as the instruction asks."}')
    assert difference_first.read_score(said, NOBODY).text == json.dumps({"reasoning": REASON, "score": [4]})


# What a critic is trained on


def test_a_critic_learns_the_answer_without_what_the_teacher_knew(tmp_path):
    gen, edit = records(tmp_path, 3), records(tmp_path, 3, images=2)
    found = [example for outcome in curate(tmp_path, GEN, gen)[0] for example in GEN_RECIPE.examples(outcome)] + [
        example for outcome in curate(tmp_path, EDIT, edit)[0] for example in EDIT_RECIPE.examples(outcome)
    ]
    assert collections.Counter(one.criterion for one in found) == dict.fromkeys(
        ("alignment", "edit_execution", "edit_consistency"), 3
    )
    assert len({one.id for one in found}) == 9
    for one in found:
        assert one.question == RUBRICS[one.criterion].fill(one.prompt)
        assert not any(word in one.question + one.answer for word in ("PLAN", "plan", "NOTES", "notes", "corner:"))
        parse = parse_alignment if one.criterion == "alignment" else parse_edit
        assert parse(one.answer).scores == (one.score,) and parse(one.answer).reason == one.reason
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(one.to_json()) + "\n" for one in found))
    read = load_conversations(tmp_path / "train.jsonl")
    assert [(one.prompt, one.answer, len(one.images)) for one in read] == [
        (one.question, one.answer, len(one.images)) for one in found
    ]


def test_the_score_is_what_the_teacher_gave(tmp_path):
    seen = {}

    def play(number, text, pictures):
        if "INSTRUCTION" in text and pictures:
            seen[re.findall(r"INSTRUCTION\n(.*)\n", text)[-1]] = score_of(text, pictures)
        return wise(number, text, pictures)

    outcomes = curate(tmp_path, GEN, records(tmp_path, 12), play)[0]
    assert {one.record.prompt: one.answers["alignment"].score for one in outcomes} == seen
    assert len(set(seen.values())) > 2


# Low scores on purpose


def test_exchanged_instructions_are_of_other_records(tmp_path):
    asked = [Record(f"r{number}", f"prompt {number % 4}", (f"{number}.png",)) for number in range(20)]
    made = mismatch.exchange_instructions(asked, 0.5, seed=1)
    assert len(made) == 10 and made == mismatch.exchange_instructions(asked, 0.5, seed=1)
    assert made != mismatch.exchange_instructions(asked, 0.5, seed=2)
    by_id = {record.id: record for record in asked}
    for one in made:
        origin = by_id[one.id.removesuffix("/exchanged")]
        assert one.images == origin.images and one.made_from == origin.prompt != one.prompt
        assert one.prompt in {record.prompt for record in asked}
    assert mismatch.exchange_instructions([asked[0], asked[4]], 1.0, seed=0) == []  # there is no other instruction


def test_another_instruction_for_the_same_pair_costs_no_new_notes(tmp_path):
    asked = records(tmp_path, 2, images=2)
    curate(tmp_path, EDIT, asked)
    outcomes, _, sent, _ = curate(tmp_path, EDIT, mismatch.exchange_instructions(asked, 1.0, seed=0))
    assert len(sent) == 4 and all("DIFFERENCE NOTES" in one["messages"][0]["content"][-1]["text"] for one in sent)
    [first, *_] = EDIT_RECIPE.examples(outcomes[0])
    assert first.mismatched and first.prompt in first.question


@pytest.mark.parametrize("edits", [False, True])
def test_the_teacher_rewrites_an_instruction(tmp_path, edits):
    asked = records(tmp_path, 1)
    [outcome], _, sent, _ = curate(tmp_path, [mismatch.rewrite_stage(edits)], asked)
    made = mismatch.rewritten(outcome)
    assert (made.prompt, made.made_from, made.images) == ("a green dog", "a cat number 0", asked[0].images)
    assert ("edit instruction" in sent[0]["messages"][0]["content"][0]["text"]) == edits
    same = json.dumps({"instruction": "A  cat number 0"})
    picture(tmp_path, "other.png", 5)
    [outcome], running, _, _ = curate(
        tmp_path, [mismatch.rewrite_stage(edits)], [Record("x", "a Cat number  0", ("other.png",))], lambda *_: same
    )
    assert mismatch.rewritten(outcome) is None and running.missing == {("other_instruction", "unreadable"): 1}
