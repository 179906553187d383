"""metrics.jsonl is JSON whatever the numbers are, and can be cut back; TensorBoard gets the same numbers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from firm_jax.errors import WorkdirError
from firm_jax.metrics import JsonLines, MetricWriter, headline


def strict_lines(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_line_has_step_epoch_time_and_plain_numbers(tmp_path):
    writer = MetricWriter(tmp_path)
    returned = writer.write(
        jnp.int32(4),
        2,
        {
            "loss/total": jnp.bfloat16(0.5),
            "reward/mean": np.float64(0.25),
            "n": np.int64(3),
            "throughput/mfu": None,
            "loss/policy": jnp.nan,
            "grad/norm": float("inf"),
        },
    )
    writer.close()
    (line,) = strict_lines(tmp_path / "metrics.jsonl")
    assert line.pop("time") > 1.7e9
    assert line.pop("non_finite") == ["loss/policy", "grad/norm"]
    assert line == {"step": 4, "epoch": 2, **returned}
    assert returned == {
        "loss/total": 0.5,
        "reward/mean": 0.25,
        "n": 3,
        "throughput/mfu": None,
        "loss/policy": None,
        "grad/norm": None,
    }


def test_tensorboard_has_scalars_and_images(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, 1, {"reward/mean": 0.5, "throughput/mfu": None})
    writer.image("held-out", np.zeros((4, 4, 3), np.uint8), 1)
    writer.close()
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents*")
    content = events.read_bytes()
    assert b"reward/mean" in content and b"held-out" in content and b"PNG" in content
    assert b"throughput/mfu" not in content


def test_rewinding_drops_what_a_checkpoint_does_not_cover(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, 1, {"a": 1})
    writer.sync()
    covered = writer.length
    writer.write(2, 2, {"a": 2})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "half a li')
    writer = MetricWriter(tmp_path)
    writer.rewind(covered, step=1)
    writer.write(2, 2, {"a": 20})
    writer.close()
    assert [(line["step"], line["a"]) for line in strict_lines(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 20)]


def test_other_processes_write_nothing(tmp_path):
    writer = MetricWriter(tmp_path, enabled=False)
    assert writer.write(1, 1, {"a": jnp.float32(1)}) == {"a": 1.0}
    writer.sync()
    assert writer.length == 0
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_records_are_json_whatever_is_in_them(tmp_path):
    lines = JsonLines(tmp_path / "judgements.jsonl")
    record = {"prompt": "bad \udc80 text \n é", "score": np.int32(3), "expected": np.float32("nan"), "box": (1, 2)}
    lines.append(record)
    lines.close()
    (line,) = strict_lines(tmp_path / "judgements.jsonl")
    assert line == {"prompt": "bad \udc80 text \n é", "score": 3, "expected": None, "box": [1, 2]}


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match=r"file/metrics\.jsonl.*--workdir"):
        JsonLines(tmp_path / "file" / "metrics.jsonl")


def test_the_headline_shows_what_there_is():
    assert (
        headline({"loss/total": 0.51234, "reward/mean": 0.5, "grad/norm": None}) == "reward/mean 0.5  loss/total 0.5123"
    )


def test_an_array_is_not_a_metric(tmp_path):
    with pytest.raises(ValueError, match="reward/all"):
        MetricWriter(tmp_path).write(1, 1, {"reward/all": jnp.zeros(3)})
