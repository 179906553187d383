"""The devices' idle share: from intervals made by hand, and from a trace of a program and of a sleep."""

import time
from types import SimpleNamespace as Fake

import jax
import jax.numpy as jnp
import pytest

from firm_jax.errors import DataError
from firm_jax.idle import Span, Timeline, common, idle, merged, read_trace, timeline_of, without
from firm_jax.profiling import PhaseTimers, ProfileWindow

S = 1e9  # nanoseconds


def span(start, end, name) -> Span:
    return Span(start * S, end * S, name)


def test_sets_of_moments():
    assert merged([(5, 6), (0, 2), (1, 3), (1, 2), (3, 4), (8, 8)]) == [(0, 4), (5, 6)]
    assert without([(0, 10)], [(-1, 1), (2, 3), (9, 12)]) == [(1, 2), (3, 9)]
    assert without([(0, 1), (2, 3), (4, 6)], [(2, 5)]) == [(0, 1), (5, 6)]
    assert without([(0, 2)], []) == [(0, 2)] and without([], [(0, 1)]) == []
    assert common([(0, 4), (5, 9)], [(3, 6), (8, 20)]) == [(3, 4), (5, 6), (8, 9)]


def test_idle_shares_of_two_devices_by_phase():
    timeline = Timeline(
        {
            # Overlaps, one within another, and one that begins before the epoch and one that ends after it.
            "0": [span(8, 11, "encode"), span(12, 16, "draw"), span(13, 14, "draw"), span(15, 17, "draw")],
            "1": [span(12, 14, "draw"), span(19, 25, "update")],
        },
        [
            span(10, 20, "iteration"),
            span(12, 17, "rollout"),
            span(17, 19, "critic"),
            span(17.1, 18.9, "tokenise"),
            span(17.2, 18.8, "split"),
            span(17.2, 17.3, "join"),
        ],
    )
    found = idle(timeline)
    assert found["seconds"] == pytest.approx(10) and found["devices"] == 2
    assert found["idle"] == pytest.approx(((10 - 6) + (10 - 3)) / 2 / 10)
    shares = {name: (part["seconds"], part["idle"]) for name, part in found["phases"].items()}
    assert shares == {
        "rollout": (pytest.approx(5), pytest.approx((0 + 3) / 2 / 5)),
        "critic": (pytest.approx(2), 1.0),
        "rest": (pytest.approx(3), pytest.approx((2 + 2) / 2 / 3)),
    }
    # Stretches in which no device ran anything, and what stands around them.
    assert [(gap["seconds"], gap["at"], gap["phase"]) for gap in found["gaps"]] == [
        (pytest.approx(2), pytest.approx(7), "critic"),
        (pytest.approx(1), pytest.approx(1), "rest"),
    ]
    first, second = found["gaps"]
    assert (first["after"], first["before"], first["host"]) == ("draw", "update", ["tokenise", "split"])
    assert (second["after"], second["before"], second["host"]) == ("encode", "draw", [])
    assert len(idle(timeline, largest=1)["gaps"]) == 1


def test_devices_without_a_program_are_idle_all_the_time():
    found = idle(Timeline({"0": []}, [span(0, 1, "iteration")]))
    assert found["idle"] == 1 and found["gaps"][0]["after"] is None and found["gaps"][0]["before"] is None


def test_which_events_of_a_trace_count():
    def line(name, *events):
        made = [Fake(name=n, start_ns=a * S, end_ns=b * S, stats=stats.items()) for n, a, b, stats in events]
        return Fake(name=name, events=made)

    def busy(plane):
        return timeline_of([plane]).busy

    tpu = Fake(
        name="/device:TPU:0",
        lines=[line("XLA Modules", ("jit_draw", 0, 4, {})), line("Steps", ("1", 0, 9, {})), line("XLA Ops")],
    )
    assert busy(tpu) == {"/device:TPU:0": [span(0, 4, "jit_draw")]}
    gpu = Fake(
        name="/device:GPU:1",
        lines=[
            line("Stream #13(Compute,MemcpyD2H)", ("gemm", 1, 2, {"hlo_module": "jit_draw"}), ("MemcpyD2H", 3, 9, {})),
            line("XLA Modules", ("jit_draw", 0, 9, {})),
        ],
    )
    assert busy(gpu) == {"/device:GPU:1": [span(1, 2, "jit_draw")]}
    operation = {"hlo_op": "dot", "hlo_module": "jit_draw", "device_ordinal": 1}
    cpu = Fake(
        name="/host:CPU",
        lines=[
            line("python", ("iteration", 0, 9, {}), ("$call", 0, 1, {}), ("dot", 1, 2, operation)),
            line("tf_XLAEigen", ("dot.1", 3, 4, operation), ("ThunkExecutor::Execute", 3, 9, {})),
        ],
    )
    found = timeline_of([cpu, Fake(name="/host:metadata", lines=[]), Fake(name="Task Environment", lines=[])])
    assert found.busy == {"cpu 1": [span(1, 2, "jit_draw"), span(3, 4, "jit_draw")]}
    assert found.thread == [span(0, 9, "iteration"), span(0, 1, "$call")]


def test_a_real_trace_tells_work_from_sleep(tmp_path):
    @jax.jit
    def work(x):
        return jax.lax.fori_loop(0, 20, lambda _, x: jnp.sin(x @ x), x)

    x, timers, window = work(jnp.ones((600, 600))), PhaseTimers(), ProfileWindow(1, 1, tmp_path)
    for number in range(2):
        with window.iteration(number):
            with timers.measure("update"):
                for _ in range(3):
                    x = work(x).block_until_ready()
            with timers.measure("critic"):
                time.sleep(0.2)
    found = idle(read_trace(tmp_path))
    assert found["phases"]["update"]["idle"] < 0.5 and found["phases"]["critic"]["idle"] > 0.95
    assert found["gaps"][0]["phase"] == "critic" and found["gaps"][0]["seconds"] >= 0.19
    assert found["gaps"][0]["after"] == "jit_work"
    assert any("sleep" in call for call in found["gaps"][0]["host"])  # traces of `profile` hold Python's calls


def test_a_missing_trace_is_told(tmp_path):
    with pytest.raises(DataError, match=r"no trace .* set --config.profile.steps=1"):
        read_trace(tmp_path)
