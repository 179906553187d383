"""Conversations in JSON: both spellings, what is refused and why, what changes afterwards."""

import json

import hostile
import pytest
from critic_miniature import picture

from firm_jax.data.conversations import load_conversations
from firm_jax.data.records import MalformedRecord
from firm_jax.errors import ConfigError, DataError


def record(**changes) -> dict:
    turns = [{"role": "user", "content": "<image>rate it"}, {"role": "assistant", "content": "\\boxed{4}"}]
    return {"messages": turns, "images": ["a.png"]} | changes


def write(folder, records, name="train.jsonl"):
    """The file, beside the picture that its records show."""
    picture(0, 5, 7).save(folder / "a.png")
    path = folder / name
    lines = [json.dumps(item) for item in records]
    path.write_text("\n".join(lines) if name.endswith("l") else "[" + ",\n".join(lines) + "]")
    return path


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_both_spellings(tmp_path, name):
    turns = [{"from": "human", "value": "<image><image>rate"}, {"from": "gpt", "value": "5"}]
    sharegpt = {"conversations": turns, "images": ["a.png", "a.png"]}
    conversations = load_conversations(write(tmp_path, [record(), sharegpt], name))
    assert len(conversations) == 2
    first, second = conversations[0], conversations[1]
    assert (first.prompt, first.answer, len(first.images)) == ("rate it", "\\boxed{4}", 1)
    assert (second.prompt, second.answer, len(second.images)) == ("rate", "5", 2)
    assert first.images[0].size == (5, 7)
    assert conversations.text_length(1) == len("rate5")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (record(images=[]), "one <image> for each of the 0 images"),
        (record(images=["a.png", "b.png"]), "one <image> for each of the 2 images"),
        (record(images=5), "images must be a list of paths"),
        (record(images=[["a.png"]]), "images must be a list of paths"),
        (record(images=[{"path": None}]), "images must be a list of paths"),
        (record(criterion=[]), "criterion is neither text"),
        ({"turns": [], "images": []}, "there are: turns, images"),
        (record(messages=record()["messages"] * 2), "one user turn and one assistant turn"),
        (record(messages=record()["messages"][::-1]), "one user turn and one assistant turn"),
        ([1], "not an object"),
        (record(messages=[{"role": ["user"], "content": "a"}, {"role": {}, "content": "b"}]), "one user turn"),
        (record(messages=[{"role": "user", "content": "<image>\ud83d"}, record()["messages"][1]]), "surrogate"),
        (record(messages=[{"role": "user", "content": "<image>a\0"}, record()["messages"][1]]), "NUL"),
        (record(score=float("nan")), "NaN"),
        (record(images=["missing.png"]), "image 'missing.png' does not exist"),
        (record(images=["../a.png"]), "leads out"),
        (record(images=["train.jsonl"]), "not one of the formats"),
    ],
)
@pytest.mark.fault("malformed-line")
def test_records_that_are_refused(tmp_path, broken, reason):
    path = write(tmp_path, [record(), broken])
    with pytest.raises(DataError, match=f"line 2: .*{reason}"):
        load_conversations(path)
    quarantine = tmp_path / "bad.jsonl"
    kept = load_conversations(path, max_bad_fraction=0.5, quarantine_file=quarantine)
    assert len(kept) == 1 and reason in json.loads(quarantine.read_text())["reason"]


@pytest.mark.fault("hostile-image")
def test_an_image_that_cannot_be_decoded_sets_its_record_aside(tmp_path):
    path = write(tmp_path, [record(), record(images=["b.png"])])
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    with pytest.raises(DataError, match=r"line 2: image 'b.png' is damaged"):
        load_conversations(path)
    assert len(load_conversations(path, max_bad_fraction=0.5)) == 1


@pytest.mark.fault("hostile-image")
def test_what_changes_after_it_was_read_is_named(tmp_path):
    path = write(tmp_path, [record(), record()])
    conversations = load_conversations(path)
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:-30])
    with pytest.raises(DataError, match=r"train.jsonl, line 2: image 'a.png' is damaged"):
        conversations[1]
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl has changed since it was read"):
        conversations[0]


def test_lines_are_found_again_wherever_they_lie(tmp_path):
    """Blank lines, carriage returns and a line of several megabytes before them."""
    path = write(tmp_path, [])
    lines = [json.dumps(record(id=number)) for number in range(4)]
    path.write_text(lines[0] + "\r\n\n \n" + lines[1] + "\n" + "x" * 3_000_000 + "\n" + lines[2] + "\n" + lines[3])
    conversations = load_conversations(path, max_bad_fraction=0.5)
    assert [conversations[index].id for index in (3, 1, 0, 2)] == ["3", "1", "0", "2"]
    assert [bad.line for bad in conversations.quarantined] == [2, 3, 5]


def test_a_source_with_half_its_records_broken_is_refused_with_reasons_and_counts(tmp_path):
    broken = [record(images=[f"{number}.png"]) for number in range(4)]
    broken += [record(images=[]), record(images=["a.png", "a.png"]), {"n": 1}]
    path = write(tmp_path, [row for bad in broken for row in (record(), bad)])
    with pytest.raises(DataError) as error:
        load_conversations(path, max_bad_fraction=0.4, quarantine_file=tmp_path / "bad.jsonl")
    told = str(error.value)
    assert "7 of 14 records cannot be used" in told
    assert "line 2: image '0.png' does not exist. Correct the record or leave it out. (4 like this)" in told
    assert "for each of the 0 images, and holds 1 (2 like this)" in told and "line 14: no messages" in told
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 7
    assert len(load_conversations(path, max_bad_fraction=0.5)) == 7


def test_a_check_sets_aside_what_a_caller_cannot_use(tmp_path):
    def check(conversation):
        assert conversation.images[0].size == (5, 7)
        if conversation.criterion == "quality":
            raise MalformedRecord("of no use here")

    path = write(tmp_path, [record(criterion="quality"), record(criterion="alignment", id="x")])
    conversations = load_conversations(path, max_bad_fraction=0.5, check=check)
    assert [(c.criterion, c.id) for c in conversations] == [("alignment", "x")]
    assert [(bad.line, bad.reason) for bad in conversations.quarantined] == [(1, "of no use here")]


def test_columns_of_other_names_and_a_folder_of_images_elsewhere(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    renamed = {"talk": record()["messages"], "shown": "a.png", "axis": "execution"}
    path = write(tmp_path, [renamed]).rename(elsewhere / "train.jsonl")
    columns = {"messages": "talk", "images": "shown", "criterion": "axis"}
    (conversation,) = load_conversations(path, image_folder=tmp_path, columns=columns)
    assert (conversation.prompt, conversation.criterion, len(conversation.images)) == ("rate it", "execution", 1)
    with pytest.raises(DataError, match=r"'a\.png' does not exist"):
        load_conversations(elsewhere, columns=columns)


@pytest.mark.fault("hostile-text")
def test_special_tokens_are_text(tmp_path):
    rows = []
    for text in hostile.TEXTS:
        turns = [{"role": "user", "content": "<image>" + text}, {"role": "assistant", "content": text}]
        rows.append(record(messages=turns))
    conversations = load_conversations(write(tmp_path, rows))
    assert [(c.prompt, c.answer) for c in conversations] == [(text, text) for text in hostile.TEXTS]


def test_files_that_cannot_be_read(tmp_path):
    for name in ("none.jsonl", "none.parquet", "", "none"):
        with pytest.raises(DataError, match="not an existing"):
            load_conversations(tmp_path / name if name else "")
    with pytest.raises(ConfigError, match="columns names picture; what a conversation has is messages, images"):
        load_conversations(write(tmp_path, [record()]), columns={"picture": "image"})
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match="not a JSON list"):
        load_conversations(tmp_path / "broken.json")
