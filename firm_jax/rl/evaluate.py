"""How good the policy is on prompts that it is never trained on."""

from collections.abc import Sequence

import numpy as np

from firm_jax.critic import Critic
from firm_jax.data.prompts import PromptRecord
from firm_jax.rl.rewards import Reward
from firm_jax.rl.rollout import judge, judgement_metrics, make_sampler, mean_or_none, scores
from firm_jax.run import Run
from firm_jax.shapes import oracle
from firm_jax.shapes.scene import Prompt

SHOWN = 16  # pictures of the grid


class Evaluator:
    """Draws `eval.images_per_prompt` images of `eval.prompts` held-out prompts, always from the same noise.

    `eval.judged` of them go to the critic. `eval.oracle` says that the prompts are of the shapes world, whose oracle
    then tells from the pixels which of a prompt's requirements hold.
    """

    def __init__(
        self, run: Run, generator, critic: Critic, reward: Reward, held_out: Sequence[PromptRecord], config, key
    ):
        settings = config.eval
        self.run, self.critic, self.reward, self.config = run, critic, reward, config
        prompts = list(held_out[: settings.prompts])
        if len(prompts) < settings.prompts:
            run.say(
                f"eval.prompts is {settings.prompts}, but there are only {len(prompts)} held-out prompts: all are used"
            )
        rows = np.tile(np.arange(len(prompts), dtype=np.int32), settings.images_per_prompt)
        self.prompts, self.rows = [prompts[row] for row in rows], rows
        self.numbers = np.arange(len(rows), dtype=np.uint32)
        self.conditioning = generator.encode_prompts([prompt.text for prompt in prompts], settings.max_text_tokens)
        self.sample = make_sampler(
            generator, settings, generator.mesh, lambda chunks: run.progress(chunks, "evaluating")
        )
        self.key = key

    def __call__(self, lora, *, step: int, epoch: int) -> dict[str, float | None]:
        """Metrics `eval/*` of one policy (a LoRA tree, strength folded in), and a grid of pictures for the report."""
        with self.run.timer("eval"):
            _, images = self.sample(lora, self.conditioning, self.rows, self.numbers, self.key)
            metrics, captions = self._judge(images)
            if self.config.eval.oracle:
                metrics |= self._ask_oracle(images)
        texts = [f"{p.text} | {caption}" for p, caption in zip(self.prompts, captions, strict=False)]
        self.run.images("eval", images[:SHOWN], texts[:SHOWN], step=step, epoch=epoch)
        return metrics

    def _judge(self, images: np.ndarray) -> tuple[dict[str, float | None], list[str]]:
        count, kind = min(self.config.eval.judged, len(images)), self.config.critic.score
        if count == 0:
            return {}, [""] * len(images)
        judged = judge(
            self.critic,
            images[:count],
            self.prompts[:count],
            self.reward.criteria,
            self.config.critic,
            lambda batches: self.run.progress(batches, "judging"),
        )
        pairs = {name: scores(judgements, kind) for name, judgements in judged.items()}
        rewards, valid = self.reward({n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()})
        rewards = np.asarray(rewards)
        metrics = judgement_metrics(judged, kind) | {"reward": mean_or_none(rewards)}
        names = {name: f"eval/{name.removeprefix('reward/').replace('/', '_')}" for name in metrics}
        captions = [f"reward {r:.2f}" if ok else "not judged" for r, ok in zip(rewards, np.asarray(valid), strict=True)]
        return {names[name]: value for name, value in metrics.items()}, captions + [""] * (len(images) - count)

    def _ask_oracle(self, images: np.ndarray) -> dict[str, float]:
        wanted = [Prompt.from_json({"prompt": p.text, **p.metadata}) for p in self.prompts]
        pictures = np.nan_to_num(images)  # one that is not finite is black: the generator has failed
        holds = [oracle.check(picture, prompt) for picture, prompt in zip(pictures, wanted, strict=True)]
        fraction, accuracy = np.array([np.mean(h) for h in holds]), np.array([all(h) for h in holds], float)
        return {
            "eval/oracle_fraction": float(fraction.mean()),
            "eval/oracle_fraction_se": clustered_error(fraction, self.rows),
            "eval/oracle_accuracy": float(accuracy.mean()),
            "eval/oracle_accuracy_se": clustered_error(accuracy, self.rows),
        }


def clustered_error(values: np.ndarray, clusters: np.ndarray) -> float:
    """Standard error of the mean of `values` [M] when those of one cluster (a prompt's images) may go together."""
    names, slots = np.unique(clusters, return_inverse=True)
    sums = np.zeros(len(names))
    np.add.at(sums, slots, values - values.mean())
    return float(np.sqrt(np.square(sums).sum() * len(names) / max(len(names) - 1, 1)) / len(values))
