"""The NFT update: one jitted program from a batch of judged rollouts to the next LoRA."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from firm_jax.generation import initial_noise
from firm_jax.generation.schedules import noised
from firm_jax.mesh import batch_size, shard_batch
from firm_jax.models.layers import take_rows
from firm_jax.models.lora import scaled, zeros_like
from firm_jax.rl.nft import ema_decay, mix, nft_loss

if TYPE_CHECKING:  # the update itself needs no data loader to be installed
    from firm_jax.data.groups import EpochGroups


def make_optimizer(train) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm, at a constant learning rate, as the paper trains."""
    return optax.chain(
        optax.clip_by_global_norm(train.max_grad_norm),
        optax.adamw(train.learning_rate, b1=train.b1, b2=train.b2, eps=train.eps, weight_decay=train.weight_decay),
    )


@partial(jax.jit, static_argnames="optimizer")
def init_state(lora, optimizer: optax.GradientTransformation) -> dict:
    """The trained part of a run: current, old and averaged LoRA, optimizer state, number of updates done.

    Compiled, so that its scalars lie on the mesh from the start: the update is one program, and a restored state is
    placed like this one.
    """
    return {"lora": lora, "old": lora, "ema": lora, "optimizer": optimizer.init(lora), "step": jnp.int32(0)}


def make_update(velocity: Callable, optimizer: optax.GradientTransformation, train, scale: float) -> Callable:
    """The jitted `update(params, state, conditioning, batch, key) -> (state, metrics)`.

    velocity: `(params, lora, x [b, h, w, C], t [b], conditioning rows) -> v [b, h, w, C]`, the LoRA's strength folded
    in; `scale` is that strength, alpha / rank. `conditioning` holds one row a prompt. `batch` is one optimizer step,
    A micro-batches of b samples with T timesteps each:

        x0 [A, b, h, w, C]  final latents      t [A, T, b]   noise shares in (0, 1]    r [A, b]       optimality
        valid [A, b]        judged or not      prompt [A, b] row of `conditioning`     sample [A, b]  its number

    A sample's noise comes from its number, and the loss is the mean over all valid samples and all timesteps: neither
    micro-batching nor the number of devices changes the recipe. Samples that are not valid may hold anything. Where
    loss or gradient is not finite, or no sample is valid, the state comes back as it was (not even AdamW's decay and
    momentum move it), and `update/skipped` is 1.
    """

    def timestep_loss(lora, old, params, part, t, noise, rows):
        x_t = noised(part["x0"], noise, t)
        v = velocity(params, scaled(lora, scale), x_t, t, rows)
        v_old = velocity(params, scaled(old, scale), x_t, t, rows)
        v_ref = velocity(params, zeros_like(lora), x_t, t, rows)
        return nft_loss(
            v, v_old, v_ref, x_t, part["x0"], t, part["r"],
            beta=train.beta, scale=train.adv_clip, kl_weight=train.kl_weight, valid=part["valid"],
        )  # fmt: skip

    def gradient(params, state, conditioning, batch, key):
        """The gradient of the mean loss and the mean of its terms, accumulated over micro-batches and timesteps."""
        timesteps = batch["t"].shape[1]
        judged = jnp.maximum(batch["valid"].sum(), 1)

        def micro_batch(total, part):
            rows = jax.tree.map(lambda table: take_rows(table, part["prompt"]), conditioning)
            # Zero times NaN is NaN: what does not count is not to enter the network either.
            part = part | {"x0": jnp.where(part["valid"][:, None, None, None], part["x0"], 0)}
            share = part["valid"].sum() / judged / timesteps

            def timestep(total, scanned):
                number, t = scanned
                noise = initial_noise(jax.random.fold_in(key, number), part["sample"], part["x0"].shape[1:])
                grads, terms = jax.grad(timestep_loss, has_aux=True)(
                    state["lora"], state["old"], params, part, t, noise, rows
                )
                total = jax.tree.map(lambda sum_, new: sum_ + share * new, total, grads)
                return total, jax.tree.map(lambda term: share * term, terms)

            return jax.lax.scan(timestep, total, (jnp.arange(timesteps), part["t"]))

        grads, terms = jax.lax.scan(micro_batch, zeros_like(state["lora"]), batch)
        return grads, jax.tree.map(jnp.sum, terms)

    @jax.jit
    def update(params, state, conditioning, batch, key):
        with jax.named_scope("nft_gradient"):
            grads, metrics = gradient(params, state, conditioning, batch, key)
        norm = optax.global_norm(grads)
        judged = batch["valid"].sum()
        usable = jnp.isfinite(metrics["loss/total"]) & jnp.isfinite(norm) & (judged > 0)
        with jax.named_scope("adamw"):
            updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["lora"])
            lora = optax.apply_updates(state["lora"], updates)
            step = state["step"] + 1
            ema = mix(state["ema"], lora, ema_decay(step, train.ema))
        updated = {"lora": lora, "old": state["old"], "ema": ema, "optimizer": optimizer_state, "step": step}
        state = jax.tree.map(lambda new, before: jnp.where(usable, new, before), updated, state)
        return state, metrics | {"grad/norm": norm, "update/samples": judged, "update/skipped": ~usable}

    return update


def learning_flops(generator, settings, size: tuple[int, int], conditioning) -> int:
    """The transformer's operations for one image of `size` (height, width), by our count.

    At each timestep a forward pass of the current, the old and the reference policy, and a backward pass through
    frozen weights; what is computed again to save memory is not counted.
    """
    forward, backward = (count(*size, conditioning) for count in (generator.forward_flops, generator.backward_flops))
    return settings.timesteps * (3 * forward + backward)


def micro_batches(samples: int, settings, mesh) -> tuple[int, int]:
    """(A, b): how many micro-batches of how many samples one of the epoch's updates takes."""
    size = settings.micro_batch + -settings.micro_batch % batch_size(mesh)
    largest = -(-samples // settings.updates_per_epoch)
    return -(-largest // size), size


def optimizer_batches(group: "EpochGroups", latents, r, valid, sigmas, seed: int, settings, mesh) -> Iterator[dict]:
    """The epoch's M samples, shuffled, as `updates_per_epoch` batches of micro-batches for the update.

    Every sample comes at `timesteps` points of its rollout's schedule, drawn without replacement (all arrays indexed
    by sample are host arrays [M, ...]). Batches are filled up to one shape with samples that count for nothing.
    """
    rng = np.random.default_rng([seed, group.epoch])
    order = rng.permutation(len(latents))
    points = np.argsort(rng.random((len(latents), len(sigmas) - 1)), axis=1)[:, : settings.timesteps]
    noise_shares = np.asarray(sigmas, np.float32)[points]
    shape = micro_batches(len(latents), settings, mesh)
    for part in np.array_split(order, settings.updates_per_epoch):
        rows = np.resize(part, shape)
        counted = (np.arange(rows.size) < len(part)).reshape(rows.shape)
        by_sample = {
            "x0": latents[rows],
            "r": np.asarray(r)[rows],
            "valid": counted & np.asarray(valid)[rows],
            "prompt": group.group_ids[rows],
            "sample": group.sample_indices[rows],
        }
        t = noise_shares[rows].transpose(0, 2, 1)
        yield shard_batch(by_sample, mesh, axis=1) | {"t": shard_batch(t, mesh, axis=2)}
