"""The processes of one run watch over each other, so that none waits forever for one that is gone.

A collective operation whose partner has died may never return. Each process therefore leaves a sign of life in the
run's folder every few seconds, and ends itself, with a message, when another's stays away. Nothing is lost that was
saved: the same command on every host continues the run.

Where the connection breaks with the partner, as when it was killed, the operation fails instead, and `main.py` ends the
process with the same exit code before anything here is due. Process 0 is the exception: JAX's own service runs in it,
and JAX may end the others the moment it is gone, with a message of its own and SIGABRT (134), which nothing can catch.
"""

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from absl import logging

# EX_PROTOCOL: another process of the run is gone; what was saved is whole, start all of them again to continue.
LOST_EXIT_CODE = 76

BEAT_SECONDS = 5.0
LOST_SECONDS = 60.0
# After which JAX's own service would end a process, with an abort and a stack trace: the last resort, for a folder that
# not all of them see.
SERVICE_SECONDS = 300
# All processes meet most errors at the same time: time for one to tell its own instead of another's.
FAILED_SECONDS = 10.0


class ProcessWatch:
    """Signs of life of `count` processes in files of `folder`, which all of them see; this one is number `index`.

    `run` is a number that these processes share and that those of another start do not: what a killed run has left
    behind is nobody's sign of life.
    """

    def __init__(self, folder: Path, index: int, count: int, run: int):
        self.folder, self.index, self.count, self.run = Path(folder), index, count, run
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="process-watch", daemon=True)
        self._beats = 0
        # Process -> its last sign of life and when it came by our own clock: clocks of hosts need not agree.
        self._seen: dict[int, tuple[dict | None, float]] = {}

    def start(self) -> None:
        """Show signs of life and watch those of the others, until `stop`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        started = time.monotonic()
        self._seen = {other: (None, started) for other in range(self.count) if other != self.index}
        self._thread.start()

    def stop(self, error: BaseException | None = None) -> None:
        """End in peace, or tell the others of the error that ends this process."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(BEAT_SECONDS)
        if error is not None:
            self._write({"failed": f"{type(error).__name__}: {error}"[:500]})
        else:
            self._file(self.index).unlink(missing_ok=True)

    def lost(self) -> str | None:
        """Why the run cannot go on, or None: looks at the others' files once."""
        now = time.monotonic()
        for other, (last, since) in list(self._seen.items()):
            sign = self._read(other)
            if sign is None and last is not None:  # it has ended in peace
                del self._seen[other]
            elif sign is not None and sign != last:
                self._seen[other] = (sign, now)
            elif last is not None and "failed" in last and now - since > FAILED_SECONDS:
                return f"process {other} ({self._name(last)}) has ended with an error: {last['failed']}"
            elif now - since > LOST_SECONDS:
                return f"process {other} ({self._name(last)}) has given no sign of life for {LOST_SECONDS:.0f} s"
        return None

    def _watch(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._beat()
            if reason := self.lost():
                print(
                    f"error: {reason}. This process ({self.index} of {self.count}) cannot go on without it and ends. "
                    "Checkpoints are whole: start the same command on every host again to continue.",
                    file=sys.stderr,
                    flush=True,
                )
                # The main thread may be inside a collective operation that never returns.
                os._exit(LOST_EXIT_CODE)

    def _beat(self) -> None:
        self._beats += 1
        self._write({"beat": self._beats})

    def _write(self, sign: dict) -> None:
        file = self._file(self.index)
        staging = file.with_suffix(".tmp")
        try:
            sign = {"run": self.run, "pid": os.getpid(), "host": socket.gethostname(), **sign}
            staging.write_text(json.dumps(sign))
            staging.replace(file)
        except OSError as error:
            logging.warning("cannot write the sign of life %s: %s", file, error)

    def _read(self, other: int) -> dict | None:
        try:
            sign = json.loads(self._file(other).read_text())
            return sign if sign["run"] == self.run else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return self._seen[other][0]  # as if nothing had changed: a storage that fails for long counts as silence

    def _file(self, index: int) -> Path:
        return self.folder / f"{index}.json"

    @staticmethod
    def _name(sign: dict | None) -> str:
        return f"pid {sign['pid']} on {sign['host']}" if sign else "which never started"
