"""The job: records, teachers and a budget in; selected examples, what was set aside and a report out.

Everything that teachers have answered is in the folder's ledger, so a run that was stopped, killed or out of budget
goes on with the same command and pays for nothing twice. The files of examples appear whole, at the end.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from firm_jax import storage
from firm_jax.critic.endpoints import Policy
from firm_jax.critic.rubric import FOLDER, rubrics_from
from firm_jax.curation import miniature, mismatch, outputs
from firm_jax.curation.engine import StopAsked
from firm_jax.curation.engines import ENGINES, RAY, engines, ray_engine
from firm_jax.curation.ledger import Budget, Ledger, Totals
from firm_jax.curation.oracle_teacher import Eye, OracleTeacher
from firm_jax.curation.recipes import Recipe, recipe_of
from firm_jax.curation.records import Source, read_records
from firm_jax.curation.report import write_report
from firm_jax.curation.selection import Rules, benchmark_of, look_at, selected
from firm_jax.curation.stage import Example, Outcome, Record
from firm_jax.curation.teacher import Teacher, TeacherSettings
from firm_jax.data.conversation_files import parquet_modules
from firm_jax.embedded import embedded_path
from firm_jax.errors import BudgetError, ConfigError, DataError
from firm_jax.metrics import MetricWriter
from firm_jax.run import Stopped
from firm_jax.signals import StopSignals
from firm_jax.workdir import WorkdirLock, contradictions, plain_config, prepare_workdir

LEDGER = "calls.sqlite"
HOW = ("exchange", "rewrite")
ORACLE = "oracle"
BACKENDS = ("openai", ORACLE)
# What decides neither what is asked nor of whom: free to change when a curation goes on.
MAY_CHANGE = (
    "engine",
    "ray",
    "budget",
    "requests",
    "selection",
    "output",
    "log_every",
    "records.max_bad_fraction",
    *(
        f"teachers.{role}.{name}"
        for role in ("planner", "describer", "judge")
        for name in ("endpoints", "key_variable", "price_in", "price_out", "requests_per_minute", "tokens_per_minute")
    ),
)


def curate(config, workdir: str | Path) -> None:
    """Run the curation that a config describes in a folder. Raises Stopped when it was asked to stop.

    BudgetError comes when the budget does not reach: the files then hold what the records up to there came to.
    """
    workdir = prepare_workdir(workdir)
    with contextlib.ExitStack() as stack:
        lock = WorkdirLock(workdir)
        lock.acquire()
        stack.callback(lock.release)
        _keep_config(workdir, config)
        _Curation(config, workdir, stack).run()


def _keep_config(workdir: Path, config) -> None:
    """Write config.json; ConfigError where the folder's ledger belongs to another curation."""
    file, plain = workdir / "config.json", plain_config(config)
    saved = json.loads(file.read_text()) if file.is_file() and (workdir / LEDGER).exists() else plain
    if differing := contradictions(saved, plain, MAY_CHANGE):
        listed = "\n  ".join(differing)
        raise ConfigError(
            f"the config is another than that of the curation in {workdir} (there -> now):\n  {listed}\n"
            "Start with the values in its config.json, or choose another --workdir."
        )
    with storage.writing(file):
        storage.replace(file, json.dumps(plain, indent=2))


@dataclasses.dataclass
class Collected:
    """What the records came to. shown: of some examples, by id, what only the teacher was shown, by stage."""

    records: int = 0
    examples: list[Example] = dataclasses.field(default_factory=list)
    missing: list[dict] = dataclasses.field(default_factory=list)
    counts: Counter = dataclasses.field(default_factory=Counter)  # of the missing, by (stage, status)
    answered: Counter = dataclasses.field(default_factory=Counter)  # by stage
    shown: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def note(self, outcome: Outcome) -> None:
        """Count what an outcome has and lacks."""
        self.answered.update(outcome.answers.keys())
        for stage, one in outcome.missing.items():
            self.counts[stage, one.status] += 1
            line = {"record": outcome.record.id, "stage": stage, "status": one.status, "reason": one.reason}
            self.missing.append(line)


class _Curation:
    def __init__(self, config, workdir: Path, stack: contextlib.ExitStack):
        self.config, self.workdir, self._stack = config, workdir, stack
        rubrics = rubrics_from(embedded_path(config.rubrics or "") or config.rubrics or FOLDER)
        self.recipe: Recipe = recipe_of(config.task, config.recipe, rubrics)
        self.asks = list(self.recipe.teachers)
        self._check()
        self.collected = Collected()
        self._stop_asking: Callable[[], None] = lambda: None
        self.signals = stack.enter_context(StopSignals(lambda: self._stop_asking()))

    def _check(self) -> None:
        config = self.config
        if not 0 <= config.mismatch.share <= 1 or config.mismatch.how not in HOW:
            raise ConfigError(f"mismatch.share must be from 0 to 1 and mismatch.how one of {', '.join(HOW)}")
        if config.mismatch.share and config.mismatch.how == "rewrite" and "planner" not in self.asks:
            self.asks.append("planner")
        if not 0 <= config.output.held_out < 1:
            raise ConfigError(f"output.held_out is {config.output.held_out}; give a share from 0 to below 1")
        formats = config.output.formats
        if not formats or not set(formats) <= outputs.FORMATS.keys():
            raise ConfigError(f"output.formats is {tuple(formats)}; give one or more of {', '.join(outputs.FORMATS)}")
        if "parquet" in formats:
            parquet_modules()  # before anything is asked, not after
        if config.engine not in ENGINES:
            raise ConfigError(f"engine is {config.engine!r}; it is {' or '.join(ENGINES)}")
        if config.ray.workers < 1:
            raise ConfigError(f"ray.workers is {config.ray.workers}; give 1 or more")
        if config.engine == RAY:
            ray_engine()
        if config.teachers.backend not in BACKENDS:
            raise ConfigError(f"teachers.backend is {config.teachers.backend!r}; it is {' or '.join(BACKENDS)}")
        if config.teachers.backend == ORACLE and config.records.source != miniature.SOURCE:
            raise ConfigError(
                f"teachers.backend {ORACLE!r} knows the records of records.source={miniature.SOURCE!r} alone"
            )
        if config.log_every < 1:
            raise ConfigError(f"log_every is {config.log_every}; give 1 or more")
        prices = [config.teachers[role][name] for role in self.asks for name in ("price_in", "price_out")]
        if config.budget.money is not None and not any(prices):
            raise ConfigError("budget.money is set, and all prices are 0: set teachers.*.price_in and price_out")

    def run(self) -> None:
        """Ask, select, write."""
        config = self.config
        rules = Rules(
            config.selection.near_levels,
            benchmark_of(
                config.selection.benchmarks,
                config.task,
                config.selection.benchmark_fields,
                config.selection.near_levels,
            ),
            config.selection.contradictions,
            config.selection.per_score,
            config.seed,
        )
        source, budget = self._source(), Budget(**config.budget.to_dict())
        metrics = MetricWriter(self.workdir)
        self._stack.callback(metrics.close)
        metrics.rewind(0, -1)  # every start goes through all records again, if mostly in the ledger
        out_of_budget = None
        try:
            asyncio.run(self._ask(source, budget, metrics))
        except BudgetError as error:
            out_of_budget = error
        except StopAsked:
            self._stop()
        with contextlib.closing(Ledger(self.workdir / LEDGER, budget)) as ledger:
            self._finish(source, rules, ledger, metrics, out_of_budget)
        if out_of_budget:
            raise out_of_budget

    def _source(self) -> Source:
        config = self.config
        file = Path(config.records.source)
        if config.records.source == miniature.SOURCE:
            drawn = config.shapes
            file = miniature.draw_records(
                self.workdir / "records", config.task, drawn.count, config.seed, drawn.faults.to_dict()
            )
            self._list = file
        source = read_records(file, config.task, config.records.max_bad_fraction, self.workdir / "records")
        for record in source.records:
            if record.requirement:  # one tells whether the rubrics have a place for it
                for rubric in self.recipe.rubrics:
                    rubric.fill(record.prompt, record.requirement)
                break
        return source

    def _makers(self) -> dict[str, Callable[[], Any]]:
        """By role what makes its teacher; roles with the same settings share one, with its limits."""
        config, known, found = self.config, {}, {}
        for role in self.asks:
            given = config.teachers[role].to_dict()
            if config.teachers.backend == ORACLE:
                given["endpoints"] = (ORACLE,)
            if not given["endpoints"]:
                raise ConfigError(
                    f"teachers.{role}.endpoints is empty: give the base URLs of servers of {given['model']}, as in "
                    f"--config.teachers.{role}.endpoints=\"('http://localhost:8000/v1',)\""
                )
            settings = TeacherSettings(**given | {"endpoints": tuple(given["endpoints"])})
            if settings not in known:
                known[settings] = self._maker(settings)
            found[role] = known[settings]
        return found

    def _maker(self, settings: TeacherSettings) -> Callable[[], Any]:
        config = self.config
        if config.teachers.backend == ORACLE:
            eye = Eye(config.shapes.miss, config.shapes.skip, config.seed)
            return functools.partial(OracleTeacher, settings, miniature.asked_of(self._list, config.task), eye)
        return functools.partial(Teacher, settings, Policy(**config.requests.to_dict()))

    async def _ask(self, source: Source, budget: Budget, metrics: MetricWriter) -> None:
        """Every stage of every record, with the mismatched ones after the others."""
        config = self.config
        running = engines(
            config.engine, self._makers(), self.workdir / LEDGER, source.folder,
            budget=budget, concurrency=config.requests.concurrency, workers=config.ray.workers,
        )  # fmt: skip
        try:
            async with running as engine_of:
                records = [*source.records, *await self._mismatched(source.records, engine_of)]
                engine, begun, seen = self._stoppable(engine_of(self.recipe.stages)), time.monotonic(), 0
                with _bar(records, "records") as bar:
                    async with contextlib.aclosing(engine.run(records)) as outcomes:
                        async for outcome in outcomes:
                            self._take(outcome)
                            seen += 1
                            bar.update()
                            if seen % config.log_every == 0 or seen == len(records):
                                self._log(metrics, await engine.totals(), seen / (time.monotonic() - begun))
        finally:
            self._stop_asking = lambda: None

    def _stoppable(self, engine):
        """The engine, which a signal stops from now on."""
        loop = asyncio.get_running_loop()
        self._stop_asking = lambda: loop.call_soon_threadsafe(engine.stop)  # a handler may have interrupted anything
        if self.signals.seen:
            engine.stop()
        return engine

    async def _mismatched(self, records: tuple[Record, ...], engine_of: Callable[..., Any]) -> list[Record]:
        how = self.config.mismatch
        exchanged = mismatch.exchange_instructions(records, how.share, self.config.seed)
        if how.how == "exchange" or not exchanged:
            return exchanged
        by_id = {record.id: record for record in records}
        chosen = [by_id[one.id.removesuffix("/exchanged")] for one in exchanged]  # the same draw, rewritten instead
        made = []
        with _bar(chosen, "rewritten") as bar:
            stage = mismatch.rewrite_stage(self.config.task == "edit")
            engine = self._stoppable(engine_of((stage,)))
            async with contextlib.aclosing(engine.run(chosen)) as outcomes:
                async for outcome in outcomes:
                    self.collected.note(outcome)
                    bar.update()
                    if record := mismatch.rewritten(outcome):
                        made.append(record)
        return made

    def _take(self, outcome: Outcome) -> None:
        collected = self.collected
        collected.records += 1
        collected.note(outcome)
        for one in self.recipe.examples(outcome):
            collected.examples.append(one)
            if outputs.may_be_shown(one, self.config.seed):
                collected.shown[one.id] = {name: outcome.answers[name] for name in self.recipe.privileged}

    def _log(self, metrics: MetricWriter, totals: Totals, pace: float) -> None:
        collected = self.collected
        values = {
            "curation/records": collected.records,
            "curation/examples": len(collected.examples),
            "curation/missing": len(collected.missing),
            "cost/money": totals.money,
            "cost/tokens": totals.tokens,
            "cost/calls": totals.done,
            "cost/lost": totals.lost,
            "throughput/records_per_s": pace,
        }
        metrics.write(collected.records, 1, values)
        tqdm.write(
            f"{collected.records} records  {len(collected.examples)} examples  {len(collected.missing)} missing  "
            f"cost {totals.money:.4g}, {totals.tokens} tokens",
            file=sys.stderr,
        )

    def _stop(self) -> None:
        raise Stopped(
            f"stopped on request; what was answered is kept in {self.workdir / LEDGER}, and the same command goes on"
        )

    def _finish(
        self, source: Source, rules: Rules, ledger: Ledger, metrics: MetricWriter, out_of_budget: BudgetError | None
    ) -> None:
        """Select, write the examples, what was set aside, and the report."""
        collected, config = self.collected, self.config
        looks = look_at(collected.examples, source.folder)
        kept, rejected = selected(collected.examples, looks, rules)
        if self.signals.seen:
            self._stop()
        outputs.write_quarantine(self.workdir, source.quarantined, collected.missing, rejected)
        written = outputs.write_examples(self.workdir, kept, looks, source.folder, config) if kept else {}
        truth = miniature.Truth(self._list, config.task) if config.records.source == miniature.SOURCE else None
        report = write_report(
            self.workdir, config, source, collected, kept, rejected, written, ledger, truth, self.recipe, out_of_budget
        )
        metrics.write(collected.records, 1, report["metrics"])
        tqdm.write(f"{len(kept)} examples kept, {len(rejected)} rejected: {self.workdir / 'report.html'}", sys.stderr)
        if not kept and out_of_budget is None:
            raise DataError(
                f"no example is left of {collected.records} records: {len(collected.missing)} answers are missing and "
                f"{len(rejected)} examples were rejected. quarantine.jsonl in {self.workdir} says why."
            )


def _bar(records, name: str) -> tqdm:
    return tqdm(total=len(records), desc=name, unit="record", disable=not sys.stderr.isatty())
