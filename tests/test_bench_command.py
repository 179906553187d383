"""`firm-jax bench`: critics against the miniature's scores, whatever happens in between, and the probes."""

import json

import numpy as np
import pytest
from bench_reader import Reader
from fake_critic import FakeCritic

from firm_jax.commands import bench as command
from firm_jax.commands import main
from firm_jax.critic.bench import paper, questions
from firm_jax.critic.bench.miniature import write_bench
from firm_jax.critic.bench.records import HUMAN, ITEMS, read_bench
from firm_jax.critic.bench.report import measured
from firm_jax.embedded import embedded_path
from firm_jax.errors import DataError


@pytest.fixture(scope="module")
def data():
    return {task: read_bench(embedded_path(f"embedded:bench_{task}"), task) for task in ("gen", "edit")}


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Run the command with a critic in the place of a model's; returns bench.json."""

    def ask(critic, task, *more, out=tmp_path / "out", status=0):
        monkeypatch.setattr(command, "load_critic", lambda *_: critic)
        assert main(["bench", "--task", task, "--out", str(out), "--dtype", "float32", *more]) == status
        return json.loads((out / "bench.json").read_text()) if status == 0 else None

    return ask


@pytest.mark.parametrize("task", ["gen", "edit"])
def test_what_ships_is_what_is_made(task, tmp_path, data):
    write_bench(tmp_path, task)
    shipped = embedded_path(f"embedded:bench_{task}")
    for file in (ITEMS, HUMAN):
        assert (tmp_path / file).read_text() == (shipped / file).read_text()
    made = read_bench(tmp_path, task)
    for ours, theirs in zip(made.items, data[task].items, strict=True):
        for one, other in zip(ours.pictures, theirs.pictures, strict=True):
            assert one.open()[0].tobytes() == other.open()[0].tobytes()
    assert len(made.items) == 120 and not made.quarantined
    assert sum(file.stat().st_size for file in shipped.rglob("*.*")) < 750_000


def test_a_critic_that_agrees_with_people_is_never_wrong(ask, data, tmp_path, capsys):
    found = ask(Reader(data["edit"]), "edit")["critics"]["embedded:critic_edit"]
    for one in (*found["criteria"].values(), found["overall"]):
        assert one["mae"] == one["failure_rate"] == 0 and one["exact"] == 1 and one["mae_interval"] == [0, 0]
    assert all(one["spearman"] == one["kendall"] == pytest.approx(1) for one in found["criteria"].values())
    page = (tmp_path / "out" / "bench.md").read_text()
    assert page == capsys.readouterr().out
    assert "| FIRM-Edit-8B | 0.53 | 0.73 | 0.62 |" in page and "not measured here" in page


def test_errors_failures_and_splits_are_told_apart(ask, data):
    bench = data["gen"]
    hard = {item.prompt for item in bench.items if item.difficulty == "hard"}
    easy = {item.prompt for item in bench.items if item.difficulty == "easy"}
    silent = next(item for item in bench.items if item.prompt not in hard)

    def change(request, score):
        if request["prompt"] == silent.prompt:
            return None
        return max(score - 1, 1) if request["prompt"] in hard else score

    found = ask(Reader(bench, change), "gen")["critics"]["embedded:critic_gen"]
    of_hard = [item.human for item in bench.items if item.difficulty == "hard"]
    assert found["difficulty"]["easy"]["mae"] == pytest.approx(
        np.mean([item.human > 1 and item.prompt in hard for item in bench.items if item.difficulty == "easy"])
    )
    assert found["difficulty"]["hard"]["mae"] == pytest.approx(np.mean(np.array(of_hard) > 1))
    failed = sum(item.prompt == silent.prompt for item in bench.items)
    assert found["failures"] == {"no_score": failed} and silent.prompt in easy
    assert found["overall"]["failure_rate"] == pytest.approx(failed / 120)
    assert found["overall"]["mae_failures_worst"] > found["overall"]["mae"]


def test_probes_show_what_can_be_fooled(ask, data):
    def fooled(request, score):
        if request["prompt"].endswith(questions.INJECTION):
            return 5
        source, image = (picture.tobytes() for picture in request["images"])
        return (2 if request["criterion"] == "edit_execution" else 4) if source == image else score

    found = ask(Reader(data["edit"], fooled), "edit")["critics"]["embedded:critic_edit"]["probes"]
    assert {name: one["mean"] for name, one in found["untouched"].items()} == {"execution": 2, "consistency": 4}
    for name, change in found["injection"].items():
        numbers = [n for n in questions.probed(data["edit"]) if data["edit"].items[n].criterion == name]
        shown = data["edit"].items
        asked = [{"prompt": shown[n].prompt, "criterion": f"edit_{name}", "images": _images(shown[n])} for n in numbers]
        before = [fooled(request, shown[n].human) for request, n in zip(asked, numbers, strict=True)]
        assert change["mean"] == pytest.approx(np.mean(5 - np.array(before)))
        assert change["items"] == change["judged"] == len(numbers)
    assert found["batch"] == {"items": 48, "judged": 48, "changed": 0, "expected_change": 0}


def test_a_probe_that_throws_a_critic_off_its_track_is_not_averaged_away(ask, data):
    def lost(request, score):
        return None if request["prompt"].endswith(questions.INJECTION) and score != 3 else score

    found = ask(Reader(data["gen"], lost), "gen")["critics"]["embedded:critic_gen"]
    threes = sum(data["gen"].items[number].human == 3 for number in questions.probed(data["gen"]))
    assert found["probes"]["injection"]["instruction"] == {"mean": 0, "items": 48, "judged": threes}
    assert found["failures"] == {} and 0 < threes < 48


def _images(item):
    return [picture.open()[0] for picture in item.pictures]


def test_scores_that_depend_on_their_batch_are_found(data):
    bench, plain = data["gen"], questions.questions(data["gen"])

    def records(asked, score):
        return [
            {"of": one.of, "probe": one.probe, "score": score(one), "expected": float(score(one)), "status": "ok"}
            for one in asked
        ]

    unsteady = questions.probed(bench)[:12]
    found = measured(
        bench, records(plain, lambda one: 3), records(questions.reordered(bench), lambda one: 3 + (one.of in unsteady))
    )
    assert found["probes"]["batch"] == {"items": 48, "judged": 48, "changed": 0.25, "expected_change": 0.25}


def test_the_same_command_goes_on_and_other_critics_join_the_table(ask, data, tmp_path):
    class Dies(Reader):
        def judge(self, requests, *more):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().judge(requests, *more)

    ask(Dies(data["gen"]), "gen", status=130)
    again = Reader(data["gen"])
    whole = ask(again, "gen")
    count = len(questions.questions(data["gen"])) + questions.PROBED
    assert sum(again.calls) == count - 2 * 64
    third = Reader(data["gen"])
    assert ask(third, "gen") == whole and not third.calls
    assert ask(Reader(data["gen"]), "gen", out=tmp_path / "straight") == whole
    other = str(embedded_path("embedded:critic_gen"))
    both = ask(Reader(data["gen"], lambda request, score: 3), "gen", "--critic", other)
    assert len(both["critics"]) == 2
    assert both["critics"]["embedded:critic_gen"] == whole["critics"]["embedded:critic_gen"]
    maes = [one["overall"]["mae"] for one in both["critics"].values()]
    assert min(maes) == 0 < max(maes)


def test_what_a_critic_cannot_be_asked_is_its_failure_alone(ask, data):
    class Short(Reader):
        def judge(self, requests, *more):
            if any(request["prompt"] == data["gen"].items[5].prompt for request in requests):
                raise DataError("the request is too long")
            return super().judge(requests, *more)

    found = ask(Short(data["gen"]), "gen")["critics"]["embedded:critic_gen"]
    same = sum(item.prompt == data["gen"].items[5].prompt for item in data["gen"].items)
    assert found["failures"] == {"rejected": same} and found["overall"]["mae"] == 0


def test_a_critic_on_a_server_is_measured_too(data, tmp_path):
    server = FakeCritic()
    try:
        given = ["--backend", "firm", "--endpoint", server.url, "--critic", "critic", "--out", str(tmp_path)]
        assert main(["bench", "--task", "gen", *given]) == 0
    finally:
        server.stop()
    found = json.loads((tmp_path / "bench.json").read_text())["critics"]["critic"]
    assert found["failures"] == {} and found["overall"]["items"] == 120 and found["overall"]["mae"] > 0.5
    # What the server's formula makes of each picture, beside what people say.
    shown = [np.asarray(item.pictures[0].open()[0], float)[..., 0].mean() for item in data["gen"].items]
    scores = [round(3 + 2 * np.sin(red / 4)) for red in shown]
    human = [item.human for item in data["gen"].items]
    assert found["overall"]["mae"] == pytest.approx(np.mean(np.abs(np.subtract(scores, human))))


def test_mistakes_are_one_message(ask, data, tmp_path, capsys):
    for more, words in (
        (["--backend", "firm"], "endpoints go with the backend firm or openai"),
        (["--endpoint", "http://127.0.0.1:1"], "endpoints go with the backend firm or openai"),
        (["--max-bad-fraction", "2"], "give a fraction"),
        (["--critic", "a/b", "--critic", "a-b"], "two of the critics would share a folder"),
        (["--data", str(tmp_path)], "cannot read"),
        (["--fields", "x"], "--fields x: give NAME=FIELD"),
    ):
        ask(Reader(data["gen"]), "gen", *more, status=2)
        assert words in capsys.readouterr().err


def test_the_papers_overall_is_the_mean_over_its_items():
    for execution, consistency, overall in paper.TABLES["edit"].values():
        assert (execution * 301 + consistency * 256) / 557 == pytest.approx(overall, abs=0.0101)
    for easy, hard, overall in paper.TABLES["gen"].values():
        assert min(easy, hard) <= overall <= max(easy, hard)
