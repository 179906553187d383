"""The README.md of an exported model: what it is, how it was trained, how it did, how it is loaded."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What of a run's config is its recipe; the rest says where and how patiently it ran.
RECIPE = (
    "model dtype quantize seed prompts.train prompts.held_out group lora rollout critic.model critic.answer "
    "critic.score reward data train"
).split()
# Metrics of a job that tell how the model does, beside everything that evaluation measures.
RESULTS = ("eval/", "reward/mean", "reward/instruction", "reward/quality", "reward/execution", "reward/consistency")
LICENCE = "# license: yours to choose, within the licence of the base model"


def is_hub_id(name: str) -> bool:
    """Whether a model's name is that of a repository on the Hugging Face Hub, and no folder here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).expanduser().exists()


def model_card(
    *,
    title: str,
    base_model: str | None,
    relation: str,
    library: str,
    pipeline_tag: str,
    tags: Sequence[str],
    what: str,
    example: str,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    step: int,
) -> str:
    """The card, in Markdown behind the YAML that the Hugging Face Hub reads.

    Args:
        base_model: the name that the config gives; one that is no Hub id is left for the user to fill in.
        relation: of the model to its base, as the Hub has it: "adapter" or "finetune".
        example: Python, to be run in the card's folder.
        config: the run's resolved config.
        metrics: the lines of metrics.jsonl.
        step: optimizer updates that the model has seen.
    """
    hub_id = base_model is not None and is_hub_id(base_model)
    front = [
        f"base_model: {json.dumps(base_model)}" if hub_id else "# base_model: the Hub id of the base model",
        *([f"base_model_relation: {relation}"] if hub_id else []),
        f"library_name: {library}",
        f"pipeline_tag: {pipeline_tag}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
        LICENCE,
    ]
    recipe = [(key, value) for name in RECIPE for key, value in _settings(config, name)]
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {title}",
        what,
        f"## Use\n\nIn this folder:\n\n```python\n{example.strip()}\n```",
        "## Results\n\n" + _results(metrics, step),
        "## Recipe\n\n"
        + _table(("setting", "value"), [(f"`{key}`", _code(value)) for key, value in recipe])
        + "\n\nTrained with firm_jax.",
        "## Licence\n\nTo be filled in by who publishes this model, here and as `license` above.",
    ]
    return "\n\n".join(parts) + "\n"


def _settings(config: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    """A key of the config with its value, or all keys below it; nothing where the config has no such key."""
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return []
        value = value[part]
    if isinstance(value, Mapping) and value:
        return [pair for below in value for pair in _settings(config, f"{name}.{below}")]
    return [] if value is None else [(name, value)]


def _results(metrics: Sequence[Mapping[str, Any]], step: int) -> str:
    """A table of each metric's first value and its last up to `step`."""
    seen = [line for line in metrics if line["step"] <= step]
    names = [name for line in seen for name in line if name.startswith(RESULTS)]
    rows = []
    for name in dict.fromkeys(names):
        found = [line for line in seen if isinstance(line.get(name), int | float)]
        if found:
            first, last = found[0], found[-1]
            rows.append((f"`{name}`", *(f"{line[name]:.4g} ({line['epoch']})" for line in (first, last))))
    if not rows:
        return "The run has measured nothing up to this step."
    return _table(("metric", "first (epoch)", f"last up to step {step} (epoch)"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return f"`{text}`".replace("|", "\\|").replace("\n", " ") if text else ""
