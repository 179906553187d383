"""The folder of a run with kept pictures in plain colours, and texts that would be code if a page let them."""

import colorsys
import json
from pathlib import Path

import numpy as np
from PIL import Image

from firm_jax import gallery
from firm_jax.report import image_grid

HOSTILE = '</script><script>window.pwned = 1</script><img src=x onerror="window.pwned = 1"> & \u202e <b>é 👁'
EVALUATED, TRAINED = (0, 2, 4), (1, 2, 3, 4)
IMAGES = 12


def colour(record: dict) -> tuple[int, int, int]:
    """The one colour of a picture, different for each."""
    number = 997 * record["epoch"] + 101 * record["image"] + 31 * (record["set"] == "eval")
    return tuple(int(255 * part) for part in colorsys.hsv_to_rgb(number * 0.618 % 1, 0.8, 0.5 + number % 5 / 10))


def a_judgement(criterion: str, score, expected=None, entropy=None, oracle=None, **changed) -> dict:
    found = {
        "criterion": criterion,
        "score": score,
        "expected": expected,
        "entropy": entropy,
        "status": "ok" if score is not None else "no_score",
        "reason": f"the {criterion} is {score}" if score is not None else "",
        "text": f'{{"score": {score}}}' if score is not None else "I would rather not say",
        "rubric": "0" * 64,
        "value": gallery.unit(score),
        "oracle": oracle,
    }
    return found | changed


def a_record(rng, tag: str, epoch: int, image: int, *, oracle: bool = True) -> dict:
    """One in six has a judgement that failed; the texts of picture 0 are hostile."""
    failed, (first, second) = rng.random() < 1 / 6, (int(score) for score in rng.integers(1, 6, 2))
    about = {"expected": float(rng.uniform(1, 5)), "entropy": float(rng.uniform(0, 1.6))}
    judgements = [
        a_judgement("execution", first, **about, oracle=float(rng.random()) if oracle else None),
        a_judgement("quality", None if failed else (5, second, 5), entropy=float(rng.uniform(0, 1.6))),
    ]
    if image == 0:
        judgements[0]["reason"] = f"I see {HOSTILE}"
    return {
        "set": tag,
        "epoch": epoch,
        "image": image,
        "prompt": f"{HOSTILE} {image}" if image == 0 else f"prompt {image} of {tag}",
        "requirement": HOSTILE if image == 0 else "",
        "sources": [f"sources/{image}.png"],
        "reward": None if failed else float(rng.random()),
        "judgements": judgements,
    }


def write_run(workdir: Path, *, oracle: bool = True, size: int = 64) -> list[dict]:
    """Metrics, grids, and kept pictures of evaluations and training. Returns the records of all that are kept."""
    rng, kept = np.random.default_rng(0), []
    (workdir / "images").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({"job": "rl", "model": HOSTILE, "train": {"epochs": 4}}))
    lines = []
    for epoch in range(5):
        line = {"step": 5 * epoch, "epoch": epoch, "time": 1e9 + epoch, "time/wall": 1.0, "time/critic": 0.5}
        if epoch:
            line |= {"reward/mean": 0.3 + epoch / 10, "reward/execution": 0.4, "policy/kl": 0.01 * epoch}
            line |= {"policy/old_deviation": 0.001, "critic/failure_rate": 0.1, "critic/status/no_score": 2}
        if epoch in EVALUATED:
            line |= {"eval/reward": 0.3 + epoch / 9, "eval/oracle_edit": 0.5, "eval/oracle_edit_se": 0.0123}
            image_grid(np.full((4, 16, 16, 3), 0.5), ["x"] * 4, 4, workdir / "images" / f"eval_{epoch:05d}.png")
        lines.append(json.dumps(line) + "\n")
    (workdir / "metrics.jsonl").write_text("".join(lines))
    for tag, epochs in (("eval", EVALUATED), ("train", TRAINED)):
        for epoch in epochs:
            records = [a_record(rng, tag, epoch, image, oracle=oracle) for image in range(IMAGES)]
            for image, reason in gallery.choose(records, rng, same=tag == "eval").items():
                record = records[image] | {"kept": reason}
                source = Image.new("RGB", (size, size), (image, 0, 0))
                picture = Image.new("RGB", (size, size), colour(record))
                gallery.write(workdir / "images" / gallery.FOLDER, picture, [source], record)
                kept.append(record)
    return kept
