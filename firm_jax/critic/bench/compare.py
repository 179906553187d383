"""Several critics on one benchmark: each is asked what it has not answered yet, and all stand in one table.

A folder holds, for each critic, `critics/NAME/judgements.jsonl` and `reordered.jsonl`, every answer, and
`measured.json`, what they come to; of all critics that were measured on the same items `bench.json` and `bench.md`; and
`quarantine.jsonl`, what of the benchmark could not be used.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from firm_jax import storage
from firm_jax.critic.bench.questions import Asked, ask, questions, reordered
from firm_jax.critic.bench.records import CRITERIA, Bench
from firm_jax.critic.bench.report import markdown, measured, report
from firm_jax.critic.questions import UNANSWERED
from firm_jax.critic.results import Results
from firm_jax.critic.rubric import RUBRICS, rubrics_from
from firm_jax.critic.score import Critic, rubric_of, served_rubrics
from firm_jax.data.records import write_quarantine
from firm_jax.errors import ConfigError, WorkdirError
from firm_jax.interop.hub import identity, resolve

LOCAL = "local"
BACKENDS = (LOCAL, "firm", "openai")


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A critic that is measured. Raises ConfigError for settings that contradict each other.

    name: in the table, and of its folder. model: a Qwen3-VL folder, a Hugging Face id or `embedded:NAME`; of a critic
    on a server the name under which it is served, None where that serves one. backend: "local", or the protocol of its
    servers, as in `RemoteCritic`. endpoints: their base URLs. rubrics: a folder, in place of the critic's own.
    """

    name: str
    model: str | None
    backend: str = LOCAL
    endpoints: tuple[str, ...] = ()
    rubrics: str | None = None

    def __post_init__(self):
        if self.backend not in BACKENDS:
            raise ConfigError(f"{self.name}: the backend {self.backend!r} is none of {', '.join(BACKENDS)}")
        if bool(self.endpoints) == (self.backend == LOCAL):
            raise ConfigError(f"{self.name}: endpoints go with the backend firm or openai, and these need one")
        if self.backend == LOCAL and not self.model:
            raise ConfigError(f"{self.name}: no model is named; give a folder or a Hugging Face id")

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.-]+", "-", self.name).strip("-.") or "critic"


def compare(
    out: Path,
    bench: Bench,
    entrants: Sequence[Entrant],
    load: Callable[[Entrant], Critic],
    *,
    dtype: str,
    max_new_tokens: int,
    batch_size: int,
) -> str:
    """Measure the critics and write the files of the folder `out`. Returns the page, bench.md.

    load: makes a local critic, whose weights are held as `dtype`; called only where one has something to answer.
    batch_size: questions at once. Raises ConfigError when answers in the folder were given to other questions or by
    another critic, or two critics would share a folder; and what the critics raise.
    """
    if not entrants or min(max_new_tokens, batch_size) < 1:
        raise ConfigError("there has to be a critic to measure; max_new_tokens and batch_size are 1 or more")
    if len({entrant.folder for entrant in entrants}) < len(entrants):
        raise ConfigError(f"two of the critics would share a folder of {out}. Name them differently, or apart.")
    asked = {"task": bench.task, "data": bench.sha256, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    for entrant in entrants:
        _measure(out / "critics" / entrant.folder, bench, entrant, load, dtype, asked)
    write_quarantine(out / "quarantine.jsonl", bench.quarantined)
    found = dict(_all_measured(out, bench))
    page = markdown(bench, found)
    _write(out / "bench.json", _text(report(bench, found)))
    _write(out / "bench.md", page)
    return page


def _measure(folder: Path, bench: Bench, entrant: Entrant, load: Callable, dtype: str, asked: dict) -> None:
    """One critic's answers, and what they come to. asked: what all critics are asked alike."""
    if entrant.backend == LOCAL:
        asked = asked | _local(entrant, bench, dtype)
        records = _answers(folder, bench, asked, lambda: load(entrant), entrant.name)
    else:
        asked = asked | _remote(entrant)
        if _is_complete(folder / "measured.json", asked):
            return  # its server need not be there any more
        critic = _connected(entrant)
        try:
            asked["critic"] = json.loads(json.dumps(critic.identity))
            records = _answers(folder, bench, asked, lambda: critic, entrant.name)
        finally:
            critic.close()
    found = {"critic": entrant.name, "model": entrant.model, "data": bench.sha256, "asked": asked}
    _write(folder / "measured.json", _text(found | measured(bench, *records)))


def _local(entrant: Entrant, bench: Bench, dtype: str) -> dict:
    """What decides the answers of a critic in this process, beside the questions."""
    model = resolve(entrant.model)
    rubrics = served_rubrics(model, entrant.rubrics)
    shown = {name: rubric_of(rubrics, RUBRICS[name]).sha256 for name in CRITERIA[bench.task]}
    return {"critic": identity(model), "dtype": dtype, "rubrics": shown}


def _remote(entrant: Entrant) -> dict:
    """The same of one on a server, which says itself who it is."""
    given = entrant.rubrics and {name: one.sha256 for name, one in rubrics_from(entrant.rubrics).items()}
    return {"backend": entrant.backend, "model": entrant.model, "rubrics": given}


def _connected(entrant: Entrant):
    try:
        from firm_jax.critic.remote import RemoteCritic
    except ImportError as error:
        raise ConfigError(f"{entrant.name}: the backend {entrant.backend} is not installed: {error}") from error
    return RemoteCritic(entrant.endpoints, protocol=entrant.backend, model=entrant.model, rubrics=entrant.rubrics)


def _is_complete(file: Path, asked: dict) -> bool:
    """Whether a critic was measured with the same questions and answered all of them."""
    if not file.exists():
        return False
    found = json.loads(file.read_text())
    return found["unanswered"] == 0 and asked.items() <= found["asked"].items()


def _answers(folder: Path, bench: Bench, asked: dict, critic: Callable, name: str) -> list[list[dict]]:
    """The records of `questions` and of `reordered`, in their order; `critic()` is asked for those that are missing."""
    size, loaded, found = asked["batch_size"], None, []
    passes = {"judgements": (questions(bench), size), "reordered": (reordered(bench), max(1, size // 2 - 1))}
    for part, (every, together) in passes.items():
        with Results(folder / f"{part}.jsonl", asked | {"together": together}) as results:
            batches = _missing(results, every, together)
            bar = tqdm(batches, f"{name}, {part}", unit="batch", disable=not sys.stderr.isatty())
            for numbers in bar:
                loaded = loaded or critic()
                results.append(ask(loaded, every, numbers, asked["max_new_tokens"]), [])
            last = {record["item"]: record for record in results.judgements()}
            found.append([last[number] for number in range(len(every))])
    return found


def _missing(results: Results, every: Sequence[Asked], together: int) -> list[Sequence[int]]:
    """The numbers of the questions that have no answer, in batches: those that were not heard before, then the rest."""
    done = results.resume(every, 1)
    last = {record["item"]: record["status"] for record in results.judgements()}
    again = [number for number in range(done) if last[number] in UNANSWERED]
    parts = again, range(done, len(every))
    return [part[first : first + together] for part in parts for first in range(0, len(part), together)]


def _all_measured(out: Path, bench: Bench) -> Iterator[tuple[str, dict]]:
    """Every critic of the folder that was measured on this benchmark."""
    for file in sorted(out.glob("critics/*/measured.json")):
        one = json.loads(file.read_text())
        if one["data"] == bench.sha256:
            yield one["critic"], one


def _text(found: dict) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def _write(file: Path, text: str) -> None:
    try:
        storage.replace(file, text)
    except OSError as error:
        raise WorkdirError(f"cannot write {file}: {error}. Free some space there.") from error
