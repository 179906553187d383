"""`firm-jax score`: pictures that exist are judged as a run judges them, once, whatever happens in between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hostile
import numpy as np
import pytest
from PIL import Image

from firm_jax import Critic
from firm_jax.commands import main
from firm_jax.data.candidates import Candidate, read_candidates
from firm_jax.data.records import QuarantinedRecord
from firm_jax.errors import DataError
from firm_jax.rl.rewards import normalise, qma
from firm_jax.shapes.render import render
from firm_jax.shapes.scene import prompts, sample_scene

ROOT = Path(__file__).parents[1]
PICTURES = 10
TOKENS = 128


def write_pictures(folder: Path) -> list[str]:
    """1.png to 10.png and what each of them should show; returns the texts."""
    rng, texts = np.random.default_rng(0), []
    for number, prompt in enumerate(prompts("test", PICTURES, seed=5), 1):
        pixels = np.rint(render(sample_scene(rng, prompt)) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        texts.append(prompt.text)
    return [*texts[:6], *texts[:3], texts[9]]  # three of them show something else


def write_lines(file: Path, records) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of pictures, the texts that they were made from, and a list in which two of twelve cannot be judged."""
    folder = tmp_path_factory.mktemp("pictures")
    texts = write_pictures(folder)
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:-80])
    listed = [{"id": f"p{n}", "prompt": text, "image": f"{n}.png"} for n, text in enumerate(texts, 1)]
    listed[3:3] = [{"prompt": "a red circle", "image": "cut.png"}]
    listed[6:6] = [{"prompt": "a red circle", "image": "../outside.png"}]
    write_lines(folder / "list.jsonl", listed)
    return folder, texts


@pytest.fixture(scope="module")
def critic():
    return Critic.from_pretrained("embedded:critic_gen", dtype="float32", max_batch=4)


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    given = ["score", "--task", "gen", "--input", str(source), "--out", str(out), "--batch-size", "4"]
    return [*given, "--max-new-tokens", str(TOKENS), "--dtype", "float32", *more]


@pytest.fixture(scope="module")
def scored(world, critic, tmp_path_factory):
    """A whole scoring of the list: its file, and what was printed."""
    out = tmp_path_factory.mktemp("scored") / "scores.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("firm_jax.commands.score.load_critic", lambda *_: critic)
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert main(arguments(world[0] / "list.jsonl", out)) == 0
    return out, "\n".join(printed)


@pytest.fixture
def with_critic(monkeypatch, critic):
    monkeypatch.setattr("firm_jax.commands.score.load_critic", lambda *_: critic)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_pictures_are_judged_as_a_run_judges_them(scored, world, critic):
    folder, texts = world
    records = lines(scored[0])
    assert [record["criterion"] for record in records] == ["instruction", "quality"] * PICTURES
    assert [record["id"] for record in records[::2]] == [f"p{n}" for n in range(1, PICTURES + 1)]
    requests = [
        {"images": [Image.open(folder / f"{n}.png")], "prompt": text, "criterion": criterion}
        for n, text in enumerate(texts, 1)
        for criterion in ("alignment", "quality")
    ]
    for record, judgement in zip(records, critic.judge(requests, max_new_tokens=TOKENS), strict=True):
        assert (record["text"], record["status"], record["rubric"]) == (
            judgement.text,
            judgement.status,
            judgement.rubric,
        )
        assert record["score"] == (list(judgement.score) if record["criterion"] == "quality" else judgement.score)
        assert record["expected"] == pytest.approx(judgement.expected, abs=1e-4)
        assert record["entropy"] == pytest.approx(judgement.entropy, abs=1e-4)
    for alignment, quality in zip(records[::2], records[1::2], strict=True):
        reward = qma(normalise(alignment["score"]), normalise(min(quality["score"])))
        assert alignment["reward"] == quality["reward"] == pytest.approx(float(reward), abs=1e-6)


@pytest.mark.fault("hostile-image", "escaping-path")
def test_what_cannot_be_judged_is_set_aside_and_spoils_nothing(scored):
    refused = lines(scored[0].with_suffix(".quarantine.jsonl"))
    assert [(bad["item"], bad["line"]) for bad in refused] == [(3, 4), (6, 7)]
    assert "is damaged" in refused[0]["reason"] and "leads out of the dataset's folder" in refused[1]["reason"]
    assert {record["item"] for record in lines(scored[0])} == set(range(12)) - {3, 6}


def test_the_table_says_what_the_records_say(scored):
    records, (_, *rows) = lines(scored[0]), [line for line in scored[1].splitlines() if line]
    for row, name in zip(rows, ("instruction", "quality"), strict=False):
        values = [np.min(record["score"]) for record in records if record["criterion"] == name and record["score"]]
        counts = [int(np.sum(np.array(values) == score)) for score in range(1, 6)]
        assert row.split()[:2] == [name, str(len(values))] and row.split()[4:9] == list(map(str, counts))
        assert float(row.split()[2]) == pytest.approx(np.mean(values), abs=6e-4)
    rewards = [record["reward"] for record in records[::2] if record["reward"] is not None]
    assert f"reward qma: mean {np.mean(rewards):.3f}" in scored[1] and f"{len(rewards)} of 10 pictures" in scored[1]
    assert "2 not judged" in scored[1]


def test_a_folder_with_prompts_gives_the_same_scores(scored, world, with_critic, tmp_path):
    folder, texts = world
    (tmp_path / "pictures").mkdir()
    for n in range(1, PICTURES + 1):
        (tmp_path / "pictures" / f"{n}.png").write_bytes((folder / f"{n}.png").read_bytes())
    (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n")
    out = tmp_path / "scores.jsonl"
    assert main(arguments(tmp_path / "pictures", out, "--prompts", str(tmp_path / "prompts.txt"))) == 0
    asked = ("image", "prompt", "criterion", "score", "text", "reward")
    assert [[r[key] for key in asked] for r in lines(out)] == [[r[key] for key in asked] for r in lines(scored[0])]
    assert not out.with_suffix(".quarantine.jsonl").exists()


@pytest.mark.fault("scoring-killed")
@pytest.mark.parametrize("left", ["whole batches", "half a batch", "half a line", "nothing", "all"])
def test_a_scoring_that_was_stopped_goes_on_to_the_same_bytes(
    scored, world, critic, with_critic, tmp_path, left, monkeypatch
):
    content = scored[0].read_bytes()
    ends = [at + 1 for at, byte in enumerate(content) if byte == ord("\n")]
    kept = {"whole batches": ends[5], "half a batch": ends[7], "half a line": ends[7] + 30, "nothing": 0, "all": None}
    out = tmp_path / "scores.jsonl"
    out.write_bytes(content[: kept[left]])
    for suffix in (".run.json", ".quarantine.jsonl"):
        out.with_suffix(suffix).write_bytes(scored[0].with_suffix(suffix).read_bytes())
    shown, real = [], critic.decoder.generate
    monkeypatch.setattr(
        critic.decoder, "generate", lambda prompts, *more: shown.append(len(prompts)) or real(prompts, *more)
    )
    assert main(arguments(world[0] / "list.jsonl", out)) == 0
    assert out.read_bytes() == content
    judged = {"whole batches": 7, "half a batch": 7, "half a line": 7, "nothing": 10, "all": 0}
    assert sum(shown) == 2 * judged[left]
    quarantine = out.with_suffix(".quarantine.jsonl")
    assert quarantine.read_bytes() == scored[0].with_suffix(".quarantine.jsonl").read_bytes()


@pytest.mark.fault("scoring-killed")
def test_kill_9_in_the_middle_of_scoring(scored, world, tmp_path):
    out = tmp_path / "scores.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "firm_jax", *arguments(world[0] / "list.jsonl", out)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (out.exists() and out.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()
        time.sleep(0.002)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    before = out.read_bytes()
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    whole = before[: before.rindex(b"\n") + 1]
    assert out.read_bytes().startswith(whole) and len(lines(out)) == 2 * PICTURES > len(whole.splitlines())
    said = ("item", "criterion", "score", "status", "text")
    assert [[r[key] for key in said] for r in lines(out)] == [[r[key] for key in said] for r in lines(scored[0])]
    assert "reward qma: mean" in ended.stdout


def refusal(capsys, given: list[str]) -> str:
    assert main(given) == 2
    return capsys.readouterr().err


@pytest.mark.fault("scoring-changed")
def test_what_has_changed_in_between_is_refused(scored, world, with_critic, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in world[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "scores.jsonl"
    for suffix in (".jsonl", ".run.json", ".quarantine.jsonl"):
        out.with_suffix(suffix).write_bytes(scored[0].with_suffix(suffix).read_bytes())
    given = arguments(folder / "list.jsonl", out)
    assert main(given) == 0
    assert "another max_new_tokens" in refusal(capsys, [*given, "--max-new-tokens", "64"])
    assert "another together" in refusal(capsys, [*given, "--batch-size", "8"])
    (tmp_path / "alignment.txt").write_text("Rate it. {prompt}")
    (tmp_path / "quality.txt").write_text("Rate it.")
    assert "another rubrics" in refusal(capsys, [*given, "--rubrics", str(tmp_path)])
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes())
    assert "'2.png' or its sources have changed" in refusal(capsys, given)
    (folder / "list.jsonl").write_text((folder / "list.jsonl").read_text().replace("circle", "square"))
    assert "another input" in refusal(capsys, given)
    out.with_suffix(".run.json").unlink()
    assert "no scores.run.json that says what it holds" in refusal(capsys, given)
    assert out.read_bytes() == scored[0].read_bytes()


def test_wrong_use_ends_with_a_message(world, with_critic, tmp_path, capsys):
    folder, out = world[0], tmp_path / "scores.jsonl"
    assert "needs a list of prompts" in refusal(capsys, arguments(folder, out))
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    assert "11 pictures" in (told := refusal(capsys, arguments(folder, out, "--prompts", str(tmp_path / "three.txt"))))
    assert "3 records" in told
    write_lines(tmp_path / "edits.jsonl", [{"prompt": "make it red", "image": "1.png", "source": "2.png"}])
    given = ["edit" if word == "gen" else word for word in arguments(tmp_path / "edits.jsonl", out)]
    assert "no rubric for the criterion 'edit_execution'" in refusal(capsys, given)
    assert "not an existing file" in refusal(capsys, arguments(tmp_path / "none.jsonl", out))
    write_lines(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    assert "nothing to judge; the first of 1 records" in refusal(capsys, arguments(tmp_path / "bad.jsonl", out))
    assert not out.exists()


def test_two_scorings_into_one_file_are_refused(world, with_critic, tmp_path, capsys):
    from firm_jax.commands.score import Results

    with Results(tmp_path / "scores.jsonl", {}):
        assert "is being written by another process" in refusal(
            capsys, arguments(world[0] / "list.jsonl", tmp_path / "scores.jsonl")
        )


def test_edits_name_their_sources(tmp_path):
    records = [
        {"prompt": "make it red", "image": "after.png", "source": "before.png"},
        {"prompt": "put both together", "image": "after.png", "source": ["a.png", "b.png"], "requirement": "no text"},
        {"prompt": "make it red", "image": "after.png"},
        {"prompt": "make it red", "image": "after.png", "source": [1]},
        {"prompt": "make it red", "image": ["a.png", "b.png"], "source": "before.png"},
    ]
    write_lines(tmp_path / "edits.jsonl", records)
    first, second, *refused = read_candidates(tmp_path / "edits.jsonl", None, edits=True)[0]
    assert [picture.path for picture in first.pictures] == ["before.png", "after.png"]
    assert [picture.path for picture in second.pictures] == ["a.png", "b.png", "after.png"]
    assert second.asked.requirement == "no text"
    assert [type(bad) for bad in refused] == [QuarantinedRecord] * 3
    (tmp_path / "after").mkdir()
    for name in ("10.png", "9.png", "note.txt"):
        (tmp_path / "after" / name).write_bytes(hostile.png(4, 4))
    write_lines(tmp_path / "asked.jsonl", [{"prompt": f"edit {n}", "image": f"{n}.png"} for n in range(2)])
    found, _ = read_candidates(tmp_path / "after", tmp_path / "asked.jsonl", edits=True)
    assert [[picture.path for picture in one.pictures] for one in found] == [["0.png", "9.png"], ["1.png", "10.png"]]
    assert [picture.folder for picture in found[0].pictures] == [tmp_path, tmp_path / "after"]
    assert all(isinstance(one, Candidate) for one in found)


@pytest.mark.fault("malformed-line")
def test_a_line_that_is_no_record_keeps_its_place(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.jpg", "c.webp"):
        (tmp_path / "pictures" / name).write_bytes(b"")
    for file, content in (("p.txt", "one\n\xff\nthree\n"), ("p.jsonl", '{"prompt": "one"}\n{\n{"prompt": "three"}\n')):
        (tmp_path / file).write_bytes(content.encode("latin-1"))
        first, second, third = read_candidates(tmp_path / "pictures", tmp_path / file, edits=False)[0]
        assert (first.asked.text, third.asked.text, third.image.path) == ("one", "three", "c.webp")
        assert isinstance(second, QuarantinedRecord) and second.line == 2
    with pytest.raises(DataError, match="unknown ending"):
        read_candidates(tmp_path / "pictures", tmp_path / "pictures" / "a.png", edits=False)
