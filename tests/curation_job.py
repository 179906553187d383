"""A curation that is killed again and again, until it has ended; then the same once more, in peace.

    python curation_job.py FOLDER KILLS SEED

Imports once and forks a process for every life, so that a life is about curation and not about imports. What the
teacher bills, a line a request, is in FOLDER/bills, written whatever happens to us.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import curation_world as world

from firm_jax.curation import difference_first, plan_then_score
from firm_jax.curation.ledger import Ledger

RECORDS = 40  # so much that there is work for every life, however many requests it makes before it is killed


def play(bills: Path):
    """The wise teacher, which now and then is busy or answers not in the form that was asked for.

    It is busy at most once for a question: one that is busy for all of a question's tries has not answered it, in a
    curation that nobody kills as in one that is killed, and the two tables would differ by that chance.
    """
    busy = set()

    def answer(number, text, pictures):
        name = f"{hash(text) & 0xFFFFFFFF:x}-{sum(int(one.sum()) for one in pictures)}"
        if random.random() < 0.1 and name not in busy:
            busy.add(name)
            return 429
        with open(bills, "a") as out:
            out.write(name + "\n")
        if text.startswith("The answer below"):
            return text.split("START OF ANSWER\n")[1].split("\nEND OF ANSWER")[0].replace("|", "")
        right = world.wise(number, text, pictures)
        return right.replace("score", "|score") if hash(text) % 4 == 0 and "NOTES" in text else right

    return answer


def curate(folder: Path, ledger: Path, bills: Path) -> list:
    book = Ledger(ledger)
    found = []
    for stages, records in (
        (plan_then_score.stages(world.RUBRICS["alignment"]), world.records(folder, RECORDS)),
        (difference_first.stages(world.RUBRICS), world.records(folder, RECORDS, images=2)),
    ):
        engine, _ = world.engine(stages, book, folder, play(bills), after=0.01, concurrency=8)
        for outcome in asyncio.run(world.collect(engine, records)):
            answers = {name: getattr(one, "text", one) for name, one in outcome.answers.items()}
            found.append([outcome.record.id, answers, {name: one.status for name, one in outcome.missing.items()}])
    book.close()
    return found


def life(folder: Path, ledger: Path, bills: Path, out: Path) -> int:
    """A child that curates; its process id."""
    if child := os.fork():
        return child
    try:
        random.seed()
        out.write_text(json.dumps(curate(folder, ledger, bills)))
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def alive(child: int) -> bool:
    """Whether a child is still at work; one that is not stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def main(folder: Path, kills: int, seed: int) -> None:
    draw, done = random.Random(seed), 0
    world.records(folder, RECORDS, images=2)
    while True:
        child = life(folder, folder / "calls.sqlite", folder / "bills", folder / "killed.json")
        if done < kills:
            more = draw.randint(0, 40 // kills)  # requests that it may make, and then some
            until = lines(folder / "bills") + more
            while lines(folder / "bills") < until and alive(child):
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)  # nothing happens to one that has ended
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        if status != -signal.SIGKILL:
            sys.exit("a life ended in an error")
        done += 1
    child = life(folder, folder / "straight.sqlite", folder / "other bills", folder / "straight.json")
    print(done, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
