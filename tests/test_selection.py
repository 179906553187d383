"""The selection in its order, what is held out, and the records that come in."""

import json

import numpy as np
import pytest
from PIL import Image

from firm_jax.curation import select
from firm_jax.curation.records import read_records
from firm_jax.curation.select import Benchmark
from firm_jax.curation.selection import Look, Rules, benchmark_of, counted, held_out, look_at, selected
from firm_jax.curation.stage import Example
from firm_jax.data.images import read_image_file
from firm_jax.embedded import embedded_path
from firm_jax.errors import DataError


def example(name: str, image: str = "a", *, prompt="a cat", score=3, reason="It is about as asked.", **changed):
    given = {"criterion": "alignment", "images": (image,), "question": "?", "answer": "!"} | changed
    return Example(id=name, prompt=prompt, score=score, reason=reason, **given)


# Of the images b and c the files differ and the pictures hardly do.
SHADES = {"a": 0, "b": 100, "c": 101, "d": 200, "e": 10}
LOOKS = {name: Look(name, bytes([shade] * 432)) for name, shade in SHADES.items()}
RULES = Rules(near_levels=2)


def kept(examples, rules=RULES):
    stay, rejected = selected(examples, LOOKS, rules)
    assert len(stay) + len(rejected) == len(examples)
    return [one.id for one in stay], {one.example.id: one.reason for one in rejected}


def test_every_reason_is_the_first_that_applies():
    benchmark = Benchmark([LOOKS["d"].thumbnail], ["A dog!"], 2)
    examples = [
        example("first"), example("double"),
        example("b", "b"), example("near", "c"),
        example("leaked picture", "d"), example("leaked prompt", "b", prompt="a dog"),
        example("against itself", "b", prompt="a fish", score=5, reason="The fish is missing."),
        *(example(f"more {number}", "a", prompt=f"prompt {number}") for number in range(4)),
    ]  # fmt: skip
    rules = Rules(2, benchmark, True, per_score=3, seed=0)
    stay, rejected = kept(examples, rules)
    assert len(stay) == 3 and list(rejected.values()).count("balance") == 3
    assert {name: reason for name, reason in rejected.items() if reason != "balance"} == {
        "double": "duplicate", "near": "near_duplicate", "leaked picture": "leakage", "leaked prompt": "leakage",
        "against itself": "contradiction",
    }  # fmt: skip
    assert counted(selected(examples, LOOKS, rules)[1]) == {
        "duplicate": 1, "near_duplicate": 1, "leakage": 2, "contradiction": 1, "balance": 3
    }  # fmt: skip
    assert kept(examples, rules) == (stay, rejected)


def test_the_balance_is_drawn_from_what_has_passed_the_rest():
    bad = [example(f"bad {number}", score=5, prompt=f"p{number}", reason="It is missing.") for number in range(20)]
    good = [example(f"good {number}", score=5, prompt=f"q{number}") for number in range(3)]
    assert kept([*bad, *good], Rules(2, per_score=3))[0] == ["good 0", "good 1", "good 2"]


def test_another_criterion_or_prompt_is_another_example():
    examples = [example("one"), example("two", criterion="quality"), example("three", prompt="a dog")]
    assert kept(examples)[0] == ["one", "two", "three"]


def test_contradictions_benchmark_and_balance_are_left_out_when_they_are_not_asked_for():
    examples = [example("one", score=5, reason="The cat is missing."), example("two", "d")]
    assert kept(examples, Rules(2, contradictions=False))[0] == ["one", "two"]


def test_no_picture_is_in_both_parts():
    examples = [example(f"{name} {number}", name) for name in LOOKS for number in range(3)]
    aside = held_out(examples, LOOKS, 0.4, seed=0)
    pictures = {True: set(), False: set()}
    for one, out in zip(examples, aside, strict=True):
        pictures[out].add(one.images)
    assert len(pictures[True]) == 2 and not pictures[True] & pictures[False]
    assert sum(held_out(examples, LOOKS, 0.001, seed=0)) == 3 and not any(held_out(examples, LOOKS, 0.0, seed=0))
    assert not any(held_out(examples[:3], LOOKS, 0.5, seed=0))  # the one picture is trained on


@pytest.mark.parametrize(("task", "pictures"), [("gen", 1), ("edit", 2)])
def test_what_the_shipped_benchmark_holds_does_not_stay(task, pictures):
    folder = embedded_path(f"embedded:bench_{task}")
    items = [json.loads(line) for line in (folder / "bench_v1.jsonl").read_text().splitlines()[:4]]
    images = [tuple(item[name] for name in ("source", "image") if name in item) for item in items]
    assert {len(one) for one in images} == {pictures}
    examples = [example(f"picture {n}", prompt=f"prompt {n}", images=one) for n, one in enumerate(images)]
    examples += [example(f"prompt {n}", prompt=item["prompt"], images=images[0]) for n, item in enumerate(items)]
    rules = Rules(0, benchmark_of([f"embedded:bench_{task}"], task, (), 0))
    _, rejected = selected(examples, look_at(examples, folder), rules)
    assert {one.example.id for one in rejected} == {one.id for one in examples}
    assert {one.detail for one in rejected} <= {"its image is the benchmark's", "its prompt is the benchmark's"}


def test_a_folder_that_is_no_benchmark_is_refused(tmp_path):
    assert benchmark_of([], "gen", (), 3) is None
    with pytest.raises(DataError, match="bench_v1"):
        benchmark_of([str(tmp_path)], "gen", (), 3)


def test_images_are_looked_at_once(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
    looked = []
    monkeypatch.setattr(select, "thumbnail", lambda image: looked.append(image.size) or b"1")
    found = look_at([example("1", "a.png"), example("2", "a.png")], tmp_path)
    assert set(found) == {"a.png"} and found["a.png"].thumbnail == b"1" and looked == [(9, 9)]


# The records that come in


def write(folder, lines):
    for name in ("1.png", "2.png"):
        Image.fromarray(np.full((8, 8, 3), int(name[0]) * 40, np.uint8)).save(folder / name)
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "records.jsonl"


def test_records_of_a_list(tmp_path):
    file = write(
        tmp_path,
        [
            {"prompt": "a cat", "image": "1.png"},
            {"id": "x", "caption": "a dog", "image": "2.png", "tag": "animal"},
            {"id": "x", "prompt": "again", "image": "2.png"},
            {"prompt": "two", "image": ["1.png", "2.png"]},
            {"prompt": "with one", "image": "1.png", "requirement": "no hat"},
            {"prompt": "none"},
        ],
    )
    found = read_records(file, "gen", 0.9, tmp_path / "unpacked")
    assert [(one.id, one.prompt, one.images, one.requirement) for one in found.records] == [
        ("1", "a cat", ("1.png",), ""), ("x", "a dog", ("2.png",), ""), ("5", "with one", ("1.png",), "no hat"),
    ]  # fmt: skip
    assert [bad.line for bad in found.quarantined] == [3, 4, 6]
    assert found.folder == tmp_path
    with pytest.raises(DataError, match="max_bad_fraction"):
        read_records(file, "gen", 0.01, tmp_path / "unpacked")


def test_records_of_edits_show_the_source_first(tmp_path):
    file = write(tmp_path, [{"prompt": "make it red", "image": "2.png", "source": "1.png"}])
    [one] = read_records(file, "edit", 0.0, tmp_path).records
    assert one.images == ("1.png", "2.png")


def test_records_of_parquet_bring_their_images_along(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write(tmp_path, [])
    content = {name: (tmp_path / f"{name}.png").read_bytes() for name in "12"}
    sources = [{"bytes": content["1"], "path": "x"}, {"bytes": None, "path": "1.png"}]
    sources += [{"bytes": b"no image", "path": None}, {"bytes": None, "path": "../1.png"}]
    names = ("make it red", "make it blue", "broken", "outside")
    image = {"bytes": content["2"], "path": None}
    rows = [{"prompt": name, "source": one, "image": image} for name, one in zip(names, sources, strict=True)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "records.parquet")
    found = read_records(tmp_path / "records.parquet", "edit", 0.6, tmp_path / "unpacked")
    assert [one.prompt for one in found.records] == ["make it red", "make it blue"]
    for one in found.records:
        assert [read_image_file(path, found.folder) for path in one.images] == [content["1"], content["2"]]
    assert [bad.line for bad in found.quarantined] == [3, 4]
    (tmp_path / "records.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_records(tmp_path / "records.parquet", "edit", 0.6, tmp_path / "unpacked")
