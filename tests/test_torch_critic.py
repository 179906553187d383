"""The critic against transformers: greedy text, alone and batched, with one and two images of different sizes."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from critic_miniature import REQUESTS, write_miniature  # noqa: E402
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

from firm_jax.critic.score import Critic  # noqa: E402

NEW_TOKENS = 64


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A torch model with every parameter drawn at random, and the folder that holds it."""
    folder = write_miniature(tmp_path_factory.mktemp("critic"))
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(float(is_scale) + 0.3 * torch.randn(parameter.shape))
    model.generation_config.eos_token_id = None  # random weights rarely end a turn where a test wants it
    model.save_pretrained(folder)
    return model, folder


def torch_inputs(folder, requests):
    """Left-padded inputs from transformers' own tokenizer, template and image processor."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    rows, images = [], [image for request in requests for image in request["images"]]
    vision = processor(images=images) if images else {}
    grids = iter(vision.get("image_grid_thw", []))
    for request in requests:
        content = [{"type": "image"} for _ in request["images"]] + [{"type": "text", "text": "TEXT"}]
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        for _ in request["images"]:
            chat = chat.replace("<|image_pad|>", "#" * int(np.prod(next(grids)) // 4), 1)
        before, after = chat.replace("#", "<|image_pad|>").split("TEXT")
        if request["images"]:
            ids = tokenizer.encode(before) + tokenizer.encode(request["text"], split_special_tokens=True)
        else:
            head = "<|im_start|>"
            ids = tokenizer.encode(head) + tokenizer.encode(
                before.removeprefix(head) + request["text"], split_special_tokens=True
            )
        rows.append(ids + tokenizer.encode(after))
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if images:
        inputs["pixel_values"] = torch.tensor(vision["pixel_values"])
        inputs["image_grid_thw"] = torch.tensor(vision["image_grid_thw"])
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    # A prompt's own "<|image_pad|>" is text, so what remains under this id is images.
    inputs["mm_token_type_ids"] = (ids == pad).int()
    return inputs, tokenizer


def torch_texts(model, folder, requests):
    inputs, tokenizer = torch_inputs(folder, requests)
    written = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        suppress_tokens=tokenizer.convert_tokens_to_ids(
            ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
        ),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    new = written[:, inputs["input_ids"].shape[1] :]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in new]


@pytest.fixture(scope="module")
def critic(reference):
    return Critic.from_pretrained(reference[1], dtype="float32")


def test_greedy_text_alone(reference, critic):
    for request in REQUESTS:
        assert critic.generate([request], max_new_tokens=NEW_TOKENS) == torch_texts(*reference, [request])


def test_greedy_text_batched(reference, critic):
    assert critic.generate(REQUESTS, max_new_tokens=NEW_TOKENS) == torch_texts(*reference, REQUESTS)
