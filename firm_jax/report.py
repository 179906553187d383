"""Pictures of a run for people: grids with text, and `report.html`."""

import base64
import hashlib
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image, ImageDraw, ImageFont

from firm_jax import storage
from firm_jax.cards import gallery_of
from firm_jax.curves import charts

_SMALLEST_TILE = 224
_FONT_SIZE = 17
_LARGEST_GRID = 400_000  # bytes


def image_grid(images: Any, captions: Sequence[str], columns: int, path: str | Path | None = None) -> np.ndarray:
    """Lay pictures out in rows with wrapped text under each; small ones are enlarged so that the text is readable.

    Args:
        images: [N, H, W, 3], float in [0, 1] or uint8.
        captions: N texts; their line breaks are kept.
        columns: Pictures a row.
        path: Where to write a PNG, if anywhere.

    Returns:
        The grid, uint8 [height, width, 3].
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        images = (np.clip(np.nan_to_num(images.astype(np.float32)), 0, 1) * 255 + 0.5).astype(np.uint8)
    if images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(captions) or len(images) == 0:
        raise ValueError(f"a grid needs images [N, H, W, 3] and N captions: {images.shape} and {len(captions)}")
    height, width = images.shape[1:3]
    scale = max(1, -(-_SMALLEST_TILE // width))
    height, width = height * scale, width * scale
    font = ImageFont.load_default(_FONT_SIZE)
    characters = max(8, int(width / font.getlength("abcdefghij") * 10))
    texts = [
        "\n".join(line for part in caption.splitlines() for line in textwrap.wrap(part, characters) or [""])
        for caption in captions
    ]
    columns = min(columns, len(images))
    margin, line_height = 8, int(_FONT_SIZE * 1.35)
    rows = [list(range(start, min(start + columns, len(images)))) for start in range(0, len(images), columns)]
    text_heights = [max(texts[i].count("\n") + 1 for i in row) * line_height for row in rows]
    total_height = margin + sum(height + 4 + text_height + margin for text_height in text_heights)
    canvas = Image.new("RGB", (margin + columns * (width + margin), total_height), "white")
    draw = ImageDraw.Draw(canvas)
    top = margin
    for row, text_height in zip(rows, text_heights, strict=True):
        for column, index in enumerate(row):
            left = margin + column * (width + margin)
            tile = Image.fromarray(images[index]).resize((width, height), Image.Resampling.NEAREST)
            # The outline tells a white picture from the page.
            draw.rectangle((left - 1, top - 1, left + width, top + height), outline=(220, 220, 220))
            canvas.paste(tile, (left, top))
            draw.multiline_text((left, top + height + 4), texts[index], fill=(30, 30, 30), font=font, spacing=3)
        top += height + 4 + text_height + margin
    if path is not None:
        canvas.save(path)
    return np.asarray(canvas)


def write_report(workdir: str | Path) -> Path:
    """Write `report.html` from what a run's folder holds; the file can be moved and sent by itself.

    Sections whose data the run does not have are left out, so that one report serves every kind of job.
    """
    workdir = Path(workdir)
    rows = _read_lines(workdir / "metrics.jsonl")
    config = _read_json(workdir / "config.json")
    pages = environment()
    drawn, others = charts(rows)
    page = pages.get_template("report.html").render(
        name=workdir.resolve().name,
        script_hash=_script_hash(pages),
        config=config,
        flat_config=flat(config),
        versions=_versions(workdir),
        last=rows[-1] if rows else {},
        seconds=rows[-1]["time"] - rows[0]["time"] + (rows[0].get("time/wall") or 0) if rows else 0,
        headlines=_headlines(rows),
        pictures=_pictures(workdir),
        charts=drawn,
        other_charts=others,
        health=_health(workdir, rows),
        gallery=gallery_of(workdir),
    )
    path = workdir / "report.html"
    storage.replace(path, page.encode(errors="replace").decode())  # a lone surrogate of a text becomes "?"
    return path


# What a run of prompts or of edits is about; the first three that it has are on its cards.
_HEADLINES = (
    "eval/oracle_fraction",
    "eval/oracle_edit",
    "eval/oracle_execution",
    "eval/oracle_preservation",
    "eval/oracle_accuracy",
    "reward/mean",
)


def _headlines(rows: list[dict]) -> list[dict]:
    """First and last value of what the run was for, with standard errors where the run measured them."""
    others = sorted({n for row in rows for n in row if n.startswith("eval/") and not n.endswith("_se")} - {*_HEADLINES})
    table = []
    for name in (*_HEADLINES, *others):
        known = [row for row in rows if _is_number(row.get(name))]
        if known:
            first, last = known[0], known[-1]
            table.append(
                {
                    "name": name,
                    "before": first[name],
                    "after": last[name],
                    "before_error": first.get(f"{name}_se"),
                    "after_error": last.get(f"{name}_se"),
                    "before_epoch": first["epoch"],
                    "after_epoch": last["epoch"],
                }
            )
    return table


def _health(workdir: Path, rows: list[dict]) -> list[dict]:
    """What a careful person looks at before believing the numbers: each a finding, good or not."""
    findings = []

    def look(name: str, bad: Callable[[float], bool], text: str) -> None:
        values = [row[name] for row in rows if _is_number(row.get(name))]
        if values:
            worst = max(values)
            mean = sum(values) / len(values)
            findings.append({"good": not bad(worst), "text": text.format(mean=mean, worst=worst)})

    look(
        "critic/failure_rate",
        lambda x: x > 0.05,
        "judgements missing: {mean:.2%} on average, {worst:.2%} at worst",
    )
    reasons = {
        name.rpartition("/")[2]: int(sum(row[name] for row in rows if _is_number(row.get(name))))
        for name in sorted({name for row in rows for name in row if name.startswith("critic/status/")})
    }
    if reasons:
        told = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        findings.append({"good": False, "text": f"judgements missing, by reason: {told}"})
    look(
        "reward/zero_std_ratio",
        lambda x: x > 0.5,
        "groups of equal rewards, nothing to learn from: {mean:.1%} on average",
    )
    look(
        "update/skipped",
        lambda x: x > 0,
        "updates skipped, for numbers that were not finite or for want of rewards: {worst:.0f}",
    )
    lost = sorted({name for row in rows for name in row.get("non_finite", [])})
    findings.append(
        {"good": not lost, "text": f"metrics that were not finite at some time: {', '.join(lost) or 'none'}"}
    )
    phases = {
        name.removeprefix("time/"): values
        for name in sorted({name for row in rows for name in row if name.startswith("time/")})
        if (values := [row[name] for row in rows if _is_number(row.get(name))])
    }
    if phases:
        told = ", ".join(f"{name} {_number(sum(values) / len(values))} s" for name, values in phases.items())
        findings.append({"good": True, "text": f"time of each phase, on average of the epochs that had it: {told}"})
    damaged = sorted(path.name for path in (workdir / "checkpoints").glob("*.damaged*"))
    if damaged:
        findings.append({"good": False, "text": f"checkpoints found damaged and set aside: {', '.join(damaged)}"})
    return findings


def _pictures(workdir: Path) -> list[dict]:
    """By tag, the first and the last grid inlined, and links to those between."""
    tags = {}
    for path in sorted((workdir / "images").glob("*_*.png")):
        tag, _, epoch = path.stem.rpartition("_")
        if epoch.isdigit():
            tags.setdefault(tag, []).append((int(epoch), path))
    return [
        {
            "tag": tag,
            "shown": [
                {"epoch": epoch, "source": _inlined(path)} for epoch, path in dict.fromkeys([grids[0], grids[-1]])
            ],
            "between": [{"epoch": epoch, "link": f"images/{path.name}"} for epoch, path in grids[1:-1]],
        }
        for tag, grids in tags.items()
    ]


def _inlined(path: Path) -> str:
    """A picture as a data address; a large one as WebP, the first below the limit, so that the page can be mailed."""
    content = path.read_bytes()
    if len(content) <= _LARGEST_GRID:
        return f"data:image/png;base64,{base64.b64encode(content).decode()}"
    with Image.open(path) as image:
        whole = image.convert("RGB")
    for width, quality in ((1600, 80), (1200, 70), (800, 50)):
        small, buffer = whole.copy(), io.BytesIO()
        small.thumbnail((width, 2 * width), Image.Resampling.LANCZOS)
        small.save(buffer, "WEBP", quality=quality)
        if buffer.tell() <= _LARGEST_GRID:
            break
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _script_hash(pages: Environment) -> str:
    """What the page's policy names its one script by: no other is run, however it came into the page."""
    script = pages.get_template("report.js").render()
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _versions(workdir: Path) -> dict[str, Any]:
    metas = sorted((workdir / "checkpoints").glob("*/meta.json"), key=lambda path: path.stat().st_mtime)
    return _read_json(metas[-1]).get("versions", {}) if metas else {}


def environment() -> Environment:
    """The package's pages, with what they write numbers by."""
    pages = Environment(loader=PackageLoader("firm_jax", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters["number"] = _number
    pages.filters["short"] = "{:.2g}".format
    return pages


def _number(value: Any) -> str:
    """Three digits after the point for what is near 1, four significant ones otherwise."""
    if not _is_number(value):
        return "–"
    return f"{value:.3f}" if 0.1 <= abs(value) < 10 else f"{value:.4g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The values of nested dictionaries by their dotted names."""
    if not isinstance(tree, dict) or not tree:
        return [(prefix, tree)]
    return [pair for key, value in tree.items() for pair in flat(value, f"{prefix}.{key}".lstrip("."))]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return _whole_lines(path.read_bytes()) if path.is_file() else []


def _whole_lines(content: bytes) -> list[dict[str, Any]]:
    """JSON lines but for a last one that a crash or a full disk has cut."""
    return [json.loads(line) for line in content.split(b"\n")[:-1]]
