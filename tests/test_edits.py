"""The reader of editing runs: formats, images that cannot be used, groups of instruction and image."""

import dataclasses
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import hostile
import numpy as np
import pytest
from PIL import Image

from firm_jax.data.edits import EditRecord, convert_edits, load_edits, read_edits
from firm_jax.data.groups import PromptGroups
from firm_jax.errors import CheckpointError, ConfigError, DataError


def picture(number: int, width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        picture(number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(number=0, prompt="make it red", **fields) -> dict:
    return {"prompt": prompt, "image": f"images/{number}.png", **fields}


def read(folder, rows, **options):
    return read_edits(write(folder / "train_metadata.jsonl", rows), **({"max_images": 2} | options))


# Formats


def test_metadata_lines(folder):
    rows = [row(0, requirement="keep the sky", tag="recolor"), row(1, image=["images/1.png", "images/2.png"])]
    (first, second), quarantined = read(folder, rows)
    assert not quarantined
    assert (first.text, first.requirement, first.metadata, first.line) == (
        "make it red",
        "keep the sky",
        {"tag": "recolor"},
        1,
    )
    assert [(image.name, image.width, image.height) for image in first.images] == [("images/0.png", 24, 16)]
    assert (np.asarray(first.images[0].open()) == np.asarray(picture(0))).all()
    assert [image.name for image in second.images] == ["images/1.png", "images/2.png"]
    assert (np.asarray(second.images[1].open()) == np.asarray(picture(2))).all()


def test_a_list_is_read_and_converted_to_lines_that_read_the_same(folder):
    rows = [
        {"input_prompt": "make it ré", "input_image": ["images/0.png"], "output_image": "x.png"},
        row(1),
        {"input_prompt": "join them", "input_image": ["images/2.png", "images/3.png"], "requirement": "no frame"},
        {"input_prompt": "no image", "input_image": []},
    ]
    path = folder / "text_and_image_to_image.json"
    path.write_text(json.dumps(rows, indent=1))
    found, quarantined = read_edits(path, max_images=2)
    written, left_out = convert_edits(path, folder / "train_metadata.jsonl")
    assert written == len(found) == 3 and left_out == quarantined
    assert "without an image" in quarantined[0].reason
    again, none = read_edits(folder / "train_metadata.jsonl", max_images=2)
    assert not none
    assert [(r.group_key, r.metadata) for r in again] == [(r.group_key, r.metadata) for r in found]
    lines = [json.loads(line) for line in (folder / "train_metadata.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "prompt": "make it ré",
        "image": "images/0.png",
        "requirement": "",
        "output_image": "x.png",
    }
    assert lines[2]["image"] == ["images/2.png", "images/3.png"]
    command = [sys.executable, "-m", "firm_jax.data.edits", str(path), str(folder / "again.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])
    assert "3 edits written" in done.stdout and "without an image" in done.stderr, done
    assert (folder / "again.jsonl").read_text() == (folder / "train_metadata.jsonl").read_text()


def test_a_folder_and_a_folder_of_images_elsewhere(folder):
    write(folder / "train_metadata.jsonl", [row(0), row(1), row(0)])
    write(folder / "test_metadata.jsonl", [row(2), row(1)])
    splits = load_edits(folder, max_images=1)
    assert [[record.images[0].name for record in part] for part in (splits.train, splits.held_out)] == [
        ["images/0.png", "images/1.png"],
        ["images/2.png", "images/1.png"],
    ]
    assert (splits.duplicates_merged, splits.shared) == (1, 1)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    path = write(elsewhere / "test_metadata.jsonl", [row(0), row(1)])
    assert len(read_edits(path, max_images=1, image_folder=folder)[0]) == 2
    assert len(read_edits(path, max_images=1)[1]) == 2
    with pytest.raises(DataError, match=r"looked for train_metadata\.jsonl and text_and_image_to_image\.json"):
        load_edits(elsewhere, max_images=1)


# Bad input


@pytest.mark.fault("malformed-line")
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"prompt": "make it red"}, "an instruction without an image"),
        ({"prompt": "make it red", "image": None}, "an instruction without an image"),
        ({"prompt": "make it red", "image": []}, "an instruction without an image"),
        ({"image": "images/0.png"}, "an image without an instruction"),
        ({"image": "images/0.png", "prompt": None}, "an image without an instruction"),
        (row(prompt=" "), "empty"),
        (row(prompt=["a"]), "prompt is a list, not text"),
        (row(image=5), "image is neither a path nor a list of paths"),
        (row(image=["images/0.png", 5]), "image is neither"),
        (row(image=["images/0.png", " "]), "empty"),
        (row(image=[f"images/{n}.png" for n in range(3)]), "3 source images, more than the 2 that the model takes"),
        (row(requirement=3), "requirement is a number, not text"),
        (["images/0.png"], "a list instead of an object"),
        ('{"prompt": "a", "image": "x", "image": "y"}', "names the key 'image' twice"),
        ('{"prompt": "a", "image": "images/0.png"', "not JSON"),
    ],
)
def test_a_malformed_record_is_set_aside(folder, line, reason):
    found, quarantined = read(folder, [row(0), line, row(1)])
    assert [record.line for record in found] == [1, 3]
    assert [bad.line for bad in quarantined] == [2] and reason in quarantined[0].reason


@pytest.mark.fault("hostile-image")
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF")
def test_every_image_is_looked_at_before_the_run(folder, tmp_path_factory):
    reasons = {}
    for name, (content, reason) in hostile.images().items():
        (folder / name).write_bytes(content)
        reasons[name] = reason
    found = [name for name, reason in reasons.items() if reason is None]
    small = [name for name in found if min(Image.open(folder / name).size) < 16]
    reasons |= dict.fromkeys(small, "one latent token takes 16")
    for name, size in {"token.png": (16, 16), "long.png": (128, 16)}.items():
        picture(0, *size).save(folder / name)
        reasons[name] = None
    for name, size in {"thin.png": (15, 40), "longer.png": (129, 16), "tall.png": (16, 129)}.items():
        picture(0, *size).save(folder / name)
        reasons[name] = "one latent token takes 16" if 15 in size else "8 times"
    reasons |= {"missing.png": "does not exist", "images": "regular file"}
    quarantine = folder / "quarantine.jsonl"
    write(folder / "test_metadata.jsonl", [row()])
    write(folder / "train_metadata.jsonl", [row(image=name, prompt=f"edit {name}") for name in reasons])
    splits = load_edits(folder, max_images=1, max_bad_fraction=0.99, quarantine_file=quarantine)
    usable = [name for name, reason in reasons.items() if reason is None]
    assert [record.images[0].name for record in splits.train] == usable and "token.png" in usable
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    said = [json.loads(line)["reason"] for line in quarantine.read_text().splitlines()]
    assert len(said) == len(refused)
    for (name, reason), text in zip(refused.items(), said, strict=True):
        assert reason in text and name in text and str(folder) not in text
    with pytest.raises(DataError, match=r"more than the 0\.10% that max_bad_fraction allows"):
        load_edits(folder, max_images=1)


@pytest.mark.fault("escaping-path")
@pytest.mark.parametrize(
    "path",
    ["../outside.png", "/etc/passwd", "images/../../outside.png", "link.png", "http://a/b.png", "file:x", "a\\u0000b"],
)
def test_a_path_out_of_the_folder_is_set_aside(folder, path):
    inside = folder / "dataset"
    inside.mkdir()
    picture(0).save(folder / "outside.png")
    picture(0).save(inside / "good.png")
    os.symlink(folder / "outside.png", inside / "link.png")
    found, quarantined = read(inside, [row(image="good.png"), f'{{"prompt": "a", "image": "{path}"}}'])
    assert len(found) == len(quarantined) == 1


def test_a_turned_image_is_upright_and_other_modes_become_rgb(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    picture(0).save(folder / "turned.jpg", exif=exif, quality=95)
    picture(0).convert("L").save(folder / "grey.png")
    (turned, grey), _ = read(folder, [row(image="turned.jpg"), row(image="grey.png")])
    assert (turned.images[0].width, turned.images[0].height) == (16, 24) == turned.images[0].open().size
    assert grey.images[0].open().mode == "RGB"


@pytest.mark.fault("hostile-image")
def test_an_image_that_changes_during_the_run_is_an_error(folder):
    (record,), _ = read(folder, [row(0)])
    picture(9).save(folder / "images" / "0.png")
    with pytest.raises(DataError, match=r"'images/0\.png' has changed since the run began"):
        record.images[0].open()
    (folder / "images" / "0.png").unlink()
    with pytest.raises(DataError, match="does not exist"):
        record.images[0].open()


@pytest.mark.parametrize("name", ["nowhere.jsonl", "images", "notes.txt", ""])
def test_what_is_no_metadata_file_is_refused(folder, name):
    (folder / "notes.txt").write_text("make it red\n")
    with pytest.raises(DataError, match=r"not an existing \.json or \.jsonl file"):
        read_edits(folder / name if name else "", max_images=1)


# Groups


def groups(records: list[EditRecord], **changes) -> PromptGroups:
    return PromptGroups(records, **({"prompts_per_epoch": 2, "images_per_prompt": 3, "seed": 0} | changes))


def test_groups_are_of_one_instruction_and_one_image(folder):
    rows = [row(0), row(1), row(0, "make it blue"), row(0, requirement="keep the sky"), row(0)]
    rows.append(row(image=["images/0.png", "images/1.png"]))
    rows.append(row(image=["images/1.png", "images/0.png"]))
    (folder / "copy.png").write_bytes((folder / "images" / "0.png").read_bytes())
    rows.append(row(image="copy.png"))
    found, _ = read(folder, rows)
    keys = [record.group_key for record in found]
    assert keys[0] == keys[4] == keys[7] and len(set(keys)) == 6
    splits = load_edits(folder / "train_metadata.jsonl", max_images=2)
    assert len(splits.train) + len(splits.held_out) == 6 and splits.duplicates_merged == 2
    with pytest.raises(ConfigError, match="listed twice"):
        groups(found)


def test_edits_resume_and_ban_as_prompts_do_and_another_picture_is_another_run(folder):
    records, _ = read(folder, [row(number) for number in range(4)])
    first, second = groups(records), groups(records)
    banned = next(first).prompt_indices[0]
    first.ban([banned])
    second.set_state(json.loads(json.dumps(first.get_state())))
    for one, other in zip(islice(first, 3), islice(second, 3), strict=True):
        assert one.prompts == other.prompts and banned not in one.prompt_indices
    assert first.banned == (records[banned],)
    changed = dataclasses.replace(records[3].images[0], sha256="0" * 64)
    others = [*records[:3], dataclasses.replace(records[3], images=(changed,))]
    with pytest.raises(CheckpointError, match="another prompts"):
        groups(others).set_state(first.get_state())


# TensorFlow Datasets


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    folder = tmp_path_factory.mktemp("tfds")
    rows = []
    for number, size in enumerate([(24, 16), (24, 16), (8, 8), (24, 16)]):
        picture(number, *size).save(folder / f"{number}.png")
        name = str(folder / f"{number}.png")
        rows.append({"instruction": f"edit {number}", "wish": "keep", "before": name, "sources": [name] * number})

    class FirmJaxEdits(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            features = {
                "instruction": tfds.features.Text(),
                "wish": tfds.features.Text(),
                "before": tfds.features.Image(shape=(None, None, 3)),
                "sources": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(rows)

    FirmJaxEdits(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.fault("hostile-image")
def test_a_dataset_with_declared_columns(dataset_folder):
    name = f"tfds:firm_jax_edits?text=instruction&image=before&requirement=wish&data_dir={dataset_folder}"
    found, quarantined = read_edits(name, max_images=1)
    assert sorted(record.text for record in found) == ["edit 0", "edit 1", "edit 3"]
    assert ["one latent token" in bad.reason for bad in quarantined] == [True]
    for record in found:
        assert record.requirement == "keep" and record.metadata == {}
        assert (np.asarray(record.images[0].open()) == np.asarray(picture(int(record.text[-1])))).all()


def test_a_dataset_with_several_images_a_record(dataset_folder):
    name = f"tfds:firm_jax_edits?text=instruction&image=sources&data_dir={dataset_folder}"
    found, quarantined = read_edits(name, max_images=2)
    assert [(record.text, len(record.images), record.metadata) for record in found] == [("edit 1", 1, {"wish": "keep"})]
    reasons = " ".join(bad.reason for bad in quarantined)
    for reason in ("sources is empty", "one latent token", "3 source images, more than the 2"):
        assert reason in reasons


@pytest.mark.parametrize(
    ("options", "problem", "error"),
    [
        ("text=instruction", "no image column is named as usual.*image=COLUMN.*before, sources", DataError),
        ("text=before&image=before", "'before' is no text column.*instruction, wish", DataError),
        ("text=instruction&image=wish", "'wish' is no image column", DataError),
        ("text=instruction&image=before&requirement=no", "'no' is no text column", DataError),
        ("picture=before", "unknown option picture.*text=TEXT&image=IMAGE&requirement", ConfigError),
    ],
)
def test_columns_that_are_not_there(dataset_folder, options, problem, error):
    with pytest.raises(error, match=problem):
        read_edits(f"tfds:firm_jax_edits?{options}&data_dir={dataset_folder}", max_images=1)
