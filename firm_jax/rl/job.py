"""What the RL loop works with: the models, the prompts, the jitted programs, and what is said about each epoch."""

import contextlib
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from absl import logging

from firm_jax.critic import Critic, Judgement
from firm_jax.data.edits import load_edits
from firm_jax.data.groups import EpochGroups, PromptGroups
from firm_jax.data.prompts import PromptSplits, load_prompts
from firm_jax.data.records import write_quarantine
from firm_jax.embedded import embedded_path
from firm_jax.errors import CriticError, DataError, FirmError, NonFiniteError, WeightsError
from firm_jax.gallery import is_due
from firm_jax.generation import Generator, check_size
from firm_jax.generation.generator import pipeline_class, read_model_index
from firm_jax.interop.hub import identity, resolve
from firm_jax.mesh import to_host
from firm_jax.models.lora import LoraConfig, init_lora, lora_shardings, scaled
from firm_jax.profiling import model_flops_utilisation
from firm_jax.rl.advantages import group_statistics, mean_group_std, solved, zero_std_ratio
from firm_jax.rl.audit import keep
from firm_jax.rl.checks import check_editing
from firm_jax.rl.evaluate import Evaluator
from firm_jax.rl.judging import (
    check_of_prompts,
    connect,
    critic_name,
    is_remote,
    judging_of,
    too_many_failures,
)
from firm_jax.rl.nft import old_policy_decay
from firm_jax.rl.rewards import resolve_reward
from firm_jax.rl.rollout import (
    conditioner,
    drawing_flops,
    judgement_metrics,
    make_sampler,
    mean_or_none,
    scores,
    shown_sources,
    write_judgements,
)
from firm_jax.rl.start import read_start
from firm_jax.rl.update import init_state, learning_flops, make_optimizer, make_update, optimizer_batches
from firm_jax.run import Run

# What a random key is for; each purpose has its own stream below the run's one root key.
LORA, EVALUATION, ROLLOUT, UPDATE = range(4)


def find_weights(names: Mapping[str, str]) -> dict[str, Path]:
    """The local folder of every model; one WeightsError that tells of all that are missing."""
    folders, missing = {}, []
    for part, name in names.items():
        try:
            folders[part] = resolve(name)
        except WeightsError as error:
            missing.append(f"{part}: {error}")
    if missing:
        raise WeightsError("\n\n".join(missing))
    return folders


class Job:
    """The state of an RL run outside its arrays.

    Made before the run's folder, so that a run without weights or prompts leaves none; the weights are read after it,
    so that a folder in use, or a config that contradicts its checkpoint, is not told only after minutes of loading.
    """

    def __init__(self, config, mesh):
        self.config, self.mesh = config, mesh
        local = {} if is_remote(config.critic) else {"critic.model": config.critic.model}
        self.folders = find_weights({"model": config.model} | local)
        self.base_weights = {part: identity(folder) for part, folder in self.folders.items()}
        for section in (config.rollout, config.eval):
            check_size(self.folders["model"], section.height, section.width)
        self.reward_function = resolve_reward(config.reward.name, config.reward.weights)
        self.pipeline = pipeline_class(read_model_index(self.folders["model"]))
        check_editing(config, self.reward_function, self.pipeline.edits)
        self.prompts = self._read_prompts()
        self.groups = PromptGroups(self.prompts.train, seed=config.seed, **config.group)
        self.keys = [jax.random.fold_in(jax.random.key(config.seed), purpose) for purpose in range(4)]
        self.lora = LoraConfig(config.lora.rank, config.lora.alpha, tuple(config.lora.targets))
        self.start = read_start(config.lora.init, self.lora, self.folders["model"] / "transformer")
        self.skipped = 0
        self.critic = connect(config.critic, self.reward_function.criteria)
        if self.critic is not None:  # remote, and pinned like the weights that the run is made over
            self.base_weights["critic.model"] = self.critic.identity

    def _read_prompts(self) -> PromptSplits:
        """The prompts, or for a pipeline that edits the instructions with their source images."""
        prompts = self.config.prompts
        given = {
            "held_out_source": prompts.held_out and (embedded_path(prompts.held_out) or prompts.held_out),
            "max_bad_fraction": prompts.max_bad_fraction,
            "check": check_of_prompts(
                self.config, self.reward_function.criteria, self.folders.get("critic.model"), self.pipeline.edits
            ),
        }
        source = embedded_path(prompts.train) or prompts.train
        if not self.pipeline.edits:
            return load_prompts(source, **given)
        return load_edits(source, max_images=self.pipeline.max_images, image_folder=prompts.image_folder, **given)

    def begin(self, run: Run) -> tuple[dict, int]:
        """The state to start or to continue from, and how many epochs are done. Evaluates a policy not yet trained."""
        config, settings = self.config, self.config.train
        self.run = run
        if run.is_main:
            write_quarantine(run.workdir / "quarantine.jsonl", self.prompts.quarantined)
        self._load()
        lora = self._first_lora()
        optimizer = make_optimizer(settings)
        self._update = make_update(
            partial(self.generator.velocity, remat=settings.remat), optimizer, settings, self.lora.scale
        )
        self._condition = conditioner(self.generator, config.rollout, self.prompts.train)
        self._sample = make_sampler(self.generator, config.rollout, self.mesh, self._bar("rollout"))
        self._sigmas = self.generator.sigmas(config.rollout.steps, config.rollout.height, config.rollout.width)
        self._evaluate = Evaluator(
            run, self.generator, self.critic, self.reward_function, self.prompts.held_out, config, self.keys[EVALUATION]
        )
        state = init_state(lora, optimizer)
        if restored := run.restore(state):
            self.groups.set_state(restored.data["groups"])
            self.skipped = restored.data["skipped"]
            return restored.state, restored.epoch
        run.log(0, 0, self._evaluate(self._policy(state["ema"]), step=0, epoch=0))
        return state, 0

    def _first_lora(self):
        """The LoRA that the run begins with, on the mesh: the one that `lora.init` names, or a random one."""
        if self.start is not None:
            return self.generator.place_lora(self.start)
        draw = partial(init_lora, abstract_params=self.generator.params, config=self.lora)
        placed = lora_shardings(jax.eval_shape(draw, self.keys[LORA]), self.generator.sharding_rules, self.mesh)
        return jax.jit(draw, out_shardings=placed)(self.keys[LORA])

    def _load(self) -> None:
        config, mesh = self.config, self.mesh
        self.run.say(f"loading {config.model} and {critic_name(config.critic)}")
        self.generator = Generator.from_pretrained(
            self.folders["model"], dtype=config.dtype, mesh=mesh, quantize=config.quantize
        )
        self.critic = self.critic or Critic.from_pretrained(
            self.folders["critic.model"],
            dtype=config.dtype,
            mesh=mesh,
            rubrics=config.critic.rubrics,
            max_batch=config.critic.batch_size,
            answer=config.critic.answer,
        )

    def next_group(self, state: dict) -> EpochGroups:
        """P prompts and the K images of each. Remembers where everything stands, for a stop within the epoch."""
        self._step, self._started, data = int(state["step"]), time.perf_counter(), self._data()
        self.run.hold(state, data, step=self._step, epoch=data["groups"]["epoch"])
        group = next(self.groups)
        self.drawn_for = [group.prompts[row] for row in group.group_ids]
        self.sources = self._open_sources(group)
        given = self.drawn_for, self.sources, self.reward_function.criteria, self.config.critic
        self.group, self.judging = group, judging_of(self.critic, *given)
        self.conditioned = self._condition(group.prompts)
        return group

    def _open_sources(self, group: EpochGroups) -> list[list[np.ndarray]]:
        """What the critic is shown before each of the epoch's images. Stops the run, saved, when a file has changed."""
        try:
            sources = shown_sources(group.prompts, self.config.rollout)
        except DataError as error:
            self._stop(group, DataError, str(error))
        return [sources[row] for row in group.group_ids]

    def sample(self, old, group: EpochGroups) -> tuple[np.ndarray, np.ndarray]:
        """Final latents [M, h, w, C] and images [M, H, W, 3] of the old policy, on the host."""
        rows, key = (group.group_ids, group.sample_indices), self.keys[ROLLOUT]
        with self.run.timer("rollout"):
            latents, images = self._sample(self._policy(old), self.conditioned, *rows, key, self.judging.drawn)
        if bad := [p.text for p, image in zip(self.drawn_for, images, strict=True) if not np.isfinite(image).all()]:
            told = f"{len(bad)} of {len(images)} images are not finite, the first of the prompt {bad[0]!r}"
            if len(bad) > (limit := self.config.critic.max_failure_rate) * len(images):
                remedy = "Start another run with a lower train.learning_rate, or with dtype float32."
                self._stop(group, NonFiniteError, f"{told}, more than critic.max_failure_rate = {limit}. {remedy}")
            logging.warning("epoch %d: %s; they are not judged and not learned from", group.epoch + 1, told)
        return latents, images

    def judge(self, images: np.ndarray) -> dict[str, list[Judgement]]:
        """The critic's judgements of the epoch's images, by criterion of the reward. A remote critic has been asked
        since the first of them were drawn: here the last ones are waited for."""
        with self.run.timer("critic"), self._stopping():
            return self.judging.judgements(images, self._bar("critic"))

    def reward(self, images, judged: dict[str, list], group: EpochGroups) -> tuple[np.ndarray, np.ndarray]:
        """Rewards [M] and which of them exist. Stops the run, saved, when the critic fails too often."""
        kind = self.config.critic.score
        found = {name: scores(judgements, kind) for name, judgements in judged.items()}
        rewards, valid = self.reward_function(
            {name: values for name, (values, _) in found.items()}, {name: exist for name, (_, exist) in found.items()}
        )
        rewards, valid = np.asarray(rewards), np.asarray(valid)
        problem = too_many_failures(judged, self.config.critic)
        keeps = bool(problem) or is_due(group.epoch + 1, 1, self.config.train.epochs)
        self.run.beside(self._record, group, self.drawn_for, self.sources, images, judged, rewards, keeps)
        if problem:
            self._stop(group, CriticError, problem)
        return rewards, valid

    def _record(self, group: EpochGroups, prompts, sources, images, judged: dict[str, list], rewards, keeps: bool):
        """The epoch's judgements and, if it keeps any, its pictures go to the run's folder."""
        files = {}
        if keeps:
            about = prompts, sources, images, judged, rewards, self._evaluate.truth(group, images)
            files = keep(self.run, "train", group.epoch + 1, *about, self.config.critic.score)
        write_judgements(self.run, group.epoch, prompts, judged, rewards, files)

    def update(self, state: dict, group: EpochGroups, latents, r, valid) -> tuple[dict, dict[str, float | None]]:
        """The epoch's optimizer steps: the new state and the mean of the loss's terms."""
        settings, terms = self.config.train, []
        batches = optimizer_batches(group, latents, r, valid, self._sigmas, self.config.seed, settings, self.mesh)
        key = jax.random.fold_in(self.keys[UPDATE], group.epoch)
        with self.run.timer("update"):
            for batch in self.run.progress(batches, "update", settings.updates_per_epoch):
                state, one = self._update(self.generator.params, state, self.conditioned[0], batch, key)
                terms.append({name: value.item() for name, value in jax.device_get(one).items()})
                if terms[-1]["update/skipped"]:
                    self._skip(group, batch, terms[-1])
        made = [one for one in terms if not one["update/skipped"]]
        means = {name: float(np.mean([one[name] for one in made])) if made else None for name in terms[0]}
        return state, means | {"update/made": len(made)}

    def _skip(self, group: EpochGroups, batch: dict, terms: dict[str, float]) -> None:
        """An update that had nothing to learn from, or would have brought in a NaN, was not made: say so, keep its
        prompts, stop when it repeats."""
        self.skipped += 1
        file, limit = self.run.workdir / "skipped_updates.jsonl", self.config.train.max_skipped_updates
        reason = "loss or gradient not finite" if terms["update/samples"] else "no image has a reward"
        record = {
            "epoch": group.epoch,
            "step": self._step,
            "reason": reason,
            **{name: repr(value) for name, value in terms.items()},
            "prompts": [group.prompts[row].text for row in np.unique(to_host(batch["prompt"]))],
        }
        if self.run.is_main:
            with file.open("a") as out:
                out.write(json.dumps(record) + "\n")
        logging.warning("epoch %d: update skipped: %s; see %s", group.epoch + 1, reason, file)
        if self.skipped > limit:
            self._stop(
                group,
                NonFiniteError,
                f"{self.skipped} updates had to be skipped, more than train.max_skipped_updates = {limit}; the last "
                f"because: {reason}. Their prompts are in {file}. Look at these prompts' judgements, or start "
                "another run with a lower train.learning_rate.",
            )

    def _stop(self, group: EpochGroups, kind: type[FirmError], message: str) -> NoReturn:
        """End the run with an error, saved as it was at the epoch's start."""
        self.run.save_held()
        raise kind(f"epoch {group.epoch + 1}: {message} The run is saved in {self.run.workdir} as it was before it.")

    @contextlib.contextmanager
    def _stopping(self):
        """Where a critic may turn out to be another one: the run then ends, saved."""
        try:
            yield
        except CriticError as error:
            self._stop(self.group, CriticError, str(error))

    def end_epoch(self, state: dict, group: EpochGroups, judged, rewards, valid, terms) -> None:
        """Ban, evaluate, log and save, as the config asks."""
        settings, epoch, step = self.config.train, group.epoch + 1, int(state["step"])
        statistics = group_statistics(rewards, group.group_ids, valid)
        if settings.ban_solved_prompts:
            self.groups.ban(group.prompt_indices[np.unique(group.group_ids[np.asarray(solved(statistics))])])
        metrics = terms | judgement_metrics(judged, self.config.critic.score) | self.judging.metrics
        metrics |= {
            "reward/mean": mean_or_none(rewards),
            "reward/std": float(np.std(rewards[valid])) if valid.any() else None,
            "reward/group_std": float(mean_group_std(statistics)),
            "reward/zero_std_ratio": float(zero_std_ratio(statistics)),
            "reward/missing": int((~valid).sum()),
            "reward/missing_groups": len(group.prompts) - int((statistics.count > 0).sum()),
            "policy/old_decay": float(old_policy_decay(step, settings.decay_type)),
            "prompts/banned": len(self.groups.banned),
            "update/skipped": self.skipped,
        }
        seconds = time.perf_counter() - self._started
        metrics |= {
            "throughput/images_per_s": len(rewards) / seconds,
            "throughput/mfu": model_flops_utilisation(self._flops(len(rewards)), seconds),
        }
        if epoch % self.config.eval.every == 0 or epoch == settings.epochs:
            with self._stopping():
                metrics |= self._evaluate(self._policy(state["ema"]), step=step, epoch=epoch)
        self.run.log(step, epoch, metrics)
        self.run.safe_point(state, self._data(), step=step, epoch=epoch)

    def _flops(self, images: int) -> float:
        """The transformer's operations in an epoch."""
        rollout, (conditioning, _) = self.config.rollout, self.conditioned
        drawing = drawing_flops(self.generator, rollout, conditioning)
        learning = learning_flops(self.generator, self.config.train, (rollout.height, rollout.width), conditioning)
        return images * (drawing + learning)

    def _policy(self, lora):
        return scaled(lora, self.lora.scale)

    def _data(self) -> dict:
        return {"groups": self.groups.get_state(), "skipped": self.skipped}

    def _bar(self, description: str):
        return lambda items: self.run.progress(items, description)
