"""Conversation files: both spellings, what is refused and why, images opened late."""

import json

import pytest
from critic_miniature import picture

from firm_jax.data.conversations import ConversationFile
from firm_jax.errors import DataError


def record(**changes) -> dict:
    turns = [{"role": "user", "content": "<image>rate it"}, {"role": "assistant", "content": "\\boxed{4}"}]
    return {"messages": turns, "images": ["a.png"]} | changes


def write(folder, records, name="train.jsonl"):
    path = folder / name
    lines = [json.dumps(item) for item in records]
    path.write_text("\n".join(lines) if name.endswith("l") else "[" + ",\n".join(lines) + "]")
    return path


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_both_spellings(tmp_path, name):
    picture(0, 5, 7).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image><image>rate"}, {"from": "gpt", "value": "5"}]
    sharegpt = {"conversations": turns, "images": ["a.png", "a.png"]}
    conversations = ConversationFile(write(tmp_path, [record(), sharegpt], name))
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
        (record(images="a.png"), "list of paths"),
        (record(messages=record()["messages"] * 2), "one user turn and one assistant turn"),
        (record(messages=record()["messages"][::-1]), "one user turn and one assistant turn"),
        ([1], "not an object"),
    ],
)
def test_records_that_are_refused(tmp_path, broken, reason):
    path = write(tmp_path, [record(), broken])
    with pytest.raises(DataError, match=f"line 2: .*{reason}"):
        ConversationFile(path)
    quarantine = tmp_path / "bad.jsonl"
    kept = ConversationFile(path, max_bad_fraction=0.5, quarantine_file=quarantine)
    assert len(kept) == 1 and reason in json.loads(quarantine.read_text())["reason"]


def test_an_image_that_is_missing_is_named_with_its_line(tmp_path):
    conversations = ConversationFile(write(tmp_path, [record()]))
    with pytest.raises(DataError, match=r"train.jsonl, line 1: image 'a.png' does not exist"):
        conversations[0]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="not an existing"):
        ConversationFile(tmp_path / "none.jsonl")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match="not a JSON list"):
        ConversationFile(tmp_path / "broken.json")
