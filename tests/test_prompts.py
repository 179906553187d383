import io
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firm_jax.data import records
from firm_jax.data.prompts import PromptRecord, load_prompts, merge_duplicates, read_prompts, split_prompts
from firm_jax.data.records import MAX_RECORD_BYTES
from firm_jax.errors import ConfigError, DataError, WorkdirError

REAL_PROMPTS = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real_prompts = pytest.mark.skipif(
    not REAL_PROMPTS.is_dir(), reason="the published prompt files are not beside the project (../shared/data)"
)


def write(path: Path, content: str | bytes | list) -> str:
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def texts(found: list[PromptRecord]) -> list[str]:
    return [record.text for record in found]


# Formats


def test_text_file(tmp_path):
    path = write(tmp_path / "p.txt", "A Cat, \tsitting\r\nein Hündchen ☃\n  two dogs \n\n \n")
    found, quarantined = read_prompts(path)
    # Kept as they are, but for the line end; blank lines at the end of a file are no prompts.
    assert texts(found) == ["A Cat, \tsitting", "ein Hündchen ☃", "  two dogs "]
    assert [record.line for record in found] == [1, 2, 3]
    assert {record.source_file for record in found} == {path}
    assert not quarantined


def test_only_line_feeds_separate_prompts(tmp_path):
    found, _ = read_prompts(write(tmp_path / "p.txt", "one\u2028still one\x0band one\ntwo"))
    assert texts(found) == ["one\u2028still one\x0band one", "two"]


def test_sharegpt_list(tmp_path):
    rows = [
        {"input_prompt": "a", "caption": "not this", "requirement": "be red", "source": "web", "category": 3},
        {"caption": "b", "text": "not this", "requirement": None},
        {"input_prompt": None, "prompt": "c"},
        {"text": "d\nwith a second line"},
    ]
    path = write(tmp_path / "text_to_image.json", json.dumps(rows, indent=1))
    found, quarantined = read_prompts(path)
    assert texts(found) == ["a", "b", "c", "d\nwith a second line"]
    assert [record.requirement for record in found] == ["be red", "", "", ""]
    assert found[0].metadata == {"caption": "not this", "source": "web", "category": 3}
    lines = Path(path).read_text().splitlines()
    assert all(lines[record.line - 1].strip() == "{" for record in found)  # the lines on which the objects begin
    assert not quarantined


def test_plain_and_geneval_lines(tmp_path):
    item = {"class": "dog", "count": 2}
    rows = [
        {"prompt": "two dogs", "tag": "counting", "include": [item], "exclude": [item | {"count": 3}]},
        {"text": "x", "y": 1},
    ]
    found, _ = read_prompts(write(tmp_path / "p.jsonl", rows))
    assert found[0].metadata == {"tag": "counting", "include": [item], "exclude": [item | {"count": 3}]}
    assert found[1] == PromptRecord("x", "", {"y": 1}, str(tmp_path / "p.jsonl"), 2)


def test_group_key_is_the_whole_prompt():
    long = "word " * 400
    different = [
        PromptRecord("A cat"),
        PromptRecord("a cat"),
        PromptRecord("A cat", "red"),
        PromptRecord(long + "x"),
    ]
    assert len({record.group_key for record in [*different, PromptRecord(long + "y")]}) == 5
    assert (
        PromptRecord("a", line=1, source_file="f").group_key == PromptRecord("a", line=2, metadata={"k": 1}).group_key
    )


# Split, duplicates, folders


@pytest.mark.parametrize("count", [2, 3, 49, 50, 51, 100, 1234])
def test_split_is_the_published_one(count):
    prompts = [PromptRecord(str(index)) for index in range(count)]
    indices = list(range(count))
    random.Random(42).shuffle(indices)
    train, held_out = split_prompts(prompts)
    assert texts(train) == [str(index) for index in indices[: int(count * 0.98)]]
    assert texts(held_out) == [str(index) for index in indices[int(count * 0.98) :]]
    assert train and held_out


def test_split_order_for_seven_prompts():
    # random.Random(42).shuffle([0..6]), written out: the order may not depend on the Python version.
    train, held_out = split_prompts([PromptRecord(str(index)) for index in range(7)])
    assert texts(train) + texts(held_out) == ["1", "3", "4", "2", "6", "0", "5"]


def test_one_prompt_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match="at least two prompts, or a separate held-out source"):
        load_prompts(write(tmp_path / "p.txt", "a\na\n"))


def test_duplicates_are_merged_before_the_split(tmp_path):
    rows = [{"text": f"p{index % 60}", "requirement": "r" if index >= 60 else "", "n": index} for index in range(180)]
    splits = load_prompts(write(tmp_path / "p.jsonl", rows))
    assert splits.duplicates_merged == 60
    assert len(splits.train) + len(splits.held_out) == 120
    assert not {record.group_key for record in splits.train} & {record.group_key for record in splits.held_out}
    assert all(record.line <= 120 for record in splits.train + splits.held_out)  # the first of each is kept
    assert merge_duplicates([]) == []


def test_separate_held_out_source(tmp_path):
    train = write(tmp_path / "a.txt", "one\ntwo\nthree\n")
    held_out = write(tmp_path / "b.txt", "four\none\nfour\n")
    splits = load_prompts(train, held_out_source=held_out)
    assert texts(splits.train) == ["one", "two", "three"]
    assert texts(splits.held_out) == ["four", "one"]
    assert (splits.duplicates_merged, splits.shared) == (1, 1)


def test_folders(tmp_path):
    write(tmp_path / "train.txt", "one\ntwo\n")
    assert len(load_prompts(tmp_path).held_out) == 1  # split
    write(tmp_path / "test_metadata.jsonl", [{"prompt": "three"}, {"prompt": "four"}])
    splits = load_prompts(tmp_path)
    assert (texts(splits.train), texts(splits.held_out)) == (["one", "two"], ["three", "four"])
    write(tmp_path / "train_metadata.jsonl", [{"prompt": "five"}])
    with pytest.raises(DataError, match=r"train\.txt and .*train_metadata\.jsonl could both be meant"):
        load_prompts(tmp_path)
    (tmp_path / "train.txt").unlink()
    (tmp_path / "train_metadata.jsonl").unlink()
    with pytest.raises(DataError, match=r"looked for train\.txt, train_metadata\.jsonl and text_to_image\.json"):
        load_prompts(tmp_path)
    (tmp_path / "test_metadata.jsonl").unlink()
    write(tmp_path / "text_to_image.json", json.dumps([{"input_prompt": str(index)} for index in range(100)]))
    assert len(load_prompts(tmp_path).train) == 98


# Bad input

BAD_LINES = {
    b'{"prompt": "a"': "not JSON: Expecting ',' delimiter at column 15",
    b'{"prompt": "a"} {}': "not JSON: Extra data",
    b'\xef\xbb\xbf{"prompt": "a"}': "byte order mark",
    b'{"prompt": "a\xef\xbb\xbf"}': "byte order mark",
    b'{"prompt": "a\\ufeff"}': "byte order mark",
    b'{"prompt": "a\x00b"}': "NUL",
    b'{"prompt": "a\\u0000b"}': "NUL",
    b'{"prompt": "a", "requirement": "\\u0000"}': "NUL",
    b'{"prompt": "a\xff"}': "not UTF-8",
    '{"prompt": "a"}'.encode("utf-16"): "not UTF-8",
    b'{"prompt": "\\ud83d"}': "surrogate",
    b'{"prompt": 5}': "prompt is a number, not text",
    b'{"caption": ["a"]}': "caption is a list, not text",
    b'{"prompt": {"a": 1}}': "prompt is an object, not text",
    b'{"prompt": true}': "prompt is a boolean, not text",
    b'{"prompt": "a", "requirement": 1}': "requirement is a number, not text",
    b'{"prompt": "a", "requirement": " "}': "empty",
    b'{"prompt": null}': "no prompt: none of the keys input_prompt, caption, prompt, text",
    b'{"promt": "a"}': "no prompt",
    b'{"prompt": ""}': "empty",
    b'{"prompt": " \\n"}': "empty",
    b'["a"]': "a list instead of an object",
    b'"a"': "text instead of an object",
    b"null": "null instead of an object",
    b"": "empty",
    b" \t": "empty",
    b'{"prompt": "a", "x": NaN}': "NaN",
    b'{"prompt": "a", "x": ' + b"1" * 5000 + b"}": "number out of range",
    b'{"prompt": "a", "x": ' + b"[" * 200_000 + b"}": "nested too deeply",
    b'{"prompt": "a", "include": []}': "without a tag",
    b'{"prompt": "a", "tag": "colors", "include": {}}': "include is an object, not a list",
    b'{"prompt": "a", "tag": "colors", "include": [{"class": "x"}]}': "include holds an item without",
    b'{"prompt": "a", "tag": "colors", "include": [{"class": "x", "count": "2"}]}': "whole count",
    b'{"prompt": "a", "tag": "counting", "include": [], "exclude": [1]}': "exclude holds an item",
    b'{"prompt": "' + b"a" * MAX_RECORD_BYTES + b'"}': "longer than 1048576 bytes",
}


@pytest.mark.fault("malformed-line")
@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=[reason[:30] for reason in BAD_LINES.values()])
def test_a_malformed_line_is_quarantined(tmp_path, line, reason):
    path = write(tmp_path / "p.jsonl", b'{"prompt": "first"}\n' + line + b'\n{"prompt": "third"}\n')
    found, quarantined = read_prompts(path)
    assert [(record.text, record.line) for record in found] == [("first", 1), ("third", 3)]
    assert [(bad.file, bad.line) for bad in quarantined] == [(path, 2)]
    assert reason in quarantined[0].reason


def test_malformed_text_lines(tmp_path):
    found, quarantined = read_prompts(write(tmp_path / "p.txt", b"\xef\xbb\xbfone\ntwo\n\nfo\0ur\n\xfffive\nsix"))
    assert texts(found) == ["two", "six"]
    assert [bad.line for bad in quarantined] == [1, 3, 4, 5]


def test_bad_elements_of_a_list_are_quarantined(tmp_path):
    last_line = '{"prompt": "c", "x": NaN}, {"prompt": "\\ufeff"}, {"prompt": "d"}]'
    document = f'[\n{{"prompt": "a"}},\n{{"prompt": 1}},\n\n"b",\n{last_line}'
    found, quarantined = read_prompts(write(tmp_path / "p.json", document))
    assert [(record.text, record.line) for record in found] == [("a", 2), ("d", 6)]
    assert [bad.line for bad in quarantined] == [3, 5, 6, 6]


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (b'{"prompt": "a"}', "not a JSON list"),
        (b"", "not a JSON list"),
        (b'[\n{"prompt": "a"}\n{"prompt": "b"}]', "Expecting ',' delimiter at line 3 column 1"),
        (b'[{"prompt": "a"}', "Expecting ',' delimiter"),
        (b'[{"prompt": "a"},]', "Expecting value at line 1"),
        (b'[{"prompt": "a"}] x', "Extra data"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[1" + b"1" * 5000 + b"]", "number out of range"),
        (b'\xef\xbb\xbf[{"prompt": "a"}]', "byte order mark"),
        ('[{"prompt": "a"}]'.encode("utf-16"), "not UTF-8"),
        (b"[]", "is empty"),
    ],
    ids=range(11),
)
def test_a_document_that_is_no_list_is_refused(tmp_path, document, problem):
    with pytest.raises(DataError, match=problem) as error:
        load_prompts(write(tmp_path / "p.json", document))
    assert "p.json" in str(error.value)


def test_a_huge_line_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1000)
    sizes = []

    class Watched(io.FileIO):
        def readline(self, limit):
            sizes.append(limit)
            return super().readline(limit)

    path = write(tmp_path / "p.txt", b"one\n" + b"x" * 50_000 + b"\ntwo\n" + b"y" * 1000 + b"\r\n" + b"z" * 1001)
    monkeypatch.setattr(records, "open", lambda path, _: Watched(path), raising=False)
    found, quarantined = read_prompts(path)
    assert texts(found) == ["one", "two", "y" * 1000]
    assert [(bad.line, bad.reason) for bad in quarantined] == [
        (2, "longer than 1000 bytes"),
        (5, "longer than 1000 bytes"),
    ]
    assert max(sizes) <= 1002


@pytest.mark.fault("malformed-line")
@pytest.mark.parametrize("bad", [1, 2])
def test_the_budget(tmp_path, bad):
    lines = [json.dumps({"prompt": f"p{index}"}) for index in range(1000 - bad)] + ["{"] * bad
    path = write(tmp_path / "p.jsonl", "\n".join(lines))
    quarantine = tmp_path / "quarantine.jsonl"
    if bad == 1:  # 0.1 % are tolerated
        splits = load_prompts(path, quarantine_file=quarantine)
        assert len(splits.train) + len(splits.held_out) == 999
        assert len(splits.quarantined) == 1
    else:
        with pytest.raises(
            DataError, match=r"2 of 1000 records .* line 999: not JSON.* \(2 like this\).*max_bad_fraction"
        ) as error:
            load_prompts(path, quarantine_file=quarantine)
        assert path in str(error.value)
        assert load_prompts(path, max_bad_fraction=0.002).train
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rows] == [(path, line) for line in range(1001 - bad, 1001)]
    assert all(row["reason"].startswith("not JSON") for row in rows)


def test_the_budget_is_inclusive(tmp_path):
    path = write(tmp_path / "p.jsonl", "{\n" * 29 + "".join(f'{{"prompt": "{index}"}}\n' for index in range(71)))
    assert len(load_prompts(path, max_bad_fraction=0.29).quarantined) == 29  # although 0.29 * 100 is below 29


def test_a_corrected_file_leaves_no_quarantine_behind(tmp_path):
    quarantine = tmp_path / "quarantine.jsonl"
    path = write(tmp_path / "p.txt", "a\n\nb\nc\n")
    load_prompts(path, max_bad_fraction=0.5, quarantine_file=quarantine)
    assert quarantine.exists()
    load_prompts(write(tmp_path / "p.txt", "a\nb\nc\n"), quarantine_file=quarantine)
    assert not quarantine.exists()


def test_many_bad_lines_give_a_short_error(tmp_path):
    with pytest.raises(DataError, match="1000 like this") as error:
        load_prompts(write(tmp_path / "p.jsonl", "{\n" * 1000), max_bad_fraction=0.99)
    assert len(str(error.value)) < 1000


def test_budget_holds_for_the_held_out_source_too(tmp_path):
    with pytest.raises(DataError, match=r"test\.txt: 1 of 3"):
        load_prompts(write(tmp_path / "a.txt", "a\nb\n"), held_out_source=write(tmp_path / "test.txt", "c\n\nd\n"))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_budget_out_of_range(tmp_path, fraction):
    with pytest.raises(ConfigError, match="max_bad_fraction"):
        load_prompts(write(tmp_path / "a.txt", "a\nb\n"), max_bad_fraction=fraction)


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist\. Give a \.txt"):
        load_prompts(tmp_path / "nowhere.txt")
    for content in ("", "\n\n  \n"):
        with pytest.raises(DataError, match=r"p\.txt is empty"):
            load_prompts(write(tmp_path / "p.txt", content))
    with pytest.raises(DataError, match=r"unknown ending '\.csv'. Supported are \.txt, \.jsonl, \.json"):
        load_prompts(write(tmp_path / "p.csv", "a"))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="not a regular file"):
        load_prompts(tmp_path / "pipe.txt")
    with pytest.raises(WorkdirError, match="quarantine file"):
        load_prompts(write(tmp_path / "p.txt", "a\n\nb"), quarantine_file=tmp_path / "missing" / "q.jsonl")


@pytest.mark.fault("malformed-line")
@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(
        st.binary(max_size=40) | st.sampled_from(sorted(line for line in BAD_LINES if len(line) < 200)),
        max_size=8,
    )
)
@pytest.mark.parametrize("ending", [".txt", ".json", ".jsonl"])
def test_any_bytes_are_read_or_accounted_for(tmp_path_factory, lines, ending):
    path = tmp_path_factory.getbasetemp() / f"fuzz{ending}"
    path.write_bytes(b"\n".join(lines))
    try:
        found, quarantined = read_prompts(path)
    except DataError:
        assert ending == ".json"
        return
    assert all(record.text.strip() and "\0" not in record.text for record in found)
    json.dumps([[record.text, record.requirement, record.metadata] for record in found], ensure_ascii=False).encode()
    if ending != ".json":
        numbers = sorted([record.line for record in found] + [bad.line for bad in quarantined])
        used = b"\n".join(lines).split(b"\n")
        while used and not used[-1].strip():
            used.pop()
        assert numbers == list(range(1, len(used) + 1))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "text", "tag", "include", "x"]), inner)
    ),
    max_leaves=8,
)


@pytest.mark.fault("malformed-line")
@settings(max_examples=60, deadline=None)
@given(values=st.lists(JSON_VALUES, max_size=5))
def test_any_json_reads_the_same_as_a_list_and_as_lines(tmp_path_factory, values):
    folder = tmp_path_factory.getbasetemp()
    as_list, bad_in_list = read_prompts(write(folder / "same.json", json.dumps(values)))
    as_lines, bad_in_lines = read_prompts(write(folder / "same.jsonl", values))
    assert len(as_list) + len(bad_in_list) == len(values)
    assert [(record.group_key, record.metadata) for record in as_list] == [
        (record.group_key, record.metadata) for record in as_lines
    ]
    assert [bad.reason for bad in bad_in_list] == [bad.reason for bad in bad_in_lines]


# The published files


@needs_real_prompts
@pytest.mark.parametrize(
    ("name", "count", "distinct"),
    [("drawbench_test.txt", 1000, 200), ("pickscore_test.txt", 2048, 2048), ("ocr_test.txt", 1018, 1018)],
)
def test_published_text_files(name, count, distinct):
    found, quarantined = read_prompts(REAL_PROMPTS / name)
    assert len(found) == count
    assert not quarantined
    splits = load_prompts(REAL_PROMPTS / name)
    assert len(splits.train) == int(distinct * 0.98)
    assert len(splits.train) + len(splits.held_out) == distinct
    assert splits.duplicates_merged == count - distinct


@needs_real_prompts
def test_published_geneval_file():
    found, quarantined = read_prompts(REAL_PROMPTS / "geneval_test_metadata.jsonl")
    assert len(found) == 2212
    assert not quarantined
    assert Counter(record.metadata["tag"] for record in found) == {
        "color_attr": 400,
        "position": 400,
        "two_object": 396,
        "colors": 376,
        "counting": 320,
        "single_object": 320,
    }
    assert sum("exclude" in record.metadata for record in found) == 320
    splits = load_prompts(REAL_PROMPTS / "geneval_test_metadata.jsonl")
    assert (len(splits.train), len(splits.held_out), splits.duplicates_merged) == (541, 12, 1659)


# TensorFlow Datasets


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    from PIL import Image

    folder = tmp_path_factory.mktemp("tfds")
    Image.new("RGB", (4, 4)).save(folder / "image.png")
    rows = [
        {"caption": b"a caf\xc3\xa9", "note": "x", "requirement": "be red"},
        {"caption": "a dog", "note": "", "requirement": ""},
        {"caption": "", "note": "y", "requirement": ""},
    ]

    class FirmJaxPrompts(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "caption": tfds.features.Text(),
                        "note": tfds.features.Text(),
                        "requirement": tfds.features.Text(),
                        "kind": tfds.features.ClassLabel(names=["a", "b"]),
                        "tags": tfds.features.Sequence({"tag": tfds.features.Text()}),
                        "image": tfds.features.Image(shape=(None, None, 3)),
                    }
                ),
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples(), "validation": self._generate_examples(rows[:1])}

        def _generate_examples(self, rows=rows):
            for index, row in enumerate(rows):
                yield index, {**row, "kind": "b", "tags": [{"tag": "t"}], "image": str(folder / "image.png")}

    FirmJaxPrompts(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_dataset(dataset_folder):
    found, quarantined = read_prompts(f"tfds:firm_jax_prompts?data_dir={dataset_folder}")
    assert sorted(texts(found)) == ["a café", "a dog"]
    record = next(record for record in found if record.text == "a café")
    assert record.requirement == "be red"
    assert record.metadata == {"note": "x", "kind": 1}
    assert [bad.reason for bad in quarantined] == ["empty"]
    assert sorted([record.line for record in found] + [bad.line for bad in quarantined]) == [1, 2, 3]
    assert "tensorflow" not in sys.modules


def test_dataset_split_and_column(dataset_folder):
    found, _ = read_prompts(f"tfds:firm_jax_prompts?split=validation&text=note&data_dir={dataset_folder}")
    assert [(record.text, record.metadata) for record in found] == [("x", {"caption": "a café", "kind": 1})]


@pytest.mark.parametrize(
    ("name", "problem", "error"),
    [
        ("no_such_prompts", "not found", DataError),
        ("../x", "failed", DataError),
        ("firm_jax_prompts?data_dir={folder}&split=dev", "Unknown split 'dev'.*'train'", DataError),
        (
            "firm_jax_prompts?data_dir={folder}&text=kind",
            "'kind' is no text column.*caption, note, requirement",
            DataError,
        ),
        ("firm_jax_prompts?column=note", "unknown option column", ConfigError),
    ],
)
def test_dataset_that_cannot_be_read(dataset_folder, name, problem, error):
    with pytest.raises(error, match=problem):
        read_prompts("tfds:" + name.format(folder=dataset_folder))


def test_dataset_that_is_not_prepared(dataset_folder, tmp_path):
    with pytest.raises(DataError, match=r"tfds build firm_jax_prompts --file_format=array_record"):
        read_prompts(f"tfds:firm_jax_prompts?data_dir={tmp_path}")


def test_dataset_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'firm-jax\[tfds\]'"):
        load_prompts("tfds:coco_captions?split=val")
