"""The one place that reads a run's config: `file.py:variant` plus `--config.key=value`, with errors that help."""

import difflib
import functools
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from operator import getitem
from pathlib import Path
from types import ModuleType

from absl import flags
from ml_collections import ConfigDict

from firm_jax.errors import ConfigError


def choose_variant(variants: Mapping[str, Callable[[], ConfigDict]], name: str) -> ConfigDict:
    """The config of a named variant: the body of a config file's `get_config(variant)`.

    Raises ConfigError naming the variants that exist.
    """
    if name not in variants:
        known = ", ".join(f":{variant}" if variant else "(none: the default)" for variant in variants)
        problem = f"unknown variant ':{name}'" if name else "this config has no default: name a variant"
        raise ConfigError(f"{problem}.{_nearest(name, list(variants))} There are: {known}.")
    return variants[name]()


def parse_flags(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """A `flags_parser` for `absl.app.run`: checks file, variant and keys first, so that each error names its remedy.

    Raises ConfigError.
    """
    argv = list(argv)
    source = _config_argument(argv)
    if source is not None:
        config = load_config(source)
        for argument in argv:
            if argument.startswith(("--config.", "-config.")):
                check_key(config, argument.lstrip("-").removeprefix("config.").partition("=")[0], source)
    try:
        rest = flag_values(argv)
    except flags.Error as error:
        raise ConfigError(f"{error}. `--help` lists the flags.") from error
    if source is not None:
        check_finite(flag_values["config"].value)
    return rest


def check_finite(config: ConfigDict) -> None:
    """ConfigError naming a value that is NaN or infinite: no comparison with it would ever stop the run."""
    for key in all_keys(config):
        value = functools.reduce(getitem, key.split("."), config)
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, float) and not math.isfinite(item):
                raise ConfigError(f"{key} is {value}; it must be finite")


def load_config(source: str) -> ConfigDict:
    """The config of `path/to/file.py` or `path/to/file.py:variant`, before overrides. Raises ConfigError."""
    path, _, variant = source.partition(":")
    module = _load_module(Path(path))
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{path} has no function get_config(variant): it is not a config file.")
    return module.get_config(variant)


def check_key(config: ConfigDict, key: str, source: str) -> None:
    """Raise ConfigError, with the nearest keys, unless the dotted `key` names a value in `config`."""
    keys = all_keys(config)
    if not any(known == key or known.startswith(f"{key}.") for known in keys):
        raise ConfigError(f"unknown config key '{key}' in {source}.{_nearest(key, keys)}")


def all_keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Every dotted key that holds a value."""
    keys = []
    for key, value in config.items(preserve_field_references=True):
        keys += all_keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [f"{prefix}{key}"]
    return keys


def _config_argument(argv: Sequence[str]) -> str | None:
    for index, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            if equals:
                return value
            return argv[index + 1] if index + 1 < len(argv) else None
    return None


def _load_module(path: Path) -> ModuleType:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("configs")
        present = sorted(str(file) for file in folder.glob("*.py"))
        raise ConfigError(
            f"there is no config file {path}.{_nearest(str(path), present)}"
            + (f" In {folder} there are: {', '.join(present)}." if present else "")
        )
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file; a config is a .py file with a function get_config(variant).")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not Python that can be read: {error}") from error
    return module


def _nearest(name: str, known: Sequence[str]) -> str:
    """' Did you mean ...?', or nothing: by likeness of the whole name, then by the same last part."""
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    near += [k for k in known if k and k.rpartition(".")[2] == last and k not in near][:2]
    near = [f"'{key}'" for key in near if key]
    return f" Did you mean {' or '.join(near)}?" if near else ""
