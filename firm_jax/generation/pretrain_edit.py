"""Training an editing generator from nothing: a Qwen-Image transformer together with its Qwen2.5-VL.

Batch `i` comes from a random generator seeded by (seed, i), as in `pretrain`.
"""

import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from firm_jax import models
from firm_jax.data.patches import ImageConfig, cut_patches
from firm_jax.fit import fit
from firm_jax.generation.folder import read_scheduler, write_scheduler
from firm_jax.generation.pretrain import Readout, of_tokens, write_samples
from firm_jax.generation.qwen_image import QwenImageEditPlusGenerator, pack_sources
from firm_jax.generation.qwen_text import EDIT_PLUS, QwenTextEncoder
from firm_jax.generation.schedules import noised
from firm_jax.generation.text import load_tokenizer
from firm_jax.interop.hub import resolve
from firm_jax.mesh import make_mesh, replicate, shard_batch, to_host
from firm_jax.models.qwen2_5_vl import Qwen2_5VL, Qwen2_5VLConfig
from firm_jax.models.qwen_image import QwenImageConfig, QwenImageTransformer
from firm_jax.run import Run
from firm_jax.shapes import edit_oracle, edit_teach, teach
from firm_jax.shapes.critic_folder import learn_tokenizer, write_image_processor
from firm_jax.shapes.edits import edits
from firm_jax.shapes.render import render


def edit_matching_loss(generator: QwenImageEditPlusGenerator, readouts, config) -> Callable:
    """Rectified flow for edits, see `pretrain.flow_matching_loss`: the source's latents stand beside the noisy ones.

    Here the text's tokens are asked what the instruction says, and the target's what the edited picture shows.
    """

    def loss(params, batch, key):
        noise_key, time_key = jax.random.split(key)
        x0 = batch["latents"]
        t = jax.random.uniform(time_key, x0.shape[:1])
        t = config.shift * t / (1 + (config.shift - 1) * t)
        noise = jax.random.normal(noise_key, x0.shape)
        context = generator.text_encoder.encode(params["text"], batch)
        transformer = nnx.merge(generator.graphdef, params["transformer"])
        v, tokens = transformer(
            noised(x0, noise, t), t * generator.timesteps, context, batch["mask"], sources=batch["sources"],
            with_tokens=True,
        )  # fmt: skip
        flow = jnp.square(v - (noise - x0)).mean()
        ask_text, ask_picture = (nnx.merge(*parts) for parts in zip(readouts, params["readouts"], strict=True))
        words = batch["words"][..., None]
        caption = ask_text((words * context).sum(1) / words.sum(1), batch["said"])
        picture = ask_picture(tokens, of_tokens(batch["shown"], tokens.shape[1]))
        total = flow + config.train.caption_readout * caption + config.train.picture_readout * picture
        return total, {"loss/total": total, "loss/flow": flow, "loss/caption": caption, "loss/picture": picture}

    return loss


def train_edit_matching(config, workdir: str) -> None:
    """Train an Edit-Plus pipeline on the shapes world; leaves it as a diffusers folder in `workdir/model`.

    Beside it lies `samples.npz`, edits of `samples` training tasks, for its critic to learn from. The targets of the
    last `train.wrong_epochs` are those of an editor who is often wrong and careless, see `edit_teach.generator_batch`.
    """
    mesh, folder = make_mesh(**config.mesh), Path(workdir) / "model"
    vae = models.from_pretrained(resolve(config.vae), mesh=mesh)
    with Run(config, workdir) as run, jax.set_mesh(mesh):
        if run.is_main:
            _write_texts_and_schedule(folder, config)
        generator = _new_generator(folder, vae, config, mesh)
        rngs = nnx.Rngs(config.seed)
        asked = [
            Readout(config.text.hidden_size, edit_teach.INSTRUCTION_CLASSES, rngs=rngs),
            Readout(generator.config.width, teach.PICTURE_CLASSES, rngs=rngs),
        ]
        readouts, readout_params = zip(*map(nnx.split, asked), strict=True)
        params = {"transformer": generator.params, "text": generator.text_encoder.params}
        params = replicate(params | {"readouts": list(readout_params)}, mesh)

        train = config.train
        right = _encoded_tasks(generator, config, {"wrong": 0.0, "careless": 0.0}, run.progress)
        faults = {"untouched": train.untouched, "wrong": train.wrong, "careless": train.careless}
        wrong = _encoded_tasks(generator, config, faults, run.progress)
        first_wrong = (train.epochs - train.wrong_epochs) * train.steps_per_epoch

        def batch_at(step):
            rng = np.random.default_rng([config.seed, 1, step])
            rows = rng.integers(train.tasks, size=train.batch_size)
            return _batch(generator, right if step < first_wrong else wrong, rows)

        def draw(sources, tasks):
            return generator.sample(
                [edit.text for edit in tasks], list(sources), steps=config.eval.steps, guidance=1.0, solver="dpm2",
                height=config.sample_size, width=config.sample_size, source_area=config.sample_size**2,
                condition_area=config.sample_size**2, max_text_tokens=config.text_tokens,
            )  # fmt: skip

        scenes, held_out = zip(*edits("test", config.eval.sources), strict=True)
        sources = np.stack([render(scene) for scene in scenes])

        def evaluate(params, epoch):
            generator.params, generator.text_encoder.params = params["transformer"], params["text"]
            edited = draw(sources, held_out)
            found = [edit_oracle.compare(*given) for given in zip(sources, edited, held_out, strict=True)]
            texts = [f"{e.text} | {f.execution:.2f} {f.preservation:.2f}" for e, f in zip(held_out, found, strict=True)]
            pairs = np.stack([sources[:16], edited[:16]], 1).reshape(-1, *edited.shape[1:])
            captions = [text for one in texts[:16] for text in ("source", one)]
            run.images("edits", pairs, captions, step=epoch * train.steps_per_epoch, epoch=epoch)
            names = ("execution", "preservation", "accurate")
            return {f"eval/oracle_{name}": float(np.mean([getattr(f, name) for f in found])) for name in names}

        params = fit(run, config, mesh, params, edit_matching_loss(generator, readouts, config), batch_at, evaluate)
        generator.params, generator.text_encoder.params = params["transformer"], params["text"]
        asked = edits("train", config.samples // 3)
        sources = np.stack([render(scene) for scene, _ in asked])
        tasks = [edit for _, edit in asked]
        drawn = [draw(sources[i : i + 256], tasks[i : i + 256]) for i in range(0, len(tasks), 256)]
        if run.is_main:
            generator.save_pretrained(folder, dtype="float16")
            texts = [edit.to_json() for edit in tasks]
            pictures = {"sources": sources, "images": np.concatenate(drawn)}
            write_samples(Path(workdir) / "samples.npz", "edits", texts, **pictures)


def _batch(generator: QwenImageEditPlusGenerator, tasks: dict, rows: np.ndarray) -> dict:
    """One training batch: row b shows the text encoder its own source, row b of the table of images."""
    config = generator.text_encoder.images
    patches = cut_patches(tasks["pixels"][rows], config)
    count = patches.shape[1] // config.merge_size**2
    own = tasks["image_index"][rows]
    side, grid = tasks["pixels"].shape[1] // config.patch_size, math.isqrt(tasks["sources"].shape[1])
    samples = [[(tasks["sources"][row], (grid, grid))] for row in rows]
    given = {name: tasks[name][rows] for name in ("latents", "ids", "segments", "positions", "mask", "words")}
    return given | {
        "image_index": np.where(own >= 0, own + count * np.arange(len(rows))[:, None], -1),
        "patches": patches,
        "grids": np.full((len(rows), 2), side, np.int32),
        "sources": pack_sources(samples, grid * grid),
        "said": tasks["said"][rows],
        "shown": tasks["shown"][rows],
    }


def _encoded_tasks(generator: QwenImageEditPlusGenerator, config, faults: dict, progress: Callable) -> dict:
    """`train.tasks` edits as arrays: pictures, latents, tokens, what instructions say and what targets show."""

    @jax.jit
    def encode(vae_params, images):
        mean, _ = nnx.merge(generator.vae_graphdef, vae_params).encode(images * 2 - 1)
        return generator.vae_config.standardise(mean)

    text = generator.text_encoder
    found: dict[str, list] = {}
    for start in progress(range(0, config.train.tasks, 256), f"encoding edits {faults}"):
        rng = np.random.default_rng([config.seed, 0, start])
        tasks, sources, scenes, targets = edit_teach.generator_batch(
            rng, min(256, config.train.tasks - start), **faults
        )
        pixels = np.round(sources * 255).astype(np.uint8)
        sequences = text.sequences([edit.text for edit in tasks], [[image] for image in pixels], config.text_tokens)
        length = config.text_tokens + int((sequences[0].image >= 0).sum())
        parts = text.collate(sequences, length, len(sequences))
        del parts["patches"], parts["grids"]
        shown = [np.where(sequence.image >= 0, sequence.patch, -1) for sequence in sequences]
        width = parts["ids"].shape[1]
        parts["image_index"] = np.stack([np.pad(one, (0, width - len(one)), constant_values=-1) for one in shown])
        mask = parts["segments"][:, text.template.dropped :]
        parts |= {
            "pixels": pixels,
            "latents": to_host(encode(generator.vae_params, shard_batch(targets, generator.mesh))),
            "sources": to_host(
                generator.encode_sources_jitted(generator.vae_params, shard_batch(sources * 2 - 1, generator.mesh))
            ),
            "mask": mask,
            "words": (mask * (parts["image_index"][:, text.template.dropped :] < 0)).astype(np.float32),
            "said": np.stack([edit_teach.instruction_classes(edit) for edit in tasks]),
            "shown": np.stack([teach.picture_classes(scene) for scene in scenes]),
        }
        for name, array in parts.items():
            found.setdefault(name, []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def _new_generator(folder: Path, vae, config, mesh) -> QwenImageEditPlusGenerator:
    """The pipeline of the config with fresh transformer and text encoder; tokenizer and schedule from its folder."""
    rngs, tokenizer = nnx.Rngs(config.seed), load_tokenizer(folder / "tokenizer")
    vision = config.vision.to_dict() | {"out_hidden_size": config.text.hidden_size}
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text_config = Qwen2_5VLConfig.from_hf(
        {
            "text_config": config.text.to_dict() | {"vocab_size": len(tokenizer)},
            "vision_config": vision,
            "tie_word_embeddings": True,
            **dict(zip(names, tokenizer.convert_tokens_to_ids(marks), strict=True)),
        }
    )
    network = Qwen2_5VL(text_config, rngs=rngs)
    images = ImageConfig.from_folder(folder / "processor")
    text_encoder = QwenTextEncoder(tokenizer, network, images, EDIT_PLUS, mesh)
    channels = vae.config.z_dim
    fields = {"in_channels": 4 * channels, "out_channels": channels, "joint_attention_dim": config.text.hidden_size}
    transformer = QwenImageTransformer(QwenImageConfig.from_hf(config.transformer.to_dict() | fields), rngs=rngs)
    return QwenImageEditPlusGenerator(
        transformer, vae, text_encoder, read_scheduler(folder), mesh, processor_folder=folder / "processor"
    )


def _write_texts_and_schedule(folder: Path, config) -> None:
    """What a new pipeline reads from its folder; the rest of the folder is written when it is trained."""
    rng = np.random.default_rng([config.seed, 2])
    instructions = [edit_teach.sample_task(rng)[1].text for _ in range(config.texts)]
    opening = f"system\n{EDIT_PLUS.system} user\nPicture 1: assistant\n"
    # Often enough for each of its words to become one token, as in the tokenizer of the published pipelines.
    tokenizer = learn_tokenizer([opening] * config.texts + instructions, config.vocab_size)
    for part in ("tokenizer", "processor"):
        tokenizer.save_pretrained(folder / part)
    area = config.sample_size**2
    write_image_processor(folder / "processor", "Qwen2VL", config.vision.to_dict(), area, area)
    write_scheduler(folder, config.scheduler.to_dict())
