"""A critic's LoRA against PEFT: the loss and its gradients in training, the texts of both folders that a run leaves."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from critic_miniature import REQUESTS  # noqa: E402
from flax import nnx  # noqa: E402
from test_torch_critic import NEW_TOKENS, reference, torch_texts  # noqa: E402, F401
from test_torch_sft import EXAMPLES, inputs  # noqa: E402
from tiny_run import card_example  # noqa: E402
from transformers import Qwen3VLForConditionalGeneration  # noqa: E402

from firm_jax import models  # noqa: E402
from firm_jax.commands import main  # noqa: E402
from firm_jax.critic import sft, sft_data, tuning  # noqa: E402
from firm_jax.critic.processing import Processor, collate, image_table  # noqa: E402
from firm_jax.critic.score import Critic, served_rubrics  # noqa: E402
from firm_jax.interop.lora_formats import adapter_of, write_peft  # noqa: E402
from firm_jax.models.lora import LoraConfig  # noqa: E402

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS += ("attn.qkv", "attn.proj", "linear_fc1", "linear_fc2")


@pytest.fixture(scope="module")
def trained(reference, tmp_path_factory):  # noqa: F811
    """The folder of the base, the network with a LoRA in every layer that can have one, and that LoRA in PEFT."""
    base, folder = reference[1], tmp_path_factory.mktemp("run")
    graphdef, params = nnx.split(models.from_pretrained(base))
    chosen = tuning.Tuning(tuple(tuning.PARTS), LoraConfig(3, 4.5, TARGETS)).for_network(params)
    lora, frozen = chosen.first(params, jax.random.key(0), (), None)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), lora)
    model = nnx.merge(graphdef, jax.jit(chosen.merged)(lora, frozen))
    sft.write_model(folder / "model", Processor(base), model, served_rubrics(base), "float32")
    adapter = adapter_of(lora, model.weight_rules(model.config), chosen.lora)
    write_peft(folder, adapter, str(base))
    plain = Qwen3VLForConditionalGeneration.from_pretrained(base, attn_implementation="eager").eval()
    plain.generation_config.eos_token_id = None
    before = torch_texts(plain, base, REQUESTS)
    return (
        folder,
        graphdef,
        chosen,
        lora,
        frozen,
        peft.PeftModel.from_pretrained(plain, folder, is_trainable=True),
        before,
    )


def test_pytorch_writes_the_same_texts_with_both_folders(trained):
    folder, *_, adapted, before = trained
    ours = Critic.from_pretrained(folder / "model", dtype="float32")
    texts = ours.generate(REQUESTS, NEW_TOKENS)
    with torch.no_grad():
        assert torch_texts(adapted.eval(), folder / "model", REQUESTS) == texts != before
        merged = Qwen3VLForConditionalGeneration.from_pretrained(folder / "model", attn_implementation="eager").eval()
        assert torch_texts(merged, folder / "model", REQUESTS) == texts


def test_both_exports_of_a_run_give_the_same_logits(trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained[0] / "model", run / "model")
    shutil.copytree(trained[0], run / "adapter", ignore=lambda *_: ["model"])
    base = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    config = {"job": "critic_sft", "critic": {"model": base}, "train": {"epochs": 2, "learning_rate": 1e-3}}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 40, "epoch": 2, "eval/loss": 0.125}) + "\n")
    names = {}
    for format in ("peft", "transformers"):
        assert main(["export", "--workdir", str(run), "--format", format, "--out", str(tmp_path / format)]) == 0
        monkeypatch.chdir(tmp_path / format)
        names[format] = {}
        exec(card_example(Path("README.md").read_text()), names[format])
    adapted, merged = (names[format]["model"].eval() for format in ("peft", "transformers"))
    assert isinstance(adapted, peft.PeftModel)
    example = EXAMPLES[0]
    sequence = Processor(tmp_path / "transformers").sequence(example.images, example.prompt, example.answer)
    with torch.no_grad():
        with_lora, whole = (model(**inputs([sequence]), use_cache=False).logits for model in (adapted, merged))
        with adapted.disable_adapter():
            without = adapted(**inputs([sequence]), use_cache=False).logits
    torch.testing.assert_close(with_lora, whole, atol=2e-4, rtol=2e-4)
    assert (with_lora - without).abs().max() > 0.1
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "library_name: peft" in card and "LoRA alone" in card and "| `eval/loss` | 0.125 (2) | 0.125 (2) |" in card
    rubrics = [sorted(file.name for file in (tmp_path / format / "rubrics").iterdir()) for format in names]
    assert rubrics[0] == rubrics[1] != []


def test_loss_and_gradients_of_the_lora(trained):
    folder, graphdef, chosen, lora, frozen, adapted, _ = trained
    processor, example = Processor(folder / "model"), EXAMPLES[0]
    sequence = processor.sequence(example.images, example.prompt, example.answer)
    table, rows = image_table([sequence])
    merged = table["patches"].shape[1] // 4
    batch = collate([sequence], rows, merged, batch=1, length=len(sequence), side="right")
    adapted.zero_grad()
    labels = torch.tensor(np.where(batch["targets"] > 0, batch["ids"], -100)).long()
    expected = adapted(**inputs([sequence]), labels=labels, use_cache=False).loss
    expected.backward()

    def loss(lora):
        params, scaled = chosen.join(lora, frozen)
        return sft.sft_loss(graphdef, params, sft_data.on_mesh(batch | table, None), lora=scaled)[0]

    found, grads = jax.jit(jax.value_and_grad(loss))(lora)
    assert float(found) == pytest.approx(expected.item(), rel=1e-5)
    rules = models.network_class("Qwen3VLForConditionalGeneration").weight_rules(nnx.merge(graphdef, frozen).config)
    theirs = dict(adapted.named_parameters())
    pairs = adapter_of(grads, rules, chosen.lora).pairs
    assert len(pairs) == sum(".lora_A." in name for name in theirs)
    for module, pair in pairs.items():
        for side, ours in zip("AB", pair, strict=True):
            grad = theirs[f"base_model.model.{module}.lora_{side}.default.weight"].grad.numpy()
            assert np.linalg.norm(ours - grad) <= 2e-4 * np.linalg.norm(grad) + 1e-7, (module, side)
