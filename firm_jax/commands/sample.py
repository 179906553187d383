"""Draw or edit images with a pipeline and, if you like, a LoRA; PNG files that tell how they were made.

An image depends on its prompt, its number, the seed and the settings, whatever else is drawn: every device draws one
image at a time, by the same program. On one device it is the same to the bit for every --batch-size.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from firm_jax.data.edits import EditRecord, read_edits, source_image
from firm_jax.data.prompts import PromptRecord, read_prompts
from firm_jax.devices import default_dtype, default_mesh, say_nothing_of_absent_devices, use_compilation_cache
from firm_jax.embedded import PREFIX, embedded_path
from firm_jax.errors import ConfigError, DataError, NonFiniteError, WorkdirError
from firm_jax.generation import Generator
from firm_jax.generation.generator import pipeline_class, read_model_index
from firm_jax.generation.qwen_image import QwenImageGenerator
from firm_jax.generation.solvers import SOLVERS
from firm_jax.generation.sources import size_of_area
from firm_jax.interop.hub import resolve
from firm_jax.models import DTYPES
from firm_jax.report import image_grid

SHEET = Path("overview") / "contact_sheet.png"  # in a folder of its own: the images are read as one by others
ON_SHEET, SHEET_SIDE, SHEET_COLUMNS = 64, 512, 4
# What the pipelines are published with; the miniature that ships was trained for its own.
PUBLISHED = {"steps": 28, "guidance": 4.5, "max_text_tokens": None}
PUBLISHED_QWEN = {"steps": 50, "guidance": 4.0, "max_text_tokens": None}
MINIATURE = {"steps": 10, "guidance": 1.0, "max_text_tokens": 17}
QWEN_SIDE, MINIATURE_SIDE = 1024, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add(
        "--model", default="embedded:sd3", help="a diffusers pipeline: folder or Hugging Face id (default: %(default)s)"
    )
    add("--lora", type=Path, help="folder or file of a LoRA, applied at the strength it was trained with")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="one image each; repeated, another image each")
    prompts.add_argument("--prompts", metavar="FILE", help=".txt, .json or .jsonl; for editing with `prompt`, `image`")
    add("--image", nargs="+", type=Path, metavar="FILE", help="the source images of every --prompt, for editing")
    add("--out", required=True, type=Path, help="a new or empty folder")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--steps", type=int, help="network evaluations, twice as many with guidance")
    add("--guidance", type=float, help="strength of classifier-free guidance; 1 is none")
    add("--solver", choices=SOLVERS, default="euler", help="(default: %(default)s)")
    add(
        "--height", type=int, help="in pixels; by default the model's own, for editing that of the source's proportions"
    )
    add("--width", type=int, help="in pixels")
    add("--max-text-tokens", type=int, help="where prompts are cut; by default the pipeline's own length")
    add("--source-area", type=int, help="for editing: pixels of a source that the transformer sees")
    add("--condition-area", type=int, help="for editing: pixels of a source that the text encoder sees")
    add(
        "--batch-size", type=int, default=8, help="images that are drawn before they are written (default: %(default)s)"
    )
    add("--dtype", choices=DTYPES, help="of the networks; by default float32 on a CPU, else bfloat16")


def run(arguments: argparse.Namespace) -> int:
    """Draw the images and say where they are. Raises FirmError with a remedy for what cannot be drawn."""
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size is {arguments.batch_size}; it is at least 1")
    if (arguments.height is None) != (arguments.width is None):
        raise ConfigError("--height and --width are given together, or neither")
    out = arguments.out.expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WorkdirError(f"--out {out} is there already and not an empty folder; name another, or remove it")
    kind = pipeline_class(read_model_index(resolve(arguments.model)))
    records = _records(arguments, kind)
    say_nothing_of_absent_devices()
    use_compilation_cache()
    dtype = arguments.dtype or default_dtype()
    generator = Generator.from_pretrained(arguments.model, dtype=dtype, mesh=default_mesh(), lora=arguments.lora)
    settings = _settings(arguments, generator)
    sizes = [_size(record, arguments, generator, settings) for record in records]
    for height, width in set(sizes):
        generator.latent_shape(height, width)
    all_sources = (
        [[(image.height, image.width) for image in record.images] for record in records] if kind.edits else None
    )
    shown: list[tuple[Image.Image, str]] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(records), unit="image") as bar:
            for rows in _batches(sizes, arguments.batch_size):
                pictures, sources = [records[row] for row in rows], None
                if kind.edits:
                    sources = [[image.open() for image in record.images] for record in pictures]
                height, width = sizes[rows[0]]
                images = generator.sample_each(
                    [record.text for record in pictures], sources, first=rows[0], sizes=all_sources,
                    seed=arguments.seed, height=height, width=width, **settings,
                )  # fmt: skip
                for place, row in enumerate(rows):
                    picture = _picture(images[place], row)
                    told = settings | {"height": height, "width": width, "dtype": dtype, "number": row}
                    picture.save(out / f"{row:05d}.png", pnginfo=_metadata(arguments, records[row], told))
                    if len(shown) < ON_SHEET:
                        shown += [(source, "source") for source in (sources[place] if sources else [])]
                        shown.append((picture, f"{row}  {records[row].text}"))
                bar.update(len(rows))
        _write_sheet(out / SHEET, shown)
    except OSError as error:
        raise WorkdirError(f"cannot write the images to {out}: {error}") from error
    print(f"{len(records)} images, and an overview in {SHEET} -> {out}")
    return 0


def _records(arguments: argparse.Namespace, kind: type[Generator]) -> Sequence[PromptRecord]:
    """What is to be drawn, in order; for editing EditRecords."""
    if arguments.image and not kind.edits:
        raise ConfigError(f"--image is for editing, and {arguments.model} draws from text alone")
    if arguments.prompt is not None:
        if not kind.edits:
            return [PromptRecord(text) for text in arguments.prompt]
        if not arguments.image or len(arguments.image) > kind.max_images:
            raise ConfigError(f"{arguments.model} edits images: give --image FILE, 1 to {kind.max_images} of them")
        images = tuple(source_image(path) for path in arguments.image)
        return [EditRecord(text, images=images) for text in arguments.prompt]
    if arguments.image:
        raise ConfigError("--image goes with --prompt; the edits of a --prompts file name their own images")
    source = os.fspath(embedded_path(arguments.prompts) or arguments.prompts)
    records, bad = read_edits(source, max_images=kind.max_images) if kind.edits else read_prompts(source)
    if bad or not records:
        first = f"line {bad[0].line}: {bad[0].reason}" if bad else "it is empty"
        raise DataError(
            f"{source} has {len(bad)} prompts that cannot be used, {first}. Correct them or leave them out."
        )
    return records


def _settings(arguments: argparse.Namespace, generator: Generator) -> dict[str, Any]:
    """The settings of `Generator.sample_each`, from the arguments or the model's own."""
    qwen = isinstance(generator, QwenImageGenerator)
    if arguments.model.startswith(PREFIX):
        own = MINIATURE | ({"max_text_tokens": None} if qwen else {})
    else:
        own = PUBLISHED_QWEN if qwen else PUBLISHED
    given = {name: getattr(arguments, name) for name in own}
    settings = own | {name: value for name, value in given.items() if value is not None} | {"solver": arguments.solver}
    if settings["steps"] < 1:
        raise ConfigError(f"--steps is {settings['steps']}; it is at least 1")
    for name in ("source_area", "condition_area"):
        area = getattr(arguments, name)
        if area is None and generator.edits and arguments.model.startswith(PREFIX):
            area = MINIATURE_SIDE**2
        if area is not None:
            settings[name] = area
    return settings


def _size(record: PromptRecord, arguments: argparse.Namespace, generator: Generator, settings: dict) -> tuple[int, int]:
    """The height and width of a new image: as asked for, that of its first source, or the model's own."""
    if arguments.height is not None:
        return arguments.height, arguments.width
    if isinstance(record, EditRecord):
        source = record.images[0]
        return size_of_area(settings.get("source_area", generator.source_area), source.height, source.width)
    if isinstance(generator, QwenImageGenerator):
        side = MINIATURE_SIDE if arguments.model.startswith(PREFIX) else QWEN_SIDE
    else:
        side = generator.config.sample_size * generator.vae_config.downscale
    return side, side


def _batches(sizes: Sequence[tuple[int, int]], most: int) -> Iterator[list[int]]:
    """Rows of at most `most` neighbours of one size."""
    for _, run_of_rows in groupby(range(len(sizes)), key=lambda row: sizes[row]):
        rows = list(run_of_rows)
        yield from (rows[start : start + most] for start in range(0, len(rows), most))


def _picture(image: np.ndarray, row: int) -> Image.Image:
    if not np.isfinite(image).all():
        raise NonFiniteError(f"image {row} is not finite; try --dtype float32")
    return Image.fromarray((image * 255).round().astype(np.uint8))


def _metadata(arguments: argparse.Namespace, record: PromptRecord, settings: dict[str, Any]) -> PngInfo:
    """Texts that stay with the file: `prompt`, `seed`, and as JSON `settings`, with model, LoRA and source images."""
    told = {"model": arguments.model, "lora": arguments.lora and str(arguments.lora)} | settings
    if isinstance(record, EditRecord):
        told["sources"] = [image.name for image in record.images]
    info = PngInfo()
    info.add_text("Software", "firm_jax")
    info.add_text("prompt", record.text)
    info.add_text("seed", str(arguments.seed))
    info.add_text("settings", json.dumps(told, ensure_ascii=False))
    return info


def _write_sheet(path: Path, shown: Sequence[tuple[Image.Image, str]]) -> None:
    """An overview, with everything at the size of the last new image, or smaller."""
    path.parent.mkdir()
    width, height = shown[-1][0].size
    share = min(1.0, SHEET_SIDE / max(width, height))
    size = (max(1, round(width * share)), max(1, round(height * share)))
    tiles = np.stack([np.asarray(ImageOps.pad(picture, size, color="white")) for picture, _ in shown])
    image_grid(tiles, [caption for _, caption in shown], SHEET_COLUMNS, path)
