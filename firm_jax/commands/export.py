"""Write what a run has trained in a form that other programs load, with a model card.

formats:
  diffusers-lora  a LoRA for `pipe.load_lora_weights(DIR)`
  peft            a LoRA for `PeftModel.from_pretrained(MODEL, DIR)`, of a pipeline's transformer or of a critic
  comfyui-lora    a LoRA for ComfyUI's folder models/loras
  diffusers       the whole pipeline, the LoRA merged into its transformer
  transformers    the critic that a critic_sft run has trained
"""

import argparse
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from firm_jax import models
from firm_jax.checkpoint import Checkpoint, read_arrays
from firm_jax.embedded import PREFIX
from firm_jax.errors import CheckpointError, ConfigError, WorkdirError
from firm_jax.generation.generator import read_model_index
from firm_jax.interop import lora_formats
from firm_jax.interop.card_examples import critic_example, critic_lora_example, pipeline_example
from firm_jax.interop.files import read_json
from firm_jax.interop.hub import PATTERNS, find_local, identity, resolve
from firm_jax.interop.lora_formats import Adapter, adapter_of
from firm_jax.interop.model_card import is_hub_id, model_card
from firm_jax.interop.pipeline_folder import INDEX_FILE, present_parts
from firm_jax.models.lora import LoraConfig

RL, SFT = "rl", "critic_sft"
# Each format, and the jobs whose runs it is for.
FORMATS = {
    "diffusers-lora": (RL,),
    "peft": (RL, SFT),
    "comfyui-lora": (RL,),
    "diffusers": (RL,),
    "transformers": (SFT,),
}
# Adapters by the names that they have in a checkpoint.
ADAPTERS = {"ema": "ema", "current": "lora", "old": "old"}
ADAPTER_WORDS = {"ema": "averaged", "current": "last", "old": "rollout"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--workdir", required=True, type=Path, help="the run's folder")
    parser.add_argument("--format", required=True, choices=FORMATS, help="see above")
    parser.add_argument("--out", required=True, type=Path, help="a new or empty folder for the export")
    parser.add_argument(
        "--adapter",
        choices=ADAPTERS,
        help="which policy of an RL run: the averaged weights that evaluation uses (ema, the default), the last ones, "
        "or those that the rollouts are drawn with (old)",
    )
    parser.add_argument("--step", type=int, help="which checkpoint of an RL run; by default the newest")


def run(arguments: argparse.Namespace) -> int:
    """Write the export and say where. Raises FirmError with a remedy for what cannot be exported."""
    workdir, out = arguments.workdir.expanduser().absolute(), arguments.out.expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WorkdirError(f"--out {out} is there already and not an empty folder; name another, or remove it")
    config = _config(workdir)
    _check_format(arguments, config["job"], workdir)
    staging = out.parent / f".{out.name}.exporting"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        if config["job"] == SFT:
            told = _critic(workdir, config, arguments.format, staging)
        else:
            told = _generator(workdir, arguments, staging)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    except OSError as error:
        raise WorkdirError(f"cannot write the export to {out}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{told} -> {out}\nHow to load it stands in {out / 'README.md'}.")
    return 0


def _config(workdir: Path) -> dict:
    try:
        return read_json(workdir / "config.json")
    except FileNotFoundError:
        raise WorkdirError(
            f"{workdir} is not the folder of a run: it has no config.json. Pass its --workdir."
        ) from None


def _check_format(arguments: argparse.Namespace, job: str, workdir: Path) -> None:
    """ConfigError for a format that the run's job does not have."""
    format = arguments.format
    if job not in (RL, SFT):
        raise ConfigError(
            f"{workdir} is a run of the job {job!r}, which leaves its model in {workdir / 'model'} as a Hugging Face "
            "folder when it ends; there is nothing to export"
        )
    if job not in FORMATS[format]:
        fit = [name for name, jobs in FORMATS.items() if job in jobs]
        raise ConfigError(
            f"{workdir} is a run of the job {job!r}, and --format {format} is for runs of {FORMATS[format][0]!r}; the "
            f"formats for what it has trained are {', '.join(fit)}"
        )
    if job == SFT and (arguments.adapter or arguments.step is not None):
        raise ConfigError(
            "--adapter and --step choose among the LoRAs of an RL run; a critic's run has one model, its last"
        )


# Generators


def _generator(workdir: Path, arguments: argparse.Namespace, folder: Path) -> str:
    """Write an RL run's LoRA, or the pipeline with it, into `folder`; returns what it is in words."""
    name = arguments.adapter or "ema"
    checkpoint = read_arrays(workdir / "checkpoints", ADAPTERS[name], arguments.step)
    config = checkpoint.meta["config"]
    base = (find_local(config["model"]) if arguments.format != "diffusers" else None) or resolve(config["model"])
    index = read_model_index(base)
    network, network_config = models.read_network(base / "transformer")
    lora = LoraConfig(config["lora"]["rank"], config["lora"]["alpha"], tuple(config["lora"]["targets"]))
    adapter = adapter_of(checkpoint.state, network.weight_rules(network_config), lora)
    if arguments.format == "diffusers-lora":
        lora_formats.write_diffusers(folder, adapter)
    elif arguments.format == "peft":
        lora_formats.write_peft(folder, adapter, config["model"])
    elif arguments.format == "comfyui-lora":
        lora_formats.write_comfyui(folder, adapter, network.hf_class)
    else:
        _merge(base, index, folder, adapter, checkpoint)
    what = f"the {ADAPTER_WORDS[name]} LoRA of step {checkpoint.step}"
    (folder / "README.md").write_text(_generator_card(workdir, arguments.format, checkpoint, index, what))
    return f"{what}, rank {adapter.rank}, alpha {adapter.alpha:g}, {len(adapter.pairs)} layers"


def _merge(base: Path, index: dict, folder: Path, adapter: Adapter, checkpoint: Checkpoint) -> None:
    """The pipeline's parts as they are in the base, but for the transformer.

    Raises CheckpointError when the base is not the one that the run was trained on.
    """
    trained_on, found = checkpoint.meta["base_weights"]["model"], identity(base)
    if trained_on != found:
        raise CheckpointError(
            f"checkpoint {checkpoint.step} was trained on a base with the fingerprint {trained_on}, and {base} has "
            f"{found}: the model has changed since. Restore it, or export the LoRA alone."
        )
    for part in sorted(present_parts(index) - {"transformer"}):
        for file in (base / part).rglob("*"):
            if file.is_file() and any(fnmatch(file.name, pattern) for pattern in PATTERNS):
                target = folder / file.relative_to(base)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    lora_formats.write_merged(base / "transformer", folder / "transformer", adapter)
    shutil.copyfile(base / INDEX_FILE, folder / INDEX_FILE)


def _generator_card(workdir: Path, format: str, checkpoint: Checkpoint, index: dict, what: str) -> str:
    config, merged = checkpoint.meta["config"], format == "diffusers"
    sentences = [
        f"{what[0].upper()}{what[1:]} ({checkpoint.meta['epoch']} epochs) of a run that trained `{config['model']}` by "
        f"DiffusionNFT on the reward `{config['reward']['name']}` of the critic `{config['critic']['model']}`, as in "
        '"Trust Your Critic" (arXiv 2603.12247).'
    ]
    if merged:
        sentences.append("It is merged into the transformer; every other part is the base's.")
    if config.get("quantize"):
        sentences.append(
            f"It was trained over a base held as {config['quantize']}"
            + (" and is merged into the float one." if merged else ".")
        )
    if format == "comfyui-lora":
        sentences.append(
            f"Put `{lora_formats.COMFYUI_FILE}` into ComfyUI's folder `models/loras` and apply it with the node "
            "LoraLoaderModelOnly at strength 1, the strength that it was trained with."
        )
    if format == "diffusers-lora":
        sentences.append("Its alpha is in the file's metadata, which diffusers reads from 0.34 on.")
    edits = "Edit" in index["_class_name"]
    kind = "image-to-image" if edits else "text-to-image"
    return model_card(
        title=_title(config["model"], "An image generator", "trained with FIRM"),
        base_model=config["model"],
        relation="finetune" if merged else "adapter",
        library={"peft": "peft", "comfyui-lora": "diffusion-single-file"}.get(format, "diffusers"),
        pipeline_tag=kind,
        tags=[
            kind,
            "firm",
            "diffusion-nft",
            *([] if merged else ["lora"]),
            *(["comfyui"] if "comfy" in format else []),
        ],
        what=" ".join(sentences),
        example=pipeline_example(format, config, index),
        config=config,
        metrics=_metrics(workdir),
        step=checkpoint.step,
    )


# Critics


def _critic(workdir: Path, config: dict, format: str, folder: Path) -> str:
    """Write the critic of an SFT run, or its LoRA, into `folder`; returns what it is in words."""
    model, lora = workdir / "model", workdir / "adapter"
    if not (model / "config.json").is_file():
        raise WorkdirError(
            f"{workdir} has no trained critic yet: the folder model is written when the run ends, after "
            f"{config['train']['epochs']} epochs. Start the same command again to continue it."
        )
    base, merged = config["critic"]["model"], format == "transformers"
    rubrics = sorted(file.stem for file in (model / "rubrics").glob("*.txt"))
    if merged:
        models.read_network(model)
        shutil.copytree(model, folder, dirs_exist_ok=True)
        told, example = "the critic", critic_example(rubrics[0])
    else:
        if not (lora / lora_formats.PEFT_CONFIG).is_file():
            raise ConfigError(
                f"the run in {workdir} has left no LoRA in {lora}: with lora.rank 0 it trains the weights themselves. "
                "Export the whole critic with --format transformers."
            )
        adapter = lora_formats.read_adapter(lora)
        for part, source in ((".", lora), ("rubrics", model / "rubrics")):
            shutil.copytree(source, folder / part, dirs_exist_ok=True)
        told = f"the critic's LoRA, rank {adapter.rank}, alpha {adapter.alpha:g}, {len(adapter.pairs)} layers,"
        example = critic_lora_example(read_json(lora / lora_formats.PEFT_CONFIG)["base_model_name_or_path"])
    metrics = _metrics(workdir)
    step = max((line["step"] for line in metrics), default=0)
    card = model_card(
        title=_title(base, "A vision-language model", "trained to judge images"),
        base_model=base,
        relation="finetune" if merged else "adapter",
        library="transformers" if merged else "peft",
        pipeline_tag="image-text-to-text",
        tags=["image-text-to-text", "firm", "critic", *([] if merged else ["lora"])],
        what=f"A critic of images (arXiv 2603.12247), trained for {step} steps to answer the texts in `rubrics/`: "
        f"{', '.join(rubrics)}. Serve it with these."
        + ("" if merged else f" This is the LoRA alone, of `{base or 'the folder that the run started from'}`."),
        example=example,
        config=config,
        metrics=metrics,
        step=step,
    )
    (folder / "README.md").write_text(card)
    return f"{told} after {step} steps"


def _title(base: str | None, otherwise: str, ending: str) -> str:
    """A heading with the base model's name, where that is more than the path of a folder."""
    named = base and (is_hub_id(base) or base.startswith(PREFIX))
    return f"{base.split('/')[-1] if named else otherwise} {ending}"


def _metrics(workdir: Path) -> list[dict]:
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
