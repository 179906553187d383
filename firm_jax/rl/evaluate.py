"""How good the policy is on prompts that it is never trained on."""

from collections.abc import Callable, Sequence

import numpy as np
from absl import logging
from PIL import Image, ImageOps

from firm_jax.critic import Critic
from firm_jax.data.edits import EditRecord
from firm_jax.data.groups import EpochGroups
from firm_jax.data.images import to_array
from firm_jax.data.prompts import PromptRecord
from firm_jax.errors import DataError
from firm_jax.gallery import is_due
from firm_jax.rl.audit import keep
from firm_jax.rl.rewards import Reward
from firm_jax.rl.rollout import (
    conditioner,
    judge,
    judgement_metrics,
    make_sampler,
    mean_or_none,
    scores,
    shown_sources,
    sources_of,
)
from firm_jax.run import Run
from firm_jax.shapes import oracle
from firm_jax.shapes.edit_oracle import compare_readings
from firm_jax.shapes.edits import Edit
from firm_jax.shapes.scene import Prompt

SHOWN = 16  # pictures of the grid
# Criterion of the reward -> what an oracle calls the same question. Of quality no oracle knows the truth.
ASKED_ALIKE = {"instruction": "fraction", "execution": "execution", "consistency": "preservation"}


class Evaluator:
    """Draws `eval.images_per_prompt` images of `eval.prompts` held-out prompts or edits, always from the same noise.

    `eval.judged` of them go to the critic. `eval.oracle` says that they are of the shapes world, whose oracle then
    tells from the pixels which of a prompt's requirements hold, or what of an edit was carried out and what kept.
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
        sources = shown_sources(prompts, settings)
        self.sources = [sources[row] for row in rows]
        self.oracle = make_oracle(prompts) if settings.oracle else None
        self.conditioned = conditioner(generator, settings, prompts)(prompts)
        self.sample = make_sampler(
            generator, settings, generator.mesh, lambda chunks: run.progress(chunks, "evaluating")
        )
        self.key = key

    def __call__(self, lora, *, step: int, epoch: int) -> dict[str, float | None]:
        """Metrics `eval/*` of one policy (a LoRA tree, strength folded in), and a grid of pictures for the report."""
        with self.run.timer("eval"):
            _, images = self.sample(lora, self.conditioned, self.rows, self.numbers, self.key)
            # A picture that is not finite is black: the generator has failed.
            found = self.oracle(np.nan_to_num(images), self.rows) if self.oracle else {}
            metrics, captions = self._judge(images, truth_of(found), epoch)
            metrics |= self._oracle_metrics(found)
        texts = [f"{p.text} | {caption}" for p, caption in zip(self.prompts, captions, strict=True)]
        shown, columns = images[:SHOWN], 4
        if _of_edits(self.prompts):
            shown, columns = beside_sources(shown, self.sources[:SHOWN]), 2
        self.run.images("eval", shown, texts[:SHOWN], step=step, epoch=epoch, columns=columns)
        return metrics

    def truth(self, group: EpochGroups, images: np.ndarray) -> dict[str, np.ndarray]:
        """What the oracle finds of an epoch's M images, by the critic's criterion, [M] on [0, 1].

        Empty without an oracle, and for prompts that are not of the shapes world.
        """
        if self.oracle is None:
            return {}
        try:
            return truth_of(make_oracle(group.prompts)(np.nan_to_num(images), group.group_ids))
        except DataError as error:
            logging.warning("no oracle for the pictures kept from training: %s", error)
            return {}

    def _judge(self, images: np.ndarray, truth: dict, epoch: int) -> tuple[dict[str, float | None], list[str]]:
        count, kind = min(self.config.eval.judged, len(images)), self.config.critic.score
        if count == 0:
            return {}, [""] * len(images)
        judged = judge(
            self.critic,
            images[:count],
            self.prompts[:count],
            self.sources[:count],
            self.reward.criteria,
            self.config.critic,
            lambda batches: self.run.progress(batches, "judging"),
        )
        pairs = {name: scores(judgements, kind) for name, judgements in judged.items()}
        rewards, valid = self.reward({n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()})
        rewards = np.asarray(rewards)
        if is_due(epoch, self.config.eval.every, self.config.train.epochs):
            about = self.prompts[:count], self.sources[:count], images[:count], judged, rewards, truth
            keep(self.run, "eval", epoch, *about, kind)
        metrics = judgement_metrics(judged, kind) | {"reward": mean_or_none(rewards)}
        names = {name: f"eval/{name.removeprefix('reward/').replace('/', '_')}" for name in metrics}
        captions = ["not judged"] * count + [""] * (len(images) - count)
        for index in np.flatnonzero(valid):
            found = ", ".join(f"{name} {1 + 4 * values[index]:.3g}" for name, (values, _) in pairs.items())
            captions[index] = f"reward {rewards[index]:.2f} ({found})"
        return {names[name]: value for name, value in metrics.items()}, captions

    def _oracle_metrics(self, found: dict[str, np.ndarray]) -> dict[str, float]:
        means = {f"eval/oracle_{name}": float(values.mean()) for name, values in found.items()}
        errors = {f"eval/oracle_{name}_se": clustered_error(values, self.rows) for name, values in found.items()}
        return means | errors


def _of_edits(records: Sequence[PromptRecord]) -> bool:
    return isinstance(records[0], EditRecord)


def beside_sources(images: np.ndarray, sources: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Each of N edited pictures [N, H, W, 3] to the right of its source images, in one picture of twice its width.

    sources: [N] uint8 [h, w, 3] each; they are shown whole, several of them next to each other.
    """
    count, height, width, _ = images.shape
    gap = np.ones((count, height, max(1, width // 16), 3), np.float32)
    return np.concatenate([[_tile(before, height, width) for before in sources], gap, images], axis=2)


def _tile(sources: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    tile = Image.new("RGB", (width, height), "white")
    each = width // len(sources)
    for place, source in enumerate(sources):
        tile.paste(ImageOps.pad(Image.fromarray(source), (each, height), color="white"), (place * each, 0))
    return to_array(tile)


def make_oracle(prompts: Sequence[PromptRecord]) -> Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """The oracle of edits or that of prompts, whichever these are."""
    return (edit_oracle if _of_edits(prompts) else prompt_oracle)(prompts)


def truth_of(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What an oracle has found, by the critic's criterion that asks the same."""
    return {criterion: found[name] for criterion, name in ASKED_ALIKE.items() if name in found}


def prompt_oracle(prompts: Sequence[PromptRecord]) -> Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """`ask(pictures [M, H, W, 3], rows [M])`: of each picture, drawn for prompt `rows`, the share of its requirements
    that hold (`fraction`) and whether all do (`accuracy`), [M] each.

    Raises DataError for a prompt that is not of the shapes world.
    """
    wanted = [Prompt.from_json({"prompt": p.text, **p.metadata}) for p in prompts]

    def ask(pictures, rows):
        holds = [oracle.check(picture, wanted[row]) for picture, row in zip(pictures, rows, strict=True)]
        return {"fraction": np.array([np.mean(h) for h in holds]), "accuracy": np.array([all(h) for h in holds], float)}

    return ask


def edit_oracle(edits: Sequence[EditRecord]) -> Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """`ask(pictures [M, H, W, 3], rows [M])`: of each picture, made for edit `rows`, the share of the requested changes
    that hold (`execution`), of all else that was kept (`preservation`), both together (`edit`), and whether all of it
    holds (`accuracy`), [M] each.

    Raises DataError for an edit that is not of the shapes world.
    """
    wanted = [Edit.from_json({"prompt": edit.text, **edit.metadata}) for edit in edits]
    before = [oracle.inspect(to_array(source)) for source, *_ in sources_of(edits)]

    def ask(pictures, rows):
        found = [
            compare_readings(before[row], oracle.inspect(picture), wanted[row])
            for picture, row in zip(pictures, rows, strict=True)
        ]
        return {
            "execution": np.array([one.execution for one in found]),
            "preservation": np.array([one.preservation for one in found]),
            "edit": np.array([one.score for one in found]),
            "accuracy": np.array([one.accurate for one in found], float),
        }

    return ask


def clustered_error(values: np.ndarray, clusters: np.ndarray) -> float:
    """Standard error of the mean of `values` [M] when those of one cluster (a prompt's images) may go together."""
    names, slots = np.unique(clusters, return_inverse=True)
    sums = np.zeros(len(names))
    np.add.at(sums, slots, values - values.mean())
    return float(np.sqrt(np.square(sums).sum() * len(names) / max(len(names) - 1, 1)) / len(values))
