"""Which judged pictures of an epoch or an evaluation are kept for people, with what the critic said of them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from firm_jax import gallery, storage
from firm_jax.critic import Judgement
from firm_jax.data.edits import EditRecord
from firm_jax.data.images import from_array
from firm_jax.data.prompts import PromptRecord
from firm_jax.rl.rollout import recorded, scores
from firm_jax.run import Run


def keep(
    run: Run,
    tag: str,
    epoch: int,
    prompts: Sequence[PromptRecord],
    sources: Sequence[Sequence[np.ndarray]],
    images: np.ndarray,
    judged: dict[str, list[Judgement]],
    rewards: np.ndarray,
    truth: dict[str, np.ndarray],
    kind: str,
) -> dict[int, str]:
    """Keep some of M judged images in the run's folder. On every process but the first it does nothing.

    Args:
        tag: "train" or "eval"; the images of evaluations are of the same prompts and noise every time.
        epoch: Epochs done.
        prompts, sources, images: What was drawn, from what, and what came out, [M] each.
        judged: Criterion -> [M] judgements.
        rewards: [M], NaN where there is none.
        truth: Criterion -> [M] on [0, 1], for the criteria that an oracle knows about.
        kind: Which score the reward takes, as for `scores`.

    Returns:
        Image -> its file, as seen from the run's folder.
    """
    if not run.is_main:
        return {}
    values = {name: scores(judgements, kind)[0] for name, judgements in judged.items()}

    def judgement(name: str, index: int) -> dict:
        own = recorded(name, judged[name][index], rewards[index])
        del own["reward"]
        known = truth[name][index] if name in truth else np.nan
        return own | {"value": _number(values[name][index]), "oracle": _number(known)}

    records = [
        {
            "set": tag,
            "epoch": epoch,
            "image": index,
            "prompt": prompt.text,
            "requirement": prompt.requirement,
            "sources": [image.name for image in prompt.images] if isinstance(prompt, EditRecord) else [],
            "reward": _number(rewards[index]),
            "judgements": [judgement(name, index) for name in judged],
        }
        for index, prompt in enumerate(prompts)
    ]
    folder, files = run.images_folder / gallery.FOLDER, {}
    chosen = gallery.choose(records, np.random.default_rng(epoch), same=tag == "eval")
    with storage.limited(f"writing in {folder}"):
        for index, reason in sorted(chosen.items()):
            before = [Image.fromarray(source) for source in sources[index]]
            picture = from_array(np.nan_to_num(images[index]))
            name = gallery.write(folder, picture, before, records[index] | {"kept": reason})
            files[index] = f"{run.images_folder.name}/{folder.name}/{name}"
    return files


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
