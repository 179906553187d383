"""A run's folder: made or refused at once, held by one run at a time, and true to the config it was started with."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from firm_jax import storage
from firm_jax.errors import ConfigError, WorkdirError

# What may differ between the start of a run and its continuation: how long, how often, where, how patiently, not what
# is computed. (Another mesh computes the same numbers up to floating-point order.)
MAY_CHANGE = (
    "train.epochs",
    "train.report_every",
    "train.examples_per_device",
    "train.max_skipped_updates",
    "critic.max_failure_rate",
    "critic.endpoints",  # who answers there is pinned, not where
    "critic.concurrency",
    "critic.connect_timeout",
    "critic.try_timeout",
    "critic.timeout",
    "critic.attempts",
    "checkpoint",
    "eval.every",
    "profile",
    "mesh",
    "distributed",
)

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0


def prepare_workdir(workdir: str | Path) -> Path:
    """Create the folder if need be and make sure that it can be written. Raises WorkdirError."""
    workdir = Path(workdir).expanduser().absolute()
    try:
        storage.make_folder(workdir)
        probe = workdir / f".write-test-{os.getpid()}"
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise WorkdirError(
            f"the run folder {workdir} cannot be written: {error}. Pass a --workdir that this user can write to, "
            f"on a disk with free space."
        ) from error
    return workdir


class WorkdirLock:
    """Holds a run folder for this process: `run.lock` names the holder (pid, host) and carries its heartbeat.

    The lock of a process that died is taken over with a notice: on one machine the kernel knows (flock), between
    machines the heartbeat tells. Raises WorkdirError when another run holds the folder.
    """

    def __init__(self, workdir: Path):
        self.path = Path(workdir) / "run.lock"
        self._file = None
        self._kernel_locks = True
        self._started = time.strftime("%Y-%m-%d %H:%M:%S")
        self._stop = threading.Event()

    def acquire(self) -> None:
        self._file = self._open_locked()
        holder = self._holder()
        if holder:
            # On this machine we hold the kernel's lock, so that the other cannot be alive.
            dead = self._kernel_locks and holder.get("host") == socket.gethostname()
            if not dead and time.time() - float(holder.get("heartbeat", 0)) < STALE_SECONDS:
                self._file.close()
                raise self._refusal(holder)
            logging.warning("taking over %s from a run that ended without releasing it: %s", self.path, holder)
        self._beat()
        threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True).start()

    def release(self) -> None:
        self._stop.set()
        self.path.unlink(missing_ok=True)
        self._file.close()

    def _open_locked(self):
        while True:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._file = file
                holder = self._holder()
                file.close()
                raise self._refusal(holder) from error
            except OSError as error:
                self._kernel_locks = False
                logging.warning("%s: no locks on this file system (%s); heartbeats decide", self.path, error)
            # The previous holder may have removed the file between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == self.path.stat().st_ino:
                    return file
            file.close()

    def _holder(self) -> dict[str, Any]:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read() or "{}")
        except ValueError:
            holder = None
        return holder if isinstance(holder, dict) else {"unreadable": True}

    def _refusal(self, holder: dict[str, Any]) -> WorkdirError:
        return WorkdirError(
            f"{self.path.parent} is in use by process {holder.get('pid', '?')} on {holder.get('host', '?')} "
            f"(started {holder.get('started', '?')}). Wait for it or stop it, or choose another --workdir."
        )

    def _beat(self) -> None:
        record = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": self._started,
            "heartbeat": time.time(),
        }
        # One write of constant length: a reader never sees half a record.
        os.pwrite(self._file.fileno(), json.dumps(record).ljust(512).encode(), 0)

    def _keep_beating(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self._beat()
            except (OSError, ValueError) as error:
                # A full disk must not stop the run here: the save that meets it says so.
                if not self._stop.is_set():
                    logging.warning("cannot refresh %s: %s", self.path, error)


def contradictions(saved: dict[str, Any], current: dict[str, Any], may_change: Sequence[str] = MAY_CHANGE) -> list[str]:
    """Keys whose values differ between two resolved configs, as `key: saved -> current`, but for `may_change`."""
    before, after = _flat(saved), _flat(current)
    absent = "(absent)"
    return [
        f"{key}: {before.get(key, absent)!r} -> {after.get(key, absent)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, absent) != after.get(key, absent)
        and not any(key == name or key.startswith(name + ".") for name in may_change)
    ]


def check_same_config(saved: dict[str, Any], current: dict[str, Any], workdir: Path) -> None:
    """Raise ConfigError naming every key in which a run's config contradicts its checkpoint's."""
    if differing := contradictions(saved, current):
        listed = "\n  ".join(differing)
        raise ConfigError(
            f"the config contradicts the checkpoint in {workdir} (checkpoint -> now):\n  {listed}\n"
            f"Start with the checkpoint's values (config.json there) or choose another --workdir. "
            f"Free to change: {', '.join(MAY_CHANGE)}."
        )


def plain_config(config: Any) -> dict[str, Any]:
    """A config as JSON would give it back: tuples become lists, so that saved and current compare equal."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }
