"""Measure critics against people on FIRM-Bench, several in one table, and probe how they can be fooled.

The data is a folder of FIRM-Bench, with bench_v1.jsonl and result/human_bench_v1.jsonl; by default the miniature that
ships with the package. The answers of each critic are kept in DIR/critics, and the same command started again goes on
where it was stopped. Every critic that was measured on the same data with the same --out is in the table, bench.md and
bench.json; what could not be used is in quarantine.jsonl.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from firm_jax import storage
from firm_jax.commands.critics import add_critic_arguments, given_dtype, load_critic, positive
from firm_jax.commands.score import Results
from firm_jax.critic.bench import paper
from firm_jax.critic.bench.questions import Asked, ask, questions, reordered
from firm_jax.critic.bench.records import CRITERIA, Bench, Fields, fields_from, read_bench
from firm_jax.critic.bench.report import markdown, measured
from firm_jax.critic.rubric import RUBRICS
from firm_jax.critic.score import rubric_of, served_rubrics
from firm_jax.data.records import write_quarantine
from firm_jax.errors import ConfigError, WorkdirError
from firm_jax.interop.hub import identity, resolve

LOCAL = "local"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_critic_arguments(parser, max_new_tokens=512, several=True)
    parser.add_argument(
        "--task", required=True, choices=CRITERIA, help="gen: instruction; edit: execution, consistency"
    )
    parser.add_argument("--data", metavar="DIR", help="a folder of FIRM-Bench; by default the miniature")
    parser.add_argument(
        "--fields",
        action="append",
        default=[],
        metavar="NAME=FIELD",
        help=f"the field of the files that is the NAME ({', '.join(Fields.__dataclass_fields__)}); may be repeated",
    )
    parser.add_argument(
        "--backend", choices=(LOCAL, "firm", "openai"), default=LOCAL, help="firm, openai: on the servers of --endpoint"
    )
    parser.add_argument("--endpoint", action="append", default=[], metavar="URL", help="of a server; may be repeated")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where answers and tables go")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="answers at once (%(default)s)")


def run(arguments) -> int:
    """Ask every critic what it was not asked yet, then write and print the table."""
    if bool(arguments.endpoint) == (arguments.backend == LOCAL):
        raise ConfigError("--endpoint goes with --backend firm or openai, and these need one")
    data = arguments.data or f"embedded:bench_{arguments.task}"
    bench = read_bench(data, arguments.task, fields_from(arguments.fields))
    names = arguments.critic or [f"embedded:critic_{arguments.task}" if arguments.backend == LOCAL else None]
    folders = {_folder(arguments, name): name for name in names}
    if len(folders) < len(names):
        raise ConfigError(f"two of the critics would share a folder of {arguments.out}. Give them another --out.")
    for folder, name in folders.items():
        _measure(arguments, bench, name, folder)
    write_quarantine(arguments.out / "quarantine.jsonl", bench.quarantined)
    found = dict(_measured(arguments.out, bench))
    page = markdown(bench.task, found, len(bench.quarantined))
    report = {
        "task": bench.task,
        "data": bench.sha256,
        "quarantined": len(bench.quarantined),
        "critics": found,
        "paper": {"columns": paper.COLUMNS[bench.task], "mae": paper.TABLES[bench.task]},
    }
    _write(arguments.out / "bench.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _write(arguments.out / "bench.md", page)
    print(page, end="")
    return 0


def _folder(arguments, name: str | None) -> Path:
    shown = name or arguments.endpoint[0]
    return arguments.out / "critics" / (re.sub(r"[^\w.-]+", "-", shown).strip("-.") or "critic")


def _measured(out: Path, bench: Bench) -> Iterator[tuple[str, dict]]:
    """Every critic of the folder that was measured on this benchmark."""
    for file in sorted(out.glob("critics/*/measured.json")):
        one = json.loads(file.read_text())
        if one["data"] == bench.sha256:
            yield one["critic"], one


def _measure(arguments, bench: Bench, name: str | None, folder: Path) -> None:
    """One critic's answers and what they come to, in its folder."""
    critic, asked = None, {"task": bench.task, "data": bench.sha256, "max_new_tokens": arguments.max_new_tokens}
    if arguments.backend == LOCAL:
        model = resolve(name)
        rubrics = served_rubrics(model, arguments.rubrics)
        asked["critic"], asked["dtype"] = identity(model), given_dtype(arguments)
        asked["rubrics"] = {one: rubric_of(rubrics, RUBRICS[one]).sha256 for one in CRITERIA[bench.task]}
    else:
        critic = _remote(arguments, name)
        asked["critic"] = json.loads(json.dumps(critic.identity))
    passes = {"judgements": (questions(bench), arguments.batch_size)}
    passes["reordered"] = reordered(bench), max(1, arguments.batch_size // 2 - 1)
    records = {}
    for part, (every, together) in passes.items():
        with Results(folder / f"{part}.jsonl", asked | {"together": together}) as results:
            done = results.resume(every, 1)
            if done < len(every):
                critic = critic or load_critic(
                    argparse.Namespace(**vars(arguments) | {"critic": name}), arguments.batch_size
                )
                _ask(critic, every, done, together, arguments.max_new_tokens, results, f"{name or 'critic'}, {part}")
            records[part] = list(results.judgements())
    found = {"critic": name or arguments.endpoint[0], "data": bench.sha256, "asked": asked}
    found |= measured(bench, records["judgements"], records["reordered"])
    _write(folder / "measured.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def _remote(arguments, name: str | None):
    try:
        from firm_jax.critic.remote import RemoteCritic
    except ImportError as error:
        raise ConfigError(f"--backend {arguments.backend} needs `pip install firm_jax[remote]`: {error}") from error
    return RemoteCritic(arguments.endpoint, protocol=arguments.backend, model=name, rubrics=arguments.rubrics)


def _ask(
    critic, every: list[Asked], done: int, together: int, max_new_tokens: int, results: Results, words: str
) -> None:
    bar = tqdm(total=len(every), initial=done, desc=words, unit="answer", disable=not sys.stderr.isatty())
    with bar:
        for start in range(done, len(every), together):
            batch = ask(critic, every[start : start + together], max_new_tokens, start)
            results.append(batch, [])
            bar.update(len(batch))


def _write(file: Path, text: str) -> None:
    try:
        storage.replace(file, text)
    except OSError as error:
        raise WorkdirError(f"cannot write {file}: {error}. Free some space there.") from error
