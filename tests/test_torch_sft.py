"""One training step of the critic against PyTorch: loss and every gradient, through the production loader."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from critic_miniature import picture, write_miniature  # noqa: E402
from flax import nnx  # noqa: E402
from transformers import Qwen3VLForConditionalGeneration  # noqa: E402

from firm_jax import models  # noqa: E402
from firm_jax.critic.decode import shard_positions  # noqa: E402
from firm_jax.critic.processing import Processor, collate, image_table  # noqa: E402
from firm_jax.critic.sft import read_scores, sft_loss  # noqa: E402
from firm_jax.interop.mapping import SAME_NAMES, tensors, to_torch  # noqa: E402
from firm_jax.sharding import path_name  # noqa: E402

EXAMPLES = (
    ([picture(0, 37, 22), picture(1, 24, 40)], "which is red", '{"reasoning": "the first", "score": [4]}'),
    ([picture(2, 50, 17)], "a red circle", "**Final Alignment Rating: 2**\n\\boxed{2}"),
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = write_miniature(tmp_path_factory.mktemp("critic"))
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(float(is_scale) + 0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.train(), folder


@pytest.mark.parametrize("remat", ["none", "full"])
def test_loss_and_gradients(reference, remat):
    model, folder = reference
    processor = Processor(folder)
    sequences = [
        processor.sequence(images, text, answer, scores=read_scores(answer).spans) for images, text, answer in EXAMPLES
    ]
    table, rows = image_table(sequences)
    merged = table["patches"].shape[1] // 4
    batch = collate(sequences, rows, merged, batch=2, length=max(map(len, sequences)) + 5, side="right")

    labels = torch.tensor(np.where(batch["targets"] > 0, batch["ids"], -100)).long()
    images = [image for sequence in sequences for image in sequence.images]
    model.zero_grad()
    loss = model(**_inputs(batch, images), labels=labels).loss
    loss.backward()

    ours = models.from_pretrained(folder, dtype="float32")
    graphdef, params = nnx.split(ours)
    arrays = {name: jnp.asarray(array) for name, array in (batch | table).items() if name != "positions"}
    arrays["positions"] = shard_positions(batch["positions"], None)
    step = jax.jit(jax.value_and_grad(lambda p: sft_loss(graphdef, p, arrays, remat=remat), has_aux=True))
    (found, metrics), grads = step(params)
    assert float(found) == pytest.approx(loss.item(), rel=1e-5)

    theirs = dict(model.named_parameters())
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]}
    rules = (*ours.weight_rules(ours.config), *SAME_NAMES)
    seen = 0
    for tensor in tensors(grads, rules):
        leaf = leaves[tensor.path] if tensor.layer is None else leaves[tensor.path][tensor.layer]
        expected = theirs[tensor.name].grad.numpy()
        error = np.linalg.norm(to_torch(np.asarray(leaf), tensor.layout) - expected)
        assert error <= 1e-4 * np.linalg.norm(expected) + 1e-7, tensor.name
        seen += 1
    assert seen == len(theirs)

    log_probabilities = torch.log_softmax(model(**_inputs(batch, images)).logits[:, :-1].float(), -1)
    chosen = -log_probabilities.gather(-1, torch.tensor(batch["ids"])[:, 1:, None].long())[..., 0]
    score = chosen[torch.tensor(batch["targets"])[:, 1:] == 2].mean()
    assert float(metrics["loss/score"]) == pytest.approx(score.item(), rel=1e-4)


def _inputs(batch, images) -> dict:
    return {
        "input_ids": torch.tensor(batch["ids"]).long(),
        "attention_mask": torch.tensor(batch["segments"]),
        "pixel_values": torch.tensor(np.concatenate([image.patches for image in images])),
        "image_grid_thw": torch.tensor([[1, *image.grid] for image in images]),
        "mm_token_type_ids": torch.tensor(batch["image_index"] >= 0).int(),
    }
