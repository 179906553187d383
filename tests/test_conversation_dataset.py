"""Conversations in a prepared dataset: ArrayRecord read at random without TensorFlow."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from firm_jax.data.conversations import load_conversations
from firm_jax.errors import ConfigError, DataError


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 12, 3), np.uint8))


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    folder = tmp_path_factory.mktemp("tfds")
    rows = []
    for number in range(5):
        picture(number).save(folder / f"{number}.png")
        marks = 1 if number == 3 else 2
        talk = [
            {"role": "user", "content": "<image>" * marks + f"rate é {number}"},
            {"role": "assistant", "content": f"\\boxed{{{number}}}"},
        ]
        shown = [str(folder / f"{number}.png"), str(folder / "0.png")]
        rows.append({"talk": talk, "shown": shown, "axis": "execution", "id": number})

    class FirmJaxTalks(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            features = {
                "talk": tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()}),
                "shown": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
                "axis": tfds.features.Text(),
                "id": np.int64,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(rows)

    FirmJaxTalks(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_a_dataset_with_declared_columns(dataset_folder):
    name = f"tfds:firm_jax_talks?messages=talk&images=shown&criterion=axis&data_dir={dataset_folder}"
    with pytest.raises(DataError, match=r"1 of 5 records .*for each of the 2 images, and holds 1"):
        load_conversations(name)
    found = load_conversations(name, max_bad_fraction=0.2)
    assert sorted(conversation.id for conversation in found) == ["0", "1", "2", "4"]
    assert [bad.file for bad in found.quarantined] == [name]
    for index in (2, 0, 3, 1):
        conversation, number = found[index], int(found[index].id)
        assert (conversation.prompt, conversation.answer) == (f"rate é {number}", f"\\boxed{{{number}}}")
        assert conversation.criterion == "execution"
        shown = [np.asarray(image) for image in conversation.images]
        assert all((a == np.asarray(picture(b))).all() for a, b in zip(shown, (number, 0), strict=True))
        assert found.encoded(index).images[0] == (dataset_folder / f"{number}.png").read_bytes()


# Without the dataset's metadata

COLUMNS = {"messages": "talk", "images": "shown", "criterion": "axis"}


def bare(dataset_folder) -> str:
    [file] = dataset_folder.glob("**/*.array_record*")
    return str(file)


def test_the_files_of_a_dataset_say_the_same_without_its_metadata(dataset_folder, tmp_path):
    name = f"tfds:firm_jax_talks?messages=talk&images=shown&criterion=axis&data_dir={dataset_folder}"
    expected = load_conversations(name, max_bad_fraction=0.2)
    file = bare(dataset_folder)
    for source in (file, file.replace("firm_jax", "*")):
        found = load_conversations(source, columns=COLUMNS, max_bad_fraction=0.2)
        assert [found.encoded(n) for n in range(4)] == [expected.encoded(n) for n in range(4)]
        assert [(bad.file, bad.line) for bad in found.quarantined] == [(file, expected.quarantined[0].line)]
    shutil.copy(file, tmp_path / "0.array_record")
    shutil.copy(file, tmp_path / "1.array_record")
    both = load_conversations(f"{tmp_path}/*.array_record", columns=COLUMNS, max_bad_fraction=0.2)
    assert [both.encoded(n) for n in (6, 1, 4)] == [expected.encoded(n) for n in (2, 1, 0)]
    shutil.copy(file, tmp_path / "new")
    os.replace(tmp_path / "new", tmp_path / "1.array_record")
    with pytest.raises(DataError, match=r"1\.array_record has changed"):
        both[7]


def write_records(file, records: list[bytes]) -> str:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(file)


def example(**features) -> bytes:
    """A serialized tf.train.Example, made by the class that TensorFlow Datasets has of it."""
    proto = pytest.importorskip("tensorflow_datasets.proto.tf_example_generated_pb2").Example()
    for name, values in features.items():
        of = proto.features.feature[name.replace("__", "/")]
        (of.bytes_list if isinstance(values[0], bytes) else of.int64_list).value.extend(values)
    return proto.SerializeToString()


def test_records_that_cannot_be_read_are_set_aside_with_the_reason(tmp_path):
    picture(1).save(tmp_path / "1.png")
    image = [(tmp_path / "1.png").read_bytes()]
    said = {"messages__role": [b"user", b"assistant"], "messages__content": [b"<image>how?", "5 é".encode()]}
    records = [
        example(**said, images=image, id=[-7], criterion=[b"quality"]),
        b'{"messages": []}',
        b"",
        example(images=image),
        example(**said | {"messages__role": [b"user"]}, images=image),
        example(**said | {"messages__content": [b"<image>\xff", b"5"]}, images=image),
        example(**said, images=[b"no image"]),
    ]
    file = write_records(tmp_path / "x.arrayrecord", records)
    found = load_conversations(file, max_bad_fraction=0.9)
    assert [(one.prompt, one.answer, one.id, one.criterion) for one in found] == [("how?", "5 é", "-7", "quality")]
    assert (np.asarray(found[0].images[0]) == np.asarray(picture(1))).all()
    reasons = {bad.line: bad.reason for bad in found.quarantined}
    for line, told in (
        (2, "no serialized tf.train.Example"),
        (3, "no serialized tf.train.Example"),
        (4, "no messages or conversations (there are: images)"),
        (5, "messages/{content, role} have not as many values"),
        (6, "'messages/content' is not UTF-8"),
        (7, "image"),
    ):
        assert told in reasons[line]


def test_a_file_that_is_no_array_record_and_a_folder_of_them_are_told(dataset_folder, tmp_path):
    for content in (b"", b"not at all", b"x" * 100_000):
        (tmp_path / "x.array_record").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.array_record"):
            load_conversations(tmp_path / "x.array_record")
    whole = Path(bare(dataset_folder)).read_bytes()
    (tmp_path / "x.array_record").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"x\.array_record"):
        load_conversations(tmp_path / "x.array_record", columns=COLUMNS, max_bad_fraction=0.9)
    with pytest.raises(DataError, match=r"tfds:NAME\?data_dir=FOLDER.*a pattern"):
        load_conversations(tmp_path)


def test_nothing_of_tensorflow_is_imported(dataset_folder):
    name = f"tfds:firm_jax_talks?messages=talk&images=shown&data_dir={dataset_folder}"
    program = (
        "import json, sys\n"
        "from firm_jax.data.conversations import load_conversations\n"
        f"found = load_conversations({name!r}, max_bad_fraction=0.2)\n"
        "texts = [found[index].prompt for index in range(len(found))]\n"
        "roots = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "print(json.dumps([len(texts), roots]))\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr
    count, roots = json.loads(done.stdout.splitlines()[-1])
    assert count == 4 and "array_record" in roots
    assert not [root for root in roots if root in ("tensorflow", "tensorflow_cpu", "tf_keras", "keras")]


@pytest.mark.parametrize(
    ("options", "problem", "error"),
    [
        ("images=shown", r"no list of turns column is named as usual.*messages=COLUMN.*: talk", DataError),
        ("messages=axis", "'axis' is no list of turns column", DataError),
        ("messages=talk&images=axis", "'axis' is no image column.*shown", DataError),
        ("messages=talk&criterion=shown", "'shown' is no text or number column", DataError),
        ("messages=talk&picture=shown", "unknown option picture", ConfigError),
    ],
)
def test_columns_that_are_not_there(dataset_folder, options, problem, error):
    with pytest.raises(error, match=problem):
        load_conversations(f"tfds:firm_jax_talks?{options}&data_dir={dataset_folder}")


def test_a_name_says_its_columns_itself():
    with pytest.raises(ConfigError, match=r"as in \?messages=COLUMN"):
        load_conversations("tfds:any", columns={"messages": "talk"})
