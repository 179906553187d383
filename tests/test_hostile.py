"""The hostile corpus through the production path: readers, tokenizers, critic, and an RL run."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import hostile
import numpy as np
import pytest
from critic_miniature import picture, write_miniature
from tiny_pipeline import tiny_generator

from firm_jax.critic import Critic
from firm_jax.critic.score import prompt_check
from firm_jax.data import records
from firm_jax.data.conversations import load_conversations
from firm_jax.data.images import load_image
from firm_jax.data.prompts import PromptRecord, load_prompts, read_prompts
from firm_jax.data.records import MalformedRecord
from firm_jax.errors import ConfigError, DataError
from firm_jax.generation.text import spell_out
from firm_jax.shapes.tokenizers import t5_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.mark.fault("malformed-line", "hostile-text")
@pytest.mark.parametrize("name", hostile.LINES)
def test_one_bad_line_among_good_ones(tmp_path, name):
    content, texts, reasons = hostile.LINES[name]
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "first"}\n' + content + b'\n{"prompt": "third"}\n')
    found, bad = read_prompts(path)
    assert [record.text for record in found] == texts
    assert [record.line for record in bad] == [2] * len(reasons)
    assert all(reason in record.reason for reason, record in zip(reasons, bad, strict=True))


@pytest.mark.fault("malformed-line")
@pytest.mark.parametrize(("name", "content", "outcome"), hostile.FILES, ids=[file[0] for file in hostile.FILES])
def test_a_hostile_prompt_file(tmp_path, name, content, outcome):
    path = tmp_path / name
    path.write_bytes(content)
    if isinstance(outcome, str):
        with pytest.raises(DataError, match=outcome) as error:
            load_prompts(path)
        assert name in str(error.value) and len(str(error.value)) < 600
        return
    found, bad = read_prompts(path)
    assert [record.text for record in found] == outcome[0]
    assert all(reason in record.reason for reason, record in zip(outcome[1], bad, strict=True))


@pytest.mark.fault("malformed-line", "escaping-path")
def test_what_is_no_file_in_the_place_of_one(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    names = ["pipe.jsonl", "folder.json", "dangling.txt", "loop.txt", "a\0b.txt", "x" * 5000 + ".txt", "\udcff.txt"]
    for name in ["", *(str(tmp_path / name) for name in names)]:
        with pytest.raises(DataError, match=r"does not exist|not a regular file|holds no training prompts|cannot read"):
            load_prompts(name)


MEASURE = """
import resource, sys
from firm_jax.data.prompts import load_prompts
from firm_jax.errors import DataError
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
try:
    print(len(load_prompts(sys.argv[1], max_bad_fraction=0.5).train), peak() - before)
except DataError as error:
    print(str(error)[-200:], peak() - before)
"""


@pytest.mark.fault("malformed-line")
@pytest.mark.parametrize(
    ("name", "begin", "end", "outcome"),
    [
        ("line.jsonl", b'{"prompt": "a"}\n', b'\n{"prompt": "b"}\n{"prompt": "c"}', "2 "),
        ("line.txt", b"one\n", b"\ntwo\nthree", "2 "),
        ("document.json", b'[{"prompt": "', b'"}]', "does not end within 1048576 characters"),
        ("blank.json", b"", b"[]", "not a JSON list"),
    ],
)
def test_a_hundred_megabytes_in_one_piece_take_little_memory(tmp_path, name, begin, end, outcome):
    path = tmp_path / name
    with path.open("wb") as file:  # a hole of NUL characters: nothing on the disk
        file.write(begin)
        file.seek(100 << 20)
        file.write(end)
    if name == "document.json":  # NUL would end the string at once
        path.write_bytes(begin + b"x" * (100 << 20) + end)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert outcome in done.stdout, done.stderr
    assert int(done.stdout.split()[-1]) < 64


@pytest.mark.fault("malformed-line")
def test_a_list_larger_than_the_window_is_read_to_the_same_records(tmp_path, monkeypatch):
    rows = [{"prompt": f"{number} é 字 😀" * (number % 7 + 1), "x": [number, {"y": None}]} for number in range(300)]
    (tmp_path / "p.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1).replace("},", "},\n  \n"))
    whole, _ = read_prompts(tmp_path / "p.json")
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 300)
    pieces, bad = read_prompts(tmp_path / "p.json")
    assert pieces == whole and not bad
    text = (tmp_path / "p.json").read_text().splitlines()
    assert [record.text for record in whole] == [row["prompt"] for row in rows]
    assert all(text[record.line - 1].strip() == "{" for record in whole)


@pytest.mark.fault("malformed-line")
def test_reasons_are_not_collected_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_QUARANTINED", 50)
    (tmp_path / "p.txt").write_text("\n" * 51 + "one")
    with pytest.raises(DataError, match="more than 50 records cannot be used, the last of them on line 51: empty"):
        load_prompts(tmp_path / "p.txt", max_bad_fraction=0.99)


# Images


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    made = hostile.images()
    for name, (content, _) in made.items():
        (folder / name).write_bytes(content)
    return folder, {name: reason for name, (_, reason) in made.items()}


@pytest.mark.fault("hostile-image")
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF")
def test_hostile_images_are_read_or_refused_with_a_fixed_reason(gallery):
    folder, reasons = gallery
    for name, reason in reasons.items():
        begun = time.perf_counter()
        if reason is None:
            assert load_image(name, folder).mode == "RGB", name
        else:
            with pytest.raises(DataError, match=reason) as error:
                load_image(name, folder)
            assert "0x" not in str(error.value) and str(folder) not in str(error.value)
        assert time.perf_counter() - begun < 5, name


@pytest.mark.fault("hostile-image", "escaping-path")
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF")
def test_conversations_with_hostile_images_are_set_aside_when_the_file_is_read(gallery, tmp_path):
    folder, reasons = gallery
    names = [*reasons, "../escape.png", "/etc/passwd", "file:page.png", "n" * 5000, "a\0.png"]
    turns = [{"role": "user", "content": "<image>rate"}, {"role": "assistant", "content": "\\boxed{4}"}]
    rows = [json.dumps({"messages": turns, "images": [name]}) for name in names]
    (folder / "train.jsonl").write_text("\n".join(rows))
    read = load_conversations(folder / "train.jsonl", max_bad_fraction=0.9, quarantine_file=tmp_path / "bad.jsonl")
    assert len(read) + len((tmp_path / "bad.jsonl").read_text().splitlines()) == len(names)
    usable = [name for name, reason in reasons.items() if reason is None]
    assert len(read) >= len(usable)
    for index in range(len(read)):
        try:
            assert read[index].images[0].mode == "RGB"
        except DataError as error:
            assert "is damaged" in str(error) and "train.jsonl, line" in str(error)


# Texts


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    return Critic.from_pretrained(write_miniature(tmp_path_factory.mktemp("critic")), dtype="float32")


def test_source_images_take_their_share_of_what_the_critic_can_read(critic):
    folder, rubrics, size, source = critic.processor.folder, critic.rubrics, (16, 16), (48, 80)
    texts = [rubrics[name].fill("make it red") for name in ("edit_execution", "edit_consistency")]
    needed = [max(critic.processor.length([source] * count + [size], text) for text in texts) for count in (0, 1, 2)]
    assert needed[0] < needed[1] < needed[2]
    criteria = ["edit_execution", "edit_consistency"]
    check = prompt_check(
        folder, None, criteria, [size], critic.max_length - needed[1], lambda edit: [source] * edit.metadata["images"]
    )
    check(PromptRecord("make it red", metadata={"images": 1}))
    with pytest.raises(MalformedRecord, match=f"needs {needed[2]} tokens of the critic with rubric and images"):
        check(PromptRecord("make it red", metadata={"images": 2}))


@pytest.mark.fault("hostile-text")
def test_hostile_prompts_reach_the_critic_as_text(critic):
    prompts = [*hostile.TEXTS, "a" * 10_000_000]
    for prompt in hostile.TEXTS:
        text = critic.rubrics["alignment"].fill(prompt)
        assert prompt in text
        image = picture(0, 16, 16)
        sequence = critic.processor.sequence([image], text)
        assert critic.processor.length([(16, 16)], text) == len(sequence)
        assert critic.processor.length([], text) == len(critic.processor.sequence([], text))
        ids = sequence.ids.tolist()
        for token, count in (("<|im_start|>", 2), ("<|im_end|>", 1), ("<|vision_start|>", 1), ("<|image_pad|>", 4)):
            assert ids.count(critic.processor.token_id(token)) == count
    asked = [{"images": [picture(0, 16, 16)], "prompt": prompt, "criterion": "alignment"} for prompt in prompts[:3]]
    assert len(critic.judge(asked, max_new_tokens=4)) == 3
    for bad, reason in ((prompts[-1], "10000000 characters"), ("\ud83d", "surrogate"), (7, "int, not a string")):
        begun = time.perf_counter()
        with pytest.raises(DataError, match=rf"request 0: the prompt .*{reason}"):
            critic.judge([{"images": [picture(0, 16, 16)], "prompt": bad, "criterion": "alignment"}])
        assert time.perf_counter() - begun < 0.05
    with pytest.raises(DataError, match="request 0 has no images"):
        critic.judge([{"prompt": "a", "criterion": "alignment"}])


@pytest.mark.fault("hostile-text")
def test_a_prompt_that_the_critic_could_not_read_is_known_before_the_run(critic):
    folder, rubrics = critic.processor.folder, critic.rubrics
    room = critic.max_length - len(critic.processor.sequence([picture(0, 16, 16)], rubrics["alignment"].fill("")))
    check = prompt_check(folder, None, ["alignment", "quality"], [(16, 16)], room - 500)
    fits, too_long = PromptRecord("0" * 450), PromptRecord("0 " * 1000)
    for record, refused in ((fits, False), (too_long, True)):
        request = {"images": [picture(0, 16, 16)], "prompt": record.text, "criterion": "alignment"}
        if refused:
            with pytest.raises(MalformedRecord, match=r"needs \d+ tokens of the critic"):
                check(record)
            with pytest.raises(DataError, match="more than the"):
                critic.judge([request], max_new_tokens=room - 500)
        else:
            check(record)
            critic.prompt(request, room - 500)
    with pytest.raises(ConfigError, match="leaves no room"):
        prompt_check(folder, None, ["alignment"], [(16, 16)], critic.max_length)


@pytest.mark.fault("hostile-text")
def test_hostile_prompts_reach_the_text_encoders_as_text():
    tokenizer = t5_tokenizer(512)
    [spelled] = spell_out(["a</s><pad> b"], tokenizer)
    assert spelled == "a< /s>< pad> b"
    ids = tokenizer(spelled)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
    assert tokenizer.pad_token_id not in ids
    encoders = tiny_generator().text_encoders
    for token, names in (("<|endoftext|>", ("text_encoder", "text_encoder_2")), ("</s>", ("text_encoder_3",))):
        rows = encoders.tokenize([f"a {token} b", f"a < {token[1:]} b"], 12)
        for name in names:
            np.testing.assert_array_equal(*rows[name], err_msg=name)
    conditioning = encoders(hostile.TEXTS, 12)
    assert np.isfinite(np.asarray(conditioning.context)).all()
    for bad, reason in (("a" * 10_000_000, "10000000 characters"), ("\ud83d", "surrogate"), (None, "NoneType")):
        begun = time.perf_counter()
        with pytest.raises(DataError, match=f"prompt 1 .*{reason}"):
            encoders.tokenize(["a", bad], 12)
        assert time.perf_counter() - begun < 0.05


@pytest.mark.fault("damaged-weights")
def test_nothing_is_unpickled():
    for file in (ROOT / "firm_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"} & set(names), file
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert node.value.value is False, file
