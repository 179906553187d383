"""Conversations written and read back: sharegpt and parquet, their shards, columns and damages."""

import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import hostile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from firm_jax.data.conversation_files import write_parquet, write_sharegpt
from firm_jax.data.conversations import IMAGE_MARK, Conversation, load_conversations
from firm_jax.errors import ConfigError, DataError, WorkdirError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

WRITERS = {"train.json": write_sharegpt, "train.jsonl": write_sharegpt, "train.parquet": write_parquet}


def pixels(seed: int, height: int = 3, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(seed: int, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(seed, 16, 24)).save(out, kind, **options)
    return out.getvalue()


def turns(images: int = 1, prompt: str = "rate it", answer: str = "\\boxed{4}") -> list[dict]:
    content = IMAGE_MARK * images + prompt
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def table(path: Path, rows: list[dict], **options) -> Path:
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def same(found: Conversation, written: Conversation) -> None:
    shown = [np.asarray(image) for image in found.images]
    assert len(shown) == len(written.images)
    assert all((a == b).all() for a, b in zip(shown, written.images, strict=True))
    assert (found.prompt, found.answer) == (written.prompt, written.answer)
    assert (found.criterion, found.id) == (written.criterion, written.id)


# Round trips

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), min_size=1).filter(
    lambda text: text.strip() and IMAGE_MARK not in text
)
LABEL = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
CONVERSATION = st.builds(
    Conversation,
    st.lists(st.builds(pixels, st.integers(0, 9), st.integers(1, 4), st.integers(1, 4)), max_size=3).map(tuple),
    TEXT | st.sampled_from(hostile.TEXTS),
    TEXT | st.sampled_from(hostile.TEXTS),
    LABEL,
    LABEL,
)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=15, deadline=None)
@given(written=st.lists(CONVERSATION, min_size=1, max_size=4))
def test_what_is_written_is_read_back_as_it_was(name, written):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        assert WRITERS[name](path, written) == len(written)
        found = load_conversations(path)
        for one, other in zip(found, written, strict=True):
            same(one, other)
        assert [found.text_length(i) for i in range(len(found))] == [len(c.prompt) + len(c.answer) for c in written]


@pytest.mark.parametrize("name", WRITERS)
def test_image_files_are_kept_as_they_are(tmp_path, name):
    """A turned JPEG goes through two formats and loses nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(1, "JPEG", exif=exif)
    write_parquet(tmp_path / "first.parquet", [Conversation((content, encoded(2)), "a", "b")])
    first = load_conversations(tmp_path / "first.parquet")
    assert first[0].images[0].size == (16, 24) and first[0].images[1].size == (24, 16)
    WRITERS[name](tmp_path / "out" / name, map(first.encoded, range(len(first))))
    second = load_conversations(tmp_path / "out" / name)
    assert second.encoded(0).images == (content, encoded(2))
    same(second[0], Conversation(tuple(np.asarray(i) for i in first[0].images), "a", "b"))


def test_the_sharegpt_file_is_what_llamafactory_reads_and_images_are_stored_once(tmp_path):
    shown = (pixels(0), pixels(1))
    write_sharegpt(
        tmp_path / "train.jsonl", [Conversation(shown, "p", "a", "execution", "7"), Conversation(shown, "q", "b")]
    )
    first, second = (json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines())
    assert first["messages"] == turns(2, "p", "a") and (first["criterion"], first["id"]) == ("execution", "7")
    assert first["images"] == second["images"] and set(second) == {"messages", "images"}
    assert sorted(first["images"]) == sorted(f"train_images/{name}" for name in os.listdir(tmp_path / "train_images"))
    assert sorted(os.listdir(tmp_path)) == ["train.jsonl", "train_images"]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (Conversation((), "an <image> in words", "a"), "holds 1"),
        (Conversation((), " ", "a"), "empty"),
        (Conversation((), "a", "\ud83d"), "surrogate"),
        (Conversation((), "a", "\0"), "NUL"),
        (Conversation((b"<html>",), "a", "b"), "not one of the formats"),
        (Conversation((np.zeros((2, 500, 3), np.uint8),), "a", "b"), "200 times"),
        (Conversation((np.full((2, 2, 3), np.nan),), "a", "b"), "NaN"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, name, conversation, reason):
    path = tmp_path / name
    path.write_text("as it was")
    with pytest.raises(DataError, match=f"conversation 1 cannot be written: .*{reason}"):
        WRITERS[name](path, [Conversation((), "a", "b"), conversation])
    assert path.read_text() == "as it was" and os.listdir(tmp_path) == [name]
    with pytest.raises(DataError, match="no conversation to write"):
        WRITERS[name](path, [])
    assert path.read_text() == "as it was"


def test_names_and_disks_that_take_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"\.json or \.jsonl"):
        write_sharegpt(tmp_path / "a.parquet", [])
    with pytest.raises(ConfigError, match=r"named \.parquet"):
        write_parquet(tmp_path / "a.jsonl", [])
    (tmp_path / "file").write_text("")
    for name, write in WRITERS.items():
        with pytest.raises(WorkdirError, match="cannot write to"):
            write(tmp_path / "file" / name, [Conversation((), "a", "b")])


# Parquet of others


@pytest.mark.parametrize("group", [1, 7, 100])
def test_rows_are_found_at_random_over_shards_and_row_groups(tmp_path, group):
    rows = [{"messages": turns(0, f"row {number}"), "id": number} for number in range(60)]
    for shard, (a, b) in enumerate([(0, 25), (25, 26), (26, 60)]):
        table(tmp_path / "data" / f"train-{shard:05d}-of-00003.parquet", rows[a:b], row_group_size=group)
    found = load_conversations(tmp_path)
    for index in np.random.default_rng(0).permutation(60).tolist() + list(range(60)):
        assert (found[index].prompt, found[index].id) == (f"row {index}", str(index))
    with pytest.raises(IndexError):
        found[60]


def test_images_as_paths_bytes_and_structs(tmp_path):
    Image.fromarray(pixels(3)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    forms = {
        "paths": ["a.png"],
        "bytes": [content],
        "structs": [{"bytes": content, "path": "not/there.png"}],
        "struct_paths": [{"bytes": None, "path": "a.png"}],
        "struct": {"bytes": content, "path": None},
        "path": "a.png",
        "file": content,
    }
    table(tmp_path / "a.parquet", [{"talk": turns(), **forms}])
    for form in forms:
        (found,) = load_conversations(tmp_path / "a.parquet", columns={"messages": "talk", "images": form})
        same(found, Conversation((pixels(3),), "rate it", "\\boxed{4}"))


def test_columns_that_are_not_there_are_told_with_those_that_are(tmp_path):
    path = table(tmp_path / "a.parquet", [{"talk": turns(0), "picture": b"", "n": 1}])
    with pytest.raises(DataError, match=r"no column messages or conversations .*are talk, picture, n; .*'messages'"):
        load_conversations(path)
    with pytest.raises(DataError, match="no column photo for the images"):
        load_conversations(path, columns={"messages": "talk", "images": "photo"})
    assert len(load_conversations(path, columns={"messages": "talk"})) == 1


def test_a_source_that_could_mean_two_things_is_refused(tmp_path):
    data = tmp_path / "data"
    for split in ("train", "validation"):
        table(data / f"{split}-00000-of-00001.parquet", [{"messages": turns(0, split)}])
    with pytest.raises(DataError, match=r"the splits train, validation\. Give one: '.*/data/train-\*\.parquet'"):
        load_conversations(tmp_path)
    (found,) = load_conversations(data / "validation-*.parquet")
    assert found.prompt == "validation"
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="each could be meant"):
        load_conversations(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"looked for train\.json, train\.jsonl and parquet files"):
        load_conversations(tmp_path / "empty")
    with pytest.raises(DataError, match="stands for 0 files"):
        load_conversations(data / "test-*.parquet")


@pytest.mark.fault("malformed-line", "hostile-image")
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF")
def test_half_of_a_table_broken(tmp_path):
    """Bombs, cut images, paths out of the folder, broken text: each is set aside, and the error counts them."""
    images = {name: content for name, (content, reason) in hostile.images().items() if reason is not None}
    bad = [{"messages": turns(), "images": [{"bytes": content, "path": None}]} for content in images.values()]
    outside = ["../a.png", "/etc/passwd", "http://a/b.png"]
    bad += [{"messages": turns(), "images": [{"bytes": None, "path": path}]} for path in outside]
    bad += [{"messages": turns(2), "images": [{"bytes": encoded(0), "path": None}]}, {"messages": None}]
    bad += [{"messages": turns(1, " "), "images": [{"bytes": encoded(0), "path": None}]}]
    good = {"messages": turns(), "images": [{"bytes": encoded(0), "path": None}]}
    path = table(tmp_path / "a.parquet", [row for one in bad for row in (good, one)])
    quarantine = tmp_path / "bad.jsonl"
    with pytest.raises(DataError, match=rf"a\.parquet: {len(bad)} of {2 * len(bad)} records .*like this\)"):
        load_conversations(path, quarantine_file=quarantine)
    lines = [json.loads(line)["line"] for line in quarantine.read_text().splitlines()]
    assert lines == list(range(2, 2 * len(bad) + 1, 2))
    found = load_conversations(path, max_bad_fraction=0.5)
    assert len(found) == len(bad) and found[3].images[0].size == (24, 16)


@pytest.mark.fault("malformed-line")
def test_text_that_is_not_utf8_is_set_aside(tmp_path):
    raw = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    rows = pyarrow.Table.from_pylist([{"messages": turns(0)}] * 2).append_column("id", raw)
    parquet.write_table(rows, tmp_path / "a.parquet")
    found = load_conversations(tmp_path / "a.parquet", max_bad_fraction=0.5)
    assert [(bad.line, bad.reason) for bad in found.quarantined] == [(2, "not UTF-8")] and found[0].id == "good"


@pytest.mark.parametrize("where", ["start", "middle", "end", "page"])
def test_a_damaged_file_is_refused(tmp_path, where):
    rows = [{"messages": turns(0, f"{number} " + os.urandom(500).hex())} for number in range(200)]
    path = table(tmp_path / "a.parquet", rows, compression="zstd")
    content = bytearray(path.read_bytes())
    if where == "page":
        content[1000:60_000] = os.urandom(59_000)
    else:
        content = content[{"start": slice(100, None), "middle": slice(len(content) // 2), "end": slice(-8)}[where]]
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"a\.parquet"):
        load_conversations(path)


def test_a_file_that_was_replaced_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("firm_jax.data.conversation_rows.MAX_OPEN", 1)
    for name in "ab":
        table(tmp_path / f"{name}.parquet", [{"messages": turns(0, f"{name}{n}")} for n in range(40)])
    found = load_conversations(tmp_path)
    assert found[60].prompt == "b20"
    shutil.copy(tmp_path / "b.parquet", tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has changed since it was read"):
        found[0]


def test_without_pyarrow(tmp_path, monkeypatch):
    path = table(tmp_path / "a.parquet", [{"messages": turns(0)}])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for use in (load_conversations, lambda path: write_parquet(path, [])):
        with pytest.raises(ConfigError, match=r"pip install 'firm-jax\[data\]'"):
            use(path)
