"""How good a critic is while it is trained: its loss on held-out examples, and the scores that it writes for them."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from firm_jax.critic.bench.metrics import bench_metrics
from firm_jax.critic.bench.records import CRITERIA, read_bench
from firm_jax.critic.rubric import RUBRICS
from firm_jax.critic.score import Critic, end_tokens, rubric_of
from firm_jax.critic.sft_data import Batches, on_mesh, read_scores
from firm_jax.data.conversations import Conversation
from firm_jax.run import Run


class Evaluator:
    """Evaluates trained parameters, always on the same held-out examples.

    Raises DataError for a benchmark that cannot be read, ConfigError when there is no rubric for its criteria.

    batches: the held-out examples. sums: `(trained, frozen, batch) -> sums`, as `sft.make_evaluation` makes it.
    whole: `(trained, frozen) -> params`, the network to be served. rubrics: of the critic that is made of it.
    """

    def __init__(self, run: Run, batches: Batches, sums, whole, graphdef, rubrics, mesh, settings):
        self.run, self.batches, self.mesh, self.settings = run, batches, mesh, settings
        self.sums, self.whole, self.graphdef, self.rubrics = sums, whole, graphdef, rubrics
        count = len(batches.examples)
        asked = count if settings.answers is None else min(settings.answers, count)
        self.asked = np.linspace(0, count - 1, asked).round().astype(int)  # from all over a source that may be sorted
        if settings.bench:  # read at each evaluation, and here so that what is wrong with it is known at once
            read_bench(settings.bench, settings.bench_task)
            for criterion in CRITERIA[settings.bench_task]:
                rubric_of(rubrics, RUBRICS[criterion])

    def __call__(self, trained, frozen) -> dict:
        metrics, settings = self._losses(trained, frozen), self.settings
        if not len(self.asked) and not settings.bench:
            return metrics
        critic = self._critic(self.whole(trained, frozen))
        if len(self.asked):
            examples = [self.batches.examples[int(number)] for number in self.asked]
            bar = partial(self.run.progress, description="held out")
            metrics |= score_errors(critic, examples, settings.max_new_tokens, bar)
        if settings.bench:
            metrics |= bench_metrics(
                critic, settings.bench, settings.bench_task, max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size, progress=partial(self.run.progress, description="benchmark"),
            )  # fmt: skip
        return metrics

    def _losses(self, trained, frozen) -> dict:
        """Means over all tokens of all held-out answers, so that batches do not matter."""
        total: dict[str, float] = {}
        for batch in self.batches.in_order():
            found = jax.device_get(self.sums(trained, frozen, on_mesh(batch, self.mesh)))
            total = {name: total.get(name, 0.0) + float(value) for name, value in found.items()}
        scored = total["score_tokens"] > 0
        return {
            "eval/loss": total["loss"] / total["weight"],
            "eval/score_loss": total["score_loss"] / total["score_tokens"] if scored else None,
        }

    def _critic(self, params) -> Critic:
        processor = self.batches.processor
        return Critic(
            nnx.merge(self.graphdef, params),
            processor,
            ends=end_tokens(processor.folder, processor),
            rubrics=self.rubrics,
            mesh=self.mesh,
            max_batch=self.settings.batch_size,
        )


def score_errors(critic: Critic, examples: list[Conversation], max_new_tokens: int, progress=iter) -> dict:
    """How far the critic's scores are from the answers' on held-out examples, by generation.

    Returns mean absolute error over all scores and per criterion (answers that cannot be read left out), the same of
    the best constant answer, and the share of unreadable answers.
    """
    requests = [{"images": example.images, "text": example.prompt} for example in examples]
    texts = critic.generate(requests, max_new_tokens, progress)
    right = [read_scores(example.answer).scores for example in examples]
    given = [read_scores(text).scores for text in texts]
    names = [example.criterion for example in examples]
    usable = [r is not None and g is not None and len(r) == len(g) for r, g in zip(right, given, strict=True)]
    metrics = {"eval/parse_failure_rate": 1 - float(np.mean(usable))}
    for name in sorted({"", *names}):
        rows = [i for i in range(len(examples)) if usable[i] and name in ("", names[i])]
        suffix = f"_{name}" if name else ""
        metrics[f"eval/mae{suffix}"] = _mean(
            [abs(a - b) for i in rows for a, b in zip(right[i], given[i], strict=True)]
        )
        lengths = {len(right[i]) for i in rows}
        if len(lengths) == 1:  # one kind of answer: then the best constant is the median of each score
            table = np.array([right[i] for i in rows])
            metrics[f"eval/mae_constant{suffix}"] = float(np.abs(table - np.median(table, axis=0)).mean())
    return metrics


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
