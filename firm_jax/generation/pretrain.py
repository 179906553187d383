"""Training a text-to-image generator from nothing: a flow-matching transformer together with its text encoders.

Batch `i` comes from a random generator seeded by (seed, i), so a resumed run sees the batches that an uninterrupted
one would have seen, and no data state has to be kept.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from firm_jax import models
from firm_jax.fit import fit
from firm_jax.generation.schedules import noised
from firm_jax.generation.sd3 import SD3Generator
from firm_jax.generation.text import TextEncoders, load_tokenizer
from firm_jax.interop.hub import resolve
from firm_jax.interop.pipeline_folder import read_scheduler
from firm_jax.mesh import make_mesh, replicate, shard_batch, to_host
from firm_jax.models.clip import CLIPTextConfig, CLIPTextModel
from firm_jax.models.layers import Linear
from firm_jax.models.sd3 import SD3Config, SD3Transformer
from firm_jax.models.t5 import T5Config, T5Encoder
from firm_jax.models.vae_kl import AutoencoderKL
from firm_jax.run import Run
from firm_jax.shapes import oracle, teach
from firm_jax.shapes.scene import prompts as shapes_prompts
from firm_jax.shapes.tokenizers import save_tokenizers
from firm_jax.typing import Array, Float


class Readout(nnx.Module):
    """Linear read-outs of several labels: features [..., D], labels [..., N] -> the mean of N cross-entropies."""

    def __init__(self, width: int, classes: Sequence[int], *, rngs: nnx.Rngs):
        self.heads = nnx.List([Linear(width, count, rngs=rngs) for count in classes])

    def __call__(self, features, labels):
        entropy = optax.softmax_cross_entropy_with_integer_labels
        entropies = [entropy(head(features), labels[..., i]).mean() for i, head in enumerate(self.heads)]
        return sum(entropies) / len(entropies)


def flow_example(key, x0: Float[Array, "B h w C"], shift: float):
    """Latents at random noise shares, `x_t = (1 - t) x0 + t noise`, with t [B] and the velocity `noise - x0`.

    t is distributed as the sampler's sigmas: uniform, moved by the schedule's shift.
    """
    noise_key, time_key = jax.random.split(key)
    t = jax.random.uniform(time_key, x0.shape[:1])
    t = shift * t / (1 + (shift - 1) * t)
    noise = jax.random.normal(noise_key, x0.shape)
    return noised(x0, noise, t), t, noise - x0


def flow_matching_loss(generator: SD3Generator, readouts, config) -> Callable:
    """Rectified flow: the squared error of the velocity (`flow_example`).

    A share `train.unconditional` of the captions arrives empty, for classifier-free guidance.

    Two cross-entropies of linear read-outs, thrown away afterwards, teach sooner what velocities teach late. The text
    encoders of a real pipeline can read before a picture is drawn, and these learn along: their pooled vector, and the
    means of CLIP's and of T5's tokens, are asked what the caption says (`train.caption_readout`). And the image tokens
    are asked what the finished picture shows in their quarter (`train.picture_readout`), a cousin of the alignment of
    representations (REPA, arXiv 2410.06940): at high noise that answer is in the caption, and must be looked up there.
    """

    def loss(params, batch, key):
        x_t, t, target = flow_example(key, batch["latents"], config.shift)
        conditioning = generator.text_encoders.encode(params["text"], batch["ids"], config.text.t5_length)
        transformer = nnx.merge(generator.graphdef, params["transformer"])
        v, tokens = transformer(
            x_t, t * generator.timesteps, conditioning.context, conditioning.pooled,
            remat="full", with_tokens=True,
        )  # fmt: skip
        flow = jnp.square(v - target).mean()
        clip, t5 = jnp.split(conditioning.context, [config.text.clip_length], axis=1)
        *ask_texts, ask_picture = (nnx.merge(*parts) for parts in zip(readouts, params["readouts"], strict=True))
        texts = (conditioning.pooled, clip.mean(1), t5.mean(1))
        caption = sum(ask(text, batch["said"]) for ask, text in zip(ask_texts, texts, strict=True)) / len(texts)
        picture = ask_picture(tokens, of_tokens(batch["shown"], tokens.shape[1]))
        total = flow + config.train.caption_readout * caption + config.train.picture_readout * picture
        return total, {"loss/total": total, "loss/flow": flow, "loss/caption": caption, "loss/picture": picture}

    return loss


def of_tokens(quarters: jax.Array, count: int) -> jax.Array:
    """Labels [B, 4, N] of a square picture's quarters -> those of its `count` tokens, row by row [B, count, N]."""
    half = math.isqrt(count) // 2
    grid = quarters.reshape(-1, 2, 2, quarters.shape[-1])
    return grid.repeat(half, 1).repeat(half, 2).reshape(-1, count, quarters.shape[-1])


def train_flow_matching(config, workdir: str) -> None:
    """Train an SD3 pipeline on the shapes world; leaves it as a diffusers folder in `workdir/model`.

    Beside it lies `samples.npz`, pictures of `samples` training prompts, for its critic to learn from.
    Most of the training is on pictures that show what their captions say, which is quickly learned. In the pictures of
    the last `train.wrong_epochs` each attribute is wrong with probability `train.wrong`: the generator goes on drawing
    every concept well, and no longer obeys; to make it obey is what reinforcement learning is for.
    """
    mesh, folder = make_mesh(**config.mesh), Path(workdir) / "model"
    vae = models.from_pretrained(resolve(config.vae), mesh=mesh)
    with Run(config, workdir) as run, jax.set_mesh(mesh):
        if run.is_main:
            _write_schedule_and_tokenizers(folder, config)
        generator = _new_generator(folder, vae, config, mesh)
        widths = (sum(config.text.clip_widths), config.text.t5_width, config.text.t5_width)
        rngs = nnx.Rngs(config.seed)
        asked = [Readout(width, teach.CAPTION_CLASSES, rngs=rngs) for width in widths]
        asked.append(Readout(generator.config.width, teach.PICTURE_CLASSES, rngs=rngs))
        readouts, readout_params = zip(*map(nnx.split, asked), strict=True)
        params = {"transformer": generator.params, "text": generator.text_encoders.params}
        params = replicate(params | {"readouts": list(readout_params)}, mesh)

        train = config.train
        right = _encoded_pictures(generator, config, 0.0, run.progress)
        wrong = _encoded_pictures(generator, config, train.wrong, run.progress)
        first_wrong = (train.epochs - train.wrong_epochs) * train.steps_per_epoch
        empty = generator.text_encoders.tokenize([""], config.text.t5_length)

        def batch_at(step):
            rng = np.random.default_rng([config.seed, 1, step])
            pictures = right if step < first_wrong else wrong
            rows = rng.integers(train.pictures, size=train.batch_size)
            dropped = rng.random((len(rows), 1)) < train.unconditional
            ids = {name: np.where(dropped, empty[name], all_ids[rows]) for name, all_ids in pictures["ids"].items()}
            said = np.where(dropped, 0, pictures["said"][rows])
            return {"latents": pictures["latents"][rows], "ids": ids, "said": said, "shown": pictures["shown"][rows]}

        def draw(prompts):
            return generator.sample(
                [prompt.text for prompt in prompts], steps=config.eval.steps, guidance=1.0, solver="dpm2",
                height=config.sample_size, width=config.sample_size, max_text_tokens=config.text.t5_length,
            )  # fmt: skip

        held_out = shapes_prompts("test", config.eval.prompts)

        def evaluate(params, epoch):
            generator.params, generator.text_encoders.params = params["transformer"], params["text"]
            images = draw(held_out)
            holds = [oracle.check(image, prompt) for image, prompt in zip(images, held_out, strict=True)]
            captions = [f"{p.text} | {np.mean(h):.2f}" for p, h in zip(held_out, holds, strict=True)]
            run.images("samples", images[:32], captions[:32], step=epoch * config.train.steps_per_epoch, epoch=epoch)
            return {
                "eval/oracle_fraction": float(np.mean([np.mean(h) for h in holds])),
                "eval/oracle_accuracy": float(np.mean([all(h) for h in holds])),
            }

        params = fit(
            run, config, mesh, params, flow_matching_loss(generator, readouts, config), batch_at, evaluate,
            fixed=r"pos_embed\.pos_embed",
        )  # fmt: skip
        generator.params, generator.text_encoders.params = params["transformer"], params["text"]
        asked = shapes_prompts("train", config.samples)
        pictures = [draw(asked[start : start + 256]) for start in range(0, len(asked), 256)]
        if run.is_main:
            generator.save_pretrained(folder, dtype="float16")
            texts = [prompt.to_json() for prompt in asked]
            write_samples(Path(workdir) / "samples.npz", "prompts", texts, images=np.concatenate(pictures))


def write_samples(file: Path, asked: str, texts: Sequence[dict], **pictures: np.ndarray) -> None:
    """Pictures float [N, H, W, 3] in [0, 1] and, under the name `asked`, what each was asked to show."""
    arrays = {name: np.round(images * 255).astype(np.uint8) for name, images in pictures.items()}
    np.savez_compressed(file, **{asked: np.array([json.dumps(text) for text in texts])}, **arrays)


def _encoded_pictures(generator: SD3Generator, config, wrong: float, progress: Callable) -> dict:
    """`train.pictures` captioned pictures as latents, token ids, what the captions say and what the pictures show.

    The autoencoder does not change, and would take more of every step than the transformer.
    """

    @jax.jit
    def encode(vae_params, images):
        mean, _ = nnx.merge(generator.vae_graphdef, vae_params).encode(images * 2 - 1)
        return generator.vae_config.standardise(mean)

    latents, ids, said, shown = [], [], [], []
    for start in progress(range(0, config.train.pictures, 256), f"encoding pictures ({wrong:.0%} wrong)"):
        rng = np.random.default_rng([config.seed, 0, start])
        prompts, scenes, images = teach.generator_batch(rng, min(256, config.train.pictures - start), wrong)
        latents.append(to_host(encode(generator.vae_params, shard_batch(images, generator.mesh))))
        ids.append(generator.text_encoders.tokenize([prompt.text for prompt in prompts], config.text.t5_length))
        said += [teach.caption_classes(prompt) for prompt in prompts]
        shown += [teach.picture_classes(scene) for scene in scenes]
    return {
        "latents": np.concatenate(latents),
        "said": np.stack(said),
        "shown": np.stack(shown),
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
    for network in networks.values():
        embedding = getattr(network, "shared", None) or network.token_embedding
        # Of the size of what attention adds to it: otherwise all tokens of a caption look alike after one layer.
        embedding.embedding[...] *= 50
    text_encoders = TextEncoders(tokenizers, networks, text.t5_width, mesh)
    return SD3Generator(transformer, vae, text_encoders, read_scheduler(folder), mesh)


def _write_schedule_and_tokenizers(folder: Path, config) -> None:
    """What a new pipeline reads from its folder; the rest of the folder is written when it is trained."""
    schedule = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": config.shift,
    }
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=2) + "\n")
    save_tokenizers(folder, config.text.clip_length)
