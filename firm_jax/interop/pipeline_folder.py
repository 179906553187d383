"""The parts of a diffusers pipeline folder that are no network: the index of its parts and the noise schedule."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from firm_jax.errors import ConfigError, WeightsError
from firm_jax.interop.files import read_json

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
INDEX_FILE, SCHEDULER_FILE = "model_index.json", Path("scheduler") / "scheduler_config.json"


def present_parts(index: Mapping) -> set[str]:
    """The parts that a model_index.json names; those that are null there are left out."""
    return {name for name, kind in index.items() if isinstance(kind, list | tuple) and list(kind) != [None, None]}


def check_parts(folder: Path, index: Mapping, required: Collection[str]) -> None:
    """ConfigError unless the pipeline has exactly the parts `required`."""
    present = present_parts(index)
    if missing := sorted(set(required) - present):
        raise ConfigError(f"{folder / INDEX_FILE} lacks {', '.join(missing)}")
    if unsupported := sorted(present - set(required)):
        raise ConfigError(f"{folder / INDEX_FILE} names parts that are not supported: {unsupported}")


def read_scheduler(folder: Path) -> dict:
    """The scheduler_config.json of a pipeline folder."""
    file = folder / SCHEDULER_FILE
    try:
        return read_json(file)
    except FileNotFoundError:
        raise WeightsError(f"the pipeline lacks {file}") from None


def write_scheduler(folder: Path, scheduler: Mapping) -> None:
    """The scheduler_config.json of a pipeline folder."""
    _write(folder / SCHEDULER_FILE, {"_class_name": SCHEDULER} | dict(scheduler))


def write_index(folder: Path, pipeline: str, parts: Mapping[str, list]) -> None:
    """The model_index.json: pipeline class, and part -> [library, class], nulls for a part that is left out."""
    _write(folder / INDEX_FILE, {"_class_name": pipeline, "scheduler": ["diffusers", SCHEDULER], **parts})


def _write(file: Path, content: Mapping) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
