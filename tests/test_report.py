"""Pictures for people: the grid holds every picture and text, the report opens alone and shows what there is."""

import itertools
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from audited_run import a_record
from PIL import Image

from firm_jax import gallery
from firm_jax.charts import line_chart, nice_ticks
from firm_jax.report import image_grid, write_report

COLOURS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]], np.float32)


def plain_images(size=16):
    return np.broadcast_to(COLOURS[:, None, None], (5, size, size, 3))


def test_a_grid_shows_every_picture_and_leaves_room_for_text(tmp_path):
    grid = image_grid(
        plain_images(), ["short", "a long prompt " * 10, "", "1\n2\n3", "x"], columns=3, path=tmp_path / "g.png"
    )
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "g.png")), grid)
    for colour in COLOURS:
        shown = (grid == (colour * 255).astype(np.uint8)).all(-1).nonzero()
        assert np.ptp(shown[0]) + 1 == np.ptp(shown[1]) + 1 == 224
    dark = (grid < 100).all(-1)
    assert dark.any() and not dark[:, -8:].any(), "text is drawn, and wrapped before the edge"


@pytest.mark.parametrize(("images", "captions"), [(np.zeros((0, 4, 4, 3)), []), (np.zeros((2, 4, 4, 3)), ["one"])])
def test_a_grid_needs_a_text_for_each_picture(images, captions):
    with pytest.raises(ValueError, match="captions"):
        image_grid(images, captions, columns=2)


def test_a_grid_takes_bytes_and_wide_pictures_and_bad_numbers():
    assert image_grid(np.full((1, 10, 300, 3), 7, np.uint8), ["x"], columns=4).dtype == np.uint8
    assert image_grid(np.full((1, 8, 8, 3), np.nan), ["x"], columns=1).max() == 255


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.5, 0.5), (0, 0), (-3e-5, 2e-5), (17, 1234), (1e9, 1e9 + 5)])
def test_ticks_are_few_and_cover_the_range(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9
    assert len(set(ticks)) == len(ticks)


def test_a_chart_is_well_formed_and_thin():
    points = [(x, x**0.5) for x in range(5000)]
    svg = ElementTree.fromstring(line_chart({"a<b": points, "single": [(3, 1.0)]}, {"a<b": [(0, 0.5)]}, "a & b"))
    (line, _) = svg.iter("{http://www.w3.org/2000/svg}polyline")
    assert 250 <= len(line.get("points").split()) <= 302
    assert 60 <= len(list(svg.iter("{http://www.w3.org/2000/svg}circle"))) <= 102
    assert "a<b: 70.7036 at 4999" in [tip.text for tip in svg.iter("{http://www.w3.org/2000/svg}title")]


def test_a_chart_has_zero_on_it_when_asked():
    for values, asked in itertools.product(([9.0, 9.5], [-9.5, -9.0]), (False, True)):
        svg = ElementTree.fromstring(line_chart({"a": list(enumerate(values))}, from_zero=asked))
        ticks = [one for one in svg.iter("{http://www.w3.org/2000/svg}text") if one.get("text-anchor") == "end"]
        assert ("0" in [one.text for one in ticks]) == asked


def a_run(workdir, epochs=4):
    (workdir / "images").mkdir()
    (workdir / "config.json").write_text(json.dumps({"job": "rl", "train": {"epochs": epochs, "note": "<script>"}}))
    lines = []
    for epoch in range(epochs + 1):
        line = {"step": epoch * 5, "epoch": epoch, "time": 1e9 + epoch, "time/wall": 1.0, "throughput/mfu": None}
        if epoch % 2 == 0:
            line |= {"eval/oracle_fraction": 0.5 + epoch / 10, "eval/oracle_fraction_se": 0.0123}
            image_grid(plain_images(), ["x"] * 5, 5, workdir / "images" / f"held-out_{epoch:05d}.png")
        if epoch:
            line |= {"reward/mean": 0.3 + epoch / 100, "reward/instruction": 0.4, "reward/quality": 0.5}
            line |= {"critic/failure_rate": 0.01 * epoch, "update/skipped": 0}
        lines.append(line)
    lines[-1]["non_finite"] = ["grad/norm"]
    cut = '{"step": 99, "epo'
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)


def test_the_report_tells_the_whole_run_by_itself(tmp_path):
    a_run(tmp_path)
    page = write_report(tmp_path).read_text()
    text = re.sub(r"<.*?>", "", page)
    assert re.search(r"0\.500 ± 0\.012\s.*0\.900 ± 0\.012\s.*\+0\.4", text, re.S)
    assert page.count("data:image/png;base64,") == 2, "before and after are inlined"
    assert 'href="images/held-out_00002.png"' in page
    titles = re.findall(r"<h3>([^<]+?)(?:<span.*?</span>)?</h3>", page)
    assert {"reward", "reward by criterion", "share of judgements that failed", "seconds an epoch, by phase"} <= set(
        titles
    )
    assert page.count("Healthy: ") == page.count("<figcaption>") - 2 >= 5, "what to look for in each but the grids"
    assert "grad/norm" in page and 'class="bad"' in page
    assert "&lt;script&gt;" in page and page.count("<script") == 1, "its own"
    assert not re.findall(r'(?:src|href)="https?:', page)
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)


def test_the_report_of_edits_names_sources_and_says_what_was_done_and_what_was_kept(tmp_path):
    a_run(tmp_path)
    assert "the edit on the right" not in write_report(tmp_path).read_text()
    names = ["oracle_edit", "oracle_execution", "oracle_preservation", "oracle_accuracy"]
    rows = [
        {"step": epoch, "epoch": epoch, "time": epoch} | {f"eval/{name}": 0.25 + epoch / 2 for name in names[::-1]}
        for epoch in (0, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = a_record(np.random.default_rng(0), "train", 1, 3) | {"kept": "by chance"}
    record["sources"], picture = ["a/0.png", "b/<1>.png"], Image.new("RGB", (8, 8))
    gallery.write(tmp_path / "images" / gallery.FOLDER, picture, [picture, picture], record)
    page = write_report(tmp_path).read_text()
    assert re.findall(r"<h3>eval/(\w+)</h3>", page) == names[:3]
    assert "<code>a/0.png, b/&lt;1&gt;.png</code>" in page and "the edit on the right" in page


def test_a_run_with_nothing_measured_has_a_report(tmp_path):
    page = write_report(tmp_path).read_text()
    assert "nothing measured yet" in page
    assert "Curves" not in page and "Pictures" not in page


def test_a_large_grid_is_shrunk_into_the_report(tmp_path):
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).random((4, 400, 400, 3))
    image_grid(noise, ["x"] * 4, 2, tmp_path / "images" / "noise_00000.png")
    page = write_report(tmp_path).read_text()
    assert page.count("data:image/webp;base64,") == 1 and len(page) < 600_000
