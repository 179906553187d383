"""Judge pictures that exist, with the critic and the rubrics that a training run uses.

The input is a .jsonl file with a line for each picture, {"image": "1.png", "prompt": "a red circle"}, for edits with
"source" besides, the path of the picture that was edited; or a folder of pictures, with --prompts. Paths are relative
to the file that names them. One line is written for each picture and criterion, as in a run's judgements.jsonl. The
same command started again goes on where it was stopped; beside FILE.jsonl it keeps FILE.run.json, what was asked, and
FILE.quarantine.jsonl, the pictures that could not be judged and why.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from firm_jax.commands.critics import add_critic_arguments, given_dtype, load_critic, positive
from firm_jax.critic import Critic
from firm_jax.critic.processing import Sequence as Prompt
from firm_jax.critic.results import Results
from firm_jax.critic.rubric import RUBRICS
from firm_jax.critic.score import rubric_of, served_rubrics
from firm_jax.data.candidates import Candidate, read_candidates
from firm_jax.data.records import QuarantinedRecord
from firm_jax.errors import DataError
from firm_jax.interop.hub import identity, resolve
from firm_jax.rl.rewards import resolve_reward
from firm_jax.rl.rollout import recorded, scores

REWARDS = {"gen": "qma", "edit": "cme"}
SCALE = range(1, 6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_critic_arguments(parser, max_new_tokens=512)
    parser.add_argument(
        "--task",
        required=True,
        choices=REWARDS,
        help="gen: instruction and quality, QMA; edit: execution and consistency, CME",
    )
    parser.add_argument("--input", required=True, type=Path, metavar="PATH", help="a .jsonl file, or a folder")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="for a folder: .txt, .json or .jsonl, in its order"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl", help="where the judgements go")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="answers at once (%(default)s)")


def run(arguments) -> int:
    """Judge what is not judged yet, then print what all of it came to."""
    reward = resolve_reward(REWARDS[arguments.task])
    candidates, listed = read_candidates(arguments.input, arguments.prompts, edits=arguments.task == "edit")
    if all(isinstance(one, QuarantinedRecord) for one in candidates):
        raise DataError(f"{arguments.input}: nothing to judge{_first_reason(candidates)}. Give a file with pictures.")
    folder = resolve(arguments.critic)
    rubrics = served_rubrics(folder, arguments.rubrics)
    asked = {
        "task": arguments.task,
        "input": listed,
        "critic": identity(folder),
        "rubrics": {name: rubric_of(rubrics, RUBRICS[name]).sha256 for name in reward.criteria},
        "dtype": given_dtype(arguments),
        "max_new_tokens": arguments.max_new_tokens,
        # Pictures that are judged together: another number gives the same scores, to rounding.
        "together": max(1, arguments.batch_size // len(reward.criteria)),
    }
    with Results(arguments.out, asked) as results:
        done = results.resume(candidates, len(reward.criteria))
        if done < len(candidates):
            judge = _Judge(load_critic(arguments, arguments.batch_size), reward, arguments.max_new_tokens)
            _judge_all(judge, candidates, done, asked["together"], results)
        print(summary(results.judgements(), results.quarantined(), reward, results))
    return 0


def _judge_all(judge: "_Judge", candidates: Sequence, done: int, together: int, results: "Results") -> None:
    """Every batch from item `done` on; the next one's pictures are read while one is judged."""
    bar = tqdm(total=len(candidates), initial=done, desc="judged", unit="picture", disable=not sys.stderr.isatty())
    with ThreadPoolExecutor() as pool, bar:
        try:
            following = judge.read(pool, candidates, done, together)
            for start in range(done, len(candidates), together):
                batch, following = following, judge.read(pool, candidates, start + together, together)
                results.append(*judge(batch))
                bar.update(len(batch))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _first_reason(candidates: Sequence[QuarantinedRecord]) -> str:
    return f"; the first of {len(candidates)} records: {candidates[0].reason}" if candidates else ""


class _Judge:
    """Judges candidates a batch at a time, by every criterion of a reward."""

    def __init__(self, critic: Critic, reward, max_new_tokens: int):
        self.critic, self.reward, self.max_new_tokens = critic, reward, max_new_tokens

    def read(self, pool, candidates: Sequence, start: int, count: int) -> list[tuple[int, object, Future]]:
        """Item, candidate and its prompts to come, of up to `count` items from `start` on."""
        patched: dict = {}
        items = enumerate(candidates[start : start + count], start)
        return [(item, candidate, pool.submit(self._prompts, candidate, patched)) for item, candidate in items]

    def _prompts(self, candidate, patched: dict) -> tuple[list[Prompt], list[str]] | str:
        """A prompt for each criterion and the hashes of the pictures, or the reason why there are none."""
        if isinstance(candidate, QuarantinedRecord):
            return candidate.reason
        asked = candidate.asked
        try:
            images, hashes = zip(*(picture.open() for picture in candidate.pictures), strict=True)
            request = {"images": images, "prompt": asked.text, "requirement": asked.requirement}
            prompts = [
                self.critic.prompt(
                    request | {"criterion": RUBRICS[criterion]}, self.max_new_tokens, name="it", patched=patched
                )
                for criterion in self.reward.criteria
            ]
        except DataError as error:
            return str(error)
        return prompts, list(hashes)

    def __call__(self, batch: list[tuple[int, object, Future]]) -> tuple[list[dict], list[dict]]:
        """The records of a batch, and those of what had to be set aside."""
        read, refused = [], []
        for item, candidate, future in batch:
            found = future.result()
            if isinstance(found, str):
                where = candidate if isinstance(candidate, QuarantinedRecord) else None
                file, line = (where.file, where.line) if where else (candidate.asked.source_file, candidate.asked.line)
                refused.append({"item": item, "file": file, "line": line, "reason": found})
            else:
                read.append((item, candidate, *found))
        if not read:
            return [], refused
        criteria = self.reward.criteria
        prompts = [one[place] for place in range(len(criteria)) for _, _, one, _ in read]
        written = iter(self.critic.decoder.generate(prompts, self.max_new_tokens))
        judged = {name: [self.critic.judgement(RUBRICS[name], next(written)) for _ in read] for name in criteria}
        found = {name: scores(judgements, "parsed") for name, judgements in judged.items()}
        rewards, _ = self.reward(
            {name: values for name, (values, _) in found.items()}, {name: exist for name, (_, exist) in found.items()}
        )
        rewards = np.asarray(rewards)
        return [
            _asked(item, candidate, hashes) | recorded(name, judged[name][row], rewards[row])
            for row, (item, candidate, _, hashes) in enumerate(read)
            for name in criteria
        ], refused


def _asked(item: int, candidate: Candidate, hashes: list[str]) -> dict:
    """What a record says besides the judgement."""
    asked = candidate.asked
    return {
        "item": item,
        **({"id": asked.metadata["id"]} if "id" in asked.metadata else {}),
        "image": candidate.image.path,
        **({"sources": [source.path for source in candidate.sources]} if candidate.sources else {}),
        "sha256": hashes,
        "prompt": asked.text,
        **({"requirement": asked.requirement} if asked.requirement else {}),
    }


def summary(records: Iterator[dict], quarantined: int, reward, results: Results) -> str:
    """The table that ends the command: scores by criterion, why there are none, and the reward."""
    counts = {name: Counter() for name in reward.criteria}
    expected: dict[str, list[float]] = {name: [] for name in reward.criteria}
    failed = {name: Counter() for name in reward.criteria}
    rewards, pictures = [], set()
    for record in records:
        name = record["criterion"]
        if record["score"] is None:
            failed[name][record["status"]] += 1
        else:
            counts[name][int(np.min(record["score"]))] += 1
            expected[name] += [] if record["expected"] is None else [record["expected"]]
        if record["item"] not in pictures:
            pictures.add(record["item"])
            rewards += [] if record["reward"] is None else [record["reward"]]
    lines = [
        "",
        f"{'criterion':12s} judged   mean  expected" + "".join(f"{score:6d}" for score in SCALE) + "  no score",
    ]
    for name in reward.criteria:
        total = counts[name].total()
        mean = sum(score * count for score, count in counts[name].items()) / total if total else math.nan
        of_expected = np.mean(expected[name]) if expected[name] else math.nan
        numbers = "".join(f"{counts[name][score]:6d}" for score in SCALE)
        reasons = ", ".join(f"{status} {count}" for status, count in sorted(failed[name].items()))
        lines.append(f"{name:12s} {total:6d} {mean:6.3f} {of_expected:9.3f}{numbers}  {reasons or '0'}")
    mean, error = f"{np.mean(rewards):.3f}" if rewards else "none", ""
    if len(rewards) > 1:
        error = f", standard error {np.std(rewards, ddof=1) / math.sqrt(len(rewards)):.3f}"
    lines += ["", f"reward {reward.name}: mean {mean}{error}, {len(rewards)} of {len(pictures)} pictures"]
    if quarantined:
        lines.append(f"{quarantined} not judged, with the reasons in {results.quarantine_file}")
    return "\n".join(lines)
