"""Judge pictures that exist, with the critic and the rubrics that a training run uses.

The input is a .jsonl file with a line for each picture, {"image": "1.png", "prompt": "a red circle"}, for edits with
"source" besides, the path of the picture that was edited; or a folder of pictures, with --prompts. Paths are relative
to the file that names them. One line is written for each picture and criterion, as in a run's judgements.jsonl. The
same command started again goes on where it was stopped; beside FILE.jsonl it keeps FILE.run.json, what was asked, and
FILE.quarantine.jsonl, the pictures that could not be judged and why.
"""

import argparse
import fcntl
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from firm_jax import storage
from firm_jax.commands.critics import add_critic_arguments, given_dtype, load_critic, positive
from firm_jax.critic import Critic
from firm_jax.critic.processing import Sequence as Prompt
from firm_jax.critic.rubric import RUBRICS
from firm_jax.critic.score import rubric_of, served_rubrics
from firm_jax.data.candidates import Candidate, read_candidates
from firm_jax.data.records import QuarantinedRecord
from firm_jax.errors import ConfigError, DataError, WorkdirError
from firm_jax.interop.hub import identity, resolve
from firm_jax.metrics import JsonLines
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


class Results:
    """The files of one scoring, as a context manager: judgements, what was set aside, and what had been asked.

    asked: what must be the same when the scoring is continued. Raises WorkdirError when the files cannot be written or
    another process is writing them, ConfigError when they are of another scoring.
    """

    def __init__(self, out: Path, asked: dict):
        if out.suffix != ".jsonl":
            raise ConfigError(f"--out is {out}; name it with the ending .jsonl")
        self.out, self.asked = out, asked
        self.run_file, self.quarantine_file = out.with_suffix(".run.json"), out.with_suffix(".quarantine.jsonl")

    def __enter__(self) -> "Results":
        try:
            storage.make_folder(self.out.absolute().parent)
        except OSError as error:
            raise WorkdirError(f"cannot make the folder of {self.out}: {error}. Name another --out.") from error
        self._records = JsonLines(self.out)
        self._lock = self.out.open("rb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkdirError(f"{self.out} is being written by another process. Wait for it, or stop it.") from error
        self._refused = JsonLines(self.quarantine_file)
        self._check_asked()
        return self

    def __exit__(self, *error) -> None:
        self._records.close()
        self._refused.close()
        self._lock.close()
        if self.quarantine_file.stat().st_size == 0:
            self.quarantine_file.unlink()

    def _check_asked(self) -> None:
        if not self.run_file.exists():
            if self._records.length:
                raise ConfigError(
                    f"{self.out} exists, and there is no {self.run_file.name} that says what it holds. Name another "
                    "--out."
                )
            try:
                storage.replace(self.run_file, json.dumps(self.asked, indent=2) + "\n")
            except OSError as error:
                raise WorkdirError(f"cannot write {self.run_file}: {error}. Free some space there.") from error
            return
        try:
            before = json.loads(self.run_file.read_text())
        except ValueError as error:
            raise ConfigError(f"{self.run_file} is damaged. Remove it together with {self.out.name}.") from error
        if differing := [name for name in self.asked if before.get(name) != self.asked[name]]:
            raise ConfigError(
                f"{self.out} was begun with another {', '.join(differing)}. Go on with the same, or name another --out."
            )

    def resume(self, candidates: Sequence, criteria: int) -> int:
        """The item to go on from: what whole batches have not left on the disk is cut off.

        Raises DataError when a picture that is judged already is no longer there, or no longer the same.
        """
        lines = {log: list(_lines(log.path)) for log in (self._records, self._refused)}
        complete = Counter(record["item"] for record, _ in lines[self._records])
        finished = {item for item, count in complete.items() if count == criteria}
        finished |= {record["item"] for record, _ in lines[self._refused]}
        done = next((item for item in range(len(candidates)) if item not in finished), len(candidates))
        if done < len(candidates):
            done -= done % self.asked["together"]
        for log, found in lines.items():
            log.rewind(max((end for record, end in found if record["item"] < done), default=0))
        judged = [record for record, _ in lines[self._records] if record["item"] < done]
        for record in judged[::criteria]:
            if record["sha256"] != [picture.sha256() for picture in candidates[record["item"]].pictures]:
                raise DataError(
                    f"{record['image']!r} or its sources have changed since they were judged. Restore them, or name "
                    "another --out."
                )
        return done

    def append(self, records: list[dict], refused: list[dict]) -> None:
        """Write what a batch came to."""
        for log, lines in ((self._refused, refused), (self._records, records)):
            for line in lines:
                log.append(line)

    def judgements(self) -> Iterator[dict]:
        """Every record written so far."""
        return (record for record, _ in _lines(self.out))

    def quarantined(self) -> int:
        """How many pictures were set aside."""
        return sum(1 for _ in _lines(self.quarantine_file))


def _lines(path: Path) -> Iterator[tuple[dict, int]]:
    """The whole lines of a file, and the byte at which each ends; what a crash has left behind them is passed over."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                yield json.loads(line), end
            except ValueError as error:
                raise DataError(f"{path}: the line that ends at byte {end} is damaged. Remove the file.") from error


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
