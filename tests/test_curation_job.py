"""The curation job end to end: the miniature with its oracle, and endpoints that misbehave."""

import json
import os
import signal
import sys

import pytest
from curation_world import picture, wise
from docs_pages import unexplained
from scripted_teacher import ScriptedTeacher, chat

from firm_jax.config import load_config
from firm_jax.critic.rubric import rubrics_from
from firm_jax.curation import job
from firm_jax.curation import teacher as teachers
from firm_jax.curation.job import curate
from firm_jax.curation.outputs import EXAMPLES, HELD_OUT
from firm_jax.data.conversations import load_conversations
from firm_jax.errors import BudgetError, ConfigError, DataError, WorkdirError
from firm_jax.run import Stopped
from firm_jax.workdir import WorkdirLock

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[data]'")

RECIPES = [("gen", "plan_then_score"), ("gen", "single_pass"), ("edit", "difference_first"), ("edit", "single_pass")]
FILES = [f"{part}.{ending}" for part in (EXAMPLES, HELD_OUT) for ending in ("parquet", "jsonl")]


def tiny(task: str, recipe: str | None = None, count: int = 10, **changed):
    config = load_config(f"configs/curate.py:tiny_{task}")
    config.recipe = recipe or config.recipe
    config.shapes.count, config.log_every, config.output.held_out = count, 4, 0.2
    config.requests.concurrency = 4
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changed.items()})
    return config


def report(workdir) -> dict:
    return json.loads((workdir / "report.json").read_text())


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def bytes_of(workdir) -> dict[str, bytes]:
    return {name: (workdir / name).read_bytes() for name in (*FILES, "quarantine.jsonl", "report.json")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a finished curation for each task and recipe."""
    found = {}
    for task, recipe in RECIPES:
        found[task, recipe] = tmp_path_factory.mktemp(f"{task}_{recipe}")
        curate(tiny(task, recipe), found[task, recipe])
    return found


@pytest.mark.parametrize(("task", "recipe"), RECIPES)
def test_a_curation_ends_in_data_that_a_critic_can_be_trained_on(runs, task, recipe):
    workdir = runs[task, recipe]
    told, parts = report(workdir), {}
    for name in (EXAMPLES, HELD_OUT):
        read = [
            load_conversations(workdir / f"{name}.{ending}", max_bad_fraction=0.0) for ending in ("parquet", "jsonl")
        ]
        parts[name] = [[(one.prompt, one.answer, one.criterion, one.id) for one in part] for part in read]
        assert parts[name][0] == parts[name][1] and len(read[0]) == told["examples"][name] > 0
        assert all(len(one.images) == (1 if task == "gen" else 2) for one in read[0])
    every = parts[EXAMPLES][0] + parts[HELD_OUT][0]
    assert len(every) == told["examples"]["kept"] == sum(sum(one.values()) for one in told["scores"]["kept"].values())
    assert {one[2] for one in every} == {"gen": {"alignment"}, "edit": {"edit_execution", "edit_consistency"}}[task]
    for question, answer, *_ in every:  # asked as the miniature's critic is, and nothing the teacher alone was shown
        assert "PLAN" not in question + answer and "NOTES" not in question + answer
    assert told["whole"] and not told["missing"] and told["records"]["usable"] == 10
    made = sum(sum(one.values()) for one in told["scores"]["made"].values())
    assert made == told["examples"]["made"] == told["examples"]["kept"] + sum(told["rejected"].values())
    assert len([one for one in lines(workdir / "quarantine.jsonl") if one["step"] == "selection"]) == sum(
        told["rejected"].values()
    )


def test_the_recipes_ask_their_own_questions(runs):
    asked = {key: {part["stage"] for part in report(folder)["cost"]["parts"]} for key, folder in runs.items()}
    assert asked["gen", "plan_then_score"] == {"plan", "alignment"} and asked["gen", "single_pass"] == {"alignment"}
    judged = {"edit_execution", "edit_consistency", "other_instruction"}
    assert asked["edit", "single_pass"] == judged
    assert asked["edit", "difference_first"] == judged | {"obvious_differences", "detailed_differences"}


def test_what_it_costs_is_told_by_stage_and_agrees(runs):
    for folder in runs.values():
        cost = report(folder)["cost"]
        assert sum(part["money"] for part in cost["parts"]) == pytest.approx(cost["money"]) and cost["money"] > 0
        assert sum(part["tokens_in"] + part["tokens_out"] for part in cost["parts"]) == cost["tokens"]
        assert sum(part["calls"] for part in cost["parts"]) == cost["calls"] and cost["lost"] == 0


def test_its_metrics_are_explained_and_the_last_line_says_how_far_the_teacher_was_from_the_oracle(runs):
    for (task, _), folder in runs.items():
        rows = lines(folder / "metrics.jsonl")
        assert unexplained(name for row in rows for name in row) == []
        assert [row["curation/records"] for row in rows[:-1]] == sorted({row["curation/records"] for row in rows[:-1]})
        names = {"gen": {"alignment"}, "edit": {"edit_execution", "edit_consistency"}}[task]
        assert {name for name in rows[-1] if name.startswith("teacher/")} == {f"teacher/mae_{name}" for name in names}


@pytest.mark.parametrize("task", ["gen", "edit"])
def test_good_eyes_are_never_off(tmp_path, task):
    curate(tiny(task, count=6, shapes__miss=0.0, shapes__skip=0.0), tmp_path)
    assert all(one["mae"] == 0 and one["exact"] == 1 for one in report(tmp_path)["teacher"].values())


def test_the_page_shows_it_all_and_nothing_that_runs_or_is_fetched(runs):
    folder = runs["edit", "difference_first"]
    page, told = (folder / "report.html").read_text(), report(folder)
    assert "default-src 'none'" in page and "<script" not in page and "http" not in page.replace("http-equiv", "")
    for text in (
        "obvious_differences, shown to the teacher alone",
        "judgement",
        "embedded:bench_edit",
        "best constant",
    ):
        assert text in page
    assert page.count("data:image/webp;base64,") == 2 * page.count("<article") > 0
    assert f"{told['examples']['kept']} <small>of {told['examples']['made']}" in page
    assert f"{told['cost']['tokens']:,} tokens" in page


def test_texts_of_records_are_text_on_the_page(tmp_path, monkeypatch):
    config = endpoints(tmp_path, monkeypatch, wise, prompts=["<script>alert(1)</script> a cat", "a dog"])
    curate(config, tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


# Stopped, out of budget, changed


@pytest.mark.fault("curation-stopped")
@pytest.mark.parametrize("task", ["gen", "edit"])
def test_a_stopped_curation_goes_on_to_the_same_bytes_and_pays_nothing_twice(tmp_path, runs, monkeypatch, task):
    whole, recipe = next((folder, key[1]) for key, folder in runs.items() if key[0] == task)
    asked, answer = [], job.OracleTeacher.answer

    def stopping(self, stage, text, pictures):
        asked.append(stage)
        if len(asked) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(self, stage, text, pictures)

    monkeypatch.setattr(job.OracleTeacher, "answer", stopping)
    with pytest.raises(Stopped, match="the same command goes on"):
        curate(tiny(task, recipe), tmp_path)
    before = len(asked)
    assert 7 <= before < report(whole)["cost"]["calls"] and not (tmp_path / FILES[0]).exists()
    curate(tiny(task, recipe), tmp_path)
    assert len(asked) == report(whole)["cost"]["calls"]
    assert bytes_of(tmp_path) == bytes_of(whole)
    curate(tiny(task, recipe), tmp_path)  # and once more, when all is done
    assert len(asked) == report(whole)["cost"]["calls"] and bytes_of(tmp_path) == bytes_of(whole)
    steps = [[row["step"] for row in lines(folder / "metrics.jsonl")] for folder in (tmp_path, whole)]
    assert steps[0] == steps[1]


@pytest.mark.fault("teacher-budget")
def test_a_curation_out_of_budget_leaves_what_there_is_and_goes_on_with_more(tmp_path, runs):
    whole = runs["gen", "plan_then_score"]
    tokens = report(whole)["cost"]["tokens"]
    with pytest.raises(BudgetError, match="raise the budget"):
        curate(tiny("gen", budget__tokens=int(tokens * 0.6)), tmp_path)
    told = report(tmp_path)
    assert not told["whole"] and "budget.tokens" in told["stopped"] and told["cost"]["tokens"] <= 0.6 * tokens
    assert 0 < told["records"]["asked"] < report(whole)["records"]["asked"]
    assert len(load_conversations(tmp_path / "examples.jsonl")) == told["examples"]["examples"] > 0
    assert "Not whole" in (tmp_path / "report.html").read_text()
    curate(tiny("gen"), tmp_path)
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_another_question_needs_another_folder(runs, tmp_path):
    folder = runs["gen", "plan_then_score"]
    for changed in ({"recipe": "single_pass"}, {"shapes__miss": 0.5}, {"seed": 3}, {"teachers__judge__model": "x"}):
        with pytest.raises(ConfigError, match=next(iter(changed)).replace("__", r"\.")):
            curate(tiny("gen", **changed), folder)
    lock = WorkdirLock(tmp_path)
    lock.acquire()
    with pytest.raises(WorkdirError, match="in use"):
        curate(tiny("gen"), tmp_path)
    lock.release()


def test_the_selection_may_be_made_anew(runs, tmp_path, monkeypatch):
    curate(tiny("gen", "single_pass"), tmp_path)
    monkeypatch.setattr(job.OracleTeacher, "answer", None)  # nothing is asked
    curate(
        tiny("gen", "single_pass", selection__per_score=1, output__held_out=0.0, output__formats=("jsonl",)), tmp_path
    )
    assert max(report(tmp_path)["scores"]["kept"]["alignment"].values()) == 1
    assert not any((tmp_path / name).exists() for name in FILES if name != "examples.jsonl")


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"recipe": "difference_first"}, "for the task gen"),
        ({"mismatch__how": "guess"}, "mismatch"),
        ({"mismatch__share": 1.5}, "mismatch"),
        ({"output__formats": ("csv",)}, "csv"),
        ({"output__formats": ()}, "one or more"),
        ({"output__held_out": 1.0}, "held_out"),
        ({"log_every": 0}, "log_every"),
        ({"engine": "spark"}, "embedded or ray"),
        ({"ray__workers": 0}, r"ray\.workers is 0"),
        ({"teachers__backend": "people"}, "openai or oracle"),
        ({"teachers__backend": "openai"}, r"teachers\.planner\.endpoints is empty"),
        ({"teachers__planner__price_in": -1.0}, "price_in"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_asked(tmp_path, changed, problem):
    with pytest.raises(ConfigError, match=problem):
        curate(tiny("gen", count=2, **changed), tmp_path)
    assert not (tmp_path / "examples.jsonl").exists()


def test_parquet_that_cannot_be_written_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"parquet needs pyarrow.*firm-jax\[data\]"):
        curate(tiny("gen", count=2), tmp_path)
    assert not (tmp_path / job.LEDGER).exists()


def test_ray_that_is_not_installed_is_told_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "firm_jax.curation.ray_engine", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"engine='ray'.*pip install -e '\.\[ray\]'"):
        curate(tiny("gen", count=2, engine="ray"), tmp_path)
    assert not (tmp_path / job.LEDGER).exists()


def test_a_budget_of_money_needs_prices(tmp_path):
    config = load_config("configs/curate.py:gen")
    config.budget.money = 10.0
    with pytest.raises(ConfigError, match="all prices are 0"):
        curate(config, tmp_path)


# Endpoints


def endpoints(folder, monkeypatch, play, *, prompts=None, **changed):
    """The config of a curation over `folder/records.jsonl`, with the script in the place of its endpoints."""
    prompts = prompts or [f"a cat number {number}" for number in range(6)]
    records = [{"prompt": text, "image": picture(folder, f"{n}.png", 10 * n)} for n, text in enumerate(prompts)]
    (folder / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    config = load_config("configs/curate.py:gen")
    config.records.source = str(folder / "records.jsonl")
    for role in ("planner", "judge"):
        config.teachers[role].update({"endpoints": ("http://one/v1",), "price_in": 0.15, "price_out": 0.6})
    config.requests.update({"attempts": 3, "connect_timeout": 2.0, "try_timeout": 5.0, "timeout": 10.0})
    config.output.samples = 1
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changed.items()})
    script = ScriptedTeacher(play)

    def quick(settings, policy):
        quicker = teachers.Policy(**{**vars(policy), "backoff": 0.001, "rest": 0.01})
        return teachers.Teacher(settings, quicker, transport=script)

    monkeypatch.setattr(job, "Teacher", quick)
    return config


@pytest.mark.fault("teacher-answers")
@pytest.mark.fault("teacher-unreadable")
def test_teachers_that_misbehave_leave_missing_answers_with_their_reasons(tmp_path, monkeypatch):
    def play(number, text, pictures):
        if "ANALYSIS PLAN" not in text:
            return wise(number, text, pictures)
        which = int(text.split("a cat number ")[-1][0])
        if which == 4 and not tried.add(number) and len(tried) == 1:
            return 429
        return {0: b"<html>down</html>", 1: chat(None, refusal="No."), 2: b'{"choices": [', 3: 500}.get(which) or wise(
            number, text, pictures
        )

    tried: set[int] = set()
    config = endpoints(tmp_path, monkeypatch, play)
    curate(config, tmp_path / "run")
    told = report(tmp_path / "run")
    assert told["missing"] == {"alignment": {"malformed_reply": 2, "refused": 1, "server_error": 1}}
    assert told["examples"]["made"] == 2 and len(tried) == 2  # the one that was busy was asked again
    missing = [one for one in lines(tmp_path / "run" / "quarantine.jsonl") if one["step"] == "answer"]
    assert [one["record"] for one in missing] == ["1", "2", "3", "4"] and all(one["reason"] for one in missing)
    curate(endpoints(tmp_path, monkeypatch, wise), tmp_path / "run")  # those that failed are asked again, no refusal is
    assert report(tmp_path / "run")["missing"] == {"alignment": {"refused": 1}}
    assert report(tmp_path / "run")["examples"]["made"] == 5


def test_roles_with_the_same_settings_share_a_teacher_and_its_limits(tmp_path, monkeypatch):
    made = []
    config = endpoints(tmp_path, monkeypatch, wise)
    of = job.Teacher
    monkeypatch.setattr(job, "Teacher", lambda *given: made.append(given[0]) or of(*given))
    config.teachers.planner.model = config.teachers.judge.model
    curate(config, tmp_path / "run")
    assert len(made) == 1
    config.teachers.planner.model = "another"
    curate(config, tmp_path / "other run")
    assert [one.model for one in made[1:]] == ["another", config.teachers.judge.model]


def test_instructions_are_exchanged_or_rewritten_and_told_apart(tmp_path, monkeypatch):
    for how, stages in (("exchange", {"plan", "alignment"}), ("rewrite", {"plan", "alignment", "other_instruction"})):
        config = endpoints(tmp_path, monkeypatch, wise, mismatch__share=0.5, mismatch__how=how)
        curate(config, tmp_path / how)
        told = report(tmp_path / how)
        assert told["records"]["asked"] == 9 and told["examples"]["mismatched"] == 3
        assert {part["stage"] for part in told["cost"]["parts"]} == stages


def test_requirements_are_in_the_questions_and_rubrics_without_a_place_for_them_are_refused(tmp_path, monkeypatch):
    config = endpoints(tmp_path, monkeypatch, wise, prompts=["a cat", "a cat", "a dog"])
    records = lines(tmp_path / "records.jsonl")
    records[0]["requirement"], records[2]["requirement"] = "with red ears", "with <image> ears"
    records[1]["image"] = records[0]["image"]  # another question about the same picture
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    config.output.held_out = 0.0
    curate(config, tmp_path / "run")
    found = load_conversations(tmp_path / "run" / "examples.jsonl")
    rubric = rubrics_from()["alignment"]
    assert {one.prompt for one in found} == {rubric.fill("a cat", "with red ears"), rubric.fill("a cat")}
    assert report(tmp_path / "run")["missing"] == {"plan": {"bad_record": 1}, "alignment": {"bad_record": 1}}
    assert "with red ears" in (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "rubrics").mkdir()
    (tmp_path / "rubrics" / "alignment.txt").write_text("How well? {prompt}")
    config.rubrics = str(tmp_path / "rubrics")
    with pytest.raises(ConfigError, match=r"no field \{requirement\}"):
        curate(config, tmp_path / "other")
    assert not (tmp_path / "other" / job.LEDGER).exists()


def test_when_no_example_is_left_the_job_says_so(tmp_path, monkeypatch):
    config = endpoints(tmp_path, monkeypatch, lambda *_: chat(None, refusal="No."))
    with pytest.raises(DataError, match="no example is left of 6 records"):
        curate(config, tmp_path / "run")
    assert report(tmp_path / "run")["missing"] == {"alignment": {"upstream": 6}, "plan": {"refused": 6}}
    assert not (tmp_path / "run" / "examples.jsonl").exists()
