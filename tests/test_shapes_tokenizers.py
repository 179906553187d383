"""The miniature's CLIP and T5 tokenizers: a word is a token, anything else falls apart, and always alike."""

import pytest

from firm_jax.shapes.scene import VOCABULARY
from firm_jax.shapes.tokenizers import clip_tokenizer, save_tokenizers, t5_tokenizer


@pytest.mark.parametrize(("make", "around"), [(clip_tokenizer, 2), (t5_tokenizer, 1)])
def test_every_word_of_the_world_is_one_token(make, around):
    tokenizer = make(18)
    assert all(len(tokenizer(word)["input_ids"]) == 1 + around for word in VOCABULARY)
    ids = tokenizer(" ".join(VOCABULARY))["input_ids"]
    assert len(ids) == len(set(ids)) == len(VOCABULARY) + around


@pytest.mark.parametrize(("make", "unknown"), [(clip_tokenizer, None), (t5_tokenizer, 2)])
def test_other_texts_fall_apart_into_letters(make, unknown):
    tokenizer = make(18)
    ids = tokenizer("a dog, 7")["input_ids"]
    assert len(ids) > 6 and unknown not in ids


def test_clip_does_not_see_capitals():
    tokenizer = clip_tokenizer(18)
    assert tokenizer("A Red SQUARE")["input_ids"] == tokenizer("a red square")["input_ids"]


def test_the_files_are_the_same_every_time(tmp_path):
    for name in ("first", "second"):
        save_tokenizers(tmp_path / name, 18)
    for file in sorted((tmp_path / "first").rglob("*.json")):
        assert file.read_bytes() == (tmp_path / "second" / file.relative_to(tmp_path / "first")).read_bytes()
