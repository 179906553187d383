"""Training a generator from nothing: its autoencoder, then its flow-matching transformer with the text encoders.

Both jobs draw batch `i` from a random generator seeded by (seed, i), so a resumed run sees the batches that an
uninterrupted one would have seen, and no data state has to be kept.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from firm_jax import models
from firm_jax.fit import fit
from firm_jax.generation.schedules import noised
from firm_jax.generation.sd3 import SD3Generator, read_scheduler
from firm_jax.generation.text import TextEncoders, load_tokenizer
from firm_jax.interop.hub import resolve
from firm_jax.mesh import make_mesh, replicate, shard_batch, to_host
from firm_jax.models.clip import CLIPTextConfig, CLIPTextModel
from firm_jax.models.sd3 import SD3Config, SD3Transformer
from firm_jax.models.t5 import T5Config, T5Encoder
from firm_jax.models.vae_kl import AutoencoderKL, AutoencoderKLConfig
from firm_jax.run import Run
from firm_jax.shapes import oracle, teach
from firm_jax.shapes.scene import prompts as shapes_prompts
from firm_jax.shapes.tokenizers import save_tokenizers


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

        params = fit(run, config, mesh, params, autoencoder_loss(graph, config), batch_at, evaluate)
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


def flow_matching_loss(generator: SD3Generator, config) -> Callable:
    """Rectified flow: the squared error of the velocity `noise - x0` at `x_t = (1 - t) x0 + t noise`.

    t is logit-normal, moved by the schedule's shift as the sampler's sigmas are. The text encoders learn along; a
    share `train.unconditional` of the captions arrives empty, for classifier-free guidance.
    """

    def loss(params, batch, key):
        noise_key, time_key = jax.random.split(key)
        x0 = batch["latents"]
        t = jax.nn.sigmoid(jax.random.normal(time_key, x0.shape[:1]))
        t = config.shift * t / (1 + (config.shift - 1) * t)
        noise = jax.random.normal(noise_key, x0.shape)
        conditioning = generator.text_encoders.encode(params["text"], batch["ids"], config.text.t5_length)
        v = generator.velocity(params["transformer"], None, noised(x0, noise, t), t, conditioning)
        total = jnp.square(v - (noise - x0)).mean()
        return total, {"loss/total": total}

    return loss


def train_flow_matching(config, workdir: str) -> None:
    """Train an SD3 pipeline on the shapes world; leaves it as a diffusers folder in `workdir/model`.

    The pictures follow their captions only in part (`train.wrong`), so the generator learns to draw every concept
    and not to obey: what reinforcement learning is for.
    """
    mesh, folder = make_mesh(**config.mesh), Path(workdir) / "model"
    vae = models.from_pretrained(resolve(config.vae), mesh=mesh)
    with Run(config, workdir) as run, jax.set_mesh(mesh):
        if run.is_main:
            _write_pipeline_files(folder, config)
        generator = _new_generator(folder, vae, config, mesh)
        params = replicate({"transformer": generator.params, "text": generator.text_encoders.params}, mesh)

        pictures = _encoded_pictures(generator, config, run.progress)
        empty = generator.text_encoders.tokenize([""], config.text.t5_length)

        def batch_at(step):
            rng = np.random.default_rng([config.seed, 1, step])
            rows = rng.integers(config.train.pictures, size=config.train.batch_size)
            dropped = rng.random((len(rows), 1)) < config.train.unconditional
            ids = {name: np.where(dropped, empty[name], all_ids[rows]) for name, all_ids in pictures["ids"].items()}
            return {"latents": pictures["latents"][rows], "ids": ids}

        held_out = shapes_prompts("test", config.eval.prompts)

        def evaluate(params, epoch):
            generator.params, generator.text_encoders.params = params["transformer"], params["text"]
            size = config.sample_size
            images = generator.sample(
                [prompt.text for prompt in held_out], steps=config.eval.steps, guidance=1.0, solver="dpm2",
                height=size, width=size, max_text_tokens=config.text.t5_length,
            )  # fmt: skip
            holds = [oracle.check(image, prompt) for image, prompt in zip(images, held_out, strict=True)]
            captions = [f"{p.text} | {np.mean(h):.2f}" for p, h in zip(held_out, holds, strict=True)]
            run.images("samples", images[:32], captions[:32], step=epoch * config.train.steps_per_epoch, epoch=epoch)
            return {
                "eval/oracle_fraction": float(np.mean([np.mean(h) for h in holds])),
                "eval/oracle_accuracy": float(np.mean([all(h) for h in holds])),
            }

        params = fit(
            run, config, mesh, params, flow_matching_loss(generator, config), batch_at, evaluate,
            fixed=r"pos_embed\.pos_embed",
        )  # fmt: skip
        if run.is_main:
            _save_networks(folder, generator, params, vae)


def _encoded_pictures(generator: SD3Generator, config, progress: Callable) -> dict:
    """`train.pictures` captioned pictures as latents and token ids: the autoencoder, which does not change, would
    take more of every step than the transformer."""

    @jax.jit
    def encode(vae_params, images):
        mean, _ = nnx.merge(generator.vae_graphdef, vae_params).encode(images * 2 - 1)
        return (mean - generator.vae_config.shift_factor) * generator.vae_config.scaling_factor

    latents, ids = [], []
    for start in progress(range(0, config.train.pictures, 256), "encoding the pictures"):
        rng = np.random.default_rng([config.seed, 0, start])
        captions, images = teach.generator_batch(rng, min(256, config.train.pictures - start), config.train.wrong)
        latents.append(to_host(encode(generator.vae_params, shard_batch(images, generator.mesh))))
        ids.append(generator.text_encoders.tokenize(captions, config.text.t5_length))
    return {
        "latents": np.concatenate(latents),
        "ids": {name: np.concatenate([part[name] for part in ids]) for name in ids[0]},
    }


def _new_generator(folder: Path, vae: AutoencoderKL, config, mesh) -> SD3Generator:
    """The pipeline of the config with fresh transformer and text encoders; tokenizers and schedule from its folder."""
    rngs, text = nnx.Rngs(config.seed), config.text
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = {name: load_tokenizer(folder / name.replace("text_encoder", "tokenizer")) for name in names}
    clip = tokenizers["text_encoder"]
    networks = {
        name: CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                projection_dim=width,
                max_position_embeddings=text.clip_length,
                hidden_act="quick_gelu" if name == "text_encoder" else "gelu",
                eos_token_id=clip.eos_token_id,
            ),
            rngs=rngs,
        )
        for name, width in zip(names[:2], text.clip_widths, strict=True)
    }
    networks["text_encoder_3"] = T5Encoder(
        T5Config(
            vocab_size=len(tokenizers["text_encoder_3"]),
            d_model=text.t5_width,
            d_kv=text.t5_width // text.heads,
            d_ff=2 * text.t5_width,
            num_layers=text.layers,
            num_heads=text.heads,
        ),
        rngs=rngs,
    )
    width = config.transformer.num_attention_heads * config.transformer.attention_head_dim
    transformer = SD3Transformer(
        SD3Config(
            **config.transformer,
            in_channels=vae.config.latent_channels,
            out_channels=vae.config.latent_channels,
            sample_size=config.sample_size // vae.config.downscale,
            joint_attention_dim=text.t5_width,
            caption_projection_dim=width,
            pooled_projection_dim=sum(text.clip_widths),
        ),
        rngs=rngs,
    )
    text_encoders = TextEncoders(tokenizers, networks, text.t5_width, mesh)
    return SD3Generator(transformer, vae, text_encoders, read_scheduler(folder), mesh)


def _write_pipeline_files(folder: Path, config) -> None:
    """What a diffusers SD3 folder holds beside its networks: the index, the schedule, the tokenizers."""
    text = {"text_encoder": "CLIPTextModelWithProjection", "tokenizer": "CLIPTokenizer"}
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **{f"{name}{suffix}": ["transformers", kind] for name, kind in text.items() for suffix in ("", "_2")},
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
    }
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": config.shift,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    save_tokenizers(folder, config.text.clip_length)


def _save_networks(folder: Path, generator: SD3Generator, params, vae: AutoencoderKL) -> None:
    models.save_pretrained(vae, folder / "vae", dtype="float16")
    models.save_pretrained(
        nnx.merge(generator.graphdef, params["transformer"]), folder / "transformer", dtype="float16"
    )
    for name, graphdef in generator.text_encoders.graphdefs.items():
        models.save_pretrained(nnx.merge(graphdef, params["text"][name]), folder / name, dtype="float16")
