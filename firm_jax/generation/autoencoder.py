"""Training an autoencoder from nothing, or further.

Batch `i` comes from a random generator seeded by (seed, i), so a resumed run sees the batches that an uninterrupted
one would have seen, and no data state has to be kept.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from firm_jax import models
from firm_jax.errors import ConfigError
from firm_jax.fit import fit
from firm_jax.interop.hub import resolve
from firm_jax.mesh import make_mesh, replicate, shard_batch
from firm_jax.run import Run
from firm_jax.shapes import oracle, teach


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
    """Train an autoencoder on the shapes world; leaves it as a diffusers folder in `workdir/model`.

    Its config tells of the latents' mean and deviation over a fixed sample, by which a generator's are standardised.
    """
    mesh = make_mesh(**config.mesh)
    with Run(config, workdir) as run, jax.set_mesh(mesh):
        graph, params = nnx.split(_first_autoencoder(config))
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

        params = fit(run, config, mesh, params, autoencoder_loss(graph, config), batch_at, evaluate)
        latents = np.asarray(encode(params, shard_batch(held_out, mesh)))
        vae = nnx.merge(graph, params)
        vae.config = vae.config.fitted_to(latents)
        if run.is_main:
            models.save_pretrained(vae, Path(workdir) / "model", dtype="float16")


def _first_autoencoder(config) -> nnx.Module:
    """The autoencoder that training starts from: the one in the folder `init`, or a new one when that is None."""
    if config.init == "":
        raise ConfigError("this variant continues a trained autoencoder: set --config.init to a folder with one")
    if config.init:
        return models.from_pretrained(resolve(config.init))
    network = models.network_class(config.vae_class)
    return network(network.config_class.from_hf(config.vae.to_dict()), rngs=nnx.Rngs(config.seed))


def _same_reading(image: np.ndarray, decoded: np.ndarray) -> bool:
    """Whether the oracle sees the same shapes (kind, colour, size) and background in both pictures."""
    before, after = oracle.read(image), oracle.read(decoded)

    def content(scene):
        return scene.background, sorted((s.kind, s.color, s.size) for s in scene.shapes)

    return content(before) == content(after)
