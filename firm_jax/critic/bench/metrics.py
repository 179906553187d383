"""How far a critic in training is from people, as numbers for its log."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from firm_jax.critic.bench import measures
from firm_jax.critic.bench.questions import as_they_are, ask
from firm_jax.critic.bench.records import CRITERIA, MAX_BAD_FRACTION, Fields, read_bench


def bench_metrics(
    critic,
    folder: str | Path,
    task: str,
    *,
    fields: Fields | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    max_new_tokens: int = 512,
    batch_size: int = 64,
    progress: Callable = iter,
) -> dict[str, float | None]:
    """Ask a critic every item of a benchmark as it is: no probes, no intervals, nothing written.

    critic: a `Critic`, such as one made of the weights in training, or a `RemoteCritic`. folder, task, fields,
    max_bad_fraction: as in `read_bench`, which raises the same errors; call it before a long training to have them at
    once. batch_size: questions at once. progress: wraps the list of batches.

    Returns `eval/bench_mae`, over all items of all criteria as the paper's overall, `eval/bench_failure_rate`, the
    share of items without a score, and for each criterion `eval/bench_mae_<criterion>` and
    `eval/bench_spearman_<criterion>`. Errors are over the items with a score; what is not known is None.
    """
    bench = read_bench(folder, task, fields, max_bad_fraction)
    asked = as_they_are(bench)
    batches = [range(len(asked))[first : first + batch_size] for first in range(0, len(asked), batch_size)]
    records = [record for numbers in progress(batches) for record in ask(critic, asked, numbers, max_new_tokens)]
    human = np.array([item.human for item in bench.items], float)
    predicted = np.array([np.nan if one["score"] is None else one["score"] for one in records], float)
    criterion = np.array([item.criterion for item in bench.items])
    found = {
        "eval/bench_mae": measures.mae(human, predicted),
        "eval/bench_failure_rate": measures.failure_rate(human, predicted),
    }
    for name in CRITERIA[task]:
        of = criterion == name
        found[f"eval/bench_mae_{name}"] = measures.mae(human[of], predicted[of])
        found[f"eval/bench_spearman_{name}"] = measures.spearman(human[of], predicted[of])
    return {name: None if np.isnan(value) else value for name, value in found.items()}
