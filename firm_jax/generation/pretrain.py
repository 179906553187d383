"""Training a generator from nothing: its autoencoder, then its flow-matching transformer with the text encoders.

Both jobs draw batch `i` from a random generator seeded by (seed, i), so a resumed run sees the batches that an
uninterrupted one would have seen, and no data state has to be kept.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from firm_jax import models
from firm_jax.errors import NonFiniteError
from firm_jax.mesh import make_mesh, replicate, shard_batch
from firm_jax.models.vae_kl import AutoencoderKL, AutoencoderKLConfig
from firm_jax.rl.nft import ema_decay
from firm_jax.run import Run
from firm_jax.shapes import oracle, teach


def fit(run: Run, config, params, loss: Callable, batch_at: Callable, evaluate: Callable):
    """AdamW with warm-up and cosine decay on `loss(params, batch, key) -> (scalar, metrics)`.

    `batch_at(step)` gives the host arrays of one step, `evaluate(params)` the metrics of the averaged weights, asked
    for every `eval.every` epochs. Returns the exponential moving average of the parameters (decay `train.ema`).
    """
    mesh, train = jax.sharding.get_mesh(), config.train
    steps = train.epochs * train.steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, train.warmup_steps, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(train.max_grad_norm), optax.adamw(schedule, b2=0.99, weight_decay=train.weight_decay)
    )
    root = jax.random.key(config.seed)

    @jax.jit
    def update(state, batch):
        key = jax.random.fold_in(root, state["step"])
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state["params"], batch, key)
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        step = state["step"] + 1
        decay = ema_decay(step, train.ema)
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state["ema"], params)
        metrics = metrics | {"grad/norm": optax.global_norm(grads)}
        return {"params": params, "ema": ema, "optimizer": optimizer_state, "step": step}, metrics

    state = {"params": params, "ema": params, "optimizer": optimizer.init(params), "step": jnp.int32(0)}
    done = 0
    if restored := run.restore(state):
        state, done = restored.state, restored.epoch
    for epoch in run.loop(done, train.epochs):
        with run.timer("update"):
            totals = None
            for step in run.progress(range(train.steps_per_epoch), f"epoch {epoch + 1}"):
                batch = shard_batch(batch_at(epoch * train.steps_per_epoch + step), mesh)
                state, metrics = update(state, batch)
                totals = metrics if totals is None else jax.tree.map(jnp.add, totals, metrics)
            metrics = {name: float(total) / train.steps_per_epoch for name, total in totals.items()}
        if not all(np.isfinite(value) for value in metrics.values()):
            raise NonFiniteError(
                f"epoch {epoch + 1}: {metrics}; lower train.learning_rate and start from the last checkpoint"
            )
        if (epoch + 1) % config.eval.every == 0 or epoch + 1 == train.epochs:
            with run.timer("eval"):
                metrics |= evaluate(state["ema"], epoch + 1)
        run.log(int(state["step"]), epoch + 1, metrics)
        run.safe_point(state, step=int(state["step"]), epoch=epoch + 1)
    return state["ema"]


def autoencoder_loss(vae_graph, config) -> Callable:
    """Absolute plus squared error of the reconstruction, and a small pull of the posterior towards N(0, 1).

    The posterior's own noise is in the decoder's input, so the decoder learns to forgive a generator's small errors.
    """

    def loss(params, batch, key):
        vae = nnx.merge(vae_graph, params)
        mean, logvar = vae.encode(batch["images"])
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = vae.decode(latents) - batch["images"]
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
        absolute, squared = jnp.abs(error).mean(), jnp.square(error).mean()
        total = absolute + squared + config.kl_weight * kl
        return total, {"loss/total": total, "loss/absolute": absolute, "loss/squared": squared, "loss/kl": kl}

    return loss


def train_autoencoder(config, workdir: str) -> None:
    """Train an AutoencoderKL on the shapes world; leaves it as a diffusers folder in `workdir/model`.

    The latents' mean and deviation over a fixed sample become `shift_factor` and `scaling_factor`.
    """
    mesh = make_mesh(**config.mesh)
    with Run(config, workdir) as run, jax.set_mesh(mesh):
        vae_config = AutoencoderKLConfig(**config.vae, scaling_factor=1.0, shift_factor=0.0, force_upcast=False)
        graph, params = nnx.split(AutoencoderKL(vae_config, rngs=nnx.Rngs(config.seed)))
        params = replicate(params, mesh)

        def batch_at(step):
            rng = np.random.default_rng([config.seed, 0, step])
            return {"images": teach.autoencoder_batch(rng, config.train.batch_size) * 2 - 1}

        held_out = teach.autoencoder_batch(np.random.default_rng([config.seed, 1]), config.eval.images)

        @jax.jit
        def encode(params, images):
            return nnx.merge(graph, params).encode(images * 2 - 1)[0]

        @jax.jit
        def decode(params, latents):
            return jnp.clip(nnx.merge(graph, params).decode(latents) / 2 + 0.5, 0, 1)

        def evaluate(params, epoch):
            images = shard_batch(held_out, mesh)
            decoded = np.asarray(decode(params, encode(params, images)))
            psnr = -10 * np.log10(np.square(decoded - held_out).mean((1, 2, 3)))
            same = [_same_reading(a, b) for a, b in zip(held_out, decoded, strict=True)]
            pairs = np.stack([held_out[:8], decoded[:8]], 1).reshape(-1, *held_out.shape[1:])
            captions = [text for value in psnr[:8] for text in ("source", f"{value:.1f} dB")]
            run.images("reconstructions", pairs, captions, step=epoch * config.train.steps_per_epoch, epoch=epoch)
            return {"eval/psnr": float(psnr.mean()), "eval/oracle_agreement": float(np.mean(same))}

        params = fit(run, config, params, autoencoder_loss(graph, config), batch_at, evaluate)
        latents = np.asarray(encode(params, shard_batch(held_out, mesh)))
        vae = nnx.merge(graph, params)
        scaling = {"scaling_factor": 1 / float(latents.std()), "shift_factor": float(latents.mean())}
        vae.config = dataclasses.replace(vae_config, **scaling)
        if run.is_main:
            models.save_pretrained(vae, Path(workdir) / "model", dtype="float16")


def _same_reading(image: np.ndarray, decoded: np.ndarray) -> bool:
    """Whether the oracle sees the same shapes (kind, colour, size) and background in both pictures."""
    before, after = oracle.read(image), oracle.read(decoded)

    def content(scene):
        return scene.background, sorted((s.kind, s.color, s.size) for s in scene.shapes)

    return content(before) == content(after)
