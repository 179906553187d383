"""Everything that fine-tuning a critic compiles, at the shapes that it meets, over shapes in the place of arrays.

The functions are the job's own; only what they are given is made here. Every row of a batch is taken to be as long as
the last of `train.lengths`, and every image as large as `data.max_pixels` allows.
"""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from firm_jax.abstract import batch, outputs, place
from firm_jax.critic.bench.records import CRITERIA
from firm_jax.critic.processing import image_table, lay_out
from firm_jax.critic.programs import CLOSING_TOKENS, OPENING_TOKENS, AbstractCritic
from firm_jax.critic.rubric import RUBRICS
from firm_jax.critic.sft import check_settings, init_state, make_evaluation, make_update, make_whole
from firm_jax.critic.sft_data import micro_batches
from firm_jax.critic.sft_flops import image_flops, text_flops
from firm_jax.critic.tuning import Tuning, learning_rates, make_optimizer
from firm_jax.embedded import embedded_path
from firm_jax.errors import ConfigError
from firm_jax.mesh import batch_size
from firm_jax.models.lora import init_lora, lora_shardings
from firm_jax.models.qwen3_vl import Qwen3VL
from firm_jax.plan import Program

IMAGES = {"gen": 1, "edit": 2}  # of an example, by `eval.bench_task`


class SFTPrograms:
    """The fine-tuning job of a config on a mesh: what it keeps on the devices, and its programs.

    No weights and no data are read: the base folder, where it is at hand, gives its config, else `published` does.
    Raises ConfigError and WeightsError as the job would, and for a model whose config is not to be had.
    """

    def __init__(self, config, mesh: Mesh):
        self.config, self.mesh, settings = config, mesh, config.train
        check_settings(config)
        tuning = Tuning.from_config(config)
        if not config.critic.model:
            raise ConfigError("a plan needs a network: set critic.model to a folder or to the id of a published critic")
        served = SimpleNamespace(
            model=config.critic.model,
            rubrics=config.critic.rubrics and (embedded_path(config.critic.rubrics) or config.critic.rubrics),
            batch_size=config.eval.batch_size,
            max_new_tokens=config.eval.max_new_tokens,
        )
        self.critic = AbstractCritic(served, settings.compute_dtype, mesh)
        self.graphdef, params = self.critic.decoder.graphdef, self.critic.params
        self.tuning = tuning.for_network(params)
        trained, self.frozen = self.tuning.split(params)
        if self.tuning.lora:
            tree = jax.eval_shape(partial(init_lora, config=self.tuning.lora), jax.random.key(0), params)
            trained = place(tree, lora_shardings(tree, Qwen3VL.sharding_rules, mesh))
        else:
            trained = _held_as(trained, settings.param_dtype)
        self.steps = settings.steps_per_epoch or 1
        self.optimizer = make_optimizer(settings, learning_rates(config), settings.epochs * self.steps)
        self.state = outputs(mesh, partial(init_state, self.optimizer, moment_dtype=settings.moment_dtype), trained)

    def resident(self) -> dict[str, object]:
        """What stays on the devices for the whole run: trees of shapes with their shardings, by what they are."""
        return {
            "frozen weights": self.frozen,
            "LoRA" if self.tuning.lora else "trained weights": self.state["params"],
            "optimizer": (self.state["optimizer"], self.state["step"]),
        }

    def programs(self) -> Iterator[Program]:
        """The step, then what an evaluation runs, beside a copy of the network in the dtype that it computes in."""
        settings, trained = self.config.train, self.state["params"]
        arrays, images, patches = self._batch()
        yield Program(
            "update",
            make_update(
                self.graphdef, self.tuning, self.optimizer, compute_dtype=settings.compute_dtype, remat=settings.remat,
                verdict_weight=settings.verdict_weight,
            ),
            (self.frozen, self.state, arrays),
            fed=arrays,
            flops=self._learning_flops(arrays["ids"].shape, images, patches),
            calls=self.steps,
            limit="train.examples_per_device",
        )  # fmt: skip
        yield Program(
            "held-out loss",
            make_evaluation(self.graphdef, self.tuning, settings.compute_dtype),
            (trained, self.frozen, arrays),
            fed=arrays,
            flops=self._flops(arrays["ids"].shape, images, patches),
            calls=0,
            limit="train.examples_per_device",
        )
        if self.config.eval.answers == 0 and not self.config.eval.bench:
            return  # no evaluation asks for an answer
        yield Program(
            "weights as served",
            make_whole(self.tuning),
            (trained, self.frozen),
            fed=(),
            flops=0,
            calls=0,
            keywords={"dtype": settings.compute_dtype},
        )
        for program in self._judging():
            fed = (program.fed, self.critic.params)
            yield dataclasses.replace(program, fed=fed, calls=0, limit="eval.batch_size")

    def _judging(self) -> Iterator[Program]:
        task, side = self.config.eval.bench_task, math.isqrt(self.config.data.max_pixels)
        criteria = [RUBRICS[name] for name in CRITERIA[task]]
        sources = [(side, side)] * (IMAGES[task] - 1)
        return self.critic.programs(self.config.eval.batch_size, (side, side), criteria, sources)

    def _batch(self) -> tuple[dict, int, int]:
        """A step's arrays as `sft_data.Batches` makes them, and of a micro-batch the images and their patches."""
        settings, mesh = self.config.train, self.mesh
        A, b = micro_batches(settings.batch_size, settings.examples_per_device, batch_size(mesh))
        T, count = max(settings.lengths), IMAGES[self.config.eval.bench_task]
        if settings.packing:
            count = settings.packed_images
        table, _ = image_table([self._example(row, count) for row in range(b)], multiple=b)
        arrays = dict.fromkeys(("ids", "segments", "image_index"), batch(mesh, (A, b, T), jnp.int32, axis=1))
        arrays["targets"] = batch(mesh, (A, b, T), jnp.int8, axis=1)
        arrays["positions"] = batch(mesh, (A, 3, b, T), jnp.int32, axis=2)
        arrays |= {name: batch(mesh, (A, *array.shape), array.dtype, axis=1) for name, array in table.items()}
        return arrays, *table["patches"].shape[:2]

    def _example(self, row: int, images: int):
        """A question with as many images of the largest size; what it says does not matter here."""
        side = math.isqrt(self.config.data.max_pixels)
        pictures = [self.critic.picture(f"{row} {place}", (side, side)) for place in range(images)]
        shown = [part for picture in pictures for part in ([0], picture, [0])]
        merge = self.critic.decoder.merge
        return lay_out([[0] * OPENING_TOKENS, *shown, [0] * CLOSING_TOKENS], 0, merge)

    def _flops(self, shape: tuple[int, int, int], images: int, patches: int) -> int:
        """Of a forward pass over a step's batch of A x b rows and as many micro-batches of images."""
        (A, b, T), config = shape, self.critic.config
        return A * (b * config.text.forward_flops(T, T, T) + images * config.vision.forward_flops(patches))

    def _learning_flops(self, shape: tuple[int, int, int], images: int, patches: int) -> int:
        """Of the step on it, as `sft_flops.step_flops` with full rows."""
        (A, b, T), config = shape, self.critic.config
        images *= image_flops(config, self.tuning, patches)
        return A * (b * text_flops(config, self.tuning, T) + images)


def _held_as(tree, dtype: str):
    """The tree's shapes in another dtype."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), tree)
