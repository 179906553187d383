"""Training a Qwen-Image generator from nothing, for pictures or for edits: a transformer together with its Qwen2.5-VL.

Batch `i` comes from a random generator seeded by (seed, i), as in `pretrain`.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from firm_jax import models
from firm_jax.data.patches import ImageConfig, cut_patches
from firm_jax.errors import ConfigError
from firm_jax.fit import fit
from firm_jax.generation.generator import pipeline_class
from firm_jax.generation.pretrain import Readout, flow_example, of_tokens, write_samples
from firm_jax.generation.qwen_image import QwenImageGenerator, pack_sources
from firm_jax.generation.qwen_text import QwenTextEncoder
from firm_jax.generation.text import load_tokenizer
from firm_jax.interop.hub import resolve
from firm_jax.interop.pipeline_folder import read_scheduler, write_scheduler
from firm_jax.mesh import make_mesh, replicate, shard_batch, to_host
from firm_jax.models.qwen2_5_vl import Qwen2_5VL, Qwen2_5VLConfig
from firm_jax.models.qwen_image import QwenImageConfig, QwenImageTransformer
from firm_jax.run import Run
from firm_jax.shapes import edit_oracle, edit_teach, oracle, teach
from firm_jax.shapes.critic_folder import learn_tokenizer, write_image_processor
from firm_jax.shapes.edits import Edit, edits
from firm_jax.shapes.render import render
from firm_jax.shapes.scene import Prompt, Scene
from firm_jax.shapes.scene import prompts as shapes_prompts


class Tasks(NamedTuple):
    """N texts with the pictures that a generator may answer them with.

    asked: what the texts ask for. sources: the pictures to be edited [N, H, W, 3] in [0, 1], or None. scenes, targets:
    the answers and their pictures. said: what the texts say, as numbers.
    """

    asked: Sequence[Prompt] | Sequence[Edit]
    sources: np.ndarray | None
    scenes: Sequence[Scene]
    targets: np.ndarray
    said: np.ndarray


class Captions:
    """Pictures of prompts."""

    pipeline, classes, samples = "QwenImagePipeline", teach.CAPTION_CLASSES, "prompts"

    @staticmethod
    def draw(rng: np.random.Generator, count: int, faults: dict) -> Tasks:
        prompts, scenes, images = teach.generator_batch(rng, count, faults.get("wrong", 0.0))
        return Tasks(prompts, None, scenes, images, np.stack([teach.caption_classes(prompt) for prompt in prompts]))

    @staticmethod
    def known(split: str, count: int) -> tuple[list[Prompt], None]:
        return shapes_prompts(split, count), None

    @staticmethod
    def judge(images: np.ndarray, sources, asked: Sequence[Prompt]) -> dict[str, np.ndarray]:
        holds = [oracle.check(image, prompt) for image, prompt in zip(images, asked, strict=True)]
        return {"fraction": np.array([np.mean(h) for h in holds]), "accuracy": np.array([all(h) for h in holds])}


class Edits:
    """Edits of pictures."""

    pipeline, classes, samples = "QwenImageEditPlusPipeline", edit_teach.INSTRUCTION_CLASSES, "edits"

    @staticmethod
    def draw(rng: np.random.Generator, count: int, faults: dict) -> Tasks:
        given = {"wrong": 0.0, "careless": 0.0} | faults
        asked, sources, scenes, targets = edit_teach.generator_batch(rng, count, **given)
        return Tasks(asked, sources, scenes, targets, np.stack([edit_teach.instruction_classes(e) for e in asked]))

    @staticmethod
    def known(split: str, count: int) -> tuple[list[Edit], np.ndarray]:
        scenes, asked = zip(*edits(split, -(-count // 3)), strict=True)
        return list(asked)[:count], np.stack([render(scene) for scene in scenes])[:count]

    @staticmethod
    def judge(images: np.ndarray, sources: np.ndarray, asked: Sequence[Edit]) -> dict[str, np.ndarray]:
        found = [edit_oracle.compare(*given) for given in zip(sources, images, asked, strict=True)]
        names = ("execution", "preservation", "accurate")
        return {name: np.array([getattr(one, name) for one in found], float) for name in names}


KINDS = {kind.pipeline: kind for kind in (Captions, Edits)}


def qwen_matching_loss(generator: QwenImageGenerator, readouts, config) -> Callable:
    """Rectified flow, see `pretrain.flow_matching_loss`; of edits, the source's latents stand beside the noisy ones.

    Here the text's tokens are asked what the text says, and the target's what the finished picture shows.
    """

    def loss(params, batch, key):
        x_t, t, target = flow_example(key, batch["latents"], config.shift)
        context = generator.text_encoder.encode(params["text"], batch)
        transformer = nnx.merge(generator.graphdef, params["transformer"])
        v, tokens = transformer(
            x_t, t * generator.timesteps, context, batch["mask"], sources=batch.get("sources"),
            with_tokens=True,
        )  # fmt: skip
        flow = jnp.square(v - target).mean()
        ask_text, ask_picture = (nnx.merge(*parts) for parts in zip(readouts, params["readouts"], strict=True))
        words = batch["words"][..., None]
        caption = ask_text((words * context).sum(1) / words.sum(1), batch["said"])
        picture = ask_picture(tokens, of_tokens(batch["shown"], tokens.shape[1]))
        total = flow + config.train.caption_readout * caption + config.train.picture_readout * picture
        return total, {"loss/total": total, "loss/flow": flow, "loss/caption": caption, "loss/picture": picture}

    return loss


def train_qwen_matching(config, workdir: str) -> None:
    """Train a Qwen-Image pipeline on the shapes world; leaves it as a diffusers folder in `workdir/model`.

    Beside it lies `samples.npz`, its answers to `samples` training tasks, for its critic to learn from. The targets of
    the last `train.wrong_epochs` have the faults `train.faults`: those of `teach.generator_batch` or, for edits, of
    `edit_teach.generator_batch`. Raises ConfigError for a pipeline that is not trained here.
    """
    if config.pipeline not in KINDS:
        raise ConfigError(f"pipeline is {config.pipeline!r}; trained here are {', '.join(KINDS)}")
    kind, train = KINDS[config.pipeline], config.train
    mesh, folder = make_mesh(**config.mesh), Path(workdir) / "model"
    vae = models.from_pretrained(resolve(config.vae), mesh=mesh)
    with Run(config, workdir) as run, jax.set_mesh(mesh):
        if run.is_main:
            _write_texts_and_schedule(folder, kind, config)
        generator = _new_generator(folder, vae, config, mesh)
        rngs = nnx.Rngs(config.seed)
        asked = [
            Readout(config.text.hidden_size, kind.classes, rngs=rngs),
            Readout(generator.config.width, teach.PICTURE_CLASSES, rngs=rngs),
        ]
        readouts, readout_params = zip(*map(nnx.split, asked), strict=True)
        params = {"transformer": generator.params, "text": generator.text_encoder.params}
        params = replicate(params | {"readouts": list(readout_params)}, mesh)

        right = _encoded_tasks(generator, kind, config, {}, run.progress)
        wrong = _encoded_tasks(generator, kind, config, train.faults.to_dict(), run.progress)
        first_wrong = (train.epochs - train.wrong_epochs) * train.steps_per_epoch

        def batch_at(step):
            rng = np.random.default_rng([config.seed, 1, step])
            rows = rng.integers(train.tasks, size=train.batch_size)
            return _batch(generator, right if step < first_wrong else wrong, rows)

        areas = {"source_area": config.sample_size**2, "condition_area": config.sample_size**2}

        def draw(tasks, sources):
            return generator.sample(
                [task.text for task in tasks], None if sources is None else list(sources), steps=config.eval.steps,
                guidance=1.0, solver="dpm2", height=config.sample_size, width=config.sample_size,
                max_text_tokens=config.text_tokens, **(areas if generator.edits else {}),
            )  # fmt: skip

        held_out, sources = kind.known("test", config.eval.tasks)

        def evaluate(params, epoch):
            generator.params, generator.text_encoder.params = params["transformer"], params["text"]
            drawn = draw(held_out, sources)
            found = kind.judge(drawn, sources, held_out)
            captions = [
                f"{task.text} | {' '.join(f'{values[row]:.2f}' for values in found.values())}"
                for row, task in enumerate(held_out[:16])
            ]
            shown = drawn[:16]
            if sources is not None:
                shown = np.stack([sources[:16], shown], 1).reshape(-1, *drawn.shape[1:])
                captions = [text for caption in captions for text in ("source", caption)]
            run.images("samples", shown, captions, step=epoch * train.steps_per_epoch, epoch=epoch)
            return {f"eval/oracle_{name}": float(values.mean()) for name, values in found.items()}

        params = fit(run, config, mesh, params, qwen_matching_loss(generator, readouts, config), batch_at, evaluate)
        generator.params, generator.text_encoder.params = params["transformer"], params["text"]
        tasks, sources = kind.known("train", config.samples)
        parts = [slice(start, start + 256) for start in range(0, len(tasks), 256)]
        drawn = [draw(tasks[part], None if sources is None else sources[part]) for part in parts]
        if run.is_main:
            generator.save_pretrained(folder, dtype="float16")
            pictures = {"images": np.concatenate(drawn)} | ({} if sources is None else {"sources": sources})
            texts = [task.to_json() for task in tasks]
            write_samples(Path(workdir) / "samples.npz", kind.samples, texts, **pictures)


def _batch(generator: QwenImageGenerator, tasks: dict, rows: np.ndarray) -> dict:
    """One training batch; of edits, row b shows the text encoder its own source, row b of the table of images."""
    names = ("latents", "ids", "segments", "positions", "image_index", "mask", "words", "said", "shown")
    batch = {name: tasks[name][rows] for name in names}
    if "pixels" not in tasks:
        return batch
    config = generator.text_encoder.images
    patches = cut_patches(tasks["pixels"][rows], config)
    count, own = patches.shape[1] // config.merge_size**2, batch["image_index"]
    side, grid = tasks["pixels"].shape[1] // config.patch_size, math.isqrt(tasks["sources"].shape[1])
    samples = [[(tasks["sources"][row], (grid, grid))] for row in rows]
    return batch | {
        "image_index": np.where(own >= 0, own + count * np.arange(len(rows))[:, None], -1),
        "patches": patches,
        "grids": np.full((len(rows), 2), side, np.int32),
        "sources": pack_sources(samples, grid * grid),
    }


def _encoded_tasks(generator: QwenImageGenerator, kind, config, faults: dict, progress: Callable) -> dict:
    """`train.tasks` tasks as arrays: latents, tokens, what texts say and what targets show; of edits, the sources.

    The autoencoder does not change, and would take more of every step than the transformer.
    """

    @jax.jit
    def encode(vae_params, images):
        mean, _ = nnx.merge(generator.vae_graphdef, vae_params).encode(images * 2 - 1)
        return generator.vae_config.standardise(mean)

    text, found = generator.text_encoder, {}
    for start in progress(range(0, config.train.tasks, 256), f"encoding tasks {faults or ''}"):
        rng = np.random.default_rng([config.seed, 0, start])
        tasks = kind.draw(rng, min(256, config.train.tasks - start), faults)
        pixels = None if tasks.sources is None else np.round(tasks.sources * 255).astype(np.uint8)
        shown = [()] * len(tasks.asked) if pixels is None else [[image] for image in pixels]
        sequences = text.sequences([task.text for task in tasks.asked], shown, config.text_tokens)
        length = config.text_tokens + int((sequences[0].image >= 0).sum())
        arrays = text.collate(sequences, length, len(sequences))
        # Of its own picture: what row of a table that is, each batch decides.
        own = [np.where(sequence.image >= 0, sequence.patch, -1) for sequence in sequences]
        width = arrays["ids"].shape[1]
        index = np.stack([np.pad(one, (0, width - len(one)), constant_values=-1) for one in own])
        mask = arrays["segments"][:, text.template.dropped :]
        parts = {name: arrays[name] for name in ("ids", "segments", "positions")} | {
            "image_index": index,
            "mask": mask,
            "words": (mask * (index[:, text.template.dropped :] < 0)).astype(np.float32),
            "latents": to_host(encode(generator.vae_params, shard_batch(tasks.targets, generator.mesh))),
            "said": tasks.said,
            "shown": np.stack([teach.picture_classes(scene) for scene in tasks.scenes]),
        }
        if pixels is not None:
            images = shard_batch(tasks.sources * 2 - 1, generator.mesh)
            parts["sources"] = to_host(generator.encode_sources_jitted(generator.vae_params, images))
            parts["pixels"] = pixels
        for name, array in parts.items():
            found.setdefault(name, []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def _new_generator(folder: Path, vae, config, mesh) -> QwenImageGenerator:
    """The pipeline of the config with fresh transformer and text encoder; tokenizer and schedule from its folder."""
    generator_class = pipeline_class({"_class_name": config.pipeline})
    rngs, tokenizer = nnx.Rngs(config.seed), load_tokenizer(folder / "tokenizer")
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text_config = Qwen2_5VLConfig.from_hf(
        {
            "text_config": config.text.to_dict() | {"vocab_size": len(tokenizer)},
            "vision_config": config.vision.to_dict() | {"out_hidden_size": config.text.hidden_size},
            "tie_word_embeddings": True,
            **dict(zip(names, tokenizer.convert_tokens_to_ids(marks), strict=True)),
        }
    )
    processor = folder / "processor" if generator_class.edits else None
    images = ImageConfig.from_folder(processor) if processor else None
    text_encoder = QwenTextEncoder(tokenizer, Qwen2_5VL(text_config, rngs=rngs), images, generator_class.template, mesh)
    channels = vae.config.z_dim
    fields = {"in_channels": 4 * channels, "out_channels": channels, "joint_attention_dim": config.text.hidden_size}
    transformer = QwenImageTransformer(QwenImageConfig.from_hf(config.transformer.to_dict() | fields), rngs=rngs)
    return generator_class(transformer, vae, text_encoder, read_scheduler(folder), mesh, processor_folder=processor)


def _write_texts_and_schedule(folder: Path, kind, config) -> None:
    """What a new pipeline reads from its folder; the rest of the folder is written when it is trained."""
    generator_class = pipeline_class({"_class_name": config.pipeline})
    asked = kind.draw(np.random.default_rng([config.seed, 2]), config.texts, {}).asked
    template = generator_class.template
    opening = f"system\n{template.system} user\n{template.picture.format(1)}assistant\n"
    # Often enough for each of its words to become one token, as in the tokenizer of the published pipelines.
    tokenizer = learn_tokenizer([opening] * config.texts + [task.text for task in asked], config.vocab_size)
    for part in ("tokenizer", "processor") if generator_class.edits else ("tokenizer",):
        tokenizer.save_pretrained(folder / part)
    if generator_class.edits:
        area = config.sample_size**2
        write_image_processor(folder / "processor", "Qwen2VL", config.vision.to_dict(), area, area)
    write_scheduler(folder, config.scheduler.to_dict())
