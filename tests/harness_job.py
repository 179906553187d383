"""A job small enough to kill: it fits a matrix, and uses the whole harness. Also its own config file."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from firm_jax.config import choose_variant
from firm_jax.run import Run

UPDATES_PER_EPOCH = 3


def small() -> ConfigDict:
    return ConfigDict(
        {
            "job": "fit_matrix",
            "seed": 0,
            "distributed": False,
            "train": {"epochs": 6, "learning_rate": 0.1, "sizes": (4, 8)},
            "eval": {"every": 2},
            "checkpoint": {"every": 2, "keep": 2},
            "profile": {"start": 0, "steps": 0},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )


def slow() -> ConfigDict:
    config = small()
    config.checkpoint.every = 1
    config.train.epochs = 12
    return config


VARIANTS = {"": small, "slow": slow}


def get_config(variant: str = "") -> ConfigDict:
    return choose_variant(VARIANTS, variant)


@jax.jit
def update(state, learning_rate):
    key, noise = jax.random.split(state["key"])
    x = jax.random.normal(noise, (16, 8))
    loss, grads = jax.value_and_grad(lambda w: jnp.mean((x @ w["a"] @ w["b"] - x) ** 2))(state["weights"])
    updates, optimizer = optax.adam(learning_rate).update(grads, state["optimizer"], state["weights"])
    weights = optax.apply_updates(state["weights"], updates)
    return {"weights": weights, "optimizer": optimizer, "key": key}, {"loss/total": loss}


def initial_state(config):
    key = jax.random.key(config.seed)
    weights = {"a": jax.random.normal(key, (8, 4)), "b": jnp.zeros((4, 8))}
    return {"weights": weights, "optimizer": optax.adam(0.1).init(weights), "key": key}


def keep_the_device_busy(run, epoch):
    """An endless program: the main thread waits for it outside Python."""
    run.say("busy")
    jax.lax.while_loop(lambda x: x > 0, lambda x: jnp.sqrt(x), jnp.float32(2)).block_until_ready()


def train_on_a_busy_device(config, workdir):
    return train(config, workdir, at_epoch=keep_the_device_busy)


def train(config, workdir, at_epoch=None):
    """Returns the final state; `at_epoch(run, epoch)` is called in the middle of every epoch."""
    with Run(config, workdir) as run:
        state, data, step, done = initial_state(config), {"next": 0}, 0, 0
        if restored := run.restore(state):
            state, data, step, done = restored.state, restored.data, restored.step, restored.epoch
        for epoch in run.loop(done, config.train.epochs):
            with run.timer("update"):
                for _ in run.progress(range(UPDATES_PER_EPOCH), "update"):
                    state, metrics = update(state, config.train.learning_rate)
                    step += 1
                jax.block_until_ready(state)
            if at_epoch:
                at_epoch(run, epoch)
            if pause := os.environ.get("PAUSE"):
                time.sleep(float(pause))
            run.judgements([{"epoch": epoch, "prompt": "a red square", "score": data["next"] % 5, "status": "ok"}])
            if epoch % config.eval.every == 0:
                run.images(
                    "held-out", np.full((2, 8, 8, 3), 0.5), ["a red square\n4", "a circle\n2"], step=step, epoch=epoch
                )
            data = {"next": data["next"] + 1}
            run.log(step, epoch + 1, metrics)
            run.safe_point(state, data, step=step, epoch=epoch + 1)
    return jax.tree.map(np.asarray, state | {"key": jax.random.key_data(state["key"])})
