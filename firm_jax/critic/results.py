"""The file that a scoring writes its judgements to, which the same scoring started again goes on with."""

import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from firm_jax import storage
from firm_jax.errors import ConfigError, DataError, WorkdirError
from firm_jax.metrics import JsonLines


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
            raise WorkdirError(f"cannot make the folder of {self.out}: {error}. Name another.") from error
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
                    "--out or --workdir."
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
                f"{self.out} was begun with another {', '.join(differing)}. Go on with the same, or name another --out "
                "or --workdir."
            )

    def resume(self, candidates: Sequence, criteria: int) -> int:
        """The item to go on from: what whole batches have not left on the disk is cut off.

        criteria: the records of an item, at least.

        Raises DataError when a picture that is judged already is no longer there, or no longer the same.
        """
        lines = {log: list(_lines(log.path)) for log in (self._records, self._refused)}
        complete = Counter(record["item"] for record, _ in lines[self._records])
        finished = {item for item, count in complete.items() if count >= criteria}
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
                    "another --out or --workdir."
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
