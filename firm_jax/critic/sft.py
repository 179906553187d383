"""Supervised fine-tuning of a critic: cross-entropy on the assistant's turn, measured by the scores it then gives.

Which examples make up step `i` follows from the seed and `i`, so a resumed run sees what an uninterrupted one would
have seen, and the step is all the data state there is.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from firm_jax import models
from firm_jax.critic.decode import shard_positions
from firm_jax.critic.parse import Parsed, parse_alignment, parse_quality
from firm_jax.critic.processing import Processor, Sequence, collate, image_table
from firm_jax.critic.rubric import Rubric, rubrics_from
from firm_jax.critic.score import Critic, end_tokens, served_rubrics
from firm_jax.data.conversations import Conversation, Conversations, load_conversations
from firm_jax.data.records import MalformedRecord
from firm_jax.errors import ConfigError, DataError, NonFiniteError
from firm_jax.interop.hub import identity, resolve
from firm_jax.mesh import batch_size, make_mesh, shard_batch
from firm_jax.run import Run
from firm_jax.shapes import edit_teach, teach
from firm_jax.shapes.conversations import ShapesConversations, ShapesEditConversations
from firm_jax.shapes.critic_folder import write_critic_folder
from firm_jax.sharding import path_name

# `data.source` -> the shapes world's examples of that kind, and the rubrics that they answer.
SHAPES = {
    "shapes": (ShapesConversations, teach.RUBRICS),
    "shapes_edits": (ShapesEditConversations, edit_teach.RUBRICS),
}
# What a trained critic's folder takes over from the one it was made from.
COMPANIONS = ("tokenizer*.json", "vocab.json", "merges.txt", "*preprocessor_config.json", "processor_config.json")
COMPANIONS += ("generation_config.json", "chat_template.*", "special_tokens_map.json", "added_tokens.json")

# On a requirement, at the end of its line; on one of the differences between two pictures, at the end of its clause.
VERDICT = re.compile(r"\b(yes|no|fine|significant|minor)(?=$|;)", re.MULTILINE)
WINDOW = 16  # batches that are sorted by length together


def read_scores(answer: str) -> Parsed:
    """The scores in an answer of any rubric: three in JSON, or one, boxed or in JSON."""
    three = parse_quality(answer)
    return three if three.scores else parse_alignment(answer)


def sft_loss(graphdef, params, batch, *, verdict_weight: float = 1.0, remat: str = "none"):
    """Mean cross-entropy over the tokens of the assistant's turns, verdicts counting `verdict_weight` times.

    batch: what `collate` returns, with the image table's `patches` and `grids`. Returns the scalar and
    {"loss/total", "loss/score"}: the latter over the tokens that hold a score, NaN in a batch without any.
    """
    model = nnx.merge(graphdef, params)
    deepstack = None
    if "patches" in batch:
        vision = model.encode_images(batch["patches"], batch["grids"], remat=remat)
        embeddings, deepstack = model.splice(batch["ids"], *vision, batch["image_index"])
    else:
        embeddings = model.language_model.embed_tokens(batch["ids"])
    hidden, _ = model(embeddings, batch["positions"], batch["segments"], deepstack=deepstack, remat=remat)
    logits = model.logits(hidden[:, :-1])
    labels, targets = batch["ids"][:, 1:], batch["targets"][:, 1:]
    # A masked sum in the place of a gather: it stays local where the vocabulary is split over devices.
    chosen = jnp.arange(logits.shape[-1]) == labels[..., None]
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.where(chosen, logits, 0).sum(-1)
    weights = jnp.where(targets == 3, verdict_weight, (targets > 0).astype(losses.dtype))
    total = (weights * losses).sum() / weights.sum()
    score = jnp.where(targets == 2, losses, 0).sum() / (targets == 2).sum()
    return total, {"loss/total": total, "loss/score": score}


def make_optimizer(train) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping, on a cosine with linear warm-up, from the keys of `config.train`.

    Weight decay spares norms and biases.
    """
    steps = train.epochs * train.steps_per_epoch
    warmup = int(train.warmup_ratio * steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, warmup, max(steps, 1))

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path_name(path).endswith((".kernel", ".embedding")), params
        )

    return optax.chain(
        optax.clip_by_global_norm(train.max_grad_norm),
        optax.adamw(schedule, b1=train.b1, b2=train.b2, weight_decay=train.weight_decay, mask=decayed),
    )


def init_state(optimizer, params) -> dict:
    """Parameters, the optimizer's state split as they are, and the number of steps done."""
    return jax.jit(lambda params: {"params": params, "optimizer": optimizer.init(params), "step": jnp.int32(0)})(params)


def make_update(graphdef, optimizer, *, compute_dtype, verdict_weight: float = 1.0, remat: str):
    """The jitted step `(state, batch) -> (state, metrics)`; a step that is not finite leaves the state as it was."""

    def loss(params, batch):
        params = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)
        return sft_loss(graphdef, params, batch, verdict_weight=verdict_weight, remat=remat)

    @partial(jax.jit, donate_argnames="state")
    def update(state, batch):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state["params"], batch)
        norm = optax.global_norm(grads)
        changes, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
        new = {
            "params": optax.apply_updates(state["params"], changes),
            "optimizer": optimizer_state,
            "step": state["step"] + 1,
        }
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        state = jax.tree.map(lambda before, after: jnp.where(finite, after, before), state, new)
        return state, metrics | {"grad/norm": norm}

    return update


@dataclass(frozen=True)
class Batches:
    """Examples as training batches: `batch_size` of about one length, padded to the next of `lengths`."""

    examples: ShapesConversations | Conversations
    processor: Processor
    batch_size: int
    lengths: tuple[int, ...]
    multiple: int
    seed: int

    def __post_init__(self):
        if len(self.examples) < self.batch_size:
            raise DataError(f"{len(self.examples)} examples do not fill one batch of {self.batch_size}")

    def __len__(self) -> int:
        return len(self.examples) // self.batch_size

    def at(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of one training step; every pass over the examples has an order of its own.

        WINDOW batches are drawn together and sorted by the length of their texts, then taken in random order.
        """
        epoch, place = divmod(step, len(self))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        window, place = divmod(place, WINDOW)
        drawn = order[: len(self) * self.batch_size].reshape(len(self), -1)[window * WINDOW :][:WINDOW].reshape(-1)
        drawn = drawn[np.argsort([self.examples.text_length(int(index)) for index in drawn], kind="stable")]
        batches = drawn.reshape(-1, self.batch_size)
        turn = np.random.default_rng([self.seed, epoch, window]).permutation(len(batches))[place]
        return self.take(batches[turn])

    def take(self, indices) -> dict[str, np.ndarray]:
        """The arrays of some examples; DataError for one that is longer than the last of `lengths`."""
        sequences = [self._encode(int(index)) for index in indices]
        table, rows = image_table(sequences, multiple=self.multiple)
        merged = table["patches"].shape[1] // self.processor.images.merge_size**2
        longest = max(map(len, sequences))
        length = next(length for length in sorted(self.lengths) if length >= longest)
        batch = collate(sequences, rows, merged, batch=len(sequences), length=length, side="right")
        return batch | table if rows else batch

    def _encode(self, index: int) -> Sequence:
        example = self.examples[index]
        spans, verdicts = read_scores(example.answer).spans or (), [m.span(1) for m in VERDICT.finditer(example.answer)]
        sequence = self.processor.sequence(
            example.images, example.prompt, example.answer, scores=spans, verdicts=verdicts
        )
        if len(sequence) > max(self.lengths):
            raise DataError(
                f"example {index} has {len(sequence)} tokens, more than the last of train.lengths = {self.lengths}; "
                f"add a greater length, shrink the images, or leave the example out"
            )
        return sequence


def on_mesh(batch: dict[str, np.ndarray], mesh) -> dict[str, jax.Array]:
    """A host batch on the mesh, split over its batch axes."""
    split = shard_batch({name: array for name, array in batch.items() if name != "positions"}, mesh)
    return split | {"positions": shard_positions(batch["positions"], mesh)}


def score_errors(critic: Critic, examples: list[Conversation], max_new_tokens: int, progress=iter) -> dict:
    """How far the critic's scores are from the answers' on held-out examples, by generation.

    Returns mean absolute error over all scores and per criterion (answers that cannot be read left out), the same of
    the best constant answer, and the share of unreadable answers.
    """
    requests = [{"images": example.images, "text": example.prompt} for example in examples]
    texts = critic.generate(requests, max_new_tokens, progress)
    right = [read_scores(example.answer).scores for example in examples]
    given = [read_scores(text).scores for text in texts]
    names = [example.criterion for example in examples]
    usable = [r is not None and g is not None and len(r) == len(g) for r, g in zip(right, given, strict=True)]
    metrics = {"eval/parse_failure_rate": 1 - float(np.mean(usable))}
    for name in sorted({"", *names}):
        rows = [i for i in range(len(examples)) if usable[i] and name in ("", names[i])]
        suffix = f"_{name}" if name else ""
        metrics[f"eval/mae{suffix}"] = _mean(
            [abs(a - b) for i in rows for a, b in zip(right[i], given[i], strict=True)]
        )
        lengths = {len(right[i]) for i in rows}
        if len(lengths) == 1:  # one kind of answer: then the best constant is the median of each score
            table = np.array([right[i] for i in rows])
            metrics[f"eval/mae_constant{suffix}"] = float(np.abs(table - np.median(table, axis=0)).mean())
    return metrics


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def train(config, workdir: str) -> None:
    """Train a critic; leaves a transformers folder in `workdir/model`.

    Raises ConfigError, WeightsError or DataError before anything is trained, NonFiniteError when a step is.
    """
    mesh = make_mesh(**config.mesh)
    with Run(config, workdir) as run, jax.set_mesh(mesh):
        rubrics = rubrics_of(config)
        examples, held_out = sources(config, rubrics)
        folder = base_folder(config, run, examples)
        processor = Processor(folder)
        rubrics = rubrics or served_rubrics(folder)
        run.base_weights = {"critic": identity(folder)}
        graphdef, params = nnx.split(models.from_pretrained(folder, dtype="float32", mesh=mesh))
        settings = config.train
        if settings.batch_size % batch_size(mesh):
            raise ConfigError(f"train.batch_size={settings.batch_size} cannot be split over {batch_size(mesh)} devices")
        batches, checks = (
            Batches(source, processor, settings.batch_size, settings.lengths, batch_size(mesh), config.seed)
            for source in (examples, held_out)
        )
        optimizer = make_optimizer(settings)
        compute_dtype = jnp.dtype(settings.compute_dtype)
        update = make_update(
            graphdef, optimizer, compute_dtype=compute_dtype, verdict_weight=settings.verdict_weight,
            remat=settings.remat,
        )  # fmt: skip
        held_out_loss = jax.jit(partial(sft_loss, graphdef))

        def evaluate(params) -> dict:
            params = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)
            losses = [held_out_loss(params, on_mesh(checks.at(number), mesh))[1] for number in range(len(checks))]
            critic = Critic(
                nnx.merge(graphdef, params),
                processor,
                ends=end_tokens(folder, processor),
                rubrics=rubrics,
                mesh=mesh,
                max_batch=config.eval.batch_size,
            )
            judged = [held_out[index] for index in range(len(held_out))]
            bar = partial(run.progress, description="held out")
            return {
                "eval/loss": _mean([float(loss["loss/total"]) for loss in losses]),
                "eval/score_loss": _mean([float(loss["loss/score"]) for loss in losses]),
                **score_errors(critic, judged, config.eval.max_new_tokens, bar),
            }

        state = init_state(optimizer, params)
        done = 0
        if restored := run.restore(state):
            state, done = restored.state, restored.epoch
        for epoch in run.loop(done, settings.epochs):
            first = epoch * settings.steps_per_epoch
            with run.timer("update"):
                history = []
                for step in run.progress(range(first, first + settings.steps_per_epoch), f"epoch {epoch + 1}"):
                    state, metrics = update(state, on_mesh(batches.at(step), mesh))
                    history.append(metrics)
                metrics = _averages(jax.device_get(history), first)
            if (epoch + 1) % config.eval.every == 0 or epoch + 1 == settings.epochs:
                with run.timer("eval"):
                    metrics |= evaluate(state["params"])
            run.log(first + settings.steps_per_epoch, epoch + 1, metrics)
            run.safe_point(state, step=first + settings.steps_per_epoch, epoch=epoch + 1)
        if run.is_main:
            _write(run.workdir / "model", folder, nnx.merge(graphdef, state["params"]), rubrics, settings.stored_dtype)


def _averages(history: list[dict], first: int) -> dict[str, float]:
    """The means of an epoch's metrics; NonFiniteError for a loss or gradient that is not finite."""
    for number, metrics in enumerate(history):
        if not np.isfinite([metrics["loss/total"], metrics["grad/norm"]]).all():
            raise NonFiniteError(
                f"step {first + number}: loss {metrics['loss/total']}, gradient norm {metrics['grad/norm']}. The step "
                f"was not applied; lower train.learning_rate and start again from the last checkpoint."
            )
    return {name: float(np.nanmean([metrics[name] for metrics in history])) for name in history[0]}


def rubrics_of(config) -> dict[str, Rubric] | None:
    """The rubrics that the config names or its data were made with; None leaves the choice to the base folder."""
    if config.critic.rubrics:
        return rubrics_from(config.critic.rubrics)
    return rubrics_from(SHAPES[config.data.source][1]) if config.data.source in SHAPES else None


def sources(config, rubrics: dict[str, Rubric] | None):
    """Examples to train on and held-out ones, by `config.data`."""
    data = config.data
    if data.source in SHAPES:
        conversations, _ = SHAPES[data.source]
        options = {"rubrics": rubrics, "seed": config.seed, "samples": data.samples, "share": data.samples_share}
        return (
            conversations(data.examples, stream=0, **options),
            conversations(config.eval.examples, stream=1, **options),
        )
    if not data.held_out:
        raise ConfigError("data.held_out is not set: give a conversation file of examples that are not trained on")
    options = {}
    if config.critic.model:  # a miniature is made from the examples, and cannot tell beforehand
        options["check"] = length_check(Processor(resolve(config.critic.model)), max(config.train.lengths))
    return load_conversations(data.source, **options), load_conversations(data.held_out, **options)


def length_check(processor: Processor, longest: int) -> Callable[[Conversation], None]:
    """A check for `load_conversations`: MalformedRecord for a conversation of more than `longest` tokens.

    It is left out then, and never cut: a cut would fall into an image or take the answer's score.
    """

    def check(conversation: Conversation) -> None:
        sizes = [(image.height, image.width) for image in conversation.images]
        tokens = processor.length(sizes, conversation.prompt, conversation.answer)
        if tokens > longest:
            raise MalformedRecord(f"has {tokens} tokens, more than the {longest} that are trained on")

    return check


def base_folder(config, run: Run, examples) -> Path:
    """The folder that training starts from: `critic.model`, or a new miniature when that is None."""
    if config.critic.model:
        return resolve(config.critic.model)
    folder = run.workdir / "untrained"
    if run.is_main:
        shown = range(min(config.miniature.texts, len(examples)))
        texts = [text for i in shown for text in (examples[i].prompt, examples[i].answer)]
        miniature = config.miniature.to_dict()
        base = miniature.pop("base")
        write_critic_folder(folder, texts, miniature, seed=config.seed, base=resolve(base) if base else None)
    return folder


def _write(folder: Path, base: Path, model, rubrics: dict[str, Rubric], dtype: str) -> None:
    """The trained critic: weights, everything else that its base folder has, and the rubrics it was trained with."""
    models.save_pretrained(model, folder, dtype=dtype)
    for pattern in COMPANIONS:
        for file in Path(base).glob(pattern):
            shutil.copy(file, folder / file.name)
    (folder / "rubrics").mkdir(exist_ok=True)
    for rubric in rubrics.values():
        (folder / "rubrics" / f"{rubric.name}.txt").write_text(rubric.text + "\n")
