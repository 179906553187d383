"""From a folder name or a Hugging Face id to a local folder."""

import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from firm_jax.embedded import embedded_path
from firm_jax.errors import WeightsError

# Everything a pipeline or model folder needs, and none of the copies in other precisions and formats that repositories
# keep beside it. As the Hub matches them, `*` passes over slashes.
PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "*model.safetensors", "*model-?????-of-?????.safetensors"]
TOKEN_VARIABLE = "HF_TOKEN"
_ANSWER_WITHIN_SECONDS = 5
_SAMPLED_BYTES = 1 << 16


def resolve(path_or_id: str | os.PathLike, *, revision: str | None = None) -> Path:
    """The local folder of a model: the folder itself, the cached copy of a Hub id, or a fresh download.

    Raises WeightsError naming the id, where it was looked for, the token variable, and what to do.
    """
    if embedded := embedded_path(str(path_or_id)):
        return embedded
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    looked_in = [str(folder.absolute()), f"{HF_HUB_CACHE} (the Hugging Face cache; HF_HOME moves it)"]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise WeightsError(f"no such model folder: {folder.absolute()} (and {name!r} is not a Hugging Face id)")
    try:
        return _fetch(name, revision)
    except GatedRepoError as error:
        reason = "the repository is gated: accept its licence on huggingface.co and set the token"
        raise _missing(name, looked_in, reason) from error
    except RepositoryNotFoundError as error:
        raise _missing(name, looked_in, "there is no such repository, or the token may not see it") from error
    except Exception as error:  # network errors have other classes in each version of the Hub's client
        reason = f"it is not cached and could not be fetched ({type(error).__name__}: {error})"
        raise _missing(name, looked_in, reason) from error


def find_local(path_or_id: str | os.PathLike) -> Path | None:
    """The folder of a model that is on this machine, be it without its weights; None where there is none."""
    if embedded := embedded_path(str(path_or_id)):
        return embedded
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(path_or_id), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def identity(folder: Path) -> str:
    """A fingerprint of the model in a folder, wherever it lies: 16 hex digits.

    Of each JSON and safetensors file its name, size, and 64 KiB at the start, the middle and the end: it tells models
    and fine-tunes apart in a moment however large they are. It is no proof against forgery, and does not see a bit
    that has flipped elsewhere in the files.
    """
    digest = hashlib.sha256()
    for file in sorted(file for pattern in ("*.json", "*.safetensors") for file in folder.rglob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size} ".encode())
        with file.open("rb") as stream:
            for start in (0, size // 2, size - _SAMPLED_BYTES):
                stream.seek(max(0, start))
                digest.update(stream.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def _fetch(name: str, revision: str | None) -> Path:
    """Download what the cache lacks; without an answer from the Hub, take the cache as it is."""
    try:
        # Asked first, because snapshot_download waits without limit for a server that accepts and never answers.
        HfApi().model_info(name, revision=revision, timeout=_ANSWER_WITHIN_SECONDS)
    except Exception as no_answer:
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise no_answer from None
    return Path(
        snapshot_download(name, revision=revision, allow_patterns=PATTERNS, etag_timeout=_ANSWER_WITHIN_SECONDS)
    )


def _missing(name: str, looked_in: list[str], reason: str) -> WeightsError:
    places = "\n".join(f"  - {place}" for place in looked_in)
    token = "is set" if os.environ.get(TOKEN_VARIABLE) else "is not set"
    return WeightsError(
        f"weights of {name!r} not found: {reason}.\nLooked in:\n{places}\n"
        f"Remedy: run once with network access, or pass a local folder instead of the id. Private and gated models "
        f"need an access token in the environment variable {TOKEN_VARIABLE} (it {token}). To try the whole system "
        f"without any download, use the `:tiny` variant of the config."
    )
