"""Conversations in a prepared dataset: ArrayRecord read at random without TensorFlow."""

import json
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
