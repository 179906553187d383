"""Judged pictures that a run keeps: those that an audit needs, few, whole, and a page of them that can be mailed."""

import json
import os
import re

import numpy as np
import pytest
from audited_run import HOSTILE, a_judgement, a_record, write_run
from PIL import Image

from firm_jax import cards, gallery
from firm_jax.errors import WorkdirError
from firm_jax.report import write_report


def some_records(count=40, seed=0, **given):
    rng = np.random.default_rng(seed)
    return [a_record(rng, "train", 1, image, **given) for image in range(count)]


def test_epochs_are_kept_early_and_late_and_their_number_grows_as_a_logarithm():
    kept = [epoch for epoch in range(101) if gallery.is_due(epoch, 1, 100)]
    assert kept == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]
    assert [epoch for epoch in range(101) if gallery.is_due(epoch, 10, 95)] == [0, 10, 20, 30, 40, 60, 80, 95]
    assert sum(gallery.is_due(epoch, 1, 10_000) for epoch in range(1, 10_001)) == 27


@pytest.mark.parametrize("same", [False, True])
def test_what_stands_out_is_kept_beside_what_does_not(same):
    records = some_records()
    chosen = gallery.choose(records, np.random.default_rng(3), same=same)
    assert chosen == gallery.choose(records, np.random.default_rng(3), same=same)
    reasons = list(chosen.values())
    assert len(chosen) == 12 and reasons.count("failed judgement") == 1
    assert reasons[:3] == [gallery.THE_SAME if same else gallery.BY_CHANCE] * 3
    assert list(chosen)[:3] == [0, 1, 2] if same else list(chosen)[:3] != [0, 1, 2]
    rest = [i for i in range(40) if i not in list(chosen)[:3] and records[i]["reward"] is not None]
    ranked = sorted(rest, key=lambda i: records[i]["reward"])
    assert [i for i in chosen if chosen[i] == "highest reward"] == ranked[:-3:-1]
    assert [i for i in chosen if chosen[i] == "lowest reward"] == ranked[:2]
    (failed,) = (i for i in chosen if chosen[i] == "failed judgement")
    assert records[failed]["judgements"][1]["score"] is None


def test_equal_pictures_are_chosen_by_chance_and_never_twice():
    equal = {"sources": [], "reward": 1.0, "judgements": [a_judgement("quality", 5, 5.0, 0.0)]}
    records = [equal | {"prompt": f"prompt {row % 20}"} for row in range(40)]
    picks = [tuple(gallery.choose(records, np.random.default_rng(seed), same=True))[3:] for seed in range(5)]
    assert len(set(picks)) == 5 and all(len(set(pick)) == len(pick) == 6 for pick in picks)
    assert all(len({row % 20 for row in pick[place : place + 2]}) == 2 for pick in picks for place in (0, 2, 4))
    assert gallery.choose(records[:2], np.random.default_rng(0), same=False).keys() == {0, 1}


def test_disagreement_is_with_the_oracle_and_without_one_with_what_was_expected():
    known = [a_judgement("execution", 5, 4.5, 0.1, oracle=0.25), a_judgement("consistency", 1, 3.0, oracle=0.5)]
    assert gallery.disagreement({"judgements": known}, with_oracle=True) == 0.75
    assert gallery.disagreement({"judgements": known}, with_oracle=False) == 0.5
    unknown = [a_judgement("quality", (5, 2, 4), 2.5, 0.3), a_judgement("instruction", None, oracle=0.5)]
    assert gallery.disagreement({"judgements": unknown}, with_oracle=True) is None
    assert gallery.disagreement({"judgements": unknown}, with_oracle=False) == 0.125
    assert gallery.has_failed({"judgements": unknown}) and not gallery.has_failed({"judgements": known})
    assert gallery.entropy({"judgements": known + unknown}) == 0.3


def test_a_picture_carries_its_record_and_its_pixels(tmp_path):
    record = some_records(1)[0] | {"kept": "by chance", "prompt": HOSTILE + "\0\ud800"}
    pixels = np.random.default_rng(0).integers(0, 256, (3, 12, 20, 3), np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    assert gallery.write(tmp_path / "judged", images[0], images[1:], record) == "train_00001_00000.png"
    ((path, found),), broken = gallery.read(tmp_path / "judged")
    assert found == json.loads(json.dumps(record)) and not broken
    for file, expected in zip([path, *gallery.sources_of(path)], pixels, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), expected)


@pytest.mark.fault("preempted")
def test_pictures_of_epochs_that_are_done_again_are_forgotten(tmp_path):
    write_run(tmp_path)
    before = sorted(path.name for path in (tmp_path / "images" / "judged").iterdir())
    gallery.forget(tmp_path / "images" / "judged", after=2)
    left = sorted(path.name for path in (tmp_path / "images" / "judged").iterdir())
    assert left == [name for name in before if int(name.split("_")[1]) <= 2] and 0 < len(left) < len(before)
    foreign = tmp_path / "images" / "judged" / "not_of_this.png"
    foreign.touch()
    gallery.forget(tmp_path / "images" / "judged", after=-1)
    gallery.forget(tmp_path / "images" / "none", after=-1)
    assert list((tmp_path / "images" / "judged").iterdir()) == [foreign]


@pytest.mark.fault("disk-full")
def test_a_kept_picture_that_finds_no_room_leaves_no_half_of_itself(tmp_path, monkeypatch):
    def cut_short(self, path, **given):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", cut_short)
    with pytest.raises(WorkdirError, match=r"train_00001_00000\.png: .*No space left"):
        gallery.write(tmp_path / "judged", Image.new("RGB", (4, 4)), [], some_records(1)[0])
    assert not list((tmp_path / "judged").iterdir())


def articles(page: str) -> list[str]:
    return re.findall(r"<article.*?</article>", page, re.S)


@pytest.mark.fault("hostile-answer")
def test_the_page_shows_every_card_in_order_and_harms_nobody(tmp_path):
    kept = write_run(tmp_path)
    page = write_report(tmp_path).read_text()
    shown = [
        tuple(re.search(rf'data-{key}="(.*?)"', one)[1] for key in ("epoch", "set", "image")) for one in articles(page)
    ]
    everything = sorted(kept, key=lambda record: (-record["epoch"], record["set"], record["image"]))
    assert shown == [(str(r["epoch"]), r["set"], str(r["image"])) for r in everything]
    for record, article in zip(everything, articles(page), strict=True):
        assert article.count("data:image/webp;base64,") == 2 and f"sources/{record['image']}.png" in article
        for judgement in record["judgements"]:
            assert re.search(rf'<th scope="row">{judgement["criterion"]}</th>', article)
        if gallery.has_failed(record):
            assert "no_score</span>, the answer as it came" in article and "I would rather not say" in article
    assert page.count("<script>") == 1 and "<img src=x" not in page and "I see &lt;/script&gt;" in page
    assert "which reads the truth" in page and "This run has no oracle" not in page
    assert re.search(r"epoch 0 and that of epoch 4", page)


def test_without_an_oracle_the_page_says_what_disagreement_is(tmp_path):
    write_run(tmp_path, oracle=False)
    page = write_report(tmp_path).read_text()
    assert "This run has no oracle" in page and ">oracle</th>" not in page and "critic minus oracle" not in page


@pytest.mark.fault("disk-full")
def test_a_kept_picture_that_is_torn_is_named_and_the_rest_is_shown(tmp_path):
    kept = write_run(tmp_path)
    folder = tmp_path / "images" / "judged"
    picture = sorted(file for file in folder.glob("train_*") if ".source" not in file.name)[0]
    source = sorted(folder.glob("train_*.source1.png"))[1]
    for file in (picture, source):
        os.truncate(file, file.stat().st_size // 2)
    (folder / "eval_00009_00000.png").write_bytes(b"")
    page = write_report(tmp_path).read_text()
    assert f"Could not be read: eval_00009_00000.png, {picture.name}, {source.name.replace('.source1', '')}." in page
    assert len(articles(page)) == len(kept) - 2


def test_a_long_run_of_large_pictures_and_long_answers_is_a_page_that_can_be_mailed(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "images" / "judged"
    folder.parent.mkdir()
    noise = Image.fromarray(rng.integers(0, 256, (160, 160, 3), np.uint8))
    for tag in ("eval", "train"):
        for epoch in range(5):
            for image in range(12):
                record = a_record(rng, tag, epoch, image) | {"kept": "by chance", "prompt": "<" * 9000}
                gallery.write(folder, noise, [noise] if image == 0 else [], record)
    rows = [
        {"step": epoch, "epoch": epoch, "time": 1e9 + epoch} | {f"a/{name}": float(rng.random()) for name in range(30)}
        for epoch in range(1000)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    found = articles(page)
    assert len(found) == 12 * cards.MOST_EPOCHS and "Shown are 96 of 120" in page
    shown = {re.search(r'data-set="(\w+)" data-epoch="(\d+)"', one).groups() for one in found}
    assert shown == {(tag, epoch) for tag in ("eval", "train") for epoch in "0134"}
    assert "(9000 characters, the rest is left out)" in page
    assert len(page.encode()) < 5_000_000
    assert sum(map(len, re.findall(r'src="(data:.*?)"', "".join(found)))) <= cards.MOST_BYTES
