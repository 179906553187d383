"""Safetensors straight to their shards: each device's part is read from disk on its own, never a whole model."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from firm_jax.errors import WeightsError
from firm_jax.interop.mapping import SAME_NAMES, Rule, Tensor, read_slice, tensors
from firm_jax.sharding import Rules, path_name, shardings

STEMS = ("diffusion_pytorch_model", "model")
READABLE = {"F32", "F16", "BF16"}


class WeightFiles:
    """The tensors of one folder, single-file or sharded by an index: their names, shapes and lazy slices."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._open_files: dict[str, safe_open] = {}
        self._stored_names: dict[str, str] = {}
        self.files = self._locate()

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file name."""
        candidates = [f"{stem}.safetensors{suffix}" for stem in STEMS for suffix in (".index.json", "")]
        found = [file for file in candidates if (self.folder / file).exists()]
        if not found:
            raise WeightsError(f"no weights in {self.folder}: expected one of {', '.join(candidates)}")
        if len(found) > 1:
            raise WeightsError(f"{self.folder} holds several sets of weights: {', '.join(found)}; remove the stale one")
        if found[0].endswith(".json"):
            return self._read_index(self.folder / found[0])
        return {name: found[0] for name in self._file(found[0]).keys()}  # noqa: SIM118 (not a dict)

    def _read_index(self, index: Path) -> dict[str, str]:
        try:
            files = json.loads(index.read_text())["weight_map"]
            outside = sorted(file for file in set(files.values()) if Path(file).name != file)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index}: not a safetensors index ({error}); fetch the file again") from error
        if outside:
            raise WeightsError(f"{index} names files outside of its folder: {_some(outside)}")
        seen: dict[str, str] = {}
        for file in sorted(set(files.values())):
            if not (self.folder / file).exists():
                missing = next(name for name, where in files.items() if where == file)
                raise WeightsError(f"{index} names the file {file} (for {missing}), which is not in the folder")
            for name in self._file(file).keys():  # noqa: SIM118 (not a dict)
                if name in seen:
                    raise WeightsError(f"{self.folder}: tensor {name} stands in both {seen[name]} and {file}")
                seen[name] = file
        absent = sorted(set(files) - set(seen))
        if absent:
            raise WeightsError(f"{index} lists tensors that its files do not hold: {_some(absent)}")
        return seen

    def _file(self, file: str):
        if file not in self._open_files:
            try:
                self._open_files[file] = safe_open(self.folder / file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise WeightsError(
                    f"{self.folder / file} cannot be read ({error}); it may be truncated: fetch it again"
                ) from error
        return self._open_files[file]

    def rename(self, stored: str, name: str) -> None:
        """Let the tensor stored under one name answer to another."""
        self.files[name] = self.files.pop(stored)
        self._stored_names[name] = stored

    def slice(self, name: str):
        """A lazy view of one tensor, in the PyTorch layout."""
        return self._file(self.files[name]).get_slice(self._stored_names.get(name, name))

    def where(self, name: str) -> str:
        return f"{self.folder / self.files[name]}, tensor {name}"


def account(
    needed: Mapping[str, tuple[int, ...]],
    present: Mapping[str, tuple[int, ...]],
    where: str,
    ignored=(),
    tied=(),
) -> None:
    """WeightsError unless `present` holds exactly the needed names and shapes.

    `ignored`: names of buffers that hold no parameter; `tied`: names that repeat another tensor.
    """
    missing = sorted(set(needed) - set(present))
    extra = sorted(set(present) - set(needed) - set(ignored) - set(tied))
    wrong = [
        f"{name}: {present[name]} in the file, {needed[name]} by the config"
        for name in sorted(set(needed) & set(present))
        if present[name] != needed[name]
    ]
    problems = []
    if missing:
        problems.append(f"missing tensors: {_some(missing)}")
    if extra:
        problems.append(f"tensors that this architecture does not have: {_some(extra)}")
    if wrong:
        problems.append(f"tensors of another shape: {_some(wrong)}")
    if problems:
        raise WeightsError(
            f"the weights in {where} do not fit their config.json; " + "; ".join(problems) + ". "
            "Check that weights and config come from the same revision of the same model."
        )


def load_params(
    abstract_params,
    rules: tuple[Rule, ...],
    folder: Path,
    *,
    dtype,
    sharding_rules: Rules = (),
    mesh: Mesh | None = None,
    ignored: tuple[str, ...] = (),
    tied: Mapping[str, str] | None = None,
):
    """The parameter tree of `abstract_params`' structure, read from the safetensors in `folder`.

    Every leaf arrives in `dtype` on its shards by `sharding_rules` (on the default device without a mesh). Raises
    WeightsError for a missing, extra, duplicate or misshapen tensor, an unreadable file, or a dtype other than
    float32, float16 and bfloat16.
    """
    files, tied, dtype = WeightFiles(folder), dict(tied or {}), jnp.dtype(dtype)
    for alias, name in tied.items():
        if alias in files.files and name not in files.files:
            files.rename(alias, name)
        elif alias in files.files and not np.array_equal(_whole(files, alias), _whole(files, name)):
            raise WeightsError(f"{folder}: tensors {alias} and {name} differ, but this architecture ties them")
    wanted = list(tensors(abstract_params, (*rules, *SAME_NAMES)))
    present = {name: tuple(files.slice(name).get_shape()) for name in files.files}
    account({tensor.name: tensor.shape for tensor in wanted}, present, str(folder), ignored, tied)
    for tensor in wanted:
        kind = files.slice(tensor.name).get_dtype()
        if kind not in READABLE:
            raise WeightsError(f"{files.where(tensor.name)} has dtype {kind}; readable are {sorted(READABLE)}")
    by_path: dict[str, list[Tensor]] = {}
    for tensor in wanted:
        by_path.setdefault(tensor.path, []).append(tensor)
    if mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        placement = jax.tree.map(lambda _: device, abstract_params)
    else:
        placement = shardings(abstract_params, sharding_rules, mesh)

    def read(path, leaf, sharding):
        sources = by_path[path_name(path)]
        parts = {}  # devices that hold the same part share one read and one buffer

        def part(index):
            index = tuple(entry.indices(size)[:2] for entry, size in zip(index, leaf.shape, strict=True))
            if index not in parts:
                parts[index] = _read_leaf(files, sources, tuple(slice(*ends) for ends in index), dtype)
            return parts[index]

        return jax.make_array_from_callback(leaf.shape, sharding, part)

    return jax.tree_util.tree_map_with_path(read, abstract_params, placement)


def _read_leaf(files: WeightFiles, sources: list[Tensor], index: tuple[slice, ...], dtype) -> np.ndarray:
    """The part `index` of one leaf; a stacked leaf's is filled layer by layer."""
    if sources[0].layer is None:
        return _read_tensor(files, sources[0], index, dtype)
    out = np.empty([part.stop - part.start for part in index], dtype)
    for row, source in enumerate(sources[index[0]]):
        out[row] = _read_tensor(files, source, index[1:], dtype)
    return out


def _read_tensor(files: WeightFiles, tensor: Tensor, index, dtype) -> np.ndarray:
    try:
        return np.ascontiguousarray(read_slice(files.slice(tensor.name), tensor.layout, index)).astype(dtype)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{files.where(tensor.name)} cannot be read ({error}); fetch the file again") from error


def _whole(files: WeightFiles, name: str) -> np.ndarray:
    return read_slice(files.slice(name), "same", ())


def _some(items: list[str], limit: int = 8) -> str:
    return ", ".join(items[:limit]) + (f", and {len(items) - limit} more" if len(items) > limit else "")
