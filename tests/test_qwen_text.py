"""The text side of the Qwen-Image pipelines: templates, lengths, pictures in their places, batches."""

import jax
import numpy as np
import pytest
from tiny_qwen_image import tiny_qwen_image

from firm_jax.data.patches import patch_image
from firm_jax.errors import ConfigError, DataError
from firm_jax.generation.qwen_text import EDIT_PLUS, QwenTextEncoder
from firm_jax.mesh import make_mesh


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return tiny_qwen_image(tmp_path_factory.mktemp("edit"), "QwenImageEditPlusPipeline")


@pytest.fixture(scope="module")
def text(generator):
    return generator.text_encoder


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def spelled(text, sequence) -> str:
    return text.tokenizer.decode(sequence.ids)


def test_pictures_are_numbered_before_the_instruction(text):
    images = [patch_image(picture(16, 24), text.images), patch_image(picture(32, 16), text.images)]
    sequence, cut = text.sequence("make it red", images)
    marks = "<|vision_start|>{}<|vision_end|>"
    pads = ["<|image_pad|>" * (len(image.patches) // 4) for image in images]
    expected = f"Picture 1: {marks.format(pads[0])}Picture 2: {marks.format(pads[1])}make it red<|im_end|>\n"
    assert spelled(text, sequence).endswith(f"<|im_start|>user\n{expected}<|im_start|>assistant\n")
    assert spelled(text, sequence).startswith(f"<|im_start|>system\n{EDIT_PLUS.system}<|im_end|>")
    assert not cut
    for number, image in enumerate(images):
        assert sequence.patch[sequence.image == number].tolist() == list(range(len(image.patches) // 4))
    assert sequence.positions.shape == (3, len(sequence.ids))
    assert (
        np.ptp(sequence.positions[:, sequence.image == 0], axis=1) == [0, *(np.array(images[0].grid) // 2 - 1)]
    ).all()


def test_special_tokens_in_an_instruction_are_text(text):
    sequence, _ = text.sequence("<|image_pad|><|im_end|>", [patch_image(picture(16, 16), text.images)])
    assert (sequence.ids == text.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum() == (sequence.image >= 0).sum()
    assert (sequence.ids == text.tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == 2  # of the template
    assert "<|image_pad|><|im_end|>" in spelled(text, sequence)


def test_pictures_do_not_count_against_the_instruction(text):
    words = "a red circle " * 9
    alone, cut = text.sequence(words, (), 12)
    assert cut and len(alone.ids) == text.template.dropped + 12
    big = patch_image(picture(64, 64), text.images)
    sequence, cut = text.sequence(words, [big], 12)
    pads = int((sequence.image >= 0).sum())
    assert cut and pads == 64 and len(sequence.ids) == text.template.dropped + 12 + pads
    _, cut = text.sequence("a red circle", [big], 200)
    assert not cut


def test_a_state_does_not_depend_on_its_batch_or_its_padding(text):
    images = [[picture(16, 24, 1)], [picture(64, 16, 2), picture(16, 16, 3)], [picture(16, 24, 1)]]
    sequences = text.sequences(["a red circle", "put it on the red background", "draw"], images, None)
    states, mask = text(sequences, 60)
    assert states.shape == (3, 60, 24) and mask.shape == (3, 60)
    for row, sequence in enumerate(sequences):
        count = len(sequence.ids) - text.template.dropped
        assert mask[row].tolist() == [1] * count + [0] * (60 - count)
        alone, _ = text([sequence], 52)
        np.testing.assert_allclose(states[row, :count], alone[0, :count], atol=1e-5)
    with pytest.raises(DataError, match=r"tokens, more than the \d+ it was given"):
        text(sequences, 5)


def test_eight_devices_encode_as_one(generator):
    text, mesh = generator.text_encoder, make_mesh(data=2, fsdp=2, tensor=2)
    images = [[picture(16, 24, seed)] for seed in range(3)]
    sequences = text.sequences(["a red circle", "draw", "put it"], images, None)
    expected, _ = text(sequences, 40)
    with jax.set_mesh(mesh):
        spread = QwenTextEncoder(text.tokenizer, text.network(), text.images, text.template, mesh)
        got, _ = spread(sequences, 40)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_tokenizer_of_another_world_is_refused(text):
    with pytest.raises(ConfigError, match="fewer than the 900 that are dropped"):
        QwenTextEncoder(text.tokenizer, text.network(), text.images, EDIT_PLUS._replace(dropped=900))

    class WithoutMarks:
        def token_to_id(self, mark):
            return None

    class Words:
        backend_tokenizer = WithoutMarks()

    with pytest.raises(ConfigError, match=r"has no <\|im_end\|>"):
        QwenTextEncoder(Words(), text.network(), text.images, EDIT_PLUS)


@pytest.mark.parametrize("prompt", [None, 3, "\ud800"])
def test_what_is_no_text_is_refused(text, prompt):
    with pytest.raises(DataError, match="prompt 1"):
        text.sequences(["fine", prompt], [[], []], None)
