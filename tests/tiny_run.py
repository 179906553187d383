"""The folder of an RL run on a tiny pipeline, as the job leaves it, without the training: random adapters."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np

from firm_jax.config import load_config
from firm_jax.generation import Generator
from firm_jax.interop.hub import identity
from firm_jax.models.lora import LoraConfig, init_lora
from firm_jax.run import Run

CONFIG = Path(__file__).parents[1] / "configs" / "gen_qma.py"
LORA = LoraConfig(
    rank=3,
    alpha=7.0,  # over the rank it is no power of two, so that a strength that is lost or doubled shows
    targets=tuple(
        f"attn.{name}" for name in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
    ),
)
SIZE = {"height": 24, "width": 16, "max_text_tokens": 21, "steps": 4}


def random_lora(generator: Generator, seed: int, config: LoraConfig = LORA):
    """Our tree of an adapter that changes the pictures visibly, and every layer differently."""
    tree = jax.eval_shape(partial(init_lora, config=config), jax.random.key(0), generator.params)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), tree)


def write_run(workdir: Path, folder: Path, generator: Generator, lora: LoraConfig = LORA, **changed) -> dict:
    """Two checkpoints, of steps 4 and 6, and their metrics; returns the last one's adapters by their names in it."""
    config = load_config(f"{CONFIG}:tiny")
    config.model = str(folder)
    config.lora.update({"rank": lora.rank, "alpha": lora.alpha, "targets": lora.targets})
    config.eval.update(SIZE | {"solver": "euler"})
    config.checkpoint.every = 1
    config.train.epochs = 3
    config.update_from_flattened_dict(changed)
    with Run(config, workdir, {"model": identity(folder)}) as run:
        run.log(0, 0, {"eval/reward": 0.25})
        for epoch, step in ((2, 4), (3, 6)):
            adapters = {
                name: random_lora(generator, 10 * step + number, lora)
                for number, name in enumerate(("lora", "old", "ema"))
            }
            run.log(step, epoch, {"eval/reward": 0.1 * step, "reward/mean": 0.5})
            state = adapters | {"optimizer": {"count": np.int32(step)}, "step": np.int32(step)}
            run.safe_point(jax.tree.map(jax.numpy.asarray, state), {}, step=step, epoch=epoch)
    return adapters


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def card_example(card: str) -> str:
    """The Python in a model card."""
    return card.split("```python\n")[1].split("\n```")[0]
