"""Rubrics: the texts that tell a critic what to judge, on which scale, and in which form to answer.

A critic is served with the rubric it was trained with, so rubrics are plain files that a configuration may
replace, and the hash of each goes into every record. The package's own lie in the folder `rubrics` beside
this module: `alignment` and `quality` for generation, `edit_execution` and `edit_consistency` for editing.

In a file, `{prompt}` stands for the instruction and `{requirement}` for what a prompt may demand besides it.
All other braces are plain text, in the file as in what replaces the fields.
"""

import dataclasses
import hashlib
import os
import re
from pathlib import Path

from firm_jax.errors import ConfigError

FOLDER = Path(__file__).parent / "rubrics"
NAMES = ("alignment", "quality", "edit_execution", "edit_consistency")
# What rewards and the benchmark call a criterion -> the rubric that asks the critic for it.
RUBRICS = {
    "instruction": "alignment",
    "quality": "quality",
    "execution": "edit_execution",
    "consistency": "edit_consistency",
}
FIELDS = ("prompt", "requirement")
# Quality is judged from the picture alone, so that following the instruction is not paid for twice.
WITHOUT_PROMPT = ("quality",)

# A word in braces is a field. `\boxed{n}` and the like are LaTeX: there the brace follows a letter.
FIELD = re.compile(r"(?<![A-Za-z])\{([A-Za-z_]\w*)\}")


@dataclasses.dataclass(frozen=True)
class Rubric:
    """A rubric's name, its text with fields still open, and the SHA-256 of that text in hexadecimal."""

    name: str
    text: str
    sha256: str

    def fill(self, prompt: str, requirement: str = "") -> str:
        """The text for one judgement. A line that holds only `{requirement}` is left out if there is none.

        Raises:
            ConfigError: if there is a requirement that the rubric, though it shows the prompt, would drop.
        """
        fields = set(FIELD.findall(self.text))
        if requirement and "prompt" in fields and "requirement" not in fields:
            raise ConfigError(
                f"rubric {self.name!r} has no field {{requirement}}, so the critic would not see the requirement "
                f"{requirement[:80]!r}; add the field to the rubric, or drop the requirement from the data."
            )
        text = self.text if requirement else self.text.replace("{requirement}\n", "")
        values = {"prompt": prompt, "requirement": requirement}
        # In one pass: a prompt that itself contains a field's name is not filled again.
        return FIELD.sub(lambda field: values[field[1]], text)


def load_rubric(name_or_path: str | os.PathLike, *, needs_prompt: bool | None = None) -> Rubric:
    """Reads one rubric.

    Args:
        name_or_path: one of `NAMES` for the package's own, or a UTF-8 text file. The file's stem is the
            rubric's name; one line break at its end is not part of the text.
        needs_prompt: whether the text must contain `{prompt}`; by default all must but those named in
            `WITHOUT_PROMPT`.

    Raises:
        ConfigError: if there is no such rubric, the file is empty or not UTF-8, a field is unknown or
            `{prompt}` is missing.
    """
    path = FOLDER / f"{name_or_path}.txt" if name_or_path in NAMES else Path(name_or_path)
    try:
        text = path.read_text(encoding="utf-8-sig").removesuffix("\n")
    except OSError as error:
        raise ConfigError(
            f"rubric {str(name_or_path)!r} cannot be read from {path} ({error.strerror}); "
            f"give the path of a text file or one of {', '.join(NAMES)}."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"rubric {path} is not UTF-8 text ({error}); save it as UTF-8.") from error
    if needs_prompt is None:
        needs_prompt = path.stem not in WITHOUT_PROMPT
    _check(path, text, needs_prompt)
    return Rubric(path.stem, text, hashlib.sha256(text.encode()).hexdigest())


def rubrics_from(folder: str | os.PathLike = FOLDER) -> dict[str, Rubric]:
    """Reads every rubric of a folder, `<name>.txt` each, by name.

    Raises:
        ConfigError: if the folder has no rubric, a `.txt` file whose name is not one of `NAMES` (it would
            silently never be used), or a rubric that `load_rubric` refuses.
    """
    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        raise ConfigError(f"no rubrics in {folder}; it must hold files named {', '.join(f'{n}.txt' for n in NAMES)}.")
    for file in files:
        if file.stem not in NAMES:
            raise ConfigError(f"{file} is not the name of a rubric; rename it to one of {', '.join(NAMES)}.")
    return {file.stem: load_rubric(file) for file in files}


def _check(path: Path, text: str, needs_prompt: bool) -> None:
    """Refuses a rubric that would reach the critic other than it was meant."""
    if not text.strip():
        raise ConfigError(f"rubric {path} is empty.")
    for number, line in enumerate(text.splitlines(), 1):
        if "{{" in line:
            raise ConfigError(f"rubric {path}, line {number}: braces are not doubled here; write '{{' once.")
        unknown = set(FIELD.findall(line)) - set(FIELDS)
        if unknown:
            raise ConfigError(
                f"rubric {path}, line {number}: unknown field {{{unknown.pop()}}}; "
                f"known are {', '.join(f'{{{name}}}' for name in FIELDS)}."
            )
    if needs_prompt and "prompt" not in FIELD.findall(text):
        raise ConfigError(f"rubric {path} never shows the instruction; put {{prompt}} where it belongs.")
