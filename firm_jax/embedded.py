"""Where the miniature that ships with the package lies: names like `embedded:sd3` in configs and on command lines."""

from pathlib import Path

from firm_jax.errors import WeightsError

PREFIX = "embedded:"
ROOT = Path(__file__).parent / "shapes" / "checkpoints"


def embedded_path(name: str) -> Path | None:
    """The folder or file of an `embedded:` name; None for any other name. WeightsError when there is no such part."""
    if not name.startswith(PREFIX):
        return None
    path = ROOT / name.removeprefix(PREFIX)
    if not path.exists():
        present = sorted(f"{PREFIX}{part.name}" for part in ROOT.glob("*"))
        raise WeightsError(f"the package has no part {name!r}; it ships {', '.join(present) or 'none'}")
    return path
