"""Everything that the RL job compiles, at the shapes that it meets, over shapes in the place of arrays.

The functions are the job's own; only what they are given is made here.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from firm_jax.abstract import batch, outputs, place, whole
from firm_jax.critic.programs import AbstractCritic
from firm_jax.critic.rubric import RUBRICS
from firm_jax.generation import Generator
from firm_jax.generation.generator import decoded_together, pipeline_class, read_model_index
from firm_jax.generation.programs import SOURCE_SIDE, encoding, text_parameters
from firm_jax.interop.hub import find_local
from firm_jax.mesh import batch_size
from firm_jax.models.lora import LoraConfig, init_lora, lora_shardings, scaled
from firm_jax.plan import Program
from firm_jax.published import PIPELINES, published
from firm_jax.rl.checks import check_config, check_editing
from firm_jax.rl.judging import is_remote
from firm_jax.rl.rewards import resolve_reward
from firm_jax.rl.rollout import drawing_flops, drawn_together, make_draw, shown_size
from firm_jax.rl.update import init_state, learning_flops, make_optimizer, make_update, micro_batches


class RLPrograms:
    """The RL job of a config on a mesh: what it keeps on the devices, and its programs.

    No weights are read: the models' folders, where they are at hand, give their configs, else `published` does. Raises
    ConfigError and WeightsError as the job would, and for a model whose config is not to be had.
    """

    def __init__(self, config, mesh: Mesh):
        check_config(config)
        self.config, self.mesh, self.devices = config, mesh, batch_size(mesh)
        self.generator = abstract_generator(config.model, config.dtype, mesh, config.quantize)
        check_editing(config, resolve_reward(config.reward.name, config.reward.weights), self.generator.edits)
        for section in (config.rollout, config.eval):
            self.generator.latent_shape(section.height, section.width)
        self.critic = None if is_remote(config.critic) else AbstractCritic(config.critic, config.dtype, mesh)
        self.images = config.group.prompts_per_epoch * config.group.images_per_prompt
        lora = LoraConfig(config.lora.rank, config.lora.alpha, tuple(config.lora.targets))
        self.optimizer, self.scale = make_optimizer(config.train), lora.scale
        tree = jax.eval_shape(partial(init_lora, config=lora), jax.random.key(0), self.generator.params)
        tree = place(tree, lora_shardings(tree, self.generator.sharding_rules, mesh))
        self.state = outputs(mesh, partial(init_state, optimizer=self.optimizer), tree)
        self.policy = outputs(mesh, partial(scaled, scale=self.scale), self.state["lora"])
        self.key = whole(jax.eval_shape(lambda: jax.random.key(0)), mesh)
        self.encoding = {
            "rollout": encoding(self.generator, mesh, config.group.prompts_per_epoch, config.rollout),
            "eval": encoding(self.generator, mesh, config.eval.prompts, config.eval),
        }

    def resident(self) -> dict[str, object]:
        """What stays on the devices for the whole run: trees of shapes with their shardings, by what they are."""
        return {
            "generator": self.generator.params,
            "text encoders": text_parameters(self.generator),
            "autoencoder": self.generator.vae_params,
            **({"critic": self.critic.params} if self.critic else {"critic (on a server)": ()}),
            "LoRA, averages, optimizer": self.state,
            "encoded prompts": [(made.conditioning, made.negative) for made in self.encoding.values()],
        }

    def programs(self) -> Iterator[Program]:
        """In the order in which an epoch runs them; evaluation, which most epochs do without, comes last."""
        config = self.config
        yield from self.encoding["rollout"].programs
        drawn = {"rollout": self.images, "eval": config.eval.prompts * config.eval.images_per_prompt}
        draws, decodes = ({name: make(name, drawn[name]) for name in drawn} for make in (self._draw, self._decode))
        yield draws["rollout"]
        yield decodes["rollout"]
        if self.critic:
            yield from self._judging()
        yield self._update()
        yield draws["eval"]
        if decodes["eval"].arguments != decodes["rollout"].arguments:
            yield decodes["eval"]

    def _judging(self) -> Iterator[Program]:
        config, rollout = self.config, self.config.rollout
        criteria = [RUBRICS[name] for name in resolve_reward(config.reward.name, config.reward.weights).criteria]
        # Edits have one source each, square as where the generator's own programs are planned.
        sources = [shown_size(SOURCE_SIDE, SOURCE_SIDE, rollout)] if self.generator.edits else ()
        size, candidates = (rollout.height, rollout.width), config.group.images_per_prompt
        return self.critic.programs(self.images, size, criteria, sources, candidates)

    def _draw(self, section: str, images: int) -> Program:
        generator, settings, encoded = self.generator, self.config[section], self.encoding[section]
        size = drawn_together(images, settings.batch_size, self.devices)
        rows = (batch(self.mesh, (size,), jnp.int32), batch(self.mesh, (size,), jnp.uint32))
        return Program(
            section,
            make_draw(generator, settings),
            (generator.params, self.policy, encoded.conditioning, encoded.negative, *rows, self.key),
            fed=(self.policy, rows, self.key),
            flops=size * drawing_flops(generator, settings, encoded.conditioning),
            calls=-(-images // size) if section == "rollout" else 0,
            limit=f"{section}.batch_size",
        )

    def _decode(self, section: str, images: int) -> Program:
        generator, settings = self.generator, self.config[section]
        size = settings.height, settings.width
        drawn = drawn_together(images, settings.batch_size, self.devices)
        decoded = decoded_together(drawn, size, self.devices)
        latents = batch(self.mesh, (decoded, *generator.latent_shape(*size)), jnp.float32)
        return Program(
            "VAE decode" if section == "rollout" else f"{section}: VAE decode",
            generator.decode_jitted,
            (generator.vae_params, latents),
            fed=(latents, self.policy, self.key),  # the policy is there for the images to come
            flops=decoded * generator.decode_flops(*size),
            calls=-(-images // drawn) * -(-drawn // decoded) if section == "rollout" else 0,
        )

    def _update(self) -> Program:
        generator, settings, rollout = self.generator, self.config.train, self.config.rollout
        A, b = micro_batches(self.images, settings, self.mesh)

        def by_sample(dtype, *shape):
            return batch(self.mesh, (A, b, *shape), dtype, axis=1)

        samples = {
            "x0": by_sample(jnp.float32, *generator.latent_shape(rollout.height, rollout.width)),
            "r": by_sample(jnp.float32),
            "valid": by_sample(jnp.bool_),
            "prompt": by_sample(jnp.int32),
            "sample": by_sample(jnp.uint32),
            "t": batch(self.mesh, (A, settings.timesteps, b), jnp.float32, axis=2),
        }
        conditioning, size = self.encoding["rollout"].conditioning, (rollout.height, rollout.width)
        velocity = partial(generator.velocity, remat=settings.remat)
        return Program(
            "NFT update",
            make_update(velocity, self.optimizer, settings, self.scale),
            (generator.params, self.state, conditioning, samples, self.key),
            fed=(samples, self.key),
            flops=A * b * learning_flops(generator, settings, size, conditioning),
            calls=settings.updates_per_epoch,
            limit="train.micro_batch",
        )


def abstract_generator(name: str, dtype: str, mesh: Mesh, quantize: str | None = None) -> Generator:
    """The generator of a folder, or of a published pipeline's configs, with shapes in the place of weights."""
    if folder := find_local(name):
        kind = pipeline_class(read_model_index(folder))
        return kind.from_configs(kind.read_configs(folder), dtype, mesh, quantize)
    configs = published(PIPELINES, name, "model")
    return pipeline_class(configs["model_index"]).from_configs(configs, dtype, mesh, quantize)
