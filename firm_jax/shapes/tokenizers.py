"""The tokenizers of the miniature: real CLIP and T5 tokenizer files whose vocabularies are the shapes world's words.

Every word of the world is one token; anything else falls apart into letters, so that no text is refused.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from firm_jax.shapes.scene import VOCABULARY

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"


def clip_tokenizer(max_length: int) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer, lower-casing, with `<|startoftext|>` and `<|endoftext|>` (also the padding)."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=list(_LETTERS),
        show_progress=False,
    )
    learner.train_from_iterator([*VOCABULARY, *_LETTERS], trainer)
    learned = learner.get_vocab()
    pieces = sorted(learned, key=learned.get)
    pieces += [f"{letter}</w>" for letter in _LETTERS if f"{letter}</w>" not in learned]
    merges = [tuple(pair) for pair in _merges(learner)]
    vocab = {piece: index for index, piece in enumerate([*pieces, *special])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def _merges(learner: Tokenizer) -> list[list[str]]:
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [pair if isinstance(pair, list) else pair.split(" ") for pair in merges]


def t5_tokenizer(max_length: int) -> T5Tokenizer:
    """A T5 unigram tokenizer: `<pad>` 0, `</s>` 1, `<unk>` 2, then the words, each cheaper than its letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in VOCABULARY]
    pieces += [(piece, -10.0) for piece in ("▁", *_LETTERS, *_LETTERS.upper()[:26]) if len(piece) == 1]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def save_tokenizers(folder: Path, max_length: int) -> None:
    """Write `tokenizer/`, `tokenizer_2/` (CLIP) and `tokenizer_3/` (T5) of a diffusers SD3 folder."""
    folder = Path(folder)
    for name in ("tokenizer", "tokenizer_2"):
        clip_tokenizer(max_length).save_pretrained(folder / name)
    t5_tokenizer(max_length).save_pretrained(folder / "tokenizer_3")
