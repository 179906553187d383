"""Training checkpoints: written in the background, complete or absent, verified before they are believed.

`checkpoints/<step>/` holds `state/` (arrays, through Orbax), `data.json` (where the data iterator stands), `meta.json`
(epoch, config, versions, ...) and `manifest.json` (size and sha256 of every other file). A checkpoint is written under
a name that starts with a dot and renamed when all of it is on the disk, so that a number names a complete one.

This is the only module that knows Orbax.
"""

import hashlib
import json
import re
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from firm_jax import storage
from firm_jax.errors import CheckpointError

MANIFEST = "manifest.json"

# In place of a step, among processes that can only pass numbers on.
NONE = -1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: `state` as saved, `data` and `meta` the JSON objects beside it."""

    step: int
    state: Any
    data: Any
    meta: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run, in one folder; at most one save is under way at a time.

    The newest `keep` (at least 1) stay. With several processes every one makes the same calls; each writes its
    shards, the first commits.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = Path(folder).absolute()
        self.keep = keep
        self._saving: threading.Thread | None = None
        self._deadline = 0.0
        self._error: BaseException | None = None
        if jax.process_index() == 0:
            storage.make_folder(self.folder)
            for leftover in [*self.folder.glob(".saving-*"), *self.folder.glob(".deleting-*")]:
                shutil.rmtree(leftover)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return _steps(self.folder)

    def damaged(self) -> list[Path]:
        """Checkpoints that were set aside because they do not match their manifest."""
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(r"\d+\.damaged.*", path.name))

    def save(self, step: int, state: Any, data: Any, meta: dict[str, Any]) -> None:
        """Start writing a checkpoint; returns once the arrays are copied, so that they may be donated.

        A step that is saved already is left as it is.

        Args:
            step: Its name; grows from save to save.
            state: Pytree of jax arrays, typed random keys included.
            data: What the data pipeline needs to continue, as JSON.
            meta: What a reader needs to know, as JSON.

        Raises:
            CheckpointError: The previous save failed, or this one cannot start. Earlier checkpoints are intact.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        if _from_first_process(step in self.steps()):
            return
        arrays = _named(jax.tree.map(_without_key_type, state))
        meta = meta | {"arrays": {name: _signature(leaf) for name, leaf in _named(state).items()}}
        staging = self.folder / f".saving-{step}"
        try:
            if jax.process_index() == 0:
                staging.mkdir(parents=True)
                (staging / "data.json").write_bytes(_json(data))
                (staging / "meta.json").write_bytes(_json(meta))
            _barrier(f"save-{step}")
            response = ocp.save_async(staging / "state", arrays)
        except (OSError, ValueError, RuntimeError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise self._save_error(step, error) from error
        self._deadline = time.monotonic() + storage.TIMEOUT_SECONDS
        self._saving = threading.Thread(target=self._finish, args=(step, staging, response), daemon=True)
        self._saving.start()

    def wait(self) -> None:
        """Wait until the save under way, if any, is on the disk; raises CheckpointError if it failed or hangs."""
        if self._saving is not None:
            self._saving.join(max(0.0, self._deadline - time.monotonic()))
            if self._saving.is_alive():
                raise CheckpointError(
                    f"a checkpoint in {self.folder} is not written after {storage.TIMEOUT_SECONDS} s: the storage "
                    f"hangs. Earlier checkpoints are intact; start the same command again when it answers."
                )
            self._saving = None
        self.check()

    def check(self) -> None:
        """Raise the CheckpointError of a save that has failed by now."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def restore(self, abstract_state: Any) -> Checkpoint | None:
        """Read the newest checkpoint that is whole, or None when there is none at all.

        A checkpoint that differs from its manifest is set aside (renamed `<step>.damaged`) with an error in the log,
        and the one before it is read.

        Args:
            abstract_state: Pytree of arrays or `jax.ShapeDtypeStruct`s: the structure, shapes, dtypes and shardings
                to restore into. Shardings may differ from those at saving.

        Raises:
            CheckpointError: No checkpoint is whole, or the newest whole one does not fit `abstract_state`.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        step = _from_first_process(self._newest_whole() if jax.process_index() == 0 else NONE)
        if step == NONE:
            if self.damaged():
                raise CheckpointError(
                    f"no checkpoint in {self.folder} is whole; set aside: {', '.join(p.name for p in self.damaged())}. "
                    f"Remove them to start from the beginning, or choose another --workdir."
                )
            return None
        path = self.folder / str(step)
        meta = json.loads((path / "meta.json").read_text())
        _check_fits(path, meta["arrays"], {name: _signature(leaf) for name, leaf in _named(abstract_state).items()})
        abstract_arrays = _named(jax.tree.map(_abstract, abstract_state))
        try:
            arrays = ocp.load(path / "state", abstract_arrays)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is whole by its manifest but cannot be read: {error}") from error
        leaves = [arrays[name] for name in abstract_arrays]
        state = jax.tree.map(
            _with_key_type, abstract_state, jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        )
        return Checkpoint(step, state, json.loads((path / "data.json").read_text()), meta)

    def latest_meta(self) -> dict[str, Any] | None:
        """`meta.json` of the newest checkpoint in which it is as it was written, without reading the arrays."""
        for step in reversed(self.steps()):
            path = self.folder / str(step)
            try:
                written = json.loads((path / MANIFEST).read_bytes())["files"]["meta.json"]
                if _digest(path / "meta.json") == written:
                    return json.loads((path / "meta.json").read_bytes())
                problem = "its content has changed"
            except (OSError, ValueError, KeyError, TypeError) as error:
                problem = error
            logging.warning("passing over meta.json of checkpoint %d: %s", step, problem)
        return None

    def _newest_whole(self) -> int:
        for step in reversed(self.steps()):
            path = self.folder / str(step)
            problem = find_damage(path)
            if problem is None:
                return step
            aside = _unused(path.with_name(f"{step}.damaged"))
            path.rename(aside)
            logging.error("CHECKPOINT %s IS DAMAGED (%s); set aside as %s", path, problem, aside.name)
        return NONE

    def _finish(self, step: int, staging: Path, response: Any) -> None:
        """In the background: wait for the arrays, write the manifest, commit, delete what is too old."""
        try:
            response.result()
            if jax.process_index() == 0:
                (staging / MANIFEST).write_bytes(_manifest(staging))
                _sync_tree(staging)
                staging.rename(self.folder / str(step))
                storage.sync(self.folder)
                for old in self.steps()[: -self.keep]:
                    # Renamed first: a kill half-way through the deletion must not leave half a checkpoint.
                    doomed = self.folder / f".deleting-{old}"
                    (self.folder / str(old)).rename(doomed)
                    shutil.rmtree(doomed)
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)
            self._error = self._save_error(step, error)
            self._error.__cause__ = error

    def _save_error(self, step: int, error: Exception) -> CheckpointError:
        steps = self.steps()
        intact = f"checkpoint {steps[-1]} is intact" if steps else "there is no earlier checkpoint"
        return CheckpointError(
            f"checkpoint {step} could not be written to {self.folder}: {error}\n{intact}. "
            f"Make room, or make the folder writable, and start the same command again."
        )


def read_arrays(folder: Path, group: str, step: int | None = None) -> Checkpoint:
    """A part of a run's state, on the first device: the arrays whose names begin with `group/`, as nested dicts.

    Only reads, so that the run may be under way. step: which checkpoint; None takes the newest that is whole.

    Raises:
        CheckpointError: There is none, or not of that step, or it is damaged, or its state has no such group.
    """
    from orbax.checkpoint import v1 as ocp

    steps = _steps(folder)
    if not steps:
        raise CheckpointError(f"there is no checkpoint in {folder}: the run has not saved one yet (checkpoint.every)")
    if step is not None and step not in steps:
        raise CheckpointError(f"there is no checkpoint {step} in {folder}; there are {', '.join(map(str, steps))}")
    for candidate in reversed(steps) if step is None else (step,):
        path = folder / str(candidate)
        if (problem := find_damage(path)) is None:
            break
        logging.warning("passing over checkpoint %d: %s", candidate, problem)
    else:
        raise CheckpointError(f"no checkpoint asked for in {folder} is whole; the last problem: {problem}")
    meta = json.loads((path / "meta.json").read_text())
    wanted = {name: text for name, text in meta["arrays"].items() if name.startswith(f"{group}/")}
    if not wanted:
        groups = sorted({name.split("/")[0] for name in meta["arrays"]})
        raise CheckpointError(f"{path} holds no {group!r}, but {', '.join(groups)}")
    abstract = {name: _abstract(_from_signature(text)) for name, text in wanted.items()}
    part = ocp.Context()
    part.pytree.loading.partial_load = True
    with part:
        arrays = ocp.load(path / "state", abstract)
    tree: dict = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")[1:]
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = array
    return Checkpoint(candidate, tree, json.loads((path / "data.json").read_text()), meta)


def _steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if re.fullmatch(r"\d+", path.name))


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder by its manifest, in words; None if every byte is as it was written."""
    try:
        written = (path / MANIFEST).read_bytes()
        found = _manifest(path)
        if written == found:
            return None
        expected, present = (json.loads(manifest)["files"] for manifest in (written, found))
        if missing := sorted(expected.keys() - present.keys()):
            return f"missing {', '.join(missing)}"
        if unexpected := sorted(present.keys() - expected.keys()):
            return f"unexpected {', '.join(unexpected)}"
        for name, entry in expected.items():
            if entry["size"] != present[name]["size"]:
                return f"{name} has {present[name]['size']} bytes instead of {entry['size']}"
            if entry["sha256"] != present[name]["sha256"]:
                return f"the content of {name} has changed"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error!r}"
    return f"the content of {MANIFEST} has changed"


def _check_fits(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    problems = [f"{name}: only in the checkpoint" for name in saved.keys() - wanted.keys()]
    problems += [f"{name}: not in the checkpoint" for name in wanted.keys() - saved.keys()]
    problems += [
        f"{name}: {saved[name]} in the checkpoint, {wanted[name]} in this run"
        for name in saved.keys() & wanted.keys()
        if saved[name] != wanted[name]
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(
            f"{path} was saved by a different model or optimizer:\n  {shown}{more}\n"
            f"Use the config it was saved with, or another --workdir."
        )


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, such as `lora/blocks/a`: independent of the classes that the tree is made of."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise CheckpointError("two leaves of the state have the same path; rename one of the keys that contain '/'")
    return named


def _signature(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _from_signature(text: str) -> jax.ShapeDtypeStruct:
    dtype, shape = text.removesuffix("]").split("[")
    return jax.ShapeDtypeStruct(tuple(map(int, filter(None, shape.split(",")))), dtype)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_key_type(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _with_key_type(abstract: Any, leaf: Any) -> Any:
    if not _is_key(abstract):
        return leaf
    found = []  # `key_impl` answers for a value or inside a trace, but not for a ShapeDtypeStruct
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), abstract)
    return jax.random.wrap_key_data(leaf, impl=found[0])


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    shape, dtype, sharding = leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        shape, dtype = data.shape, data.dtype
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _manifest(folder: Path) -> bytes:
    """The manifest of what is in a checkpoint's folder, byte for byte as it is written there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    return _json({"files": {str(file.relative_to(folder)): _digest(file) for file in files}})


def _sync_tree(folder: Path) -> None:
    """Force a folder and all it holds to the disk, so that the rename that follows never outlives the content."""
    for path in [*folder.rglob("*"), folder]:
        storage.sync(path)


def _unused(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _from_first_process(value: int) -> int:
    """The first process' value, on every process: what a file system shows may differ between hosts for a while."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
