"""Measure critics against people on FIRM-Bench, several in one table, and probe how they can be fooled.

The data is a folder of FIRM-Bench, with bench_v1.jsonl and result/human_bench_v1.jsonl; by default the miniature that
ships with the package. The answers of each critic are kept in DIR/critics, and the same command started again goes on
where it was stopped. Every critic that was measured on the same data with the same --out is in the table, bench.md and
bench.json; what could not be used is in quarantine.jsonl.
"""

import argparse
from pathlib import Path

from firm_jax.commands.critics import add_critic_arguments, given_dtype, load_critic, positive
from firm_jax.critic.bench.compare import BACKENDS, LOCAL, Entrant, compare
from firm_jax.critic.bench.records import CRITERIA, MAX_BAD_FRACTION, Fields, fields_from, read_bench


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
        "--max-bad-fraction",
        type=float,
        default=MAX_BAD_FRACTION,
        metavar="F",
        help="of the records, that may be unusable (%(default)s)",
    )
    parser.add_argument("--backend", choices=BACKENDS, default=LOCAL, help="firm, openai: on the servers of --endpoint")
    parser.add_argument("--endpoint", action="append", default=[], metavar="URL", help="of a server; may be repeated")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where answers and tables go")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="answers at once (%(default)s)")


def run(arguments) -> int:
    """Ask every critic what it was not asked yet, then write and print the table."""
    data = arguments.data or f"embedded:bench_{arguments.task}"
    bench = read_bench(data, arguments.task, fields_from(arguments.fields), arguments.max_bad_fraction)
    default = f"embedded:critic_{arguments.task}" if arguments.backend == LOCAL else None
    endpoints = tuple(arguments.endpoint)
    entrants = [
        Entrant(model or ", ".join(endpoints) or "the critic", model, arguments.backend, endpoints, arguments.rubrics)
        for model in arguments.critic or [default]
    ]

    def load(entrant: Entrant):
        chosen = argparse.Namespace(**vars(arguments) | {"critic": entrant.model})
        return load_critic(chosen, arguments.batch_size)

    page = compare(
        arguments.out,
        bench,
        entrants,
        load,
        dtype=given_dtype(arguments),
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
    )
    print(page, end="")
    return 0
