"""The benchmark's numbers in a trainer's log: those of the report, from fewer questions."""

import numpy as np
import pytest
from bench_reader import Reader
from docs_pages import unexplained
from scipy.stats import spearmanr

from firm_jax.critic.bench.metrics import bench_metrics
from firm_jax.critic.bench.records import read_bench
from firm_jax.errors import DataError


def kind_and_sometimes_silent(request, score):
    if "circle" in request["prompt"]:
        return None
    return min(score + 1, 5) if request["criterion"].endswith("execution") else score


def test_the_log_has_the_numbers_of_the_benchmark():
    bench = read_bench("embedded:bench_edit", "edit")
    critic, waited = Reader(bench, kind_and_sometimes_silent), []
    found = bench_metrics(
        critic,
        "embedded:bench_edit",
        "edit",
        batch_size=50,
        progress=lambda batches: waited.append(len(batches)) or batches,
    )
    assert critic.calls == [50, 50, 20] and waited == [3]
    silent = np.array(["circle" in item.prompt for item in bench.items])
    execution = np.array([item.criterion == "execution" for item in bench.items])
    human = np.array([item.human for item in bench.items])
    assert 0 < silent.mean() < 1
    wrong, of = (human < 5) & execution, execution & ~silent
    assert found == {
        "eval/bench_mae": pytest.approx(wrong[~silent].mean()),
        "eval/bench_failure_rate": pytest.approx(silent.mean()),
        "eval/bench_mae_execution": pytest.approx(wrong[of].mean()),
        "eval/bench_mae_consistency": 0,
        "eval/bench_spearman_execution": pytest.approx(spearmanr(human[of], np.minimum(human[of] + 1, 5)).statistic),
        "eval/bench_spearman_consistency": pytest.approx(1),
    }
    assert unexplained(found) == []


def test_a_silent_critic_has_no_error():
    bench = read_bench("embedded:bench_gen", "gen")
    found = bench_metrics(Reader(bench, lambda *_: None), "embedded:bench_gen", "gen")
    assert found.pop("eval/bench_failure_rate") == 1
    assert set(found.values()) == {None} and "eval/bench_mae_instruction" in found


def test_a_folder_that_is_no_benchmark_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        bench_metrics(None, tmp_path, "gen")
