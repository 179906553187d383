"""The tokenizers of the miniature: real CLIP and T5 tokenizer files whose vocabularies are the shapes world's words.

Every word of the world is one token; anything else falls apart into letters, so that no text is refused.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer, T5Tokenizer

from firm_jax.shapes.scene import VOCABULARY

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"


def clip_tokenizer(max_length: int) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer, lower-casing, with `<|startoftext|>` and `<|endoftext|>` (also the padding)."""
    merges = _merges(VOCABULARY)
    pieces = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), *map("".join, merges)]
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, until every word is one piece: always the most frequent pair.

    Of equally frequent pairs the first in the alphabet, where the `tokenizers` library takes another one each time: a
    run that is continued has to find the tokens that it was begun with.
    """
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for pieces in spelled for pair in pairwise(pieces)):
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(pair)
        spelled = [_merged(pieces, pair) for pieces in spelled]
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces of a word with every occurrence of the pair made one."""
    merged = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


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
