"""The stages over records on Ray Data, for more machines than one: many workers, one ledger, each call paid once.

`RayEngine` runs the same stages as `engine.Engine`: each worker of a Ray Data `map_batches` is an actor with an Engine
of its own, which reads pictures, asks teachers and reads answers. Only the ledger is elsewhere: one actor, `Books`,
holds the SQLite file, on the machine from which the run was started, and every worker asks it before it asks a teacher.

Why one ledger, and not one for each worker: calls are named by content, and records share calls (the notes on a pair of
images serve all its instructions). Ledgers by record would pay for such calls once in each; a budget would have to be
dealt out, and run dry in one ledger while another has some left; and with another number of workers answers would lie
where nobody looks for them. One file needs none of that, it is the embedded engine's own, and either engine continues
what the other began. It is no bottleneck: a call takes seconds at the teacher, and 0.8 to 3.3 ms of the ledger on an
idle and on a busy disk, nearly all of it the write that is forced to the disk.

What happens when something dies:

- A worker. Ray starts it anew and gives it its records again. When it comes back, what it had on its way is settled as
  lost, at the most that it may have cost, and its questions are free for others. What it had settled is known.
- The driver, or the machine with the ledger. Ray ends all workers with it. The ledger stays as after any kill; the same
  command goes on. Ray takes some seconds to end what is left, in which the ledger counts as in use.
- A machine that was only cut off. Its workers have been started elsewhere meanwhile, and the books no longer know the
  old ones: they can neither ask nor settle.

The package and the images must be at the same path on all machines, and the teacher's key in their environment.
"""

import asyncio
import collections
import contextlib
import logging
import signal
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from firm_jax.critic.questions import UNREACHABLE
from firm_jax.curation.engine import Engine, StopAsked, check_stages
from firm_jax.curation.ledger import Answered, Budget, Cost, Ledger, Totals
from firm_jax.curation.stage import Outcome, Record, Stage
from firm_jax.curation.teacher import Pace, Teacher, TeacherSettings
from firm_jax.errors import ConfigError, DataError, FirmError, WorkdirError

try:
    import ray
    import ray.data
    from ray.exceptions import RayActorError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise ImportError(f"curation on a cluster needs {error.name}: pip install -e '.[ray]'", name=error.name) from error

BLOCKS = 4  # at once in a worker, so that the last records of one do not hold up all


class RayEngine:
    """As Engine, with workers on a Ray cluster: the one that Ray is connected to, or else this machine.

    teachers: by role, what makes the teacher, in each worker; the same maker for two roles makes one. ledger: the file,
    which nobody else may have open during `run`. workers: actors, of a CPU each, and no more than the cluster has CPUs.
    concurrency: records in work at once in each worker. missing, answered: as Engine's. Raises ConfigError as Engine
    does.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        teachers: Mapping[str, Callable[[], Teacher]],
        ledger,
        root,
        *,
        budget: Budget | None = None,
        workers: int = 4,
        concurrency: int = 64,
    ):
        if workers < 1 or concurrency < 1:
            raise ConfigError(f"{workers} workers with {concurrency} records each; give 1 or more of both")
        check_stages(stages, teachers)
        self.stages, self.teachers, self.root = tuple(stages), dict(teachers), str(Path(root).absolute())
        self.ledger, self.budget = Path(ledger).absolute(), budget
        self.workers, self.concurrency = workers, concurrency
        self.missing: collections.Counter[tuple[str, str]] = collections.Counter()
        self.answered: collections.Counter[str] = collections.Counter()
        self._books: Any = None  # during `run`
        self._stopped: StopAsked | None = None

    async def run(self, records: Iterable[Record]) -> AsyncIterator[Outcome]:
        """The outcome of each record, in order. What is asked of a teacher twice is asked once.

        Raises as `Engine.run` does, when what was on its way in all workers has been answered and kept.
        """
        records = list(records)
        if not records:
            return
        if not ray.is_initialized():
            _connect()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Whoever waits for another's answer holds one of the actor's turns.
        turns = 4 * self.workers * self.concurrency + 1000
        books = ray.remote(Books).options(num_cpus=0, scheduling_strategy=here, max_concurrency=turns).remote()
        rows, self._books = None, books
        try:
            await _told(books.open.remote(str(self.ledger), self.budget))
            if self._stopped:
                raise self._stopped
            rows = iter(self._data(records, books).iter_rows())
            while (row := await asyncio.to_thread(next, rows, None)) is not None:
                outcome = row["outcome"]
                if isinstance(outcome, FirmError):
                    # What is on its way is paid for: let it be answered. Nothing more is begun.
                    await asyncio.to_thread(collections.deque, rows, 0)
                    raise outcome
                for name, missing in outcome.missing.items():
                    self.missing[name, missing.status] += 1
                self.answered.update(outcome.answers.keys())
                yield outcome
        finally:
            del rows  # ends the workers
            self._books = None
            with contextlib.suppress(RayActorError):  # it has ended already
                await books.close.remote()
            ray.kill(books)

    def stop(self) -> None:
        """From now on no worker asks anything; a run under way ends early or raises StopAsked."""
        self._stopped = self._stopped or StopAsked()
        if self._books is not None:
            self._books.stop.remote(self._stopped)

    async def totals(self) -> Totals:
        """What the ledger has come to; during `run`."""
        return await _told(self._books.totals.remote())

    def _data(self, records: list[Record], books) -> "ray.data.Dataset":
        blocks = min(BLOCKS, self.concurrency)
        size = self.concurrency // blocks
        data = ray.data.from_items([{"record": one} for one in records], override_num_blocks=-(-len(records) // size))
        data.context.execution_options.preserve_order = True
        data.context.enable_progress_bars = False
        # Ray would wait without end for more of them than there are CPUs.
        workers = min(self.workers, max(1, int(ray.cluster_resources().get("CPU", 1))))
        if workers < self.workers:
            logging.warning("the cluster has CPUs for %d of %d workers; the others are left out", workers, self.workers)
        return data.map_batches(
            _Worker,
            fn_constructor_args=(self.stages, self.teachers, books, self.root),
            batch_size=None,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(
                size=workers, max_concurrent_calls_per_actor=blocks, max_tasks_in_flight_per_actor=2 * blocks
            ),
            num_cpus=1,
        )


class Books:
    """The ledger of a run, as an actor: what all workers ask before they ask a teacher.

    A worker is named by its actor's id, which it keeps when it is started anew, and by its life, which it does not.
    """

    def __init__(self):
        self._ledger: Ledger | None = None
        self._lives: dict[str, str] = {}
        self._claims: dict[str, tuple[str, asyncio.Future]] = {}  # by key: whose it is, and what was replied
        self._sent: dict[str, str] = {}  # by key: whose try is on its way
        self._paces: dict[TeacherSettings, Pace] = {}
        self._stopped: FirmError | None = None

    async def open(self, path: str, budget: Budget | None) -> None:
        """Raises as Ledger does. Here, for the ledger must be used in the thread that opens it."""
        self._ledger = Ledger(path, budget)

    async def close(self) -> None:
        if self._ledger:
            self._ledger.close()
            self._ledger = None

    async def enter(self, worker: str, life: str) -> None:
        """A worker begins a life. What it had begun in an earlier one is over."""
        self._lives[worker] = life
        for key in [key for key, owner in self._sent.items() if owner == worker]:
            del self._sent[key]
            self._ledger.settle(key, None, outcome=UNREACHABLE, done=False, reason="the worker that asked has died")
        for key in [key for key, (owner, _) in self._claims.items() if owner == worker]:
            self._free(key, None)

    async def claim(self, worker: str, life: str, key: str) -> Answered | None:
        """The answer to a call; None where the worker is to get it, and then to `release` the call.

        Waits while another worker is at it. Raises what ended the run.
        """
        while True:
            self._check(worker, life)
            if isinstance(self._stopped, StopAsked):  # nothing more is of interest, known or not
                raise self._stopped
            if found := self._ledger.answered(key):
                return found
            if self._stopped:
                raise self._stopped
            if key not in self._claims:
                self._claims[key] = (worker, asyncio.get_running_loop().create_future())
                return None
            if reply := await asyncio.shield(self._claims[key][1]):
                return reply

    async def release(self, worker: str, life: str, key: str, reply: Answered | None) -> None:
        """The worker is through with a call that it had claimed. None: there is no reply."""
        self._check(worker, life)
        self._free(key, reply)

    async def begin(self, worker: str, life: str, key: str, stage: str, model: str, most: Cost) -> None:
        self._check(worker, life)
        self._ledger.begin(key, stage=stage, model=model, most=most)
        self._sent[key] = worker

    async def settle(self, worker: str, life: str, key: str, cost: Cost | None, said: dict) -> None:
        self._check(worker, life)
        self._ledger.settle(key, cost, **said)
        del self._sent[key]

    async def take(self, settings: TeacherSettings, tokens: int) -> int:
        """As Pace: the limits of a teacher are those of all workers together."""
        pace = self._paces.setdefault(settings, Pace(settings.requests_per_minute, settings.tokens_per_minute))
        return await pace.take(tokens)

    async def correct(self, settings: TeacherSettings, number: int, tokens: int) -> None:
        self._paces[settings].correct(number, tokens)

    async def stop(self, error: FirmError) -> None:
        """No call is begun any more that is not known; after StopAsked nothing is told either."""
        self._stopped = self._stopped or error

    async def totals(self) -> Totals:
        return self._ledger.totals()

    def _free(self, key: str, reply: Answered | None) -> None:
        self._claims.pop(key)[1].set_result(reply)

    def _check(self, worker: str, life: str) -> None:
        if self._ledger is None or self._lives.get(worker) != life:
            raise WorkdirError(f"the worker {worker} has been replaced, or the run is over: it must not ask any more")


class _Desk:
    """A worker's access to the books, in the place of an Engine's ledger.

    `begin` and `settle` hold up the worker's event loop for the milliseconds that they take: no request leaves before
    it is in the books, and no answer is used before.
    """

    def __init__(self, books):
        self.books = books
        self.me = (ray.get_runtime_context().get_actor_id(), uuid.uuid4().hex)

    def enter(self) -> None:
        _wait(self.books.enter.remote(*self.me))

    def answered(self, key: str) -> None:
        """Nothing: `claim` tells, for all who ask at once."""

    def begin(self, key: str, *, stage: str, model: str, most: Cost) -> None:
        _wait(self.books.begin.remote(*self.me, key, stage, model, most))

    def settle(self, key: str, cost: Cost | None, **said) -> None:
        _wait(self.books.settle.remote(*self.me, key, cost, said))


class _SharedPace:
    """A teacher's Pace, kept by the books."""

    def __init__(self, books, settings: TeacherSettings):
        self._books, self._settings = books, settings

    async def take(self, tokens: int) -> int:
        return await _told(self._books.take.remote(self._settings, tokens))

    def correct(self, number: int, tokens: int) -> None:
        self._books.correct.remote(self._settings, number, tokens)


class _Clerk(Engine):
    """An Engine among several: a call is claimed before it is asked."""

    async def _ask(self, teacher: Teacher, key: str, *asked) -> Answered:
        desk: Any = self.ledger
        if found := await _told(desk.books.claim.remote(*desk.me, key)):
            return found
        reply = None
        try:
            reply = await super()._ask(teacher, key, *asked)
            return reply
        finally:
            await _told(desk.books.release.remote(*desk.me, key, reply))


class _Worker:
    """What Ray Data maps blocks of records with: rows of records become rows of outcomes, or of what ended the run."""

    def __init__(self, stages, makers: Mapping[str, Callable[[], Teacher]], books, root: str):
        self._books, self._ended = books, None
        try:
            if not Path(root).is_dir():
                raise DataError(
                    f"the data's folder {root} is not there on {ray.util.get_node_ip_address()}. Put it on storage "
                    "that all machines of the cluster have at the same path."
                )
            made = {make: make() for make in dict.fromkeys(makers.values())}
            for teacher in made.values():
                if teacher.settings.requests_per_minute or teacher.settings.tokens_per_minute:
                    teacher.pace = _SharedPace(books, teacher.settings)
            desk = _Desk(books)
            desk.enter()
            self._engine = _Clerk(stages, {role: made[make] for role, make in makers.items()}, desk, root)
        except FirmError as error:
            self._ended = error
            books.stop.remote(error)

    async def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = np.empty(len(rows["record"]), object)
        found[:] = await asyncio.gather(*map(self._outcome, rows["record"]))
        return {"outcome": found}

    async def _outcome(self, record: Record) -> Outcome | FirmError:
        if self._ended is None:
            try:
                return await self._engine.outcome(record)
            except FirmError as error:
                self._ended = error
                self._books.stop.remote(error)
        return self._ended


def _connect() -> None:
    """Connect to the cluster that Ray's environment names, or start one of this machine alone.

    `ray.init` puts a handler of its own in the place of ours, by which SIGTERM would end the run where it is.
    """
    former = signal.getsignal(signal.SIGTERM)
    ray.init()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, former)


def _wait(reference) -> Any:
    """What an actor's method returns. Raises what it raises, as it was raised there."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
    except RayActorError as error:
        raise _gone() from error


async def _told(reference) -> Any:
    """As `_wait`, while others go on."""
    try:
        return await reference
    except RayTaskError as error:
        raise error.cause from error
    except RayActorError as error:
        raise _gone() from error


def _gone() -> WorkdirError:
    return WorkdirError(
        "the process that keeps the ledger has ended. What was answered is kept: start the same command again, and see "
        "Ray's logs if it ends again."
    )
