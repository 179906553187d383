"""How costs grow: points as small as they can be, what compiled programs send between devices, and the page of it."""

import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import jax
import numpy as np
import pytest

from benchmarks import cost_growth, growth_page, harness, tables
from benchmarks.cost_growth import GROWTH, LAYOUTS, PROGRAMS, Growth, Point
from benchmarks.harness import OutputsDiffer, Variant, cpu_name
from benchmarks.sizes import SD3

BASE = replace(SD3["tiny"], height=32, width=16, text_tokens=7, images=4, steps=3, timesteps=1, rank=4)
TINY = Growth(BASE, {"rank": (4,)}, BASE)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A whole run of the command, and its file; compiling takes the time, so the machine code is left as it comes."""
    out = tmp_path_factory.mktemp("growth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "WARM_UP", 1)
        patch.setattr(harness, "cores", lambda: 2)
        patch.setitem(GROWTH, "tiny", TINY)
        patch.setattr(cost_growth, "DEVICES", (1, 4))
        jax.config.update("jax_disable_most_optimizations", True)
        found = cost_growth.main(["--rounds", "1", "--factors", "rank", "devices", "--out", str(out)])
        jax.config.update("jax_disable_most_optimizations", False)
    [file] = out.iterdir()
    return found, file


@pytest.mark.slow
def test_the_file_says_what_was_measured_and_how(measured):
    found, file = measured
    assert json.loads(file.read_text()) == found
    assert file.name == f"cost_growth_tiny_cpu_{cpu_name(found['machine']['cpu'])}_{found['date']}.json"
    assert found["command"] == "python -m benchmarks.cost_growth --rounds 1 --factors rank devices"
    assert found["options"]["dtype"] == "float32" and found["machine"]["cores"] == 2 and "cases" not in found
    points = [row for factor in ("rank", "devices") for row in found["factors"][factor]["points"]]
    assert [(row["factor"], row["value"], row["work"], row["devices"]) for row in points] == [
        (factor, value, work, devices)
        for factor, value, devices in (("rank", 4, 2), ("alone", 1, 1), ("data", 4, 4), ("fsdp", 4, 4))
        for work in ("rollout", "update")
    ]
    for row in points:
        assert row["images"] == 4 and row["tokens"] == 7 + 2 and row["rank"] == 4 and row["flops"] > 0
        assert len(row["seconds"]) == len(row["cpu_seconds"]) == 1 and row["median"] == row["seconds"][0]
        assert row["images_per_second"] == pytest.approx(4 / row["median"])


def programs(found) -> dict[tuple[str, str], dict]:
    """The rows of the programs by layout and name."""
    return {(row["layout"], row["program"]): row for row in found["factors"]["devices"]["programs"]}


@pytest.mark.slow
def test_an_update_over_data_sums_the_gradient_once_and_drawing_sends_nothing(measured):
    found, _ = measured
    gradient = found["factors"]["devices"]["gradient_bytes"]
    assert gradient == 4 * found["factors"]["devices"]["points"][0]["adapter_parameters"]
    sent = programs(found)["data", "update"]["received"]
    assert sent.keys() == {"all-reduce"}
    # Beside it there are only the few scalars that the metrics are made of.
    assert 0 <= sent["all-reduce"] - 2 * 3 / 4 * gradient < 1000
    assert programs(found)["data", "draw"]["received"] == programs(found)["data", "decode"]["received"] == {}


@pytest.mark.slow
def test_few_rows_go_to_split_weights_and_nothing_is_sent_within_one_device(measured):
    made = programs(measured[0])
    assert all(made["alone", name]["received"] == {} for name in PROGRAMS)
    # What a device lacks of the weights, and would receive in every step: what it holds less of than a device alone.
    lacking = made["alone", "draw"]["arguments"] - made["fsdp", "draw"]["arguments"]
    received = made["fsdp", "draw"]["received"]
    assert received.keys() == {"all-gather", "all-reduce", "all-to-all"}
    assert 0 < sum(received.values()) < BASE.steps * lacking / 2
    assert made["fsdp", "update"]["arguments"] < 0.5 * made["alone", "update"]["arguments"]


@pytest.mark.slow
def test_devices_share_the_operations(measured):
    made = programs(measured[0])
    assert list(made) == [(layout, name) for layout in ("alone", *LAYOUTS) for name in PROGRAMS]
    for layout in LAYOUTS:
        for name in PROGRAMS:
            one, four = made["alone", name], made[layout, name]
            assert (one["devices"], four["devices"]) == (1, 4) and four["flops"] == one["flops"] / 4
            assert 0.25 <= four["xla_flops"] / one["xla_flops"] < 0.4, name
            assert one["peak"] >= one["arguments"] + one["temporaries"] > 0


class Stub(Point):
    """A point whose work nobody asks for."""

    def described(self):
        return {"images": 2, "value": self.value}

    def flops(self):
        return dict.fromkeys(self.variants, 1.0)


def stub(value: int, outputs, log: list | None = None) -> Stub:
    def run(_):
        if log is not None:
            log.append(value)

    return Stub("data", value, None, {"rollout": Variant(harness.OURS, "float32", "jit", run, lambda _: outputs)})


def test_points_run_in_turns(monkeypatch):
    monkeypatch.setattr(harness, "WARM_UP", 2)
    log = []
    rows = cost_growth.measure([stub(value, {"x": np.full(2, value)}, log) for value in (1, 2)], rounds=3)
    assert log == [1, 1, 2, 2, *(1, 2), *(2, 1), *(1, 2)]
    assert [len(row["seconds"]) for row in rows] == [3, 3]


@pytest.mark.parametrize("same, second", [(True, 2.0), (False, np.nan)])
def test_other_outputs_on_more_devices_stop_the_measurement_and_so_do_none(same, second):
    points = [stub(1, {"x": np.ones(2)}), stub(2, {"x": np.full(2, second)})]
    with pytest.raises(OutputsDiffer, match="rollout, data 2: x is"):
        cost_growth.measure(points, rounds=1, same=same)


def test_the_sizes_grow_one_thing_from_the_base():
    for growth in GROWTH.values():
        for factor in growth.factors:
            sizes = growth.sizes(factor)
            assert growth.base in sizes.values() and len(sizes) >= 3
            for value, size in sizes.items():
                names = {"height", "width"} if factor == "side" else {factor}
                assert {name: getattr(size, name) for name in names} == dict.fromkeys(names, value)
                assert replace(size, **{name: getattr(growth.base, name) for name in names}) == growth.base
        assert growth.spread.images % max(cost_growth.DEVICES) == 0


# The page


def test_powers_and_lines_are_those_of_the_rows():
    rows = [{"x": x, "median": 3 + 0.5 * x, "flops": 7 * x**2} for x in (1, 2, 4)]
    assert growth_page.power(rows[0], rows[1], "x", "flops") == pytest.approx(2)
    assert growth_page.overall(rows, "x", "flops") == pytest.approx(2)
    assert growth_page.power(rows[0], rows[2], "x", "median") == pytest.approx(math.log(5 / 3.5) / math.log(4))
    assert growth_page.line(rows, "x") == (pytest.approx(3), pytest.approx(0.5), pytest.approx(0, abs=1e-9))
    bent = [*rows, {"x": 8, "median": 14.0}]
    assert growth_page.line(bent, "x")[2] > 0.05


def made_up(factors) -> dict:
    """A result in which seconds are 1 + 0.01 tokens an image, and updates take twice as long."""
    growth = GROWTH["small"]
    found = {"base": vars(growth.base), "spread": vars(growth.spread), "factors": {}, "date": "1999-12-31"}
    found |= {"command": "a command", "revision": "0" * 40, "versions": {"jax": "0"}, "options": {"size": "small"}}
    found["machine"] = {"accelerators": [], "cores": 2, "cpu": "a CPU", "load_before": 0.0}

    def row(factor, value, size, work):
        tokens = (size.height // 16) ** 2 + size.text_tokens
        median = (1 + (work == "update")) * size.images * (1 + 0.01 * tokens)
        told = {"factor": factor, "value": value, "work": work, "images": size.images, "tokens": tokens}
        seconds = {"lower": median, "median": median, "upper": median, "images_per_second": size.images / median}
        return told | seconds | {"devices": 2, "rank": size.rank, "flops": size.images * tokens**2}

    for factor in factors:
        sizes = growth.sizes(factor).items()
        points = [row(factor, value, size, work) for value, size in sizes for work in ("rollout", "update")]
        found["factors"][factor] = {"points": points}
    return found


def test_a_result_becomes_a_page_with_a_plot():
    files = growth_page.files({"small_cpu_1999": made_up(["images", "side", "rank"])})
    page, plot = files
    assert page == growth_page.PAGE and plot.name == "cost_growth_small_cpu_1999_factors.svg"
    text = files[page]
    assert "`a command` on 2 cores of a CPU" in text and "; images are split over 2 devices. A rollout" in text
    assert f"]({plot.name})" in text
    assert "| images | tokens | rollout, seconds |" in text and "### Length of the prompt" not in text
    assert "| 4 | 397 | 19.9 (19.9 to 19.9) | 0.201 |" in text and "| 1.00 | 1.00 |" in text
    # From 205 to 397 tokens, and from 397 to 1165.
    slow = math.log(4.97 / 3.05) / math.log(397 / 205), math.log(12.65 / 4.97) / math.log(1165 / 397)
    assert all(f"| {power:.2f} | 2.00 |" in text for power in slow)
    assert "of tokens, FLOPs with 2.00. Line: 2 s and 0.02 s a token, off by 0% at most." in text
    words = [one.text for one in ElementTree.fromstring(files[plot]).iter("{http://www.w3.org/2000/svg}text")]
    assert {"rollout", "update", "Images: images a second against images"} <= set(words)


@pytest.mark.slow
def test_devices_become_a_table_and_a_plot(measured):
    found, _ = measured
    found = found | {"factors": {"devices": found["factors"]["devices"]}}
    files = growth_page.files({"tiny_cpu_1999": found})
    page, plot = files
    assert plot.name == "cost_growth_tiny_cpu_1999_devices.svg" and f"]({plot.name})" in files[page]
    assert found["command"] in files[page]
    sent = programs(found)["data", "update"]["received"]["all-reduce"]
    assert f"| all-reduce {sent / 2**20:.3g} | 1.5" in files[page]
    assert "| alone | draw | 1 |" in files[page] and "| 100.0% |" in files[page]
    words = [one.text for one in ElementTree.fromstring(files[plot]).iter("{http://www.w3.org/2000/svg}text")]
    assert {*LAYOUTS, "update: peak MiB of a device"} <= set(words)


def test_the_page_is_made_of_the_kept_results():
    assert growth_page.kept() == growth_page.files(growth_page.stored()), "run python -m benchmarks.growth_page"


@pytest.mark.slow
def test_results_of_growth_are_not_on_the_page_of_comparisons(measured, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", measured[1].parent)
    assert tables.stored() == []
    monkeypatch.setattr(growth_page, "RESULTS", measured[1].parent)
    assert list(growth_page.stored().values()) == [measured[0]]
