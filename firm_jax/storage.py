"""What a run asks of a disk: to keep what was written, never to show half a file, and to answer within a limit."""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from firm_jax.errors import WorkdirError

# Storage that takes longer than this for one save, or for one line, is taken to hang.
TIMEOUT_SECONDS = 1200

# How long threads that wait for such storage may hold up the end of the process.
EXIT_SECONDS = 20


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and those above it, such that a power failure cannot take their names back."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        sync(folder.parent)


def replace(path: Path, text: str) -> None:
    """Write a text file whole or, on a full disk, leave the one that was there."""
    staging = path.with_name(f".{path.name}.writing")
    try:
        staging.write_text(text, encoding="utf-8")
        staging.replace(path)
    except OSError:
        staging.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write in the place of `path`, which it becomes, on the disk, when the block ends without an error."""
    staging = path.with_name(f".{path.name}.writing")
    try:
        yield staging
        sync(staging)
        staging.replace(path)
        sync(path.parent)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """WorkdirError where the disk does not take what a block writes to a file of a run."""
    try:
        yield
    except OSError as error:
        raise WorkdirError(
            f"cannot write to {path}: {error}. Free some space and start the same command again: it continues from "
            "what is saved."
        ) from error


@contextlib.contextmanager
def writing_whole(path: Path) -> Iterator[None]:
    """As `writing`, for a file that is of no use when only a part of it is there."""
    with writing(path):
        try:
            yield
        except OSError:
            path.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
    """End the process, with the stacks of its threads, when a block takes longer than TIMEOUT_SECONDS.

    For what the main thread writes itself: it cannot raise anything while it hangs in the kernel.
    """
    timer = _after(TIMEOUT_SECONDS, f"{what} takes more than {TIMEOUT_SECONDS} s: the storage hangs", 2)
    try:
        yield
    finally:
        timer.cancel()


def leave(code: int) -> None:
    """To be called when the process is about to end: it does within EXIT_SECONDS, whatever its threads wait for."""
    _after(EXIT_SECONDS, "threads that do not end are left behind", code)


def _after(seconds: float, message: str, code: int) -> threading.Timer:
    def end() -> None:
        with contextlib.suppress(OSError, ValueError):
            print(f"error: {message}. The saved checkpoints are intact; start the same command again.", file=sys.stderr)
            faulthandler.dump_traceback()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer
