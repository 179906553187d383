"""Training a critic against PyTorch: loss and gradients through the production loader, and the optimizer's steps."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import jax  # noqa: E402
import optax  # noqa: E402
from critic_miniature import picture, write_miniature  # noqa: E402
from flax import nnx  # noqa: E402
from transformers import Qwen3VLForConditionalGeneration, Trainer, get_cosine_schedule_with_warmup  # noqa: E402

from firm_jax import models  # noqa: E402
from firm_jax.critic.packing import PackedBatches, measure  # noqa: E402
from firm_jax.critic.processing import Processor, collate, image_table  # noqa: E402
from firm_jax.critic.sft import sft_loss  # noqa: E402
from firm_jax.critic.sft_data import on_mesh, read_scores  # noqa: E402
from firm_jax.critic.tuning import PARTS, make_optimizer  # noqa: E402
from firm_jax.data.conversations import Conversation  # noqa: E402
from firm_jax.interop.mapping import SAME_NAMES, tensors, to_torch  # noqa: E402
from firm_jax.sharding import path_name  # noqa: E402

# Two images each, all of unequal size; the third shows an image of the first again.
EXAMPLES = (
    Conversation((picture(0, 37, 22), picture(1, 24, 40)), "which is red", '{"reasoning": "the first", "score": [4]}'),
    Conversation((picture(2, 50, 17), picture(3, 30, 30)), "a red circle", "**Final Alignment Rating: 2**\n\\boxed{2}"),
    Conversation((picture(4, 21, 45), picture(0, 37, 22)), "two blue squares on white", "\\boxed{5}"),
)
ROWS = [[0, 2], [1]]  # how they are packed


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    """transformers' model with random weights, ours read from its folder, and the examples in every form."""
    folder = write_miniature(tmp_path_factory.mktemp("critic"))
    reference = Qwen3VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(float(is_scale) + 0.2 * torch.randn(parameter.shape))
    reference.save_pretrained(folder)
    processor = Processor(folder)
    sequences = [processor.sequence(e.images, e.prompt, e.answer, scores=read_scores(e.answer).spans) for e in EXAMPLES]
    table, rows = image_table(sequences)
    merged, longest = table["patches"].shape[1] // 4, max(map(len, sequences))
    sizes = measure(EXAMPLES, processor)
    length = max(int(sizes.tokens[row].sum()) for row in ROWS) + 3
    packed = PackedBatches(sequences.__getitem__, sizes, 2, length, 4, 2, 1, 0).take(ROWS)
    model = models.from_pretrained(folder, dtype="float32")
    graphdef, params = nnx.split(model)
    return SimpleNamespace(
        reference=reference.train(),
        sequences=sequences,
        unpacked=collate(sequences, rows, merged, batch=3, length=longest + 5, side="right") | table,
        packed=packed,
        params=params,
        rules=(*model.weight_rules(model.config), *SAME_NAMES),
        step=jax.jit(
            lambda params, batch, remat="none": jax.value_and_grad(
                lambda params: sft_loss(graphdef, params, batch, remat=remat), has_aux=True
            )(params),
            static_argnames="remat",
        ),
    )


@pytest.fixture(scope="module")
def expected(critic):
    """Loss and gradients of transformers' model: each example by itself, weighted by its tokens."""
    losses, scores = token_losses(critic)
    critic.reference.zero_grad()
    loss = torch.cat(losses).mean()
    loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in critic.reference.named_parameters()}
    return SimpleNamespace(loss=loss.item(), score=torch.cat(scores).mean().item(), gradients=gradients)


@pytest.mark.parametrize(("form", "remat"), [("unpacked", "none"), ("unpacked", "full"), ("packed", "none")])
def test_loss_and_gradients(critic, expected, form, remat):
    batch = getattr(critic, form)
    assert batch["segments"].max() == (2 if form == "packed" else 1)
    (found, metrics), gradients = critic.step(critic.params, on_mesh(batch, None), remat)
    assert float(found) == pytest.approx(expected.loss, rel=1e-5)
    assert float(metrics["loss/score"]) == pytest.approx(expected.score, rel=1e-4)
    seen = set()
    for name, gradient in in_torch(gradients, critic.rules):
        theirs = expected.gradients[name]
        assert np.linalg.norm(gradient - theirs) <= 1e-4 * np.linalg.norm(theirs) + 1e-7, name
        seen.add(name)
    assert seen == set(expected.gradients)


@pytest.mark.parametrize("form", ["unpacked", "packed"])
def test_transformers_own_batches_have_the_same_loss(critic, expected, form):
    """Its loss of padded rows; and of packed ones, which it tells from text positions that begin again."""
    batch = getattr(critic, form)
    order = [0, 1, 2] if form == "unpacked" else [number for row in ROWS for number in row]
    given = inputs([critic.sequences[number] for number in order])
    given["input_ids"] = torch.tensor(batch["ids"]).long()
    if form == "unpacked":
        given["attention_mask"] = torch.tensor(batch["segments"])
        given["mm_token_type_ids"] = torch.tensor(batch["image_index"] >= 0).int()
    else:
        given["position_ids"] = torch.zeros((4, *batch["ids"].shape), dtype=torch.long)
        for row, numbers in enumerate(ROWS):
            start = 0
            for number in numbers:
                place = slice(start, start + len(critic.sequences[number]))
                given["position_ids"][:, row, place] = positions(critic, number)
                start = place.stop
        del given["mm_token_type_ids"]
    labels = torch.tensor(np.where(batch["targets"] > 0, batch["ids"], -100)).long()
    with torch.no_grad():
        loss = critic.reference(**given, labels=labels, use_cache=False).loss
    assert loss.item() == pytest.approx(expected.loss, rel=1e-5)


def test_the_optimizer_takes_pytorchs_steps(critic):
    """AdamW behind clipping on HF Trainer's schedule and weight-decay groups, six steps: three of the warm-up.

    Both sides get our gradients: an element that is zero but for rounding would send Adam either way. Two differences
    from HF Trainer remain: PyTorch's clipping divides by the norm + 1e-6; its Adam has b2 = 0.999 unless told
    otherwise, ours what the config says.
    """
    train = SimpleNamespace(
        warmup_ratio=0.3, learning_rate=1e-2, max_grad_norm=0.5, b1=0.9, b2=0.98, weight_decay=0.3
    )  # fmt: skip
    model = copy.deepcopy(critic.reference)
    theirs = dict(model.named_parameters())
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    assert 0 < len(decayed) < len(theirs)
    groups = [
        {"params": [p for name, p in theirs.items() if name in decayed], "weight_decay": train.weight_decay},
        {"params": [p for name, p in theirs.items() if name not in decayed], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=train.learning_rate, betas=(train.b1, train.b2), eps=1e-8)
    schedule = get_cosine_schedule_with_warmup(adam, num_warmup_steps=3, num_training_steps=10)

    optimizer = make_optimizer(train, dict.fromkeys(PARTS, train.learning_rate), 10)
    update = jax.jit(optimizer.update)
    params, state = critic.params, optimizer.init(critic.params)
    rates = []
    for number in range(6):
        batch = critic.packed if number % 2 else critic.unpacked | {"targets": drop_row(critic.unpacked["targets"])}
        _, gradients = critic.step(params, on_mesh(batch, None), "none")
        before = {name: parameter.detach().clone() for name, parameter in theirs.items()}
        for name, gradient in in_torch(gradients, critic.rules):
            theirs[name].grad = torch.tensor(gradient)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        assert norm > 2 * train.max_grad_norm
        rates.append(schedule.get_last_lr()[0])
        adam.step()
        schedule.step()
        changes, state = update(gradients, state, params)
        params = optax.apply_updates(params, changes)
        for name, ours in in_torch(params, critic.rules):
            moved = (theirs[name].detach() - before[name]).norm().item()
            assert np.linalg.norm(ours - theirs[name].detach().numpy()) <= 1e-4 * moved, (number, name)
            assert moved > 0 or number == 0
    assert rates[0] == 0 and rates[1] < rates[2] < rates[3] == train.learning_rate > rates[4] > rates[5]


def inputs(sequences) -> dict:
    """Sequences of no padding as transformers takes them, their images one behind the other."""
    images = [image for sequence in sequences for image in sequence.images]
    return {
        "input_ids": torch.tensor(np.concatenate([sequence.ids for sequence in sequences])[None]).long(),
        "pixel_values": torch.tensor(np.concatenate([image.patches for image in images])),
        "image_grid_thw": torch.tensor([[1, *image.grid] for image in images]),
        "mm_token_type_ids": torch.tensor(np.concatenate([s.image >= 0 for s in sequences])[None]).int(),
    }


def token_losses(critic):
    """The losses of the answers' tokens, and of their scores' alone, a tensor for each example run by itself."""
    losses, scores = [], []
    for sequence in critic.sequences:
        logits = critic.reference(**inputs([sequence]), use_cache=False).logits[0, :-1].float()
        targets = torch.tensor(sequence.targets[1:])
        chosen = torch.nn.functional.cross_entropy(logits, torch.tensor(sequence.ids[1:]).long(), reduction="none")
        losses.append(chosen[targets > 0])
        scores.append(chosen[targets == 2].detach())
    return losses, scores


def positions(critic, number: int):
    """transformers' positions of one example: 0, 1, 2, ... of the text, then the three axes; int64 [4, T]."""
    given = inputs([critic.sequences[number]])
    del given["pixel_values"]
    axes, _ = critic.reference.model.get_rope_index(**given)
    return torch.cat([torch.arange(axes.shape[-1])[None], axes[:, 0]])


def in_torch(tree, rules):
    """The name and the array of each of PyTorch's tensors in a tree of our parameters."""
    leaves = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    for tensor in tensors(tree, rules):
        leaf = leaves[tensor.path] if tensor.layer is None else leaves[tensor.path][tensor.layer]
        yield tensor.name, to_torch(leaf, tensor.layout)


def drop_row(targets: np.ndarray) -> np.ndarray:
    """Targets of all rows but the first, so that this batch has gradients of its own."""
    return np.concatenate([np.zeros_like(targets[:1]), targets[1:]])
