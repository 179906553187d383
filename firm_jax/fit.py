"""Training all parameters of a network on batches that follow from the step's number: the loop of every pretraining."""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from firm_jax.errors import ConfigError, NonFiniteError
from firm_jax.mesh import shard_batch
from firm_jax.run import Run
from firm_jax.sharding import path_name


def fit(run: Run, config, mesh, params, loss: Callable, batch_at: Callable, evaluate: Callable, fixed: str = r"(?!)"):
    """AdamW with warm-up and cosine decay on `loss(params, batch, key) -> (scalar, metrics)`.

    `batch_at(step)` gives the host arrays of one step; `evaluate(params, epoch)` the metrics of the averaged weights,
    asked for every `eval.every` epochs and after the last. Parameters whose path matches `fixed` are not trained.
    Returns the exponential moving average of the parameters (decay `train.ema`).
    """
    train = config.train
    steps = train.epochs * train.steps_per_epoch
    if train.warmup_steps >= steps:
        raise ConfigError(
            f"train.warmup_steps is {train.warmup_steps}, but the whole training has {steps} steps "
            f"(train.epochs x train.steps_per_epoch): set it lower"
        )
    schedule = optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, train.warmup_steps, steps)
    adamw = optax.chain(
        optax.clip_by_global_norm(train.max_grad_norm), optax.adamw(schedule, b2=0.99, weight_decay=train.weight_decay)
    )
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "fixed" if re.search(fixed, path_name(path)) else "trained", params
    )
    optimizer = optax.partition({"trained": adamw, "fixed": optax.set_to_zero()}, labels)
    root = jax.random.key(config.seed)

    @partial(jax.jit, donate_argnums=0)
    def update(state, batch):
        key = jax.random.fold_in(root, state["step"])
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state["params"], batch, key)
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        step = state["step"] + 1
        # The average starts young, or the fresh weights would stay in it for long.
        decay = jnp.minimum(train.ema, (1 + step) / (10 + step))
        ema = optax.incremental_update(params, state["ema"], 1 - decay)
        metrics = metrics | {"grad/norm": optax.global_norm(grads)}
        return {"params": params, "ema": ema, "optimizer": optimizer_state, "step": step}, metrics

    ema = jax.tree.map(jnp.copy, params)
    state = {"params": params, "ema": ema, "optimizer": optimizer.init(params), "step": jnp.int32(0)}
    done = 0
    if restored := run.restore(state):
        state, done = restored.state, restored.epoch
    for epoch in run.loop(done, train.epochs):
        with run.timer("update"):
            totals = None
            for step in run.progress(range(train.steps_per_epoch), f"epoch {epoch + 1} of {train.epochs}"):
                state, metrics = update(state, shard_batch(batch_at(epoch * train.steps_per_epoch + step), mesh))
                totals = metrics if totals is None else jax.tree.map(jnp.add, totals, metrics)
            metrics = {name: float(total) / train.steps_per_epoch for name, total in totals.items()}
        lost = sorted(name for name, value in metrics.items() if not np.isfinite(value))
        if lost:
            raise NonFiniteError(
                f"epoch {epoch + 1}: {', '.join(lost)} not finite; nothing of this epoch was saved. "
                "Lower train.learning_rate and start again from the last checkpoint."
            )
        if (epoch + 1) % config.eval.every == 0 or epoch + 1 == train.epochs:
            with run.timer("eval"):
                metrics |= evaluate(state["ema"], epoch + 1)
        run.log(int(state["step"]), epoch + 1, metrics)
        run.safe_point(state, step=int(state["step"]), epoch=epoch + 1)
    return state["ema"]
