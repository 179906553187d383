"""Training a critic's vision tower before it meets the language model, as the towers of real critics were.

From the features of each of the tower's outputs alone, each quarter of a picture of the shapes world has to say what
it holds (kind, colour and size of its shape, or none) and which quarter it is, so that a language model finds it; the
mean of all quarters has to say the picture's three quality scores. The read-outs are linear and thrown away afterwards.
"""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from firm_jax import models
from firm_jax.critic.processing import Processor
from firm_jax.critic.sft import COMPANIONS, base_folder
from firm_jax.critic.sft_data import rubrics_of, sources
from firm_jax.data.patches import patch_image
from firm_jax.fit import fit
from firm_jax.mesh import make_mesh, replicate
from firm_jax.models.layers import Linear, reshape
from firm_jax.run import Run
from firm_jax.shapes import teach

QUARTERS = 4


class Readout(nnx.Module):
    """Quarters' features [M, 4, D] -> logits [M, 4, classes] for each of teach.QUARTER_CLASSES, and logits
    [M, classes] of the whole picture for each of teach.QUALITY_CLASSES."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.contents = nnx.List([Linear(width, classes, rngs=rngs) for classes in teach.QUARTER_CLASSES])
        self.quality = nnx.List([Linear(width, classes, rngs=rngs) for classes in teach.QUALITY_CLASSES])

    def __call__(self, features):
        return [head(features) for head in self.contents], [head(features.mean(1)) for head in self.quality]


def quarters(features):
    """Features [M, P, D] of a square picture's P merged patches, row by row -> the quarters' means [M, 4, D]."""
    M, P, D = features.shape
    half = int(P**0.5) // 2
    return reshape(features, M, 2, half, 2, half, D).mean((2, 4)).reshape(M, QUARTERS, D)


def vision_loss(graphdefs, params, batch):
    """Mean cross-entropy of all read-outs; of the main output, the shares of quarters and of scores read right.

    batch: `patches` and `grids` of M square pictures, `labels` [M, 4, 4], `quality` [M, 3].
    """
    model = nnx.merge(graphdefs["model"], params["model"])
    features, deepstack = model.encode_images(batch["patches"], batch["grids"], remat="full")
    losses, right = [], []
    for output, graphdef, state in zip([features, *deepstack], graphdefs["readouts"], params["readouts"], strict=True):
        contents, quality = nnx.merge(graphdef, state)(quarters(output))
        for logits, labels in ((contents, batch["labels"]), (quality, batch["quality"])):
            labels = jnp.moveaxis(labels, -1, 0)
            losses += [_cross_entropy(a, b) for a, b in zip(logits, labels, strict=True)]
            right.append(jnp.stack([a.argmax(-1) == b for a, b in zip(logits, labels, strict=True)]))
    total = sum(losses) / len(losses)
    shares = {"train/quarters_right": right[0].all(0).mean(), "train/quality_right": right[1].mean()}
    return total, {"loss/total": total, **shares}


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_vision(config, workdir: str) -> None:
    """Train the vision tower of a new miniature critic; leaves its folder in `workdir/model`."""
    mesh = make_mesh(**config.mesh)
    with Run(config, workdir) as run, jax.set_mesh(mesh):
        folder = base_folder(config, run, sources(config, rubrics_of(config))[0])
        processor, model = Processor(folder), models.from_pretrained(folder)
        outputs = 1 + len(model.config.vision.deepstack_visual_indexes)
        width = model.config.vision.out_hidden_size
        readouts = [nnx.split(Readout(width, rngs=nnx.Rngs(config.seed + i))) for i in range(outputs)]
        graphdef, params = nnx.split(model)
        graphdefs = {"model": graphdef, "readouts": [graph for graph, _ in readouts]}
        params = replicate({"model": params, "readouts": [state for _, state in readouts]}, mesh)

        def batch(rng, count):
            images, labels, quality = teach.vision_batch(rng, count)
            patched = [patch_image(np.round(image * 255).astype(np.uint8), processor.images) for image in images]
            return {
                "patches": np.stack([image.patches for image in patched]),
                "grids": np.array([image.grid for image in patched], np.int32),
                "labels": labels,
                "quality": quality,
            }

        def batch_at(step):
            return batch(np.random.default_rng([config.seed, 2, step]), config.train.batch_size)

        held_out = batch(np.random.default_rng([config.seed, 3]), config.eval.examples)
        measure = jax.jit(lambda params: vision_loss(graphdefs, params, held_out)[1])

        def evaluate(params, epoch):
            measured = measure(params)
            return {f"eval/{name}": float(measured[f"train/{name}"]) for name in ("quarters_right", "quality_right")}

        params = fit(
            run, config, mesh, params, lambda p, b, key: vision_loss(graphdefs, p, b), batch_at, evaluate,
            fixed=r"language_model|lm_head",
        )  # fmt: skip
        if run.is_main:
            target = Path(workdir) / "model"
            models.save_pretrained(nnx.merge(graphdef, params["model"]), target)
            for pattern in COMPANIONS:
                for file in Path(folder).glob(pattern):
                    shutil.copy(file, target / file.name)
