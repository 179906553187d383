"""Reading FIRM-Bench: what is joined to what, and that what cannot be used is set aside with its place."""

import json

import numpy as np
import pytest
from PIL import Image

from firm_jax.critic.bench.records import HUMAN, ITEMS, Fields, fields_from, read_bench
from firm_jax.errors import ConfigError, DataError


def write(folder, items, human, pictures=("1.png", "2.png", "source.png")):
    (folder / "result").mkdir(exist_ok=True)
    for file, rows in ((ITEMS, items), (HUMAN, human)):
        rows = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / file).write_text("".join(f"{row}\n" for row in rows))
    for number, name in enumerate(pictures):
        Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(folder / name)
    return folder


def item(name, **more):
    return {"id": name, "prompt": f"a cat {name}", "image": "1.png"} | more


def edit(name, **more):
    return item(name) | {"source": "source.png"} | more


def reasons(bench):
    return {(one.file.rpartition("/")[2], one.line): one.reason for one in bench.quarantined}


def test_items_are_joined_to_their_scores(tmp_path):
    items = [item("a", difficulty="Easy", requirement="whiskers"), item(2, difficulty="hard"), item("c", image="2.png")]
    human = [{"id": "c", "score": 1}, {"id": 2, "score": "4"}, {"id": "a", "score": 5.0}]
    found = read_bench(write(tmp_path, items, human), "gen")
    assert [(one.id, one.criterion, one.human, one.difficulty) for one in found.items] == [
        ("a", "instruction", 5, "easy"),
        ("2", "instruction", 4, "hard"),
        ("c", "instruction", 1, None),
    ]
    assert found.items[0].requirement == "whiskers" and found.items[0].prompt == "a cat a"
    assert found.items[2].pictures[0].path == "2.png" and not found.quarantined
    assert found.items[0].sha256 == found.items[1].sha256 != found.items[2].sha256
    human[0]["score"] = 2
    assert read_bench(write(tmp_path, items, human), "gen").sha256 != found.sha256


@pytest.mark.parametrize(
    "items, human",
    [
        ([edit("a"), edit("b")], [{"id": "a", "execution": 5, "consistency": 2}, {"id": "b", "execution": 1}]),
        (
            [item("a", image=["source.png", "1.png"]), edit("b")],
            [
                {"id": "a", "criterion": "execution", "score": 5},
                {"id": "a", "criterion": "edit_consistency", "score": 2},
                {"id": "b", "criterion": "Execution", "score": 1},
            ],
        ),
        (
            [edit("a", criterion="execution"), edit("x", criterion="consistency"), edit("b", criterion="execution")],
            [{"id": "a", "score": 5}, {"id": "x", "score": 2}, {"id": "b", "score": 1}],
        ),
        (
            [edit("a", criterion="execution"), edit("a", criterion="consistency"), edit("b")],
            [{"id": "a", "execution": 5, "consistency": 2}, {"id": "b", "execution": 1}],
        ),
        (
            [edit("a", criterion="execution"), edit("a"), edit("b")],
            [{"id": "a", "execution": 5, "consistency": 2}, {"id": "b", "execution": 1}],
        ),
    ],
)
def test_an_edit_has_the_criteria_that_people_scored(tmp_path, items, human):
    found = read_bench(write(tmp_path, items, human), "edit")
    assert [(one.criterion, one.human) for one in found.items] == [
        ("execution", 5),
        ("consistency", 2),
        ("execution", 1),
    ]
    assert all([picture.path for picture in one.pictures] == ["source.png", "1.png"] for one in found.items)
    assert not found.quarantined


def test_a_score_without_a_criterion_says_nothing_of_two(tmp_path):
    with pytest.raises(DataError, match="no usable human score of 'a'"):
        read_bench(write(tmp_path, [edit("a")], [{"id": "a", "score": 3}]), "edit")


def test_other_names_are_declared(tmp_path):
    items = [{"uid": 7, "caption": "a cat", "picture": "1.png", "level": "medium"}]
    folder = write(tmp_path, items, [{"key": "7", "mos": 3}])
    given = ["id=uid", "human_id=key", "prompt=caption", "image=picture", "score=mos"]
    (found,) = read_bench(folder, "gen", fields_from(given)).items
    assert (found.id, found.prompt, found.human) == ("7", "a cat", 3)
    assert fields_from(["id=uid"]) == Fields(id="uid", human_id="uid")
    with pytest.raises(DataError, match=r"'medium' is neither easy nor hard \(an empty field"):
        read_bench(folder, "gen", fields_from([*given, "difficulty=level"]))
    for wrong in ("caption=prompt", "prompt"):
        with pytest.raises(ConfigError, match=f"--fields {wrong}: give NAME=FIELD, .*human_id, prompt, "):
            fields_from([wrong])


def test_a_mapping_that_does_not_fit_lists_what_there_is(tmp_path):
    write(tmp_path, ["[1]", {"id": 1, "caption": "a", "image": "1.png"}], [{"id": 1, "mos": 4}])
    with pytest.raises(DataError) as error:
        read_bench(tmp_path, "gen")
    assert all(part in str(error.value) for part in (ITEMS, "'prompt'", "Line 2", "'id', 'caption', 'image'"))
    assert "--fields prompt=FIELD" in str(error.value)
    with pytest.raises(DataError, match=r"human_bench_v1.jsonl: .*'score' for the score.*'id', 'mos'.*--fields score="):
        read_bench(tmp_path, "gen", Fields(prompt="caption"))
    with pytest.raises(DataError, match=r"'source' for the source.*--fields source=FIELD"):
        read_bench(tmp_path, "edit", Fields(prompt="caption"))
    (tmp_path / HUMAN).unlink()
    with pytest.raises(DataError, match=r"cannot read .*human_bench_v1.jsonl: No such file.*The benchmark is a folder"):
        read_bench(tmp_path, "gen")


@pytest.mark.fault("malformed-line", "hostile-image", "escaping-path")
def test_what_cannot_be_used_is_set_aside_with_its_place(tmp_path):
    items = [
        item("good"),
        "{",
        item("cut", image="cut.png"),
        item("out", image="../1.png"),
        item("gone", image="none.png"),
        item("two", image=["1.png", "2.png"]),
        item("blank", prompt=" "),
        item("unscored"),
        item("good", image="2.png"),
        item(True),
        item("odd", difficulty="medium"),
        item("split"),
        item("doubled"),
        item("high"),
    ]
    human = [{"id": name, "score": 3} for name in ("good", "cut", "out", "gone", "two", "blank", "odd", "doubled")]
    human += [{"id": "doubled", "score": 4}, {"id": "split", "score": 3.5}, {"id": "high", "score": True}, "null"]
    folder = write(tmp_path, items, human)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "cut.png")
    noise = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(noise[:-80])
    found = read_bench(folder, "gen", max_bad_fraction=0.99)
    assert [one.id for one in found.items] == ["good"]
    said = reasons(found)
    expected = {2: "not JSON", 3: "damaged", 4: "leads out", 5: "does not exist", 6: "2 pictures; one is judged"}
    expected |= {
        7: "empty",
        8: "no usable human score of 'unscored'",
        9: "the item 'good' comes again",
        10: "names no item",
    }
    expected |= {
        11: "neither easy nor hard",
        12: "no usable human score",
        13: "no usable human score",
        14: "no usable human score",
    }
    for line, reason in expected.items():
        assert reason in said[ITEMS, line], line
    name = HUMAN.rpartition("/")[2]
    expected = {5: "no usable item", 6: "no usable item", 7: "no usable item", 9: "scores 'doubled' again after line 8"}
    expected |= {10: "'3.5' is no whole number", 11: "'True' is no whole number", 12: "not a JSON object"}
    for line, reason in expected.items():
        assert reason in said[name, line], line


@pytest.mark.parametrize("value", [0, 6, 3.5, "four", "nan", "1e999", None, [3], True, 10**400, ""])
def test_only_whole_scores_from_1_to_5_count(tmp_path, value):
    found = read_bench(
        write(tmp_path, [item("a"), item("b")], [{"id": "a", "score": value}, {"id": "b", "score": 2}]),
        "gen",
        max_bad_fraction=0.5,
    )
    assert [one.id for one in found.items] == ["b"]


@pytest.mark.fault("broken-benchmark")
@pytest.mark.parametrize("where", ["lines", "pictures", "scores", "missing items"])
def test_a_benchmark_of_which_half_is_broken_is_refused_with_the_reasons(tmp_path, where):
    items, human = [item(n) for n in range(20)], [{"id": n, "score": 1 + n % 5} for n in range(20)]
    if where == "lines":
        items[10:] = ["{", *["null"] * 9]
        words = r"10 of 20 records .*the 5.00% .*not a JSON object \(9 like this\); line 11: not JSON"
    elif where == "pictures":
        items[10:] = [one | {"image": f"none{n}.png"} for n, one in enumerate(items[10:])]
        words = r"10 of 20 records .*line 11: .*none0.png.* does not exist.* \(10 like this\)"
    elif where == "scores":
        human[10:] = [one | {"score": 9} for one in human[10:]]
        words = r"10 of 20 records .*no usable human score of '10' \(10 like this\)"
    else:
        items[10:] = []
        words = r"human_bench_v1.jsonl: 10 of 20 records .*a score of '10', which is no usable item \(10 like this\)"
    folder = write(tmp_path, items, human)
    with pytest.raises(DataError, match=words):
        read_bench(folder, "gen")
    assert len(read_bench(folder, "gen", max_bad_fraction=0.5).items) == 10


def test_the_budget_is_of_lines_and_one_in_twenty_is_within_it(tmp_path):
    items, human = [edit(n) for n in range(20)], [{"id": n, "execution": 3, "consistency": 4} for n in range(20)]
    items[3]["image"] = "none.png"
    folder = write(tmp_path, items, human)
    found = read_bench(folder, "edit")
    assert len(found.items) == 38 and len(found.quarantined) == 1
    with pytest.raises(DataError, match=r"1 of 20 records cannot be used, more than the 4\.00%"):
        read_bench(folder, "edit", max_bad_fraction=0.04)
