"""Fine-tuning a critic: one step from a batch of conversations to the next weights.

    python -m benchmarks.critic_sft --size small

The whole language model is trained and the vision tower is not, as in the published recipe. Ours is the job's step.
PyTorch's is transformers' loss of the same batch, the clip of the gradient's norm, and AdamW, over float32 weights
under autocast. Both begin with the same weights and an empty AdamW every time. At full size the network is the one of
2B: the weights, moments and gradients of both sides of the 8B would not fit one device.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.critic_side import Questions, torch_critic
from benchmarks.harness import OURS, PYTORCH, Case, Options, Variant, main
from benchmarks.sizes import SFT, Critic, parameters
from benchmarks.torch_side import absent, autocast, compiled, done, modes, tensor, variants
from firm_jax import models
from firm_jax.critic.processing import collate, image_table
from firm_jax.critic.sft import init_state, make_update
from firm_jax.critic.sft_data import on_mesh as batch_on_mesh
from firm_jax.critic.tuning import PARTS, Tuning, cast, make_optimizer
from firm_jax.interop.mapping import SAME_NAMES, tensors, to_torch
from firm_jax.mesh import batch_size, on_mesh, to_host
from firm_jax.sharding import path_name

TRAIN = SimpleNamespace(
    warmup_ratio=0.0, learning_rate=1e-5, max_grad_norm=1.0, b1=0.9, b2=0.999, weight_decay=0.0
)  # fmt: skip
STEPS = 1000  # of the schedule, whose first step is timed


def conversations(size: Critic, questions: Questions) -> list:
    """The questions with their last `tokens` tokens as the answer that is learned."""

    def marked(sequence):
        targets = np.zeros(len(sequence), np.int8)
        targets[-size.tokens :] = 1
        return replace(sequence, targets=targets)

    return [marked(sequence) for sequence in questions.sequences]


def ours(size: Critic, questions: Questions, dtype: str, options: Options) -> Variant:
    mesh, merge = options.mesh(len(questions.sequences)), questions.config.vision.spatial_merge_size
    model = models.from_pretrained(questions.folder, dtype="float32", mesh=mesh)
    rules = (*model.weight_rules(model.config), *SAME_NAMES)
    graphdef, params = nnx.split(model)
    tuning = Tuning(("language",))
    trained, frozen = tuning.split(params)
    frozen = cast(frozen, dtype)
    optimizer = make_optimizer(TRAIN, dict.fromkeys(PARTS, TRAIN.learning_rate), STEPS)
    with on_mesh(mesh):
        state = init_state(optimizer, trained)
    update = make_update(graphdef, tuning, optimizer, compute_dtype=dtype, remat=size.remat)
    made = conversations(size, questions)
    table, rows = image_table(made, multiple=batch_size(mesh))
    merged = table["patches"].shape[1] // merge**2
    batch = collate(made, rows, merged, batch=len(made), length=len(made[0]), side="right") | table
    batch = batch_on_mesh({name: array[None] for name, array in batch.items()}, mesh)
    copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))

    def prepare():  # the update takes the state's memory for its result
        with on_mesh(mesh):
            return jax.block_until_ready(copied(state))

    def run(state):
        with on_mesh(mesh):
            return jax.block_until_ready(update(frozen, state, batch))

    def outputs(result):
        state, metrics = to_host(result)
        moments = named(optax.tree.get(state["optimizer"], "mu"), rules)
        return {"loss": np.asarray(metrics["loss/total"]), "gradient": flat(moments)}

    return Variant(OURS, dtype, "jit", run, outputs, prepare)


def named(tree, rules) -> dict[str, np.ndarray]:
    """A tree of our parameters by PyTorch's names."""
    leaves = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    return {
        tensor.name: to_torch(
            leaves[tensor.path] if tensor.layer is None else leaves[tensor.path][tensor.layer], tensor.layout
        )
        for tensor in tensors(tree, rules)
    }


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays[name].astype(np.float32).reshape(-1) for name in sorted(arrays)])


class Theirs:
    """transformers' model with the language model's weights to be trained."""

    def __init__(self, size: Critic, questions: Questions):
        self.model = torch_critic(questions.folder, "float32").train()
        if size.remat == "full":
            self.model.gradient_checkpointing_enable()
        self.model.model.visual.requires_grad_(False)
        made = conversations(size, questions)
        labels = np.stack([np.where(one.targets > 0, one.ids, -100) for one in made])
        self.inputs = questions.inputs(len(made), "float32") | {"labels": tensor(labels)}
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.begun = [parameter.detach().clone() for parameter in self.trained.values()]

    def prepare(self):
        import torch

        with torch.no_grad():
            for parameter, begun in zip(self.trained.values(), self.begun, strict=True):
                parameter.copy_(begun)
                parameter.grad = None
        adamw = torch.optim.AdamW(
            self.trained.values(), lr=TRAIN.learning_rate, betas=(TRAIN.b1, TRAIN.b2), weight_decay=TRAIN.weight_decay
        )
        done()
        return adamw

    def variant(self, mode: str, how: str, dtype: str) -> Variant:
        import torch

        network = compiled(self.model, mode)

        def run(adamw):
            with autocast(dtype):
                loss = network(**self.inputs, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained.values(), TRAIN.max_grad_norm)
            adamw.step()
            done()
            return adamw, loss.detach()

        def outputs(result):
            adamw, loss = result
            moments = {name: adamw.state[p]["exp_avg"].cpu().numpy() for name, p in self.trained.items()}
            return {"loss": np.float32(loss.item()), "gradient": flat(moments)}

        return Variant(PYTORCH, dtype, how, run, outputs, self.prepare)


def cases(options: Options, folder: Path, size: Critic | None = None) -> Iterator[Case]:
    size = size or SFT[options.size]
    (count,) = size.batches
    questions = Questions(size, folder, count)
    made, skipped = [ours(size, questions, dtype, options) for dtype in options.dtypes], {}
    if why := absent("transformers"):
        skipped["PyTorch"] = why
    else:
        skipped = modes(options)[1]
        theirs = Theirs(size, questions)
        made += [theirs.variant(*given) for given in variants(options)]
    length, config = len(questions.sequences[0]), questions.config
    patches = len(questions.sequences[0].images[0].patches)
    flops = count * (3 * config.text.forward_flops(length, 0, length) + config.vision.forward_flops(patches))
    described = size.described() | {
        "parameters": parameters(models.read_config(questions.folder)),
        "tokens_a_row": length,
        "patches": patches,
    }
    name = f"critic, fine-tuning step from {count} conversations of {length} tokens"
    yield Case(name, made, count * length, "tokens", flops, described, skipped)


if __name__ == "__main__":
    main("critic_sft", __doc__, cases)
