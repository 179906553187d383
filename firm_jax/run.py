"""The harness that every trainer runs in: its folder, its checkpoints, its metrics, its signals.

A trainer is its step and its data; the rest is here:

    with Run(config, workdir) as run:
        state, done, data = init(...), 0, sampler.state()
        if restored := run.restore(state):
            state, done, data = restored.state, restored.epoch, restored.data
        for epoch in run.loop(done, config.train.epochs):
            with run.timer("update"):
                state, metrics = update(state, next(batches))
            run.log(step, epoch + 1, metrics)
            run.safe_point(state, data, step=step, epoch=epoch + 1)
"""

import contextlib
import json
import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from tqdm import tqdm

from firm_jax import gallery, storage
from firm_jax.checkpoint import Checkpointer
from firm_jax.errors import CheckpointError, ConfigError, FirmError, WorkdirError
from firm_jax.metrics import JsonLines, MetricWriter, headline
from firm_jax.processes import ProcessWatch
from firm_jax.profiling import PhaseTimers, ProfileWindow
from firm_jax.report import image_grid, write_report
from firm_jax.signals import StopSignals
from firm_jax.workdir import WorkdirLock, check_same_config, plain_config, prepare_workdir

# EX_TEMPFAIL: stopped on request with everything saved; the same command continues the run.
STOPPED_EXIT_CODE = 75

REFUSED = -1  # in place of a start's number: the folder is another run's


def due(every: float, epoch: float, before: float) -> bool:
    """Whether a multiple of `every` epochs lies after `before` and not after `epoch`; never for 0."""
    return every > 0 and math.floor(epoch / every + 1e-6) > math.floor(before / every + 1e-6)


class Stopped(Exception):
    """SIGTERM or SIGINT was seen and what there is to save is saved. `main.py` ends with STOPPED_EXIT_CODE."""


@dataclass(frozen=True)
class Restored:
    """What a run continues from.

    Attributes:
        state: The pytree that was saved.
        data: The JSON object that the data pipeline gave at saving.
        step: Optimizer updates done.
        epoch: Epochs done, a fraction within one; the next one has this number, counted from 0.
    """

    state: Any
    data: Any
    step: int
    epoch: float


class Run:
    """One run in one folder, as a context manager.

    Reads of the config: `train.epochs`, `checkpoint.every` (epochs), `checkpoint.keep`, `profile.{start,steps}`.

    Args:
        config: The resolved `ml_collections.ConfigDict`; kept in `config.json`.
        workdir: The run's folder. If it holds a checkpoint, `restore` continues it.
        base_weights: JSON that identifies the frozen weights under the trained ones (ids, hashes): a checkpoint made
            over other weights is refused.

    Raises (on entering):
        WorkdirError: The folder cannot be written, or another run holds it.
        ConfigError: A value that cannot be used, or a config that contradicts the checkpoint in the folder.

    Attributes:
        workdir: The run's folder, absolute.
        is_main: Whether this is the process that writes files.
    """

    def __init__(self, config: Any, workdir: str | Path, base_weights: dict[str, Any] | None = None):
        _check_values(config)
        self.config = config
        self.is_main = jax.process_index() == 0
        self.workdir = prepare_workdir(workdir)
        self.base_weights = base_weights or {}
        self.images_folder = self.workdir / "images"
        self._plain_config = plain_config(config)
        self._signals = StopSignals(self._on_signal)
        self._begun = False
        self._held: dict[str, Any] | None = None
        self._lengths_before: dict[str, int] | None = None
        self._ended: float = 0  # the epoch that ended last
        self._timers = PhaseTimers()
        self._beside: deque[Future] = deque()

    def __enter__(self) -> "Run":
        try:
            self._enter()
        except OSError as error:
            raise WorkdirError(
                f"cannot start in {self.workdir}: {error}. Make room there, or pass a --workdir that can be written to."
            ) from error
        return self

    def _enter(self) -> None:
        with contextlib.ExitStack() as stack:
            start = self._lock_folder(stack)
            self._watch = None
            if jax.process_count() > 1:
                processes = jax.process_index(), jax.process_count()
                self._watch = ProcessWatch(self.workdir / ".processes", *processes, run=start)
                self._watch.start()
                stack.push(lambda kind, error, traceback: self._watch.stop(error))
            self._checkpointer = Checkpointer(self.workdir / "checkpoints", self.config.checkpoint.keep)
            if saved := self._checkpointer.latest_meta():
                check_same_config(saved["config"], self._plain_config, self.workdir)
            self._metrics = MetricWriter(self.workdir, enabled=self.is_main)
            stack.callback(self._metrics.close)
            self._judgements = None
            if self.is_main:
                self._judgements = JsonLines(self.workdir / "judgements.jsonl")
                stack.callback(self._judgements.close)
                self.images_folder.mkdir(exist_ok=True)
                self._write_config()
            self._thread = stack.enter_context(ThreadPoolExecutor(1, "beside"))
            profile = self.config.profile
            self._profile = ProfileWindow(profile.start, profile.steps, self.workdir / "profile")
            stack.callback(self._profile.close)
            stack.enter_context(self._signals)
            self._stack = stack.pop_all()

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if self._watch is not None and error is not None and not isinstance(error, Stopped):
            self._watch.stop(error)  # from here on, this process tells its own story
        with self._stack:
            if self._watch is not None and isinstance(error, jax.errors.JaxRuntimeError):
                return  # a save under way may wait for a process that is gone
            try:
                self._wait_for_work_beside()
                self._checkpointer.wait()
                if self.is_main:
                    with storage.limited(f"writing the report in {self.workdir}"):
                        write_report(self.workdir)
            except (FirmError, OSError) as ending_error:
                if error is not None:  # the first failure is the one to show
                    logging.error("%s", ending_error)
                elif isinstance(ending_error, FirmError):
                    raise
                else:
                    raise WorkdirError(f"cannot write the report in {self.workdir}: {ending_error}") from ending_error

    # Checkpoints

    def restore(self, abstract_state: Any) -> Restored | None:
        """Continue from the newest whole checkpoint; None when the run starts from the beginning.

        The run's files are cut back to what the checkpoint covers, so that they end as if nothing had happened.

        Args:
            abstract_state: Pytree of arrays or `jax.ShapeDtypeStruct`s with the shardings to restore into.

        Raises:
            CheckpointError: Nothing whole is left, or it does not fit this run.
        """
        checkpoint = self._checkpointer.restore(abstract_state)
        if checkpoint is None:
            self._rewind({}, step=-1, epoch=-1)
            return None
        meta = checkpoint.meta
        check_same_config(meta["config"], self._plain_config, self.workdir)
        if meta["base_weights"] != self.base_weights:
            raise CheckpointError(
                f"checkpoint {checkpoint.step} was trained over the base weights {meta['base_weights']}, this run has "
                f"{self.base_weights}. Use those weights, or another --workdir."
            )
        if changed := [f"{k} {v} -> {_versions()[k]}" for k, v in meta["versions"].items() if v != _versions()[k]]:
            logging.warning("continuing on another system, bits may differ: %s", ", ".join(changed))
        self._rewind(meta["lengths"], checkpoint.step, meta["epoch"])
        self._ended = meta["epoch"]
        self.say(f"continuing from checkpoint {checkpoint.step} ({meta['epoch']:.4g} epochs done)")
        return Restored(checkpoint.state, checkpoint.data, meta["step"], meta["epoch"])

    def save(self, state: Any, data: Any = None, *, step: int, epoch: float) -> None:
        """Save in the background; the arrays of `state` may be donated as soon as this returns.

        Called within an iteration of `loop`, before its `safe_point`, it does not count what the iteration has written
        so far to metrics and judgements: the continued run does that iteration again.

        Args:
            state: Pytree of jax arrays: everything that the rest of the run depends on.
            data: JSON: where the data pipeline stands; or a function that returns it, for what is costly to have.
            step: Optimizer updates done; grows from save to save.
            epoch: Epochs done; a fraction within one.

        Raises:
            CheckpointError: This save cannot start or the previous one failed; earlier checkpoints are intact.
        """
        self._wait_for_work_beside()
        meta = {
            "step": int(step),
            "epoch": epoch if isinstance(epoch, float) else int(epoch),
            "config": self._plain_config,
            "base_weights": self.base_weights,
            "versions": _versions(),
            "lengths": self._lengths_before or self._lengths(),
        }
        with storage.limited(f"saving in {self.workdir}"):
            if self.is_main:
                self._metrics.sync()
                self._judgements.sync()
            self._checkpointer.save(int(step), state, data() if callable(data) else data, meta)

    def hold(self, state: Any, data: Any = None, *, step: int, epoch: int) -> None:
        """To be called first in an iteration: from here to its `safe_point` the run can go back to this, and be saved.

        It does where `progress` finds that it was asked to stop, so that a stop takes no longer than one part of a
        phase. The arrays must not be donated before the safe point.
        """
        self._held = {"state": state, "data": data, "step": step, "epoch": epoch}

    def save_held(self) -> None:
        """Save the run as it was when `hold` was called."""
        self.save(**self._held)

    def safe_point(self, state: Any, data: Any = None, *, step: int, epoch: float, epoch_ends: bool = True) -> None:
        """To be called where `state` and `data` are consistent: saves when it is time, stops when asked to.

        Time is every `checkpoint.every` epochs (0: never) and after the last one, where an epoch, or a part of it that
        the trainer tells of, ends (`epoch_ends`).

        Raises:
            Stopped: SIGTERM or SIGINT was seen; the state is saved.
            CheckpointError: As for `save`, or a save in the background has failed.
        """
        self._lengths_before = self._held = None
        save = stop = self.should_stop()
        if epoch_ends:
            save |= epoch == self.config.train.epochs or due(self.config.checkpoint.every, epoch, self._ended)
            self._ended = epoch
        if save:
            with self.timer("checkpoint"):
                self.save(state, data, step=step, epoch=epoch)
        if stop:
            self._checkpointer.wait()
            raise Stopped(
                f"stopped on request after {epoch:.4g} epochs, saved in {self.workdir}; the same command continues"
            )
        self._checkpointer.check()

    def should_stop(self) -> bool:
        """Whether SIGTERM or SIGINT has been seen, by any process: all get the same answer, and all have to ask."""
        if jax.process_count() == 1:
            return self._signals.seen
        return bool(multihost_utils.process_allgather(np.int32(self._signals.seen)).any())

    # Observability

    def loop(self, first: int, last: int) -> Iterator[int]:
        """Numbers first ... last - 1: the iterations that `profile.start` and `profile.steps` count."""
        self._begun = True
        for number in range(first, last):
            self._lengths_before = self._lengths()
            with self._profile.iteration(number):
                yield number
        self._lengths_before = None

    def timer(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """Time a phase of an iteration: `time/<phase>` in the next `log`, and a name in the profile."""
        return self._timers.measure(phase)

    def log(self, step: int, epoch: float, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write metrics (numbers, scalar arrays or None) with the phase times since the last call; print one line.

        Args:
            step: Optimizer updates done.
            epoch: Epochs done; a fraction within one.

        Returns:
            The metrics as plain Python numbers, None for what is unknown or not finite.
        """
        self._wait_for_work_beside()
        times = self._timers.report()
        with storage.limited(f"writing in {self.workdir}"):
            damaged = {"checkpoint/damaged": len(self._checkpointer.damaged())} if self.is_main else {}
            values = self._metrics.write(step, epoch, metrics | damaged | times)
        self.say(f"epoch {epoch:.6g}  step {step}  {headline(values)}  {times['time/wall']:.1f} s")
        return values

    def say(self, line: str) -> None:
        """Print a line, once however many processes there are, without tearing a bar."""
        if self.is_main:
            tqdm.write(line, file=sys.stderr)

    def progress(self, iterable: Iterable | None = None, description: str = "", total: int | None = None) -> tqdm:
        """A bar over a long phase. Where there is no terminal, a line every few seconds instead.

        Between two items the run can be stopped, if it has something to go back to (`hold`): every process has to go
        through the same number of them.
        """
        terminal = sys.stderr.isatty()
        return tqdm(
            iterable if iterable is None else self._interruptible(iterable),
            desc=description,
            total=len(iterable) if total is None and isinstance(iterable, Sized) else total,
            disable=not self.is_main,
            leave=not terminal,
            mininterval=0.1 if terminal else 5.0,
            delay=0 if terminal else 5.0,
            file=sys.stderr if terminal else _Lines(),
            dynamic_ncols=terminal,
        )

    def images(
        self, tag: str, images: Any, captions: Sequence[str], *, step: int, epoch: int, columns: int = 4
    ) -> Path:
        """Keep a grid of pictures with text under each: `images/<tag>_<epoch>.png`, and in TensorBoard.

        Args:
            images: float [N, H, W, 3] in [0, 1] or uint8, on every process the same.
            captions: N texts, such as the prompt and its score.

        Returns:
            The file's path.
        """
        path = self.images_folder / f"{tag.replace('/', '-')}_{epoch:05d}.png"
        if self.is_main:
            with storage.limited(f"writing {path}"):
                with storage.writing_whole(path):
                    grid = image_grid(images, captions, columns, path)
                self._metrics.image(tag, grid, step)
        return path

    def judgements(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records, one a judged image, to `judgements.jsonl`."""
        if self.is_main:
            with storage.limited(f"writing in {self.workdir}"):
                for record in records:
                    self._judgements.append(record)

    def beside(self, work: Callable, *given: Any) -> None:
        """Have `work(*given)` done by a thread while the devices go on: work of the host, such as writing pictures.

        One after the other in the order given, and done before the next `log` or `save`, so that files, and what a
        checkpoint covers of them, are as if it had been done here. What it raises is raised there.
        """
        self._beside.append(self._thread.submit(work, *given))

    # Inside

    def _wait_for_work_beside(self) -> None:
        while self._beside:
            self._beside.popleft().result()

    def _lock_folder(self, stack: contextlib.ExitStack) -> int:
        """Take the folder for this run's processes; returns a number that this start of it has for all of them."""
        refusal, start = None, time.time_ns() // 1_000_000 % 2**31
        if self.is_main:
            lock = WorkdirLock(self.workdir)
            try:
                lock.acquire()
                stack.callback(lock.release)
            except WorkdirError as error:
                refusal, start = error, REFUSED
        if jax.process_count() > 1:
            start = int(multihost_utils.broadcast_one_to_all(np.int32(start)))
        if start == REFUSED:
            raise refusal or WorkdirError(f"{self.workdir} is in use by another run; process 0 says by which")
        return start

    def _on_signal(self) -> None:
        """Before the first iteration there is nothing to lose, but other processes must not be left waiting."""
        if not self._begun and jax.process_count() == 1:
            self._stop_before_start()

    def _interruptible(self, items: Iterable) -> Iterator:
        for item in items:
            if self._held and self.should_stop():
                self.save_held()
                self._checkpointer.wait()
                raise Stopped(
                    f"stopped on request in epoch {self._held['epoch'] + 1}, saved in {self.workdir} as it was before "
                    f"it; the same command continues"
                )
            if not self._begun and jax.process_count() > 1 and self.should_stop():
                self._stop_before_start()
            yield item

    def _stop_before_start(self) -> NoReturn:
        raise Stopped(
            f"stopped on request before training went on in {self.workdir}: nothing to save; the same "
            f"command starts again"
        )

    def _lengths(self) -> dict[str, int]:
        """How far the run's files are written, in bytes."""
        self._wait_for_work_beside()
        return {"metrics": self._metrics.length, "judgements": self._judgements.length} if self.is_main else {}

    def _rewind(self, lengths: dict[str, int], step: int, epoch: int) -> None:
        lost = self._metrics.last()
        self._metrics.rewind(lengths.get("metrics", 0), step)
        self._timers.resume(lost, self._metrics.last())
        if self.is_main:
            self._judgements.rewind(lengths.get("judgements", 0))
            gallery.forget(self.images_folder / gallery.FOLDER, after=epoch)

    def _write_config(self) -> None:
        storage.replace(self.workdir / "config.json", json.dumps(self._plain_config, indent=2))


def _check_values(config: Any) -> None:
    """Raise ConfigError for a value of the harness's own keys that cannot be used."""
    for group, key, least in (
        ("train", "epochs", 0),
        ("checkpoint", "every", 0),
        ("checkpoint", "keep", 1),
        ("profile", "start", 0),
        ("profile", "steps", 0),
    ):
        if config[group][key] < least:
            raise ConfigError(f"{group}.{key} is {config[group][key]}: it has to be {least} or more")


class _Lines:
    """Where a bar goes when there is no terminal: each refresh becomes a line."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def _versions() -> dict[str, Any]:
    """What bit-for-bit equality depends on beside the config."""
    packages = ("firm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    return {
        **{name: _version(name) for name in packages},
        "python": platform.python_version(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "threefry_partitionable": jax.config.jax_threefry_partitionable,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
