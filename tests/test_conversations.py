"""Conversation files: both spellings, what is refused and why, images opened late."""

import json

import pytest
from critic_miniature import picture
from PIL import Image

from firm_jax.data.conversations import ConversationFile
from firm_jax.errors import DataError


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
        ConversationFile(path)
    quarantine = tmp_path / "bad.jsonl"
    kept = ConversationFile(path, max_bad_fraction=0.5, quarantine_file=quarantine)
    assert len(kept) == 1 and reason in json.loads(quarantine.read_text())["reason"]


@pytest.mark.fault("hostile-image")
def test_an_image_that_cannot_be_decoded_is_named_with_its_line(tmp_path):
    path = write(tmp_path, [record()])
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:-30])
    with pytest.raises(DataError, match=r"train.jsonl, line 1: image 'a.png' is damaged"):
        ConversationFile(path)[0]


@pytest.mark.fault("hostile-image")
def test_images_are_looked_at_but_not_decoded_when_the_file_is_read(tmp_path, monkeypatch):
    path = write(tmp_path, [record()] * 3)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("the pixels were decoded"))
    assert len(ConversationFile(path)) == 3


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="not an existing"):
        ConversationFile(tmp_path / "none.jsonl")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match="not a JSON list"):
        ConversationFile(tmp_path / "broken.json")
