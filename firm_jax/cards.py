"""What a report shows of the judged pictures that a run keeps: few enough, and small enough, to be mailed."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import escape
from PIL import Image

from firm_jax import gallery
from firm_jax.gallery import Record

MOST_EPOCHS = 8  # of evaluations and of training together; 12 pictures each
MOST_PAIRS = 4
MOST_BYTES = 2_000_000  # of all thumbnails together
MOST_TEXT_BYTES = 1_000_000  # of all texts together
# Longest side and WebP quality of the thumbnails: the first with which they stay below MOST_BYTES.
_SIZES = ((320, 85), (256, 75), (192, 70), (128, 60), (96, 40))
_LOSSLESS_SIDE = 128  # pictures up to this size stay as they are
# Characters of one text: the first with which they stay below MOST_TEXT_BYTES.
_LENGTHS = (8000, 4000, 2000, 1000, 500, 250)


def gallery_of(workdir: Path) -> dict[str, Any]:
    """The gallery of a run, for the template: `cards` (newest first), `pairs`, and numbers about all of them.

    A pair is the card of one held-out prompt at the first evaluation and that at the last, from the same noise.
    """
    everything, broken = gallery.read(workdir / "images" / gallery.FOLDER)
    with_oracle = gallery.has_oracle(record for _, record in everything)
    shown = _some_epochs(everything)
    cards = [_card(record, with_oracle) for _, record in shown]
    for card, pictures in zip(cards, thumbnails(_files(path) for path, _ in shown), strict=True):
        card["sources"], card["picture"] = pictures[:-1], pictures[-1]
    _shorten(cards)
    cards.sort(key=lambda card: (-card["epoch"], card["set"], card["image"]))
    return {
        "cards": cards,
        "pairs": _pairs(cards),
        "kept": len(everything),
        "broken": broken,
        "with_oracle": with_oracle,
        "of_edits": any(card["sources"] for card in cards),
        "reasons": sorted({card["kept"] for card in cards}),
        "epochs": sorted({card["epoch"] for card in cards}, reverse=True),
        "unpicked": _gaps([card for card in cards if card["kept"] in (gallery.BY_CHANCE, gallery.THE_SAME)]),
    }


def _some_epochs(everything: Sequence[tuple[Path, Record]]) -> list[tuple[Path, Record]]:
    """Those of some epochs of each set, the first and the last among them."""
    epochs = {}
    for _, record in everything:
        epochs.setdefault(record["set"], []).append(record["epoch"])
    wanted = set()
    for name, of_set in epochs.items():
        distinct = sorted(set(of_set))
        places = np.linspace(0, len(distinct) - 1, min(len(distinct), MOST_EPOCHS // len(epochs)))
        wanted |= {(name, distinct[round(place)]) for place in places}
    return [(path, record) for path, record in everything if (record["set"], record["epoch"]) in wanted]


def _card(record: Record, with_oracle: bool) -> dict[str, Any]:
    """A record with what the gallery sorts by. Of an answer that was understood, its reasoning is shown."""
    judgements = [
        judgement
        | {
            "lowest": None if judgement["score"] is None else int(np.min(judgement["score"])),
            "words": (judgement["status"] == "ok" and judgement["reason"]) or judgement["text"],
        }
        for judgement in record["judgements"]
    ]
    return record | {
        "judgements": judgements,
        "entropy": gallery.entropy(record),
        "disagreement": gallery.disagreement(record, with_oracle),
        "failed": gallery.has_failed(record),
        "names": record["sources"],
    }


def _shorten(cards: Sequence[dict]) -> None:
    """Cut the texts of the cards, all to one length, where there is more than a page can hold."""
    texts = [(card, key) for card in cards for key in ("prompt", "requirement")]
    texts += [(judgement, "words") for card in cards for judgement in card["judgements"]]
    for length in _LENGTHS:
        if sum(len(escape(holder[key][:length]).encode(errors="replace")) for holder, key in texts) <= MOST_TEXT_BYTES:
            break
    for holder, key in texts:
        if len(holder[key]) > length:
            holder[key] = f"{holder[key][:length]} … ({len(holder[key])} characters, the rest is left out)"


def _pairs(cards: Sequence[dict]) -> list[tuple[dict, dict]]:
    held_out = sorted((card for card in cards if card["set"] == "eval"), key=lambda card: card["epoch"])
    if not held_out or held_out[0]["epoch"] == held_out[-1]["epoch"]:
        return []
    before, after = (
        {card["image"]: card for card in held_out if card["epoch"] == epoch}
        for epoch in (held_out[0]["epoch"], held_out[-1]["epoch"])
    )
    return [(before[image], after[image]) for image in sorted(before.keys() & after.keys())][:MOST_PAIRS]


def _gaps(cards: Sequence[dict]) -> dict[str, Any] | None:
    """Critic minus oracle over the criteria of these pictures that both have judged: number, mean, mean size."""
    gaps = [j["value"] - j["oracle"] for c in cards for j in c["judgements"] if None not in (j["value"], j["oracle"])]
    if not gaps:
        return None
    return {"pictures": len(cards), "mean": float(np.mean(gaps)), "size": float(np.mean(np.abs(gaps)))}


def _files(path: Path) -> list[Path]:
    """A kept picture after its sources."""
    return [*gallery.sources_of(path), path]


def thumbnails(groups: Iterable[Sequence[Path]]) -> list[list[dict[str, Any]]]:
    """Groups of image files as `source` (a data address), `width` and `height`, all small enough for one page."""
    files = list(groups)
    for side, quality in _SIZES:
        made = [[_thumbnail(file, side, quality) for file in group] for group in files]
        if sum(len(picture["source"]) for group in made for picture in group) <= MOST_BYTES:
            break
    return made


def _thumbnail(path: Path, side: int, quality: int) -> dict[str, Any]:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    lossless = side == _SIZES[0][0] and max(small.size) <= _LOSSLESS_SIDE
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=quality, lossless=lossless)
    content = base64.b64encode(buffer.getvalue()).decode()
    return {"source": f"data:image/webp;base64,{content}", "width": small.width, "height": small.height}
