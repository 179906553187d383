"""What an int8 base changes: the same held-out pictures from the same noise, drawn on it and on the float base.

    python -m benchmarks.int8_base --config configs/gen_qma.py:tiny --out benchmarks/int8_base_sd3.json

Model, prompts and sampler are those of the config's evaluation, without any LoRA. Told of each base: how good the
oracle of the shapes world finds its pictures, of how many it says something else than of the float base's, and how far
their pixels are from those. bfloat16 is drawn too, as a measure: full-size weights are held in it.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import jax
import numpy as np

from firm_jax import Generator
from firm_jax.config import load_config
from firm_jax.data.edits import read_edits
from firm_jax.data.prompts import read_prompts
from firm_jax.embedded import embedded_path
from firm_jax.plan import shard_bytes
from firm_jax.rl.evaluate import clustered_error, edit_oracle, prompt_oracle
from firm_jax.rl.rollout import conditioner, make_sampler

FLOAT = "float32"
BASES = {FLOAT: {"dtype": FLOAT}, "int8": {"dtype": FLOAT, "quantize": "int8"}, "bfloat16": {"dtype": "bfloat16"}}


def measure(config, prompts: int, seeds: list[int]) -> dict[str, dict]:
    """For each base its bytes, the oracle's means with standard errors, and its distance from the float base."""
    drawn, found = {}, {}
    for name, given in BASES.items():
        generator = Generator.from_pretrained(config.model, **given)
        file = embedded_path(config.prompts.held_out) or config.prompts.held_out
        read = read_edits(file, max_images=generator.max_images) if generator.edits else read_prompts(file)
        records = read[0][:prompts]
        ask = (edit_oracle if generator.edits else prompt_oracle)(records)
        conditioned = conditioner(generator, config.eval, records)(records)
        sample = make_sampler(generator, config.eval, None)
        rows = np.arange(len(records), dtype=np.int32)
        numbers = rows.astype(np.uint32)
        images = [sample(None, conditioned, rows, numbers, jax.random.key(seed))[1] for seed in seeds]
        told = [ask(np.nan_to_num(pictures), rows) for pictures in images]
        drawn[name] = np.stack(images), {what: np.stack([one[what] for one in told]) for what in told[0]}
        found[name] = {"transformer_bytes": shard_bytes(generator.params)} | compare(*drawn[name], *drawn[FLOAT])
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    return found


def compare(images: np.ndarray, told: dict, base: np.ndarray, base_told: dict) -> dict:
    """images [seeds, M, H, W, 3] and what the oracle tells of them [seeds, M], against the float base's."""
    prompts = np.tile(np.arange(images.shape[1]), len(images))
    oracle = {}
    for what, values in told.items():
        change = values - base_told[what]
        oracle[what] = {
            "mean": round(float(values.mean()), 4),
            "standard_error": round(clustered_error(values.reshape(-1), prompts), 4),
            "change": round(float(change.mean()), 4),
            "change_standard_error": round(clustered_error(change.reshape(-1), prompts), 4),
            "by_seed": [round(float(one), 4) for one in values.mean(1)],
            "pictures_judged_otherwise": int((change != 0).sum()),
        }
    difference = np.abs(images - base).mean((2, 3, 4))
    return {
        "pictures": int(difference.size),
        "oracle": oracle,
        "mean_pixel_difference": float(difference.mean()),
        "largest_picture_difference": float(difference.max()),
    }


def machine() -> str:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = cpu[0].split(":", 1)[1].strip() if cpu else platform.processor()
    return f"{os.cpu_count()} cores of {name}, jax {jax.__version__} on {jax.default_backend()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/gen_qma.py:tiny")
    parser.add_argument("--model", help="in the place of the config's")
    parser.add_argument("--prompts", type=int, default=256, help="the first so many of the held-out ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    config = load_config(given.config)
    config.model = given.model or config.model
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "config": given.config,
        "model": config.model,
        "prompts": given.prompts,
        "seeds": given.seeds,
        "bases": measure(config, given.prompts, given.seeds),
    }
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
