"""Supervised fine-tuning of a critic: cross-entropy on the assistant's turn, measured by the scores it then gives.

The step is a pure function `update(frozen, state, batch)`: what is trained lies in `state`, what is not beside it
(`tuning.Tuning` parts them), and a batch comes in micro-batches whose gradients are added up (`sft_data.Batches`).
"""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from firm_jax import models
from firm_jax.critic.bench.records import CRITERIA
from firm_jax.critic.processing import Processor
from firm_jax.critic.rubric import Rubric
from firm_jax.critic.score import served_rubrics
from firm_jax.critic.sft_data import (
    Batches,
    ahead,
    micro_batches,
    on_mesh,
    rubrics_of,
    sources,
    training_batches,
)
from firm_jax.critic.sft_eval import Evaluator
from firm_jax.critic.sft_flops import step_flops
from firm_jax.critic.tuning import Tuning, cast, cast_like, learning_rates, make_optimizer
from firm_jax.data.patches import limit_pixels
from firm_jax.errors import ConfigError, NonFiniteError
from firm_jax.interop.hub import identity, resolve
from firm_jax.interop.lora_formats import adapter_of, write_peft
from firm_jax.mesh import batch_size, make_mesh, to_host
from firm_jax.models.qwen3_vl import Qwen3VL
from firm_jax.profiling import model_flops_utilisation
from firm_jax.run import Run, due
from firm_jax.shapes.critic_folder import write_critic_folder

# What a trained critic's folder takes over from the one it was made from.
COMPANIONS = ("tokenizer*.json", "vocab.json", "merges.txt", "*preprocessor_config.json", "processor_config.json")
COMPANIONS += ("generation_config.json", "chat_template.*", "special_tokens_map.json", "added_tokens.json")

# In which numbers parameters, moments and activations can be held.
HELD = ("float32", "bfloat16")

# What a random key is for; each purpose has its own stream below the run's one root key.
LORA, ROUNDING = range(2)


# The step


def sft_sums(graphdef, params, batch, *, lora=None, verdict_weight: float = 1.0, remat: str | None = None) -> dict:
    """The cross-entropy over the tokens of the assistant's turns, as sums; verdicts count `verdict_weight` times.

    batch: what `collate` returns, with the image table's `patches` and `grids`. lora: adapters beside the parameters,
    their strength folded in. Returns float32 scalars: `loss` and the `weight` to divide it by, `score_loss` and
    `score_tokens`, those that hold a score.
    """
    model = nnx.merge(graphdef, params)
    deepstack = None
    if "patches" in batch:
        vision = model.encode_images(batch["patches"], batch["grids"], lora=lora, remat=remat)
        embeddings, deepstack = model.splice(batch["ids"], *vision, batch["image_index"])
    else:
        embeddings = model.language_model.embed_tokens(batch["ids"])
    hidden, _ = model(
        embeddings, batch["positions"], batch["segments"], deepstack=deepstack, lora=lora, remat=remat
    )  # fmt: skip
    logits = model.logits(hidden[:, :-1])
    labels, targets = batch["ids"][:, 1:], batch["targets"][:, 1:]
    # A masked sum in the place of a gather: it stays local where the vocabulary is split over devices.
    chosen = jnp.arange(logits.shape[-1]) == labels[..., None]
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.where(chosen, logits, 0).sum(-1)
    weights = token_weights(targets, verdict_weight)
    return {
        "loss": (weights * losses).sum(),
        "weight": weights.sum(),
        "score_loss": jnp.where(targets == 2, losses, 0).sum(),
        "score_tokens": (targets == 2).sum().astype(jnp.float32),
    }


def token_weights(targets, verdict_weight: float):
    """How often each token counts, float32, by `targets` as `collate` returns them."""
    return jnp.where(targets == 3, verdict_weight, (targets > 0).astype(jnp.float32))


def sft_loss(graphdef, params, batch, **options):
    """The mean of `sft_sums` over one batch, not in micro-batches: the scalar and {"loss/total", "loss/score"}.

    The latter is over the tokens that hold a score, NaN in a batch without any.
    """
    sums = sft_sums(graphdef, params, batch, **options)
    total = sums["loss"] / sums["weight"]
    return total, {"loss/total": total, "loss/score": sums["score_loss"] / sums["score_tokens"]}


def init_state(optimizer, trained, moment_dtype: str = "float32") -> dict:
    """What is trained, the optimizer's state split as it is, and the number of steps done."""

    @jax.jit
    def init(trained):
        moments = cast(optimizer.init(cast(trained, jnp.float32)), moment_dtype)
        return {"params": trained, "optimizer": moments, "step": jnp.int32(0)}

    return init(trained)


def make_update(
    graphdef, tuning: Tuning, optimizer, *, compute_dtype, remat: str, verdict_weight: float = 1.0, key=None
) -> Callable:
    """The jitted step `(frozen, state, batch) -> (state, metrics)`; one that is not finite leaves the state as it was.

    batch: micro-batches, as `Batches` makes them. The gradient is that of the mean over all their tokens, however they
    are divided. The network computes in `compute_dtype`; gradients are added up, and the optimizer computes, in
    float32. key: of the rounding of what is held in bfloat16.
    """
    key = jax.random.key(0) if key is None else key

    def loss(trained, frozen, weight, part):
        params, lora = tuning.join(trained, frozen)
        sums = sft_sums(graphdef, params, part, lora=lora, verdict_weight=verdict_weight, remat=remat)
        return sums["loss"] / weight, sums

    def gradient(trained, frozen, batch):
        # The first token of a row is predicted from nothing.
        weight = token_weights(batch["targets"][:, :, 1:], verdict_weight).sum()
        whole = trained if tuning.lora else cast(trained, compute_dtype)  # layers cast a LoRA themselves

        def micro_batch(total, part):
            grads, sums = jax.grad(loss, has_aux=True)(whole, frozen, weight, part)
            return jax.tree.map(lambda sum_, new: sum_ + new.astype(jnp.float32), total, grads), sums

        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), whole)
        grads, sums = jax.lax.scan(micro_batch, zeros, batch)
        sums = jax.tree.map(jnp.sum, sums)
        total, score = sums["loss"] / weight, sums["score_loss"] / sums["score_tokens"]
        return grads, {"loss/total": total, "loss/score": score}

    @partial(jax.jit, donate_argnames="state")
    def update(frozen, state, batch):
        with jax.named_scope("sft_gradient"):
            grads, metrics = gradient(state["params"], frozen, batch)
        norm = optax.global_norm(grads)
        with jax.named_scope("adamw"):
            before = cast({name: state[name] for name in ("params", "optimizer")}, jnp.float32)
            changes, moments = optimizer.update(grads, before["optimizer"], before["params"])
            after = {"params": optax.apply_updates(before["params"], changes), "optimizer": moments}
            after = cast_like(after, {name: state[name] for name in after}, jax.random.fold_in(key, state["step"]))
        new = after | {"step": state["step"] + 1}
        finite = jnp.isfinite(metrics["loss/total"]) & jnp.isfinite(norm)
        state = jax.tree.map(lambda before, after: jnp.where(finite, after, before), state, new)
        return state, metrics | {"grad/norm": norm}

    return update


def make_evaluation(graphdef, tuning: Tuning, compute_dtype) -> Callable:
    """The jitted `(trained, frozen, batch) -> sums` of `sft_sums` over all micro-batches, verdicts counting once."""

    @jax.jit
    def evaluate(trained, frozen, batch):
        params, lora = tuning.join(trained if tuning.lora else cast(trained, compute_dtype), frozen)
        sums = jax.lax.map(lambda part: sft_sums(graphdef, params, part, lora=lora), batch)
        return jax.tree.map(jnp.sum, sums)

    return evaluate


def make_whole(tuning: Tuning) -> Callable:
    """The jitted `(trained, frozen, *, dtype) -> params`: the network as it is served and stored."""
    return jax.jit(lambda trained, frozen, dtype: cast(tuning.merged(trained, frozen), dtype), static_argnames="dtype")


# The job


def train(config, workdir: str) -> None:
    """Train a critic; leaves a transformers folder in `workdir/model`, and a LoRA beside it in `workdir/adapter`.

    Raises ConfigError, WeightsError or DataError before anything is trained, NonFiniteError when a step is.
    """
    mesh, tuning, settings = make_mesh(**config.mesh), Tuning.from_config(config), config.train
    check_settings(config)
    with Run(config, workdir) as run, jax.set_mesh(mesh):
        folder, processor, rubrics, examples, held_out = prepare(config, run)
        run.base_weights = {"critic": identity(folder)}
        held_as = settings.compute_dtype if tuning.lora else settings.param_dtype
        graphdef, params = nnx.split(models.from_pretrained(folder, dtype=held_as, mesh=mesh))
        tuning = tuning.for_network(params)
        key = jax.random.key(config.seed)
        trained, frozen = tuning.first(params, jax.random.fold_in(key, LORA), Qwen3VL.sharding_rules, mesh)
        frozen, params = cast(frozen, settings.compute_dtype), None

        shape = micro_batches(settings.batch_size, settings.examples_per_device, batch_size(mesh))
        bar = partial(run.progress, description="packing")
        batches = training_batches(examples, processor, settings, shape, config.seed, bar)
        checks = Batches(held_out, processor, settings.batch_size, tuple(settings.lengths), shape, config.seed)
        steps_per_epoch = settings.steps_per_epoch or len(batches)
        steps = settings.epochs * steps_per_epoch
        optimizer = make_optimizer(settings, learning_rates(config), steps)
        options = {"compute_dtype": settings.compute_dtype, "remat": settings.remat}
        update = make_update(
            graphdef, tuning, optimizer, **options, verdict_weight=settings.verdict_weight,
            key=jax.random.fold_in(key, ROUNDING),
        )  # fmt: skip
        whole = make_whole(tuning)
        evaluate = Evaluator(
            run, checks, make_evaluation(graphdef, tuning, settings.compute_dtype),
            partial(whole, dtype=settings.compute_dtype), graphdef, rubrics, mesh, config.eval,
        )  # fmt: skip

        state, done, history = init_state(optimizer, trained, settings.moment_dtype), 0, []
        trained = None
        if restored := run.restore(state):
            state, done, history = restored.state, restored.step, restored.data["history"]
        told = _epochs(done - len(history), steps_per_epoch)
        flops = partial(step_flops, models.read_network(folder)[1], tuning)
        made, clock = ahead(batches.at, range(done, steps)), Throughput(flops)
        for step in run.progress(run.loop(done, steps), "training", total=steps - done):
            with run.timer("data"):
                batch = next(made)
            with run.timer("update"):
                clock.count(batch)
                state, metrics = update(frozen, state, on_mesh(batch, mesh))
                history.append(metrics)
                jax.block_until_ready(history[-2:-1])  # one step is under way while the next batch is waited for
            before, epoch = (_epochs(number, steps_per_epoch) for number in (step, step + 1))
            ends = epoch == settings.epochs
            if tell := ends or due(settings.report_every, epoch, before):
                with run.timer("update"):
                    metrics = _averages(_fetched(history), step + 1) | clock.report()
                if ends or due(config.eval.every, epoch, told):
                    with run.timer("eval"):
                        metrics |= evaluate(state["params"], frozen)
                run.log(step + 1, epoch, metrics)
                history = []
            run.safe_point(
                state, lambda history=history: {"history": _fetched(history)}, step=step + 1, epoch=epoch,
                epoch_ends=tell,
            )  # fmt: skip
            if tell:
                told, clock = epoch, Throughput(flops)
        model = nnx.merge(graphdef, _on_host(whole(state["params"], frozen, dtype=settings.stored_dtype)))
        lora = _on_host(state["params"]) if tuning.lora else None
        if run.is_main:
            write_model(run.workdir / "model", processor, model, rubrics, settings.stored_dtype)
            if lora is not None:
                adapter = adapter_of(lora, model.weight_rules(model.config), tuning.lora)
                (run.workdir / "adapter").mkdir(exist_ok=True)
                write_peft(run.workdir / "adapter", adapter, config.critic.model or str(folder))


def check_settings(config) -> None:
    """Raise ConfigError for a value that cannot be used, before anything is loaded."""
    train = config.train
    for key in ("batch_size", "examples_per_device", "report_every"):
        if train[key] <= 0:
            raise ConfigError(f"train.{key} is {train[key]}: it has to be more than 0")
    for key in ("param_dtype", "moment_dtype", "compute_dtype", "stored_dtype"):
        if train[key] not in (known := models.DTYPES if key == "stored_dtype" else HELD):
            raise ConfigError(f"train.{key} is {train[key]!r}; it can be {' or '.join(known)}")
    if config.eval.bench and config.eval.bench_task not in CRITERIA:
        raise ConfigError(f"eval.bench_task is {config.eval.bench_task!r}; it can be {' or '.join(CRITERIA)}")


def prepare(config, run: Run):
    """The folder that training starts from, its processor, the rubrics, examples to train on and held-out ones.

    What is left out of the data is kept in `quarantine.jsonl`.
    """
    rubrics, quarantine = rubrics_of(config), run.workdir / "quarantine.jsonl" if run.is_main else None
    if config.critic.model:
        folder = base_folder(config, run)
        processor = Processor(folder, config.data.max_pixels)
        examples, held_out = sources(config, rubrics, processor, quarantine)
    else:
        examples, held_out = sources(config, rubrics, None, quarantine)
        folder = base_folder(config, run, examples)
        processor = Processor(folder, config.data.max_pixels)
    return folder, processor, rubrics or served_rubrics(folder), examples, held_out


def base_folder(config, run: Run, examples=()) -> Path:
    """The folder that training starts from: `critic.model`, or a new miniature of the examples when that is None.

    Raises WeightsError for a folder whose weights are missing or do not fit, ConfigError for another architecture.
    """
    if config.critic.model:
        folder = resolve(config.critic.model)
        network, _ = models.read_network(folder)
        if network is not Qwen3VL:
            raise ConfigError(f"{folder} holds a {network.hf_class}; a critic must be a {Qwen3VL.hf_class}")
        models.check_pretrained(folder)
        return folder
    folder = run.workdir / "untrained"
    if run.is_main:
        shown = range(min(config.miniature.texts, len(examples)))
        texts = [text for i in shown for text in (examples[i].prompt, examples[i].answer)]
        miniature = config.miniature.to_dict()
        base = miniature.pop("base")
        write_critic_folder(folder, texts, miniature, seed=config.seed, base=resolve(base) if base else None)
    return folder


class Throughput:
    """Examples and tokens a second since it was made, and the share of the devices' peak that `flops(batch)` is."""

    def __init__(self, flops: Callable[[dict], int]):
        self.since, self.examples, self.tokens, self.flops, self._flops_of = time.perf_counter(), 0, 0, 0, flops

    def count(self, batch: dict[str, np.ndarray]) -> None:
        """Add a batch of micro-batches; padding does not count."""
        real = batch["segments"] > 0
        self.examples, self.tokens = self.examples + int(real.any(-1).sum()), self.tokens + int(real.sum())
        self.flops += self._flops_of(batch)

    def report(self) -> dict[str, float | None]:
        seconds = time.perf_counter() - self.since
        return {
            "throughput/examples_per_s": self.examples / seconds,
            "throughput/tokens_per_s": self.tokens / seconds,
            "throughput/mfu": model_flops_utilisation(self.flops, seconds),
        }


def _epochs(step: int, steps_per_epoch: int) -> int | float:
    whole, rest = divmod(step, steps_per_epoch)
    return step / steps_per_epoch if rest else whole


def _fetched(history: list[dict]) -> list[dict[str, float]]:
    """Steps' metrics as plain numbers; float32 survives JSON unchanged."""
    return [{name: float(value) for name, value in metrics.items()} for metrics in jax.device_get(history)]


def _averages(history: list[dict[str, float]], done: int) -> dict[str, float]:
    """The means of the last steps' metrics, of `done` in all; NonFiniteError for a step that was not finite."""
    for number, metrics in enumerate(history, done - len(history)):
        if not np.isfinite([metrics["loss/total"], metrics["grad/norm"]]).all():
            raise NonFiniteError(
                f"step {number}: loss {metrics['loss/total']}, gradient norm {metrics['grad/norm']}. The step "
                f"was not applied; lower train.learning_rate and start again from the last checkpoint."
            )
    columns = {name: np.array([metrics[name] for metrics in history]) for name in history[0]}
    return {
        name: float(values[~np.isnan(values)].mean()) if (~np.isnan(values)).any() else None
        for name, values in columns.items()
    }


def _on_host(tree):
    """What lies on other hosts' devices too, whole in the memory of this one, by all processes together."""
    return to_host(tree) if jax.process_count() > 1 else tree


def write_model(folder: Path, processor: Processor, model, rubrics: dict[str, Rubric], dtype: str) -> None:
    """The trained critic: weights, everything else that its base folder has, and the rubrics it was trained with."""
    models.save_pretrained(model, folder, dtype=dtype)
    for pattern in COMPANIONS:
        for file in processor.folder.glob(pattern):
            shutil.copy(file, folder / file.name)
    limit_pixels(folder, processor.images.max_pixels)
    (folder / "rubrics").mkdir(exist_ok=True)
    for rubric in rubrics.values():
        (folder / "rubrics" / f"{rubric.name}.txt").write_text(rubric.text + "\n")
